"""A disk that is full at every file a script writes: a sentence that names it, nothing lost, no temporary files."""
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

import run_folder
import utils
from checkpoints import load_checkpoint
from conftest import contents, make_pairs, save
from test_train import assert_same_weights, options, tiny
from warm import figure

PAGE = 4096
TINY = {"patch_size": 11, "stride": 9, "recurrent_iter": 1, "val_pairs": 1}


def free(folder):
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def fill(folder, left):
    """Leave ``left`` bytes of the disk."""
    with open(folder / "filler", "wb") as file:
        if free(folder) > left:
            os.posix_fallocate(file.fileno(), 0, free(folder) - left)


def pad_log(path):
    """Make the log fill its last page of the disk, where a further line would find room otherwise."""
    *lines, last = path.read_text().splitlines(keepends=True)
    record = {**json.loads(last), "note": ""}
    lines = "".join(lines)
    record["note"] = "x" * (-len(lines + json.dumps(record) + "\n") % PAGE)
    path.write_text(lines + json.dumps(record) + "\n")
    assert path.stat().st_size % PAGE == 0


def fill_before_write(disk, monkeypatch, site, count):
    """Fill the disk just before the ``count``-th write of the file ``site``; what it held then is appended."""
    seen, held, named, write, write_event = [], [], *(
        getattr(*place) for place in (
            (utils, "temporary_name"), (run_folder.RunLog, "write"), (run_folder.RunLog, "write_event")
        )
    )

    def look(name):
        if site in name:
            seen.append(name)
            if len(seen) == count:
                path = disk / "run" / name
                held.append(path.exists() and path.read_bytes())
                fill(disk, 0)

    monkeypatch.setattr(utils, "temporary_name", lambda name, process: look(name) or named(name, process))
    monkeypatch.setattr(run_folder.RunLog, "write", lambda log, record: look("log.jsonl") or write(log, record))
    monkeypatch.setattr(
        run_folder.RunLog, "write_event", lambda log, **content: look("events.out") or write_event(log, **content)
    )
    return held


# (file, which write of it fails in a resumed run of one epoch): the log is written anew first, and then added to.
SITES = (
    ("args.json", 1), ("net_latest", 1), ("log.jsonl", 1), ("events.out", 1), ("log.jsonl", 2), ("net_best", 1),
    ("net_epoch", 1), ("train_state", 1), ("net_latest.pth", 2),
)


@pytest.mark.slow
def test_full_disk_at_every_file_of_a_run(run, small_disk, monkeypatch, tmp_path, capsys):
    pairs = make_pairs(tmp_path / "pairs", (1, 2), 32, 40)
    disk = small_disk("16m")

    def arguments(folder, *extra, **changes):
        return options(pairs, folder, *extra, **{**TINY, "packed_dir": tmp_path / "packed", **changes})

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("train", *arguments(whole, epochs=2)).status == 0
    assert run("train", *arguments(cut, epochs=1)).status == 0
    pad_log(cut / "log.jsonl")
    for site, count in SITES:
        shutil.copytree(cut, disk / "run")
        with monkeypatch.context() as patch:
            held = fill_before_write(disk, patch, site, count)
            result = run("train", *arguments(disk / "run", "--resume", epochs=2))
        (disk / "filler").unlink()
        (line,) = result.err.splitlines()
        assert result.status == 1 and f"{disk / 'run' / site}" in line and "No space left" in line, result
        assert not [*disk.rglob("*.tmp"), *disk.rglob(".lock")]
        if site != "events.out":
            path = Path(line.split("error: ")[1].split(": could not")[0])
            assert (path.exists() and path.read_bytes()) == held[0]
        for path in (disk / "run").glob("*.pth"):
            load_checkpoint(path)
        assert run("train", *arguments(disk / "run", "--resume", epochs=2)).status == 0, "there is room again"
        for name in ("net_latest.pth", "net_epoch1.pth", "net_epoch2.pth", "net_best.pth"):
            assert_same_weights(disk / "run" / name, whole / name)
        shutil.rmtree(disk / "run")
    figure(capsys, f"full disk: {len(SITES)} writes of a run failed, each named, 0 lost, 0 temporary files")


def test_packing_that_finds_no_room_is_refused_and_the_packed_file_stays(run, refused, small_disk, pairs_dir, tmp_path):
    disk = small_disk("1m")
    first = tiny(pairs_dir, tmp_path / "run", packed_dir=disk, epochs=1)
    assert run("train", *first, "--stop_after", 1).status == 0
    before = contents(disk)
    (packed,) = disk.glob("*.h5")
    fill(disk, 5 * PAGE)
    os.utime(pairs_dir / "rain-1.png", (0, 0))
    refused("train", *first, "--resume", names=[f"--packed_dir {disk}", packed.name, " MB are free"])
    other = tiny(pairs_dir, tmp_path / "other", packed_dir=disk, stride=10)
    refused("train", *other, names=[f"--packed_dir {disk}", " MB are free"])
    (disk / "filler").unlink()
    assert contents(disk) == before
    assert run("train", *first, "--resume").status == 0


@pytest.mark.parametrize("pages", [1, 3])
def test_full_disk_of_drawn_rain(refused, small_disk, pairs_dir, tmp_path, pages):
    disk = small_disk("64k")
    clean = tmp_path / "clean"
    save(clean / "a.png", np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    fill(disk, pages * PAGE)
    refused("rain", "--clean", clean, "--out", disk / "out", status=1, names=[disk / "out", "No space left"])
    assert not [*disk.rglob("*.tmp")]


def test_full_disk_for_the_report(refused, small_disk, checkpoint, pairs_dir, tmp_path):
    """The image fits, metrics.csv does not."""
    disk = small_disk("64k")
    for number in (2, 3):
        (pairs_dir / f"rain-{number}.png").unlink()
    arguments = "test", "--save_path", checkpoint, "--test_data_path", pairs_dir, "--output_path"
    size = len(contents(pairs_dir)["norain-1.png"])
    fill(disk, (size // PAGE + 2) * PAGE)
    message = refused(*arguments, disk, status=1, names=[disk, "No space left"])
    assert not [*disk.rglob("*.tmp")], message


def test_full_disk_under_an_image_that_works_on_disk(refused, small_disk, checkpoint, tmp_path, monkeypatch):
    """The feature maps are mapped from a file, where a full disk is a SIGBUS if nobody looks first."""
    disk = small_disk("1m")
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    save(tmp_path / "real/a.png", np.zeros((100, 120, 3), np.uint8))
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", tmp_path / "real", "--output_path", tmp_path / "out",
        "--max_memory", 0, status=1, names=[disk, "No space left", "TMPDIR"],
    )
    assert not [*disk.iterdir()]
