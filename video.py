"""Derain a video frame by frame: each frame keeps its time stamp, and sounds, subtitles and chapters are copied.

    python test.py --test_data_path datasets/test/RainSample/rainy/rain-%03d.png --output_path results/clip

makes a video of the numbered pictures of a folder. test.py calls ``derain_video`` if --test_data_path is a video or
such a pattern. Reading is in video_input.py, codecs and colours in video_form.py, writing in video_output.py.
"""
import csv
import json
import os
import signal
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from images import to_uint8
from utils import (
    HANGUP, STOP_SIGNALS, UNREAD, InputError, RunError, ahead, begins_with, counted, drop_output, locked,
    output_is_closed, printable, progress, stop_printing, write_csv,
)
from video_form import CODECS, choose_form, describe_form, same_tags, tags_of
from video_input import Shot, clip_name, is_cover, open_source
from video_output import (
    SUFFIXES, VideoWriter, beside, choose_container, describe_stream, read_mark, unfinished_task,
)

STATIC_CHANGE = 3  # largest change of a pixel that stands still, in grey levels, after the streaks are filtered out
STREAK_FILTER = 15  # px, the side of the median filter that removes the streaks
COLUMNS = ("frame", "seconds", "static", "change_rainy", "change_derained")  # of NAME.csv


@dataclass
class VideoOptions:
    """What derain_video is asked for.

    Args:
        codec: a key of ``CODECS``.
        crf: quality of the encoder, smaller is better; None takes that of ``CODECS``.
        frames: (first, last) frame to derain, both counted from 1 and included; None takes all.
        overwrite: whether to start again where an earlier result is; otherwise a stopped one is gone on with.
        settings: what else the result depends on, such as the weights; values that JSON can hold.
        at_once: how many threads derain frames, while others are read and written; with 0 the caller's thread does all,
            one frame after the other.
        metadata: whether the result keeps the source's metadata, such as date and place; the colours stay in any case.
    """

    codec: str = "h264"
    crf: int | None = None
    frames: tuple[int, int] | None = None
    overwrite: bool = True
    settings: dict = field(default_factory=dict)
    at_once: int = 0
    metadata: bool = True


class VideoResult(NamedTuple):
    """What ``derain_video`` did.

    ``rows`` has a dictionary with the keys ``COLUMNS`` for each frame that was derained, earlier runs included;
    ``last`` is the number of the last frame in the output; ``faults`` are sentences on what could not be read;
    ``stopped`` is the number of the signal that ended it early, or 0; ``notes`` are sentences on what the output does
    not keep, and on what not all players can play; ``kept`` is whether the output is that of an earlier run, which
    is finished or longer than what this one had done when it was stopped; ``late_signal`` is the number of a signal
    that came when all frames were done, or 0.
    """

    output: Path
    rows: list
    last: int
    faults: list
    stopped: int
    notes: list | tuple = ()
    kept: bool = False
    late_signal: int = 0


# Stopping and going on


class StopSignals:
    """While this is open, the first of ``STOP_SIGNALS`` raises KeyboardInterrupt, and later ones do nothing.

    Inside ``with signals.held():`` it is raised at the end of the block. ``number`` is that of the signal, or 0.
    """

    def __init__(self):
        self.number, self.holding, self.before = 0, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # no other one may set handlers
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self.take)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def take(self, number, _):
        if number == HANGUP:
            drop_output()
        if not self.number:
            self.number = number
            if not self.holding:
                raise KeyboardInterrupt

    @contextmanager
    def held(self):
        self.holding = True
        yield
        self.holding = False
        if self.number:
            raise KeyboardInterrupt


def check_output(output, source, task, overwrite):
    """Refuse to write over what is not a result of this program.

    Returns:
        Whether the result is there already, and to be kept.
    """
    inputs = getattr(source, "paths", None) or [source.path]
    if os.path.realpath(output) in {os.path.realpath(path) for path in inputs}:
        raise InputError(
            f"--output_path {output.parent}: {output.name} would overwrite an input; expected another folder"
        )
    taken, table, mark = [], output.with_suffix(".csv"), None
    if os.path.lexists(output) and not (mark := read_mark(output)):
        taken.append(output.name)
    if os.path.lexists(table) and not begins_with(",".join(COLUMNS) + "\n")(table):
        taken.append(table.name)
    if taken:
        raise InputError(
            f"--output_path {output.parent}: {' and '.join(taken)} would be overwritten, but no earlier run has written"
            " that; expected another folder"
        )
    if overwrite:
        return False
    for before in (mark and mark["task"], unfinished_task(output)):
        before = before and {"metadata": True, **before}  # earlier versions knew no other
        if before and before != task:
            changed = ", ".join(name for name in task if task[name] != before.get(name))
            raise InputError(
                f"--overwrite False: {output} was begun from another source or with other options ({changed}); expected"
                " the same, or --overwrite True"
            )
    return bool(mark and mark["complete"])


# Deraining


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
        mask = static.astype(np.uint8)
        means = [np.mean(cv2.mean(change, mask)[:3]) if static.any() else float("nan") for change in changes]
        return {"static": float(static.mean()), "change_rainy": float(means[0]), "change_derained": float(means[1])}


class Frame(NamedTuple):
    """A frame on its way; ``rainy`` is ``picture`` as RGB. Both are None where the last result is written again."""

    number: int
    shot: Shot
    picture: object
    rainy: np.ndarray | None


class Deraining:
    """The loop over the frames of a video; what it has done so far is in its attributes.

    Attributes:
        rows: a dictionary with the keys ``COLUMNS`` for each frame that was derained.
        lost: the numbers of the frames that could not be read.
        recoloured: the numbers of the frames whose colours are coded in another way than those of the first.
        last: the number of the last frame that was written.
    """

    def __init__(self, writer, derain, at_once):
        self.writer, self.derain, self.at_once = writer, derain, at_once
        self.rows, self.lost, self.recoloured, self.last = [], [], [], writer.first - 1
        self.tags = None  # of the first picture
        self.picture, self.prepared = None, False  # the last picture that could be read; whether one was prepared
        self.derained = None  # the last result
        self.waiting = []  # frames before the first one that can be read
        self.flicker = Flicker()

    def go_through(self, shots, signals):
        """Derain the frames that are still to be derained.

        Returns:
            None if these are all, and else the exception that ended it; what is done so far is worth keeping.

        Raises:
            OSError: the packets cannot be written.
        """
        writer, numbered = self.writer, enumerate(shots, 1)
        first, last, before = writer.first, writer.last, writer.first - 1 + writer.done
        try:
            for number, shot in islice(numbered, before):
                self.skip(number, shot, number >= first)
            if writer.done:
                print(f"{printable(writer.output)}: going on after frame {before}", flush=True)
            count = writer.source.count
            total = max(0, min(count, last or count) - before)
            frames = map(self.prepare, islice(numbered, last and last - before))
            with closing(ahead(self.work_on, frames, self.at_once)) as results:
                for frame, derained, seconds in progress(results, "deraining", total=total):
                    self.write(frame, derained, seconds, signals)
            signals.holding = True
        except OSError as error:
            if not (isinstance(error, BrokenPipeError) and output_is_closed()):
                raise
            signals.holding = True
            stop_printing()
            return RunError(UNREAD)
        except (KeyboardInterrupt, Exception) as error:
            signals.holding = True
            return error
        return None

    def skip(self, number, shot, written):
        """Take a frame that is not derained, because an earlier run has ``written`` it or it is not asked for."""
        self.picture = shot.picture or self.picture
        if written:
            self.writer.skip(shot)
            self.last = number
            if shot.picture is None:
                self.lost.append(number)

    def prepare(self, numbered):
        """The ``Frame`` of a (number, shot). One that cannot be read is the one before it once more."""
        number, shot = numbered
        self.picture = shot.picture or self.picture
        if self.picture is None or shot.picture is None and self.prepared:
            return Frame(number, shot, None, None)
        self.prepared = True
        tags = tags_of(self.picture, self.writer.source)
        self.tags = self.tags or tags
        if not same_tags(tags, self.tags):
            self.recoloured.append(number)
        return Frame(number, shot, self.picture, self.writer.converter.to_rgb(self.picture))

    def work_on(self, frame):
        """(frame, its result or None, the seconds it took)."""
        started = time.perf_counter()
        try:
            derained = None if frame.rainy is None else self.derain(frame.rainy)
        except (OSError, RunError) as error:  # such as no room for feature maps; what is done is kept
            reason = getattr(error, "strerror", None) or error
            raise RunError(f"{self.writer.output}: frame {frame.number} could not be derained ({reason})") from None
        return frame, derained, time.perf_counter() - started

    def write(self, frame, derained, seconds, signals):
        """Write a frame, or the result before it once more; those before the first result wait for that."""
        if frame.shot.picture is None:
            self.lost.append(frame.number)
        if derained is not None:
            self.derained = self.writer.converter.change(frame.picture, frame.rainy, derained)
            if frame.shot.picture is not None:
                changes = self.flicker.add(to_uint8(frame.rainy), to_uint8(derained))
                self.rows.append({"frame": frame.number, "seconds": seconds, **changes})
        if self.derained is None:
            self.waiting.append(frame.shot)
            return
        with signals.held():
            for shot in (*self.waiting, frame.shot):
                self.writer.add(self.derained, shot)
            self.waiting, self.last = [], frame.number


def check_crf(codec, crf):
    """Refuse a --crf that a codec does not take; ``crf`` is None where none was given."""
    worst = CODECS[codec].worst
    if crf is not None and crf > (worst or -1):
        wanted = f"0 to {worst}" if worst else "no --crf, as it has no such setting"
        raise InputError(f"--crf {crf}: for --codec {codec} expected {wanted}")


def derain_video(path, folder, derain, options, name=None):
    """Derain a video, or numbered pictures, into a video file.

    A frame that cannot be read is replaced by the one before, or by the first readable one if there is none before,
    so that sound and picture stay together. Ctrl-C, SIGTERM and SIGHUP end the video early.

    Args:
        path: a video, or a pattern as ``PictureSequence`` takes it.
        folder: where to write NAME.mp4, or NAME.mkv or NAME.mov where the codec or the other streams want it.
        derain: function of a frame, (H, W, 3) RGB uint8 or uint16, that returns the derained one in the same form;
            with ``options.at_once``, so many threads call it at the same time.
        options: ``VideoOptions``.
        name: NAME; that of ``clip_name`` by default.

    Returns:
        A ``VideoResult``, or None if the result was there already and is kept.

    Raises:
        InputError: not a video, one without readable frames, one that is HDR, or the output is taken.
        RunError: the output could not be written.
    """
    check_crf(options.codec, options.crf)
    with closing(open_source(path)) as source:
        # 1. The first readable frame decides what the output is like
        shots, leading = source.shots(), []
        while not (leading and leading[-1].picture):
            if not (shot := next(shots, None)):
                raise InputError(f"--test_data_path {path}: no frame of this video can be read")
            leading.append(shot)
        picture = leading[-1].picture
        form = choose_form(picture, source, options.codec)
        if not options.metadata:  # cameras write where they are into streams of data
            source.others = [stream for stream in source.others if stream.type != "data"]
        container_name, taken = choose_container(options.codec, source.others, form.aspect in (None, 1))
        output = Path(folder) / f"{name or clip_name(path)}{SUFFIXES[container_name]}"
        task = {
            "source": source.identity(), "codec": options.codec, "crf": options.crf, "frames": options.frames,
            "metadata": options.metadata, **options.settings,
        }
        task = json.loads(json.dumps(task))  # as it is read again: lists instead of tuples
        if check_output(output, source, task, options.overwrite):
            print(f"{printable(output)} is there already")
            return None
        with StopSignals() as signals, locked(Path(f"{beside(output)}.lock"), f"--output_path {folder}"):
            try:
                writer = VideoWriter(source, form, options, output, (container_name, taken), task)
                sentences = describe_form(form, options.codec, picture, source)
                sentences += describe_others(source.others, taken, output.suffix)
                for sentence in sentences:
                    print(f"{printable(path)}: {sentence}")
                result = run(writer, chain(leading, shots), Deraining(writer, derain, options.at_once), signals)
                return result._replace(notes=sentences)
            except OSError as error:
                raise RunError(f"{output}: could not be written ({error.strerror or error})") from None
            except KeyboardInterrupt:  # before the first frame
                return VideoResult(output, [], 0, [], signals.number, kept=is_more(output, 0))


def describe_others(streams, taken, suffix):
    """Sentences on other streams of a source: those that are not ``taken`` into the output, and further videos."""
    sentences = []
    for stream in streams:
        if stream.index not in taken:
            sentences.append(f"{describe_stream(stream)} is left out, as {suffix} files take no such stream")
        elif stream.type == "video" and not is_cover(stream):
            sentences.append(f"{describe_stream(stream)} is another video, copied with its rain")
    return sentences


def is_more(path, frames):
    """Whether a file is a result of this program that the first ``frames`` of another one must not replace.

    That is one that is finished, or of more frames.
    """
    mark = read_mark(path)
    return bool(mark and (mark["complete"] or mark["frames"] > frames))


def run(writer, shots, deraining, signals):
    """Derain the frames that are still to be derained, and write the output; the result of ``derain_video``."""
    source, output, first, before = writer.source, writer.output, writer.first, writer.first - 1 + writer.done
    try:
        failure = deraining.go_through(shots, signals)
        complete = failure is None
        kept, added = not complete and is_more(output, len(writer.times)), len(writer.times) > writer.done
        if kept and added:
            writer.packets.remove()
        elif added or complete and writer.times:
            writer.finish(complete)
            writer.packets.remove()
        else:
            writer.put_down()
    except (OSError, InputError, RunError):  # an InputError where the source is gone, whose sounds are to be copied
        if done := writer.put_down():
            what = f"{counted(done, 'frame')} kept, from which --overwrite False goes on"
            print(f"{printable(output)}: {what}", flush=True)
        raise
    if failure and not isinstance(failure, KeyboardInterrupt):
        raise failure
    if complete and not writer.times:
        raise InputError(f"--frames {first}:{writer.last}: no such frames, or none that can be read")
    if kept:
        return VideoResult(output, [], deraining.last, [], signals.number, kept=True)
    faults = [
        f"{counted(len(numbers), 'frame')} {what}, the first of them number {numbers[0]}"
        for numbers, what in (
            (deraining.lost, "could not be read"),
            (deraining.recoloured, "coded with other colours than the first, which they are taken to have too"),
        ) if numbers
    ]
    if complete:
        faults += source.faults
    rows = [*read_report(output.with_suffix(".csv"), first, before), *deraining.rows]
    result = VideoResult(output, rows, deraining.last, faults, 0 if complete else signals.number)
    return result._replace(late_signal=signals.number if complete else 0)


# The report


def read_report(path, first, last):
    """The rows of an earlier run's NAME.csv for the frames from ``first`` to ``last``."""
    if last < first or not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["frame"].isdecimal()]
    rows = [{"frame": int(row.pop("frame")), **{name: float(value) for name, value in row.items()}} for row in rows]
    return [row for row in rows if first <= row["frame"] <= last]


def write_report(path, rows):
    """Write NAME.csv, the rows and their average, in which NaN do not count; the average."""
    average = {}
    for name in COLUMNS[1:]:
        values = [row[name] for row in rows if not np.isnan(row[name])]
        average[name] = float(np.mean(values)) if values else float("nan")
    write_csv(path, COLUMNS, [*rows, {"frame": f"average of {len(rows)}", **average}])
    return average
