"""The ONNX file against the network, at sizes that the command does not check itself."""
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import export
from checkpoints import BUNDLED, load_network, save_checkpoint
from conftest import ROOT, contents, photo, save, with_rain
from images import read_rgb
from inference import to_image, to_tensor
from networks import SAPNet
from utils import write_text
from warm import Fork, run_script

VARIANTS = {
    "plain": {}, "separable": {"residual_conv": "separable"}, "split": {"residual_conv": "split"},
    "PReNet": {"use_dilation": False, "use_cra": False},
}
SHAPES = [(3, 3, 40, 56), (1, 3, 57, 18), (2, 3, 1, 9), (1, 3, 1, 1)]


def onnx_run(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"rainy": images.numpy()})[0]


def difference(path, net, shape):
    """Largest difference between an ONNX file and the clamped network on noise."""
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = net(images).clamp(0, 1).numpy()
    derained = onnx_run(path, images)
    assert derained.dtype == np.float32 and derained.shape == expected.shape
    return np.abs(derained - expected).max()


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """A run of two stages with larger weights, whose estimate leaves [0, 1] and whose gates are not all near 1/2."""
    folder = tmp_path_factory.mktemp("lively")
    torch.manual_seed(2)
    state = {name: 2 * value for name, value in SAPNet().state_dict().items()}
    save_checkpoint(folder / "net_latest.pth", state)
    write_text(folder / "args.json", '{"recurrent_iter": 2, "use_dilation": true}')
    return folder / "net_latest.pth"


@pytest.fixture(scope="module")
def exported(lively, tmp_path_factory):
    """The file of that run, which its tests only read."""
    path = tmp_path_factory.mktemp("exported") / "sapnet.onnx"
    export_run = Fork(path.with_suffix(".log"), run_script, "export", ["--save_path", lively.parent, "--output", path])
    assert export_run.wait() == 0, export_run.log.read_text()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_network_at_any_size(run, tmp_path, variant):
    torch.manual_seed(0)
    net = SAPNet(recurrent_iter=2, **VARIANTS[variant])
    save_checkpoint(tmp_path / "net.pth", net.state_dict())
    result = run("export", "--save_path", tmp_path / "net.pth", "--recurrent_iter", 2, "--output", tmp_path / "a.onnx")
    assert result.status == 0 and not result.err, result
    assert result.out.count("largest difference to PyTorch") == 3 and "opset 18" in result.out
    for shape in SHAPES:
        assert difference(tmp_path / "a.onnx", net, shape) < 1e-5, shape


@pytest.mark.slow
def test_the_file_is_small_valid_and_tells_what_it_holds(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("export", "--output", "made/sapnet.onnx")
    assert result.status == 0 and f"exporting {BUNDLED / 'general.pth'}: 6 stages" in result.out, result
    assert list(contents(tmp_path)) == ["made/sapnet.onnx"], "one file"
    path = tmp_path / "made/sapnet.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {prop.key: prop.value for prop in model.metadata_props} == {
        "checkpoint": "general.pth", "recurrent_iter": "6", "dilations": "(1, 2, 4, 8, 16)"
    }
    # The parameters once and the first stage's half of the gates; not six times.
    count = sum(np.prod(tensor.dims, dtype=int) for tensor in model.graph.initializer)
    assert 180_483 <= count < 180_483 + 40_000 and path.stat().st_size < 1.1e6
    assert str(ROOT).encode() not in path.read_bytes(), "paths of the machine"
    shape = "batch", 3, "height", "width"
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        assert tuple(dim.dim_param or dim.dim_value for dim in dims) == shape
    assert difference(path, load_network(BUNDLED / "general.pth"), (1, 3, 50, 70)) < 1e-5


@pytest.mark.slow
def test_stages_and_dilation_are_those_of_the_run_or_of_the_options(run, lively, exported, tmp_path):
    options = "--recurrent_iter", 1, "--use_dilation", "False"
    result = run("export", "--save_path", lively.parent, "--output", tmp_path / "a.onnx", *options)
    assert result.status == 0, result
    files = exported, tmp_path / "a.onnx"
    nets = load_network(lively), load_network(lively, 1, False)
    for file in files:
        for net in nets:
            assert (difference(file, net, (1, 3, 30, 40)) < 1e-5) == (files.index(file) == nets.index(net))


@pytest.mark.slow
def test_half_precision_reports_an_error_that_is_its_own(run, lively, tmp_path):
    path = tmp_path / "a.onnx"
    result = run("export", "--save_path", lively, "--output", path, "--precision", "fp16")
    assert result.status == 0, result
    images, reported = export.rainy_batch(1, 128, 96), result.out.splitlines()[2]
    with torch.inference_mode():
        expected = load_network(lively)(images)
    assert expected.min() < 0 or expected.max() > 1
    error = np.abs(onnx_run(path, images) - expected.clamp(0, 1).numpy()).max()
    assert 1e-5 < error < 0.02 and f"1x3x128x96   largest difference to PyTorch {error:.1e}, PSNR" in reported
    assert {tensor.data_type for tensor in onnx.load(path).graph.initializer} >= {onnx.TensorProto.FLOAT16}


@pytest.mark.slow
@pytest.mark.parametrize("error", [pytest.param(2e-4, marks=pytest.mark.slow), float("nan")])
def test_a_file_that_differs_is_refused_and_the_old_one_survives(refused, checkpoint, tmp_path, monkeypatch, error):
    program = onnx.helper.make_model(onnx.helper.make_graph([], "older", [], []))
    onnx.helper.set_model_props(program, {"checkpoint": "a.pth", "recurrent_iter": "6", "dilations": "(1,)"})
    onnx.save(program, tmp_path / "a.onnx")
    before = contents(tmp_path)
    real = onnxruntime.InferenceSession.run
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "run", lambda *args: [output + np.float32(error) for output in real(*args)]
    )
    names = ["2x3x33x47", "expected 0.0001 or less", str(error)[:3]]
    options = "--save_path", checkpoint, "--recurrent_iter", 1, "--output", tmp_path / "a.onnx"
    refused("export", *options, status=1, names=names)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(refused, checkpoint, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    names = [f"{package} is missing", "pip install onnxscript onnxruntime"]
    refused("export", "--save_path", checkpoint, "--output", tmp_path / "a.onnx", names=names)
    assert not (tmp_path / "a.onnx").exists()


def test_bad_paths_are_named_before_the_work(refused, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: pytest.fail("exported"))
    (tmp_path / "file").write_text("")
    before = contents(tmp_path)
    refused("export", "--save_path", tmp_path / "no.pth", "--output", tmp_path / "a.onnx", names=["no.pth", "no such"])
    refused("export", "--save_path", checkpoint, "--output", checkpoint, names=["--output", checkpoint, ".onnx"])
    blocked = tmp_path / "file/a.onnx"
    refused("export", "--save_path", checkpoint, "--output", blocked, names=["--output", blocked.parent])
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_the_lines_of_the_page_derain_an_image(lively, exported, tmp_path, monkeypatch):
    section = (ROOT / "docs/images.md").read_text().split("\n## ONNX\n", 1)[1].split("\n## ", 1)[0]
    lines = section.split("```python\n", 1)[1].split("```", 1)[0]
    (tmp_path / "sapnet.onnx").write_bytes(exported.read_bytes())
    rainy = with_rain(photo(1, 30, 50))
    save(tmp_path / "rainy.png", rainy)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    with torch.inference_mode():
        expected = to_image(load_network(lively)(to_tensor(rainy)))
    derained = read_rgb("derained.png")
    assert np.abs(derained.astype(int) - expected).max() <= 1 and (derained == expected).mean() > 0.999
