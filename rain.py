"""Synthesise rain on clean photographs and write training or test pairs in PReNet's layouts.

    python rain.py --clean datasets/clean --out datasets/train/RainSynth --preset heavy --per_image 2

The rain model is that of Rain100L and Rain100H: rainy = min(255, clean + S), with one grey streak layer S >= 0.
The bundled test/RainSample was made from photographs that scikit-image ships (public domain or CC0) by

    python rain.py --clean scikit-image --out datasets/test/RainSample --preset light heavy --per_image 2 --layout test
"""
import argparse
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import skimage.data

from utils import InputError, at_least, find_images, progress, read_rgb, run_script, write_image


@dataclass(frozen=True)
class Preset:
    """Ranges that a streak layer is drawn from; lengths and widths in px, levels in grey levels of 255."""

    mean: tuple  # of the whole layer; drawn uniformly
    directions: tuple  # distinct streak directions in one image
    angle: float  # largest angle from the vertical, degrees
    length: tuple
    width: tuple
    level: tuple  # (a, b): a streak's typical level is a + b * mean
    hard_edged: float  # share of the passes that are not blurred
    blur: tuple  # standard deviation of the blur of the others, px
    density: tuple  # segments a pass and 10,000 px


PRESETS = {
    "light": Preset((1.5, 13), (1, 1), 35, (8, 45), (1, 2), (20, 1.0), 0.0, (0.5, 1.1), (0.5, 3)),
    "heavy": Preset((6, 92), (1, 3), 15, (15, 110), (1, 3), (15, 0.4), 0.6, (0.4, 0.9), (2, 8)),
}
MAX_PASSES = 200
# Eileen Collins (NASA), Chelsea (S. van der Walt), a coffee cup (R. Michetti), a Falcon 9 (SpaceX).
SAMPLE_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
SAMPLE_SIDE = 288  # px, the longer one: keeps the bundled files small


def draw_pass(shape, direction, level, preset, rng):
    """One pass of nearly parallel segments of about one grey level: (H, W) float32 in [0, 255]."""
    height, width = shape
    layer = np.zeros(shape, np.uint8)
    count = max(1, round(rng.uniform(*preset.density) * height * width / 1e4))
    angles = np.radians(direction + rng.normal(0, 1, count))
    lengths = rng.uniform(*preset.length, count)
    half = np.stack((np.sin(angles), np.cos(angles)), 1) * lengths[:, None] / 2
    margin = preset.length[1] / 2  # centres outside the frame too, or its borders would be dry
    centres = rng.uniform((-margin, -margin), (width + margin, height + margin), (count, 2))
    levels = np.clip(level * rng.uniform(0.7, 1.3, count), 0, 255)
    widths = rng.integers(preset.width[0], preset.width[1] + 1, count)
    hard_edged = rng.random() < preset.hard_edged
    for start, end, grey, thickness in zip(centres - half, centres + half, levels, widths):
        cv2.line(layer, np.rint(start).astype(int), np.rint(end).astype(int), float(grey), int(thickness))
    layer = layer.astype(np.float32)
    return layer if hard_edged else cv2.GaussianBlur(layer, (0, 0), rng.uniform(*preset.blur))


def streak_layer(height, width, preset, rng):
    """Draw one streak layer S.

    Args:
        height, width: its size in px.
        preset: a key of ``PRESETS``.
        rng: ``numpy.random.Generator``; the same state draws the same layer.

    Returns:
        (height, width) uint8 grey levels to add to an image.
    """
    preset = PRESETS[preset]
    target = rng.uniform(*preset.mean)
    directions = rng.uniform(-preset.angle, preset.angle, rng.integers(preset.directions[0], preset.directions[1] + 1))
    piled = rng.random() < 0.75
    # Where streaks hide one another instead of adding up, they must be brighter for the same mean.
    level = (preset.level[0] + preset.level[1] * target) * (1 if piled else 2)
    layer = np.zeros((height, width), np.float32)
    for _ in range(MAX_PASSES):
        streaks = draw_pass(layer.shape, rng.choice(directions), level * rng.uniform(0.3, 1.7), preset, rng)
        layer = np.minimum(layer + streaks, 255) if piled else np.maximum(layer, streaks)
        if layer.mean() >= target:
            break
    return np.rint(layer).astype(np.uint8)


def add_rain(clean, streaks):
    """min(255, clean + S) for (H, W, 3) and (H, W) uint8 arrays."""
    return np.minimum(clean.astype(np.uint16) + streaks[..., None], 255).astype(np.uint8)


def sample_photograph(name):
    """A photograph that scikit-image ships, shrunk to ``SAMPLE_SIDE``: (H, W, 3) uint8."""
    image = getattr(skimage.data, name)()
    height, width = image.shape[:2]
    scale = SAMPLE_SIDE / max(height, width)
    return cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--clean", required=True, metavar="DIR",
        help="folder of clean photographs, or scikit-image for the four it ships",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the pairs, made if absent")
    parser.add_argument(
        "--preset", choices=PRESETS, nargs="+", default=["heavy"],
        help="rain to draw; with several, the versions of a photograph take turns (default: heavy)",
    )
    parser.add_argument(
        "--per_image", type=at_least(1), default=1, help="rainy versions of each photograph (default: 1)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="the same seed writes the same files (default: 0)")
    parser.add_argument(
        "--layout", choices=("train", "test"), default="train",
        help="train: rain-N.png beside norain-N.png; test: norain-NNN.png with rainy/rain-NNN.png (default: train)",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    bundled = args.clean == "scikit-image"
    photographs = SAMPLE_PHOTOGRAPHS if bundled else find_images(args.clean, "--clean")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"--out {args.out}: expected a new or an empty folder")
    jobs = [(photograph, k) for photograph in photographs for k in range(args.per_image)]
    for number, (photograph, k) in enumerate(progress(jobs, "drawing rain"), 1):
        clean = sample_photograph(photograph) if bundled else read_rgb(photograph)
        rng = np.random.default_rng((args.seed, number))
        rainy = add_rain(clean, streak_layer(*clean.shape[:2], args.preset[k % len(args.preset)], rng))
        if args.layout == "train":
            rainy_path, clean_path = args.out / f"rain-{number}.png", args.out / f"norain-{number}.png"
        else:
            rainy_path = args.out / "rainy" / f"rain-{number:03d}.png"
            clean_path = args.out / f"norain-{number:03d}.png"
        write_image(rainy_path, rainy)
        write_image(clean_path, clean)
    print(f"{len(jobs)} pairs from {len(photographs)} photographs in {args.out}")


if __name__ == "__main__":
    run_script(main)
