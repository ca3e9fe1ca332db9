"""Two processes over gloo: the weights of one process with the same global batch, and an end when one is lost."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT, make_pairs
from networks import SAPNet
from test_train import options
from checkpoints import load_weights


def start(processes, *arguments):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    return out


def flat(state):
    return torch.cat([state[name].flatten() for name in sorted(state)])


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume(tmp_path):
    pairs = make_pairs(tmp_path / "pairs")
    runs = {name: options(pairs, tmp_path / name, epochs=2, save_steps=2) for name in ("one", "two", "resumed")}
    finish(start(1, *runs["one"]))
    out = finish(start(2, *runs["two"]))
    assert out.count("epoch 1, step 4") == 1, "one process writes the log"
    finish(start(2, *runs["resumed"], "--max_steps", "3"))
    finish(start(2, *runs["resumed"], "--resume"))

    one, two, resumed = (flat(load_weights(tmp_path / name / "net_latest.pth")) for name in runs)
    torch.manual_seed(0)
    trained = one - flat(SAPNet(recurrent_iter=2).state_dict())
    # Adam divides a gradient that is all rounding error by its own size, so single weights may differ more.
    assert (two - one).norm() < 0.01 * trained.norm()
    assert torch.equal(two, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_the_run_ends_when_a_process_is_lost(tmp_path, capsys, lost):
    pairs = make_pairs(tmp_path / "pairs")
    arguments = options(pairs, tmp_path / "run", epochs=100000)
    process = start(2, *arguments)
    state = tmp_path / "run" / "train_state.pth"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    listing = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    children = listing.stdout.split()
    os.kill(int(children[lost]), signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    with capsys.disabled():
        print(f"\nprocess {lost} of two killed: the other ended after {time.monotonic() - killed:.1f} s")
    assert f"train.py: error: process {1 - lost} of 2 stopped" in err and "--resume" in err
    epochs = len(list((tmp_path / "run").glob("net_epoch*.pth")))
    finish(start(2, *options(pairs, tmp_path / "run", epochs=epochs + 2), "--resume"))
