"""Derain an image, a folder of images or a video, and report PSNR and SSIM where there are clean images.

    python test.py --test_data_path datasets/test/RainSample

Writes one PNG an image and metrics.csv. The figures follow PReNet's MATLAB protocol, on the 8-bit images written.
"""
import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from checkpoints import BUNDLED, add_network_options, find_checkpoint, load_network
from comparison import MAX_THUMBNAILS, contact_sheet, panel, thumbnail
from devices import fast_bfloat16, free_memory, pick_device
from images import IMAGE_SUFFIXES, read_rgb, to_uint8, write_image
from inference import StripRunner, self_ensemble, to_image, to_tensor
from metrics import measure
from pairs import Pair, check_sizes, find_pairs, read_clean, read_rainy, report_left_out
from utils import InputError, RunError, add_flag, at_least, natural_key, printable, progress, run_script, write_csv
from video import derain_video

HALF_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_options(parser)
    parser.add_argument(
        "--test_data_path", type=Path, default=Path("datasets/test/Rain100H"), metavar="PATH",
        help="an image, a folder of rainy images, with clean ones or without, or a video (default: %(default)s)",
    )
    parser.add_argument(
        "--clean_path", type=Path, metavar="DIR",
        help="folder of the clean images, where --test_data_path has the rainy ones and their place does not tell",
    )
    parser.add_argument(
        "--side_by_side", choices=("left", "right"),
        help="each picture holds a rainy and a clean image side by side; this half is the rainy one",
    )
    add_flag(parser, "--recursive", False, "take the images of all folders below too; no clean images are looked for")
    parser.add_argument(
        "--output_path", type=Path, metavar="DIR",
        help="folder of the derained images (default: results/SET/MODEL, after --test_data_path and --save_path)",
    )
    add_flag(parser, "--overwrite", True, "derain again what is there already; False goes on with a long folder")
    add_flag(parser, "--comparison", False, "write a labelled panel for each image too, and a contact sheet")
    add_flag(
        parser, "--self_ensemble", False,
        "average over the image, its mirror image, and both upside down: four times as long",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=("fp32", *HALF_PRECISIONS, "auto"), default="fp32",
        help="of the convolutions; auto is fp16 on a GPU, bf16 on a CPU that is faster with it (default: %(default)s)",
    )
    parser.add_argument(
        "--max_memory", type=at_least(0, float), metavar="GIB",
        help="an image that needs more on the CPU, 0.6 GiB a megapixel in fp32, works on disk"
        " (default: 3/4 of what is free)",
    )
    args = parser.parse_args(argv)
    args.checkpoint = find_checkpoint(args.save_path)
    args.output_path = args.output_path or default_output(args)
    return args


def check_options(args, clip):
    """Refuse options that do not go together; ``clip`` is whether --test_data_path is a video."""
    source = args.test_data_path
    if args.comparison and clip:
        raise InputError(f"--comparison: {source} is no image; expected an image or a folder of images")
    clean_options = [name for name in ("clean_path", "side_by_side") if getattr(args, name)]
    if len(clean_options) == 2:
        raise InputError("--clean_path and --side_by_side: expected one of them; each says where the clean images are")
    for name in clean_options:
        if args.recursive:
            raise InputError(f"--{name}: expected no --recursive, which looks for no clean images")
        if clip:
            raise InputError(f"--{name}: {source} is a video; expected images, as a video is not measured")
    if args.clean_path and source.is_file():
        raise InputError(f"--clean_path: {source} is one image; expected a folder of rainy images as --test_data_path")


# What to read and where to write


def default_output(args):
    """results/SET/MODEL: named after --test_data_path, and after the checkpoint (``model_name``)."""
    source = Path(os.path.abspath(args.test_data_path))
    return Path("results", source.stem if source.is_file() else source.name, model_name(args.save_path))


def model_name(save_path):
    """The name of a checkpoint under results/.

    That is the name of its run's folder; FOLDER-STEM where --save_path is a file, as a run's folder has several; and
    STEM alone for the bundled weights.
    """
    checkpoint = Path(os.path.abspath(find_checkpoint(save_path)))
    if checkpoint.resolve().parent == BUNDLED:
        return checkpoint.stem
    from_folder = save_path is None or save_path.is_dir()
    return checkpoint.parent.name if from_folder else f"{checkpoint.parent.name}-{checkpoint.stem}"


def find_below(folder, left_out):
    """All images in ``folder`` and the folders below, linked ones too, without the folder ``left_out`` below it."""
    paths, seen = [], {os.path.realpath(left_out)} - {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link may lead back up
            folders.clear()
            continue
        seen.add(real)
        paths += [Path(place, name) for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise InputError(
            f"--test_data_path {folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in this folder or below it"
        )
    return sorted(paths, key=natural_key)


def find_inputs(args):
    """Find the images to derain, and say which of them are not measured and which files are left out.

    Returns:
        (list of ``Pair``, whose clean image is None where there is none; paths of the images left out).
    """
    path, rainy_half = args.test_data_path, args.side_by_side
    if path.is_file():
        return [Pair(path, path if rainy_half else None, rainy_half)], []
    if args.recursive:
        return [Pair(image, None) for image in find_below(path, args.output_path)], []
    found = find_pairs(path, "--test_data_path", args.clean_path, rainy_half, required=False)
    if rainy_half and not all(pair.rainy_half for pair in found.pairs):
        raise InputError(
            f"--side_by_side {rainy_half}: {path} has rainy and clean images in files of their own,"
            f" such as {found.pairs[0].rainy.name} and {found.pairs[0].clean.name}; expected both in one"
        )
    report_left_out(path, found.unused)
    if found.alone and found.pairs:
        names = ", ".join(printable(image.name) for image in found.alone)
        print(f"{printable(path)}: {len(found.alone)} without a clean image, derained but not measured: {names}")
    elif found.alone:
        print(f"{printable(path)}: no clean images, so all {len(found.alone)} are derained but not measured")
    pairs = [*found.pairs, *(Pair(image, None) for image in found.alone)]
    return sorted(pairs, key=lambda pair: natural_key(pair.rainy)), found.unused


def name_outputs(pairs, root=None):
    """Where each pair's result goes, relative to --output_path.

    It is the input's name as PNG, or with its suffix kept where two would collide; below ``root``, in the folder
    that mirrors the input's.
    """
    folders = [pair.rainy.parent.relative_to(root) if root else Path() for pair in pairs]
    stems = [folder / pair.rainy.stem for folder, pair in zip(folders, pairs)]
    counts = Counter(stems)
    return [
        folder / f"{pair.rainy.name if counts[stem] > 1 else pair.rainy.stem}.png"
        for folder, stem, pair in zip(folders, stems, pairs)
    ]


class Job(NamedTuple):
    """One image: what is read, and where its result goes and its panel, which is None without --comparison."""

    pair: Pair
    output: Path
    panel: Path | None


def plan_jobs(pairs, args):
    """A ``Job`` for each pair."""
    root = args.test_data_path if args.recursive and args.test_data_path.is_dir() else None
    return [
        Job(
            pair, args.output_path / name,
            args.output_path / "comparison" / name.with_suffix(".jpg") if args.comparison else None,
        )
        for pair, name in zip(pairs, name_outputs(pairs, root))
    ]


def check_outputs(paths, inputs, output_path):
    """Refuse to write over an input, or one result over another."""
    inputs = {os.path.realpath(path) for path in inputs}  # unlike Path.resolve, also of a link to itself
    written = set()
    for path in paths:
        if os.path.realpath(path) in inputs:
            raise InputError(
                f"--output_path {output_path}: {path.name} would overwrite an input; expected another folder"
            )
        if path in written:
            raise InputError(f"--output_path {output_path}: two results would be {path.name}; expected other names")
        written.add(path)


# Images


def derain(runner, image, device):
    """Derain an image of 8 or 16 bits.

    Args:
        runner: a ``StripRunner``, or a function like it.
        image: (H, W, 3 or 4) RGB(A) uint8 or uint16, any size.
        device: of the network.

    Returns:
        (array of the same shape and dtype, alpha unchanged; its (H, W, 3) uint8 RGB, which is measured).
    """
    output = runner(to_tensor(image[..., :3]).to(device))
    derained = np.concatenate((to_image(output, image.dtype), image[..., 3:]), axis=2)
    return derained, to_image(output)


def process(runner, job, device, overwrite=True):
    """Derain one image, save and measure it, and write its panel if it has one.

    Args:
        runner, device: as for ``derain``.
        job: a ``Job``.
        overwrite: whether to derain the image again where its result is there already.

    Returns:
        (its row of the report: name, metrics where there is a clean image, seconds of the network; its thumbnail for
        the contact sheet, or None without a panel).
    """
    pair = job.pair
    row = {"image": printable(pair.rainy.name)}

    # 1. Load
    image = read_rainy(pair)
    clean = read_clean(pair) if pair.clean else None
    if clean is not None:
        check_sizes(pair, image.shape, clean.shape)

    # 2. Derain and save, or take what is there
    if job.output.exists() and not overwrite:
        derained = read_rgb(job.output)
        if derained.shape[:2] != image.shape[:2]:
            raise InputError(f"{job.output} is not the result of {pair.rainy}, as it has another size; remove it")
    else:
        started = time.perf_counter()
        result, derained = derain(runner, image, device)
        row["seconds"] = time.perf_counter() - started
        write_image(job.output, result)

    # 3. Measure, and show both
    if clean is not None:
        row |= measure(derained, clean)
    if job.panel is None:
        return row, None
    rainy = to_uint8(image[..., :3])
    scores = clean is not None and {"rainy": measure(rainy, clean), "derained": row}
    write_image(job.panel, panel(row["image"], rainy, derained, clean, scores))
    return row, thumbnail(row["image"], rainy, derained)


def describe(row):
    """A row of the report as one line for the console."""
    seconds = f"{row['seconds']:6.2f} s" if "seconds" in row else "was there"
    if "psnr_y" not in row:
        return f"{row['image']:24} {seconds}"
    return (
        f"{row['image']:24} Y {row['psnr_y']:7.4f} dB {row['ssim_y']:.4f}"
        f"   RGB {row['psnr_rgb']:7.4f} dB {row['ssim_rgb']:.4f}   {seconds}"
    )


def mean(values):
    """The mean without NaN, which an image under 11 px has as its SSIM; NaN where nothing is left."""
    values = [value for value in values if not np.isnan(value)]
    return float(np.mean(values)) if values else float("nan")


def average(rows):
    """The averages of a report: metrics over the images that have them, time without the first image's warm-up."""
    measured = [row for row in rows if "psnr_y" in row]
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    summary = {"image": f"average of {len(measured) or len(rows)}"}
    if measured:
        summary |= {name: mean(row[name] for row in measured) for name in METRICS}
    return summary | ({"seconds": mean(seconds[1:] or seconds)} if seconds else {})


def derain_images(runner, args, device):
    """Derain the images of --test_data_path; a bad one does not cost the others."""
    # 1. Which images, and where each result goes
    pairs, left_out = find_inputs(args)
    jobs = plan_jobs(pairs, args)
    sheet_path = args.output_path / "contact_sheet.jpg"
    written = [job.output for job in jobs]
    if args.comparison:
        written += [sheet_path, *(job.panel for job in jobs)]
    inputs = [path for pair in pairs for path in (pair.rainy, pair.clean) if path]
    check_outputs(written, inputs + left_out, args.output_path)

    # 2. Load, derain, save and measure each
    rows, thumbnails, failures = [], [], []
    step = -(-len(jobs) // MAX_THUMBNAILS)
    for number, job in enumerate(progress(jobs, "deraining")):
        try:
            row, small = process(runner, job, device, args.overwrite)
        except InputError as error:
            failures.append(printable(job.pair.rainy.name))
            tqdm.write(f"error: {printable(error)}")
            continue
        tqdm.write(describe(row))
        rows.append(row)
        if small is not None and number % step == 0:
            thumbnails.append(small)

    # 3. Report
    if rows:
        write_csv(args.output_path / "metrics.csv", ("image", *METRICS, "seconds"), [*rows, average(rows)])
        print(describe(average(rows)))
        print(f"{len(rows)} images in {printable(args.output_path)}")
    if thumbnails:
        write_image(sheet_path, contact_sheet(thumbnails))
        print(f"panels in {printable(args.output_path / 'comparison')}, {len(thumbnails)} images on {sheet_path.name}")
    if failures:
        raise RunError(f"{len(failures)} of {len(jobs)} images failed: {', '.join(failures)}")


# Videos


def derain_clip(runner, args, device):
    """Derain the video --test_data_path, and report how steady it is."""
    source = args.test_data_path
    output = args.output_path / f"{source.stem}.mp4"
    check_outputs([output], [source], args.output_path)
    if output.exists() and not args.overwrite:
        print(f"{printable(output)} is there already")
        return
    rows, lost, interrupted = derain_video(source, output, lambda frame: derain(runner, frame, device)[1])
    columns = ("frame", "seconds", "static", "change_rainy", "change_derained")
    summary = {name: mean(row[name] for row in rows) for name in columns[1:]}
    write_csv(output.with_suffix(".csv"), columns, [*rows, {"frame": f"average of {len(rows)}", **summary}])
    print(f"{len(rows)} frames, {summary['seconds']:.2f} s a frame, in {printable(output)}")
    if not np.isnan(summary["change_rainy"]):
        print(
            f"change between frames where the scene stands still ({summary['static']:.0%} of the pixels):"
            f" {summary['change_rainy']:.3f} grey levels before, {summary['change_derained']:.3f} after"
        )
    if interrupted:
        print(f"interrupted after frame {rows[-1]['frame']}; the video ends there")
        sys.exit(130)
    if lost:
        raise RunError(f"{printable(source)}: {len(lost)} frames could not be read, the first of them number {lost[0]}")


def load_runner(args, device):
    """The network of --save_path, ready for whole images in the precision and memory that the options allow."""
    precision = args.precision
    if precision == "auto":
        precision = "fp16" if device.type == "cuda" else "bf16" if fast_bfloat16(device) else "fp32"
    net = load_network(args.checkpoint, args.recurrent_iter, args.use_dilation).to(device)
    max_memory = 0.75 * free_memory() if args.max_memory is None else args.max_memory * 2**30
    runner = StripRunner(net, HALF_PRECISIONS.get(precision, torch.float32), max_memory)
    return self_ensemble(runner) if args.self_ensemble else runner


def main():
    args = parse_args()
    source = args.test_data_path
    if not source.exists():
        raise InputError(f"--test_data_path {source}: no such file or folder; expected an image, a folder or a video")
    clip = source.is_file() and source.suffix.lower() not in IMAGE_SUFFIXES
    check_options(args, clip)
    device = pick_device(args.device)
    runner = load_runner(args, device)
    print(f"weights: {printable(args.checkpoint)}")
    (derain_clip if clip else derain_images)(runner, args, device)


if __name__ == "__main__":
    run_script(main)
