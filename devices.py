"""Devices, their precisions and memory, and the processes of a distributed run.

    python -c "from devices import pick_device; print(pick_device('auto'))"

Apart from ``utils.py``, so that what needs no PyTorch starts without it.
"""
import argparse
import os
import queue
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from collections import deque
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path, PurePosixPath

import torch
from torch import distributed

from utils import InputError, RunError, boolean, counted, output_is_closed

HALF_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
TENSOR_CORES = 7, 0  # the first compute capability that has them, and that torch.compile can write kernels for
FULL = (  # what errors of a GPU whose memory is full say
    "out of memory", "STATUS_ALLOC_FAILED",  # cuDNN and cuBLAS
    "Invalid buffer size",  # Apple's, of a tensor that is larger than one may be
)
PROC, CONTROL_GROUPS = Path("/proc"), Path("/sys/fs/cgroup")  # where Linux tells of memory
PATIENCE = timedelta(hours=2)  # of processes for one another: one may be packing, downloading or validating


def processes_here():
    """How many processes of the run torchrun has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def pick_device(name, own_process=True):
    """The torch device for --device: "auto" takes the GPU where there is one.

    Where torchrun has started several processes on this machine, each takes the CUDA card of its number (LOCAL_RANK),
    whatever card the name gives. The card becomes the current one of the process.

    Args:
        name: "auto", "cpu", "cuda", "cuda:N" or "mps".
        own_process: whether this process runs one of our scripts. In one that runs another program nothing is changed
            and torchrun does not count: the card is the one that is named, and that of "cuda" the current one.

    Raises:
        InputError: this machine has no such device, or fewer cards than processes.
    """
    chosen, processes = name, processes_here() if own_process else 1
    if name == "auto":
        mps = torch.backends.mps.is_available() and processes == 1  # which several cannot train on
        chosen = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if own_process and (chosen == "cuda" or chosen.startswith("cuda:") and processes > 1):
        chosen = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(chosen)
        if device.type == "meta":
            raise RuntimeError
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError):  # the last two where PyTorch was built without the device
        found = [f"cuda:{card}" for card in range(torch.cuda.device_count())]
        found += ["mps"] if torch.backends.mps.is_available() else []
        needed = f", and one for each of {processes} processes" if chosen != name and processes > 1 else ""
        raise InputError(
            f"--device {name}: expected auto or a device of this machine ({', '.join(['cpu', *found])}){needed}"
        ) from None
    if device.type == "cuda" and own_process:
        torch.cuda.set_device(device)
    elif device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def fast_bfloat16(device):
    """Whether bfloat16 convolutions beat float32 ones on ``device``: AVX512-BF16, AMX or a GPU that has them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def fast_float16(device):
    """Whether float16 convolutions beat float32 ones on ``device``: a GPU with tensor cores, from Volta on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= TENSOR_CORES


def fast_precision(device):
    """The precision of --precision auto: "fp16" or "bf16" where the device is faster with it, else "fp32"."""
    return "fp16" if fast_float16(device) else "bf16" if fast_bfloat16(device) else "fp32"


def can_compile(device):
    """Whether torch.compile works: it needs a C++ compiler, and a CPU or a CUDA card that is not too old."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < TENSOR_CORES
    return shutil.which(os.environ.get("CXX", "g++")) is not None and device.type != "mps" and not old


def choose_speed(args, device, steps):
    """Resolve the speed options that were left to the program; ``steps`` are those of the whole run.

    ``args.amp`` becomes "bf16", "fp16" or False. float16 is for GPUs without bfloat16: it needs its loss scaled.
    """
    if args.amp in (None, True):
        half = "bf16" if fast_bfloat16(device) else "fp16" if fast_float16(device) else None
        args.amp = half or bool(args.amp) and "bf16"
    if args.compile is None:
        # The warm-up takes about a minute, which short runs never earn back.
        args.compile = steps >= 1000 and can_compile(device)
    # The patches of a run have one size, for which cuDNN's fastest kernels are found in the first step.
    torch.backends.cudnn.benchmark = device.type == "cuda"
    print(
        f"device {device}, mixed precision {args.amp}, compile {args.compile}, channels_last {args.channels_last},"
        f" {counted(args.num_workers, 'loader process')}", flush=True,
    )


def mixed_precision(text):
    """``argparse`` type for --amp: "bf16", "fp16", or True for the one that the device is fast in, and False."""
    try:
        return text if text in HALF_PRECISIONS else boolean(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected bf16, fp16, True or False, got {text!r}") from None


def loader_processes():
    """How many loader processes a process of the run has: its share of the cores, 1 to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, max(1, cores // processes_here()))


def threads_beside(device):
    """How many threads read and measure images while the network is at another one.

    They do so beside CUDA cards only: on a CPU the network itself uses the cores, and Apple's GPUs take commands from
    one thread.
    """
    return min(8, loader_processes()) if device.type == "cuda" else 0


def free_memory(device=torch.device("cpu")):
    """Bytes that a program can take: of a CUDA device, or of the main memory without swapping.

    The main memory is what the machine has free and the limits of a container or a batch job allow. It is infinite
    where the system does not say, as on macOS and Windows: there the scripts have no limit by default.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min(machine, control_group_room())


def control_group_room():
    """Bytes that Linux still lets this process's control group and those around it take; infinite without a limit.

    A container and a job of a batch system such as Slurm are such groups. A process that takes more is killed. Both
    versions of their files are read. Within a container, the group's path may be that outside it: then only the
    container's own limit is there to be read.
    """
    rooms = [float("inf")]
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return rooms[0]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, limit, usage = CONTROL_GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif not controllers:
            root, limit, usage = CONTROL_GROUPS, "memory.max", "memory.current"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for folder in (root / place for place in (group, *group.parents)):
            with suppress(OSError, ValueError):  # no such file, or "max"
                room = int((folder / limit).read_text()) - int((folder / usage).read_text())
                counts = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                # Copies of files, which the system drops when memory is short.
                cache = int(counts.get("total_inactive_file") or counts.get("inactive_file", 0))
                rooms.append(max(0, room + cache))
    return min(rooms)


class PeakMemory:
    """Measures by how much the memory in use grows at most within a ``with`` block.

    Args:
        device: a GPU, whose tensors are counted, or the CPU, where it is the whole process.

    Attributes:
        peak: bytes, after the block; None where the system does not say.
    """

    def __init__(self, device):
        self.device, self.peak = device, None

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        self.before = None
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the largest resident size
            self.before = resident_memory("VmRSS")
        return self

    def __exit__(self, *_):
        if self.before is None:
            return
        cuda = self.device.type == "cuda"
        after = torch.cuda.max_memory_allocated(self.device) if cuda else resident_memory("VmHWM")
        self.peak = max(0, after - self.before)


def resident_memory(field):
    """Bytes of main memory that this process has now ("VmRSS") or has had at most ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def rank_of_run():
    """(rank, number of processes) of this process in a run that torchrun started; (0, 1) without torchrun.

    The output of all processes but the first is silenced.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return rank, ranks


def restarted():
    """Whether torchrun --max_restarts has started this process again, after one of the run was lost or has failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launcher():
    """What tells the torchrun that started this process from every other one; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return f"{os.environ['TORCHELASTIC_RUN_ID']}, process {os.getppid()} on {socket.gethostname()}"


def meet(store, rank, ranks, patience=PATIENCE):
    """The part of a store that only the processes which are running now write to.

    torchrun keeps one store for all its restarts, and in it stand the addresses of processes that are gone: who read
    one would wait there. torchrun's own count of restarts may differ between machines. So each process writes a random
    word of its own; the first process answers with its word and all those that it has read; and who finds its own word
    in the answer says so, and takes the first process's word for the name of the part.

    Args:
        store: a ``torch.distributed.Store`` that all of them see.
        rank, ranks: this process's number, and how many they are.
        patience: a ``timedelta``, how long to wait for the others.

    Returns:
        a ``PrefixStore``.

    Raises:
        DistStoreError: the others have not come in time.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + patience.total_seconds()
    others = [str(other) for other in range(1, ranks)]
    store.set(str(rank), mine)
    while True:
        if rank == 0:
            words = [store.get(other).decode() for other in others if store.check([other])]
            store.set("answer", " ".join([mine, *words]))
            if store.check([f"{mine} {other}" for other in others]):
                return distributed.PrefixStore(mine, store)
        elif store.check(["answer"]) and mine in (answer := store.get("answer").decode().split()):
            store.set(f"{answer[0]} {rank}", "here")
            return distributed.PrefixStore(answer[0], store)
        if time.monotonic() > deadline:
            raise distributed.DistStoreError(f"the others have not come within {patience}")
        time.sleep(0.05)


def join_processes(device, patience=PATIENCE, message=None):
    """Wait until all processes of the run have called this; return the ``message`` of the first.

    Args:
        device: on which they will exchange tensors.
        patience: a ``timedelta``, how long they wait for one another, here and from then on.
        message: what the first process has to tell the others.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return message
    cuda = device.type == "cuda"
    store, rank, ranks = next(distributed.rendezvous("env://", timeout=patience))
    store = meet(store, rank, ranks, patience)
    distributed.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks, timeout=patience
    )
    distributed.barrier(device_ids=[device.index] if cuda else None)  # NCCL does not wait in init_process_group
    return from_first(lambda: message)


def total(values, device):
    """The sums of ``values``, a list of numbers, over the processes of the run; all must call it at the same time."""
    if not distributed.is_initialized():
        return values
    # gloo, which joins processes on anything but CUDA cards, takes tensors of the main memory.
    tensor = torch.tensor(values, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
    distributed.all_reduce(tensor)
    return tensor.tolist()


def average(values, device):
    """The means of ``values`` over the processes of the run, as ``total``."""
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    return [value / ranks for value in total(values, device)]


def from_first(function):
    """What ``function`` returns in the first process of the run, in all of them; all must call this at the same time.

    Raises:
        InputError: ``function`` has raised it; the other processes end without a word.
    """
    box = [None, None]
    if not distributed.is_initialized():
        return function()
    if distributed.get_rank() == 0:
        try:
            box[0] = function()
        except InputError as error:
            box[1] = str(error)
    distributed.broadcast_object_list(box)
    if box[1] is not None:
        if distributed.get_rank() > 0:
            sys.exit(2)
        raise InputError(box[1])
    return box[0]


def to_first(value):
    """A list of what each process of the run gives, in the first one, and an empty one in the others."""
    if not distributed.is_initialized():
        return [value]
    boxes = [None] * distributed.get_world_size() if distributed.get_rank() == 0 else None
    distributed.gather_object(value, boxes)
    return boxes or []


class AmongProcesses:
    """A function whose calls the processes of the run share. Threads of the first process call it, at the same time.

    Meanwhile the others ``serve`` it. Each process computes one call at a time, the first one too.

    Attributes:
        free: a queue of the ranks of the processes that have no call.
    """

    def __init__(self, function):
        self.function, self.free, self.rank, self.ranks = function, queue.SimpleQueue(), 0, 1
        if distributed.is_initialized():
            self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()
        for rank in range(self.ranks):
            self.free.put(rank)

    def __call__(self, value):
        """``function(value)``, or what it has raised; both travel between the processes."""
        rank = self.free.get()
        try:
            if rank == 0:
                return self.function(value)
            distributed.send_object_list([value], rank)
            box = [None, None]
            distributed.recv_object_list(box, rank)
        finally:
            self.free.put(rank)
        result, error = box
        if error is not None:
            raise error
        return result

    def serve(self):
        """Compute what the first process sends, until it closes; signals are left to the first process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        box = [None]
        while True:
            distributed.recv_object_list(box, 0)
            if box[0] is None:
                return
            try:
                answer = [self.function(box[0]), None]
            except (InputError, RunError) as error:
                answer = [None, error]
            distributed.send_object_list(answer, 0)

    def close(self):
        """Let the other processes go on, once the calls that are under way have ended."""
        if self.ranks > 1:
            for rank in [self.free.get() for _ in range(self.ranks)]:
                if rank:
                    distributed.send_object_list([None], rank)


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


@contextmanager
def as_one_run(rank, ranks, advice=""):
    """End a run of several processes in order; make of an error that another's end has caused a ``RunError``."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        unread = isinstance(error, BrokenPipeError) and output_is_closed()
        reason = None if unread else lost_process(error)
        if reason is None:
            raise
        process = f"process {rank} of {ranks}: " if ranks > 1 else ""
        raise RunError(f"{process}{reason}{advice}") from None
    if distributed.is_initialized():
        distributed.destroy_process_group()


def out_of_memory(error):
    """Whether an exception says that a GPU's memory is full; many have no type of their own."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in FULL)


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


class FiniteCheck:
    """Stops the run at a number that is not finite, once it has arrived, so that nothing waits for the device.

    Args:
        describe: function from the index of a patch to its name, for the error.
    """

    def __init__(self, describe):
        self.describe, self.waiting = describe, deque()

    def add(self, value, what, indices):
        """Take a scalar tensor, what to call it, and the indices of the batch that it was computed on."""
        finite = value.detach().isfinite()
        event = torch.cuda.Event() if finite.is_cuda else None
        finite = finite.to("cpu", non_blocking=event is not None)
        if event:
            event.record()
        self.waiting.append((finite, event, what, indices))

    def check(self, wait=False):
        """Look at those that have arrived, or with ``wait`` at all.

        Raises:
            RunError: one is not finite; it names the batch.
        """
        while self.waiting:
            finite, event, what, indices = self.waiting[0]
            if event and not event.query():
                if not wait:
                    return
                event.synchronize()
            self.waiting.popleft()
            if not finite:
                names = "; ".join(self.describe(int(index)) for index in indices)
                raise RunError(f"the {what} is not finite on the batch of {names}; the last checkpoint is kept")

    def check_weights(self, net, indices):
        """Look at all, and at the weights: a gradient that was not finite may have left such, and its loss been sound.

        Raises:
            RunError: as for ``check``.
        """
        self.add(torch.stack(torch._foreach_norm(list(net.parameters()))).norm(), "norm of the weights", indices)
        self.check(wait=True)


class StopSignal:
    """Ctrl-C or SIGTERM asks the run to stop after the current step; a second Ctrl-C stops it at once.

    Several processes with GPUs stop at the next step that is logged, as agreeing would make each step wait for them.

    Attributes:
        agreed: whether all processes of the run have come to know that one of them was asked.
    """

    def __init__(self):
        # Apart from one another, as a signal may arrive while the processes agree: that one counts the next time.
        self.asked = self.agreed = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agree(self, device):
        """Whether any process of the run was asked to stop; all must call this at the same step."""
        self.agreed = average([float(self.asked)], device)[0] > 0
        return self.agreed
