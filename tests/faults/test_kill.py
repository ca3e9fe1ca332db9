"""kill -9 at any moment of a training run: it resumes, and ends with the weights of a run that was left alone."""
import functools
import os
import shutil
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from conftest import make_pairs
from test_train import assert_same_run, options
from warm import Fork, figure, run_script

KILLS = 50
TINY = {"patch_size": 11, "stride": 9, "recurrent_iter": 1, "val_pairs": 1, "save_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    make_pairs(folder / "pairs", (1, 2), 32, 40)
    return folder


class Runs:
    """Runs of one command line in one folder, as a restart loop makes them."""

    def __init__(self, folder, name, **changes):
        self.folder, self.name, self.changes = folder / name, name, {**TINY, **changes}

    def start(self, before=None, **changes):
        """With --resume from the moment on that there is a folder."""
        chosen = {**self.changes, "packed_dir": self.folder.with_name(f"{self.name}-packed"), **changes}
        resume = ["--resume"] if self.folder.is_dir() else []
        arguments = options(self.folder.parent / "pairs", self.folder, *resume, **chosen)
        return Fork(self.folder.with_name(f"{self.name}.log"), run_script, "train", arguments, before)

    def finish(self):
        run = self.start()
        assert run.wait() == 0, run.log.read_text()
        return run

    def packed(self):
        return self.folder.with_name(f"{self.name}-packed")


def surviving_events(folder):
    """What TensorBoard shows: (tag, step) of all event files, without what a later start declares void."""
    events = []
    for path in sorted(folder.glob("events.out.tfevents*")):
        data, start = path.read_bytes(), 0
        while start + 12 <= len(data):
            length = int.from_bytes(data[start : start + 8], "little")
            if start + 16 + length > len(data):
                break  # the kill came within the record
            event = Event.FromString(data[start + 12 : start + 12 + length])
            start += 16 + length
            if event.session_log.status == SessionLog.START:
                events = [(tag, step) for tag, step in events if step < event.step]
            events += [(value.tag, event.step) for value in event.summary.value]
    return events


def assert_as_if_never_killed(runs, whole):
    assert_same_run(runs.folder, whole.folder)
    assert surviving_events(runs.folder) == surviving_events(whole.folder)
    assert not [*runs.folder.glob(".lock"), *runs.folder.glob("*.tmp"), *runs.packed().glob("*.tmp")]
    with h5py.File(*runs.packed().glob("*.h5")) as killed, h5py.File(*whole.packed().glob("*.h5")) as good:
        assert all(np.array_equal(killed[name], good[name]) for name in ("rainy", "clean", "origin", "names"))


@pytest.mark.slow
def test_killed_at_random_moments(folder, capsys):
    whole = Runs(folder, "whole", epochs=8)
    whole.finish()
    started = time.monotonic()
    Runs(folder, "timed", epochs=8).finish()
    duration = time.monotonic() - started
    random, kills, resumes, runs = np.random.default_rng(0), 0, 0, 0
    while kills < KILLS:
        run = Runs(folder, f"run{runs}", epochs=8)
        runs += 1
        for _ in range(5):
            resumes += run.folder.is_dir()
            process = run.start()
            time.sleep(random.uniform(0, duration))
            if not process.alive:
                break
            kills += process.kill() == -signal.SIGKILL
        resumes += 1
        run.finish()
        assert_as_if_never_killed(run, whole)
        shutil.rmtree(run.folder)
    figure(capsys, f"kill -9 at random moments: {kills} kills, {resumes} resumes, {runs} runs, 0 lost, bit-identical")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def set_trap(name, moment, count):
    """Kill this process at the ``count``-th write of the file ``name``: half written, written, or just named."""
    seen, write_bytes, write_text, replace = [], Path.write_bytes, Path.write_text, os.replace

    def matches(path):
        if name in Path(path).name:
            seen.append(path)
        return name in Path(path).name and len(seen) == count

    def half(write):
        def trapped(path, content, *args, **named):
            if moment == "half" and matches(path):
                write(path, content[: len(content) // 2], *args, **named)
                die()
            return write(path, content, *args, **named)

        return trapped

    def trapped_replace(source, target):
        hit = moment != "half" and matches(target)
        if hit and moment == "written":
            die()
        replace(source, target)
        if hit:
            die()

    Path.write_bytes, Path.write_text, os.replace = half(write_bytes), half(write_text), trapped_replace
    if name == ".h5" and moment == "half":
        setitem = h5py.Dataset.__setitem__

        def trapped_setitem(data_set, *args):
            seen.append(data_set)
            if len(seen) == count:
                data_set.file.flush()
                die()
            setitem(data_set, *args)

        h5py.Dataset.__setitem__ = trapped_setitem


SITES = {"train_state": 2, "net_latest": 2, "net_epoch": 1, "net_best": 1, "log.jsonl": 2, "args.json": 1, ".h5": 1}


@pytest.mark.slow
def test_killed_within_each_write(folder, capsys):
    whole = Runs(folder, "whole of 3", epochs=3)
    whole.finish()
    kills = 0
    for site, later in SITES.items():
        for moment in ("half", "written", "named"):
            for count in sorted({1, later}):
                run = Runs(folder, f"{site}-{moment}-{count}", epochs=3)
                assert run.start(functools.partial(set_trap, site, moment, count)).wait() == -signal.SIGKILL
                kills += 1
                if moment != "named":
                    assert [*run.folder.parent.glob(f"{run.name}*/*.tmp")], "the trap leaves a file half written"
                run.finish()
                assert_as_if_never_killed(run, whole)
    figure(capsys, f"kill -9 within writes of {len(SITES)} files: {kills} kills and resumes, 0 lost, bit-identical")


@pytest.mark.slow
def test_killed_between_the_state_and_the_weights_of_the_last_epoch(folder):
    """Nothing is left to do then but to write net_latest.pth."""
    whole = Runs(folder, "whole of 1", epochs=1, save_steps=100)
    whole.finish()
    run = Runs(folder, "last", epochs=1, save_steps=100)
    assert run.start(functools.partial(set_trap, "train_state", "named", 1)).wait() == -signal.SIGKILL
    assert not (run.folder / "net_latest.pth").exists()
    assert "nothing left to do" in run.finish().log.read_text()
    assert_same_run(run.folder, whole.folder)
