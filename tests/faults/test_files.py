"""Damaged and hostile files: thousands of mutants through the readers, each read or refused by name."""
import io
import json
import re
import resource
import signal
import struct
import time
import zlib

import cv2
import h5py
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from checkpoints import load_network, load_weights
from conftest import THOROUGH, contents, photo
from DerainDataset import PackedPatches, PReNetPatches, fingerprint, pack, plan_cuts
from images import image_size, read_image, read_metadata, read_rgb
from layouts import Pair
from metadata import encode as encode_result
from networks import SAPNet
from test_train import options
from training_sets import PRENET_FILES, TrainingSet
from utils import InputError
from warm import Fork, figure, run_script

try:
    import pillow_heif
except ImportError:  # it is optional
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()

SECONDS = 10  # for one file
MEMORY = 2 * 2**30  # what a reader may take, all in all


# Mutants


def chunk_of_png(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_valid_checksums(png):
    """A damaged PNG whose chunks have the right checksums, so that the decoder goes on."""
    start, fixed = 8, png[:8]
    while start + 12 <= len(png):
        length = int.from_bytes(png[start : start + 4], "big")
        if start + 12 + length > len(png):
            break
        fixed += chunk_of_png(png[start + 4 : start + 8], png[start + 8 : start + 8 + length])
        start += 12 + length
    return fixed + png[start:]


def flip(data, random, edge):
    for _ in range(random.integers(1, 9)):
        at = random.integers(len(data)) if random.random() < 0.5 else random.integers(min(edge, len(data)))
        data[at if random.random() < 0.7 else -1 - at] ^= 1 << random.integers(8)
    return data


def cut(data, random, edge):
    return data[: random.integers(len(data))]


def wipe(data, random, edge):
    start, length = random.integers(len(data)), random.integers(1, 64)
    data[start : start + length] = bytes([random.choice([0, 255, 127])]) * len(data[start : start + length])
    return data


def splice(data, random, edge):
    start, stop, target = random.integers(len(data), size=3)
    return data[:target] + data[start : start + min(stop, 500)] + data[target:]


def drop(data, random, edge):
    start = random.integers(len(data))
    return data[:start] + data[start + random.integers(1, 64) :]


def inflate(data, random, edge):
    """A huge or impossible number near the beginning, where sizes are declared."""
    value = random.choice([60000, 65535, 16383, 0, 2**31 - 1, 2**32 - 1, 10**6])
    packed = struct.pack(random.choice(["<I", ">I"]), value)
    packed = packed[:2] if value < 2**16 and random.random() < 0.3 else packed
    start = random.integers(min(edge, len(data)))
    data[start : start + len(packed)] = packed
    return data


MUTATIONS = (flip, flip, cut, wipe, splice, drop, inflate, inflate)


def mutate(data, random, edge):
    """``data`` with one or two faults; ``edge`` is how much of both ends is structure."""
    data = bytearray(data)
    for _ in range(random.integers(1, 3)):
        data = MUTATIONS[random.integers(len(MUTATIONS))](data, random, edge) or bytearray(b"\0")
    return bytes(data)


def suffix_of(name):
    """The suffix that the file of a seed must have."""
    return ".tga" if name.startswith("tga") else ""


def limit_memory(size):
    """Let this process map ``size`` bytes more than it has."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + size,) * 2)


def examine(report, path, seeds, count, edge, read, as_good):
    """Mutate, write and read ``count`` times in this process, which has a limit to its memory and its time.

    ``read(path)`` is what is tested, ``seeds`` {name: bytes}, and ``as_good(name, result)`` tells whether the
    damage has changed nothing. The report: {outcome: count}, and every exception but ``InputError``.
    """
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    limit_memory(2 * MEMORY)
    random, names = np.random.default_rng(0), sorted(seeds)
    result = {"same": 0, "other": 0, "refused": 0, "slowest": 0, "faults": []}
    stem = path
    for number in range(count):
        name = names[number % len(names)]
        path = stem.with_suffix(suffix_of(name))
        data = mutate(seeds[name], random, edge)
        if name.startswith("png") and random.random() < 0.7:
            data = with_valid_checksums(data)
        path.write_bytes(data)
        signal.alarm(SECONDS)
        started = time.monotonic()
        try:
            result["same" if as_good(name, read(path)) else "other"] += 1
        except InputError as error:
            result["refused"] += 1
            if not str(error).startswith(str(path)) or "\n" in str(error) or len(str(error)) > 600:
                result["faults"].append(f"{name} {number}: {error}")
        except Exception as error:
            result["faults"].append(f"{name} {number}: {error!r}")
        signal.alarm(0)
        result["slowest"] = max(result["slowest"], time.monotonic() - started)
        result["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - begun
    report.write_text(json.dumps(result))


def check(tmp_path, capsys, title, count, edge, make):
    """Let a process ``examine`` the files that ``make(folder)`` gives; it must live, and find nothing."""
    report, path = tmp_path / "report", tmp_path / "mutant"
    fork = Fork(tmp_path / "log", examine_made, make, tmp_path, report, path, count, edge)
    assert fork.wait(300 * THOROUGH) == 0, f"{path} ended or hung its reader\n{fork.log.read_text()[-2000:]}"
    result = json.loads(report.read_text())
    assert not result["faults"], "\n".join(result["faults"][:20])
    assert result["memory"] < MEMORY
    figure(
        capsys, f"{title}: {count} mutants, {result['refused']} refused by name, {result['same']} read as before,"
        f" {result['other']} read with other content, 0 crashes; slowest {result['slowest']:.2f} s,"
        f" {result['memory'] / 2**20:.0f} MiB",
    )
    return result


def examine_made(make, folder, report, path, count, edge):
    seeds, read, as_good = make(folder)
    examine(report, path, seeds, count, edge, read, as_good)


# Images


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_seeds():
    """{name: bytes} of a small image in each form that the readers know."""
    rgb = Image.fromarray(photo(1, 40, 50))
    deep = 257 * photo(1, 40, 50).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = rgb.convert("RGBA")
    alpha.putalpha(rgb.convert("L"))
    exif[0x010F], exif[0x8825] = "Camera", {1: "N", 2: (51.0, 30.0, 0.0)}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    seeds = {
        "png rgb": encode(rgb, "PNG"), "png grey": encode(rgb.convert("L"), "PNG"), "png rgba": encode(alpha, "PNG"),
        "png palette": encode(rgb.quantize(16), "PNG", transparency=3), "png bits": encode(rgb.convert("1"), "PNG"),
        "png text": encode(rgb, "PNG", exif=exif, icc_profile=profile),
        "jpeg": encode(rgb, "JPEG", icc_profile=profile),
        "jpeg progressive": encode(rgb, "JPEG", progressive=True, exif=exif),
        "jpeg cmyk": encode(rgb.convert("CMYK"), "JPEG"), "jpeg grey": encode(rgb.convert("L"), "JPEG"),
        "bmp": encode(rgb, "BMP"), "bmp palette": encode(rgb.quantize(16), "BMP"),
        "webp": encode(rgb, "WEBP", exif=exif, icc_profile=profile),
        "webp lossless": encode(alpha, "WEBP", lossless=True),
        "mpo": encode(rgb, "MPO", save_all=True, append_images=[rgb.resize((20, 16))]),
        "gif": encode(rgb, "GIF"), "gif clear": encode(rgb.quantize(16), "GIF", transparency=3),
        "ppm": encode(rgb, "PPM"), "ppm grey": encode(rgb.convert("L"), "PPM"),
        "ppm bits": encode(rgb.convert("1"), "PPM"), "ppm deep": b"P6 50 40 65535\n" + deep.astype(">u2").tobytes(),
        "ppm text": b"P3 # made\n50 40\n65535\n" + b" ".join(b"%d" % value for value in deep.ravel()),
        "tga": encode(rgb, "TGA"), "tga rle": encode(alpha, "TGA", compression="tga_rle"),
        "jp2": encode(rgb, "JPEG2000"), "jp2 tiles": encode(alpha, "JPEG2000", tile_size=(32, 32)),
        "jp2 codestream": encode(rgb.convert("L"), "JPEG2000", no_jp2=True),
        "avif": encode(rgb, "AVIF", exif=exif, icc_profile=profile), "avif alpha": encode(alpha, "AVIF"),
    }
    for suffix in ("jp2", "avif"):
        seeds[f"{suffix} deep"] = cv2.imencode(f".{suffix}", deep >> 6, [cv2.IMWRITE_AVIF_DEPTH, 10])[1].tobytes()
    if pillow_heif:
        seeds |= {"heic": encode(rgb, "HEIF", exif=exif, icc_profile=profile), "heic alpha": encode(alpha, "HEIF")}
        file = io.BytesIO()
        pillow_heif.from_bytes("RGB;16", rgb.size, deep.tobytes()).save(file)
        seeds["heic deep"] = file.getvalue()
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        seeds[f"tiff {compression}"] = encode(rgb, "TIFF", compression=compression)
    for suffix in ("png", "tiff"):
        seeds[f"{suffix} deep"] = cv2.imencode(f".{suffix}", deep)[1].tobytes()
        seeds[f"{suffix} deep grey"] = cv2.imencode(f".{suffix}", deep[..., 0])[1].tobytes()
    return seeds


def make_images(folder):
    seeds, good = image_seeds(), {}

    def read(path):
        """The pixels; whatever the file says beside them can be written in each format."""
        size, image, metadata = image_size(path), read_image(path), read_metadata(path)
        assert image.shape[:2] == size and image.shape[2] in (3, 4) and image.dtype in (np.uint8, np.uint16)
        for kind in ("PNG", "TIFF", "JPEG", "WEBP"):
            encode_result(image[:2, :2], kind, metadata, 90)
        return image

    for name, data in seeds.items():
        path = folder / f"seed{suffix_of(name)}"
        path.write_bytes(data)
        good[name] = read(path)
    return seeds, read, lambda name, image: np.array_equal(image, good[name])


@pytest.mark.slow
def test_mutated_images(tmp_path, capsys):
    check(tmp_path, capsys, "images", 600 * THOROUGH, 100, make_images)


def declare(data, kind):
    """The image with a header that declares 60,000x60,000."""
    data, big = bytearray(data), struct.pack("<I", 60000)
    if kind.startswith("png"):
        data[16:24] = struct.pack(">II", 60000, 60000)
        return with_valid_checksums(bytes(data))
    if kind.startswith("bmp"):
        data[18:26] = big + big
    elif kind.startswith(("jpeg", "mpo")):
        start = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) if kind != "mpo" else data.find(b"\xff\xc0")
        data[start + 5 : start + 9] = struct.pack(">HH", 60000, 60000)
    elif kind.startswith("gif"):
        data[6:10] = struct.pack("<HH", 60000, 60000)
    elif kind.startswith("tga"):
        data[12:16] = struct.pack("<HH", 60000, 60000)
    elif kind.startswith("ppm"):
        return bytes(data).replace(b"50 40", b"60000 60000", 1)
    elif kind.startswith("jp2"):  # a box of the container, and the codestream
        for size in (struct.pack(">II", 50, 40), struct.pack(">II", 40, 50)):
            data = data.replace(size, struct.pack(">II", 60000, 60000))
    elif kind.startswith(("avif", "heic")):  # without the box that would cut it to another size
        big = b"ispe" + bytes(4) + struct.pack(">II", 60000, 60000)
        data = re.sub(rb"ispe.{12}", big, data, flags=re.DOTALL).replace(b"clap", b"free")
    else:  # TIFF: the entries of the directory
        (start,) = struct.unpack_from("<I", data, 4)
        for entry in range(start + 2, start + 2 + 12 * data[start], 12):
            if struct.unpack_from("<H", data, entry)[0] in (256, 257):
                data[entry + 2 : entry + 12] = struct.pack("<HI", 4, 1) + big
    return bytes(data)


def read_bombs(folder):
    """Each must be refused by the size it declares, with 256 MiB to spare; two libraries have such a limit too."""
    limit_memory(2**28)
    for name, data in image_seeds().items():
        if name.startswith("webp"):  # which cannot declare more than 16,383x16,383
            continue
        reason = "60000x60000; expected at most 268,435,456 pixels"
        if name.startswith(("avif", "heic")):
            reason = "not a readable image"
        path = folder / f"{name}{suffix_of(name)}"
        path.write_bytes(declare(data, name))
        for read in (image_size, read_image, read_rgb):
            with pytest.raises(InputError, match=reason):
                print(name, read(path))


@pytest.mark.slow
def test_decompression_bombs(tmp_path):
    fork = Fork(tmp_path / "log", read_bombs, tmp_path)
    assert fork.wait(60) == 0, fork.log.read_text()
    assert fork.log.read_text() == ""


def read_liars(folder):
    """Pictures larger than their header declares, with 256 MiB to spare: refused, or of the size declared."""
    limit_memory(2**28)
    for kind in ["AVIF", "JPEG2000"] + ["HEIF"] * bool(pillow_heif):
        data = encode(Image.new("RGB", (1000, 1001), "teal"), kind)
        path = folder / kind
        for large, small in ((struct.pack(">II", 1000, 1001), (50, 40)), (struct.pack(">II", 1001, 1000), (40, 50))):
            path.write_bytes(data.replace(large, struct.pack(">II", *small), 1))
            if path.read_bytes() != data:
                try:
                    assert read_image(path).shape[:2] == image_size(path) == (40, 50)
                except InputError as error:
                    assert str(path) in str(error)


@pytest.mark.slow
def test_a_picture_larger_than_it_declares(tmp_path):
    fork = Fork(tmp_path / "log", read_liars, tmp_path)
    assert fork.wait(60) == 0, fork.log.read_text()


def derain_within(size, arguments):
    limit_memory(size)
    run_script("test", arguments)


def test_an_image_without_room_in_memory_does_not_cost_the_others(tmp_path, checkpoint):
    """1.2 GB of feature maps, where 300 MB can be had."""
    for name, side in (("a", 24), ("b", 2000), ("c", 24)):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (side, side), "teal").save(tmp_path / f"in/{name}.png")
    arguments = (
        "--save_path", checkpoint, "--test_data_path", tmp_path / "in", "--output_path", tmp_path / "out",
        "--max_memory", 9, "--device", "cpu",
    )
    fork = Fork(tmp_path / "log", derain_within, 3 * 10**8, arguments)
    assert fork.wait(60) == 1, fork.log.read_text()
    lines = fork.log.read_text().splitlines()
    assert lines[-1] == "test.py: error: 1 of 3 images failed: b.png"
    assert any(f"error: {tmp_path / 'in/b.png'}: " in line and "allocate memory" in line for line in lines), lines
    assert {*contents(tmp_path / "out")} == {"a.png", "c.png", "metrics.csv"}


def test_postscript_is_not_run(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encode(Image.fromarray(photo(1, 40, 50)), "EPS"))
    with pytest.raises(InputError, match="image.png: not a readable image"):
        read_image(path)


# HDF5


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_patch_is_named_when_it_is_read(run, refused, pairs_dir, tmp_path, workers):
    assert run("train", *options(pairs_dir, tmp_path / "first", max_steps=1)).status == 0
    (path,) = tmp_path.glob("packed/*.h5")
    data = bytearray(path.read_bytes())
    for start in range(5000, len(data), 3000):  # in each patch
        data[start] ^= 1
    path.write_bytes(data)
    arguments = options(pairs_dir, tmp_path / "run", num_workers=workers)
    refused("train", *arguments, names=[f"error: {path}: cut short, damaged", "delete it and pack again"])


def make_packed(folder):
    for name in ("rain-1", "norain-1", "rain-2", "norain-2"):
        Image.fromarray(photo(1, 24, 32)).save(folder / f"{name}.png")
    pairs = [Pair(folder / f"rain-{k}.png", folder / f"norain-{k}.png") for k in (1, 2)]
    cuts, _ = plan_cuts(pairs, 11, 9)
    pack(cuts, folder / "seed.h5", 11, fingerprint(pairs, 11, 9))

    def read(path):
        patches = PackedPatches(path)
        items = [(*patches[index], patches.describe(index)) for index in range(len(patches))]
        return items, (patches.fingerprint, patches.content)

    good = read(folder / "seed.h5")

    def as_good(name, result):
        return len(result[0]) == len(good[0]) and result[1] == good[1] and all(
            np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) and a[2] == b[2]
            for a, b in zip(result[0], good[0])
        )

    return {"packed": (folder / "seed.h5").read_bytes()}, read, as_good


def make_prenet(folder):
    (folder / "good").mkdir()
    for name in PRENET_FILES:
        with h5py.File(folder / "good" / name, "w") as file:
            for index in range(7):
                file[str(index)] = np.random.default_rng(index).random((3, 11, 11), np.float32)

    def read(path):
        """``path`` is the mutant; it takes the place of one of the two files."""
        (folder / "set").mkdir(exist_ok=True)
        for name in PRENET_FILES:
            target = folder / "set" / name
            target.unlink(missing_ok=True)
            target.hardlink_to(path if name == PRENET_FILES[0] else folder / "good" / name)
        try:
            patches = PReNetPatches(TrainingSet(folder / "set"))
            return [patches[index] for index in range(len(patches))]
        except InputError as error:
            mutant = str(folder / "set" / PRENET_FILES[0])
            raise InputError(str(error).replace(mutant, str(path))) from None

    good = PReNetPatches(TrainingSet(folder / "good"))
    return {"prenet": (folder / "good" / PRENET_FILES[0]).read_bytes()}, read, lambda name, result: (
        len(result) == len(good) and all(np.array_equal(a, b[0]) for (a, _), b in zip(result, good))
    )


@pytest.mark.slow
def test_mutated_packed_files(tmp_path, capsys):
    result = check(tmp_path, capsys, "packed patches", 150 * THOROUGH, 2000, make_packed)
    assert result["other"] == 0, "each part of the file has a checksum"


@pytest.mark.slow
def test_mutated_prenet_files(tmp_path, capsys):
    check(tmp_path, capsys, "PReNet's HDF5", 150 * THOROUGH, 3000, make_prenet)


# Checkpoints


def make_checkpoints(folder):
    state, seeds = SAPNet(recurrent_iter=1, residual_conv="separable").state_dict(), {}
    for name, new in (("zip", True), ("old", False)):
        torch.save(state, folder / name, _use_new_zipfile_serialization=new)
        seeds[name] = (folder / name).read_bytes()

    def read(path):
        load_network(path)
        return load_weights(path)

    return seeds, read, lambda name, result: all(torch.equal(result[key], value) for key, value in state.items())


@pytest.mark.parametrize("fault", ["NaN", "shape", "missing", "extra", "optimizer", "position", "list", "folder"])
def test_bad_state_of_a_run(run, refused, pairs_dir, tmp_path, fault):
    arguments = options(pairs_dir, tmp_path / "run", max_steps=1)
    assert run("train", *arguments).status == 0
    path = tmp_path / "run/train_state.pth"
    state = torch.load(path, weights_only=True)
    if fault == "NaN":
        state["net"]["conv.0.bias"][1] = float("nan")
    elif fault == "shape":
        state["net"]["conv.0.bias"] = torch.zeros(4)
    elif fault == "missing":
        del state["net"]["conv.0.bias"]
    elif fault == "extra":
        state["net"]["more"] = torch.zeros(1)
    elif fault == "optimizer":
        state["optimizers"][0][0]["exp_avg"] = torch.zeros(4)
    elif fault == "position":
        state["position"]["step"] = "one"
    torch.save([1] if fault == "list" else state, path)
    if fault == "folder":
        path.unlink()
        path.mkdir()
    before = contents(tmp_path)
    refused("train", *arguments, "--resume", names=[path])
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_mutated_checkpoints(tmp_path, capsys):
    check(tmp_path, capsys, "checkpoints", 150 * THOROUGH, 6000, make_checkpoints)
