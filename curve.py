r"""Draw the course of a training run.

    python rain.py --clean scikit-image --out datasets/train/RainSynth --per_image 20
    python train.py --data_path datasets/train/RainSynth --save_path logs/Short --patch_size 48 --batch_size 4 \
        --max_steps 60 --log_interval 2 --val_pairs 1 --use_contrast False --use_lpips False --use_seg_stage1 False
    pip install matplotlib
    python curve.py logs/Short

The first two commands make a run to draw, in a minute or two. The last one writes curve.png into its folder: the PSNR
of the training batches and of the validation after each epoch, and the learning rate, all from the run's log.jsonl.
"""
import argparse
import json

import numpy as np

from images import MARK, is_marked, read_metadata
from utils import InputError, a_path, atomic_write, check_file, run_script

LOG_FILE = "log.jsonl"


def read_log(path):
    """Read the log of a training run, whose lines are JSON objects.

    A line with "epoch" ends an epoch; any other is a step. If a step or an epoch has several lines, the last one
    counts. The last line of a run that was killed may be cut short: it is left out.

    Args:
        path: of the log.

    Returns:
        (steps, epochs): two lists of the lines as dictionaries, in the order of their "step".

    Raises:
        InputError: no such file, no steps in it, or lines that are not those of a training log.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected the folder of a training run, or a copy of its log") from None
    steps, epochs = {}, {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if "epoch" in record:
                epochs[float(record["step"])] = record
            else:
                steps[float(record["step"])] = {name: float(record[name]) for name in ("step", "psnr", "learning_rate")}
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise InputError(
                f"{path}: line {number} is not what train.py writes; expected JSON with step, psnr and learning_rate"
            ) from None
    if not steps:
        raise InputError(f"{path}: no step in it; expected the log of a run that trained")
    return [[records[step] for step in sorted(records)] for records in (steps, epochs)]


def draw(steps, epochs, path):
    """Write the picture.

    Args:
        steps, epochs: as ``read_log`` returns them.
        path: of the PNG file.

    Raises:
        InputError: matplotlib is missing.
        RunError: the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("matplotlib is missing; expected it: pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    numbers, psnr, rates = ([record[name] for record in steps] for name in ("step", "psnr", "learning_rate"))
    width = max(1, len(psnr) // 20)
    smooth = np.convolve(psnr, np.ones(width) / width, "valid")
    axes.plot(numbers, psnr, color="tab:blue", alpha=0.25)
    axes.plot(numbers[width // 2 :][: len(smooth)], smooth, color="tab:blue", label="training batches, RGB")
    validated = [record for record in epochs if "val_psnr_y" in record]
    if validated:
        values = [record["val_psnr_y"] for record in validated]
        axes.plot([record["step"] for record in validated], values, "o-", color="tab:orange", label="validation, Y")
    axes.set(xlabel="step", ylabel="PSNR, dB")
    rate_axes = axes.twinx()
    rate_axes.plot(numbers, rates, color="tab:grey", linewidth=1)
    rate_axes.set(ylabel="learning rate (grey)", ylim=(0, None))
    axes.legend(loc="lower center")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100, metadata={"Software": MARK})
    pyplot.close(figure)


def is_curve(path):
    """Whether a curve.png is of this program; earlier versions left matplotlib's name in it."""
    try:
        return str(read_metadata(path).software).startswith((MARK, "Matplotlib"))
    except InputError:
        return False


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=a_path(), metavar="RUN", help=f"a run's folder, or a copy of its {LOG_FILE}")
    parser.add_argument(
        "--output", type=a_path(), metavar="FILE",
        help="the PNG file to write (default: curve.png in the folder; NAME.png beside a log NAME.jsonl)",
    )
    return parser.parse_args(argv)


def main():
    args = parse_args()
    if not args.run.exists():
        raise InputError(f"{args.run}: no such file or folder; expected a training run's folder, or a copy of its log")
    if args.run.is_file():
        log, output = args.run, args.output or args.run.with_suffix(".png")
    else:
        log, output = args.run / LOG_FILE, args.output or args.run / "curve.png"
    if output.suffix != ".png":
        raise InputError(f"--output {output}: expected a file name that ends in .png")
    steps, epochs = read_log(log)
    check_file("--output", output, is_marked if args.output else is_curve)
    draw(steps, epochs, output)
    print(f"{output}: written")


if __name__ == "__main__":
    run_script(main)
