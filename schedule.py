"""What changes in the course of a training run: learning rate, number of stages and loss terms; and where it ends.

    python -c "from train import parse_args; from schedule import conditions; print(conditions(parse_args([]), 9, 0.1))"
"""
import math
from typing import NamedTuple

from utils import at_least


class Conditions(NamedTuple):
    """What holds for one training step."""

    learning_rate: float
    recurrent_iter: int  # number of stages
    left_out: frozenset  # names of loss terms (``losses.DerainLoss``)


def conditions(args, epoch, done):
    """The ``Conditions`` of the next step, after ``epoch`` whole epochs and the share ``done``, 0 to 1, of the run."""
    if args.schedule == "cosine":
        rate = args.lr * (1 + math.cos(math.pi * done)) / 2
    else:
        rate = args.lr * 0.2 ** sum(epoch >= milestone for milestone in args.milestone)
    stages, until = args.first_stages or (args.recurrent_iter, 0)
    left_out = {"segmentation"} if epoch < args.seg_start_epoch else set()
    if done >= args.psnr_until:
        left_out.add("psnr_loss")
    return Conditions(rate, stages if done < until else args.recurrent_iter, frozenset(left_out))


def share_done(args, position, epoch_patches):
    """How much of the run is done, from 0 to 1: by --max_steps or by --epochs, whichever is further.

    Args:
        args: of train.py.
        position: a ``run_folder.Position``.
        epoch_patches: how many patches a whole epoch has, in all its batches.
    """
    epochs = (position.epoch + min(1, position.sample / epoch_patches)) / args.epochs
    return max(epochs, position.step / args.max_steps if args.max_steps else 0)


# Options


def add_schedule_options(group):
    """Add train.py's options of the schedule."""
    group.add_argument("--epochs", type=at_least(1), default=100, help="passes over the patches")
    group.add_argument(
        "--milestone", type=at_least(1), nargs="+", default=[30, 50, 80], metavar="EPOCH",
        help="epochs after which the learning rate is multiplied by 0.2",
    )
    group.add_argument(
        "--schedule", choices=("step", "cosine"), default="step",
        help="step lowers the learning rate at --milestone; cosine at each step, to 0 at the run's end",
    )
    group.add_argument("--lr", type=at_least(0, float), default=1e-3, help="initial learning rate")
    group.add_argument(
        "--first_stages", type=float, nargs=2, metavar=("N", "SHARE"),
        help="train the first SHARE of the run with N stages, which takes less time: for example 2 0.5",
    )
    group.add_argument(
        "--psnr_until", type=at_least(0, float), default=1, metavar="SHARE",
        help="leave out the PSNR term of --w_psnr after this share of the run",
    )
    group.add_argument(
        "--max_steps", type=at_least(1), metavar="N",
        help="end after N steps in all, if --epochs is not over before; --schedule cosine reaches 0 there",
    )
    group.add_argument(
        "--stop_after", type=at_least(1), metavar="N",
        help="stop after step N as Ctrl-C does: the schedule stays, and --resume goes on",
    )


def check_schedule_options(parser, args):
    """End the program for values that make no sense, and make the stages of ``args.first_stages`` an int."""
    if any(first >= second for first, second in zip(args.milestone, args.milestone[1:])):
        parser.error(f"argument --milestone: expected ascending epochs, got {' '.join(map(str, args.milestone))}")
    if not args.psnr_until <= 1:
        parser.error(f"argument --psnr_until: expected a share from 0 to 1, got {args.psnr_until:g}")
    if args.psnr_until < 1 and not args.w_psnr:
        parser.error("argument --psnr_until: there is no PSNR term to leave out; expected a --w_psnr above 0 too")
    if args.w_stages and args.recurrent_iter == 1:
        parser.error("argument --w_stages: a single stage has none before it; expected a larger --recurrent_iter")
    if args.first_stages:
        stages, share = args.first_stages
        if stages not in range(1, args.recurrent_iter + 1) or not 0 <= share < 1:
            expected = f"a number of stages from 1 to {args.recurrent_iter} (--recurrent_iter) and a share below 1"
            parser.error(f"argument --first_stages: expected {expected}, got {stages:g} {share:g}")
        args.first_stages = [int(stages), share]
