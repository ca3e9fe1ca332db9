"""Numbers: extreme images, low precision, a learning rate that is too high; the same weights again; flat memory."""
import math
import time

import numpy as np
import pytest
import torch

import utils
from conftest import ROOT, make_pairs, photo, save
from inference import StripRunner
from test_train import assert_same_weights, options, records
from warm import Fork, figure, run_script

TINY = {"patch_size": 11, "recurrent_iter": 1, "log_interval": 1000}
IMAGES = {
    "black": np.zeros((40, 50, 3), np.uint8), "white": np.full((40, 50, 3), 255, np.uint8),
    "grey": np.full((40, 50, 3), 128, np.uint8), "red": np.full((40, 50, 3), (255, 0, 0), np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8),
    "black and white noise": 255 * np.random.default_rng(1).integers(0, 2, (40, 50, 3), np.uint8),
    "one pixel": np.full((1, 1, 3), 200, np.uint8), "one row": photo(1, 1, 60), "photograph": photo(2, 40, 50),
}
# Largest and mean difference to fp32 on any of these images, in [0, 1].
BOUNDS = {torch.bfloat16: (0.01, 0.001), torch.float16: (0.001, 0.0001)}


@pytest.mark.parametrize("weights", ["Model11/seventh", "Model11"])
def test_extreme_images_and_precisions(capsys, weights):
    """With the bundled weights, and those before them, which keep the bounds on CPUs with bfloat16 units."""
    net = utils.load_network(ROOT / "logs/SAPNet" / weights)
    runners = {dtype: StripRunner(net, dtype) for dtype in (torch.float32, *BOUNDS)}
    worst = {dtype: (0.0, 0.0) for dtype in BOUNDS}
    beyond = {}
    for name, image in IMAGES.items():
        outputs = {dtype: runner(utils.to_tensor(image)) for dtype, runner in runners.items()}
        for dtype, output in outputs.items():
            assert output.isfinite().all(), (name, dtype)
            clamped = output.clamp(0, 1)
            assert np.array_equal(utils.to_image(output), np.rint(255 * clamped[0].permute(1, 2, 0).numpy())), name
            if dtype in BOUNDS:
                error = (clamped - outputs[torch.float32].clamp(0, 1)).abs()
                largest, mean = error.max().item(), error.mean().item()
                worst[dtype] = tuple(map(max, zip(worst[dtype], (largest, mean))))
                if largest > BOUNDS[dtype][0]:
                    beyond[dtype, name] = largest
    for dtype, (largest, mean) in worst.items():
        figure(capsys, f"{weights}, {dtype} against float32: at most {largest:.4f}, mean {mean:.5f}")
        assert mean <= BOUNDS[dtype][1]
    if weights == "Model11" and beyond and beyond.keys() == {(torch.bfloat16, "noise")}:
        pytest.xfail(f"on noise, single pixels go further on some CPUs: {beyond}")
    assert not beyond


def assert_finite_state(folder):
    state = utils.load_checkpoint(folder / "train_state.pth")
    for tensor in (*state["net"].values(), *utils.load_weights(folder / "net_latest.pth").values()):
        assert tensor.isfinite().all()


@pytest.mark.slow
def test_ten_thousand_steps_at_ten_times_the_learning_rate(tmp_path, capsys):
    """Finite to the end, or stopped with the right message and the last good weights; and the memory is flat."""
    pairs = make_pairs(tmp_path / "pairs", (1,), 41, 44)
    arguments = options(
        pairs, tmp_path / "run", **TINY, stride=1, batch_size=1, lr=0.01, epochs=1000, milestone=999, max_steps=10000,
        save_freq=1000, use_dilation=False,  # a third of the time, at 11 px
    )
    fork, memory = Fork(tmp_path / "log", run_script, "train", arguments), {}
    while fork.alive:
        time.sleep(0.5)
        try:
            step = records(tmp_path / "run")[-1]["step"]
            memory[step] = fork.memory()
        except (FileNotFoundError, IndexError):
            continue
    lines = records(tmp_path / "run")
    assert all(math.isfinite(line[name]) for line in lines for name in ("loss", "psnr", "ssim"))
    assert_finite_state(tmp_path / "run")
    log = fork.log.read_text()
    if fork.wait() == 0:
        assert lines[-1]["step"] == 10000
    else:
        assert fork.wait() == 1 and "the last checkpoint is kept" in log.splitlines()[-1], log
    figure(capsys, f"learning rate 0.01: step {lines[-1]['step']} of 10,000, exit {fork.wait()}, all kept is finite")
    growth = check_flat({step: value for step, value in memory.items() if step >= 500})
    figure(capsys, f"memory of training, steps {min(memory)} to {max(memory)}: {growth / 2**20:+.1f} MiB after warm-up")
    assert max(memory) >= 2000


def check_flat(memory, bound=20 * 2**20):
    """The growth between the first and the last fifth of {progress: bytes}, which must not exceed ``bound``."""
    values = [memory[key] for key in sorted(memory)]
    fifth = max(1, len(values) // 5)
    growth = np.median(values[-fifth:]) - np.median(values[:fifth])
    assert growth < bound, memory
    return growth


def test_infinite_learning_rate_stops_the_run(refused, run, pairs_dir, tmp_path):
    changes = {**TINY, "stride": 9, "log_interval": 1}
    assert run("train", *options(pairs_dir, tmp_path / "run", **changes, max_steps=10)).status == 0
    kept = (tmp_path / "run/train_state.pth").read_bytes()
    refused(
        "train", *options(pairs_dir, tmp_path / "run", "--resume", **changes, lr=1e30), status=1,
        names=["is nan on the batch of", "the last checkpoint is kept"],
    )
    assert (tmp_path / "run/train_state.pth").read_bytes() == kept
    assert_finite_state(tmp_path / "run")


@pytest.mark.slow
def test_same_weights_with_any_number_of_loader_processes(run, pairs_dir, tmp_path, capsys):
    for workers in (0, 1, 2):
        arguments = options(pairs_dir, tmp_path / f"run{workers}", **TINY, stride=9, num_workers=workers, epochs=2)
        assert run("train", *arguments).status == 0
        assert_same_weights(tmp_path / f"run{workers}/net_latest.pth", tmp_path / "run0/net_latest.pth")
    figure(capsys, "same seed, 0, 1 and 2 loader processes: bit-identical weights")


@pytest.mark.slow
def test_memory_of_500_images(tmp_path, checkpoint, capsys):
    random = np.random.default_rng(0)
    # Of 25 sizes: oneDNN keeps some 0.1 MiB for each size it meets, up to a thousand of them.
    sizes = random.integers(8, 120, (25, 2))
    for number in range(500):
        save(tmp_path / f"in/{number}.png", photo(number, *sizes[number % 25]))
    arguments = ("--save_path", checkpoint, "--test_data_path", tmp_path / "in", "--output_path", tmp_path / "out")
    fork, memory = Fork(tmp_path / "log", run_script, "test", arguments), {}
    while fork.alive:
        done = len(list(tmp_path.glob("out/*.png")))
        try:
            memory[done] = fork.memory()
        except (FileNotFoundError, IndexError):
            break
        time.sleep(0.05)
    assert fork.wait() == 0, fork.log.read_text()
    growth = check_flat({done: value for done, value in memory.items() if done >= 100})
    figure(capsys, f"memory of test.py, images 100 to {max(memory)} of 500: {growth / 2**20:+.1f} MiB")
    assert max(memory) >= 450
