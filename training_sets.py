"""What a run is trained and validated on: its folders of pairs, with nothing that is held out among them.

    python train.py --data_path datasets/test/RainSample --val_pairs 2 --save_path logs/HeldOut --max_steps 20 \
--use_contrast False --use_lpips False --use_seg_stage1 False

holds out two photographs of the bundled sample, with all their rainy versions.
"""
import argparse
import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from layouts import Pair, find_pairs, report_left_out
from pairs import Backgrounds, hold_out, pair_size, read_pair
from utils import Gathered, InputError, a_path, add_flag, at_least, counted

PRENET_FILES = ("train_input.h5", "train_target.h5")  # the patches that PReNet's code packs
DATA_HINT = (
    "README.md, section Data, says where to get the public sets, and this trains on drawn rain instead:"
    " python rain.py --clean scikit-image --out datasets/train/RainSynth --per_image 20"
    " && python train.py --data_path datasets/train/RainSynth --save_path logs/RainSynth"
)


@dataclass
class TrainingSet:
    """A folder of --data_path: its pairs, and how many times it counts."""

    folder: Path
    count: int = 1
    pairs: list = field(default_factory=list)  # none where the folder has PReNet's packed patches instead
    clean_only: bool = False  # photographs without rain, each the clean image of a ``Pair`` with itself
    left_out: list = field(default_factory=list)  # names of the rainy images that were removed from the pairs
    scale: float = 1  # that the images are shrunk to before patches are cut

    def leave_out(self, others, backgrounds, reason):
        """Remove the pairs that share a background with one of ``others``, and name them.

        Raises:
            InputError: none is left.
        """
        partners = backgrounds.partners(self.pairs, others)
        shared = [pair for pair, partner in zip(self.pairs, partners) if partner]
        if shared and len(shared) == len(self.pairs):
            raise InputError(
                f"--data_path {self.folder}: {counted(len(shared), 'pair')}, all of which show a {reason};"
                " none is left to train on"
            )
        self.pairs = [pair for pair, partner in zip(self.pairs, partners) if not partner]
        self.left_out += [pair.rainy.name for pair in shared]
        report_left_out(self.folder, [pair.rainy for pair in shared], reason)


def counted_folder(text):
    """(folder, count) of "FOLDER:COUNT" or "FOLDER", which counts once; a folder of the whole name comes first.

    Raises:
        InputError: a count below 1.
    """
    folder, _, count = text.rpartition(":")
    if not folder or not count.isdecimal() or Path(text).exists():
        return Path(text), 1
    if int(count) < 1:
        raise InputError(f"--data_path {text}: expected FOLDER:COUNT with a count of 1 or more")
    return Path(folder), int(count)


def find_training_sets(
    data_paths, clean_paths, rainy_half=None, photographs=False, prenet=True, ways_out=("--clean_path", "--rain_synth")
):
    """The ``TrainingSet``s of --data_path.

    Args:
        data_paths: "FOLDER" or "FOLDER:COUNT" each.
        clean_paths: a folder of clean images for each of them, or none at all.
        rainy_half: as for ``layouts.find_pairs``.
        photographs: take a folder without pairs as clean photographs to put rain on.
        prenet: take PReNet's packed patches where a folder has them.
        ways_out: as for ``layouts.find_pairs``.

    Raises:
        InputError: a folder is missing, or there is nothing to train on in it.
    """
    sets = []
    for text, clean_path in zip(data_paths, clean_paths or [None] * len(data_paths)):
        folder, count = counted_folder(text)
        if not folder.is_dir():
            raise InputError(f"--data_path {folder}: no such folder; {DATA_HINT}")
        if prenet and all((folder / name).is_file() for name in PRENET_FILES):
            print(
                f"{folder}: using PReNet's {' and '.join(PRENET_FILES)} as they are, without --stride and --skip_small"
                " (--preprocess packs its images instead)"
            )
            sets.append(TrainingSet(folder, count))
            continue
        found = find_pairs(folder, "--data_path", clean_path, rainy_half, not photographs, ways_out)
        if found.pairs:
            report_left_out(folder, [*found.alone, *found.unused])
            sets.append(TrainingSet(folder, count, found.pairs))
        else:
            number = counted(len(found.alone), "image")
            print(f"{folder}: {number} without pairs, taken as clean photographs to put rain on")
            sets.append(TrainingSet(folder, count, [Pair(path, path) for path in found.alone], clean_only=True))
    return sets


def with_scales(sets, scales):
    """``sets``, and each set of photographs at further scales, which count as often as it does in full size.

    Args:
        sets: ``TrainingSet``s.
        scales: from --photograph_scales.

    Raises:
        InputError: there are scales, and no set of photographs.
    """
    shrunk = [
        replace(training_set, scale=scale, count=max(1, round(training_set.count / scale**2)))
        for training_set in sets if training_set.clean_only for scale in scales
    ]
    if scales and not shrunk:
        raise InputError("--photograph_scales: expected a --data_path of clean photographs, and new rain for them")
    return sets + shrunk


def find_validation_pairs(folder, rainy_half=None):
    """The pairs of --val_path."""
    found = find_pairs(folder, "--val_path", rainy_half=rainy_half)
    report_left_out(folder, [*found.alone, *found.unused])
    return found.pairs


def summarise_validation(pairs):
    """Read the pairs to validate on, now and not after the first epoch; return what tells them from others.

    Raises:
        InputError: an image cannot be read, or some are too small; all of these are named.
    """
    digest, small = hashlib.sha256(), []
    for pair in pairs:
        images = read_pair(pair)
        height, width = images[0].shape[:2]
        if min(height, width) < 11:
            small.append(f"{pair.rainy} ({width}x{height})")
        for image in images:
            digest.update(np.ascontiguousarray(image))
    if small:
        raise InputError(f"{', '.join(small)}: expected validation images of 11 px or more, the window of SSIM")
    return {"pairs": len(pairs), "content": digest.hexdigest()}


def separate(sets, hold_out_counts, val_pairs, exclude_test, rainy_half=None, smallest=0):
    """Make training, validation and test sets share no background; what is left out of training is named.

    Args:
        sets: ``TrainingSet``s, whose pairs are removed.
        hold_out_counts: how many backgrounds of each set to hold out for validation.
        val_pairs: further pairs to validate on.
        exclude_test: folders of test sets.
        rainy_half: of these, as for ``layouts.find_pairs``.
        smallest: shorter side in px from which on an image may be held out; --skip_small leaves smaller ones out.

    Returns:
        The pairs to validate on: those held out, and ``val_pairs``.

    Raises:
        InputError: nothing is left to train on.
    """
    backgrounds, held_out = Backgrounds(), []
    for training_set in sets:
        if not training_set.pairs and (any(hold_out_counts) or exclude_test):
            raise InputError(f"--data_path {training_set.folder}: no pair can be left out of PReNet's packed files")
    if any(hold_out_counts) and all(training_set.clean_only for training_set in sets):
        raise InputError(
            "--val_pairs: clean photographs have no pairs to hold out; make some with python rain.py"
            " --clean OTHER_PHOTOGRAPHS --out DIR, and give --val_path DIR"
        )
    for test_folder in exclude_test:
        found = find_pairs(test_folder, "--exclude_test", rainy_half=rainy_half)
        report_left_out(test_folder, [*found.alone, *found.unused])  # what is no pair is not compared
        for training_set in sets:
            training_set.leave_out(found.pairs, backgrounds, f"background of {test_folder}")
    for training_set, count in zip(sets, hold_out_counts):
        if count and not training_set.clean_only:
            large = [pair for pair in training_set.pairs if not smallest or min(pair_size(pair)) >= smallest]
            chosen = hold_out(large, count, backgrounds)
            print(f"{training_set.folder}: holds out {len(chosen)} of its backgrounds for validation")
            held_out += [pair for pair in chosen if pair not in held_out]
    held_out += [pair for pair in val_pairs if pair not in held_out]
    for training_set in sets:
        if held_out and not training_set.pairs:
            print(f"{training_set.folder}: PReNet's packed files cannot be compared with the validation pairs")
    for training_set in sets:
        training_set.leave_out(held_out, backgrounds, "background held out for validation")
    return held_out


# Options


def scale(text):
    """``argparse`` type for --photograph_scales: more than 0 and less than 1."""
    value = at_least(0, float)(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return value


def add_data_options(group):
    """Add train.py's options of the data, but for those of new rain."""
    group.add_argument(
        "--data_path", action=Gathered, type=a_path(str), nargs="+", default=["datasets/train/RainTrainH"],
        metavar="DIR[:N]",
        help="folders of rainy/clean pairs; DIR:40 counts 40 times",
    )
    group.add_argument(
        "--clean_path", action=Gathered, type=a_path(str), nargs="+", default=[], metavar="DIR",
        help="folders of the clean images, one for each --data_path, where its layout is not found from the names",
    )
    group.add_argument(
        "--side_by_side", choices=("left", "right"),
        help="pictures that hold both images, in folders where no layout fits: which half is the rainy one",
    )
    add_flag(group, "--preprocess", False, "pack the images again even if the packed file is up to date")
    group.add_argument(
        "--packed_dir", type=a_path(str), default="datasets/packed", metavar="DIR",
        help="folder of the packed HDF5 files",
    )
    group.add_argument("--patch_size", type=at_least(11), default=100, help="side of the training patches, px")
    group.add_argument("--stride", type=at_least(1), default=80, help="distance between patches, px")
    group.add_argument(
        "--photograph_scales", type=scale, nargs="+", default=[], metavar="S",
        help="also take clean photographs shrunk to these scales, for example 0.5, whose structures are finer",
    )
    add_flag(group, "--skip_small", False, "leave out images that are smaller than a patch")
    group.add_argument(
        "--exclude_test", action=Gathered, type=a_path(str), nargs="+", default=[], metavar="DIR",
        help="leave out pairs that show a background of these test sets",
    )
    add_flag(group, "--augment", True, "mirror half of the patches")
    group.add_argument(
        "--num_workers", type=at_least(0), metavar="N",
        help="loader processes; 0 loads in the main one (default: one for each core that the process has, up to 16)",
    )
    group.add_argument(
        "--val_path", type=a_path(str), metavar="DIR",
        help="folder of pairs to validate on after each epoch; what shows a background of theirs is not trained on",
    )
    group.add_argument(
        "--val_pairs", type=at_least(0), nargs="+", default=[0], metavar="N",
        help="hold out N backgrounds of each data folder and validate on them; several numbers: one for each folder",
    )
