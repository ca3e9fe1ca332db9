"""The processes of a run that torchrun has started: how they meet, share values and work, and end together.

    python -c "from processes import rank_of_run; print(*rank_of_run())"

prints the number of a process, and how many there are: 0 1 without torchrun. There each function works as in a run of
one process.
"""
import os
import queue
import signal
import socket
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from utils import HANGUP, STOP_SIGNALS, InputError, RunError, drop_output, output_is_closed

PATIENCE = timedelta(hours=2)  # of processes for one another: one may be packing, downloading or validating


def processes_here():
    """How many processes of the run torchrun has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


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
        for number in STOP_SIGNALS:
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
    """Disconnect the processes at the end; an error that the end of another one has caused becomes a ``RunError``.

    ``advice`` is added to its text.
    """
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


def leave_signals_to_parent(worker=None):
    """In a loader process: let none of ``STOP_SIGNALS`` end it but the SIGTERM of its parent.

    A terminal and a batch system signal the whole group of processes, and the parent still needs its loaders for the
    step that is under way.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
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


class StopSignal:
    """One of ``STOP_SIGNALS`` asks the run to stop after the current step; then Ctrl-C stops it at once.

    Several processes with GPUs stop at the next step that is logged, as agreeing would make each step wait for them.

    Attributes:
        agreed: whether all processes of the run have come to know that one of them was asked.
    """

    def __init__(self):
        # Apart from one another, as a signal may arrive while the processes agree: that one counts the next time.
        self.asked = self.agreed = False
        for number in STOP_SIGNALS:
            if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        if number == HANGUP:
            drop_output()
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agree(self, device):
        """Whether any process of the run was asked to stop; all must call this at the same step."""
        self.agreed = average([float(self.asked)], device)[0] > 0
        return self.agreed
