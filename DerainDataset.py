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
from pathlib import Path
from typing import NamedTuple

import cv2
import h5py
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from utils import IMAGE_SUFFIXES, InputError, atomic_write, find_images, natural_key, progress, read_rgb, run_script


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
        match = re.fullmatch(layout.rainy_stem, stem)
        if match is None:
            continue
        partner = layout.clean_stem.format(match[1])
        used.add(partner)
        pairs.append(Pair(path, clean.get(partner)))
        if partner not in clean:
            orphans.append(path.name)
    clean_pattern = layout.clean_stem.format(r".+")
    orphans += [
        path.name for stem, path in clean.items() if stem not in used and re.fullmatch(clean_pattern, stem)
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
        raise InputError(
            f"{option} {folder}: no rainy/clean pairs; expected for example rain-1.png beside norain-1.png,"
            " or input/ and target/ with equal names"
        )
    return [Pair(path, None) for path in find_images(folder, option)], []


def image_size(path):
    """(height, width) after EXIF orientation, from the header alone."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            return (width, height) if image.getexif().get(0x0112, 1) >= 5 else (height, width)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image ({error})") from None


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


PACKED_VERSION = 1


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
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def packed_path(folder, packed_dir):
    """The packed file of a data folder: its name, and a few digits of its full path to tell namesakes apart."""
    folder = Path(folder).resolve()
    return Path(packed_dir) / f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}.h5"


def create_hdf5(path, size):
    """A new h5py file that owns ``size`` bytes of disk beforehand: HDF5 crashes where the disk fills up under it."""
    empty = io.BytesIO()
    h5py.File(empty, "w").close()
    with open(path, "wb") as file:
        file.write(empty.getvalue())
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    return h5py.File(path, "r+")  # closing it gives back what was not needed


def pack(pairs, path, patch_size, stride):
    """Cut pairs into patches and write them to one HDF5 file, complete or not at all.

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

    size = 2 * total * patch_size**2 * 3 + 12 * total + 256 * len(pairs) + 2**16
    with atomic_write(path) as temporary, create_hdf5(temporary, size) as file:
        data_sets = [file.create_dataset(name, shape, np.uint8) for name in ("rainy", "clean")]
        file["origin"] = np.concatenate(cuts).astype(np.int32)
        file["names"] = [pair.rainy.name for pair in pairs]
        file.attrs["fingerprint"] = fingerprint(pairs, patch_size, stride)
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


def prepare_patches(folder, packed_dir, patch_size, stride, preprocess=False, exclude_test=(), hold_out=0):
    """Open the patches of a data folder, packing its images first where that has not been done yet.

    Args:
        folder: a data set in one of ``LAYOUTS``, or a folder with PReNet's train_input.h5 and train_target.h5.
        packed_dir: folder of the packed files.
        preprocess: pack anew even if an up-to-date packed file exists.
        exclude_test: test folders whose backgrounds are left out.
        hold_out: this many pairs are kept from training (``pick_held_out``).

    Returns:
        (``PackedPatches`` or ``PReNetPatches``, pairs held out).
    """
    folder = Path(folder)
    if PReNetPatches.found_in(folder) and not preprocess:
        print(f"{folder}: using PReNet's train_input.h5 and train_target.h5 (--preprocess True packs the images)")
        if hold_out or exclude_test:
            raise InputError(f"--data_path {folder}: no pair can be left out of PReNet's packed files")
        return PReNetPatches(folder), []
    pairs, orphans = find_pairs(folder)
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
        print(f"{folder}: packing {len(pairs)} pairs into {path} ({reason})")
        pack(pairs, path, patch_size, stride)
    return PackedPatches(path), held_out


# Reading patches


class HDF5Patches:
    """Base of the two readers: HDF5 files that each process opens for itself, once, when it first reads.

    A handle must not cross a fork or a spawn, so it belongs to the process that opened it.
    """

    def __init__(self, *paths):
        self.paths = [Path(path) for path in paths]
        self._handles = {}

    def __getstate__(self):
        return {**self.__dict__, "_handles": {}}

    def open(self, path):
        """An h5py file for reading."""
        try:
            return h5py.File(path, "r")
        except OSError as error:
            raise InputError(f"{path}: cut short or not an HDF5 file ({error}); delete it and pack again") from None

    def files(self):
        pid = os.getpid()
        if pid not in self._handles:
            self._handles = {pid: [self.open(path) for path in self.paths]}
        return self._handles[pid]


class PackedPatches(HDF5Patches):
    """The patches of a file that ``pack`` wrote; item k is a pair of (P, P, 3) uint8 RGB arrays."""

    def __init__(self, path):
        super().__init__(path)
        with self.open(path) as file:
            try:
                self.length, self.patch_size = file["rainy"].shape[:2]
                self.fingerprint = file.attrs["fingerprint"]
                self.origin, self.names = file["origin"][:], file["names"].asstr()[:]
            except (KeyError, ValueError, OSError):
                raise InputError(f"{path}: not a file of packed patches; delete it and pack again") from None

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        (file,) = self.files()
        return file["rainy"][index], file["clean"][index]

    def describe(self, index):
        number, top, left = self.origin[index]
        return f"{self.names[number]} at row {top}, column {left}"


class PReNetPatches(HDF5Patches):
    """PReNet's pair of files: a (3, P, P) float32 data set in [0, 1] a patch, keys "0", "1", ..."""

    NAMES = ("train_input.h5", "train_target.h5")

    @classmethod
    def found_in(cls, folder):
        return all((Path(folder) / name).is_file() for name in cls.NAMES)

    def __init__(self, folder):
        super().__init__(*(Path(folder) / name for name in self.NAMES))
        lengths = []
        for path in self.paths:
            with self.open(path) as file:
                lengths.append(len(file))
                last = str(lengths[-1] - 1)
                if "0" not in file or last not in file or file["0"].ndim != 3 or file["0"].shape[0] != 3:
                    raise InputError(f'{path}: expected (3, P, P) data sets with the keys "0", "1", ...')
                self.patch_size = file["0"].shape[1]
        if lengths[0] != lengths[1]:
            raise InputError(f"{self.paths[0]} has {lengths[0]} patches but {self.NAMES[1]} has {lengths[1]}")
        self.length = lengths[0]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return tuple(file[str(index)][()].transpose(1, 2, 0) for file in self.files())

    def describe(self, index):
        return f"{self.paths[0].parent.name} patch {index}"


class TrainingPatches(Dataset):
    """Patches of several sources as tensors, augmented reproducibly.

    Items are requested by (epoch, index) and depend on nothing else but ``seed``, so that neither the number
    of workers nor a resumed run changes what the network sees.

    Args:
        sources: ``PackedPatches`` or ``PReNetPatches``, all with patches of one size.
        augment: mirror half of the patches. Rain falls, so they are not turned.
        seed: of the augmentation.

    Raises:
        InputError: the sources have patches of several sizes.
    """

    def __init__(self, sources, augment=True, seed=0):
        self.sources, self.augment, self.seed = sources, augment, seed
        self.starts = np.cumsum([0] + [len(source) for source in sources])
        sizes = {source.patch_size: source.paths[0] for source in sources}
        if len(sizes) > 1:
            found = ", ".join(f"{size} px in {path}" for size, path in sizes.items())
            raise InputError(f"--data_path: expected patches of one size, found {found}")

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

    def __getitem__(self, key):
        """(rainy, clean, index): two (3, P, P) float32 tensors in [0, 1], and the patch's index."""
        epoch, index = key
        source, inner = self.locate(index)
        images = source[inner]
        mirror = self.augment and np.random.default_rng((self.seed, epoch, index)).random() < 0.5
        tensors = []
        for image in images:
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
