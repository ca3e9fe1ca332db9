"""The picture of a training run."""
import json
import sys

import pytest
from PIL import Image

import curve
from test_train import options


@pytest.fixture
def trained(run, pairs_dir, tmp_path):
    """The folder of a run of 8 steps, validated twice."""
    assert run("train", *options(pairs_dir, tmp_path / "run", epochs=2, val_path=pairs_dir)).status == 0
    return tmp_path / "run"


def test_records_are_those_of_the_log(trained):
    series = curve.read_records(trained)
    assert sorted(series["train/psnr"]) == list(range(1, 9))
    for line in map(json.loads, (trained / "log.jsonl").read_text().splitlines()):
        steps = range(line["step"] - 3, line["step"] + 1)
        assert sum(series["train/psnr"][step] for step in steps) / 4 == pytest.approx(line["psnr"], abs=1e-4)


def test_a_file_that_ends_within_a_record_is_read_up_to_there(trained):
    path, = trained.glob("events*")
    whole, data = curve.read_records(trained), path.read_bytes()
    seen = set()
    for size in range(len(data), 0, -len(data) // 50):
        path.write_bytes(data[:size])
        part = curve.read_records(trained)
        assert all(values.items() <= whole[tag].items() for tag, values in part.items())
        seen.add(len(part.get("train/psnr", ())))
    assert min(seen) < 2 and max(seen) == 8


def test_the_picture_is_written_beside_the_log(run, trained):
    result = run("curve", trained)
    assert result.status == 0 and "curve.png" in result.out
    picture = Image.open(trained / "curve.png")
    assert picture.size == (700, 360) and len(picture.convert("RGB").getcolors(10**6)) > 10


def test_a_folder_without_records_is_named(refused, tmp_path):
    refused("curve", tmp_path, names=[str(tmp_path), "training run"])


def test_a_missing_matplotlib_is_named(refused, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused("curve", trained, names=["pip install matplotlib"])
    assert not (trained / "curve.png").exists()
