"""Compare drawn rain with the rain of given pairs, in a table and a picture.

    python rain_stats.py --data_path datasets/test/RainSample --output results/RainSample/rain

prints a table, and with --output writes it and a picture, here to rain.md and rain.jpg in results/RainSample. For each
data set, the presets light and heavy of rain.py are drawn on its clean images. Given and drawn rain are measured alike:
the streak layer S is extracted from the rainy image in both cases (rain.extract_streaks), as it is not exact where the
image is white. The picture shows the statistics and drawn layers, but no image of the data sets.
"""
import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage.feature import structure_tensor

from images import MARK, is_marked, write_image
from layouts import find_pairs, report_left_out
from metadata import Metadata
from metrics import measure
from pairs import read_clean
from rain import EXACT, add_rain, extract_streaks, read_streaks, sample_photograph, streak_layer
from utils import (
    Gathered, InputError, a_path, at_least, begins_with, check_file, progress, run_script, write_text,
)

HEADING = "# Drawn rain against real rain"  # by which a later run knows its table
COLUMNS = (
    "mean S", "std of S", "angle, degrees", "coherence", "PSNR-Y, dB", "SSIM-Y", "median S", "95th percentile of S",
    "spread, degrees", "length, px",
)
DIGITS = 1, 1, 1, 3, 1, 3, 0, 0, 1, 1  # that the table shows
REAL_COLOUR, DRAWN_COLOUR = (20, 60, 150), (225, 120, 20)
WIDTH, CHART, MARGIN = 1200, 325, 60  # px


def streak_angle(streaks):
    """Angle from the vertical in degrees (/ is positive) and coherence of a layer, from its mean structure tensor.

    The coherence (a - b) / (a + b) of the eigenvalues a >= b is 1 where all edges are parallel, 0 where none are.
    """
    down, mixed, across = (part.mean() for part in structure_tensor(streaks.astype(np.float32), 0.7, "nearest"))
    angle = 0.5 * np.arctan2(2 * mixed, across - down)
    return np.degrees(angle), np.hypot(across - down, 2 * mixed) / max(across + down, 1e-9)


def spread_and_length(streaks):
    """How far a layer's directions spread and how long its streaks are, from its power spectrum under a Hann window.

    Args:
        streaks: (H, W) uint8.

    Returns:
        spread: 80 % of the power, weighted by its frequency, lie within so many degrees of the main direction.
        length: px along that direction until the autocorrelation has fallen to half.
    """
    window = np.outer(*map(np.hanning, streaks.shape))
    power = np.abs(np.fft.fft2((streaks - np.average(streaks, weights=window)) * window)) ** 2
    down, across = np.fft.fftfreq(len(streaks))[:, None], np.fft.fftfreq(streaks.shape[1])
    frequency = np.hypot(down, across)
    used = (frequency > 0.06) & (frequency < 0.5)  # below are brightness and the window, above the corners
    degrees = np.floor(np.degrees(np.arctan2(down, across)))[used].astype(int) % 180
    energy = np.bincount(degrees, (power * frequency)[used], 180)
    main = energy.argmax()
    distance = np.abs((np.arange(180) - main + 90) % 180 - 90)
    shares = np.bincount(distance, energy).cumsum() / max(energy.sum(), 1e-9)
    streak = np.radians(main + 0.5)  # waves run across the streaks
    steps = np.outer((np.cos(streak), -np.sin(streak)), np.arange(min(streaks.shape) // 2))
    along = np.fft.ifft2(power).real[tuple(np.rint(steps).astype(int))]
    return np.count_nonzero(shares < 0.8), np.count_nonzero(np.minimum.accumulate(along) > along[0] / 2)


def describe(rainy, clean):
    """The figures of ``COLUMNS`` for a rainy image that is clean + S, both (H, W, 3) uint8."""
    streaks = extract_streaks(rainy, clean)
    scores = measure(rainy, clean)
    return (
        streaks.mean(), streaks.std(), *streak_angle(streaks), scores["psnr_y"], scores["ssim_y"],
        *np.percentile(streaks, (50, 95)), *spread_and_length(streaks),
    )


def describe_set(folder, seed):
    """Measure the rain of a folder of pairs, and each preset of ``EXACT`` drawn on its clean images.

    Returns:
        {"real" or a preset's name: (pairs, columns) array, a row of ``describe`` for each pair}.

    Raises:
        InputError: a pair cannot be measured, as it has no rain or is too small.
    """
    pairs, alone, unused = find_pairs(folder)
    report_left_out(folder, [*alone, *unused])
    figures = {"real": [], **{name: [] for name in EXACT}}
    for number, pair in enumerate(progress(pairs, Path(folder).name)):
        clean, layers = read_clean(pair), {"real": read_streaks(pair, "--data_path")}
        height, width = clean.shape[:2]
        if min(height, width) < 11:
            raise InputError(f"{pair.rainy}: {width}x{height}; expected images of 11 px or more, the window of SSIM")
        for k, name in enumerate(EXACT):
            layers[name] = streak_layer(height, width, name, np.random.default_rng((seed, number, k)))
        for name, streaks in layers.items():
            figures[name].append(describe(add_rain(clean, streaks), clean))
            if not np.isfinite(figures[name][-1]).all():
                which = "its rain" if name == "real" else f"rain as drawn by the preset {name}"
                raise InputError(
                    f"{pair.rainy}: {which} does not show on {pair.clean.name}; expected images that differ"
                )
    return {name: np.array(rows) for name, rows in figures.items()}


def table_row(folder, name, rows):
    """A line of the table: means over the images, and the 10th and 90th percentile.

    Args:
        folder, name: the data set, and a key of ``describe_set``.
        rows: (pairs, columns) array of ``describe``. Of the angles, the amount counts, and its median is given.
    """
    rows = rows.copy()
    rows[:, 2] = np.abs(rows[:, 2])
    middles = rows.mean(0)
    middles[2] = np.median(rows[:, 2])
    low, high = np.percentile(rows, (10, 90), axis=0)
    cells = []
    for middle, a, b, digits in zip(middles, low, high, DIGITS):
        cells.append(f"{middle:.{digits}f} ({a:.{digits}f} to {b:.{digits}f})")
    return f"| {Path(folder).name} | {name} | {len(rows)} | " + " | ".join(cells) + " |"


def draw_chart(draw, corner, groups, columns, font):
    """Draw a scatter chart of two of the ``COLUMNS`` against each other, a square of ``CHART`` px.

    Args:
        draw: ``PIL.ImageDraw.Draw`` to draw on.
        corner: (left, top) of the chart, px.
        groups: pairs of a colour and the (N, columns) rows that are drawn in it.
        columns: the indices of the columns for the x and the y axis.
        font: of the labels.
    """
    left, top = corner
    values = [rows[:, columns] for _, rows in groups]
    low, high = np.min([value.min(0) for value in values], 0), np.max([value.max(0) for value in values], 0)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    draw.rectangle((left, top, left + CHART, top + CHART), outline="black")
    step = [float(f"{span / 3:.0g}") for span in high - low]
    for x in np.arange(np.ceil(low[0] / step[0]), high[0] / step[0]) * step[0]:
        across = left + (x - low[0]) / (high[0] - low[0]) * CHART
        draw.line((across, top + CHART, across, top + CHART + 5), "black")
        draw.text((across, top + CHART + 8), f"{x:g}", "black", font, anchor="mt")
    for y in np.arange(np.ceil(low[1] / step[1]), high[1] / step[1]) * step[1]:
        down = top + (high[1] - y) / (high[1] - low[1]) * CHART
        draw.line((left - 5, down, left, down), "black")
        draw.text((left - 8, down), f"{y:g}", "black", font, anchor="rm")
    draw.text((left + CHART / 2, top + CHART + 26), COLUMNS[columns[0]], "black", font, anchor="mt")
    draw.text((left, top - 6), COLUMNS[columns[1]], "black", font, anchor="lb")
    for (colour, _), points in zip(groups, values):
        for x, y in (left, top + CHART) + (points - low) / (high - low) * (CHART, -CHART):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), outline=colour, width=2)


def draw_picture(sets, seed):
    """Draw charts of each set and of the preset whose mean is nearest, above four images with rain of that preset.

    Args:
        sets: {folder: ``describe_set``}.
        seed: of the rain.

    Returns:
        (H, W, 3) uint8.
    """
    side = (WIDTH - 5 * 12) // 4
    photograph = sample_photograph("astronaut")[:side, :side]
    height = CHART + 2 * MARGIN + side + 12
    sheet = Image.new("RGB", (WIDTH, len(sets) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for number, (folder, figures) in enumerate(sets.items()):
        top = number * height + MARGIN
        real = figures["real"]
        nearest = min(EXACT, key=lambda name: abs(figures[name][:, 0].mean() - real[:, 0].mean()))
        groups = ((DRAWN_COLOUR, figures[nearest]), (REAL_COLOUR, real))
        for k, columns in enumerate(([0, 1], [2, 3], [4, 5])):
            draw_chart(draw, (MARGIN + k * (CHART + MARGIN - 5), top), groups, columns, font)
        draw.text((WIDTH - 12, top - 50), f"{Path(folder).name}", REAL_COLOUR, font, anchor="rt")
        draw.text((WIDTH - 12, top - 28), f"drawn, {nearest}", DRAWN_COLOUR, font, anchor="rt")
        for k in range(4):
            rng = np.random.default_rng((seed, number, k, 9))
            rainy = add_rain(photograph, streak_layer(side, side, nearest, rng))
            sheet.paste(Image.fromarray(rainy), (12 + k * (side + 12), top + CHART + MARGIN))
    return np.asarray(sheet)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_path", action=Gathered, type=a_path(str), nargs="+", required=True, metavar="DIR",
        help="folders of rainy/clean pairs",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the drawn rain (default: 0)")
    parser.add_argument(
        "--output", type=a_path(), metavar="STEM", help="also write the table to STEM.md, and a picture to STEM.jpg"
    )
    return parser.parse_args()


def main():
    args = parse_args()
    if args.output:
        if not args.output.name:
            raise InputError(f"--output {args.output}: expected a file name without its suffix")
        table, picture = (args.output.with_name(args.output.name + suffix) for suffix in (".md", ".jpg"))
        check_file("--output", table, begins_with(HEADING))
        # An earlier version marked the table only.
        check_file("--output", picture, lambda path: is_marked(path) or begins_with(HEADING)(table))
    sets = {folder: describe_set(folder, args.seed) for folder in args.data_path}
    lines = [
        HEADING, "",
        "Means over the images and, in brackets, the 10th and 90th percentile; of the angle from the vertical, the",
        "median of its amount. Spread: 80 % of the spectral power lie within so many degrees of the main direction.",
        "Length: px along that direction over which the autocorrelation falls to half. The presets were drawn on the",
        "clean images of each set.", "",
        f"Command: `python rain_stats.py {shlex.join(sys.argv[1:])}`", "",
        "| set | rain | images | " + " | ".join(COLUMNS) + " |", "| --- " * (3 + len(COLUMNS)) + "|",
    ]
    lines += [table_row(folder, name, rows) for folder, figures in sets.items() for name, rows in figures.items()]
    print(*lines[-3 * len(sets) - 2 :], sep="\n")
    if args.output:
        sheet = draw_picture(sets, args.seed)
        write_text(table, "\n".join(lines) + "\n")
        write_image(picture, sheet, Metadata(software=MARK), quality=42)


if __name__ == "__main__":
    run_script(main)
