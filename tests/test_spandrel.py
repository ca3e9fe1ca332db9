"""spandrel_sapnet.py: SAPNet in programs that load their networks with spandrel."""
import importlib.util
import json
import pickle
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from checkpoints import BUNDLED, load_network, network_options, save_checkpoint, save_safetensors
from conftest import ROOT, photo, with_rain
from inference import StripRunner, to_tensor
from networks import SAPNet
from utils import write_text

spandrel = pytest.importorskip("spandrel", reason="spandrel is missing: pip install spandrel")
spandrel_sapnet = importlib.import_module("spandrel_sapnet")

VARIANTS = {
    "plain": {}, "separable": {"residual_conv": "separable"}, "split": {"residual_conv": "split"},
    "PReNet": {"use_dilation": False, "use_cra": False},
}
HALVES = [torch.float16, torch.bfloat16]


def load(path):
    return spandrel.ModelLoader("cpu").load_from_file(path)


@pytest.fixture(scope="module")
def rainy():
    """(1, 3, 44, 60) in [0, 1]."""
    return to_tensor(with_rain(photo(1, 44, 60)))


def random_net(variant):
    torch.manual_seed(0)
    return SAPNet(**VARIANTS[variant]).eval()


def assert_is(model, net):
    """That a descriptor holds ``net``, and says what programs go by."""
    assert isinstance(model, spandrel.ImageModelDescriptor) and model.architecture.id == "SAPNet"
    assert model.tiling is spandrel.ModelTiling.INTERNAL
    assert (model.purpose, model.scale, model.input_channels, model.output_channels) == ("Restoration", 1, 3, 3)
    assert (model.model.recurrent_iter, model.model.dilations) == (net.recurrent_iter, net.dilations)
    expected, found = net.state_dict(), model.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["general", "heavy", "light", "real"])
def test_bundled_weights(name, suffix):
    path = BUNDLED / (name + suffix)
    for model in (load(path), spandrel_sapnet.load(path), spandrel_sapnet.load(name)):
        assert_is(model, load_network(path))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state, lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"params_ema": state, "params": {}}, lambda state: {"epoch": 3, "ema": state},
        lambda state: {"weights": {f"_orig_mod.{name}": value for name, value in state.items()}},
        lambda state: {name: value.half() for name, value in state.items()},
    ],
    ids=["plain", "module.", "params_ema", "beside others", "within others", "in half precision"],
)
def test_every_variant_however_it_is_wrapped(tmp_path, variant, wrap):
    save_checkpoint(tmp_path / "net.pth", wrap(random_net(variant).state_dict()))
    model = load(tmp_path / "net.pth")
    assert_is(model, load_network(tmp_path / "net.pth"))
    kind = "PReNet" if variant == "PReNet" else "SAPNet"
    assert model.tags == [kind, VARIANTS[variant].get("residual_conv", "plain"), "6 stages"]


def test_published_weights_and_variants(shared):
    paths = [*shared.glob("weights/sapnet_*.pth"), *shared.glob("weights/prenet_*.pth")]
    paths += shared.glob("reference/variant_*_random.pth")
    assert len(paths) == 7
    for path in paths:
        assert_is(load(path), load_network(path))
    with pytest.raises(spandrel.UnsupportedModelError):
        load(shared / "weights/alexnet_features.pth")


@pytest.mark.parametrize("change", ["narrow", "four blocks", "another name"])
def test_a_network_that_is_like_it_is_not_taken_for_it(change):
    state = SAPNet().state_dict()
    if change == "narrow":
        state = {name: value[:16] for name, value in state.items()}
    elif change == "four blocks":
        state = {name: value for name, value in state.items() if not name.startswith("res_conv5.")}
    else:
        state["res_conv5.9.weight"] = state["res_conv5.0.weight"]
    with pytest.raises((spandrel.UnsupportedModelError, ValueError)):
        spandrel.ModelLoader().load_from_state_dict(state)


def test_stages_and_dilation_are_those_of_the_file_or_the_run(tmp_path, rainy):
    """Which spandrel's own loader cannot know, as it hands over the tensors alone."""
    net = load_network(BUNDLED / "light.pth", recurrent_iter=2, use_dilation=False)
    save_safetensors(tmp_path / "net.safetensors", net.state_dict(), network_options(net))
    run = {"epoch": 3, "args": Namespace(lr=1), "state_dict": net.state_dict()}  # which spandrel's reader refuses
    save_checkpoint(tmp_path / "net_latest.pth", run)
    write_text(tmp_path / "args.json", json.dumps({"recurrent_iter": 2, "use_dilation": False}))
    expected = StripRunner(net)(rainy).clamp(0, 1)
    for path in (tmp_path / "net.safetensors", tmp_path):
        model = spandrel_sapnet.load(path)
        assert_is(model, net)
        assert model.tags == ["SAPNet", "plain", "2 stages"] and torch.equal(model(rainy), expected)
    assert spandrel_sapnet.load(tmp_path, 3, True).tags[2] == "3 stages"
    assert load(tmp_path / "net.safetensors").tags[2] == "6 stages", "no longer: then docs/python.md is to say so"
    with pytest.raises(pickle.UnpicklingError):
        load(tmp_path / "net_latest.pth")
    for path, error in ((tmp_path / "none.pth", FileNotFoundError), (tmp_path / "args.json", ValueError)):
        with pytest.raises(error, match=path.name):
            spandrel_sapnet.load(path)


def test_it_derains_as_the_strips_do(rainy):
    model = load(BUNDLED / "light.pth")
    model.model.recurrent_iter = 2
    net = load_network(BUNDLED / "light.pth", recurrent_iter=2)
    expected = StripRunner(net)(rainy)
    assert torch.equal(model(rainy), expected.clamp(0, 1)) and not torch.equal(expected, expected.clamp(0, 1))
    assert torch.equal(model(rainy.repeat(2, 1, 1, 1)), expected.clamp(0, 1).repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match=r"\(1, 1, 44, 60\)"):
        model(rainy[:, :1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_close(rainy, dtype):
    """Within what ``test.py --precision`` allows itself (tests/test_inference.py), and back again."""
    model = load(BUNDLED / "light.pth")
    expected = model(rainy)
    halved = model.to(dtype)(rainy.to(dtype))
    assert halved.dtype == dtype and model.dtype == dtype
    difference = (halved.float() - expected).abs()
    assert difference.max() < (0.02 if dtype == torch.float16 else 0.1) and difference.mean() < 0.005
    assert model.float()(rainy).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_type_of_the_program_does_not_count(default):
    expected = load(BUNDLED / "light.pth").model.state_dict()
    torch.set_default_dtype(default)
    try:
        state = load(BUNDLED / "light.pth").model.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.slow
def test_in_comfyui_as_a_link_among_its_nodes(tmp_path):
    """What ComfyUI does with a file in custom_nodes, with a ``utils`` of its own; the node gives the whole result."""
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils/__init__.py").write_text("MINE = True\n")
    (tmp_path / "custom_nodes").mkdir()
    link = tmp_path / "custom_nodes/spandrel_sapnet.py"
    link.symlink_to(ROOT / "spandrel_sapnet.py")
    program = f"""
import importlib.util, sys
import torch, utils
spec = importlib.util.spec_from_file_location({str(link.with_suffix(""))!r}, {str(link)!r})
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
from spandrel import ModelLoader
import utils
assert utils.MINE and "networks" not in sys.modules and "hubconf" not in sys.modules
model = ModelLoader().load_from_state_dict(torch.load({str(BUNDLED / "light.pth")!r}, weights_only=True)).eval()
model.model.recurrent_iter = 1
(name, kind), = module.NODE_CLASS_MAPPINGS.items()
assert kind.INPUT_TYPES()["required"] == {{"model": ("UPSCALE_MODEL",), "image": ("IMAGE",)}}
images = torch.rand(2, 20, 600, 4)
derained, = getattr(kind(), kind.FUNCTION)(model=model, image=images)
assert derained.shape == images.shape and torch.equal(derained[..., 3], images[..., 3])
expected = model(images[1:, ..., :3].movedim(3, 1)).movedim(1, 3)
assert torch.equal(derained[1:, ..., :3], expected)
print("good")
"""
    child = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert child.stdout == "good\n", child.stderr


def test_without_spandrel_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    spec = importlib.util.spec_from_file_location("again", ROOT / "spandrel_sapnet.py")
    with pytest.raises(ImportError, match="pip install spandrel"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_importing_it_again_is_harmless():
    spec = importlib.util.spec_from_file_location("again", ROOT / "spandrel_sapnet.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert [support.architecture.id for support in spandrel.MAIN_REGISTRY].count("SAPNet") == 1
