"""kill -9 at any moment of a training run: it resumes, and ends with the weights of a run that was left alone."""
import io
import os
import shutil
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

import run_folder
from conftest import THOROUGH, make_pairs
from test_train import assert_same_run, options, read_state, tiny
from warm import Fork, figure, run_script

KILLS = 5 * THOROUGH
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
    whole = Runs(folder, "whole", epochs=4)
    whole.finish()
    started = time.monotonic()
    Runs(folder, "timed", epochs=4).finish()
    duration = time.monotonic() - started
    random, kills, resumes, runs = np.random.default_rng(0), 0, 0, 0
    while kills < KILLS:
        run = Runs(folder, f"run{runs}", epochs=4)
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


class Trap:
    """Kills this process at the ``count``-th write of the file ``name``: half written, written, or just renamed."""

    def __init__(self, name, moment, count):
        self.name, self.moment, self.count, self.seen = name, moment, count, 0

    def set(self):
        if self.moment == "half":
            Path.write_bytes, Path.write_text = self.half(Path.write_bytes), self.half(Path.write_text)
            h5py.Dataset.__setitem__ = self.half_packed(h5py.Dataset.__setitem__)
            RecordWriter.write = self.half_event(RecordWriter.write)
            run_folder.open = self.open_log
        else:
            os.replace = self.replace(os.replace)

    def hits(self, name):
        """Whether the write of ``name`` that is about to begin is the one."""
        self.seen += self.name in str(name)
        return self.name in str(name) and self.seen == self.count

    def half(self, write):
        def trapped(path, content, *args, **named):
            if self.hits(path.name):
                write(path, content[: len(content) // 2], *args, **named)
                die()
            return write(path, content, *args, **named)

        return trapped

    def half_packed(self, setitem):
        def trapped(data_set, *args):
            if self.hits(data_set.file.filename):
                data_set.file.flush()
                die()
            setitem(data_set, *args)

        return trapped

    def half_event(self, write):
        def trapped(writer, content):
            if self.hits(writer.path):
                writer._writer.write(content[: len(content) // 2])
                writer.flush()
                die()
            write(writer, content)

        return trapped

    def open_log(self, path, mode, buffering):
        """The log's lines are added to the file itself."""
        trap = self

        class Log(io.FileIO):
            def write(self, line):
                if trap.hits(path):
                    super().write(line[: len(line) // 2])
                    die()
                return super().write(line)

        return Log(path, mode)

    def replace(self, replace):
        def trapped(source, target):
            hit = self.hits(Path(target).name)
            if hit and self.moment == "written":
                die()
            replace(source, target)
            if hit:
                die()

        return trapped


MOMENTS = "half", "written", "renamed"
# The file: at which of its writes, and when. The log and TensorBoard's file are added to, never replaced by a new run.
SITES = {
    "train_state": ((1, 2), MOMENTS), "net_latest": ((1, 2), MOMENTS), "net_epoch": ((1,), MOMENTS),
    "net_best": ((1,), MOMENTS), "args.json": ((1,), MOMENTS), ".h5": ((1,), MOMENTS),
    "log.jsonl": ((1, 2, 5), ("half",)), "events.out": ((1, 3, 7), ("half",)),
}


@pytest.mark.slow
def test_killed_within_each_write(folder, capsys):
    whole = Runs(folder, "whole of 2", epochs=2)
    whole.finish()
    kills = 0
    for site, (counts, moments) in SITES.items():
        for count in counts if THOROUGH >= 10 else counts[:1]:
            for moment in moments:
                run = Runs(folder, f"{site}-{moment}-{count}", epochs=2)
                assert run.start(Trap(site, moment, count).set).wait() == -signal.SIGKILL, (site, moment, count)
                kills += 1
                if len(moments) > 1 and moment != "renamed":
                    assert [*run.folder.parent.glob(f"{run.name}*/*.tmp")], "the trap leaves a file half written"
                run.finish()
                assert_as_if_never_killed(run, whole)
    figure(capsys, f"kill -9 within writes of {len(SITES)} files: {kills} kills and resumes, 0 lost, bit-identical")


@pytest.mark.slow
def test_killed_within_the_rewriting_of_the_log(folder):
    """Which a resumed run begins with."""
    whole = Runs(folder, "whole of 2", epochs=2)
    whole.finish()
    for moment in MOMENTS:
        run = Runs(folder, f"log again-{moment}", epochs=2)
        assert run.start(Trap("net_epoch1", "renamed", 1).set).wait() == -signal.SIGKILL
        assert run.start(Trap("log.jsonl", moment, 1).set).wait() == -signal.SIGKILL
        run.finish()
        assert_as_if_never_killed(run, whole)


@pytest.mark.slow
def test_killed_at_the_end_of_the_first_epoch_before_the_first_state(folder):
    whole = Runs(folder, "whole of 2", epochs=2, save_steps=100)
    whole.finish()
    for site in ("net_best", "net_epoch"):
        run = Runs(folder, f"first epoch-{site}", epochs=2, save_steps=100)
        assert run.start(Trap(site, "renamed", 1).set).wait() == -signal.SIGKILL
        assert not (run.folder / "train_state.pth").exists()
        run.finish()
        assert_as_if_never_killed(run, whole)


@pytest.mark.slow
def test_killed_between_the_state_and_the_weights_of_the_last_epoch(folder):
    """Nothing is left to do then but to write net_latest.pth."""
    whole = Runs(folder, "whole of 1", epochs=1, save_steps=100)
    whole.finish()
    run = Runs(folder, "last", epochs=1, save_steps=100)
    assert run.start(Trap("train_state", "renamed", 1).set).wait() == -signal.SIGKILL
    assert not (run.folder / "net_latest.pth").exists()
    assert "nothing left to do" in run.finish().log.read_text()
    assert_same_run(run.folder, whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 0.1])
def test_a_killed_loader_process_ends_the_run_in_a_sentence(run, pairs_dir, tmp_path, at):
    """As the kernel does it when memory runs out; the run goes on from its last save."""
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments = tiny(pairs_dir, folder, num_workers=2, save_steps=1, epochs=1000)
    training = Fork(log, run_script, "train", arguments)
    while not (folder / "train_state.pth").exists():
        assert training.alive, log.read_text()
        time.sleep(0.01)
    time.sleep(at)
    children = Path(f"/proc/{training.process.pid}/task/{training.process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[0]), signal.SIGKILL)
    assert training.wait() == 1
    *_, last = log.read_text().splitlines()
    assert last.startswith("train.py: error: ") and "loader process was killed" in last and "--num_workers" in last
    assert "--resume goes on" in last
    assert log.read_text().count("rror") == 1 and "Traceback" not in log.read_text()
    more = read_state(folder)["position"]["step"] + 2
    result = run("train", *tiny(pairs_dir, folder, "--resume", num_workers=2, max_steps=more, epochs=1000))
    assert result.status == 0 and read_state(folder)["position"]["step"] == more, result
