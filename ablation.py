"""Compare the semantic losses: train once for each choice of terms, with equal seed, data and steps.

    python ablation.py --data_path datasets/train/RainTrainL --max_steps 500 --output results/ablation.md

Each run holds out the same 20 pairs, on which PSNR, SSIM, LPIPS and PCL are measured at its end. Arguments that this
script does not know go to every train.py, for example --backbone_dir.
"""
import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from DerainDataset import find_pairs, pick_held_out
from inference import StripRunner
from losses import LPIPSLoss, PerceptualContrastiveLoss
from utils import (
    RunError, at_least, load_network, measure, progress, read_rgb, run_script, to_image, to_tensor, write_text,
)

HELD_OUT = 20
RUNS = {
    "pixel": (0, 0),  # name: --w_contrast, --w_lpips
    "pixel + PCL": (0.4, 0),
    "pixel + LPISL": (0, 1.0),
    "pixel + PCL + LPISL": (0.4, 1.0),
    "pixel + PCL + LPISL, a quarter of their weights": (0.1, 0.25),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_path", required=True, metavar="DIR", help="folder of pairs to train on and hold out from"
    )
    parser.add_argument("--max_steps", type=at_least(1), default=500, help="steps of each run (default: 500)")
    parser.add_argument("--epochs", type=at_least(1), default=100, help="at most so many (default: 100)")
    parser.add_argument("--backbone_dir", metavar="DIR", help="folder of the backbones' weights")
    parser.add_argument(
        "--logs", type=Path, default=Path("logs/ablation"), metavar="DIR",
        help="folder of the runs (default: logs/ablation)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results/ablation.md"), metavar="FILE",
        help="the table (default: results/ablation.md)",
    )
    return parser.parse_known_args(argv)


@torch.inference_mode()
def evaluate(weights, pairs, lpips, pcl):
    """Mean PSNR-Y, SSIM-Y, LPIPS and PCL of a network on whole images; the first two as ``utils.measure`` has them."""
    runner, rows = StripRunner(load_network(weights)), []
    for pair in progress(pairs, weights.parent.name):
        rainy, clean = (to_tensor(read_rgb(path)) for path in pair)
        derained = runner(rainy).clamp(0, 1)
        scores = measure(to_image(derained), to_image(clean))
        distances = lpips(derained, clean).item(), pcl(derained, clean, rainy).item()
        rows.append((scores["psnr_y"], scores["ssim_y"], *distances))
    return np.mean(rows, axis=0)


def main():
    args, passed_on = parse_args()
    files = ["--backbone_dir", args.backbone_dir] if args.backbone_dir else []
    lines = [
        "# Ablation of the semantic losses", "",
        f"Equal seed and {args.max_steps} steps for all; measured on {HELD_OUT} pairs of the training folder that no",
        "run has seen. Lower is better for LPIPS (AlexNet) and PCL.", "",
        f"Command: `python ablation.py {shlex.join(sys.argv[1:])}`",
        f"(PyTorch {torch.__version__}, {torch.get_num_threads()} threads).", "",
        "| loss | PSNR-Y, dB | SSIM-Y | LPIPS | PCL |", "| --- | --- | --- | --- | --- |",
    ]
    held_out = pick_held_out(find_pairs(args.data_path)[0], HELD_OUT)
    lpips, pcl = LPIPSLoss(backbone_dir=args.backbone_dir), PerceptualContrastiveLoss(args.backbone_dir)
    for number, (name, (w_contrast, w_lpips)) in enumerate(RUNS.items()):
        folder = args.logs / f"run{number}"
        command = [
            sys.executable, "train.py", "--data_path", args.data_path, "--val_pairs", str(HELD_OUT),
            "--max_steps", str(args.max_steps), "--epochs", str(args.epochs), "--w_contrast", str(w_contrast),
            "--w_lpips", str(w_lpips), "--use_seg_stage1", "False", "--save_path", str(folder), *files, *passed_on,
        ]
        print(shlex.join(command[1:]), flush=True)
        if subprocess.run(command).returncode:
            raise RunError(f"{name}: train.py failed; {args.output} has the runs before it")
        scores = evaluate(folder / "net_latest.pth", held_out, lpips, pcl)
        figures = (f"{score:.{digits}f}" for score, digits in zip(scores, (3, 4, 4, 4)))
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
        print(lines[-1], flush=True)
        write_text(args.output, "\n".join(lines) + "\n")


if __name__ == "__main__":
    run_script(main)
