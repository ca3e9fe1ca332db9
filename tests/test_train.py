"""Training runs, tiny but whole: what they write, that stopping one changes nothing, and how they fail."""
import json
import os
import select
import shutil
import signal
import time
from argparse import Namespace
from contextlib import contextmanager

import h5py
import numpy as np
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

import train
from checkpoints import load_network, load_weights, save_checkpoint
from conftest import contents, make_pairs, photo, run_subprocess, save, with_rain
from DerainDataset import PackedPatches, ShuffledBatches, TrainingPatches
from devices import choose_speed, fast_bfloat16
from images import read_rgb
from inference import to_image, to_tensor
from layouts import find_pairs
from metrics import measure
from networks import SAPNet
from run_folder import Position
from SSIM import ssim
from train import last_epoch

STEPS_AN_EPOCH = 4  # 18 patches from three images of 64x48, four a batch
TIMES = ("seconds", "patches_per_second", "waiting")  # what differs between two runs of the same command


def options(folder, save_path, *extra, **changes):
    """The arguments of a run of seconds; ``changes`` override, with a tuple where an option takes a list."""
    chosen = {
        "data_path": folder, "packed_dir": save_path.parent / "packed", "save_path": save_path, "patch_size": 32,
        "stride": 20, "recurrent_iter": 2, "batch_size": 4, "epochs": 3, "milestone": 2, "num_workers": 0,
        "device": "cpu", "amp": False, "compile": False, "log_interval": 1,
        "use_contrast": False, "use_lpips": False, "use_seg_stage1": False, **changes,
    }
    words = [(f"--{name}", *(value if isinstance(value, tuple) else (value,))) for name, value in chosen.items()]
    return [str(word) for part in (*words, extra) for word in part]


def tiny(folder, save_path, *extra, **changes):
    """``options`` of two epochs on 18 patches of 11x11, for tests that look at the run and not at the network."""
    chosen = {"recurrent_iter": 1, "patch_size": 11, "stride": 37, "epochs": 2, "milestone": 1, **changes}
    return options(folder, save_path, *extra, **chosen)


@pytest.fixture
def train_run(run, pairs_dir, tmp_path):
    """train_run("name", *flags, status=0, **options) -> (folder of the run, result)."""

    def start(name="run", *extra, status=0, **changes):
        result = run("train", *tiny(pairs_dir, tmp_path / name, *extra, **changes))
        assert result.status == status, result
        return tmp_path / name, result

    return start


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")])
def test_want_of_memory_is_told_in_a_sentence_and_the_run_goes_on(train_run, monkeypatch, error):
    def scarce(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", scarce)
        _, result = train_run(status=1, max_steps=2)
    assert "not enough memory (" in result.err and "a smaller --batch_size" in result.err
    train_run("run", "--resume", max_steps=2, batch_size=1)


def test_the_last_epoch_is_counted_from_where_the_run_is():
    """Of 100 patches, 16 a batch before and 4 now: 60 steps were 10 epochs, and the 40 to come are 1.6."""
    args, batches = Namespace(max_steps=100, epochs=30), ShuffledBatches(100, 4)
    assert last_epoch(args, batches, Position()) == 4
    assert last_epoch(args, batches, Position(epoch=10, step=60)) == 12
    assert last_epoch(args, batches, Position(epoch=9, sample=96, step=60)) == 12
    assert last_epoch(Namespace(max_steps=None, epochs=30), batches, Position(epoch=9)) == 30
    assert last_epoch(Namespace(max_steps=10**6, epochs=30), batches, Position()) == 30


@pytest.fixture(scope="module")
def module_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture
def whole_run(run, module_dir):
    """whole_run(**options) -> the folder of a run that never stopped, made once for all tests: only read it."""

    def start(**changes):
        folder = module_dir / "-".join(["run", *(f"{name}={value}" for name, value in sorted(changes.items()))])
        if not folder.exists():
            pairs = make_pairs(module_dir / "pairs")
            val = make_pairs(module_dir / "val", (4,))
            assert run("train", *tiny(pairs, folder, **{"val_path": val, **changes})).status == 0
        return folder

    return start


@pytest.fixture
def val_dir(tmp_path):
    """A pair to validate on, whose background is not in ``pairs_dir``."""
    return make_pairs(tmp_path / "val", (4,))


def read_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def records(folder):
    """The lines of log.jsonl that end an epoch."""
    return [line for line in read_lines(folder) if "epoch" in line]


def steps(folder):
    """The lines of log.jsonl that are of a step."""
    return [line for line in read_lines(folder) if "epoch" not in line]


def read_state(folder):
    return torch.load(folder / "train_state.pth", weights_only=True)


def assert_same_weights(first, second):
    a, b = load_weights(first), load_weights(second)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without(record, names):
    return {name: value for name, value in record.items() if name not in names}


def assert_same_run(folder, whole):
    """Everything that says where a run has arrived: weights of each epoch, optimizer, random state, log."""
    names = {path.name for path in whole.glob("*.pth")}
    assert {path.name for path in folder.glob("*.pth")} == names
    for name in names - {"train_state.pth"}:
        assert_same_weights(folder / name, whole / name)
    states = [read_state(path) for path in (folder, whole)]
    data = [state.pop("data") for state in states]
    for k in (0, 1):
        data[k]["sources"] = [without(source, ["folder"]) for source in data[k]["sources"]]
    assert data[0] == data[1] and states[0].pop("horizon") == states[1].pop("horizon")
    torch.testing.assert_close(*states, rtol=0, atol=0)
    lines = [[without(line, TIMES) for line in read_lines(path)] for path in (folder, whole)]
    assert lines[0] == lines[1]


@contextmanager
def watch(look, kind=SAPNet):
    """Call ``look(input, output)`` at each forward pass of a ``kind`` of module."""

    def hook(module, inputs, output):
        if isinstance(module, kind):
            look(inputs[0].detach().clone(), output)

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def struck(number, step=None):
    """Send a signal to this process in a step of the training, counted from 1, or in the first validation."""
    passes = []

    def look(*_):
        if torch.is_inference_mode_enabled() == (step is None):
            passes.append(1)
            if len(passes) == (step or 1):
                os.kill(os.getpid(), number)

    with watch(look, SAPNet if step else torch.nn.Conv2d):
        yield


# What a run writes


def test_a_run_writes_its_files(train_run, val_dir):
    folder, _ = train_run(save_freq=2, val_path=val_dir)
    written = set(contents(folder))
    events = {name for name in written if name.startswith("events.out.tfevents")}
    assert written - events == {
        "net_latest.pth", "net_epoch2.pth", "net_best.pth", "train_state.pth", "args.json", "log.jsonl"
    }
    assert len(events) == 1
    arguments = json.loads((folder / "args.json").read_text())
    assert arguments.keys() == vars(train.parse_args([])).keys()
    assert arguments["recurrent_iter"] == 1 and arguments["milestone"] == [1] and arguments["seed"] == 0
    for name in ("net_latest.pth", "net_epoch2.pth", "net_best.pth"):
        state = torch.load(folder / name, weights_only=True)
        assert state.keys() == SAPNet().state_dict().keys()
        assert all(type(value) is torch.Tensor for value in state.values())


def test_log_has_a_line_a_step_and_a_line_an_epoch(whole_run):
    folder = whole_run()
    lines = read_lines(folder)
    assert [(line.get("epoch"), line["step"]) for line in lines] == [
        (None, 1), (None, 2), (None, 3), (None, 4), (1, 4), (None, 5), (None, 6), (None, 7), (None, 8), (2, 8),
    ]
    for line in records(folder):
        figures = ("psnr", "val_psnr_y", "val_ssim_y", "val_psnr_rgb", "val_ssim_rgb", "seconds")
        assert all(np.isfinite(line[name]) for name in figures)
        epoch = [step for step in steps(folder) if line["step"] - STEPS_AN_EPOCH < step["step"] <= line["step"]]
        for name in ("loss", "ssim", "psnr"):
            assert line[name] == pytest.approx(np.mean([step[name] for step in epoch]), rel=1e-5)
        assert line["loss"] == pytest.approx(line["ssim"]), "the pixel loss is the only term here"


def test_speed_and_waiting_are_logged(train_run):
    began = time.monotonic()
    folder, _ = train_run(log_interval=2, epochs=1)
    took = time.monotonic() - began
    lines = steps(folder)
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert all(0 <= line["waiting"] <= 1 for line in lines)
    seconds = sum(patches / line["patches_per_second"] for patches, line in zip((4, 4, 8), lines))
    assert 0.05 * took < seconds < took, "the intervals make up the run"


def test_a_run_shorter_than_the_log_interval_is_logged(train_run):
    folder, _ = train_run(max_steps=3, log_interval=50)
    assert [line["step"] for line in steps(folder)] == [1, 3]
    scalars, _ = read_events(folder)
    assert [step for step, _ in scalars["train/loss"]] == [1, 3]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_logged_rate_is_the_schedules(train_run, schedule):
    """In the line of a step and in that of the epoch, which has its last step's."""
    folder, _ = train_run(lr=0.01, milestone=1, schedule=schedule)
    if schedule == "step":
        expected = [0.01] * 4 + [0.002] * 4
    else:
        expected = [0.005 * (1 + np.cos(np.pi * k / 8)) for k in range(8)]
    assert [line["learning_rate"] for line in steps(folder)] == pytest.approx(expected)
    assert [line["learning_rate"] for line in records(folder)] == pytest.approx(expected[3::4])


def used_rate(state, before):
    """The learning rate of the last step, from how far Adam's averages say it moved the weights."""
    moved, unit = [], []
    assert len(state["optimizers"][0]) == len(state["net"])
    for k, (name, weights) in enumerate(state["net"].items()):
        values = state["optimizers"][0][k]
        mean = values["exp_avg"] / (1 - 0.9 ** values["step"])
        square = values["exp_avg_sq"] / (1 - 0.999 ** values["step"])
        unit.append((mean / (square.sqrt() + 1e-8)).flatten())
        moved.append((before["net"][name] - weights).flatten())
    moved, unit = torch.cat(moved), torch.cat(unit)
    return float(moved @ unit / (unit @ unit))


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_logged_rate_is_the_one_used(train_run, schedule):
    flags = {"lr": 0.01, "milestone": 1, "schedule": schedule, "max_steps": 7}
    folder, _ = train_run(stop_after=5, **flags)
    before = read_state(folder)
    train_run("run", "--resume", stop_after=6, **flags)
    assert steps(folder)[-1]["step"] == 6
    assert steps(folder)[-1]["learning_rate"] == pytest.approx(used_rate(read_state(folder), before), rel=1e-3)


def test_a_run_takes_its_stages_and_terms_from_the_schedule(train_run):
    options = {"recurrent_iter": 3, "w_psnr": 0.5, "psnr_until": 0.75, "w_stages": 0.25, "log_interval": 1}
    found = []
    with watch(lambda _, output: found.append(len(output[1]))):
        folder, result = train_run("run", "--first_stages", 1, 0.75, **options)
    assert found == [1] * 6 + [3] * 2, "eight steps"
    assert "loss: ssim + 0.5 psnr_loss + 0.25 stages" in result.out
    assert json.loads((folder / "args.json").read_text())["first_stages"] == [1, 0.75]
    *early, late = steps(folder)[:6], steps(folder)[6:]
    for line in early[0]:
        assert line["loss"] == pytest.approx(line["ssim"] + 0.5 * line["psnr_loss"]) and "stages" not in line
    for line in late:
        assert line["loss"] == pytest.approx(line["ssim"] + 0.25 * line["stages"]) and line["stages"] < 0
    first, second = records(folder)
    assert "stages" not in first, "it had no earlier stage"
    for name in ("ssim", "psnr_loss", "loss"):
        assert second[name] == pytest.approx(np.mean([line[name] for line in steps(folder)[4:]]))
    assert second["stages"] == pytest.approx(np.mean([line["stages"] for line in late])), "of the steps that have it"


@pytest.mark.slow
def test_resuming_where_the_stages_change_is_exact(train_run):
    options = {"recurrent_iter": 2, "w_psnr": 0.5, "psnr_until": 0.75, "w_stages": 0.25, "save_freq": 9}
    whole, _ = train_run("whole", "--first_stages", 1, 0.5, **options)
    for stop in (3, 4, 6):
        folder, _ = train_run("run", "--first_stages", 1, 0.5, *["--resume"] * (stop > 3), stop_after=stop, **options)
    _, result = train_run("run", "--first_stages", 1, 0.5, "--resume", **options)
    assert "first_stages" not in result.out
    assert_same_run(folder, whole)
    assert len(read_lines(folder)) == 10


def test_first_logged_loss_and_psnr_are_those_of_the_first_batch(train_run, tmp_path):
    """One step: the record must hold what its batch gives, by the definitions."""
    folder, _ = train_run(max_steps=1, pixel_loss="mse+ssim")
    initial, _ = train_run("initial", use_stage1=False)
    (packed,) = tmp_path.glob("packed/*.h5")
    dataset = TrainingPatches([PackedPatches(packed)])
    batch = [dataset[key] for key in next(iter(ShuffledBatches(len(dataset), 4)))]
    rainy, clean = (torch.stack([item[k] for item in batch]) for k in (0, 1))
    with torch.inference_mode():
        derained = load_network(initial)(rainy)
    (line,) = records(folder)
    mse = ((derained - clean) ** 2).mean()
    assert line["mse"] == pytest.approx(mse.item(), rel=1e-4)
    assert line["ssim"] == pytest.approx(-ssim(derained, clean).item(), rel=1e-4)
    assert line["loss"] == pytest.approx(line["mse"] + line["ssim"], rel=1e-5)
    each = -10 * ((derained.clamp(0, 1) - clean) ** 2).flatten(1).mean(1).log10()
    assert line["psnr"] == pytest.approx(each.mean().item(), rel=1e-4)


@pytest.mark.slow
def test_ema_saves_the_average_of_the_weights(train_run):
    """Against the average taken by hand of the weights after each step, which a run that stops at each one keeps."""
    initial, _ = train_run("initial", use_stage1=False)
    expected, decay = load_weights(initial / "net_latest.pth"), 0.5
    for k in range(4):
        folder, _ = train_run("run", *["--resume"][: k], ema=decay, stop_after=k + 1)
        weights, share = read_state(folder)["net"], min(decay, (1 + k) / (10 + k))
        expected = {name: share * old + (1 - share) * weights[name] for name, old in expected.items()}
    saved = load_weights(folder / "net_latest.pth")
    assert saved.keys() == expected.keys()
    assert all(torch.allclose(saved[name], expected[name], atol=1e-6) for name in saved)
    assert any(not torch.allclose(saved[name], weights[name], atol=1e-4) for name in saved)


@pytest.mark.slow
def test_logged_validation_is_that_of_the_saved_weights(train_run, tmp_path):
    val = make_pairs(tmp_path / "val", (4, 5))
    folder, _ = train_run(val_path=val, epochs=1, ema=0.9, recurrent_iter=2)
    net = load_network(folder)
    assert net.recurrent_iter == 2
    with torch.inference_mode():
        scores = [
            measure(to_image(net(to_tensor(read_rgb(pair.rainy)))), read_rgb(pair.clean))
            for pair in find_pairs(val).pairs
        ]
    (line,) = records(folder)
    # A pixel that rounds the other way moves 9,216 values' PSNR a little.
    assert line["val_psnr_y"] == pytest.approx(np.mean([score["psnr_y"] for score in scores]), abs=0.01)
    assert line["val_ssim_rgb"] == pytest.approx(np.mean([score["ssim_rgb"] for score in scores]), abs=1e-3)
    assert_same_weights(folder / "net_best.pth", folder / "net_latest.pth")


def read_events(folder):
    """(scalars {tag: [(step, value)]}, {tags of images}) of TensorBoard's record files, whose checksums must hold."""
    scalars, images = {}, set()
    for path in sorted(folder.glob("events.out.tfevents*")):
        data, start = path.read_bytes(), 0
        while start < len(data):
            length = int.from_bytes(data[start : start + 8], "little")
            event = data[start + 12 : start + 12 + length]
            for part, at in ((data[start : start + 8], start + 8), (event, start + 12 + length)):
                assert int.from_bytes(data[at : at + 4], "little") == masked_crc32c(part)
            start += 16 + length
            event = Event.FromString(event)
            for value in event.summary.value:
                if value.HasField("image"):
                    images.add(value.tag)
                elif value.HasField("simple_value"):
                    scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars, images


def test_tensorboard_has_each_term_rate_psnr_and_pictures(train_run, val_dir):
    folder, _ = train_run(val_path=val_dir, pixel_loss="mse+ssim", log_interval=2)
    scalars, images = read_events(folder)
    assert images == {"rainy", "derained", "clean"}
    for name in ("ssim", "mse", "loss", "psnr", "learning_rate"):
        logged = [(line["step"], line[name]) for line in steps(folder)]
        assert [step for step, _ in logged] == [1, 2, 4, 6, 8]
        assert np.allclose(scalars[f"train/{name}"], logged, rtol=1e-6)
    for name in ("val_psnr_y", "val_ssim_rgb"):
        assert np.allclose(scalars[f"val/{name}"], [(line["step"], line[name]) for line in records(folder)])
    for line in steps(folder):
        assert line["loss"] == pytest.approx(line["mse"] + line["ssim"], rel=1e-5)


def test_network_runs_once_a_step(train_run):
    calls = []
    with watch(lambda *_: calls.append(1)):
        train_run()
    assert len(calls) == 2 * STEPS_AN_EPOCH


@pytest.mark.slow
def test_net_best_is_that_of_the_best_validation(train_run, val_dir):
    """The second epoch's learning rate spoils the weights; the resumed run knows of the first epoch's."""
    train_run(stop_after=STEPS_AN_EPOCH, val_path=val_dir)
    folder, _ = train_run("run", "--resume", val_path=val_dir, lr=1)
    first, second = (line["val_psnr_y"] for line in records(folder))
    assert first > second
    assert_same_weights(folder / "net_best.pth", folder / "net_epoch1.pth")
    assert_same_weights(folder / "net_latest.pth", folder / "net_epoch2.pth")
    assert read_state(folder)["position"]["best_psnr_y"] == first


@pytest.mark.slow
@pytest.mark.parametrize("pixel_loss, w_psnr", [("ssim", 0), ("mse", 0), ("mse+ssim", 0), ("ssim", 0.02)])
def test_loss_falls_on_one_patch(run, tmp_path, pixel_loss, w_psnr):
    folder = make_pairs(tmp_path / "pairs", (1,), 11, 11)
    changes = {"epochs": 1, "lr": 1e-2, "augment": False, "pixel_loss": pixel_loss, "w_psnr": w_psnr}
    assert run("train", *tiny(f"{folder}:80", tmp_path / "run", **changes)).status == 0
    first, *_, last = steps(tmp_path / "run")
    # Negative SSIM can fall to -1, MSE to 0, and in so few steps the negative PSNR to -40 dB.
    floor = {"ssim": -1, "mse": 0, "mse+ssim": -1}[pixel_loss] - 40 * w_psnr
    assert last["loss"] - floor < 0.5 * (first["loss"] - floor)
    assert last["psnr"] > first["psnr"] + 3


def test_use_stage1_false_validates_and_saves_without_training(train_run, checkpoint, val_dir):
    folder, _ = train_run(use_stage1=False, init_weights=checkpoint, val_path=val_dir)
    assert_same_weights(folder / "net_latest.pth", checkpoint)
    assert_same_weights(folder / "net_best.pth", checkpoint)
    (line,) = read_lines(folder)
    assert line["epoch"] == 1 and line["step"] == 0 and "val_psnr_y" in line and "loss" not in line


def test_max_steps_ends_the_run_where_it_says(train_run):
    folder, _ = train_run(max_steps=STEPS_AN_EPOCH + 1)
    assert [line["step"] for line in records(folder)] == [STEPS_AN_EPOCH, STEPS_AN_EPOCH + 1]
    assert (folder / "net_epoch1.pth").exists() and not (folder / "net_epoch2.pth").exists()


def test_same_seed_same_weights_other_seed_others(train_run):
    first, again, other = (train_run(name, seed=seed, epochs=1)[0] for name, seed in (("a", 7), ("b", 7), ("c", 8)))
    assert_same_weights(first / "net_latest.pth", again / "net_latest.pth")
    with pytest.raises(AssertionError):
        assert_same_weights(first / "net_latest.pth", other / "net_latest.pth")


def test_clip_grad_bounds_the_step(train_run):
    """Adam's average of the gradients after one step is a tenth of the first."""

    def gradient(folder):
        averages = [values["exp_avg"].flatten() for values in read_state(folder)["optimizers"][0].values()]
        return 10 * torch.cat(averages)

    free, clipped = (gradient(train_run(f"clip {norm}", max_steps=1, clip_grad=norm)[0]) for norm in (0, 0.01))
    assert free.norm() > 0.02
    assert clipped.norm() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-3, atol=1e-6)


# The speed options


@pytest.mark.slow
def test_amp_computes_the_network_in_half_precision_and_the_loss_in_float32(train_run):
    """And float16, whose loss is scaled, resumes to the same result as the run that did not stop."""
    types, losses = {}, {}
    for amp in (False, "bf16", "fp16"):
        found = types[amp] = set()
        with watch(lambda _, output, found=found: found.add(output.dtype), torch.nn.Conv2d):
            folder, _ = train_run(f"amp {amp}", max_steps=3, amp=amp)
        losses[amp] = [line["loss"] for line in steps(folder)]
        assert all(weight.dtype == torch.float32 for weight in load_weights(folder / "net_latest.pth").values())
    assert types == {False: {torch.float32}, "bf16": {torch.bfloat16}, "fp16": {torch.float16}}
    # Equal but for the three digits of bfloat16 and the four of float16, of which the mean over the patches keeps more.
    for half, tolerance in (("bf16", 0.02), ("fp16", 0.005)):
        assert losses[half][0] != losses[False][0] and losses[half] == pytest.approx(losses[False], abs=tolerance)
    folder, _ = train_run("stopped", max_steps=3, amp="fp16", stop_after=1)
    assert read_state(folder)["scaler"]["scale"] == 2**16
    train_run("stopped", "--resume", max_steps=3, amp="fp16")
    assert read_state(folder)["scaler"]["_growth_tracker"] == 3
    for name, weight in load_weights(folder / "net_latest.pth").items():
        assert torch.equal(weight, load_weights(folder.parent / "amp fp16/net_latest.pth")[name])


def without_speed(arguments):
    """The arguments without --amp and --compile, which are then the program's choice."""
    pairs = zip(arguments[::2], arguments[1::2])
    return [part for name, value in pairs if name not in ("--amp", "--compile") for part in (name, value)]


def test_amp_and_compile_are_chosen_by_the_machine_and_the_length_of_the_run(run, pairs_dir, tmp_path):
    result = run("train", *without_speed(tiny(pairs_dir, tmp_path / "run", max_steps=1)))
    assert result.status == 0, result
    arguments = json.loads((tmp_path / "run/args.json").read_text())
    half = "bf16" if fast_bfloat16(torch.device("cpu")) else False
    assert arguments["amp"] == half and arguments["compile"] is False
    assert f"mixed precision {half}, compile False" in result.out


@pytest.mark.parametrize("steps, compiler, chosen", [(999, True, False), (1000, True, True), (1000, False, False)])
def test_long_runs_are_compiled_where_there_is_a_compiler(monkeypatch, tmp_path, steps, compiler, chosen):
    """The steps are those of the whole run: how much is left of a resumed one must not change its arithmetic."""
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) if compiler else "")
    monkeypatch.delenv("CXX", raising=False)
    args = train.parse_args([])
    choose_speed(args, torch.device("cpu"), steps)
    assert args.compile is chosen


@pytest.mark.slow
def test_a_long_run_is_really_compiled(train_run, run, pairs_dir, tmp_path, monkeypatch):
    """By default, and with mixed precision: two steps of a thousand, whose losses are those of the eager run."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler here")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = {"max_steps": 1000, "epochs": 1000, "stop_after": 2, "use_dilation": False, "use_cra": False}
    eager, _ = train_run("eager", amp=True, **flags)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        result = run("train", *without_speed(tiny(pairs_dir, tmp_path / "run", **flags)), "--amp", "True")
        assert result.status == 0 and "mixed precision bf16, compile True" in result.out, result
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        assert torch._dynamo.utils.counters["inductor"] and not torch._dynamo.utils.counters["graph_break"]
    finally:
        torch._dynamo.reset()
    losses = [[line["loss"] for line in steps(folder)] for folder in (tmp_path / "run", eager)]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], abs=0.02)
    names = [load_weights(folder / "net_latest.pth").keys() for folder in (tmp_path / "run", eager)]
    assert names[0] == names[1]


# Validation


def packed_names(folder):
    """The names of the rainy images in the only packed file of a folder."""
    (path,) = folder.glob("packed/*.h5")
    return PackedPatches(path).names


def make_versions(folder, backgrounds=(1, 2, 3), versions=2):
    """Rain12600's layout: several rainy versions of each clean image."""
    for number in backgrounds:
        clean = photo(number)
        save(folder / f"ground_truth/{number}.png", clean)
        for version in range(1, versions + 1):
            save(folder / f"rainy_image/{number}_{version}.png", with_rain(clean, 10 * number + version))
    return folder


def assert_one_background_is_held_out(result, tmp_path, backgrounds, versions):
    names = packed_names(tmp_path)
    trained = {name.split("_")[0] for name in names}
    assert len(trained) == backgrounds - 1 and len(names) == versions * len(trained)
    assert "1 validation pair" in result.out
    left_out = next(line for line in result.out.splitlines() if "left out" in line)
    (held_out,) = {str(number) for number in range(1, backgrounds + 1)} - trained
    assert left_out.count(f"{held_out}_") == versions, "each version is named"


def test_all_versions_of_a_background_that_is_held_out_leave_the_training(train_run, tmp_path):
    _, result = train_run(data_path=make_versions(tmp_path / "versions"), val_pairs=1, max_steps=1)
    assert_one_background_is_held_out(result, tmp_path, 3, 2)


def test_case_val_leak(train_run, shared, tmp_path):
    _, result = train_run(data_path=shared / "cases/val_leak/Rain12600", val_pairs=1, max_steps=1, stride=300)
    assert_one_background_is_held_out(result, tmp_path, 3, 2)


def test_backgrounds_of_val_path_leave_the_training(train_run, tmp_path):
    """Pairs of theirs and photographs alike."""
    val = make_pairs(tmp_path / "val", (2, 4))
    for number in (2, 5):
        save(tmp_path / f"photographs/{number}.jpg", photo(number))
    folders = tmp_path / "pairs", tmp_path / "photographs"
    _, result = train_run("run", "--rain_synth", "heavy", 0.5, data_path=folders, val_path=val, max_steps=1)
    names = sorted(name for path in tmp_path.glob("packed/*.h5") for name in PackedPatches(path).names)
    assert names == ["5.jpg", "rain-1.png", "rain-3.png"]
    left_out = [line for line in result.out.splitlines() if "left out" in line]
    assert len(left_out) == 2 and "rain-2.png" in left_out[0] and "2.jpg" in left_out[1]


def test_a_training_set_of_which_nothing_is_left_is_refused(refused, pairs_dir, tmp_path):
    refused(
        "train", *tiny(pairs_dir, tmp_path / "run", val_path=pairs_dir), names=["--data_path", pairs_dir, "3 pairs"]
    )
    assert not (tmp_path / "run").exists()


def test_pairs_are_held_out_by_folder(run, pairs_dir, tmp_path):
    folders = pairs_dir, make_pairs(tmp_path / "others", (5, 6, 7)), f"{pairs_dir}:2"
    arguments = tiny(folders, tmp_path / "run", max_steps=1)
    result = run("train", *arguments, "--val_pairs", 0, 2, 0)
    assert result.status == 0 and "60 patches" in result.out and "2 validation pairs" in result.out, result


def test_a_folder_given_twice_holds_out_the_same_pairs(run, pairs_dir, tmp_path):
    arguments = tiny((pairs_dir, pairs_dir), tmp_path / "run", max_steps=1)
    result = run("train", *arguments, "--val_pairs", 1)
    assert result.status == 0 and "24 patches" in result.out and "1 validation pair" in result.out, result


def test_numbers_of_held_out_pairs_that_fit_no_folders_are_refused(refused, pairs_dir, tmp_path):
    arguments = tiny(pairs_dir, tmp_path / "run")
    refused("train", *arguments, "--val_pairs", 1, 2, names=["--val_pairs", "--data_path (1)", "1 2"])


def test_validation_pair_of_two_sizes_is_refused_before_training(refused, pairs_dir, val_dir, tmp_path):
    save(val_dir / "norain-4.png", photo(4, 40, 64))
    refused(
        "train", *tiny(pairs_dir, tmp_path / "run", val_path=val_dir),
        names=[val_dir / "rain-4.png", "norain-4.png", "64x40"],
    )
    assert not (tmp_path / "run").exists()


# Stopping and resuming


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_workers, flags",
    [
        (1, {}), (0, {"schedule": "cosine", "ema": 0.9}),
        (1, {"schedule": "cosine", "ema": 0.9, "optimizer": "muon"}),
        (0, {"schedule": "cosine", "max_steps": 7, "epochs": 100, "optimizer": "muon"}),
    ],
)
def test_a_run_stopped_three_times_equals_one_that_never_was(train_run, whole_run, val_dir, num_workers, flags):
    """Stopped after the first step, at an epoch's end, and within an epoch."""
    for stop_after in (1, STEPS_AN_EPOCH, STEPS_AN_EPOCH + 2):
        resume = ["--resume"] if stop_after > 1 else []
        folder, result = train_run(
            "run", *resume, stop_after=stop_after, val_path=val_dir, num_workers=num_workers, **flags
        )
        assert f"stopped after step {stop_after}; the same command with --resume continues" in result.out
        assert read_state(folder)["position"]["step"] == stop_after
        torch.rand(100)  # the random state must come from the file
    train_run("run", "--resume", val_path=val_dir, num_workers=num_workers, **flags)
    assert_same_run(folder, whole_run(**flags))


@pytest.mark.slow
def test_the_same_stop_after_again_does_not_stop_twice(train_run, whole_run, val_dir):
    train_run(stop_after=3, val_path=val_dir)
    folder, _ = train_run("run", "--resume", stop_after=3, val_path=val_dir)
    assert_same_run(folder, whole_run())


@pytest.mark.slow
def test_a_run_ended_by_max_steps_goes_on_without_it(train_run, whole_run, val_dir):
    """But its line of the unfinished epoch is dropped. The validation in its middle may have found a net_best."""
    train_run(max_steps=6, val_path=val_dir)
    folder, result = train_run("run", "--resume", val_path=val_dir)
    assert "--max_steps 6 -> None" in result.out and "max_steps 6 -> None" in result.out
    whole = whole_run()
    states = [read_state(path) for path in (folder, whole)]
    torch.testing.assert_close(*(state["net"] for state in states), rtol=0, atol=0)
    assert [line["step"] for line in records(folder)] == [4, 8]
    assert [line["step"] for line in steps(folder)] == [*range(1, 9)]


@pytest.mark.slow
@pytest.mark.parametrize("number, step, last", [(signal.SIGINT, 6, 6), (signal.SIGTERM, None, STEPS_AN_EPOCH + 1)])
def test_a_signal_stops_after_the_step(train_run, whole_run, val_dir, number, step, last):
    """In the second epoch's second step, or in the validation of the first epoch, after which a step is still made."""
    with struck(number, step):
        folder, result = train_run(val_path=val_dir, status=130)
    assert result.out.splitlines()[-1] == f"stopped after step {last}; the same command with --resume continues"
    assert not result.err
    train_run("run", "--resume", val_path=val_dir)
    assert_same_run(folder, whole_run())


def test_a_signal_in_the_last_step_changes_nothing(train_run, whole_run, val_dir):
    with struck(signal.SIGINT, 2 * STEPS_AN_EPOCH):
        folder, _ = train_run(val_path=val_dir)
    assert_same_run(folder, whole_run())


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(train_run, whole_run, val_dir):
    with struck(signal.SIGINT, 7), struck(signal.SIGINT, 7):
        folder, result = train_run(val_path=val_dir, save_steps=3, status=130)
    assert result.err == "train.py: error: interrupted\n"
    train_run("run", "--resume", val_path=val_dir, save_steps=3)
    assert_same_run(folder, whole_run())


@pytest.mark.slow
def test_ctrl_c_in_the_terminal_stops_saves_and_resumes_exactly(train_run, pairs_dir, tmp_path):
    """The real thing: a process group with loader workers gets SIGINT in the middle of an epoch."""
    flags = {"num_workers": 2, "epochs": 1000, "milestone": 2, "save_steps": 2}
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    arguments = tiny(pairs_dir, tmp_path / "stopped", **flags)
    child = run_subprocess("train.py", *arguments, start_new_session=True, env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "stopped/net_latest.pth").exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, (out, err)
    assert "--resume continues" in out.splitlines()[-1] and "Traceback" not in err
    more = read_state(tmp_path / "stopped")["position"]["step"] + 3
    flags["num_workers"] = 0
    # It goes on to a step of its own choosing, which a run that never stopped must reach with the same weights.
    train_run("stopped", "--resume", stop_after=more, **flags)
    train_run("straight", stop_after=more, **flags)
    assert_same_weights(tmp_path / "stopped/net_latest.pth", tmp_path / "straight/net_latest.pth")


@pytest.mark.slow
def test_a_terminal_that_is_closed_stops_the_run_which_saves(pairs_dir, tmp_path):
    """The real thing: the system then signals the run and its loader processes, and what they print is an error."""
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")

    def take_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored

    terminal, end = os.openpty()
    flags = {"data_path": f"{pairs_dir}:100000", "save_steps": 10**6, "num_workers": 2}  # the epoch has no end
    child = run_subprocess(
        "train.py", *tiny(pairs_dir, tmp_path / "run", **flags), stdin=end, stdout=end, stderr=end,
        preexec_fn=take_terminal,
    )
    os.close(end)
    log, deadline, shown = tmp_path / "run/log.jsonl", time.monotonic() + 120, b""
    while not (log.exists() and log.read_text()):
        if select.select([terminal], [], [], 0.02)[0]:
            shown += os.read(terminal, 4096)
        assert child.poll() is None and time.monotonic() < deadline, shown.decode()
    os.close(terminal)
    assert child.wait(60) == 130
    assert read_state(tmp_path / "run")["position"]["step"] == read_lines(tmp_path / "run")[-1]["step"]


def test_resume_restores_the_random_state(train_run, monkeypatch):
    """Nothing draws from it today; a loss that does must go on as if it had never stopped."""
    build = train.build_criterion

    def build_noisy(*args):
        criterion = build(*args)

        def noisy(*images):
            total, terms = criterion(*images)
            return total * torch.rand(()), terms

        return noisy

    monkeypatch.setattr(train, "build_criterion", build_noisy)
    whole, _ = train_run("whole", epochs=1)
    cut, _ = train_run("cut", epochs=1, stop_after=2)
    train_run("cut", "--resume", epochs=1)
    assert_same_run(cut, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first, stop_after, second, step, seen",
    [
        (4, 2, 2, 7, 18),
        (2, 1, 4, 5, 18),
        (2, 7, 4, 8, 18),  # the last four patches are one batch more than an epoch of fours has
        (3, 5, 4, 5, 15),  # the last three patches are no batch
    ],
)
def test_resume_with_another_batch_size_goes_on_at_the_same_sample(
    train_run, tmp_path, first, stop_after, second, step, seen
):
    drawn = []
    flags = {"augment": False, "epochs": 1}
    with watch(lambda rainy, _: drawn.extend(rainy)):
        train_run(batch_size=first, stop_after=stop_after, **flags)
        folder, result = train_run("run", "--resume", batch_size=second, **flags)
    before = first * stop_after
    assert f"going on after step {stop_after}, {before} patches, batch_size {first} -> {second}" in result.out
    (packed,) = tmp_path.glob("packed/*.h5")
    patches = PackedPatches(packed)
    order = np.random.default_rng((0, 0)).permutation(len(patches))[:seen]
    expected = torch.stack([torch.from_numpy(patches[index][0]).permute(2, 0, 1) / 255 for index in order])
    assert torch.equal(torch.stack(drawn), expected), "each patch once, in the order of the undisturbed epoch"
    assert [(line["epoch"], line["step"]) for line in records(folder)] == [(1, step)]
    position = read_state(folder)["position"]
    assert [position[name] for name in ("epoch", "sample", "step", "seen")] == [1, 0, step, seen]


def test_case_resume_other_batch(train_run, refused, shared, tmp_path):
    data = tmp_path / "Rain12600"
    shutil.copytree(shared / "cases/resume_other_batch/Rain12600", data)
    flags = {"data_path": data, "stride": 150}
    folder, _ = train_run(batch_size=2, stop_after=7, **flags)
    position = read_state(folder)["position"]
    patches = read_state(folder)["data"]["sources"][0]["patches"]
    train_run("run", "--resume", batch_size=6, stop_after=8, **flags)
    assert read_state(folder)["position"]["seen"] == position["seen"] + 6 < patches
    (data / "rainy_image/2_14.jpg").unlink()
    refused("train", *tiny(data, folder, "--resume", stride=150), names=[data, "6 images then, 5 images now"])


def add_pair(data, val):
    make_pairs(data, (9,))


def remove_pair(data, val):
    (data / "rain-3.png").unlink()
    (data / "norain-3.png").unlink()


def edit_image(data, val):
    image = read_rgb(data / "rain-2.png").copy()
    image[10, 10, 1] ^= 1
    save(data / "rain-2.png", image)


def edit_validation(data, val):
    save(val / "norain-4.png", photo(8))


CHANGES = {
    "file added": (add_pair, {}, "3 images then, 4 images now"),
    "file removed": (remove_pair, {}, "3 images then, 2 images now"),
    "image edited": (edit_image, {}, "other images than then"),
    "patch size": (None, {"patch_size": 12}, "patches of 11 px then, patches of 12 px now"),
    "stride": (None, {"stride": 20}, "18 patches then, 36 patches now"),
    "count": (None, {"data_path": "{data}:2"}, "counted 1 time then, counted 2 times now"),
    "hold-out": (None, {"val_pairs": 1}, "3 images then, 2 images now"),
    "seed": (None, {"seed": 1}, "--seed 0 then, 1 now"),
    "folders": (None, {"data_path": "{data} {val}"}, "--data_path with 1 folder then, 2 now"),
    "validation": (edit_validation, {}, "1 validation pair then, 1 other now"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_on_other_data_says_what_changed(train_run, refused, pairs_dir, tmp_path, change):
    val = make_pairs(tmp_path / "val", (4,))
    folder, _ = train_run(stop_after=2, val_path=val)
    before = contents(folder)
    act, flags, expected = CHANGES[change]
    if act:
        act(pairs_dir, val)
    flags = {"val_path": val, **flags}
    data_path = flags.pop("data_path", "{data}").format(data=pairs_dir, val=make_pairs(tmp_path / "more", (5,)))
    arguments = tiny(tuple(data_path.split()), folder, "--resume", **flags)
    message = refused("train", *arguments, names=[f"--resume {folder}", expected])
    assert "--init_weights" in message
    assert contents(folder) == before


@pytest.mark.slow
def test_resume_does_not_mind_other_dates_and_another_place(train_run, whole_run, pairs_dir, val_dir, tmp_path):
    train_run(stop_after=2, val_path=val_dir)
    for path in pairs_dir.iterdir():
        os.utime(path, (1e9, 1e9))
    folder, result = train_run("run", "--resume", stop_after=6, val_path=val_dir)
    assert "the folder has changed" in result.out, "packed again, but from the same images"
    moved = tmp_path / "elsewhere"
    shutil.copytree(pairs_dir, moved / "data")
    shutil.copytree(folder, moved / "run")
    shutil.rmtree(pairs_dir)
    shutil.rmtree(folder)
    train_run("elsewhere/run", "--resume", data_path=moved / "data", packed_dir=moved / "packed", val_path=val_dir)
    assert_same_run(moved / "run", whole_run())


@pytest.mark.slow
def test_initial_weights_are_not_needed_again(train_run, tmp_path):
    torch.manual_seed(5)
    checkpoint, flags = tmp_path / "initial.pth", {"epochs": 1}
    save_checkpoint(checkpoint, SAPNet().state_dict())
    whole, _ = train_run("whole", init_weights=checkpoint, **flags)
    plain, _ = train_run("plain", **flags)
    cut, _ = train_run("cut", init_weights=checkpoint, stop_after=1, **flags)
    checkpoint.unlink()
    train_run("cut", "--resume", stop_after=2, **flags)
    train_run("cut", "--resume", init_weights=checkpoint, **flags)
    assert_same_run(cut, whole)
    assert steps(plain)[0]["loss"] != steps(whole)[0]["loss"]


def test_the_state_of_an_earlier_version_is_refused(refused, pairs_dir, tmp_path):
    folder, net = tmp_path / "run", SAPNet(recurrent_iter=1)
    optimizer = torch.optim.Adam(net.parameters())
    state = {"net": net.state_dict(), "averaged": net.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"position": {"epoch": 1, "batch": 2, "step": 6}, "random": torch.get_rng_state()}
    save_checkpoint(folder / "train_state.pth", state)
    save_checkpoint(folder / "net_latest.pth", net.state_dict())
    before = contents(folder)
    arguments = tiny(pairs_dir, folder, "--resume")
    message = refused("train", *arguments, names=[folder / "train_state.pth", "earlier version"])
    assert f"--init_weights {folder / 'net_latest.pth'}" in message
    assert contents(folder) == before


def test_finished_run_resumed_changes_nothing(train_run):
    folder, _ = train_run(epochs=1)
    before = contents(folder)
    for flags in ({"epochs": 1}, {"epochs": 3, "max_steps": STEPS_AN_EPOCH}):
        _, result = train_run("run", "--resume", **flags)
        assert f"nothing left to do after step {STEPS_AN_EPOCH}" in result.out
        after = contents(folder)
        assert {name for name in after if before.get(name) != after[name]} <= {"args.json"}


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_epochs(train_run, whole_run, val_dir):
    train_run(epochs=1, val_path=val_dir)
    folder, result = train_run("run", "--resume", val_path=val_dir)
    assert "epochs 1 -> 2" in result.out
    assert_same_run(folder, whole_run())


def test_resume_with_other_network_options_is_refused_and_changes_nothing(train_run, refused, pairs_dir):
    folder, _ = train_run(epochs=1)
    before = contents(folder)
    refused("train", *tiny(pairs_dir, folder, "--resume", residual_conv="split"), names=["train_state.pth"])
    assert contents(folder) == before


@pytest.mark.parametrize("first, second", [("adam", "muon"), ("muon", "adam")])
def test_resume_with_another_optimizer_is_refused_and_changes_nothing(train_run, refused, pairs_dir, first, second):
    folder, _ = train_run(max_steps=1, optimizer=first)
    before = contents(folder)
    refused("train", *tiny(pairs_dir, folder, "--resume", optimizer=second), names=["train_state.pth", "--optimizer"])
    assert contents(folder) == before


def test_a_run_is_not_overwritten_and_none_is_not_resumed(train_run, refused, pairs_dir, tmp_path):
    folder, _ = train_run(max_steps=1)
    before = contents(folder)
    refused("train", *tiny(pairs_dir, folder), names=[f"--save_path {folder}", "--resume"])
    assert contents(folder) == before
    refused("train", *tiny(pairs_dir, tmp_path / "none", "--resume"), names=["--resume", tmp_path / "none"])
    assert not (tmp_path / "none").exists()
    (folder / "train_state.pth").unlink()
    refused("train", *tiny(pairs_dir, folder, "--resume"), names=["--resume", folder, "train_state.pth"])


# Faults


def write_prenet_patches(folder, count, broken):
    """PReNet's packed patches, which are numbers of 32 bits: one of patch ``broken``'s is NaN."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in ("train_input.h5", "train_target.h5"):
        patches = random.random((count, 3, 11, 11), np.float32)
        patches[broken, 1, 5, 5] = np.nan
        with h5py.File(folder / name, "w") as file:
            for key, patch in enumerate(patches):
                file[str(key)] = patch
    return folder


@pytest.mark.parametrize("bad_step", [2, STEPS_AN_EPOCH, STEPS_AN_EPOCH + 3])
def test_non_finite_loss_names_the_batch_and_keeps_the_last_checkpoint(refused, tmp_path, bad_step):
    """In the second epoch: by a patch that the first one has left over."""
    count, epoch, batch = 18, *divmod(bad_step - 1, STEPS_AN_EPOCH)
    for seed in range(1000):
        orders = [np.random.default_rng((seed, k)).permutation(count) for k in range(epoch + 1)]
        guilty = orders[-1][4 * batch : 4 * batch + 4]
        broken = set(guilty) & set(orders[0][16:]) if epoch else set(guilty)
        if broken:
            break
    data = write_prenet_patches(tmp_path / "data", count, min(broken))
    folder = tmp_path / "run"
    message = refused("train", *tiny(data, folder, seed=seed), status=1, names=["the loss is not finite"])
    assert all(f"data patch {index}" in message for index in guilty) and message.count(" patch ") == 4
    if epoch == 0:
        assert not list(folder.glob("*.pth"))
    else:
        assert_same_weights(folder / "net_latest.pth", folder / "net_epoch1.pth")
        assert read_state(folder)["position"]["step"] == STEPS_AN_EPOCH
        assert [line["epoch"] for line in records(folder)] == [1]


@pytest.mark.parametrize(
    "flags", [{"save_steps": 1}, {"max_steps": 1}, {"stop_after": 1}, {"batch_size": 18}], ids=lambda flags: str(flags)
)
def test_non_finite_weights_are_not_saved(refused, pairs_dir, val_dir, tmp_path, flags):
    """A step so large that they overflow: its loss was finite still."""
    arguments = tiny(pairs_dir, tmp_path / "run", lr=1e37, val_path=val_dir, **flags)
    refused("train", *arguments, status=1, names=["norm of the weights is not finite", " at row "])
    assert not list((tmp_path / "run").glob("*.pth")) and not records(tmp_path / "run")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_programming_error_keeps_its_traceback(train_run, monkeypatch, num_workers):
    """A RuntimeError of PyTorch's in somebody's new code, in the main process or in a loader's."""
    if num_workers == 0:
        monkeypatch.setattr(SAPNet, "forward", lambda self, rainy, **_: rainy @ torch.rand(5, 7))
    else:
        monkeypatch.setattr(TrainingPatches, "__getitem__", lambda self, key: torch.rand(2, 3) @ torch.rand(5, 7))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied|Expected size"):
        train_run(num_workers=num_workers)


# New rain


def test_a_folder_of_clean_photographs_trains(train_run, tmp_path):
    for number in (1, 2, 3):
        save(tmp_path / f"photographs/{number}.jpg", photo(number))
    folder, result = train_run("run", "--rain_synth", "heavy", 1, data_path=tmp_path / "photographs", max_steps=2)
    line = records(folder)[-1]
    assert line["step"] == 2 and line["psnr"] < 30, "no network can tell drawn rain from nothing"
    assert "3 images without pairs" in result.out
    assert json.loads((folder / "args.json").read_text())["rain_synth"] == ["heavy", 1]


@pytest.mark.slow
def test_new_rain_resumes_exactly(train_run):
    rain = ["--rain_synth", "both", "0.4", "--rain_mix", "0.4", "--rain_vary", "0.5"]
    whole, _ = train_run("whole", *rain, epochs=1)
    plain, _ = train_run("plain", max_steps=1)
    train_run("cut", *rain, epochs=1, stop_after=2)
    cut, result = train_run("cut", *rain, "--resume", epochs=1, num_workers=1)
    assert_same_run(cut, whole)
    assert "--rain" not in result.out
    assert steps(plain)[0]["loss"] != steps(whole)[0]["loss"]


@pytest.mark.parametrize(
    "rain",
    [
        ("--rain_synth", "hail", 0.5), ("--rain_synth", "heavy", 1.01), ("--rain_synth", "heavy", -0.1),
        ("--rain_synth", "heavy", "nan"), ("--rain_synth", "heavy", "often"), ("--rain_synth", "heavy"),
        ("--rain_mix", -0.1), ("--rain_mix", 1.1), ("--rain_mix", "nan"),
        ("--rain_mix", 0.6, "--rain_synth", "heavy", 0.5),
        ("--rain_vary", 0.5), ("--rain_vary", 1.1, "--rain_mix", 0.5), ("--rain_vary", "nan", "--rain_mix", 0.5),
    ],
)
def test_bad_shares_of_rain_are_named(refused, pairs_dir, tmp_path, rain):
    refused("train", *tiny(pairs_dir, tmp_path / "run", *rain), names=[rain[0]])
    assert not (tmp_path / "run").exists()


def test_holding_out_of_clean_photographs_says_what_to_do(refused, tmp_path):
    save(tmp_path / "photographs/1.jpg", photo(1))
    rain = ("--rain_synth", "heavy", 1)
    refused(
        "train", *tiny(tmp_path / "photographs", tmp_path / "run", *rain, val_pairs=1),
        names=["--val_pairs", "rain.py", "--val_path"],
    )
