"""--comparison: panels and the contact sheet."""
import numpy as np
import pytest

import comparison
import test as script
from comparison import COLUMNS, contact_sheet, error_map, panel, shrink, thumbnail
from conftest import contents, photo, save, with_rain
from images import read_image
from metrics import measure


@pytest.fixture
def compare(run, checkpoint, tmp_path):
    """compare(folder, *flags) -> (folder of the results, result)."""

    def start(folder, *extra):
        output = tmp_path / "results"
        result = run(
            "test", "--save_path", checkpoint, "--test_data_path", folder, "--output_path", output, "--device", "cpu",
            "--comparison", *extra,
        )
        assert result.status == 0, result
        return output, result

    return start


def test_each_image_has_a_panel_and_the_run_a_sheet(compare, pairs_dir):
    output, result = compare(pairs_dir)
    names = {f"comparison/rain-{number}.jpg" for number in (1, 2, 3)}
    assert set(contents(output)) == names | {f"rain-{n}.png" for n in (1, 2, 3)} | {"metrics.csv", "contact_sheet.jpg"}
    assert all(len(data) < 300e3 for data in contents(output).values())
    assert "comparison" in result.out and "3 images on contact_sheet.jpg" in result.out


def test_real_rain_has_two_columns_and_pairs_four():
    rainy, derained, clean = (photo(seed, 90, 120) for seed in (1, 2, 3))
    scores = {"rainy": measure(rainy, clean), "derained": measure(derained, clean)}
    two, four = panel("a", rainy, derained), panel("a", rainy, derained, clean, scores)
    assert two.shape[0] == four.shape[0] and four.shape[1] > 1.9 * two.shape[1]
    for sheet, images in ((two, (rainy, derained)), (four, (rainy, derained, clean, error_map(derained, clean)))):
        top = next(y for y in range(sheet.shape[0]) if (sheet[y : y + 90, :120] == rainy).all())
        for k, image in enumerate(images):
            left = k * (120 + comparison.GAP)
            assert np.array_equal(sheet[top : top + 90, left : left + 120], image)
            assert (sheet[:top, left : left + 120] < 128).any(), "a label above"
        assert (sheet[top + 90 :] < 128).any(), "a caption below"


def test_the_caption_says_the_figures(monkeypatch):
    captions = []
    monkeypatch.setattr(comparison, "tile_row", lambda images, labels, caption: captions.append(caption))
    clean = photo(1)
    rainy = with_rain(clean)
    scores = {"rainy": measure(rainy, clean), "derained": measure(rainy // 2, clean)}
    panel("rain-7.png", rainy, rainy // 2, clean, scores)
    assert captions[0].startswith("rain-7.png")
    assert f"rainy {scores['rainy']['psnr_y']:.2f} dB / {scores['rainy']['ssim_y']:.4f}" in captions[0]
    assert f"derained {scores['derained']['psnr_y']:.2f} dB" in captions[0]


def test_error_map_is_dark_without_an_error_and_brightens_with_it():
    clean = photo(1)
    wrong = [np.clip(clean.astype(int) + error, 0, 255).astype(np.uint8) for error in (0, 9, 99)]
    levels = [error_map(image, clean).mean() for image in wrong]
    assert levels[0] < 3 < levels[1] < levels[2]


@pytest.mark.parametrize("height, width", [(1, 1), (1, 500), (500, 1), (1500, 40), (700, 1000)])
def test_any_size_fits(height, width):
    image = photo(1, height, width)
    sheet = panel("x" * 300, image, image, image, {"rainy": measure(image, image // 2)})
    assert max(shrink(image, comparison.TILE).shape) <= comparison.TILE
    assert sheet.shape[0] <= comparison.TILE + 60 and sheet.shape[1] <= 4 * (comparison.TILE + comparison.GAP)
    small = thumbnail("x", image, image)
    assert contact_sheet([small] * (COLUMNS + 1)).shape[0] > contact_sheet([small] * COLUMNS).shape[0]


def test_a_long_run_has_an_evenly_spaced_sheet(compare, tmp_path, monkeypatch):
    for number in range(7):
        save(tmp_path / f"in/{number}.png", photo(number, 12, 12))
    monkeypatch.setattr(script, "MAX_THUMBNAILS", 3)
    output, result = compare(tmp_path / "in")
    assert "3 images on contact_sheet.jpg" in result.out and len(list((output / "comparison").iterdir())) == 7


def test_alpha_and_depth_are_compared_in_eight_bits(compare, tmp_path):
    deep = photo(1, 20, 24).astype(np.uint16) * 257
    save(tmp_path / "in/deep.png", deep)
    save(tmp_path / "in/alpha.png", np.dstack((photo(2, 20, 24), np.full((20, 24), 9, np.uint8))))
    output, _ = compare(tmp_path / "in")
    for name in ("deep", "alpha"):
        assert read_image(output / f"comparison/{name}.jpg").dtype == np.uint8


def test_videos_have_no_panels(refused, checkpoint, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"any")
    refused("test", "--test_data_path", tmp_path / "clip.mp4", "--comparison", names=["--comparison", "clip.mp4"])
