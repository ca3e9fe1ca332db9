"""A page in the browser: drop a picture or a video on it, compare before and after, download the result.

    pip install -r requirements-app.txt
    python app.py

opens it on http://127.0.0.1:7860, for this machine alone: what is dropped goes nowhere else, and the page loads nothing
from anywhere. Pictures and videos are done as test.py does them with the same options, to the byte. Without --save_path
the model "automatic" takes the weights that test.py takes: others for a rainy picture alone than beside a clean one.
--recurrent_iter and --use_dilation are for that model, or for that of --save_path; the bundled ones need neither.
"""
import argparse
import functools
import html
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from checkpoints import BUNDLED, add_network_options, find_checkpoint, load_network
from devices import PeakMemory, pick_device
from images import image_size, read_image, read_metadata, read_rgb
from metrics import measure
from outputs import METRICS, model_name
from pairs import Pair
from test import (
    HALF_PRECISIONS, Saving, derain, describe_change, faults_of, fill_in_defaults, load_runner,
    parse_args as parse_test_args, plan_jobs, process, save, video_options,
)
from utils import InputError, RunError, at_least, counted, natural_key, printable, run_script
from video import derain_video, write_report
from video_input import open_source

SAMPLE = Path(__file__).resolve().parent / "datasets/test/RainSample"
PACKAGES = "pip install -r requirements-app.txt"
PRECISIONS = ("fp32", *HALF_PRECISIONS, "auto")
LARGEST_QUEUE = 20  # jobs that wait; further ones are told to come back
AUTOMATIC = "automatic"  # the model that test.py takes by itself
KEPT = 24 * 3600  # seconds after which uploads go that no video is being made of, and results
GRACE = 3600  # seconds after which the results of a page go that no longer answers
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # that end the server; Windows has no SIGHUP
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}  # options of an event
STYLE = """
footer { display: none !important; }
.report table { width: auto; }
.report table td { white-space: nowrap; }
.report table th { overflow-wrap: normal; word-break: normal; }
@media (max-width: 500px) { .report table :is(th, td) { padding: 4px; font-size: 12px; } }
"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS",
        help="address to open the page on; 0.0.0.0 lets every machine in that can reach this one, without a password"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=port_number, default=7860, metavar="N", help="0 takes any that is free (default: %(default)s)"
    )
    add_network_options(parser, "real.pth")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    parser.add_argument(
        "--max_memory", type=at_least(0, float), metavar="GIB",
        help="an image that needs more on the CPU, 0.6 GiB a megapixel in fp32, works on disk"
        " (default: 3/4 of what is free)",
    )
    parser.add_argument(
        "--max_megapixels", type=at_least(0.001, float), default=25, metavar="N",
        help="largest picture, and frame of a video, that is taken (default: %(default)s)",
    )
    parser.add_argument(
        "--max_upload", type=at_least(1), default=500, metavar="MIB", help="largest file taken (default: %(default)s)"
    )
    parser.add_argument(
        "--max_frames", type=at_least(1), default=1000, metavar="N", help="longest video taken (default: %(default)s)"
    )
    return parser.parse_args(argv)


def port_number(text):
    """``argparse`` type for the number of a TCP port."""
    if not (text.isdecimal() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 65535, got {text!r}")
    return int(text)


# One job at a time


class Cancelled(RunError):
    """A visitor no longer wants the job."""


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
            work = Work(Path(tempfile.mkdtemp(prefix="job-", dir=self.folder)), cancelled)
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
        """Remove the results whose time has come."""
        now = time.monotonic()
        with self.lock:
            old = [self.results.pop(key)[0] for key, (_, end) in list(self.results.items()) if end <= now]
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)


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

    def options(self, path, choice, folder, photographs=True):
        """The arguments of a test.py that does the same; ``photographs`` is whether there is no clean picture."""
        memory = [] if self.args.max_memory is None else ["--max_memory", str(self.args.max_memory)]
        args = parse_test_args([
            "--test_data_path", str(path), "--output_path", str(folder), *self.models[choice.model], "--precision",
            choice.precision, "--self_ensemble", str(choice.self_ensemble), "--device", self.args.device, *memory,
        ])
        fill_in_defaults(args, photographs)
        return args

    def check_size(self, path, width, height):
        """Refuse a picture, or a video with frames, of more than --max_megapixels."""
        limit = round(1e6 * self.args.max_megapixels)
        if width * height > limit:
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


# The page


def load_gradio():
    """Gradio, which sends and fetches nothing from then on."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    try:
        import gradio
    except ImportError:
        raise InputError(f"the page takes another package: {PACKAGES}") from None
    return gradio


def sentence(error, folders):
    """What is wrong, as HTML, without the folders of the server.

    Args:
        error: an exception.
        folders: those whose names are known, which may hold spaces.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = ": ".join([Path(os.fsdecode(name)).name for name in (error.filename,) if name] + [error.strerror])
    for folder in folders:
        text = re.sub(rf"{re.escape(str(folder))}[/\\](?:[^/\\\s]+[/\\])*", "", text)
    text = re.sub(r"(?<![\w./:\\])(?:[A-Za-z]:)?[/\\](?:[^/\\\s:'\"]+[/\\])+", "", text)
    return html.escape(printable(text.replace("--test_data_path ", "")))


class Page:
    """The page, of Gradio's components.

    Args:
        desk: a ``Desk``.
    """

    def __init__(self, desk):
        self.desk, self.gr = desk, load_gradio()

    def build(self):
        """The page, as ``gradio.Blocks``."""
        gr, args = self.gr, self.desk.args
        with gr.Blocks(analytics_enabled=False, title="SAPNet", delete_cache=(3600, KEPT)) as page:
            gr.Markdown(
                "# SAPNet\nTakes the rain off pictures and videos. All of it is done on the machine that serves this"
                f" page, one job at a time: up to {args.max_megapixels:g} megapixels, {args.max_upload} MiB a file and"
                f" {counted(args.max_frames, 'frame')} a video."
            )
            with gr.Row():  # of columns, which go below one another where there is no room
                with gr.Column(scale=2, min_width=300), gr.Row():
                    model = gr.Dropdown(list(self.desk.models), value=self.desk.default, label="Model", min_width=120)
                    precision = gr.Dropdown(PRECISIONS, value="fp32", label="Precision", min_width=120)
                with gr.Column(scale=1, min_width=300):
                    ensemble = gr.Checkbox(
                        label="Self-ensemble", elem_id="self_ensemble", info="better, in four times the time"
                    )
            choices = [model, precision, ensemble]
            with gr.Tab("Picture"):
                self.picture_tab("picture", ["Rainy picture"], choices)
            with gr.Tab("With a clean picture"):
                self.picture_tab("pair", ["Rainy picture", "Clean picture"], choices)
            with gr.Tab("Video"):
                self.video_tab(choices)

            def leave(request: gr.Request):
                self.desk.jobs.leave(request.session_hash)

            page.unload(leave)
        page.queue(max_size=LARGEST_QUEUE)
        return page

    def picture_tab(self, name, labels, choices):
        """The tab of a picture, or of a rainy and a clean one. ``name`` begins the ids of its elements."""
        gr, desk = self.gr, self.desk
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                files = [
                    gr.File(label=label, height=130, elem_id=f"{name}_{number}") for number, label in enumerate(labels)
                ]
                button = gr.Button("Derain", variant="primary", elem_id=f"{name}_derain")
            with gr.Column(scale=2, min_width=300):
                slider = gr.ImageSlider(
                    label="Rainy and derained", format="png", interactive=False, buttons=["fullscreen"],
                    elem_id=f"{name}_slider", max_height=500,
                )
                text = gr.Markdown(elem_id=f"{name}_report", elem_classes="report")
                download = gr.DownloadButton("Download", interactive=False, elem_id=f"{name}_download")
        self.examples(files)  # last, so that the result is in sight on a phone too

        @self.answering
        def run(request: gr.Request, *inputs):
            paths, choice = inputs[: len(files)], Choice(*inputs[len(files) :])
            if not all(paths):
                raise InputError(f"expected {' and '.join(f'a {label.lower()}' for label in labels)}")
            before, after, report = desk.picture(request.session_hash, choice, *map(Path, paths))
            return (str(before), str(after)), report, gr.DownloadButton(value=str(after), interactive=True)

        button.click(run, [*files, *choices], [slider, text, download], **self.one_at_a_time(slider))

    def video_tab(self, choices):
        gr, desk = self.gr, self.desk
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                file = gr.File(label="Rainy video", height=130, elem_id="video_0")
                with gr.Row():
                    button = gr.Button("Derain", variant="primary", elem_id="video_derain", min_width=100)
                    cancel = gr.Button("Cancel", interactive=False, elem_id="video_cancel", min_width=100)
            with gr.Column(scale=2, min_width=300):
                player = gr.Video(label="Derained", interactive=False, elem_id="video_player", buttons=[])
                text = gr.Markdown(elem_id="video_report", elem_classes="report")
                download = gr.DownloadButton("Download", interactive=False, elem_id="video_download")

        @self.answering
        def run(clip, model, precision, self_ensemble, request: gr.Request, progress=gr.Progress()):
            if not clip:
                raise InputError("expected a rainy video")

            def report(done, count):
                progress((done, max(done, count) or None), desc="deraining", unit="frames")

            choice = Choice(model, precision, self_ensemble)
            try:
                output, sentences = desk.video(request.session_hash, choice, Path(clip), report)
            except Cancelled:  # which may end the job before the page has let go of it
                return gr.skip(), "Cancelled.", gr.skip()
            shown = str(output) if output.suffix == ".mp4" else None  # browsers play no .mkv
            return shown, sentences, gr.DownloadButton(value=str(output), interactive=True)

        def stop(request: gr.Request):
            desk.jobs.cancel(request.session_hash, "video")
            return "Cancelled.", gr.Button(interactive=False)

        button.click(lambda: gr.Button(interactive=True), None, cancel, **AT_ONCE)
        running = button.click(run, [file, *choices], [player, text, download], **self.one_at_a_time(player))
        running.then(lambda: gr.Button(interactive=False), None, cancel, **AT_ONCE)
        cancel.click(stop, None, [text, cancel], cancels=[running], **AT_ONCE)

    @staticmethod
    def one_at_a_time(place):
        """The options of an event that is a job; ``place`` shows its progress."""
        return {
            "concurrency_id": "jobs", "concurrency_limit": 1, "show_progress_on": place, "api_visibility": "private",
        }

    def examples(self, files):
        """The bundled sample to choose from: rainy pictures, with their clean ones for two ``files``."""
        pairs = sample_pairs()
        if not pairs:
            return
        examples = self.gr.Dataset(
            label="The bundled sample", components=[self.gr.Image(visible=False)], type="index",
            samples=[[str(rainy)] for rainy, _ in pairs],
        )

        def take(index):
            paths = [str(path) for path in pairs[index]]
            return paths if len(files) == 2 else paths[0]

        examples.click(take, examples, files, **AT_ONCE)

    def answering(self, function):
        """Make of what goes wrong a sentence in the page; a fault of this program leaves its traceback here too."""

        @functools.wraps(function)
        def answer(*inputs):
            try:
                try:
                    return function(*inputs)
                except (MemoryError, RuntimeError):
                    with faults_of("this job"):  # makes an InputError of it if it is for want of memory
                        raise
            except (InputError, RunError, OSError) as error:
                message = sentence(error, self.desk.folders)
            except Exception:
                traceback.print_exc()
                message = "This is a fault of the program, whose console tells more."
            raise self.gr.Error(message, duration=None, print_exception=False)

        return answer


def sample_pairs():
    """(rainy, clean) paths of the bundled sample, no pairs where it is missing."""
    rainy = sorted(SAMPLE.glob("rainy/rain-*.png"), key=natural_key)
    pairs = [(path, SAMPLE / f"no{path.name}") for path in rainy]
    return [pair for pair in pairs if pair[1].exists()]


# The server


def open_port(host, port):
    """A socket that listens for the browsers.

    Raises:
        InputError: no such address of this machine, or another program has the port.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        parts = "a part of it between dots is empty or too long"
        reason = parts if isinstance(error, UnicodeError) else error.strerror or error
        raise InputError(f"--host {host}: expected an address of this machine ({reason})") from None
    try:
        return socket.create_server(address, family=family)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: cannot be opened ({error.strerror or error})") from None


def serve(page, desk, listener):
    """Serve the page until a signal comes."""
    from fastapi import FastAPI
    from gradio import mount_gradio_app, themes
    from uvicorn import Config, Server

    system = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # nothing is loaded
    app = mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None), page, "/", footer_links=[], run_history=False, ssr_mode=False,
        pwa=False, mcp_server=False, enable_monitoring=False, max_file_size=desk.args.max_upload * 2**20,
        allowed_paths=[str(SAMPLE)], theme=themes.Base(primary_hue="blue", **system), css=STYLE,
        app_kwargs={"docs_url": None, "redoc_url": None},
    )
    # In a thread, as uvicorn would wait at its end for the pages that are open and for the job that is running.
    thread = threading.Thread(target=Server(Config(app, log_level="warning")).run, args=([listener],), daemon=True)
    thread.start()
    host, port = listener.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    while thread.is_alive():
        thread.join(1)  # without a number, Windows would hand on no Ctrl-C
        desk.jobs.sweep()
    raise RunError("the server has ended")  # uvicorn has said why


def end_with_signals(folder):
    """Let the signals that end the server remove ``folder`` first."""

    def stop(number, frame):
        for _ in range(2):  # for what the server's threads put there while it is emptied
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + number)  # at once, and not when the job that is running is done

    for name in SIGNALS:
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, stop)


def main():
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix="sapnet-", ignore_cleanup_errors=True) as folder:
        end_with_signals(folder)  # before the seconds in which Gradio loads
        folder = os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(folder)  # where Gradio puts what is uploaded
        desk = Desk(args, folder)
        with open_port(args.host, args.port) as listener:
            serve(Page(desk).build(), desk, listener)


if __name__ == "__main__":
    run_script(main)
