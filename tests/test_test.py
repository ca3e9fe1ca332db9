"""test.py on made folders of all kinds of images."""
import csv
import io
import json
import os
import shutil
import tempfile

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import pictures
import test as test_script
from checkpoints import BUNDLED, PUBLISHED_FOLDER, load_network, save_checkpoint
from conftest import contents, make_pairs, photo, run_subprocess, save, with_rain
from images import MARK, content_of, image_size, read_image, read_metadata, write_image
from layouts import find_pairs
from metadata import Metadata
from metrics import measure
from networks import SAPNet
from outputs import METRICS


@pytest.fixture
def test_run(run, checkpoint, tmp_path):
    """test_run(folder, *flags) -> (folder of the results, result)."""

    def start(folder, *extra, status=0, model=checkpoint.parent):
        output = tmp_path / "results"
        paths = folder if isinstance(folder, list) else [folder]
        result = run(
            "test", "--save_path", model, "--test_data_path", *paths, "--output_path", output, "--device", "cpu", *extra
        )
        assert result.status == status, result
        return output, result

    return start


@pytest.fixture
def rain100(tmp_path):
    """Twelve pairs in Rain100H's layout, numbered without zeros in front."""
    for number in range(1, 13):
        clean = photo(number, 16 + number, 20)
        save(tmp_path / f"Rain100/norain-{number}.png", clean)
        save(tmp_path / f"Rain100/rainy/rain-{number}.png", with_rain(clean, number))
    return tmp_path / "Rain100"


@pytest.fixture
def few(tmp_path):
    """Three small pairs."""
    return make_pairs(tmp_path / "few", height=16, width=20)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def restored(net, image):
    """What the network makes of an (H, W, 3) array, in its dtype: rounded, clamped; of a grey one without a tint."""
    peak = np.iinfo(image.dtype).max
    with torch.inference_mode():
        output = net(torch.from_numpy(np.float32(image) / peak).permute(2, 0, 1)[None])[0]
    if (image == image[..., :1]).all():
        output = output.mean(0, keepdim=True).expand_as(output)
    return (peak * output.clamp(0, 1).permute(1, 2, 0).numpy()).round()


def lines_with_metrics(result):
    """The console's lines with metrics."""
    return [line for line in result.out.splitlines() if " dB " in line]


# Which checkpoint, and where to


def test_each_set_and_model_has_its_folder(run, checkpoint, tmp_path, monkeypatch):
    """results/SET/MODEL, and the checkpoint is said before the first image."""
    save(tmp_path / "clips/photo.png", photo(1, 12, 12))
    monkeypatch.chdir(tmp_path / "clips")
    save_checkpoint(checkpoint.parent / "net_best.pth", load_network(checkpoint).state_dict())
    own = checkpoint.parent
    real, light = BUNDLED / "real.pth", BUNDLED / "light.pth"
    for source, model, used, folder in (
        (".", (own,), checkpoint, f"clips/{own.name}"),
        ("photo.png", (own,), checkpoint, f"photo/{own.name}"),
        ("../clips", (own / "net_best.pth",), own / "net_best.pth", f"clips/{own.name}-net_best"),
        ("../clips", (checkpoint,), checkpoint, f"clips/{own.name}-net_latest"),
        ("../clips", (light,), light, "clips/light"),
        ("../clips", (), real, "clips/real"),
    ):
        arguments = ("--save_path", *model) if model else ()
        result = run("test", *arguments, "--test_data_path", source, "--device", "cpu")
        assert result.status == 0, result
        assert f"weights: {used}" in result.out.splitlines()[:2], "before the first image"
        assert f"1 image in results/{folder}" in result.out
        assert (tmp_path / "clips/results" / folder / "photo.png").exists()


def test_own_weights_are_taken_once_they_are_there(run, checkpoint, tmp_path, monkeypatch):
    save(tmp_path / "photo.png", photo(1, 12, 12))
    monkeypatch.chdir(tmp_path)
    save_checkpoint(PUBLISHED_FOLDER / "net_latest.pth", load_network(checkpoint).state_dict())
    result = run("test", "--test_data_path", "photo.png", "--device", "cpu")
    assert result.status == 0, result
    assert f"weights: {PUBLISHED_FOLDER / 'net_latest.pth'}" in result.out
    assert f"results/photo/{PUBLISHED_FOLDER.name}" in result.out


@pytest.mark.slow
def test_from_another_directory(shared, tmp_path):
    """The bundled weights are beside the script, wherever it is started."""
    save(tmp_path / "ref.png", read_image(shared / "cases/other_cwd/ref.png"))
    child = run_subprocess("test.py", "--test_data_path", "ref.png", "--device", "cpu", cwd=tmp_path)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0 and err == "", err
    assert out.startswith(f"weights: {BUNDLED / 'real.pth'}\n")
    assert (tmp_path / "results/ref/real/ref.png").exists()


def test_the_folder_of_the_results_is_looked_at_before_the_work(refused, tmp_path, monkeypatch):
    """That of the weights which are taken in the end."""
    monkeypatch.chdir(tmp_path)
    for name in ("rain-1", "norain-1"):
        save(tmp_path / f"set/{name}.png", photo(1, 16, 16))
    (tmp_path / "results/set").mkdir(parents=True)
    (tmp_path / "results/set/general").write_text("mine")
    refused("test", "--test_data_path", "set", names=["results/set/general", "is a file", "expected a folder"])


def test_results_of_all_models_are_no_inputs(run, tmp_path, monkeypatch):
    """Of a folder that is taken with --recursive and holds the results too."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "photo.png", photo(1, 16, 16))
    for flags in (("--save_path", BUNDLED / "general.pth"), ()):
        result = run("test", "--test_data_path", ".", "--recursive", "--device", "cpu", "--recurrent_iter", 1, *flags)
        assert result.status == 0 and "1 image in" in result.out, result


@pytest.mark.parametrize("clean, weights", [(True, "general"), (False, "real")])
def test_a_set_with_clean_images_gets_other_weights_than_photographs(run, tmp_path, monkeypatch, clean, weights):
    monkeypatch.chdir(tmp_path)
    for name in ("rain-1", *["norain-1"] * clean):
        save(tmp_path / f"set/{name}.png", photo(1, 16, 16))
    result = run("test", "--test_data_path", "set", "--device", "cpu", "--recurrent_iter", 1)
    assert result.status == 0 and f"weights: {BUNDLED / weights}.pth" in result.out, result
    assert (tmp_path / f"results/set/{weights}/rain-1.png").exists()


# Images with and without clean ones


@pytest.mark.parametrize("named", [".", "rainy"])
def test_folder_with_ground_truth(test_run, rain100, checkpoint, named):
    output, result = test_run(rain100 / named)
    names = [f"rain-{number}.png" for number in range(1, 13)]
    assert set(contents(output)) == {*names, "metrics.csv"}
    rows = read_csv(output / "metrics.csv")
    assert [row["image"] for row in rows] == [*names, "average of 12"], "natural order"
    net = load_network(checkpoint)
    for number, row in enumerate(rows[:-1], 1):
        saved = cv2.imread(str(output / row["image"]), cv2.IMREAD_UNCHANGED)[..., ::-1]
        expected = restored(net, read_image(rain100 / f"rainy/rain-{number}.png"))
        assert saved.dtype == np.uint8 and np.abs(saved - expected).max() <= 1 and (saved == expected).mean() > 0.999
        scores = measure(saved, read_image(rain100 / f"norain-{number}.png"))
        assert {name: float(row[name]) for name in scores} == pytest.approx(scores, abs=1e-6)
        assert float(row["seconds"]) > 0
    for name in ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"):
        assert float(rows[-1][name]) == pytest.approx(np.mean([float(row[name]) for row in rows[:-1]]), abs=1e-6)
    warm = [float(row["seconds"]) for row in rows[1:-1]]
    assert float(rows[-1]["seconds"]) == pytest.approx(np.mean(warm), abs=1e-6), "without the first image's warm-up"
    lines = lines_with_metrics(result)
    assert [line.split()[0] for line in lines] == [*names, "average"]
    assert f"{float(rows[-1]['psnr_y']):.4f} dB" in lines[-1] and f"{float(rows[-1]['ssim_rgb']):.4f}" in lines[-1]
    assert "12 images" in result.out


def test_folder_without_ground_truth_reports_no_metrics(test_run, tmp_path):
    for number in (2, 10):
        save(tmp_path / f"real/{number}.jpg", photo(number, 20, 30))
    output, result = test_run(tmp_path / "real")
    assert set(contents(output)) == {"2.png", "10.png", "metrics.csv"}
    assert "dB" not in result.out and "average of 2" in result.out
    assert all(row["psnr_y"] == "" and float(row["seconds"]) > 0 for row in read_csv(output / "metrics.csv"))


def deep(image):
    """16-bit version with low bytes that an 8-bit detour would lose."""
    low = np.random.default_rng(0).integers(0, 256, image.shape)
    return (image.astype(np.uint16) * 256 + low).astype(np.uint16)


ALPHA = np.linspace(0, 255, 20 * 24).reshape(20, 24, 1)
KINDS = {
    "colour.png": photo(1, 20, 24),
    "grey.png": photo(1, 20, 24)[..., 0],
    "alpha.png": np.dstack((photo(1, 20, 24), ALPHA.astype(np.uint8))),
    "deep.png": deep(photo(1, 20, 24)),
    "deep.tif": deep(photo(1, 20, 24)),
    "deep_grey.png": deep(photo(1, 20, 24)[..., 0]),
    "deep_alpha.png": np.dstack((deep(photo(1, 20, 24)), (257 * ALPHA).astype(np.uint16))),
    "colour.bmp": photo(1, 20, 24),
    "pixel.png": photo(1, 1, 1),
    "column.png": photo(1, 37, 1),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_images(test_run, tmp_path, checkpoint, name):
    """Depth and alpha come out as they went in, and the colours are the network's."""
    image = KINDS[name]
    save(tmp_path / "in" / name, image)
    output, _ = test_run(tmp_path / "in")
    saved = cv2.imread(str(output / f"{name.split('.')[0]}.png"), cv2.IMREAD_UNCHANGED)
    assert saved.dtype == image.dtype and saved.shape[:2] == image.shape[:2]
    colour = image[..., :3] if image.ndim == 3 else np.repeat(image[..., None], 3, 2)
    expected = restored(load_network(checkpoint), colour)
    if image.ndim == 2:
        assert (np.ptp(saved, axis=2) == 0).all(), "a grey picture gets no tint"
    tolerance = 1 if image.dtype == np.uint8 else 4  # 16-bit levels are as fine as float32's rounding
    assert np.abs(saved[..., 2::-1].astype(int) - expected).max() <= tolerance
    if image.ndim == 3 and image.shape[2] == 4:
        assert np.array_equal(saved[..., 3], image[..., 3])
    else:
        assert saved.shape[2] == 3


def test_pairs_of_other_kinds_are_measured_in_8_bits(test_run, tmp_path):
    clean = photo(1, 20, 24)
    deep_clean = 257 * clean.astype(np.uint16)
    kinds = (
        ("a", KINDS["deep.png"], deep_clean), ("b", KINDS["grey.png"], clean[..., 0]), ("c", KINDS["alpha.png"], clean)
    )
    for stem, rainy, truth in kinds:
        save(tmp_path / f"set/input/{stem}.png", rainy)
        save(tmp_path / f"set/target/{stem}.png", truth)
    output, _ = test_run(tmp_path / "set")
    rows = read_csv(output / "metrics.csv")
    saved = cv2.imread(str(output / "a.png"), cv2.IMREAD_UNCHANGED)[..., ::-1]
    scores = measure((saved / 257).round().astype(np.uint8), clean)
    assert float(rows[0]["psnr_rgb"]) == pytest.approx(scores["psnr_rgb"], abs=1e-2)
    assert all(5 < float(row["psnr_y"]) < 100 for row in rows)


def test_pair_of_one_pixel_has_a_psnr_and_no_ssim(test_run, tmp_path):
    save(tmp_path / "set/rain-1.png", photo(1, 1, 1))
    save(tmp_path / "set/norain-1.png", photo(2, 1, 1))
    output, _ = test_run(tmp_path / "set")
    row = read_csv(output / "metrics.csv")[0]
    assert np.isfinite(float(row["psnr_y"])) and row["ssim_y"] == "nan"


def test_photograph_taken_upright_is_turned(test_run, tmp_path, checkpoint):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    (tmp_path / "in").mkdir()
    Image.fromarray(photo(1, 20, 30)).save(tmp_path / "in/a.jpg", exif=exif)
    output, _ = test_run(tmp_path / "in")
    assert cv2.imread(str(output / "a.png")).shape == (30, 20, 3)


def test_same_stem_twice_gives_two_files(test_run, tmp_path):
    save(tmp_path / "in/a.png", photo(1, 12, 12))
    save(tmp_path / "in/a.jpg", photo(2, 12, 14))
    output, _ = test_run(tmp_path / "in")
    assert set(contents(output)) == {"a.png.png", "a.jpg.png", "metrics.csv"}
    assert cv2.imread(str(output / "a.jpg.png")).shape == (12, 14, 3)


def test_two_results_of_one_name_are_refused(refused, checkpoint, tmp_path):
    for name in ("a.png", "a.jpg", "a.png.bmp"):
        save(tmp_path / "in" / name, photo(1, 12, 12))
    output = tmp_path / "out"
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", tmp_path / "in", "--output_path", output,
        names=["--output_path", "a.png.png"],
    )
    assert not output.exists()


def test_input_without_ground_truth_among_pairs_is_derained_and_named(test_run, rain100):
    (rain100 / "norain-5.png").unlink()
    save(rain100 / "norain-99.png", photo(99, 12, 12))
    save(rain100 / "rainy/stray.png", photo(98, 12, 12))
    output, result = test_run(rain100)
    rows = read_csv(output / "metrics.csv")
    assert [row["image"] for row in rows if not row["psnr_y"]] == ["rain-5.png"]
    assert [row["image"] for row in rows] == [*(f"rain-{number}.png" for number in range(1, 13)), "average of 11"]
    lines = result.out.splitlines()
    assert f"{rain100}: 1 without a clean image, derained but not measured: rain-5.png" in lines
    assert f"{rain100}: left out 2 (no pair by their names): norain-99.png, rainy/stray.png" in lines
    assert set(contents(output)) == {*(f"rain-{number}.png" for number in range(1, 13)), "metrics.csv"}


CASES = {  # case: (images that are derained, of which these are not measured, images that are left out)
    "left_out_but_done/Test2800": (
        ["901_1", "902_1", "903_1", "926_10(1)"], ["926_10(1).jpg"], [],
    ),
    "own_photos_layout/own_photos": (
        ["rain-1"], [], [f"{name}{number}.png" for name in ("beach", "holiday") for number in (1, 2, 3)],
    ),
    "own_photos_layout/Rain1400_stray": (["901_1", "902_1", "903_1"], [], ["rainy_image/901_1(1).jpg"]),
}


@pytest.mark.parametrize("case", CASES)
def test_words_and_deed_agree(shared, test_run, case):
    """All images are derained or said to be left out, and all that are not measured are said not to be."""
    folder = shared / "cases" / case
    derained, not_measured, left_out = CASES[case]
    output, result = test_run(folder)
    assert set(contents(output)) == {*(f"{stem}.png" for stem in derained), "metrics.csv"}
    rows = read_csv(output / "metrics.csv")[:-1]
    assert [row["image"] for row in rows if not row["psnr_y"]] == not_measured
    lines = result.out.splitlines()
    said = [line for line in lines if "left out" in line or "not measured" in line]
    expected = []
    if left_out:
        expected.append(f"{folder}: left out {len(left_out)} (no pair by their names): {', '.join(left_out)}")
    if not_measured:
        expected.append(
            f"{folder}: {len(not_measured)} without a clean image, derained but not measured: {', '.join(not_measured)}"
        )
    assert said == expected
    assert len(lines_with_metrics(result)) == len(derained) - len(not_measured) + 1


PUBLIC_SETS = (
    "AllWeather", "GT_LQ", "InputTargetCaps", "Rain1400_sep", "Rain200L_orig", "Rain800_sep", "SPA_real_test_1000",
    "test/Rain100H",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_public_sets_are_measured(shared, test_run, name):
    """Each as it is distributed: three small pairs."""
    output, result = test_run(shared / "cases/layouts" / name)
    rows = read_csv(output / "metrics.csv")
    assert rows[-1]["image"] == "average of 3" and len(rows) == 4
    assert all(float(row["psnr_y"]) > 25 for row in rows), f"other backgrounds give 24 dB or less: {rows}"
    assert "left out" not in result.out and "not measured" not in result.out


def test_a_folder_of_sets_is_told_from_a_set(refused, shared, checkpoint, tmp_path):
    folder = shared / "cases/layouts"
    arguments = ("--save_path", checkpoint, "--output_path", tmp_path / "out", "--test_data_path")
    refused("test", *arguments, folder / "test", names=["--test_data_path", "several data sets", "Rain100H, Rain100L"])
    refused("test", *arguments, folder, names=[name for name in PUBLIC_SETS if "/" not in name])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "folder, twins", [("twins", ("input/1.jpg", "1.png")), ("rain_twins", ("rain-1.jpg", "rain-1.png"))]
)
def test_two_files_of_one_stem_are_named(refused, shared, checkpoint, tmp_path, folder, twins):
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", shared / "cases/twins_one_stem" / folder,
        "--output_path", tmp_path / "out", names=twins,
    )
    assert not (tmp_path / "out").exists()


# --clean_path and --side_by_side


@pytest.fixture
def odd_folders(tmp_path):
    """The pairs of a data set in two folders whose names say nothing."""
    for number in (1, 2, 3):
        clean = photo(number, 16 + number, 20)
        save(tmp_path / f"scenes/wet/{number}.png", with_rain(clean, number))
        save(tmp_path / f"scenes/dry/{number}.png", clean)
    return tmp_path / "scenes"


def metrics_of(output):
    """{image's stem: metrics} of a report."""
    rows = read_csv(output / "metrics.csv")
    return {row["image"].split(".")[0]: [row[name] for name in METRICS] for row in rows}


def test_clean_path_names_the_clean_images(test_run, odd_folders, pairs_dir):
    output, result = test_run(odd_folders / "wet")
    assert "no clean images, so all 3 are derained but not measured" in result.out and not lines_with_metrics(result)
    save(odd_folders / "wet/4.png", photo(4, 12, 12))
    save(odd_folders / "dry/5.png", photo(5, 12, 12))
    output, result = test_run(odd_folders / "wet", "--clean_path", odd_folders / "dry")
    rows = read_csv(output / "metrics.csv")
    for number, row in enumerate(rows[:3], 1):
        scores = measure(read_image(output / f"{number}.png"), photo(number, 16 + number, 20))
        assert float(row["psnr_y"]) == pytest.approx(scores["psnr_y"], abs=1e-6)
    assert [row["image"] for row in rows if not row["psnr_y"]] == ["4.png"]
    assert "not measured: 4.png" in result.out and "left out 1 (no pair by their names): ../dry/5.png" in result.out
    assert not (output / "5.png").exists()


@pytest.mark.parametrize("clean", ["missing", "other"])
def test_clean_path_without_the_clean_images_is_refused(refused, odd_folders, checkpoint, tmp_path, clean):
    save(odd_folders / "other/a.png", photo(1, 12, 12))
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", odd_folders / "wet", "--output_path", tmp_path / "out",
        "--clean_path", odd_folders / clean, names=[f"--clean_path {odd_folders / clean}"],
    )


def side_by_side(pairs_dir, folder, rainy_half):
    """The pairs of a folder as pictures that hold both."""
    for path in sorted(pairs_dir.glob("rain-*.png")):
        halves = [read_image(path), read_image(path.with_name(f"no{path.name}"))]
        save(folder / path.name.removeprefix("rain-"), np.hstack(halves if rainy_half == "left" else halves[::-1]))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("half", ["left", "right"])
def test_halves_of_a_picture_are_a_pair(test_run, pairs_dir, tmp_path, half):
    """The result is what the split files give, with the panels too."""
    output, _ = test_run(pairs_dir, "--comparison")
    derained = [read_image(path) for path in sorted(output.glob("rain-*.png"))]
    expected = {stem.removeprefix("rain-"): values for stem, values in metrics_of(output).items()}
    folder = side_by_side(pairs_dir, tmp_path / "wide", half)
    output, result = test_run(folder, "--side_by_side", half, "--comparison", "--output_path", tmp_path / "halves")
    written = contents(tmp_path / "halves")
    assert metrics_of(tmp_path / "halves") == expected
    for number, picture in enumerate(derained, 1):
        assert np.array_equal(read_image(tmp_path / f"halves/{number}.png"), picture)
    assert {name for name in written if "/" in name} == {f"comparison/{number}.jpg" for number in (1, 2, 3)}
    assert "left out" not in result.out and "not measured" not in result.out
    # One such picture alone
    output, _ = test_run(folder / "2.png", "--side_by_side", half, "--output_path", tmp_path / "one")
    assert set(contents(tmp_path / "one")) == {"2.png", "metrics.csv"}
    assert metrics_of(tmp_path / "one")["2"] == expected["2"]
    # The other half is not the rainy one
    test_run(folder, "--side_by_side", {"left": "right", "right": "left"}[half], "--output_path", tmp_path / "other")
    assert not np.array_equal(read_image(tmp_path / "other/1.png"), derained[0])


def test_halves_keep_depth_and_alpha(test_run, tmp_path):
    clean, rainy = (np.dstack((deep(photo(seed, 20, 24)), np.full((20, 24), 9000, np.uint16))) for seed in (1, 2))
    save(tmp_path / "wide/a.png", np.hstack((clean, rainy)))
    output, _ = test_run(tmp_path / "wide", "--side_by_side", "right")
    image = read_image(output / "a.png").astype(int)
    assert image.shape == (20, 24, 4) and (image[..., 3] == 9000).all()
    assert np.abs(image - rainy).mean() < np.abs(image - clean).mean()


def test_pictures_of_rain800_as_distributed(shared, test_run):
    folder = shared / "cases/side_by_side/Rain800_side_by_side"
    output, _ = test_run(folder, "--side_by_side", "left")
    rows = read_csv(output / "metrics.csv")
    assert rows[-1]["image"] == "average of 3" and all(float(row["psnr_y"]) > 25 for row in rows)
    for row in rows[:-1]:
        height, width = read_image(folder / row["image"]).shape[:2]
        assert read_image(output / f"{row['image'].split('.')[0]}.png").shape == (height, width // 2, 3)


def test_an_odd_width_does_not_cost_the_others(test_run, pairs_dir, tmp_path):
    folder = side_by_side(pairs_dir, tmp_path / "wide", "left")
    save(folder / "2.png", photo(1, 20, 31))
    output, result = test_run(folder, "--side_by_side", "left", status=1)
    assert set(contents(output)) == {"1.png", "3.png", "metrics.csv"}
    assert f"error: {folder / '2.png'} is 31 px wide; expected an even width" in result.out
    assert result.err.strip() == "test.py: error: 1 of 3 images failed: 2.png"


def test_options_that_do_not_go_together_are_refused(refused, checkpoint, pairs_dir, tmp_path):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"any")
    image = pairs_dir / "rain-1.png"
    clean, half = ("--clean_path", pairs_dir), ("--side_by_side", "left")
    for source, options, names in (
        (pairs_dir, (*clean, *half), ["--clean_path and --side_by_side"]),
        (pairs_dir, (*clean, "--recursive"), ["--clean_path", "--recursive"]),
        (pairs_dir, (*half, "--recursive"), ["--side_by_side", "--recursive"]),
        (clip, clean, ["--clean_path", clip]),
        (clip, half, ["--side_by_side", clip]),
        (image, clean, ["--clean_path", image]),
        (pairs_dir, half, ["--side_by_side", "rain-1.png", "norain-1.png"]),
    ):
        refused(
            "test", "--save_path", checkpoint, "--test_data_path", source, "--output_path", tmp_path / "out", *options,
            names=names,
        )
    assert not (tmp_path / "out").exists()


# All kinds of images


def test_a_bad_file_does_not_cost_the_others(test_run, rain100):
    data = (rain100 / "rainy/rain-3.png").read_bytes()
    (rain100 / "rainy/rain-3.png").write_bytes(data[: len(data) // 2])
    save(rain100 / "norain-6.png", photo(6, 22, 21))
    output, result = test_run(rain100, status=1)
    lines = result.err.strip().splitlines()
    assert lines[-1] == "test.py: error: 2 of 12 images failed: rain-3.png, rain-6.png"
    rows = read_csv(output / "metrics.csv")
    assert rows[-1]["image"] == "average of 10"
    assert set(contents(output)) >= {f"rain-{n}.png" for n in range(1, 13) if n not in (3, 6)}
    assert "rain-3.png" in result.out and "21x22" in result.out, "each with its reason"
    assert not list(output.glob("*.tmp"))


@pytest.mark.parametrize("layout", ["real", "pairs"])
def test_overwriting_an_input_is_refused(refused, checkpoint, tmp_path, layout):
    if layout == "real":
        save(tmp_path / "in/a.png", photo(1, 12, 12))
        output = tmp_path / "other/../in"
    else:
        save(tmp_path / "in/input/a.png", photo(1, 12, 12))
        save(tmp_path / "in/target/a.png", photo(2, 12, 12))
        output = tmp_path / "in/target"
    (tmp_path / "other").mkdir()
    before = contents(tmp_path / "in")
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", tmp_path / "in", "--output_path", output,
        names=["--output_path", "a.png"],
    )
    assert contents(tmp_path / "in") == before


def test_self_ensemble_from_the_command_line(test_run, tmp_path, checkpoint):
    image = photo(1, 20, 24)
    save(tmp_path / "in/a.png", image)
    output, _ = test_run(tmp_path / "in", "--self_ensemble")
    net, rainy = load_network(checkpoint), torch.from_numpy(np.float32(image) / 255).permute(2, 0, 1)[None]
    with torch.inference_mode():
        views = [net(rainy.flip(dims)).flip(dims) for dims in ((), (2,), (3,), (2, 3))]
    expected = 255 * torch.stack(views).mean(0)[0].clamp(0, 1).permute(1, 2, 0).numpy()
    assert np.abs(read_image(output / "a.png") - expected).max() < 1


# Images, folders and what is there already


@pytest.mark.parametrize("name", ["Straße.JPG", "雨.png", "a b.TIFF"])
def test_one_image(test_run, tmp_path, checkpoint, name):
    image = photo(1, 20, 24)
    save(tmp_path / "in" / name, image)
    save(tmp_path / "in/other.png", image)
    output, _ = test_run(tmp_path / "in" / name)
    stem = name.split(".")[0]
    assert set(contents(output)) == {f"{stem}.png", "metrics.csv"}
    expected = restored(load_network(checkpoint), read_image(tmp_path / "in" / name))
    assert np.abs(read_image(output / f"{stem}.png") - expected).max() <= 1


def test_recursive_mirrors_the_folders(test_run, tmp_path):
    names = ("a.png", "x/a.png", "x/y/a.jpg", "x/y/a.png", "z/rain-1.png", "z/norain-1.png")
    for number, name in enumerate(names):
        save(tmp_path / "in" / name, photo(number, 12 + number, 14))
    (tmp_path / "in/x/notes.txt").write_text("no image")
    output, result = test_run(tmp_path / "in", "--recursive")
    written = {"a.png", "x/a.png", "x/y/a.jpg.png", "x/y/a.png.png", "z/rain-1.png", "z/norain-1.png", "metrics.csv"}
    assert set(contents(output)) == written
    for number, name in enumerate(names):
        twice = name.startswith("x/y/")
        assert read_image(output / (f"{name}.png" if twice else name)).shape == (12 + number, 14, 3)
    assert "dB" not in result.out, "all of them are taken as real rain"
    _, result = test_run(tmp_path / "in")
    assert "1 image in" in result.out, "only on request"


def test_recursive_follows_links_once_and_leaves_its_own_results_out(test_run, tmp_path):
    save(tmp_path / "in/a.png", photo(1, 12, 12))
    save(tmp_path / "elsewhere/b.png", photo(2, 12, 12))
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "in")
    (tmp_path / "results").symlink_to(tmp_path / "in/results")
    (tmp_path / "in/results").mkdir()
    for _ in range(2):
        output, result = test_run(tmp_path / "in", "--recursive")
        assert set(contents(tmp_path / "in/results")) == {"a.png", "linked/b.png", "metrics.csv"}
        assert "2 images in" in result.out


def test_recursive_without_images_is_refused(refused, checkpoint, tmp_path):
    (tmp_path / "in/x").mkdir(parents=True)
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", tmp_path / "in", "--recursive",
        names=["--test_data_path", tmp_path / "in"],
    )


@pytest.mark.slow
def test_a_long_folder_is_gone_on_with(test_run, rain100):
    """What is there is measured and not derained again; what is not is derained."""
    output, _ = test_run(rain100)
    before, rows = contents(output), read_csv(output / "metrics.csv")
    (output / "rain-4.png").unlink()
    kept = [f"rain-{number}.png" for number in range(1, 13) if number != 4]
    times = [(output / name).stat().st_mtime_ns for name in kept]
    output, result = test_run(rain100, "--overwrite", False)
    assert {name: data for name, data in contents(output).items() if name != "metrics.csv"} == {
        name: data for name, data in before.items() if name != "metrics.csv"
    }
    assert [(output / name).stat().st_mtime_ns for name in kept] == times
    assert result.out.count("was there") == 11
    after = read_csv(output / "metrics.csv")
    for name in ("image", "psnr_y", "ssim_rgb"):
        assert [row[name] for row in after] == [row[name] for row in rows]
    assert [row["image"] for row in after if row["seconds"]] == ["rain-4.png", "average of 12"]
    output, result = test_run(rain100, "--overwrite", False)
    assert result.out.count("was there") == 13 and read_csv(output / "metrics.csv")[-1]["seconds"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--recurrent_iter", 1], ["--precision", "bf16"], ["--self_ensemble"], ["--metadata", False], ["--quality", 60],
    ["--save_path", BUNDLED / "light.pth"], "another picture", "an earlier version",
], ids=str)
def test_a_result_of_other_options_is_not_gone_on_with(test_run, few, tmp_path, flags):
    """It is derained again, and what is of these is kept."""
    flags, case = ([], flags) if isinstance(flags, str) else (flags, None)
    arguments = ("--format", "jpg", *flags)
    test_run(few, "--output_path", tmp_path / "expected", *arguments)
    output, _ = test_run(few, "--format", "jpg")
    if case == "another picture":  # into the same folder
        test_run(save(tmp_path / "other/rain-2.png", photo(1, 9, 9)), "--format", "jpg")
    elif case:
        write_image(output / "rain-2.jpg", read_image(output / "rain-3.jpg"), Metadata(software=MARK))
    _, result = test_run(few, "--overwrite", False, *arguments)
    number = "1 result" if case else "3 results"
    assert f"--overwrite False: derained again {number} of other pictures, weights, options or versions" in result.out
    assert result.out.count("was there") == (2 if case else 0)
    results = [{name: data for name, data in contents(folder).items() if name.endswith("jpg")}
               for folder in (output, tmp_path / "expected")]
    assert results[0] == results[1] and len(results[0]) == 3
    _, result = test_run(few, "--overwrite", False, *arguments)
    assert result.out.count("was there") == 4 and "derained again" not in result.out


# Nothing of other people is overwritten


def test_case_of_a_neighbour(refused, test_run, shared, checkpoint, tmp_path):
    """IMG_1.jpg is derained beside another IMG_1.png."""
    folder = shutil.copytree(shared / "cases/overwrites_neighbour/photos", tmp_path / "photos")
    before = contents(folder)
    arguments = ("--save_path", checkpoint, "--test_data_path", folder / "IMG_1.jpg", "--output_path", folder)
    refused("test", *arguments, names=["--output_path", folder, "IMG_1.png"])
    assert contents(folder) == before
    test_run(folder / "IMG_1.jpg", "--output_path", folder, "--suffix", "_derained")
    after = contents(folder)
    assert after.keys() - before.keys() == {"IMG_1_derained.png", "metrics.csv"}
    assert {name: after[name] for name in before} == before


TAKEN = ("a.png", "metrics.csv", "comparison/a.jpg", "contact_sheet.jpg")


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("kind", ["file", "picture", "folder", "link"])
@pytest.mark.parametrize("name", TAKEN)
def test_what_lies_there_is_not_overwritten(refused, checkpoint, tmp_path, name, kind, overwrite):
    save(tmp_path / "in/a.png", photo(1, 12, 12))
    output = tmp_path / "out"
    save(tmp_path / "mine.png", photo(2, 12, 12))
    taken = output / name
    taken.parent.mkdir(parents=True)
    if kind == "file":
        taken.write_text("image,mine\na.png,1\n")
    elif kind == "picture":
        taken.write_bytes((tmp_path / "mine.png").read_bytes())
    elif kind == "folder":
        taken.mkdir()
    else:
        taken.symlink_to(tmp_path / "mine.png")
    before = contents(tmp_path)
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", tmp_path / "in", "--output_path", output,
        "--comparison", "--overwrite", overwrite, names=["--output_path", output, name],
    )
    assert contents(tmp_path) == before and os.path.lexists(taken)


def test_all_that_is_taken_is_named(refused, checkpoint, tmp_path):
    """Before the first is derained, and the first few of many."""
    for number in range(9):
        save(tmp_path / f"in/{number}.jpg", photo(number, 12, 12))
        if number:
            save(tmp_path / f"out/{number}.png", photo(number, 12, 12))
    arguments = ("--save_path", checkpoint, "--test_data_path", tmp_path / "in", "--output_path", tmp_path / "out")
    before = contents(tmp_path)
    message = refused("test", *arguments, names=["1.png, 2.png, 3.png, 4.png, 5.png and 3 more would be overwritten"])
    assert "0.png" not in message and contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("form", ["png", "jpg", "webp", "same"])
def test_results_of_an_earlier_run_are_replaced(test_run, few, form):
    """Known by their mark, metrics.csv or not; another run into the same folder has left its own."""
    output, _ = test_run(few, "--comparison", "--format", form)
    (output / "metrics.csv").unlink()
    for path in output.rglob("*.*"):
        assert read_metadata(path).software.startswith(MARK)
    before = contents(output)
    output, result = test_run(few, "--comparison", "--format", form)
    assert {name: data for name, data in contents(output).items() if name != "metrics.csv"} == before
    assert "was there" not in result.out
    (output / "metrics.csv").unlink()  # as after a run that was killed
    _, result = test_run(few, "--format", form, "--overwrite", False)
    assert result.out.count("was there") == 4


def test_a_row_in_the_report_makes_no_picture_ours(test_run, refused, checkpoint, tmp_path):
    """A picture of the user beside the input, whose result went to another format in the run before."""
    save(tmp_path / "p/a.jpg", photo(1, 12, 12))
    save(tmp_path / "p/a.png", photo(2, 12, 12))
    save(tmp_path / "p/comparison/a.jpg", photo(3, 12, 12))
    test_run(tmp_path / "p/a.jpg", "--output_path", tmp_path / "p", "--format", "webp")
    before = contents(tmp_path / "p")
    assert b"a.jpg" in before["metrics.csv"]
    arguments = ("--save_path", checkpoint, "--test_data_path", tmp_path / "p/a.jpg", "--output_path", tmp_path / "p")
    refused("test", *arguments, names=["a.png would be overwritten"])
    refused("test", *arguments, "--format", "webp", "--comparison", names=["comparison/a.jpg would be overwritten"])
    assert contents(tmp_path / "p") == before


@pytest.mark.slow
@pytest.mark.parametrize("rainy, clean", [("q/rain", "q/norain"), ("q/in", "q"), ("q", "q/target")])
def test_results_are_no_clean_images(test_run, refused, checkpoint, few, tmp_path, rainy, clean):
    """Where their folder looks like that of the clean images; --clean_path asks for them all the same."""
    for number in (1, 2, 3):
        save(tmp_path / rainy / f"{number}.jpg", read_image(few / f"rain-{number}.png"))
    for _ in range(2):
        test_run(tmp_path / rainy, "--output_path", tmp_path / clean)
    output, result = test_run(tmp_path / rainy)
    assert result.out.count("are results of an earlier run and no clean images") == 1 and " dB " not in result.out
    assert "all 3 are derained but not measured" in result.out and not read_csv(output / "metrics.csv")[0]["psnr_y"]
    measured = ("--test_data_path", tmp_path / rainy, "--results_path", output, "--output_path", tmp_path / "measured")
    refused("test", *measured, names=["--clean_path"])
    _, result = test_run(tmp_path / rainy, "--clean_path", tmp_path / clean)
    assert len(lines_with_metrics(result)) == 4
    save(tmp_path / clean / "2.png", read_image(few / "norain-2.png"))
    (tmp_path / clean / "2.jpg").unlink(missing_ok=clean != rainy)
    _, result = test_run(tmp_path / rainy)
    assert len(lines_with_metrics(result)) == 2 and "derained but not measured: 1.jpg, 3.jpg" in result.out


def test_clean_images_are_found_beside_results(test_run, few, tmp_path):
    """Where the folder of the results has a name that is looked for earlier."""
    for number in (1, 2, 3):
        for name, place in (("rain", "rain"), ("norain", "gt")):
            save(tmp_path / f"q/{place}/{number}.png", read_image(few / f"{name}-{number}.png"))
    test_run(tmp_path / "q/rain", "--output_path", tmp_path / "q/norain")
    test_run(tmp_path / "q/rain", "--output_path", tmp_path / "q/target")
    expected = metrics_of(tmp_path / "q/target")
    for named in ("q/rain", "q"):
        output, result = test_run(tmp_path / named)
        assert metrics_of(output) == expected and result.out.count("and no clean images") == 2
    shutil.rmtree(tmp_path / "q/gt")
    assert all(expected["1"]) and "all 3 are derained but not measured" in test_run(tmp_path / "q/rain")[1].out


def test_results_are_no_clean_images_of_halves(test_run, pairs_dir, tmp_path):
    """Nor do they make two files of each pair."""
    side_by_side(pairs_dir, tmp_path / "q/input", "left")
    for _ in range(2):
        _, result = test_run(tmp_path / "q/input", "--side_by_side", "left", "--output_path", tmp_path / "q/gt")
        assert len(lines_with_metrics(result)) == 4


def test_results_beside_their_inputs_are_no_inputs(test_run, tmp_path):
    """A second run derains the photographs again, and not the results."""
    for name in ("a.jpg", "b.png", "below/c.jpg"):
        save(tmp_path / "in" / name, photo(1, 12, 12))
    for flags, names in (((), {"a", "b"}), (("--recursive",), {"a", "b", "below/c"})):
        for again in (False, True):
            _, result = test_run(
                tmp_path / "in", "--output_path", tmp_path / "in", "--suffix", "_derained", "--comparison", *flags
            )
            results = {name for name in contents(tmp_path / "in") if name.endswith("_derained.png")}
            assert results == {f"{name}_derained.png" for name in names}
            assert f"{len(names)} images in" in result.out
            assert not again or "(results of an earlier run): a_derained.png, b_derained.png" in result.out


@pytest.mark.slow
def test_results_beside_pairs_and_videos_are_no_inputs(test_run, shared, few):
    """Nor is such a result an image left out, which would be kept from being written again."""
    shutil.copy(shared / "cases/overwrites_neighbour/videos/a.ts", few / "clip.ts")
    for _ in range(2):
        _, result = test_run(few, "--output_path", few, "--suffix", "_x", "--recurrent_iter", 1)
        assert "average of 3 " in result.out
        derained = {name for name in contents(few) if "rain-" not in name} - {"metrics.csv", "clip.ts"}
        assert derained == {"clip_x.mp4", "clip_x.csv"}
        assert len(list(few.glob("rain-*_x.png"))) == len(list(few.glob("*_x.png"))) == 3
    assert "(results of an earlier run): clip_x.mp4, rain-1_x.png, rain-2_x.png, rain-3_x.png" in result.out


@pytest.mark.parametrize("layout, form", [
    (("set/input/{}.png", "set/target/{}.png"), "png"), (("set/rain-{}.png", "set/norain-{}.png"), "jpg"),
])
def test_a_set_may_hold_its_results(test_run, tmp_path, layout, form):
    """They are no rainy images later, in another run nor in one that goes on."""
    rainy, clean = layout
    for number in (1, 2):
        save(tmp_path / rainy.format(number), with_rain(photo(number, 16, 16), number))
        save(tmp_path / clean.format(number), photo(number, 16, 16))
    folder, options = tmp_path / "set", ("--format", form)
    _, first = test_run(folder, "--output_path", folder, *options)
    results = sorted(path.name for path in folder.glob(f"*[12].{form}") if read_metadata(path).software)
    figures = [row["psnr_y"] for row in read_csv(folder / "metrics.csv")]
    assert len(results) == 2 and all(figures)
    for output, more in ((tmp_path / "other", ()), (folder, ("--overwrite", "False")), (folder, ())):
        _, result = test_run(folder, "--output_path", output, *options, *more)
        assert f"left out 2 (results of an earlier run): {', '.join(results)}\n" in result.out
        assert result.out.count("left out") == 1 and ("was there" in result.out) == bool(more)
        assert [row["psnr_y"] for row in read_csv(output / "metrics.csv")] == figures


# Formats, names and what a file says beside its pixels


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def photographed(path, **options):
    """A JPEG as a phone writes it: to be turned, with profile, date, camera, place and a thumbnail."""
    exif = Image.Exif()
    exif.update({0x0112: 6, 271: "Maker", 34665: {36867: "2026:05:01 10:20:30", 37500: b"thumbnail"}})
    exif[34853] = {1: "N", 2: (51.0, 30.0, 12.5)}
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(1, 20, 30)).save(path, exif=exif, icc_profile=PROFILE, **options)
    return path


@pytest.mark.parametrize("form, name", [("png", "a.png"), ("jpg", "a.jpg"), ("webp", "a.webp"), ("same", "a.JPG")])
def test_a_result_says_what_its_photograph_says(test_run, tmp_path, form, name):
    photographed(tmp_path / "in/a.JPG")
    output, _ = test_run(tmp_path / "in", "--format", form)
    metadata = read_metadata(output / name)
    assert metadata.profile == PROFILE and metadata.exif[271] == "Maker"
    assert metadata.exif[34665] == {36867: "2026:05:01 10:20:30"} and metadata.exif[34853][2] == (51.0, 30.0, 12.5)
    assert b"thumbnail" not in (output / name).read_bytes()
    assert image_size(output / name) == (30, 20), "turned, and not to be turned again"
    output, _ = test_run(tmp_path / "in", "--format", form, "--metadata", False)
    metadata = read_metadata(output / name)
    assert metadata.profile is None and metadata.exif.keys() <= {305} and metadata.software.startswith(MARK)


def seen(path):
    """The colours of a picture as sRGB, by the profile that it has."""
    with Image.open(path) as picture:
        profile = picture.info.get("icc_profile")
        if not profile:
            return np.asarray(picture.convert("RGB")).astype(int)
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        return np.asarray(ImageCms.profileToProfile(picture.convert("RGB"), source, target)).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["png", "jpg", "webp", "same"])
@pytest.mark.parametrize("wide, plain", [("p3.png", "scene_srgb.png"), ("p3.jpg", "scene_srgb.png"),
                                         ("bars_p3.png", "bars_srgb.png")])
def test_colours_look_as_they_did(shared, test_run, wide, plain, form):
    """A photograph in Display P3, and the same in sRGB."""
    folder = shared / "cases/icc_profile"
    shift = np.abs(seen(folder / wide) - seen(folder / plain)).mean()
    assert shift < 3 < np.abs(read_image(folder / wide).astype(int) - seen(folder / plain)).mean()
    output, _ = test_run([folder / wide, folder / plain], "--format", form, model=BUNDLED / "light.pth")
    results = [next(output.glob(f"{name.split('.')[0]}.*")) for name in (wide, plain)]
    error = np.abs(seen(results[0]) - seen(results[1])).mean()
    assert error < 4 and 2 * error < np.abs(read_image(results[0]) - seen(results[1])).mean(), "without its profile"


def test_formats_that_are_kept_and_those_that_are_not(test_run, tmp_path):
    image = photo(1, 20, 24)
    for name in ("a.jpeg", "b.PNG", "c.tif", "d.webp", "e.bmp"):
        save(tmp_path / "in" / name, image)
    (tmp_path / "in/f.png").write_bytes((tmp_path / "in/a.jpeg").read_bytes())  # its content counts
    save(tmp_path / "in/g.tif", deep(image))
    Image.fromarray(image).save(tmp_path / "in/h.gif")
    output, result = test_run(tmp_path / "in", "--format", "same")
    names = {"a.jpeg", "b.PNG", "c.tif", "d.webp", "e.png", "f.jpg", "g.tif", "h.png", "metrics.csv"}
    assert set(contents(output)) == names
    assert "--format same: as PNG e.bmp, h.gif" in result.out.splitlines()
    for path in output.glob("[a-h].*"):
        source = next((tmp_path / "in").glob(f"{path.stem}.*"))
        assert path.suffix == ".png" or content_of(path) == content_of(source)
        assert read_image(path).dtype == read_image(source).dtype


def test_what_a_format_does_not_hold_is_said_once(test_run, tmp_path):
    kinds = {"deep": KINDS["deep.png"], "alpha": KINDS["alpha.png"], "plain": KINDS["colour.png"]}
    for name, image in kinds.items():
        save(tmp_path / f"in/{name}.png", image)
    for form, reduced in (("jpg", "2: alpha.png, deep.png"), ("webp", "1: deep.png"), ("png", None)):
        output, result = test_run(tmp_path / "in", "--format", form)
        lines = [line for line in result.out.splitlines() if "has not kept" in line]
        assert lines == [f"--format {form} has not kept the alpha or 16 bits of {reduced}"] * bool(reduced)
        assert read_image(output / f"deep.{form}").dtype == (np.uint16 if form == "png" else np.uint8)
        assert read_image(output / f"alpha.{form}").shape[2] == (3 if form == "jpg" else 4)


def test_quality_decides_the_size_and_what_is_written_is_measured(test_run, few):
    sizes, scores = [], []
    for quality in (20, 95):
        output, _ = test_run(few, "--format", "jpg", "--quality", quality)
        sizes.append(sum(path.stat().st_size for path in output.glob("*.jpg")))
        row = read_csv(output / "metrics.csv")[1]
        scores.append(float(row["psnr_y"]))
        expected = measure(read_image(output / "rain-2.jpg"), read_image(few / "norain-2.png"))
        assert scores[-1] == pytest.approx(expected["psnr_y"], abs=1e-6)
    assert sizes[0] < sizes[1] and scores[0] != scores[1]


def test_names_that_differ_by_case_do_not_collide(test_run, tmp_path):
    """Where upper and lower case are one, as on a Mac."""
    save(tmp_path / "in/a.png", photo(1, 12, 12))
    save(tmp_path / "in/A.jpg", photo(2, 12, 12))
    output, _ = test_run(tmp_path / "in", "--suffix", "_x")
    assert set(contents(output)) == {"a.png_x.png", "A.jpg_x.png", "metrics.csv"}


@pytest.mark.parametrize("option", [("--quality", 0), ("--quality", 101), ("--suffix", "a/b"), ("--format", "gif")])
def test_bad_options_of_results_are_refused(refused, checkpoint, one_image, tmp_path, option):
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", one_image, "--output_path", tmp_path / "out", *option,
        names=[option[0]],
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("victim", ["contact_sheet.jpg", "comparison/a.jpg"])
def test_panels_do_not_overwrite_an_input(refused, checkpoint, tmp_path, victim):
    save(tmp_path / "in/a.bmp", photo(1, 12, 12))
    save(tmp_path / "in" / victim, photo(2, 12, 12))
    before = contents(tmp_path / "in")
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", tmp_path / "in", "--output_path", tmp_path / "in",
        "--recursive", "--comparison", names=["--output_path"],
    )
    assert contents(tmp_path / "in") == before


# Several paths, and whatever else a folder holds


def test_case_of_a_glob(shared, test_run):
    """photos/*.jpg, which the shell expands."""
    paths = sorted((shared / "cases/glob_inputs/input").glob("*.jpg"))
    output, _ = test_run(paths)
    assert set(contents(output)) == {"1.png", "2.png", "3.png", "metrics.csv"}
    assert [row["image"] for row in read_csv(output / "metrics.csv")] == ["1.jpg", "2.jpg", "3.jpg", "average of 3"]


def test_files_and_folders_mirror_below_the_folder_that_they_share(test_run, few, tmp_path):
    """Equal names stay apart, in the folders and in the report; the pairs are found and measured."""
    save(tmp_path / "photos/rain-1.jpg", photo(7, 12, 12))
    save(tmp_path / "photos/deep/rain-1.jpg", photo(8, 12, 14))
    output, _ = test_run([few, tmp_path / "photos/rain-1.jpg", tmp_path / "photos/deep"])
    names = [f"few/rain-{number}.png" for number in (1, 2, 3)] + ["photos/rain-1.jpg", "photos/deep/rain-1.jpg"]
    assert set(contents(output)) == {name.replace(".jpg", ".png") for name in names} | {"metrics.csv"}
    rows = read_csv(output / "metrics.csv")
    assert [row["image"] for row in rows] == [*names, "average of 3"]
    assert [bool(row["psnr_y"]) for row in rows] == [True, True, True, False, False, True]
    assert read_image(output / "photos/deep/rain-1.png").shape == (12, 14, 3)


def test_several_paths_have_a_folder_under_results(run, checkpoint, few, monkeypatch):
    monkeypatch.chdir(few.parent)
    result = run("test", "--save_path", checkpoint, "--test_data_path", "few/rain-1.png", "few/rain-3.png")
    assert result.status == 0 and "2 images in results/few/model-net_latest" in result.out, result


def test_a_glob_may_have_caught_other_files(test_run, refused, checkpoint, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("notes.txt", "more.txt"):
        (tmp_path / "in" / name).write_text("about")
    arguments = ("--save_path", checkpoint, "--output_path", tmp_path / "out", "--test_data_path")
    refused("test", *arguments, *(tmp_path / "in").iterdir(), names=["--test_data_path", "neither an image nor a"])
    save(tmp_path / "in/a.png", photo(1, 12, 12))
    _, result = test_run([*sorted((tmp_path / "in").iterdir()), tmp_path / "in/a.png"])
    assert "1 image in" in result.out and "not processed: more.txt, notes.txt" in result.out.splitlines()


def test_a_glob_may_have_caught_a_folder_without_pictures_and_a_broken_link(test_run, tmp_path):
    save(tmp_path / "in/a.png", photo(1, 12, 12))
    (tmp_path / "in/empty").mkdir()
    (tmp_path / "in/b.png").symlink_to(tmp_path / "none.png")
    output, result = test_run(sorted((tmp_path / "in").iterdir()), status=1)
    assert (output / "a.png").exists() and "not processed: empty\n" in result.out
    assert result.err == "test.py: error: 1 of 2 images failed: b.png\n"


def test_a_glob_within_a_set_takes_no_clean_image_of_it(test_run, tmp_path):
    for number in (1, 2):
        save(tmp_path / f"set/norain-00{number}.png", photo(number, 12, 12))
    save(tmp_path / "set/rainy/rain-001.png", with_rain(photo(1, 12, 12)))
    output, result = test_run(sorted((tmp_path / "set").iterdir()))
    assert set(contents(output)) == {"rainy/rain-001.png", "norain-002.png", "metrics.csv"}
    assert "left out 1 (clean images of others): norain-001.png" in result.out and result.out.count("left out") == 1


@pytest.mark.parametrize("layout, count", [("set/rainy/rain-{}.png set/norain-{}.png", 1),
                                            ("input/{}.png target/{}.png", 3), ("rain-{}.png norain-{}.png", 3)])
def test_pictures_named_by_themselves_are_told_of_their_clean_images(test_run, tmp_path, layout, count):
    rainy, clean = layout.split()
    paths = [save(tmp_path / rainy.format(number), photo(number, 12, 12)) for number in range(count)]
    assert "clean image" not in test_run(paths)[1].out
    for number in range(count):
        save(tmp_path / clean.format(number), photo(number, 12, 12))
    out = test_run(paths)[1].out
    assert f"({os.path.relpath(tmp_path / clean.format(0), paths[0].parent)}); name the folder" in out
    assert ("a picture has a clean image" if count == 1 else "3 pictures have clean images") in out
    assert "name the folder" not in test_run(paths, "--no_reference")[1].out
    assert "name the folder" not in test_run([paths[0].parent, paths[0]])[1].out


@pytest.mark.parametrize("place", ["in", "in/derained"])
def test_a_glob_may_catch_its_own_results_the_second_time(run, checkpoint, tmp_path, place):
    save(tmp_path / "in/a.png", photo(1, 12, 12))
    options = "--save_path", checkpoint, "--output_path", tmp_path / place, "--suffix", "_1"
    for _ in range(2):
        result = run("test", *options, "--test_data_path", *sorted((tmp_path / "in").glob("*")))
        assert result.status == 0 and "1 image in" in result.out, result
    assert "(result" in result.out and "of an earlier run): a_1.png" in result.out


@pytest.mark.parametrize("first", [True, False])
def test_a_folder_and_a_file_in_it(test_run, few, tmp_path, first):
    """The file is taken once, with its clean image, and in the place of the folder; so are files that are neither."""
    (few / "notes.txt").write_text("about")
    files = [few / "rain-2.png", few / "notes.txt"]
    output, result = test_run([few, *files] if first else [*files, few])
    assert len(lines_with_metrics(result)) == 4 and "not processed: few/notes.txt\n" in result.out
    (few / "again").symlink_to(few)
    save(few / "below/rain-2.png", photo(2, 12, 12))
    output, result = test_run([few / "below", few, few / "again"], "--recursive", "--output_path", tmp_path / "other")
    assert "7 images in" in result.out


@pytest.mark.parametrize("form", ["set {}", "{} set", "set {} other"])
def test_a_picture_named_beside_its_set_is_derained(test_run, few, tmp_path, form, monkeypatch):
    """It belongs to no pair, so the set alone leaves it out."""
    monkeypatch.chdir(few.rename(tmp_path / "set").parent)
    for name in ("set/holiday.jpg", "set/beach.jpg", "other/a.png"):
        save(tmp_path / name, photo(1, 12, 12))
    words = form.format("set/holiday.jpg").split()
    output, result = test_run(words)
    other = "other" in words
    assert f"{4 + other} images in" in result.out and "not processed" not in result.out
    assert {"set/holiday.png", "set/rain-1.png"} <= set(contents(output))
    assert "left out 1 (no pair by their names): beach.jpg\n" in result.out
    _, result = test_run(["set", *sorted(map(str, (tmp_path / "set").glob("*.jpg")))])
    assert "5 images in" in result.out and "left out" not in result.out


@pytest.mark.parametrize("words", ["h h/input h/target", "h/target h/input", "h/target h h/notes.txt"])
def test_a_glob_of_a_sets_folders_takes_no_clean_image(test_run, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        save(tmp_path / f"h/input/{number}.png", with_rain(photo(number, 12, 12)))
        save(tmp_path / f"h/target/{number}.png", photo(number, 12, 12))
    (tmp_path / "h/notes.txt").write_text("about")
    _, result = test_run(words.split())
    assert "average of 2 " in result.out and len(lines_with_metrics(result)) == 3 and "2 images in" in result.out
    assert result.out.count("left out 2 (clean images of others)") == 1 and "derained but not" not in result.out
    assert result.out.count("not processed") == ("notes" in words or words.startswith("h "))


def test_an_option_given_twice_takes_both(test_run, few):
    output, result = test_run(few / "rain-1.png", "--test_data_path", few / "rain-2.png")
    assert {"rain-1.png", "rain-2.png"} <= set(contents(output))


def test_a_path_that_is_missing_among_several_is_named(refused, checkpoint, few, tmp_path):
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", few, tmp_path / "none.jpg", "--output_path",
        tmp_path / "out", names=["--test_data_path", tmp_path / "none.jpg"],
    )
    assert not (tmp_path / "out").exists()


def test_rows_carry_the_path_below_the_folder(test_run, tmp_path):
    names = ["a.png", "x/a.png", "x/y/a.png"]
    for number, name in enumerate(names):
        save(tmp_path / "in" / name, photo(number, 12, 12))
    (tmp_path / "in/x/bad.png").write_bytes(b"")
    output, result = test_run(tmp_path / "in", "--recursive", status=1)
    assert [row["image"] for row in read_csv(output / "metrics.csv")] == [*names, "average of 3"]
    assert result.err == "test.py: error: 1 of 4 images failed: x/bad.png\n"


@pytest.mark.slow
def test_case_of_a_folder_with_pictures_and_videos(shared, test_run, tmp_path):
    """All of them, and every file that is neither is named once."""
    pytest.importorskip("pillow_heif")
    folder = shutil.copytree(shared / "cases/still_suffixes/folder", tmp_path / "in")
    (folder / "readme.txt").write_text("about")
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "damaged.mov").write_bytes(b"")
    (folder / ".hidden").touch()
    output, result = test_run(folder, "--recurrent_iter", 1, status=1)
    done = {"IMG_0001.png", "x_jfif.png", "ref.png", "metrics.csv"}
    assert {name for name in contents(output) if not name.startswith("plain.")} == done
    assert [path.stem for path in output.glob("plain.*") if path.suffix != ".csv"] == ["plain"]
    assert result.err == "test.py: error: 2 of 6 files failed: damaged.jpg, damaged.mov\n"
    assert result.out.count("readme.txt") == 1 and "not processed: readme.txt" in result.out.splitlines()
    assert ".hidden" not in result.out


@pytest.mark.parametrize("flags", [(), ("--recursive",)])
def test_a_video_that_is_called_a_picture_is_found_by_its_content(test_run, shared, tmp_path, flags):
    save(tmp_path / "in/photo.png", photo(1, 12, 12))
    (tmp_path / "in/old.png").mkdir()
    shutil.copy(shared / "cases/still_suffixes/folder/plain.mp4", tmp_path / "in/funny.gif")
    output, _ = test_run(tmp_path / "in", "--recurrent_iter", 1, *flags)
    stems = {path.stem for path in output.iterdir()}
    assert stems == {"photo", "metrics", "funny"} and not (output / "funny.png").exists()


def test_colours_that_a_result_cannot_name_are_told_of(test_run, tmp_path):
    """A profile of grey, and Display P3 in a chunk of its own; not what says the colours of sRGB in such a chunk."""
    (tmp_path / "in").mkdir()
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[16:20] = b"GRAY"
    Image.fromarray(photo(1, 12, 12)[..., 0]).save(tmp_path / "in/grey.png", icc_profile=bytes(profile))
    write_image(tmp_path / "in/p3.png", photo(2, 12, 12), Metadata(colour={b"cICP": b"\x0c\x0d\0\1"}))
    write_image(tmp_path / "in/srgb.png", photo(3, 12, 12), Metadata(colour={b"gAMA": (45455).to_bytes(4, "big")}))
    for form, names in (("png", "grey.png"), ("jpg", "grey.png, p3.png")):
        _, result = test_run(tmp_path / "in", "--format", form, "--output_path", tmp_path / form)
        (line,) = [line for line in result.out.splitlines() if "may look different" in line]
        assert line.endswith(f": {names}"), line


def test_what_macos_leaves_beside_files_is_no_input(test_run, shared, tmp_path):
    save(tmp_path / "in/below/a.png", photo(1, 12, 12))
    for name in ("below/._a.png", "._clip.mp4"):
        (tmp_path / "in" / name).write_bytes(b"\0\5\x16\7")
    output, result = test_run(tmp_path / "in", "--recursive")
    assert set(contents(output)) == {"below/a.png", "metrics.csv"} and "._" not in result.out


def test_a_folder_of_videos_alone_and_one_of_neither(test_run, refused, shared, checkpoint, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(shared / "cases/still_suffixes/folder/plain.mp4", tmp_path / "in/plain.dat")
    output, _ = test_run(tmp_path / "in", "--recurrent_iter", 1)
    assert "plain" in {path.stem for path in output.iterdir()}
    (tmp_path / "in/plain.dat").write_text("rain")
    for flags in ((), ("--recursive",)):
        refused(
            "test", "--save_path", checkpoint, "--test_data_path", tmp_path / "in", *flags,
            names=["--test_data_path", tmp_path / "in", "neither images nor videos"],
        )


def test_folders_below_with_pictures_are_named(refused, checkpoint, tmp_path):
    for name in ("A/1.png", "B/1.png"):
        save(tmp_path / "in" / name, photo(1, 12, 12))
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", tmp_path / "in",
        names=["neither images nor videos in this folder, but pictures in A and B;", "--clean_path", "--recursive"],
    )


def small_video(path, frames=2):
    """Write a raw video, which is known by its first bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = b"FRAME\n" + bytes(range(256)) + bytes([128]) * 128
    path.write_bytes(b"YUV4MPEG2 W16 H16 F25:1 Ip A1:1 C420jpeg\n" + frames * frame)
    return path


@pytest.mark.parametrize("name", ["a.y4m", "a.dat", "a"])
def test_a_raw_video_is_taken_beside_others(test_run, refused, checkpoint, tmp_path, name):
    """As it is taken alone."""
    path = small_video(tmp_path / "in" / name)
    save(tmp_path / "in/b.png", photo(1, 12, 12))
    for words in (path, [path, tmp_path / "in/b.png"], tmp_path / "in"):
        output, result = test_run(words, "--output_path", tmp_path / f"out{len(list(tmp_path.iterdir()))}")
        assert "2 frames" in result.out and "not processed" not in result.out


def test_the_suffix_is_of_videos_too(test_run, refused, checkpoint, tmp_path):
    """So it is a way out where a table is in the way, as the error says."""
    clip = small_video(tmp_path / "in/clip.y4m")
    (tmp_path / "in/clip.csv").write_text("mine")
    base = ("--save_path", checkpoint, "--test_data_path", clip, "--output_path", tmp_path / "in")
    refused("test", *base, names=["clip.csv would be overwritten", "or a --suffix for the names"])
    for _ in range(2):
        test_run(tmp_path / "in", "--output_path", tmp_path / "in", "--suffix", "_x")
        made = {path.stem for path in (tmp_path / "in").iterdir() if path.suffix in (".csv", ".mp4", ".mkv")}
        assert made == {"clip", "clip_x"} and (tmp_path / "in/clip.csv").read_text() == "mine"


def test_options_of_pictures_are_refused_for_a_video_alone(refused, checkpoint, tmp_path):
    clip = small_video(tmp_path / "clip.y4m")
    for option in (("--format", "jpg"), ("--quality", 90)):
        arguments = ("--save_path", checkpoint, "--test_data_path", clip, *option)
        refused("test", *arguments, names=[option[0], f"{clip} is a video"])


def test_metadata_false_reaches_videos(tmp_path):
    for flags, expected in (([], True), (["--metadata", "False"], False)):
        args = test_script.parse_args(["--test_data_path", str(small_video(tmp_path / "a.y4m")), *flags])
        assert test_script.video_options(args).metadata is expected


def test_stray_files_of_a_data_set_are_named(test_run, few, tmp_path):
    for number in (1, 2, 3):
        for kind, name in (("input", f"rain-{number}.png"), ("target", f"norain-{number}.png")):
            (tmp_path / "set" / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(few / name, tmp_path / "set" / kind / f"{number}.png")
    save(tmp_path / "set/cover.jpg", photo(9, 12, 12))
    (tmp_path / "set/input/list.txt").write_text("1 2 3")
    _, result = test_run(tmp_path / "set")
    assert "left out 1 (no pair by their names): cover.jpg" in result.out
    assert "not processed: input/list.txt" in result.out.splitlines()
    assert read_csv(tmp_path / "results/metrics.csv")[-1]["image"] == "average of 3"


# One bad picture


def test_an_image_without_room_on_the_disk_does_not_cost_the_others(test_run, small_disk, tmp_path, monkeypatch):
    """Its feature maps are mapped from a file, for which there is no room."""
    disk = small_disk("1m")
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    for name, side in (("a", 12), ("b", 100), ("c", 12)):
        save(tmp_path / f"in/{name}.png", photo(1, side, side))
    output, result = test_run(tmp_path / "in", "--max_memory", 0, status=1)
    assert result.err == "test.py: error: 1 of 3 images failed: b.png\n"
    assert f"error: {tmp_path / 'in/b.png'}: {disk}" in result.out and "No space left" in result.out
    assert set(contents(output)) == {"a.png", "c.png", "metrics.csv"} and not list(disk.iterdir())


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    OSError(12, "Cannot allocate memory"),
])
def test_want_of_memory_does_not_cost_the_others(test_run, few, monkeypatch, error):
    derain = pictures.derain

    def scarce(runner, image, device):
        if (image == read_image(few / "rain-2.png")).all():
            raise error
        return derain(runner, image, device)

    monkeypatch.setattr(pictures, "derain", scarce)
    output, result = test_run(few, status=1)
    assert result.err == "test.py: error: 1 of 3 images failed: rain-2.png\n"
    assert f"error: {few / 'rain-2.png'}: " in result.out and "emory" in result.out
    assert read_csv(output / "metrics.csv")[-1]["image"] == "average of 2"


@pytest.mark.parametrize("error", [MemoryError(), cv2.error("(-4:Insufficient memory) Failed to allocate 9 bytes")])
def test_want_of_memory_in_saving_does_not_cost_the_others(test_run, few, monkeypatch, error):
    write = pictures.write_image

    def scarce(path, *arguments):
        if path.name == "rain-2.png":
            raise error
        return write(path, *arguments)

    monkeypatch.setattr(pictures, "write_image", scarce)
    output, result = test_run(few, status=1)
    assert "1 of 3 images failed: rain-2.png\n" in result.err and "not enough memory" in result.out
    assert read_csv(output / "metrics.csv")[-1]["image"] == "average of 2"


def test_results_alone_are_not_said_to_be_no_images(test_run, refused, few, tmp_path):
    output, _ = test_run(few)
    results = sorted(output.glob("*.png"))
    refused("test", "--test_data_path", *results, "--output_path", output, names=["a result of an earlier run"])


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ZeroDivisionError(), KeyError("psnr")])
def test_a_fault_of_ours_keeps_its_traceback(test_run, few, monkeypatch, error):
    def broken(*arguments):
        raise error

    monkeypatch.setattr(pictures, "derain", broken)
    with pytest.raises(type(error)):
        test_run(few)


def test_the_only_picture_that_fails_has_its_reason_as_the_error(test_run, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    _, result = test_run(tmp_path / "a.png", status=1)
    assert result.err.startswith(f"test.py: error: {tmp_path / 'a.png'}: not a readable image")


def test_a_picture_that_fails_beside_a_video_has_its_reason_said(test_run, tmp_path):
    small_video(tmp_path / "in/clip.y4m")
    (tmp_path / "in/bad.jpg").write_bytes(b"")
    _, result = test_run(tmp_path / "in", status=1)
    assert f"error: {tmp_path / 'in/bad.jpg'}: not a readable image" in result.out
    assert result.err == "test.py: error: 1 of 2 files failed: bad.jpg\n"


def test_a_full_disk_ends_the_run(test_run, small_disk, tmp_path):
    disk = small_disk("64k")
    for name in ("a", "b", "c"):
        noise = np.random.default_rng(0).integers(0, 256, (100, 120, 3), np.uint8)
        save(tmp_path / f"in/{name}.png", noise)
    _, result = test_run(tmp_path / "in", "--output_path", disk / "out", status=1)
    assert result.err.startswith(f"test.py: error: {disk / 'out/b.png'}: could not be written (No space left")
    assert "c.png" not in result.out and set(contents(disk / "out")) == {"a.png"}


# --results_path


def other_method(few, folder, name):
    """Results of another method: the rainy images, darker; ``name(number)`` is how each is called."""
    for number in (1, 2, 3):
        save(folder / name(number), read_image(few / f"rain-{number}.png") // 2)
    return folder


@pytest.mark.parametrize("name", ["rain-{}.png", "norain-{}.png", "{}.png", "00{}.webp", "Rain-0{}.TIFF"])
def test_results_of_another_method_are_measured(run, few, tmp_path, monkeypatch, name):
    """By the protocol and into the report of any run, without a network; nothing is written to their folder."""
    folder = other_method(few, tmp_path / "theirs", lambda number: name.format(number))
    before = contents(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(test_script, "load_network", None)
    result = run("test", "--results_path", folder, "--test_data_path", few)
    assert result.status == 0, result
    rows = read_csv(tmp_path / "results/few/measured-theirs/metrics.csv")
    assert [row["image"] for row in rows] == [*(f"rain-{number}.png" for number in (1, 2, 3)), "average of 3"]
    for number, row in enumerate(rows[:-1], 1):
        result_path = folder / name.format(number)
        scores = measure(read_image(result_path), read_image(few / f"norain-{number}.png"))
        assert {key: float(row[key]) for key in scores} == pytest.approx(scores, abs=1e-6)
        assert row["seconds"] == ""
    assert len(lines_with_metrics(result)) == 4 and "weights" not in result.out
    assert contents(folder) == before
    assert set(contents(tmp_path / "results")) == {"few/measured-theirs/metrics.csv"}


@pytest.mark.parametrize("name", ["Rain1400_sep", "Rain200L_orig", "SPA_real_test_1000", "Rain800_sep"])
@pytest.mark.parametrize("which", [0, 1], ids=["rainy", "clean"])
def test_results_of_public_sets_are_found_by_either_name(run, shared, tmp_path, name, which):
    folder = shared / "cases/layouts" / name
    (tmp_path / "theirs").mkdir()
    for pair in find_pairs(folder).pairs:
        shutil.copy(pair.clean, tmp_path / "theirs" / f"{pair[which].stem}{pair.clean.suffix}")
    result = run("test", "--results_path", tmp_path / "theirs", "--test_data_path", folder, "--output_path", tmp_path)
    assert result.status == 0, result
    assert [row["psnr_y"] for row in read_csv(tmp_path / "metrics.csv")] == ["inf"] * 4


def test_a_clean_image_of_several_rainy_ones_names_no_result(run, refused, shared, tmp_path):
    folder = shared / "cases/val_leak/Rain12600"
    arguments = ("test", "--test_data_path", folder, "--output_path", tmp_path / "out", "--results_path")
    refused(*arguments, folder / "ground_truth", names=["no picture goes by its name with"])
    result = run(*arguments, folder / "rainy_image")
    assert result.status == 0 and "average of 6 " in result.out, result


def test_missing_and_surplus_results_are_named(run, few, tmp_path):
    folder = other_method(few, tmp_path / "theirs", lambda number: f"rain-{number}.png")
    (folder / "rain-2.png").rename(folder / "cat.png")
    save(folder / "rain-3.png", photo(1, 9, 9))
    result = run(
        "test", "--results_path", folder, "--test_data_path", few, "--output_path", tmp_path / "out", "--comparison"
    )
    assert result.status == 1, result
    assert result.err == f"test.py: error: --results_path {folder}: no result of 1 image: rain-2.png\n"
    assert f"{folder}: left out 1 (no image of the set by their names): cat.png" in result.out
    assert "rain-3.png is not the result of" in result.out
    assert set(contents(tmp_path / "out")) == {"metrics.csv", "comparison/rain-1.jpg", "contact_sheet.jpg"}
    assert read_csv(tmp_path / "out/metrics.csv")[-1]["image"] == "average of 1"


def test_a_report_goes_into_the_other_methods_folder_only_on_request(run, refused, few, tmp_path):
    folder = other_method(few, tmp_path / "theirs", lambda number: f"rain-{number}.png")
    arguments = ("test", "--results_path", folder, "--test_data_path", few, "--output_path", folder)
    (folder / "metrics.csv").write_text("theirs")
    refused(*arguments, names=["metrics.csv would be overwritten"])
    (folder / "metrics.csv").unlink()
    assert run(*arguments).status == run(*arguments).status == 0


@pytest.mark.parametrize("names, said", [
    (["rain-1.png", "norain-1.png"], "may both be the result of rain-1.png"),
    (["rain-1.png", "rain-1.jpg"], "may both be the result of rain-1.png"),
    (["cat.png"], "no picture goes by its name with"), ([], "no images"), (None, "no such folder"),
])
def test_results_that_are_not_clear_are_refused(refused, few, tmp_path, names, said):
    if names is not None:
        (tmp_path / "theirs").mkdir()
        for name in names:
            save(tmp_path / "theirs" / name, photo(1, 16, 20))
    refused(
        "test", "--results_path", tmp_path / "theirs", "--test_data_path", few, "--output_path", tmp_path / "out",
        names=[f"--results_path {tmp_path / 'theirs'}", said],
    )
    assert not (tmp_path / "out").exists()


def test_options_of_deraining_do_not_go_with_measuring(refused, checkpoint, few, tmp_path):
    arguments = ("test", "--results_path", few, "--output_path", tmp_path / "out", "--test_data_path")
    for option in (("--save_path", checkpoint), ("--recursive",), ("--self_ensemble",)):
        refused(*arguments, few, *option, names=["--results_path", option[0]])
    refused(*arguments, few / "rain-1.png", names=["--results_path", "rain-1.png"])
    refused(*arguments, few, tmp_path, names=["--results_path", "expected a folder"])


# Which network


@pytest.fixture
def one_image(tmp_path):
    return save(tmp_path / "one/a.png", photo(1, 24, 24)).parent


@pytest.mark.parametrize("recurrent_iter, use_dilation", [(1, True), (2, False), (6, True)])
def test_network_is_that_of_the_runs_arguments(test_run, one_image, tmp_path, recurrent_iter, use_dilation):
    torch.manual_seed(1)
    net = SAPNet(recurrent_iter, use_dilation).eval()
    for parameter in net.parameters():
        parameter.data *= 2  # random weights are timid; make stages and dilation show
    save_checkpoint(tmp_path / "m/net_latest.pth", net.state_dict())
    (tmp_path / "m/args.json").write_text(json.dumps({"recurrent_iter": recurrent_iter, "use_dilation": use_dilation}))
    image = read_image(one_image / "a.png")
    expected = restored(net, image)
    others = [
        restored(SAPNet.from_state_dict(net.state_dict(), *other), image)
        for other in ((3, use_dilation), (recurrent_iter, not use_dilation))
    ]
    assert all(np.abs(expected - other).max() > 2 for other in others), "the arguments matter here"
    output, _ = test_run(one_image, model=tmp_path / "m")
    assert np.abs(read_image(output / "a.png") - expected).max() <= 1
    # The options given on the command line come first.
    output, _ = test_run(one_image, "--recurrent_iter", 3, model=tmp_path / "m/net_latest.pth")
    assert np.abs(read_image(output / "a.png") - others[0]).max() <= 1
    output, _ = test_run(one_image, "--use_dilation", not use_dilation, model=tmp_path / "m")
    assert np.abs(read_image(output / "a.png") - others[1]).max() <= 1


@pytest.mark.slow
def test_published_weights_derain_a_real_image(shared, test_run, tmp_path):
    """The whole way from the command line, once."""
    for name in ("norain-001.png", "rainy/rain-001.png"):
        (tmp_path / "set/rainy").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes((shared / "data/test/Rain100H" / name).read_bytes())
    output, _ = test_run(tmp_path / "set", model=shared / "weights/sapnet_published_2021-09.pth")
    expected = json.loads((shared / "reference/expected_metrics.json").read_text())
    expected = expected["sapnet_published_2021-09 on Rain100H"]["images"]["rain-001.png"]["round"]
    (row, _) = read_csv(output / "metrics.csv")
    assert float(row["psnr_y"]) == pytest.approx(expected["psnr_y"], abs=1e-3)
    assert float(row["ssim_y"]) == pytest.approx(expected["ssim_y"], abs=1e-4)
