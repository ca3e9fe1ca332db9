"""Checkpoints: written whole, read without running their code, and turned into networks.

    python checkpoints.py weights/general.pth general.safetensors

converts a checkpoint of SAPNet or PReNet, published or trained here or elsewhere, to .safetensors or to .pth, by the
name of the new file. A .safetensors file carries the options of its network. --average takes the mean of its weights
and those of others that were trained on from it.
"""
import argparse
import codecs
import io
import json
import os
import pickle
import re
import reprlib
import stat
import threading
import warnings
import zipfile
from pathlib import Path

import safetensors.torch
import torch

from networks import CRA, DILATIONS, RESIDUAL_CONVS, SAPNet
from utils import (
    InputError, a_path, add_flag, at_least, atomic_write, boolean, check_folder, counted, printable, run_script,
)

BUNDLED = Path(__file__).resolve().parent / "weights"  # found from any working directory
PUBLISHED_FOLDER = Path("logs/SAPNet/Model11")  # where train.py leaves its weights by default
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_HEADER = 2**20  # bytes of a .safetensors file that are parsed; ResNet-152 has 100,000
EXPECTED = "expected a checkpoint, .pth or .safetensors"


# Writing


def in_main_memory(content):
    """Tensors, dicts and lists of such, with all tensors on the CPU; anything else as it is."""
    if isinstance(content, torch.Tensor):
        return content.cpu()
    if isinstance(content, dict):
        return {name: in_main_memory(value) for name, value in content.items()}
    return [in_main_memory(value) for value in content] if isinstance(content, list) else content


def save_checkpoint(path, content):
    """Write plain tensors and plain types as PyTorch does, complete or not at all.

    Tensors of a GPU are written as those of the CPU, since torch.load would refuse them where there is no GPU.

    Raises:
        RunError: the file cannot be written.
    """
    # Through memory: torch.save reports a full disk as an unspecific RuntimeError.
    buffer = io.BytesIO()
    torch.save(in_main_memory(content), buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def save_safetensors(path, weights, options):
    """Write weights as .safetensors, complete or not at all. The same weights and options give the same bytes.

    Args:
        path: the file to write.
        weights: {name: tensor}, on any device and in any memory layout.
        options: {name: value} for the file's metadata, as from ``network_options``.

    Raises:
        RunError: the file cannot be written.
    """
    # Copies, as the format has neither strides nor two names for one tensor.
    plain = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    data = safetensors.torch.save(plain, {name: str(value) for name, value in options.items()})
    # The library writes the metadata in an order that differs from run to run.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the numbers begin at a multiple of eight
    with atomic_write(path) as temporary:
        temporary.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


# What a file is

TORCH_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # from the third byte on: torch.save before PyTorch 1.6
FOREIGN = {  # what files are that are taken for checkpoints, and how those begin
    "a plain pickle, which torch.save did not write and which can hold code": (b"\x80",),
    "a Git LFS pointer, in whose place `git lfs pull` puts the checkpoint": (b"version https://git-lfs",),
    "an HTML or XML page, as a failed download leaves": (b"<",),
    "an ONNX file": tuple(bytes([8, version, tag]) for version in range(3, 32) for tag in b"\x12\x1a\x22\x3a\x42"),
    "an HDF5 file, as Keras writes": (b"\x89HDF",),
    "a TensorFlow model": (b"\x08\x01\x12",),
    "a part of a TensorFlow checkpoint": (b"model_checkpoint_path",),
    "a GGUF file": (b"GGUF",),
    "a NumPy array": (b"\x93NUMPY",),
    "a MATLAB file": (b"MATLAB",),
    "a picture": (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*"),
    "a picture, video or sound": (b"RIFF",),
    "a PDF document": (b"%PDF",),
    "an archive, which must be unpacked": (b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ"),
}
ZIP_ENTRIES = (  # patterns for the names in ZIP files, and what those are
    (r"/(constants\.pkl|code/.*)$", "a TorchScript file, which is code"),
    (r"\.weights\.h5$", "a Keras file"),
    (r"\.npy$", "NumPy arrays"),
    (r"(^|/)(models/model\.json|serialized_exported_program\.json)$", "a program exported by torch.export"),
)


def recognise(path):
    """Tell by its content which library reads a file: "safetensors" or "torch".

    Raises:
        InputError: neither; the message says what the file is.
    """
    head, tail = read_ends(path)
    if head[8:9] == b"{" and not is_text(head[:8]):  # the length of the header, and its beginning
        return "safetensors"
    if head[:1] == b"\x80" and TORCH_MAGIC.startswith(head[2 : 2 + len(TORCH_MAGIC)]):  # or cut short within that
        return "torch"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    if head.startswith(b"PK\x03\x04"):
        kind = recognise_zip(path)
        if kind is None:
            return "torch"
    elif not head:
        kind = "an empty file"
    elif known := [kind for kind, beginnings in FOREIGN.items() if start.startswith(beginnings)]:
        kind = known[0]
    elif head[257:262] == b"ustar":
        kind = "an archive, which must be unpacked"
    elif tail == bytes.fromhex("57fb808b247547db") or re.search(r"\.data-\d+-of-\d+$", path.name):
        kind = "a part of a TensorFlow checkpoint"
    elif is_text(head):
        kind = f"a text that begins with {start[:60].decode(errors='replace')!r}"
    else:
        kind = f"of no known kind, as it begins with the bytes {head[:8].hex(' ')}"
    raise InputError(f"{path}: {kind}; {EXPECTED}")


def read_ends(path):
    """The first 512 and the last 8 bytes of a file, which must be a regular one."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise InputError(f"{path}: {kind}; {EXPECTED}")
        with open(path, "rb") as file:
            head = file.read(512)
            file.seek(max(0, status.st_size - 8))
            return head, file.read(8)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {EXPECTED}") from None
    except OSError as error:
        raise InputError(f"{path}: could not be read ({error.strerror or error}); {EXPECTED}") from None


def is_text(data):
    """Whether bytes are the beginning of a text in UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)  # which may end within a letter
    except UnicodeDecodeError:
        return False
    return not re.search(rb"[\0-\x08\x0e-\x1f]", data)


def recognise_zip(path):
    """What a ZIP file is, as part of a sentence; None if it may be a checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # a damaged table of contents can fail in many ways
        return "cut short or damaged"
    names = [entry.filename for entry in entries]
    for pattern, kind in ZIP_ENTRIES:
        if any(re.search(pattern, name) for name in names):
            return kind
    if not any(name.endswith("data.pkl") for name in names):
        return f"a ZIP archive of {listing(names, 'file')}"
    # PyTorch stores tensors as they are; but it reads compressed ones, of which a small file holds many GB.
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):
        return "refused, as it declares more data than it holds"
    return None


def listing(names, unit):
    """Say how many names there are and what the first are; some may be no strings, or very long."""
    names = list(names)
    first = [printable(name[:60]) if isinstance(name, str) else reprlib.repr(name) for name in names[:3]]
    return f"{counted(len(names), unit)} ({', '.join(first)}{', ...' * (len(names) > 3)})"


# Reading


class Ignored:
    """Takes the place of an object that a checkpoint holds beside the weights: nothing of it is kept or called."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


class Dictionary:
    """Takes the place of a kind of dictionary: calling it gives a plain one, which the reader then fills."""

    def __new__(cls, *args):
        return {}


IGNORED = (  # what training code leaves beside the weights, by the names in the file: none of it is imported
    "argparse.Namespace", "types.SimpleNamespace", "torch.torch_version.TorchVersion",
    *(f"pathlib.{local}{name}" for local in ("", "_local.") for name in (
        "Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"
    )),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"builtins.{name}" for name in ("dict", "float", "frozenset", "int", "list", "range", "slice", "str", "tuple")),
    "numpy.dtype", "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    # MMEngine's log, which names its methods by getattr.
    "mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr",
)
STAND_INS = [(Ignored, name) for name in IGNORED] + [(Dictionary, "collections.defaultdict")]
UNPICKLING = threading.Lock()  # while the stand-ins are allowed and warnings ignored, in the whole process


def load_checkpoint(path):
    """Read what PyTorch or safetensors wrote, on the CPU, without running any code the file may hold.

    Objects of the kinds in ``IGNORED`` become ``Ignored``.

    Raises:
        InputError: a missing, damaged or foreign file; the message says what it is.
    """
    return read_file(Path(path))[0]


def read_file(path):
    """Read a file of either format.

    Returns:
        (content, metadata): what was saved, and {name: text}, which only a .safetensors file has.
    """
    if recognise(path) == "safetensors":
        return read_safetensors(path)
    try:
        # The open file and not its path, of which torch.load would look at the suffix.
        with open(path, "rb") as file, UNPICKLING, torch.serialization.safe_globals(STAND_INS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's guesses about damaged files; the error says enough
                return torch.load(file, map_location="cpu", weights_only=True), {}
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]{1,100}) (was|whose)", str(error))
        found = f"it holds {code[1]}, which is code" if code else "it is damaged or holds something else"
        raise InputError(
            f"{path}: refused, as {found}; expected plain tensors, as torch.save(net.state_dict(), FILE) writes"
        ) from None
    except Exception as error:  # a damaged file can fail at any point of the unpickler
        raise InputError(f"{path}: cut short, damaged or not from PyTorch ({first_line(error)}); {EXPECTED}") from None


def read_safetensors(path):
    """The tensors and the metadata of a .safetensors file."""
    with open(path, "rb") as file:
        declared = int.from_bytes(file.read(8), "little")
    if declared > LARGEST_HEADER:
        raise InputError(
            f"{path}: a .safetensors file whose header declares {declared} bytes; expected at most {LARGEST_HEADER}"
        )
    try:
        # By reading, not by mapping the file, which another process may cut short meanwhile.
        with safetensors.safe_open(path, "pt", backend="pread") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except Exception as error:
        raise InputError(
            f"{path}: a .safetensors file that is cut short or damaged ({first_line(error)}); {EXPECTED}"
        ) from None


def first_line(error):
    lines = str(error).splitlines()
    return printable(lines[0][:200]) if lines else type(error).__name__


# Weights

# Names under which training code keeps weights: as a key beside others such as "epoch", or at the beginning of each
# tensor's name. The first that is there is taken, so averages over the training come before the last step's weights.
WRAPPERS = (
    "params_ema", "state_dict_ema", "ema_state_dict", "model_ema", "net_ema", "netG_ema", "g_ema", "generator_ema",
    "ema_model", "ema", "averaged", "shadow",
    "params", "state_dict", "model_state_dict", "model_state", "net_state_dict", "model", "net", "network", "netG",
    "net_g", "generator", "module", "weights", "_orig_mod", "_forward_module",
)
PREFIXES = re.compile(rf"((?:{'|'.join(WRAPPERS)})\.)*")
DEEPEST = 4  # dictionaries within one another


def unwrap(content, depth=DEEPEST):
    """Find the weights in what training code has saved.

    Args:
        content: of a checkpoint. Weights lie in it or in a dictionary under one of ``WRAPPERS``, and so on.
        depth: how many dictionaries may lie within one another.

    Returns:
        {name: tensor} without the prefixes that all names share. Integers, such as the num_batches_tracked of batch
        normalisation, are left out. An empty dictionary where there are no weights.
    """
    if not isinstance(content, dict) or depth == 0:
        return {}
    for wrapper in WRAPPERS:
        if weights := unwrap(content.get(wrapper), depth - 1):
            return weights
    weights = {
        name: value for name, value in content.items()
        if isinstance(name, str) and isinstance(value, torch.Tensor)
        and (value.is_floating_point() or value.is_complex())  # which is refused later, not left out
    }
    prefix = PREFIXES.match(os.path.commonprefix(list(weights)))[0]
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def load_weights(path):
    """A network's state dict from a checkpoint of either format, without what training code wraps it in (``unwrap``).

    Returns:
        {name: tensor of floating-point numbers}, as they are stored.

    Raises:
        InputError: missing or unreadable file, or content without weights that are finite.
    """
    return read_weights(Path(path))[0]


def read_weights(path):
    """``load_weights``, and the file's metadata."""
    content, metadata = read_file(path)
    weights = unwrap(content)
    if not weights:
        found = listing(content, "key") if isinstance(content, dict) else f"a {type(content).__name__}"
        raise InputError(f"{path}: no weights; expected names and tensors of floating-point numbers, found {found}")
    for name, value in weights.items():
        if not is_plain(value):
            raise InputError(
                f"{path}: expected dense tensors of 16 to 64 bits whose numbers are all in the file, found"
                f" {printable(name[:100])} of {value.dtype}, {value.layout}, {tuple(value.shape)}"
            )
        if not value.float().isfinite().all():
            raise InputError(f"{path}: NaN or infinite weights in {printable(name[:100])}")
    return {name: value.detach() for name, value in weights.items()}, metadata


def is_plain(value):
    """Whether the numbers of a tensor are floating-point ones and all in memory, none shown twice by strides."""
    return (
        value.layout is torch.strided and value.device.type == "cpu" and value.dtype in FLOATS
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


# Networks


def add_network_options(parser, bundled="general.pth"):
    """Add the options that say which network to run: --save_path, --recurrent_iter, --use_dilation.

    ``bundled`` says which of the bundled weights are the default.
    """
    parser.add_argument(
        "--save_path", type=a_path(), metavar="PATH",
        help=f"a checkpoint, or the folder of a training run, whose net_latest.pth is taken (default:"
        f" {PUBLISHED_FOLDER} once a run has left weights there, the bundled {bundled} until then)",
    )
    add_stage_options(parser)


def add_stage_options(parser):
    """Add the options of a network that the names of its tensors do not tell."""
    parser.add_argument(
        "--recurrent_iter", type=at_least(1), metavar="N",
        help="number of stages (default: that of the checkpoint's training run, else 6)",
    )
    add_flag(
        parser, "--use_dilation", None,
        "dilated residual blocks (default: that of the training run, else True for SAPNet and False for PReNet)",
    )


def find_checkpoint(save_path=None, photographs=False):
    """The checkpoint file that --save_path means.

    Args:
        save_path: a file, or the folder of a training run, whose net_latest.pth is taken. None takes the published
            folder if a run has left weights there, and bundled weights otherwise.
        photographs: whether it is for real rain; the bundled weights are then those for photographs, else the general
            ones.
    """
    if save_path is None:
        published = PUBLISHED_FOLDER / "net_latest.pth"
        return published if published.exists() else BUNDLED / ("real.pth" if photographs else "general.pth")
    save_path = Path(save_path)
    return save_path / "net_latest.pth" if save_path.is_dir() else save_path


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


def stage_options(stored, source):
    """Those of ``add_stage_options`` among the options that a file has stored as text or as JSON.

    Args:
        stored: {name: value}.
        source: names the file in an error.

    Raises:
        InputError: a value that the option does not take.
    """
    options = {}
    for name, read in (("recurrent_iter", at_least(1)), ("use_dilation", boolean)):
        if stored.get(name) is not None:
            try:
                options[name] = read(str(stored[name]))
            except argparse.ArgumentTypeError as error:
                raise InputError(f"{source}: {name}: {error}") from None
    return options


def network_options(net):
    """The options of train.py that build ``net``, a ``SAPNet``: {name: value}."""
    convolution, second = net.res_conv1[:2]
    return {
        "recurrent_iter": net.recurrent_iter,
        "use_dilation": net.dilations == DILATIONS,
        "residual_conv": next(name for name, kind in RESIDUAL_CONVS.items() if type(convolution) is kind),
        "use_cra": isinstance(second, CRA),
    }


def load_network(path, recurrent_iter=None, use_dilation=None):
    """Rebuild a network from its checkpoint, in evaluation mode on the CPU, in float32 whatever PyTorch's default is.

    Args:
        path: a checkpoint, or the folder of a training run (``find_checkpoint``).
        recurrent_iter, use_dilation: None takes what the file's metadata say, or else the run's args.json beside it,
            or else the published 6 stages and dilation (none for PReNet). The names of the tensors tell the rest.

    Raises:
        InputError: no checkpoint there, or none of this network.
    """
    path = find_checkpoint(path)
    weights, metadata = read_weights(path)
    options = stage_options(read_options(path.parent), path.parent / "args.json")
    options |= stage_options(metadata, f"{path}: metadata")
    given = {"recurrent_iter": recurrent_iter, "use_dilation": use_dilation}
    options |= {name: value for name, value in given.items() if value is not None}
    try:
        return SAPNet.from_state_dict(weights, **options).eval()
    except ValueError as error:
        raise InputError(f"{path}: {error}, found {listing(weights, 'tensor')}") from None


# Converting


def average_weights(weights, others):
    """The mean of the weights of networks, of which some were trained on from another.

    Source: Wortsman et al., "Model soups", 2022, whose average of fine-tuned weights keeps more of what each knows than
    the last of them does.

    Args:
        weights: {name: floating tensor}.
        others: {path: {name: tensor}}, at least one, of the same names and shapes.

    Returns:
        {name: tensor} of the types of ``weights``.

    Raises:
        InputError: one has other tensors; it names the path.
    """
    for path, state in others.items():
        different = [name for name in weights if name not in state or state[name].shape != weights[name].shape]
        if different or len(state) != len(weights):
            raise InputError(f"--average {path}: expected the tensors of IN, in the same shapes")
    return {
        name: torch.stack([tensor.double(), *(state[name].double() for state in others.values())]).mean(0).to(tensor)
        for name, tensor in weights.items()
    }


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=a_path(), metavar="IN", help="a checkpoint, or the folder of a training run")
    parser.add_argument("output", type=a_path(), metavar="OUT", help="the new file, which ends in .safetensors or .pth")
    parser.add_argument(
        "--average", type=a_path(), nargs="+", default=[], metavar="FILE",
        help="write the mean of the weights of IN and these, which were trained on from it or from the same weights",
    )
    add_stage_options(parser)
    return parser.parse_args(argv)


def main():
    args = parse_args()
    if args.output.suffix not in (".safetensors", ".pth"):
        raise InputError(f"OUT {args.output}: expected a name that ends in .safetensors or .pth")
    if args.output.exists():
        raise InputError(f"OUT {args.output}: is there already; expected the name of a new file")
    check_folder("OUT", args.output.parent)
    net = load_network(args.source, args.recurrent_iter, args.use_dilation)
    stored = load_weights(find_checkpoint(args.source))  # as precise as they are, in the network's order
    weights, options = {name: stored[name] for name in net.state_dict()}, network_options(net)
    if args.average:
        weights = average_weights(weights, {path: load_weights(find_checkpoint(path)) for path in args.average})
    if args.output.suffix == ".pth":
        save_checkpoint(args.output, weights)
    else:
        save_safetensors(args.output, weights, options)
    choices = ", ".join(f"{name} {value}" for name, value in options.items())
    print(f"{args.output}: {counted(len(weights), 'tensor')}, {choices}")
    stages, dilated = options["recurrent_iter"], options["use_dilation"]
    published = stages == 6 and dilated == options["use_cra"]  # what load_network takes by itself
    if args.output.suffix == ".pth" and not published:
        print(f"a .pth file does not say so: give --recurrent_iter {stages} --use_dilation {dilated} where it is used")


if __name__ == "__main__":
    run_script(main)
