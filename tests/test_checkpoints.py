"""Checkpoints: which file is taken, what loads, and what is refused in one sentence that says what was found."""
import argparse
import collections
import datetime
import hashlib
import io
import json
import os
import pathlib
import pickle
import resource
import shutil
import sys
import threading
import time
import types
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import permutations

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from torchvision.models import resnet18

from checkpoints import (
    BUNDLED, LARGEST_HEADER, PUBLISHED_FOLDER, Ignored, find_checkpoint, load_checkpoint, load_network, load_weights,
    network_options, save_checkpoint, save_safetensors,
)
from conftest import ROOT, contents, photo, save
from losses import SegmentationLoss
from networks import RESIDUAL_CONVS, SAPNet
from test_networks import PUBLISHED, weights_path
from utils import InputError, RunError


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


def small(value=0.5):
    """Weights of two layers: {name: tensor}."""
    return {"conv0.0.weight": torch.full((2, 3), float(value)), "conv0.0.bias": torch.full((2,), float(value))}


def assert_equal(found, expected):
    """To the bit, names and types included."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def refusal(path, read=load_weights):
    """The sentence with which a file is refused."""
    with pytest.raises(InputError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600, message
    assert message.isprintable(), message
    return message


# Which file


def test_bundled_weights_are_taken_until_a_run_has_left_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint() == BUNDLED / "general.pth" == ROOT / "weights/general.pth"
    assert find_checkpoint(photographs=True) == BUNDLED / "real.pth"
    PUBLISHED_FOLDER.mkdir(parents=True)
    (PUBLISHED_FOLDER / "args.json").write_text("{}")
    assert find_checkpoint() == BUNDLED / "general.pth", "the run has saved no weights yet"
    save_checkpoint(PUBLISHED_FOLDER / "net_latest.pth", good_state())
    assert find_checkpoint() == find_checkpoint(photographs=True) == PUBLISHED_FOLDER / "net_latest.pth"


def test_folder_means_its_latest_weights(checkpoint):
    assert find_checkpoint(checkpoint.parent) == find_checkpoint(str(checkpoint.parent)) == checkpoint
    assert find_checkpoint(checkpoint) == checkpoint
    assert find_checkpoint("no such/file.pth").name == "file.pth", "which is refused when it is read"


BUNDLED_FILES = sorted([*BUNDLED.glob("*.pth"), *BUNDLED.glob("*.safetensors")])


@pytest.mark.parametrize("path", BUNDLED_FILES, ids=lambda path: path.name)
def test_bundled_weights_are_the_published_network(path):
    net = load_network(path)
    assert net.recurrent_iter == 6 and net.dilations == (1, 2, 4, 8, 16) and not net.training
    assert sum(parameter.numel() for parameter in net.parameters()) == 180_483
    assert path.stat().st_size < 10**6
    readme = (BUNDLED / "README.md").read_text()
    assert path.name in readme and hashlib.sha256(path.read_bytes()).hexdigest() in readme


@pytest.mark.parametrize("name", ["general", "heavy", "light", "real"])
def test_both_forms_of_the_bundled_weights_are_the_same(run, tmp_path, name):
    assert_equal(load_weights(BUNDLED / f"{name}.safetensors"), load_weights(BUNDLED / f"{name}.pth"))
    result = run("checkpoints", BUNDLED / f"{name}.pth", tmp_path / "again.safetensors")
    assert result.status == 0, result
    assert (tmp_path / "again.safetensors").read_bytes() == (BUNDLED / f"{name}.safetensors").read_bytes()


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
    assert_equal(load_weights(tmp_path / "new folder/net.pth"), state)
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["net.pth"]


AVERAGES = (
    "params_ema", "state_dict_ema", "ema_state_dict", "model_ema", "net_ema", "generator_ema", "g_ema", "ema_model",
    "ema", "averaged",
)
LAST_STEP = ("params", "state_dict", "model_state_dict", "model", "net", "network", "netG", "generator", "module")


@pytest.mark.parametrize("wrapper", AVERAGES + LAST_STEP)
def test_wrappers_are_unwrapped(tmp_path, wrapper):
    beside = {"epoch": 3, "best": 31.5, "name": "SAPNet", "history": [1, 2], "optimizer": {"state": {0: torch.ones(2)}}}
    torch.save({**beside, wrapper: good_state(), "lr": 1e-3}, tmp_path / "net.pt")
    assert load_network(tmp_path / "net.pt").recurrent_iter == 6
    torch.save({"state_dict": {wrapper: small(), "epoch": 3}}, tmp_path / "nested.ckpt")
    assert_equal(load_weights(tmp_path / "nested.ckpt"), small())


@pytest.mark.parametrize("average", AVERAGES)
def test_averages_come_first(tmp_path, average):
    for last in LAST_STEP:
        for order in (1, -1):
            items = [(last, small(1)), (average, {"module": small(2), "updates": 7})]
            torch.save(dict(items[::order]), tmp_path / "net.pth")
            assert_equal(load_weights(tmp_path / "net.pth"), small(2))


def test_an_average_that_holds_no_weights_is_passed_over(tmp_path):
    content = {"ema": {"decay": 0.999}, "params": {"lr": 0.1}, "averaged": 0.9, "model": {}, "net": small()}
    torch.save(content, tmp_path / "net.pth")
    assert_equal(load_weights(tmp_path / "net.pth"), small())


PREFIXES = ("module.", "_orig_mod.", "net.", "model.", "netG.")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_prefixes_in_any_order_are_removed(tmp_path, count):
    for parts in permutations(PREFIXES, count):
        prefix = "".join(parts)
        for number, wrapper in enumerate(("", "state_dict")):
            state = {prefix + name: value for name, value in small().items()}
            torch.save({wrapper: state} if wrapper else state, tmp_path / f"{number}.pth")
            assert_equal(load_weights(tmp_path / f"{number}.pth"), small())


def test_only_prefixes_that_all_names_share_are_removed(tmp_path):
    weight = torch.ones(2)
    for state, expected in (
        ({"module.a.weight": weight, "b.weight": weight}, None),
        ({"module.net.a": weight, "module.model.b": weight}, {"net.a": weight, "model.b": weight}),
        ({"netA.weight": weight}, None),
        ({"module": weight}, None),
        ({"module.layer.a": weight, "module.layer.b": weight}, {"layer.a": weight, "layer.b": weight}),
    ):
        torch.save(state, tmp_path / "net.pth")
        assert_equal(load_weights(tmp_path / "net.pth"), expected or state)


def test_average_of_pytorch_itself(tmp_path):
    net = SAPNet(recurrent_iter=1)
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.DataParallel(net))
    assert averaged.state_dict()["n_averaged"].dtype == torch.int64
    torch.save(averaged.state_dict(), tmp_path / "net.pth")
    assert_equal(load_weights(tmp_path / "net.pth"), net.state_dict())


def test_parameters_in_place_of_tensors(tmp_path):
    torch.save(dict(SAPNet(recurrent_iter=1).named_parameters()), tmp_path / "net.pth")
    assert not any(value.requires_grad for value in load_weights(tmp_path / "net.pth").values())
    load_network(tmp_path / "net.pth")


@pytest.mark.parametrize("residual_conv", RESIDUAL_CONVS)
def test_half_precision_and_other_layouts_in_memory(tmp_path, residual_conv):
    state = SAPNet(residual_conv=residual_conv).state_dict()
    for name, value in state.items():
        state[name] = value.half()
        if value.dim() == 4:
            state[name] = state[name].contiguous(memory_format=torch.channels_last)
    torch.save(state, tmp_path / "net.pth")
    net = load_network(tmp_path / "net.pth")
    assert all(torch.equal(value, state[name].float()) for name, value in net.state_dict().items())


def test_counters_of_batch_normalisation_are_not_needed(tmp_path):
    """What today's torchvision saves of a ResNet is a backbone of the segmentation loss, wrapped or not."""
    torch.manual_seed(1)
    state = resnet18().state_dict()
    assert state["bn1.num_batches_tracked"].dtype == torch.int64
    wrapped = {"state_dict": {f"module.{name}": value for name, value in state.items()}}
    for folder, content in (("plain", state), ("wrapped", wrapped)):
        (tmp_path / folder).mkdir()
        torch.save(content, tmp_path / folder / "resnet18-f37072fd.pth")
        loss = SegmentationLoss(backbone="resnet18", backbone_dir=tmp_path / folder)
        assert all(torch.equal(value, state[name]) for name, value in loss.network.fpn.body.state_dict().items())


# What training code leaves beside the weights


def saved(content, **save_options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **save_options)
    return buffer.getvalue()


def rewrite(path, target, change):
    """Copy a checkpoint with another pickle: ``change`` takes and returns its bytes."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            data = archive.read(name)
            copy.writestr(name, change(data) if name.endswith("data.pkl") else data)


def test_plain_objects_beside_the_weights(tmp_path):
    beside = {
        "args": argparse.Namespace(lr=0.1, path=pathlib.Path("a/b")), "simple": types.SimpleNamespace(a=1),
        "windows": pathlib.PureWindowsPath("a\\b"), "psnr": np.float64(31.5), "step": np.int64(3),
        "random": np.random.get_state(), "history": collections.defaultdict(list, {"loss": [0.1]}),
        "version": torch.__version__, "when": datetime.datetime(2026, 1, 1), "took": datetime.timedelta(hours=1),
        "ordered": collections.OrderedDict(a=1), "sets": {1, 2}, "frozen": frozenset("ab"), "range": range(3),
        "complex": 1j, "bytes": b"abc", "type": torch.float32, "numpy type": np.dtype("float32"),
    }
    path = tmp_path / "net.pth"
    torch.save({**beside, "model": small()}, path)
    before = set(torch.serialization.get_safe_globals())
    content = load_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before, "nothing is allowed for longer than it takes"
    for name in ("args", "simple", "windows", "psnr", "step", "version", "when", "took", "frozen", "numpy type"):
        assert type(content[name]) is Ignored and not vars(content[name])
    assert content["history"] == {"loss": [0.1]} and content["ordered"] == {"a": 1}
    assert_equal(load_weights(path), small())
    # As NumPy 1 and as Python 3.13 name them.
    assert b"numpy._core" in saved(beside)
    for old, new in ((b"numpy._core", b"numpy.core"), (b"cpathlib\n", b"cpathlib._local\n")):
        rewrite(path, tmp_path / "other.pth", lambda data: data.replace(old, new))
        assert_equal(load_weights(tmp_path / "other.pth"), small())


def test_threads_read_at_the_same_time(tmp_path, monkeypatch):
    """The first one is still reading when the second one has done so, were it not for a lock."""
    path, both = tmp_path / "net.pth", threading.Barrier(2)
    torch.save({"args": argparse.Namespace(lr=0.1), "model": small()}, path)
    load, filters = torch.load, list(warnings.filters)

    def slow_load(file, **options):
        with suppress(threading.BrokenBarrierError):
            if both.wait(0.2):
                time.sleep(0.1)
        return load(file, **options)

    monkeypatch.setattr(torch, "load", slow_load)
    with ThreadPoolExecutor(2) as pool:
        for weights in pool.map(load_weights, [path] * 2):
            assert_equal(weights, small())
    assert warnings.filters == filters


def test_lightning(tmp_path):
    state = good_state()
    content = {
        "epoch": 9, "global_step": 1000, "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model._orig_mod.{name}": value for name, value in state.items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 10}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'psnr'}": {"best_model_score": torch.tensor(31.5), "dirpath": "a"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"betas": (0.9, 0.999)}]}],
        "lr_schedulers": [], "hparams_name": "kwargs", "hyper_parameters": {"lr": 1e-3, "net": {"channels": 32}},
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert_equal(load_network(tmp_path / "last.ckpt").state_dict(), state)


def test_mmengine(tmp_path, monkeypatch):
    """Its log is of a class of its own, whose methods are named by getattr, and which need not be installed."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self.history, self.methods = np.arange(3.0), {"mean": HistoryBuffer.mean}

        def mean(self):
            pass

    module.HistoryBuffer = HistoryBuffer
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = {f"generator.{name}": value for name, value in small().items()} | {"step_counter": torch.tensor(7)}
    torch.save({
        "meta": {"cfg": "a = 1", "seed": 1, "epoch": 2}, "state_dict": collections.OrderedDict(state),
        "message_hub": {"log_scalars": collections.OrderedDict(loss=HistoryBuffer()), "runtime_info": {}},
        "param_schedulers": [],
    }, tmp_path / "epoch_2.pth")
    monkeypatch.undo()
    assert b"getattr" in (tmp_path / "epoch_2.pth").read_bytes() and "mmengine" not in sys.modules
    assert_equal(load_weights(tmp_path / "epoch_2.pth"), small())


# .safetensors


OPTIONS = {"recurrent_iter": 4, "use_dilation": False, "residual_conv": "plain", "use_cra": True}


def test_safetensors_hold_weights_to_the_bit_and_options(tmp_path):
    torch.manual_seed(3)
    state = {
        "half": torch.randn(3, 5).half(), "brain": torch.randn(2, 2).bfloat16(), "single": torch.randn(4, 3, 3, 3),
        "double": torch.randn(7).double(), "scalar": torch.tensor(1.5), "none": torch.zeros(0, 3),
        "transposed": torch.randn(4, 6).T, "parameter": torch.nn.Parameter(torch.randn(2)),
        "channels": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }
    state["tied"] = state["single"]
    save_safetensors(tmp_path / "new folder/net.safetensors", state, OPTIONS)
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["net.safetensors"]
    assert_equal(load_weights(tmp_path / "new folder/net.safetensors"), state)
    assert_equal(safetensors.torch.load_file(tmp_path / "new folder/net.safetensors"), state)
    with safetensors.safe_open(tmp_path / "new folder/net.safetensors", "pt") as file:
        assert file.metadata() == {name: str(value) for name, value in OPTIONS.items()}


def test_equal_networks_are_equal_files(tmp_path):
    state = good_state()
    for number in range(8):
        items = list(OPTIONS.items())
        save_safetensors(tmp_path / f"{number}", dict(reversed(state.items())) if number % 2 else state, dict(items))
    assert len(set(contents(tmp_path).values())) == 1


def test_content_decides_not_the_suffix(tmp_path):
    save_safetensors(tmp_path / "a.pth", small(), {})
    torch.save(small(), tmp_path / "b.safetensors")
    torch.save(small(), tmp_path / "c.safetensors", **OLD)
    for name in ("a.pth", "b.safetensors", "c.safetensors"):
        assert_equal(load_weights(tmp_path / name), small())


def test_safetensors_are_unwrapped(tmp_path):
    state = {f"module.net.{name}": value for name, value in small().items()} | {"step": torch.tensor(3)}
    safetensors.torch.save_file(state, tmp_path / "net.safetensors", {"format": "pt", "by": "somebody"})
    assert_equal(load_weights(tmp_path / "net.safetensors"), small())


@pytest.mark.parametrize("residual_conv", RESIDUAL_CONVS)
@pytest.mark.parametrize("use_cra", [True, False])
@pytest.mark.parametrize("use_dilation", [True, False])
def test_options_of_a_network(residual_conv, use_cra, use_dilation):
    options = {"recurrent_iter": 3, "use_dilation": use_dilation, "residual_conv": residual_conv, "use_cra": use_cra}
    assert network_options(SAPNet(**options)) == options


def test_where_the_options_come_from(tmp_path):
    """The first of these that says something: arguments, the file's metadata, args.json beside it, the published."""
    path = tmp_path / "net.safetensors"
    state, dilated = good_state(), (1, 2, 4, 8, 16)

    def stages(*given):
        net = load_network(path, *given)
        return net.recurrent_iter, net.dilations == dilated

    save_safetensors(path, state, {})
    assert stages() == (6, True)
    (tmp_path / "args.json").write_text('{"recurrent_iter": 3, "use_dilation": false, "use_cra": false}')
    assert stages() == (3, False)
    save_safetensors(path, state, {"recurrent_iter": 4})
    assert stages() == (4, False)
    save_safetensors(path, state, {"recurrent_iter": 4, "use_dilation": True})
    assert stages() == (4, True) and stages(5) == (5, True) and stages(5, False) == (5, False)
    assert stages(None, False) == (4, False)
    (tmp_path / "args.json").unlink()
    save_safetensors(path, SAPNet(use_dilation=False, use_cra=False).state_dict(), {"recurrent_iter": 2})
    assert stages() == (2, False), "PReNet is not dilated"


@pytest.mark.parametrize("option", ["recurrent_iter six", "recurrent_iter 0", "use_dilation maybe"])
def test_damaged_options_in_the_metadata(test_refused, tmp_path, option):
    name, value = option.split()
    path = tmp_path / "net.safetensors"
    save_safetensors(path, good_state(), {**OPTIONS, name: value})
    test_refused(path, names=[f"{path}: metadata: {name}: expected ", value])


def test_no_room_for_safetensors(small_disk):
    disk = small_disk("500k")
    with pytest.raises(RunError, match="net.safetensors: could not be written .No space left"):
        save_safetensors(disk / "net.safetensors", good_state(), OPTIONS)
    assert not list(disk.iterdir())


# Runs of train.py


@pytest.fixture
def train_tiny(run, pairs_dir, tmp_path):
    """train_tiny(*options) -> the folder of a short run."""

    def start(*options, status=0):
        arguments = {
            "data_path": pairs_dir, "packed_dir": tmp_path / "packed", "save_path": tmp_path / "run", "patch_size": 11,
            "stride": 37, "recurrent_iter": 2, "use_dilation": False, "batch_size": 4, "num_workers": 0, "epochs": 1,
            "device": "cpu", "amp": False, "compile": False, "ema": 0.5, "use_contrast": False, "use_lpips": False,
            "use_seg_stage1": False,
        }
        result = run("train", *[part for name, value in arguments.items() for part in (f"--{name}", value)], *options)
        assert result.status == status, result
        return tmp_path / "run"

    return start


@pytest.mark.slow
def test_a_run_writes_safetensors_on_request(train_tiny, tmp_path):
    folder = train_tiny("--max_steps", 3, "--safetensors")
    weights = load_weights(folder / "net_latest.pth")
    assert_equal(load_weights(folder / "net_latest.safetensors"), weights)
    shutil.copy(folder / "net_latest.safetensors", tmp_path / "alone.safetensors")
    net = load_network(tmp_path / "alone.safetensors")
    assert net.recurrent_iter == 2 and net.dilations == (1,) * 5
    assert_equal(net.state_dict(), weights)
    # Killed before it could write it.
    written = (folder / "net_latest.safetensors").read_bytes()
    (folder / "net_latest.safetensors").unlink()
    train_tiny("--max_steps", 3, "--safetensors", "True", "--resume")
    assert (folder / "net_latest.safetensors").read_bytes() == written
    train_tiny("--max_steps", 4, "--safetensors", "True", "--resume")
    assert (folder / "net_latest.safetensors").read_bytes() != written
    assert_equal(load_weights(folder / "net_latest.safetensors"), load_weights(folder / "net_latest.pth"))


@pytest.mark.slow
def test_state_of_a_run_is_its_averaged_weights(train_tiny, run, one_image, tmp_path):
    folder = train_tiny("--max_steps", 3)
    assert not list(folder.glob("*.safetensors"))
    state = load_checkpoint(folder / "train_state.pth")
    assert not torch.equal(state["net"]["conv.0.weight"], state["averaged"]["conv.0.weight"])
    net = load_network(folder / "train_state.pth")
    assert net.recurrent_iter == 2 and net.dilations == (1,) * 5
    assert_equal(net.state_dict(), state["averaged"])
    assert_equal(net.state_dict(), load_weights(folder / "net_latest.pth"))
    paths = "--save_path", folder / "train_state.pth", "--test_data_path", one_image, "--output_path", tmp_path / "out"
    assert run("test", *paths).status == 0 and (tmp_path / "out/a.png").exists()


# Converting


def test_conversion_there_and_back(run, tmp_path):
    state = {name: value.half() for name, value in SAPNet(residual_conv="split").state_dict().items()}
    torch.save({"params_ema": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "a.pth")
    result = run("checkpoints", tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert result.status == 0 and "recurrent_iter 6, use_dilation True, residual_conv split" in result.out, result
    assert_equal(load_weights(tmp_path / "b.safetensors"), state)
    result = run("checkpoints", tmp_path / "b.safetensors", tmp_path / "c.pth")
    assert result.status == 0 and "does not say so" not in result.out, result
    content = torch.load(tmp_path / "c.pth", weights_only=True)
    assert_equal(content, state)
    assert list(content) == list(state)


def test_conversion_keeps_the_options(run, checkpoint, tmp_path):
    assert run("checkpoints", checkpoint.parent, tmp_path / "run.safetensors").status == 0
    assert load_network(tmp_path / "run.safetensors").recurrent_iter == 2
    result = run("checkpoints", tmp_path / "run.safetensors", tmp_path / "run.pth")
    assert result.status == 0
    assert "a .pth file does not say so: give --recurrent_iter 2 --use_dilation True" in result.out
    options = "--recurrent_iter", 3, "--use_dilation", False
    assert run("checkpoints", tmp_path / "run.pth", tmp_path / "other.safetensors", *options).status == 0
    net = load_network(tmp_path / "other.safetensors")
    assert net.recurrent_iter == 3 and net.dilations == (1,) * 5


def test_weights_of_one_origin_are_averaged(run, refused, checkpoint, tmp_path):
    start = load_weights(checkpoint)
    for name, change in (("a", 0.3), ("b", -1.5)):
        save_checkpoint(tmp_path / f"{name}.pth", {key: value + change for key, value in start.items()})
    arguments = checkpoint, tmp_path / "mean.pth", "--average", tmp_path / "a.pth", tmp_path / "b.pth"
    assert run("checkpoints", *arguments, "--recurrent_iter", 2).status == 0
    for key, value in load_weights(tmp_path / "mean.pth").items():
        torch.testing.assert_close(value, start[key] - 0.4)
    prenet = tmp_path / "prenet.pth"
    save_checkpoint(prenet, SAPNet(use_dilation=False, use_cra=False).state_dict())
    for other, expected in ((prenet, "expected the tensors of IN"), (tmp_path / "none.pth", "no such file")):
        refused("checkpoints", checkpoint, tmp_path / "no.pth", "--average", other, names=[other, expected])
    refused("checkpoints", prenet, tmp_path / "no.pth", "--average", checkpoint, names=[checkpoint, "of IN"])
    assert not (tmp_path / "no.pth").exists()


def test_conversion_refuses_in_a_sentence(refused, checkpoint, tmp_path):
    (tmp_path / "there.safetensors").write_text("mine")
    torch.save(small(), tmp_path / "small.pth")
    new = tmp_path / "new.safetensors"
    before = contents(tmp_path)
    refused("checkpoints", tmp_path / "none.pth", new, names=[tmp_path / "none.pth", "no such file"])
    refused("checkpoints", tmp_path / "there.safetensors", new, names=["a text that begins with 'mine'"])
    refused("checkpoints", tmp_path / "small.pth", new, names=["SAPNet or PReNet", "2 tensors (conv0.0.weight,"])
    refused("checkpoints", checkpoint, tmp_path / "new.onnx", names=["OUT", "new.onnx", ".safetensors or .pth"])
    refused("checkpoints", checkpoint, tmp_path / "there.safetensors", names=["OUT", "is there already"])
    refused("checkpoints", checkpoint, names=["OUT"])
    assert contents(tmp_path) == before


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


def other_network():
    state = torch.nn.Sequential(*(torch.nn.Linear(3, 2) for _ in range(4))).state_dict()
    return {"state_dict": {f"encoder.{name}": value for name, value in state.items()}}


OLD = {"_use_new_zipfile_serialization": False}
BAD_CHECKPOINTS = {  # name: (how to write it, what the sentence must say)
    "missing": (lambda path: None, "no such file"),
    "truncated": (cut({}, 0.6), "cut short"),
    "truncated at the end": (cut({}, 0.9999), "cut short"),
    "old format, truncated": (cut(OLD, 0.6), "cut short"),
    "old format, truncated early": (cut(OLD, 0.02), "damaged"),
    "old format, truncated at once": (lambda path: path.write_bytes(saved({}, **OLD)[:9]), "cut short"),
    "other architecture": (
        lambda path: torch.save(other_network(), path),
        "(32 of 32 tensors missing, such as conv0.0.weight), found 8 tensors (encoder.0.weight, encoder.0.bias,"
        " encoder.1.weight, ...)",
    ),
    "other shape": (
        lambda path: torch.save({**good_state(), "conv.0.bias": torch.zeros(4)}, path),
        "(conv.0.bias is 4 instead of 3)",
    ),
    "missing key": (lambda path: torch.save(lacking_state(), path), "res_conv3.4.conv_1_1.weight"),
    "NaN": (lambda path: torch.save(nan_state(), path), "NaN or infinite weights in conv_g.0.weight"),
    "infinite in 32 bits": (
        lambda path: torch.save({"a": torch.tensor([1e300]).double()}, path), "NaN or infinite weights in a"
    ),
    "optimizer alone": (
        lambda path: torch.save({"optimizer": {"state": {0: torch.ones(1)}}, "epoch": 3, 7: 1, "lr": 0.1}, path),
        "no weights; expected names and tensors of floating-point numbers, found 4 keys (optimizer, epoch, 7, ...)",
    ),
    "numbers for names": (lambda path: torch.save({1: torch.zeros(2)}, path), "found 1 key (1)"),
    "integers": (lambda path: torch.save({"a": torch.ones(2, dtype=torch.int64)}, path), "found 1 key (a)"),
    "NumPy arrays": (lambda path: torch.save({"a": np.ones(2)}, path), "no weights"),
    "list": (lambda path: torch.save([torch.zeros(2)], path), "no weights; expected names and tensors of"),
    "one tensor": (lambda path: torch.save(torch.zeros(2), path), "found a Tensor"),
    "nothing": (lambda path: torch.save(None, path), "found a NoneType"),
    "sparse": (lambda path: torch.save({"a": torch.eye(2).to_sparse()}, path), "found a of torch.float32, torch.sp"),
    "complex": (lambda path: torch.save({"a": torch.ones(2) * 1j}, path), "found a of torch.complex64"),
    "8 bits": (lambda path: torch.save({"a": torch.ones(2).to(torch.float8_e5m2)}, path), "torch.float8_e5m2"),
    "no data": (lambda path: torch.save({"a": torch.ones(2, device="meta")}, path), "expected dense tensors"),
    "a pickled network": (
        lambda path: torch.save(SAPNet(), path),
        "it holds networks.SAPNet, which is code; expected plain tensors, as torch.save(net.state_dict(), FILE) writes",
    ),
    "odd names": (lambda path: torch.save({"a\nb\0" * 99: torch.ones(2), "c\td": torch.ones(1)}, path), r"a\nb\x00"),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoint_to_test_with(test_refused, tmp_path, kind):
    path = tmp_path / "weights.pth"
    write, reason = BAD_CHECKPOINTS[kind]
    write(path)
    assert reason in test_refused(path, names=[path])
    assert reason in refusal(path, load_network)


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


def zip_of(*names):
    def write(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, bytes(10**5))

    return write


def onnx_file(path):
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("Relu", ["a"], ["b"])
    a, b = (onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "ab")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "graph", [a], [b])), path)


def hdf5_file(path):
    with h5py.File(path, "w") as file:
        file["a"] = np.ones(3)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4ce1fd0a\nsize 744681\n"
FOREIGN = {  # name: (how to write it, what the sentence must say)
    "empty": (lambda path: path.touch(), "an empty file"),
    "folder": (lambda path: path.mkdir(), "a folder"),
    "pipe": (os.mkfifo, "no regular file"),
    "Git LFS": (lambda path: path.write_text(LFS), "a Git LFS pointer, in whose place `git lfs pull` puts"),
    "page": (lambda path: path.write_text("\n<!DOCTYPE html><html>Sign in</html>"), "an HTML or XML page"),
    "page with a mark": (lambda path: path.write_text("\ufeff<html>"), "an HTML or XML page"),
    "text": (lambda path: path.write_text("Entry not found"), "a text that begins with 'Entry not found'"),
    "JSON": (lambda path: path.write_text('{"a": 1, {"b": 2}}'), """a text that begins with '{"a": 1, {"b": 2}}'"""),
    "TorchScript": (lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path), "a TorchScript file"),
    "TorchScript without code": (zip_of("net/data.pkl", "net/constants.pkl"), "a TorchScript file, which is code"),
    "exported program": (zip_of("net/archive_format", "net/models/model.json"), "a program exported by torch.export"),
    "ONNX": (onnx_file, "an ONNX file"),
    "ONNX from PyTorch": (lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.0.0:\x95"), "an ONNX file"),
    "HDF5": (hdf5_file, "an HDF5 file, as Keras writes"),
    "Keras": (zip_of("metadata.json", "config.json", "model.weights.h5"), "a Keras file"),
    "TensorFlow index": (lambda path: path.write_bytes(bytes(99) + bytes.fromhex("57fb808b247547db")), "TensorFlow"),
    "TensorFlow list": (lambda path: path.write_text('model_checkpoint_path: "model.ckpt-1"\n'), "TensorFlow"),
    "TensorFlow model": (lambda path: path.write_bytes(b"\x08\x01\x12\xa8\x06\n\x0e"), "a TensorFlow model"),
    "GGUF": (lambda path: path.write_bytes(b"GGUF\3\0\0\0"), "a GGUF file"),
    "NumPy": (lambda path: np.save(path.open("wb"), np.ones(3)), "a NumPy array"),
    "NumPy arrays": (lambda path: np.savez(path.open("wb"), a=np.ones(3)), "NumPy arrays"),
    "ZIP": (zip_of("weights/net.pth", "readme.txt"), "a ZIP archive of 2 files (weights/net.pth, readme.txt)"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08\0\0\0\0\0"), "an archive, which must be unpacked"),
    "tar": (lambda path: path.write_bytes(b"net.pth".ljust(257, b"\0") + b"ustar\00000"), "an archive, which must be"),
    "picture": (lambda path: save(path.with_suffix(".png"), photo(1)).rename(path), "a picture"),
    "JPEG": (lambda path: save(path.with_suffix(".jpg"), photo(1)).rename(path), "a picture"),
    "bytes": (lambda path: path.write_bytes(bytes(range(99))), "as it begins with the bytes 00 01 02 03 04 05 06 07"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "a plain pickle, which torch.save did not"),
    "pickle of tensors": (lambda path: path.write_bytes(pickle.dumps(small())), "a plain pickle, which torch.save did"),
    "one byte of a pickle": (lambda path: path.write_bytes(b"\x80"), "cut short"),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_file_is_called_what_it_is(tmp_path, kind):
    write, found = FOREIGN[kind]
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"weights{suffix}"
        write(path)
        message = refusal(path)
        assert found in message and "expected" in message, message


def test_real_files_of_other_programs(shared):
    for path, found in (
        (shared / "weights/centernet_coco80.onnx", "an ONNX file"),
        (shared / "reference/golden.npz", "NumPy arrays"),
        (shared / "reference/golden_losses.json", "a text that begins with '{"),
    ):
        assert found in refusal(path)


def test_data_of_tensorflow_is_known_by_its_name(tmp_path):
    path = tmp_path / "model.ckpt-1.data-00000-of-00001"
    path.write_bytes(bytes(100))
    assert "a part of a TensorFlow checkpoint" in refusal(path)


def test_folder_without_a_checkpoint(test_refused, tmp_path):
    (tmp_path / "empty").mkdir()
    test_refused(tmp_path / "empty", names=[tmp_path / "empty/net_latest.pth", "no such file"])


@pytest.mark.parametrize("text", ["{", "[1]", '{"recurrent_iter": "six"}', '{"use_dilation": "maybe"}'])
def test_damaged_arguments_beside_a_checkpoint(test_refused, checkpoint, text):
    path = checkpoint.parent / "args.json"
    path.write_text(text)
    test_refused(checkpoint, names=[path])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["new format", "old format", "safetensors"])
def test_checkpoint_cut_anywhere_is_an_input_error(tmp_path, form):
    path = tmp_path / "weights.pth"
    if form == "safetensors":
        save_safetensors(path, good_state(), OPTIONS)
    else:
        torch.save(good_state(), path, **(OLD if form == "old format" else {}))
    data = path.read_bytes()
    lengths = [*range(64), *range(64, 4096, 101), *range(4096, len(data), len(data) // 50), len(data) - 1]
    for length in lengths:
        path.write_bytes(data[:length])
        refusal(path, load_network)


# Code


@pytest.mark.parametrize(
    "how", ["plain pickle", "torch.save", "torch.save, old format", "inside a state dict", "beside a state dict"]
)
def test_code_in_a_checkpoint_does_not_run(test_refused, tmp_path, how):
    path, trace = tmp_path / "weights.pth", tmp_path / "trace"
    content = Code(trace)
    if how == "inside a state dict":
        content = {**good_state(), "conv.0.bias": Code(trace)}
    if how == "beside a state dict":
        content = {"model": good_state(), "args": argparse.Namespace(hook=Code(trace))}
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, **(OLD if "old" in how else {}))
    found = "can hold code" if how == "plain pickle" else "it holds io.open, which is code; expected plain tensors"
    test_refused(path, names=[path, found])
    assert not trace.exists()
    if "plain" not in how:
        torch.load(path, weights_only=False)
        assert trace.exists(), "the trap works"


def text_of(word):
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


@pytest.mark.parametrize("name", ["posix.system", "os.system", "builtins.eval", "builtins.exec", "torch.load"])
def test_named_code_is_refused_by_its_name(tmp_path, name):
    module, function = name.split(".")
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pth")
    call = f"c{module}\n{function}\n".encode() + text_of(f"touch {tmp_path / 'trace'}") + b"\x85R."
    rewrite(tmp_path / "good.pth", tmp_path / "bad.pth", lambda data: b"\x80\x02" + call)
    assert f"it holds {name.removeprefix('builtins.')}, which is code" in refusal(tmp_path / "bad.pth")
    assert not (tmp_path / "trace").exists()


def test_what_is_ignored_is_not_called(tmp_path):
    """getattr is among it: here it would find and then call a function that leaves a file behind."""
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pth")
    path, trace = tmp_path / "bad.pth", tmp_path / "trace"
    found = b"cbuiltins\ngetattr\ncpathlib\nPosixPath\n" + text_of("touch") + b"\x86R"
    argument = b"cpathlib\nPosixPath\n" + text_of(str(trace)) + b"\x85R"
    rewrite(tmp_path / "good.pth", path, lambda data: b"\x80\x02" + found + b".")
    assert type(load_checkpoint(path)) is Ignored
    rewrite(tmp_path / "good.pth", path, lambda data: b"\x80\x02" + found + argument + b"\x85R.")
    assert "plain tensors" in refusal(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the trap works"


# More than is there


def test_checkpoints_that_declare_more_than_they_hold(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({**good_state(), "conv.0.bias": torch.zeros(1).expand(2**40)}, path)
    assert "numbers are all in the file, found conv.0.bias of torch.float32, torch.strided" in refusal(path)
    torch.save({**good_state(), "conv.0.bias": torch.zeros(2**22)}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(InputError, match="small.pth: refused, as it declares more data than it holds"):
        load_weights(tmp_path / "small.pth")


def test_dictionaries_without_end(tmp_path):
    content = {}
    content |= {name: content for name in AVERAGES + LAST_STEP}
    torch.save(content, tmp_path / "circle.pth")
    assert "no weights" in refusal(tmp_path / "circle.pth")
    content = {"model": small()}
    for _ in range(300):
        content = {"model": content}
    torch.save(content, tmp_path / "deep.pth")
    assert "no weights" in refusal(tmp_path / "deep.pth")
    torch.save({"net." * 10**6 + "weight": torch.ones(2)}, tmp_path / "long.pth")
    assert list(load_weights(tmp_path / "long.pth")) == ["weight"]


@contextmanager
def limited_memory(size):
    """This process may map ``size`` bytes more than it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def described(shape=(2, 2), offsets=(0, 16), dtype="F32", **more):
    """The entry of a tensor in the header of a .safetensors file."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def header_of(**tensors):
    return json.dumps(tensors).encode()


HOSTILE = {  # name: (header, its declared length or None for the right one, bytes of data)
    "header beyond the file": (header_of(a=described()), 10**5, 16),
    "huge header": (header_of(a=described()), 10**8, 16),
    "header of 2^63 bytes": (header_of(a=described()), 2**63, 16),
    "header of 2^64 - 1 bytes": (header_of(a=described()), 2**64 - 1, 16),
    "large header": (header_of(a=described()) + b" " * LARGEST_HEADER, None, 16),
    "cut header": (header_of(a=described())[:-1], None, 16),
    "no header": (b"", None, 16),
    "empty header": (b"{}", None, 0),
    "no JSON": (b"{ a", None, 16),
    "no text": (b"{\xff\xfe}", None, 16),
    "deep JSON": (b'{"a":' * 10**5, None, 16),
    "a list": (b'{"a": [1, 2]}', None, 16),
    "offsets that overlap": (header_of(a=described(), b=described()), None, 16),
    "offsets with a hole": (header_of(a=described(), b=described(offsets=(32, 48))), None, 48),
    "offsets beyond the file": (header_of(a=described(offsets=(0, 10**12), shape=(10**12 // 4,))), None, 16),
    "offsets backwards": (header_of(a=described(offsets=(16, 0))), None, 16),
    "negative offsets": (header_of(a=described(offsets=(-16, 0))), None, 16),
    "data that are not described": (header_of(a=described()), None, 32),
    "another type": (header_of(a=described(dtype="F64")), None, 16),
    "an unknown type": (header_of(a=described(dtype="O")), None, 16),
    "a shape that overflows": (header_of(a=described(shape=(2**62, 2**62))), None, 16),
    "a shape of 2^63": (header_of(a=described(shape=(2**63, 0), offsets=(0, 0))), None, 0),
    "an empty tensor with huge sides": (header_of(a=described(shape=(2**62, 2**62, 0), offsets=(0, 0))), None, 0),
    "a negative shape": (header_of(a=described(shape=(-2, -2))), None, 16),
    "metadata of numbers": (header_of(__metadata__={"recurrent_iter": 6}, a=described()), None, 16),
    "4 bits": (header_of(a=described(dtype="F4", shape=(32,))), None, 16),
    "8 bits": (header_of(a=described(dtype="F8_E4M3", shape=(16,))), None, 16),
    "integers": (header_of(a=described(dtype="I64", shape=(2,))), None, 16),
    "NaN": (header_of(a=described()), None, b"\xff" * 16),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_safetensors(tmp_path, kind):
    header, length, data = HOSTILE[kind]
    length = len(header) if length is None else length
    path = tmp_path / "net.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + (data if isinstance(data, bytes) else bytes(data)))
    with limited_memory(2**27):
        message = refusal(path)
    if kind not in ("empty header", "no header", "4 bits", "8 bits", "integers", "NaN"):
        assert ".safetensors file" in message, message


def test_a_huge_header_that_is_there_takes_no_memory(tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes((90 * 10**6).to_bytes(8, "little") + b"{")
    os.truncate(path, 10**9)  # of which nothing is on the disk
    with limited_memory(2**26):
        assert "header declares 90000000 bytes; expected at most" in refusal(path)


def mutants(data, count):
    """``data`` with one to three faults each, most of them in the first 8 KB, where the header is."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(min(len(changed), 8192) if rng.random() < 0.8 else len(changed)))
            size, kind = int(rng.integers(1, 40)), rng.integers(6)
            if kind == 0:
                changed[start] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                del changed[start : start + size]
            elif kind == 2:
                changed[start:start] = changed[start : start + size]
            elif kind == 3:
                changed[start : start + size] = bytes(rng.integers(256, size=size, dtype=np.uint8))
            elif kind == 4:  # another digit: offsets, shapes, lengths
                digits = [at for at in range(start, min(start + 300, len(changed))) if 48 <= changed[at] < 58]
                if digits:
                    changed[rng.choice(digits)] = int(rng.integers(48, 58))
            else:
                del changed[max(start, 1) :]
        yield bytes(changed)


@pytest.mark.slow
def test_mutated_safetensors_are_read_or_refused_by_name(tmp_path):
    path, state = tmp_path / "net.safetensors", SAPNet(recurrent_iter=1, residual_conv="separable").state_dict()
    save_safetensors(path, state, OPTIONS)
    outcomes = collections.Counter()
    with limited_memory(2**28):
        for data in mutants(path.read_bytes(), 400):
            path.write_bytes(data)
            try:
                net = load_network(path)
            except InputError as error:
                outcomes["refused"] += 1
                assert str(error).startswith(f"{path}: ") and str(error).isprintable() and len(str(error)) < 600
            else:
                outcomes["read"] += 1
                assert all(value.isfinite().all() for value in net.state_dict().values())
    assert outcomes["refused"] > 200 and outcomes["read"] > 10, outcomes
