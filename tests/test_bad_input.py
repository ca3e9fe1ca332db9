"""Bad input: one sentence that names the culprit, a non-zero exit, and nothing lost or half written."""
import pickle

import cv2
import h5py
import numpy as np
import pytest
import torch

import train
import utils
from conftest import contents, make_pairs, photo, run_subprocess, save
from networks import SAPNet
from test_data import write_prenet
from test_train import options


@pytest.fixture
def refused_untouched(refused, tmp_path):
    """``refused``, and every file under the test's folder is as it was."""

    def check(*args, **named):
        before = contents(tmp_path)
        message = refused(*args, **named)
        assert contents(tmp_path) == before
        return message

    return check


# Folders and images, for each script that reads them


def args_of_train(folder, tmp_path):
    return "train", *options(folder, tmp_path / "run")


def args_of_test(folder, tmp_path):
    return "test", "--save_path", tmp_path / "model", "--test_data_path", folder, "--output_path", tmp_path / "results"


def args_of_rain(folder, tmp_path):
    return "rain", "--clean", folder, "--out", tmp_path / "drawn"


def args_of_check(folder, tmp_path):
    return "DerainDataset", "--check", folder, folder


SCRIPTS = {"train": args_of_train, "test": args_of_test, "rain": args_of_rain, "DerainDataset": args_of_check}


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
    clean_only = script in ("rain", "DerainDataset")
    path = pairs_dir / ("norain-2.png" if clean_only else "rain-2.png")
    damage(kind, path)
    message = refused(*SCRIPTS[script](pairs_dir, tmp_path), status=1 if script == "test" else 2, names=["rain-2.png"])
    assert script == "test" or str(path) in message
    if script == "train":
        assert not (tmp_path / "run").exists() and not list((tmp_path / "packed").glob("*"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_damaged_validation_image_stops_before_training(refused_untouched, pairs_dir, tmp_path, run):
    run("train", *options(pairs_dir, tmp_path / "first", max_steps=1))  # packs
    val = make_pairs(tmp_path / "val")
    damage("no image", val / "norain-3.png")
    refused_untouched("train", *options(pairs_dir, tmp_path / "run", val_path=val), names=[val / "norain-3.png"])


@pytest.mark.parametrize("fault", ["too small", "sizes differ"])
def test_unfit_training_image(refused_untouched, pairs_dir, tmp_path, fault):
    save(pairs_dir / "rain-2.png", photo(2, *((20, 64) if fault == "too small" else (48, 60))))
    if fault == "too small":
        save(pairs_dir / "norain-2.png", photo(2, 20, 64))
    names = ["64x20", "--patch_size 32"] if fault == "too small" else ["norain-2.png", "60x48", "64x48"]
    refused_untouched(*args_of_train(pairs_dir, tmp_path), names=[pairs_dir / "rain-2.png", *names])


@pytest.mark.parametrize("kind", ["grey", "RGBA", "16 bits"])
def test_unusual_images_are_trained_on(run, pairs_dir, tmp_path, kind):
    image = photo(2)
    image = {
        "grey": image[..., 0], "RGBA": np.dstack((image, image[..., :1])), "16 bits": 257 * image.astype(np.uint16)
    }[kind]
    save(pairs_dir / "rain-2.png", image)
    result = run("train", *options(pairs_dir, tmp_path / "run", max_steps=1))
    assert result.status == 0, result
    with h5py.File(next((tmp_path / "packed").glob("*.h5"))) as file:
        patch = file["rainy"][6]  # the first of the second image
    expected = np.repeat(photo(2)[..., :1], 3, 2) if kind == "grey" else photo(2)
    assert np.array_equal(patch, expected[:32, :32])


def test_one_pixel_is_too_small_to_args_of_train(refused_untouched, tmp_path):
    folder = make_pairs(tmp_path / "pairs", height=1, width=1)
    refused_untouched(*args_of_train(folder, tmp_path), names=["rain-1.png", "1x1", "--patch_size"])


# Checkpoints


class Code:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def good_state():
    return SAPNet(recurrent_iter=1).state_dict()


def nan_state():
    state = good_state()
    state["conv_g.0.weight"][3, 5] = float("nan")
    return state


def lacking_state():
    state = good_state()
    del state["res_conv3.4.conv_1_1.weight"]
    return state


def cut(save_options, share):
    def write(path):
        torch.save(good_state(), path, **save_options)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return write


OLD = {"_use_new_zipfile_serialization": False}
BAD_CHECKPOINTS = {  # name: (how to write it, what the sentence must say)
    "missing": (lambda path: None, "no such file"),
    "zero bytes": (lambda path: path.touch(), "not a PyTorch checkpoint"),
    "text": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "expected a checkpoint"),
    "truncated": (cut({}, 0.6), "truncated"),
    "truncated at the end": (cut({}, 0.9999), "truncated"),
    "old format, truncated": (cut(OLD, 0.6), "truncated"),
    "old format, truncated early": (cut(OLD, 0.02), "expected a checkpoint|not a PyTorch checkpoint"),
    "other architecture": (lambda path: torch.save(torch.nn.Linear(3, 2).state_dict(), path), "SAPNet"),
    "other shape": (lambda path: torch.save({**good_state(), "conv.0.bias": torch.zeros(4)}, path), "conv.0.bias"),
    "missing key": (lambda path: torch.save(lacking_state(), path), "res_conv3.4.conv_1_1.weight"),
    "NaN": (lambda path: torch.save(nan_state(), path), "NaN or infinite weights in conv_g.0.weight"),
    "whole training state": (lambda path: torch.save({"net": good_state(), "step": 3}, path), "expected a state dict"),
    "numbers for names": (lambda path: torch.save({1: torch.zeros(2)}, path), "expected a state dict"),
    "list": (lambda path: torch.save([torch.zeros(2)], path), "expected a state dict"),
}


@pytest.fixture
def one_image(tmp_path):
    return save(tmp_path / "real/a.png", photo(1, 16, 16)).parent


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoint_to_test_with(refused_untouched, tmp_path, one_image, kind):
    path = tmp_path / "weights.pth"
    write, reason = BAD_CHECKPOINTS[kind]
    write(path)
    output = tmp_path / "results"
    message = refused_untouched(
        "test", "--save_path", path, "--test_data_path", one_image, "--output_path", output, names=[path]
    )
    assert any(part in message for part in reason.split("|")), message
    assert len(message) < 600


@pytest.mark.parametrize("format_options", [{}, OLD], ids=["new format", "old format"])
def test_checkpoint_cut_anywhere_is_an_input_error(tmp_path, format_options):
    path = tmp_path / "weights.pth"
    torch.save(good_state(), path, **format_options)
    data = path.read_bytes()
    lengths = [*range(64), *range(64, 4096, 101), *range(4096, len(data), len(data) // 50), len(data) - 1]
    for length in lengths:
        path.write_bytes(data[:length])
        with pytest.raises(utils.InputError, match="weights.pth"):
            utils.load_network(path)


@pytest.mark.parametrize("kind", ["missing", "truncated", "other architecture", "NaN"])
def test_bad_checkpoint_to_start_from(refused, tmp_path, pairs_dir, kind):
    path = tmp_path / "weights.pth"
    BAD_CHECKPOINTS[kind][0](path)
    refused("train", *options(pairs_dir, tmp_path / "run", init_weights=path), names=[path])
    assert not list((tmp_path / "run").glob("*.pth"))


@pytest.mark.parametrize("how", ["plain pickle", "torch.save", "torch.save, old format", "inside a state dict"])
def test_code_in_a_checkpoint_does_not_run(refused_untouched, tmp_path, one_image, how):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    content = {**good_state(), "conv.0.bias": Code(trace)} if how == "inside a state dict" else Code(trace)
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, **(OLD if "old" in how else {}))
    refused_untouched(
        "test", "--save_path", path, "--test_data_path", one_image, "--output_path", tmp_path / "r",
        names=[path, "plain tensors"],
    )
    assert not trace.exists()
    if "plain" not in how:
        torch.load(path, weights_only=False)
        assert trace.exists(), "the trap works"


def test_folder_without_a_checkpoint(refused_untouched, tmp_path, one_image):
    (tmp_path / "model").mkdir()
    refused_untouched(*args_of_test(one_image, tmp_path), names=[tmp_path / "model/net_latest.pth"])


# Options


@pytest.mark.parametrize(
    "script, option",
    [
        ("train", ("--use_dilation", "maybe")),
        ("test", ("--use_dilation", "maybe")),
        ("train", ("--milestone", 50, 30)),
        ("train", ("--milestone", 30, 30)),
        ("train", ("--milestone", 0)),
        ("train", ("--batch_size", 0)),
        ("train", ("--lr", "nan")),
        ("train", ("--lr", "fast")),
        ("train", ("--epochs", 1.5)),
        ("train", ("--pixel_loss", "l1")),
        ("train", ("--device", "nonsense")),
        ("test", ("--device", "nonsense")),
        ("test", ("--recurrent_iter", 0)),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_bad_option(refused_untouched, checkpoint, one_image, pairs_dir, tmp_path, script, option):
    base = args_of_train(pairs_dir, tmp_path) if script == "train" else args_of_test(one_image, tmp_path)
    refused_untouched(*base, *option, names=[option[0]])


@pytest.mark.parametrize(
    "text, value", [((), True), (("True",), True), (("False",), False), (("no",), False), (("1",), True)]
)
def test_booleans_mean_what_they_say(text, value):
    assert train.parse_args(["--use_dilation", *text]).use_dilation is value


# Runs


def test_folder_with_another_run_is_kept(refused_untouched, run, pairs_dir, tmp_path):
    run("train", *options(pairs_dir, tmp_path / "run", max_steps=1))
    refused_untouched(*args_of_train(pairs_dir, tmp_path), names=["--save_path", tmp_path / "run", "--resume"])


def test_nothing_to_resume(refused_untouched, pairs_dir, tmp_path):
    refused_untouched(*args_of_train(pairs_dir, tmp_path), "--resume", names=["--resume", tmp_path / "run"])


@pytest.mark.parametrize("share", [0, 0.5])
def test_cut_state_is_named_and_the_run_kept(refused_untouched, run, pairs_dir, tmp_path, share):
    run("train", *options(pairs_dir, tmp_path / "run", max_steps=1))
    path = tmp_path / "run/train_state.pth"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused_untouched(*args_of_train(pairs_dir, tmp_path), "--resume", names=[path])


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_cut_packed_file_is_named(refused_untouched, run, pairs_dir, tmp_path, share):
    run("train", *options(pairs_dir, tmp_path / "first", max_steps=1))
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


def test_output_path_is_a_file(refused_untouched, checkpoint, one_image, tmp_path):
    (tmp_path / "results").write_text("mine")
    refused_untouched(*args_of_test(one_image, tmp_path), status=1, names=[tmp_path / "results"])


def test_save_path_is_a_file(refused, pairs_dir, tmp_path):
    (tmp_path / "run").write_text("mine")
    refused(*args_of_train(pairs_dir, tmp_path), status=1, names=[tmp_path / "run"])
    assert (tmp_path / "run").read_text() == "mine"


# A full disk


def test_full_disk_while_packing(refused, run, small_disk, pairs_dir, tmp_path):
    disk = small_disk("96k")
    first = options(pairs_dir, tmp_path / "first", packed_dir=tmp_path / "packed", max_steps=1)
    assert run("train", *first).status == 0
    (packed,) = (tmp_path / "packed").iterdir()
    (disk / packed.name).write_bytes(b"a good file of before")
    before = contents(disk)
    arguments = options(pairs_dir, tmp_path / "run", "--preprocess", packed_dir=disk)
    refused("train", *arguments, status=1, names=[disk / packed.name, "No space left"])
    assert contents(disk) == before
    assert not list((tmp_path / "run").glob("*.pth"))


def test_full_disk_while_training(refused, small_disk, pairs_dir, tmp_path):
    """There is room for the weights of one epoch and not for two: what was saved stays whole."""
    disk = small_disk("5m")
    arguments = options(pairs_dir, disk / "run", packed_dir=tmp_path / "packed", epochs=20)
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
    (disk / "a.png").write_bytes(b"a good result of before")
    noise = np.random.default_rng(0).integers(0, 256, (120, 140, 3), np.uint8)  # does not compress
    save(tmp_path / "real/a.png", noise)
    message = refused(
        "test", "--save_path", checkpoint, "--test_data_path", tmp_path / "real", "--output_path", disk,
        status=1, names=[disk / "a.png"],
    )
    assert "No space left" in message
    assert contents(disk) == {"a.png": b"a good result of before"}


# As a person sees it: separate processes


@pytest.mark.parametrize("script", ["train.py", "test.py"])
def test_shell_sees_one_line_and_status_2(tmp_path, script):
    if script == "train.py":
        option, arguments = "--data_path", options(tmp_path / "none", tmp_path / "run")
    else:
        weights = tmp_path / "w.pth"
        torch.save(good_state(), weights)
        option, arguments = "--test_data_path", ("--save_path", weights, "--test_data_path", tmp_path / "none")
    child = run_subprocess(script, *arguments)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 2
    assert err.startswith(f"{script}: error: {option} {tmp_path / 'none'}: no such f") and err.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[1]", '{"recurrent_iter": "six"}', '{"use_dilation": "maybe"}'])
def test_damaged_arguments_beside_a_checkpoint(refused, checkpoint, pairs_dir, tmp_path, text):
    path = checkpoint.parent / "args.json"
    path.write_text(text)
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", pairs_dir, "--output_path", tmp_path / "out",
        names=[path],
    )
