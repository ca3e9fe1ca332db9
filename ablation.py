r"""Compare the semantic losses: train once for each choice of terms, with equal seed, data and steps.

    python rain.py --clean scikit-image --out datasets/train/RainSynth --per_image 20
    python ablation.py --data_path datasets/train/RainSynth --output results/trial/table.md --val_pairs 1 \
        --max_steps 10 --patch_size 48 --batch_size 4

The second command trains five networks and writes tables of their PSNR, SSIM, LPIPS and PCL on the pairs that all of
them held out, and on those of --val_path. With several --seeds it trains as many times five, and each cell has a figure
for each seed. Ten small steps, which take a few minutes, show how it works and say nothing about the losses. The
weights of VGG-16 and AlexNet are downloaded, or taken from --backbone_dir.

Options that this script does not have are passed on to each train.py, such as --patch_size here.
"""
import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from checkpoints import load_network
from inference import StripRunner, derain_array, to_image, to_tensor
from layouts import find_pairs
from losses import LPIPSLoss, PerceptualContrastiveLoss
from metrics import measure
from pairs import hold_out, read_pair
from training_sets import PRENET_FILES, counted_folder
from utils import (
    Gathered, InputError, RunError, a_path, add_flag, at_least, begins_with, check_file, check_folder, counted,
    progress, run_script, write_text,
)

TRAIN = Path(__file__).resolve().with_name("train.py")
RUNS = {
    "pixel": (0, 0),  # name: --w_contrast, --w_lpips
    "pixel + PCL": (0.4, 0),
    "pixel + LPISL": (0, 1.0),
    "pixel + PCL + LPISL": (0.4, 1.0),
    "pixel + PCL + LPISL, a quarter of their weights": (0.1, 0.25),
}
DIGITS = 3, 4, 4, 4  # of each figure in a table
HEADING = "# Ablation of the semantic losses"  # by which a later run knows its table
NOT_PASSED_ON = (  # options of train.py that are set for each run, or would make the runs unequal or not comparable
    "--data_path", "--val_pairs", "--val_path", "--exclude_test", "--clean_path", "--side_by_side", "--init_weights",
    "--max_steps", "--epochs", "--stop_after", "--seed", "--save_path", "--resume", "--use_stage1",
    "--use_contrast", "--use_lpips", "--use_seg_stage1", "--w_contrast", "--w_lpips", "--backbone_dir",
)
OPTIONS = "options.json"  # in the folder of the runs: what --resume compares


def parse_args(argv=None):
    """(options of this script, list of those to pass on)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--data_path", action=Gathered, type=a_path(str), nargs="+", required=True, metavar="DIR[:N]",
        help="folders of pairs to train on and hold out from; DIR:40 counts 40 times"
    )
    parser.add_argument(
        "--val_pairs", type=at_least(0), nargs="+", default=[20], metavar="N",
        help="hold out N backgrounds of each folder; several numbers: one for each folder (default: 20)"
    )
    parser.add_argument(
        "--val_path", type=a_path(str), metavar="DIR",
        help="further pairs to measure on; what shows a background of theirs is not trained on"
    )
    parser.add_argument(
        "--seeds", type=at_least(0), nargs="+", default=[0], metavar="SEED", help="train with each of them (default: 0)"
    )
    parser.add_argument("--max_steps", type=at_least(1), default=500, help="steps of each run (default: 500)")
    parser.add_argument("--backbone_dir", type=a_path(str), metavar="DIR", help="folder of the backbones' weights")
    parser.add_argument(
        "--logs", type=a_path(), default=Path("logs/ablation"), metavar="DIR",
        help="folder of the runs (default: logs/ablation)",
    )
    parser.add_argument(
        "--output", type=a_path(), metavar="FILE", help="also write the table to this file, anew after each run"
    )
    add_flag(parser, "--resume", False, "go on where this script was stopped, with the same options")
    add_flag(parser, "--preprocess", False, "pack the images again, also where PReNet's packed files lie beside them")
    args, passed_on = parser.parse_known_args(argv)
    if len(args.val_pairs) not in (1, len(args.data_path)):
        parser.error(f"argument --val_pairs: expected one number, or {len(args.data_path)}, one for each --data_path")
    if not any(args.val_pairs) and not args.val_path:
        raise InputError("--val_pairs: nothing to measure on; expected 1 or more, or --val_path DIR")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"argument --seeds: expected each once, got {' '.join(map(str, args.seeds))}")
    for option in passed_on:
        name = option.partition("=")[0]
        if name.startswith("--") and any(refused.startswith(name) for refused in NOT_PASSED_ON):
            raise InputError(f"{name}: not one of the options that can be passed on to train.py")
    return args, passed_on


def check_runs(args, passed_on):
    """See that the folders of the runs are free, or with --resume that they are of the same options.

    The options that an earlier call has kept count only where a run of its has begun: train.py may have refused them.

    Raises:
        InputError: they are not.
    """
    kept = args.logs / OPTIONS
    options = {name: value for name, value in vars(args).items() if name not in ("seeds", "logs", "output", "resume")}
    options["passed on"] = passed_on
    try:
        before = json.loads(kept.read_text()) if kept.exists() else options
        changed = [name for name in options if before[name] != options[name]]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"--logs: {kept} is not of this script; expected the options that it writes there") from None
    begun = [path for path in args.logs.glob("seed*/run*") if has_begun(path)]
    used = [path for path in (kept, *(args.logs / f"seed{seed}" for seed in args.seeds)) if path.exists()]
    if used and not args.resume and (begun or used != [kept]):
        raise InputError(f"--logs: {used[0]} is there already; expected --resume to go on with it, or another folder")
    if changed and begun:
        raise InputError(f"--resume {kept}: {changed[0]} was {before[changed[0]]}; expected the same options")
    write_text(kept, json.dumps(options, indent=2) + "\n")


def has_begun(folder):
    """Whether train.py has begun the run in ``folder``, having taken its options and data."""
    return (folder / "args.json").is_file()


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
        rainy, clean = read_pair(pair)
        derained = derain_array(runner, rainy).clamp(0, 1)
        scores = measure(to_image(derained), clean)
        rainy, clean = to_tensor(rainy), to_tensor(clean)
        distances = lpips(derained, clean).item(), pcl(derained, clean, rainy).item()
        rows.append((scores["psnr_y"], scores["ssim_y"], *distances))
    return np.mean(rows, axis=0)


def measured_pairs(args):
    """What the networks are measured on: {what it is: its pairs}. train.py holds out the same.

    Raises:
        InputError: no pairs, or a folder of patches whose backgrounds nobody can tell from those that are held out.
    """
    chosen, counts = {}, args.val_pairs * (len(args.data_path) if len(args.val_pairs) == 1 else 1)
    for text, count in zip(args.data_path, counts):
        folder, _ = counted_folder(text)
        if not args.preprocess and all((folder / name).is_file() for name in PRENET_FILES):
            raise InputError(
                f"--data_path {folder}: holds PReNet's packed files, from which nothing can be left out; expected"
                " --preprocess True, to pack its pairs, or a folder without these files"
            )
        if count:
            held_out = hold_out(find_pairs(folder).pairs, count)
            chosen[f"{counted(len(held_out), 'pair')} held out of {folder}"] = held_out
    if args.val_path:
        further = find_pairs(args.val_path, "--val_path").pairs
        chosen[f"{counted(len(further), 'pair')} of {args.val_path}"] = further
    return chosen


def table_of(title, scores):
    """The lines of the table of one set of pairs.

    Args:
        title: what was measured on.
        scores: {name of the losses: [(4,) array of ``evaluate`` for each seed]}.
    """
    lines = [f"## {title}", "", "| loss | PSNR-Y, dB | SSIM-Y | LPIPS | PCL |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, seeds in scores.items():
        cells = (" / ".join(f"{score:.{digits}f}" for score in column) for column, digits in zip(zip(*seeds), DIGITS))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def report(args, scores):
    """The text of the tables; ``scores`` is {what was measured on: as for ``table_of``}."""
    seeds = f"Seeds {' / '.join(map(str, args.seeds))}" if len(args.seeds) > 1 else "Equal seed"
    lines = [
        HEADING, "",
        f"{seeds} and {counted(args.max_steps, 'step')} for all. No run has seen what is measured on, nor its",
        "backgrounds. Lower is better for LPIPS (AlexNet) and PCL.", "",
        f"Command: `python ablation.py {shlex.join(sys.argv[1:])}`",
        f"(PyTorch {torch.__version__}, {counted(torch.get_num_threads(), 'thread')}).",
    ]
    for title, rows in scores.items():
        lines += ["", *table_of(title, rows)]
    return "\n".join(lines) + "\n"


def train(args, passed_on, seed, weights, folder):
    """Run train.py with these weights of PCL and LPISL.

    Raises:
        RunError: it failed.
    """
    command = [
        sys.executable, str(TRAIN), "--data_path", *args.data_path, "--val_pairs", *map(str, args.val_pairs),
        "--seed", str(seed), "--max_steps", str(args.max_steps), "--epochs", str(args.max_steps),  # no fewer steps
        "--w_contrast", str(weights[0]), "--w_lpips", str(weights[1]), "--use_seg_stage1", "False",
        "--preprocess", str(args.preprocess), "--save_path", str(folder), *passed_on,
    ]
    for option, value in (("--val_path", args.val_path), ("--backbone_dir", args.backbone_dir)):
        command += [option, value] if value else []
    if args.resume and has_begun(folder):
        command.append("--resume")
    print(shlex.join(command[1:]), flush=True)
    with subprocess.Popen(command) as process:
        try:
            process.wait()
        except KeyboardInterrupt:
            process.wait()  # it saves what --resume needs; subprocess.run would kill it
            raise
    if process.returncode:
        raise RunError(f"{folder}: train.py failed; expected --resume when its cause is mended")


def main():
    args, passed_on = parse_args()
    check_folder("--logs", args.logs)
    if args.output:
        check_file("--output", args.output, begins_with(HEADING))
    measured = measured_pairs(args)
    check_runs(args, passed_on)
    lpips, pcl = LPIPSLoss(backbone_dir=args.backbone_dir), PerceptualContrastiveLoss(args.backbone_dir)
    scores = {title: {} for title in measured}
    for seed in args.seeds:
        for number, (name, weights) in enumerate(RUNS.items()):
            folder = args.logs / f"seed{seed}" / f"run{number}"
            train(args, passed_on, seed, weights, folder)
            for title, pairs in measured.items():
                figures = evaluate(folder / "net_latest.pth", pairs, lpips, pcl)
                scores[title].setdefault(name, []).append(figures)
                print(f"{name}, seed {seed}, {title}: PSNR-Y, SSIM-Y, LPIPS, PCL", *figures.round(4), flush=True)
            if args.output:
                write_text(args.output, report(args, scores))
    print(report(args, scores), end="")


if __name__ == "__main__":
    run_script(main)
