"""The files of a run: who may write them, its log, and what its state says."""
import json
import time
from argparse import Namespace
from dataclasses import asdict

import pytest
import torch

from conftest import contents
from muon import build_optimizers
from run_folder import (
    Position, RunLog, RunState, changed_data, hold_run, read_log, read_state, write_arguments,
)
from test_train import read_events
from utils import InputError

SOURCE = {"folder": "data", "count": 1, "patches": 9, "size": 100, "content": "aa", "images": 3}
DATA = {"seed": 0, "sources": [SOURCE], "validation": {"pairs": 2, "content": "bb"}}


# The folder


def test_a_folder_is_held_by_one_run_and_left_clean(tmp_path):
    folder = tmp_path / "new" / "run"
    with hold_run(folder, resume=False):
        assert (folder / ".lock").exists()
    assert not folder.exists(), "nothing was written"


@pytest.mark.parametrize(
    "files, resume, expected",
    [
        (["train_state.pth", "net_latest.pth"], False, "holds another run; give --resume"),
        (["net_latest.pth"], True, "has net_latest.pth but no train_state.pth"),
        (None, True, "expected that of a stopped run"),
    ],
)
def test_what_would_harm_a_run_is_refused(tmp_path, files, resume, expected):
    folder = tmp_path / "run"
    for name in files or ():
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"weights")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=expected), hold_run(folder, resume):
        raise AssertionError("entered")
    assert contents(tmp_path) == before and folder.exists() == bool(files)


def test_a_folder_in_which_nothing_was_saved_yet_begins_anew(tmp_path, capsys):
    """A run that was killed before it saved its state leaves these, the last line half written or not."""
    (tmp_path / "args.json").write_text('{"save_path": "x"}')
    for log in ("", '{"epoch": 1, "st', '{"epoch": 1, "step": 4}\n{"ep'):
        (tmp_path / "log.jsonl").write_text(log)
        for resume in (True, False):
            with hold_run(tmp_path, resume):
                pass
            assert ("starting from the beginning" in capsys.readouterr().out) == resume


@pytest.mark.parametrize("resume", [True, False])
def test_weights_of_a_run_whose_state_was_removed_are_refused(tmp_path, resume):
    """But not those of a first epoch, at whose end a run was killed before it saved its state."""
    (tmp_path / "args.json").write_text('{"save_path": "x"}')
    for name in ("net_best.pth", "net_epoch1.pth"):
        (tmp_path / name).write_bytes(b"weights")
    first, second = ('{"step": 4}\n{"epoch": 1, "step": 4}\n', '{"step": 8}\n')
    (tmp_path / "log.jsonl").write_text(first)
    with hold_run(tmp_path, resume):
        pass
    (tmp_path / "log.jsonl").write_text(first + second)
    with pytest.raises(InputError, match="has net_best.pth but no train_state.pth"), hold_run(tmp_path, resume):
        pass


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name, content", [
    ("log.jsonl", "mine\nprecious"), ("log.jsonl", '{"loss": 1}\n{"loss": 2}\n'), ("log.jsonl", b"\xff\xfe{"),
    ("log.jsonl", '{"step": 1, "loss": 2}\n'),
    ("args.json", '{"learning_rate": 1}'), ("args.json", "mine"), ("net_latest.pth", "mine"),
    ("net_latest.safetensors", "mine"), ("net_best.pth", "mine"), ("net_epoch3.pth", "mine"),
], ids=str)
def test_files_of_others_are_refused_with_and_without_resume(tmp_path, name, content, resume):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"has {name} but no train_state.pth"), hold_run(tmp_path, resume):
        pass
    assert (tmp_path / name).read_bytes() == content


def test_arguments_are_kept_and_a_resumed_run_says_which_it_changes(tmp_path, capsys):
    args = Namespace(save_path=tmp_path, resume=False, lr=0.1, data_path=["a", "b"])
    write_arguments(args)
    assert json.loads((tmp_path / "args.json").read_text()) == {**vars(args), "save_path": str(tmp_path)}
    assert capsys.readouterr().out == ""
    args.lr, args.resume, args.new = 0.2, True, 5
    write_arguments(args)
    out = capsys.readouterr().out
    assert "--lr 0.1 -> 0.2" in out and "--new None -> 5" in out and "data_path" not in out
    assert json.loads((tmp_path / "args.json").read_text())["lr"] == 0.2


# The log


def write_lines(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', "[1]\n", '{"loss": 1}\n', "\x00\x00\x00", '{"step": 3}\x00'])
def test_the_log_is_read_up_to_a_line_that_a_kill_left(tmp_path, rest):
    lines = {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}
    write_lines(tmp_path / "log.jsonl", *lines, rest)
    assert read_log(tmp_path / "log.jsonl") == [*lines]


def test_what_was_logged_beyond_the_position_is_dropped(tmp_path):
    """Steps after the last save, and the line of an epoch that --max_steps cut short or that was not saved."""
    lines = (
        {"step": 2}, {"step": 4}, {"epoch": 1, "step": 4}, {"step": 6}, {"epoch": 2, "step": 6}, {"step": 8},
        {"epoch": 2, "step": 8},
    )
    write_lines(tmp_path / "log.jsonl", *lines)
    RunLog(tmp_path, Position(epoch=1, step=6))
    assert read_log(tmp_path / "log.jsonl") == [*lines[:4]]


def test_a_step_is_logged_with_the_speed_since_the_last(tmp_path):
    position = Position()
    log = RunLog(tmp_path, position)
    for k in (1, 2):
        log.batch_arrived()
        time.sleep(0.1)
        log.step_ended()
        time.sleep(0.1)
        position.advance(50, {})
    log.batch_arrived()
    position.advance(50, {})
    text = log.write_step(position, {"learning_rate": 0.1, "loss": 0.5, "psnr": 20.0})
    (line,) = read_log(tmp_path / "log.jsonl")
    assert [*line] == ["step", "learning_rate", "loss", "psnr", "patches_per_second", "waiting"]
    assert line["step"] == 3 and line["loss"] == 0.5
    assert 150 < line["patches_per_second"] <= 150 / 0.4 and 0.2 < line["waiting"] < 0.8
    assert text.startswith("loss 0.5000, PSNR 20.00 dB, ")
    scalars, _ = read_events(tmp_path)
    assert scalars["train/loss"] == [(3, 0.5)] and scalars["train/psnr"] == [(3, 20.0)]
    position.advance(50, {})
    time.sleep(0.01)
    log.write_step(position, {"loss": 0.5, "psnr": 20.0})
    assert 50 < read_log(tmp_path / "log.jsonl")[1]["patches_per_second"] <= 5000, "of the last step alone"


def test_pictures_are_logged(tmp_path):
    RunLog(tmp_path, Position()).add_images({"rainy": 2 * torch.rand(2, 3, 8, 8) - 0.5}, 4)
    assert read_events(tmp_path) == ({}, {"rainy"})


def test_other_processes_of_a_run_write_nothing(tmp_path):
    log = RunLog(tmp_path, Position(), enabled=False)
    log.write({"step": 1})
    log.add_scalars("val", {"psnr": 1.0}, 1)
    log.add_images({"rainy": torch.rand(1, 3, 8, 8)}, 1)
    assert "loss 1.0000" in log.write_step(Position(step=1), {"loss": 1.0, "psnr": 2.0})
    assert contents(tmp_path) == {}


def test_each_start_has_a_tensorboard_file_of_its_own(tmp_path):
    """That of a killed run may end within a record, after which nothing is read."""
    for k in (0, 1):
        log = RunLog(tmp_path, Position(step=k))
        log.add_scalars("train", {"loss": 0.5 + k}, k + 1)
    assert len([*tmp_path.glob("events.out.tfevents.*")]) == 2
    assert read_events(tmp_path)[0]["train/loss"] == [(1, 0.5), (2, 1.5)]


# The state


def test_the_position_counts_patches():
    position = Position()
    for patches, terms in ((4, {"loss": 1.0}), (4, {"loss": 2.0, "stages": 5.0}), (2, {"loss": 3.0})):
        position.advance(patches, terms)
    assert (position.step, position.sample, position.seen) == (3, 10, 10)
    assert position.totals == {"loss": 6.0, "stages": 5.0} and position.counts == {"loss": 3, "stages": 1}
    position.next_epoch()
    assert asdict(position) == {**asdict(Position()), "epoch": 1, "step": 3, "seen": 10}


def change(path, value):
    """``DATA`` with another value at a path of keys."""
    data = json.loads(json.dumps(DATA))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    "path, value, words",
    [
        (["seed"], 5, ["--seed 0 then, 5 now"]),
        (["sources"], [SOURCE, SOURCE], ["--data_path", "1 folder then, 2 now"]),
        (["sources", 0, "size"], 64, ["data: ", "100 px then", "64 px now"]),
        (["sources", 0, "images"], 4, ["data: ", "3 images then", "4 images now"]),
        (["sources", 0, "patches"], 8, ["data: ", "9 patches then", "8 patches now"]),
        (["sources", 0, "count"], 40, ["data: ", "counted 1 time then", "counted 40 times now"]),
        (["sources", 0, "content"], "cc", ["data: ", "other images than then"]),
        (["validation", "pairs"], 3, ["2 validation pairs then, 3 now"]),
        (["validation", "content"], "cc", ["2 validation pairs then, 2 others now"]),
        (["sources", 0, "folder"], "elsewhere", None),
        (["seed"], 0, None),
    ],
)
def test_what_has_changed_in_the_data_is_said(path, value, words):
    sentence = changed_data(DATA, change(path, value))
    assert sentence is None if words is None else all(word in sentence for word in words)


@pytest.fixture
def state():
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 3))
    return make_state(net)


def make_state(net, optimizer="muon", **horizon):
    optimizers = build_optimizers(optimizer, net, 0.01)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    for each in optimizers:
        each.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return RunState(net, net, optimizers, scaler, DATA, {"batch_size": 4, "processes": 1, "max_steps": None, **horizon})


def go_on(state, folder):
    saved, position = read_state(folder)
    state.load(folder, saved, position)
    return position


def test_a_state_is_restored_as_it_was(tmp_path, state, capsys):
    position = Position(1, 8, 7, 30, 31.5, {"loss": 2.5}, {"loss": 3})
    torch.manual_seed(3)
    state.save(tmp_path, position)
    drawn = torch.rand(3)
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 3))
    other = make_state(net.to(memory_format=torch.channels_last), batch_size=2)  # which --channels_last may change
    assert go_on(other, tmp_path) == position
    assert torch.equal(torch.rand(3), drawn)
    torch.testing.assert_close(other.net.state_dict(), state.net.state_dict(), rtol=0, atol=0)
    for mine, theirs in zip(other.optimizers, state.optimizers, strict=True):
        torch.testing.assert_close(mine.state_dict()["state"], theirs.state_dict()["state"], rtol=0, atol=0)
        for parameter, values in mine.state.items():
            assert values["exp_avg"].stride() == parameter.stride(), "fused kernels read both in one order"
    assert capsys.readouterr().out == "going on after step 7, 30 patches, batch_size 4 -> 2\n"


def test_a_state_with_one_count_for_all_terms_goes_on(tmp_path, state):
    """As versions before wrote it."""
    state.save(tmp_path, Position(step=3, totals={"loss": 2.5, "ssim": 1.5}, counts={"loss": 3, "ssim": 3}))
    path = tmp_path / "train_state.pth"
    saved = torch.load(path, weights_only=True)
    del saved["position"]["counts"]
    torch.save({**saved, "position": {**saved["position"], "batches": 3}}, path)
    assert go_on(state, tmp_path).counts == {"loss": 3, "ssim": 3}


@pytest.mark.parametrize(
    "place, value",
    [
        (["position", "step"], "7"), (["position", "sample"], 1.5), (["position", "other"], 1), (["position"], None),
        (["position", "counts"], {"loss": 1}),
        (["net"], {}), (["random"], torch.zeros(3)), (["optimizers"], []), (["data"], {}), (["horizon"], None),
        (["optimizers", 0, 0, "exp_avg"], torch.zeros(2)), (["optimizers", 1, 0], {}),
        (["horizon"], {}),
    ],
    ids=str,
)
def test_a_state_of_another_content_is_refused(tmp_path, state, place, value):
    state.save(tmp_path, Position())
    path = tmp_path / "train_state.pth"
    saved = torch.load(path, weights_only=True)
    inner = saved
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    torch.save(saved, path)
    with pytest.raises(InputError, match="train_state.pth: "):
        go_on(state, tmp_path)


def test_a_state_that_is_not_finite_is_refused(tmp_path, state):
    with torch.no_grad():
        state.net[0].weight[0, 0, 0, 0] = float("nan")
    state.save(tmp_path, Position())
    with pytest.raises(InputError, match="NaN or infinite"):
        go_on(state, tmp_path)


@pytest.mark.parametrize("content", [[], {"weight": torch.ones(3)}, 5, None, "text"])
def test_what_is_no_state_is_refused(tmp_path, state, content):
    torch.save(content, tmp_path / "train_state.pth")
    with pytest.raises(InputError, match="train_state.pth: "):
        go_on(state, tmp_path)
