"""test.py on made folders of all kinds of images."""
import csv
import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import test as test_script
import utils
from conftest import contents, photo, save, with_rain
from networks import SAPNet
from utils import load_network, measure, read_image


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


def test_each_set_and_model_has_its_folder(checkpoint, tmp_path, monkeypatch):
    save(tmp_path / "clips/photo.png", photo(1, 12, 12))
    monkeypatch.chdir(tmp_path / "clips")

    def output(source, model):
        return str(test_script.parse_args(["--test_data_path", str(source), "--save_path", str(model)]).output_path)

    run_folder = checkpoint.parent
    assert output(".", run_folder) == f"results/clips/{run_folder.name}"
    assert output("photo.png", checkpoint) == f"results/photo/{run_folder.name}-{checkpoint.stem}"
    assert output("../clips", "missing") == "results/clips/missing"


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
    lines = [line for line in result.out.splitlines() if " dB " in line]
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
    output, result = test_run(rain100)
    rows = read_csv(output / "metrics.csv")
    assert [row["image"] for row in rows if not row["psnr_y"]] == ["rain-5.png"]
    assert rows[-1]["image"] == "average of 11" and "without a partner: rain-5.png" in result.out


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
    utils.save_checkpoint(tmp_path / "m/net_latest.pth", net.state_dict())
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
