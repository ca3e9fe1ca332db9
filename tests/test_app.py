"""app.py in a real browser: pictures and videos are done as by test.py, and nothing leaves the machine."""
import csv
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from urllib.parse import urlsplit

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import ImageCms

import utils
from checkpoints import save_checkpoint
from conftest import ROOT, contents, make_pairs, photo, save, with_rain
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


# The browser


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
        return self.wait((self.downloads / name).is_file, name) and (self.downloads / name).read_bytes()


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
    assert "large.png: 400x300, 0.1 megapixels; expected at most 0.06" in page.refusal()

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
    page.open_tab("Video")
    page.derain("video", write_video(tmp_path / "endless.mp4", 250))
    page.wait(lambda: "/250" in page.text("#video_player"), "progress")
    page.find("#video_cancel")[0].click()
    assert page.report("video") == "Cancelled."
    page.wait(lambda: not job_folders(server), "the folder to go")

    short = write_video(tmp_path / "short.mp4", 3)
    page.derain("video", short)
    report = page.report("video", "Cancelled.")
    assert "3 frames" in report and "grey levels before" in report
    assert len(job_folders(server)) == 1
    (tmp_path / "downloaded.mp4").write_bytes(page.download("video", "short.mp4"))
    derained(run, server, short, tmp_path / "expected")
    assert np.array_equal(frames_of(tmp_path / "downloaded.mp4"), frames_of(tmp_path / "expected/short.mp4"))

    page.derain("video", write_video(tmp_path / "long.mp4", 301))
    assert "long.mp4: 301 frames; expected at most 300" in page.refusal()


@pytest.mark.slow
def test_a_visitor_leaves_nothing_behind(visitor, server, driver, tmp_path):
    """All earlier tests have closed their pages; and nothing was asked of another machine all the while."""
    page = visitor()
    page.derain("picture", save(tmp_path / "small.png", photo(6)))
    page.report("picture")
    assert outside(server, driver) == []
    page.wait(lambda: len(job_folders(server)) == 1, "the others' folders to go")
    page.leave()
    end = time.monotonic() + PATIENCE
    while job_folders(server):
        assert time.monotonic() < end
        time.sleep(0.1)
