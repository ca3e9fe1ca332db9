"""What a picture's file says beside its pixels, read from any format and written to PNG, JPEG, WebP and TIFF.

    python -c "from metadata import Metadata, encode; print(encode)"

A result keeps what makes it look like its input, the colour profile, and what tells where it comes from: EXIF's date,
place and camera. ``images.py`` reads and writes the files themselves.
"""
import io
import os
import re
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin

# Tags of TIFF and EXIF
BITS_PER_SAMPLE, ORIENTATION, SOFTWARE, EXIF_IFD, GPS_IFD, INTEROP_IFD = 258, 274, 305, 34665, 34853, 40965
# Of the first directory: title, camera, density, program, date, artist, computer, copyright. The rest is about how the
# pixels lie in the file.
KEPT_TAGS = (270, 271, 272, 282, 283, 296, SOFTWARE, 306, 315, 316, 33432, EXIF_IFD, GPS_IFD)
# Of EXIF's own directory: the size, which may be turned, and the maker's note, whose offsets are wrong in another file,
# and which may have a picture with the rain.
DROPPED_TAGS = (40962, 40963, 37500)
COLOUR_CHUNKS = (b"cICP", b"gAMA", b"cHRM", b"sRGB")  # of PNG
SRGB = b"\1", b"\x0d"  # primaries and transfer function, as AVIF, HEIC and PNG number them
USUAL = {  # the content of such chunks that says no more than that the colours are those of sRGB
    b"cICP": b"".join(SRGB) + b"\0\1", b"gAMA": struct.pack(">I", 45455),
    b"cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
}


class Metadata(NamedTuple):
    """What a picture's file says beside its pixels, as far as its result should say it too."""

    profile: bytes | None = None  # ICC profile of RGB
    exif: dict = {}  # {tag: value}, with a dictionary for each directory within; no orientation, no thumbnail
    colour: dict = {}  # {name: data} of a PNG's ``COLOUR_CHUNKS``
    software: str | None = None  # the program that wrote the file
    foreign: bool = False  # whether the file has a profile of grey or CMYK, which does not fit an RGB result

    def loses_colours(self, kind):
        """Whether a file of this kind ("PNG", ...) cannot say what colours its numbers are."""
        if self.foreign:
            return True
        if kind == "PNG" or self.profile or b"sRGB" in self.colour:
            return False
        return any(value != USUAL.get(name) for name, value in self.colour.items())


# Reading


def read_start(path, size):
    """The first ``size`` bytes of a file, or all that it has."""
    with open(path, "rb") as file:
        return file.read(size)


def png_chunks(file):
    """Yield (name, start, length of the data) of the chunks of an open PNG file.

    Raises:
        ValueError: it ends within one of them, for which OpenCV would take as much memory as that one declares.
    """
    size = os.fstat(file.fileno()).st_size
    start, name = 8, None  # behind the signature
    file.seek(start)
    while name != b"IEND" and len(header := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        yield name, start + 8, length
        start += 8 + length + 4  # with the checksum
        if start > size:
            raise ValueError("cut short")
        file.seek(start)


def has_late_metadata(path):
    """Whether a PNG has more than its end behind its pixels, as few have."""
    late, before = False, None
    with open(path, "rb") as file:
        for name, _, _ in png_chunks(file):
            late |= before == b"IDAT" and name not in (b"IDAT", b"IEND")
            before = name
    return late


def read_exif(image, path):
    """The EXIF data, as Pillow's ``Exif``, of the file at ``path`` that Pillow has opened as ``image``."""
    if image.format == "PNG" and not has_late_metadata(path):
        return Image.Image.getexif(image)  # PngImageFile.getexif would decode the pixels to see what is behind them
    return image.getexif()


def metadata_of(image, path):
    """The ``Metadata`` of the file at ``path`` that Pillow has opened as ``image``; what is damaged is left out."""
    try:
        exif = kept_exif(read_exif(image, path))
    except Exception:  # as for the pixels, a damaged file can fail at any point
        exif = {}
    profile = image.info.get("icc_profile")
    if not profile and image.format in PROFILES:  # Pillow does not read it
        profile = PROFILES[image.format](path)
    # A profile of CMYK or grey would be wrong for the RGB that such pixels are converted to.
    foreign = bool(profile) and profile[16:20] in (b"GRAY", b"CMYK") and profile[36:40] == b"acsp"
    if not profile or profile[16:20] != b"RGB " or profile[36:40] != b"acsp":
        profile = None
    colour = {}
    if image.format == "PNG":
        colour = colour_chunks(path)
    elif image.format in ("AVIF", "HEIF") and not profile:
        box = re.search(rb"colrnclx.(.).(.)", Path(path).read_bytes(), re.DOTALL)
        if box and box.groups() != SRGB:
            colour[b"cICP"] = box[1] + box[2] + b"\0\1"
    software = image.info.get("Software") or exif.get(SOFTWARE)
    software = software.decode("latin-1") if isinstance(software, bytes) else software
    return Metadata(profile, exif, colour, software, foreign)


def as_bytes(value):
    """The bytes of a text that is not ASCII, as the file has them; any other value as it is."""
    return value.encode("latin-1") if isinstance(value, str) and not value.isascii() else value


def kept_exif(exif):
    """What a result keeps of Pillow's ``Exif``, as ``Metadata`` has it."""
    # Pillow reads texts as Latin-1 and would write "?" for what is not ASCII; as bytes they stay as they were. In the
    # directories within, bytes would become another type, and such texts are left out.
    kept = {tag: as_bytes(exif[tag]) for tag in KEPT_TAGS if tag in exif}
    for tag in kept.keys() & {EXIF_IFD, GPS_IFD}:
        inner = exif.get_ifd(tag).items()
        kept[tag] = {key: value for key, value in inner if key not in DROPPED_TAGS and as_bytes(value) is value}
    if INTEROP_IFD in kept.get(EXIF_IFD, ()):
        kept[EXIF_IFD][INTEROP_IFD] = exif.get_ifd(INTEROP_IFD)
    kept = {tag: value for tag, value in kept.items() if value != {}}
    return kept if len(exif_bytes(kept)) < 60_000 else {}  # JPEG has room for 65,533 bytes


def profile_of_jp2(path):
    """The ICC profile of a JPEG 2000 file, which Pillow does not read, or None."""
    header = read_start(path, 2**20).partition(b"jp2c")[0]
    box = re.search(rb"colr\x02..(?=(....))", header, re.DOTALL)  # a profile begins with its length
    return header[box.end() :][: int.from_bytes(box[1], "big")] if box else None


def profile_of_bmp(path):
    """The ICC profile embedded in a BMP file, whose header is then that of version 5, or None."""
    header = read_start(path, 138)
    if len(header) < 138 or header[14:18] != b"\x7c\0\0\0" or header[70:74] != b"DEBM":  # MBED, from the end
        return None
    start, length = struct.unpack("<II", header[126:134])
    with open(path, "rb") as file:
        file.seek(14 + start)
        return file.read(min(length, 2**24)) or None


def profile_of_gif(path):
    """The ICC profile of a GIF file, which is in blocks of up to 255 bytes behind their length, or None."""
    rest = Path(path).read_bytes().partition(b"\x21\xff\x0bICCRGBG1012")[2]
    profile, start = b"", 0
    while start < len(rest) and (length := rest[start]):
        profile += rest[start + 1 : start + 1 + length]
        start += 1 + length
    return profile or None


PROFILES = {"JPEG2000": profile_of_jp2, "BMP": profile_of_bmp, "GIF": profile_of_gif}


def colour_chunks(path):
    """{name: data} of a PNG's ``COLOUR_CHUNKS``."""
    chunks = {}
    with open(path, "rb") as file:
        for name, start, length in png_chunks(file):
            if name in COLOUR_CHUNKS and length <= 32:
                file.seek(start)
                chunks[name] = file.read(length)
    return chunks


# Writing


def exif_bytes(tags):
    """A dictionary of tags as EXIF, in which a picture is upright."""
    exif = Image.Exif()
    exif.update(tags)
    exif[ORIENTATION] = 1
    return exif.tobytes()


def encode(image, kind, metadata, quality):
    """Encode a picture as the content of a file.

    Args:
        image: (H, W, 3 or 4) RGB(A) uint8 or uint16 array. JPEG has no alpha, and like WebP 8 bits.
        kind: "PNG", "TIFF", "JPEG" or "WEBP".
        metadata: ``Metadata``.
        quality: of JPEG and WebP, 1 to 100.
    """
    tags = metadata.exif | ({SOFTWARE: metadata.software} if metadata.software else {})
    if kind == "PNG":
        return encode_png(image, tags, metadata)
    if kind == "TIFF":
        return encode_tiff(image, tags, metadata.profile)
    pixels = np.rint(image / 257).astype(np.uint8) if image.dtype == np.uint16 else image
    file = io.BytesIO()
    Image.fromarray(pixels if kind == "WEBP" else np.ascontiguousarray(pixels[..., :3])).save(
        file, kind, quality=quality, icc_profile=metadata.profile, exif=exif_bytes(tags) if tags else b"",
        subsampling=0 if quality >= 90 else 2, exact=True,  # JPEG: full resolution of colour; WebP: colour under alpha
    )
    return file.getvalue()


def encode_png(image, tags, metadata):
    """PNG by OpenCV, as Pillow writes no 16-bit colour, with chunks of ours behind the header."""
    code = cv2.COLOR_RGBA2BGRA if image.shape[2] == 4 else cv2.COLOR_RGB2BGR
    data = cv2.imencode(".png", cv2.cvtColor(image, code))[1].tobytes()
    chunks = dict(metadata.colour)
    if metadata.profile:
        chunks[b"iCCP"] = b"ICC profile\0\0" + zlib.compress(metadata.profile)
    if metadata.exif:
        chunks[b"eXIf"] = exif_bytes(tags).removeprefix(b"Exif\0\0")
    if metadata.software:
        chunks[b"tEXt"] = b"Software\0" + metadata.software.encode("latin-1")
    body = b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks.items()
    )
    behind_header = 8 + 25  # the signature, and IHDR, which is always the first chunk
    return data[:behind_header] + body + data[behind_header:]


def encode_tiff(image, tags, profile):
    """TIFF with deflate. The directory is Pillow's, which writes no 16-bit colour; OpenCV would write no tags."""
    height, width, channels = image.shape
    rows = max(1, 2**20 // image[0].nbytes)
    samples = image.astype(image.dtype.newbyteorder("<"))
    strips = [zlib.compress(samples[start : start + rows].tobytes()) for start in range(0, height, rows)]
    sizes = [len(strip) for strip in strips]
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in {
        256: width, 257: height, BITS_PER_SAMPLE: (8 * image.itemsize,) * channels, 277: channels,
        259: 8, 262: 2,  # deflate; RGB
        278: rows, 279: tuple(sizes), 273: tuple(np.cumsum([0, *sizes[:-1]]).tolist()),  # strips: rows, sizes, starts
        **({338: 2} if channels == 4 else {}),  # alpha, by which the colours are not multiplied
        **({34675: profile} if profile else {}), **tags,
    }.items():
        directory[tag] = value
    file = io.BytesIO()
    directory.save(file)  # which moves the strips' starts behind it
    return file.getvalue() + b"".join(strips)
