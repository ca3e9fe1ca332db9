"""What the scripts share: errors, options, images, metrics by the MATLAB protocol, checkpoints, progress.

    python -c "from utils import read_rgb, psnr; x = read_rgb('example.png'); print(psnr(x, x))"
"""
import argparse
import csv
import errno
import glob
import io
import json
import math
import os
import pickle
import re
import socket
import sys
import time
import warnings
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from skimage.metrics import structural_similarity
from torch import distributed
from tqdm import tqdm

from networks import SAPNet

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # Pillow would also run the PostScript of an EPS file
MAX_PIXELS = 2**28  # of an image; the largest cameras have 200 million, and a few bytes can declare 60,000x60,000
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns from 89 million on; ``open_image`` has ours


# Errors and options


class InputError(Exception):
    """Bad input. The message is one sentence that names the path or option and what was expected."""


class RunError(Exception):
    """A run that failed on good input. The message is one sentence that says at what."""


def run_script(main):
    """Call ``main``; turn its errors into one line on stderr and exit status 2 for bad input, 1 for a failed run."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be valid text
    try:
        main()
    except InputError as error:
        sys.exit(fail(error, 2))
    except (RunError, OSError) as error:
        sys.exit(fail(error, 1))
    except KeyboardInterrupt:
        sys.exit(fail("interrupted", 130))


def fail(error, status):
    # PyTorch hands on a loader process's error with its traceback.
    text = str(error).strip().rpartition("utils.InputError: ")[2]
    print(f"{Path(sys.argv[0]).name}: error: {printable(text)}", file=sys.stderr)
    return status


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


def at_least(minimum, kind=int):
    """``argparse`` type for numbers that are ``minimum`` or more."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"expected {minimum} or more, got {text}")
        return value

    return parse


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


def join_processes(device):
    """Join the processes that torchrun started, and silence the output of all but the first.

    Returns:
        (rank, ranks): (0, 1) without torchrun.
    """
    if "RANK" not in os.environ:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return rank, ranks


def fast_bfloat16(device):
    """Whether bfloat16 convolutions beat float32 ones on ``device``: AVX512-BF16, AMX or a GPU that has them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def free_memory():
    """Bytes of main memory that a program can take without swapping; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


# Files


def natural_key(path):
    """Sort key under which rain-2 comes before rain-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def printable(name):
    """A path, or a text that holds one, on one line: a name may hold line breaks, and bytes that are no text."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(name))


def find_images(folder, option):
    """Image paths directly in ``folder`` in natural order; ``option`` is what an error names."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{option} {folder}: no such folder; expected a folder of images")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise InputError(f"{option} {folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in this folder")
    return sorted(paths, key=natural_key)


def temporary_name(name, process):
    """What a file is called while ``process`` writes it: not its name and more, which may be too long a name."""
    return f"{name[:40]}-{zlib.crc32(os.fsencode(name)):08x}-{process}.tmp"


def remove_leftovers(folder, name=None):
    """Remove what killed processes left of ``atomic_write``, of one file or all; call it where no other writes them."""
    pattern = "*-????????-*.tmp" if name is None else glob.escape(temporary_name(name, "")[:-4]) + "*.tmp"
    for path in Path(folder).glob(pattern):
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
    new_folder = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab+", buffering=0)
        while not take_lock(file, path):
            file.seek(0)
            holder = file.read().decode() or "another process"
            if refusal:
                raise InputError(f"{refusal}: in use by {holder}")
            if not waited:
                print(f"{path}: waiting for {holder}", flush=True)
            waited = True
            time.sleep(0.2)
            file.close()
            file = open(path, "ab+", buffering=0)
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
        if new_folder:
            with suppress(OSError):  # not empty
                path.parent.rmdir()


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


# Images


@contextmanager
def open_image(path):
    """Yield an image file as Pillow opens it: the header is read, the pixels are not.

    Raises:
        InputError: missing, too large or no image; also for what goes wrong inside the ``with`` block.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height}; expected at most {MAX_PIXELS:,} pixels")
            yield image
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected an image") from None
    except Exception as error:  # a damaged file can fail at any point of the decoders
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable image ({reason})") from None


def read_image(path):
    """Decode an image file.

    Returns:
        (H, W, 3) RGB or (H, W, 4) RGBA array, uint8, or uint16 for 16-bit files; grey is repeated to
        three channels and the EXIF orientation applied.

    Raises:
        InputError: the file is missing, truncated, no image, or one of more than ``MAX_PIXELS``.
    """
    with open_image(path) as image:
        if image.mode.startswith("I;16") or is_deep(image, path):
            return read_deep(path)
        if image.mode in ("I", "F"):
            raise ValueError("32 bits a sample; expected 8 or 16")
        ImageOps.exif_transpose(image, in_place=True)  # decodes, and raises where data is missing
        mode = "RGBA" if image.has_transparency_data else "RGB"
        return np.asarray(image if image.mode == mode else image.convert(mode))


def is_deep(image, path):
    """Whether the file opened as ``image`` has 16 bits a sample, which Pillow would reduce to 8 in colour files."""
    if image.format == "TIFF":
        return image.tag_v2.get(258, (8,))[0] == 16
    with open(path, "rb") as file:
        header = file.read(26)
    return image.format == "PNG" and len(header) == 26 and header[24] == 16


def read_deep(path):
    """Decode a 16-bit file to (H, W, 3) RGB or (H, W, 4) RGBA uint16."""
    with open(path, "rb") as file:
        image = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16:
        raise ValueError("damaged 16-bit image")
    if image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)
    return cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA if image.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def read_rgb(path):
    """``read_image`` as (H, W, 3) uint8: alpha dropped, 16 bits rounded to 8."""
    return to_uint8(read_image(path)[..., :3])


def to_uint8(image):
    """A uint8 or uint16 array as uint8, rounded."""
    return image if image.dtype == np.uint8 else np.rint(image / 257).astype(np.uint8)


def write_image(path, image):
    """Write an (H, W, 3 or 4) uint8 or uint16 RGB(A) array in the format of the suffix, complete or not at all."""
    code = cv2.COLOR_RGBA2BGRA if image.shape[2] == 4 else cv2.COLOR_RGB2BGR
    ok, data = cv2.imencode(path.suffix, cv2.cvtColor(image, code))
    if not ok:
        raise OSError(f"{path}: could not be encoded as {path.suffix}")
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def to_tensor(image):
    """(H, W, 3) uint8 or uint16 array -> (1, 3, H, W) float32 tensor in [0, 1]."""
    peak = np.iinfo(image.dtype).max
    scaled = image.astype(np.float32) / peak
    return torch.from_numpy(scaled.transpose(2, 0, 1).copy())[None]


def to_image(tensor, dtype=np.uint8):
    """(1, 3, H, W) tensor -> (H, W, 3) array of ``dtype``: clamped to [0, 1] and rounded."""
    peak = np.iinfo(dtype).max
    image = tensor[0].detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    return np.rint(image * peak).astype(dtype)


# Metrics, as PReNet's MATLAB scripts measure


def luma(image):
    """Y of MATLAB's ``rgb2ycbcr`` on doubles: (H, W, 3) uint8 -> (H, W) float64 in [16/255, 235/255]."""
    return (16 + image.astype(np.float64) / 255 @ (65.481, 128.553, 24.966)) / 255


def psnr(image, reference):
    """Peak signal-to-noise ratio in dB of two float arrays in [0, 1]; infinite for equal arrays."""
    error = np.mean(np.square(image - reference))
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def ssim_255(image, reference):
    """SSIM as in MATLAB: 11x11 Gaussian, sigma 1.5, "valid" windows, on float arrays in [0, 1] scaled by 255.

    Shapes: (H, W), or (H, W, C) for the mean over channels. NaN where a side is under 11 px: no window fits.
    """
    if min(image.shape[:2]) < 11:
        return float("nan")
    return float(
        structural_similarity(
            255 * image, 255 * reference, data_range=255, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, channel_axis=2 if image.ndim == 3 else None,
        )
    )


def measure(image, reference):
    """PSNR in dB and SSIM, on Y and on RGB, of two (H, W, 3) uint8 arrays.

    Returns:
        {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"}: floats, by the protocol of PReNet's MATLAB scripts.
    """
    y, y_reference = luma(image), luma(reference)
    rgb, rgb_reference = image / 255, reference / 255
    return {
        "psnr_y": psnr(y, y_reference),
        "ssim_y": ssim_255(y, y_reference),
        "psnr_rgb": psnr(rgb, rgb_reference),
        "ssim_rgb": ssim_255(rgb, rgb_reference),
    }


# Checkpoints


def save_checkpoint(path, content):
    """Write plain tensors and plain types, complete or not at all."""
    # Through memory: torch.save reports a full disk as an unspecific RuntimeError.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path):
    """Read what ``save_checkpoint`` or PyTorch wrote, on the CPU, without running any code the file may hold."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # PyTorch stores tensors as they are; but it reads compressed ones, of which a small file holds many GB.
                if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
                    raise InputError(f"{path}: refused; it declares more data than it holds")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's guesses about damaged files; the error says enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a checkpoint (.pth)") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder; expected a checkpoint file (.pth)") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: refused; expected a checkpoint of plain tensors, not a pickle with other content"
        ) from None
    except Exception as error:  # a damaged file can fail at any point of the unpickler
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: truncated or not a PyTorch checkpoint ({reason})") from None


def load_weights(path):
    """A network's state dict from a file, without the "module." prefix that DataParallel leaves.

    Raises:
        InputError: missing or unreadable file, or content that is no dictionary of finite tensors.
    """
    state = load_checkpoint(path)
    items = state.items() if isinstance(state, dict) else ()
    if not items or not all(isinstance(name, str) and is_plain(value) for name, value in items):
        raise InputError(f"{path}: expected a state dict (names and tensors of floating-point numbers)")
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        raise InputError(f"{path}: NaN or infinite weights in {broken[0]}")
    return {name.removeprefix("module."): value for name, value in state.items()}


def is_plain(value):
    """Whether ``value`` is a tensor of floating-point numbers that are all in memory, none shown twice by strides."""
    return (
        isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"
        and value.is_floating_point() and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def read_options(folder):
    """The resolved options of a training run, from args.json in its folder; empty where there is none."""
    path = Path(folder) / "args.json"
    try:
        options = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(
            f"{path}: damaged ({error}); expected the options of a training run, or no such file"
        ) from None
    if not isinstance(options, dict):
        raise InputError(f"{path}: expected the options of a training run, or no such file")
    return options


def add_network_options(parser):
    """Add the options that are the arguments of ``load_network``."""
    parser.add_argument(
        "--save_path", default="logs/SAPNet/Model11", metavar="PATH",
        help="a checkpoint, or the folder of a training run (its net_latest.pth) (default: %(default)s)",
    )
    parser.add_argument(
        "--recurrent_iter", type=at_least(1), metavar="N",
        help="number of stages (default: that of the checkpoint's training run, else 6)",
    )
    add_flag(
        parser, "--use_dilation", None, "dilated residual blocks (default: that of the training run, else published)"
    )


def load_network(save_path, recurrent_iter=None, use_dilation=None):
    """Rebuild a network from its checkpoint, in evaluation mode on the CPU.

    Args:
        save_path: a checkpoint, or the folder of a training run, whose net_latest.pth is taken.
        recurrent_iter, use_dilation: None takes what the run's args.json beside the checkpoint says, or else
            the published 6 stages and dilation (none for PReNet).

    Raises:
        InputError: no checkpoint there, or none of this network.
    """
    path = Path(save_path)
    if path.is_dir():
        path = path / "net_latest.pth"
    state = load_weights(path)
    options = read_options(path.parent)
    if recurrent_iter is None:
        recurrent_iter = options.get("recurrent_iter", 6)
    if use_dilation is None:
        use_dilation = options.get("use_dilation")
    if type(recurrent_iter) is not int or recurrent_iter < 1 or use_dilation not in (None, True, False):
        raise InputError(
            f"{path.parent / 'args.json'}: expected recurrent_iter of 1 or more and use_dilation true or false"
        )
    try:
        return SAPNet.from_state_dict(state, recurrent_iter, use_dilation).eval()
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


# Progress


def progress(items, description, total=None, status=None):
    """Iterate with a tqdm bar on a terminal, and with a plain line every ten seconds elsewhere.

    ``status`` is a function without arguments whose text is shown beside the estimate.
    """
    total = len(items) if total is None else total
    status = status or (lambda: "")
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        with tqdm(items, desc=description, total=total, dynamic_ncols=True) as bar:
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
            print(f"{description}: {count}/{total}, about {left:.0f} s left  {status()}".rstrip(), flush=True)
            reported = now
