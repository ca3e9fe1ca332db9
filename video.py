"""Derain a video frame by frame: the result has the same size, frame rate, number of frames and, with ffmpeg, sound.

    python -c "import cv2; clip = cv2.VideoWriter('clip.mp4', cv2.VideoWriter.fourcc(*'mp4v'), 2, (288, 288)); [
        clip.write(cv2.imread(f'datasets/test/RainSample/rainy/rain-00{k}.png')) for k in (1, 2)]"
    python test.py --test_data_path clip.mp4 --output_path results/clip

The first command makes a clip of two frames from the bundled sample. test.py calls ``derain_video`` if --test_data_path
is a video, of any kind that OpenCV reads.
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

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # silent: damaged frames are reported here, in one line
MAX_LOST = 250  # after so many unreadable frames in a row the video is over, whatever number its header declares
STATIC_CHANGE = 3  # largest change of a pixel that stands still, in grey levels, after the streaks are filtered out
STREAK_FILTER = 15  # px, the side of the median filter that removes the streaks


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
    """Yield a video's frames, (H, W, 3) uint8 RGB.

    None stands for a frame that cannot be read, but only if a readable frame follows: the end of a video looks the
    same as a frame that cannot be read.
    """
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

    To find them, the streaks are removed from the grey image by a median filter. A pixel is static if the filtered
    image changes by ``STATIC_CHANGE`` grey levels at most, at the pixel and within the filter's reach around it.
    Only rain changes such pixels, so the video that changes less there is the steadier one. Moving objects are left
    out rather than tracked.
    """

    def __init__(self):
        self.previous = None

    def add(self, rainy, derained):
        """Take the next frame, before and after.

        Args:
            rainy, derained: (H, W, 3) uint8.

        Returns:
            {"static", "change_rainy", "change_derained"}: the share of static pixels, and their mean absolute
            differences to the frame before, in grey levels of 255. NaN for the first frame, and differences of NaN
            where no pixel is static.
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
    """Write ``video`` with the sound of ``source`` to ``output`` by ffmpeg.

    Returns:
        None, or a sentence that says why the sound was left out.
    """
    if not shutil.which("ffmpeg"):
        return "ffmpeg is not on the PATH, so any sound was left out"
    for codec in ("copy", "aac"):  # MP4 does not take every sound as it is
        command = [
            "ffmpeg", "-nostdin", "-v", "error", "-y", "-i", video, "-i", source.resolve(),
            "-map", "0:v", "-map", "1:a?", "-c:v", "copy", "-c:a", codec, "-t", f"{video_seconds(video):.6f}", output,
        ]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if result.returncode == 0 and count_frames(output) == count_frames(video):
            return None
    reasons = result.stderr.strip().splitlines() or ["another number of frames"]
    return f"the sound was left out: {reasons[-1]}"


def count_frames(path):
    """The number of frames that a video's header declares."""
    return int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT))


def video_seconds(path):
    """The length in seconds that a video's header declares."""
    return count_frames(path) / cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS)


class FrameWriter:
    """Write frames to an MP4 file (MPEG-4), which takes even sizes only: odd ones are cropped by a pixel."""

    def __init__(self, path, rate):
        self.path, self.rate, self.writer = path, rate, None

    def write(self, frame, copies=1):
        """Add an (H, W, 3) uint8 RGB frame ``copies`` times; the first frame decides the size of the video."""
        height, width = frame.shape[:2]
        even = height // 2 * 2, width // 2 * 2
        if self.writer is None:
            if even != (height, width):
                print(f"MPEG-4 takes even sizes: {width}x{height} is cropped by a pixel")
            self.writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, even[::-1])
        picture = cv2.cvtColor(frame[: even[0], : even[1]], cv2.COLOR_RGB2BGR)
        for _ in range(copies):
            self.writer.write(picture)

    def close(self):
        """Complete the file; whether there is one, which takes a frame."""
        if self.writer is None:
            return False
        self.writer.release()
        return True


def derain_frames(frames, writer, derain, total):
    """Derain frame after frame, until the end or Ctrl-C.

    Args:
        frames: as ``read_frames`` yields them.
        writer: the ``FrameWriter`` that takes the result.
        derain: function of a frame that returns the derained one.
        total: the number of frames that the video declares, for the progress line.

    Returns:
        (rows, lost, interrupted) as ``derain_video`` returns them.
    """
    rows, lost, flicker = [], [], Flicker()
    try:
        for number, frame in enumerate(progress(frames, "deraining", total=total), 1):
            if frame is None:
                lost.append(number)
                if rows:
                    writer.write(derained)
                continue
            started = time.perf_counter()
            derained = derain(frame)
            copies = 1 if rows else number  # the first frame stands for the unreadable ones before it too
            rows.append({"frame": number, "seconds": time.perf_counter() - started, **flicker.add(frame, derained)})
            writer.write(derained, copies)
    except KeyboardInterrupt:
        return rows, lost, True
    return rows, lost, False


def derain_video(source, output, derain):
    """Derain a video into an MP4 file (MPEG-4). The file appears when it is complete, or when Ctrl-C ends it early.

    For a frame that cannot be read, the one before it is repeated, or the first readable one if there is none before,
    so that sound and picture stay together.

    Args:
        source: a video that OpenCV reads.
        output: the .mp4 file to write.
        derain: function of a frame, (H, W, 3) uint8 RGB, that returns the derained one.

    Returns:
        (rows, lost, interrupted): a dictionary for each frame with "frame", "seconds" and what ``Flicker.add``
        returns; the numbers of the frames that could not be read; whether Ctrl-C ended it.

    Raises:
        InputError: not a video, or one without readable frames.
        RunError: the output could not be written.
    """
    capture = open_video(source)
    rate = capture.get(cv2.CAP_PROP_FPS)
    if not 0 < rate < 1000:
        rate = 25.0
        print(f"{printable(source)}: declares no frame rate; taken as 25 frames a second")
    declared = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".video-") as folder:
        silent, with_sound = Path(folder) / "silent.mp4", Path(folder) / "sound.mp4"
        writer = FrameWriter(silent, rate)
        rows, lost, interrupted = derain_frames(read_frames(capture), writer, derain, declared)
        capture.release()
        if not writer.close():
            if interrupted:
                raise KeyboardInterrupt
            raise InputError(f"--test_data_path {printable(source)}: no frame of this video can be read")
        # OpenCV does not report a full disk. Ctrl-C may come between a frame's row and its picture.
        if not len(rows) + len(lost) - interrupted <= count_frames(silent):
            raise RunError(f"{printable(output)}: could not be written; is the disk full?")
        complaint = add_sound(silent, Path(source), with_sound)
        if complaint:
            print(complaint)
        (silent if complaint else with_sound).replace(output)
    if not interrupted and declared - rows[-1]["frame"] > rate:
        lost += range(rows[-1]["frame"] + 1, declared + 1)
    return rows, lost, interrupted
