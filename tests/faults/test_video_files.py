"""Damaged and hostile videos: thousands of mutants through ``derain_video``, each derained or refused by name."""
import shutil
from fractions import Fraction
from functools import partial

import pytest

from conftest import THOROUGH
from test_files import check
from test_video import BASE, MS, add_company, make_clip, pictures
from utils import InputError
from video import VideoOptions, derain_video

# Name, which decides the container; codec; pixel format; time base; whether sounds, subtitles and chapters lie beside.
SEEDS = (
    ("h264.mp4", "libx264", "yuv420p", BASE, True), ("h264.mkv", "libx264", "yuv420p10le", MS, True),
    ("h264.ts", "libx264", "yuv420p", Fraction(1, 90000), False), ("hevc.mp4", "libx265", "yuv420p", BASE, False),
    ("vp9.webm", "libvpx-vp9", "yuv420p", MS, False), ("prores.mov", "prores_ks", "yuv422p10le", BASE, False),
    ("mpeg4.avi", "mpeg4", "yuv420p", Fraction(1, 30), False),
    ("mjpeg.avi", "mjpeg", "yuvj420p", Fraction(1, 30), False), ("ffv1.mkv", "ffv1", "yuv444p", MS, False),
    ("av1.mp4", "libsvtav1", "yuv420p", BASE, False), ("clip.gif", "gif", "rgb8", Fraction(1, 100), False),
)


def make_videos(folder, chosen):
    seeds, good = {}, {}
    for name, codec, kind, base, company in chosen:
        options = {"libx265": {"x265-params": "log-level=none"}, "libx264": {"crf": "30", "g": "3"}}.get(codec, {})
        path = make_clip(
            folder / "seeds" / name, pictures(6), codec, kind, base=base, options=options,
            setup=add_company if company else None,
        )
        seeds[name] = path.read_bytes()

    def read(path):
        shutil.rmtree(folder / "out", ignore_errors=True)
        try:
            result = derain_video(path, folder / "out", lambda frame: frame, VideoOptions(crf=40))
        except InputError as error:
            raise InputError(str(error).removeprefix("--test_data_path ")) from None
        assert result.output.stat().st_size and not list((folder / "out").glob("*.packets"))
        return result.last, result.faults

    for name, data in seeds.items():
        (folder / "seed").write_bytes(data)
        good[name] = read(folder / "seed")
        assert good[name] == (6, []), (name, good[name])
    return seeds, read, lambda name, result: result == good[name]


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_mutated_videos(tmp_path, capsys, half):
    """THOROUGH=10 tries 4,000."""
    check(tmp_path, capsys, f"videos, half {half}", 200 * THOROUGH, 2000, partial(make_videos, chosen=SEEDS[half::2]))
