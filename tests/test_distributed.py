"""Processes over gloo: the run of one process with the same global batch, and an end when one of them is lost."""
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed

import DerainDataset
import test
import train
from checkpoints import load_weights
from conftest import ROOT, contents, make_pairs, photo, save
from networks import SAPNet
from processes import StopSignal, lost_process, meet
from test_test import read_csv
from test_train import TIMES, options, read_lines, read_state, tiny, without
from test_video import frames_of
from utils import STOP_SIGNALS, InputError
from warm import Fork, run_script


def start(processes, *arguments, script=ROOT / "train.py", restarts=0):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    launcher.append(f"--max_restarts={restarts}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process, status=0):
    out, err = process.communicate(timeout=240)
    assert (process.returncode != 0) == (status != 0), out + err
    return out, err


def run_rank(variables, script, arguments, before):
    os.environ.update(variables)
    run_script(script, arguments, before)


def forked(folder, processes, *arguments, script="train", before=None, status=0):
    """What the processes of a run print, one after another; torchrun starts them likewise, in four times as long."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    size = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [
        Fork(
            folder / f"rank{rank}.log", run_rank, {**where, **size, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            script, arguments, before,
        )
        for rank in range(processes)
    ]
    statuses = [rank.wait() for rank in ranks]
    printed = "".join(rank.log.read_text() for rank in ranks)
    assert statuses[0] == status and any(statuses) == bool(status), printed
    return printed


def wait_for_state(process, folder):
    """Until the run has saved something; returns the processes, the first one's first."""
    deadline = time.monotonic() + 120
    while not (folder / "train_state.pth").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    ranks = {}
    for child in children.stdout.split():
        with open(f"/proc/{child}/environ") as file:
            ranks[re.search(r"(?:^|\0)RANK=(\d+)", file.read())[1]] = int(child)
    return [ranks["0"], ranks["1"]]


def flat(state):
    return torch.cat([state[name].flatten() for name in sorted(state)])


def assert_nearly_same_weights(first, second, start_weights, share):
    """Equal but for a share of how far the training has moved them.

    Adam divides a gradient that is all rounding error by its own size, so single weights may differ more.
    """
    first, second = flat(first), flat(second)
    assert (first - second).norm() < share * (second - start_weights).norm()


def initial_weights():
    torch.manual_seed(0)
    return flat(SAPNet().state_dict())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A run of one process, with Muon, the average of the weights and validation: its flags and its folder."""
    folder = tmp_path_factory.mktemp("one")
    pairs, val = make_pairs(folder / "pairs"), make_pairs(folder / "val", (4, 5, 6))
    flags = {"max_steps": 6, "optimizer": "muon", "ema": 0.9, "save_steps": 2, "val_path": val, "recurrent_iter": 1}
    alone = Fork(folder / "log", run_script, "train", options(pairs, folder / "run", **flags))
    assert alone.wait() == 0, alone.log.read_text()
    return pairs, flags, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_train_as_one(one_process, tmp_path, processes):
    """What is logged is the mean of all, whose patches differ. The pairs to validate on are shared among them."""
    pairs, flags, alone = one_process
    out = forked(tmp_path, processes, *options(pairs, tmp_path / "several", **flags))
    assert out.count("epoch 1, step 4,") == 1, "one process writes the log"
    folders = alone, tmp_path / "several"
    lines = [read_lines(folder) for folder in folders]
    assert len(lines[0]) == len(lines[1]) == 6 + 2
    for one, several in zip(*lines):
        assert without(several, TIMES) == pytest.approx(without(one, TIMES), rel=1e-3)
    one, several = map(read_state, folders)
    sums = [state["position"].pop("totals") for state in (one, several)]
    assert sums[0] and sums[1] == pytest.approx(sums[0], rel=1e-3)
    assert without(several["position"], ["best_psnr_y"]) == without(one["position"], ["best_psnr_y"])
    assert (one["horizon"]["processes"], several["horizon"]["processes"]) == (1, processes)
    for name in ("net", "averaged"):
        assert_nearly_same_weights(several[name], one[name], initial_weights(), 0.01)
    assert not torch.equal(flat(several["net"]), flat(several["averaged"]))
    assert torch.equal(flat(load_weights(folders[1] / "net_latest.pth")), flat(several["averaged"]))


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_any_number_of_processes_goes_on(run, tmp_path):
    """Two processes, then one, then two again, and all of it against one that never stopped."""
    pairs, folder = make_pairs(tmp_path / "pairs"), tmp_path / "run"
    flags = {"save_steps": 2, "log_interval": 10**6, "data_path": f"{pairs}:100000"}  # the epoch has no end
    process = start(2, *tiny(pairs, folder, **flags))
    os.kill(wait_for_state(process, folder)[1], signal.SIGTERM)
    out, err = finish(process, status=1)
    step = read_state(folder)["position"]["step"]
    assert f"stopped after step {step}; the same command with --resume continues" in out
    assert "train.py: error" not in err, "they have agreed, without waiting for a step that is logged"
    result = run("train", *tiny(pairs, folder, "--resume", stop_after=step + 3, **flags))
    assert result.status == 0 and "processes 2 -> 1" in result.out, result
    out, _ = finish(start(2, *tiny(pairs, folder, "--resume", stop_after=step + 7, **flags)))
    assert "processes 1 -> 2" in out
    assert run("train", *tiny(pairs, tmp_path / "straight", stop_after=step + 7, **flags)).status == 0
    changed, straight = read_state(folder), read_state(tmp_path / "straight")
    where = [[state["position"][name] for name in ("epoch", "sample", "step", "seen")] for state in (changed, straight)]
    assert where[0] == where[1]
    assert_nearly_same_weights(changed["net"], straight["net"], initial_weights(), 0.05)
    lines = [read_lines(path) for path in (folder, tmp_path / "straight")]
    assert [(line.get("epoch"), line["step"]) for line in lines[0]] == [
        (line.get("epoch"), line["step"]) for line in lines[1]
    ]
    losses = [[line["loss"] for line in each] for each in lines]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


@pytest.mark.slow
def test_the_run_ends_when_a_process_is_lost(run, tmp_path):
    """The first one; the next test loses the other."""
    pairs, folder = make_pairs(tmp_path / "pairs"), tmp_path / "run"
    flags = {"epochs": 100000, "save_steps": 2}
    process = start(2, *tiny(pairs, folder, **flags))
    os.kill(wait_for_state(process, folder)[0], signal.SIGKILL)
    _, err = finish(process, status=1)
    (sentence,) = [line for line in err.splitlines() if "train.py: error: " in line]
    assert "train.py: error: process 1 of 2: another process of the run is gone" in sentence
    assert "--resume" in sentence
    step = read_state(folder)["position"]["step"]
    result = run("train", *tiny(pairs, folder, "--resume", stop_after=step + 1, **flags))
    assert result.status == 0 and read_state(folder)["position"]["step"] == step + 1, result


def see_an_older_folder():
    exists = Path.exists
    if os.environ["RANK"] == "1":
        Path.exists = lambda path: path.name != "train_state.pth" and exists(path)
        del train.read_state


def see_other_images():
    load = train.load_data

    def load_others(*arguments):
        loader, pairs, data = load(*arguments)
        data["sources"][0]["content"] = "another"
        return loader, pairs, data

    if os.environ["RANK"] == "1":
        train.load_data = load_others


@pytest.mark.slow
def test_the_first_process_says_whether_the_run_goes_on(run, tmp_path):
    """Over a network, a process on another machine may see what the folder held some seconds ago."""
    pairs, folder = make_pairs(tmp_path / "pairs"), tmp_path / "run"
    result = run("train", *tiny(pairs, folder, max_steps=4, stop_after=2))
    assert result.status == 0, result
    out = forked(tmp_path, 2, *tiny(pairs, folder, "--resume", max_steps=4), before=see_an_older_folder)
    assert out.count("going on after step 2") == 1
    assert read_state(folder)["position"]["step"] == 4


def test_torchrun_does_not_go_on_with_the_run_of_another(run, refused, tmp_path, monkeypatch):
    """It starts a process that has failed again, and so one that has refused the folder."""
    arguments = tiny(make_pairs(tmp_path / "pairs"), tmp_path / "run", max_steps=2)
    assert run("train", *arguments).status == 0
    before = contents(tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "later")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    refused("train", *arguments, names=["holds another run"])
    assert contents(tmp_path / "run") == before


@pytest.mark.slow
def test_processes_with_other_data_do_not_train_together(tmp_path):
    arguments = tiny(make_pairs(tmp_path / "pairs"), tmp_path / "run", max_steps=4)
    out = forked(tmp_path, 2, *arguments, before=see_other_images, status=1)
    assert f"train.py: error: process 1 of 2: {tmp_path / 'pairs'}: other images than in the first process" in out
    assert not (tmp_path / "run/train_state.pth").exists()


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_process_and_it_goes_on(tmp_path):
    pairs, folder = make_pairs(tmp_path / "pairs"), tmp_path / "run"
    flags = {"epochs": 1000, "milestone": 1000, "max_steps": 120, "save_steps": 2}
    process = start(2, *tiny(pairs, folder, **flags), restarts=1)
    os.kill(wait_for_state(process, folder)[1], signal.SIGKILL)
    out, err = finish(process)
    assert "another process of the run is gone" in err
    (going_on,) = re.findall(r"going on after step (\d+)", out)
    assert 0 < int(going_on) < 120 == read_state(folder)["position"]["step"]


def pack_slowly():
    distributed.distributed_c10d.default_pg_timeout = timedelta(seconds=2)
    pack = DerainDataset.pack

    def slow_pack(*arguments):
        time.sleep(6)
        return pack(*arguments)

    DerainDataset.pack = slow_pack


@pytest.mark.slow
def test_a_first_process_that_packs_for_longer_than_pytorch_waits_does_not_end_the_run(tmp_path):
    arguments = tiny(make_pairs(tmp_path / "pairs"), tmp_path / "run", max_steps=2)
    forked(tmp_path, 2, *arguments, before=pack_slowly)
    assert read_state(tmp_path / "run")["position"]["step"] == 2


@pytest.mark.slow
def test_processes_share_the_pictures_of_a_folder(run, tmp_path, checkpoint):
    folder = make_pairs(tmp_path / "pairs", range(1, 6))
    (folder / "rain-6.png").write_bytes((folder / "rain-1.png").read_bytes()[:200])
    (folder / "norain-6.png").write_bytes((folder / "norain-1.png").read_bytes())
    arguments = ["--test_data_path", folder, "--save_path", checkpoint, "--device", "cpu"]
    alone = run("test", *arguments, "--output_path", tmp_path / "alone")
    out = forked(tmp_path, 2, *arguments, "--output_path", tmp_path / "both", script="test", status=1)
    assert alone.status == 1 and alone.err.splitlines()[-1] in out
    tables = [
        [without(row, ["seconds"]) for row in read_csv(tmp_path / name / "metrics.csv")] for name in ("alone", "both")
    ]
    assert tables[0] == tables[1] and tables[0][-1]["image"] == "average of 5"
    pictures = [without(contents(tmp_path / name), ["metrics.csv"]) for name in ("alone", "both")]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 5
    assert out.count("rain-2.png") == 1


def tell_of_frames():
    derain = test.derain

    def telling(*arguments):
        time.sleep(0.2)
        print(f"process {os.environ['RANK']} has a frame", file=sys.stderr, flush=True)
        return derain(*arguments)

    test.derain = telling


@pytest.mark.slow
def test_processes_share_the_frames_of_a_video(run, tmp_path, checkpoint):
    pattern = make_pairs(tmp_path / "pairs", range(1, 10)) / "rain-%d.png"
    arguments = ["--save_path", checkpoint, "--device", "cpu", "--recurrent_iter", 1, "--codec", "ffv1"]
    alone = run("test", "--test_data_path", pattern, *arguments, "--output_path", tmp_path / "alone")
    assert alone.status == 0, alone
    arguments += ["--output_path", tmp_path / "both"]
    out = forked(tmp_path, 3, "--test_data_path", pattern, *arguments, script="test", before=tell_of_frames)
    assert out.count("9 frames") == 1
    assert all(f"process {rank} has a frame" in out for rank in range(3)) and out.count("has a frame") == 9
    assert set(contents(tmp_path / "both")) == set(contents(tmp_path / "alone"))
    videos = [frames_of(*(tmp_path / folder).glob("*.mkv")) for folder in ("alone", "both")]
    assert np.array_equal(*videos) and len(videos[0]) == 9


def run_out_of_memory():
    derain = test.derain

    def with_little_memory(runner, frame, device):
        if frame.shape[1] == 64 and os.environ["RANK"] == "1":
            raise MemoryError
        return derain(runner, frame, device)

    test.derain = with_little_memory


@pytest.mark.slow
def test_want_of_memory_in_one_process_costs_no_other_video(run, tmp_path, checkpoint):
    for name, width in (("small", 64), ("wide", 96)):
        for number in range(4):
            save(tmp_path / f"{name}/f-{number}.png", photo(number, 48, width))
    patterns = [tmp_path / f"{name}/f-%d.png" for name in ("small", "wide")]
    arguments = ["--test_data_path", *patterns, "--save_path", checkpoint, "--device", "cpu", "--recurrent_iter", 1]
    arguments += ["--output_path", tmp_path / "out"]
    out = forked(tmp_path, 2, *arguments, script="test", before=run_out_of_memory, status=1)
    assert "not enough memory (MemoryError)" in out and "1 of 2 files failed" in out
    assert len(frames_of(tmp_path / "out/wide/f.mp4")) == 4


BROKEN = """
import os, sys
sys.path.insert(0, {root!r})
import torch, train, utils
from networks import SAPNet

forward, passes = SAPNet.forward, []

def broken(self, rainy, **options):
    passes.append(1)
    if len(passes) == 2 and os.environ["RANK"] == "0":
        return rainy @ torch.rand(5, 7)
    return forward(self, rainy, **options)

SAPNet.forward = broken
utils.run_script(train.main)
"""


@pytest.mark.slow
def test_a_programming_error_keeps_its_traceback_under_torchrun(tmp_path):
    """Somebody's new layer fails in the first process."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(root=str(ROOT)))
    arguments = tiny(make_pairs(tmp_path / "pairs"), tmp_path / "run", num_workers=1)
    _, err = finish(start(2, *arguments, script=script), status=1)
    assert "Traceback" in err and "in broken" in err and "RuntimeError: Expected size" in err
    assert "process 0 of 2" not in err


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_meet_where_nobody_of_an_earlier_start_has_written(ranks):
    """Also those that come before the first one."""
    store, gone, patience = distributed.HashStore(), timedelta(seconds=0.1), timedelta(seconds=60)
    for late in range(3):
        with ThreadPoolExecutor(ranks) as pool:
            if late:
                calls = [pool.submit(meet, store, rank, ranks, gone) for rank in range(1, ranks)]
                for call in calls:
                    with pytest.raises(distributed.DistStoreError, match="have not come within 0:00:00.1"):
                        call.result()
            calls = [pool.submit(meet, store, rank, ranks, patience) for rank in range(1, ranks)]
            time.sleep(0.1)
            assert not any(call.done() for call in calls), "an answer to another start is not taken"
            parts = [meet(store, 0, ranks, patience), *(call.result() for call in calls)]
        assert not parts[-1].check(["address"])
        parts[0].set("address", str(late))
        assert all(part.get("address").decode() == str(late) for part in parts)


def test_a_signal_that_comes_while_the_processes_agree_counts_the_next_time(monkeypatch):
    def average(values, device):
        os.kill(os.getpid(), signal.SIGTERM)
        return values

    handlers = [(number, signal.getsignal(number)) for number in STOP_SIGNALS]
    try:
        stop = StopSignal()
        assert not stop.agree("cpu")
        monkeypatch.setattr("processes.average", average)
        assert not stop.agree("cpu") and stop.asked
        assert stop.agree("cpu") and stop.agreed
    finally:
        for handler in handlers:
            signal.signal(*handler)


@pytest.mark.parametrize(
    "error, expected",
    [
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), "loader process was killed"),
        (RuntimeError("DataLoader worker (pid(s) 1, 2) exited unexpectedly"), "loader process was killed"),
        (ConnectionResetError(104, "Connection reset by peer"), "loader process was killed"),
        (EOFError(), "loader process was killed"),
        (distributed.DistBackendError("NCCL error\nin: line 2"), "is gone (NCCL error)"),
        (distributed.DistNetworkError("Connection was closed"), "is gone (Connection was closed)"),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:525] Connection closed by peer"), "is gone ([../gloo"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 5x7)"), None),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback"), None),
    ],
)
def test_the_end_of_another_process_is_told_from_an_error_of_this_one(error, expected):
    reason = lost_process(error)
    assert reason is None if expected is None else expected in reason and "\n" not in reason


@pytest.mark.slow
@pytest.mark.parametrize("arguments, message", [
    (("--output_path", ""), "argument --output_path: expected a path, got an empty text"),
    (("--test_data_path", "none"), "--test_data_path none: no such file or folder"),
])
def test_bad_input_is_told_of_once(arguments, message):
    _, err = finish(start(2, *arguments, script=ROOT / "test.py"), status=2)
    assert err.count(message) == 1, err


def test_bad_input_of_one_process_alone_is_told_of(refused, tmp_path, monkeypatch):
    """Where the first one goes on, nobody ends the others while they wait."""
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(time, "sleep", waited.append)
    for started_by_torchrun in (False, True):
        if started_by_torchrun:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        refused("test", "--test_data_path", tmp_path / "none", names=[tmp_path / "none"])
        assert len(waited) == started_by_torchrun


@pytest.mark.parametrize("flags, ranks, name", [({"batch_size": 3}, 2, "--batch_size 3"), ({}, 20, "--data_path")])
def test_what_so_many_processes_cannot_share_is_refused(pairs_dir, tmp_path, flags, ranks, name):
    args = train.parse_args(tiny(pairs_dir, tmp_path / "run", **{"batch_size": ranks, **flags}))
    with pytest.raises(InputError, match=f"{name}.*{ranks} processes"):
        train.load_data(args, torch.device("cpu"), 0, ranks)
