"""Scripts in processes of their own, forked from one that has imported everything, so that they start at once."""
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch

import utils

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["pytest", "train", "test", "torch._dynamo"])  # the last for each optimizer
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(utils.__file__).parent), os.getenv("PYTHONPATH"))))


class Fork:
    """``function(*args)`` in a process: ``alive``, ``kill``, ``wait``, ``memory``; what it prints is in ``log``."""

    def __init__(self, log, function, *args):
        self.log = Path(log)
        self.log.touch()
        self.process = context.Process(target=begin, args=(str(log), function, args))
        self.process.start()

    @property
    def alive(self):
        return self.process.is_alive()

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        return self.wait()

    def wait(self, seconds=120):
        """Its exit status, negative after a signal."""
        self.process.join(seconds)
        assert not self.alive, self.log.read_text()
        return self.process.exitcode

    def memory(self):
        """Resident bytes of what the process has allocated: its private and its shared memory.

        Both, because where tensors lie depends on who made them: PyTorch's allocator and a private mapping take
        private memory, which Linux calls anonymous; a shared mapping and what loader processes hand over is shared.
        Mapped files (libraries, packed patches) do not count: the system drops their pages when it needs the room.
        """
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return sum(1024 * int(status.split(f"{name}:")[1].split()[0]) for name in ("RssAnon", "RssShmem"))


def figure(capsys, text):
    """Show a measured figure whatever pytest captures."""
    with capsys.disabled():
        print(f"\n{text}")


def begin(log, function, args):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's processes, as in a run from the shell
    function(*args)


def run_script(script, arguments, before=None):
    """Run a script's ``main`` as its command line does, after ``before()`` has set a trap."""
    if before:
        before()
    sys.argv = [f"{script}.py", *map(str, arguments)]
    utils.run_script(__import__(script).main)
