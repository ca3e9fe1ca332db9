"""Read the images of rainy/clean pairs, and tell which pairs show the same background.

    python pairs.py --check datasets/test/RainSample datasets/test/RainSample

lists the pairs of the first folder, a training set say, whose clean image is, or nearly is, one of the second.
layouts.py finds the pairs.
"""
import argparse
from collections import defaultdict

import cv2
import numpy as np

from images import image_size, read_image, read_rgb, to_uint8
from layouts import find_pairs, report_left_out
from utils import InputError, a_path, ahead, cores, counted, progress, run_script

SAME_BACKGROUND = 0.95  # correlation of thumbnails; see ``Backgrounds``


# Reading


def take_half(picture, half, path):
    """The "left" or "right" half of an (H, W, C) picture; ``path`` is what the error about an odd width names."""
    width = picture.shape[1]
    if width % 2:
        raise InputError(f"{path} is {width} px wide; expected an even width, as it holds two images side by side")
    return picture[:, : width // 2] if half == "left" else picture[:, width // 2 :]


def read_rainy(pair):
    """The rainy image of a pair as ``images.read_image`` returns it: 8 or 16 bits, with or without alpha."""
    image = read_image(pair.rainy)
    return take_half(image, pair.rainy_half, pair.rainy) if pair.rainy_half else image


def read_clean(pair):
    """The clean image of a pair, (H, W, 3) uint8 RGB."""
    image = read_rgb(pair.clean)
    clean_half = {"left": "right", "right": "left"}
    return take_half(image, clean_half[pair.rainy_half], pair.clean) if pair.rainy_half else image


def read_pair(pair):
    """Both images of a pair, each (H, W, 3) uint8 RGB.

    Raises:
        InputError: an image cannot be read, or the two have different sizes.
    """
    rainy, clean = to_uint8(read_rainy(pair)[..., :3]), read_clean(pair)
    check_sizes(pair, rainy.shape, clean.shape)
    return rainy, clean


def pair_size(pair):
    """(height, width) of both images of a pair, from their headers alone; errors as for ``read_pair``."""
    height, width = size = image_size(pair.rainy)
    if pair.rainy_half:
        take_half(np.empty((1, width, 0)), pair.rainy_half, pair.rainy)
        return height, width // 2
    if pair.clean != pair.rainy:
        check_sizes(pair, size, image_size(pair.clean))
    return size


def check_sizes(pair, size, clean_size):
    """Refuse a pair of two sizes, (height, width, ...) each."""
    if size[:2] != clean_size[:2]:
        raise InputError(
            f"{pair.rainy} is {size[1]}x{size[0]} but its clean image {pair.clean.name} is"
            f" {clean_size[1]}x{clean_size[0]}; expected equal sizes"
        )


# Backgrounds


class Backgrounds:
    """Which clean images show the same photograph, also if mirrored, recompressed, resized or cut by a few pixels.

    Two images count as the same where their thumbnails of 16x16 px correlate by ``SAME_BACKGROUND`` or more. Between
    different photographs of BSD the correlation reached 0.90; recompression, resizing or a cut of 5 px left 0.98.
    Each image is read once in the life of the object.
    """

    def __init__(self):
        self.thumbnails = {}

    def describe(self, pairs):
        """(len(pairs), 256) float32: the thumbnails of the pairs' clean images, of mean 0 and length 1."""
        unread = list({pair[1:]: pair for pair in pairs if pair[1:] not in self.thumbnails}.values())
        results = ahead(thumbnail, unread, cores())
        results = progress(results, "comparing backgrounds", len(unread)) if unread else ()
        self.thumbnails.update(zip((pair[1:] for pair in unread), results))
        return np.stack([self.thumbnails[pair[1:]] for pair in pairs]) if pairs else np.empty((0, 256), np.float32)

    def partners(self, pairs, others):
        """For each of ``pairs`` the one of ``others`` with the same background, or None."""
        if not pairs or not others:
            return [None] * len(pairs)
        vectors, reference = self.describe(pairs), self.describe(others)
        mirrored = reference.reshape(-1, 16, 16)[:, :, ::-1].reshape(-1, 256)
        similarity = np.maximum(vectors @ reference.T, vectors @ mirrored.T)
        of_file = {other[1:]: other for other in others}  # which is its own background, even of a single colour
        return [
            of_file.get(pair[1:]) or (others[row.argmax()] if row.max() >= SAME_BACKGROUND else None)
            for pair, row in zip(pairs, similarity)
        ]


def thumbnail(pair):
    """(256,) zero-mean, unit-length description of a pair's clean image."""
    grey = cv2.cvtColor(read_clean(pair), cv2.COLOR_RGB2GRAY).astype(np.float32)
    small = cv2.resize(grey, (16, 16), interpolation=cv2.INTER_AREA)
    small -= small.mean()
    return small.ravel() / max(np.linalg.norm(small), 1e-6)


def hold_out(pairs, count, backgrounds=None):
    """Choose ``count`` pairs with different backgrounds to validate on, evenly spaced and the same each time.

    Where a clean image has several rainy versions, the chosen pairs take turns in which one they have. The other
    pairs with these backgrounds must not be trained on: ``Backgrounds.partners`` finds them.

    Args:
        pairs: of a data set, all with a clean image.
        count: how many.
        backgrounds: ``Backgrounds`` that may have read the images already.

    Returns:
        A list of ``count`` pairs, or fewer where the set has fewer backgrounds.
    """
    backgrounds = backgrounds or Backgrounds()
    versions = defaultdict(list)
    for pair in pairs:
        versions[pair[1:]].append(pair)
    images = list(versions.values())
    chosen = []
    for k in range(min(count, len(images))):
        start = k * len(images) // count
        for turn in range(len(images)):
            candidate = images[(start + turn) % len(images)]
            if backgrounds.partners(candidate[:1], chosen) == [None]:
                chosen.append(candidate[k % len(candidate)])
                break
    return chosen


# Command


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", nargs=2, type=a_path(), required=True, metavar=("TRAIN_DIR", "TEST_DIR"),
        help="list the training pairs whose clean image is (nearly) a test background",
    )
    parser.add_argument(
        "--side_by_side", choices=("left", "right"),
        help="pictures that hold both images, in folders where no layout fits: which half is the rainy one",
    )
    return parser.parse_args(argv)


def main():
    args = parse_args()
    test_folder, sets = args.check[1], []
    for folder in args.check:
        found = find_pairs(folder, "--check", rainy_half=args.side_by_side)
        report_left_out(folder, [*found.alone, *found.unused])
        sets.append(found.pairs)
    pairs, test_pairs = sets
    partners = Backgrounds().partners(pairs, test_pairs)
    for pair, partner in zip(pairs, partners):
        if partner:
            print(f"{pair.rainy.name}: {pair.clean.name} is {partner.clean.name} of {test_folder}")
    leaks = sum(partner is not None for partner in partners)
    show = "shows" if len(pairs) == 1 else "show"
    print(f"{leaks} of {counted(len(pairs), 'pair')} {show} a background of {test_folder}")


if __name__ == "__main__":
    run_script(main)
