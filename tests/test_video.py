"""Videos through test.py: a clip made here, a photograph that stands still or pans under rain that moves."""
import csv
import os
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import video
from conftest import contents, photo, run_subprocess
from rain import add_rain, streak_layer
from video import Flicker, count_frames, read_frames

RATE = 30000 / 1001


def make_clip(path, frames=12, height=48, width=64, pan=1, rain=True, rate=RATE, code="mp4v"):
    """A clip of one photograph that pans ``pan`` px a frame; the rain is another in each frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scene = cv2.resize(photo(3, 48, 64), (width + pan * frames, height), interpolation=cv2.INTER_CUBIC) // 2
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), rate, (width, height))
    for k in range(frames):
        frame = np.ascontiguousarray(scene[:, pan * k : pan * k + width])
        if rain:
            frame = add_rain(frame, streak_layer(height, width, "light", np.random.default_rng(k)))
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def frames_of(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while (result := capture.read())[0]:
        frames.append(result[1])
    return frames


@pytest.fixture
def derain_clip(run, checkpoint, tmp_path):
    """derain_clip(path, *flags) -> (folder of the results, result)."""

    def start(path, *extra, status=0):
        output = tmp_path / "results"
        result = run(
            "test", "--save_path", checkpoint, "--test_data_path", path, "--output_path", output, "--device", "cpu",
            *extra,
        )
        assert result.status == status, result
        return output, result

    return start


@pytest.fixture
def no_ffmpeg(monkeypatch):
    monkeypatch.setattr(video, "shutil", SimpleNamespace(which=lambda name: None))


@pytest.fixture
def ffmpeg(monkeypatch, tmp_path):
    """An ffmpeg on the PATH: the system's, or imageio-ffmpeg's."""
    if shutil.which("ffmpeg"):
        return shutil.which("ffmpeg")
    program = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ffmpeg").symlink_to(program)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return program


@pytest.mark.parametrize("suffix, code", [("mp4", "mp4v"), ("avi", "MJPG"), ("MKV", "mp4v")])
def test_a_clip_keeps_its_size_rate_and_frames(derain_clip, no_ffmpeg, tmp_path, suffix, code):
    source = make_clip(tmp_path / f"in/Regen ü.{suffix}", code=code)
    before = source.read_bytes()
    output, result = derain_clip(source)
    assert set(contents(output)) == {"Regen ü.mp4", "Regen ü.csv"} and source.read_bytes() == before
    capture = cv2.VideoCapture(str(output / "Regen ü.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(RATE, abs=0.01)
    frames = frames_of(output / "Regen ü.mp4")
    assert len(frames) == 12 and frames[0].shape == (48, 64, 3)
    assert "ffmpeg is not on the PATH" in result.out and "12 frames" in result.out
    with open(output / "Regen ü.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["frame"] for row in rows] == [*map(str, range(1, 13)), "average of 12"]
    assert float(rows[-1]["seconds"]) == pytest.approx(np.mean([float(row["seconds"]) for row in rows[:-1]]), abs=1e-5)


def test_frames_are_what_the_network_makes_of_them(derain_clip, no_ffmpeg, tmp_path, monkeypatch):
    """Shown on a network that darkens: frames are neither swapped nor their colours."""
    source = make_clip(tmp_path / "in/clip.mp4", pan=3)
    colours = torch.tensor([1, 0.5, 0.25])[:, None, None]
    monkeypatch.setattr("inference.StripRunner.__call__", lambda self, rainy: rainy * colours)
    output, _ = derain_clip(source)
    for before, after in zip(frames_of(source), frames_of(output / "clip.mp4"), strict=True):
        expected = before[..., ::-1] * [1, 0.5, 0.25]
        assert np.abs(after[..., ::-1] - expected).mean() < 6, "of MPEG-4's losses"


def test_sound_is_kept(derain_clip, ffmpeg, tmp_path):
    """Kept as it is where MP4 takes it, and else as AAC; also where it is shorter than the pictures."""
    silent = make_clip(tmp_path / "in/silent.mp4", frames=12)
    for name, codec, seconds in (("a.mp4", "aac", 0.4), ("b.avi", "adpcm_ms", 0.4), ("c.mp4", "aac", 0.15)):
        tone = ["-f", "lavfi", "-i", f"sine=duration={seconds}"]
        command = [ffmpeg, "-v", "error", "-i", silent, *tone, "-c:v", "copy", "-c:a", codec, tmp_path / "in" / name]
        subprocess.run(command, check=True)
        output, result = derain_clip(tmp_path / "in" / name)
        written = output / f"{name[0]}.mp4"
        streams = subprocess.run([ffmpeg, "-i", written], capture_output=True, text=True).stderr
        assert "Audio: aac" in streams and "Video: mpeg4" in streams, streams
        assert count_frames(written) == len(frames_of(written)) == 12
        assert "left out" not in result.out
    output, result = derain_clip(silent)
    assert len(frames_of(output / "silent.mp4")) == 12 and "left out" not in result.out, "there is none to keep"


def test_sound_that_cannot_be_kept_is_reported(derain_clip, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ffmpeg").write_text("#!/bin/sh\necho out of tune >&2\nexit 1\n")
    (tmp_path / "bin/ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    output, result = derain_clip(make_clip(tmp_path / "in/clip.mp4", frames=3))
    assert "the sound was left out: out of tune" in result.out and len(frames_of(output / "clip.mp4")) == 3


def test_lost_frames_are_replaced_and_reported(derain_clip, no_ffmpeg, tmp_path):
    source = make_clip(tmp_path / "in/clip.mp4", frames=40, height=120, width=160)
    data = bytearray(source.read_bytes())
    data[len(data) // 3 : len(data) // 2] = np.random.default_rng(1).bytes(len(data) // 2 - len(data) // 3)
    source.write_bytes(data)
    readable = len([frame for frame in read_frames(cv2.VideoCapture(str(source))) if frame is not None])
    assert 20 < readable < 40, "the damage costs frames, and others follow"
    output, result = derain_clip(source, "--recurrent_iter", 1, status=1)
    assert f"{40 - readable} frames could not be read" in result.err
    assert len(frames_of(output / "clip.mp4")) == 40, "sound and picture stay together"


def test_frames_lost_at_the_start_are_replaced_by_the_first(derain_clip, no_ffmpeg, tmp_path, monkeypatch):
    source = make_clip(tmp_path / "in/clip.mp4", frames=5, pan=5)
    monkeypatch.setattr(video, "read_frames", lambda capture: iter([None, None, *read_frames(capture)]))
    output, result = derain_clip(source, status=1)
    assert "2 frames could not be read, the first of them number 1" in result.err
    frames = frames_of(output / "clip.mp4")
    assert len(frames) == 7
    changes = [np.abs(b.astype(int) - a).mean() for a, b in zip(frames, frames[1:])]
    assert max(changes[:2]) < min(changes[2:])


def test_a_clip_cut_short_is_derained_and_reported(derain_clip, no_ffmpeg, tmp_path):
    source = make_clip(tmp_path / "in/clip.avi", frames=90, code="MJPG")
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 3])
    output, result = derain_clip(source, status=1)
    assert "could not be read" in result.err
    assert 10 < len(frames_of(output / "clip.mp4")) < 60


def test_odd_sizes_are_cropped_and_said(derain_clip, ffmpeg, tmp_path):
    source = tmp_path / "in/odd.avi"
    clip = make_clip(tmp_path / "in/clip.mp4", frames=3)
    subprocess.run([ffmpeg, "-v", "error", "-i", clip, "-vf", "scale=65:49", "-c:v", "ffv1", source], check=True)
    assert frames_of(source)[0].shape == (49, 65, 3)
    output, result = derain_clip(source)
    assert frames_of(output / "odd.mp4")[0].shape == (48, 64, 3) and "65x49 is cropped" in result.out


def test_ctrl_c_leaves_a_playable_file(checkpoint, tmp_path):
    source = make_clip(tmp_path / "in/clip.mp4", frames=2000, pan=0, rain=False)
    process = run_subprocess(
        "test.py", "--save_path", checkpoint, "--test_data_path", source, "--output_path", tmp_path / "out",
        "--device", "cpu",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
    )
    while process.poll() is None and not list((tmp_path / "out").glob(".video-*/silent.mp4")):
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    frames = frames_of(tmp_path / "out/clip.mp4")
    assert 1 <= len(frames) < 2000 and f"interrupted after frame {len(frames)}" in out
    assert set(contents(tmp_path / "out")) == {"clip.mp4", "clip.csv"}, "nothing temporary"


def test_a_full_disk_keeps_the_earlier_result(refused, checkpoint, small_disk, tmp_path, no_ffmpeg):
    source = make_clip(tmp_path / "in/clip.mp4", frames=12, height=64, width=96)
    disk = small_disk("16k")
    (disk / "clip.mp4").write_bytes(b"the earlier result")
    refused(
        "test", "--save_path", checkpoint, "--recurrent_iter", 1, "--test_data_path", source, "--output_path", disk,
        status=1, names=[disk / "clip.mp4"],
    )
    assert contents(disk) == {"clip.mp4": b"the earlier result"}


def test_what_is_no_video_is_named(refused, checkpoint, tmp_path):
    (tmp_path / "notes.txt").write_text("rain")
    for name in ("notes.txt", "missing.mp4"):
        refused(
            "test", "--save_path", checkpoint, "--test_data_path", tmp_path / name, "--output_path", tmp_path / "out",
            names=["--test_data_path", tmp_path / name, "video"],
        )
    assert not (tmp_path / "out").exists()


def test_the_input_is_not_overwritten(refused, checkpoint, tmp_path):
    source = make_clip(tmp_path / "in/clip.mp4", frames=3)
    before = source.read_bytes()
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", source, "--output_path", tmp_path / "in",
        names=["--output_path", "clip.mp4"],
    )
    assert source.read_bytes() == before


def test_a_result_is_kept_on_request(derain_clip, no_ffmpeg, tmp_path):
    source = make_clip(tmp_path / "in/clip.mp4", frames=3)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/clip.mp4").write_bytes(b"mine")
    output, result = derain_clip(source, "--overwrite", False)
    assert (output / "clip.mp4").read_bytes() == b"mine" and "is there already" in result.out
    output, _ = derain_clip(source)
    assert len(frames_of(output / "clip.mp4")) == 3


# Temporal consistency


def noisy(scene, k, share=0.02):
    """A scene with bright points that are others in each frame, as sparse rain is."""
    points = np.random.default_rng(k).random(scene.shape[:2]) < share
    return np.where(points[..., None], 255, scene).astype(np.uint8)


def test_flicker_of_a_scene_that_stands_still():
    scene, flicker = photo(1, 60, 80) // 8, Flicker()
    rows = [flicker.add(noisy(scene, k), noisy(scene, k, 0.005)) for k in range(6)]
    assert np.isnan(rows[0]["change_rainy"])
    for row in rows[1:]:
        assert row["static"] > 0.9
        # A point appears or vanishes at 2 * 2 % of the pixels, and changes them by 255 less their level.
        assert row["change_rainy"] == pytest.approx(0.04 * (255 - scene.mean()), rel=0.2)
        assert row["change_derained"] == pytest.approx(0.01 * (255 - scene.mean()), rel=0.3)


def test_flicker_leaves_out_what_moves():
    still = photo(1, 60, 80) // 8
    flicker, rows = Flicker(), []
    for k in range(4):
        frame = still.copy()
        frame[:, 40:] = np.roll(photo(2, 60, 40), 9 * k, 1)
        rows.append(flicker.add(noisy(frame, k), frame))
    for row in rows[1:]:
        assert 0.2 < row["static"] < 0.6
        assert row["change_derained"] < 1 < row["change_rainy"], "the moving half would change by far more"


def test_flicker_without_static_regions_has_no_figure():
    flicker = Flicker()
    flicker.add(np.zeros((20, 20, 3), np.uint8), np.zeros((20, 20, 3), np.uint8))
    row = flicker.add(np.full((20, 20, 3), 99, np.uint8), np.zeros((20, 20, 3), np.uint8))
    assert row["static"] == 0 and np.isnan(row["change_rainy"])


def test_a_video_without_end_ends(monkeypatch):
    """A header may declare any number of frames."""

    class Endless:
        def read(self):
            return False, None

    assert list(read_frames(Endless())) == []
