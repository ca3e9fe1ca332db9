"""Training runs, tiny but whole: what they write, and that stopping one changes nothing."""
import copy
import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

import train
from conftest import contents, make_pairs, photo, run_subprocess, save
from DerainDataset import find_pairs
from networks import SAPNet
from SSIM import ssim
from utils import load_network, load_weights, measure, read_rgb, to_image, to_tensor

STEPS_AN_EPOCH = 4  # 18 patches of 32x32 from three images of 64x48, four a batch


def options(folder, save_path, *extra, **changes):
    """The arguments of a run of seconds; ``changes`` override."""
    chosen = {
        "data_path": folder, "packed_dir": save_path.parent / "packed", "save_path": save_path, "patch_size": 32,
        "stride": 20, "recurrent_iter": 2, "batch_size": 4, "epochs": 3, "milestone": 2, "num_workers": 0,
        "device": "cpu", "amp": False, "compile": False, "log_interval": 1,
        "use_contrast": False, "use_lpips": False, "use_seg_stage1": False, **changes,
    }
    return [part for name, value in chosen.items() for part in (f"--{name}", str(value))] + [*map(str, extra)]


@pytest.fixture
def train_run(run, pairs_dir, tmp_path):
    """train_run("name", *flags, status=0, **options) -> (folder of the run, result)."""

    def start(name="run", *extra, status=0, **changes):
        result = run("train", *options(pairs_dir, tmp_path / name, *extra, **changes))
        assert result.status == status, result
        return tmp_path / name, result

    return start


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_weights(first, second):
    a, b = load_weights(first), load_weights(second)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_run(folder, whole):
    """Everything that says where a run has arrived: weights of each epoch, optimizer, random state, log."""
    names = {path.name for path in whole.glob("*.pth")}
    assert {path.name for path in folder.glob("*.pth")} == names
    for name in names - {"train_state.pth"}:
        assert_same_weights(folder / name, whole / name)
    states = [torch.load(path / "train_state.pth", weights_only=True) for path in (folder, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    lines = [[{**record, "seconds": None} for record in records(path)] for path in (folder, whole)]
    assert lines[0] == lines[1]


# What a run writes


def test_a_run_writes_its_files(train_run, pairs_dir):
    folder, result = train_run(save_freq=2, val_path=pairs_dir)
    written = set(contents(folder))
    events = {name for name in written if name.startswith("events.out.tfevents")}
    assert written - events == {
        "net_latest.pth", "net_epoch2.pth", "net_best.pth", "train_state.pth", "args.json", "log.jsonl"
    }
    assert len(events) == 1
    arguments = json.loads((folder / "args.json").read_text())
    assert arguments.keys() == vars(train.parse_args([])).keys()
    assert arguments["recurrent_iter"] == 2 and arguments["milestone"] == [2] and arguments["seed"] == 0
    for name in ("net_latest.pth", "net_epoch2.pth", "net_best.pth"):
        state = torch.load(folder / name, weights_only=True)
        assert state.keys() == SAPNet().state_dict().keys()
        assert all(type(value) is torch.Tensor for value in state.values())
    assert "net_epoch1.pth" not in result.out


def test_log_has_a_line_an_epoch(train_run, pairs_dir):
    folder, _ = train_run(val_path=pairs_dir, lr=0.01)
    lines = records(folder)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.01, 0.01, 0.002])
    for line in lines:
        assert line["loss"] == pytest.approx(line["ssim"]), "the pixel loss is the only term here"
        figures = ("psnr", "val_psnr_y", "val_ssim_y", "val_psnr_rgb", "val_ssim_rgb", "seconds")
        assert all(np.isfinite(line[name]) for name in figures)


def test_cosine_lowers_the_rate_at_each_step(train_run, monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step",
        lambda self, *args, **named: rates.append(self.param_groups[0]["lr"]) or step(self, *args, **named),
    )
    train_run(lr=0.01, schedule="cosine", max_steps=8)
    assert rates == pytest.approx([0.005 * (1 + np.cos(np.pi * k / 8)) for k in range(8)])


def test_ema_saves_the_average_of_the_weights(train_run, monkeypatch, pairs_dir):
    """Against the average taken by hand of the weights after each step; validation sees it too."""
    history, initial, build, update = [], [], train.build_network, train.update_average

    def look(averaged, net, *args):
        history.append([weight.detach().clone() for weight in net.parameters()])
        update(averaged, net, *args)

    monkeypatch.setattr(train, "update_average", look)
    monkeypatch.setattr(
        train, "build_network", lambda *args: initial.append(copy.deepcopy(net := build(*args))) or net
    )
    folder, _ = train_run(ema=0.5, max_steps=6, val_path=pairs_dir)
    expected = [weight.detach() for weight in initial[0].parameters()]
    for k, weights in enumerate(history):
        decay = min(0.5, (1 + k) / (10 + k))
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, weights)]
    saved = [*load_weights(folder / "net_latest.pth").values()]
    assert len(history) == 6 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(saved, expected, strict=True))
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(saved, history[-1]))
    assert_same_weights(folder / "net_latest.pth", folder / "net_best.pth")


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_cosine_and_ema_resume_exactly(train_run, optimizer):
    flags = {"ema": 0.9, "schedule": "cosine", "optimizer": optimizer}
    whole, _ = train_run("whole", **flags)
    for cut in (1, STEPS_AN_EPOCH + 2):
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.StopSignal, "agree", lambda *args: calls.append(0) or len(calls) >= cut)
            train_run(f"cut{cut}", status=130, **flags)
        folder, _ = train_run(f"cut{cut}", "--resume", **flags)
        assert_same_run(folder, whole)


def test_optimizer_steps_at_the_schedules_rate(train_run, monkeypatch):
    rates = []
    step = torch.optim.Adam.step

    def look(self, *args, **named):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **named)

    monkeypatch.setattr(torch.optim.Adam, "step", look)
    train_run(lr=0.01, milestone=1, max_steps=6)
    train_run("run", "--resume", lr=0.01, milestone=1)
    assert rates == pytest.approx([0.01] * 4 + [0.002] * 8)


def test_logged_validation_is_that_of_the_saved_weights(train_run, pairs_dir):
    folder, _ = train_run(val_path=pairs_dir, epochs=1)
    net = load_network(folder)
    assert net.recurrent_iter == 2
    with torch.inference_mode():
        scores = [
            measure(to_image(net(to_tensor(read_rgb(pair.rainy)))), read_rgb(pair.clean))
            for pair in find_pairs(pairs_dir)[0]
        ]
    (line,) = records(folder)
    # A pixel that rounds the other way moves 9,216 values' PSNR a little.
    assert line["val_psnr_y"] == pytest.approx(np.mean([score["psnr_y"] for score in scores]), abs=0.01)
    assert line["val_ssim_rgb"] == pytest.approx(np.mean([score["ssim_rgb"] for score in scores]), abs=1e-3)


def test_first_logged_loss_and_psnr_are_those_of_the_first_batch(train_run, monkeypatch):
    """One step: the record must hold what its batch gives, by the definitions."""
    seen = []
    criterion = train.DerainLoss.forward

    def look(self, derained, clean, rainy, *rest, **named):
        seen.append((derained.detach().clone(), clean.clone()))
        return criterion(self, derained, clean, rainy, *rest, **named)

    monkeypatch.setattr(train.DerainLoss, "forward", look)
    folder, _ = train_run(max_steps=1, pixel_loss="mse+ssim")
    ((derained, clean),) = seen
    (line,) = records(folder)
    mse = ((derained - clean) ** 2).mean()
    assert line["mse"] == pytest.approx(mse.item(), rel=1e-5)
    assert line["ssim"] == pytest.approx(-ssim(derained, clean).item(), rel=1e-5)
    assert line["loss"] == pytest.approx(line["mse"] + line["ssim"], rel=1e-5)
    each = -10 * ((derained.clamp(0, 1) - clean) ** 2).flatten(1).mean(1).log10()
    assert line["psnr"] == pytest.approx(each.mean().item(), rel=1e-5)


def read_events(folder):
    """(scalars {tag: [(step, value)]}, {tags of images}) of TensorBoard's record files."""
    scalars, images = {}, set()
    for path in sorted(folder.glob("events.out.tfevents*")):
        data, start = path.read_bytes(), 0
        while start < len(data):
            length = int.from_bytes(data[start : start + 8], "little")
            event = Event.FromString(data[start + 12 : start + 12 + length])
            start += 16 + length  # length, its checksum, the event, its checksum
            for value in event.summary.value:
                if value.HasField("image"):
                    images.add(value.tag)
                elif value.HasField("simple_value"):
                    scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars, images


def test_tensorboard_has_each_term_rate_psnr_and_pictures(train_run, pairs_dir):
    folder, _ = train_run(val_path=pairs_dir, pixel_loss="mse+ssim", epochs=2, log_interval=2)
    scalars, images = read_events(folder)
    assert images == {"rainy", "derained", "clean"}
    for tag in ("train/ssim", "train/mse", "train/loss", "train/psnr", "train/learning_rate"):
        assert [step for step, _ in scalars[tag]] == [2, 4, 6, 8], tag
    assert [step for step, _ in scalars["val/psnr_y"]] == [4, 8]
    assert scalars["val/psnr_y"][-1][1] == pytest.approx(records(folder)[-1]["val_psnr_y"], rel=1e-6)
    for (_, loss), (_, mse), (_, score) in zip(scalars["train/loss"], scalars["train/mse"], scalars["train/ssim"]):
        assert loss == pytest.approx(mse + score, rel=1e-5)


def test_network_runs_once_a_step(train_run, monkeypatch):
    calls = []
    forward = SAPNet.forward
    monkeypatch.setattr(SAPNet, "forward", lambda self, *args: calls.append(1) or forward(self, *args))
    train_run(epochs=2)
    assert len(calls) == 2 * STEPS_AN_EPOCH


def test_net_best_is_that_of_the_best_validation(train_run, monkeypatch, pairs_dir):
    scores = iter([20.0, 22.0, 21.0])
    monkeypatch.setattr(train, "validate", lambda *args: {"psnr_y": next(scores)})
    folder, _ = train_run(val_path=pairs_dir)
    assert_same_weights(folder / "net_best.pth", folder / "net_epoch2.pth")
    assert_same_weights(folder / "net_latest.pth", folder / "net_epoch3.pth")
    state = load_weights(folder / "net_epoch2.pth"), load_weights(folder / "net_epoch3.pth")
    assert any(not torch.equal(state[0][name], state[1][name]) for name in state[0])


@pytest.mark.parametrize("pixel_loss, w_psnr", [("ssim", 0), ("mse", 0), ("mse+ssim", 0), ("ssim", 0.02)])
def test_loss_falls_on_one_batch(run, tmp_path, pixel_loss, w_psnr):
    folder = make_pairs(tmp_path / "pairs", (1,), 32, 64)
    save_path = tmp_path / "run"
    changes = {"epochs": 25, "milestone": 100, "lr": 5e-3, "augment": False, "save_freq": 100}
    changes |= {"pixel_loss": pixel_loss, "w_psnr": w_psnr}
    assert run("train", *options(folder, save_path, **changes)).status == 0
    losses = [line["loss"] for line in records(save_path)]
    # Negative SSIM can fall to -1, MSE to 0, the negative PSNR to -50 dB.
    floor = {"ssim": -1, "mse": 0, "mse+ssim": -1}[pixel_loss] - 50 * w_psnr
    assert losses[-1] - floor < 0.5 * (losses[0] - floor), losses
    assert records(save_path)[-1]["psnr"] > records(save_path)[0]["psnr"] + 3


def test_use_stage1_false_validates_and_saves_without_training(train_run, tmp_path, checkpoint, pairs_dir):
    folder, _ = train_run(use_stage1=False, init_weights=checkpoint, val_path=pairs_dir)
    assert_same_weights(folder / "net_latest.pth", checkpoint)
    assert_same_weights(folder / "net_best.pth", checkpoint)
    (line,) = records(folder)
    assert line["step"] == 0 and "val_psnr_y" in line and "loss" not in line


def test_max_steps_ends_the_run_where_it_says(train_run):
    folder, _ = train_run(max_steps=STEPS_AN_EPOCH + 1)
    assert [line["step"] for line in records(folder)] == [STEPS_AN_EPOCH, STEPS_AN_EPOCH + 1]
    assert (folder / "net_epoch1.pth").exists() and not (folder / "net_epoch2.pth").exists()


def test_same_seed_same_weights_other_seed_others(train_run):
    first, again, other = (train_run(name, seed=seed, epochs=1)[0] for name, seed in (("a", 7), ("b", 7), ("c", 8)))
    assert_same_weights(first / "net_latest.pth", again / "net_latest.pth")
    with pytest.raises(AssertionError):
        assert_same_weights(first / "net_latest.pth", other / "net_latest.pth")


def test_clip_grad_bounds_the_step(train_run, monkeypatch):
    norms = []
    step = torch.optim.Adam.step

    def look(self, *args, **named):
        norms.append(torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm().item())
        return step(self, *args, **named)

    monkeypatch.setattr(torch.optim.Adam, "step", look)
    train_run("free", max_steps=2)
    assert min(norms) > 0.01
    norms.clear()
    train_run("clipped", max_steps=2, clip_grad=0.01)
    assert max(norms) <= 0.01 * (1 + 1e-4)


def test_held_out_pairs_are_validated_on(train_run):
    _, result = train_run(val_pairs=1, epochs=1)
    assert "12 patches" in result.out and "1 validation pairs" in result.out


def test_pairs_are_held_out_by_folder(run, pairs_dir, tmp_path):
    folders = pairs_dir, make_pairs(tmp_path / "others"), pairs_dir
    arguments = options(pairs_dir, tmp_path / "run", epochs=1, max_steps=1)
    result = run("train", *arguments, "--data_path", *folders, "--val_pairs", 0, 2, 0)
    assert result.status == 0 and "42 patches" in result.out and "2 validation pairs" in result.out, result


def test_a_folder_given_twice_holds_out_the_same_pairs(refused, run, pairs_dir, tmp_path):
    arguments = *options(pairs_dir, tmp_path / "run", epochs=1, max_steps=1), "--data_path", pairs_dir, pairs_dir
    result = run("train", *arguments, "--val_pairs", 1)
    assert result.status == 0 and "24 patches" in result.out and "1 validation pairs" in result.out, result
    refused("train", *arguments, "--resume", "--val_pairs", 0, 1, names=["--val_pairs", str(pairs_dir)])


def test_numbers_of_held_out_pairs_that_fit_no_folders_are_refused(refused, pairs_dir, tmp_path):
    arguments = options(pairs_dir, tmp_path / "run")
    refused("train", *arguments, "--val_pairs", 1, 2, names=["--val_pairs", "--data_path (1)", "1 2"])


# Stopping and resuming


@pytest.fixture
def whole(train_run, pairs_dir):
    """A run of three epochs that never stopped."""
    return train_run("whole", val_path=pairs_dir)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_run_stopped_after_an_epoch_resumes_exactly(train_run, monkeypatch, whole, pairs_dir, workers):
    """Ctrl-C while epoch 2 is being validated."""
    validate, calls = train.validate, []

    def stop_in_second(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return validate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", stop_in_second)
        folder, result = train_run("stopped", val_path=pairs_dir, num_workers=workers, status=130)
    assert "--resume continues" in result.out.splitlines()[-1]
    assert [line["epoch"] for line in records(folder)] == [1, 2]
    torch.rand(100)  # the random state must come from the file
    train_run("stopped", "--resume", val_path=pairs_dir, num_workers=workers)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("steps", [1, STEPS_AN_EPOCH, STEPS_AN_EPOCH + 2])
def test_run_cut_by_max_steps_resumes_exactly(train_run, whole, pairs_dir, steps):
    train_run("cut", val_path=pairs_dir, max_steps=steps)
    folder, result = train_run("cut", "--resume", val_path=pairs_dir)
    assert f"--max_steps {steps} -> None" in result.out
    # A validation in the middle of an epoch may have found a better net_best.
    (folder / "net_best.pth").write_bytes((whole / "net_best.pth").read_bytes())
    states = [torch.load(path / "train_state.pth", weights_only=True) for path in (folder, whole)]
    for state in states:
        state["position"].pop("best_psnr_y")
    torch.testing.assert_close(*states, rtol=0, atol=0)
    for name in ("net_latest.pth", "net_epoch1.pth", "net_epoch2.pth", "net_epoch3.pth"):
        assert_same_weights(folder / name, whole / name)
    assert [line["step"] for line in records(folder)] == [4, 8, 12]


def test_run_that_dies_within_an_epoch_resumes_from_its_last_save(train_run, monkeypatch, whole, pairs_dir):
    """In its eighth step: saved are the third, the fourth, which ends an epoch, and the sixth."""
    rate = train.learning_rate

    def die(args, position, steps):
        assert position.step < STEPS_AN_EPOCH + 3, "struck"
        return rate(args, position, steps)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", die)
        with pytest.raises(AssertionError, match="struck"):
            train_run("struck", val_path=pairs_dir, save_steps=3)
    state = torch.load(whole.with_name("struck") / "train_state.pth", weights_only=True)
    assert (state["position"]["epoch"], state["position"]["batch"]) == (1, 2)
    folder, _ = train_run("struck", "--resume", val_path=pairs_dir, save_steps=3)
    assert_same_run(folder, whole)


def test_run_that_dies_in_an_epochs_report_makes_up_for_it(train_run, monkeypatch, whole, pairs_dir):
    """Saved is the second step of four: a save of the fourth would leave no batch to show in TensorBoard."""
    name, reported, report = "unreported", [], train.report_epoch

    def die(*args):
        raise AssertionError("struck")

    def note(args, net, rate, position, images, *rest):
        reported.append(images)
        return report(args, net, rate, position, images, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "report_epoch", die)
        with pytest.raises(AssertionError, match="struck"):
            train_run(name, val_path=pairs_dir, save_steps=2)
    monkeypatch.setattr(train, "report_epoch", note)
    folder, _ = train_run(name, "--resume", val_path=pairs_dir, save_steps=2)
    assert_same_run(folder, whole)
    assert reported and all(images is not None for images in reported)


def test_resume_restores_the_random_state(train_run, monkeypatch):
    """Nothing draws from it today; a loss that does must go on as if it had never stopped."""
    forward = train.DerainLoss.forward

    def noisy(self, *args, **named):
        total, terms = forward(self, *args, **named)
        return total * torch.rand(()), terms

    monkeypatch.setattr(train.DerainLoss, "forward", noisy)
    whole, _ = train_run("whole", epochs=2)
    cut, _ = train_run("cut", epochs=2, max_steps=3)
    train_run("cut", "--resume", epochs=2)
    assert_same_weights(cut / "net_latest.pth", whole / "net_latest.pth")


def test_ctrl_c_in_the_terminal_stops_saves_and_resumes_exactly(train_run, whole, pairs_dir, tmp_path):
    """The real thing: a process group with loader workers gets SIGINT in the middle of an epoch."""
    arguments = options(pairs_dir, tmp_path / "stopped", val_path=pairs_dir, num_workers=2, epochs=1000, milestone=2)
    child = run_subprocess("train.py", *arguments, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "stopped/net_latest.pth").exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, (out, err)
    assert "--resume continues" in out.splitlines()[-1] and "Traceback" not in err
    state = torch.load(tmp_path / "stopped/train_state.pth", weights_only=True)
    step = state["position"]["step"]
    # It goes on to a step of its own choosing, which a run that never stopped must reach with the same weights.
    more = step + 3
    train_run("stopped", "--resume", val_path=pairs_dir, epochs=1000, max_steps=more)
    train_run("straight", val_path=pairs_dir, epochs=1000, max_steps=more)
    assert_same_weights(tmp_path / "stopped/net_latest.pth", tmp_path / "straight/net_latest.pth")


def test_finished_run_resumed_changes_nothing(train_run, whole):
    before = {name: data for name, data in contents(whole).items() if name.endswith((".pth", ".jsonl"))}
    train_run("whole", "--resume")
    assert {name: data for name, data in contents(whole).items() if name.endswith((".pth", ".jsonl"))} == before


def test_resume_chooses_eager_or_compiled_as_the_whole_run_would(train_run, monkeypatch, pairs_dir):
    """Both are right, but not to the bit the same: how much is left must not decide."""
    decided = []
    choose = train.choose_speed
    monkeypatch.setattr(
        train, "choose_speed", lambda args, device, steps: decided.append(steps) or choose(args, device, steps)
    )
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", lambda *args: os.kill(os.getpid(), signal.SIGINT) or {"psnr_y": 1.0})
        train_run(val_path=pairs_dir, status=130)
    train_run("run", "--resume", val_path=pairs_dir)
    assert decided == [3 * STEPS_AN_EPOCH] * 2


def test_resume_with_other_network_options_is_refused_and_changes_nothing(train_run, refused, pairs_dir, tmp_path):
    folder, _ = train_run(epochs=1)
    before = contents(folder)
    refused("train", *options(pairs_dir, folder, "--resume", residual_conv="split"), names=["train_state.pth"])
    assert contents(folder) == before


@pytest.mark.parametrize("first, second", [("adam", "muon"), ("muon", "adam")])
def test_resume_with_another_optimizer_is_refused_and_changes_nothing(train_run, refused, pairs_dir, first, second):
    folder, _ = train_run(epochs=1, optimizer=first)
    before = contents(folder)
    arguments = options(pairs_dir, folder, "--resume", optimizer=second)
    refused("train", *arguments, names=["train_state.pth", "--optimizer"])
    assert contents(folder) == before


# Faults


@pytest.mark.parametrize("bad_step", [2, STEPS_AN_EPOCH, STEPS_AN_EPOCH + 3])
def test_non_finite_loss_names_the_batch_and_keeps_the_last_checkpoint(
    train_run, refused, monkeypatch, pairs_dir, tmp_path, bad_step
):
    good, _ = train_run("good", epochs=1)
    forward, batches = train.DerainLoss.forward, []

    def spoil(self, *args, **named):
        total, terms = forward(self, *args, **named)
        batches.append(1)
        return (total * float("nan") if len(batches) == bad_step else total), terms

    drawn = []
    getitem = train.TrainingPatches.__getitem__
    monkeypatch.setattr(
        train.TrainingPatches, "__getitem__",
        lambda self, key: drawn.append(self.describe(key[1])) or getitem(self, key),
    )
    monkeypatch.setattr(train.DerainLoss, "forward", spoil)
    message = refused("train", *options(pairs_dir, tmp_path / "bad"), status=1, names=["loss is nan"])
    guilty = drawn[4 * (bad_step - 1) : 4 * bad_step]
    assert all(name in message for name in guilty) and message.count(" at row ") == 4
    if bad_step <= STEPS_AN_EPOCH:
        assert not list((tmp_path / "bad").glob("*.pth"))
    else:
        assert_same_weights(tmp_path / "bad/net_latest.pth", good / "net_latest.pth")
        assert [line["epoch"] for line in records(tmp_path / "bad")] == [1]


@pytest.mark.parametrize("bad_step, save_steps", [(STEPS_AN_EPOCH, 500), (2, 2)])
def test_non_finite_gradient_before_a_save_is_not_saved(
    refused, monkeypatch, pairs_dir, tmp_path, bad_step, save_steps
):
    """Its loss was finite still: only the weights tell."""
    step, steps = torch.optim.Adam.step, []

    def spoil(self, *args, **named):
        steps.append(1)
        if len(steps) == bad_step:
            self.param_groups[0]["params"][0].grad[0] = float("inf")
        return step(self, *args, **named)

    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    arguments = options(pairs_dir, tmp_path / "run", save_steps=save_steps)
    refused("train", *arguments, status=1, names=["norm of the weights is nan", " at row "])
    assert not list((tmp_path / "run").glob("*.pth"))


def test_validation_pair_of_two_sizes_is_refused_before_training(refused, pairs_dir, tmp_path):
    val = make_pairs(tmp_path / "val")
    save(val / "norain-2.png", photo(2, 40, 64))
    refused(
        "train", *options(pairs_dir, tmp_path / "run", val_path=val),
        names=[val / "rain-2.png", "norain-2.png", "64x40"],
    )
    assert not (tmp_path / "run").exists()


def test_resuming_a_run_that_has_all_its_steps_changes_nothing(train_run):
    folder, _ = train_run(max_steps=STEPS_AN_EPOCH)
    before = contents(folder)
    _, result = train_run("run", "--resume", max_steps=STEPS_AN_EPOCH)
    assert "nothing left to do after step 4" in result.out
    after = contents(folder)
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed <= {"args.json"}, changed


# New rain


def test_a_folder_of_clean_photographs_trains(train_run, tmp_path):
    for number in (1, 2, 3):
        save(tmp_path / f"photographs/{number}.jpg", photo(number))
    folder, result = train_run("run", "--rain_synth", "heavy", 1, data_path=tmp_path / "photographs", max_steps=2)
    line = records(folder)[-1]
    assert line["step"] == 2 and line["psnr"] < 30, "no network can tell drawn rain from nothing"
    assert "3 images without pairs" in result.out
    assert json.loads((folder / "args.json").read_text())["rain_synth"] == ["heavy", 1]


def test_new_rain_resumes_exactly(train_run):
    rain = ["--rain_synth", "both", "0.4", "--rain_mix", "0.4", "--rain_vary", "0.5"]
    whole, _ = train_run("whole", *rain)
    plain, _ = train_run("plain")
    train_run("cut", *rain, max_steps=6)
    cut, result = train_run("cut", *rain, "--resume", num_workers=1)
    assert_same_run(cut, whole)
    assert "--rain" not in result.out
    assert records(plain)[0]["loss"] != records(whole)[0]["loss"]


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
    refused("train", *options(pairs_dir, tmp_path / "run", *rain), names=[rain[0]])
    assert not (tmp_path / "run").exists()


def test_holding_out_of_clean_photographs_says_what_to_do(refused, tmp_path):
    save(tmp_path / "photographs/1.jpg", photo(1))
    rain = ("--rain_synth", "heavy", 1)
    refused(
        "train", *options(tmp_path / "photographs", tmp_path / "run", *rain, val_pairs=1),
        names=["--val_pairs", "rain.py", "--val_path"],
    )
