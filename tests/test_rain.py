"""rain.py: the rain model holds to the pixel, the files are what the other scripts find."""
from dataclasses import replace

import numpy as np
import pytest

import rain_stats
from conftest import ROOT, contents, photo, save, with_rain
from images import is_marked, read_rgb
from layouts import find_pairs
from pairs import read_pair
from rain import (
    EXACT, PRESETS, TrainingRain, add_rain, draw_pass, draw_rain, extract_streaks, fit_streaks, follows_model,
    streak_layer, vary_streaks,
)


@pytest.fixture
def photographs(tmp_path):
    for number in (1, 2, 10):
        save(tmp_path / f"clean/{number}.png", photo(number, 60, 90))
    return tmp_path / "clean"


@pytest.mark.parametrize("layout", ["train", "test"])
def test_written_pairs_are_found_and_follow_the_model(run, photographs, tmp_path, layout):
    out = tmp_path / "out"
    assert run("rain", "--clean", photographs, "--out", out, "--layout", layout, "--per_image", 2).status == 0
    pairs, alone, unused = find_pairs(out)
    assert len(pairs) == 6 and not alone and not unused
    layers = []
    for pair, source in zip(pairs, (1, 1, 2, 2, 10, 10)):
        rainy, clean = (image.astype(int) for image in read_pair(pair))
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


@pytest.mark.parametrize("preset", EXACT)
def test_layers_have_their_presets_mean(preset):
    """The parts add up. Streaks lie at random, so that a layer's mean is the drawn one only about."""
    low, high = np.sum([part.mean for part in PRESETS[preset].parts if part.share == 1], axis=0)
    layers = [streak_layer(160, 200, preset, np.random.default_rng(seed)) for seed in range(40)]
    assert all(layer.dtype == np.uint8 and layer.shape == (160, 200) for layer in layers)
    means = np.array([layer.mean() for layer in layers])
    assert means.min() >= low / 2 and means.max() <= 1.3 * high, means
    assert abs(means.mean() - (low + high) / 2) < (high - low) / 8, means.mean()
    assert means.min() < low + (high - low) / 4 and means.max() > high - (high - low) / 3, "the range is used"


@pytest.mark.parametrize("angle", [-35, -5, 0, 20])
def test_a_pass_has_the_direction_length_level_and_mean_that_it_is_told(angle):
    part = replace(PRESETS["heavy"].parts[0], scatter=0, width=(3,), blur=(0.7, 0.7))
    layer = draw_pass((300, 340), angle, 40, 100, 10, part, np.random.default_rng(1))
    assert layer.shape == (300, 340) and 0 <= layer.min() and layer.max() == pytest.approx(100, abs=3)
    found, _ = rain_stats.streak_angle(layer)
    assert found == pytest.approx(angle, abs=2)
    assert layer.mean() == pytest.approx(10, rel=0.15)
    for border in (layer[:20], layer[-20:], layer[:, :20], layer[:, -20:]):
        assert border.mean() == pytest.approx(10, rel=0.6), "no dry border"
    upright = draw_pass((300, 340), 0, 40, 100, 1, part, np.random.default_rng(1)) > 50
    runs = np.diff(np.flatnonzero(np.diff(np.pad(upright, ((1, 1), (0, 0))).T.ravel())))[::2]
    assert np.median(runs) == 40


def test_streaks_are_mostly_vertical():
    layer = streak_layer(200, 200, "heavy", np.random.default_rng(3)).astype(float)
    across, along = np.abs(np.diff(layer, axis=1)).mean(), np.abs(np.diff(layer, axis=0)).mean()
    assert across > 2 * along


def test_rain_as_photographs_show_it_is_coloured_and_misty():
    clean = np.full((120, 150, 3), 60, np.uint8)
    for seed in range(8):
        rainy = draw_rain(clean, "real", np.random.default_rng(seed)).astype(float)
        assert np.array_equal(rainy, draw_rain(clean, "real", np.random.default_rng(seed)))
        mist = np.percentile(rainy, 1) - 60
        assert -1 < mist <= 0.2 * (230 - 60) + 1 and rainy.mean() > 60 + mist
    assert np.ptp(rainy - rainy[..., :1]) > 1, "the channels differ"
    for preset in EXACT:
        assert follows_model(draw_rain(clean, preset, np.random.default_rng(1)), clean)


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


@pytest.mark.parametrize("option", [
    ("--seed", -1), ("--per_image", 0), ("--preset", "hail"), ("--streaks", ".", "--preset", "light"),
    ("--preset", "light", "heavy"),
])
def test_bad_options_are_named(refused, photographs, tmp_path, option):
    refused("rain", "--clean", photographs, "--out", tmp_path / "out", *option, names=[option[0]])
    assert not (tmp_path / "out").exists()


def test_the_rainy_images_of_pairs_are_no_photographs(run, pairs_dir, tmp_path):
    save(pairs_dir / "rain-7.png", photo(7))
    save(pairs_dir / "cat.png", photo(8))
    result = run("rain", "--clean", pairs_dir, "--out", tmp_path / "out")
    assert result.status == 0 and "4 pairs from 4 photographs" in result.out, result
    assert f"{pairs_dir}: 3 rainy images of pairs left out\n" in result.out
    assert "left out 1 (no pair by their names): rain-7.png" in result.out
    for pair, number in zip(find_pairs(tmp_path / "out").pairs, (8, 1, 2, 3), strict=True):
        assert np.array_equal(read_rgb(pair.clean), photo(number))


def test_a_folder_of_rainy_images_alone_has_no_photographs(refused, tmp_path, monkeypatch):
    save(tmp_path / "set/norain-001.png", photo(1))
    save(tmp_path / "set/rainy/rain-001.png", with_rain(photo(1)))
    save(tmp_path / "set/rainy/rain-001 copy.png", with_rain(photo(1)))
    monkeypatch.chdir(tmp_path)
    for folder in ("set/rainy", tmp_path / "set/rainy"):
        refused("rain", "--clean", folder, "--out", "out", names=[folder, "images without rain"])
    assert not (tmp_path / "out").exists()


def test_clean_images_beside_a_folder_of_rainy_ones_are_all_drawn_on(run, tmp_path):
    for number in (1, 2):
        save(tmp_path / f"set/norain-00{number}.png", photo(number))
    save(tmp_path / "set/rainy/rain-001.png", with_rain(photo(1)))
    result = run("rain", "--clean", tmp_path / "set", "--out", tmp_path / "out")
    assert result.out.splitlines()[-1].startswith("2 pairs from 2 photographs") and "left out" not in result.out, result


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "empty folder"])
def test_a_damaged_photograph_leaves_no_part_of_a_set(run, refused, photographs, tmp_path, there):
    last = photographs / "10.png"
    last.write_bytes(last.read_bytes()[:200])
    if there:
        (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    command = "rain", "--clean", photographs, "--out", tmp_path / "out", "--layout", "test"
    refused(*command, names=[last])
    assert sorted(tmp_path.rglob("*")) == before
    save(last, photo(10, 60, 90))
    assert run(*command).status == 0 and len(find_pairs(tmp_path / "out").pairs) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "out"]


# Streaks of real pairs


def test_extraction_is_exact_below_saturation():
    rng = np.random.default_rng(0)
    clean, streaks = rng.integers(0, 256, (40, 50, 3), np.uint8), rng.integers(0, 120, (40, 50), np.uint8)
    rainy = add_rain(clean, streaks)
    found = extract_streaks(rainy, clean)
    known = rainy.min(2) < 255
    assert found.dtype == np.uint8 and 0.5 < known.mean() < 1
    assert np.array_equal(found[known], streaks[known]) and (found <= streaks).all()
    assert follows_model(rainy, clean)
    for change in (-1, 1):  # of one channel of one pixel that is neither 0 nor full
        y, x = np.argwhere((rainy.min(2) > 0) & (rainy.max(2) < 255))[0]
        other = rainy.copy()
        other[y, x, 1] = int(other[y, x, 1]) + change
        assert not follows_model(other, clean)
    darker = np.maximum(clean, 1) - np.uint8(1)
    assert not follows_model(darker, clean) and extract_streaks(darker, clean).max() == 0


@pytest.mark.parametrize("data_set", ["RainTrainL", "RainTrainH"])
def test_real_pairs_are_clean_plus_streaks(shared, data_set):
    for pair in find_pairs(shared / "data/train" / data_set).pairs[::4][:6]:
        rainy, clean = read_pair(pair)
        assert np.array_equal(add_rain(clean, extract_streaks(rainy, clean)), rainy), pair.rainy


@pytest.mark.parametrize("size", [(30, 40), (20, 40), (7, 9), (75, 100), (31, 8)])
def test_streaks_are_cut_tiled_and_mirrored_but_not_resampled(size):
    streaks = np.arange(30 * 40, dtype=np.uint16).reshape(30, 40)
    views = set()
    for seed in range(12):
        fitted = fit_streaks(streaks, *size, np.random.default_rng(seed))
        assert fitted.shape == size
        mirrored = fitted[0, 1] < fitted[0, 0] if fitted[0, 0] % 40 not in (0, 39) else fitted[0, 2] < fitted[0, 1]
        plain = fitted[:, ::-1] if mirrored else fitted
        rows, columns = (plain[0, 0] // 40 + np.arange(size[0])) % 30, (plain[0, 0] % 40 + np.arange(size[1])) % 40
        assert np.array_equal(plain, rows[:, None] * 40 + columns)
        views.add((bool(mirrored), int(plain[0, 0])))
    assert {mirrored for mirrored, _ in views} == {False, True}
    assert len(views) > 2 or size == (30, 40), "cut at random"


def test_streaks_of_pairs_fall_on_other_photographs(run, photographs, tmp_path):
    """Pairs with rain of 90 grey levels; what is written must have just that rain, and the seed decide where."""
    for number in (1, 2):
        dark = photo(number, 30, 40) // 2
        save(tmp_path / f"pairs/norain-{number}.png", dark)
        save(tmp_path / f"pairs/rain-{number}.png", with_rain(dark, number))
    options = ("--clean", photographs, "--streaks", tmp_path / "pairs", "--per_image", 2)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = run("rain", *options, "--out", tmp_path / name, "--seed", seed)
        assert result.status == 0, result
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and a != c
    for pair in find_pairs(tmp_path / "a").pairs:
        rainy, clean = read_pair(pair)
        streaks = extract_streaks(rainy, clean)
        assert follows_model(rainy, clean) and 0 < (streaks == 90).mean() < 0.5
        assert set(streaks[rainy.min(2) < 255]) == {0, 90}


def test_pairs_that_are_not_clean_plus_streaks_are_named(refused, photographs, tmp_path):
    coloured = photo(1)
    coloured[..., 0] //= 2
    save(tmp_path / "pairs/rain-1.png", photo(1))
    save(tmp_path / "pairs/norain-1.png", coloured)
    refused(
        "rain", "--clean", photographs, "--out", tmp_path / "out", "--streaks", tmp_path / "pairs",
        names=["--streaks", "rain-1.png", "one grey layer"],
    )
    refused("rain", "--clean", photographs, "--out", tmp_path / "out", "--streaks", photographs, names=["--streaks"])
    refused("rain_stats", "--data_path", tmp_path / "pairs", names=["--data_path", "rain-1.png", "one grey layer"])


def test_pairs_of_two_sizes_are_named(refused, photographs, tmp_path):
    save(tmp_path / "pairs/rain-1.png", photo(1))
    save(tmp_path / "pairs/norain-1.png", photo(1)[:-2])
    refused(
        "rain", "--clean", photographs, "--out", tmp_path / "out", "--streaks", tmp_path / "pairs",
        names=["rain-1.png", "64x48", "norain-1.png", "64x46"],
    )


def test_images_that_give_no_rain_are_named(run, photographs, pairs_dir, tmp_path):
    save(pairs_dir / "rain-9.png", photo(9))
    save(pairs_dir / "holiday.png", photo(8))
    for script, *options in (
        ("rain", "--clean", photographs, "--out", tmp_path / "out", "--streaks", pairs_dir),
        ("rain_stats", "--data_path", pairs_dir, "--output", tmp_path / "stats/rain"),
    ):
        result = run(script, *options)
        assert result.status == 0 and "left out 2" in result.out, result
        assert "rain-9.png" in result.out and "holiday.png" in result.out


# Rain on training patches


def rains(rain, clean_only, count=200):
    """{"own", "donor" or "drawn": how often} of a patch whose own rain is 50 and whose donor's is 70 everywhere."""
    clean = np.full((16, 16, 3), 100, np.uint8)
    own, donor = clean + np.uint8(0 if clean_only else 50), (clean + np.uint8(70), clean)
    found = {"own": 0, "donor": 0, "drawn": 0}
    for seed in range(count):
        rainy = rain(own, clean, clean_only, lambda: donor, np.random.default_rng(seed))
        names = {own[0, 0, 0]: "own", donor[0][0, 0, 0]: "donor"}
        found[names.get(rainy.min(), "drawn") if rainy.min() == rainy.max() else "drawn"] += 1
    return found


def test_probabilities_of_rain():
    assert rains(TrainingRain(synth=1, preset="heavy"), False, 20) == {"own": 0, "donor": 0, "drawn": 20}
    assert rains(TrainingRain(mix=1), False, 20) == {"own": 0, "donor": 20, "drawn": 0}
    shares = rains(TrainingRain(0.5, "heavy", 0.3), False)
    assert 75 < shares["drawn"] < 125 and 40 < shares["donor"] < 80 and 20 < shares["own"] < 60, shares
    # Photographs without rain always get some: all drawn, all mixed, or in the proportion of both.
    assert rains(TrainingRain(0.1, "heavy"), True, 20) == {"own": 0, "donor": 0, "drawn": 20}
    assert rains(TrainingRain(mix=0.1), True, 20) == {"own": 0, "donor": 20, "drawn": 0}
    shares = rains(TrainingRain(0.3, "heavy", 0.1), True)
    assert shares["own"] == 0 and 125 < shares["drawn"] < 175, shares


def test_either_preset_is_drawn():
    clean = np.zeros((60, 60, 3), np.uint8)
    means = [
        TrainingRain(1, "both")(clean, clean, True, None, np.random.default_rng(seed)).mean() for seed in range(40)
    ]
    light = sum(mean < 15 for mean in means)
    assert 8 < light < 32 and max(means) > 40


def test_mixed_rain_of_floats_is_that_of_bytes():
    clean = photo(4)
    rainy = with_rain(clean)
    rain, rng = TrainingRain(mix=1), np.random.default_rng
    expected = rain(clean, clean, True, lambda: (rainy, clean), rng(0))
    floats = [image.astype(np.float32) / 255 for image in (clean, rainy)]
    assert np.array_equal(rain(floats[0], floats[0], True, lambda: floats[::-1], rng(0)), expected)
    assert np.array_equal(expected, rainy)


def varied(streaks, lost=None, count=20):
    lost = np.zeros(streaks.shape, bool) if lost is None else lost
    return [vary_streaks(streaks, lost, np.random.default_rng(seed)) for seed in range(count)]


@pytest.fixture
def one_direction(monkeypatch):
    monkeypatch.setattr("rain.VARY_JOINED", 0)


def test_varied_rain_is_sheared_stretched_and_scaled_in_level(one_direction):
    streaks = np.zeros((60, 120), np.uint8)
    streaks[:, ::10] = 100
    results = varied(streaks)
    assert all(result.shape == streaks.shape and result.dtype == np.uint8 for result in results)
    levels = [result.max() for result in results]
    assert min(levels) < 90 and 110 < max(levels) <= 135
    # A slope shifts the last row against the first; a stretch changes the number of streaks in a row.
    crossings = [((row[1:] > 40) & (row[:-1] <= 40)).sum() for row in (result[0] for result in results)]
    assert 9 <= min(crossings) < 11 and 13 < max(crossings) <= 16
    upright = np.abs(np.diff(np.float32(results), axis=1)).max((1, 2)) == 0
    assert not upright.any()


def test_varied_rain_is_lengthened_and_shortened(one_direction):
    streaks = np.zeros((200, 40), np.uint8)
    streaks[80:120] = 100
    lengths = [(result[:, 20] > 40).sum() for result in varied(streaks, count=60)]
    assert 24 <= min(lengths) < 30 and 54 < max(lengths) <= 65


def test_some_varied_rain_falls_in_two_directions():
    y, x = np.mgrid[:96, :96]
    streaks = np.where((x + y // 4) % 12 == 0, 200, 0).astype(np.uint8)  # 14 degrees to one side
    both = 0
    for result in varied(streaks, count=60):
        power = np.abs(np.fft.fft2(result - result.mean())) ** 2
        frequency = np.fft.fftfreq(96)
        product = np.sign(frequency[:, None] * frequency)
        left, right = power[product > 0].sum(), power[product < 0].sum()
        both += min(left, right) > 0.3 * max(left, right)
    assert 12 < both < 32, "about 0.35 of them"


def test_varied_rain_is_turned_upside_down_half_of_the_time(one_direction):
    streaks = np.zeros((60, 60), np.uint8)
    streaks[:20] = 100
    above = [result[:8].any() for result in varied(streaks, count=40)]
    assert 10 < sum(above) < 30


def test_varied_rain_fills_in_what_was_lost(one_direction):
    streaks, lost = np.full((40, 40), 100, np.uint8), np.zeros((40, 40), bool)
    lost[10:20, 10:20] = True
    streaks[lost] = 3
    whole = [result.min() >= 74 and np.ptp(result) <= 1 for result in varied(streaks, lost)]
    assert sum(whole) > 15, "two other places seldom hide both behind the same white"
    assert all(result.min() < 20 for result in varied(streaks))


def test_only_mixed_rain_is_varied():
    clean = photo(4)
    rainy = with_rain(clean)
    rain, rng = TrainingRain(mix=0.5, vary=1), np.random.default_rng
    assert np.array_equal(rain(rainy, clean, False, None, rng(0)), rainy), "this seed keeps the patch's own rain"
    other = rain(clean, clean, True, lambda: (rainy, clean), rng(0))
    assert not np.array_equal(other, rainy) and follows_model(other, clean)
    some = TrainingRain(mix=1, vary=0.4)
    same = [np.array_equal(some(clean, clean, True, lambda: (rainy, clean), rng(k)), rainy) for k in range(50)]
    assert 20 < sum(same) < 40


# Against real rain


@pytest.mark.parametrize("angle", [-20, 0, 12])
def test_angle_and_coherence_of_parallel_streaks(angle):
    """Stripes that lean like / where the angle is positive."""
    y, x = np.mgrid[:120, :120]
    across = x * np.cos(np.radians(angle)) + y * np.sin(np.radians(angle))
    stripes = 100 + 90 * np.sin(across / 3)
    found, coherence = rain_stats.streak_angle(stripes)
    assert found == pytest.approx(angle, abs=1) and coherence > 0.97
    _, coherence = rain_stats.streak_angle(np.random.default_rng(0).integers(0, 255, (120, 120)))
    assert coherence < 0.1


@pytest.mark.parametrize("angle", [-40, 0, 15])
def test_spread_and_length_of_streaks(angle):
    """Of streaks of one length and direction, and of noise, which has none."""
    part = replace(PRESETS["heavy"].parts[0], scatter=0, fade=0, width=(3,), blur=(0.7, 0.7))
    streaks = draw_pass((321, 481), angle, 50, 100, 15, part, np.random.default_rng(0)).astype(np.uint8)
    spread, length = rain_stats.spread_and_length(streaks)
    # The autocorrelation of a line of n px falls to half after n / 2. A line that leans is longer.
    assert spread <= 8 and length == pytest.approx(25 / np.cos(np.radians(angle)), abs=4), (spread, length)
    crossed = streaks + draw_pass(streaks.shape, angle + 20, 50, 100, 15, part, np.random.default_rng(1))
    assert 17 <= rain_stats.spread_and_length(crossed)[0] <= 23
    assert rain_stats.spread_and_length(np.random.default_rng(0).integers(0, 255, (160, 160)))[0] > 60


def test_comparison_is_written(run, pairs_dir, tmp_path):
    result = run("rain_stats", "--data_path", pairs_dir, "--output", tmp_path / "out/rain")
    assert result.status == 0, result
    table = (tmp_path / "out/rain.md").read_text()
    assert [line.split(" | ")[1] for line in table.splitlines()[-3:]] == ["real", *EXACT]
    means = [extract_streaks(*read_pair(pair)).mean() for pair in find_pairs(pairs_dir).pairs]
    assert f"| pairs | real | 3 | {np.mean(means):.1f} (" in table and f"--output {tmp_path / 'out/rain'}" in table
    assert read_rgb(tmp_path / "out/rain.jpg").shape[1] == rain_stats.WIDTH
    assert run("rain_stats", "--data_path", pairs_dir, "--output", tmp_path / "out/rain").status == 0, "its own, anew"


@pytest.mark.parametrize("height, width, rain, expected", [
    (48, 64, False, "does not show on norain-3.png"), (10, 64, True, "64x10; expected images of 11 px or more"),
    (64, 10, True, "10x64"),
])
def test_pairs_that_cannot_be_compared_are_named(refused, pairs_dir, tmp_path, height, width, rain, expected):
    clean = photo(3, height, width)
    save(pairs_dir / "norain-3.png", clean)
    save(pairs_dir / "rain-3.png", with_rain(clean) if rain else clean)
    before = contents(tmp_path)
    arguments = "--data_path", pairs_dir, "--output", tmp_path / "out/rain"
    refused("rain_stats", *arguments, names=[pairs_dir / "rain-3.png", expected])
    assert contents(tmp_path) == before


def test_comparison_is_only_printed_without_a_place_for_it(run, pairs_dir, tmp_path, monkeypatch):
    """In a clone, the repository's own table stays as it is."""
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    result = run("rain_stats", "--data_path", pairs_dir)
    assert result.status == 0 and "| pairs | real | 3 |" in result.out and contents(tmp_path) == before, result
    assert is_marked(ROOT / "results/rain.jpg"), "or the command of results/rain.md is refused"


@pytest.mark.slow
@pytest.mark.parametrize("preset, data_set", [("light", "RainTrainL"), ("heavy", "RainTrainH"), ("heavy", "RainHeavy")])
def test_presets_look_like_the_real_sets(shared, preset, data_set):
    """All that rain_stats.py measures, of 18 layers on the backgrounds of real pairs."""
    pairs = find_pairs(shared / "data/train" / data_set).pairs
    real, drawn = [], []
    for number, pair in enumerate(pairs[:: len(pairs) // 18][:18]):
        rainy, clean = (image[:240, :240] for image in read_pair(pair))
        streaks = streak_layer(240, 240, preset, np.random.default_rng(number))
        real.append(rain_stats.describe(rainy, clean))
        drawn.append(rain_stats.describe(add_rain(clean, streaks), clean))
    real, drawn = np.abs(real), np.abs(drawn)
    # Half the real spread between 10th and 90th percentile is how far the averages may lie apart.
    low, high = np.percentile(real, (10, 90), axis=0)
    assert (np.abs(np.median(drawn, 0) - np.median(real, 0)) <= (high - low) / 2).all(), (drawn.mean(0), real.mean(0))
