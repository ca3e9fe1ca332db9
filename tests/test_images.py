"""Pictures of every format, depth and orientation, against Pillow and the arrays that were written."""
import io
import os
import re
import struct
import sys
import time
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps

from conftest import ROOT, photo, save
from images import (
    IMAGE_SUFFIXES, SIGNATURES, WRITTEN, content_of, find_images, image_size, is_image, is_video, list_images,
    open_image, read_image, read_metadata, read_rgb, to_uint8, write_image,
)
from metadata import Metadata, png_chunks
from utils import InputError

HEIGHT, WIDTH = 20, 30
ORIENTATIONS = range(1, 9)
ORIENTATION_TAG = 0x0112


def deep(image):
    """16-bit version with low bytes that an 8-bit detour would lose."""
    low = np.random.default_rng(0).integers(0, 256, image.shape)
    return (image.astype(np.uint16) * 256 + low).astype(np.uint16)


COLOUR = photo(1, HEIGHT, WIDTH)
GREY = COLOUR[..., 0]
ALPHA = np.dstack((COLOUR, photo(2, HEIGHT, WIDTH)[..., :1]))
KINDS = {"colour": COLOUR, "grey": GREY, "alpha": ALPHA}
KINDS |= {f"deep {name}": deep(image) for name, image in KINDS.items()}


def as_read(image):
    """What ``read_image`` gives for an array that was written: grey is repeated."""
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)


# Orientation


def exif_of(orientation):
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return exif


def upright(image, orientation):
    """The array turned by Pillow, which knows 8 bits only: it turns the pixels' positions, and they are put there."""
    positions = np.arange(image.shape[0] * image.shape[1], dtype=np.uint32).view(np.uint8)
    picture = Image.fromarray(positions.reshape(*image.shape[:2], 4), "RGBA")
    picture.getexif()[ORIENTATION_TAG] = orientation
    turned = np.ascontiguousarray(ImageOps.exif_transpose(picture))
    return image.reshape(-1, *image.shape[2:])[turned.view(np.uint32)[..., 0]]


def insert_exif(png, orientation, before=b"IDAT"):
    """A PNG with an eXIf chunk before the first chunk of a name."""
    data = exif_of(orientation).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    start = png.index(before) - 4
    return png[:start] + chunk + png[start:]


def check_orientation(path, expected):
    image = read_image(path)
    assert image.shape[:2] == expected.shape[:2] == image_size(path)
    assert image.dtype == expected.dtype and np.array_equal(image, expected)
    assert image.flags.c_contiguous


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["before the pixels", "behind the pixels"])
def test_png_is_turned(tmp_path, kind, orientation, place):
    path = save(tmp_path / "a.png", KINDS[kind])
    path.write_bytes(insert_exif(path.read_bytes(), orientation, b"IDAT" if place.startswith("before") else b"IEND"))
    check_orientation(path, upright(as_read(KINDS[kind]), orientation))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["colour", "grey", "alpha"])
def test_webp_is_turned(tmp_path, kind, orientation):
    Image.fromarray(KINDS[kind]).save(tmp_path / "a.webp", lossless=True, exact=True, exif=exif_of(orientation))
    check_orientation(tmp_path / "a.webp", upright(as_read(KINDS[kind]), orientation))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["colour", "grey"])
def test_jpeg_is_turned(tmp_path, kind, orientation):
    picture = Image.fromarray(KINDS[kind])
    picture.save(tmp_path / "plain.jpg")
    picture.save(tmp_path / "a.jpg", exif=exif_of(orientation))
    decoded = np.asarray(Image.open(tmp_path / "plain.jpg"))  # JPEG changes the pixels, the same way in both
    check_orientation(tmp_path / "a.jpg", upright(as_read(decoded), orientation))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_is_turned(tmp_path, kind, orientation, compression):
    image = KINDS[kind]
    tifffile.imwrite(
        tmp_path / "a.tif", image, photometric="minisblack" if image.ndim == 2 else "rgb", compression=compression,
        extrasamples=["unassalpha"] if image.shape[2:] == (4,) else None,
        extratags=[(ORIENTATION_TAG, "H", 1, orientation, True)],
    )
    check_orientation(tmp_path / "a.tif", upright(as_read(image), orientation))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
@pytest.mark.parametrize("kind", ["colour", "deep colour"])
def test_an_orientation_that_does_not_exist_is_none(tmp_path, kind, orientation):
    path = save(tmp_path / "a.png", KINDS[kind])
    path.write_bytes(insert_exif(path.read_bytes(), orientation))
    check_orientation(path, KINDS[kind])


def test_case_of_a_turned_16_bit_png(shared):
    """One picture in 8 and in 16 bits, both to be turned."""
    folder = shared / "cases/exif_16bit_png"
    shallow, other = read_image(folder / "exif6.png"), read_image(folder / "rgb16_exif6.png")
    assert other.dtype == np.uint16
    for name, image in (("exif6.png", shallow), ("rgb16_exif6.png", other)):
        assert image.shape[:2] == image_size(folder / name)
        with Image.open(folder / name) as picture:
            assert picture.getexif()[ORIENTATION_TAG] == 6
            assert np.array_equal(to_uint8(image)[..., :3], ImageOps.exif_transpose(picture.convert("RGB")))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_size_is_read_from_the_header(tmp_path, suffix):
    """The pixels are damaged, and need not be read."""
    path = save(tmp_path / f"a{suffix}", photo(1, 90, 120))
    data = bytearray(path.read_bytes())
    if suffix == ".png":
        start = data.index(b"IDAT") + 100
        data[start : start + 1000] = bytes(1000)
    else:
        del data[len(data) // 2 :]
    path.write_bytes(data)
    assert image_size(path) == (90, 120)
    with pytest.raises(InputError, match=f"a{suffix}"):
        read_image(path)


# Formats


def as_file(picture, kind, **options):
    """A picture by Pillow as the content of a file."""
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


SOFT = COLOUR // 4 + 96  # colours that a lossy format keeps
FORMATS = {  # of Pillow: (suffix, options to save with, largest mean error in grey levels)
    "PNG": (".png", {}, 0), "JPEG": (".jpg", {"quality": 95}, 4), "BMP": (".bmp", {}, 0), "TIFF": (".tif", {}, 0),
    "WEBP": (".webp", {"lossless": True}, 0), "GIF": (".gif", {}, 4), "PPM": (".ppm", {}, 0),
    "TGA": (".tga", {"compression": "tga_rle"}, 0), "JPEG2000": (".jp2", {}, 0), "AVIF": (".avif", {"quality": 95}, 4),
    "HEIF": (".heic", {"quality": 95}, 4),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_whatever_its_name(tmp_path, kind):
    """TGA has no signature, so that its suffix must be right."""
    suffix, options, error = FORMATS[kind]
    data = as_file(Image.fromarray(SOFT), kind, **options)
    names = [f"a{suffix}", f"b{suffix.upper()}"] + ([] if kind == "TGA" else ["c", "d.png", "e.dat"])
    for name in names:
        (tmp_path / name).write_bytes(data)
        image = read_image(tmp_path / name)
        assert image.dtype == np.uint8 and image.shape == (HEIGHT, WIDTH, 3)
        assert np.abs(image.astype(int) - SOFT).mean() <= error, name
        assert image_size(tmp_path / name) == (HEIGHT, WIDTH)
        assert is_image(tmp_path / name) and not is_video(tmp_path / name)
    assert {path.name for path in list_images(tmp_path)} == set(names)
    assert content_of(tmp_path / f"a{suffix}") == (None if kind == "TGA" else kind)
    assert kind == "TGA" or kind in SIGNATURES


def test_case_of_suffixes(shared):
    """The same picture, as far as the formats keep it."""
    folder = shared / "cases/still_suffixes"
    pytest.importorskip("pillow_heif")
    paths = list_images(folder)
    assert len(paths) == len([path for path in folder.iterdir() if path.is_file()]) == 8
    reference = read_image(folder / "x_ppm.ppm").astype(int)
    for path in paths:
        error = np.abs(read_image(path).astype(int) - reference).mean()
        assert error < 20, f"{path.name}: {error}"


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "TIFF", "JPEG2000", "AVIF", "HEIF", "TGA"])
def test_alpha_is_read(tmp_path, kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {"quality": 100} if kind == "AVIF" else {}
    path = tmp_path / f"a{FORMATS[kind][0]}"
    path.write_bytes(as_file(Image.fromarray(ALPHA, "RGBA"), kind, **options))
    assert np.abs(read_image(path).astype(int) - ALPHA)[..., 3].mean() < 4


def deep_file(kind):
    """(content of a file of more than 8 bits a sample, the samples as 16 bits)."""
    image = deep(photo(1, 48, 64))
    bgr = np.ascontiguousarray(image[..., ::-1])
    if kind == "ppm":
        return b"P6 # made\n64 48\n65535\n" + image.astype(">u2").tobytes(), image
    if kind == "pgm of 10 bits, as text":
        grey = image[..., 0] >> 6
        return b"P2 64 48 1023\n" + b" ".join(b"%d" % level for level in grey.ravel()), grey[..., None] * (65535 / 1023)
    if kind == "jp2":
        return cv2.imencode(".jp2", bgr, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])[1].tobytes(), image
    if kind == "avif":
        depth = [cv2.IMWRITE_AVIF_DEPTH, 10, cv2.IMWRITE_AVIF_QUALITY, 100]
        return cv2.imencode(".avif", bgr >> 6, depth)[1].tobytes(), (image >> 6) * (65535 / 1023)
    heif = pytest.importorskip("pillow_heif").from_bytes("RGB;16", (64, 48), np.full_like(image, 65535).tobytes())
    buffer = io.BytesIO()
    heif.save(buffer, quality=-1)
    return buffer.getvalue(), np.full_like(image, 65535)


@pytest.mark.parametrize("kind", ["ppm", "pgm of 10 bits, as text", "jp2", "avif", "heic"])
def test_more_than_8_bits_are_kept(tmp_path, kind):
    """White is 65535, however many bits the file has."""
    data, expected = deep_file(kind)
    (tmp_path / "a").write_bytes(data)
    image = read_image(tmp_path / "a")
    assert image.dtype == np.uint16 and image.shape == (48, 64, 3)
    assert np.abs(image - np.rint(expected).astype(int)).max() <= (1 if kind != "avif" else 64)


@pytest.mark.parametrize("dtype, shape, photometric, named", [
    (np.float32, (20, 30, 3), "rgb", "float samples of 32 bits; expected 8 or 16 bits, unsigned"),
    (np.float16, (20, 30, 3), "rgb", "float samples of 16 bits"),
    (np.float32, (20, 30), "minisblack", "float samples of 32 bits"),
    (np.uint32, (20, 30, 3), "rgb", "32 bits a sample; expected 8 or 16"),
    (np.uint32, (20, 30), "minisblack", "32 bits a sample"),
    (np.int16, (20, 30, 3), "rgb", "signed samples of 16 bits"),
    (np.int16, (20, 30), "minisblack", "signed samples of 16 bits"),
    (np.int8, (20, 30, 3), "rgb", "signed samples of 8 bits"), (np.int8, (20, 30), "minisblack", "signed samples of 8"),
    (np.uint16, (20, 30, 2), "minisblack", "grey of 16 bits with alpha; expected grey, RGB or RGBA"),
    (np.uint8, (20, 30, 3), "ycbcr", "samples in YCbCr without compression; expected RGB or grey"),
])
def test_sound_tiffs_of_unusual_samples_are_called_what_they_are(tmp_path, dtype, shape, photometric, named):
    planes = {"planarconfig": "contig"} if len(shape) == 3 else {}
    for name, big in (("a.tif", False), ("b.tif", True)):
        tifffile.imwrite(tmp_path / name, np.ones(shape, dtype), photometric=photometric, bigtiff=big, **planes)
        with pytest.raises(InputError, match=re.escape(f"{name}: not a readable image ({named}")):
            read_image(tmp_path / name)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_a_compressed_tiff_in_ycbcr_is_read(tmp_path, compression):
    Image.fromarray(SOFT).convert("YCbCr").save(tmp_path / "a.tif", compression=compression)
    assert np.abs(read_image(tmp_path / "a.tif").astype(int) - SOFT).max() <= 3


def test_frames_in_one_file_are_not_cut_to_the_first(tmp_path):
    """As raw video from a camera; a smaller preview behind a photograph is none of its frames."""
    frame, small = as_file(FIRST, "JPEG"), as_file(FIRST.resize((8, 8)), "JPEG")
    (tmp_path / "a.mjpeg").write_bytes(3 * frame)
    with pytest.raises(InputError, match="JPEGs one after another, as in raw video; expected one, or a video"):
        read_image(tmp_path / "a.mjpeg")
    for rest in (small, b"\xff\xd8\xff", b"", frame[:2]):
        (tmp_path / "a.jpg").write_bytes(frame + rest)
        assert read_image(tmp_path / "a.jpg").shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_avif_is_turned(tmp_path, orientation):
    """Its container says how, which Pillow hands on as EXIF."""
    data = as_file(Image.fromarray(COLOUR), "AVIF", quality=100, subsampling="4:4:4", exif=exif_of(orientation))
    (tmp_path / "a.avif").write_bytes(data)
    expected = upright(COLOUR, orientation)
    assert image_size(tmp_path / "a.avif") == expected.shape[:2]
    assert np.abs(read_image(tmp_path / "a.avif").astype(int) - expected).mean() < 2
    as_it_lies = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert as_it_lies.shape[:2] == (HEIGHT, WIDTH), "OpenCV, which reads those of 10 bits, leaves the turning to us"


@pytest.mark.parametrize("head", [
    b"YUV4MPEG2 W16 H16", b"DKIF\0\0\x20\0AV01", b"nut/multimedia container\0", b".RMF\0\0\0\x12",
    b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02", b"\xb7\xd8\0\x20\x37\x49\xda\x11\xa6\x4e",
    b"\x1f\x07\0\x3f\xf8\x78", b"\0\0\x01\xb3\x01\x40",
    b"OggS\0\2" + bytes(22) + b"\x80theora", b"\0\0\0\x01\x67\x42", b"\0\0\x01\x67\x64", b"\0\0\0\x01\x40\x01\x0c",
    b"\0\0\0\x01\x09\x10\0\0", b"\x12\0\x0a\x0b\0\0", b"\0\0\0\0\x01\xbc\0\0\0\0\0\0\0\0\xe1\xe2",
])
def test_raw_and_professional_videos_are_known_by_their_first_bytes(tmp_path, head):
    (tmp_path / "a").write_bytes(head + bytes(40))
    assert is_video(tmp_path / "a") and not is_image(tmp_path / "a")


@pytest.mark.parametrize("head", [
    b"OggS\0\2" + bytes(22) + b"OpusHead", b"\0\0\x01\0\x01\0\x10\x10",  # sound alone; an icon
    b"\x12\0\x0a\0\0\0\0\0", b"\0\0\x0a\0\0\0\0\0",  # TGA with a name, without
])
def test_other_files_are_taken_for_no_video(tmp_path, head):
    (tmp_path / "a").write_bytes(head + bytes(40))
    assert not is_video(tmp_path / "a")


def test_videos_are_known_by_their_content(tmp_path, shared):
    for name, other in (("video_colour/bars.mkv", "a.dat"), ("video_anamorphic/sar.mp4", "b.jpg")):
        (tmp_path / other).write_bytes((shared / "cases" / name).read_bytes())
        assert is_video(tmp_path / other)
    assert not is_image(tmp_path / "a.dat"), "by its suffix b.jpg may be a picture until it is opened"
    for name, content in (("c.mp4", b""), ("d.ts", b"G@\x11\x10")):
        (tmp_path / name).write_bytes(content)
        assert is_video(tmp_path / name) and not is_image(tmp_path / name)


@pytest.mark.parametrize("content", [b"BMW and other makes of cars", b"P3 is so", b"II. Chapter", b"RIFF1234WAVE"])
def test_text_is_neither_picture_nor_video(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert not is_image(tmp_path / "a.txt") and not is_video(tmp_path / "a.txt")


def test_heic_names_the_package_it_takes(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x1cftypheic" + bytes(100))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    with pytest.raises(InputError, match="a.heic: not a readable image .HEIC, .* pip install pillow-heif"):
        read_image(tmp_path / "a.heic")


FIRST, SECOND = Image.fromarray(SOFT), Image.fromarray(photo(2, HEIGHT, WIDTH))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
@pytest.mark.parametrize("read", [read_image, image_size])
def test_several_frames_are_refused(tmp_path, kind, read):
    (tmp_path / "a").write_bytes(as_file(FIRST, kind, save_all=True, append_images=[SECOND]))
    with pytest.raises(InputError, match="a: not a readable image .an animation or several pages; expected a single"):
        read(tmp_path / "a")


def test_the_picture_among_its_previews_is_read(tmp_path):
    """In a phone's MPO, and in a TIFF with a thumbnail as its second page."""
    (tmp_path / "a.jpg").write_bytes(as_file(FIRST, "MPO", quality=95, save_all=True, append_images=[SECOND]))
    with tifffile.TiffWriter(tmp_path / "b.tif") as file:
        file.write(SOFT, photometric="rgb")
        file.write(SOFT[::2, ::2], photometric="rgb", subfiletype=1)
    for name in ("a.jpg", "b.tif"):
        assert np.abs(read_image(tmp_path / name).astype(int) - SOFT).mean() < 4


def test_the_thumbnail_of_a_raw_photograph_is_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.nef") as file:
        file.write(COLOUR, photometric="rgb", subfiletype=1)
        file.write(deep(COLOUR), photometric="rgb")
    with pytest.raises(InputError, match="a.nef: not a readable image .it begins with a thumbnail, as raw"):
        read_image(tmp_path / "a.nef")


@pytest.mark.parametrize("image, options, words", [
    (deep(COLOUR).transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}, "in planes"),
    (deep(COLOUR)[..., 0], {"photometric": "miniswhite"}, "neither RGB nor grey with 0 for black"),
])
def test_deep_tiffs_that_opencv_would_take_for_others_are_refused(tmp_path, image, options, words):
    tifffile.imwrite(tmp_path / "a.tif", np.ascontiguousarray(image), **options)
    with pytest.raises(InputError, match=f"a.tif: not a readable image .16 bits a sample.*{words}"):
        read_image(tmp_path / "a.tif")


def test_what_macos_leaves_beside_a_picture_is_no_picture(tmp_path):
    write_image(tmp_path / "a.png", COLOUR)
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7" + bytes(60))
    assert list_images(tmp_path) == [tmp_path / "a.png"]


# Depth, grey and alpha


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_depth_and_alpha_are_kept(tmp_path, kind, suffix):
    path, image = tmp_path / f"a{suffix}", as_read(KINDS[kind])
    write_image(path, image)
    read = read_image(path)
    assert read.dtype == image.dtype and np.array_equal(read, image)
    assert image_size(path) == (HEIGHT, WIDTH)
    assert np.array_equal(read_rgb(path), to_uint8(image)[..., :3])
    save(path, KINDS[kind])  # grey as one channel
    assert np.array_equal(read_image(path), image)


def test_other_kinds_become_rgb(tmp_path):
    colour = Image.fromarray(COLOUR)
    palette = colour.quantize(16)
    kinds = {  # name: (picture, options to save it with, channels that are read)
        "palette.png": (palette, {}, 3),
        "clear.png": (palette, {"transparency": 3}, 4),
        "bits.png": (colour.convert("1"), {}, 3),
        "grey_alpha.png": (colour.convert("LA"), {}, 4),
        "cmyk.jpg": (colour.convert("CMYK"), {}, 3),
    }
    for name, (picture, options, channels) in kinds.items():
        picture.save(tmp_path / name, **options)
        image = read_image(tmp_path / name)
        assert image.dtype == np.uint8 and image.shape == (HEIGHT, WIDTH, channels), name
    assert np.array_equal(read_image(tmp_path / "palette.png"), palette.convert("RGB"))


def test_16_bits_are_rounded_to_8():
    levels = np.array([[0, 128, 129, 65535 - 129, 65535 - 128, 65535]], np.uint16)
    assert to_uint8(levels).tolist() == [[0, 0, 1, 254, 255, 255]]
    assert np.array_equal(to_uint8(np.arange(256, dtype=np.uint16) * 257), np.arange(256))


# What is refused


def test_32_bits_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="a.tif: not a readable image .float samples of 32 bits; expected 8 or 16"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("read", [read_image, read_rgb, image_size])
def test_no_image(tmp_path, read):
    with pytest.raises(InputError, match="missing.png: no such file"):
        read(tmp_path / "missing.png")
    for content in (b"", b"neither PNG nor JPEG"):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(InputError, match="a.png: not a readable image .its content is that of no known format.$"):
            read(tmp_path / "a.png")


def test_a_chunk_that_declares_gigabytes_is_refused_at_once(tmp_path):
    """Within the 16-bit PNG, which OpenCV decodes: it would fill 1.5 GB first."""
    data = bytearray(save(tmp_path / "a.png", deep(COLOUR)).read_bytes())
    start = data.index(b"IDAT") - 4
    data[start : start + 4] = struct.pack(">I", 1_500_000_000)
    (tmp_path / "a.png").write_bytes(data)
    before = time.process_time()
    with pytest.raises(InputError, match="a.png: not a readable image"):
        read_image(tmp_path / "a.png")
    assert time.process_time() - before < 0.5


def test_content_decides_the_format(tmp_path):
    data = cv2.imencode(".jpg", COLOUR)[1].tobytes()
    (tmp_path / "a.png").write_bytes(data)
    with open_image(tmp_path / "a.png") as image:
        assert image.format == "JPEG"
    assert read_image(tmp_path / "a.png").shape == (HEIGHT, WIDTH, 3)


def test_a_pipe_is_not_waited_for(tmp_path):
    for name in ("pipe", "pipe.png"):
        os.mkfifo(tmp_path / name)
        assert not is_video(tmp_path / name)
        with pytest.raises(InputError, match=f"{name}: not a readable image .not a file"):
            read_image(tmp_path / name)
    assert list_images(tmp_path) == [tmp_path / "pipe.png"], "by its suffix"


# What is written


def test_every_suffix_that_is_written_is_read(tmp_path):
    assert WRITTEN.keys() <= IMAGE_SUFFIXES
    for suffix, kind in WRITTEN.items():
        path = tmp_path / f"a{suffix}"
        write_image(path, SOFT, quality=100)
        assert content_of(path) == kind
        assert np.abs(read_image(path).astype(int) - SOFT).mean() < 4


def test_quality_and_depth_of_lossy_formats(tmp_path):
    deep_alpha = as_read(KINDS["deep alpha"])
    for suffix, channels in ((".jpg", 3), (".webp", 4)):
        sizes = []
        for quality in (50, 89, 90, 100):
            write_image(tmp_path / f"a{suffix}", deep_alpha, quality=quality)
            sizes.append((tmp_path / f"a{suffix}").stat().st_size)
        assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
        image = read_image(tmp_path / f"a{suffix}")
        assert image.dtype == np.uint8 and image.shape[2] == channels


def test_a_picture_too_large_for_a_format_is_refused(tmp_path):
    for suffix, side in ((".jpg", 65_501), (".webp", 16_384)):
        with pytest.raises(InputError, match=f"a{suffix}: .* at most .* px a side; expected PNG"):
            write_image(tmp_path / f"a{suffix}", np.zeros((1, side, 3), np.uint8))
    assert not list(tmp_path.iterdir())


# Metadata


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CAMERA = {271: "Maker", 272: "Model", 305: "firmware 1.0", 306: "2026:05:01 10:20:30"}
EXPOSURE = {36867: "2026:05:01 10:20:30", 33434: 0.005, 42036: "35 mm"}
PLACE = {1: "N", 2: (51.0, 30.0, 12.5), 3: "E", 4: (7.0, 1.0, 2.0)}


def photographed(orientation=6):
    """EXIF as a camera writes it, with a thumbnail in a maker's note and sizes that will be wrong."""
    exif = exif_of(orientation)
    exif.update(CAMERA)
    exif[34665] = EXPOSURE | {37500: b"thumbnail" * 100, 40962: WIDTH, 40963: HEIGHT}
    exif[34853] = PLACE
    return exif


def assert_photographed(path, software="SAPNet"):
    metadata = read_metadata(path)
    assert metadata.exif.pop(34665) == EXPOSURE and metadata.exif.pop(34853) == PLACE
    assert metadata.exif == CAMERA | {305: software} and metadata.profile == PROFILE
    assert b"thumbnail" not in path.read_bytes()
    with Image.open(path) as picture:
        assert picture.getexif().get(ORIENTATION_TAG, 1) == 1


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("kind", ["colour", "alpha", "deep colour", "deep alpha"])
def test_metadata_is_written_with_the_pixels(tmp_path, suffix, kind):
    (tmp_path / "in.jpg").write_bytes(as_file(FIRST, "JPEG", exif=photographed(), icc_profile=PROFILE))
    metadata, path = read_metadata(tmp_path / "in.jpg"), tmp_path / f"out{suffix}"
    assert metadata.software == "firmware 1.0"
    write_image(path, KINDS[kind], metadata._replace(software="SAPNet"))
    assert_photographed(path)
    assert read_metadata(path).software == "SAPNet"
    if suffix in (".png", ".tif"):
        assert np.array_equal(read_image(path), KINDS[kind])
    write_image(path, KINDS[kind], Metadata(software="SAPNet"))
    assert read_metadata(path)._replace(exif={}) == Metadata(software="SAPNet")
    assert read_metadata(path).exif.keys() <= {305}
    write_image(path, KINDS[kind])
    assert read_metadata(path) == Metadata()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_texts_that_are_not_ascii_stay_as_they_were(tmp_path, suffix):
    exif, texts = Image.Exif(), {33432: "© 2024 Anna Müller".encode(), 315: "Zoë".encode("latin-1"), 305: "Ä".encode()}
    exif.update(texts)
    exif.get_ifd(34665)[42036] = "50 mm"
    (tmp_path / "in.jpg").write_bytes(as_file(FIRST, "JPEG", exif=exif.tobytes()))
    metadata = read_metadata(tmp_path / "in.jpg")
    assert metadata.software == "Ä".encode().decode("latin-1")
    write_image(tmp_path / f"out{suffix}", COLOUR, metadata._replace(software="SAPNet"))
    with Image.open(tmp_path / f"out{suffix}") as picture:
        kept = picture.getexif()
        assert {tag: kept[tag].encode("latin-1") for tag in texts} == texts | {305: b"SAPNet"}
        assert kept.get_ifd(34665)[42036] == "50 mm"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF", "HEIF", "MPO"])
def test_metadata_is_read_from_every_format_that_has_it(tmp_path, kind):
    path = tmp_path / "in"
    path.write_bytes(as_file(FIRST, kind, exif=photographed(1).tobytes(), icc_profile=PROFILE))
    write_image(tmp_path / "out.png", COLOUR, read_metadata(path)._replace(software="SAPNet"))
    assert_photographed(tmp_path / "out.png")


def test_the_profile_of_jpeg_2000_is_read(tmp_path):
    data = as_file(FIRST, "JPEG2000")
    start = data.index(b"colr") - 4
    box = struct.pack(">I4s3s", 11 + len(PROFILE), b"colr", b"\2\0\0") + PROFILE
    grown = len(box) - struct.unpack_from(">I", data, start)[0]
    header = data.index(b"jp2h") - 4
    data = (
        data[:header] + struct.pack(">I", struct.unpack_from(">I", data, header)[0] + grown) + data[header + 4 : start]
        + box + data[start + len(box) - grown :]
    )
    (tmp_path / "a.jp2").write_bytes(data)
    assert np.array_equal(read_image(tmp_path / "a.jp2"), SOFT)
    assert read_metadata(tmp_path / "a.jp2").profile == PROFILE


def test_the_profile_of_bmp_and_gif_is_read(tmp_path):
    """Of a BMP with a header of version 5, and of a GIF in its blocks; one that is cut short costs no picture."""
    pixels = as_file(FIRST, "BMP")[54:]
    header = struct.pack("<IiiHHIIiiII", 124, WIDTH, HEIGHT, 1, 24, 0, len(pixels), 0, 0, 0, 0) + bytes(16) + b"DEBM"
    header += bytes(48) + struct.pack("<4I", 4, 124 + len(pixels), len(PROFILE), 0)
    size = 14 + 124 + len(pixels)
    bmp = b"BM" + struct.pack("<IHHI", size + len(PROFILE), 0, 0, 138) + header + pixels + PROFILE
    gif = as_file(FIRST, "GIF")
    start = 13 + 3 * 2 ** ((gif[10] & 7) + 1)  # behind the palette
    parts = [PROFILE[k : k + 255] for k in range(0, len(PROFILE), 255)]
    blocks = b"".join(bytes([len(part)]) + part for part in parts) + b"\0"
    gif = gif[:start] + b"\x21\xff\x0bICCRGBG1012" + blocks + gif[start:]
    for name, data in (("a.bmp", bmp), ("a.gif", gif)):
        (tmp_path / name).write_bytes(data)
        assert np.array_equal(read_image(tmp_path / name), read_image(tmp_path / name)[..., :3])
        assert read_metadata(tmp_path / name).profile == PROFILE
    (tmp_path / "cut.bmp").write_bytes(bmp[: -len(PROFILE)])
    assert read_metadata(tmp_path / "cut.bmp").profile is None and read_image(tmp_path / "cut.bmp").shape[2] == 3
    for name in ("plain.bmp", "plain.gif"):
        (tmp_path / name).write_bytes(as_file(FIRST, name[6:].upper()))
        assert read_metadata(tmp_path / name).profile is None


@pytest.mark.parametrize("space", [b"CMYK", b"GRAY", b"Lab "])
def test_a_profile_that_is_none_of_rgb_is_left_out(tmp_path, space):
    profile = PROFILE[:16] + space + PROFILE[20:]
    (tmp_path / "a.jpg").write_bytes(as_file(FIRST.convert("CMYK"), "JPEG", icc_profile=profile))
    assert read_metadata(tmp_path / "a.jpg") == Metadata(foreign=space != b"Lab ")


@pytest.mark.filterwarnings("ignore")
def test_damaged_metadata_costs_no_picture(tmp_path):
    exif = photographed(1).tobytes()
    for number, damaged in enumerate((exif[:60], exif[:20] + bytes(40) + exif[60:], b"Exif\0\0MM\0*\xff\xff\xff\xff")):
        (tmp_path / "a.jpg").write_bytes(as_file(FIRST, "JPEG", exif=damaged, icc_profile=b"none" * 50))
        assert read_image(tmp_path / "a.jpg").shape == (HEIGHT, WIDTH, 3)
        metadata = read_metadata(tmp_path / "a.jpg")
        assert metadata.profile is None
        write_image(tmp_path / "b.jpg", COLOUR, metadata)


def test_colours_that_a_png_says_in_chunks_are_kept(tmp_path):
    colours = {b"gAMA": struct.pack(">I", 100_000), b"cICP": b"\x0c\x0d\0\1", b"cHRM": bytes(range(32))}
    write_image(tmp_path / "a.png", COLOUR, Metadata(colour=colours))
    assert read_metadata(tmp_path / "a.png").colour == colours
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.info["gamma"] == 1
    with open(tmp_path / "a.png", "rb") as file:
        names = [name for name, _, _ in png_chunks(file)]
    assert names[0] == b"IHDR" and max(map(names.index, colours)) < names.index(b"IDAT")


def test_colours_that_an_avif_says_by_numbers_become_a_chunk(tmp_path):
    """Display P3's primaries, without an ICC profile."""
    data = as_file(FIRST, "AVIF")
    for numbers, expected in ((b"\0\x0c\0\x0d", {b"cICP": b"\x0c\x0d\0\1"}), (b"\0\1\0\x0d", {})):
        start = data.index(b"colrnclx") + 8
        (tmp_path / "a.avif").write_bytes(data[:start] + numbers + data[start + 4 :])
        assert read_metadata(tmp_path / "a.avif").colour == expected


# Folders


def test_images_of_a_folder_in_natural_order(tmp_path):
    for name in ("10.png", "9.JPG", "b.webp", "a.tiff", "notes.txt", "below/1.png", "c.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("d", "e.png-0123abcd-9.tmp"):  # the second is half a file, of a run that was killed
        (tmp_path / name).write_bytes(cv2.imencode(".png", COLOUR)[1].tobytes())
    assert [path.name for path in list_images(tmp_path)] == ["9.JPG", "10.png", "a.tiff", "b.webp", "c.heic", "d"]
    assert find_images(tmp_path, "--clean") == list_images(tmp_path)


def test_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    for folder, reason in ((tmp_path, "no images"), (tmp_path / "none", "no such folder")):
        with pytest.raises(InputError, match=f"--clean {folder}: {reason}"):
            find_images(folder, "--clean")


def test_the_sample_of_the_docstring_is_read():
    assert read_image(ROOT / "results/sample.jpg").ndim == 3
