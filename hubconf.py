"""SAPNet from another Python program: its network, and a function that derains pictures.

    python -c "from hubconf import sapnet; print(sum(weight.numel() for weight in sapnet('light').parameters()))"

In another program, ``torch.hub`` finds the two entry points of this file, ``sapnet`` and ``derain``:

    derain = torch.hub.load(FOLDER, "derain", source="local")

That program may have its own ``utils.py``, ``networks.py`` and so on, so the files here are imported under names of
their own (``_module``): its modules, ``sys.path`` and later imports stay as they are, in all its threads.
"""
import builtins
import importlib.machinery
import importlib.util
import inspect
import numbers
import os
import pathlib
import re
import sys
import threading
import types
import warnings
import zlib
from contextlib import contextmanager as _contextmanager  # torch.hub.list shows all names without an underscore

import numpy as np
import torch

dependencies = ["torch", "numpy", "safetensors", "tqdm"]  # which torch.hub looks for; pictures by their path need more

_ROOT = pathlib.Path(__file__).resolve().parent
_PACKAGE = f"_sapnet_{zlib.crc32(os.fsencode(_ROOT)):08x}"  # another folder with these files is another package
# torch.hub runs this file anew for each load. What the process has one of hangs on the package, which stays.
_PROCESS = vars(sys.modules.setdefault(_PACKAGE, types.ModuleType(_PACKAGE)))
_IMPORTING = _PROCESS.setdefault("importing", threading.RLock())
_DERAINING = _PROCESS.setdefault("deraining", threading.Lock())
_FILES = _PROCESS.setdefault("files", threading.Lock())  # being read or written: warnings are the whole process's


# Imports apart from those of the caller


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs a file of this repository so that its import statements find the files beside it first.

    Python looks the function behind ``import`` up in the builtins of the module that the statement is in. So each
    module gets builtins of its own, and nothing outside it changes.
    """

    def exec_module(self, module):
        module.__builtins__ = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


def _import(name, global_names=None, local_names=None, fromlist=(), level=0):
    """What ``import`` calls in our files."""
    if (_ROOT / f"{name}.py").is_file():
        return _module(name)
    return builtins.__import__(name, global_names, local_names, fromlist, level)


def _module(name):
    """The module of NAME.py beside this file, imported on the first call under a name of its own."""
    private = f"{_PACKAGE}.{name}"
    with _IMPORTING:
        if private not in sys.modules:
            path = str(_ROOT / f"{name}.py")
            spec = importlib.util.spec_from_file_location(private, path, loader=_Loader(private, path))
            sys.modules[private] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(sys.modules[private])
            except BaseException:
                del sys.modules[private]
                raise
        return sys.modules[private]


@_contextmanager
def _usual_errors():
    """Turn the errors that our scripts report into those which a Python program expects, with the same sentence.

    An option that is an argument here is called so: --max_memory becomes max_memory.
    """
    utils, arguments = _module("utils"), "|".join(inspect.signature(derain).parameters)
    try:
        yield
    except (utils.InputError, utils.RunError) as error:
        kind = ValueError if isinstance(error, utils.InputError) else RuntimeError
        raise kind(re.sub(rf"(^|[\s(])--({arguments})\b", r"\1\2", str(error))) from None


# The network


def sapnet(weights="general", recurrent_iter=None, use_dilation=None):
    """The network with its weights.

    Args:
        weights: the name of one of the files under ``weights/``, such as "general", the default, or "light" for light
            rain; or the path of any checkpoint that ``test.py`` takes, or of the folder of a training run. A path that
            is such a name too is written "./general".
        recurrent_iter: number of stages; None takes that of the checkpoint's training run, else 6.
        use_dilation: whether the residual blocks are dilated; None takes what the training run had, else what is
            published for the network.

    Returns:
        A ``torch.nn.Module`` in evaluation mode, on the CPU, in float32. It takes RGB, (N, 3, H, W) in [0, 1], of any
        size, and returns the same shape, not clamped. Give it whole pictures, as its attention averages over them;
        for large ones ``derain`` takes less memory.

    Raises:
        FileNotFoundError: no such file.
        TypeError: ``weights`` are neither a name nor a path.
        ValueError: no such name, a file that holds no such weights, or another argument that is not as above.
    """
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(f"weights: expected a name or a path, found {_kind(weights)}")
    if recurrent_iter is not None and not (isinstance(recurrent_iter, numbers.Integral) and recurrent_iter >= 1):
        raise ValueError(f"recurrent_iter: expected an integer from 1 on, found {recurrent_iter!r}")
    _check_choice("use_dilation", use_dilation, (None, True, False))
    path = _find_weights(weights)
    with _usual_errors(), _FILES:
        return _module("checkpoints").load_network(path, recurrent_iter, use_dilation)


def _find_weights(weights):
    """The path of a checkpoint or a run's folder that ``weights`` of ``sapnet`` names."""
    names = sorted(path.stem for path in _ROOT.glob("weights/*.pth"))
    if weights in names:
        return _ROOT / "weights" / f"{weights}.pth"
    path = pathlib.Path(weights)
    if path.exists():
        return path
    known = ", ".join(f'"{name}"' for name in names)
    if str(weights) == path.stem:  # a bare word
        raise ValueError(f"weights: {str(weights)!r} is not there; expected {known} or the path of a checkpoint")
    raise FileNotFoundError(f"weights: {path}: no such file; expected {known} or the path of a checkpoint")


# Deraining


def derain(
    weights="general", precision="fp32", device="auto", self_ensemble=False, max_memory=None, recurrent_iter=None,
    use_dilation=None,
):
    """A function that takes the rain off pictures; the arguments are the options of ``test.py`` of the same names.

    Args:
        weights, recurrent_iter, use_dilation: as for ``sapnet``.
        precision: of the convolutions: "fp32", "bf16", "fp16", or "auto" for the fastest of the device.
        device: "auto", the GPU if there is one, or "cpu", "cuda", "cuda:N", or a ``torch.device``. A GPU without a
            number is the current one of the process, which stays the current one.
        self_ensemble: average over the picture, its mirror image, and both upside down, which takes four times as long.
        max_memory: GiB. On the CPU, a picture that needs more (0.6 GiB a megapixel in fp32) works on the disk, with
            the same result. None takes 3/4 of what is free when a picture comes, and has no limit on macOS and Windows.

    Returns:
        A function of a picture, described by its docstring: ``help(torch.hub.load(...))`` shows it.

    Raises:
        FileNotFoundError, TypeError: as for ``sapnet``.
        ValueError: as for ``sapnet``; also for a device that is not there.
    """
    devices = _module("devices")
    precisions = {"fp32": torch.float32, **devices.HALF_PRECISIONS}
    _check_choice("precision", precision, (*precisions, "auto"))
    _check_choice("self_ensemble", self_ensemble, (True, False))
    if max_memory is not None and not (isinstance(max_memory, numbers.Real) and max_memory >= 0):
        raise ValueError(f"max_memory: expected a number of GiB, 0 or more, found {max_memory!r}")
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: expected a name or a torch.device, found {_kind(device)}")
    with _usual_errors():
        device = devices.pick_device(str(device), own_process=False)
    if precision == "auto":
        precision = devices.fast_precision(device)
    net = sapnet(weights, recurrent_iter, use_dilation).to(device)
    return _Derain(net, device, precisions[precision], self_ensemble, max_memory)


class _Derain:
    """What ``derain`` returns; see ``__call__``."""

    def __init__(self, net, device, dtype, self_ensemble, max_memory):
        self.device, self.max_memory = device, max_memory
        self._runner = _module("inference").StripRunner(net, dtype)
        self._run = _module("runners").self_ensemble(self._runner) if self_ensemble else self._runner
        self._settings = _module("runners").settings_of(self._runner, self_ensemble)

    def __call__(self, picture, output=None):
        """Take the rain off a picture of any size, in bounded memory. Several threads may call this: they take turns.

        Args:
            picture: an (H, W, 3) RGB array of uint8 or uint16, from 0 to 255 or 65535; (H, W, 4) has alpha too, which
                is not changed. Or a PIL image, or the path of a picture of any format that ``test.py`` reads. As
                there, grey becomes RGB, and a picture is turned as its EXIF orientation says.
            output: only with a path: the path of a new file to write, .png, .tif, .jpg or .webp, with the input's
                colour profile and its EXIF data. JPEG has no alpha, and like WebP 8 bits; only PNG has a place for
                colours without a profile, and none has it for a profile of grey or CMYK. A ``UserWarning`` tells of
                such a loss.

        Returns:
            The same kind. For an array one of the same shape and type. For a PIL image one in mode RGB or RGBA, with
            the colour profile. For a path the path of the written ``output``; without an ``output`` the array, of the
            file's depth and with alpha if the file has it.

        Raises:
            FileExistsError, FileNotFoundError: ``output`` is there already, ``picture`` is not.
            ImportError: reading files takes Pillow and OpenCV; the message names the pip command.
            RuntimeError: no room on the disk, no folder for temporary files, or the output is not finite.
            TypeError: another kind of picture, or of numbers in it.
            ValueError: another shape, or a file that is no readable picture, also behind a PIL image.
        """
        if isinstance(picture, (str, os.PathLike)):
            return self._derain_file(pathlib.Path(picture), output)
        if output is not None:
            raise TypeError(f"output: expected a picture given by its path, found {_kind(picture)}")
        if isinstance(picture, np.ndarray):
            return self._derain_array(picture)
        if hasattr(picture, "getexif"):  # not isinstance: arrays need no Pillow
            return self._derain_pil(picture)
        raise TypeError(f"expected an array (H, W, 3), a PIL image or a path, found {_kind(picture)}")

    def _derain_array(self, image):
        _check_array(image)
        inference = _module("inference")
        free = _module("devices").free_memory()
        # One at a time: the runner sets float32's precision for the whole process, and two would take memory twice.
        with _usual_errors(), _DERAINING:
            self._runner.max_memory = 0.75 * free if self.max_memory is None else self.max_memory * 2**30
            try:
                output = inference.derain_array(self._run, image[..., :3], self.device)
                derained = inference.to_image(output, image.dtype)
            except OSError as error:
                if error.filename is None and not isinstance(error, FileNotFoundError):
                    raise  # no memory; all others are of temporary files
                raise RuntimeError(
                    f"{error.filename or 'TMPDIR'}: no temporary file for a large picture ({error.strerror}); expected"
                    " a larger max_memory, or TMPDIR to name a folder with room"
                ) from None
        return np.concatenate((derained, image[..., 3:]), axis=2)

    def _derain_pil(self, image):
        from PIL import Image, ImageOps

        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise TypeError(f"a PIL image in mode {image.mode}: expected 8 bits; give more as an array or by its path")
        try:  # Image.open reads a file's header; its pixels are read here
            turned = ImageOps.exif_transpose(image)
            pixels = np.asarray(turned.convert("RGBA" if turned.has_transparency_data else "RGB"))
        except MemoryError:
            raise
        except Exception as error:  # a damaged file can fail at any point of the decoders
            reason = str(error).partition("\n")[0] or type(error).__name__
            name = f" of {os.fsdecode(image.filename)}" if getattr(image, "filename", "") else ""
            raise ValueError(
                f"a PIL image{name} cannot be read ({reason}); expected one whose file is whole and has not been closed"
            ) from None
        result = Image.fromarray(self._derain_array(pixels))
        result.info = {name: turned.info[name] for name in ("dpi", "exif", "icc_profile") if name in turned.info}
        profile = result.info.get("icc_profile") or b""  # Pillow sets None where one in a JPEG file is incomplete
        if profile[16:20] != b"RGB ":  # that of CMYK or grey would be wrong for the result
            result.info.pop("icc_profile", None)
        return result

    def _derain_file(self, path, output):
        with _image_files() as images:
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file; expected a picture")
            if output is not None:
                output = pathlib.Path(output)
                _check_output(output, images.WRITTEN)
            image = images.read_image(path)
            metadata = None if output is None else images.read_metadata(path)
        if output is None:
            return self._derain_array(image)
        kind = images.WRITTEN[output.suffix.lower()]
        lost = ["alpha"] * (kind == "JPEG" and image.shape[2] == 4)
        lost += ["16 bits"] * (kind in ("JPEG", "WEBP") and image.dtype != np.uint8)
        ways_out = ".png and .tif do"
        if metadata.loses_colours(kind):
            lost.append("colour profile, of grey or CMYK," if metadata.foreign else "colour space")
            ways_out = "an RGB profile would be kept" if metadata.foreign else ".png does"
        if lost:
            warnings.warn(
                f"output: {output}: {kind} does not keep the {' and '.join(lost)} of {path}; {ways_out}",
                stacklevel=3,  # the caller of ``__call__``
            )
        derained = self._derain_array(image)
        with _image_files():
            # As in test.py, whose results have the same bytes
            mark = images.mark_of(path, output, quality=95, metadata=True, rainy_half=None, **self._settings)
            images.write_image(output, derained, metadata._replace(software=mark))
        return output


@_contextmanager
def _image_files():
    """The module ``images``, to read and write files with; its errors become those of ``_usual_errors``.

    Pillow's largest picture and OpenCV's log level, of which the process has one each, are those of ``images`` within
    this context and the caller's after it. So only one thread at a time is within.
    """
    try:
        import cv2
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f"{error.name} is missing; expected, to read files: pip install pillow opencv-python-headless"
        ) from None
    log = cv2.utils.logging
    with _usual_errors(), _FILES:
        largest, level = Image.MAX_IMAGE_PIXELS, log.getLogLevel()
        try:
            with warnings.catch_warnings():  # its import adds a filter
                images = _module("images")
            Image.MAX_IMAGE_PIXELS = None  # as its import does, but the first one only
            log.setLogLevel(log.LOG_LEVEL_SILENT)
            yield images
        finally:
            Image.MAX_IMAGE_PIXELS = largest
            log.setLogLevel(level)


def _check_output(output, suffixes):
    """Refuse the path of a new file that is there already, or whose suffix is none of those that can be written."""
    if output.suffix.lower() not in suffixes:
        raise ValueError(f"output: {output}: expected a name that ends in {', '.join(suffixes)}")
    if os.path.lexists(output):
        raise FileExistsError(f"output: {output}: is there already; expected the name of a new file")


def _check_array(image):
    """Refuse what is no (H, W, 3) or (H, W, 4) array of 8 or 16 bits."""
    if isinstance(image, np.ma.MaskedArray):
        raise TypeError(
            "a masked array: expected a plain one, as image.filled(0) makes of it, since no pixel can be left out: the"
            " network averages over all of them"
        )
    if image.dtype.kind == "f":
        raise TypeError(
            f"an array of {image.dtype}: expected uint8 or uint16, as np.rint(255 * image).astype(np.uint8) makes of"
            " numbers in [0, 1]"
        )
    if image.dtype.kind != "u" or image.dtype.itemsize > 2:
        raise TypeError(f"an array of {image.dtype}: expected uint8 or uint16")
    if image.ndim == 2 or image.ndim == 3 and image.shape[2] == 1:
        raise ValueError(f"a grey array {image.shape}: expected (H, W, 3), as np.dstack([image] * 3) makes of (H, W)")
    if image.ndim != 3 or image.shape[2] not in (3, 4) or 0 in image.shape:
        raise ValueError(f"an array {image.shape}: expected (H, W, 3), one RGB picture, or (H, W, 4) with alpha")


def _check_choice(name, value, choices):
    if not any(value is choice or isinstance(value, str) and value == choice for choice in choices):
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, found {value!r}")


def _kind(value):
    """How an error calls what it found."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
