"""What a training run leaves under its --save_path: lock, arguments, log, state.

    python -c "from run_folder import Position; print(Position())"

The state is the contract of --resume: it says how far the run has come and on which data, so that a run can go on with
another batch size or number of processes, and not with other data.
"""
import errno
import json
import os
import socket
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from checkpoints import load_checkpoint, network_options, read_options, save_checkpoint, save_safetensors
from muon import Muon
from processes import launcher
from utils import InputError, RunError, check_folder, counted, locked, remove_leftovers, write_text

STATE_FILE, WEIGHTS_FILE, LOG_FILE = "train_state.pth", "net_latest.pth", "log.jsonl"
SAFETENSORS_FILE, BEST_FILE = "net_latest.safetensors", "net_best.pth"
OPTIMIZER_STATE = {torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"exp_avg"}}


# The folder


@contextmanager
def hold_run(folder, resume):
    """Keep a run's folder to this process, and refuse what would harm the run that may be there.

    Raises:
        InputError: another process uses the folder; it holds a run and ``resume`` is False; ``resume`` is True and
            there is no such folder; or it holds files that no stopped run leaves.
    """
    check_folder("--save_path", folder)
    if resume and not folder.is_dir():
        raise InputError(f"--resume: no folder {folder}; expected that of a stopped run")
    with locked(folder / ".lock", f"--save_path {folder}"):
        found = (folder / STATE_FILE).exists()
        if found and not resume:
            raise InputError(
                f"--save_path {folder}: holds another run; give --resume to continue it, or another folder"
            )
        if not found:
            refuse_other_files(folder, "--resume" if resume else "--save_path")
        if resume and not found:
            print(f"{folder}: nothing was saved there yet; starting from the beginning")
        remove_leftovers(folder)
        yield


def begun_by(folder, launcher):
    """Whether this very torchrun began the run in the folder, so that it goes on without --resume.

    torchrun starts the processes again after any failure, also after they have refused to write over another run.
    """
    try:
        return load_checkpoint(folder / STATE_FILE)["launcher"] == launcher
    except (InputError, KeyError, TypeError):
        return False


def refuse_other_files(folder, option):
    """Refuse a folder without a state where a run would write over files that no run has left.

    One that was killed before it saved its state leaves its options, a log of its first epoch at most, and perhaps the
    weights of that epoch, but not the latest ones.
    """
    log = folder / LOG_FILE
    taken = [name for name in (WEIGHTS_FILE, SAFETENSORS_FILE) if (folder / name).exists()]
    try:
        options = read_options(folder)
    except InputError:
        options = None
    of_a_run = "save_path" in (options or {})  # which are written before the log
    if log.exists() and not (of_a_run and is_log(log)):
        taken.append(LOG_FILE)
    if (folder / "args.json").exists() and not of_a_run:
        taken.append("args.json")
    ends = ["epoch" in record for record in read_log(log)] if log.exists() and not taken else []
    if not of_a_run or True in ends[:-1]:
        epochs = sorted(path.name for path in folder.glob("net_epoch*.pth"))
        taken += [name for name in (BEST_FILE, *epochs) if (folder / name).exists()]
    if taken:
        raise InputError(
            f"{option} {folder}: has {taken[0]} but no {STATE_FILE}; expected a stopped run's folder, or another one"
        )


def is_log(path):
    """Whether a log.jsonl is empty or of a run, which may have been killed within its first line."""
    try:
        text = path.read_text(encoding="utf-8")
        return not text or bool(read_log(path)) or text.startswith("{") and "\n" not in text
    except (OSError, ValueError):
        return False


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


# The log


def read_log(path):
    """The lines of a log.jsonl as dictionaries, up to one that a killed run may have left unfinished."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


class RunLog:
    """log.jsonl and the records for TensorBoard of a run.

    Both are written at once, in the calling thread. TensorBoardX's ``SummaryWriter`` writes in a thread of its own: a
    full disk ends that thread, and the run would wait for it forever.

    Args:
        folder: the run's.
        position: where the run begins or goes on; what earlier starts wrote beyond it is dropped.
        enabled: False writes nothing, in all processes of a run but the first.
    """

    def __init__(self, folder, position, enabled=True):
        self.path, self.enabled = folder / LOG_FILE, enabled
        self.start_interval(position)
        if not enabled:
            return
        if self.path.exists():
            kept = [
                json.dumps(record) + "\n" for record in read_log(self.path)
                if record["step"] <= position.step and record.get("epoch", 0) <= position.epoch
            ]
            write_text(self.path, "".join(kept))
        # A file for each start: that of a killed run may end within a record.
        self.events_path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        with self.writing(self.events_path):
            self.events = RecordWriter(str(self.events_path))
        self.write_event(step=position.step + 1, file_version="brain.Event:2")
        self.write_event(step=position.step + 1, session_log=SessionLog(status=SessionLog.START))

    @contextmanager
    def writing(self, path):
        """Name the file that cannot be written."""
        try:
            yield
        except OSError as error:
            raise RunError(f"{path}: could not be written ({error.strerror})") from None

    def write_event(self, **content):
        if not self.enabled:
            return
        with self.writing(self.events_path):
            self.events.write(Event(wall_time=time.time(), **content).SerializeToString())
            self.events.flush()

    def write(self, record):
        """Add a line to log.jsonl, whole or not at all."""
        if not self.enabled:
            return
        with self.writing(self.path), open(self.path, "ab", buffering=0) as file:
            line, size = json.dumps(record).encode() + b"\n", file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise

    def add_scalars(self, group, values, step):
        """Add {name: value} to TensorBoard's ``group``."""
        parts = [summary.scalar(f"{group}/{name}", value).value[0] for name, value in values.items()]
        self.write_event(step=step, summary=Summary(value=parts))

    def add_images(self, batches, step):
        """Add the first image of each of {name: (N, 3, H, W) tensor} to TensorBoard."""
        for name, images in batches.items():
            self.write_event(step=step, summary=summary.image(name, images[0].clamp(0, 1).float().cpu().numpy()))

    def start_interval(self, position):
        """Begin to measure the speed, at ``position``."""
        self.begun = self.idle_since = time.monotonic()
        self.waited, self.seen = 0.0, position.seen

    def batch_arrived(self):
        """Note the end of the wait for a batch, which began with the end of the step before."""
        self.waited += time.monotonic() - self.idle_since

    def step_ended(self):
        """Note the beginning of the wait for the next batch."""
        self.idle_since = time.monotonic()

    def write_step(self, position, values):
        """Log the terms of a step, and the speed since the last time.

        Args:
            position: after the step.
            values: {name: number}, with "loss" and "psnr".

        Returns:
            The values in short, for the console.
        """
        seconds = time.monotonic() - self.begun
        speed, waiting = (position.seen - self.seen) / seconds, self.waited / seconds
        self.add_scalars("train", values, position.step)
        figures = {"patches_per_second": round(speed, 1), "waiting": round(waiting, 3)}
        self.write({"step": position.step, **values, **figures})
        self.start_interval(position)
        return (
            f"loss {values['loss']:.4f}, PSNR {values['psnr']:.2f} dB, {speed:.1f} patches/s,"
            f" {waiting:.0%} of the time waiting for data"
        )


# The state


@dataclass
class Position:
    """How far a run has come."""

    epoch: int = 0  # epochs completed
    sample: int = 0  # patches of the epoch that is under way that have been seen, by all processes together
    step: int = 0  # optimizer steps in all
    seen: int = 0  # patches in all
    best_psnr_y: float = float("-inf")  # of the validations so far
    totals: dict = field(default_factory=dict)  # sums over the epoch's batches, by the name of the loss term
    counts: dict = field(default_factory=dict)  # of how many batches each, as not every step has every term

    def advance(self, patches, terms):
        """Count a step on so many patches, whose loss terms were {name: number or scalar tensor}."""
        self.step, self.sample, self.seen = self.step + 1, self.sample + patches, self.seen + patches
        for name, value in terms.items():
            self.totals[name] = self.totals.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def next_epoch(self):
        """Begin the next epoch."""
        self.epoch, self.sample, self.totals, self.counts = self.epoch + 1, 0, {}, {}


def changed_data(before, now, there="then", here="now"):
    """What of the data has changed, as part of a sentence; None where nothing has.

    Args:
        before, now: {"seed", "sources", "validation"}: the seed of the shuffling, a summary of each folder of
            training patches, and one of the validation pairs.
        there, here: the words for these two.
    """
    if before["seed"] != now["seed"]:
        return f"--seed {before['seed']} {there}, {now['seed']} {here}"
    if len(before["sources"]) != len(now["sources"]):
        return f"--data_path with {counted(len(before['sources']), 'folder')} {there}, {len(now['sources'])} {here}"
    for old, new in zip(before["sources"], now["sources"]):
        folder = new["folder"]
        for name, words, noun in (("size", "patches of {} px", None), ("images", "{}", "image"),
                                  ("patches", "{}", "patch"), ("count", "counted {}", "time")):
            if old.get(name) != new.get(name) and None not in (old.get(name), new.get(name)):
                numbers = (counted(each.get(name), noun) if noun else each.get(name) for each in (old, new))
                then, now = map(words.format, numbers)
                return f"{folder}: {then} {there}, {now} {here}"
        if old["content"] != new["content"]:
            return f"{folder}: other images than {there}"
    if before["validation"] != now["validation"]:
        old, new = before["validation"], now["validation"]
        now = counted(new["pairs"], "other") if old["pairs"] == new["pairs"] else new["pairs"]
        return f"{counted(old['pairs'], 'validation pair')} {there}, {now} {here}"
    return None


def read_state(folder):
    """(state, position) of a run's folder: what ``RunState.save`` wrote, as it is, and the ``Position`` in it.

    Raises:
        InputError: no such file, a damaged one, or that of another program.
    """
    path = folder / STATE_FILE
    state = load_checkpoint(path)
    if isinstance(state, dict) and "net" in state and "data" not in state:
        raise InputError(
            f"{path}: of an earlier version of train.py; --init_weights {folder / WEIGHTS_FILE} and another"
            " --save_path start from its weights"
        )
    try:
        saved = dict(state["position"])
        if "batches" in saved:  # of a version that had one count for all terms
            saved["counts"] = dict.fromkeys(saved["totals"], saved.pop("batches"))
        position, fresh = Position(**saved), Position()
        if any(type(value) is not type(getattr(fresh, name)) for name, value in vars(position).items()):
            raise ValueError
        if position.counts.keys() != position.totals.keys():
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path}: not the state of a run; expected what train.py has saved there") from None
    return state, position


@dataclass
class RunState:
    """The parts of a run that a stop and a resumption must not change."""

    net: torch.nn.Module
    averaged: torch.nn.Module  # ``net`` itself without --ema
    optimizers: list
    scaler: torch.amp.GradScaler  # of the loss, with fp16
    data: dict  # ``changed_data`` says what is in it
    horizon: dict  # {"batch_size", "processes", "epochs", "max_steps"}: what the position and the schedule refer to
    safetensors: bool = False  # whether to write the weights as .safetensors too

    def save(self, folder, position):
        """Write the state and then the weights."""
        totals = {name: float(value) for name, value in position.totals.items()}
        state = {
            "net": self.net.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizers": [optimizer.state_dict()["state"] for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "position": {**asdict(position), "totals": totals},
            "random": torch.get_rng_state(),
            "data": self.data,
            "horizon": self.horizon,
            "launcher": launcher(),
        }
        save_checkpoint(folder / STATE_FILE, state)
        self.save_weights(folder)

    def save_weights(self, folder):
        """Write the weights. A resumed run does so first, as it may have been killed between state and weights."""
        weights = self.averaged.state_dict()
        save_checkpoint(folder / WEIGHTS_FILE, weights)
        if self.safetensors:
            save_safetensors(folder / SAFETENSORS_FILE, weights, network_options(self.averaged))

    def load(self, folder, state, position):
        """Restore what ``save`` wrote, and say how far the run had come.

        Args:
            folder: the run's, for the messages.
            state, position: from ``read_state``.

        Raises:
            InputError: the state of another network or optimizer, or of a run on other data.
        """
        path = folder / STATE_FILE
        try:
            change = changed_data(state["data"], self.data)
            if change is None:
                self.restore(state)
                horizon = {name: state["horizon"][name] for name in self.horizon}
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
            raise InputError(
                f"{path}: not the state of a run with these network options and --optimizer; expected the run's own"
            ) from None
        if change:
            raise InputError(
                f"--resume {folder}: the data have changed since the run stopped ({change}); expected the same, or"
                f" another --save_path with --init_weights {folder / WEIGHTS_FILE}"
            )
        tensors = [*self.net.parameters(), *self.averaged.parameters()]
        tensors += [value for optimizer in self.optimizers for values in optimizer.state.values()
                    for value in values.values()]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise InputError(f"{path}: NaN or infinite weights; expected the state of a run that can go on")
        changes = [
            f"{name} {horizon[name]} -> {value}" for name, value in self.horizon.items() if horizon[name] != value
        ]
        print(f"going on after step {position.step}, {counted(position.seen, 'patch')}", *changes, sep=", ")

    def restore(self, state):
        """Load all parts, whose types and shapes must fit; any of a dozen exceptions says that they do not."""
        self.averaged.load_state_dict(state["averaged"])
        self.net.load_state_dict(state["net"])  # the same object without --ema
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]  # these follow from the options
            optimizer.load_state_dict({"state": saved, "param_groups": groups})
            for parameter, values in optimizer.state.items():
                averages = values.keys() - {"step"}
                shapes = {values[name].shape for name in averages}
                if values.keys() != OPTIMIZER_STATE[type(optimizer)] or shapes != {parameter.shape}:
                    raise ValueError
                for name in averages:  # in the memory layout of the parameter, as fused kernels expect it
                    values[name] = torch.empty_like(parameter).copy_(values[name])
        if state.get("scaler") and self.scaler.is_enabled():  # a run may go on in another precision
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
