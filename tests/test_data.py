"""Packing pairs into patches, reading them back, and drawing batches from them."""
import gc
import itertools
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import time
import weakref

import cv2
import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import DerainDataset
from conftest import contents, make_pairs, photo, save
from DerainDataset import (
    PackedPatches, ShuffledBatches, TrainingPatches, open_patches, open_sets, packed_path, packed_size,
    patch_positions, plan_cuts,
)
from images import read_rgb
from layouts import find_pairs
from rain import TrainingRain
from training_sets import TrainingSet, find_training_sets, separate, with_scales
from utils import InputError, RunError


def find(folder, **options):
    """The training set of a folder."""
    (training_set,) = find_training_sets([str(folder)], [], **options)
    return training_set


def prepare(folder, packed_dir, patch_size=32, stride=20, preprocess=False, skip_small=False, **options):
    """The patches of a folder, packed where they are not yet."""
    return open_patches(find(folder, **options), packed_dir, patch_size, stride, preprocess, skip_small)


# Packing


@pytest.mark.parametrize(
    "length, patch, stride",
    [(100, 100, 80), (101, 100, 80), (180, 100, 80), (321, 100, 80), (481, 100, 80), (50, 11, 7)],
)
def test_patches_reach_every_pixel_and_lie_inside(length, patch, stride):
    positions = patch_positions(length, patch, stride)
    assert positions[0] == 0 and positions[-1] == length - patch, "flush with both borders"
    assert all(0 < after - before <= stride for before, after in itertools.pairwise(positions))


@pytest.mark.parametrize("half", [None, "left"])
def test_packed_patches_are_the_pictures(tmp_path, half):
    """Put every patch back where its origin says: both images must come out whole."""
    folder = make_pairs(tmp_path / "pairs", (3, 20), 48, 64)
    expected = {
        str(number): [cv2.imread(str(folder / f"{name}-{number}.png"))[..., ::-1] for name in ("rain", "norain")]
        for number in (3, 20)
    }
    if half:
        folder = tmp_path / "both"
        for number, images in expected.items():
            save(folder / f"rain-{number}.png", np.hstack(images))
    patches = prepare(folder, tmp_path / "packed", rainy_half=half)
    canvases = {number: [np.full((48, 64, 3), -1) for _ in range(2)] for number in expected}
    assert patches.names == ["rain-3.png", "rain-20.png"]
    for index in range(len(patches)):
        number, top, left = patches.origin[index]
        for canvas, patch in zip(canvases[patches.names[number][5:-4]], patches[index], strict=True):
            assert patch.dtype == np.uint8 and patch.shape == (32, 32, 3)
            canvas[top : top + 32, left : left + 32] = patch
        assert patches.describe(index) == f"{patches.names[number]} at row {top}, column {left}"
    for number, images in expected.items():
        assert all(np.array_equal(canvas, image) for canvas, image in zip(canvases[number], images, strict=True))
    with h5py.File(patches.paths[0]) as file:
        assert file["rainy"].dtype == file["clean"].dtype == np.uint8


def test_photographs_are_packed_at_further_scales_too(clean_dir, tmp_path, capsys):
    """Each scale in a file of its own, whose patches are those of the shrunk pictures, and counts for as many."""
    whole, half, small = sets = with_scales([find(clean_dir, photographs=True)], [0.5, 0.4])
    assert [(each.scale, each.count) for each in sets] == [(1, 1), (0.5, 4), (0.4, 6)]
    sources = open_sets(sets, tmp_path / "packed", 16, 16)
    assert len({source.paths[0] for source in sources}) == 3
    for training_set, source in zip(sets, sources):
        height, width = round(48 * training_set.scale), round(64 * training_set.scale)
        for index in range(len(source)):
            number, top, left = source.origin[index]
            picture = read_rgb(clean_dir / source.names[number])
            if training_set.scale < 1:
                picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
            rainy, clean = source[index]
            assert np.array_equal(rainy, clean)
            assert np.array_equal(clean, picture[top : top + 16, left : left + 16])
    assert capsys.readouterr().out.count("no packed file yet") == 3
    open_sets(sets, tmp_path / "packed", 16, 16)
    assert "packing" not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"smaller than --patch_size 48: .*\(32x24\)"):
        open_sets([half], tmp_path / "packed", 48, 16)


def test_only_photographs_are_shrunk(pairs_dir):
    with pytest.raises(InputError, match="--photograph_scales: expected a --data_path of clean photographs"):
        with_scales([find(pairs_dir)], [0.5])


def test_packing_happens_once_and_again_after_a_change(pairs_dir, tmp_path, capsys):
    packed_dir = tmp_path / "packed"

    def packed_because():
        lines = [line for line in capsys.readouterr().out.splitlines() if ": packing " in line]
        return lines[0].rpartition("(")[2].rstrip(")") if lines else None

    assert len(prepare(pairs_dir, packed_dir)) == 3 * 6
    assert packed_because() == "no packed file yet"
    prepare(pairs_dir, packed_dir)
    assert packed_because() is None
    prepare(pairs_dir, packed_dir, preprocess=True)
    assert packed_because() == "--preprocess"
    make_pairs(pairs_dir, (9,))
    assert len(prepare(pairs_dir, packed_dir)) == 4 * 6
    assert packed_because() == "the folder has changed"
    (pairs_dir / "rain-2.png").unlink()
    assert len(prepare(pairs_dir, packed_dir)) == 3 * 6
    assert packed_because() == "the folder has changed"
    save(pairs_dir / "rain-1.png", photo(77))
    changed = prepare(pairs_dir, packed_dir)
    assert packed_because() == "the folder has changed"
    assert np.array_equal(changed[0][0], read_rgb(pairs_dir / "rain-1.png")[:32, :32])
    os.utime(pairs_dir / "norain-3.png", ns=(0, 0))  # an edit may keep the size
    prepare(pairs_dir, packed_dir)
    assert packed_because() == "the folder has changed"
    times = os.stat(pairs_dir / "norain-3.png")
    (tmp_path / "other.png").write_bytes((pairs_dir / "norain-3.png").read_bytes()[:-1] + b"x")
    os.utime(tmp_path / "other.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / "other.png").rename(pairs_dir / "norain-3.png")  # of the same size and date, as from an archive
    prepare(pairs_dir, packed_dir)
    assert packed_because() == "the folder has changed"
    assert len(list(packed_dir.iterdir())) == 1, "each time the same file"


def test_runs_that_cut_otherwise_do_not_overwrite_one_another(tmp_path, capsys):
    """Other patches, strides, namesakes and hold-outs have packed files of their own, and none is packed twice."""
    first, second = make_pairs(tmp_path / "a/RainTrainL"), make_pairs(tmp_path / "b/RainTrainL", (7, 8, 9, 10))
    test_set = make_pairs(tmp_path / "test", (2,))
    kinds = [  # folder, patch, stride, held out, test sets: number of patches
        ((first, 32, 20, 0, []), 18), ((first, 32, 16, 0, []), 18), ((first, 32, 10, 0, []), 3 * 15),
        ((first, 24, 20, 0, []), 3 * 9), ((second, 32, 20, 0, []), 24), ((first, 32, 20, 1, []), 12),
        ((first, 32, 20, 2, []), 6), ((first, 32, 20, 0, [test_set]), 12),
    ]
    for again in (False, True):
        for (folder, patch, stride, count, tests), patches in kinds:
            training_set = find(folder)
            separate([training_set], [count], [], tests)
            assert len(open_patches(training_set, tmp_path / "packed", patch, stride)) == patches
        assert capsys.readouterr().out.count(": packing ") == (0 if again else len(kinds))


def test_what_is_held_out_is_not_packed(pairs_dir, tmp_path):
    training_set = find(pairs_dir)
    held_out = separate([training_set], [2], [], [])
    names = open_patches(training_set, tmp_path, 32, 20).names
    assert len(names) == 1 and len(held_out) == 2
    assert {pair.rainy.name for pair in held_out} | set(names) == {f"rain-{n}.png" for n in (1, 2, 3)}


def test_a_packed_file_of_another_version_is_packed_anew(pairs_dir, tmp_path):
    path = prepare(pairs_dir, tmp_path).paths[0]
    with h5py.File(path, "r+") as file:
        del file.attrs["content"]
        file.attrs["fingerprint"] = "text of variable length"
    assert len(prepare(pairs_dir, tmp_path)) == 18 and len(PackedPatches(path).content) == 64


# What a resumed run knows its data by


def test_content_is_that_of_the_pixels_wherever_they_lie(pairs_dir, tmp_path):
    original = prepare(pairs_dir, tmp_path / "packed")
    shutil.copytree(pairs_dir, tmp_path / "elsewhere/named otherwise", copy_function=shutil.copyfile)
    copied = prepare(tmp_path / "elsewhere/named otherwise", tmp_path / "elsewhere/packed")
    for path in pairs_dir.iterdir():
        path.touch()
    touched = prepare(pairs_dir, tmp_path / "packed")
    repacked = prepare(pairs_dir, tmp_path / "packed", preprocess=True)
    assert original.content == copied.content == touched.content == repacked.content
    assert len({original.fingerprint, copied.fingerprint, touched.fingerprint}) == 3, "each was packed"
    facts = [{**source.summary(), "folder": None} for source in (original, copied)]
    assert facts[0] == facts[1]
    assert facts[0] == {
        "folder": None, "count": 1, "patches": 18, "size": 32, "images": 3, "content": original.content
    }


@pytest.mark.parametrize("edit", ["a pixel of a rainy image", "a pixel of a clean image", "stride", "images swapped"])
def test_content_is_another_after_an_edit(pairs_dir, tmp_path, edit):
    original = prepare(pairs_dir, tmp_path)
    if edit == "images swapped":
        (pairs_dir / "rain-2.png").rename(tmp_path / "image")
        (pairs_dir / "norain-2.png").rename(pairs_dir / "rain-2.png")
        (tmp_path / "image").rename(pairs_dir / "norain-2.png")
    elif edit != "stride":
        path = pairs_dir / ("rain-2.png" if "rainy" in edit else "norain-2.png")
        image = read_rgb(path).copy()
        image[-1, -1, 2] ^= 1
        save(path, image)
    changed = prepare(pairs_dir, tmp_path, stride=16 if edit == "stride" else 20)
    assert len(changed) == len(original) and changed.content != original.content


# Interrupted


@pytest.mark.parametrize("before", [False, True], ids=["first packing", "repacking"])
def test_packing_that_fails_half_way_leaves_what_was_there(pairs_dir, tmp_path, before):
    """The header of the third image is whole, so that this shows when it is read."""
    packed_dir = tmp_path / "packed"
    packed_dir.mkdir()
    if before:
        prepare(pairs_dir, packed_dir)
    state, path = contents(packed_dir), pairs_dir / "rain-3.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="rain-3.png: not a readable image"):
        prepare(pairs_dir, packed_dir)
    assert contents(packed_dir) == state
    path.write_bytes(whole)
    assert len(prepare(pairs_dir, packed_dir)) == 18


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_killed_packing_leaves_what_was_there(pairs_dir, tmp_path, monkeypatch):
    packed_dir = tmp_path / "packed"
    prepare(pairs_dir, packed_dir)
    (name,) = state = contents(packed_dir)
    receive, send = multiprocessing.Pipe(duplex=False)
    read_pair = DerainDataset.read_pair

    def halt(pair):
        if "3" in pair.rainy.name:
            send.send("halfway")
            time.sleep(60)
        return read_pair(pair)

    with monkeypatch.context() as patch:
        patch.setattr(DerainDataset, "read_pair", halt)
        child = multiprocessing.get_context("fork").Process(target=prepare, args=(pairs_dir, packed_dir, 32, 20, True))
        child.start()
    assert receive.poll(30)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert len(contents(packed_dir)) > 1, "it had begun to write"
    assert contents(packed_dir)[name] == state[name]
    # What the kill left over does not disturb the next run, which clears it away.
    assert len(prepare(pairs_dir, packed_dir, preprocess=True)) == 18
    assert list(contents(packed_dir)) == [name]


@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_cut_short_file_is_named(pairs_dir, tmp_path, share):
    path = prepare(pairs_dir, tmp_path / "packed").paths[0]
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match="cut short") as caught:
        prepare(pairs_dir, tmp_path / "packed")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_foreign_hdf5_file_is_named(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["numbers"] = np.arange(3)
    with pytest.raises(InputError, match="other.h5: .* no file of patches"):
        PackedPatches(tmp_path / "other.h5")


# Memory and disk


def test_packing_holds_few_images_where_the_disk_is_slow(tmp_path, monkeypatch):
    """All would be decoded long before the first is written."""
    folder = make_pairs(tmp_path / "pairs", range(60), 24, 24)
    alive, most = [0], [0]
    cut_patches, write = DerainDataset.cut_patches, h5py.Dataset.__setitem__

    def forget():
        alive[0] -= 1

    def cut(*args):
        *patches, digest = cut_patches(*args)
        for array in patches:
            alive[0] += 1
            weakref.finalize(array, forget)
        most[0] = max(most[0], alive[0])
        return *patches, digest

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(DerainDataset, "cut_patches", cut)
    monkeypatch.setattr(h5py.Dataset, "__setitem__", lambda *args: time.sleep(0.003) or write(*args))
    prepare(folder, tmp_path / "packed", 24, 24)
    gc.collect()
    assert alive[0] == 0 and 2 <= most[0] <= 2 * 8, "of 120 arrays"


SAID = re.compile(r"packing 6 pairs into (.*), ([\d.]+) MB \(no packed file yet\)")


@pytest.mark.parametrize("patch, stride", [(100, 80), (32, 20), (240, 80)])
def test_the_size_that_packing_announces_is_the_files(tmp_path, capsys, patch, stride):
    prepare(make_pairs(tmp_path / "pairs", range(6), 240, 320), tmp_path / "packed", patch, stride)
    path, megabytes = SAID.search(capsys.readouterr().out).groups()
    size = os.path.getsize(path) / 1e6
    assert size <= float(megabytes) + 0.05 and float(megabytes) <= 1.05 * size + 0.1


@pytest.mark.parametrize("patch, stride, names", [(11, 11, "x"), (11, 3, "x" * 200), (47, 1, "x")])
def test_the_size_is_never_less_than_the_files(tmp_path, patch, stride, names):
    """Or the disk could be full where HDF5 crashes."""
    for number in range(40):
        for kind in ("input", "target"):
            save(tmp_path / f"pairs/{kind}/{names}{number}.png", photo(number, 47, 50))
    training_set = find(tmp_path / "pairs")
    path = open_patches(training_set, tmp_path / "packed", patch, stride).paths[0]
    cuts, _ = plan_cuts(training_set.pairs, patch, stride)
    assert path.stat().st_size <= packed_size(cuts, patch) <= 1.3 * path.stat().st_size + 2**16


def test_packing_needs_room_before_it_starts(pairs_dir, small_disk, tmp_path):
    disk = small_disk("96k")
    with pytest.raises(InputError) as caught:
        prepare(pairs_dir, disk / "packed")
    message = str(caught.value)
    assert message.startswith(f"--packed_dir {disk / 'packed'}: ") and "\n" not in message
    needed, free = map(float, re.findall(r"([\d.]+) MB", message))
    assert needed == pytest.approx(18 * 2 * 3 * 32**2 / 1e6, abs=0.1) and 0.08 <= free <= 0.1
    assert list(disk.iterdir()) == []


def test_disk_that_others_fill_while_packing_loses_nothing(pairs_dir, small_disk, tmp_path, monkeypatch):
    disk = small_disk("96k")
    path = packed_path(find(pairs_dir), disk, 32, 20)
    path.write_bytes(b"a good file of before")
    monkeypatch.setattr(DerainDataset, "check_disk", lambda *args: None)  # there was room at that time
    with pytest.raises(RunError, match=f"{path}: could not be written .No space left"):
        prepare(pairs_dir, disk, preprocess=True)
    assert contents(disk) == {path.name: b"a good file of before"}


# Images that cannot be packed


def test_all_small_images_are_named(tmp_path):
    folder = make_pairs(tmp_path / "pairs", range(1, 4), 48, 64)
    make_pairs(folder, (5, 7), 20, 64)
    make_pairs(folder, (6,), 64, 31)
    with pytest.raises(InputError) as caught:
        prepare(folder, tmp_path / "packed")
    expected = ", ".join(
        f"{folder / f'rain-{number}.png'} ({size})" for number, size in ((5, "64x20"), (6, "31x64"), (7, "64x20"))
    )
    assert str(caught.value) == f"smaller than --patch_size 32: {expected}; --skip_small leaves such images out"
    assert not (tmp_path / "packed").exists()


def test_small_images_of_all_sets_are_named_at_once(tmp_path):
    """Before any set is packed; a folder given twice is packed once."""
    sets = []
    for name, sizes in (("a", (48, 48)), ("b", (20, 48)), ("c", (48, 12))):
        folder = make_pairs(make_pairs(tmp_path / name, (1,), 48, 64), (2,), *sizes)
        sets.append(TrainingSet(folder, pairs=find_pairs(folder).pairs))
    with pytest.raises(InputError) as caught:
        open_sets(sets, tmp_path / "packed", 32, 20)
    expected = f"{tmp_path / 'b/rain-2.png'} (48x20), {tmp_path / 'c/rain-2.png'} (12x48)"
    assert str(caught.value) == f"smaller than --patch_size 32: {expected}; --skip_small leaves such images out"
    assert not (tmp_path / "packed").exists()
    sources = open_sets([*sets, sets[0]], tmp_path / "packed", 32, 20, skip_small=True)
    assert [len(source.names) for source in sources] == [2, 1, 1, 2] and len(list(tmp_path.glob("packed/*.h5"))) == 3


def test_skip_small_leaves_them_out_by_name(tmp_path, capsys):
    folder = make_pairs(tmp_path / "pairs", range(1, 4), 48, 64)
    make_pairs(folder, (5, 7), 20, 64)
    patches = prepare(folder, tmp_path / "packed", skip_small=True)
    assert patches.names == [f"rain-{number}.png" for number in (1, 2, 3)] and len(patches) == 18
    assert f"{folder}: left out 2 (smaller than 32 px): rain-5.png, rain-7.png\n" in capsys.readouterr().out
    assert patches.summary()["images"] == 3
    with pytest.raises(InputError, match="smaller than --patch_size 32: .*rain-5.png"):
        prepare(folder, tmp_path / "packed")
    with pytest.raises(InputError, match=f"--data_path {folder}: no image is as large as --patch_size 50"):
        prepare(folder, tmp_path / "packed", 50, skip_small=True)


def test_small_images_are_named_by_later_runs_too(tmp_path, capsys):
    folder = make_pairs(make_pairs(tmp_path / "pairs", (1, 2)), (5,), 20, 64)
    for _ in range(2):
        prepare(folder, tmp_path / "packed", skip_small=True)
        assert f"{folder}: left out 1 (smaller than 32 px): rain-5.png\n" in capsys.readouterr().out


@pytest.mark.parametrize("target, reason", [
    ("/nowhere", "no such file; expected an image"), ("2.png", "not a readable image")
], ids=["nowhere", "itself"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, target, reason):
    for number in (1, 2):
        save(tmp_path / f"pairs/target/{number}.png", photo(number))
        save(tmp_path / f"pairs/input/{number}.png", photo(number))
    link = tmp_path / "pairs/input/2.png"
    link.unlink()
    link.symlink_to(target)
    with pytest.raises(InputError, match=f"{link}: {reason}"):
        prepare(tmp_path / "pairs", tmp_path / "packed")


def test_case_of_a_tiny_training_image(shared, tmp_path):
    folder = shared / "cases/tiny_training_image/tiny"
    with pytest.raises(InputError, match=f"smaller than --patch_size 40: {folder / 'rain-3.png'} .20x64.; --skip"):
        prepare(folder, tmp_path, 40)
    assert prepare(folder, tmp_path, 40, skip_small=True).names == ["rain-1.png", "rain-2.png", "rain-4.png"]


def test_pair_of_two_sizes_is_named(pairs_dir, tmp_path):
    save(pairs_dir / "norain-2.png", photo(2, 48, 65))
    for skip_small in (False, True):
        with pytest.raises(InputError, match="rain-2.png is 64x48 but its clean image norain-2.png is 65x48"):
            prepare(pairs_dir, tmp_path / "packed", skip_small=skip_small)
    assert not (tmp_path / "packed").exists()


def test_images_are_packed_as_they_are_shown(shared, tmp_path):
    """A 16-bit PNG with an EXIF orientation, beside a clean image that was turned for good."""
    path = shared / "cases/exif_16bit_png/rgb16_exif6.png"
    (tmp_path / "pairs").mkdir()
    shutil.copyfile(path, tmp_path / "pairs/rain-1.png")
    save(tmp_path / "pairs/norain-1.png", read_rgb(path))
    patches = prepare(tmp_path / "pairs", tmp_path / "packed")
    assert len(patches) and all(np.array_equal(*patches[index]) for index in range(len(patches)))


# PReNet's own files


def write_prenet(folder, count=5, size=24, targets=None):
    """train_input.h5 and train_target.h5 as PReNet's prepare_data writes them; returns the arrays."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = []
    for name, length in (("train_input.h5", count), ("train_target.h5", targets or count)):
        arrays.append(rng.random((length, 3, size, size), np.float32))
        with h5py.File(folder / name, "w") as file:
            for key, array in enumerate(arrays[-1]):
                file.create_dataset(str(key), data=array)
    return arrays


def test_prenets_files_are_read_as_they_are(tmp_path):
    # More than ten: HDF5 lists the keys as "0", "1", "10", "11", "2", ...
    inputs, targets = write_prenet(tmp_path / "prenet", count=12)
    source = prepare(tmp_path / "prenet", tmp_path / "packed", 24, 80)
    assert not (tmp_path / "packed").exists()
    dataset = TrainingPatches([source], augment=False)
    assert len(dataset) == 12 and dataset.describe(3) == "prenet patch 3"
    for index in range(12):
        rainy, clean, number = dataset[0, index]
        assert number == index and rainy.dtype == torch.float32
        assert np.array_equal(rainy, inputs[index]) and np.array_equal(clean, targets[index])


def test_prenets_patches_of_another_size_are_refused(tmp_path):
    write_prenet(tmp_path / "prenet", size=24)
    with pytest.raises(InputError) as caught:
        prepare(tmp_path / "prenet", tmp_path, 32)
    for name in ("--patch_size 32", tmp_path / "prenet/train_input.h5", "24 px", "--patch_size 24", "--preprocess"):
        assert str(name) in str(caught.value)


def test_prenets_files_of_different_lengths_are_refused(tmp_path):
    write_prenet(tmp_path / "prenet", count=5, targets=4)
    with pytest.raises(InputError, match="train_input.h5 has 5 patches but train_target.h5 has 4"):
        prepare(tmp_path / "prenet", tmp_path)


# Reading patches


def collect(dataset, workers, context=None, epochs=2):
    """All batches of the epochs, in the order the loader gives them."""
    sampler = ShuffledBatches(len(dataset), 4, seed=5)
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, multiprocessing_context=context if workers else None,
        persistent_workers=workers > 0,
    )
    batches = []
    for epoch in range(epochs):
        sampler.start(epoch)
        batches += list(loader)
    return batches


@pytest.fixture
def dataset(pairs_dir, tmp_path):
    write_prenet(tmp_path / "prenet", size=32)
    sources = [prepare(pairs_dir, tmp_path / "packed"), prepare(tmp_path / "prenet", tmp_path / "packed")]
    return TrainingPatches(sources, seed=3)


SPAWN = pytest.param(1, "spawn", marks=pytest.mark.slow)  # imports PyTorch anew


@pytest.mark.parametrize("workers, context", [(1, "fork"), (3, "fork"), SPAWN])
def test_workers_do_not_change_the_batches(dataset, workers, context):
    dataset[0, 0]  # a handle is open in this process already, and must not be used in another
    expected = collect(dataset, 0)
    assert len(dataset) == 3 * 6 + 5 and len(expected) == 2 * (23 // 4)
    for batch, other in zip(expected, collect(dataset, workers, context), strict=True):
        assert all(torch.equal(tensor, same) for tensor, same in zip(batch, other, strict=True))
    dataset[0, 0]


def test_a_dataset_can_be_sent_to_another_process(dataset):
    expected = dataset[1, 3], dataset[1, 20]
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(a[part], b[part]) for a, b in zip(expected, (copy[1, 3], copy[1, 20])) for part in (0, 1))


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_each_process_opens_each_file_once(dataset, monkeypatch):
    """A handle that crossed a fork shares HDF5's state with its parent."""
    opened = []
    h5_file = h5py.File
    monkeypatch.setattr(h5py, "File", lambda path, *args: opened.append(path) or h5_file(path, *args))

    def read_all():
        opened.clear()
        for index in range(len(dataset)):
            dataset[0, index]
        return [path.name for path in opened]

    files = ["pairs", "train_input", "train_target"]
    assert [name.removesuffix(".h5").partition("-")[0] for name in sorted(read_all())] == files
    assert read_all() == []
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: send.send(read_all()))
    child.start()
    assert receive.poll(30) and len(receive.recv()) == 3
    child.join()


def test_augmentation_mirrors_both_and_depends_on_seed_epoch_and_index_alone(dataset):
    plain = TrainingPatches(dataset.sources, augment=False)
    mirrored = {}
    for seed, epoch in ((3, 0), (3, 1), (4, 0)):
        augmented, flags = TrainingPatches(dataset.sources, seed=seed), []
        for index in range(len(plain)):
            rainy, clean, _ = plain[epoch, index]
            other_rainy, other_clean, _ = augmented[epoch, index]
            flags.append(not torch.equal(rainy, other_rainy))
            flip = (lambda image: image.flip(2)) if flags[-1] else (lambda image: image)
            assert torch.equal(other_rainy, flip(rainy)) and torch.equal(other_clean, flip(clean))
        mirrored[seed, epoch] = flags
        backwards = reversed(range(len(plain)))
        again = [not torch.equal(augmented[epoch, index][0], plain[epoch, index][0]) for index in backwards]
        assert again[::-1] == flags
        assert 4 <= sum(flags) <= 19, "about half of 23"
    assert len({tuple(flags) for flags in mirrored.values()}) == 3


def test_sources_of_several_patch_sizes_are_refused(pairs_dir, tmp_path):
    sources = [prepare(pairs_dir, tmp_path, 24), prepare(make_pairs(tmp_path / "others"), tmp_path, 32)]
    with pytest.raises(InputError, match="patches of one size, found 24 px .* 32 px"):
        TrainingPatches(sources)


def test_a_folder_counts_as_often_as_it_says(pairs_dir, tmp_path):
    others = make_pairs(tmp_path / "others", (7,))
    (first, second) = find_training_sets([f"{pairs_dir}:3", f"{others}:1"], [])
    sources = [open_patches(training_set, tmp_path / "packed", 32, 20) for training_set in (first, second)]
    dataset = TrainingPatches(sources, augment=False, seed=3)
    assert len(dataset) == 3 * 18 + 6 and len(TrainingPatches(sources[::-1])) == 60
    seen = [dataset.describe(index) for index in range(60)]
    assert seen[:18] == seen[18:36] == seen[36:54] and seen[54].startswith("rain-7.png at row 0")
    assert len(set(seen)) == 24
    for index in range(18):
        copies = [dataset[0, index + 18 * k] for k in range(3)]
        assert [copy[2] for copy in copies] == [index, index + 18, index + 36]
        assert all(torch.equal(copies[0][part], copy[part]) for copy in copies for part in (0, 1))
    wet = TrainingPatches(sources, augment=False, seed=3, rain=TrainingRain(1, "heavy"))
    for index in range(18):
        copies = [wet[0, index + 18 * k] for k in range(3)]
        assert all(torch.equal(copies[0][1], copy[1]) for copy in copies)
        assert not any(torch.equal(a[0], b[0]) for a, b in itertools.combinations(copies, 2)), "other rain each time"
    assert sources[0].summary()["count"] == 3 and sources[0].summary()["patches"] == 18


# Batches


def test_batches_cover_the_epoch_once_in_another_order_each_time():
    sampler = ShuffledBatches(22, 4, seed=1)
    epochs = []
    for epoch in range(2):
        sampler.start(epoch)
        epochs.append(list(sampler))
        assert len(epochs[-1]) == 5
        items = [item for batch in epochs[-1] for item in batch]
        assert {e for e, _ in items} == {epoch} and len({index for _, index in items}) == 20
    assert [index for _, index in epochs[0][0]] != [index for _, index in epochs[1][0]]
    assert list(ShuffledBatches(22, 4, seed=2)) != epochs[0]
    assert len(list(ShuffledBatches(3, 4))) == 1, "fewer patches than a batch still train"


def test_an_epoch_can_begin_at_a_sample_and_keeps_its_length():
    sampler = ShuffledBatches(22, 4, seed=1)
    sampler.start(1)
    whole = list(sampler)
    for batches in range(6):
        sampler.start(1, 4 * batches)
        assert list(sampler) == whole[batches:] and len(sampler) == 5
    sampler.start(1, 22)
    assert list(sampler) == [] and len(sampler) == 5


@pytest.mark.parametrize("other", [1, 2, 3, 5, 12])
def test_another_batch_size_goes_on_at_the_same_sample(other):
    """Neither a patch twice nor one left out."""
    first, second = ShuffledBatches(24, 4, seed=1), ShuffledBatches(24, other, seed=1)
    first.start(2)
    order = [item for batch in first for item in batch]
    second.start(2, 8)
    rest = [item for batch in second for item in batch]
    assert rest == order[8 : 8 + len(rest)] and len(rest) == 16 // other * other


@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_of_the_processes_make_up_the_batch(ranks):
    whole = ShuffledBatches(40, 6, seed=1)
    shares = [ShuffledBatches(40, 6, 1, rank, ranks) for rank in range(ranks)]
    for sampler in (whole, *shares):
        sampler.start(3, 6)
    assert {len(share) for share in shares} == {len(whole)}
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {len(part) for part in parts} == {6 // ranks}
        assert sorted(item for part in parts for item in part) == sorted(batch)


def test_shares_are_equal_where_there_are_fewer_patches_than_a_batch():
    shares = [ShuffledBatches(7, 12, 1, rank, ranks=2) for rank in range(2)]
    first, second = ([batch for batch in share] for share in shares)
    assert [len(batch) for batch in first] == [len(batch) for batch in second] == [3, 3][:len(first)]
    assert len({item for batch in (*first, *second) for item in batch}) == 6


# New rain


@pytest.fixture
def clean_dir(tmp_path):
    for number in (5, 6):
        save(tmp_path / f"photographs/{number}.jpg", photo(number))
    return tmp_path / "photographs"


def with_new_rain(dataset, *rain):
    return TrainingPatches(dataset.sources, dataset.augment, dataset.seed, TrainingRain(*rain))


@pytest.fixture
def pairs_and_photographs(pairs_dir, clean_dir, tmp_path):
    sources = [prepare(folder, tmp_path / "packed", photographs=True) for folder in (clean_dir, pairs_dir)]
    assert [source.clean_only for source in sources] == [True, False]
    return TrainingPatches(sources, seed=3)


@pytest.mark.parametrize("workers, context", [(2, "fork"), SPAWN])
def test_new_rain_depends_on_seed_epoch_and_index_alone(pairs_and_photographs, workers, context):
    """In other processes, in another order, or begun in the middle as after --resume: the same patches."""
    rainy = with_new_rain(pairs_and_photographs, 0.4, "both", 0.4, 0.5)
    expected = collect(rainy, 0)
    for batch, other in zip(expected, collect(rainy, workers, context), strict=True):
        assert all(torch.equal(tensor, same) for tensor, same in zip(batch, other, strict=True))
    for epoch, batch in ((1, expected[-1]), (0, expected[0])):
        for position in (3, 0):
            item = rainy[epoch, int(batch[2][position])]
            assert all(torch.equal(item[k], batch[k][position]) for k in (0, 1))
    first, other_epoch = (torch.stack([rainy[epoch, index][0] for index in range(30)]) for epoch in (0, 1))
    reseeded = TrainingPatches(rainy.sources, False, 4, rainy.rain)
    unmirrored = TrainingPatches(rainy.sources, False, 3, rainy.rain)
    assert not torch.equal(first, other_epoch)
    assert any(not torch.equal(reseeded[0, index][0], unmirrored[0, index][0]) for index in range(30))


def test_new_rain_leaves_the_clean_patches_and_their_mirroring_alone(dataset):
    dataset = TrainingPatches(dataset.sources[:1], seed=3)
    wet = with_new_rain(dataset, 1, "heavy")
    for index in range(18):
        assert torch.equal(wet[2, index][1], dataset[2, index][1])
        assert not torch.equal(wet[2, index][0], dataset[2, index][0])
        assert (wet[2, index][0] >= wet[2, index][1]).all(), "the rain is mirrored with the patch"


def test_patches_keep_their_rain_in_the_share_that_is_left(dataset):
    dataset = TrainingPatches(dataset.sources[:1], seed=3)
    wet = with_new_rain(dataset, 0.3, "heavy", 0.2)
    same = [torch.equal(wet[0, index][0], dataset[0, index][0]) for index in range(18)]
    assert 3 <= sum(same) <= 15


def test_mixed_rain_comes_from_pairs_only(pairs_and_photographs):
    """Photographs get the streaks of the pairs, which here are columns of 90 grey levels, or what is known of them."""
    wet = with_new_rain(pairs_and_photographs, 0, "both", 1)
    for index in range(len(wet)):
        rainy, clean, _ = (255 * np.asarray(part) for part in wet[0, index])
        added = np.rint(rainy - clean)
        assert (added >= 0).all() and added.max() <= 90
        assert (added == 0).all(axis=(0, 1)).any() and (added.max((0, 1)) > 0).any(), "dry columns and wet ones"


def test_clean_photographs_get_rain(clean_dir, tmp_path):
    patches = prepare(clean_dir, tmp_path / "packed", photographs=True)
    assert len(patches) == 2 * 6 and patches.clean_only
    rainy, clean = patches[0]
    assert np.array_equal(rainy, clean) and np.array_equal(clean, read_rgb(clean_dir / "5.jpg")[:32, :32])
    wet = TrainingPatches([patches], rain=TrainingRain(0.01, "heavy"))
    assert all((wet[0, index][0] > wet[0, index][1]).any() for index in range(12))
    with pytest.raises(InputError, match="--rain_mix: expected a --data_path with rainy/clean pairs"):
        TrainingPatches([patches], rain=TrainingRain(0.5, "heavy", 0.5))


def test_new_rain_leaves_images_without_a_partner_out(pairs_dir, tmp_path, capsys):
    (pairs_dir / "norain-2.png").unlink()
    patches = prepare(pairs_dir, tmp_path / "packed", photographs=True)
    assert list(patches.names) == ["rain-1.png", "rain-3.png"] and not patches.clean_only
    assert "left out 1 (no pair by their names): rain-2.png" in capsys.readouterr().out


def test_mixing_pairs_that_are_not_clean_plus_streaks_is_refused(pairs_dir, tmp_path):
    for number in (1, 2, 3):
        data = cv2.imencode(".jpg", cv2.imread(str(pairs_dir / f"rain-{number}.png")))[1]
        (pairs_dir / f"rain-{number}.png").write_bytes(data)
    patches = prepare(pairs_dir, tmp_path / "packed")
    TrainingPatches([patches], rain=TrainingRain(0.5, "heavy"))
    with pytest.raises(InputError, match="--rain_mix: rain-1.png at row 0, column 0 is not its clean image plus"):
        TrainingPatches([patches], rain=TrainingRain(mix=0.5))
