"""Train SAPNet.

    python train.py --data_path datasets/test/RainSample --save_path logs/Sample --max_steps 20 \
--use_contrast False --use_lpips False --use_seg_stage1 False

Packs the images of --data_path by itself, and writes weights, logs and the resumable state under --save_path. That
command is a trial on the bundled sample; README.md has those that train.
"""
import argparse
import copy
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from checkpoints import load_weights, save_checkpoint
from DerainDataset import ShuffledBatches, TrainingPatches, open_sets
from devices import (
    FiniteCheck, check_compile, check_cuda_graph, choose_speed, loader_processes, mixed_precision, pick_device,
    threads_beside,
)
from inference import StripRunner, derain_array, to_image
from losses import add_loss_options, build_criterion
from metrics import METRICS, measure
from muon import build_optimizers
from networks import RESIDUAL_CONVS, SAPNet, mismatch
from pairs import read_pair
from processes import (
    StopSignal, as_one_run, average, ignore_lost_children, join_processes, launcher, leave_signals_to_parent,
    rank_of_run, restarted, total,
)
from rain import TrainingRain, add_rain_options, check_rain_options
from run_folder import (
    BEST_FILE, STATE_FILE, Position, RunLog, RunState, begun_by, changed_data, hold_run, read_state, write_arguments,
)
from runners import SharedRunner
from schedule import add_schedule_options, check_schedule_options, conditions, share_done
from training_sets import (
    add_data_options, find_training_sets, find_validation_pairs, separate, summarise_validation, with_scales,
)
from training_step import build_pass, take_step
from utils import (
    InputError, Parser, a_path, add_flag, ahead, at_least, check_folder, counted, progress, run_script, want_of_memory,
)


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    group = parser.add_argument_group("data")
    add_data_options(group)
    add_rain_options(group)

    group = parser.add_argument_group("network")
    group.add_argument("--recurrent_iter", type=at_least(1), default=6, help="number of stages")
    add_flag(group, "--use_dilation", True, "dilation 1, 2, 4, 8, 16 in the residual blocks")
    group.add_argument(
        "--residual_conv", choices=RESIDUAL_CONVS, default="plain", help="convolution of the residual blocks"
    )
    add_flag(group, "--use_cra", True, "channel residual attention in the residual blocks; False is PReNet's form")

    add_loss_options(parser.add_argument_group("losses"))

    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch_size", type=at_least(1), default=12, help="patches a step")
    add_schedule_options(group)
    group.add_argument("--optimizer", choices=("adam", "muon"), default="adam", help="muon needs fewer steps")
    group.add_argument(
        "--weight_decay", type=at_least(0, float), default=0,
        help="with muon: a step of the rate lr first multiplies the kernels by 1 - lr * this, for example 0.1",
    )
    group.add_argument(
        "--ema", type=float, default=0, metavar="DECAY",
        help="validate and save an exponential moving average of the weights, for example 0.999; 0: no average",
    )
    group.add_argument(
        "--clip_grad", type=at_least(0, float), default=0, metavar="NORM", help="largest gradient norm; 0: no limit"
    )
    add_flag(group, "--use_stage1", True, "train; False only validates and saves the model")
    group.add_argument("--init_weights", type=a_path(str), metavar="FILE", help="start from these weights")
    group.add_argument(
        "--seed", type=at_least(0, maximum=2**64 - 1), default=0, help="of initialisation, order, augmentation and rain"
    )

    group = parser.add_argument_group("run")
    group.add_argument(
        "--save_path", type=a_path(), default=Path("logs/SAPNet/Model11"), metavar="DIR",
        help="folder of the run's files",
    )
    group.add_argument(
        "--save_freq", type=at_least(1), default=1, metavar="N", help="keep net_epochN.pth every N epochs"
    )
    group.add_argument(
        "--save_steps", type=at_least(1), default=500, metavar="N",
        help="save what --resume needs every N steps, not only when an epoch ends",
    )
    add_flag(group, "--safetensors", False, "write net_latest.safetensors too, which holds the network's options")
    add_flag(group, "--resume", False, "continue the run stopped under --save_path")
    group.add_argument(
        "--log_interval", type=at_least(1), default=50, metavar="N",
        help="steps between lines of log.jsonl and records for TensorBoard",
    )

    group = parser.add_argument_group("speed")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    group.add_argument(
        "--amp", type=mixed_precision, nargs="?", const=True, metavar="PRECISION",
        help="mixed precision: bf16, fp16, or True for the one the device is fast in, else bf16"
        " (default: the one it is fast in, or none)",
    )
    add_flag(group, "--compile", None, "torch.compile (default: for runs long enough to repay its warm-up)")
    add_flag(
        group, "--cuda_graph", None,
        "replay forward and backward pass as one CUDA graph (default: on a CUDA card, unless several processes train)",
    )
    add_flag(group, "--channels_last", True, "channels-last memory format")

    args = parser.parse_args(argv)
    if len(args.val_pairs) not in (1, len(args.data_path)):
        expected = f"one number, or one for each folder of --data_path ({len(args.data_path)})"
        parser.error(f"argument --val_pairs: expected {expected}, got {' '.join(map(str, args.val_pairs))}")
    if len(args.clean_path) not in (0, len(args.data_path)):
        parser.error(f"argument --clean_path: expected one folder for each --data_path ({len(args.data_path)})")
    if not 0 <= args.ema < 1:
        parser.error(f"argument --ema: expected 0 or more and less than 1, got {args.ema:g}")
    if args.weight_decay and args.optimizer != "muon":
        parser.error("argument --weight_decay: expected --optimizer muon, whose kernels decay")
    check_schedule_options(parser, args)
    check_rain_options(parser, args)
    return args


# What is trained on, and what is trained


def load_data(args, device, rank, ranks):
    """The training loader, the validation pairs, and a description of the data (``run_folder.changed_data``)."""
    if args.batch_size % ranks:
        raise InputError(f"--batch_size {args.batch_size}: expected a multiple of {ranks} processes, which share it")
    if args.num_workers is None:
        args.num_workers = loader_processes()
    preset, synth = args.rain_synth or ("both", 0)
    rain = TrainingRain(synth, preset, args.rain_mix, args.rain_vary) if synth or args.rain_mix else None
    sets = find_training_sets(
        args.data_path, args.clean_path, args.side_by_side, photographs=rain is not None, prenet=not args.preprocess
    )
    hold_out = args.val_pairs * (len(sets) if len(args.val_pairs) == 1 else 1)
    given = find_validation_pairs(args.val_path, args.side_by_side) if args.val_path else []
    smallest = args.patch_size if args.skip_small else 0
    val_pairs = separate(sets, hold_out, given, args.exclude_test, args.side_by_side, smallest)
    validation = summarise_validation(val_pairs)
    sets = with_scales(sets, args.photograph_scales)

    anew = args.preprocess and rank == 0 and not restarted()
    packing = args.packed_dir, args.patch_size, args.stride, anew, args.skip_small
    sources = open_sets(sets, *packing)
    dataset = TrainingPatches(sources, args.augment, args.seed, rain)
    if len(dataset) < ranks:
        raise InputError(f"--data_path: {counted(len(dataset), 'patch')}; expected one for each of {ranks} processes")
    loader = DataLoader(
        dataset, batch_sampler=ShuffledBatches(len(dataset), args.batch_size, args.seed, rank, ranks),
        num_workers=args.num_workers, pin_memory=device.type == "cuda", persistent_workers=args.num_workers > 0,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # else each pass draws from the global random state, and resuming begins another
    )
    return loader, val_pairs, {
        "seed": args.seed, "sources": [source.summary() for source in sources], "validation": validation
    }


def build_network(args, device, weights):
    """A network with fresh weights, or those of the checkpoint ``weights``."""
    net = SAPNet(args.recurrent_iter, args.use_dilation, args.residual_conv, args.use_cra).to(device)
    if weights:
        state = load_weights(weights)
        try:
            net.load_state_dict(state)
        except RuntimeError:
            raise InputError(f"--init_weights {weights}: {mismatch(net, state)}, for the network options") from None
    return net.to(memory_format=torch.channels_last) if args.channels_last else net


# The loop


@torch.no_grad()
def update_average(averaged, net, decay, step):
    """Move ``averaged`` on to the exponential moving average of the weights of ``net`` after ``step`` steps."""
    share = 1 - min(decay, step / (9 + step))  # more of the new ones early on, or the first would stay too long
    torch._foreach_lerp_(list(averaged.parameters()), list(net.parameters()), share)


def validate(net, pairs, device, rank=0, ranks=1):
    """Average PSNR and SSIM (``metrics.measure``) of ``net`` on whole images, in float32.

    Each process of the run takes its share of the pairs.
    """
    runner = SharedRunner(StripRunner(net))

    def score(pair):
        rainy, clean = read_pair(pair)
        return measure(to_image(derain_array(runner, rainy, device)), clean)

    mine = progress(pairs[rank::ranks], "validation")
    results = list(ahead(score, mine, threads_beside(device)))
    sums = total([sum(result[name] for result in results) for name in METRICS], device)
    return {f"val_{name}": value / len(pairs) for name, value in zip(METRICS, sums)}


def report_epoch(args, net, position, record, scores, log):
    """Write what an epoch leaves beside the state: the weights of the best validation, and its line of the log."""
    if scores:
        log.add_scalars("val", scores, position.step)
        record |= scores
        if scores["val_psnr_y"] > position.best_psnr_y:
            position.best_psnr_y = scores["val_psnr_y"]
            save_checkpoint(args.save_path / BEST_FILE, net.state_dict())
    log.write(record)
    print(", ".join(f"{name} {value:.6g}" for name, value in record.items()), flush=True)


def last_epoch(args, batches, position):
    """The number of the run's last epoch, from 1, seen from ``position``: epochs before may have had other batches."""
    if not args.max_steps:
        return args.epochs
    left = position.sample + (args.max_steps - position.step) * batches.batch_size
    return min(args.epochs, position.epoch + math.ceil(left / (len(batches) * batches.batch_size)))


def train(args, device, rank, ranks):
    """Run the training that ``args`` describe, as process ``rank`` of ``ranks``; return whether a signal stopped it."""
    # What the run goes on from is read by the first process alone: another machine may see the folder as it was.
    saved = position = expected = None
    if rank > 0:
        saved, position, expected = join_processes(device)  # the first, when it has packed and downloaded
    elif (args.save_path / STATE_FILE).exists():
        saved, position = read_state(args.save_path)
    resumed, position = saved is not None, position or Position()
    loader, val_pairs, data = load_data(args, device, rank, ranks)
    if rank > 0 and (change := changed_data(expected, data, "in the first process", "in this one")):
        raise InputError(f"process {rank} of {ranks}: {change}; expected the same data and options for all")
    dataset, batches = loader.dataset, loader.batch_sampler
    net = build_network(args, device, None if resumed else args.init_weights)
    averaged = copy.deepcopy(net) if args.ema else net
    optimizers = build_optimizers(args.optimizer, net, args.lr, args.weight_decay)
    criterion = build_criterion(args, device, last_epoch(args, batches, position))
    if rank == 0:
        join_processes(device, message=(saved, position, data))
    horizon = {"batch_size": args.batch_size, "processes": ranks, "epochs": args.epochs, "max_steps": args.max_steps}
    # By the steps of the whole run: resuming must not change the arithmetic.
    choose_speed(args, device, min(len(batches) * args.epochs, args.max_steps or math.inf), ranks)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    state = RunState(net, averaged, optimizers, scaler, data, horizon, args.safetensors)
    if resumed:
        state.load(args.save_path, saved, position)
    model = torch.compile(net) if args.compile else net
    if ranks > 1:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    differentiated = build_pass(args, net, model, criterion, scaler)
    epoch_patches = len(batches) * batches.batch_size
    steps, pairs = counted(len(batches), "step"), counted(len(val_pairs), "validation pair")
    print(f"{counted(len(dataset), 'patch')}, {steps} an epoch, {pairs}", flush=True)
    if args.use_stage1 and share_done(args, position, epoch_patches) >= 1:
        if rank == 0:  # the run was killed, perhaps, before it could write these
            state.save_weights(args.save_path)
        print(f"nothing left to do after step {position.step}; a larger --epochs or --max_steps trains on")
        return False
    if rank == 0:
        write_arguments(args)
        if resumed:
            state.save_weights(args.save_path)
    log, stop, finite = RunLog(args.save_path, position, enabled=rank == 0), StopSignal(), FiniteCheck(dataset.describe)

    def save():
        """Save the state; all processes must call this at the same step."""
        totals = average([float(total) for total in position.totals.values()], device)
        position.totals = dict(zip(position.totals, totals))
        if rank == 0:
            state.save(args.save_path, position)

    while True:
        started, images, indices, shown = time.monotonic(), {}, (), ""
        batches.start(position.epoch, position.sample)
        log.start_interval(position)
        left = (len(dataset) - position.sample) // batches.batch_size if args.use_stage1 else 0
        left = min(left, (args.max_steps or math.inf) - position.step)
        done, stopped, now = share_done(args, position, epoch_patches), False, None
        bar = progress(loader if left else (), f"epoch {position.epoch + 1}/{args.epochs}", left, lambda: shown)
        for rainy, clean, indices in bar:
            log.batch_arrived()
            rainy, clean = rainy.to(device, non_blocking=True), clean.to(device, non_blocking=True)
            if args.channels_last:
                rainy = rainy.contiguous(memory_format=torch.channels_last)
            now = conditions(args, position.epoch, done)
            derained, terms = take_step(args, net, differentiated, optimizers, scaler, (rainy, clean), now)
            finite.add(terms["loss"], "loss", indices)
            position.advance(batches.batch_size, terms)
            if args.ema:
                update_average(averaged, net, args.ema, position.step)

            finite.check()
            images = {"rainy": rainy, "derained": derained, "clean": clean}
            done = share_done(args, position, epoch_patches)
            due = position.step % args.log_interval == 0
            if due or position.step == 1 or done >= 1:
                values = average([value.item() for value in terms.values()], device)  # waits for the device
                shown = log.write_step(position, {"learning_rate": now.learning_rate, **dict(zip(terms, values))})
            # Agreeing waits for the device, so several processes with GPUs do not ask at every step.
            asks = due or ranks == 1 or device.type == "cpu"
            stopped = position.step == args.stop_after or asks and stop.agree(device)
            if stopped or done >= 1:
                break
            # At the epoch's end the state is saved after the report, so that a run killed in between makes it again.
            if position.step % args.save_steps == 0 and len(dataset) - position.sample >= batches.batch_size:
                finite.check_weights(net, indices)
                save()
            log.step_ended()

        finite.check_weights(net, indices)
        complete = len(dataset) - position.sample < batches.batch_size
        # A run resumed with a larger batch may find too few patches left in its last epoch, and takes no step then.
        ended = done >= 1 or not args.use_stage1 or complete and position.epoch + 1 == args.epochs
        stopped = stop.agree(device) or stopped
        means = average([float(total) / position.counts[name] for name, total in position.totals.items()], device)
        reported = complete or ended
        scores = validate(averaged, val_pairs, device, rank, ranks) if reported and val_pairs else {}
        if rank == 0 and reported:
            log.add_images(images, position.step)
            record = {"epoch": position.epoch + 1, "step": position.step}
            record |= {"learning_rate": now.learning_rate} if now else {}
            record |= {**dict(zip(position.totals, means)), "seconds": round(time.monotonic() - started, 1)}
            report_epoch(args, averaged, position, record, scores, log)
        if complete:
            position.next_epoch()
            if rank == 0 and position.epoch % args.save_freq == 0:
                save_checkpoint(args.save_path / f"net_epoch{position.epoch}.pth", averaged.state_dict())
        save()
        if ended or stopped:
            if not ended:
                print(f"stopped after step {position.step}; the same command with --resume continues")
            return stop.agreed and not ended


def main():
    args = parse_args()
    # Pages of 2 MiB (Linux), before PyTorch takes any memory: on two cores a step then takes 25 to 40 % less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    check_folder("--packed_dir", args.packed_dir)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    check_compile(args.compile, device)
    rank, ranks = rank_of_run()
    check_cuda_graph(args.cuda_graph, device, ranks)
    args.resume = args.resume or restarted() and begun_by(args.save_path, launcher())
    with as_one_run(rank, ranks, "; --resume goes on from the last save"), ignore_lost_children():
        with hold_run(args.save_path, args.resume) if rank == 0 else nullcontext():
            with want_of_memory(advice="; a smaller --batch_size takes less, and --resume goes on from the last save"):
                interrupted = train(args, device, rank, ranks)
    if interrupted:
        sys.exit(130)


if __name__ == "__main__":
    run_script(main)
