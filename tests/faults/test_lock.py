"""Two runs in one folder, or packing one data set: one at a time, and a dead one holds nothing up."""
import os
import signal
import time

import h5py
import pytest

import utils
from checkpoints import load_network
from conftest import contents
from DerainDataset import PackedPatches
from test_train import assert_same_weights, tiny
from warm import Fork, run_script


def wait_for(condition, fork, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert fork.alive and time.monotonic() < deadline, fork.log.read_text()
        time.sleep(0.01)


@pytest.fixture
def endless(pairs_dir, tmp_path):
    """A run that is under way; it is killed in the end."""
    forks = []

    def start(*extra, **changes):
        arguments = tiny(pairs_dir, tmp_path / "run", *extra, **{"epochs": 10000, **changes})
        forks.append(Fork(tmp_path / "log", run_script, "train", arguments))
        wait_for((tmp_path / "run/net_latest.pth").exists, forks[-1])
        return forks[-1]

    yield start
    for fork in forks:
        if fork.alive:
            fork.kill()


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_second_run_in_a_folder_is_refused(refused, endless, pairs_dir, tmp_path, resume):
    first = endless()
    os.kill(first.process.pid, signal.SIGSTOP)  # alive, and its files as they are
    before = contents(tmp_path)
    refused(
        "train", *tiny(pairs_dir, tmp_path / "run", *resume),
        names=[f"--save_path {tmp_path / 'run'}: in use by process {first.process.pid} on "],
    )
    assert contents(tmp_path) == before
    os.kill(first.process.pid, signal.SIGCONT)
    seen = (tmp_path / "run/train_state.pth").stat().st_mtime_ns
    wait_for(lambda: (tmp_path / "run/train_state.pth").stat().st_mtime_ns > seen, first)


@pytest.mark.slow
def test_two_new_runs_at_once(pairs_dir, tmp_path):
    """Neither has saved anything yet: the folder alone does not tell them."""
    arguments = tiny(pairs_dir, tmp_path / "run")
    forks = [Fork(tmp_path / f"log{k}", run_script, "train", arguments) for k in range(3)]
    assert sorted(fork.wait() for fork in forks) == [0, 2, 2]
    logs = [fork.log.read_text() for fork in forks]
    assert sum("in use by" in log or "holds another run" in log for log in logs) == 2
    load_network(tmp_path / "run")


@pytest.mark.slow
def test_lock_of_a_dead_process_is_taken_over(run, endless, pairs_dir, tmp_path):
    """At once, although its loader processes live on for some seconds."""
    first = endless(num_workers=2)
    first.kill()
    assert str(first.process.pid) in (tmp_path / "run/.lock").read_text()
    epochs = len(list((tmp_path / "run").glob("net_epoch*.pth"))) + 2
    result = run("train", *tiny(pairs_dir, tmp_path / "run", "--resume", epochs=epochs))
    assert result.status == 0, result
    assert not (tmp_path / "run/.lock").exists()


def test_leftovers_are_removed_and_other_files_are_not(run, pairs_dir, tmp_path):
    (tmp_path / "run").mkdir()
    left = tmp_path / "run" / utils.temporary_name("train_state.pth", 12345)
    left.write_bytes(b"half")
    others = [tmp_path / "run" / f"{name}.tmp" for name in ("notes", "results-20240131-final", "results-20240131-2")]
    for other in others:
        other.write_text("mine")
    assert run("train", *tiny(pairs_dir, tmp_path / "run", max_steps=1)).status == 0
    assert not left.exists() and all(other.exists() for other in others)


def slow_packing():
    setitem = h5py.Dataset.__setitem__

    def slow(*args):
        time.sleep(0.4)
        setitem(*args)

    h5py.Dataset.__setitem__ = slow


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["done", "killed"])
def test_second_run_waits_for_the_packing_of_the_first(pairs_dir, tmp_path, fate):
    arguments = {name: tiny(pairs_dir, tmp_path / name, epochs=1) for name in ("first", "second")}
    first = Fork(tmp_path / "log1", run_script, "train", arguments["first"], slow_packing)
    wait_for(lambda: [*tmp_path.glob("packed/*.tmp")], first)
    second = Fork(tmp_path / "log2", run_script, "train", arguments["second"])
    wait_for(lambda: f"waiting for process {first.process.pid} on " in second.log.read_text(), second)
    assert len([*tmp_path.glob("packed/*.tmp")]) == 1
    if fate == "killed":
        first.kill()
    else:
        assert first.wait() == 0, first.log.read_text()
        (packed,) = tmp_path.glob("packed/*.h5")
        written = packed.stat().st_mtime_ns
    assert second.wait() == 0, second.log.read_text()
    if fate == "done":
        assert packed.stat().st_mtime_ns == written, "packed once"
        assert_same_weights(tmp_path / "first/net_latest.pth", tmp_path / "second/net_latest.pth")
    assert [path.suffix for path in (tmp_path / "packed").iterdir()] == [".h5"]


def test_file_packed_anew_under_a_run_is_noticed(pairs_dir, tmp_path, run):
    assert run("train", *tiny(pairs_dir, tmp_path / "run", max_steps=1)).status == 0
    (path,) = tmp_path.glob("packed/*.h5")
    patches = PackedPatches(path)
    os.utime(pairs_dir / "rain-1.png", (0, 0))
    assert run("train", *tiny(pairs_dir, tmp_path / "other", max_steps=1)).status == 0
    with pytest.raises(utils.InputError, match="packed anew by another run"):
        patches[0]
