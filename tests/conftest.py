"""What the tests share: made images, the scripts run in this process, and a disk that is full."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import utils
from checkpoints import save_checkpoint
from networks import SAPNet

# More threads cost more than they gain on images this small. The processes that tests start read the variable.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

# How many times as often as usual a fault is tried: THOROUGH=10 is what the figures of docs/reliability.md are from.
THOROUGH = int(os.environ.get("THOROUGH", 1))

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items):
    """No test goes on for ever: the longest take a minute and a half, and ten times that on a machine that is busy."""
    for item in items:
        item.add_marker(pytest.mark.timeout(900 * THOROUGH))


@pytest.fixture(scope="session")
def shared():
    """The folder of real data and published weights beside the project."""
    if not SHARED.is_dir():
        pytest.skip(f"real data and published weights are not at {SHARED}")
    return SHARED


# Made images


def photo(seed, height=48, width=64):
    """(H, W, 3) uint8: smooth coloured noise, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 8, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def with_rain(clean, seed=0):
    """A clean image with vertical streaks, by other code than ``rain.py``."""
    columns = np.random.default_rng(seed).random(clean.shape[1]) < 0.2
    return np.clip(clean.astype(int) + 90 * columns[None, :, None], 0, 255).astype(np.uint8)


def save(path, image):
    """Write an RGB, RGBA or grey array; the suffix decides the format, in upper case too."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR if image.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    path.write_bytes(cv2.imencode(path.suffix.lower(), image)[1].tobytes())
    return path


def make_pairs(folder, numbers=(1, 2, 3), height=48, width=64):
    """Pairs in RainTrainL's layout."""
    for number in numbers:
        clean = photo(number, height, width)
        save(folder / f"norain-{number}.png", clean)
        save(folder / f"rain-{number}.png", with_rain(clean, number))
    return folder


@pytest.fixture
def pairs_dir(tmp_path):
    return make_pairs(tmp_path / "pairs")


@pytest.fixture
def checkpoint(tmp_path):
    """A network of two stages with random weights, as a training run leaves it."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    save_checkpoint(folder / "net_latest.pth", SAPNet(recurrent_iter=2).state_dict())
    utils.write_text(folder / "args.json", '{"recurrent_iter": 2, "use_dilation": true}')
    return folder / "net_latest.pth"


# Running the scripts


def contents(folder):
    """{relative path: bytes} of all files under ``folder``."""
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script's ``main`` in this process: run("train", "--lr", 1) -> status, out, err."""

    def run_main(script, *args):
        module = __import__(script)
        assert Path(module.__file__).parent == ROOT, f"{script} is not the project's"
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        handlers = {number: signal.getsignal(number) for number in utils.STOP_SIGNALS}
        capsys.readouterr()
        try:
            utils.run_script(module.main)
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run_main


@pytest.fixture
def refused(run):
    """Run a script that must fail with one sentence: refused("train", ..., status=2, names=[...])."""

    def run_refused(script, *args, status=2, names=()):
        result = run(script, *args)
        assert result.status == status, result
        lines = result.err.strip().splitlines()
        assert lines and lines[-1].startswith(f"{script}.py: error: "), result.err
        # argparse prints its usage first; everything else is the one line.
        assert len(lines) == 1 or lines[0].startswith("usage: "), result.err
        assert "Traceback" not in result.out + result.err
        for name in names:
            assert str(name) in lines[-1], f"{name} is not named in: {lines[-1]}"
        return lines[-1]

    return run_refused


def run_subprocess(script, *args, **options):
    """Start a script as a person would."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    usual = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{**usual, **options})


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of a given size: small_disk("200k") -> its folder."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        if not shutil.which("mount") or os.geteuid() != 0:
            pytest.skip("a full disk needs root, to mount a tmpfs")
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {result.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)
