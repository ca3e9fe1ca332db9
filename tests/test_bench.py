"""The benchmark runs, compares what it says it compares, and writes what it prints."""
import json
import math

import numpy as np
import pytest
import torch

import bench
import engines
from conftest import make_pairs
from losses import DerainLoss
from networks import SAPNet
from utils import RunError

BASELINE = """
import torch

class PlainNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, rainy):
        return self.conv(rainy), [rainy]
"""


@pytest.fixture
def baseline(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(BASELINE)
    return path


@pytest.mark.slow
def test_table_and_json(run, baseline, tmp_path):
    make_pairs(tmp_path / "pairs", range(6), height=110, width=130)  # 24 patches, two batches
    result = run(
        "bench", "--baseline", baseline, "--sizes", "24x32", "--repeats", 1, "--steps", 0, "--device", "cpu",
        "--data_path", tmp_path / "pairs", "--json", tmp_path / "bench.json",
    )
    assert result.status == 0, result
    rows = {row["what"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert all(what in result.out for what in rows)
    plain, ours = rows["inference 24x32 baseline"], rows["inference 24x32 fp32"]
    assert ours["ratio"] == ours["seconds"] / plain["seconds"] and plain["ratio"] == 1
    assert ours["microseconds a pixel"] == pytest.approx(ours["seconds"] / (24 * 32) * 1e6)
    assert ours["bytes a pixel"] > 0
    assert rows["packing 6 pairs"]["megabytes"] * 1e6 >= 6 * 4 * 100 * 100 * 3 * 2
    for rain in ("", ", drawn heavy rain"):
        assert rows[f"loader, 2 workers{rain}"]["patches a second"] > 0


@pytest.mark.slow
def test_an_engine_is_timed_and_one_whose_process_dies_is_named(monkeypatch):
    monkeypatch.setattr(engines, "rainy_image", lambda height, width: np.full((1, 3, height, width), 0.5, np.float32))
    for name in ("here", "onnxruntime"):
        arguments = [name], "fp32", (24, 32), 1, 1, "missing.onnx"
        if name == "here":
            ((seconds, peak, difference),) = engines.time_engines(*arguments).values()
            assert seconds > 0 and difference == 0 and (math.isnan(peak) or peak > 1e7)
        else:
            with pytest.raises(RunError, match="onnxruntime: its process has ended"):
                engines.time_engines(*arguments)


def test_too_few_patches_to_time_the_loader_are_named(run, tmp_path):
    make_pairs(tmp_path / "pairs", range(1), height=100, width=100)
    result = run("bench", "--sizes", "--steps", 0, "--device", "cpu", "--data_path", tmp_path / "pairs")
    assert result.status == 0 and "1 patch; expected 24 or more" in result.out and "loader," not in result.out


def test_busy_without_engines_is_refused(refused):
    refused("bench", "--busy", 1, names=["--busy", "--engines"])


@pytest.mark.slow
def test_training_phases(baseline):
    device = torch.device("cpu")
    phases = bench.training_step(SAPNet(recurrent_iter=1), DerainLoss(weights={}), device)()
    assert phases.keys() == {"forward", "loss", "backward", "optimizer"} and min(phases.values()) > 0
    plain = bench.load_baseline(str(baseline))
    assert "second forward" in bench.training_step(plain, DerainLoss(weights={}), device, second_forward=True)()


@pytest.mark.slow
def test_training_is_timed_without_a_compiler(monkeypatch, run, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(bench, "SAPNet", lambda: SAPNet(recurrent_iter=1))
    for name, value in (("BATCH", 1), ("PATCH", 64), ("WARM_UP_STEPS", 0)):
        monkeypatch.setattr(bench, name, value)
    result = run("bench", "--sizes", "--steps", 1, "--device", "cpu", "--json", tmp_path / "bench.json")
    assert result.status == 0 and "training without torch.compile" in result.out, result
    names = [row["what"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]]
    assert names == ["training step, pixel loss", "training step, all losses"]


UNFIT = """
class Sized(PlainNet):
    def __init__(self, size):
        super().__init__()

class Plain:
    pass
"""


@pytest.mark.parametrize(
    "argument", ["missing.py", "{file}:Absent", "{file}:torch", "{file}:Sized", "{file}:Plain", "{text}"]
)
def test_bad_baselines(refused, baseline, argument):
    text = baseline.with_suffix(".txt")
    text.write_text(BASELINE)
    baseline.write_text(BASELINE + UNFIT)
    refused("bench", "--baseline", argument.format(file=baseline, text=text), "--sizes", "8x8", names=["--baseline"])


def test_a_baseline_without_parameters_is_timed_but_not_trained(run, refused, baseline):
    """As a filter that is no network; the sentence comes before anything is timed."""
    baseline.write_text("import torch\n\nclass NoNet(torch.nn.Identity):\n    pass\n")
    options = ("bench", "--baseline", baseline, "--sizes", "8x8", "--repeats", 1, "--device", "cpu")
    sentence = refused(*options, "--steps", 1, names=[f"--baseline {baseline}", "parameters to train", "--steps 0"])
    assert "Traceback" not in sentence
    result = run(*options, "--steps", 0)
    assert result.status == 0 and "inference 8x8 baseline" in result.out, result


def test_bad_size(refused):
    refused("bench", "--sizes", "100", names=["--sizes"])
