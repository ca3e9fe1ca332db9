"""Read and write pictures as NumPy arrays: RGB or RGBA, 8 or 16 bits.

    python -c "from images import read_image; print(read_image('results/sample.jpg').shape)"

Pillow decodes what has 8 bits a sample, OpenCV what has more. Whatever goes wrong in a file is an ``InputError`` that
names the file.
"""
import io
import json
import math
import os
import re
import warnings
import zlib
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from metadata import BITS_PER_SAMPLE, ORIENTATION, Metadata, encode, metadata_of, png_chunks, read_exif, read_start
from utils import InputError, atomic_write, natural_key

IMAGE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".pbm",
    ".pnm", ".tga", ".jp2", ".j2k", ".avif", ".heic", ".heif", ".hif",
}
VIDEO_SUFFIXES = {
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp",
    ".ogv", ".vob", ".m2v", ".asf", ".mxf", ".gxf", ".dv", ".nut", ".y4m", ".ivf", ".obu", ".rm", ".rmvb", ".wtv",
    ".h264", ".264", ".hevc", ".h265", ".265", ".vc1",
}
HEAD = 40  # bytes at the beginning of a file, which tell its format
SIGNATURES = {  # format as Pillow calls it, or VIDEO: what the head of such a file looks like
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "BMP": rb"BM.{12}[\x0c-\x7c]\0\0\0",
    "TIFF": rb"(II[*+]\0|MM\0[*+])(?!....CR)",  # CR: a raw photograph by Canon, which begins with a thumbnail
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "PPM": rb"P[1-6]\s+[\d#]",
    "JPEG2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "AVIF": rb"....ftyp(....)*?avi[fs]",
    "HEIF": rb"....ftyp(he[iv][cxms]|mif1|msf1)",
    "VIDEO": (
        rb"....(ftyp(?!M4[AB] |crx )|moov|mdat)|\x1a\x45\xdf\xa3|RIFF....AVI |FLV\x01|0&\xb2u"
        rb"|\0\0\x01[\xb0\xb3\xba\x0f]"  # MPEG, and raw VC-1
        # MXF, GXF, raw DV, NUT
        rb"|\x06\x0e\x2b\x34\x02\x05\x01\x01|\0\0\0\0\x01\xbc.{8}\xe1\xe2|\x1f\x07\0[\x3f\xbf]|nut/multimedia"
        rb"|YUV4MPEG2 |DKIF\0\0|\.RMF\0|\xb7\xd8\0\x20\x37\x49\xda\x11"  # Y4M, IVF, RealMedia, WTV
        rb"|OggS.{24}(\x80theora|OVP80|BBCD|fishead|\x01video)"  # not what has sound alone
        # Raw H.264 and HEVC, which begin with their parameters or a delimiter, and raw AV1
        rb"|\0?\0\0\x01([\x27\x47\x67]|\x09.\0|[\x40\x46]\x01)|\x12\0\x0a[\x05-\x20]"
    ),
}
# What Pillow may open: it would also run the PostScript of an EPS file. TGA has no signature, so that Pillow takes many
# a file for one; ``open_image`` adds it where the suffix says so.
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF")
SUBFILE_TYPE, PHOTOMETRIC, PLANES = 254, 262, 284  # tags of TIFF; SUBFILE_TYPE 1 is a smaller page, 4 a mask
COMPRESSION, SAMPLES_PER_PIXEL, SAMPLE_FORMAT = 259, 277, 339
BLACK_IS_ZERO, RGB, YCBCR = 1, 2, 6  # values of PHOTOMETRIC
MAX_PIXELS = 2**28  # of an image; the largest cameras have 200 million, and a few bytes can declare 60,000x60,000
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns from 89 million on; ``open_image`` has ours
# What is wrong with a file is reported here, in one line.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


# What a file is


def match_head(head):
    """The key of ``SIGNATURES`` that the first bytes of a file fit, or None."""
    return next((kind for kind, pattern in SIGNATURES.items() if re.match(pattern, head, re.DOTALL)), None)


def content_of(path):
    """What a file is by its first bytes: a key of ``SIGNATURES``, or None where they do not say."""
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            return None
        with open(path, "rb") as file:
            return match_head(file.read(HEAD))
    except OSError:
        return None


def is_video(path):
    """Whether a file is a video: by its first bytes, or where they do not say, by its suffix."""
    kind = content_of(path)
    return kind == "VIDEO" if kind else path.suffix.lower() in VIDEO_SUFFIXES


def is_image(path):
    """Whether a file is a picture: by its suffix, which costs nothing in a long folder, else by its first bytes."""
    suffix = path.suffix.lower()
    return suffix in IMAGE_SUFFIXES or suffix != ".tmp" and content_of(path) not in (None, "VIDEO")


def is_shadow(path):
    """Whether a file is what macOS leaves beside another one on foreign disks and in archives: ._NAME, no picture."""
    return path.name.startswith("._")


class NoImages(InputError):
    """A folder without images, or without images and videos."""


def entries_in(folder, folders):
    """The paths of the files directly in ``folder``, or of the ``folders``, in any order."""
    with os.scandir(folder) as entries:  # which know without a look at the disk what is a folder, but for links
        return [
            Path(folder, entry.name) for entry in entries
            if folders == (os.path.isdir(entry) if entry.is_symlink() else entry.is_dir())
        ]


def list_images(folder):
    """The paths of the images directly in ``folder``, in natural order."""
    paths = entries_in(folder, folders=False)
    return sorted((path for path in paths if not is_shadow(path) and is_image(path)), key=natural_key)


def find_images(folder, option):
    """``list_images`` of a folder that must have some.

    Args:
        folder: where to look.
        option: the option that the folder comes from, which an error names.

    Raises:
        InputError: no such folder, or no images in it (``NoImages``).
    """
    if not Path(folder).is_dir():
        raise InputError(f"{option} {folder}: no such folder; expected a folder of images")
    paths = list_images(folder)
    if not paths:
        raise NoImages(f"{option} {folder}: no images in this folder")
    return paths


# Reading


@contextmanager
def open_image(path):
    """Yield an image file as Pillow opens it: the header is read, the pixels are not.

    Raises:
        InputError: missing, too large, of several frames or no image; also for what goes wrong inside the ``with``
            block.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("not a file")
        # Given the path, Pillow would map uncompressed TIFFs into memory, and mix up the rows of those to be turned.
        with open(path, "rb") as file, Image.open(file, formats=formats_of(path, file)) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height}; expected at most {MAX_PIXELS:,} pixels")
            if has_frames(image):
                raise ValueError("an animation or several pages; expected a single picture")
            yield image
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected an image") from None
    except UnidentifiedImageError:  # its text names the Python object of the open file
        kind = content_of(path)
        reason = f"damaged {kind}" if kind in IMAGE_FORMATS else "its content is that of no known format"
        reason = kind == "TIFF" and unusual_samples_of(path) or reason
        raise InputError(f"{path}: not a readable image ({reason})") from None
    except Exception as error:  # a damaged file can fail at any point of the decoders
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable image ({reason})") from None


def formats_of(path, file):
    """The formats as which Pillow may open a file, which is open as ``file`` and stays at its beginning."""
    kind = match_head(file.read(HEAD))
    file.seek(0)
    if kind == "HEIF":
        try:
            from pillow_heif import register_heif_opener
        except ImportError:  # it is optional, as it brings its own decoder for HEVC
            raise ValueError("HEIC, which takes another package: pip install pillow-heif") from None
        register_heif_opener(thumbnails=False)
        return (*IMAGE_FORMATS, "HEIF")
    return (*IMAGE_FORMATS, "TGA") if Path(path).suffix.lower() == ".tga" else IMAGE_FORMATS


def unusual_samples_of(path):
    """``unusual_samples`` of a TIFF that Pillow does not open; "" where it is damaged."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
            directory = TiffImagePlugin.ImageFileDirectory_v2(head if head[2:3] == b"+" else head[:8])
            file.seek(directory.next)
            directory.load(file)
            return unusual_samples(directory)
    except Exception:  # at any point of the file
        return ""


def unusual_samples(tags):
    """What is unusual in the samples of a TIFF, from its {tag: value}, and what is read instead; "" where nothing is.

    Pillow refuses some of these as unknown, and shows others wrongly.
    """
    bits, kinds = (tags.get(tag) or (1,) for tag in (BITS_PER_SAMPLE, SAMPLE_FORMAT))
    for kind, name in ((2, "signed"), (3, "float"), (5, "complex"), (6, "complex")):
        if kinds[0] == kind:
            return f"{name} samples of {bits[0]} bits; expected 8 or 16 bits, unsigned"
    if bits[0] > 8 and bits[0] != 16:
        return f"{bits[0]} bits a sample; expected 8 or 16"
    if bits[0] == 16 and tags.get(SAMPLES_PER_PIXEL) == 2:
        return "grey of 16 bits with alpha; expected grey, RGB or RGBA"
    if tags.get(PHOTOMETRIC) == YCBCR and tags.get(COMPRESSION, 1) == 1:
        return "samples in YCbCr without compression; expected RGB or grey, or compression"
    return ""


def has_frames(image):
    """Whether a file opened by Pillow holds several pictures of one rank, as an animation does.

    Raises:
        ValueError: it holds none but a thumbnail.
    """
    if image.format in ("MPO", "HEIF"):
        return False  # they say which picture is the one; the others are previews, depth or the other eye's
    if image.format == "TIFF":
        if image.tag_v2.get(SUBFILE_TYPE, 0) & 1:
            raise ValueError("it begins with a thumbnail, as raw photographs do; expected a developed one")
        try:
            for page in range(1, 20 if image.is_animated else 1):
                image.seek(page)
                if not image.tag_v2.get(SUBFILE_TYPE, 0) & 5:
                    return True
        except EOFError:
            pass
        image.seek(0)
        return False
    return getattr(image, "is_animated", False)


def image_size(path):
    """(height, width) in px as ``read_image`` returns it, from the header alone."""
    with open_image(path) as image:
        width, height = image.size
        return (width, height) if read_orientation(image, path) >= 5 else (height, width)


def read_image(path):
    """Decode an image file.

    Returns:
        (H, W, 3) RGB or (H, W, 4) RGBA array, uint8, or uint16 for files with more than 8 bits a sample. Grey is
        repeated to three channels, and the picture is turned as its EXIF orientation says. CMYK is converted without
        its colour profile.

    Raises:
        InputError: the file is missing, truncated, no image, of several frames, or of more than ``MAX_PIXELS``.
    """
    with open_image(path) as image:
        if image.format == "JPEG" and is_stream_of_jpegs(image, path):
            raise ValueError("JPEGs one after another, as in raw video; expected one, or a video such as .avi or .mp4")
        orientation, size, peak = read_orientation(image, path), image.size, largest_sample(image, path)
        if peak > 255:
            pixels = read_deep(image, path, peak)
        elif image.mode in ("I", "F"):
            raise ValueError("32 bits a sample; expected 8 or 16")
        else:
            mode = "RGBA" if image.has_transparency_data else "RGB"
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
        if pixels.shape[1::-1] != size:
            raise ValueError(f"{pixels.shape[1]}x{pixels.shape[0]}, where its header declares {size[0]}x{size[1]}")
        return turn(pixels, orientation)


def is_stream_of_jpegs(image, path):
    """Whether behind the JPEG that is open as ``image`` another one of its size begins: these are frames of a video.

    A camera may leave a smaller one there, as a preview.
    """
    data = Path(path).read_bytes()
    behind = data.find(b"\xff\xd9\xff\xd8\xff")
    try:
        return behind > 0 and Image.open(io.BytesIO(data[behind + 2 :]), formats=("JPEG",)).size == image.size
    except OSError:  # it is none
        return False


def read_metadata(path):
    """The ``Metadata`` of an image file; errors as for ``open_image``."""
    with open_image(path) as image:
        return metadata_of(image, path)


def read_rgb(path):
    """``read_image`` as (H, W, 3) uint8: alpha is dropped, 16 bits are rounded to 8."""
    return to_uint8(read_image(path)[..., :3])


def read_orientation(image, path):
    """How the file opened as ``image`` is still to be turned, as an EXIF orientation from 1 to 8; 1 is not at all."""
    if image.format == "TIFF":
        return 1  # Pillow and OpenCV turn these while they decode, and Pillow's size is the one afterwards
    orientation = read_exif(image, path).get(ORIENTATION)
    return orientation if orientation in range(1, 9) else 1


def turn(pixels, orientation):
    """An (H, W, C) array as an EXIF orientation from 1 to 8 wants it shown (EXIF 2.3, section 4.6.4)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def largest_sample(image, path):
    """The value of white in the samples of the file opened as ``image``: 255 for all that have 8 bits or fewer.

    Pillow would reduce most of the others to 8 bits.
    """
    bits = 8
    if image.format == "TIFF":
        if unusual := unusual_samples(image.tag_v2):
            raise ValueError(unusual)
        bits = image.tag_v2.get(BITS_PER_SAMPLE, (1,))[0]
        # OpenCV would take these for something else, without a word.
        if bits == 16 and image.tag_v2.get(PHOTOMETRIC) not in (BLACK_IS_ZERO, RGB):
            raise ValueError("16 bits a sample that are neither RGB nor grey with 0 for black; expected one of these")
        if bits == 16 and image.tag_v2.get(PLANES, 1) != 1 and len(image.tag_v2[BITS_PER_SAMPLE]) > 1:
            raise ValueError("16 bits a sample in planes, one after another; expected the samples of a pixel together")
    elif image.format == "PNG":
        bits = read_start(path, 25)[24]
    elif image.format == "PPM":
        words = re.sub(rb"#[^\r\n]*", b" ", read_start(path, 1024)).split()
        return max(255, int(words[3])) if words[0] not in (b"P1", b"P4") else 255
    elif image.format == "JPEG2000":
        data = Path(path).read_bytes()
        bits = (data[data.index(b"\xff\x4f\xff\x51") + 42] & 127) + 1  # Ssiz of the first component
    elif image.format == "AVIF":
        for flags in re.findall(rb"av1C\x81.(.)", Path(path).read_bytes(), re.DOTALL):
            if flags[0] & 0x40:
                bits = 12 if flags[0] & 0x20 else 10
    elif image.format == "HEIF" and image.info["bit_depth"] > 8:
        bits = image.info["bit_depth"]
        return (2**bits - 1) << (16 - bits)  # pillow-heif gives 16 bits, of which the first are those of the file
    return max(255, 2**bits - 1)


def read_deep(image, path, peak):
    """Decode a file of more than 8 bits a sample, opened as ``image``; a PNG as it lies in the file, not turned.

    Args:
        image, path: the file.
        peak: its ``largest_sample``.

    Returns:
        (H, W, 3) RGB or (H, W, 4) RGBA uint16, in which white is 65535.
    """
    if image.format == "HEIF":
        from pillow_heif import open_heif

        pixels = np.asarray(open_heif(path, convert_hdr_to_8bit=False))
    else:
        data = Path(path).read_bytes() + b"\n"  # OpenCV wants a blank behind the last number of a PPM file
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise ValueError("damaged image of more than 8 bits")
    if peak < 65535:
        pixels = np.rint(pixels * np.float32(65535 / peak)).clip(0, 65535).astype(np.uint16)
    if pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, axis=2)
    if image.format == "HEIF":
        return pixels
    return cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def to_uint8(image):
    """A uint8 or uint16 array as uint8, rounded."""
    return image if image.dtype == np.uint8 else np.rint(image / 257).astype(np.uint8)


# Writing

WRITTEN = {  # suffix: format that ``write_image`` writes
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".webp": "WEBP", ".tif": "TIFF",
    ".tiff": "TIFF",
}
MARK = "SAPNet"  # the software that a picture of this program names as its maker
LARGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383}  # px


def mark_of(path, output, quality, **settings):
    """The mark of a derained picture, which tells results of one name apart: ``MARK`` and a fingerprint.

    Args:
        path: of the file that it is made of, whose content counts and not its name.
        output: path of the result; its format counts, and of JPEG and WebP the ``quality``.
        settings: what else its bytes depend on, such as the weights; values that JSON can hold.
    """
    kind = WRITTEN[output.suffix.lower()]
    settings |= {"format": kind} | ({"quality": quality} if kind in ("JPEG", "WEBP") else {})
    made_of = json.dumps([zlib.crc32(Path(path).read_bytes()), settings], sort_keys=True)
    return f"{MARK} {zlib.crc32(made_of.encode()):08x}"


def is_marked(path):
    """Whether a picture at a path names this program as its maker, with or without a fingerprint."""
    suffix = path.suffix.lower()
    try:
        if suffix not in WRITTEN or suffix == ".png" and not has_texts(path):
            return False
        return str(read_metadata(path).software).startswith(MARK)
    except InputError:
        return False


def has_texts(path):
    """Whether a file may be a picture that names its maker: of a PNG a look at what is before the pixels tells.

    This takes a tenth of the time of opening it, and few data sets have such texts.
    """
    try:
        with open(path, "rb") as file:
            if match_head(file.read(HEAD)) != "PNG":
                return True
            before = takewhile(lambda chunk: chunk[0] != b"IDAT", png_chunks(file))
            return any(name in (b"tEXt", b"zTXt", b"iTXt", b"eXIf") for name, *_ in before)
    except (OSError, ValueError):  # cut short: it is for the reader of pictures to say so
        return True


def write_image(path, image, metadata=Metadata(), quality=95):
    """Write a picture in the format of the suffix (``WRITTEN``), complete or not at all.

    Args:
        path: where to; another file there is replaced.
        image: (H, W, 3 or 4) RGB(A) uint8 or uint16 array. JPEG has no alpha, and like WebP 8 bits.
        metadata: ``Metadata`` to write beside the pixels.
        quality: of JPEG and WebP, 1 to 100.

    Raises:
        InputError: the picture is too large for the format.
        RunError: the file cannot be written.
    """
    kind = WRITTEN[path.suffix.lower()]
    if max(image.shape[:2]) > LARGEST_SIDE.get(kind, math.inf):
        raise InputError(f"{path}: {kind} has at most {LARGEST_SIDE[kind]:,} px a side; expected PNG, which has more")
    data = encode(image, kind, metadata, quality)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
