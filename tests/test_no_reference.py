"""NIQE and PIQE against values of other programs, by their definitions, and as test.py reports them."""
import csv
import json

import cv2
import numpy as np
import pytest
import skimage.data

import metrics
from conftest import make_pairs, photo, save
from metrics import fit_aggd, imresize, measure_alone, niqe, piqe


@pytest.fixture(scope="module")
def astronaut():
    return skimage.data.astronaut()


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_golden_values(shared, name):
    golden = json.loads((shared / "reference/no_reference/golden.json").read_text())["skimage"][name]
    assert measure_alone(getattr(skimage.data, name)()) == pytest.approx(golden, abs=0.01)


def test_parameters_are_the_published_ones_wherever_the_program_is_started(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics.niqe_parameters.cache_clear()
    mean, covariance = metrics.niqe_parameters()
    published = np.load(shared / "reference/no_reference/niqe_pris_params.npz")
    assert np.array_equal(mean, published["mu_pris_param"][0])
    assert np.array_equal(covariance, published["cov_pris_param"])
    assert "University of Texas at Austin" in metrics.NIQE_PARAMETERS.with_suffix(".txt").read_text()


# imresize


def test_half_size_by_the_weights_of_the_kernel():
    """At half the size the kernel is twice as wide: f(0.25), f(0.75), f(1.25), f(1.75), halved, on both sides."""
    weights = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256
    line = np.random.default_rng(0).random(11)
    mirrored = np.pad(line, 4, "symmetric")
    expected = [weights @ mirrored[start : start + 8] for start in range(1, 13, 2)]
    assert imresize(line[:, None], 0.5) == pytest.approx(np.array(expected)[:, None])
    grid = np.outer(line, line[:6])
    assert imresize(grid, 0.5) == pytest.approx(np.outer(expected, imresize(line[:6][:, None], 0.5)))


@pytest.mark.parametrize("scale, size", [(0.5, (4, 6)), (0.3, (3, 4)), (1, (7, 11)), (2, (14, 22))])
def test_sizes_and_what_is_preserved(scale, size):
    flat = np.full((7, 11), 3.7)
    assert imresize(flat, scale) == pytest.approx(np.full(size, 3.7))
    if scale == 1:
        noise = np.random.default_rng(0).random((7, 11))
        assert imresize(noise, scale) == pytest.approx(noise)


def test_a_slope_stays_a_slope():
    slope = np.arange(40.0)[:, None] * np.ones(40)
    assert imresize(slope, 0.5)[3:-3, 5] == pytest.approx(2 * np.arange(3, 17) + 0.5)


# The fitted distribution


@pytest.mark.parametrize("shape, left, right", [(2, 1, 1), (2, 0.5, 1.5), (1, 2, 1), (0.5, 1, 1)])
def test_the_fit_finds_the_parameters_of_samples(shape, left, right):
    random = np.random.default_rng(0)
    size = random.gamma(1 / shape, 1, 400_000) ** (1 / shape)  # of a generalised Gaussian of scale 1
    sample = np.where(random.random(size.size) < left / (left + right), -left * size, right * size)
    assert fit_aggd(sample) == pytest.approx((shape, left, right), rel=0.03)


# Kinds of images


def test_kinds_of_one_image_have_one_value(astronaut):
    grey = cv2.cvtColor(astronaut, cv2.COLOR_RGB2GRAY)[:200, :300]
    value = measure_alone(grey)
    assert all(np.isfinite(list(value.values())))
    rgb = np.dstack([grey] * 3)
    alpha = np.random.default_rng(0).integers(0, 256, (*grey.shape, 1), np.uint8)
    for same in (grey[..., None], rgb, np.concatenate((rgb, alpha), 2), rgb.astype(np.uint16) * 257):
        assert measure_alone(same) == value


def test_what_does_not_matter(astronaut):
    part = astronaut[:192, :288]
    assert niqe(part[::-1, ::-1]) == pytest.approx(niqe(part), abs=1e-9), "turned upside down"
    assert piqe(part[::-1]) == pytest.approx(piqe(part), abs=1e-9), "mirrored"
    wider = np.pad(part, [(0, 90), (0, 95), (0, 0)], "edge")
    assert niqe(wider) == pytest.approx(niqe(part), abs=1e-9), "what is no whole block"


def test_blur_and_noise_are_seen(astronaut):
    noise = np.random.default_rng(0).normal(0, 25, astronaut.shape)
    noisy = np.clip(astronaut + noise, 0, 255).astype(np.uint8)
    blurred = cv2.GaussianBlur(astronaut, (0, 0), 3)
    for metric in (niqe, piqe):
        assert min(metric(noisy), metric(blurred)) > metric(astronaut) + 2


@pytest.mark.parametrize("height, width", [(1, 1), (1, 500), (95, 400), (96, 191), (191, 96)])
def test_too_small_for_niqe(height, width):
    assert np.isnan(niqe(photo(1, height, width)))


@pytest.mark.parametrize("height, width", [(1, 1), (15, 100), (100, 15)])
def test_too_small_for_piqe(height, width):
    assert np.isnan(piqe(photo(1, height, width)))


@pytest.mark.parametrize("metric, size", [(niqe, (96, 192)), (niqe, (192, 96)), (piqe, (16, 16)), (piqe, (17, 16))])
def test_just_large_enough(metric, size):
    assert np.isfinite(metric(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)))


@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_one_colour_has_no_value(level):
    flat = np.full((200, 300, 3), level, np.uint8)
    assert np.isnan(niqe(flat)) and np.isnan(piqe(flat))


def test_blocks_of_one_colour_do_not_count(astronaut):
    part = astronaut[:96, :192].copy()
    part[:, 170:] = 90
    assert niqe(np.pad(part, [(0, 0), (0, 192), (0, 0)], constant_values=90)) == pytest.approx(niqe(part), abs=1e-9)
    part[:, 50:] = 90
    assert np.isnan(niqe(part)), "only one block has structure"


@pytest.mark.parametrize("image", [
    np.zeros((200, 200, 3)), np.full((200, 200), np.nan), np.zeros((200, 200, 2), np.uint8), np.zeros(200, np.uint8),
    np.zeros((2, 200, 200, 3), np.uint8), np.zeros((0, 200, 3), np.uint8), np.zeros((200, 200), bool),
], ids=["float", "nan", "two channels", "a line", "a batch", "empty", "bool"])
def test_other_arrays_are_refused(image):
    for metric in (niqe, piqe):
        with pytest.raises(ValueError, match="expected uint8 or uint16"):
            metric(image)


# test.py


@pytest.fixture
def measured(run, checkpoint, tmp_path):
    """measured(folder, *flags) -> (rows of metrics.csv by image, the last one as "average", result)."""

    def start(folder, *flags, status=0):
        output = tmp_path / "results"
        options = flags if "--results_path" in flags else ("--save_path", checkpoint, *flags)
        result = run("test", "--test_data_path", folder, "--output_path", output, "--no_reference", *options)
        assert result.status == status, result
        with open(output / "metrics.csv", newline="") as file:
            rows = {row["image"].partition(" of ")[0]: row for row in csv.DictReader(file)}
        return rows, result

    return start


def numbers(row, *names):
    return [float(row[name]) for name in names]


COLUMNS = "niqe_rainy", "niqe_derained", "piqe_rainy", "piqe_derained"


def test_report_with_ground_truth(measured, tmp_path):
    make_pairs(tmp_path / "pairs", (1, 2), 96, 192)
    rows, result = measured(tmp_path / "pairs", "--device", "cpu")
    for name in ("rain-1.png", "rain-2.png"):
        rainy, derained = (cv2.imread(str(tmp_path / folder / name))[..., ::-1] for folder in ("pairs", "results"))
        values = [value for metric in (niqe, piqe) for value in (metric(rainy), metric(derained))]
        assert numbers(rows[name], *COLUMNS) == pytest.approx(values, abs=1e-6)
    averages = [np.mean([float(rows[f"rain-{k}.png"][name]) for k in (1, 2)]) for name in ("psnr_y", *COLUMNS)]
    assert numbers(rows["average"], "psnr_y", *COLUMNS) == pytest.approx(averages, abs=1e-5)
    assert "NIQE: rainy -> derained, lower is better, over 2 images\n" in result.out
    line = next(line for line in result.out.splitlines() if line.startswith("rain-1.png"))
    assert " dB " in line and f"NIQE {float(rows['rain-1.png']['niqe_rainy']):7.4f} -> " in line and " PIQE " in line


def test_images_without_a_value_are_named_and_not_averaged(measured, tmp_path):
    save(tmp_path / "real/large.png", np.random.default_rng(0).integers(0, 256, (96, 200, 3), np.uint8))
    save(tmp_path / "real/small.png", np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8))
    save(tmp_path / "real/dot.png", photo(1, 1, 1))
    rows, result = measured(tmp_path / "real", "--device", "cpu")
    assert rows["small.png"]["niqe_rainy"] == rows["dot.png"]["piqe_derained"] == "nan"
    assert rows["average"]["niqe_derained"] == rows["large.png"]["niqe_derained"]
    mean = np.mean([float(rows[name]["piqe_rainy"]) for name in ("large.png", "small.png")])
    assert float(rows["average"]["piqe_rainy"]) == pytest.approx(mean, abs=1e-6)
    assert "over 1 image; none for dot.png, small.png (under 192x96 px, or without structure)" in result.out
    assert "over 2 images; none for dot.png (under 16 px, or without detail)" in result.out


def test_results_of_another_method_without_ground_truth(measured, run, tmp_path):
    for name in ("1.jpg", "2.png"):
        save(tmp_path / "real" / name, photo(1, 96, 192))
    other = save(tmp_path / "other/1.png", photo(2, 96, 192))
    rows, result = measured(tmp_path / "real", "--results_path", tmp_path / "other", status=1)
    assert "no result of 1 image: 2.png" in result.err
    assert not rows["1.jpg"]["psnr_y"] and float(rows["1.jpg"]["niqe_derained"]) == pytest.approx(
        niqe(cv2.imread(str(other))[..., ::-1]), abs=1e-6
    )
    plain = run("test", "--test_data_path", tmp_path / "real", "--results_path", tmp_path / "other")
    assert plain.status == 2 and "no rainy/clean pairs" in plain.err


def test_a_video_has_none(refused, checkpoint, tmp_path):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"\0\0\0\x18ftypmp42")
    options = "--save_path", checkpoint, "--test_data_path", clip, "--no_reference"
    refused("test", *options, names=["--no_reference", clip])
