"""rain.py: the rain model holds to the pixel, the files are what the other scripts find."""
import numpy as np
import pytest

from conftest import contents, photo, save
from DerainDataset import find_pairs
from rain import PRESETS, add_rain, streak_layer
from utils import read_rgb


@pytest.fixture
def photographs(tmp_path):
    for number in (1, 2, 10):
        save(tmp_path / f"clean/{number}.png", photo(number, 60, 90))
    return tmp_path / "clean"


@pytest.mark.parametrize("layout", ["train", "test"])
def test_written_pairs_are_found_and_follow_the_model(run, photographs, tmp_path, layout):
    out = tmp_path / "out"
    assert run("rain", "--clean", photographs, "--out", out, "--layout", layout, "--per_image", 2).status == 0
    pairs, orphans = find_pairs(out)
    assert len(pairs) == 6 and orphans == []
    layers = []
    for pair, source in zip(pairs, (1, 1, 2, 2, 10, 10)):
        rainy, clean = (read_rgb(path).astype(int) for path in pair)
        assert np.array_equal(clean, read_rgb(photographs / f"{source}.png")), "natural order, nothing lost"
        # Where no channel is full, S is what was added, to all three alike; elsewhere it is at least that.
        added = rainy - clean
        layer = added.max(2)
        assert (added >= 0).all() and layer.mean() > 1
        assert np.array_equal(rainy, np.minimum(clean + layer[..., None], 255))
        layers.append(layer)
    assert all(not np.array_equal(a, b) for a, b in zip(layers, layers[1:]))


def test_seed_decides(run, photographs, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        run("rain", "--clean", photographs, "--out", tmp_path / name, "--seed", seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert len(a) == 6 and a == b
    assert all((a[name] == c[name]) == name.startswith("norain") for name in a)


@pytest.mark.parametrize("preset, tolerance", [("light", 1.5), ("heavy", 6)])
def test_layers_have_their_presets_mean(preset, tolerance):
    """The last pass may overshoot the drawn mean a little."""
    low, high = PRESETS[preset].mean
    layers = [streak_layer(160, 200, preset, np.random.default_rng(seed)) for seed in range(24)]
    assert all(layer.dtype == np.uint8 and layer.shape == (160, 200) for layer in layers)
    means = np.array([layer.mean() for layer in layers])
    assert means.min() >= low - 0.5 and means.max() <= high + tolerance, means
    assert means.min() < low + (high - low) / 4 and means.max() > high - (high - low) / 4, "the range is used"


def test_streaks_are_mostly_vertical():
    layer = streak_layer(200, 200, "heavy", np.random.default_rng(3)).astype(float)
    across, along = np.abs(np.diff(layer, axis=1)).mean(), np.abs(np.diff(layer, axis=0)).mean()
    assert across > 2 * along


def test_add_rain_saturates():
    clean = np.array([[[0, 100, 250]]], np.uint8)
    assert add_rain(clean, np.array([[10]], np.uint8)).tolist() == [[[10, 110, 255]]]
    assert add_rain(clean, np.array([[255]], np.uint8)).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("occupied", ["a file inside", "a file instead"])
def test_folder_in_use_is_refused(refused, photographs, tmp_path, occupied):
    out = tmp_path / "out"
    save(out / "mine.png" if occupied == "a file inside" else out.with_suffix(".png"), photo(1))
    target = out if occupied == "a file inside" else out.with_suffix(".png")
    before = contents(tmp_path)
    refused("rain", "--clean", photographs, "--out", target, names=["--out", target])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("option", [("--seed", -1), ("--per_image", 0), ("--preset", "hail")])
def test_bad_options_are_named(refused, photographs, tmp_path, option):
    refused("rain", "--clean", photographs, "--out", tmp_path / "out", *option, names=[option[0]])
    assert not (tmp_path / "out").exists()
