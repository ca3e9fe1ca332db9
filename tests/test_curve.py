"""The picture of a training run, drawn from its log alone."""
import json
import sys

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import curve

ORANGE, GREY, BLUE = (255, 127, 14), (127, 127, 127), (31, 119, 180)  # of validation, learning rate and training


def step_line(step):
    return {"step": step, "learning_rate": 1e-3 / step, "ssim": -0.8, "loss": -0.8, "psnr": 20 + step / 10}


def epoch_line(epoch, **validation):
    return {"epoch": epoch, "step": 20 * epoch, "learning_rate": 1e-3, "ssim": -0.8, "seconds": 1.5, **validation}


@pytest.fixture
def folder(tmp_path):
    """The folder of a run of two epochs, each validated."""
    lines = []
    for epoch in (1, 2):
        lines += [step_line(step) for step in range(20 * epoch - 18, 20 * epoch + 1, 2)]
        lines.append(epoch_line(epoch, val_psnr_y=21.5 + epoch))
    return write_log(tmp_path / "run", lines)


def write_log(folder, lines):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def colours(path):
    """The set of colours in a picture."""
    return set(map(tuple, np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).tolist()))


def test_steps_and_epochs_are_told_apart(folder):
    steps, epochs = curve.read_log(folder / "log.jsonl")
    assert [record["step"] for record in steps] == list(range(2, 41, 2))
    assert [record["psnr"] for record in steps] == [20 + step / 10 for step in range(2, 41, 2)]
    assert [(record["step"], record["val_psnr_y"]) for record in epochs] == [(20, 22.5), (40, 23.5)]


def test_of_a_step_done_twice_the_later_line_counts(tmp_path):
    """As where a run was killed, and resumed from an earlier save."""
    again = [{**step_line(step), "psnr": 50} for step in (4, 6)]
    folder = write_log(tmp_path / "run", [*map(step_line, (2, 4, 6, 8)), *again])
    steps, _ = curve.read_log(folder / "log.jsonl")
    assert [(record["step"], record["psnr"]) for record in steps] == [(2, 20.2), (4, 50), (6, 50), (8, 20.8)]


def test_a_log_that_ends_within_a_line_is_read_up_to_there(folder):
    path = folder / "log.jsonl"
    data = path.read_bytes()
    whole = curve.read_log(path)
    first = data.index(b"\n") + 1
    for size in range(first, len(data), 7):
        path.write_bytes(data[:size])
        for part, records in zip(curve.read_log(path), whole):
            assert part == records[: len(part)]
    path.write_bytes(data[:-1])
    assert curve.read_log(path) == whole, "only the line end is missing"


@pytest.mark.slow
def test_the_picture_is_written_into_the_folder(run, folder):
    result = run("curve", folder)
    assert result.status == 0 and result.out == f"{folder / 'curve.png'}: written\n"
    assert Image.open(folder / "curve.png").size == (700, 360)
    assert run("curve", folder).status == 0, "its own picture is drawn anew"
    unmarked = PngInfo()
    unmarked.add_text("Software", "Matplotlib version3.10, https://matplotlib.org/")
    Image.new("RGB", (7, 3)).save(folder / "curve.png", pnginfo=unmarked)
    assert run("curve", folder, "--output", folder / "curve.png").status == 2
    assert run("curve", folder).status == 0, "and one of an earlier version, in its own place"
    assert {ORANGE, GREY, BLUE} <= colours(folder / "curve.png")


@pytest.mark.slow
def test_a_run_without_validation_has_no_curve_of_it(run, tmp_path):
    """Nor has one that was killed within its first epoch."""
    lines = [*map(step_line, range(1, 30)), epoch_line(1)]
    for name, part in (("whole", lines), ("killed", lines[:1])):
        folder = write_log(tmp_path / name, part)
        assert run("curve", folder).status == 0
        assert ORANGE not in colours(folder / "curve.png") and (folder / "curve.png").exists()


def test_a_copy_of_the_log_is_drawn_beside_it_or_where_told(run, folder, tmp_path):
    copy = tmp_path / "weights/general.jsonl"
    copy.parent.mkdir()
    (folder / "log.jsonl").rename(copy)
    assert run("curve", copy).status == 0 and run("curve", copy, "--output", tmp_path / "new/a.png").status == 0
    for path in (copy.with_suffix(".png"), tmp_path / "new/a.png"):
        assert Image.open(path).size == (700, 360)


def test_what_is_no_run_is_named(refused, tmp_path):
    refused("curve", tmp_path, names=[tmp_path / "log.jsonl", "no such file", "training run"])
    refused("curve", tmp_path / "none", names=[tmp_path / "none", "no such file"])
    (tmp_path / "README.md").write_text("# Title\n\nText\n")
    message = refused("curve", tmp_path / "README.md", names=[tmp_path / "README.md", "not what train.py writes"])
    assert "README.md/" not in message
    refused("curve", tmp_path / "none.jsonl", names=[tmp_path / "none.jsonl", "no such file"])
    folder = write_log(tmp_path / "untrained", [epoch_line(1, val_psnr_y=20)])
    refused("curve", folder, names=[folder / "log.jsonl", "no step"])


@pytest.mark.parametrize("line", ["{}", "[1]", "7", '{"step": 4, "psnr": null, "learning_rate": 1}', '{"step": 4', ""])
def test_a_line_that_is_none_of_a_log_is_named(refused, folder, line):
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[3:]]))
    refused("curve", folder, names=[path, "line 4"])


def test_another_format_is_refused(refused, folder):
    refused("curve", folder, "--output", folder / "curve.pdf", names=["--output", "curve.pdf", ".png"])


def test_a_missing_matplotlib_is_named(refused, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused("curve", folder, names=["pip install matplotlib"])
    assert not (folder / "curve.png").exists()
