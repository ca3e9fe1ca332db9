"""Checkpoints: written whole, read without running their code, and turned into networks.

    python -c "from checkpoints import load_network; print(load_network('weights/general.pth').recurrent_iter)"

``load_network`` takes any checkpoint of SAPNet or PReNet, published or trained here.
"""
import io
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from networks import SAPNet
from utils import InputError, add_flag, at_least, atomic_write

BUNDLED = Path(__file__).resolve().parent / "weights"  # found from any working directory
PUBLISHED_FOLDER = Path("logs/SAPNet/Model11")  # where train.py leaves its weights by default


# Files


def save_checkpoint(path, content):
    """Write plain tensors and plain types, complete or not at all.

    Raises:
        RunError: the file cannot be written.
    """
    # Through memory: torch.save reports a full disk as an unspecific RuntimeError.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path):
    """Read what ``save_checkpoint`` or PyTorch wrote, on the CPU, without running any code the file may hold.

    Raises:
        InputError: a missing, damaged or foreign file.
    """
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
    """The options of a training run, from the args.json in its folder; an empty dictionary where there is none.

    Raises:
        InputError: the file is damaged.
    """
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


# Networks


def add_network_options(parser):
    """Add the options that say which network to run: --save_path, --recurrent_iter, --use_dilation."""
    parser.add_argument(
        "--save_path", type=Path, metavar="PATH",
        help=f"a checkpoint, or the folder of a training run, whose net_latest.pth is taken (default:"
        f" {PUBLISHED_FOLDER} once a run has left weights there, the bundled general.pth until then)",
    )
    parser.add_argument(
        "--recurrent_iter", type=at_least(1), metavar="N",
        help="number of stages (default: that of the checkpoint's training run, else 6)",
    )
    add_flag(
        parser, "--use_dilation", None, "dilated residual blocks (default: that of the training run, else published)"
    )


def find_checkpoint(save_path=None):
    """The checkpoint file that --save_path means.

    Args:
        save_path: a file, or the folder of a training run, whose net_latest.pth is taken. None takes the published
            folder if a run has left weights there, and the bundled general weights otherwise.
    """
    if save_path is None:
        published = PUBLISHED_FOLDER / "net_latest.pth"
        return published if published.exists() else BUNDLED / "general.pth"
    save_path = Path(save_path)
    return save_path / "net_latest.pth" if save_path.is_dir() else save_path


def load_network(path, recurrent_iter=None, use_dilation=None):
    """Rebuild a network from its checkpoint, in evaluation mode on the CPU.

    Args:
        path: a checkpoint, or the folder of a training run (``find_checkpoint``).
        recurrent_iter, use_dilation: None takes what the run's args.json beside the checkpoint says, or else
            the published 6 stages and dilation (none for PReNet).

    Raises:
        InputError: no checkpoint there, or none of this network.
    """
    path = find_checkpoint(path)
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
