"""Devices, what precision, processes and threads suit them, and their memory.

    python -c "from devices import pick_device; print(pick_device('auto'))"

Apart from ``utils.py``, so that what needs no PyTorch starts without it.
"""
import argparse
import os
import shutil
from collections import deque
from contextlib import suppress
from pathlib import Path, PurePosixPath

import torch

from processes import processes_here
from utils import InputError, RunError, boolean, cores, counted

HALF_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
TENSOR_CORES = 7, 0  # the first compute capability that has them, and that torch.compile can write kernels for
PROC, CONTROL_GROUPS = Path("/proc"), Path("/sys/fs/cgroup")  # where Linux tells of memory


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
    except (RuntimeError, AssertionError, ImportError) as error:  # the last two where PyTorch was built without it
        found = [f"cuda:{card}" for card in range(torch.cuda.device_count())]
        found += ["mps"] if torch.backends.mps.is_available() else []
        if chosen in found or chosen == "cuda" and found:  # others may have filled its memory, or have it to themselves
            reason = str(error).partition("\n")[0]
            raise InputError(f"--device {name}: {chosen} cannot be used ({reason}); expected a free device") from None
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


def check_cuda_graph(wanted, device, processes):
    """Refuse --cuda_graph where there is none; ``wanted`` is None where it was left to the program."""
    if wanted and (device.type != "cuda" or processes > 1):
        raise InputError("--cuda_graph: expected a CUDA card, and a single process that trains")


def check_compile(wanted, device):
    """Refuse --compile where it cannot work; ``wanted`` is None where it was left to the program."""
    if wanted and not can_compile(device):
        raise InputError("--compile: expected a C++ compiler (g++, or that of the variable CXX), and no old GPU")


def choose_speed(args, device, steps, processes=1):
    """Resolve the speed options that were left to the program.

    ``args.amp`` becomes "bf16", "fp16" or False. float16 is for GPUs without bfloat16: it needs its loss scaled.

    Args:
        args: of train.py.
        device: a ``torch.device``.
        steps: those of the whole run.
        processes: that train together.
    """
    if args.amp in (None, True):
        half = "bf16" if fast_bfloat16(device) else "fp16" if fast_float16(device) else None
        args.amp = half or bool(args.amp) and "bf16"
    if args.compile is None:
        # The warm-up takes about a minute, which short runs never earn back.
        args.compile = steps >= 1000 and can_compile(device)
    if args.cuda_graph is None:
        args.cuda_graph = device.type == "cuda" and processes == 1
    # The patches of a run have one size, for which cuDNN's fastest kernels are found in the first step.
    torch.backends.cudnn.benchmark = device.type == "cuda"
    print(
        f"device {device}, mixed precision {args.amp}, compile {args.compile}, CUDA graph {args.cuda_graph},"
        f" channels_last {args.channels_last}, {counted(args.num_workers, 'loader process')}", flush=True,
    )


def mixed_precision(text):
    """``argparse`` type for --amp: "bf16", "fp16", True for what the device is fast in (else "bf16"), or False."""
    try:
        return text if text in HALF_PRECISIONS else boolean(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected bf16, fp16, True or False, got {text!r}") from None


def loader_processes():
    """How many loader processes a process of the run has: its share of the cores, 1 to 16."""
    return min(16, max(1, cores() // processes_here()))


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
        """Wait for all values, and look at the weights too: a gradient can be infinite although its loss was finite.

        Raises:
            RunError: as for ``check``.
        """
        self.add(torch.stack(torch._foreach_norm(list(net.parameters()))).norm(), "norm of the weights", indices)
        self.check(wait=True)
