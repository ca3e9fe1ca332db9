"""Derain the images of a folder and report PSNR and SSIM where there is ground truth.

    python test.py --test_data_path datasets/test/RainSample --output_path results/RainSample

Writes one PNG an image and metrics.csv. The figures follow PReNet's MATLAB protocol, on the 8-bit images written.
"""
import argparse
import csv
import io
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from DerainDataset import find_pairs, report_orphans
from inference import StripRunner
from utils import (
    InputError, RunError, add_flag, at_least, fast_bfloat16, free_memory, load_network, measure, pick_device, progress,
    read_image, read_rgb, run_script, to_image, to_tensor, write_image, write_text,
)

HALF_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--save_path", default="logs/SAPNet/Model11", metavar="PATH",
        help="a checkpoint, or the folder of a training run (its net_latest.pth) (default: %(default)s)",
    )
    parser.add_argument(
        "--test_data_path", default="datasets/test/Rain100H", metavar="DIR",
        help="folder of rainy images, with ground truth or without (default: %(default)s)",
    )
    parser.add_argument(
        "--output_path", type=Path, default=Path("results/Rain100H/Model11"), metavar="DIR",
        help="folder of the derained images (default: %(default)s)",
    )
    parser.add_argument(
        "--recurrent_iter", type=at_least(1), metavar="N",
        help="number of stages (default: that of the checkpoint's training run, else 6)",
    )
    add_flag(
        parser, "--use_dilation", None, "dilated residual blocks (default: that of the training run, else published)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=("fp32", *HALF_PRECISIONS, "auto"), default="fp32",
        help="of the convolutions; auto is bf16 where the processor is faster with it (default: %(default)s)",
    )
    parser.add_argument(
        "--max_memory", type=at_least(0, float), metavar="GIB",
        help="an image that needs more on the CPU, 0.6 GiB a megapixel in fp32, works on disk"
        " (default: 3/4 of what is free)",
    )
    return parser.parse_args(argv)


def name_outputs(pairs, output_path):
    """The path to write for each pair: the input's name as PNG, or with its suffix kept where two would collide.

    Raises:
        InputError: an output would overwrite an image of the data set.
    """
    stems = [pair.rainy.stem for pair in pairs]
    names = [f"{pair.rainy.stem if stems.count(pair.rainy.stem) == 1 else pair.rainy.name}.png" for pair in pairs]
    inputs = {path.resolve() for pair in pairs for path in pair if path}
    for name in names:
        if (output_path / name).resolve() in inputs:
            raise InputError(f"--output_path {output_path}: {name} would overwrite an input; expected another folder")
    return [output_path / name for name in names]


def derain(runner, image, device):
    """Derain an image of 8 or 16 bits.

    Args:
        runner: the network as a ``StripRunner``.
        image: (H, W, 3 or 4) RGB(A) uint8 or uint16, any size.

    Returns:
        (array of the same shape and dtype, alpha unchanged; its (H, W, 3) uint8 RGB, which is measured).
    """
    output = runner(to_tensor(image[..., :3]).to(device))
    derained = np.concatenate((to_image(output, image.dtype), image[..., 3:]), axis=2)
    return derained, to_image(output)


def process(runner, pair, output_path, device):
    """Derain one image and write it.

    Returns:
        Its row of the report: name, seconds of the network, and the metrics where there is ground truth.
    """
    image = read_image(pair.rainy)
    started = time.perf_counter()
    derained, rgb = derain(runner, image, device)
    row = {"image": pair.rainy.name, "seconds": time.perf_counter() - started}
    write_image(output_path, derained)
    if pair.clean:
        clean = read_rgb(pair.clean)
        if clean.shape != rgb.shape:
            raise InputError(
                f"{pair.rainy} is {rgb.shape[1]}x{rgb.shape[0]} but its clean image {pair.clean.name} is"
                f" {clean.shape[1]}x{clean.shape[0]}; expected equal sizes"
            )
        row |= measure(rgb, clean)
    return row


def describe(row):
    """A row of the report as one line for the console."""
    if "psnr_y" not in row:
        return f"{row['image']:24} {row['seconds']:6.2f} s"
    return (
        f"{row['image']:24} Y {row['psnr_y']:7.4f} dB {row['ssim_y']:.4f}"
        f"   RGB {row['psnr_rgb']:7.4f} dB {row['ssim_rgb']:.4f}   {row['seconds']:6.2f} s"
    )


def average(rows):
    """The averages of a report: metrics over the images that have them, time without the first image's warm-up."""
    measured = [row for row in rows if "psnr_y" in row]
    seconds = [row["seconds"] for row in rows[1:] or rows]
    summary = {"image": f"average of {len(measured) or len(rows)}", "seconds": float(np.mean(seconds))}
    if measured:
        for name in METRICS:
            values = [row[name] for row in measured if not np.isnan(row[name])]  # images under 11 px have no SSIM
            summary[name] = float(np.mean(values)) if values else float("nan")
    return summary


def write_report(path, rows):
    """Write the rows as CSV, the average last."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ("image", *METRICS, "seconds"), lineterminator="\n")
    writer.writeheader()
    for row in (*rows, average(rows)):
        writer.writerow({name: f"{value:.6f}" if isinstance(value, float) else value for name, value in row.items()})
    write_text(path, text.getvalue())


def main():
    args = parse_args()
    device = pick_device(args.device)
    if args.precision == "auto":
        args.precision = "bf16" if fast_bfloat16(device) else "fp32"
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32: TF32 would show in the third digit
    net = load_network(args.save_path, args.recurrent_iter, args.use_dilation).to(device)
    max_memory = 0.75 * free_memory() if args.max_memory is None else args.max_memory * 2**30
    runner = StripRunner(net, HALF_PRECISIONS.get(args.precision, torch.float32), max_memory)
    pairs, orphans = find_pairs(args.test_data_path, "--test_data_path", ground_truth_required=False)
    report_orphans(args.test_data_path, orphans)
    outputs = name_outputs(pairs, args.output_path)

    rows, failures = [], []
    for pair, output in progress(list(zip(pairs, outputs)), "deraining"):
        try:
            rows.append(process(runner, pair, output, device))
            tqdm.write(describe(rows[-1]))
        except InputError as error:  # one bad file does not cost the others
            failures.append(pair.rainy.name)
            tqdm.write(f"error: {error}")
    if rows:
        write_report(args.output_path / "metrics.csv", rows)
        print(describe(average(rows)))
        print(f"{len(rows)} images in {args.output_path}")
    if failures:
        raise RunError(f"{len(failures)} of {len(pairs)} images failed: {', '.join(failures)}")


if __name__ == "__main__":
    run_script(main)
