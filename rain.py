"""Synthesise rain on clean photographs and write training or test pairs in PReNet's layouts.

    python rain.py --clean scikit-image --out datasets/train/RainSynth --preset heavy --per_image 20

draws rain on four photographs that come with scikit-image (public domain or CC0). --clean may also name a folder of
clean photographs, and --streaks a folder of pairs whose rain is taken instead of drawing it.

The rain model is that of Rain100L and Rain100H: rainy = min(255, clean + S), where S >= 0 is one grey layer of streaks.
The preset real departs from it, as photographs do: its streaks are soft and a little coloured, behind a veil of mist.
"""
import argparse
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import skimage.data

from images import find_images, read_rgb, write_image
from layouts import find_pairs, pairs_directly_in, report_left_out
from pairs import read_pair
from utils import InputError, RunError, a_path, at_least, check_folder, counted, progress, run_script


@dataclass(frozen=True)
class Part:
    """Streaks of one kind: ranges that they are drawn from. Lengths and widths are in px, levels in grey levels of 255.

    A part is drawn in a few passes, each of streaks of the same direction and length (``draw_pass``).
    """

    mean: tuple  # range of the mean of the part, drawn uniformly
    passes: tuple  # range of the number of passes
    angle: tuple  # range of the angle from the vertical to either side, degrees; small angles are drawn more often
    spread: float  # standard deviation of the angles of the passes around it, degrees
    length: tuple  # range of the typical length, drawn uniformly in its logarithm
    width: tuple  # each pass has one of these widths
    level: tuple  # (a, b): the typical level is a + b * mean
    scatter: float  # standard deviation of the logarithm of the levels within a pass
    fade: float  # the ends of a streak fade out over this share of its length
    blur: tuple  # range of the standard deviation of a pass's blur, px
    share: float = 1  # share of the layers that have this part


@dataclass(frozen=True)
class Preset:
    """What a rainy image is drawn from: the parts of its streak layer, which add up, and mist."""

    parts: tuple  # each a ``Part``
    veil: float = 0  # largest share of the light that mist replaces, drawn uniformly from 0 on
    tint: float = 0  # standard deviation of the colour channels' factors on the streaks


# Chosen so that rain_stats.py measures the same as on the 200 pairs of RainTrainL and on 176 heavy ones.
PRESETS = {
    "light": Preset((
        Part(
            mean=(1.8, 9), passes=(3, 5), angle=(0, 34), spread=0.8, length=(15, 70), width=(1,), level=(38, 5.5),
            scatter=0.6, fade=0.1, blur=(0.42, 0.9),
        ),
        Part(  # a faint fan
            mean=(0.15, 1.1), passes=(2, 3), angle=(0, 20), spread=14, length=(12, 50), width=(1,), level=(30, 10),
            scatter=0.4, fade=0.3, blur=(0.42, 0.9),
        ),
    )),
    "heavy": Preset((
        Part(  # hard lines of one grey in one or two directions
            mean=(8, 90), passes=(1, 2), angle=(0, 18), spread=6, length=(40, 95), width=(1, 1, 2), level=(45, 0.9),
            scatter=0, fade=0.02, blur=(0.42, 0.6),
        ),
        Part(  # a fan of soft streaks
            mean=(2, 36), passes=(2, 3), angle=(0, 9), spread=14, length=(48, 123), width=(1, 2), level=(50, 0.42),
            scatter=0.4, fade=0.34, blur=(0.38, 1.2),
        ),
        Part(  # faint streaks that cross them
            mean=(1, 8), passes=(1, 2), angle=(26, 55), spread=4, length=(16, 48), width=(1,), level=(25, 1),
            scatter=0.3, fade=0.4, blur=(0.5, 1), share=0.15,
        ),
    )),
    "real": Preset((
        # By eye, after photographs.
        Part(
            mean=(4, 42), passes=(4, 6), angle=(0, 20), spread=2, length=(10, 90), width=(1,), level=(20, 0.9),
            scatter=0.5, fade=0.1, blur=(0.45, 1.1),
        ),
    ), veil=0.2, tint=0.04),
}
EXACT = "light", "heavy"  # the presets with which rainy is exactly min(255, clean + S)
AIRLIGHT = 140, 230  # range of the grey level of mist
MAX_LEVEL = 230  # grey level of the brightest streak
MAX_COVER = 0.6  # largest share of the image that the streaks of a pass cover
VARIATION = 0.3  # how much the lengths, levels and means of the passes of a part vary, each way
# ``vary_streaks``: the largest shear in degrees, and the largest factors on widths, lengths and levels.
VARY_ANGLE, VARY_WIDTH, VARY_LENGTH, VARY_LEVEL = 8, 1.25, 1.6, 1.35
VARY_JOINED = 0.35  # how often a layer and its mirror image are added up: rain that falls in two directions
JOINED_LEVEL = 0.6  # factor on both layers then, so that the sum has a little more rain than one layer
# Eileen Collins (NASA), Chelsea (S. van der Walt), a coffee cup (R. Michetti), a Falcon 9 (SpaceX).
SAMPLE_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
SAMPLE_SIDE = 288  # px, the longer one: keeps the bundled files small


def draw_pass(shape, angle, length, level, mean, part, rng):
    """Draw one pass of streaks that are equal but for their level; where they overlap, the brighter one is seen.

    They are drawn upright and then sheared, which is much faster than one by one.

    Args:
        shape: (H, W) of the layer.
        angle: from the vertical, degrees.
        length: of a streak from top to bottom, px.
        level: mean grey level of the streaks.
        mean: what the mean of the pass is to be, about.
        part: a ``Part``, for all else.
        rng: ``numpy.random.Generator``.

    Returns:
        (H, W) float32 in [0, 255].
    """
    height, width = shape
    length, fade = round(length), max(1, round(part.fade * length))
    thickness = part.width[rng.integers(len(part.width))]
    slope = np.tan(np.radians(angle))
    # Larger than the layer by what the shear and streaks from above and below bring in.
    upright = np.zeros((height + length + fade, width + int(abs(slope) * height) + 2), np.uint8)
    # Streaks at random places that cover c of the image on top of one another hide 1 - exp(-c) of it.
    cover = -np.log(1 - min(mean / level, MAX_COVER))
    count = max(1, round(cover * upright.size / (length * thickness)))
    levels = level * rng.lognormal(-part.scatter**2 / 2, part.scatter, count)
    upright.ravel()[rng.integers(0, upright.size, count)] = np.minimum(levels, MAX_LEVEL)
    upright = cv2.dilate(upright, np.ones((length, thickness), np.uint8))
    upright = cv2.boxFilter(upright, cv2.CV_32F, (1, fade))
    source = np.array([[1, slope, max(0, -slope * height)], [0, 1, (length + fade) // 2]])  # of pixel (x, y)
    layer = cv2.warpAffine(upright, source, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return cv2.GaussianBlur(layer, (0, 0), rng.uniform(*part.blur))


def draw_part(shape, part, rng):
    """Draw the streaks of a ``Part`` on a layer of shape (H, W): (H, W) float32, unbounded."""
    mean, length = rng.uniform(*part.mean), np.exp(rng.uniform(*np.log(part.length)))
    level = part.level[0] + part.level[1] * mean
    low, high = part.angle
    angle = rng.triangular(low, low, high) * rng.choice((-1, 1))
    layer = np.zeros(shape, np.float32)
    count = rng.integers(part.passes[0], part.passes[1] + 1)
    for factors in rng.uniform(1 - VARIATION, 1 + VARIATION, (count, 3)):
        pass_length, pass_level, pass_mean = factors * (length, level, mean / count)
        layer += draw_pass(shape, rng.normal(angle, part.spread), pass_length, pass_level, pass_mean, part, rng)
    return layer


def streak_layer(height, width, preset, rng):
    """Draw one streak layer S.

    Args:
        height, width: its size in px.
        preset: a key of ``PRESETS``.
        rng: ``numpy.random.Generator``; the same state draws the same layer.

    Returns:
        (height, width) uint8 grey levels to add to an image.
    """
    layer = np.zeros((height, width), np.float32)
    for part in PRESETS[preset].parts:
        if rng.random() < part.share:
            layer += draw_part(layer.shape, part, rng)
    return np.minimum(layer, 255).astype(np.uint8)  # not rounded: real layers have as many pixels without rain


def add_rain(clean, streaks):
    """min(255, clean + S) for (H, W, 3) and (H, W) uint8 arrays."""
    return np.minimum(clean.astype(np.uint16) + streaks[..., None], 255).astype(np.uint8)


def draw_rain(clean, preset, rng):
    """Draw rain on a clean image.

    Args:
        clean: (H, W, 3) uint8.
        preset: a key of ``PRESETS``.
        rng: ``numpy.random.Generator``; the same state draws the same rain.

    Returns:
        (H, W, 3) uint8.
    """
    streaks = streak_layer(*clean.shape[:2], preset, rng)
    if preset in EXACT:
        return add_rain(clean, streaks)
    veil, airlight = rng.uniform(0, PRESETS[preset].veil), rng.uniform(*AIRLIGHT)
    colour = (1 + rng.normal(0, PRESETS[preset].tint, 3)).astype(np.float32)
    rainy = (1 - veil) * clean + veil * airlight + streaks[..., None] * colour
    return np.rint(rainy.clip(0, 255)).astype(np.uint8)


def extract_streaks(rainy, clean):
    """The streak layer S of a pair, so that ``add_rain(clean, S)`` is the rainy image again.

    S is exact where a channel of the rainy image is below 255. Where all three channels are 255, S is the least that
    makes them so: rain in front of a white sky cannot be known. For a pair that is not clean + S (``follows_model``),
    the result is the largest difference of the three channels, and 0 where all three are negative.

    Args:
        rainy, clean: (H, W, 3) uint8.

    Returns:
        (H, W) uint8.
    """
    return cv2.subtract(rainy, clean).max(2)


def follows_model(rainy, clean):
    """Whether a pair is exactly min(255, clean + S) with a grey S >= 0."""
    return np.array_equal(add_rain(clean, extract_streaks(rainy, clean)), rainy)


def fit_streaks(streaks, height, width, rng):
    """A (height, width) cut of a streak layer, at a random place and mirrored half of the time.

    A layer that is too small is tiled. It is never resampled.
    """
    tiles = -(-height // streaks.shape[0]), -(-width // streaks.shape[1])
    streaks = np.tile(streaks, tiles)
    top, left = (rng.integers(0, have - need + 1) for have, need in zip(streaks.shape, (height, width)))
    streaks = streaks[top : top + height, left : left + width]
    return streaks[:, ::-1] if rng.random() < 0.5 else streaks


def vary_streaks(streaks, lost, rng):
    """Turn a streak layer into another one of the same kind, so that a few layers are enough for training.

    The layer is sheared, stretched in both directions and made brighter or darker, each by a random amount. Half of
    the time it is turned upside down first, and sometimes its mirror image is added to it. What leaves the frame on
    one side comes back on the other.

    Args:
        streaks: (H, W) uint8.
        lost: (H, W) bool, True where the rain is not known, as it fell in front of white. There, the rain of another
            place of the layer is taken.
        rng: ``numpy.random.Generator``.

    Returns:
        (H, W) uint8.
    """
    for shift in rng.integers(0, streaks.shape, (2, 2)):
        streaks = np.where(lost, np.maximum(streaks, np.roll(streaks, shift, (0, 1))), streaks)
    if rng.random() < 0.5:
        streaks = streaks[::-1]
    if rng.random() < VARY_JOINED:
        mirrored = np.roll(streaks[:, ::-1], rng.integers(0, streaks.shape), (0, 1))
        streaks = JOINED_LEVEL * (streaks + mirrored.astype(np.float32))
    slope = np.tan(np.radians(rng.uniform(-VARY_ANGLE, VARY_ANGLE)))
    limits = np.log((VARY_WIDTH, VARY_LENGTH, VARY_LEVEL))
    across, along, gain = np.exp(rng.uniform(-limits, limits))
    source = np.array([[across, slope, 0], [0, along, 0]])  # where pixel (x, y) of the result is read
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    varied = cv2.warpAffine(gain * streaks, source, streaks.shape[::-1], flags=flags, borderMode=cv2.BORDER_WRAP)
    return np.rint(varied.clip(0, 255)).astype(np.uint8)


@dataclass(frozen=True)
class TrainingRain:
    """New rain for training patches, drawn or taken from another pair: --rain_synth, --rain_mix, --rain_vary.

    A patch of a pair gets drawn rain with probability ``synth``, that of another patch with probability ``mix``, and
    otherwise keeps its own. A patch of a photograph without rain always gets new rain, drawn or of another patch in
    the proportion of ``synth`` to ``mix``.
    """

    synth: float = 0  # probability of drawn rain
    preset: str = "both"  # a key of PRESETS, or "both" for light or heavy at random
    mix: float = 0  # probability of the rain of another patch
    vary: float = 0  # probability that rain of another patch goes through ``vary_streaks``

    def check_donor(self, rainy, clean, name):
        """Raise ``InputError``, which names the pair ``name``, unless the pair is exactly clean + S."""
        if not follows_model(as_bytes(rainy), as_bytes(clean)):
            raise InputError(
                f"--rain_mix: {name} is not its clean image plus one grey layer of streaks, as in sets stored as JPEG;"
                " expected pairs such as RainTrainL's"
            )

    def __call__(self, rainy, clean, clean_only, donor, rng):
        """The rainy patch to train on.

        Args:
            rainy, clean: (P, P, 3) uint8, or float in [0, 1].
            clean_only: there is no rain in ``rainy``.
            donor: function without arguments that returns the (rainy, clean) that rain is taken from.
            rng: ``numpy.random.Generator``.

        Returns:
            ``rainy`` itself, or ``clean`` under new rain as (P, P, 3) uint8: clean + S, and with the preset real also
            mist and tinted streaks (``draw_rain``).
        """
        if not clean_only and rng.random() >= self.synth + self.mix:
            return rainy
        clean = as_bytes(clean)
        if rng.random() < self.synth / (self.synth + self.mix):
            preset = rng.choice(EXACT) if self.preset == "both" else self.preset
            return draw_rain(clean, preset, rng)
        rainy, dry = map(as_bytes, donor())
        streaks = extract_streaks(rainy, dry)
        if self.vary and rng.random() < self.vary:
            streaks = vary_streaks(streaks, rainy.min(2) == 255, rng)
        return add_rain(clean, streaks)


def add_rain_options(group):
    """Add train.py's options of new rain: --rain_mix, --rain_vary, --rain_synth."""
    group.add_argument(
        "--rain_mix", type=at_least(0, float), default=0, metavar="P",
        help="share of the patches that get the rain of another patch",
    )
    group.add_argument(
        "--rain_vary", type=at_least(0, float), default=0, metavar="P",
        help="share of the mixed rain that is changed: sheared, stretched, brighter or darker, crossed with its mirror"
        " image",
    )
    group.add_argument(
        "--rain_synth", nargs=2, metavar=("PRESET", "P"),
        help="draw rain on the share P of the patches; PRESET is light, heavy, both (either of these) or real."
        " Photographs without rain are then enough",
    )


def check_rain_options(parser, args):
    """Make args.rain_synth [preset, share], and end the program in a sentence where the shares make no sense."""
    if args.rain_synth:
        preset, text = args.rain_synth
        try:
            args.rain_synth = [preset, float(text)]
        except ValueError:
            args.rain_synth = [preset, -1]
        if preset not in (*PRESETS, "both") or not 0 <= args.rain_synth[1] <= 1:
            expected = f"{', '.join(PRESETS)} or both and a number from 0 to 1"
            parser.error(f"argument --rain_synth: expected {expected}, got {preset} {text}")
    if args.rain_mix + (args.rain_synth[1] if args.rain_synth else 0) > 1:
        parser.error("arguments --rain_mix and --rain_synth: expected shares that add up to 1 or less")
    if args.rain_vary > (1 if args.rain_mix else 0):
        parser.error(f"argument --rain_vary: expected 0 to 1, and --rain_mix with it, got {args.rain_vary:g}")


def as_bytes(image):
    """A uint8 array as it is, and a float array in [0, 1] as uint8, rounded."""
    return image if image.dtype == np.uint8 else np.rint(255 * image).astype(np.uint8)


def sample_photograph(name):
    """One of ``SAMPLE_PHOTOGRAPHS``, its longer side shrunk to ``SAMPLE_SIDE`` px: (H, W, 3) uint8."""
    image = getattr(skimage.data, name)()
    height, width = image.shape[:2]
    scale = SAMPLE_SIDE / max(height, width)
    return cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)


def read_streaks(pair, option):
    """The streak layer of a pair of files, (H, W) uint8.

    Raises:
        InputError: the pair is not clean + S; ``option`` is the one that the error names.
    """
    rainy, clean = read_pair(pair)
    if not follows_model(rainy, clean):
        raise InputError(
            f"{option}: {pair.rainy} is not {pair.clean.name} plus one grey layer of streaks, as in sets stored as"
            " JPEG; expected pairs such as RainTrainL's"
        )
    return extract_streaks(rainy, clean)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--clean", type=a_path(str), required=True, metavar="DIR",
        help="folder of clean photographs, or scikit-image for the four it ships",
    )
    parser.add_argument("--out", type=a_path(), required=True, help="folder for the pairs, made if absent")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--preset", choices=PRESETS, nargs="+", default=["heavy"],
        help="rain to draw; with several, the versions of a photograph take turns (default: heavy)",
    )
    group.add_argument(
        "--streaks", type=a_path(str), metavar="DIR",
        help="take the rain of these rainy/clean pairs at random instead of drawing it",
    )
    parser.add_argument(
        "--per_image", type=at_least(1), default=1, help="rainy versions of each photograph (default: 1)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="the same seed writes the same files (default: 0)")
    parser.add_argument(
        "--layout", choices=("train", "test"), default="train",
        help="train: rain-N.png beside norain-N.png; test: norain-NNN.png with rainy/rain-NNN.png (default: train)",
    )
    args = parser.parse_args()
    if not args.streaks and len(args.preset) > args.per_image:
        parser.error(
            f"argument --preset: {len(args.preset)} for --per_image {args.per_image}; expected --per_image"
            f" {len(args.preset)} or more, as the versions of a photograph take turns"
        )
    return args


def find_photographs(folder):
    """The paths of the images in the folder of --clean, without the rainy ones of pairs that lie there.

    Raises:
        InputError: no images, or the rainy ones of pairs whose clean images lie elsewhere.
    """
    photographs = find_images(folder, "--clean")
    found = pairs_directly_in(folder)
    if found is None:
        return photographs
    if all(Path(folder).resolve() != pair.clean.parent.resolve() for pair in found.pairs):
        raise InputError(f"--clean {folder}: the rainy images of pairs; expected images without rain")
    print(f"{folder}: {counted(len(found.pairs), 'rainy image')} of pairs left out")
    report_left_out(folder, found.alone)
    rainy = {os.path.realpath(path) for path in (*found.alone, *(pair.rainy for pair in found.pairs))}
    return [path for path in photographs if os.path.realpath(path) not in rainy]


@contextmanager
def whole_folder(path):
    """Yield a folder whose content becomes that of ``path``, a new or an empty one, on success.

    On any error it is removed, and ``path`` is as it was.

    Raises:
        RunError: a folder cannot be made or moved.
    """
    name = f"{path.name[:40]}-unfinished-{os.getpid()}"
    # An empty folder that is there may be a disk of its own, which cannot be replaced.
    temporary = path / name if path.is_dir() else path.with_name(name)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir():
            for child in list(temporary.iterdir()):
                child.rename(path / child.name)
        else:
            temporary.rename(path)
    except OSError as error:
        raise RunError(f"{path}: could not be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def output_paths(folder, layout, number):
    """The paths of the rainy and of the clean image of pair ``number`` in one of the layouts of --layout."""
    if layout == "train":
        return folder / f"rain-{number}.png", folder / f"norain-{number}.png"
    return folder / "rainy" / f"rain-{number:03d}.png", folder / f"norain-{number:03d}.png"


def main():
    args = parse_args()
    bundled = args.clean == "scikit-image"
    photographs = SAMPLE_PHOTOGRAPHS if bundled else find_photographs(args.clean)
    check_folder("--out", args.out)
    if args.out.exists() and any(args.out.iterdir()):
        raise InputError(f"--out {args.out}: expected a new or an empty folder")
    pairs = []
    if args.streaks:
        pairs, alone, unused = find_pairs(args.streaks, "--streaks")
        report_left_out(args.streaks, [*alone, *unused])
    jobs = [(photograph, k) for photograph in photographs for k in range(args.per_image)]
    with whole_folder(args.out) as folder:
        for number, (photograph, k) in enumerate(progress(jobs, "drawing rain"), 1):
            clean = sample_photograph(photograph) if bundled else read_rgb(photograph)
            rng = np.random.default_rng((args.seed, number))
            if pairs:
                donor = pairs[rng.integers(len(pairs))]
                rainy = add_rain(clean, fit_streaks(read_streaks(donor, "--streaks"), *clean.shape[:2], rng))
            else:
                rainy = draw_rain(clean, args.preset[k % len(args.preset)], rng)
            rainy_path, clean_path = output_paths(folder, args.layout, number)
            write_image(rainy_path, rainy)
            write_image(clean_path, clean)
    print(f"{counted(len(jobs), 'pair')} from {counted(len(photographs), 'photograph')} in {args.out}")


if __name__ == "__main__":
    run_script(main)
