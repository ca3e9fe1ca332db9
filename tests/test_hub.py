"""hubconf.py: SAPNet from another program, whose modules may be called as ours."""
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import threading
import warnings

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import hubconf
from checkpoints import BUNDLED, load_network, load_weights, save_checkpoint
from conftest import ROOT, contents, photo, save, with_rain
from images import read_image
from networks import SAPNet

STEMS = sorted(path.stem for path in ROOT.glob("*.py"))
HEIGHT, WIDTH = 44, 60
# A program all of whose modules have our names. It imports half of them before, and half after.
PROGRAM = """
import sys, threading, warnings
import cv2, torch
from PIL import Image
import {before}

def settings():
    return Image.MAX_IMAGE_PIXELS, cv2.utils.logging.getLogLevel(), list(warnings.filters)

settings_before = settings()
paths, modules = list(sys.path), {{name: sys.modules[name] for name in sys.modules}}
net = torch.hub.load(*{repository}, "sapnet", {options})
derain = torch.hub.load(*{repository}, "derain", weights="light", recurrent_iter=1, {options})
assert sys.path == paths
assert all(sys.modules[name] is module for name, module in modules.items())
ours = [name for name in sys.modules if name.startswith("_sapnet")]
assert not {{*sys.modules}} - {{*modules}} & {{*{stems}}}, "modules of ours under their plain names"
import {after}
assert all(sys.modules[name].MINE for name in {stems})

import numpy as np
image = np.full((24, 32, 3), 99, np.uint8)
results = [None] * 3
def work(number):
    results[number] = derain({picture!r} if number else image)
threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert results[0].shape == image.shape and (results[1] == results[2]).all()
assert all(sys.modules[name].MINE for name in {stems})
assert settings() == settings_before
with torch.inference_mode():
    print(tuple(net(torch.rand(1, 3, 24, 32)).shape), results[1].shape, {more})
"""


def run_program(folder, repository, options, more="0"):
    """Run ``PROGRAM`` in a folder of modules named as ours."""
    for name in STEMS:
        (folder / f"{name}.py").write_text("MINE = True\n")
    picture = save(folder / "rainy.png", photo(3, 24, 32))
    half = len(STEMS) // 2
    text = PROGRAM.format(
        before=", ".join(STEMS[:half]), after=", ".join(STEMS[half:]), stems=STEMS, repository=repository,
        options=options, picture=str(picture), more=more,
    )
    (folder / "program.py").write_text(text)
    return subprocess.run([sys.executable, "program.py"], cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_a_program_with_modules_of_our_names_keeps_them(tmp_path):
    child = run_program(tmp_path, (str(ROOT),), 'source="local"')
    assert child.returncode == 0, child.stderr
    assert child.stdout == "(1, 3, 24, 32) (24, 32, 3) 0\n"


@pytest.mark.slow
def test_from_github_as_torch_hub_keeps_it(tmp_path):
    """GitHub's archive, unpacked where torch.hub looks before it downloads; with one more file of weights."""
    clone = tmp_path / "hub/someone_SAPNet_main"
    shutil.copytree(BUNDLED, clone / "weights")
    shutil.copy(BUNDLED / "light.pth", clone / "weights/own.pth")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, clone)
    (tmp_path / "program").mkdir()
    options = f'trust_repo=True, skip_validation=True, verbose=torch.hub.set_dir({str(tmp_path / "hub")!r})'
    more = f'torch.hub.load("someone/SAPNet:main", "sapnet", "own", {options}).recurrent_iter'
    child = run_program(tmp_path / "program", ("someone/SAPNet:main",), options, more)
    assert child.returncode == 0, child.stderr
    assert child.stdout == "(1, 3, 24, 32) (24, 32, 3) 6\n"


@pytest.mark.slow
def test_the_case_of_a_program_with_its_own_utils(shared):
    project = shared / "cases/own_project_import/proj"
    child = subprocess.run([sys.executable, "app.py", ROOT], cwd=project, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout == f"(1, 3, 32, 48) {project.resolve() / 'utils.py'}\n"


# What it returns


def test_torch_hub_lists_the_two_entry_points_alone():
    public = [name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")]
    assert sorted(public) == ["derain", "sapnet"]


def test_sapnet_is_the_network_of_the_file(tmp_path):
    expected = load_network(BUNDLED / "light.pth").state_dict()
    for weights in ("light", BUNDLED / "light.safetensors", str(BUNDLED / "light.pth")):
        net = hubconf.sapnet(weights)
        assert not net.training and net.recurrent_iter == 6
        assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())
    save_checkpoint(tmp_path / "net.pth", {"params": SAPNet(residual_conv="split").state_dict()})
    net = hubconf.sapnet(tmp_path / "net.pth", recurrent_iter=3, use_dilation=False)
    assert (net.recurrent_iter, set(net.dilations)) == (3, {1})


@pytest.fixture(scope="module")
def rainy():
    """A picture of 8 bits."""
    return with_rain(photo(1, HEIGHT, WIDTH))


@pytest.fixture(scope="module")
def derain():
    return hubconf.derain("light", recurrent_iter=1, device="cpu")


def test_each_kind_equals_what_test_py_writes(run, tmp_path, rainy, derain):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path, written = tmp_path / "rainy.png", tmp_path / "results/rainy.png"
    Image.fromarray(rainy).save(path, icc_profile=profile)
    arguments = ("--save_path", BUNDLED / "light.pth", "--recurrent_iter", 1, "--device", "cpu")
    assert run("test", *arguments, "--test_data_path", path, "--output_path", written.parent).status == 0
    expected = read_image(written)
    assert (expected != rainy).any()

    derained = derain(rainy)
    assert isinstance(derained, np.ndarray) and derained.dtype == np.uint8
    np.testing.assert_array_equal(derained, expected)
    np.testing.assert_array_equal(derain(path), expected)
    np.testing.assert_array_equal(derain(str(path)), expected)
    with Image.open(path) as picture:
        derained = derain(picture)
    assert isinstance(derained, Image.Image) and derained.info["icc_profile"] == profile
    np.testing.assert_array_equal(np.asarray(derained), expected)
    assert derain(path, tmp_path / "new/derained.png") == tmp_path / "new/derained.png"
    assert contents(tmp_path / "new")["derained.png"] == written.read_bytes()


def test_16_bits_and_alpha_are_kept(tmp_path, rainy, derain):
    deep = np.dstack([rainy.astype(np.uint16) * 257, np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH)])
    path = save(tmp_path / "deep.png", deep)
    derained = derain(deep)
    assert derained.dtype == np.uint16 and derained.shape == deep.shape
    np.testing.assert_array_equal(derained[..., 3], deep[..., 3])
    np.testing.assert_array_equal(np.rint(derained[..., :3] / 257), derain(rainy))
    np.testing.assert_array_equal(derain(path), derained)
    np.testing.assert_array_equal(derain(deep[..., :3].astype(">u2")), derained[..., :3])
    np.testing.assert_array_equal(read_image(derain(path, tmp_path / "result.tif")), derained)
    shallow = Image.fromarray(np.dstack([rainy, rainy[..., 0]]))
    np.testing.assert_array_equal(np.asarray(derain(shallow))[..., 3], rainy[..., 0])


def test_pil_images_of_other_modes_and_turned_ones(tmp_path, rainy, derain):
    grey = derain(Image.fromarray(rainy).convert("L"))
    assert grey.mode == "RGB" and grey.size == (WIDTH, HEIGHT)
    assert (np.ptp(np.asarray(grey), axis=2) == 0).all(), "without a tint"
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright
    Image.fromarray(np.ascontiguousarray(np.rot90(rainy))).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        derained = derain(turned)
    np.testing.assert_array_equal(np.asarray(derained), derain(rainy))
    assert 274 not in derained.getexif()
    np.testing.assert_array_equal(derain(tmp_path / "turned.png"), derain(rainy))
    cmyk = Image.fromarray(rainy).convert("CMYK")
    cmyk.info["icc_profile"] = b"0" * 16 + b"CMYK" + b"0" * 100
    assert "icc_profile" not in derain(cmyk).info
    # Pillow sets None where one of a JPEG file's pieces of the profile is missing: here 1 of 2.
    file = io.BytesIO()
    Image.fromarray(rainy).save(file, "JPEG", extra=b"\xff\xe2\0\x1eICC_PROFILE\0\1\2" + b"0" * 14)
    with Image.open(file) as incomplete:
        assert incomplete.info["icc_profile"] is None
        assert "icc_profile" not in derain(incomplete).info


def test_the_settings_of_pillow_and_opencv_are_ours_while_files_are_read_alone(monkeypatch, tmp_path, derain):
    """Pillow warns from MAX_IMAGE_PIXELS on, which is an error in these tests, and refuses twice as many."""
    damaged, rainy = tmp_path / "text.png", photo(1, 12, 16)
    damaged.write_text("no picture")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_WARNING)
    try:
        for number, size in enumerate(((12, 16), (3, 5))):  # refused by Pillow, and warned of
            path = save(tmp_path / f"{number}.png", rainy[: size[0], : size[1]])
            assert derain(path).shape == (*size, 3)
            assert read_image_size(derain(path, tmp_path / f"new{number}.jpg")) == size
        # Threads come and go while others read.
        threads = [threading.Thread(target=refuse_often, args=(derain, damaged)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert Image.MAX_IMAGE_PIXELS == 10
        assert cv2.utils.logging.getLogLevel() == cv2.utils.logging.LOG_LEVEL_WARNING
    finally:
        cv2.utils.logging.setLogLevel(before)


def read_image_size(path):
    return cv2.imread(str(path)).shape[:2]


def refuse_often(derain, path):
    for _ in range(100):
        with pytest.raises(ValueError, match="not a readable image"):
            derain(path)


def test_what_a_format_does_not_keep_is_warned_of(tmp_path, rainy, derain):
    deep = save(tmp_path / "deep.png", np.dstack([rainy, rainy[..., 0]]).astype(np.uint16) * 257)
    for name, words in (("a.jpg", "JPEG does not keep the alpha and 16 bits"), ("a.webp", "WEBP .* the 16 bits of")):
        with pytest.warns(UserWarning, match=words) as caught:
            derain(deep, tmp_path / name)
        assert [warning.filename for warning in caught] == [__file__] and (tmp_path / name).exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        derain(deep, tmp_path / "a.tif")
        derain(save(tmp_path / "plain.png", rainy), tmp_path / "plain.jpg")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16", "auto"])
def test_options_are_those_of_test_py(run, tmp_path, rainy, precision):
    path = save(tmp_path / "rainy.png", rainy)
    network = ("--save_path", BUNDLED / "light.pth", "--recurrent_iter", 1, "--use_dilation", "False")
    result = run(
        "test", *network, "--precision", precision, "--self_ensemble", "--device", "cpu", "--test_data_path", path,
        "--output_path", tmp_path / "results",
    )
    assert result.status == 0, result
    derain = hubconf.derain("light", precision, torch.device("cpu"), True, recurrent_iter=1, use_dilation=False)
    np.testing.assert_array_equal(derain(rainy), read_image(tmp_path / "results/rainy.png"))


def test_large_pictures_work_on_the_disk(monkeypatch, tmp_path, rainy, derain):
    on_disk = hubconf.derain("light", recurrent_iter=1, device="cpu", max_memory=0)
    np.testing.assert_array_equal(on_disk(rainy), derain(rainy))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))  # so it was the disk
    with pytest.raises(RuntimeError, match="missing/.*No such file.*expected a larger max_memory, or TMPDIR"):
        on_disk(rainy)
    derain(rainy)


def test_a_full_disk_is_told_of_by_the_name_of_the_argument(monkeypatch, small_disk, rainy):
    monkeypatch.setattr("tempfile.tempdir", str(small_disk("100k")))
    with pytest.raises(RuntimeError, match="no room .* expected a larger max_memory, or TMPDIR"):
        hubconf.derain("light", recurrent_iter=1, device="cpu", max_memory=0)(rainy)


@pytest.mark.parametrize(
    ("device", "card"),
    [("auto", 1), ("cuda", 1), (torch.device("cuda"), 1), ("cuda:0", 0), (torch.device("cuda:1"), 1)],
)
def test_the_card_that_is_named_is_taken_and_the_current_one_stays(monkeypatch, device, card):
    """On an imitated machine with two cards, in a program of the caller's that torchrun has started twice."""
    empty, taken = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **options: empty(*size, **options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("it was changed"))
    monkeypatch.setattr(torch.nn.Module, "to", lambda net, device: taken.append(device) or net)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", str(1 - card))
    hubconf.derain("light", device=device)
    assert taken == [torch.device("cuda", card)]


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def other_default(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_default_type_of_the_program_does_not_count(rainy, derain, other_default):
    expected = load_weights(ROOT / "weights/light.pth")
    for name, value in hubconf.sapnet("light").state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name])
    ours = hubconf.derain("light", recurrent_iter=1, device="cpu")
    np.testing.assert_array_equal(ours(rainy), derain(rainy))


def test_the_default_device_of_the_program_does_not_count():
    with torch.device("meta"):
        state = hubconf.sapnet("light").state_dict()
    expected = load_weights(ROOT / "weights/light.pth")
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_the_autocast_of_the_program_does_not_count(tmp_path, rainy):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "net.pth", SAPNet(recurrent_iter=2, residual_conv="separable").state_dict())
    options = {"weights": tmp_path / "net.pth", "recurrent_iter": 2, "device": "cpu"}
    expected = hubconf.derain(**options)(rainy)
    with torch.autocast("cpu", torch.bfloat16):
        derain = hubconf.derain(**options)
        np.testing.assert_array_equal(derain(rainy), expected)
    np.testing.assert_array_equal(derain(rainy), expected)


def test_threads_get_their_own_results(rainy, derain):
    pictures = [np.roll(rainy, shift, axis=1) for shift in range(4)]
    results = [None] * 4
    threads = [
        threading.Thread(target=lambda number=number: results.__setitem__(number, derain(pictures[number])))
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for picture, result in zip(pictures, results):
        np.testing.assert_array_equal(result, derain(picture))


# Wrong input

GOOD = np.zeros((8, 9, 3), np.uint8)


@pytest.mark.parametrize(
    ("picture", "error", "words"),
    [
        (GOOD / 255, TypeError, "float64"), (GOOD.astype(np.float32), TypeError, "float32"),
        (GOOD.astype(int), TypeError, "int64"), (GOOD.astype(np.uint32), TypeError, "uint32"),
        (GOOD > 0, TypeError, "bool"), (GOOD[..., 0], ValueError, "grey"), (GOOD[..., :1], ValueError, "grey"),
        (GOOD[..., :2], ValueError, "(8, 9, 2)"), (GOOD[None], ValueError, "(1, 8, 9, 3)"),
        (GOOD.transpose(2, 0, 1), ValueError, "(3, 8, 9)"), (GOOD[:0], ValueError, "(0, 9, 3)"),
        (torch.zeros(1, 3, 8, 9), TypeError, "torch.Tensor"), (None, TypeError, "NoneType"),
        (GOOD.tolist(), TypeError, "list"), (Image.new("F", (9, 8)), TypeError, "mode F"),
        (Image.new("I;16", (9, 8)), TypeError, "mode I;16"), ("nothing.png", FileNotFoundError, "nothing.png"),
        (ROOT / "README.md", ValueError, "README.md"), (ROOT, ValueError, "not a file"),
        (np.ma.array(GOOD), TypeError, "masked array"),
    ],
)
def test_a_wrong_picture_is_refused_in_one_sentence(derain, picture, error, words):
    with pytest.raises(error) as caught:
        derain(picture)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
def test_a_pil_image_of_a_damaged_or_closed_file_is_told_as_a_damaged_file(tmp_path, derain, kind):
    """Image.open reads the header alone, so that the file shows its damage in ``derain``."""
    path = tmp_path / f"half.{kind}"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    in_memory = io.BytesIO(path.read_bytes())
    for source, name in ((path, f" of {path}"), (in_memory, "")):
        with Image.open(source) as half, pytest.raises(ValueError) as caught:
            derain(half)
        text = str(caught.value)
        assert text.startswith(f"a PIL image{name} cannot be read (") and "\n" not in text and "whole" in text
    with pytest.raises(ValueError, match="has not been closed"):
        derain(half)


def test_a_picture_that_does_not_fit_into_memory_is_not_called_damaged(derain, monkeypatch):
    def convert(*_):
        raise MemoryError

    picture = Image.fromarray(GOOD)
    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(MemoryError):
        derain(picture)


def test_a_wrong_output_is_refused(tmp_path, derain):
    path = save(tmp_path / "rainy.png", photo(1, 8, 9))
    before = contents(tmp_path)
    for output, error in ((path, FileExistsError), (tmp_path / "a.gif", ValueError), (tmp_path, ValueError)):
        with pytest.raises(error, match="output"):
            derain(path, output)
    with pytest.raises(TypeError, match="output"):
        derain(GOOD, tmp_path / "a.png")
    with pytest.raises(RuntimeError, match="a.png"):
        derain(path, path / "a.png")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"weights": "strong"}, ValueError, "general"), ({"weights": "a/b.pth"}, FileNotFoundError, "light"),
        ({"weights": ROOT / "README.md"}, ValueError, "README.md"), ({"weights": 3}, TypeError, "int"),
        ({"weights": ROOT / "tests"}, ValueError, "net_latest.pth"),
        ({"precision": "fp64"}, ValueError, "bf16"), ({"precision": torch.float16}, ValueError, "bf16"),
        ({"device": "tpu"}, ValueError, "device tpu"), ({"device": None}, TypeError, "device"),
        ({"max_memory": -1}, ValueError, "max_memory"), ({"max_memory": "2"}, ValueError, "max_memory"),
        ({"max_memory": float("nan")}, ValueError, "max_memory"), ({"self_ensemble": 4}, ValueError, "self_ensemble"),
        ({"recurrent_iter": 0}, ValueError, "recurrent_iter"), ({"recurrent_iter": 1.5}, ValueError, "recurrent_iter"),
        ({"use_dilation": "False"}, ValueError, "use_dilation"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_in_one_sentence(options, error, words):
    with pytest.raises(error) as caught:
        hubconf.derain(**options)
    text = str(caught.value)
    assert words in text and "\n" not in text and "--" not in text


def test_unsound_weights_are_told_of(tmp_path):
    state = {name: 1e30 * value for name, value in SAPNet().state_dict().items()}
    save_checkpoint(tmp_path / "net.pth", state)
    with pytest.raises(RuntimeError, match="not finite"):
        hubconf.derain(tmp_path / "net.pth", device="cpu", recurrent_iter=1)(GOOD)


def test_without_opencv_arrays_still_work_and_files_say_what_is_missing(monkeypatch, derain):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert derain(GOOD).shape == GOOD.shape
    with pytest.raises(ImportError, match="pip install pillow opencv-python-headless"):
        derain(ROOT / "results/sample.jpg")


# The page


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    """All blocks marked as Python, one after the other, but OpenVINO's, and spandrel's only where it is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(BUNDLED)
    save(tmp_path / "rainy.png", photo(1, 24, 32))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    names = {"FOLDER": str(ROOT)}
    for block in blocks:
        package = re.match(r"(?:import numpy as np\n)?import (openvino|spandrel)\n", block)
        if package and (package[1] == "openvino" or not importlib.util.find_spec(package[1])):
            continue  # OpenVINO is too large a package for a test of one page
        exec(compile(block, "docs/python.md", "exec"), names)
    assert read_image("derained.png").shape == read_image("new.png").shape == (24, 32, 3)
