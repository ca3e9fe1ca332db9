"""Pack the pairs of a data set into patches (HDF5), read them, and draw training batches from them.

    python -c "from DerainDataset import patch_positions; print(patch_positions(481, patch_size=100, stride=80))"

train.py packs by itself. Where the pairs come from is in ``layouts.py``, and which of them may be trained on in
``training_sets.py``.
"""
import hashlib
import io
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import cv2
import h5py
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from layouts import report_left_out
from pairs import pair_size, read_pair
from training_sets import PRENET_FILES, TrainingSet
from utils import InputError, ahead, atomic_write, cores, counted, locked, progress, remove_leftovers, reserve

# Packing


PACKED_VERSION = 3


def patch_positions(length, patch_size, stride):
    """Offsets of the patches along one side; the last is flush with the border, so that every pixel is in one."""
    positions = list(range(0, length - patch_size + 1, stride))
    if positions[-1] != length - patch_size:
        positions.append(length - patch_size)
    return positions


def fingerprint(pairs, *options):
    """A digest that changes when a file is added, removed or modified, or the patches would be cut differently.

    Raises:
        InputError: a file is missing, as a link may lead nowhere.
    """
    digest = hashlib.sha256(f"{PACKED_VERSION} {options}".encode())
    for pair in pairs:
        for path in (pair.rainy, pair.clean):
            try:
                status = path.stat()
            except FileNotFoundError:
                raise InputError(f"{path}: no such file; expected an image") from None
            except OSError as error:
                raise InputError(f"{path}: not a readable image ({error.strerror})") from None
            # The second time changes where a file that keeps its own date takes the place of another.
            times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
            digest.update(os.fsencode(f"{path.name} {pair.rainy_half} {status.st_size} {times}\n"))
    return digest.hexdigest()


def packed_path(training_set, packed_dir, patch_size, stride):
    """The packed file of a training set.

    Its name has the start of the folder's, a few digits of the folder's full path, which tell namesakes apart, the
    patches' size and stride, the scale, and a few digits that stand for what is left out of the folder.
    """
    folder = training_set.folder.resolve()
    left_out = hashlib.sha256(os.fsencode("\n".join(sorted(training_set.left_out)))).hexdigest()[:6]
    place = hashlib.sha256(os.fsencode(folder)).hexdigest()[:6]
    scale = "" if training_set.scale == 1 else f"-x{training_set.scale:g}"
    return Path(packed_dir) / f"{folder.name[:40]}-{place}-{patch_size}by{stride}{scale}-{left_out}.h5"


def shrunk_size(size, scale):
    """(height, width) of an image of that ``size`` at a scale, at least one pixel each."""
    return tuple(max(1, round(scale * side)) for side in size)


def plan_cuts(pairs, patch_size, stride, scale=1):
    """Where to cut the patches of each pair, once its images are shrunk to ``scale``.

    Returns:
        ({pair: [(top, left), ...]} of the pairs that are large enough, {pair: (height, width)} of the others).

    Raises:
        InputError: an image is unreadable, or of another size than its partner.
    """
    cuts, small = {}, {}
    for pair in pairs:
        height, width = shrunk_size(pair_size(pair), scale)
        if min(height, width) < patch_size:
            small[pair] = height, width
            continue
        rows, columns = (patch_positions(side, patch_size, stride) for side in (height, width))
        cuts[pair] = [(top, left) for top in rows for left in columns]
    return cuts, small


def cut_patches(pair, positions, patch_size, scale=1):
    """Read a pair, shrink it to ``scale`` and cut it.

    Returns:
        (rainy patches, clean patches, digest of the whole images); patches are (N, P, P, 3) uint8.
    """
    images = read_pair(pair)
    if scale != 1:
        height, width = shrunk_size(images[0].shape[:2], scale)
        images = [cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA) for image in images]
    patches = [
        np.stack([image[top : top + patch_size, left : left + patch_size] for top, left in positions])
        for image in images
    ]
    digest = hashlib.sha256(repr(images[0].shape).encode())
    for image in images:
        digest.update(np.ascontiguousarray(image))
    return *patches, digest.digest()


def packed_size(cuts, patch_size):
    """About how many bytes of disk the packed file of ``plan_cuts`` takes, and no less than it does."""
    patches = sum(map(len, cuts.values()))
    names = sum(len(os.fsencode(pair.rainy.name)) for pair in cuts)
    return patches * (2 * (patch_size**2 * 3 + 64) + 12) + len(cuts) * 64 + names + 2**16


def check_disk(path, size):
    """Refuse to begin a file of ``size`` bytes for which there is no room."""
    place = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < size:
        raise InputError(
            f"--packed_dir {path.parent}: {path.name} takes {size / 1e6:.1f} MB and {free / 1e6:.1f} MB are free;"
            " expected room for it, or a folder on another disk"
        )


def create_hdf5(path, size):
    """A new h5py file that has ``size`` bytes of disk: HDF5 crashes where the disk fills up under it."""
    empty, version = io.BytesIO(), "v110"  # the first whose structures all have checksums
    h5py.File(empty, "w", libver=version).close()
    with open(path, "wb") as file:
        file.write(empty.getvalue())
        reserve(file, size)
    return h5py.File(path, "r+", libver=version)  # closing it gives back what was not needed


def pack(cuts, path, patch_size, digest="", scale=1):
    """Cut pairs into patches and write them to one HDF5 file, complete or not at all, in bounded memory.

    Where another process is packing the same file, it is waited for, and what it wrote is kept if it fits.
    The file holds ``rainy`` and ``clean``, both (patches, patch_size, patch_size, 3) uint8 RGB,
    ``origin`` (patches, 3), the pair and the row and column a patch was cut at, and ``names``.

    Args:
        cuts: {pair: positions}, from ``plan_cuts``.
        path: of the file to write.
        patch_size: side of the patches, px.
        digest: ``fingerprint``, kept in the file to tell whether it is up to date.
        scale: that the images are shrunk to.

    Raises:
        InputError: an image is unreadable, or the disk has too little room.
        RunError: the file cannot be written.
    """
    total, size = sum(map(len, cuts.values())), packed_size(cuts, patch_size)
    origin = [(number, *position) for number, positions in enumerate(cuts.values()) for position in positions]
    names = np.array([os.fsencode(pair.rainy.name) for pair in cuts])
    content = hashlib.sha256(repr(origin).encode())
    with locked(path.with_suffix(".lock")) as waited:
        remove_leftovers(path.parent, path.name)
        if waited and path.exists() and PackedPatches(path).fingerprint == digest:
            return
        check_disk(path, size)
        with atomic_write(path) as temporary, create_hdf5(temporary, size) as file:
            shape = (total, patch_size, patch_size, 3)
            arrays = [
                file.create_dataset(name, shape, np.uint8, chunks=(1, *shape[1:]), fletcher32=True)  # notices damage
                for name in ("rainy", "clean")
            ]
            file.create_dataset("origin", data=np.array(origin, np.int32), fletcher32=True)
            file.create_dataset("names", data=names, fletcher32=True)
            file.attrs["fingerprint"] = np.bytes_(digest)  # of fixed length: HDF5 can hang on a damaged other
            start = 0
            results = ahead(lambda cut: cut_patches(*cut, patch_size, scale), cuts.items(), cores())
            for *patches, image_digest in progress(results, f"packing {path.name}", total=len(cuts)):
                stop = start + len(patches[0])
                for array, part in zip(arrays, patches):
                    array[start:stop] = part
                content.update(image_digest)
                start = stop
            file.attrs["content"] = np.bytes_(content.hexdigest())


def open_patches(training_set, packed_dir, patch_size, stride, preprocess=False, skip_small=False):
    """The patches of one training set; all as for ``open_sets``."""
    return open_sets([training_set], packed_dir, patch_size, stride, preprocess, skip_small)[0]


def open_sets(training_sets, packed_dir, patch_size, stride, preprocess=False, skip_small=False):
    """Open the patches of training sets, packing the images first where that has not been done yet.

    Args:
        training_sets: ``TrainingSet``s.
        packed_dir: folder of the packed files.
        patch_size, stride: side of the patches and the distance between them, px.
        preprocess: pack anew even if an up-to-date packed file exists.
        skip_small: leave out images that are smaller than a patch; otherwise they are an error, which names those of
            all sets.

    Returns:
        For each of them ``PackedPatches``, or ``PReNetPatches`` of a folder that has those. For clean photographs, the
        rainy patches are the clean ones.

    Raises:
        InputError: an image is unreadable or too small, the disk has too little room, or PReNet's patches are of
            another size.
    """
    # 1. Look at all images before any are packed, which takes long
    plans, too_small = {}, []
    for training_set in training_sets:
        path = packed_path(training_set, packed_dir, patch_size, stride)
        if not training_set.pairs or path in plans:
            continue
        scale = (training_set.scale,) if training_set.scale != 1 else ()
        digest = fingerprint(training_set.pairs, patch_size, stride, skip_small, *scale)
        if reason := reason_to_pack(path, digest, preprocess):
            cuts, small = plan_cuts(training_set.pairs, patch_size, stride, training_set.scale)
            plans[path] = cuts, digest, reason
            too_small += [f"{pair.rainy} ({width}x{height})" for pair, (height, width) in small.items()]
    if too_small and not skip_small:
        names = ", ".join(too_small)
        raise InputError(f"smaller than --patch_size {patch_size}: {names}; --skip_small leaves such images out")

    # 2. Pack and open
    sources = []
    for training_set in training_sets:
        if not training_set.pairs:
            sources.append(open_prenet(training_set, patch_size))
            continue
        path = packed_path(training_set, packed_dir, patch_size, stride)
        if path in plans:
            pack_set(training_set, path, patch_size, *plans.pop(path))
        patches = PackedPatches(path, training_set)
        packed = set(patches.names)
        small = [pair.rainy for pair in training_set.pairs if pair.rainy.name not in packed]
        report_left_out(training_set.folder, small, f"smaller than {patch_size} px")
        sources.append(patches)
    return sources


def reason_to_pack(path, digest, preprocess):
    """Why the images whose ``fingerprint`` is ``digest`` are to be packed into a file; None where that is done."""
    if preprocess:
        return "--preprocess"
    if not path.exists():
        return "no packed file yet"
    return None if PackedPatches(path).fingerprint == digest else "the folder has changed"


def pack_set(training_set, path, patch_size, cuts, digest, reason):
    """``pack`` the ``cuts`` of a ``TrainingSet``, and say why."""
    if not cuts:
        raise InputError(f"--data_path {training_set.folder}: no image is as large as --patch_size {patch_size}")
    size = f"{packed_size(cuts, patch_size) / 1e6:.1f} MB"
    number = counted(len(cuts), "image" if training_set.clean_only else "pair")
    print(f"{training_set.folder}: packing {number} into {path}, {size} ({reason})", flush=True)
    pack(cuts, path, patch_size, digest, training_set.scale)


def open_prenet(training_set, patch_size):
    """The ``PReNetPatches`` of a folder, which must have this size."""
    patches = PReNetPatches(training_set)
    if patches.patch_size != patch_size:
        raise InputError(
            f"--patch_size {patch_size}: the patches of {patches.paths[0]} have {patches.patch_size} px; expected"
            f" --patch_size {patches.patch_size}, or --preprocess, which packs the images of the folder instead"
        )
    return patches


# Reading patches


class HDF5Patches:
    """Base of the two readers: HDF5 files that each process opens for itself, once, when it first reads.

    A handle must not cross a fork or a spawn, so it belongs to the process that opened it.

    Args:
        paths: of the files.
        training_set: the ``TrainingSet`` they were packed from, which says whether the patches have no rain, the
            clean ones standing in for the rainy ones, and how many times they count in an epoch.
    """

    def __init__(self, paths, training_set):
        self.paths, self._handles = paths, {}
        self.folder, self.clean_only, self.count = training_set.folder, training_set.clean_only, training_set.count

    def __getstate__(self):
        return {**self.__dict__, "_handles": {}}

    @contextmanager
    def reading(self, path):
        """Turn what HDF5 says of a damaged file, in whatever exception, into an ``InputError`` that names the file."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: cut short, damaged or no file of patches ({reason}); {self.REMEDY}") from None

    def handles(self):
        """The open files of this process, one for each path."""
        pid = os.getpid()
        if pid not in self._handles:
            files = []
            for path in self.paths:
                with self.reading(path):
                    files.append(h5py.File(path, "r"))
            self.check_opened(files)
            self._handles = {pid: files}
        return self._handles[pid]

    def check_opened(self, files):
        """Called with the files that a process has just opened; may refuse them."""

    def summary(self):
        """What tells these data from others: folder, how many times it counts, patches, their size and content."""
        return {
            "folder": str(self.folder), "count": self.count, "patches": len(self), "size": self.patch_size,
            "content": self.content,
        }


def checked_array(file, name, shape=None, kinds="u"):
    """An array of an HDF5 file, whose values must lie in that file.

    Args:
        file: the open file.
        name: of the array.
        shape: what it must be; None takes any.
        kinds: of NumPy's types, those expected.

    Raises:
        KeyError, ValueError: none of this name, or another one than expected.
    """
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"no {name} in it")
    data = file[name]
    if not isinstance(data, h5py.Dataset) or data.dtype.kind not in kinds or shape not in (None, data.shape):
        raise ValueError(f"unexpected {name}")
    if data.is_virtual or data.external or data.nbytes > os.path.getsize(file.filename):
        raise ValueError(f"{name} is larger than the file")
    return data


def read_text_attribute(file, name):
    """A text that ``pack`` kept in the file; None where another version of it wrote something else."""
    if name not in file.attrs or file.attrs.get_id(name).dtype.kind != "S":
        return None
    return file.attrs[name].decode()


class PackedPatches(HDF5Patches):
    """The patches of a file that ``pack`` wrote; item k is a pair of (P, P, 3) uint8 RGB arrays.

    ``content`` is a digest of the images they were cut from: it stays the same where the same data are packed again,
    on another machine too.
    """

    REMEDY = "delete it and pack again"

    def __init__(self, path, training_set=None):
        path = Path(path)
        super().__init__([path], training_set or TrainingSet(path))
        with self.reading(path), h5py.File(path, "r") as file:
            self.fingerprint, self.content = (read_text_attribute(file, name) for name in ("fingerprint", "content"))
            rainy = checked_array(file, "rainy")
            checked_array(file, "clean", rainy.shape)
            self.length, self.patch_size = rainy.shape[:2]
            if rainy.shape != (self.length, self.patch_size, self.patch_size, 3):
                raise ValueError("unexpected rainy")
            if self.fingerprint is None or self.content is None:
                return  # packed by another version; it is about to be packed anew
            self.origin = checked_array(file, "origin", (self.length, 3), "i")[:]
            self.names = [os.fsdecode(name) for name in checked_array(file, "names", kinds="S")[:]]
            if not 0 <= self.origin[:, 0].min() <= self.origin[:, 0].max() < len(self.names):
                raise ValueError("unexpected origin")

    def __len__(self):
        return self.length

    def check_opened(self, files):
        """Refuse a file that another run has replaced since ``__init__``."""
        if read_text_attribute(files[0], "fingerprint") != self.fingerprint:
            raise InputError(f"{self.paths[0]}: packed anew by another run; expected another --packed_dir for each")

    def __getitem__(self, index):
        with self.reading(self.paths[0]):
            (file,) = self.handles()
            return file["rainy"][index], file["clean"][index]

    def describe(self, index):
        """Which image and position a patch was cut from."""
        number, top, left = self.origin[index]
        return f"{self.names[number]} at row {top}, column {left}"

    def summary(self):
        """The base's, and the number of images."""
        return {**super().summary(), "images": len(self.names)}


class PReNetPatches(HDF5Patches):
    """PReNet's pair of files: a (3, P, P) float32 array in [0, 1] a patch, keys "0", "1", ..."""

    REMEDY = 'expected (3, P, P) data sets with the keys "0", "1", ...'

    def __init__(self, training_set):
        super().__init__([training_set.folder / name for name in PRENET_FILES], training_set)
        lengths, self.shape = [], None
        digest = hashlib.sha256(" ".join(str(path.stat().st_size) for path in self.paths).encode())
        for path in self.paths:
            with self.reading(path), h5py.File(path, "r") as file:
                lengths.append(len(file))
                side = checked_array(file, "0", self.shape, "f").shape[-1]
                self.shape = (3, side, side)
                # Some patches, the first and the last among them: all would take minutes.
                for index in sorted({*np.linspace(0, lengths[-1] - 1, 50).astype(int).tolist()}):
                    digest.update(np.ascontiguousarray(checked_array(file, str(index), self.shape, "f")[()]))
        if lengths[0] != lengths[1]:
            number = counted(lengths[0], "patch")
            raise InputError(f"{self.paths[0]} has {number} but {self.paths[1].name} has {lengths[1]}")
        self.length, self.patch_size = lengths[0], self.shape[1]
        self.content = digest.hexdigest()

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        images = []
        for path, file in zip(self.paths, self.handles()):
            with self.reading(path):
                images.append(checked_array(file, str(index), self.shape, "f")[()].transpose(1, 2, 0))
        return tuple(images)

    def describe(self, index):
        """Which patch it is."""
        return f"{self.paths[0].parent.name} patch {index}"


class TrainingPatches(Dataset):
    """Patches of several sources as tensors, augmented reproducibly.

    Items are requested by (epoch, index) and depend on nothing else but ``seed``, so that neither the number
    of workers nor a resumed run changes what the network sees.

    Args:
        sources: ``PackedPatches`` or ``PReNetPatches``, all with patches of one size.
        augment: mirror half of the patches. Rain falls, so they are not turned.
        seed: of the augmentation and the rain.
        rain: ``rain.TrainingRain``; None leaves each patch its own.

    Raises:
        InputError: the sources have patches of several sizes, or none with the rain that ``rain`` is to mix.
    """

    def __init__(self, sources, augment=True, seed=0, rain=None):
        self.sources, self.augment, self.seed, self.rain = sources, augment, seed, rain
        lengths = [len(source) * source.count for source in sources]
        self.starts = np.cumsum([0] + lengths)
        sizes = {source.patch_size: source.paths[0] for source in sources}
        if len(sizes) > 1:
            found = ", ".join(f"{size} px in {path}" for size, path in sizes.items())
            raise InputError(f"--data_path: expected patches of one size, found {found}")
        if rain and rain.mix:
            self.donors = np.flatnonzero(np.repeat([not source.clean_only for source in sources], lengths))
            if not len(self.donors):
                raise InputError("--rain_mix: expected a --data_path with rainy/clean pairs, to take their rain")
            for index in self.donors[:: -(-len(self.donors) // 100)]:  # enough to notice a set stored as JPEG
                rain.check_donor(*self.read(index), self.describe(index))

    def __len__(self):
        return int(self.starts[-1])

    def locate(self, index):
        """(source, index within it) of a patch."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        source = self.sources[number]
        return source, (index - int(self.starts[number])) % len(source)

    def describe(self, index):
        """Which image and position a patch was cut from, for error messages."""
        source, inner = self.locate(index)
        return source.describe(inner)

    def read(self, index):
        """(rainy, clean) of a patch as it was packed."""
        source, inner = self.locate(index)
        return source[inner]

    def __getitem__(self, key):
        """(rainy, clean, index): two (3, P, P) float32 tensors in [0, 1], and the patch's index."""
        epoch, index = key
        rainy, clean = self.read(index)
        if self.rain:
            # Random numbers of its own: the mirrored patches are the same with new rain and without.
            rng = np.random.default_rng((self.seed, epoch, index, 1))
            clean_only = self.locate(index)[0].clean_only
            rainy = self.rain(rainy, clean, clean_only, lambda: self.read(rng.choice(self.donors)), rng)
        mirror = self.augment and np.random.default_rng((self.seed, epoch, index)).random() < 0.5
        tensors = []
        for image in (rainy, clean):
            image = image[:, ::-1] if mirror else image
            image = np.ascontiguousarray(image.transpose(2, 0, 1))
            scale = 255 if image.dtype == np.uint8 else 1
            tensors.append(torch.from_numpy(image.astype(np.float32) / scale))
        return *tensors, index


class ShuffledBatches(Sampler):
    """Batches of (epoch, index), in an order that depends on the seed and the epoch alone.

    Args:
        length: number of patches.
        batch_size: patches a batch, or as many as there are; the incomplete batch at an epoch's end is left out.
        seed: of the order.
        rank, ranks: with several processes, each gets its share of every batch, as large as that of the others.
    """

    def __init__(self, length, batch_size, seed=0, rank=0, ranks=1):
        self.length, self.batch_size, self.seed = length, min(batch_size, length // ranks * ranks), seed
        self.rank, self.ranks = rank, ranks
        self.epoch = self.sample = 0

    def start(self, epoch, sample=0):
        """Set the epoch to iterate next, and how many of its patches have been seen already."""
        self.epoch, self.sample = epoch, sample

    def __len__(self):
        """Batches of an epoch from its beginning."""
        return self.length // self.batch_size

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        for first in range(self.sample, self.length - self.batch_size + 1, self.batch_size):
            batch = order[first : first + self.batch_size]
            yield [(self.epoch, int(index)) for index in batch[self.rank :: self.ranks]]
