"""The jobs of a server's visitors: pictures and videos derained one at a time, with limits, as test.py does them.

    python -c "import app, desk; print(desk.Desk(app.parse_args([]), 'results').models)"

prints the models that a visitor can choose from, as options of test.py. ``app.py`` is the page.
"""
import os
import secrets
import shutil
import tempfile
import threading
import time
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from checkpoints import BUNDLED, find_checkpoint, load_network
from devices import HALF_PRECISIONS, PeakMemory, pick_device
from images import image_size, read_image, read_metadata, read_rgb
from layouts import Pair
from metrics import measure
from outputs import METRICS, model_name
from pictures import Saving, derain, faults_of, process, save
from test import describe_change, fill_in_defaults, load_runner, parse_args, plan_jobs, video_options
from utils import InputError, counted
from video import derain_video, write_report
from video_input import open_source

AUTOMATIC = "automatic"  # the model that test.py takes by itself
PRECISIONS = ("fp32", *HALF_PRECISIONS, "auto")
JOB = "job-"  # begins the name of a job's folder
KEPT = 24 * 3600  # seconds after which results go
GRACE = 3600  # seconds after which the results of a page go that no longer answers


# One job at a time


class Cancelled(Exception):
    """A visitor no longer wants the job; no ``RunError``, as no frame has failed."""


class Work(NamedTuple):
    """A job that is running: the folder for its results, and the event that a visitor no longer wants it."""

    folder: Path
    cancelled: threading.Event

    def check(self):
        """Raise ``Cancelled`` if the job is to end."""
        if self.cancelled.is_set():
            raise Cancelled("cancelled")


class Jobs:
    """The jobs of all visitors, of which one at a time has the processor and the memory.

    A visitor is a page that is open in a browser. The results of a job are kept until the next one of the same tab of
    that page is done, for ``KEPT`` seconds at most, and for ``GRACE`` seconds once the page has gone.

    Args:
        folder: where each job gets a folder of its own.
    """

    def __init__(self, folder):
        self.folder, self.turn = folder, threading.Lock()
        self.lock = threading.Lock()  # of both dictionaries, whose keys are (visitor, tab)
        self.cancelled, self.results = {}, {}  # an event each; (folder, the time.monotonic() at which it goes) each

    @contextmanager
    def open(self, visitor, tab):
        """Yield the ``Work`` of a new job once it is its turn. If it fails or is cancelled, its folder goes."""
        cancelled, key = threading.Event(), (visitor, tab)
        with self.lock:
            self.cancelled[key] = cancelled
        with self.turn:  # that of a cancelled job ends with the frame or the picture that it is at
            # The server hands a result to whoever knows its path. So the name of its folder cannot be guessed, which
            # mkdtemp alone does not promise.
            folder = tempfile.mkdtemp(prefix=f"{JOB}{secrets.token_hex(16)}-", dir=self.folder)
            work = Work(Path(folder), cancelled)
            try:
                work.check()
                yield work
                with self.lock:  # so that the visitor leaves either before, or when the results can be found
                    work.check()
                    before, _ = self.results.get(key, (None, None))
                    self.results[key] = work.folder, time.monotonic() + KEPT
            except BaseException:
                shutil.rmtree(work.folder, ignore_errors=True)
                raise
            if before:
                shutil.rmtree(before, ignore_errors=True)

    def cancel(self, visitor, tab):
        """End the job that a tab waits for. Results of an earlier one stay."""
        with self.lock:
            if cancelled := self.cancelled.get((visitor, tab)):
                cancelled.set()

    def leave(self, visitor):
        """Cancel the jobs of a page that no longer answers. Its results stay for a while.

        The page may be closed, or on a phone that sleeps or has changed to another network: then it still shows its
        results when the phone is awake, and can download them.
        """
        with self.lock:
            for key in [key for key in self.cancelled if key[0] == visitor]:
                self.cancelled.pop(key).set()
                if key in self.results:
                    folder, end = self.results[key]
                    self.results[key] = folder, min(end, time.monotonic() + GRACE)

    def sweep(self):
        """Remove the results whose time has come, and what Gradio leaves and forgets."""
        now = time.monotonic()
        with self.lock:
            old = [self.results.pop(key)[0] for key, (_, end) in list(self.results.items()) if end <= now]
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)
        # What is uploaded and what results have folders: files beside them are of uploads that broke off, or are empty.
        for path in Path(self.folder).iterdir():
            with suppress(OSError):  # it has just been moved
                if path.is_file() and time.time() - path.stat().st_mtime > GRACE:
                    path.unlink()


# What the tabs do


class Choice(NamedTuple):
    """What a visitor has chosen."""

    model: str  # a key of ``Desk.models``
    precision: str
    self_ensemble: bool


class Desk:
    """Takes pictures and videos, and hands out results: all that the page does, without the page.

    Args:
        args: of this script.
        folder: for the results.

    Attributes:
        models: {name: options of test.py that choose it}; ``default`` is the name of the first: the one that
            --save_path means, or ``AUTOMATIC``.
        folders: those that a visitor need not know: of uploads and results, and of the weights.
    """

    def __init__(self, args, folder):
        self.args, self.jobs, self.device = args, Jobs(folder), pick_device(args.device)
        checkpoint = find_checkpoint(args.save_path, photographs=True)
        self.folders = [folder, BUNDLED, checkpoint.parent]
        load_network(checkpoint, args.recurrent_iter, args.use_dilation)  # or say what is wrong
        bundled = {path.stem: ["--save_path", str(path)] for path in sorted(BUNDLED.glob("*.pth"))}
        self.default, own = AUTOMATIC, []
        if args.save_path is not None:
            self.default, own = model_name(args.save_path, checkpoint), ["--save_path", str(args.save_path)]
            if checkpoint.resolve().parent != BUNDLED and self.default in bundled:
                self.default += " of --save_path"  # as a run may be called as bundled weights are
        for name in ("recurrent_iter", "use_dilation"):
            if getattr(args, name) is not None:
                own += [f"--{name}", str(getattr(args, name))]
        bundled.pop(self.default, None)  # the same weights
        self.models = {self.default: own, **bundled}

    def choose(self, model, precision, self_ensemble):
        """The ``Choice`` that a visitor has sent, which may be anything: a program can write to the page too.

        Raises:
            InputError: it is none that the page offers.
        """
        for label, value, offered in (("Model", model, [*self.models]), ("Precision", precision, PRECISIONS)):
            if value not in offered:
                raise InputError(f"{label}: expected one of {', '.join(offered)}")
        if not isinstance(self_ensemble, bool):
            raise InputError("Self-ensemble: expected true or false")
        return Choice(model, precision, self_ensemble)

    def options(self, path, choice, folder, photographs=True):
        """The arguments of a test.py that does the same; ``photographs`` is whether there is no clean picture."""
        memory = [] if self.args.max_memory is None else ["--max_memory", str(self.args.max_memory)]
        args = parse_args([
            "--test_data_path", str(path), "--output_path", str(folder), *self.models[choice.model], "--precision",
            choice.precision, "--self_ensemble", str(choice.self_ensemble), "--device", self.args.device, *memory,
        ])
        fill_in_defaults(args, photographs)
        return args

    def check_size(self, path, width, height):
        """Refuse a picture, or a video with frames, of more than --max_megapixels."""
        if width * height / 1e6 > self.args.max_megapixels:  # which may be infinite
            limit = round(1e6 * self.args.max_megapixels)
            raise InputError(f"{path}: {width}x{height}, {width * height:,} pixels; expected at most {limit:,} here")

    def check_length(self, path, count):
        """Refuse a video of more than --max_frames."""
        limit = self.args.max_frames
        if count > limit:
            raise InputError(f"{path}: more than {counted(limit, 'frame')}; expected at most that many here")

    def picture(self, visitor, choice, rainy, clean=None):
        """Derain a picture.

        Args:
            visitor: who wants it.
            choice: a ``Choice``.
            rainy, clean: paths; ``clean`` is None where there is none.

        Returns:
            (rainy picture as PNG, derained picture, text on it), two paths and Markdown.
        """
        with self.jobs.open(visitor, "pair" if clean else "picture") as work:
            started = time.perf_counter()
            for path in (rainy, clean):
                if path:
                    height, width = image_size(path)
                    self.check_size(path, width, height)
            args = self.options(rainy, choice, work.folder, photographs=not clean)
            job, = plan_jobs([(Pair(rainy, clean), Path(), None)], args)
            with PeakMemory(self.device) as memory:
                row, _ = process(
                    load_runner(args, self.device), job, self.device,
                    Saving(args.overwrite, args.metadata, args.quality),
                )
            image, before = read_image(rainy), work.folder / "before" / job.output.name
            save(before, image, read_metadata(rainy))  # as PNG, since a browser shows neither TIFF nor HEIC
            what = f"{describe_size(image.shape)}, {8 * image.itemsize} bits"
            text = describe_job(what, args, choice, time.perf_counter() - started, memory.peak)
            if clean:
                reference = read_rgb(clean)
                text += "\n\n" + table_of({"rainy": measure(read_rgb(rainy), reference), "derained": row})
        return before, job.output, text

    def count_frames(self, path):
        """The number of frames of a video, or any larger than --max_frames; refuses what is no video or too large.

        A recording of a browser, and a bare stream of H.264, declare no number; then it is that of the packets. Where
        one is declared, there may be more packets: some codecs have such as are not shown.
        """
        with closing(open_source(path)) as source:
            context = source.stream.codec_context
            self.check_size(path, context.width, context.height)
            packets = sum(1 for _ in islice(source.packets(source.stream), self.args.max_frames + 1))
            return min(packets, source.count or packets)

    def video(self, visitor, choice, path, report):
        """Derain a video.

        Args:
            visitor, choice: as for ``picture``.
            path: of the video.
            report: is called with how many frames are done and how many there are in all.

        Returns:
            (derained video, text on it), a path and Markdown.
        """
        with self.jobs.open(visitor, "video") as work:
            started = time.perf_counter()
            self.check_length(path, count := self.count_frames(path))
            args = self.options(path, choice, work.folder)
            runner, shape, done = load_runner(args, self.device), None, 0

            def derain_frame(frame):
                nonlocal shape, done
                work.check()
                self.check_length(path, done + 1)  # of a file that declares fewer frames than it has
                os.utime(path)  # Gradio removes uploads by their age, and a video may take longer than that
                report(done, count)
                with faults_of(path):
                    derained, _ = derain(runner, frame, self.device)
                shape, done = frame.shape, done + 1
                return derained

            with PeakMemory(self.device) as memory:
                result = derain_video(path, work.folder, derain_frame, video_options(args))
            average = write_report(result.output.with_suffix(".csv"), result.rows)
            seconds = time.perf_counter() - started
            sentences = [describe_job(describe_size(shape), args, choice, seconds, memory.peak)]
            number = counted(len(result.rows), "frame")
            sentences += [f"{number}, {average['seconds']:.2f} s each", describe_change(average)]
            return result.output, "\n\n".join(filter(None, [*sentences, *result.notes, *result.faults]))


def describe_size(shape):
    """The size of a picture, from its shape, as Markdown."""
    return f"**{shape[1]} × {shape[0]}**"


def describe_job(what, args, choice, seconds, memory):
    """``what`` has been done, and the time, memory and weights it took, as a line of Markdown."""
    parts = [what, f"{seconds:.1f} s"]
    if memory is not None:
        parts.append(f"{memory / 2**20:,.0f} MiB of memory")
    model = model_name(args.save_path, args.checkpoint) if choice.model == AUTOMATIC else choice.model
    ensemble = ", self-ensemble" * choice.self_ensemble
    return " · ".join([*parts, f"`{model}`, {choice.precision}{ensemble}"])


def table_of(rows):
    """{name: metrics} as a table in Markdown."""
    lines = ["| | PSNR Y | SSIM Y | PSNR RGB | SSIM RGB |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        psnr_y, ssim_y, psnr_rgb, ssim_rgb = (row[metric] for metric in METRICS)
        lines.append(f"| {name} | {psnr_y:.3f} dB | {ssim_y:.4f} | {psnr_rgb:.3f} dB | {ssim_rgb:.4f} |")
    return "\n".join(lines)
