"""Derain an image, a folder of images or a video, and report PSNR and SSIM where there is ground truth.

    python test.py --test_data_path datasets/test/RainSample

Writes one PNG an image and metrics.csv. The figures follow PReNet's MATLAB protocol, on the 8-bit images written.
"""
import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from comparison import MAX_THUMBNAILS, contact_sheet, panel, thumbnail
from DerainDataset import Pair, find_pairs, report_orphans
from inference import StripRunner, self_ensemble
from utils import (
    IMAGE_SUFFIXES, InputError, RunError, add_flag, add_network_options, at_least, fast_bfloat16, free_memory,
    load_network, measure, natural_key, pick_device, printable, progress, read_image, read_rgb, run_script, to_image,
    to_tensor, to_uint8, write_csv, write_image,
)
from video import derain_video

HALF_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_options(parser)
    parser.add_argument(
        "--test_data_path", type=Path, default=Path("datasets/test/Rain100H"), metavar="PATH",
        help="an image, a folder of rainy images, with ground truth or without, or a video (default: %(default)s)",
    )
    add_flag(parser, "--recursive", False, "take the images of all folders below too; no ground truth is looked for")
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
    args.output_path = args.output_path or default_output(args.test_data_path, args.save_path)
    return args


# What to read and where to write


def default_output(test_data_path, save_path):
    """results/SET/MODEL; a checkpoint has its folder's name too, as every run has a net_best.pth."""
    source, model = Path(os.path.abspath(test_data_path)), Path(os.path.abspath(save_path))
    name = f"{model.parent.name}-{model.stem}" if model.is_file() else model.name
    return Path("results", source.stem if source.is_file() else source.name, name)


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
    return sorted(paths, key=natural_key)


def find_inputs(args):
    """The ``Pair``s that --test_data_path names."""
    path = args.test_data_path
    if path.is_file():
        return [Pair(path, None)]
    if args.recursive and path.is_dir():
        paths = find_below(path, args.output_path)
        if not paths:
            raise InputError(f"--test_data_path {path}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in or below it")
        return [Pair(image, None) for image in paths]
    pairs, orphans = find_pairs(path, "--test_data_path", ground_truth_required=False)
    report_orphans(path, orphans)
    return pairs


def name_outputs(pairs, root=None):
    """Where each pair's result goes, relative to --output_path.

    It is the input's name as PNG, or with its suffix kept where two would collide; below ``root``, in the folder
    that mirrors the input's.
    """
    folders = [pair.rainy.parent.relative_to(root) if root else Path() for pair in pairs]
    stems = [folder / pair.rainy.stem for folder, pair in zip(folders, pairs)]
    twice = {stem for stem in stems if stems.count(stem) > 1}
    return [
        folder / f"{pair.rainy.name if stem in twice else pair.rainy.stem}.png"
        for folder, stem, pair in zip(folders, stems, pairs)
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

    Returns:
        (array of the same shape and dtype, alpha unchanged; its (H, W, 3) uint8 RGB, which is measured).
    """
    output = runner(to_tensor(image[..., :3]).to(device))
    derained = np.concatenate((to_image(output, image.dtype), image[..., 3:]), axis=2)
    return derained, to_image(output)


def process(runner, pair, output_path, device, overwrite=True, panel_path=None):
    """Derain one image and write it, or take what is there, and its panel if there is a path for that.

    Returns:
        (its row of the report: name, metrics where there is ground truth, seconds of the network; its thumbnail for
        the contact sheet, or None).
    """
    image, row = read_image(pair.rainy), {"image": printable(pair.rainy.name)}
    if output_path.exists() and not overwrite:
        derained = read_rgb(output_path)
        if derained.shape[:2] != image.shape[:2]:
            raise InputError(f"{output_path} is not the result of {pair.rainy}, whose size it has not; remove it")
    else:
        started = time.perf_counter()
        result, derained = derain(runner, image, device)
        row["seconds"] = time.perf_counter() - started
        write_image(output_path, result)
    clean = read_rgb(pair.clean) if pair.clean else None
    if clean is not None:
        if clean.shape != derained.shape:
            raise InputError(
                f"{pair.rainy} is {derained.shape[1]}x{derained.shape[0]} but its clean image {pair.clean.name} is"
                f" {clean.shape[1]}x{clean.shape[0]}; expected equal sizes"
            )
        row |= measure(derained, clean)
    if not panel_path:
        return row, None
    rainy = to_uint8(image[..., :3])
    scores = clean is not None and {"rainy": measure(rainy, clean), "derained": row}
    write_image(panel_path, panel(row["image"], rainy, derained, clean, scores))
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
    pairs = find_inputs(args)
    names = name_outputs(pairs, args.test_data_path if args.recursive and args.test_data_path.is_dir() else None)
    outputs = [args.output_path / name for name in names]
    sheet_path = args.output_path / "contact_sheet.jpg"
    panels = [args.output_path / "comparison" / name.with_suffix(".jpg") for name in names]
    written = [*outputs, *panels, sheet_path] if args.comparison else outputs
    check_outputs(written, [path for pair in pairs for path in pair if path], args.output_path)

    rows, failures, thumbnails = [], [], []
    step = -(-len(pairs) // MAX_THUMBNAILS)
    jobs = list(zip(pairs, outputs, panels if args.comparison else [None] * len(pairs)))
    for number, (pair, output, panel_path) in enumerate(progress(jobs, "deraining")):
        try:
            row, small = process(runner, pair, output, device, args.overwrite, panel_path)
        except InputError as error:
            failures.append(printable(pair.rainy.name))
            tqdm.write(f"error: {printable(error)}")
            continue
        rows.append(row)
        if small is not None and number % step == 0:
            thumbnails.append(small)
        tqdm.write(describe(row))
    if rows:
        write_csv(args.output_path / "metrics.csv", ("image", *METRICS, "seconds"), [*rows, average(rows)])
        print(describe(average(rows)))
        print(f"{len(rows)} images in {printable(args.output_path)}")
    if thumbnails:
        write_image(sheet_path, contact_sheet(thumbnails))
        print(f"panels in {printable(args.output_path / 'comparison')}, {len(thumbnails)} images on {sheet_path.name}")
    if failures:
        raise RunError(f"{len(failures)} of {len(pairs)} images failed: {', '.join(failures)}")


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


def main():
    args = parse_args()
    source = args.test_data_path
    if not source.exists():
        raise InputError(f"--test_data_path {source}: no such file or folder; expected an image, a folder or a video")
    clip = source.is_file() and source.suffix.lower() not in IMAGE_SUFFIXES
    if clip and args.comparison:
        raise InputError(f"--comparison: {source} is no image; expected an image or a folder of images")
    device = pick_device(args.device)
    if args.precision == "auto":
        args.precision = "fp16" if device.type == "cuda" else "bf16" if fast_bfloat16(device) else "fp32"
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32: TF32 would show in the third digit
    net = load_network(args.save_path, args.recurrent_iter, args.use_dilation).to(device)
    max_memory = 0.75 * free_memory() if args.max_memory is None else args.max_memory * 2**30
    runner = StripRunner(net, HALF_PRECISIONS.get(args.precision, torch.float32), max_memory)
    if args.self_ensemble:
        runner = self_ensemble(runner)
    (derain_clip if clip else derain_images)(runner, args, device)


if __name__ == "__main__":
    run_script(main)
