"""Train SAPNet.

    python train.py --data_path datasets/train/RainTrainH --save_path logs/SAPNet/Model11

Packs the images of --data_path by itself, and writes weights, logs and the resumable state under --save_path.
Several GPUs: torchrun --nproc_per_node=N train.py ...
"""
import argparse
import copy
import json
import math
import os
import shutil
import signal
import socket
import struct
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from DerainDataset import ShuffledBatches, TrainingPatches, check_sizes, find_pairs, prepare_patches, report_orphans
from inference import StripRunner
from losses import BACKBONE_WEIGHTS, LPIPS_NETS, PIXEL_LOSSES, SMALLEST_IMAGE, WEIGHTS, DerainLoss
from muon import Muon, is_dense_kernel
from networks import RESIDUAL_CONVS, SEG_BACKBONES, SAPNet
from rain import PRESETS, TrainingRain
from utils import (
    InputError, RunError, add_flag, at_least, fast_bfloat16, join_processes, load_checkpoint, load_weights, locked,
    measure, pick_device, progress, read_options, read_rgb, remove_leftovers, run_script, save_checkpoint, to_image,
    to_tensor, write_text,
)

STATE_FILE = "train_state.pth"
OPTIMIZERS = {"adam": torch.optim.Adam, "muon": Muon}
DATA_HINT = (
    "README.md, section Data, says where to get the public sets, and this trains on drawn rain instead:"
    " python rain.py --clean scikit-image --out datasets/train/RainSynth --per_image 20"
    " && python train.py --data_path datasets/train/RainSynth --save_path logs/RainSynth"
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path", nargs="+", default=["datasets/train/RainTrainH"], metavar="DIR",
        help="one or more folders of rainy/clean pairs",
    )
    add_flag(group, "--preprocess", False, "pack the images again even if the packed file is up to date")
    group.add_argument("--packed_dir", default="datasets/packed", metavar="DIR", help="folder of the packed HDF5 files")
    group.add_argument("--patch_size", type=at_least(11), default=100, help="side of the training patches, px")
    group.add_argument("--stride", type=at_least(1), default=80, help="distance between patches, px")
    group.add_argument(
        "--exclude_test", nargs="+", default=[], metavar="DIR",
        help="leave out pairs that show a background of these test sets (when packing)",
    )
    add_flag(group, "--augment", True, "mirror half of the patches")
    group.add_argument("--num_workers", type=at_least(0), default=2, help="loader processes; 0 loads in the main one")
    group.add_argument("--val_path", metavar="DIR", help="folder of pairs to validate on after each epoch")
    group.add_argument(
        "--val_pairs", type=at_least(0), nargs="+", default=[0], metavar="N",
        help="hold out N pairs of each data folder and validate on them; several numbers: one for each folder",
    )
    group.add_argument(
        "--rain_mix", type=at_least(0, float), default=0, metavar="P",
        help="share of the patches that get the rain of another patch",
    )
    group.add_argument(
        "--rain_vary", type=at_least(0, float), default=0, metavar="P",
        help="share of the mixed rain that is sheared, stretched, crossed and scaled in level",
    )
    group.add_argument(
        "--rain_synth", nargs=2, metavar=("PRESET", "P"),
        help="share of the patches that get drawn rain (light, heavy, both); folders of clean photographs will do then",
    )

    group = parser.add_argument_group("network")
    group.add_argument("--recurrent_iter", type=at_least(1), default=6, help="number of stages")
    add_flag(group, "--use_dilation", True, "dilation 1, 2, 4, 8, 16 in the residual blocks")
    group.add_argument(
        "--residual_conv", choices=RESIDUAL_CONVS, default="plain", help="convolution of the residual blocks"
    )
    add_flag(group, "--use_cra", True, "channel residual attention in the residual blocks; False is PReNet's form")

    group = parser.add_argument_group("losses")
    group.add_argument("--pixel_loss", choices=PIXEL_LOSSES, default="ssim", help="ssim is the negative SSIM")
    group.add_argument("--w_psnr", type=at_least(0, float), default=0, help="weight of the negative PSNR in dB")
    add_flag(group, "--use_contrast", True, "add the perceptual contrastive loss (PCL)")
    add_flag(group, "--use_lpips", True, "add the learned perceptual image similarity loss (LPISL)")
    add_flag(group, "--use_seg_stage1", True, "add the loss of the background segmentation network (UBS)")
    group.add_argument("--w_contrast", type=at_least(0, float), default=WEIGHTS["contrast"], help="weight of PCL")
    group.add_argument("--w_lpips", type=at_least(0, float), default=WEIGHTS["lpips"], help="weight of LPISL")
    group.add_argument("--w_seg", type=at_least(0, float), default=WEIGHTS["segmentation"], help="weight of UBS")
    group.add_argument("--seg_start_epoch", type=at_least(0), default=50, metavar="EPOCH", help="UBS joins after it")
    group.add_argument("--lpips_net", choices=LPIPS_NETS, default="alex", help="backbone of LPISL")
    group.add_argument("--num_of_SegClass", type=at_least(2), default=21, metavar="N", help="classes of UBS")
    group.add_argument("--seg_backbone", choices=SEG_BACKBONES, default="resnet101", help="backbone of UBS")
    group.add_argument(
        "--backbone_dir", type=Path, metavar="DIR",
        help="folder with torchvision's weights of the backbones (default: torchvision's cache, filled by download)",
    )
    group.add_argument(
        "--backbone_weights", choices=BACKBONE_WEIGHTS, default="pretrained",
        help="random is for tests and dry runs only",
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch_size", type=at_least(1), default=12, help="patches a step")
    group.add_argument("--epochs", type=at_least(1), default=100, help="passes over the patches")
    group.add_argument(
        "--milestone", type=at_least(1), nargs="+", default=[30, 50, 80], metavar="EPOCH",
        help="epochs after which the learning rate is multiplied by 0.2",
    )
    group.add_argument(
        "--schedule", choices=("step", "cosine"), default="step",
        help="step lowers the learning rate at --milestone; cosine at each step, to 0 at the run's end",
    )
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="muon needs fewer steps")
    group.add_argument("--lr", type=at_least(0, float), default=1e-3, help="initial learning rate")
    group.add_argument(
        "--ema", type=float, default=0, metavar="DECAY",
        help="validate and save an exponential moving average of the weights, for example 0.999; 0: the weights",
    )
    group.add_argument(
        "--clip_grad", type=at_least(0, float), default=0, metavar="NORM", help="largest gradient norm; 0: no limit"
    )
    group.add_argument("--max_steps", type=at_least(1), metavar="N", help="stop after N steps in all (short runs)")
    add_flag(group, "--use_stage1", True, "train; False only validates and saves the model")
    group.add_argument("--init_weights", metavar="FILE", help="start from these weights")
    group.add_argument("--seed", type=at_least(0), default=0, help="of initialisation, shuffling and augmentation")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--save_path", type=Path, default=Path("logs/SAPNet/Model11"), metavar="DIR",
        help="folder of the run's files",
    )
    group.add_argument(
        "--save_freq", type=at_least(1), default=1, metavar="N", help="keep net_epochN.pth every N epochs"
    )
    group.add_argument(
        "--save_steps", type=at_least(1), default=500, metavar="N",
        help="save what --resume needs every N steps, not only when an epoch ends",
    )
    add_flag(group, "--resume", False, "continue the run stopped under --save_path")
    group.add_argument(
        "--log_interval", type=at_least(1), default=50, metavar="N", help="steps between TensorBoard records"
    )

    group = parser.add_argument_group("speed")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_flag(group, "--amp", None, "bfloat16 mixed precision (default: where the processor has it)")
    add_flag(group, "--compile", None, "torch.compile (default: for runs long enough to repay its warm-up)")
    add_flag(group, "--channels_last", True, "channels-last memory format")

    args = parser.parse_args(argv)
    if any(first >= second for first, second in zip(args.milestone, args.milestone[1:])):
        parser.error(f"argument --milestone: expected ascending epochs, got {' '.join(map(str, args.milestone))}")
    if len(args.val_pairs) not in (1, len(args.data_path)):
        expected = f"one number, or one for each folder of --data_path ({len(args.data_path)})"
        parser.error(f"argument --val_pairs: expected {expected}, got {' '.join(map(str, args.val_pairs))}")
    if not 0 <= args.ema < 1:
        parser.error(f"argument --ema: expected 0 or more and less than 1, got {args.ema:g}")
    if args.rain_synth:
        preset, text = args.rain_synth
        try:
            args.rain_synth = [preset, float(text)]
        except ValueError:
            args.rain_synth = [preset, -1]
        if preset not in (*PRESETS, "both") or not 0 <= args.rain_synth[1] <= 1:
            expected = f"{', '.join(PRESETS)} or both and a number from 0 to 1"
            parser.error(f"argument --rain_synth: expected {expected}, got {preset} {text}")
    if args.rain_mix + (args.rain_synth[1] if args.rain_synth else 0) > 1:
        parser.error("arguments --rain_mix and --rain_synth: expected shares that add up to 1 or less")
    if args.rain_vary > (1 if args.rain_mix else 0):
        parser.error(f"argument --rain_vary: expected 0 to 1, and --rain_mix with it, got {args.rain_vary:g}")
    return args


def learning_rate(args, position, steps):
    """The rate of the step that follows ``position``, in a run of ``steps``."""
    if args.schedule == "cosine":
        return args.lr * (1 + math.cos(math.pi * position.step / steps)) / 2
    return args.lr * 0.2 ** sum(position.epoch >= milestone for milestone in args.milestone)


class StopSignal:
    """Ctrl-C or SIGTERM asks the run to stop after the current step; a second Ctrl-C stops it at once."""

    def __init__(self):
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agree(self, device):
        """Whether any process of the run was asked to stop; all must call this at the same step."""
        if distributed.is_initialized():
            flag = torch.tensor(float(self.received), device=device)
            distributed.all_reduce(flag, distributed.ReduceOp.MAX)
            self.received = bool(flag)
        return self.received


class EventFile:
    """TensorBoard records in tensorboardX's format, written at once.

    tensorboardX's ``SummaryWriter`` writes from a thread, which a full disk ends; the run then waits for it forever.

    Args:
        folder: the run's.
        purge_step: TensorBoard drops what earlier files of the folder hold from this step on.
        enabled: False writes nothing.
    """

    def __init__(self, folder, purge_step, enabled=True):
        # A file for each start: that of a killed run may end within a record.
        self.path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self.enabled = enabled
        self.write(step=purge_step, file_version="brain.Event:2")
        self.write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, **content):
        if not self.enabled:
            return
        record = b""
        data = Event(wall_time=time.time(), **content).SerializeToString()
        for part in (struct.pack("<Q", len(data)), data):
            record += part + struct.pack("<I", masked_crc32c(part))
        try:
            with open(self.path, "ab") as file:
                file.write(record)
        except OSError as error:
            raise RunError(f"{self.path}: could not be written ({error.strerror})") from None

    def add_scalar(self, name, value, step):
        self.write(step=step, summary=summary.scalar(name, value))

    def add_image(self, name, image, step):
        """Add a (3, H, W) array in [0, 1]."""
        self.write(step=step, summary=summary.image(name, image))


@dataclass
class Position:
    """How far a run has come: all that the checkpointed state holds beside weights and optimizer."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches done in the epoch that is under way
    step: int = 0  # optimizer steps in all
    best_psnr_y: float = float("-inf")
    totals: dict = field(default_factory=dict)  # sums over the epoch's batches, by name


def check_finite(value, indices, dataset, what="loss"):
    """Stop the run if a step's loss, or what else is given, is not a finite number, naming the batch."""
    if not value.isfinite():
        names = "; ".join(dataset.describe(int(index)) for index in indices)
        raise RunError(f"the {what} is {value.item()} on the batch of {names}; the last checkpoint is kept")


def check_step(loss, indices, model, dataset):
    """Stop the run if a step's loss, or the weights that it left, are not finite; before each checkpoint."""
    check_finite(loss, indices, dataset)
    # A gradient that is not finite shows in the next step's loss, which would come too late.
    norm = torch.stack([parameter.detach().norm() for parameter in model.parameters()]).norm()
    check_finite(norm, indices, dataset, "norm of the weights")


def train_one_epoch(model, criterion, loader, optimizer, schedule, position, stop, writer, save, args, device):
    """Train on the rest of the epoch at ``position``, which moves along; return its last batch, None if there was none.

    ``schedule`` is the learning rate as a function of the position, ``save`` is called every --save_steps steps but
    the epoch's last. The batch is (rainy, derained, clean), each (N, 3, P, P), for the logs.
    """
    skip = {"segmentation"} if position.epoch < args.seg_start_epoch else set()
    totals, unchecked, images, shown = position.totals, None, None, ""
    loader.batch_sampler.start(position.epoch, position.batch)
    description = f"epoch {position.epoch + 1}/{args.epochs}"
    end = position.batch + len(loader)
    steps = min(len(loader), (args.max_steps or float("inf")) - position.step)
    for rainy, clean, indices in progress(loader, description, steps, status=lambda: shown):
        rainy, clean = rainy.to(device, non_blocking=True), clean.to(device, non_blocking=True)
        if args.channels_last:
            rainy = rainy.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            derained = model(rainy).float()
            loss, terms = criterion(derained, clean, rainy, skip)
        rate = schedule(position)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if args.clip_grad:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()

        # The loss is looked at one step late, so that a GPU has its next step queued while the CPU waits for it.
        if unchecked:
            check_finite(*unchecked, loader.dataset)
        unchecked = loss.detach(), indices
        images = rainy, derained.detach(), clean
        error = (images[1].clamp(0, 1) - clean).square().mean((1, 2, 3))
        terms = {**terms, "loss": loss, "psnr": -10 * error.clamp(min=1e-10).log10().mean()}
        for name, value in terms.items():
            totals[name] = totals.get(name, 0) + value.detach()
        position.batch += 1
        position.step += 1
        if position.step % args.log_interval == 0:
            for name, value in terms.items():
                writer.add_scalar(f"train/{name}", value.item(), position.step)
            writer.add_scalar("train/learning_rate", rate, position.step)
            shown = f"loss {loss.item():.4f}, PSNR {terms['psnr'].item():.2f} dB"
        # Agreeing makes the processes wait for one another, so several do not ask at every step.
        due = not distributed.is_initialized() or position.step % args.log_interval == 0
        if position.step == args.max_steps or due and stop.agree(device):
            break
        # At the epoch's end the caller saves, after its report: one that a kill prevents is then made up for.
        if position.step % args.save_steps == 0 and position.batch < end:
            check_step(*unchecked, model, loader.dataset)
            save()
    if unchecked:
        check_step(*unchecked, model, loader.dataset)
    return images


def average_totals(totals, ranks, device):
    """Make ``totals`` the same in all processes: the average of theirs."""
    for name in totals:
        value = torch.as_tensor(totals[name], dtype=torch.float32, device=device)
        distributed.all_reduce(value)
        totals[name] = value / ranks


def validate(net, pairs, device):
    """Average PSNR and SSIM (``utils.measure``) of ``net`` on whole images, in float32."""
    runner, results = StripRunner(net), []
    for pair in progress(pairs, "validation"):
        derained = runner(to_tensor(read_rgb(pair.rainy)).to(device))
        results.append(measure(to_image(derained), read_rgb(pair.clean)))
    return {name: float(np.mean([result[name] for result in results])) for name in results[0]}


@torch.no_grad()
def update_average(averaged, net, decay, step):
    """Move ``averaged`` on to the exponential moving average of the weights of ``net`` after ``step`` + 1 steps."""
    share = 1 - min(decay, (1 + step) / (10 + step))  # more of the new ones early on, or the first would stay too long
    for average, weight in zip(averaged.parameters(), net.parameters()):
        average.lerp_(weight, share)


def save_state(args, net, averaged, optimizer, position):
    """Write all that an exact resume needs, then net_latest.pth, which a resumed run begins by writing again."""
    totals = {name: float(value) for name, value in position.totals.items()}
    state = {
        "net": net.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizer": optimizer.state_dict(),
        "position": {**asdict(position), "totals": totals},
        "random": torch.get_rng_state(),
    }
    save_checkpoint(args.save_path / STATE_FILE, state)
    save_checkpoint(args.save_path / "net_latest.pth", averaged.state_dict())


def average_names(optimizer, parameter):
    """The averages that one of ``OPTIMIZERS`` keeps of a parameter's gradients."""
    return ["exp_avg"] if optimizer == "muon" and is_dense_kernel(parameter) else ["exp_avg", "exp_avg_sq"]


def load_state(args, net, averaged, optimizer):
    """Restore what ``save_state`` wrote; return the position."""
    path = args.save_path / STATE_FILE
    state = load_checkpoint(path)
    try:
        averaged.load_state_dict(state.get("averaged", state["net"]))
        net.load_state_dict(state["net"])  # the same object without --ema
        groups = optimizer.state_dict()["param_groups"]  # these follow from the options
        optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        torch.set_rng_state(state["random"])
        position = Position(**state["position"])
        fit = all(
            {name: value.shape for name, value in values.items() if name != "step"}
            == dict.fromkeys(average_names(args.optimizer, parameter), parameter.shape)
            for parameter, values in optimizer.state.items()
        )
        if not fit or [*map(type, astuple(position))] != [*map(type, astuple(Position()))]:
            raise ValueError
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{path}: not the state of a run with these network options and --optimizer; expected the run's own"
        ) from None
    tensors = [*net.parameters(), *averaged.parameters(), *(values["exp_avg"] for values in optimizer.state.values())]
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise InputError(f"{path}: NaN or infinite weights; expected the state of a run that can go on")
    return position


@contextmanager
def hold_run(args):
    """Keep --save_path to this process, and refuse what would harm the run that may be there.

    Raises:
        InputError: another process has it, there is a run that could be resumed, or none that can.
    """
    folder = args.save_path
    if args.resume and not folder.is_dir():
        raise InputError(f"--resume: no folder {folder}; expected that of a stopped run")
    with locked(folder / ".lock", f"--save_path {folder}"):
        remove_leftovers(folder)
        found = (folder / STATE_FILE).exists()
        if found and not args.resume:
            raise InputError(
                f"--save_path {folder}: holds another run; give --resume to continue it, or another folder"
            )
        if args.resume and not found:
            if (folder / "net_latest.pth").exists():  # never without the state in a run's own folder
                raise InputError(f"--resume: {folder} has weights but no {STATE_FILE}; expected a stopped run's folder")
            print(f"{folder}: nothing was saved there yet; starting from the beginning")
        yield


def write_arguments(args):
    """Write the resolved arguments beside the run, and say which of them a resumed run changes."""
    path = args.save_path / "args.json"
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    if args.resume and path.exists():
        before = read_options(args.save_path)
        changed = [
            f"--{name} {before.get(name)} -> {value}" for name, value in options.items() if before.get(name) != value
        ]
        print(f"resuming {args.save_path}", *changed, sep=", ")
    write_text(path, json.dumps(options, indent=2) + "\n")


def load_data(args, device, rank, ranks):
    """The training loader and the validation pairs, after packing what has to be packed."""
    if args.batch_size % ranks:
        raise InputError(
            f"--batch_size {args.batch_size}: expected a multiple of the {ranks} processes, which share it"
        )
    if rank > 0:
        distributed.barrier()  # the first process packs, the others read
    preset, synth = args.rain_synth or ("both", 0)
    rain = TrainingRain(synth, preset, args.rain_mix, args.rain_vary) if synth or args.rain_mix else None
    sources, val_pairs = [], []
    hold_out = args.val_pairs * (len(args.data_path) if len(args.val_pairs) == 1 else 1)
    for folder, number in zip(args.data_path, hold_out):
        if not Path(folder).is_dir():
            raise InputError(f"--data_path {folder}: no such folder; {DATA_HINT}")
        if number != hold_out[args.data_path.index(folder)]:
            raise InputError(f"--val_pairs: expected one number for {folder}, which --data_path names more than once")
        source, held_out = prepare_patches(
            folder, args.packed_dir, args.patch_size, args.stride, args.preprocess, args.exclude_test, number,
            draw_rain=rain is not None,
        )
        sources.append(source)
        val_pairs += [pair for pair in held_out if pair not in val_pairs]  # a folder may be given twice
    if any(hold_out) and not val_pairs:
        raise InputError(
            "--val_pairs: clean photographs have no pairs to hold out; make some with python rain.py"
            " --clean OTHER_PHOTOGRAPHS --out DIR, and give --val_path DIR"
        )
    if args.val_path:
        pairs, orphans = find_pairs(args.val_path, "--val_path")
        report_orphans(args.val_path, orphans)
        val_pairs += pairs
    if rank == 0 and ranks > 1:
        distributed.barrier()
    for pair in val_pairs:  # now, not after the first epoch
        if min(check_sizes(pair)) < 11:
            raise InputError(f"{pair.rainy}: expected validation images of 11 px or more, the window of SSIM")
        for path in pair:
            read_rgb(path)
    dataset = TrainingPatches(sources, args.augment, args.seed, rain)
    if len(dataset) < ranks:
        raise InputError(f"--data_path: {len(dataset)} patches are not enough for {ranks} processes")
    batches = ShuffledBatches(len(dataset), args.batch_size, args.seed, rank, ranks)
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=args.num_workers, pin_memory=device.type == "cuda",
        persistent_workers=args.num_workers > 0,
        generator=torch.Generator(),  # else each pass draws from the global random state, and resuming begins another
    )
    return loader, val_pairs


def build_network(args, device):
    """A network with fresh weights, or those of --init_weights."""
    net = SAPNet(args.recurrent_iter, args.use_dilation, args.residual_conv, args.use_cra).to(device)
    if args.init_weights:
        try:
            net.load_state_dict(load_weights(args.init_weights))
        except RuntimeError:
            raise InputError(
                f"--init_weights {args.init_weights}: weights of another network than the options ask for"
            ) from None
    return net.to(memory_format=torch.channels_last) if args.channels_last else net


def build_criterion(args, device):
    """The pixel loss and those further terms that the run will come to use."""
    weights = {
        "psnr_loss": args.w_psnr,
        "contrast": args.w_contrast if args.use_stage1 and args.use_contrast else 0,
        "lpips": args.w_lpips if args.use_stage1 and args.use_lpips else 0,
        "segmentation": args.w_seg if args.use_stage1 and args.use_seg_stage1 else 0,
    }
    if weights["segmentation"] and args.seg_start_epoch >= args.epochs:
        print(
            f"segmentation loss: not used, as --seg_start_epoch {args.seg_start_epoch}"
            f" is not under --epochs {args.epochs}"
        )
        weights["segmentation"] = 0
    smallest = SMALLEST_IMAGE[args.lpips_net]
    if weights["lpips"] and args.patch_size < smallest:
        expected = f"expected {smallest} or more for --lpips_net {args.lpips_net}, or --use_lpips False"
        raise InputError(f"--patch_size {args.patch_size}: {expected}")
    criterion = DerainLoss(
        args.pixel_loss, weights, args.lpips_net, args.num_of_SegClass, args.seg_backbone, args.backbone_dir,
        args.backbone_weights,
    )
    terms = [args.pixel_loss, *(f"{weight:g} {name}" for name, weight in criterion.weights.items())]
    print("loss:", " + ".join(terms), flush=True)
    return criterion.to(device, memory_format=torch.channels_last if args.channels_last else torch.preserve_format)


def report_epoch(args, net, rate, position, images, val_pairs, writer, complete, device, seconds):
    """Validate and write what an epoch leaves beside the state: its log line, its weights, the best weights."""
    record = {"epoch": position.epoch + 1, "step": position.step, "learning_rate": rate}
    record |= {name: float(total) / position.batch for name, total in position.totals.items()}
    record["seconds"] = round(seconds, 1)
    if val_pairs:
        scores = validate(net, val_pairs, device)
        for name, value in scores.items():
            record[f"val_{name}"] = value
            writer.add_scalar(f"val/{name}", value, position.step)
        if scores["psnr_y"] > position.best_psnr_y:
            position.best_psnr_y = scores["psnr_y"]
            save_checkpoint(args.save_path / "net_best.pth", net.state_dict())
    if images:
        for name, batch in zip(("rainy", "derained", "clean"), images):
            writer.add_image(name, batch[0].clamp(0, 1).float().cpu().numpy(), position.step)
    write_log_line(args.save_path / "log.jsonl", record)
    print(", ".join(f"{name} {value:.6g}" for name, value in record.items()), flush=True)
    if complete and record["epoch"] % args.save_freq == 0:
        save_checkpoint(args.save_path / f"net_epoch{record['epoch']}.pth", net.state_dict())


def write_log_line(path, record):
    """Add an epoch's record to the JSON Lines file, in place of any from the same or a later epoch."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["epoch"] < record["epoch"]]
    write_text(path, "\n".join([*kept, json.dumps(record)]) + "\n")


def choose_speed(args, device, steps):
    """Resolve the speed options that were left to the program."""
    if args.amp is None:
        args.amp = fast_bfloat16(device)
    if args.compile is None:
        # The warm-up takes about a minute, which short runs never earn back.
        args.compile = steps >= 1000 and shutil.which(os.environ.get("CXX", "g++")) is not None
    print(
        f"device {device}, bfloat16 {args.amp}, compile {args.compile}, channels_last {args.channels_last}", flush=True
    )


def finished(args, position):
    """Whether the run has all its epochs, or all its --max_steps."""
    return position.epoch >= args.epochs or (args.max_steps is not None and position.step >= args.max_steps)


def train(args, device, rank, ranks):
    """Run the training that ``args`` describe, as process ``rank`` of ``ranks``; return whether it was interrupted."""
    loader, val_pairs = load_data(args, device, rank, ranks)
    net = build_network(args, device)
    optimizer = OPTIMIZERS[args.optimizer](net.parameters(), lr=args.lr)
    criterion = build_criterion(args, device)
    averaged = copy.deepcopy(net) if args.ema else net
    resumed = (args.save_path / STATE_FILE).exists()
    position = load_state(args, net, averaged, optimizer) if resumed else Position()
    if args.ema:
        optimizer.register_step_post_hook(lambda *_: update_average(averaged, net, args.ema, position.step))

    batches = len(loader)
    # By the steps of the whole run: resuming must not change the arithmetic.
    steps = min(batches * args.epochs, args.max_steps or batches * args.epochs)
    choose_speed(args, device, steps)
    if rank == 0:
        write_arguments(args)
        if resumed:  # it was killed, perhaps, before it could write these
            save_checkpoint(args.save_path / "net_latest.pth", averaged.state_dict())
    model = torch.compile(net) if args.compile else net
    if ranks > 1:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    print(f"{len(loader.dataset)} patches, {batches} steps an epoch, {len(val_pairs)} validation pairs", flush=True)
    if args.use_stage1 and finished(args, position):
        print(f"nothing left to do after step {position.step}; a larger --epochs or --max_steps trains on")
        return False
    schedule, stop = partial(learning_rate, args, steps=steps), StopSignal()
    writer = EventFile(args.save_path, position.step + 1, enabled=rank == 0)

    def save():
        if ranks > 1:
            average_totals(position.totals, ranks, device)
        if rank == 0:
            save_state(args, net, averaged, optimizer, position)

    while True:
        started, images = time.monotonic(), None
        if args.use_stage1:
            images = train_one_epoch(
                model, criterion, loader, optimizer, schedule, position, stop, writer, save, args, device
            )
        if ranks > 1:
            average_totals(position.totals, ranks, device)
        complete, interrupted = position.batch == batches, stop.agree(device)
        if rank == 0 and (complete or not interrupted):
            seconds = time.monotonic() - started
            rate = schedule(position)
            report_epoch(args, averaged, rate, position, images, val_pairs, writer, complete, device, seconds)
        if complete:
            position.epoch, position.batch, position.totals = position.epoch + 1, 0, {}
        save()
        if not args.use_stage1 or finished(args, position):
            return False
        if interrupted:
            print(f"stopped after step {position.step}; the same command with --resume continues")
            return True


def main():
    args = parse_args()
    # Pages of 2 MiB (Linux), before PyTorch takes any memory: on two cores a step then takes 25 to 40 % less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    rank, ranks = join_processes(device)
    try:
        with hold_run(args) if rank == 0 else nullcontext():
            interrupted = train(args, device, rank, ranks)
    except RuntimeError as error:
        if ranks == 1:
            raise
        reason = str(error).splitlines()[0]
        raise RunError(
            f"process {rank} of {ranks} stopped ({reason}); --resume continues from the last checkpoint"
        ) from None
    if ranks > 1:
        distributed.destroy_process_group()
    if interrupted:
        sys.exit(130)


if __name__ == "__main__":
    run_script(main)
