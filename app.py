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
import traceback
from pathlib import Path

from checkpoints import add_network_options
from desk import JOB, KEPT, PRECISIONS, Cancelled, Desk
from pictures import faults_of
from utils import STOP_SIGNALS, InputError, RunError, at_least, counted, natural_key, printable, run_script

SAMPLE = Path(__file__).resolve().parent / "datasets/test/RainSample"
PACKAGES = "pip install -r requirements-app.txt"
LARGEST_QUEUE = 20  # jobs that wait; further ones are told to come back
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
    add_network_options(parser, "real.pth, and beside a clean picture general.pth,")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    parser.add_argument(
        "--max_memory", type=at_least(0, float), metavar="GIB",
        help="an image that needs more on the CPU, 0.6 GiB a megapixel in fp32, works on disk"
        " (default: 3/4 of what is free; none on macOS and Windows)",
    )
    parser.add_argument(
        "--max_megapixels", type=at_least(0.001, float), default=25, metavar="N",
        help="largest picture, and frame of a video, that is taken (default: %(default)s)",
    )
    parser.add_argument(
        "--max_upload", type=at_least(1), default=500, metavar="MIB",
        help="largest file taken, MiB (default: %(default)s)",
    )
    parser.add_argument(
        "--max_frames", type=at_least(1), default=1000, metavar="N",
        help="longest video taken, frames (default: %(default)s)",
    )
    return parser.parse_args(argv)


def port_number(text):
    """``argparse`` type for the number of a TCP port."""
    if not (text.isdecimal() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 65535, got {text!r}")
    return int(text)


# What a visitor sends


def named_files(data):
    """All that a request names as files: the values of "path", anywhere in its lists and dictionaries."""
    if isinstance(data, dict):
        if "path" in data:
            yield data["path"]
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        for value in data:
            yield from named_files(value)


def is_upload(path, folder):
    """Whether a file is one that was uploaded to the page, or the page's own copy of a picture of the sample.

    Gradio puts each of these into a folder of its own, beside the folders of the jobs. A path that lies elsewhere is
    judged by its text alone: not even how long the answer takes tells whether there is such a file.

    That a visitor names no upload of another one relies on that folder's name: it is a hash of the file with a secret
    seed, and the server lists no folder. So whoever can name a file has it already.

    Args:
        path: what a request gives as a path, which may be anything.
        folder: of uploads and results; no link leads to it.
    """
    try:
        absolute = os.path.abspath(path)
        parts = Path(absolute).relative_to(folder).parts
        # A file directly in the folder is an upload that is still under way.
        return len(parts) > 1 and not parts[0].startswith(JOB) and os.path.realpath(absolute) == absolute
    except (TypeError, ValueError):  # no text, elsewhere, or no possible path
        return False


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

    def blocks(self, **options):
        """An empty page, as ``gradio.Blocks``, which takes no files but uploads.

        Before it calls a function of ours, Gradio copies each file that a request names to where browsers fetch results
        from, and downloads it if it is an address. So what is named is looked at before that.
        """
        gr, folder = self.gr, self.desk.jobs.folder

        class Blocks(gr.Blocks):
            async def preprocess_data(self, function, inputs, *others, **options):
                if not all(is_upload(path, folder) for path in named_files(inputs)):
                    message = "expected a file that was uploaded to this page"
                    raise gr.Error(message, duration=None, print_exception=False)
                return await super().preprocess_data(function, inputs, *others, **options)

        return Blocks(**options)

    def build(self):
        """The page, as ``gradio.Blocks``."""
        gr, args = self.gr, self.desk.args
        with self.blocks(analytics_enabled=False, title="SAPNet", delete_cache=(3600, KEPT)) as page:
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
        page.queue(max_size=LARGEST_QUEUE, api_open=False)  # else a program could start jobs past the queue
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
            paths, choice = inputs[: len(files)], desk.choose(*inputs[len(files) :])
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

            choice = desk.choose(model, precision, self_ensemble)
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

        @self.answering
        def take(index):
            if not (isinstance(index, int) and 0 <= index < len(pairs)):
                raise InputError("expected a picture of the bundled sample")
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
            except (InputError, RunError, OSError, Cancelled) as error:
                message = sentence(error, self.desk.folders)
            except (Exception, SystemExit):  # that of an option parser would end the server, for all visitors
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
    from starlette.responses import Response
    from uvicorn import Config, Server

    async def nothing(request):
        return Response(status_code=404)

    system = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # nothing is loaded
    app = FastAPI(docs_url=None, redoc_url=None)
    for name in ("file=", "file/"):  # where Gradio would fetch from another machine what has an address for a name
        app.add_route(f"/gradio_api/{name}http{{rest:path}}", nothing)
    app = mount_gradio_app(
        app, page, "/", footer_links=[], run_history=False, ssr_mode=False, pwa=False, mcp_server=False,
        enable_monitoring=False, max_file_size=desk.args.max_upload * 2**20, allowed_paths=[str(SAMPLE)],
        theme=themes.Base(primary_hue="blue", **system), css=STYLE, app_kwargs={"docs_url": None, "redoc_url": None},
    )
    # Only with this does Gradio check by itself too that files were uploaded, and that results lie where they may: it
    # sets it for a page that it serves itself, not for one that is mounted.
    page.has_launched = True
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

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
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
