"""app.py, also in a real browser: pictures and videos are done as by test.py, and nothing leaves the machine."""
import asyncio
import csv
import errno
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import ImageCms

import utils
from app import Page, is_upload, named_files, parse_args, sentence, serve
from checkpoints import save_checkpoint
from conftest import ROOT, contents, make_pairs, photo, save, with_rain
from desk import AUTOMATIC, Cancelled, Choice, Desk, Jobs
from images import read_image, read_metadata, read_rgb, write_image
from metadata import Metadata
from metrics import measure
from networks import SAPNet
from outputs import METRICS

# Runs a script and notes which addresses it looks up or connects to.
WATCHED = """
import runpy, sys
log = open(sys.argv[1], "a", buffering=1)
def note(event, args):
    if event in ("socket.connect", "socket.sendto"):
        print(args[1], file=log)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        print(args[0], file=log)
sys.addaudithook(note)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
BROWSER_OPTIONS = (
    "headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-background-networking", "disable-component-update",
    "disable-sync", "no-first-run", "disable-quic", "disable-gpu", "window-size=1280,1000",
)
PATIENCE = 60  # seconds
NOT_UPLOADED = "expected a file that was uploaded to this page"


# Options


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--port", "many"), ["--port", "'many'", "0 to 65535"]),
        (("--port", 65536), ["--port", "65536"]),
        (("--save_path", "nowhere.pth"), ["nowhere.pth", "no such file"]),
        (("--max_megapixels", 0), ["--max_megapixels", "or more, got 0"]),
        (("--device", "abacus"), ["--device abacus"]),
        (("--host", "192.0.2.1"), ["--host 192.0.2.1"]),  # reserved for documents, so of no machine
        (("--host", "127..0.1"), ["--host 127..0.1", "an address of this machine"]),
        (("--host", "a" * 64), ["an address of this machine"]),  # a label has 63 letters at most
    ],
)
def test_a_wrong_option_is_one_sentence(refused, arguments, names):
    refused("app", *arguments, names=names)


def test_a_port_in_use_is_one_sentence(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused("app", "--port", port, names=[f"--port {port}"])


def test_without_gradio_the_sentence_says_how_to_install_it(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused("app", "--port", 0, names=["pip install -r requirements-app.txt"])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")
@pytest.mark.parametrize("number", [signal.SIGTERM, getattr(signal, "SIGHUP", None)])
def test_a_signal_while_gradio_loads_leaves_no_folder(tmp_path, number):
    """SIGHUP is what a terminal sends that is closed."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -r requirements-app.txt")
    child = subprocess.Popen(
        [sys.executable, "app.py", "--port", "0"], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    end = time.monotonic() + PATIENCE
    while not any(tmp_path.glob("sapnet-*")):
        assert child.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.1)
    child.send_signal(number)
    out, _ = child.communicate(timeout=PATIENCE)
    assert out == b"", "it had loaded"
    assert child.returncode == 128 + number and not any(tmp_path.iterdir())


# What the page does, without it


@pytest.fixture
def desk(checkpoint, tmp_path):
    """A function that makes a ``Desk`` from further options; its default model is a network of two stages."""

    def make(*options, save_path=checkpoint):
        folder = tmp_path / "served"
        folder.mkdir(exist_ok=True)
        chosen = ["--save_path", save_path] if save_path else []
        return Desk(parse_args([*map(str, chosen), "--device", "cpu", *map(str, options)]), folder)

    return make


def test_the_largest_picture_may_be_of_any_size(desk):
    desk("--max_megapixels", "inf").check_size("a.png", 10**6, 10**6)
    limited = desk("--max_megapixels", "12.3")
    limited.check_size("a.png", 12_300_000, 1)
    with pytest.raises(utils.InputError, match=r"a\.png: 12300001x1, .* at most 12,300,000 here"):
        limited.check_size("a.png", 12_300_001, 1)


def chosen(desk):
    return Choice(desk.default, "fp32", False)


def make_video(path, container, codec, size=(64, 48), frames=6, **options):
    """A video of noise in a file format, with its options."""
    with av.open(str(path), "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p" if size[0] % 2 == 0 else "yuv444p"
        for number in range(frames):
            picture = with_rain(photo(3, size[1], size[0]), number)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        output.mux(stream.encode(None))
    return path


def test_the_weights_are_those_that_test_py_takes(desk, run, tmp_path, monkeypatch):
    """Of its own accord: others for a picture alone than beside a clean one, and the line on the job names them."""
    monkeypatch.chdir(tmp_path)  # no run has left weights here
    folder, page = make_pairs(tmp_path / "pairs", [1], 16, 24), desk(save_path=None)
    assert list(page.models)[0] == page.default == AUTOMATIC
    rainy, clean = folder / "rain-1.png", folder / "norain-1.png"
    for name, pictures, source in (("real", [rainy], rainy), ("general", [rainy, clean], folder)):
        _, output, text = page.picture("visitor", chosen(page), *pictures)
        result = run("test", "--test_data_path", source, "--output_path", tmp_path / name)
        assert f"weights/{name}.pth" in result.out and f"`{name}`, fp32" in text
        assert output.read_bytes() == (tmp_path / name / "rain-1.png").read_bytes()


def test_options_of_the_network_are_for_that_of_save_path(desk, tmp_path):
    for save_path in ({}, {"save_path": None}):
        page = desk("--recurrent_iter", 1, **save_path)
        stages = {name: page.options("a.png", Choice(name, "fp32", False), tmp_path).recurrent_iter
                  for name in page.models}
        assert stages.pop(page.default) == 1 and set(stages.values()) == {None}


def test_a_picture_that_is_too_large_is_told_in_pixels(desk):
    with pytest.raises(utils.InputError, match="5776x4336, 25,044,736 pixels; expected at most 25,000,000 here"):
        desk().check_size(Path("large.png"), 5776, 4336)
    desk().check_size(Path("large.png"), 5000, 5000)


@pytest.mark.parametrize(
    ("container", "codec", "options"), [("h264", "libx264", {}), ("webm", "libvpx", {"live": "1"})]
)
def test_a_video_that_declares_no_length_is_refused_at_once(desk, tmp_path, container, codec, options):
    path = make_video(tmp_path / f"clip.{container}", container, codec, **options)
    with av.open(str(path)) as video:
        assert not video.streams.video[0].frames and not video.duration
    page, done = desk("--max_frames", 5), []
    with pytest.raises(utils.InputError, match="more than 5 frames; expected at most that many"):
        page.video("visitor", chosen(page), path, lambda *numbers: done.append(numbers))
    assert done == [] and list(page.jobs.folder.iterdir()) == []
    page.args.max_frames = 6
    output, text = page.video("visitor", chosen(page), path, lambda *numbers: done.append(numbers))
    assert done[-1] == (5, 6) and "6 frames" in text and output.exists()


def test_a_video_that_is_cancelled_has_not_failed(desk, tmp_path):
    path, page = make_video(tmp_path / "clip.mkv", "matroska", "ffv1"), desk()

    def report(done, count):
        if done == 2:
            page.jobs.cancel("visitor", "video")

    with pytest.raises(Cancelled):
        page.video("visitor", chosen(page), path, report)
    assert list(page.jobs.folder.iterdir()) == []


def test_what_a_video_loses_is_told_beside_it(desk, tmp_path):
    path, page = make_video(tmp_path / "odd.mkv", "matroska", "ffv1", (63, 47), 2), desk()
    _, text = page.video("visitor", chosen(page), path, lambda *_: None)
    assert "yuv444p keeps the odd size, but many players do not play it" in text


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError()])
def test_a_video_without_memory_is_told_as_a_picture_is(desk, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("inference.StripRunner.__call__", fail)
    path, page = make_video(tmp_path / "clip.mkv", "matroska", "ffv1", frames=2), desk()
    with pytest.raises(utils.InputError, match="allocate memory|not enough memory") as caught:
        page.video("visitor", chosen(page), path, lambda *_: None)
    assert sentence(caught.value, [tmp_path]).startswith("clip.mkv: ") and "written" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (utils.InputError("--test_data_path /tmp/sapnet 1/0af/my clip.mp4: no video"), "my clip.mp4: no video"),
        (utils.RunError("/tmp/sapnet 1/job-x/before/a.png: could not be written (full)"),
         "a.png: could not be written (full)"),
        (utils.InputError("/opt/my weights/real.pth: an empty file; expected .pth or .safetensors"),
         "real.pth: an empty file; expected .pth or .safetensors"),
        (utils.RunError("/var/tmp/tmp1: no room for a map and/or more"), "tmp1: no room for a map and/or more"),
        (utils.RunError(r"C:\Users\me\a.png: no room"), "a.png: no room"),
        (OSError(errno.ENOSPC, "No space left on device", "/var/tmp/x"), "x: No space left on device"),
        (utils.InputError("<b>.png: no image"), "&lt;b&gt;.png: no image"),
    ],
)
def test_no_sentence_names_a_folder_of_the_server(error, text):
    assert sentence(error, [Path("/tmp/sapnet 1"), Path("/opt/my weights")]) == text


@pytest.mark.slow
def test_a_job_without_memory_is_no_fault_of_the_program(desk, capsys):
    gradio = pytest.importorskip("gradio", reason="the page needs gradio: pip install -r requirements-app.txt")

    def run(*_):
        raise MemoryError("Cannot allocate")

    with pytest.raises(gradio.Error, match="not enough memory"):
        Page(desk()).answering(run)()
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_job_that_ends_the_program_is_a_fault_of_it(desk, capsys):
    """As an option parser does. Gradio would end the server, for all visitors."""
    gradio = pytest.importorskip("gradio", reason="the page needs gradio: pip install -r requirements-app.txt")
    with pytest.raises(gradio.Error, match="a fault of the program"):
        Page(desk()).answering(lambda: parse_args(["--port", "none"]))()
    assert "SystemExit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "wrong", "words"),
    [
        (0, "strong", "Model: expected one of .*, light, "), (0, None, "Model"), (0, ["light"], "Model"),
        (0, {"path": "light"}, "Model"), (1, "fp8", "Precision: expected one of fp32, bf16, fp16, auto"),
        (1, None, "Precision"), (2, "zzz", "Self-ensemble: expected true or false"), (2, None, "Self-ensemble"),
        (2, 1, "Self-ensemble"),
    ],
)
def test_a_choice_that_the_page_does_not_offer_is_one_sentence(desk, place, wrong, words):
    page = desk()
    choice = list(chosen(page))
    assert page.choose(*choice) == chosen(page) and page.choose("light", "auto", True) == ("light", "auto", True)
    choice[place] = wrong
    with pytest.raises(utils.InputError, match=words):
        page.choose(*choice)


def test_uploads_are_told_from_all_other_files(tmp_path, monkeypatch):
    folder = tmp_path / "served"
    for name in ("a1b2/rain.png", "a1b2/deeper/rain.png", "job-1/rain.png", "half"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (tmp_path / "private.png").touch()
    (folder / "linked").symlink_to(tmp_path)
    (folder / "a1b2/linked.png").symlink_to(tmp_path / "private.png")
    for path in ("a1b2/rain.png", "a1b2/gone.png", "a1b2/../a1b2/rain.png"):
        assert is_upload(f"{folder}/{path}", str(folder))
    for path in (".", "a1b2/..", "half", "job-1/rain.png", "a1b2/../job-1/rain.png", "a1b2/linked.png", "a1b2/\0.png",
                 "linked/private.png", "../private.png", "a1b2/../../private.png", "../served2/a1b2/rain.png"):
        assert not is_upload(f"{folder}/{path}", str(folder)), path
    monkeypatch.setattr(os.path, "realpath", lambda path: pytest.fail(f"looked at {path}"))
    for path in (tmp_path / "private.png", "/etc/passwd", "private.png", "", "https://example.com/a.png", None, 3, [],
                 f"https://example.com{folder}/a1b2/rain.png", f"file://{folder}/a1b2/rain.png"):
        assert not is_upload(path, str(folder)), path


def test_the_files_that_a_request_names_are_found_wherever_they_are():
    data = [{"path": "a", "meta": {"path": ["b", {"path": "c"}]}}, "d", None, 3, [[{"value": {"path": None}}]]]
    assert list(named_files(data)) == ["a", ["b", {"path": "c"}], "c", None]


@pytest.mark.slow
def test_gradio_itself_refuses_what_was_not_uploaded_too(desk, tmp_path, monkeypatch):
    """Should a later Gradio no longer ask ours first."""
    gradio = pytest.importorskip("gradio", reason="the page needs gradio: pip install -r requirements-app.txt")
    monkeypatch.setattr("uvicorn.Server.run", lambda *_: None)
    served = desk()
    page = Page(served).build()
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(utils.RunError, match="has ended"):
        serve(page, served, listener)
    event = next(each for each in page.fns.values() if each.inputs and each.inputs[0].elem_id == "picture_0")
    request = [named(str(save(tmp_path / "private.png", photo(1)))), *chosen(served)]

    async def prepare(blocks):
        gradio.context.LocalContext.blocks.set(page)
        await blocks.preprocess_data(page, event, request, None)

    for blocks, error, words in (
        (type(page), gradio.Error, NOT_UPLOADED), (gradio.Blocks, gradio.exceptions.InvalidPathError, "not uploaded"),
    ):
        with pytest.raises(error, match=words):
            asyncio.run(prepare(blocks))


# Jobs


def job(jobs, visitor, tab="picture"):
    """The folder of a job with a result."""
    with jobs.open(visitor, tab) as work:
        (work.folder / "result.png").write_text("result")
    return work.folder


def test_results_stay_for_a_while_when_their_page_is_lost(tmp_path, monkeypatch):
    """As when a phone sleeps; a later job of the page replaces them, and that one's stay."""
    jobs, now = Jobs(tmp_path), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    first, lost, replaced = job(jobs, "first"), job(jobs, "second"), job(jobs, "second", "video")
    jobs.leave("second")
    kept = job(jobs, "second", "video")
    assert lost.exists() and not replaced.exists()
    now += 3599
    jobs.sweep()
    assert lost.exists()
    now += 2
    jobs.sweep()
    assert [first.exists(), lost.exists(), kept.exists()] == [True, False, True]
    now += 24 * 3600
    jobs.sweep()
    assert list(tmp_path.iterdir()) == [] and not jobs.results


def test_an_upload_that_broke_off_goes(tmp_path):
    """Gradio writes it beside the folders, and moves it into one when it is complete."""
    for name, age in (("lost", 3700), ("under way", 3500)):
        (tmp_path / name).write_text("half a video")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    Jobs(tmp_path).sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["under way"]


def test_a_page_that_is_lost_ends_its_job(tmp_path):
    jobs = Jobs(tmp_path)
    with pytest.raises(Cancelled), jobs.open("visitor", "video"):
        jobs.leave("visitor")
    assert list(tmp_path.iterdir()) == [] and not jobs.results and not jobs.cancelled


def test_a_page_that_is_lost_as_its_job_ends_leaves_nothing(tmp_path):
    """Between the last look whether it is still there, and the result becoming known."""
    jobs, threads = Jobs(tmp_path), []

    def is_set():
        threads.append(threading.Thread(target=jobs.leave, args=["visitor"]))
        threads[0].start()
        threads[0].join(0.2)
        return False

    with jobs.open("visitor", "picture") as work:
        work.cancelled.is_set = is_set
    threads[0].join()
    (_, end), = jobs.results.values()
    assert end < time.monotonic() + 3601, "it is kept as if the page were there"


# The server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The page with a network of one stage and small limits: its ``url``, ``--save_path``, ``files`` and ``log``."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -r requirements-app.txt")
    folder = tmp_path_factory.mktemp("app")
    torch.manual_seed(0)
    save_checkpoint(folder / "quick/net_latest.pth", SAPNet(recurrent_iter=1).state_dict())
    utils.write_text(folder / "quick/args.json", '{"recurrent_iter": 1, "use_dilation": true}')
    (folder / "files").mkdir()
    options = ["--port", "0", "--save_path", folder / "quick"]
    options += ["--max_megapixels", "0.06", "--max_upload", "3", "--max_frames", "300"]
    with open(folder / "console", "w") as console:
        child = subprocess.Popen(
            [sys.executable, "-c", WATCHED, folder / "log", "app.py", *options],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=console, text=True,
            env=os.environ | {"TMPDIR": str(folder / "files")},
        )
        url = child.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), (folder / "console").read_text()
        yield SimpleNamespace(url=url, network=folder / "quick", files=folder / "files", log=folder / "log")
        child.terminate()
        child.communicate(timeout=PATIENCE)
    assert (folder / "console").read_text() == ""  # no fault of ours, which leaves its traceback there
    assert contents(folder / "files") == {}, "the server leaves files behind"


class Program:
    """A visitor without a browser, who can send whatever comes to mind."""

    def __init__(self, url):
        self.url = url
        config = json.loads(self.get("/config"))
        components = {component["id"]: component for component in config["components"]}
        self.events = [  # (id of an event, number of its inputs, element that is pressed)
            (event["id"], len(event["inputs"]), components[element]) for event in config["dependencies"]
            for element, _ in event["targets"] if element in components
        ]
        model = [each["props"]["value"] for each in components.values() if each["props"].get("label") == "Model"]
        self.choice = [*model, "fp32", False]

    def get(self, path, body=None, kind="application/json"):
        """The bytes of an answer; with a ``body`` that is sent."""
        return urlopen(Request(self.url + path, body, {"Content-Type": kind}), timeout=PATIENCE).read()

    def upload(self, path):
        """Upload a file, and return what a request names it by."""
        mark, head = secrets.token_hex(), f'Content-Disposition: form-data; name="files"; filename="{path.name}"'
        body = f"--{mark}\r\n{head}\r\n\r\n".encode() + path.read_bytes() + f"\r\n--{mark}--\r\n".encode()
        return named(json.loads(self.get("/gradio_api/upload", body, f"multipart/form-data; boundary={mark}"))[0])

    def event(self, element, data):
        """The number of the event that pressing an element starts with these inputs."""
        return next(number for number, count, each in self.events
                    if element in (each["props"].get("elem_id"), each["type"]) and count == len(data))

    def send(self, element, *data):
        """Press a button, by its id, or the "dataset", which is the sample's pictures.

        Returns:
            (whether it went well, what comes back).
        """
        visitor = secrets.token_hex(5)
        message = {"data": data, "fn_index": self.event(element, data), "session_hash": visitor}
        self.get("/gradio_api/queue/join", json.dumps(message).encode())
        for line in self.get(f"/gradio_api/queue/data?session_hash={visitor}").splitlines():
            message = json.loads(line.removeprefix(b"data:") or "{}")
            if message.get("msg") == "process_completed":
                return message["success"], message["output"]

    def derain(self, picture):
        """The path and the bytes of the result of a picture."""
        done, output = self.send("picture_derain", picture, *self.choice)
        assert done, output
        result = output["data"][2]["value"]
        return Path(result["path"]), self.get(f"/gradio_api/file={result['path']}")


def named(path):
    """A file as requests name one."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


@pytest.fixture
def program(server):
    return Program(server.url)


@pytest.mark.slow
def test_a_file_that_was_not_uploaded_is_refused_whether_it_is_there_or_not(program, server, run, tmp_path):
    """Whatever place of a request names it. An uploaded one is taken, and the page's copy of a sample."""
    mine = save(tmp_path / "mine.png", with_rain(photo(1), 1))
    upload, private = program.upload(mine), str(save(tmp_path / "private.png", photo(2)))
    result, derained_bytes = program.derain(upload)
    assert derained_bytes == derained(run, server, mine, tmp_path / "expected")["mine.png"]
    folder = Path(upload["path"]).parents[1]
    (folder / "linked").symlink_to(tmp_path)
    before = contents(server.files)
    wrong = [
        private, str(tmp_path / "missing.png"), "/etc/passwd", os.path.relpath(private, ROOT), str(result),
        f"{folder}/linked/private.png", f"{folder}/x/../../../../private.png", "https://example.com/a.png", 3,
    ]
    requests = [("picture_derain", named(path), *program.choice) for path in wrong]
    for path in (private, str(tmp_path / "missing.png")):
        requests += [
            ("picture_derain", {**named(path), "is_stream": True}, *program.choice),
            ("picture_derain", upload, named(path), *program.choice[1:]),
            ("pair_derain", upload, named(path), *program.choice),
            ("video_derain", named(path), *program.choice),
            ("dataset", [named(path)]),
        ]
    for element, *data in requests:
        done, output = program.send(element, *data)
        assert not done and output["error"] == NOT_UPLOADED, (data, output)
    assert contents(server.files) == before and "example.com" not in server.log.read_text()
    (folder / "linked").unlink()


@pytest.mark.slow
def test_a_picture_of_the_sample_is_taken(program):
    done, output = program.send("dataset", 2)
    assert done, output
    result, _ = program.derain(named(output["data"][0]["path"]))
    assert result.name == "rain-003.png"
    for wrong in (-1, 99, "zzz", None, 0.5):
        done, output = program.send("dataset", wrong)
        assert not done and output["error"] == "expected a picture of the bundled sample"


@pytest.mark.slow
def test_one_wrong_request_ends_no_page(program, tmp_path):
    upload = program.upload(save(tmp_path / "a.png", photo(1)))
    model, precision, _ = program.choice
    for choice, label in (
        ([model, precision, "zzz"], "Self-ensemble"), ([model, precision, None], "Self-ensemble"),
        ([model, None, False], "Precision"), ([None, precision, False], "Model"),
    ):
        for element in ("picture_derain", "video_derain"):
            done, output = program.send(element, upload, *choice)
            assert not done and output["error"].startswith(f"{label}: expected "), output
    program.derain(upload)


@pytest.mark.slow
def test_no_job_starts_past_the_queue(program, tmp_path):
    data = [program.upload(save(tmp_path / "a.png", photo(1))), *program.choice]
    message = json.dumps({"data": data, "fn_index": program.event("picture_derain", data)}).encode()
    with pytest.raises(HTTPError) as caught:
        program.get("/gradio_api/run/predict", message)
    assert caught.value.code == 404


@pytest.mark.slow
def test_the_server_fetches_nothing_for_a_visitor(program, server):
    for name in ("file=", "file/"):
        with pytest.raises(HTTPError) as caught:
            program.get(f"/gradio_api/{name}https://example.com/a.png")
        assert caught.value.code == 404
    assert "example.com" not in server.log.read_text()


# The browser


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium, which drives the browser, is not installed")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser or not shutil.which("chromedriver"):
        pytest.skip("no browser: expected chromium and chromedriver, in Debian's packages chromium and chromium-driver")
    folder = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in (*BROWSER_OPTIONS, f"user-data-dir={folder}"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


class Visitor:
    """A page that is open in a window of its own."""

    def __init__(self, driver, url, downloads):
        self.driver, self.downloads = driver, downloads
        downloads.mkdir()
        driver.switch_to.new_window("window")
        self.window = driver.current_window_handle
        driver.get(url)
        self.wait(lambda: self.find("#picture_0 input[type=file]"))

    def switch(self):
        self.driver.switch_to.window(self.window)
        return self

    def leave(self):
        """Close the page."""
        self.switch()
        self.driver.close()
        self.window = None

    def wait(self, condition, what="the page"):
        """Wait until a function gives something true, and return that."""
        end = time.monotonic() + PATIENCE
        while not (value := condition()):
            assert time.monotonic() < end, f"waited in vain for {what}; the page says: {self.find('body')[0].text}"
            time.sleep(0.05)
        return value

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, selector):
        return " ".join(element.text for element in self.find(selector))

    def open_tab(self, name):
        self.wait(lambda: [tab for tab in self.find("button[role=tab]") if tab.text == name])[0].click()

    def upload(self, place, path):
        """Put a file where one is dropped; one that is there already is taken away before."""
        for button in self.find(f"#{place} button[aria-label='Clear']"):
            button.click()
        field = self.wait(lambda: self.find(f"#{place} input[type=file]"), place)[0]
        field.send_keys(str(path))

    def derain(self, tab, *paths):
        """Upload files to a tab and press its button."""
        for number, path in enumerate(paths):
            self.upload(f"{tab}_{number}", path)
            self.wait(lambda: path.stem in self.text(f"#{tab}_{number} .file-preview"), path.name)
        self.find(f"#{tab}_derain")[0].click()

    def report(self, tab, before=""):
        """What the page says about the job once it is done."""
        return self.wait(lambda: (text := self.text(f"#{tab}_report")) != before and text, "a report")

    def refusal(self):
        """The sentence of an error, which is then put away."""
        text = self.wait(lambda: self.text(".toast-body"), "an error")
        for button in self.find(".toast-close"):
            button.click()
        self.wait(lambda: not self.find(".toast-body"))
        return text

    def download(self, tab, name):
        """Press the button, and return the bytes of the file that comes."""
        where = {"behavior": "allow", "downloadPath": str(self.downloads)}  # of all windows
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
        self.find(f"#{tab}_download")[0].click()
        path = self.downloads / name
        # The browser keeps the name with an empty file until it has the whole one to put in its place.
        return self.wait(lambda: path.is_file() and path.read_bytes(), name)


@pytest.fixture
def visitor(driver, server, tmp_path):
    """A function that opens a ``Visitor``; their windows are closed afterwards."""
    first, visitors = driver.current_window_handle, []

    def visit():
        visitors.append(Visitor(driver, server.url, tmp_path / f"downloads{len(visitors)}"))
        return visitors[-1]

    yield visit
    for each in visitors:
        if each.window:
            each.leave()
    driver.switch_to.window(first)


def outside(server, driver):
    """What the browser and the server have asked for that is not on this machine."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    urls = [urlsplit(each["request"]["url"]) for each in sent]
    assert any(url.hostname == "127.0.0.1" for url in urls)
    foreign = [url.geturl() for url in urls if url.scheme in ("http", "https", "ws", "wss")]
    called = server.log.read_text().splitlines()
    assert any("127.0.0.1" in line for line in called)
    return [address for address in foreign + called if "127.0.0.1" not in address]


def derained(run, server, path, folder, *options):
    """{name: bytes} of what test.py makes of a picture or a folder."""
    result = run("test", "--test_data_path", path, "--save_path", server.network, "--output_path", folder, *options)
    assert result.status == 0, result
    return contents(folder)


def write_video(path, frames, size=(160, 120)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, size)
    still = photo(3, size[1], size[0])
    for number in range(frames):
        writer.write(with_rain(still, number))
    writer.release()
    return path


def frames_of(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def job_folders(server):
    """The folders of results that the server has now."""
    return sorted(server.files.glob("*/job-*"))


@pytest.mark.slow
def test_a_picture_comes_back_as_test_py_writes_it(visitor, server, driver, run, tmp_path):
    """Of 16 bits and with a colour profile; and before it, three files that are refused."""
    page = visitor()
    text = tmp_path / "words.png"
    text.write_text("no picture")
    page.derain("picture", text)
    refusal = page.refusal()
    assert "words.png: not a readable image" in refusal and str(server.files) not in refusal

    page.derain("picture", save(tmp_path / "large.png", photo(1, 300, 400)))
    assert "large.png: 400x300, 120,000 pixels; expected at most 60,000" in page.refusal()

    heavy = save(tmp_path / "heavy.bmp", photo(1, 1200, 1000))
    page.upload("picture_0", heavy)
    assert "heavy.bmp" in page.refusal()

    deep = with_rain(photo(2)).astype(np.uint16) * 257 + 5
    path, profile = tmp_path / "deep.tif", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write_image(path, deep, Metadata(profile))
    page.derain("picture", path)
    assert "64 × 48, 16 bits" in page.report("picture")
    result = page.download("picture", "deep.png")
    assert result == derained(run, server, path, tmp_path / "expected")["deep.png"]
    kept = read_metadata(page.downloads / "deep.png")
    assert kept.profile == profile and read_image(page.downloads / "deep.png").dtype == np.uint16


@pytest.mark.slow
def test_the_slider_shows_both_pictures(visitor, server):
    from selenium.webdriver import ActionChains

    page = visitor()
    page.wait(lambda: page.find(".gallery-item"))[2].click()
    page.wait(lambda: "rain-003" in page.text("#picture_0 .file-preview"))
    page.find("#picture_derain")[0].click()
    assert "288 × 192, 8 bits" in page.report("picture")
    images = page.find("#picture_slider img")
    assert len(images) == 2
    before = images[1].get_attribute("style")
    handle = page.find("#picture_slider [data-testid=slider] .icon-wrap")[0]
    ActionChains(page.driver).drag_and_drop_by_offset(handle, 100, 0).perform()
    page.wait(lambda: images[1].get_attribute("style") != before, "the slider")


@pytest.mark.slow
def test_two_visitors_get_their_own_results(visitor, server, driver, run, tmp_path):
    """The first with a clean picture, the second with --self_ensemble."""
    folder = make_pairs(tmp_path / "set", [1])
    other = save(tmp_path / "other.png", with_rain(photo(5, 40, 72), 1))
    first, second = visitor(), visitor()
    second.find("#self_ensemble input")[0].click()
    first.switch().open_tab("With a clean picture")
    first.derain("pair", folder / "rain-1.png", folder / "norain-1.png")
    second.switch().derain("picture", other)
    assert "72 × 40" in second.report("picture")
    expected = derained(run, server, other, tmp_path / "expected", "--self_ensemble")["other.png"]
    assert second.download("picture", "other.png") == expected

    report = first.switch().report("pair")
    expected = derained(run, server, folder, tmp_path / "measured")
    assert first.download("pair", "rain-1.png") == expected["rain-1.png"]
    after = next(csv.DictReader(io.StringIO(expected["metrics.csv"].decode())))
    before = measure(read_rgb(folder / "rain-1.png"), read_rgb(folder / "norain-1.png"))
    for name, row in (("rainy", before), ("derained", after)):
        psnr_y, ssim_y, psnr_rgb, ssim_rgb = (float(row[metric]) for metric in METRICS)
        assert f"{name} {psnr_y:.3f} dB {ssim_y:.4f} {psnr_rgb:.3f} dB {ssim_rgb:.4f}" in report


@pytest.mark.slow
def test_a_video_is_cancelled_and_the_next_one_done(visitor, server, run, tmp_path):
    page = visitor()
    earlier = job_folders(server)
    page.open_tab("Video")
    page.derain("video", write_video(tmp_path / "endless.mp4", 250))
    page.wait(lambda: "/250" in page.text("#video_player"), "progress")
    page.find("#video_cancel")[0].click()
    assert page.report("video") == "Cancelled."
    page.wait(lambda: job_folders(server) == earlier, "the folder to go")

    short = write_video(tmp_path / "short.mp4", 3)
    page.derain("video", short)
    report = page.report("video", "Cancelled.")
    assert "3 frames" in report and "grey levels before" in report
    assert len(job_folders(server)) == len(earlier) + 1
    (tmp_path / "downloaded.mp4").write_bytes(page.download("video", "short.mp4"))
    derained(run, server, short, tmp_path / "expected")
    assert np.array_equal(frames_of(tmp_path / "downloaded.mp4"), frames_of(tmp_path / "expected/short.mp4"))

    page.derain("video", write_video(tmp_path / "long.mp4", 301))
    assert "long.mp4: more than 300 frames; expected at most that many" in page.refusal()


@pytest.mark.slow
def test_a_video_ends_when_its_page_is_closed(visitor, server, driver, tmp_path):
    """And nothing was asked of another machine all the while."""
    page, earlier = visitor(), job_folders(server)
    page.open_tab("Video")
    page.derain("video", write_video(tmp_path / "endless.mp4", 250))
    page.wait(lambda: "/250" in page.text("#video_player"), "progress")
    assert outside(server, driver) == []
    page.leave()
    end = time.monotonic() + PATIENCE
    while job_folders(server) != earlier:
        assert time.monotonic() < end
        time.sleep(0.1)
