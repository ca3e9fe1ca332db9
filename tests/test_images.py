"""Pictures of every format, depth and orientation, against Pillow and the arrays that were written."""
import struct
import time
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from conftest import ROOT, photo, save
from images import find_images, image_size, list_images, open_image, read_image, read_rgb, to_uint8, write_image
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
    with pytest.raises(InputError, match="a.tif: not a readable image .32 bits a sample; expected 8 or 16"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("read", [read_image, read_rgb, image_size])
def test_no_image(tmp_path, read):
    with pytest.raises(InputError, match="missing.png: no such file"):
        read(tmp_path / "missing.png")
    for content in (b"", b"neither PNG nor JPEG"):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(InputError, match="a.png: not a readable image"):
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


# Folders


def test_images_of_a_folder_in_natural_order(tmp_path):
    for name in ("10.png", "9.JPG", "b.webp", "a.tiff", "notes.txt", "below/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["9.JPG", "10.png", "a.tiff", "b.webp"]
    assert find_images(tmp_path, "--clean") == list_images(tmp_path)


def test_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    for folder, reason in ((tmp_path, "no images"), (tmp_path / "none", "no such folder")):
        with pytest.raises(InputError, match=f"--clean {folder}: {reason}"):
            find_images(folder, "--clean")


def test_the_sample_of_the_docstring_is_read():
    assert read_image(ROOT / "results/sample.jpg").ndim == 3
