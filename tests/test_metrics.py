"""PSNR and SSIM against the values measured independently with the published weights, and against the definitions."""
import json

import numpy as np
import pytest
import torch

from checkpoints import load_network
from conftest import SHARED, THOROUGH, photo
from images import read_rgb
from inference import StripRunner
from layouts import find_pairs
from metrics import measure
from outputs import Job, average
from pictures import process

COMBINATIONS = (
    ("prenet_rain100h", "Rain100H"),
    ("prenet_rain100l", "Rain100L"),
    ("sapnet_published_2021-09", "Rain100H"),
    ("sapnet_published_2021-09", "Rain100L"),
    ("sapnet_published_2021-11", "Rain100H"),
)
TOLERANCE = {"psnr_y": 1e-3, "psnr_rgb": 1e-3, "ssim_y": 1e-4, "ssim_rgb": 1e-4}


def assert_agrees(values, expected, label):
    for name, tolerance in TOLERANCE.items():
        assert values[name] == pytest.approx(expected[name], abs=tolerance), f"{label}: {name}"


@pytest.fixture(scope="module")
def expected(shared):
    return json.loads((shared / "reference/expected_metrics.json").read_text())


def check_images(weights, data_set, expected, output_path, chosen):
    """Derain as test.py does; compare what it measures ("round") and the truncating saver, from one forward pass."""
    runner = StripRunner(load_network(SHARED / f"weights/{weights}.pth"))
    outputs = []

    def listening(rainy):
        outputs.append(runner(rainy))
        return outputs[-1]

    images = expected[f"{weights} on {data_set}"]["images"]
    pairs = find_pairs(SHARED / "data/test" / data_set).pairs
    assert [pair.rainy.name for pair in pairs] == list(images)
    rows = []
    for pair in pairs[chosen]:
        png = output_path / pair.rainy.name
        row, _ = process(listening, Job(pair, png, None), torch.device("cpu"))
        rows.append(row)
        assert_agrees(row, images[pair.rainy.name]["round"], f"{pair.rainy.name}, rounded")
        clean = read_rgb(pair.clean)
        saved = measure(read_rgb(png), clean)
        assert saved == {name: pytest.approx(row[name], abs=1e-9) for name in TOLERANCE}, "measured on what was saved"
        truncated = np.floor(255 * outputs.pop()[0].clamp(0, 1).permute(1, 2, 0).numpy()).astype(np.uint8)
        assert_agrees(measure(truncated, clean), images[pair.rainy.name]["truncate"], f"{pair.rainy.name}, truncated")
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 3])
def test_one_real_image_agrees_with_the_published_weights(expected, tmp_path, number):
    check_images(*COMBINATIONS[number], expected, tmp_path, slice(number, number + 1))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(COMBINATIONS)), ids=[*map(" on ".join, COMBINATIONS)])
def test_real_images_agree_with_the_published_weights(expected, tmp_path, number):
    """One of twenty, another one for each combination; all of them, and their average, with THOROUGH=10."""
    images = slice(None) if THOROUGH >= 10 else slice(number + 4, number + 5)
    rows = check_images(*COMBINATIONS[number], expected, tmp_path, images)
    if len(rows) == 20:
        expected_average = expected[" on ".join(COMBINATIONS[number])]["average"]["round"]
        assert_agrees(average(rows), expected_average, "average")


def test_the_combinations_are_all_that_were_measured(expected):
    assert {*map(" on ".join, COMBINATIONS)} == expected.keys() - {"rainy input itself"}


@pytest.mark.slow
@pytest.mark.parametrize("data_set", ["Rain100H", "Rain100L"])
def test_rainy_input_itself(shared, expected, data_set):
    pairs = find_pairs(shared / "data/test" / data_set).pairs
    assert len(pairs) == 20
    for pair in pairs:
        values = measure(read_rgb(pair.rainy), read_rgb(pair.clean))
        assert_agrees(values, expected["rainy input itself"][f"{data_set}/{pair.rainy.name}"], pair.rainy.name)


def measure_by_definition(image, reference):
    """The protocol of DESIGN section 5, written out for one channel in [0, 255]: (PSNR, SSIM)."""
    x, y = np.float64(image), np.float64(reference)
    psnr = 10 * np.log10(255**2 / np.mean((x - y) ** 2))
    offset = np.arange(-5, 6)
    weight = np.exp(-(offset[:, None] ** 2 + offset**2) / 4.5)
    weight /= weight.sum()

    def blur(a):
        return np.einsum("ijkl,kl->ij", np.lib.stride_tricks.sliding_window_view(a, (11, 11)), weight)

    mu_x, mu_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mu_x**2, blur(y * y) - mu_y**2, blur(x * y) - mu_x * mu_y
    c1, c2 = 2.55**2, 7.65**2
    ssim = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    return psnr, ssim.mean()


@pytest.mark.parametrize("height, width", [(11, 11), (23, 30), (40, 12)])
def test_measures_follow_the_protocol(height, width):
    image, reference = photo(1, height, width), photo(2, height, width)
    values = measure(image, reference)
    luma = [16 + a @ np.array([65.481, 128.553, 24.966]) / 255 for a in (np.float64(image), np.float64(reference))]
    psnr_y, ssim_y = measure_by_definition(*luma)
    assert values["psnr_y"] == pytest.approx(psnr_y, abs=1e-9) and values["ssim_y"] == pytest.approx(ssim_y, abs=1e-9)
    channels = [measure_by_definition(image[..., c], reference[..., c]) for c in range(3)]
    mse = np.mean([10 ** (-psnr / 10) for psnr, _ in channels])
    assert values["psnr_rgb"] == pytest.approx(-10 * np.log10(mse), abs=1e-9)
    assert values["ssim_rgb"] == pytest.approx(np.mean([ssim for _, ssim in channels]), abs=1e-9)


def test_equal_images_are_perfect():
    values = measure(photo(1), photo(1))
    assert values["psnr_y"] == values["psnr_rgb"] == float("inf")
    assert values["ssim_y"] == pytest.approx(1) and values["ssim_rgb"] == pytest.approx(1)


@pytest.mark.parametrize("size", [(1, 1), (10, 40)])
def test_no_ssim_where_no_window_fits(size):
    values = measure(photo(1, *size), photo(2, *size))
    assert np.isfinite(values["psnr_y"]) and np.isnan(values["ssim_y"]) and np.isnan(values["ssim_rgb"])
