"""Draw the course of a training run.

    pip install matplotlib
    python curve.py logs/SAPNet/Model11

writes curve.png into the run's folder: PSNR of the training batches and learning rate from its TensorBoard records,
and the validation after each epoch from its log.jsonl.
"""
import argparse
import json
import struct
from pathlib import Path

import numpy as np
from tensorboardX.proto.event_pb2 import Event

from utils import InputError, atomic_write, run_script


def read_records(folder):
    """{tag: {step: value}} of the scalars in a folder's TensorBoard files; of a step written twice, the later one.

    A file that a killed run left may end within a record.
    """
    series = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, start = path.read_bytes(), 0
        while start + 12 <= len(data):
            length, = struct.unpack_from("<Q", data, start)
            record, start = data[start + 12 : start + 12 + length], start + length + 16  # between two checksums
            if len(record) < length:
                break
            event = Event.FromString(record)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    series.setdefault(value.tag, {})[event.step] = value.simple_value
    return series


def draw(series, epochs, path):
    """Write the picture.

    Args:
        series: ``read_records``.
        epochs: the lines of log.jsonl.
        path: of the PNG file.

    Raises:
        InputError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("matplotlib is missing; expected it: pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    steps, psnr = map(np.array, zip(*sorted(series["train/psnr"].items())))
    width = max(1, len(psnr) // 20)
    smooth = np.convolve(psnr, np.ones(width) / width, "valid")
    axes.plot(steps, psnr, color="tab:blue", alpha=0.25)
    axes.plot(steps[width // 2 :][: len(smooth)], smooth, color="tab:blue", label="training batches, RGB")
    validated = [line for line in epochs if "val_psnr_y" in line]
    if validated:
        values = [line["val_psnr_y"] for line in validated]
        axes.plot([line["step"] for line in validated], values, "o-", color="tab:orange", label="validation, Y")
    axes.set(xlabel="step", ylabel="PSNR, dB")
    rate = axes.twinx()
    rate.plot(*zip(*sorted(series["train/learning_rate"].items())), color="tab:grey", linewidth=1)
    rate.set(ylabel="learning rate (grey)", ylim=(0, None))
    axes.legend(loc="lower center")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    pyplot.close(figure)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a training run's folder")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    series = read_records(args.folder)
    if not {"train/psnr", "train/learning_rate"} <= series.keys():
        raise InputError(f"{args.folder}: no records of steps; expected the folder of a training run")
    log = args.folder / "log.jsonl"
    epochs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    draw(series, epochs, args.folder / "curve.png")
    print(f"{args.folder / 'curve.png'}: written")


if __name__ == "__main__":
    run_script(main)
