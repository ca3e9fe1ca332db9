r"""Compare the semantic losses: train once for each choice of terms, with equal seed, data and steps.

    python rain.py --clean scikit-image --out datasets/train/RainSynth --per_image 20
    python ablation.py --data_path datasets/train/RainSynth --output results/trial/table.md --val_pairs 1 \
        --max_steps 10 --patch_size 48 --batch_size 4

The second command trains five networks and writes a table of their PSNR, SSIM, LPIPS and PCL on the pairs that all of
them held out. Ten small steps, which take a few minutes, show how it works and say nothing about the losses. The
weights of VGG-16 and AlexNet are downloaded, or taken from --backbone_dir.

Options that this script does not have are passed on to each train.py, such as --patch_size here.
"""
import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from checkpoints import load_network
from inference import StripRunner, to_image, to_tensor
from losses import LPIPSLoss, PerceptualContrastiveLoss
from metrics import measure
from pairs import find_pairs, hold_out, read_pair
from utils import (
    InputError, RunError, a_path, at_least, begins_with, check_file, check_folder, counted, progress, run_script,
    write_text,
)

TRAIN = Path(__file__).resolve().with_name("train.py")
RUNS = {
    "pixel": (0, 0),  # name: --w_contrast, --w_lpips
    "pixel + PCL": (0.4, 0),
    "pixel + LPISL": (0, 1.0),
    "pixel + PCL + LPISL": (0.4, 1.0),
    "pixel + PCL + LPISL, a quarter of their weights": (0.1, 0.25),
}
HEADING = "# Ablation of the semantic losses"  # by which a later run knows its table
# Options of train.py that are set for each run, or would change which pairs it holds out.
NOT_PASSED_ON = ("--save_path", "--exclude_test", "--clean_path", "--side_by_side")


def parse_args(argv=None):
    """(options of this script, list of those to pass on)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--data_path", type=a_path(str), required=True, metavar="DIR",
        help="folder of pairs to train on and hold out from"
    )
    parser.add_argument(
        "--val_pairs", type=at_least(1), default=20, metavar="N", help="hold out N backgrounds (default: 20)"
    )
    parser.add_argument("--max_steps", type=at_least(1), default=500, help="steps of each run (default: 500)")
    parser.add_argument("--epochs", type=at_least(1), default=100, help="at most so many (default: 100)")
    parser.add_argument("--backbone_dir", type=a_path(str), metavar="DIR", help="folder of the backbones' weights")
    parser.add_argument(
        "--logs", type=a_path(), default=Path("logs/ablation"), metavar="DIR",
        help="folder of the runs (default: logs/ablation)",
    )
    parser.add_argument(
        "--output", type=a_path(), metavar="FILE", help="also write the table to this file, anew after each run"
    )
    args, passed_on = parser.parse_known_args(argv)
    for option in passed_on:
        name = option.partition("=")[0]
        if name.startswith("--") and any(refused.startswith(name) for refused in NOT_PASSED_ON):
            raise InputError(f"{name}: not one of the options that can be passed on to train.py")
    return args, passed_on


@torch.inference_mode()
def evaluate(weights, pairs, lpips, pcl):
    """Measure a network on whole images.

    Args:
        weights: path of its checkpoint.
        pairs: those to measure on.
        lpips, pcl: ``LPIPSLoss`` and ``PerceptualContrastiveLoss``.

    Returns:
        (4,) array: PSNR-Y in dB and SSIM-Y as in ``metrics.measure``, LPIPS and PCL, all averaged over the pairs.
    """
    runner, rows = StripRunner(load_network(weights)), []
    for pair in progress(pairs, weights.parent.name):
        rainy, clean = map(to_tensor, read_pair(pair))
        derained = runner(rainy).clamp(0, 1)
        scores = measure(to_image(derained), to_image(clean))
        distances = lpips(derained, clean).item(), pcl(derained, clean, rainy).item()
        rows.append((scores["psnr_y"], scores["ssim_y"], *distances))
    return np.mean(rows, axis=0)


def table_head(args, measured):
    """The lines above the rows of the table; ``measured`` is the number of pairs held out."""
    return [
        HEADING, "",
        f"Equal seed and {counted(args.max_steps, 'step')} for all; measured on {counted(measured, 'pair')} of the"
        " training folder that no",
        "run has seen. Lower is better for LPIPS (AlexNet) and PCL.", "",
        f"Command: `python ablation.py {shlex.join(sys.argv[1:])}`",
        f"(PyTorch {torch.__version__}, {torch.get_num_threads()} threads).", "",
        "| loss | PSNR-Y, dB | SSIM-Y | LPIPS | PCL |", "| --- | --- | --- | --- | --- |",
    ]


def main():
    args, passed_on = parse_args()
    check_folder("--logs", args.logs)
    if args.output:
        check_file("--output", args.output, begins_with(HEADING))
    held_out = hold_out(find_pairs(args.data_path).pairs, args.val_pairs)  # what train.py chooses from this folder too
    lpips, pcl = LPIPSLoss(backbone_dir=args.backbone_dir), PerceptualContrastiveLoss(args.backbone_dir)
    files = ["--backbone_dir", args.backbone_dir] if args.backbone_dir else []
    lines = table_head(args, len(held_out))
    print(*lines, sep="\n", flush=True)
    for number, (name, (w_contrast, w_lpips)) in enumerate(RUNS.items()):
        folder = args.logs / f"run{number}"
        command = [
            sys.executable, str(TRAIN), "--data_path", args.data_path, "--val_pairs", str(args.val_pairs),
            "--max_steps", str(args.max_steps), "--epochs", str(args.epochs), "--w_contrast", str(w_contrast),
            "--w_lpips", str(w_lpips), "--use_seg_stage1", "False", "--save_path", str(folder), *files, *passed_on,
        ]
        print(shlex.join(command[1:]), flush=True)
        if subprocess.run(command).returncode:
            raise RunError(f"{name}: train.py failed; the rows above are of the runs before it")
        scores = evaluate(folder / "net_latest.pth", held_out, lpips, pcl)
        figures = (f"{score:.{digits}f}" for score, digits in zip(scores, (3, 4, 4, 4)))
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
        print(lines[-1], flush=True)
        if args.output:
            write_text(args.output, "\n".join(lines) + "\n")


if __name__ == "__main__":
    run_script(main)
