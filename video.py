"""Derain a video frame by frame: same size, frame rate and number of frames, with the sound where ffmpeg is at hand.

    python test.py --test_data_path clip.mp4 --output_path results/clip

test.py runs it where --test_data_path is a video, any that OpenCV reads.
"""
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from utils import InputError, RunError, printable, progress

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is damaged is reported here, in one line
MAX_LOST = 250  # more frames in a row that cannot be read are taken for the end, whatever the header declares
STATIC_CHANGE = 3  # grey levels by which a pixel that stands still may change once the streaks are filtered out
STREAK_FILTER = 15  # px, the side of the median filter that takes the streaks out


def open_video(path):
    """An OpenCV capture on a video file.

    Raises:
        InputError: OpenCV cannot read it.
    """
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened() or capture.get(cv2.CAP_PROP_FRAME_WIDTH) < 2:
        raise InputError(f"--test_data_path {path}: neither an image nor a video that OpenCV reads")
    return capture


def read_frames(capture):
    """Yield a video's frames, (H, W, 3) uint8 RGB, and None for each that is lost before others that are not."""
    lost = 0
    while lost <= MAX_LOST:
        ok, frame = capture.read()
        if ok:
            yield from [None] * lost
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            lost = 0
        else:
            lost += 1


class Flicker:
    """How much the static regions of a video change from frame to frame, before and after deraining.

    A pixel is static where the grey image, its streaks taken out by a median filter, changes by ``STATIC_CHANGE`` grey
    levels at most, there and within the filter's reach. Rain changes such pixels and deraining should not, so the
    lower figure is the steadier video. Nothing is warped: what moves is left out.
    """

    def __init__(self):
        self.previous = None

    def add(self, rainy, derained):
        """Take the next frame, before and after.

        Args:
            rainy, derained: (H, W, 3) uint8.

        Returns:
            {"static", "change_rainy", "change_derained"}: the share of static pixels, and their mean absolute
            differences to the frame before, in grey levels of 255; NaN where there are none.
        """
        scene = cv2.medianBlur(cv2.cvtColor(rainy, cv2.COLOR_RGB2GRAY), STREAK_FILTER)
        current, before = (scene, rainy, derained), self.previous
        self.previous = current
        if before is None:
            return dict.fromkeys(("static", "change_rainy", "change_derained"), float("nan"))
        scene_change, *changes = (cv2.absdiff(new, old) for new, old in zip(current, before))
        static = cv2.dilate(scene_change, np.ones((STREAK_FILTER, STREAK_FILTER), np.uint8)) <= STATIC_CHANGE
        means = [float(change[static].mean()) if static.any() else float("nan") for change in changes]
        return {"static": float(static.mean()), "change_rainy": means[0], "change_derained": means[1]}


def add_sound(video, source, output):
    """Write ``video`` with the sound of ``source`` to ``output`` by ffmpeg; return its complaint, or None."""
    for codec in ("copy", "aac"):  # MP4 does not take every sound as it is
        command = [
            "ffmpeg", "-nostdin", "-v", "error", "-y", "-i", video, "-i", source.resolve(),
            "-map", "0:v", "-map", "1:a?", "-c:v", "copy", "-c:a", codec, "-t", f"{video_seconds(video):.6f}", output,
        ]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if result.returncode == 0 and count_frames(output) == count_frames(video):
            return None
    return result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "another number of frames"


def count_frames(path):
    """The number of frames that a video's header declares."""
    return int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT))


def video_seconds(path):
    """The length that a video's header declares."""
    return count_frames(path) / cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS)


def derain_video(source, output, derain):
    """Derain a video into an MP4 file (MPEG-4), which appears when it is complete, or when Ctrl-C ends it early.

    A frame that cannot be read is replaced by the one before, or the first that can, so that sound and picture stay
    together.

    Args:
        source: a video that OpenCV reads.
        output: the .mp4 file to write.
        derain: function of a frame, (H, W, 3) uint8 RGB, that returns the derained one.

    Returns:
        (rows of the report, one a frame: "frame", "seconds" and ``Flicker``'s; numbers of the lost frames;
        whether it was interrupted).

    Raises:
        InputError: no video, or one without frames.
        RunError: the output could not be written.
    """
    capture = open_video(source)
    rate = capture.get(cv2.CAP_PROP_FPS)
    if not 0 < rate < 1000:
        rate = 25.0
        print(f"{printable(source)}: declares no frame rate; taken as 25 frames a second")
    declared = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
    rows, lost, flicker, writer, interrupted = [], [], Flicker(), None, False
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".video-") as folder:
        silent = Path(folder) / "silent.mp4"
        try:
            for number, frame in enumerate(progress(read_frames(capture), "deraining", total=declared), 1):
                started = time.perf_counter()
                if frame is None:
                    lost.append(number)
                else:
                    derained = derain(frame)
                    row = {"frame": number, "seconds": time.perf_counter() - started}
                    rows.append(row | flicker.add(frame, derained))
                if not rows:
                    continue
                copies = 1
                if writer is None:
                    copies = number  # for the frames that were lost before this one
                    height, width = derained.shape[:2]
                    if height % 2 or width % 2:
                        print(f"MPEG-4 takes even sizes: {width}x{height} is cropped by a pixel")
                    code = cv2.VideoWriter.fourcc(*"mp4v")
                    writer = cv2.VideoWriter(str(silent), code, rate, (width // 2 * 2, height // 2 * 2))
                picture = cv2.cvtColor(derained[: height // 2 * 2, : width // 2 * 2], cv2.COLOR_RGB2BGR)
                for _ in range(copies):
                    writer.write(picture)
        except KeyboardInterrupt:
            interrupted = True
        capture.release()
        if writer is None:
            if interrupted:
                raise KeyboardInterrupt
            raise InputError(f"--test_data_path {printable(source)}: no frame of this video can be read")
        writer.release()
        # OpenCV says nothing of a full disk. Ctrl-C may come between a frame's row and its picture.
        if not len(rows) + len(lost) - interrupted <= count_frames(silent):
            raise RunError(f"{printable(output)}: could not be written; is the disk full?")
        result = silent
        if shutil.which("ffmpeg"):
            result = Path(folder) / "sound.mp4"
            complaint = add_sound(silent, Path(source), result)
            if complaint:
                print(f"the sound was left out: {complaint}")
                result = silent
        else:
            print("ffmpeg is not on the PATH, so any sound was left out")
        result.replace(output)
    if not interrupted and declared - rows[-1]["frame"] > rate:
        lost += range(rows[-1]["frame"] + 1, declared + 1)
    return rows, lost, interrupted
