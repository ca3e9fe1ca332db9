"""What every script shares: errors, options, files, progress. It imports no other file of the project.

    python -c "from utils import natural_key; print(sorted(['rain-10.png', 'rain-2.png'], key=natural_key))"
"""
import argparse
import csv
import errno
import io
import math
import os
import re
import select
import signal
import socket
import stat
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

HANGUP = getattr(signal, "SIGHUP", None)  # what a terminal sends that is closed; Windows has no such signal
STOP_SIGNALS = tuple(filter(None, (signal.SIGINT, signal.SIGTERM, HANGUP)))
UNREAD = "stopped, as what it printed is no longer read"
FULL_MEMORY = (  # what errors say of it; many have no type of their own
    "out of memory", "STATUS_ALLOC_FAILED",  # a GPU's; cuDNN and cuBLAS
    "Invalid buffer size",  # Apple's, of a tensor that is larger than one may be
    "allocate memory", "Insufficient memory",  # a CPU's; OpenCV
)


# Errors and options


class InputError(Exception):
    """Bad input. The message is one sentence that names the path or option and what was expected."""


class RunError(Exception):
    """A run that failed on good input. The message is one sentence that says at what."""


def memory_is_full(error):
    """Whether an exception says that the memory of this machine or of a GPU is full."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # that is torch's
    return named or any(words in str(error) for words in FULL_MEMORY)


@contextmanager
def want_of_memory(subject="", advice=""):
    """Make of a lack of memory a ``RunError``, whose text begins with ``subject`` and ends with ``advice``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (InputError, RunError, OSError)) or not memory_is_full(error):
            raise
        text = str(error).strip().partition("\n")[0]
        raise RunError(f"{subject}not enough memory ({text or type(error).__name__}){advice}") from None


def run_script(main):
    """Call ``main``; turn its errors into one line on stderr and an exit status.

    It is 2 for bad input, 1 for a run that failed and 130 for Ctrl-C. Faults of our own keep their traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be valid text
    try:
        with want_of_memory():
            main()
    except InputError as error:
        let_first_speak()
        sys.exit(fail(error, 2))
    except (RunError, OSError) as error:
        closed = isinstance(error, BrokenPipeError) and output_is_closed()
        if closed:
            stop_printing()  # else Python complains once more when it ends
        sys.exit(fail(UNREAD if closed else error, 1))
    except KeyboardInterrupt:
        sys.exit(fail("interrupted", 130))


def output_is_closed():
    """Whether nobody reads what is printed any more, as in ``python test.py | head``."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # it is no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def stop_printing():
    """Drop what will be printed from now on, but not what goes to stderr."""
    sys.stdout = open(os.devnull, "w")


def drop_output():
    """Drop what will be printed, as the terminal was closed: else each print would raise an error.

    What goes to a pipe is dropped too, as its reader has had the same signal. What goes to a regular file is kept.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with suppress(OSError):  # it is closed
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


def fail(error, status):
    # PyTorch hands on a loader process's error with its traceback.
    text = str(error).strip().rpartition("utils.InputError: ")[2]
    print(f"{Path(sys.argv[0]).name}: error: {printable(text)}", file=sys.stderr)
    return status


def let_first_speak():
    """In all processes of torchrun but the first: wait, so that bad input which all of them find is told of once.

    torchrun ends this process as soon as the first has failed. If it does not, the input is bad for this one alone.
    """
    if os.environ.get("RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the run may have set a handler that does not end it
        time.sleep(10)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` for scripts that torchrun may start several times."""

    def error(self, message):
        let_first_speak()
        super().error(message)


class Gathered(argparse.Action):
    """An option that takes a list, also in parts: --data_path A --data_path B is --data_path A B."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else [*before, *values])


def boolean(text):
    """``argparse`` type for --flag True and --flag False."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def add_flag(group, name, default, text):
    """Add an option that reads ``--flag``, ``--flag True`` and ``--flag False``."""
    group.add_argument(name, type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=text)


def at_least(minimum, kind=int, maximum=math.inf):
    """``argparse`` type for numbers that are ``minimum`` or more, and ``maximum`` or less."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"expected {minimum} or more, got {text}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"expected {maximum} or less, got {text}")
        return value

    return parse


def a_path(kind=Path):
    """``argparse`` type for a path, returned as ``kind``.

    Refused are an empty one, which would be the current folder, and one that cannot be looked at, such as one in
    another user's folder.
    """

    def parse(text):
        if not text:
            raise argparse.ArgumentTypeError("expected a path, got an empty text")
        try:
            readable = not os.path.isdir(text) or os.access(text, os.R_OK | os.X_OK)
            reason = "" if readable else os.strerror(errno.EACCES)
            os.stat(text)
        except (FileNotFoundError, NotADirectoryError):
            pass  # it may be to be made
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        if reason:
            raise argparse.ArgumentTypeError(f"expected a path that can be read, got {text!r} ({reason})")
        return kind(text)

    return parse


def check_folder(option, folder):
    """Refuse a folder to write into that cannot be made, as a file is in its place or in that of one above it."""
    whole = Path(folder).absolute()
    taken = next((place for place in (whole, *whole.parents) if os.path.lexists(place)), None)
    if taken and not taken.is_dir():
        raise InputError(f"{option} {folder}: {taken} is a file; expected a folder, there or to be made")


def check_file(option, path, is_ours):
    """Refuse a file to write whose folder cannot be made, or that is there already and not of this program.

    Args:
        option: the option that the path comes from, which an error names.
        path: of the file.
        is_ours: function of the path that says whether an earlier run has written the file that is there.
    """
    check_folder(option, Path(path).parent)
    if os.path.isdir(path):
        raise InputError(f"{option} {path}: is a folder; expected the name of a file")
    if os.path.lexists(path) and not is_ours(path):
        raise InputError(
            f"{option} {path}: would be overwritten, but this script has not written it; expected another name"
        )


def begins_with(*texts):
    """A function for ``check_file``: whether the file at a path begins with one of the texts."""

    def is_ours(path):
        if not os.path.isfile(path):
            return False
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(max(map(len, texts))).startswith(texts)

    return is_ours


# Files


def counted(number, noun):
    """A number and what it counts: "1 patch", "2 patches"."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith(("ch", "s", "x")) else "s")


def natural_key(path):
    """Sort key under which rain-2 comes before rain-10, and which no two paths share."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))], str(path)


def printable(name):
    """A path, or a text that holds one, on one line: a name may hold line breaks, and bytes that are no text."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(name))


def temporary_name(name, process):
    """What a file is called while ``process`` writes it: its name, shortened as the result could be too long."""
    return f"{name[:40]}-{zlib.crc32(os.fsencode(name)):08x}-{process}.tmp"


def remove_leftovers(folder, name=None):
    """Remove the temporary files that killed processes left: those of the file ``name``, or of all files.

    Call it only where no other process writes. Without ``name``, only files whose names had up to 40 characters are
    removed, as longer ones cannot be recognised as ours.
    """
    for path in Path(folder).glob("*-????????-*.tmp"):
        *start, _, process = path.name.removesuffix(".tmp").split("-")
        written = "-".join(start) if name is None else name
        if process.isdigit() and path.name == temporary_name(written, process):
            path.unlink(missing_ok=True)


@contextmanager
def atomic_write(path):
    """Yield a temporary path beside ``path`` that replaces it on success and is removed on any error.

    Only a killed process leaves the temporary file behind (``remove_leftovers``).

    Raises:
        RunError: the disk is full or the folder cannot be written; ``path`` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(temporary_name(path.name, os.getpid()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())  # a machine that goes down must not keep the name and lose the content
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: could not be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def reserve(file, size):
    """Make ``size`` bytes of disk the open file's own, or raise OSError now and not crash when they are written."""
    file.flush()
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def write_text(path, text):
    """Write a small text file, complete or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_csv(path, columns, rows):
    """Write dictionaries as CSV under a header of ``columns``; what a row lacks stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6f}" if isinstance(value, float) else value for name, value in row.items()})
    write_text(path, text.getvalue())


@contextmanager
def locked(path, refusal=None):
    """Hold the lock file ``path``, made if absent and removed afterwards; yield whether it had to wait for it.

    The lock is the kernel's, which lets go of it when the process ends, however it ends, so a file left behind
    locks nothing. Machines that share a network file system see one another's locks where it has them, as NFS.

    Args:
        path: of the lock file.
        refusal: what the error says where another process holds the lock; None waits for that process.

    Raises:
        InputError: another process holds the lock.
        RunError: the lock file cannot be written.
    """
    path, waited = Path(path), False
    new_folders = [folder for folder in path.parents if not folder.exists()]  # the innermost comes first
    try:
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = open(path, "ab+", buffering=0)
            except FileNotFoundError:  # the holder has removed the folder in between
                continue
            if take_lock(file, path):
                break
            file.seek(0)
            holder = file.read().decode() or "another process"
            if refusal:
                raise InputError(f"{refusal}: in use by {holder}")
            if not waited:
                print(f"{path}: waiting for {holder}", flush=True)
            waited = True
            time.sleep(0.2)
            file.close()
    except OSError as error:
        raise RunError(f"{path}: could not be written ({error.strerror or error})") from None
    try:
        with suppress(OSError):  # a full disk is told of by what is written next
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield waited
    finally:
        with suppress(OSError):
            path.unlink()
        file.close()
        for folder in new_folders:
            with suppress(OSError):  # not empty
                folder.rmdir()


def take_lock(file, path):
    """Whether this process now holds the lock of the open ``file``, which still is the one at ``path``."""
    if fcntl:
        try:
            # lockf, not flock: the loader's processes would inherit that, and outlive a killed run by seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # A file system may have no locks at all.
            return error.errno not in (errno.EACCES, errno.EAGAIN)
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


# Work and its progress


def cores():
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def ahead(function, items, threads):
    """Yield ``function(item)`` of each item, in order.

    So many ``threads`` work ahead, on the next items; with 0 all is done in the caller's thread when its turn comes.
    Unlike ``Executor.map``, which would hold all results where they are taken slowly.
    """
    if not threads:
        yield from map(function, items)
        return
    pool, futures = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > threads:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def progress(items, description, total=None, status=None):
    """Iterate with a tqdm bar on a terminal, and with a plain line every ten seconds elsewhere.

    Args:
        items: any iterable.
        description: begins the line.
        total: how many items there are, for the estimate; by default their ``len``, and 0 if nobody knows.
        status: function without arguments whose text is shown beside the estimate.
    """
    total = len(items) if total is None else total
    status = status or (lambda: "")
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        with tqdm(items, desc=description, total=total or None, dynamic_ncols=True) as bar:
            for item in bar:
                yield item
                bar.set_postfix_str(status(), refresh=False)
        return
    start = reported = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - reported >= 10:
            left = (now - start) / count * (total - count)
            # A video may have more frames than it declares, or declare none.
            of_all = f"/{total}, about {left:.0f} s left" if total >= count else ""
            print(f"{description}: {count}{of_all}  {status()}".rstrip(), flush=True)
            reported = now
