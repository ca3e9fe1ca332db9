"""Devices, their precisions and memory, and the processes of a distributed run.

    python -c "from devices import pick_device; print(pick_device('auto'))"

Apart from ``utils.py``, so that what needs no PyTorch starts without it.
"""
import os
import shutil
import signal
import sys
import threading
from collections import deque
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from utils import InputError

PATIENCE = timedelta(hours=2)  # of processes for one another; one that validates may take PyTorch's own ten minutes


def pick_device(name):
    """The torch device for --device: "auto" takes the GPU when there is one, each process of a machine its own."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: expected auto, cpu or a CUDA device of this machine ({reason})") from None
    return device


def fast_bfloat16(device):
    """Whether bfloat16 convolutions beat float32 ones on ``device``: AVX512-BF16, AMX or a GPU that has them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def choose_speed(args, device, steps):
    """Resolve the speed options that were left to the program; ``steps`` are those of the whole run."""
    if args.amp is None:
        args.amp = fast_bfloat16(device)
    if args.compile is None:
        # The warm-up takes about a minute, which short runs never earn back.
        args.compile = steps >= 1000 and shutil.which(os.environ.get("CXX", "g++")) is not None
    print(
        f"device {device}, bfloat16 {args.amp}, compile {args.compile}, channels_last {args.channels_last}", flush=True
    )


def free_memory():
    """Bytes of main memory that a program can take without swapping; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def rank_of_run():
    """(rank, number of processes) of this process in a run that torchrun started; (0, 1) without torchrun.

    The output of all processes but the first is silenced.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return rank, ranks


def join_processes(device):
    """Wait until all processes of the run have called this; it does nothing in a run of one.

    From then on they wait for one another by ``PATIENCE`` at most, which the first one's validation may take.
    """
    if "RANK" not in os.environ:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)


def average(values, device):
    """The mean of ``values``, a list of numbers, over the processes of the run; all must call it at the same time."""
    if not distributed.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(tensor)
    return (tensor / distributed.get_world_size()).tolist()


def lost_process(error):
    """What to say of an error that another process's end has caused; None for any other error.

    PyTorch tells of such ends in RuntimeErrors that have no type of their own. A loader process that is killed while
    it hands over a batch breaks its connection.
    """
    text = str(error)
    # Not "in DataLoader worker process": that is an exception of our own code there.
    if isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker (pid" in text:
        return "a loader process was killed, perhaps for want of memory; expected fewer --num_workers"
    if isinstance(error, distributed.DistError) or "gloo" in text or "NCCL" in text:
        return f"another process of the run is gone ({text.splitlines()[0]})"
    return None


def leave_signals_to_parent(worker=None):
    """In a loader process: let neither Ctrl-C nor SIGTERM end it, unless its parent sends the signal.

    A terminal and a batch system signal the whole group of processes, and the parent still needs its loaders for the
    step that is under way.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # which tells who sent it; neither Windows nor macOS has it
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def obey_parent():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()


@contextmanager
def ignore_lost_children():
    """Let PyTorch tell of a loader process that is killed within this context, but not after it.

    It does so by an exception from a signal handler, in whatever line is running: in the report of the same loss, too.
    """
    try:
        yield
    finally:
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            signal.signal(signal.SIGCHLD, lambda number, frame: None)


class FlagQueue:
    """Truth values that a device computes, looked at once they have arrived, so that nothing waits for the device."""

    def __init__(self):
        self.waiting = deque()

    def add(self, flag, label):
        """Take a boolean tensor of one element, and what to call it."""
        flag = flag.detach().to("cpu", non_blocking=True)
        event = torch.cuda.Event() if torch.cuda.is_available() else None
        if event:
            event.record()
        self.waiting.append((flag, event, label))

    def arrived(self, wait=False):
        """Yield (truth value, label) of those that have arrived, or with ``wait`` of all."""
        while self.waiting:
            flag, event, label = self.waiting[0]
            if event and not event.query():
                if not wait:
                    return
                event.synchronize()
            self.waiting.popleft()
            yield bool(flag), label


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
        self.received = average([float(self.received)], device)[0] > 0
        return self.received
