"""Find rainy/clean pairs in the field's folder layouts and pack them into HDF5 patches for training.

    python DerainDataset.py --check datasets/train/RainTrainH datasets/test/Rain100H

lists the training pairs whose clean image is, or nearly is, a background of the test set.
"""
import argparse
import hashlib
import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import h5py
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from utils import (
    IMAGE_SUFFIXES, InputError, atomic_write, find_images, locked, natural_key, open_image, progress, read_rgb,
    remove_leftovers, reserve, run_script,
)


# Finding pairs


class Layout(NamedTuple):
    """Where a data set keeps its images. Folders are relative to the data set's own."""

    rainy_folder: str
    rainy_stem: str  # regular expression; its group identifies the clean image
    clean_folder: str
    clean_stem: str  # template for that group


LAYOUTS = (
    Layout("rainy", r"rain-(\d+)", ".", "norain-{}"),  # Rain100H, Rain100L
    Layout(".", r"rain-(\d+)", ".", "norain-{}"),  # RainTrainH, RainTrainL
    Layout("rainy_image", r"(\d+)_\d+", "ground_truth", "{}"),  # Rain12600, Rain1400
    Layout("input", r"(.+)", "target", "{}"),  # Rain13K and its test sets
    Layout("rain", r"(.+)", "norain", "{}"),  # Rain200H, Rain200L
    Layout(".", r"(.+)_in", ".", "{}_GT"),  # Rain12
)


class Pair(NamedTuple):
    """A rainy image and its clean one, which is None where there is no ground truth."""

    rainy: Path
    clean: Path | None


def list_stems(folder):
    """{stem: path} of the images directly in ``folder``; empty where there is no such folder."""
    if not folder.is_dir():
        return {}
    return {path.stem: path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}


def match_layout(folder, layout):
    """(pairs, names without a partner) of ``folder`` under ``layout``."""
    rainy, clean = list_stems(folder / layout.rainy_folder), list_stems(folder / layout.clean_folder)
    pairs, orphans, used = [], [], set()
    for stem, path in rainy.items():
        match = re.fullmatch(layout.rainy_stem, stem, re.DOTALL)
        if match is None:
            continue
        partner = layout.clean_stem.format(match[1])
        used.add(partner)
        pairs.append(Pair(path, clean.get(partner)))
        if partner not in clean:
            orphans.append(path.name)
    clean_pattern = layout.clean_stem.format(r".+")
    orphans += [
        path.name for stem, path in clean.items() if stem not in used and re.fullmatch(clean_pattern, stem, re.DOTALL)
    ]
    return pairs, orphans


def find_pairs(folder, option="--data_path", ground_truth_required=True):
    """Find the image pairs of a data set from its folder alone (``LAYOUTS``).

    Args:
        folder: the data set's folder, or the folder of its rainy images.
        option: what an error names.
        ground_truth_required: leave out rainy images without a clean one (training); otherwise keep
            them with ``clean`` None, and take any folder of images as real rain.

    Returns:
        (pairs in natural order, file names without a partner).

    Raises:
        InputError: no such folder, or nothing to use in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{option} {folder}: no such folder; expected a folder of rainy and clean images")
    for layout in LAYOUTS:
        roots = [folder]
        if folder.resolve().name == layout.rainy_folder:
            roots.append(folder.resolve().parent)
        for root in roots:
            pairs, orphans = match_layout(root, layout)
            if any(pair.clean for pair in pairs):
                if ground_truth_required:
                    pairs = [pair for pair in pairs if pair.clean]
                return sorted(pairs, key=lambda pair: natural_key(pair.rainy)), sorted(orphans, key=natural_key)
    if ground_truth_required:
        hint = "; clean photographs alone need --rain_synth" if option == "--data_path" else ""
        raise InputError(
            f"{option} {folder}: no rainy/clean pairs; expected for example rain-1.png beside norain-1.png,"
            f" or input/ and target/ with equal names{hint}"
        )
    return [Pair(path, None) for path in find_images(folder, option)], []


def image_size(path):
    """(height, width) after EXIF orientation, from the header alone."""
    with open_image(path) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(0x0112) in (5, 6, 7, 8) else (height, width)


def check_sizes(pair):
    """(height, width) of both images of a pair, or an ``InputError`` that names them."""
    size, clean_size = image_size(pair.rainy), image_size(pair.clean)
    if size != clean_size:
        raise InputError(
            f"{pair.rainy} is {size[1]}x{size[0]} but its clean image {pair.clean.name} is"
            f" {clean_size[1]}x{clean_size[0]}; expected equal sizes"
        )
    return size


def report_orphans(folder, orphans):
    """Say which files have no partner and are left out."""
    if orphans:
        print(f"{folder}: left out {len(orphans)} without a partner: {', '.join(orphans)}")


# Leakage between training and test sets


def thumbnail(path):
    """(256,) zero-mean, unit-length description of a photograph that survives compression and resizing."""
    grey = cv2.cvtColor(read_rgb(path), cv2.COLOR_RGB2GRAY).astype(np.float32)
    small = cv2.resize(grey, (16, 16), interpolation=cv2.INTER_AREA)
    small -= small.mean()
    return small.ravel() / max(np.linalg.norm(small), 1e-6)


def find_leaks(pairs, test_folder, threshold=0.95):
    """Pairs whose clean image shows a test background, also if mirrored or compressed.

    Args:
        pairs: training pairs.
        test_folder: a test set in any layout with ground truth.
        threshold: correlation of 16x16 thumbnails from which two photographs count as the same. Between
            different photographs of BSD it reached 0.90; recompression, resizing or a crop of 5 px left 0.98.

    Returns:
        [(pair, path of the test background)].
    """
    test_pairs, _ = find_pairs(test_folder, "TEST_DIR")
    backgrounds = sorted({pair.clean for pair in test_pairs}, key=natural_key)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        test = np.stack(list(pool.map(thumbnail, backgrounds)))
        leaks = []
        train = pool.map(thumbnail, [pair.clean for pair in pairs])
        for pair, vector in zip(pairs, progress(train, "comparing backgrounds", total=len(pairs))):
            views = np.stack((vector, vector.reshape(16, 16)[:, ::-1].ravel()))
            similarity = (views @ test.T).max(0)
            if similarity.max() >= threshold:
                leaks.append((pair, backgrounds[similarity.argmax()]))
    return leaks


# Packing


PACKED_VERSION = 2


def patch_positions(length, patch_size, stride):
    """Offsets of the patches along one side; the last is flush with the border, so every pixel is in one."""
    positions = list(range(0, length - patch_size + 1, stride))
    if positions[-1] != length - patch_size:
        positions.append(length - patch_size)
    return positions


def fingerprint(pairs, patch_size, stride):
    """Changes when a file is added, removed or modified, or the patches would be cut differently."""
    digest = hashlib.sha256(f"{PACKED_VERSION} {patch_size} {stride}".encode())
    for path in (path for pair in pairs for path in pair):
        status = path.stat()
        digest.update(os.fsencode(f"{path.name} {status.st_size} {status.st_mtime_ns}\n"))
    return digest.hexdigest()


def packed_path(folder, packed_dir):
    """The packed file of a data folder: its name's start, and a few digits of its full path to tell namesakes apart."""
    folder = Path(folder).resolve()
    return Path(packed_dir) / f"{folder.name[:40]}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:6]}.h5"


def create_hdf5(path, size):
    """A new h5py file that has ``size`` bytes of disk: HDF5 crashes where the disk fills up under it."""
    empty, version = io.BytesIO(), "v110"  # the first whose structures all have checksums
    h5py.File(empty, "w", libver=version).close()
    with open(path, "wb") as file:
        file.write(empty.getvalue())
        reserve(file, size)
    return h5py.File(path, "r+", libver=version)  # closing it gives back what was not needed


def pack(pairs, path, patch_size, stride):
    """Cut pairs into patches and write them to one HDF5 file, complete or not at all.

    Where another process is packing the same file, it is waited for, and what it wrote is kept if it fits.
    The file holds ``rainy`` and ``clean``, both (patches, patch_size, patch_size, 3) uint8 RGB,
    ``origin`` (patches, 3), the pair and the row and column a patch was cut at, and ``names``.

    Raises:
        InputError: an image is unreadable, smaller than a patch, or of another size than its partner.
    """
    cuts = []
    for number, pair in enumerate(pairs):
        height, width = check_sizes(pair)
        if min(height, width) < patch_size:
            raise InputError(f"{pair.rainy} is {width}x{height}, smaller than --patch_size {patch_size}")
        cuts.append(
            [
                (number, top, left)
                for top in patch_positions(height, patch_size, stride)
                for left in patch_positions(width, patch_size, stride)
            ]
        )
    total = sum(map(len, cuts))
    shape = (total, patch_size, patch_size, 3)

    def read_patches(job):
        pair, positions = job
        images = read_rgb(pair.rainy), read_rgb(pair.clean)
        return [
            np.stack([image[top : top + patch_size, left : left + patch_size] for _, top, left in positions])
            for image in images
        ]

    names = np.array([os.fsencode(pair.rainy.name) for pair in pairs])
    size = 2 * total * (patch_size**2 * 3 + 64) + 12 * total + names.nbytes + 2**16
    digest = fingerprint(pairs, patch_size, stride)
    with locked(path.with_suffix(".lock")) as waited:
        remove_leftovers(path.parent, path.name)
        if waited and path.exists() and PackedPatches(path).fingerprint == digest:
            return
        with atomic_write(path) as temporary, create_hdf5(temporary, size) as file:
            data_sets = [
                file.create_dataset(name, shape, np.uint8, chunks=(1, *shape[1:]), fletcher32=True)  # notices damage
                for name in ("rainy", "clean")
            ]
            file.create_dataset("origin", data=np.concatenate(cuts).astype(np.int32), fletcher32=True)
            file.create_dataset("names", data=names, fletcher32=True)
            file.attrs["fingerprint"] = np.bytes_(digest)  # of fixed length: HDF5 can hang on a damaged other
            start = 0
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = list(zip(pairs, cuts))
                for patches in progress(pool.map(read_patches, jobs), f"packing {path.name}", total=len(jobs)):
                    stop = start + len(patches[0])
                    for data_set, part in zip(data_sets, patches):
                        data_set[start:stop] = part
                    start = stop


def pick_held_out(pairs, count):
    """``count`` evenly spaced pairs, kept from training for validation; the same for the same pairs."""
    return [pairs[k * len(pairs) // count] for k in range(count)]


def prepare_patches(
    folder, packed_dir, patch_size, stride, preprocess=False, exclude_test=(), hold_out=0, draw_rain=False
):
    """Open the patches of a data folder, packing its images first where that has not been done yet.

    Args:
        folder: a data set in one of ``LAYOUTS``, or a folder with PReNet's train_input.h5 and train_target.h5.
        packed_dir: folder of the packed files.
        preprocess: pack anew even if an up-to-date packed file exists.
        exclude_test: test folders whose backgrounds are left out.
        hold_out: this many pairs are kept from training (``pick_held_out``).
        draw_rain: take a folder of images without any pairs as clean photographs. Their patches have the clean image
            for the rainy one too and are marked ``clean_only``; none is held out.

    Returns:
        (``PackedPatches`` or ``PReNetPatches``, pairs held out).
    """
    folder = Path(folder)
    if PReNetPatches.found_in(folder) and not preprocess:
        print(f"{folder}: using PReNet's train_input.h5 and train_target.h5 (--preprocess True packs the images)")
        if hold_out or exclude_test:
            raise InputError(f"--data_path {folder}: no pair can be left out of PReNet's packed files")
        return PReNetPatches(folder), []
    pairs, orphans = find_pairs(folder, ground_truth_required=not draw_rain)
    clean_only = not any(pair.clean for pair in pairs)
    if clean_only:
        print(f"{folder}: {len(pairs)} images without pairs, taken as clean photographs to put rain on")
        pairs, hold_out = [Pair(pair.rainy, pair.rainy) for pair in pairs], 0
    pairs = [pair for pair in pairs if pair.clean]
    report_orphans(folder, orphans)
    for test_folder in exclude_test:
        leaks = {pair for pair, _ in find_leaks(pairs, test_folder)}
        pairs = [pair for pair in pairs if pair not in leaks]
        print(f"{folder}: left out {len(leaks)} pairs with a background of {test_folder}")
    if len(pairs) <= hold_out:
        raise InputError(
            f"--data_path {folder}: {len(pairs)} pairs, of which {hold_out} are held out; none is left to train on"
        )
    held_out = pick_held_out(pairs, hold_out)
    pairs = [pair for pair in pairs if pair not in held_out]
    path = packed_path(folder, packed_dir)
    reason = None
    if preprocess:
        reason = "--preprocess"
    elif not path.exists():
        reason = "no packed file yet"
    elif PackedPatches(path).fingerprint != fingerprint(pairs, patch_size, stride):
        reason = "the folder or the patch options have changed"
    if reason:
        print(f"{folder}: packing {len(pairs)} {'images' if clean_only else 'pairs'} into {path} ({reason})")
        pack(pairs, path, patch_size, stride)
    patches = PackedPatches(path)
    patches.clean_only = clean_only
    return patches, held_out


# Reading patches


class HDF5Patches:
    """Base of the two readers: HDF5 files that each process opens for itself, once, when it first reads.

    A handle must not cross a fork or a spawn, so it belongs to the process that opened it.
    """

    clean_only = False  # whether the patches have no rain, the clean ones standing in for the rainy ones

    def __init__(self, *paths):
        self.paths = [Path(path) for path in paths]
        self._handles = {}

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

    def files(self):
        """The open files; each process opens its own."""
        pid = os.getpid()
        if pid not in self._handles:
            handles = []
            for path in self.paths:
                with self.reading(path):
                    handles.append(h5py.File(path, "r"))
            self._handles = {pid: handles}
        return self._handles[pid]


def data_set(file, name, shape=None, kinds="u"):
    """A data set of an HDF5 file, whose values must lie in that file.

    Args:
        file: the open file.
        name: of the data set.
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


class PackedPatches(HDF5Patches):
    """The patches of a file that ``pack`` wrote; item k is a pair of (P, P, 3) uint8 RGB arrays."""

    REMEDY = "delete it and pack again"

    def __init__(self, path):
        super().__init__(path)
        with self.reading(path), h5py.File(path, "r") as file:
            self.fingerprint = self.read_fingerprint(file)
            rainy = data_set(file, "rainy")
            data_set(file, "clean", rainy.shape)
            self.length, self.patch_size = rainy.shape[:2]
            if rainy.shape != (self.length, self.patch_size, self.patch_size, 3):
                raise ValueError("unexpected rainy")
            if self.fingerprint is None:
                return
            self.origin = data_set(file, "origin", (self.length, 3), "i")[:]
            self.names = [os.fsdecode(name) for name in data_set(file, "names", kinds="S")[:]]
            if not 0 <= self.origin[:, 0].min() <= self.origin[:, 0].max() < len(self.names):
                raise ValueError("unexpected origin")

    def __len__(self):
        return self.length

    @staticmethod
    def read_fingerprint(file):
        """The fingerprint of an open file; None where another version packed it, so that it is packed anew."""
        return file.attrs["fingerprint"].decode() if file.attrs.get_id("fingerprint").dtype.kind == "S" else None

    def files(self):
        """The open file, which another run may have replaced since ``__init__``."""
        new = os.getpid() not in self._handles
        (file,) = super().files()
        if new and self.read_fingerprint(file) != self.fingerprint:
            raise InputError(f"{self.paths[0]}: packed anew by another run; expected another --packed_dir for each")
        return file

    def __getitem__(self, index):
        with self.reading(self.paths[0]):
            file = self.files()
            return file["rainy"][index], file["clean"][index]

    def describe(self, index):
        number, top, left = self.origin[index]
        return f"{self.names[number]} at row {top}, column {left}"


class PReNetPatches(HDF5Patches):
    """PReNet's pair of files: a (3, P, P) float32 data set in [0, 1] a patch, keys "0", "1", ..."""

    NAMES = ("train_input.h5", "train_target.h5")
    REMEDY = 'expected (3, P, P) data sets with the keys "0", "1", ...'

    @classmethod
    def found_in(cls, folder):
        return all((Path(folder) / name).is_file() for name in cls.NAMES)

    def __init__(self, folder):
        super().__init__(*(Path(folder) / name for name in self.NAMES))
        lengths, self.shape = [], None
        for path in self.paths:
            with self.reading(path), h5py.File(path, "r") as file:
                lengths.append(len(file))
                side = data_set(file, "0", self.shape, "f").shape[-1]
                self.shape = (3, side, side)
                for index in (0, lengths[-1] - 1):
                    data_set(file, str(index), self.shape, "f")
        if lengths[0] != lengths[1]:
            raise InputError(f"{self.paths[0]} has {lengths[0]} patches but {self.NAMES[1]} has {lengths[1]}")
        self.length, self.patch_size = lengths[0], self.shape[1]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        images = []
        for path, file in zip(self.paths, self.files()):
            with self.reading(path):
                images.append(data_set(file, str(index), self.shape, "f")[()].transpose(1, 2, 0))
        return tuple(images)

    def describe(self, index):
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
        self.starts = np.cumsum([0] + [len(source) for source in sources])
        sizes = {source.patch_size: source.paths[0] for source in sources}
        if len(sizes) > 1:
            found = ", ".join(f"{size} px in {path}" for size, path in sizes.items())
            raise InputError(f"--data_path: expected patches of one size, found {found}")
        if rain and rain.mix:
            self.donors = np.flatnonzero(np.repeat([not source.clean_only for source in sources], np.diff(self.starts)))
            if not len(self.donors):
                raise InputError("--rain_mix: expected a --data_path with rainy/clean pairs, to take their rain")
            for index in self.donors[:: -(-len(self.donors) // 100)]:  # enough to notice a set stored as JPEG
                rain.check_donor(*self.read(index), self.describe(index))

    def __len__(self):
        return int(self.starts[-1])

    def locate(self, index):
        """(source, index within it) of a patch."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sources[number], index - int(self.starts[number])

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
        batch_size: patches a batch; the incomplete batch at the end of an epoch is left out.
        seed: of the order.
        rank, ranks: with several processes, each gets its share of every batch.
    """

    def __init__(self, length, batch_size, seed=0, rank=0, ranks=1):
        self.length, self.batch_size, self.seed = length, min(batch_size, length), seed
        self.rank, self.ranks = rank, ranks
        self.epoch = self.first = 0

    def start(self, epoch, first=0):
        """Set the epoch to iterate next, and the batch to begin at in it."""
        self.epoch, self.first = epoch, first

    def __len__(self):
        return self.length // self.batch_size - self.first

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        for k in range(self.first, self.length // self.batch_size):
            batch = order[k * self.batch_size : (k + 1) * self.batch_size]
            yield [(self.epoch, int(index)) for index in batch[self.rank :: self.ranks]]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", nargs=2, type=Path, required=True, metavar=("TRAIN_DIR", "TEST_DIR"),
        help="list the training pairs whose clean image is (nearly) a test background",
    )
    return parser.parse_args()


def main():
    train_folder, test_folder = parse_args().check
    pairs, _ = find_pairs(train_folder, "TRAIN_DIR")
    leaks = find_leaks(pairs, test_folder)
    for pair, background in leaks:
        print(f"{pair.rainy.name}: {pair.clean.name} is {background.name} of {test_folder}")
    print(f"{len(leaks)} of {len(pairs)} pairs show a background of {test_folder}")


if __name__ == "__main__":
    run_script(main)
