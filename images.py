"""Read and write pictures as NumPy arrays: RGB or RGBA, 8 or 16 bits.

    python -c "from images import read_image; print(read_image('results/sample.jpg').shape)"

Pillow decodes what has 8 bits a sample, OpenCV what has 16. Whatever goes wrong in a file is an ``InputError`` that
names the file.
"""
import math
import os
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils import InputError, atomic_write, natural_key

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # Pillow would also run the PostScript of an EPS file
MAX_PIXELS = 2**28  # of an image; the largest cameras have 200 million, and a few bytes can declare 60,000x60,000
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns from 89 million on; ``open_image`` has ours
ORIENTATION_TAG = 0x0112  # of EXIF


def list_images(folder):
    """The paths of the images directly in ``folder``, in natural order."""
    paths = [path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(paths, key=natural_key)


def find_images(folder, option):
    """``list_images`` of a folder that must have some.

    Args:
        folder: where to look.
        option: the option that the folder comes from, which an error names.

    Raises:
        InputError: no such folder, or no images in it.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{option} {folder}: no such folder; expected a folder of images")
    paths = list_images(folder)
    if not paths:
        raise InputError(f"{option} {folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in this folder")
    return paths


# Reading


@contextmanager
def open_image(path):
    """Yield an image file as Pillow opens it: the header is read, the pixels are not.

    Raises:
        InputError: missing, too large or no image; also for what goes wrong inside the ``with`` block.
    """
    try:
        # Given the path, Pillow would map uncompressed TIFFs into memory, and mix up the rows of those to be turned.
        with open(path, "rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height}; expected at most {MAX_PIXELS:,} pixels")
            yield image
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected an image") from None
    except Exception as error:  # a damaged file can fail at any point of the decoders
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable image ({reason})") from None


def image_size(path):
    """(height, width) in px as ``read_image`` returns it, from the header alone."""
    with open_image(path) as image:
        width, height = image.size
        return (width, height) if read_orientation(image, path) >= 5 else (height, width)


def read_image(path):
    """Decode an image file.

    Returns:
        (H, W, 3) RGB or (H, W, 4) RGBA array, uint8, or uint16 for files with 16 bits a sample. Grey is repeated to
        three channels, and the picture is turned as its EXIF orientation says.

    Raises:
        InputError: the file is missing, truncated, no image, or one of more than ``MAX_PIXELS``.
    """
    with open_image(path) as image:
        orientation = read_orientation(image, path)
        if image.mode.startswith("I;16") or is_deep(image, path):
            return turn(read_deep(path), orientation)
        if image.mode in ("I", "F"):
            raise ValueError("32 bits a sample; expected 8 or 16")
        mode = "RGBA" if image.has_transparency_data else "RGB"
        return turn(np.asarray(image if image.mode == mode else image.convert(mode)), orientation)


def read_rgb(path):
    """``read_image`` as (H, W, 3) uint8: alpha is dropped, 16 bits are rounded to 8."""
    return to_uint8(read_image(path)[..., :3])


def read_orientation(image, path):
    """How the file opened as ``image`` is still to be turned, as an EXIF orientation from 1 to 8; 1 is not at all."""
    if image.format == "TIFF":
        return 1  # Pillow and OpenCV turn these while they decode, and Pillow's size is the one afterwards
    if image.format == "PNG" and not has_late_metadata(path):
        exif = Image.Image.getexif(image)  # PngImageFile.getexif would decode the pixels to see what is behind them
    else:
        exif = image.getexif()
    orientation = exif.get(ORIENTATION_TAG)
    return orientation if orientation in range(1, 9) else 1


def has_late_metadata(path):
    """Whether a PNG has more than its end behind its pixels, as few have.

    Raises:
        ValueError: it ends within one of its chunks, for which OpenCV would take as much memory as that one declares.
    """
    late, name = False, None
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(8)  # behind the signature
        while name != b"IEND" and len(header := file.read(8)) == 8:
            before, name = name, header[4:]
            late |= before == b"IDAT" and name not in (b"IDAT", b"IEND")
            end_of_chunk = file.tell() + int.from_bytes(header[:4], "big") + 4  # data and checksum
            if end_of_chunk > size:
                raise ValueError("cut short")
            file.seek(end_of_chunk)
    return late


def turn(pixels, orientation):
    """An (H, W, C) array as an EXIF orientation from 1 to 8 wants it shown (EXIF 2.3, section 4.6.4)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def is_deep(image, path):
    """Whether the file opened as ``image`` has 16 bits a sample, which Pillow would reduce to 8 in colour files."""
    if image.format == "TIFF":
        return image.tag_v2.get(258, (8,))[0] == 16
    with open(path, "rb") as file:
        header = file.read(26)
    return image.format == "PNG" and len(header) == 26 and header[24] == 16


def read_deep(path):
    """Decode a 16-bit file to (H, W, 3) RGB or (H, W, 4) RGBA uint16; a PNG as it lies in the file, not turned."""
    with open(path, "rb") as file:
        image = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16:
        raise ValueError("damaged 16-bit image")
    if image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)
    return cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA if image.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def to_uint8(image):
    """A uint8 or uint16 array as uint8, rounded."""
    return image if image.dtype == np.uint8 else np.rint(image / 257).astype(np.uint8)


# Writing


def write_image(path, image):
    """Write an (H, W, 3 or 4) uint8 or uint16 RGB(A) array in the format of the suffix, complete or not at all.

    Raises:
        RunError: the file cannot be written.
    """
    code = cv2.COLOR_RGBA2BGRA if image.shape[2] == 4 else cv2.COLOR_RGB2BGR
    ok, data = cv2.imencode(path.suffix, cv2.cvtColor(image, code))
    if not ok:
        raise OSError(f"{path}: could not be encoded as {path.suffix}")
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
