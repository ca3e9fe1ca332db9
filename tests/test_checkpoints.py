"""Checkpoints: which file is taken, what loads, and what is refused in one sentence."""
import pickle
import zipfile

import pytest
import torch

from checkpoints import BUNDLED, PUBLISHED_FOLDER, find_checkpoint, load_network, load_weights, save_checkpoint
from conftest import ROOT, contents, photo, save
from networks import SAPNet
from test_networks import PUBLISHED, weights_path
from utils import InputError


@pytest.fixture
def one_image(tmp_path):
    return save(tmp_path / "real/a.png", photo(1, 16, 16)).parent


@pytest.fixture
def test_refused(refused, one_image, tmp_path):
    """test_refused(path) runs test.py with this checkpoint; it must fail with a sentence and leave all files alone."""

    def check(path, names=()):
        before = contents(tmp_path)
        message = refused(
            "test", "--save_path", path, "--test_data_path", one_image, "--output_path", tmp_path / "results",
            names=names,
        )
        assert contents(tmp_path) == before
        return message

    return check


def good_state():
    return SAPNet(recurrent_iter=1).state_dict()


# Which file


def test_bundled_weights_are_taken_until_a_run_has_left_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint() == BUNDLED / "general.pth" == ROOT / "weights/general.pth"
    load_network(find_checkpoint())
    PUBLISHED_FOLDER.mkdir(parents=True)
    (PUBLISHED_FOLDER / "args.json").write_text("{}")
    assert find_checkpoint() == BUNDLED / "general.pth", "the run has saved no weights yet"
    save_checkpoint(PUBLISHED_FOLDER / "net_latest.pth", good_state())
    assert find_checkpoint() == PUBLISHED_FOLDER / "net_latest.pth"


def test_folder_means_its_latest_weights(checkpoint):
    assert find_checkpoint(checkpoint.parent) == find_checkpoint(str(checkpoint.parent)) == checkpoint
    assert find_checkpoint(checkpoint) == checkpoint
    assert find_checkpoint("no such/file.pth").name == "file.pth", "which is refused when it is read"


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*.pth")), ids=lambda path: path.stem)
def test_bundled_weights_are_the_published_network(path):
    net = load_network(path)
    assert net.recurrent_iter == 6 and net.dilations == (1, 2, 4, 8, 16) and not net.training
    assert sum(parameter.numel() for parameter in net.parameters()) == 180_483


# What loads


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_load_strictly_with_and_without_module_prefix(shared, tmp_path, name):
    raw = torch.load(weights_path(shared, name), map_location="cpu", weights_only=True)
    bare = {key.removeprefix("module."): value for key, value in raw.items()}
    torch.save(bare, tmp_path / "bare.pth")
    torch.save({f"module.{key}": value for key, value in bare.items()}, tmp_path / "prefixed.pth")
    is_prenet = name.startswith("prenet")
    for path in (weights_path(shared, name), tmp_path / "bare.pth", tmp_path / "prefixed.pth"):
        state = load_weights(path)
        net = SAPNet(use_dilation=not is_prenet, use_cra=not is_prenet)
        net.load_state_dict(state, strict=True)
        assert net.state_dict().keys() == bare.keys()
        assert all(torch.equal(value, bare[key]) for key, value in net.state_dict().items())


def test_what_is_saved_is_loaded(tmp_path):
    state = good_state()
    save_checkpoint(tmp_path / "new folder/net.pth", state)
    loaded = load_weights(tmp_path / "new folder/net.pth")
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], value) for name, value in state.items())
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["net.pth"]


# What is refused


class Code:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


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


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoint_to_test_with(test_refused, tmp_path, kind):
    path = tmp_path / "weights.pth"
    write, reason = BAD_CHECKPOINTS[kind]
    write(path)
    message = test_refused(path, names=[path])
    assert any(part in message for part in reason.split("|")), message
    assert len(message) < 600


@pytest.mark.parametrize("kind", ["missing", "truncated", "other architecture", "NaN"])
def test_bad_checkpoint_to_start_from(refused, tmp_path, pairs_dir, kind):
    path = tmp_path / "weights.pth"
    BAD_CHECKPOINTS[kind][0](path)
    losses_off = [part for name in ("use_contrast", "use_lpips", "use_seg_stage1") for part in (f"--{name}", False)]
    refused(
        "train", "--data_path", pairs_dir, "--packed_dir", tmp_path / "packed", "--save_path", tmp_path / "run",
        "--patch_size", 32, "--device", "cpu", *losses_off, "--init_weights", path, names=[path],
    )
    assert not list((tmp_path / "run").glob("*.pth"))


def test_folder_without_a_checkpoint(test_refused, tmp_path):
    (tmp_path / "empty").mkdir()
    test_refused(tmp_path / "empty", names=[tmp_path / "empty/net_latest.pth"])


@pytest.mark.parametrize("text", ["{", "[1]", '{"recurrent_iter": "six"}', '{"use_dilation": "maybe"}'])
def test_damaged_arguments_beside_a_checkpoint(test_refused, checkpoint, text):
    path = checkpoint.parent / "args.json"
    path.write_text(text)
    test_refused(checkpoint, names=[path])


@pytest.mark.parametrize("format_options", [{}, OLD], ids=["new format", "old format"])
def test_checkpoint_cut_anywhere_is_an_input_error(tmp_path, format_options):
    path = tmp_path / "weights.pth"
    torch.save(good_state(), path, **format_options)
    data = path.read_bytes()
    lengths = [*range(64), *range(64, 4096, 101), *range(4096, len(data), len(data) // 50), len(data) - 1]
    for length in lengths:
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match="weights.pth"):
            load_network(path)


@pytest.mark.parametrize("how", ["plain pickle", "torch.save", "torch.save, old format", "inside a state dict"])
def test_code_in_a_checkpoint_does_not_run(test_refused, tmp_path, how):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    content = {**good_state(), "conv.0.bias": Code(trace)} if how == "inside a state dict" else Code(trace)
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, **(OLD if "old" in how else {}))
    test_refused(path, names=[path, "plain tensors"])
    assert not trace.exists()
    if "plain" not in how:
        torch.load(path, weights_only=False)
        assert trace.exists(), "the trap works"


def test_checkpoints_that_declare_more_than_they_hold(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({**good_state(), "conv.0.bias": torch.zeros(1).expand(2**40)}, path)
    with pytest.raises(InputError, match="expected a state dict"):
        load_weights(path)
    torch.save({**good_state(), "conv.0.bias": torch.zeros(2**22)}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small:
        for name in archive.namelist():
            small.writestr(name, archive.read(name))
    with pytest.raises(InputError, match="small.pth: refused; it declares more data than it holds"):
        load_weights(tmp_path / "small.pth")
