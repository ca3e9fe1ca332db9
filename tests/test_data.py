"""Finding pairs, packing them, reading them back, and the guard against test backgrounds."""
import itertools
import multiprocessing
import os
import subprocess
import sys

import cv2
import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import DerainDataset
from conftest import ROOT, contents, make_pairs, photo, save, with_rain
from DerainDataset import (
    PackedPatches, Pair, PReNetPatches, ShuffledBatches, TrainingPatches, find_leaks, find_pairs, pack, packed_path,
    patch_positions, prepare_patches,
)
from rain import TrainingRain
from utils import InputError, read_rgb

# Finding pairs: the folders of DESIGN section 4 as files, and the pairs that must come out, in this order.
LAYOUTS = {
    "RainTrainH": (
        ["rain-10.png", "rain-2.PNG", "rain-1800.png", "norain-1800.png", "norain-2.png", "norain-10.png"],
        [("rain-2.PNG", "norain-2.png"), ("rain-10.png", "norain-10.png"), ("rain-1800.png", "norain-1800.png")],
    ),
    "Rain100H": (
        ["rainy/rain-001.png", "rainy/rain-003.png", "norain-001.png", "norain-003.png"],
        [("rainy/rain-001.png", "norain-001.png"), ("rainy/rain-003.png", "norain-003.png")],
    ),
    "Rain1400": (
        [
            *(f"rainy_image/{n}_{k}.jpg" for n in (901, 1000) for k in (1, 2, 14)),
            "ground_truth/901.jpg", "ground_truth/1000.jpg",
        ],
        [(f"rainy_image/{n}_{k}.jpg", f"ground_truth/{n}.jpg") for n in (901, 1000) for k in (1, 2, 14)],
    ),
    "Rain13K": (
        ["input/10.jpg", "input/9.jpg", "input/street.jpg", "target/9.jpg", "target/10.png", "target/street.JPG"],
        [("input/9.jpg", "target/9.jpg"), ("input/10.jpg", "target/10.png"), ("input/street.jpg", "target/street.JPG")],
    ),
    "Rain200H": (
        ["rain/norain-1x2.png", "rain/norain-12x2.png", "norain/norain-12x2.png", "norain/norain-1x2.png"],
        [("rain/norain-1x2.png", "norain/norain-1x2.png"), ("rain/norain-12x2.png", "norain/norain-12x2.png")],
    ),
    "Rain12": (
        ["02_in.png", "11_in.png", "02_GT.png", "11_GT.png"],
        [("02_in.png", "02_GT.png"), ("11_in.png", "11_GT.png")],
    ),
}


def touch(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def relative(pairs, folder):
    return [tuple(str(path.relative_to(folder)) for path in pair) for pair in pairs]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("required", [True, False], ids=["training", "testing"])
def test_layout_is_found_from_the_folder(tmp_path, name, required):
    files, expected = LAYOUTS[name]
    pairs, orphans = find_pairs(touch(tmp_path, [*files, "readme.txt"]), ground_truth_required=required)
    assert relative(pairs, tmp_path) == expected
    assert orphans == []


@pytest.mark.parametrize("name, folder", [("Rain100H", "rainy"), ("Rain13K", "input"), ("Rain1400", "rainy_image")])
def test_the_rainy_folder_itself_may_be_named(tmp_path, monkeypatch, name, folder):
    files, expected = LAYOUTS[name]
    touch(tmp_path, files)
    assert relative(find_pairs(tmp_path / folder)[0], tmp_path.resolve()) == expected
    monkeypatch.chdir(tmp_path)
    assert relative(find_pairs(folder)[0], tmp_path.resolve()) == expected


def test_real_sets_are_found_whole(shared):
    counts = {"train/RainTrainL": 200, "train/RainTrainH": 18, "test/Rain100L": 20, "test/Rain100H/rainy": 20}
    for folder, count in counts.items():
        pairs, orphans = find_pairs(shared / "data" / folder)
        assert len(pairs) == count and orphans == []


def test_orphans_are_left_out_and_named(tmp_path):
    touch(tmp_path, ["rain-1.png", "norain-1.png", "rain-7.png", "norain-20.png", "cat.png"])
    pairs, orphans = find_pairs(tmp_path)
    assert relative(pairs, tmp_path) == [("rain-1.png", "norain-1.png")]
    assert orphans == ["norain-20.png", "rain-7.png"]
    # A test set's image without ground truth is still to be derained.
    pairs, orphans = find_pairs(tmp_path, ground_truth_required=False)
    assert [(pair.rainy.name, pair.clean and pair.clean.name) for pair in pairs] == [
        ("rain-1.png", "norain-1.png"), ("rain-7.png", None)
    ]
    assert orphans == ["norain-20.png", "rain-7.png"]


def test_folder_without_ground_truth_is_real_rain(tmp_path):
    touch(tmp_path, ["real_10.jpg", "real_9.PNG", "notes.txt"])
    pairs, orphans = find_pairs(tmp_path, ground_truth_required=False)
    assert [(pair.rainy.name, pair.clean) for pair in pairs] == [("real_9.PNG", None), ("real_10.jpg", None)]
    with pytest.raises(InputError, match="no rainy/clean pairs"):
        find_pairs(tmp_path)


# Packing


@pytest.mark.parametrize(
    "length, patch, stride",
    [(100, 100, 80), (101, 100, 80), (180, 100, 80), (321, 100, 80), (481, 100, 80), (50, 11, 7)],
)
def test_patches_reach_every_pixel_and_lie_inside(length, patch, stride):
    positions = patch_positions(length, patch, stride)
    assert positions[0] == 0 and positions[-1] == length - patch, "flush with both borders"
    assert all(0 < after - before <= stride for before, after in itertools.pairwise(positions))


def test_packed_patches_are_the_pictures(tmp_path):
    """Put every patch back where its origin says: both images must come out whole."""
    folder = make_pairs(tmp_path / "pairs", (3, 20), 48, 64)
    pairs, _ = find_pairs(folder)
    pack(pairs, tmp_path / "packed.h5", 32, 20)
    patches = PackedPatches(tmp_path / "packed.h5")
    canvases = {pair.rainy.name: [np.full((48, 64, 3), -1) for _ in range(2)] for pair in pairs}
    for index in range(len(patches)):
        number, top, left = patches.origin[index]
        for canvas, patch in zip(canvases[patches.names[number]], patches[index]):
            assert patch.dtype == np.uint8 and patch.shape == (32, 32, 3)
            canvas[top : top + 32, left : left + 32] = patch
        assert patches.describe(index) == f"{patches.names[number]} at row {top}, column {left}"
    for pair in pairs:
        for canvas, path in zip(canvases[pair.rainy.name], pair):
            assert np.array_equal(canvas, cv2.imread(str(path))[..., ::-1])
    with h5py.File(tmp_path / "packed.h5") as file:
        assert file["rainy"].dtype == file["clean"].dtype == np.uint8


def prepare(folder, packed_dir, **options):
    return prepare_patches(folder, packed_dir, **{"patch_size": 32, "stride": 20, **options})[0]


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
    assert "have changed" in packed_because()
    (pairs_dir / "rain-2.png").unlink()
    assert len(prepare(pairs_dir, packed_dir)) == 3 * 6
    assert "have changed" in packed_because()
    save(pairs_dir / "rain-1.png", photo(77))
    changed = prepare(pairs_dir, packed_dir)
    assert "have changed" in packed_because()
    assert np.array_equal(changed[0][0], read_rgb(pairs_dir / "rain-1.png")[:32, :32])
    os.utime(pairs_dir / "norain-3.png", ns=(0, 0))  # an edit may keep the size
    prepare(pairs_dir, packed_dir)
    assert "have changed" in packed_because()
    for option in ({"stride": 16}, {"patch_size": 24}, {"hold_out": 1}):
        prepare(pairs_dir, packed_dir, **option)
        assert "have changed" in packed_because(), option
    assert sorted(path.name for path in packed_dir.iterdir()) == [packed_path(pairs_dir, packed_dir).name]


def test_namesake_folders_have_their_own_packed_files(tmp_path):
    first, second = make_pairs(tmp_path / "a/RainTrainL"), make_pairs(tmp_path / "b/RainTrainL", (7,))
    assert len(prepare(first, tmp_path)) == 18 and len(prepare(second, tmp_path)) == 6
    assert len(prepare(first, tmp_path)) == 18


def test_held_out_pairs_are_not_packed(pairs_dir, tmp_path):
    patches, held_out = prepare_patches(pairs_dir, tmp_path / "packed", 32, 20, hold_out=2)
    assert len(held_out) == 2
    assert {pair.rainy.name for pair in held_out} | set(patches.names) == {f"rain-{n}.png" for n in (1, 2, 3)}
    assert len(patches.names) == 1


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("before", [False, True], ids=["first packing", "repacking"])
def test_interrupted_packing_leaves_what_was_there(pairs_dir, tmp_path, monkeypatch, before):
    packed_dir = tmp_path / "packed"
    packed_dir.mkdir()
    if before:
        prepare(pairs_dir, packed_dir)
    state, calls = contents(packed_dir), itertools.count()

    def read_then_fail(path):
        if next(calls) >= 3:
            raise Interrupted
        return read_rgb(path)

    with monkeypatch.context() as patch:
        patch.setattr(DerainDataset, "read_rgb", read_then_fail)
        with pytest.raises(Interrupted):
            prepare(pairs_dir, packed_dir, preprocess=True)
    assert contents(packed_dir) == state
    assert len(prepare(pairs_dir, packed_dir)) == 18


def test_killed_packing_leaves_what_was_there(pairs_dir, tmp_path):
    packed_dir = tmp_path / "packed"
    prepare(pairs_dir, packed_dir)
    state = contents(packed_dir)
    program = f"""
import time, DerainDataset
read_rgb = DerainDataset.read_rgb
def slow(path):
    if "3" in path.name:
        print("halfway", flush=True)
        time.sleep(60)
    return read_rgb(path)
DerainDataset.read_rgb = slow
DerainDataset.prepare_patches({str(pairs_dir)!r}, {str(packed_dir)!r}, 32, 20, preprocess=True)
"""
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while "halfway" not in child.stdout.readline():
        assert child.poll() is None
    child.kill()
    child.communicate()
    (name,) = state
    assert contents(packed_dir)[name] == state[name]
    # What the kill left over does not disturb the next run, which clears it away.
    assert len(prepare(pairs_dir, packed_dir, preprocess=True)) == 18
    assert list(contents(packed_dir)) == [name]


@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_cut_short_file_is_named(pairs_dir, tmp_path, share):
    prepare(pairs_dir, tmp_path / "packed")
    path = packed_path(pairs_dir, tmp_path / "packed")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match="cut short") as caught:
        prepare(pairs_dir, tmp_path / "packed")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_foreign_hdf5_file_is_named(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["numbers"] = np.arange(3)
    with pytest.raises(InputError, match="other.h5: .* no file of patches"):
        PackedPatches(tmp_path / "other.h5")


def test_size_mismatch_and_small_images_are_named(pairs_dir, tmp_path):
    with pytest.raises(InputError, match="rain-1.png is 64x48, smaller than --patch_size 50"):
        prepare(pairs_dir, tmp_path, patch_size=50)
    save(pairs_dir / "norain-2.png", photo(2, 48, 65))
    with pytest.raises(InputError, match=r"rain-2.png is 64x48 but its clean image norain-2.png is 65x48"):
        prepare(pairs_dir, tmp_path)
    assert not list(tmp_path.glob("*.h5*"))


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


def test_prenets_files_are_read_as_they_are(tmp_path, capsys):
    # More than ten: HDF5 lists the keys as "0", "1", "10", "11", "2", ...
    inputs, targets = write_prenet(tmp_path / "prenet", count=12)
    source, _ = prepare_patches(tmp_path / "prenet", tmp_path / "packed", 100, 80)
    assert "train_input.h5" in capsys.readouterr().out and not (tmp_path / "packed").exists()
    dataset = TrainingPatches([source], augment=False)
    assert len(dataset) == 12
    for index in range(12):
        rainy, clean, number = dataset[0, index]
        assert number == index and rainy.dtype == torch.float32
        assert np.array_equal(rainy, inputs[index]) and np.array_equal(clean, targets[index])


def test_prenets_files_of_different_lengths_are_refused(tmp_path):
    write_prenet(tmp_path / "prenet", count=5, targets=4)
    with pytest.raises(InputError, match="train_input.h5 has 5 patches but train_target.h5 has 4"):
        PReNetPatches(tmp_path / "prenet")


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
    return TrainingPatches([prepare(pairs_dir, tmp_path / "packed"), PReNetPatches(tmp_path / "prenet")], seed=3)


@pytest.mark.parametrize("workers, context", [(1, "fork"), (3, "fork"), (2, "spawn")])
def test_workers_do_not_change_the_batches(dataset, workers, context):
    dataset[0, 0]  # a handle is open in this process already, and must not be used in another
    expected = collect(dataset, 0)
    assert len(dataset) == 3 * 6 + 5 and len(expected) == 2 * (23 // 4)
    for batch, other in zip(expected, collect(dataset, workers, context), strict=True):
        assert all(torch.equal(tensor, same) for tensor, same in zip(batch, other, strict=True))
    dataset[0, 0]


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


def test_batches_cover_the_epoch_once_and_can_begin_in_the_middle():
    sampler = ShuffledBatches(22, 4, seed=1)
    epochs = []
    for epoch in range(2):
        sampler.start(epoch)
        epochs.append(list(sampler))
        assert len(sampler) == len(epochs[-1]) == 5
        items = [item for batch in epochs[-1] for item in batch]
        assert {e for e, _ in items} == {epoch} and len({index for _, index in items}) == 20
    assert [index for _, index in epochs[0][0]] != [index for _, index in epochs[1][0]]
    sampler.start(1, first=3)
    assert list(sampler) == epochs[1][3:] and len(sampler) == 2
    assert list(ShuffledBatches(22, 4, seed=2)) != epochs[0]
    assert len(list(ShuffledBatches(3, 4))) == 1, "fewer patches than a batch still train"


# Leakage


def test_planted_test_backgrounds_are_found(tmp_path, run):
    """Training pairs that show test background 0: as it is, as JPEG, mirrored, half size; and one that shows none."""
    background = photo(100, 96, 128)
    for number in range(4):
        clean = background if number == 2 else photo(200 + number, 96, 128)
        save(tmp_path / f"test/norain-{number}.png", clean)
        save(tmp_path / f"test/rainy/rain-{number}.png", with_rain(clean))
    damaged = cv2.imdecode(cv2.imencode(".jpg", background, [cv2.IMWRITE_JPEG_QUALITY, 25])[1], cv2.IMREAD_COLOR)
    assert np.abs(damaged.astype(int) - background).max() > 5
    views = [background, damaged, background[:, ::-1], cv2.resize(background, (64, 48)), photo(300, 96, 128)]
    for number, clean in enumerate(views):
        save(tmp_path / f"train/target/{number}.png", clean)
        save(tmp_path / f"train/input/{number}.png", with_rain(clean, 7))

    result = run("DerainDataset", "--check", tmp_path / "train", tmp_path / "test")
    assert result.status == 0
    lines = result.out.splitlines()
    assert len(lines) == 5 and "4 of 5 pairs" in lines[-1]
    for number, line in enumerate(lines[:4]):
        assert line.startswith(f"{number}.png") and "norain-2.png" in line

    patches = prepare(tmp_path / "train", tmp_path / "packed", exclude_test=[tmp_path / "test"])
    assert list(patches.names) == ["4.png"]


@pytest.mark.parametrize(
    "train, leaks",
    [("train/RainTrainL", 0), ("train/RainTrainH", 0), ("clean", 0), ("test/Rain100H", 20)],
)
def test_real_training_photographs_are_told_from_test_backgrounds(shared, train, leaks):
    """RainTrainL, RainTrainH's 18 pairs and the clean photographs have no test background; Rain100H has Rain100L's."""
    folder = shared / "data" / train
    pairs = [Pair(path, path) for path in folder.iterdir()] if train == "clean" else find_pairs(folder)[0]
    found = find_leaks(pairs, shared / "data/test/Rain100L")
    assert len(found) == leaks, found


def test_sources_of_several_patch_sizes_are_refused(pairs_dir, tmp_path):
    sources = [prepare_patches(pairs_dir, tmp_path, size, 20)[0] for size in (24,)]
    sources.append(prepare_patches(make_pairs(tmp_path / "others"), tmp_path, 32, 20)[0])
    with pytest.raises(InputError, match="patches of one size, found 24 px .* 32 px"):
        TrainingPatches(sources)


def test_holding_out_every_pair_is_refused(pairs_dir, tmp_path):
    with pytest.raises(InputError, match="3 pairs, of which 3 are held out"):
        prepare_patches(pairs_dir, tmp_path, 32, 20, hold_out=3)


def test_the_rainy_folder_is_found_from_inside(tmp_path, monkeypatch):
    save(tmp_path / "set/norain-1.png", photo(1))
    save(tmp_path / "set/rainy/rain-1.png", photo(2))
    monkeypatch.chdir(tmp_path / "set/rainy")
    (pair,), _ = find_pairs(".", ground_truth_required=False)
    assert pair.clean.name == "norain-1.png"


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
    sources = [prepare(folder, tmp_path / "packed", draw_rain=True) for folder in (clean_dir, pairs_dir)]
    assert [source.clean_only for source in sources] == [True, False]
    return TrainingPatches(sources, seed=3)


@pytest.mark.parametrize("workers, context", [(2, "fork"), (1, "spawn")])
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


def test_clean_photographs_need_rain(clean_dir, tmp_path, capsys):
    with pytest.raises(InputError, match="no rainy/clean pairs.*--rain_synth"):
        prepare(clean_dir, tmp_path / "packed")
    patches, held_out = prepare_patches(clean_dir, tmp_path / "packed", 32, 20, hold_out=1, draw_rain=True)
    assert "2 images without pairs, taken as clean photographs" in capsys.readouterr().out
    assert len(patches) == 2 * 6 and held_out == []
    rainy, clean = patches[0]
    assert np.array_equal(rainy, clean) and np.array_equal(clean, read_rgb(clean_dir / "5.jpg")[:32, :32])
    wet = TrainingPatches([patches], rain=TrainingRain(0.01, "heavy"))
    assert all((wet[0, index][0] > wet[0, index][1]).any() for index in range(12))
    with pytest.raises(InputError, match="--rain_mix: expected a --data_path with rainy/clean pairs"):
        TrainingPatches([patches], rain=TrainingRain(0.5, "heavy", 0.5))


def test_new_rain_leaves_orphans_of_pairs_out(pairs_dir, tmp_path, capsys):
    (pairs_dir / "norain-2.png").unlink()
    patches = prepare(pairs_dir, tmp_path / "packed", draw_rain=True)
    assert list(patches.names) == ["rain-1.png", "rain-3.png"] and not patches.clean_only
    assert "left out 1 without a partner: rain-2.png" in capsys.readouterr().out


def test_mixing_pairs_that_are_not_clean_plus_streaks_is_refused(pairs_dir, tmp_path):
    for number in (1, 2, 3):
        data = cv2.imencode(".jpg", cv2.imread(str(pairs_dir / f"rain-{number}.png")))[1]
        (pairs_dir / f"rain-{number}.png").write_bytes(data)
    patches = prepare(pairs_dir, tmp_path / "packed")
    TrainingPatches([patches], rain=TrainingRain(0.5, "heavy"))
    with pytest.raises(InputError, match="--rain_mix: rain-1.png at row 0, column 0 is not its clean image plus"):
        TrainingPatches([patches], rain=TrainingRain(mix=0.5))
