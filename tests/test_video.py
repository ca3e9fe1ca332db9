"""Videos: clips made here, a photograph that stands still or pans under rain, and what has gone wrong with others."""
import csv
import errno
import http.server
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation
from PIL import Image, ImageCms

from conftest import ROOT, THOROUGH, contents, photo, run_subprocess, save
from rain import add_rain, streak_layer
from utils import STOP_SIGNALS, InputError, RunError
import video
import video_input
import video_output
from video import Flicker, VideoOptions, derain_video
from video_form import read_planes, write_planes

BASE, MS = Fraction(1, 15360), Fraction(1, 1000)
EXACT = Interpolation.POINT | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


# Made clips


def pictures(frames=12, height=48, width=64, pan=1, rain=True):
    """Yield the frames of one photograph that pans ``pan`` px a frame; the rain is another in each frame."""
    scene = cv2.resize(photo(3, 48, 64), (width + pan * frames, height), interpolation=cv2.INTER_CUBIC) // 2
    for k in range(frames):
        frame = np.ascontiguousarray(scene[:, pan * k : pan * k + width])
        if rain:
            frame = add_rain(frame, streak_layer(height, width, "light", np.random.default_rng(k)))
        yield frame


def tone(container, codec="aac", rate=44100):
    """Add a stream for a sound to a container; what takes (stream, seconds) and writes it."""
    stream = container.add_stream(codec, rate=rate, layout="mono")

    def write(seconds, start=0.0):
        size = stream.codec_context.frame_size or 1024
        for first in range(0, int(seconds * rate), size):
            wave = np.sin(2 * np.pi * 440 * np.arange(first, first + size) / rate)
            kind = stream.codec_context.format.name
            values = wave.astype(np.float32) if kind.startswith("flt") else (20000 * wave).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(values[None], kind, "mono")
            frame.sample_rate, frame.pts = rate, first + round(start * rate)
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    return stream, write


def make_clip(path, frames=None, codec="libx264", kind="yuv420p", times=None, base=BASE, setup=None, **settings):
    """Write a clip.

    Args:
        frames: (H, W, 3) uint8 or uint16 arrays, or (planes, ...) as they are coded; 12 rainy ones by default.
        times: of the frames in units of ``base``; 30 a second by default.
        setup: function of (container, stream), before anything is written; it may return a function that is called
            when the frames are.
        settings: attributes of the encoder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = list(frames if frames is not None else pictures())
    step = round(Fraction(1, 30) / base)
    times = times or [k * step for k in range(len(frames))]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        context = stream.codec_context
        first = frames[0] if isinstance(frames[0], np.ndarray) else frames[0][0]
        context.height, context.width, context.pix_fmt = *first.shape[:2], kind
        context.time_base = stream.time_base = base
        context.options = {"crf": "10", "g": "12"} if codec == "libx264" else {}
        for name, value in settings.items():
            setattr(context, name, value)
        after = setup and setup(container, stream)
        for values, stamp in zip(frames, times, strict=True):
            frame = coded(values, kind, context) if not isinstance(values, np.ndarray) else from_rgb(values, context)
            frame.pts, frame.time_base = stamp, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if after:
            after()
    return path


class Planes(list):
    """The planes of a frame as they are coded."""


def from_rgb(values, context):
    deep = values.dtype == np.uint16
    frame = av.VideoFrame.from_ndarray(values, "rgb48le" if deep else "rgb24")
    return frame.reformat(format=context.pix_fmt, dst_color_range=context.color_range or 1)


def coded(planes, kind, context):
    """A frame of planes as they are coded."""
    frame = av.VideoFrame(context.width, context.height, kind)
    write_planes(frame, planes)
    frame.colorspace, frame.color_range = context.colorspace, context.color_range
    return frame


def figure(capsys, text):
    """Show a measured figure whatever pytest captures."""
    with capsys.disabled():
        print(f"\n{text}")


# Looking at results


def times_of(path):
    """The times of the frames of a video, in seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.pts * stream.time_base for frame in container.decode(stream)]


def frames_of(path, kind="rgb24"):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format=kind, interpolation=EXACT) for frame in container.decode(video=0)]


def assert_same_times(first, second):
    """Equal, to a tick of the second one."""
    expected, got = times_of(first), times_of(second)
    with av.open(str(second)) as container:
        tick = container.streams.video[0].time_base
    assert len(got) == len(expected)
    assert max(abs(a - b) for a, b in zip(expected, got)) <= (0 if tick.denominator % BASE.denominator == 0 else tick)


def assert_same_planes(first, second, bound):
    """The samples of the frames differ by ``bound`` levels on average at most."""
    with av.open(str(first)) as one, av.open(str(second)) as other:
        for before, after in zip(one.decode(video=0), other.decode(video=0), strict=True):
            for a, b in zip(read_planes(before), read_planes(after), strict=True):
                assert np.abs(a.astype(int) - b).mean() <= bound


def describe(path):
    """{stream: what it is} of a video."""
    with av.open(str(path)) as container:
        return [
            (
                stream.type, stream.codec_context and stream.codec_context.codec.canonical_name,
                stream.metadata.get("language", "und"), stream.disposition,
            )
            for stream in container.streams
        ]


def packets_of(path, index):
    """[(time, data)] of the packets of a stream."""
    with av.open(str(path)) as container:
        return [
            ((packet.pts or 0) * packet.time_base, bytes(packet))
            for packet in container.demux(container.streams[index]) if packet.size
        ]


@pytest.fixture
def kept(tmp_path):
    """Derain a video with a network that changes nothing: kept(path, codec="hevc") -> the output, result."""

    def start(path, derain=lambda frame: frame, **options):
        result = derain_video(path, tmp_path / "results", derain, VideoOptions(**options))
        return result.output, result

    return start


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


# Through test.py


def test_a_clip_keeps_its_size_times_and_frames(derain_clip, tmp_path):
    source = make_clip(tmp_path / "in/Regen ü.mp4")
    before = source.read_bytes()
    output, result = derain_clip(source)
    assert set(contents(output)) == {"Regen ü.mp4", "Regen ü.csv"} and source.read_bytes() == before
    assert_same_times(source, output / "Regen ü.mp4")
    frames = frames_of(output / "Regen ü.mp4")
    assert len(frames) == 12 and frames[0].shape == (48, 64, 3) and "12 frames" in result.out
    with open(output / "Regen ü.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["frame"] for row in rows] == [*map(str, range(1, 13)), "average of 12"]
    assert float(rows[-1]["seconds"]) == pytest.approx(np.mean([float(row["seconds"]) for row in rows[:-1]]), abs=1e-5)


def test_frames_are_what_the_network_makes_of_them(derain_clip, tmp_path, monkeypatch):
    """Shown on a network that darkens: frames are neither swapped nor their colours."""
    source = make_clip(tmp_path / "in/clip.mp4", pictures(pan=3))
    colours = torch.tensor([1, 0.5, 0.25])[:, None, None]
    monkeypatch.setattr("inference.StripRunner.__call__", lambda self, rainy: rainy * colours)
    output, _ = derain_clip(source)
    for before, after in zip(frames_of(source), frames_of(output / "clip.mp4"), strict=True):
        assert np.abs(after - before * [1, 0.5, 0.25]).mean() < 6, "of half the chroma"


@pytest.mark.parametrize(
    "stem", [
        "x" * 251, "new\nline", "-y", "%d", "a:b", "file:", "http:", "\U0001f327 'ü' \"?#&", os.fsdecode(b"\xff"),
        "...",
    ],
)
def test_hard_names(kept, tmp_path, capsys, stem):
    source = make_clip(tmp_path / "in/clip.mp4", pictures(3), setup=add_company)
    source = source.rename(source.with_name(f"{stem}.mp4"))
    output, result = kept(source)
    assert set(os.listdir(output.parent)) == {f"{stem}.mp4"} and result.last == 3
    assert derain_video(source, output.parent, lambda frame: frame, VideoOptions(overwrite=False)) is None
    assert capsys.readouterr().out.count("\n") == 1


def only_the_container_says(colours):
    """A ``setup`` of ``make_clip``: the encoder has begun before it learns of these."""

    def set_colours(container, stream):
        stream.codec_context.open()
        for name, value in colours.items():
            setattr(stream.codec_context, name, value)

    return set_colours


def test_colours_that_only_the_container_knows(kept, refused, checkpoint, tmp_path):
    """HEVC's decoder, among others, forgets them."""
    options = {"codec": "libx265", "options": {"x265-params": "log-level=none"}}
    bt709 = {"color_primaries": 1, "color_trc": 1, "colorspace": 1}
    source = make_clip(tmp_path / "in/sdr.mp4", pictures(6), setup=only_the_container_says(bt709), **options)
    with av.open(str(kept(source)[0])) as container:
        frame = next(container.decode(video=0))
        assert {name: getattr(frame, name) for name in bt709} == bt709
    pq = only_the_container_says({"color_primaries": 9, "color_trc": 16, "colorspace": 9})
    source = make_clip(tmp_path / "in/hdr.mp4", pictures(6), setup=pq, **options)
    arguments = "--save_path", checkpoint, "--test_data_path", source, "--output_path", tmp_path / "out"
    refused("test", *arguments, names=[source, "HDR", "PQ"])


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_the_last_frame_stays_on_as_long_as_it_did(kept, tmp_path, codec):
    """As that of a recording of slides. MP4 knows it from the packet that is decoded last, which may be a B frame."""
    step, last = round(Fraction(1, 30) / BASE), 3 / BASE
    source = tmp_path / "in/slides.mp4"
    made = make_clip(tmp_path / "made.mp4", pictures(20), options={"bf": "0"})
    source.parent.mkdir()
    with av.open(str(made)) as container, av.open(str(source), "w") as copy:
        stream = copy.add_stream_from_template(container.streams.video[0])
        packets = [packet for packet in container.demux(video=0) if packet.size]
        packets[-1].duration = last
        for packet in packets:
            packet.stream = stream
            copy.mux(packet)
    output, _ = kept(source, codec=codec)
    lengths = []
    for path in (source, output):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            lengths.append(float(stream.duration * stream.time_base))
    assert lengths == pytest.approx([float((19 * step + last) * BASE)] * 2, abs=0.05)


def test_a_subtitle_without_an_end_does_not_cost_the_video(kept, tmp_path):
    """FFmpeg writes 2^32 - 1 ms for those of DVDs, which is longer than MP4 can say."""

    def add_pictures_of_words(container, stream):
        words = container.add_mux_stream("dvd_subtitle")
        words.time_base = MS

        def write():
            packet = av.Packet(bytes(range(64)))
            packet.stream, packet.time_base, packet.pts, packet.dts, packet.duration = words, MS, 100, 100, 2**32 - 1
            container.mux(packet)

        return write

    source = make_clip(tmp_path / "in/dvd.mkv", setup=add_pictures_of_words)
    output, result = kept(source)
    assert output.suffix == ".mp4" and len(frames_of(output)) == 12 == result.last
    with av.open(str(output)) as container:
        assert [stream.type for stream in container.streams] == ["video", "subtitle"]


# Times


def test_variable_frame_rate_is_kept(kept, tmp_path):
    """As phones record: with the sound as it is, and to the tick."""
    times = list(itertools.accumulate([0, 512, 300, 1024, 77, 2048, 512, 511, 513, 4000, 512, 9]))

    def add_sound(container, stream):
        _, write = tone(container)
        return lambda: write(1.5)

    source = make_clip(tmp_path / "in/clip.mp4", times=times, setup=add_sound)
    output, _ = kept(source)
    assert times_of(output) == times_of(source) == [time * BASE for time in times]
    assert packets_of(output, 1) == packets_of(source, 1)
    with av.open(str(source)) as first, av.open(str(output)) as second:
        assert abs(first.duration - second.duration) < 1000, "microseconds"


def test_a_stream_without_times_has_its_frame_rate(kept, tmp_path):
    source = make_clip(tmp_path / "in/clip.h264", base=Fraction(1, 30))
    output, _ = kept(source)
    assert times_of(output) == [Fraction(k, 30) for k in range(12)]


def test_frames_that_are_coded_out_of_order_in_avi_come_in_order(kept, tmp_path):
    """AVI has times of decoding only."""
    source = make_clip(tmp_path / "in/clip.avi", pictures(30), base=Fraction(1, 30))
    output, _ = kept(source)
    times = times_of(output)
    assert {b - a for a, b in zip(times, times[1:])} == {Fraction(1, 30)}
    assert_same_frames(frames_of(source), frames_of(output))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "mov", "avi", "flv"])
def test_any_container_keeps_times(kept, tmp_path, suffix):
    def add_sound(container, stream):
        _, write = tone(container, *(("pcm_s16le", 44100) if suffix == "avi" else ("aac", 44100)))
        return lambda: write(0.4)

    base = {"mkv": MS, "ts": Fraction(1, 90000), "avi": Fraction(1, 30), "flv": MS}
    codec = "mpeg4" if suffix == "avi" else "libx264"
    source = make_clip(tmp_path / f"in/clip.{suffix}", setup=add_sound, codec=codec, base=base.get(suffix, BASE))
    output, result = kept(source)
    assert output.suffix == ".mp4" and not result.faults
    first, second = times_of(source), times_of(output)
    zero = min(first[0], packets_of(source, 1)[0][0]) if suffix == "ts" else 0  # its clock starts anywhere
    assert [time - zero for time in first] == second
    if suffix != "ts":
        assert [data for _, data in packets_of(output, 1)] == [data for _, data in packets_of(source, 1)]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_pictures_that_start_after_the_sound_keep_their_distance(kept, tmp_path, suffix):
    base = BASE if suffix == "mp4" else MS
    late = round(Fraction(1, 2) / base)

    def add_sound(container, stream):
        _, write = tone(container)
        return lambda: write(1.2)

    times = [late + k * round(Fraction(1, 30) / base) for k in range(12)]
    source = make_clip(tmp_path / f"in/clip.{suffix}", times=times, setup=add_sound, base=base)
    output, _ = kept(source)
    assert times_of(output) == times_of(source) and times_of(output)[0] == Fraction(1, 2)
    for (first, data), (second, copied) in zip(packets_of(source, 1), packets_of(output, 1), strict=True):
        assert data == copied and abs(first - second) <= Fraction(1, 44100)


def test_sound_that_starts_after_the_pictures_keeps_its_distance(kept, tmp_path):
    def add_sound(container, stream):
        _, write = tone(container)
        return lambda: write(0.2, start=0.2)

    source = make_clip(tmp_path / "in/clip.mp4", setup=add_sound)
    output, _ = kept(source)
    assert times_of(output) == times_of(source)
    assert packets_of(output, 1) == packets_of(source, 1) and packets_of(output, 1)[1][0] > 0.15


def test_stamps_that_go_back_do_not_stop_the_video(kept, tmp_path):
    """As where two recordings were joined: the time goes on."""
    first, second = (make_clip(tmp_path / f"in/{name}.ts", base=Fraction(1, 90000)) for name in "ab")
    joined = tmp_path / "in/joined.ts"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    output, _ = kept(joined)
    times = times_of(output)
    assert len(times) == 24 and all(0 < b - a < 0.1 for a, b in zip(times, times[1:]))


# Colours


def coded_noise(kind, matrix, full, frames=3, height=48, width=64):
    """Frames of noise as they are coded, of colours that RGB has too."""
    random, pixels = np.random.default_rng(0), av.VideoFormat(kind, width, height)
    bits = pixels.components[0].bits
    dtype, scale = (np.uint8, 1) if bits == 8 else (np.uint16, 2 ** (bits - 8))
    for _ in range(frames):
        planes = []
        for number, part in enumerate(pixels.components):
            low, high = (80, 170) if number == 0 else (112, 144)
            planes.append(random.integers(low * scale, high * scale, (part.height, part.width), dtype))
        yield Planes(planes)


@pytest.mark.parametrize("full", [1, 2])
@pytest.mark.parametrize("matrix", [1, 6, 9])
@pytest.mark.parametrize(
    "kind, size", [
        ("yuv420p", (48, 64)), ("yuv420p", (49, 65)), ("yuv422p", (48, 64)), ("yuv444p", (48, 64)),
        ("yuv420p10le", (48, 64)), ("yuv444p10le", (49, 65)),
    ],
)
def test_what_is_not_changed_comes_back(kept, tmp_path, kind, size, matrix, full):
    """Through RGB and back, in a codec without loss: within 1 level in 8 bits, 2 of 1023 in 10, and tagged."""
    source = make_clip(
        tmp_path / "in/clip.mkv", coded_noise(kind, matrix, full, 3, *size), "ffv1", kind, base=MS,
        colorspace=matrix, color_range=full, color_primaries=1, color_trc=1,
    )
    output, _ = kept(source, codec="ffv1")
    assert output.suffix == ".mkv"
    with av.open(str(source)) as first, av.open(str(output)) as second:
        for before, after in zip(first.decode(video=0), second.decode(video=0), strict=True):
            assert after.format.name == kind
            assert (after.colorspace, after.color_range, after.color_primaries, after.color_trc) == (matrix, full, 1, 1)
            for a, b in zip(read_planes(before), read_planes(after)):
                assert np.abs(a.astype(int) - b).max() <= (1 if kind.endswith("p") else 2)


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9", "av1", "ffv1", "prores"])
@pytest.mark.parametrize("full", [1, 2])
def test_grey_stays_grey(kept, tmp_path, codec, full):
    grey = [[np.full(shape, 126, np.uint8) if n == 0 else np.full(shape, 128, np.uint8)
             for n, shape in enumerate([(96, 128), (48, 64), (48, 64)])]] * 3
    source = make_clip(tmp_path / "in/clip.mp4", map(Planes, grey), color_range=full)
    output, _ = kept(source, codec=codec)
    for before, after in zip(frames_of(source), frames_of(output), strict=True):
        assert np.abs(before.astype(int) - after).max() <= 1 and np.ptp(after, axis=2).max() <= 1


def test_the_network_gets_the_colours_of_the_source(kept, tmp_path):
    """The same RGB, coded by BT.601 and BT.709, in each range, is the same RGB for the network."""
    seen = []

    def look(frame):
        seen.append(frame)
        return frame

    colours = np.zeros((48, 64, 3), np.uint8) + np.array([180, 90, 60], np.uint8)
    for matrix, full in itertools.product((1, 6), (1, 2)):
        frame = av.VideoFrame.from_ndarray(colours, "rgb24")
        frame.colorspace, frame.color_range = matrix, 2
        frame = frame.reformat(format="yuv444p", dst_color_range=full)
        source = make_clip(
            tmp_path / f"in/{matrix}{full}.mkv", [Planes(read_planes(frame))], "ffv1", "yuv444p", base=MS,
            colorspace=matrix, color_range=full,
        )
        kept(source, look)
    assert np.abs(np.array(seen, int) - colours).max() <= 2, "of rounding twice"


@pytest.mark.parametrize("height, matrix", [(480, 6), (720, 1)])
def test_colours_without_tags_are_taken_as_players_take_them(kept, tmp_path, height, matrix):
    source = make_clip(tmp_path / "in/clip.mp4", pictures(1, height, 640))
    output, _ = kept(source)
    with av.open(str(output)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (matrix, 1)


# What the frames are like


@pytest.mark.parametrize(
    "codec, kind, expected", [
        ("h264", "yuv420p10le", "yuv420p10le"), ("h264", "yuv422p10le", "yuv422p10le"), ("h264", "gray", "yuv420p"),
        ("h264", "yuv422p12le", "yuv422p10le"), ("h264", "yuv411p", "yuv422p"), ("h264", "bgr0", "yuv444p"),
        ("h264", "yuva420p", "yuv420p"), ("hevc", "yuv420p10le", "yuv420p10le"), ("hevc", "yuv422p12le", "yuv422p12le"),
        ("vp9", "yuv420p10le", "yuv420p"), ("av1", "yuv420p10le", "yuv420p10le"), ("av1", "yuv444p", "yuv420p"),
        ("ffv1", "yuv420p16le", "yuv420p16le"), ("ffv1", "gray", "gray"), ("ffv1", "bgr0", "bgr0"),
        ("prores", "yuv420p", "yuv422p10le"),
    ],
)
def test_bits_and_chroma_are_kept_where_the_codec_has_them(kept, tmp_path, capsys, codec, kind, expected):
    deep = "le" in kind
    frames = [257 * frame.astype(np.uint16) if deep else frame for frame in pictures(3, rain=False)]
    source = make_clip(tmp_path / "in/clip.mkv", frames, "ffv1", kind, base=MS)
    seen = []
    crf = None if codec in ("ffv1", "prores") else 1
    output, _ = kept(source, lambda frame: seen.append(frame) or frame, codec=codec, crf=crf)
    assert seen[0].dtype == (np.uint16 if deep else np.uint8) and seen[0].shape == (48, 64, 3)
    with av.open(str(output)) as container:
        frame = next(container.decode(video=0))
        assert frame.format.name == expected
    out = capsys.readouterr().out
    worse = (codec, kind) in [("h264", "yuv422p12le"), ("vp9", "yuv420p10le"), ("av1", "yuv444p")]
    assert ("has nothing closer" in out) == worse and ("transparency" in out) == (kind == "yuva420p")
    if kind == expected != "bgr0":
        assert_same_planes(source, output, 2 if kind != "yuv422p12le" else 8)
    else:
        for before, after in zip(frames_of(source), frames_of(output), strict=True):
            assert np.abs(before.astype(int) - after).mean() < 6


def test_ten_bits_are_ten_bits(kept, tmp_path):
    """A ramp with more levels than 8 bits have keeps them."""
    ramp = np.linspace(64, 940, 256).round().astype(np.uint16)
    chroma = np.full((48, 128), 512, np.uint16)
    planes = Planes([np.tile(ramp, (96, 1)), chroma, chroma])
    source = make_clip(
        tmp_path / "in/clip.mp4", [planes] * 3, kind="yuv420p10le", options={"crf": "0"}, height=96, width=256
    )
    output, _ = kept(source, crf=4)
    with av.open(str(output)) as container:
        luma = read_planes(next(container.decode(video=0)))[0]
    assert len(np.unique(luma)) > 240 and np.abs(luma.astype(int) - ramp).mean() < 1


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9", "av1", "ffv1", "prores"])
def test_odd_sides_are_kept(kept, tmp_path, capfd, codec):
    source = make_clip(tmp_path / "in/odd.mkv", pictures(3, 49, 65), "ffv1", base=MS)
    output, _ = kept(source, codec=codec)
    for before, after in zip(frames_of(source), frames_of(output), strict=True):
        assert after.shape == (49, 65, 3) and np.abs(before.astype(int) - after).mean() < 6
    out, err = capfd.readouterr()
    assert ("keeps the odd size" in out) == (codec in ("h264", "hevc")) and not err, "no encoder prints"


def test_pixels_that_are_not_square_are_kept(kept, tmp_path):
    for name in ("clip.mp4", "clip.mkv"):
        base = BASE if name.endswith("mp4") else MS
        source = make_clip(tmp_path / "in" / name, sample_aspect_ratio=Fraction(4, 3), base=base)
        for codec in ("h264", "vp9", "ffv1"):
            output, _ = kept(source, codec=codec)
            with av.open(str(output)) as container:
                assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)


@pytest.mark.parametrize("degrees, flip", [(90, False), (180, False), (270, False), (90, True), (0, True)])
def test_rotation_is_kept(kept, tmp_path, degrees, flip):
    def turn(container, stream):
        stream.set_display_rotation(degrees, hflip=flip)

    source = make_clip(tmp_path / "in/clip.mp4", setup=turn)
    output, _ = kept(source)
    matrices = []
    for path in (source, output):
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            matrices += [bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    assert matrices[0] == matrices[1] and frames_of(output)[0].shape == (48, 64, 3), "the pixels as they are coded"


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused(refused, checkpoint, tmp_path, transfer, name):
    source = make_clip(
        tmp_path / "in/clip.mp4", kind="yuv420p10le", color_trc=transfer, color_primaries=9, colorspace=9
    )
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", source, "--output_path", tmp_path / "out",
        names=[source, "HDR", name],
    )
    assert not (tmp_path / "out").exists()


def test_a_moving_gif_is_a_video(kept, tmp_path):
    times = [0, 10, 30, 35]
    source = make_clip(tmp_path / "in/clip.gif", pictures(4), "gif", "rgb8", base=Fraction(1, 100), times=times)
    output, _ = kept(source, crf=1)
    assert times_of(output) == times_of(source)
    for before, after in zip(frames_of(source), frames_of(output), strict=True):
        assert np.abs(before.astype(int) - after).mean() < 2


def test_frames_of_another_size_are_brought_to_that_of_the_first(kept, tmp_path):
    first = make_clip(tmp_path / "in/a.ts", pictures(6), base=Fraction(1, 90000))
    second = make_clip(tmp_path / "in/b.ts", pictures(6, 96, 128), base=Fraction(1, 90000))
    joined = tmp_path / "in/joined.ts"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    output, _ = kept(joined)
    assert [frame.shape for frame in frames_of(output)] == [(48, 64, 3)] * 12


# The other streams


def add_company(container, stream):
    """Two sounds, subtitles, chapters and titles beside the pictures."""
    stream.metadata["title"] = "main"
    sounds = [tone(container), tone(container)]
    for (sound, _), language, kind in zip(sounds, ("eng", "fra"), (1, 0)):
        sound.metadata["language"], sound.disposition = language, kind
    name = "mov_text" if container.format.name == "mp4" else "subrip"
    words = container.add_mux_stream(name)
    words.metadata["language"], words.disposition, words.time_base = "deu", 64, MS
    container.metadata.update(title="Rain ☔", comment="a test", artist="nobody")
    container.set_chapters([
        {"id": 1, "start": 0, "end": 200, "time_base": MS, "metadata": {"title": "first"}},
        {"id": 2, "start": 200, "end": 400, "time_base": MS, "metadata": {"title": "second"}},
    ])

    def write():
        for _, sound in sounds:
            sound(2.2)
        for start in (100, 300):
            text = b"drip"
            packet = av.Packet((len(text).to_bytes(2, "big") if name == "mov_text" else b"") + text)
            packet.stream, packet.time_base = words, MS
            packet.pts = packet.dts = start
            packet.duration = 100
            container.mux(packet)

    return write


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_all_streams_chapters_and_titles_are_copied(kept, tmp_path, capsys, suffix):
    base = BASE if suffix == "mp4" else MS
    source = make_clip(tmp_path / f"in/clip.{suffix}", setup=add_company, base=base)
    output, _ = kept(source)
    assert output.suffix == f".{suffix}" and "left out" not in capsys.readouterr().out
    assert describe(output) == describe(source)
    assert len(describe(output)) == 4 + (suffix == "mp4"), "chapters are a stream in MP4"
    for index in (1, 2):
        assert packets_of(output, index) == packets_of(source, index) != []
    texts = [[packet for packet in packets_of(path, 3) if b"drip" in packet[1]] for path in (source, output)]
    assert texts[0] == texts[1] and len(texts[0]) == 2, "MP4 fills the gaps between them"
    with av.open(str(source)) as first, av.open(str(output)) as second:
        for container in (first, second):
            lower = {name.lower(): text for name, text in container.metadata.items()}
            assert (lower["title"], lower["comment"], lower["artist"]) == ("Rain ☔", "a test", "nobody")
            found = [(float(c["start"] * c["time_base"]), c["metadata"]["title"]) for c in container.chapters()]
            assert found == [(0, "first"), (0.2, "second")]
        if suffix == "mkv":
            assert second.streams[0].metadata["title"] == "main"


def test_metadata_without_a_place_are_named(kept, tmp_path, capsys):
    def add(container, stream):
        container.metadata.update(title="Rain", colour_of_my_hat="blue")

    source = make_clip(tmp_path / "in/clip.mkv", setup=add, base=MS)
    kept(source)
    assert "clip.mp4: has no place for the source's COLOUR_OF_MY_HAT\n" in capsys.readouterr().out


def test_fonts_are_copied(kept, tmp_path):
    def add(container, stream):
        container.add_attachment("font.ttf", "application/x-truetype-font", b"not really a font")

    source = make_clip(tmp_path / "in/clip.mkv", setup=add, base=MS)
    output, _ = kept(source)
    with av.open(str(output)) as container:
        (font,) = container.streams.attachments
        assert output.suffix == ".mkv" and (font.name, font.data) == ("font.ttf", b"not really a font")


def test_a_cover_is_copied_and_not_taken_for_the_video(kept, tmp_path):
    picture = cv2.imencode(".jpg", photo(5, 200, 300))[1].tobytes()

    def add(container, stream):
        cover = container.add_mux_stream("mjpeg", width=300, height=200)
        cover.disposition, cover.time_base = 1024, Fraction(1, 90000)

        def write():
            packet = av.Packet(picture)
            packet.stream, packet.pts, packet.dts, packet.time_base = cover, 0, 0, Fraction(1, 90000)
            container.mux(packet)

        return write

    source = make_clip(tmp_path / "in/clip.mp4", setup=add)
    output, _ = kept(source)
    assert describe(output) == describe(source) and len(frames_of(output)) == 12
    assert [data for _, data in packets_of(output, 1)] == [picture]


def test_a_time_code_is_kept(kept, tmp_path, capsys):
    source = make_clip(tmp_path / "in/clip.mov", setup=lambda _, stream: stream.metadata.update(timecode="01:00:00:00"))
    output, _ = kept(source)
    assert [kind for kind, *_ in describe(output)] == ["video", "data"] and "left out" not in capsys.readouterr().out
    with av.open(str(output)) as container:
        assert {stream.metadata["timecode"] for stream in container.streams} == {"01:00:00:00"}


def test_a_stream_that_no_container_takes_is_named(kept, tmp_path, capsys):
    def add(container, stream):
        data = container.add_data_stream("klv")

        def write():
            packet = av.Packet(b"\x06\x0e" + bytes(30))
            packet.stream, packet.time_base, packet.pts, packet.dts = data, Fraction(1, 90000), 0, 0
            container.mux(packet)

        return write

    source = make_clip(tmp_path / "in/clip.ts", setup=add, base=Fraction(1, 90000))
    output, _ = kept(source)
    assert "#1 (data, klv) is left out, as .mp4 files take no such stream" in capsys.readouterr().out
    assert [kind for kind, *_ in describe(output)] == ["video"]


# What cannot be read


def damage(path, start=0.4, stop=0.55, seed=1):
    """Overwrite a part of a file."""
    data = bytearray(path.read_bytes())
    first, last = int(len(data) * start), int(len(data) * stop)
    data[first:last] = np.random.default_rng(seed).bytes(last - first)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "libx265", "libvpx-vp9", "prores_ks", "ffv1"])
def test_lost_frames_are_replaced_and_reported(kept, tmp_path, codec):
    """Those whose packets are lost are not replaced, as their times are lost too: the one before stays on longer."""
    kind = "yuv422p10le" if codec == "prores_ks" else "yuv420p"
    suffix, base = ("mov", BASE) if codec == "prores_ks" else ("mkv", MS)
    source = make_clip(
        tmp_path / f"in/clip.{suffix}", pictures(40, 120, 160), codec, kind, base=base,
        options={"x265-params": "log-level=none"} if codec == "libx265" else {},
    )
    times = times_of(source)
    with av.open(str(source)) as container:
        packets = [(packet.pos, packet.pts * packet.time_base) for packet in container.demux(video=0) if packet.size]
    start = packets[16][0] / source.stat().st_size
    output, result = kept(damage(source, start, start + 0.15))
    got = times_of(output)
    assert result.faults and set(got) <= set(times) and len(got) > 10
    assert {time for _, time in packets[:15]} <= set(got), "all before the damage"
    assert kept(source)[1].faults == result.faults, "of the next file with the same damage, too"
    if codec == "prores_ks":
        assert got == times


def test_lost_frames_are_the_one_before(kept, tmp_path):
    """In ProRes each frame stands for itself, so the loss is known exactly."""
    source = make_clip(tmp_path / "in/clip.mov", pictures(10, 120, 160, pan=5), "prores_ks", "yuv422p10le")
    data = bytearray(source.read_bytes())
    marks = [k for k in range(len(data)) if data[k : k + 4] == b"icpf"]
    for k in (0, 1, 5):
        data[marks[k] : marks[k] + 4] = b"xxxx"
    source.write_bytes(data)
    output, result = kept(source)
    assert result.faults == ["3 frames could not be read, the first of them number 1"]
    frames = [frame.astype(int) for frame in frames_of(output)]
    changes = [np.abs(b - a).mean() for a, b in zip(frames, frames[1:])]
    assert len(frames) == 10 and [k for k in range(9) if changes[k] < 3] == [0, 1, 4], changes
    assert [row["frame"] for row in result.rows] == [3, 4, 5, 7, 8, 9, 10]


@pytest.mark.parametrize("suffix", ["avi", "mkv", "ts", "mp4"])
def test_a_clip_cut_short_is_derained_and_reported(kept, tmp_path, suffix):
    base = {"avi": Fraction(1, 30), "mkv": MS, "ts": Fraction(1, 90000)}.get(suffix, BASE)
    codec = "mpeg4" if suffix == "avi" else "libx264"
    source = make_clip(tmp_path / f"in/clip.{suffix}", pictures(90), codec, base=base)
    if suffix == "mp4":  # with its index at the front, as for the web
        whole, source = source, tmp_path / "in/fast.mp4"
        copy_fast(whole, source)
    source.write_bytes(source.read_bytes()[: int(source.stat().st_size * (0.65 if suffix == "avi" else 0.4))])
    output, result = kept(source)
    text = "1 damaged frame, taken" if suffix == "ts" else "ends early"  # MPEG-TS declares no length
    assert any(text in fault for fault in result.faults), result.faults
    assert 10 < len(frames_of(output)) < 60


def test_what_is_wrong_with_a_video_is_reported_in_the_end(derain_clip, tmp_path):
    source = make_clip(tmp_path / "in/clip.mkv", base=MS, frames=pictures(60))
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 4])
    output, result = derain_clip(source, "--recurrent_iter", 1, status=1)
    assert result.err.startswith(f"test.py: error: {source}: the file ends early: after ")
    assert result.err.count("\n") == 1
    assert frames_of(output / "clip.mp4")


def copy_fast(source, target):
    options = {"movflags": "+faststart"}
    with av.open(str(source)) as first, av.open(str(target), "w", container_options=options) as second:
        stream = second.add_stream_from_template(first.streams.video[0], opaque=True)
        for packet in first.demux(video=0):
            if packet.size:
                packet.stream = stream
                second.mux(packet)


def test_what_is_no_video_is_named(refused, checkpoint, tmp_path):
    (tmp_path / "notes.txt").write_text("rain")
    make_clip(tmp_path / "other.ts", base=Fraction(1, 90000))
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nother.ts\n")
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile other.ts\n")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        tone(container)[1](0.1)
    for name in ("notes.txt", "missing.mp4", "sound.mp4", "list.m3u8", "list.ffconcat"):
        refused(
            "test", "--save_path", checkpoint, "--test_data_path", tmp_path / name, "--output_path", tmp_path / "out",
            names=["--test_data_path", tmp_path / name, "video"],
        )
    assert not (tmp_path / "out").exists()


def test_a_video_without_a_readable_frame_is_refused(kept, tmp_path):
    source = make_clip(tmp_path / "in/clip.mov", codec="prores_ks", kind="yuv422p10le")
    source.write_bytes(source.read_bytes().replace(b"icpf", b"xxxx"))
    with pytest.raises(InputError, match="no frame of this video can be read"):
        kept(source)
    assert not (tmp_path / "results").exists()


# Nothing else is overwritten


def test_the_input_is_not_overwritten(refused, kept, checkpoint, tmp_path):
    source = make_clip(tmp_path / "in/clip.mp4")
    before = contents(tmp_path / "in")
    arguments = ("test", "--save_path", checkpoint, "--output_path", tmp_path / "in", "--test_data_path")
    refused(*arguments, source, names=["--output_path", "clip.mp4"])
    assert contents(tmp_path / "in") == before
    result, _ = kept(source)
    with pytest.raises(InputError, match="would overwrite an input"):
        derain_video(result, result.parent, lambda frame: frame, VideoOptions())


@pytest.mark.parametrize("name", ["clip.mp4", "clip.csv"])
def test_what_others_made_is_not_overwritten(kept, tmp_path, name):
    source = make_clip(tmp_path / "in/clip.avi", codec="mpeg4", base=Fraction(1, 30))
    make_clip(tmp_path / "results/clip.mp4") if name == "clip.mp4" else save_text(tmp_path / "results/clip.csv")
    before = contents(tmp_path / "results")
    for overwrite in (True, False):
        with pytest.raises(InputError, match=f"--output_path .*results: {name} would be overwritten"):
            kept(source, overwrite=overwrite)
    assert contents(tmp_path / "results") == before


def save_text(path):
    path.parent.mkdir(parents=True)
    path.write_text("my,table\n1,2\n")


def test_a_result_is_kept_on_request(kept, tmp_path, capsys):
    source = make_clip(tmp_path / "in/clip.mp4")
    output, _ = kept(source)
    before = contents(output.parent)
    assert derain_video(source, output.parent, lambda frame: frame, VideoOptions(overwrite=False)) is None
    assert "is there already" in capsys.readouterr().out and contents(output.parent) == before
    for options in ({"crf": 30}, {"codec": "vp9"}, {"settings": {"weights": 1}}, {"frames": (1, 2)}):
        with pytest.raises(InputError, match="other options"):
            kept(source, overwrite=False, **options)
    make_clip(source, pictures(5))
    with pytest.raises(InputError, match="another source"):
        kept(source, overwrite=False)
    assert contents(output.parent) == before
    kept(source)
    assert len(frames_of(output)) == 5


CHILD = """
import sys, time
from pathlib import Path
from utils import run_script
from video import VideoOptions, derain_video

def derain(frame):
    time.sleep(float(sys.argv[3]))
    return frame

def main():
    options = VideoOptions(sys.argv[4], overwrite=False, at_once=int(sys.argv[5]))
    result = derain_video(Path(sys.argv[1]), Path(sys.argv[2]), derain, options)
    sys.exit(result and result.stopped and 128 + result.stopped)

run_script(main)
"""


def child(source, folder, seconds=0.0, codec="h264", at_once=0):
    """Derain a video in a process of its own, without the network; each frame takes so many seconds."""
    command = [sys.executable, "-c", CHILD, str(source), str(folder), str(seconds), codec, str(at_once)]

    def heed_signals():
        for number in STOP_SIGNALS:  # a job in the background would ignore Ctrl-C, and under nohup SIGHUP
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals
    )


def wait_for(condition, process):
    end = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def packets_done(folder):
    return sum(path.stat().st_size for path in folder.glob("*.packets"))


@pytest.mark.slow
def test_two_at_once_are_refused(kept, tmp_path):
    """The second is told, and the first is not disturbed."""
    source, folder = make_clip(tmp_path / "in/clip.mp4"), tmp_path / "results"
    process = child(source, folder, 0.2)
    wait_for(lambda: list(folder.glob("*.packets")), process)
    with pytest.raises(InputError, match="in use by process"):
        kept(source)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (out, err)
    assert len(frames_of(folder / "clip.mp4")) == 12 and set(contents(folder)) == {"clip.mp4"}


def test_a_source_beside_its_result_is_an_input_again(derain_clip, tmp_path):
    """Source and result share the table, and only the result carries the mark."""
    for name in ("IMG_1.mov", "IMG_2.mkv"):
        make_clip(tmp_path / "in" / name, pictures(3))
    before = contents(tmp_path / "in")
    for again in (False, True):
        _, result = derain_clip(tmp_path / "in", "--output_path", tmp_path / "in", "--recurrent_iter", 1)
        assert result.out.count("3 frames") == 2
        assert not again or "(results of an earlier run): IMG_1.mp4, IMG_2.mp4\n" in result.out
        assert contents(tmp_path / "in").items() >= before.items()


# Stopping and going on


def moving(frames=60):
    return pictures(frames, 48, 64, rain=False)


@pytest.mark.slow
@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("suffix, at_once", [("mp4", 0), ("mkv", 2)])
def test_a_stopped_video_is_playable_and_gone_on_with(kept, tmp_path, name, status, suffix, at_once):
    base = BASE if suffix == "mp4" else MS
    source = make_clip(tmp_path / f"in/clip.{suffix}", moving(), base=base, setup=add_company)
    folder = tmp_path / "results"
    process = child(source, folder, 0.05 * max(at_once, 1), at_once=at_once)
    wait_for(lambda: packets_done(folder) > 0, process)
    time.sleep(0.5)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, (out, err)
    assert set(contents(folder)) == {f"clip.{suffix}"}, "nothing temporary"
    output = folder / f"clip.{suffix}"
    done = len(frames_of(output))
    assert 1 <= done < 60 and times_of(output) == times_of(source)[:done]
    assert packets_of(output, 1) == packets_of(source, 1)[: len(packets_of(output, 1))]
    assert packets_of(output, 1)[-1][0] < times_of(source)[done]
    result = kept(source, overwrite=False)[1]
    assert [row["frame"] for row in result.rows] == list(range(done + 1, 61)), "the others are not derained again"
    assert times_of(output) == times_of(source) and describe(output) == describe(source)
    assert packets_of(output, 1) == packets_of(source, 1)
    assert_same_planes(source, output, 3)
    assert set(contents(folder)) == {f"clip.{suffix}"}


@pytest.mark.parametrize("codec", ["hevc", "vp9", "av1", "ffv1", "prores"])
def test_every_codec_is_gone_on_with(kept, tmp_path, codec):
    """Stopped twice, at chosen frames; the time stamps are of variable rate."""
    times = list(itertools.accumulate([0, *([512, 300, 700] * 13)]))
    source = make_clip(tmp_path / "in/clip.mp4", moving(40), times=times)
    for count in (9, 14, None):
        def derain(frame, frames=itertools.count(), count=count):
            if next(frames) == count:
                os.kill(os.getpid(), signal.SIGTERM)
            return frame

        output, result = kept(source, derain, codec=codec, overwrite=False)
        assert result.stopped == (signal.SIGTERM if count else 0)
        expected = {9: 9, 14: 23, None: 40}[count]
        assert len(frames_of(output)) == result.last == expected
    tick = MS if output.suffix == ".mkv" else 0
    assert all(abs(a - b) <= tick for a, b in zip(times_of(source), times_of(output), strict=True))
    for before, after in zip(frames_of(source), frames_of(output), strict=True):
        assert np.abs(before.astype(int) - after).mean() < 4


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path, capsys):
    """By Ctrl-C, SIGTERM or kill -9; after each, what is there is playable, and the same command goes on in the end."""
    source = make_clip(tmp_path / "in/clip.mp4", moving(), setup=add_company)
    random, folder, kills, left = np.random.default_rng(0), tmp_path / "results", 0, False
    for _ in range(THOROUGH):
        for _ in range(40):
            process = child(source, folder, 0.02)
            try:
                process.communicate(timeout=random.uniform(0.3, 1.5))
                break
            except subprocess.TimeoutExpired:
                pass
            kind = random.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
            process.send_signal(int(kind))
            _, err = process.communicate(timeout=60)
            kills += 1
            assert "Traceback" not in err or kind == signal.SIGINT and "in main" not in err, err  # while it imports
            left |= kind == signal.SIGKILL
            assert left or not folder.exists() or set(contents(folder)) <= {"clip.mp4"}, "only kill -9 leaves anything"
            if (folder / "clip.mp4").exists():
                done = len(frames_of(folder / "clip.mp4"))
                assert times_of(folder / "clip.mp4") == times_of(source)[:done]
        assert process.returncode == 0
        assert times_of(folder / "clip.mp4") == times_of(source) and set(contents(folder)) == {"clip.mp4"}
        assert_same_planes(source, folder / "clip.mp4", 3)
        (folder / "clip.mp4").unlink()
        left = False
    figure(capsys, f"videos: {kills} kills, each left a playable file or none, and {THOROUGH} videos were completed")


@pytest.mark.parametrize("count, error", [(0, None), (3, None), (3, RunError("no room for a feature map"))])
def test_a_finished_video_is_not_replaced_by_the_first_frames(
    derain_clip, kept, checkpoint, tmp_path, monkeypatch, count, error
):
    """The same command once more by mistake, and Ctrl-C; or a network that fails."""
    source, frames = make_clip(tmp_path / "in/clip.mp4"), itertools.count()
    output, _ = kept(source)
    (output.parent / "clip.csv").write_text(",".join(video.COLUMNS) + "\n")
    before = contents(output.parent)

    def derain(runner, frame, device):
        if next(frames) == count:
            if error:
                raise error
            os.kill(os.getpid(), signal.SIGINT)
        return frame, frame

    monkeypatch.setattr("test.derain", derain)
    _, result = derain_clip(source, status=1 if error else 130)
    assert error or f"stopped after frame {count}; the video that was there is kept\n" in result.out
    assert contents(output.parent) == before
    derain_clip(source, "--frames", "1:5")
    assert len(frames_of(output)) == 5, "another finished one replaces it"


def test_a_stopped_video_is_not_replaced_by_fewer_frames(derain_clip, kept, tmp_path, monkeypatch):
    """Of 9 frames, which --overwrite False would have gone on with, had it not been forgotten."""
    source, stop_at = make_clip(tmp_path / "in/clip.mp4", moving(20)), iter((9, 0, 3, 12))

    def stopping():
        frames, stop = itertools.count(), next(stop_at)

        def derain(frame):
            if next(frames) == stop:
                os.kill(os.getpid(), signal.SIGINT)
            return frame

        return derain

    output, _ = kept(source, stopping())
    before = contents(output.parent)
    for _ in range(2):
        assert kept(source, stopping())[1].kept
        assert contents(output.parent) == before
    assert not kept(source, stopping())[1].kept and len(frames_of(output)) == 12


def test_the_frames_of_a_killed_run_are_not_dropped_for_other_options(kept, tmp_path):
    source, folder = make_clip(tmp_path / "in/clip.mp4", moving()), tmp_path / "results"
    process = child(source, folder, 0.05)
    wait_for(lambda: packets_done(folder) > 1000, process)
    process.kill()
    process.communicate()
    before = contents(folder)
    with pytest.raises(InputError, match="other options .crf.; expected the same, or --overwrite True"):
        kept(source, overwrite=False, crf=30)
    assert contents(folder) == before
    result = kept(source, overwrite=False)[1]
    assert result.last == 60 and len(result.rows) < 60 and set(contents(folder)) == {"clip.mp4"}


def test_stopped_before_the_first_frame_leaves_nothing(tmp_path):
    source, folder = make_clip(tmp_path / "in/clip.mp4"), tmp_path / "results"
    process = child(source, folder, 30)
    wait_for(lambda: list(folder.glob("*.packets")), process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and not folder.exists(), (out, err)


@pytest.mark.parametrize("at_once", [0, 1])
@pytest.mark.parametrize("error, raised", [
    (RunError("no room for a feature map"), RunError), (MemoryError("no room"), MemoryError),
    (OSError(errno.ENOMEM, "no room"), RunError), (FileNotFoundError("no room for temporary files"), RunError),
], ids=repr)
def test_a_failing_network_leaves_what_is_done(kept, tmp_path, at_once, error, raised):
    """It may be for want of memory, hours after the start."""
    source = make_clip(tmp_path / "in/clip.mp4", moving(20))
    frames = itertools.count()

    def derain(frame):
        if next(frames) == 7:
            raise error
        return frame

    with pytest.raises(raised, match="no room"):
        kept(source, derain, at_once=at_once)
    assert len(frames_of(tmp_path / "results/clip.mp4")) == 7
    output, result = kept(source, overwrite=False)
    assert len(result.rows) == 13 and len(frames_of(output)) == 20


@pytest.mark.parametrize("fails_again", [False, True])
def test_a_failing_encoder_leaves_what_is_done(kept, tmp_path, monkeypatch, fails_again):
    source = make_clip(tmp_path / "in/clip.mp4", moving(20))
    start, frames = video_output.VideoWriter.__init__, itertools.count()

    class Encoder:
        def __init__(self, encoder):
            self.encoder = encoder

        def encode(self, picture):
            if next(frames) == 7 or fails_again and picture is None:
                raise av.error.ExternalError(0, "no room")
            return self.encoder.encode(picture)

    def start_failing(writer, *arguments):
        start(writer, *arguments)
        writer.encoder = Encoder(writer.encoder)

    with monkeypatch.context() as patch:
        patch.setattr(video_output.VideoWriter, "__init__", start_failing)
        with pytest.raises(RunError, match="clip.mp4: could not be encoded"):
            kept(source)
    output, result = kept(source, overwrite=False)
    assert len(frames_of(output)) == 20 and len(result.rows) == (20 if fails_again else 13)


def test_want_of_memory_for_one_video_costs_no_other(derain_clip, tmp_path, monkeypatch):
    for name, width in (("a", 64), ("b", 96)):
        make_clip(tmp_path / f"in/{name}.mp4", [np.zeros((48, width, 3), np.uint8)] * 3)

    def derain(runner, frame, device):
        if frame.shape[1] == 64:
            raise MemoryError
        return frame, frame

    monkeypatch.setattr("test.derain", derain)
    output, result = derain_clip(tmp_path / "in", status=1)
    assert "a.mp4: frame 1 could not be derained (not enough memory (MemoryError))" in result.out
    assert result.err.endswith("1 of 2 files failed: a.mp4\n")
    assert len(frames_of(output / "b.mp4")) == 3


def test_a_signal_while_a_finished_video_is_written_ends_the_run_after_it(derain_clip, tmp_path, monkeypatch):
    for name in ("a", "b"):
        make_clip(tmp_path / f"in/{name}.mp4")
    monkeypatch.setattr(video_input.VideoFile, "describe_faults", lambda *_: ["cut short"])
    finish = video_output.VideoWriter.finish

    def slow_finish(writer, complete):
        os.kill(os.getpid(), signal.SIGTERM)
        finish(writer, complete)

    monkeypatch.setattr(video_output.VideoWriter, "finish", slow_finish)
    monkeypatch.setattr("test.derain", lambda runner, frame, device: (frame, frame))
    output, result = derain_clip(tmp_path / "in", status=143)
    assert set(contents(output)) == {"a.mp4", "a.csv"}
    assert "finished already\n" in result.out and "a.mp4: cut short" in result.out


def test_videos_of_one_stem_have_results_of_their_own(derain_clip, tmp_path, monkeypatch):
    """Cameras leave a small .LRV beside each .MP4."""
    for name in ("G1.mp4", "G2.mp4", "..mp4"):
        make_clip(tmp_path / "in/clip.mp4").rename(tmp_path / "in" / name)
    (tmp_path / "in/G1.LRV").write_bytes((tmp_path / "in/G1.mp4").read_bytes())
    monkeypatch.setattr("test.derain", lambda runner, frame, device: (frame, frame))
    output, _ = derain_clip(tmp_path / "in")
    stems = ("G1.mp4", "G1.LRV", "G2", Path("..mp4").stem)
    assert set(contents(output)) == {f"{stem}.{suffix}" for stem in stems for suffix in ("mp4", "csv")}


def test_a_quality_that_the_codec_has_not_is_refused_before_the_pictures(refused, checkpoint, tmp_path):
    make_clip(tmp_path / "in/clip.mp4")
    save(tmp_path / "in/photo.png", photo(1, 12, 12))
    for options in (("--crf", 60), ("--codec", "prores", "--crf", 5)):
        arguments = "--save_path", checkpoint, "--test_data_path", tmp_path / "in", "--output_path", tmp_path / "out"
        refused("test", *arguments, *options, names=["--crf"])
    assert not (tmp_path / "out").exists()


def test_numbered_pictures_beside_another_path_are_a_video(run, checkpoint, tmp_path, monkeypatch):
    for number in range(3):
        save(tmp_path / f"frames/f_{number:03d}.png", photo(number, 48, 64))
    paths = tmp_path / "frames/f_%03d.png", make_clip(tmp_path / "clip.mp4")
    monkeypatch.setattr("test.derain", lambda runner, frame, device: (frame, frame))
    result = run("test", "--save_path", checkpoint, "--test_data_path", *paths, "--output_path", tmp_path / "out")
    assert result.status == 0, result
    assert {os.path.basename(name) for name in contents(tmp_path / "out")} == {"f.mp4", "f.csv", "clip.mp4", "clip.csv"}


def test_frames_that_are_derained_at_once_stay_in_order(kept, tmp_path):
    """Each takes less time than the one before, and three threads are at work."""
    greys = range(20, 140, 10)
    source = make_clip(tmp_path / "in/clip.mp4", [np.full((48, 64, 3), grey, np.uint8) for grey in greys])
    busy, most = [], []

    def derain(frame):
        busy.append(frame)
        most.append(len(busy))
        time.sleep(0.05 / len(most))
        busy.pop()
        return 255 - frame

    output, result = kept(source, derain, at_once=3)
    assert max(most) == 3 and [row["frame"] for row in result.rows] == list(range(1, 13))
    assert [frame.mean() for frame in frames_of(output)] == pytest.approx([255 - grey for grey in greys], abs=2)


@pytest.mark.slow
def test_the_report_covers_earlier_runs(derain_clip, checkpoint, tmp_path):
    """In a process of its own, as a person runs it."""
    source = make_clip(tmp_path / "in/clip.mp4", moving(100))
    folder = tmp_path / "results"
    process = run_subprocess(
        "test.py", "--save_path", checkpoint, "--test_data_path", source, "--output_path", folder, "--device", "cpu",
    )
    wait_for(lambda: packets_done(folder) > 1000, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    done = len(frames_of(folder / "clip.mp4"))
    assert process.returncode == 143 and f"stopped after frame {done}; the same command" in out, err
    _, result = derain_clip(source, "--overwrite", False)
    assert f"going on after frame {done}" in result.out and "100 frames" in result.out
    with open(folder / "clip.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["frame"] for row in rows] == [*map(str, range(1, 101)), "average of 100"]


@pytest.mark.parametrize("size", ["16k", "48k", "64k"])
def test_a_full_disk_keeps_the_earlier_result(kept, small_disk, tmp_path, monkeypatch, size):
    """While the packets are written, and while they are joined."""
    disk = small_disk(size)
    small = make_clip(tmp_path / "in/clip.mp4", pictures(2, rain=False), options={"crf": "40"})
    derain_video(small, disk, lambda frame: frame, VideoOptions(crf=51))
    before = contents(disk)
    make_clip(small, pictures(30, 128, 192))
    with pytest.raises(RunError, match=f"{disk / 'clip.mp4'}: could not be written .No space left on device"):
        derain_video(small, disk, lambda frame: frame, VideoOptions())
    assert contents(disk) == before


@pytest.mark.slow
def test_a_full_disk_in_one_sentence(refused, checkpoint, small_disk, tmp_path):
    source, disk = make_clip(tmp_path / "in/clip.mp4", pictures(30, 128, 192)), small_disk("48k")
    refused(
        "test", "--save_path", checkpoint, "--recurrent_iter", 1, "--test_data_path", source, "--output_path", disk,
        status=1, names=[disk / "clip.mp4", "No space left"],
    )
    assert [name[-8:] for name in contents(disk)] == [".packets"]


@pytest.mark.parametrize("room", [0.5, 1.5])
def test_the_frames_that_a_full_disk_has_room_for_are_gone_on_with(kept, small_disk, tmp_path, capsys, room):
    """Where the packets have no room, and where they have but the joined file has not."""
    source, frames = make_clip(tmp_path / "in/clip.mp4", pictures(30, 128, 192)), []
    size = kept(source)[0].stat().st_size
    disk = small_disk(f"{int(room * size) // 1024}k")
    for again in (False, True):  # without room, the second run changes nothing
        with pytest.raises(RunError, match=f"{disk / 'clip.mp4'}: could not be written .No space left on device"):
            derain_video(source, disk, lambda frame: frame, VideoOptions(overwrite=not again))
        out = capsys.readouterr().out
        assert "kept, from which --overwrite False goes on" in out and (not again or "going on after frame" in out)
        assert [name[-8:] for name in contents(disk)] == [".packets"]
    subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
    result = derain_video(source, disk, lambda frame: frames.append(frame) or frame, VideoOptions(overwrite=False))
    assert result.last == 30 and len(frames) < 30 and (room < 1 or not frames)
    assert set(contents(disk)) == {"clip.mp4"}
    assert_same_planes(source, disk / "clip.mp4", 3)


# Parts and pictures


def test_a_part_for_a_quick_look(kept, tmp_path):
    source = make_clip(tmp_path / "in/clip.mp4", moving(), setup=add_company)
    output, result = kept(source, frames=(31, 45))
    first = times_of(source)[30]
    assert times_of(output) == [time - first for time in times_of(source)[30:45]]
    assert [row["frame"] for row in result.rows] == list(range(31, 46)) and result.last == 45
    sounds = [data for time, data in packets_of(source, 1) if first <= time < times_of(source)[45]]
    assert [data for _, data in packets_of(output, 1)] == sounds and packets_of(output, 1)[0][0] < 0.03
    assert_same_frames(frames_of(source)[30:45], frames_of(output))
    output, result = kept(source, frames=(1, 3))
    assert times_of(output) == times_of(source)[:3] and len(packets_of(output, 2)) < 7
    output, result = kept(source, frames=(55, 99))
    assert result.last == 60 and len(times_of(output)) == 6
    with pytest.raises(InputError, match="--frames 61:70: no such frames"):
        kept(source, frames=(61, 70))


def assert_same_frames(first, second, bound=4):
    for before, after in zip(first, second, strict=True):
        assert np.abs(before.astype(int) - after).mean() < bound


@pytest.mark.parametrize("text", ["5", "0:3", "4:3", "a:b", "1:", "-1:3"])
def test_frames_that_are_no_range_are_refused(refused, tmp_path, text):
    refused("test", "--test_data_path", tmp_path, f"--frames={text}", names=["--frames", "A:B"])


def test_a_part_that_goes_beyond_the_end_is_said(derain_clip, tmp_path):
    source = make_clip(tmp_path / "in/clip.mp4", pictures(4))
    for frames, said in (("3:9", True), ("3:4", False)):
        _, result = derain_clip(source, "--frames", frames, "--recurrent_iter", 1)
        assert (f"--frames 3:9: {source} ends with frame 4\n" in result.out) == said and "2 frames" in result.out


@pytest.mark.parametrize("option", ["--codec", "--crf", "--frames"])
def test_options_of_videos_are_refused_for_pictures(refused, checkpoint, tmp_path, option):
    save(tmp_path / "in/a.png", photo(1))
    for path in (tmp_path / "in", tmp_path / "in/a.png"):
        value = {"--codec": "h264", "--crf": 3, "--frames": "1:2"}[option]
        refused(
            "test", "--save_path", checkpoint, "--test_data_path", path, option, value, names=[option, path, "video"]
        )


@pytest.mark.parametrize("codec, crf", [("h264", 52), ("vp9", 64), ("ffv1", 3), ("prores", 3)])
def test_a_quality_that_the_codec_does_not_have_is_refused(refused, checkpoint, tmp_path, codec, crf):
    source = make_clip(tmp_path / "in/clip.mp4", pictures(2))
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", source, "--output_path", tmp_path / "out",
        "--codec", codec, "--crf", crf, names=[f"--crf {crf}", f"--codec {codec}"],
    )


def test_the_quality_is_that_of_crf(kept, tmp_path):
    source = make_clip(tmp_path / "in/clip.mp4")
    sizes = [kept(source, crf=crf)[0].stat().st_size for crf in (4, None, 40)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[2]


def test_numbered_pictures_are_a_video(derain_clip, tmp_path):
    """In the order of their numbers, gaps included; a bad one is the one before once more."""
    for number, frame in zip((2, 3, 7, 10, 100), pictures(5, pan=4)):
        save(tmp_path / f"in/frame_{number:05d}.png", frame)
    save(tmp_path / "in/other_00001.png", photo(1))
    (tmp_path / "in/frame_00007.png").write_bytes(b"no picture")
    output, result = derain_clip(tmp_path / "in/frame_%05d.png", "--crf", 4, status=1)
    assert "1 frame could not be read, the first of them number 3" in result.err
    assert set(contents(output)) == {"frame.mp4", "frame.csv"}
    assert times_of(output / "frame.mp4") == [Fraction(k, 25) for k in range(5)]


def test_numbered_pictures_of_16_bits(kept, tmp_path):
    for number, frame in enumerate(pictures(3)):
        save(tmp_path / f"in/{number}.png", 257 * frame.astype(np.uint16))
    seen = []
    output, _ = kept(tmp_path / "in/%d.png", lambda frame: seen.append(frame) or frame)
    assert output.name == "in.mp4" and seen[0].dtype == np.uint16
    assert np.array_equal(seen[1], 257 * list(pictures(3))[1].astype(np.uint16))
    with av.open(str(output)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv444p10le"


def test_a_pattern_without_pictures_is_refused(refused, checkpoint, tmp_path):
    refused(
        "test", "--save_path", checkpoint, "--test_data_path", tmp_path / "frame_%05d.png", "--output_path",
        tmp_path / "out", names=[tmp_path / "frame_%05d.png", "no pictures"],
    )


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


# What others have reported, in ../shared/cases


@pytest.mark.parametrize("name", ["vfr.mp4", "phone_vfr.mp4"])
def test_case_of_variable_frame_rate(shared, kept, name):
    source = shared / "cases/video_vfr" / name
    output, _ = kept(source)
    assert times_of(output) == times_of(source) and packets_of(output, 1) == packets_of(source, 1)


def test_case_of_pixels_that_are_not_square(shared, kept):
    output, _ = kept(shared / "cases/video_anamorphic/sar.mp4")
    with av.open(str(output)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)


@pytest.mark.slow
def test_case_of_colours(shared, kept):
    """Bars in H.264 as in the source, tagged; the grey one is neutral."""
    source = shared / "cases/video_colour/bars.mkv"
    output, _ = kept(source)
    with av.open(str(output)) as container:
        context = container.streams.video[0].codec_context
        assert context.name == "h264" and (context.colorspace, context.color_range) == (1, 1)
    around = np.ones((33, 33), np.uint8)
    for before, after in zip(frames_of(source), frames_of(output), strict=True):
        flat = (cv2.dilate(before, around) == cv2.erode(before, around)).all(axis=2)
        grey = flat & (np.ptp(before, axis=2) <= 1)
        assert grey.mean() > 0.02 and np.ptp(after, axis=2)[grey].max() <= 1
        assert np.abs(before.astype(int) - after)[flat].max() <= 2 and np.abs(before.astype(int) - after).mean() < 0.5
    assert_same_times(source, output)


def test_case_of_two_sounds_and_subtitles(shared, kept):
    source = shared / "cases/video_subtitles/twoaudio.mkv"
    output, _ = kept(source)
    assert describe(output) == describe(source) and output.suffix == ".mkv"
    for index in (1, 2, 3):
        assert packets_of(output, index) == packets_of(source, index)
    with av.open(str(output)) as container:
        assert container.metadata["title"] == "TT"


@pytest.mark.slow
def test_case_of_a_video_that_is_stopped(shared, kept, tmp_path):
    source, folder = shared / "cases/video_sigterm/long.mp4", tmp_path / "results"
    process = child(source, folder, 0.01)
    wait_for(lambda: packets_done(folder) > 10000, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and set(contents(folder)) == {"long.mp4"}
    done = len(frames_of(folder / "long.mp4"))
    output, result = kept(source, overwrite=False)
    assert 0 < done < 400 and len(result.rows) == 400 - done and times_of(output) == times_of(source)


def test_case_of_a_neighbour_of_the_same_name(shared, refused, checkpoint, tmp_path):
    shutil.copytree(shared / "cases/overwrites_neighbour/videos", tmp_path / "videos")
    before = contents(tmp_path / "videos")
    for output in (tmp_path / "videos", f"{tmp_path}/videos/../videos"):
        refused(
            "test", "--save_path", checkpoint, "--test_data_path", tmp_path / "videos/a.ts", "--output_path", output,
            names=["--output_path", "a.mp4"],
        )
    assert contents(tmp_path / "videos") == before


# In a browser

PAGE = b"""<video id=v src=video muted></video><script>
const v = document.getElementById('v');
const send = result => fetch('result', {method: 'POST', body: JSON.stringify(result)});
v.onerror = () => send({error: v.error.message});
v.onended = () => {
  const c = document.createElement('canvas'), g = c.getContext('2d');
  c.width = v.videoWidth, c.height = v.videoHeight;
  g.drawImage(v, 0, 0);
  const pixel = [...g.getImageData(c.width / 2, c.height / 2, 1, 1).data];
  const frames = v.getVideoPlaybackQuality().totalVideoFrames;
  send({size: [c.width, c.height], duration: v.duration, time: v.currentTime, frames, pixel});
};
v.play();
</script>"""


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """Play a video to its end in headless Chromium, from a server here: play(path) -> what the page says of it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("there is no chromium on the PATH to play the result with")

    def start(path):
        said, answered = {}, threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self, kind, body):
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                self.answer("text/html", PAGE) if self.path == "/" else self.answer("video/mp4", path.read_bytes())

            def do_POST(self):
                said.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.answer("text/plain", b"")
                answered.set()

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
            "--autoplay-policy=no-user-gesture-required", f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
            f"http://127.0.0.1:{server.server_port}/",
        ]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, start_new_session=True, **quiet)
        try:
            assert answered.wait(60), "Chromium says nothing"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)
            server.shutdown()
        return said

    return start


@pytest.mark.slow
@pytest.mark.parametrize("codec, size, kind", [
    ("h264", (48, 64), "yuv420p"), ("h264", (49, 65), "yuv444p"), ("h264", (48, 64), "yuv420p10le"),
    ("vp9", (48, 64), "yuv420p"), ("av1", (48, 64), "yuv420p"),
])
def test_a_browser_plays_the_result(kept, play, tmp_path, codec, size, kind):
    """All of it, in its size, and grey stays grey."""
    def add_sound(container, stream):
        _, write = tone(container)
        return lambda: write(1)

    deep = kind.endswith("le")
    grey = np.full((*size, 3), 128 * (257 if deep else 1), np.uint16 if deep else np.uint8)
    source = make_clip(tmp_path / "in/clip.mp4", [grey] * 30, kind=kind, setup=add_sound)
    output, _ = kept(source, codec=codec)
    said = play(output)
    assert said["size"] == [size[1], size[0]] and said["frames"] >= 25, said
    assert said["duration"] == said["time"] == pytest.approx(1, abs=0.05)
    assert said["pixel"][3] == 255 and all(abs(value - 128) <= 1 for value in said["pixel"][:3]), said


# What the output cannot keep is told


def notes(kept, source, capsys, **options):
    """(output, its result, what was printed)."""
    output, result = kept(source, **options)
    return output, result, capsys.readouterr().out


@pytest.mark.parametrize("suffix, turn", [("avi", None), ("mov", 90), ("mov", -90), ("mov", 180)])
def test_frames_with_exif_are_derained_and_turned(kept, tmp_path, suffix, turn):
    """FFmpeg hands on the EXIF of Motion JPEG, which PyAV does not know; Pi cameras write such."""
    exif = Image.Exif()
    exif[0x0110] = "camera"
    path = tmp_path / f"clip.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 64, 48, "yuvj420p", Fraction(1, 25)
        if turn:
            cosine, sine = round(2**16 * np.cos(np.radians(turn))), round(2**16 * np.sin(np.radians(turn)))
            stream.set_display_matrix((cosine, -sine, 0, sine, cosine, 0, 0, 0, 2**30))
        for number, frame in enumerate(pictures(4)):
            data = io.BytesIO()
            Image.fromarray(frame).save(data, "JPEG", exif=exif)
            packet = av.Packet(data.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 25)
            packet.is_keyframe = True
            container.mux(packet)
    output, _ = kept(path)
    with av.open(str(path)) as before, av.open(str(output)) as after:
        first, second = next(before.decode(video=0)), next(after.decode(video=0))
        assert first.rotation % 360 == second.rotation % 360 == (turn or 0) % 360
        with pytest.raises(ValueError):  # else this tests nothing
            print(first.side_data)
    assert len(frames_of(output)) == 4


@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_s24le", "pcm_f32le"])
@pytest.mark.parametrize("suffix", ["avi", "mkv"])
def test_samples_of_two_channels_without_places_go_into_matroska(kept, tmp_path, codec, suffix):
    """MP4 would refuse them when all frames are done."""
    def add_sound(container, stream):
        sound = container.add_stream(codec, rate=8000, layout="stereo")

        def write():
            kind = sound.codec_context.format.name
            values = np.zeros((1, 8000), np.float32 if kind == "flt" else np.int32 if kind == "s32" else np.int16)
            frame = av.AudioFrame.from_ndarray(values, kind, "stereo")
            frame.sample_rate, frame.pts, frame.time_base = 8000, 0, Fraction(1, 8000)
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))

        return write

    source = make_clip(tmp_path / f"clip.{suffix}", setup=add_sound)
    output, _ = kept(source)
    assert codec != "pcm_s16le" or output.suffix == ".mkv"
    assert b"".join(data for _, data in packets_of(output, 1)) == b"".join(data for _, data in packets_of(source, 1))


def test_metadata_are_left_out_where_that_is_wanted(kept, tmp_path):
    def add_place(container, stream):
        container.metadata.update({"location": "+48.8577+002.2950/", "title": "home", "creation_time": "2026-01-01"})
        stream.metadata["language"] = "fra"
        _, write = tone(container)
        return lambda: write(0.4)

    source = make_clip(tmp_path / "in/clip.mp4", setup=add_place)
    texts = {}
    for wanted in (True, False):
        output, _ = kept(source, metadata=wanted)
        with av.open(str(output)) as container:
            texts[wanted] = {**container.metadata, **container.streams.video[0].metadata}
        assert packets_of(output, 1) == packets_of(source, 1)
    assert texts[True]["location"].startswith("+48.8577") and texts[True]["title"] == "home"
    assert not {"location", "title", "creation_time"} & texts[False].keys() and texts[False]["language"] == "fra"


def with_captions(path, source):
    """Copy an H.264 video and put captions of CEA-608 before each frame (ATSC A/53, part 4)."""
    pairs = b"\xb5\x00\x31GA94\x03\x41\xff\xfc\xc8\xc5\xff"
    captions = bytes([6, 4, len(pairs)]) + pairs + b"\x80"
    with av.open(str(source)) as before, av.open(str(path), "w") as after:
        stream = before.streams.video[0]
        target = after.add_stream_from_template(stream)
        for packet in before.demux(stream):
            if packet.size:
                copy = av.Packet(len(captions).to_bytes(4, "big") + captions + bytes(packet))
                copy.pts, copy.dts, copy.time_base, copy.is_keyframe, copy.stream = (
                    packet.pts, packet.dts, packet.time_base, packet.is_keyframe, target
                )
                after.mux(copy)
    return path


def test_captions_within_the_pictures_are_named(kept, tmp_path, capsys):
    source = make_clip(tmp_path / "clip.mp4")
    _, result, out = notes(kept, with_captions(tmp_path / "captions.mp4", source), capsys)
    assert "captions.mp4: the closed captions within the pictures are left out\n" in out
    assert "captions" not in notes(kept, source, capsys)[2]


def test_transparency_that_the_decoder_leaves_out_is_named(kept, tmp_path, capsys):
    """FFmpeg's decoder of VP9, unlike that of libvpx."""
    source = make_clip(tmp_path / "clip.webm", pictures(3), "libvpx-vp9", "yuva420p", base=MS)
    output, _, out = notes(kept, source, capsys, codec="ffv1")
    assert "the transparency of the frames is left out" in out
    with av.open(str(output)) as container:
        assert "alpha_mode" not in {name.lower() for name in container.streams.video[0].metadata}


@pytest.mark.parametrize("suffix, codec", [("flv", "flv1"), ("mxf", "mpeg2video")])
def test_a_cut_file_that_declares_its_length_is_told(derain_clip, tmp_path, suffix, codec):
    source = make_clip(tmp_path / f"clip.{suffix}", moving(60), codec, base=Fraction(1, 30))
    derain_clip(source)
    source.write_bytes(source.read_bytes()[: int(0.6 * source.stat().st_size)])
    _, result = derain_clip(source, status=1)
    assert "the file ends early" in result.err


def test_a_second_video_is_named_as_it_keeps_its_rain(kept, tmp_path, capsys):
    def add_second(container, stream):
        other = container.add_stream("libx264", rate=30)
        other.width, other.height, other.pix_fmt = 64, 48, "yuv420p"

        def write():
            for frame in pictures(3):
                container.mux(other.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(other.encode(None))

        return write

    output, _, out = notes(kept, make_clip(tmp_path / "clip.mkv", base=MS, setup=add_second), capsys)
    assert "#1 (video, h264) is another video, copied with its rain" in out and len(describe(output)) == 2


def test_titles_of_tracks_are_kept(kept, tmp_path):
    """FFmpeg reads MP4's names of tracks under another key than it writes them from."""
    def name_them(container, stream):
        sound, write = tone(container)
        stream.metadata["title"], sound.metadata["title"] = "Camera 1", "Director's commentary"
        return lambda: write(0.4)

    output, _ = kept(make_clip(tmp_path / "clip.mp4", setup=name_them))
    with av.open(str(output)) as container:
        texts = [list(stream.metadata.values()) for stream in container.streams]
    assert "Camera 1" in texts[0] and "Director's commentary" in texts[1]


def test_a_profile_and_transparency_of_numbered_pictures_are_named(kept, tmp_path, capsys):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for number, frame in enumerate(pictures(3), 1):
        image = Image.fromarray(np.dstack((frame, frame[..., :1])))
        image.save(tmp_path / f"f{number}.png", icc_profile=profile)
    _, _, out = notes(kept, tmp_path / "f%d.png", capsys)
    assert "the transparency of the frames is left out" in out and "the pictures' colour profile is left out" in out


def test_frames_with_other_colours_than_the_first_are_told(derain_clip, tmp_path):
    """Two bare streams of H.264, one after the other: the first in BT.601, the second in BT.709."""
    parts = []
    for number, matrix in enumerate((6, 1)):
        part = make_clip(tmp_path / f"{number}.h264", moving(6), colorspace=matrix, options={"bf": "0"})
        parts.append(part.read_bytes())
    source = tmp_path / "in/both.h264"
    source.parent.mkdir()
    source.write_bytes(b"".join(parts))
    _, result = derain_clip(source, status=1)
    assert "6 frames coded with other colours than the first, which they are taken to have too" in result.err
    assert "the first of them number 7" in result.err


def test_a_reader_that_goes_away_is_not_blamed_on_the_video(checkpoint, tmp_path):
    source, folder = make_clip(tmp_path / "clip.mp4", moving(100)), tmp_path / "results"
    process = run_subprocess(
        "test.py", "--save_path", checkpoint, "--test_data_path", source, "--output_path", folder, "--device", "cpu",
    )
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 1 and error.endswith("test.py: error: stopped, as what it printed is no longer read\n")
    assert not list(folder.glob("*.packets"))


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(InputError, match="pipe.mp4: a pipe; expected a file, as it is read more than once"):
        video_input.open_source(tmp_path / "pipe.mp4")


def test_a_source_that_is_gone_leaves_what_is_done(kept, tmp_path, capsys):
    source = make_clip(tmp_path / "clip.mp4", setup=add_company)
    away = source.with_name("away.mp4")

    def derain(frame):
        if source.exists():
            source.rename(away)
        return frame

    with pytest.raises(InputError, match="clip.mp4: "):
        kept(source, derain)
    assert "clip.mp4: 12 frames kept, from which --overwrite False goes on\n" in capsys.readouterr().out
    away.rename(source)
    output, result = kept(source, overwrite=False)
    assert not result.rows and len(frames_of(output)) == 12


def test_a_link_that_leads_nowhere_is_not_replaced(kept, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/clip.mp4").symlink_to("nowhere")
    with pytest.raises(InputError, match="clip.mp4 would be overwritten"):
        kept(make_clip(tmp_path / "clip.mp4"))
    assert (tmp_path / "results/clip.mp4").is_symlink()


def test_chapters_that_mark_a_moment_are_kept(kept, tmp_path):
    marks = [{"id": k, "start": start, "end": start, "time_base": MS, "metadata": {"title": f"mark {k}"}}
             for k, start in enumerate((0, 100, 200), 1)]
    source = make_clip(tmp_path / "clip.mkv", base=MS, setup=lambda container, _: container.set_chapters(marks))
    output, _ = kept(source, codec="ffv1")
    with av.open(str(source)) as before, av.open(str(output)) as after:
        assert [chapter["start"] for chapter in before.chapters()] == [chapter["start"] for chapter in after.chapters()]
        assert len(after.chapters()) == 3


@pytest.mark.parametrize("sound_is_longer", [0.3, -0.3])
def test_recordings_one_after_the_other_keep_sound_and_picture_together(kept, tmp_path, sound_is_longer):
    """As by cat a.ts b.ts: each begins anew with its own clock, and its sound is longer or shorter than its picture."""
    def add_sound(container, stream):
        _, write = tone(container, "mp2")
        return lambda: write(1.6 + sound_is_longer)

    parts = [make_clip(tmp_path / f"{number}.ts", moving(48), setup=add_sound).read_bytes() for number in range(4)]
    source = tmp_path / "clip.ts"
    source.write_bytes(b"".join(parts))
    output, _ = kept(source)
    sounds, times = [time for time, _ in packets_of(output, 1)], times_of(output)
    assert len(times) == 4 * 48
    apart = [sounds[number * len(sounds) // 4] - times[number * 48] for number in range(4)]
    assert max(apart) - min(apart) < 0.05
    assert times[48] - times[0] == pytest.approx(max(1.6, 1.6 + sound_is_longer), abs=0.1)
