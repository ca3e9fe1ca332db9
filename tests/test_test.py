"""test.py on made folders of all kinds of images."""
import csv
import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import test as test_script
from checkpoints import BUNDLED, PUBLISHED_FOLDER, load_network, save_checkpoint
from conftest import contents, photo, run_subprocess, save, with_rain
from images import read_image
from metrics import measure
from networks import SAPNet


@pytest.fixture
def test_run(run, checkpoint, tmp_path):
    """test_run(folder, *flags) -> (folder of the results, result)."""

    def start(folder, *extra, status=0, model=checkpoint.parent):
        output = tmp_path / "results"
        result = run(
            "test", "--save_path", model, "--test_data_path", folder, "--output_path", output, "--device", "cpu", *extra
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


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def restored(net, image):
    """What the network makes of an (H, W, 3) array, in its dtype: rounded, clamped."""
    peak = np.iinfo(image.dtype).max
    with torch.inference_mode():
        output = net(torch.from_numpy(np.float32(image) / peak).permute(2, 0, 1)[None])[0]
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
    general, light = BUNDLED / "general.pth", BUNDLED / "light.pth"
    for source, model, used, folder in (
        (".", (own,), checkpoint, f"clips/{own.name}"),
        ("photo.png", (own,), checkpoint, f"photo/{own.name}"),
        ("../clips", (own / "net_best.pth",), own / "net_best.pth", f"clips/{own.name}-net_best"),
        ("../clips", (checkpoint,), checkpoint, f"clips/{own.name}-net_latest"),
        ("../clips", (light,), light, "clips/light"),
        ("../clips", (), general, "clips/general"),
    ):
        arguments = ("--save_path", *model) if model else ()
        result = run("test", *arguments, "--test_data_path", source, "--device", "cpu")
        assert result.status == 0, result
        assert result.out.splitlines()[0] == f"weights: {used}"
        assert f"1 images in results/{folder}" in result.out
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
    assert out.startswith(f"weights: {BUNDLED / 'general.pth'}\n")
    assert (tmp_path / "results/ref/general/ref.png").exists()


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
    return {row["image"].split(".")[0]: [row[name] for name in test_script.METRICS] for row in rows}


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


@pytest.mark.parametrize("half", ["left", "right"])
def test_halves_of_a_picture_are_a_pair(test_run, pairs_dir, tmp_path, half):
    """The result is what the split files give, with the panels too."""
    output, _ = test_run(pairs_dir, "--comparison")
    derained = {name.removeprefix("rain-"): data for name, data in contents(output).items() if name.startswith("rain-")}
    expected = {stem.removeprefix("rain-"): values for stem, values in metrics_of(output).items()}
    folder = side_by_side(pairs_dir, tmp_path / "wide", half)
    output, result = test_run(folder, "--side_by_side", half, "--comparison", "--output_path", tmp_path / "halves")
    written = contents(tmp_path / "halves")
    assert metrics_of(tmp_path / "halves") == expected
    assert {name: data for name, data in written.items() if name in derained} == derained
    assert {name for name in written if "/" in name} == {f"comparison/{number}.jpg" for number in (1, 2, 3)}
    assert "left out" not in result.out and "not measured" not in result.out
    # One such picture alone
    output, _ = test_run(folder / "2.png", "--side_by_side", half, "--output_path", tmp_path / "one")
    assert set(contents(tmp_path / "one")) == {"2.png", "metrics.csv"}
    assert metrics_of(tmp_path / "one")["2"] == expected["2"]
    # The other half is not the rainy one
    test_run(folder, "--side_by_side", {"left": "right", "right": "left"}[half], "--output_path", tmp_path / "other")
    assert contents(tmp_path / "other")["1.png"] != derained["1.png"]


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
    assert "1 images in" in result.out, "only on request"


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


def test_a_result_of_another_image_is_not_measured(test_run, rain100):
    output, _ = test_run(rain100)
    save(output / "rain-4.png", photo(1, 9, 9))
    output, result = test_run(rain100, "--overwrite", False, status=1)
    assert "rain-4.png" in result.err and "remove it" in result.out
    output, _ = test_run(rain100)
    assert read_image(output / "rain-4.png").shape == (20, 20, 3)


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
