"""Bad input: one sentence that names the culprit, a non-zero exit, and nothing lost or half written."""
import argparse
import importlib
import itertools
import os
import shutil

import cv2
import h5py
import numpy as np
import pytest
import torch

import train
from conftest import ROOT, contents, make_pairs, photo, run_subprocess, save
from images import MARK, write_image
from metadata import Metadata
from networks import SAPNet
from test_data import write_prenet
from test_train import options, tiny
from utils import counted


def everything(folder):
    """All that is below a folder: files with their content, and folders."""
    return contents(folder), sorted(path for path in folder.rglob("*") if path.is_dir())


@pytest.fixture
def refused_untouched(refused, tmp_path):
    """``refused``, and every file and folder under the test's is as it was."""

    def check(*args, **named):
        before = everything(tmp_path)
        message = refused(*args, **named)
        assert everything(tmp_path) == before
        return message

    return check


# Folders and images, for each script that reads them


def args_of_train(folder, tmp_path):
    return "train", *tiny(folder, tmp_path / "run", patch_size=16, stride=32)


def args_of_test(folder, tmp_path):
    return "test", "--save_path", tmp_path / "model", "--test_data_path", folder, "--output_path", tmp_path / "results"


def args_of_rain(folder, tmp_path):
    return "rain", "--clean", folder, "--out", tmp_path / "drawn"


def args_of_check(folder, tmp_path):
    return "pairs", "--check", folder, folder


OTHERS_OF_TRAIN = (  # all but folders to write into
    "--data_path", "pairs", "--patch_size", 16, "--use_contrast", False, "--use_lpips", False,
    "--use_seg_stage1", False,
)
SCRIPTS = {"train": args_of_train, "test": args_of_test, "rain": args_of_rain, "pairs": args_of_check}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_folder_with_nothing_to_read(refused_untouched, checkpoint, tmp_path, script, kind):
    folder = tmp_path / "somewhere"
    if kind == "empty":
        folder.mkdir()
    if kind == "file":
        folder.write_text("neither an image nor a video")
    refused_untouched(*SCRIPTS[script](folder, tmp_path), names=[folder])


def damage(kind, path):
    data = path.read_bytes()
    if kind == "no image":
        path.write_text("<html>404 Not Found</html>")
    elif kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "truncated PNG":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "truncated 16-bit PNG":
        deep = cv2.imencode(".png", 257 * cv2.imread(str(path)).astype(np.uint16))[1].tobytes()
        path.write_bytes(deep[: len(deep) // 2])
    elif kind == "truncated JPEG":
        jpeg = cv2.imencode(".jpg", cv2.imread(str(path)))[1].tobytes()
        path.write_bytes(jpeg[: len(jpeg) * 3 // 4])  # Pillow knows a file by its content, whatever its name


DAMAGES = ("no image", "zero bytes", "truncated PNG", "truncated 16-bit PNG", "truncated JPEG")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.filterwarnings("ignore")
def test_damaged_image(refused, checkpoint, tmp_path, pairs_dir, script, kind):
    clean_only = script in ("rain", "pairs")
    path = pairs_dir / ("norain-2.png" if clean_only else "rain-2.png")
    damage(kind, path)
    message = refused(*SCRIPTS[script](pairs_dir, tmp_path), status=1 if script == "test" else 2, names=["rain-2.png"])
    assert script == "test" or str(path) in message
    if script == "train":
        assert not (tmp_path / "run").exists() and not list((tmp_path / "packed").glob("*"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_damaged_validation_image_stops_before_training(refused_untouched, pairs_dir, tmp_path):
    """And before packing."""
    val = make_pairs(tmp_path / "val", (7, 8, 9))
    damage("truncated PNG", val / "norain-9.png")
    refused_untouched("train", *tiny(pairs_dir, tmp_path / "run", val_path=val), names=[val / "norain-9.png"])


@pytest.mark.parametrize("option", ["--val_path", "--exclude_test"])
def test_other_folders_of_pairs_are_named_with_their_option(refused_untouched, pairs_dir, tmp_path, option):
    folder = tmp_path / "somewhere"
    arguments = tiny(pairs_dir, tmp_path / "run", option, folder)
    refused_untouched("train", *arguments, names=[f"{option} {folder}: no such folder"])
    folder.mkdir()
    save(folder / "photograph.jpg", photo(9))
    refused_untouched("train", *arguments, names=[f"{option} {folder}: no rainy/clean pairs"])


def test_two_files_of_one_stem(refused_untouched, pairs_dir, tmp_path):
    shutil.copyfile(pairs_dir / "rain-1.png", pairs_dir / "rain-1.jpg")
    refused_untouched(*args_of_train(pairs_dir, tmp_path), names=[pairs_dir / "rain-1.jpg", "rain-1.png"])


def test_a_pair_of_two_sizes(refused_untouched, pairs_dir, tmp_path):
    save(pairs_dir / "rain-2.png", photo(2, 48, 60))
    names = [pairs_dir / "rain-2.png", "norain-2.png", "60x48", "64x48"]
    refused_untouched(*args_of_train(pairs_dir, tmp_path), names=names)


def test_images_smaller_than_a_patch(refused_untouched, run, pairs_dir, tmp_path):
    make_pairs(pairs_dir, (2,), 48, 15)
    make_pairs(pairs_dir, (20,), 1, 1)
    script, *arguments = args_of_train(pairs_dir, tmp_path)
    names = [f"{pairs_dir / 'rain-2.png'} (15x48)", f"{pairs_dir / 'rain-20.png'} (1x1)", "--patch_size 16"]
    refused_untouched(script, *arguments, names=[*names, "--skip_small"])
    result = run(script, *arguments, "--skip_small", "--max_steps", 1)
    assert result.status == 0 and "left out 2 (smaller than 16 px): rain-2.png, rain-20.png" in result.out


def test_a_picture_of_odd_width_that_holds_two(refused_untouched, tmp_path):
    path = save(tmp_path / "both/1.png", photo(1, 48, 63))
    arguments = args_of_train(path.parent, tmp_path)
    refused_untouched(*arguments, "--side_by_side", "left", names=[f"{path} is 63 px wide", "expected an even width"])


@pytest.mark.parametrize("kind", ["grey", "RGBA", "16 bits"])
def test_unusual_images_are_trained_on(run, pairs_dir, tmp_path, kind):
    image = photo(2)
    image = {
        "grey": image[..., 0], "RGBA": np.dstack((image, image[..., :1])), "16 bits": 257 * image.astype(np.uint16)
    }[kind]
    save(pairs_dir / "rain-2.png", image)
    result = run(*args_of_train(pairs_dir, tmp_path), "--max_steps", 1)
    assert result.status == 0, result
    with h5py.File(next((tmp_path / "packed").glob("*.h5"))) as file:
        patch = file["rainy"][6]  # the first of the second image
    expected = np.repeat(photo(2)[..., :1], 3, 2) if kind == "grey" else photo(2)
    assert np.array_equal(patch, expected[:16, :16])


# Options


@pytest.mark.parametrize(
    "script, option",
    [
        ("train", ("--use_dilation", "maybe")),
        ("train", ("--milestone", 50, 30)),
        ("train", ("--milestone", 30, 30)),
        ("train", ("--milestone", 0)),
        ("train", ("--batch_size", 0)),
        ("train", ("--lr", "nan")),
        ("train", ("--lr", "fast")),
        ("train", ("--epochs", 1.5)),
        ("train", ("--ema", 1)),
        ("train", ("--weight_decay", -1)),
        ("train", ("--weight_decay", 0.1)),
        ("train", ("--photograph_scales", 1)),
        ("train", ("--photograph_scales", 0.5, 0)),
        ("train", ("--photograph_scales", "nan")),
        ("train", ("--stop_after", 0)),
        ("train", ("--seed", -1)),
        ("train", ("--seed", 2**64)),
        ("train", ("--max_steps", 0)),
        ("train", ("--first_stages", 2, 1.5)),
        ("train", ("--first_stages", 7, 0.5)),
        ("train", ("--first_stages", 1.5, 0.5)),
        ("train", ("--first_stages", "nan", 0.5)),
        ("train", ("--first_stages", 2, "nan")),
        ("train", ("--first_stages", 2, 1)),
        ("train", ("--psnr_until", 0.5)),
        ("train", ("--psnr_until", 1.5)),
        ("train", ("--psnr_until", -1)),
        ("train", ("--w_stages", -1)),
        ("train", ("--w_stages", 0.5, "--recurrent_iter", 1)),
        ("train", ("--patch_size", 10)),
        ("train", ("--pixel_loss", "l1")),
        ("train", ("--side_by_side", "top")),
        ("train", ("--skip_small", "maybe")),
        ("train", ("--val_pairs", 1, 1)),
        ("train", ("--clean_path", "a", "b")),
        ("train", ("--clean_path", "none")),
        ("train", ("--data_path", "DIR:0")),
        ("train", ("--data_path", "none:40")),
        ("train", ("--device", "nonsense")),
        ("test", ("--device", "nonsense")),
        ("test", ("--recurrent_iter", 0)),
        ("test", ("--use_dilation", "maybe")),
        ("test", ("--side_by_side", "top")),
        ("test", ("--clean_path", "none")),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_bad_option(refused_untouched, checkpoint, pairs_dir, tmp_path, monkeypatch, script, option):
    monkeypatch.chdir(tmp_path)
    pairs_dir.rename("DIR")
    refused_untouched(*SCRIPTS[script](tmp_path / "DIR", tmp_path), *option, names=[option[0]])


@pytest.mark.parametrize(
    "text, value", [((), True), (("True",), True), (("False",), False), (("no",), False), (("1",), True)]
)
def test_booleans_mean_what_they_say(text, value):
    assert train.parse_args(["--use_dilation", *text]).use_dilation is value


# Files of a run


@pytest.mark.parametrize("share", [0, 0.5])
def test_cut_state_is_named_and_the_run_kept(refused_untouched, run, pairs_dir, tmp_path, share):
    run(*args_of_train(pairs_dir, tmp_path), "--max_steps", 1)
    path = tmp_path / "run/train_state.pth"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused_untouched(*args_of_train(pairs_dir, tmp_path), "--resume", names=[path])


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_cut_packed_file_is_named(refused_untouched, run, pairs_dir, tmp_path, share):
    run(*args_of_train(pairs_dir, tmp_path), "--max_steps", 1)
    shutil.rmtree(tmp_path / "run")
    (path,) = (tmp_path / "packed").iterdir()
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused_untouched(*args_of_train(pairs_dir, tmp_path), names=[path, "cut short"])


@pytest.mark.parametrize("fault", ["cut", "lengths", "shape"])
def test_bad_prenet_files_are_named(refused_untouched, tmp_path, fault):
    folder = tmp_path / "prenet"
    write_prenet(folder, count=5, targets=4 if fault == "lengths" else 5)
    path = folder / "train_input.h5"
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-5000])
    if fault == "shape":
        with h5py.File(path, "w") as file:
            file["0"] = np.zeros((24, 24, 3), np.float32)
    refused_untouched(*args_of_train(folder, tmp_path), names=[path])


def test_output_path_is_a_file(refused_untouched, checkpoint, pairs_dir, tmp_path):
    (tmp_path / "results").write_text("mine")
    refused_untouched(*args_of_test(pairs_dir, tmp_path), names=[tmp_path / "results"])


FOLDERS = {  # script: (an option that names a folder to write into, what else the script needs)
    "test": ("--output_path", "--save_path", "model", "--test_data_path", "pairs"),
    "train": ("--save_path", *OTHERS_OF_TRAIN, "--packed_dir", "packed"),
    "train, packed": ("--packed_dir", *OTHERS_OF_TRAIN, "--save_path", "run"),
    "rain": ("--out", "--clean", "pairs"),
    "detect": ("--output_path", "--test_data_path", "pairs", "--segmenter", "lraspp_mobilenet_v3_large"),
    "ablation": ("--logs", "--data_path", "pairs"),
    "curve": ("--output", "log.jsonl"),
    "export": ("--output", "--save_path", "model"),
    "rain_stats": ("--output", "--data_path", "pairs"),
    "bench": ("--json", "--sizes", "8x8", "--steps", 0),
}


@pytest.mark.parametrize("case", FOLDERS)
@pytest.mark.parametrize("place", ["mine", "mine/below/it"])
def test_a_file_where_a_folder_is_to_be(refused_untouched, checkpoint, pairs_dir, tmp_path, monkeypatch, case, place):
    """Both in its own place and in that of a folder above it; for a file to be written, in that of its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "psnr": 20, "learning_rate": 1}\n')
    option, *others = FOLDERS[case]
    script = case.partition(",")[0]
    endings = {"curve": "/a.png", "export": "/a.onnx", "rain_stats": "/a", "bench": "/a.json"}
    refused_untouched(
        script, *others, option, place + endings.get(script, ""), names=[f"{option} {place}", "is a file", "a folder"]
    )


# Files of the user


def text_file(path):
    path.write_text("mine")


def photograph(path):
    save(path, photo(1))


FILES = {  # script: (its arguments, and the name of the file that it would write)
    "curve": (("log.jsonl", "--output", "a.png"), "a.png"),
    "curve, unasked": (("log.jsonl",), "log.png"),
    "export": (("--save_path", "model", "--output", "a.onnx"), "a.onnx"),
    "rain_stats": (("--data_path", "pairs", "--output", "a"), "a.md"),
    "rain_stats, picture": (("--data_path", "pairs", "--output", "a"), "a.jpg"),
    "ablation": (("--data_path", "pairs", "--output", "a.md"), "a.md"),
    "bench": (("--sizes", "8x8", "--steps", 0, "--json", "a.json"), "a.json"),
    "checkpoints": (("model", "a.pth"), "a.pth"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_of_the_user_is_not_overwritten(refused_untouched, checkpoint, pairs_dir, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "psnr": 20, "learning_rate": 1}\n')
    arguments, name = FILES[case]
    (photograph if name.endswith(("png", "jpg")) else text_file)(tmp_path / name)
    refused_untouched(case.partition(",")[0], *arguments, names=[name, "expected"])


@pytest.mark.parametrize("name", ["net_latest.pth", "args.json", "log.jsonl"])
def test_files_that_a_run_would_overwrite_are_named(refused, pairs_dir, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    refused(*args_of_train(pairs_dir, tmp_path), names=[f"--save_path {tmp_path / 'run'}", name])
    assert contents(tmp_path / "run") == {name: b"mine"} and not (tmp_path / "packed").exists()


# Paths that say nothing


def path_options(script):
    """The options of a script that take a path, by what its --help calls their values."""
    parsers = []

    class Caught(Exception):
        pass

    def capture(parser, *_):
        parsers.append(parser)
        raise Caught

    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
        module.parse_args()
    kinds = ("DIR", "FILE", "PATH", "STEM", "RUN", "IN", "OUT", "DIR[:N]", "FILE[:CLASS]", ("TRAIN_DIR", "TEST_DIR"))
    named = ("out", "detector")  # whose metavar says nothing
    return [action for action in parsers[0]._actions if action.metavar in kinds or action.dest in named]


@pytest.mark.parametrize(
    "script", [path.stem for path in sorted(ROOT.glob("*.py")) if "def parse_args" in path.read_text()]
)
def test_a_path_that_cannot_be_one_is_refused_by_every_option(script):
    options = path_options(script)
    assert options
    for action, path in itertools.product(options, ("", 300 * "a", "a\0b")):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a path"):
            action.type(path)


def test_an_empty_path_is_one_sentence(refused, pairs_dir):
    refused("test", "--test_data_path", pairs_dir, "--output_path", "", names=["--output_path", "expected a path"])


def test_a_folder_that_may_not_be_read_is_one_sentence(refused, pairs_dir, monkeypatch):
    """To root, who runs some of these tests, nothing is forbidden."""
    monkeypatch.setattr(os, "access", lambda path, *_: False)
    refused("test", "--test_data_path", pairs_dir, names=["--test_data_path", pairs_dir, "Permission denied"])


def test_output_that_nobody_reads_any_more(pairs_dir, tmp_path):
    """As in ``python test.py | head -1``; it was taken for a killed loader process."""
    arguments = ["--test_data_path", pairs_dir, "--output_path", tmp_path, "--recurrent_iter", 1, "--device", "cpu"]
    process = run_subprocess("test.py", *arguments)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 1 and error.endswith("error: stopped, as what it printed is no longer read\n"), error


# Counts


@pytest.mark.parametrize("number, noun, text", [
    (1, "image", "1 image"), (0, "image", "0 images"), (2, "patch", "2 patches"), (3, "process", "3 processes"),
])
def test_what_is_counted_once_is_singular(number, noun, text):
    assert counted(number, noun) == text


# A full disk


def test_no_room_for_the_packed_file(refused, small_disk, pairs_dir, tmp_path):
    """This shows before anything is written."""
    disk = small_disk("96k")
    arguments = options(pairs_dir, tmp_path / "run", packed_dir=disk)
    message = refused("train", *arguments, names=[f"--packed_dir {disk}: pairs-", " MB are free"])
    assert "expected room for it, or a folder on another disk" in message
    assert everything(disk) == ({}, []) and not (tmp_path / "run").exists()


def test_full_disk_while_training(refused, small_disk, pairs_dir, tmp_path):
    """There is room for the weights of one epoch and not for two: what was saved stays whole."""
    disk = small_disk("5m")
    arguments = tiny(pairs_dir, disk / "run", packed_dir=tmp_path / "packed", epochs=20)
    message = refused("train", *arguments, status=1, names=[disk / "run", "No space left"])
    assert ".pth" in message
    assert not list(disk.rglob("*.tmp"))
    saved = sorted((disk / "run").glob("*.pth"))
    assert {"net_latest.pth", "net_epoch1.pth"} <= {path.name for path in saved}
    for path in saved:
        content = torch.load(path, weights_only=True)
        assert len(content.get("net", content)) == len(SAPNet().state_dict())


def test_full_disk_for_tensorboard_and_log(refused, small_disk, pairs_dir, tmp_path):
    """Not even the first scalars fit."""
    disk = small_disk("4k")
    arguments = options(pairs_dir, disk / "run", packed_dir=tmp_path / "packed")
    refused("train", *arguments, status=1, names=[disk / "run", "No space left"])
    assert not list(disk.rglob("*.tmp")) and not list(disk.rglob("*.pth"))


def test_full_disk_while_testing(refused, small_disk, checkpoint, tmp_path):
    disk = small_disk("40k")
    write_image(disk / "a.png", np.zeros((9, 9, 3), np.uint8), Metadata(software=MARK))  # a good result of before
    before = contents(disk)
    noise = np.random.default_rng(0).integers(0, 256, (120, 140, 3), np.uint8)  # does not compress
    save(tmp_path / "real/a.png", noise)
    message = refused(
        "test", "--save_path", checkpoint, "--test_data_path", tmp_path / "real", "--output_path", disk,
        status=1, names=[disk / "a.png"],
    )
    assert "No space left" in message
    assert contents(disk) == before


# As a person sees it: separate processes


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("train.py", "test.py", "rain.py")]


@pytest.mark.parametrize("script", ["pairs.py", *SLOW])
def test_shell_sees_one_line_and_status_2(tmp_path, script):
    name, *arguments = SCRIPTS[script.removesuffix(".py")](tmp_path / "none", tmp_path)
    if script == "test.py":
        arguments[1] = ROOT / "weights/general.pth"
    option = {"train.py": "--data_path", "test.py": "--test_data_path", "rain.py": "--clean", "pairs.py": "--check"}
    child = run_subprocess(script, *arguments)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 2
    expected = f"{script}: error: {option[script]} {tmp_path / 'none'}: no such f"
    assert err.startswith(expected) and err.count("\n") == 1
