"""The page of `ctmasknet demo --web`: what it reads and refuses, and the page itself in a browser."""

from __future__ import annotations

import gzip
import http.client
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import golden
import numpy as np
import pytest
from phantom import phantom
from PIL import Image

import ctmasknet.page
from ctmasknet.cli import main
from ctmasknet.errors import ConfigError, InputError

pytest.importorskip("gradio")
pytest.importorskip("matplotlib")

from scans import block_volume, write_series

from ctmasknet.page import open_case, serve

MEGABYTE = 1_000_000


def png(size: int = 128) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(phantom(0, size=size).image).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture(autouse=True)
def small_limit(monkeypatch):
    monkeypatch.setattr(ctmasknet.page, "MAX_BYTES", 2 * MEGABYTE)


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def series(tmp_path):
    """The files of a DICOM series of 6 slices."""
    pytest.importorskip("pydicom")
    pytest.importorskip("nibabel")
    slices = np.flip(block_volume().transpose(2, 1, 0), 1)
    return write_series(tmp_path / "series", np.ascontiguousarray(slices))


def test_a_picture_is_read_without_loss(work, tmp_path):
    (tmp_path / "a b.png").write_bytes(png())
    case = open_case([str(tmp_path / "a b.png")], work, None)
    expected = np.asarray(phantom(0, size=128).image, np.float32) / 255
    np.testing.assert_allclose(case.slice(0).pixels, expected, atol=1e-6)
    assert case.name == "a b.png"
    case.drop()
    assert not list(work.iterdir())


def test_a_bad_file_gives_one_line_without_our_folders_and_is_deleted(work, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(InputError) as caught:
        open_case([str(tmp_path / "x.png")], work, None)
    assert str(caught.value).startswith("x.png: not a readable image")
    assert "\n" not in str(caught.value)
    assert not list(work.iterdir())


def test_files_that_are_no_series_are_refused_in_one_line(work, tmp_path):
    paths = [tmp_path / "1.png", tmp_path / "2.png"]
    for path in paths:
        path.write_bytes(png())
    with pytest.raises(InputError, match="no readable slice of a DICOM series") as caught:
        open_case([str(path) for path in paths], work, None)
    assert str(work) not in str(caught.value)
    assert not list(work.iterdir())


def test_a_series_is_read_as_a_scan_whatever_the_folders_its_files_came_in(work, series, tmp_path):
    paths = []
    for number, path in enumerate(series):  # each in a folder of its own, as gradio keeps uploads; two of one name
        (tmp_path / "sent" / str(number)).mkdir(parents=True)
        paths.append(shutil.copy(path, tmp_path / "sent" / str(number) / ("same.dcm" if number < 2 else path.name)))
    case = open_case(paths, work, None)
    assert sorted(case.content.names) == list(range(6))
    assert case.slice(4).pixels.max() == 1
    assert str(work) not in repr(case.content) + repr(case.notes)
    with pytest.raises(InputError, match="no slice 6"):
        case.slice(6)


def test_a_nifti_scan_is_read_and_a_damaged_one_refused(work, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(block_volume().astype(np.int16), np.diag([0.7, 0.7, 5, 1])), path)
    assert len(open_case([str(path)], work, None).content.names) == 6
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:200]))
    with pytest.raises(InputError, match=r"^scan\.nii\.gz: "):
        open_case([str(path)], work, None)


def test_more_than_the_limits_is_refused(work, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(bytes(MEGABYTE + 1))
    with pytest.raises(InputError, match="more than 2 MB"):
        open_case([str(path), str(path)], work, None)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="2000 files"):
        open_case([str(path)] * 2001, work, None)
    assert not list(work.iterdir())


def test_the_port_is_the_pages(capsys):
    assert main(["demo", "--port", "7000"]) == 2
    assert "--port goes with --web" in capsys.readouterr().err


class Served:
    """A page in a thread of its own, on this machine only."""

    def __init__(self, **options) -> None:
        self.started, self._stop, self.failed = threading.Event(), threading.Event(), None
        self.thread = threading.Thread(target=self._run, kwargs=options)
        self.thread.start()
        assert self.started.wait(90)
        if self.failed is not None:
            raise self.failed

    def _run(self, **options) -> None:
        try:
            serve(device="cpu", on_start=self._note, stop=self._stop, **options)
        except Exception as error:
            self.failed = error
            self.started.set()

    def _note(self, address: str) -> None:
        self.address = address
        self.started.set()

    def close(self) -> None:
        self._stop.set()
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A page with an author's checkpoint as its segmenter."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = golden.checkpoint(tmp_path / "author.pth", "maskrcnn_resnet18_t2")
    page = Served(segmenter=str(path))
    yield page
    page.close()
    assert not list(tmp_path.glob("ctmasknet-page-*"))  # nothing stays
    assert "GRADIO_TEMP_DIR" not in os.environ


@pytest.fixture(scope="module")
def shared_page():
    """A page for tests that only ask."""
    page = Served(segmenter="none")
    yield page
    page.close()


def answer(request: str | urllib.request.Request) -> tuple[int, str, str]:
    """Status, headers and text."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as reply:
            return reply.status, str(reply.headers), reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, str(error.headers), error.read().decode()


def announce(address: str, size: int | None) -> tuple[int, str]:
    """Status and text if an upload of this size (None: chunks) is only announced: who is refused need not send it."""
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=20)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader(*(("Transfer-Encoding", "chunked") if size is None else ("Content-Length", str(size))))
    connection.endheaders()
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


def upload(address: str, size: int, start: bytes = b"") -> urllib.request.Request:
    mark = uuid.uuid4().hex
    head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n'.encode()
    body = head + start + bytes(size) + f"\r\n--{mark}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
    return urllib.request.Request(f"{address}gradio_api/upload", body, headers)


def test_the_page_offers_the_weights_it_was_given_bounds_uploads_and_leaves_nothing(served, tmp_path):
    status, _, text = answer(served.address)
    assert status == 200
    assert "author.pth" in text
    assert "not a medical device" in text
    assert answer(upload(served.address, 1000))[0] == 200
    assert answer(upload(served.address, 2_000_001))[0] == 413
    assert answer(f"{served.address}gradio_api/file=/etc/passwd")[0] == 403
    assert list(tmp_path.glob("ctmasknet-page-*/**/x.png"))  # taken away at the end: see the fixture


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"Origin": "{address}", "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, True),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, True),  # a link to the page
        ({"Origin": "http://example.org"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://127.0.0.1:1"}, False),  # another program on this machine
        ({"Host": "example.org"}, False),  # a name that was made to lead here
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, False),
    ],
)
def test_requests_of_other_origins_are_refused(shared_page, headers, allowed):
    headers = {key: value.format(address=shared_page.address.rstrip("/")) for key, value in headers.items()}
    sent = upload(shared_page.address, 10)
    for key, value in headers.items():
        sent.add_header(key, value)
    assert answer(sent)[0] == (200 if allowed else 403)
    page = urllib.request.Request(shared_page.address, headers=headers)
    assert answer(page)[0] == (200 if allowed else 403)


def test_uploads_are_bounded_also_all_together(shared_page, monkeypatch):
    assert announce(shared_page.address, 3_500_000) == (403, "more than 2 MB in one upload")
    assert announce(shared_page.address, None)[0] == 403  # chunks of a total that is not stated
    monkeypatch.setattr(ctmasknet.page, "KEPT_UPLOADS", 1)
    for _ in range(2):
        assert answer(upload(shared_page.address, 1_500_000, os.urandom(8)))[0] == 200
    full = "too much is kept here: start the page anew, or try again in an hour"
    assert announce(shared_page.address, 1000) == (403, full)


@pytest.mark.skipif(sys.platform == "win32", reason="other signals")
@pytest.mark.parametrize("how", [pytest.param("SIGTERM", marks=pytest.mark.slow), "SIGKILL"])
def test_nothing_stays_after_stop_or_kill(tmp_path, how):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "ctmasknet", "demo", "--web", "--segmenter", "none"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        address = re.search(r"http://\S+", process.stdout.readline())[0]
        assert answer(upload(address, 1000))[0] == 200
        assert list(tmp_path.glob("ctmasknet-page-*/**/x.png"))
        process.send_signal(getattr(signal, how))
        process.wait(120)
    end = time.monotonic() + 60
    while list(tmp_path.glob("ctmasknet-page-*")):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_port_that_is_taken_is_one_clear_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="choose another --port"):
            Served(segmenter="none", port=taken.getsockname()[1])


browser_needed = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium"
)


@pytest.mark.slow
@browser_needed
def test_the_page_in_a_browser(tmp_path, series):
    pytest.importorskip("selenium")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    page = Served()
    first, second = Browser(page.address, tmp_path / "1"), Browser(page.address, tmp_path / "2", width=400)
    try:
        # Predict at once, on what is there; two visitors at a time.
        for browser in (first, second):
            browser.watch("predicted")
            browser.click("#predict")
        for browser in (first, second):
            browser.wait_for("#status", "slice.png: predicted")
            assert browser.seen_with_status() != browser.first_picture  # no word of success before the picture
            assert "lesions covering" in browser.text("#facts")
            assert "one patient with common pneumonia" in browser.text("#facts")
        assert second.font_size("#facts p") >= 14  # legible on a phone
        assert second.width() <= 400
        assert ".json" in first.text("#files")

        before = first.text("#facts")
        first.to_the_end("#threshold input[type=range]")
        first.wait_for("#facts", "no lesion above 1.00")
        assert before != first.text("#facts")
        for view in ("Score map", "RoI contributions"):
            picture = first.picture()
            first.click(f"#view input[value='{view}']")
            first.wait(lambda picture=picture: first.picture() != picture, f"another picture for {view}")

        first.upload([bad])
        first.wait_for("#status", "bad.png: not a readable image")
        assert "Traceback" not in first.text("body")

        first.upload(series)
        first.wait_for("#status", "6 files: a scan of 6 slices")
        first.click("#predict")
        first.wait_for("#status", "6 files: predicted")
        assert "6 slices" in first.text("#facts")
        assert "lesions.nii" in first.text("#files")
        assert first.other_hosts() == second.other_hosts() == set()
    finally:
        first.driver.quit()
        second.driver.quit()
        page.close()


class Browser:
    """Headless Chromium on the page."""

    def __init__(self, address: str, profile: Path, width: int = 1400) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        if width < 500:
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": {"width": width, "height": 850}})
        switches = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        switches += f" disable-component-update disable-sync no-proxy-server window-size={width},1300"
        for switch in [*switches.split(), f"user-data-dir={profile}"]:
            options.add_argument(f"--{switch}")
        self.address = address
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        self.driver.get(address)
        self.wait_for("#status", "Press Predict")
        self.wait(lambda: self.picture() != "", "the example")
        self.first_picture = self.picture()

    def run(self, script: str, *arguments: str):
        return self.driver.execute_script(script, *arguments)

    def text(self, css: str) -> str:
        return self.run("const e = document.querySelector(arguments[0]); return e ? e.innerText : ''", css)

    def picture(self) -> str:
        return self.run("const e = document.querySelector('#picture img'); return e ? e.src : ''")

    def watch(self, word: str) -> None:
        """Note which picture is there when the status first says so."""
        self.run(
            "const word = arguments[0]; window.seen = null; new MutationObserver(() => {"
            " if (window.seen === null && document.querySelector('#status').innerText.includes(word))"
            " window.seen = document.querySelector('#picture img').src;"
            "}).observe(document.body, {childList: true, subtree: true, characterData: true})",
            word,
        )

    def seen_with_status(self) -> str:
        return self.run("return window.seen")

    def font_size(self, css: str) -> float:
        return float(self.run("return getComputedStyle(document.querySelector(arguments[0])).fontSize", css)[:-2])

    def width(self) -> int:
        return self.run("return document.documentElement.scrollWidth")

    def wait(self, happens, what: str) -> None:
        end = time.monotonic() + 90
        while not happens():
            assert time.monotonic() < end, f"never: {what}"
            time.sleep(0.2)

    def wait_for(self, css: str, text: str) -> None:
        self.wait(lambda: text in self.text(css), f"{css}: {text!r}")

    def click(self, css: str) -> None:
        self.run("document.querySelector(arguments[0]).click()", css)

    def upload(self, paths: list[Path]) -> None:
        """Another upload in place of the one before."""
        self.run("document.querySelector('#upload button[aria-label=Clear], #upload button[title=Clear]')?.click()")
        self.wait(lambda: self.run("return document.querySelector('#upload input[type=file]') !== null"), "a field")
        field = self.driver.find_element("css selector", "#upload input[type=file]")
        field.send_keys("\n".join(str(path) for path in paths))

    def to_the_end(self, css: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.run("document.querySelectorAll('button').forEach(b => b.innerText.includes('thresholds') && b.click())")
        self.wait(lambda: self.run("return document.querySelector(arguments[0]) !== null", css), css)
        self.driver.find_element("css selector", css).send_keys(Keys.END)

    def other_hosts(self) -> set[str]:
        """Hosts other than the page's that it loaded anything from."""
        names = self.run("return performance.getEntriesByType('resource').map(e => e.name)")
        return {name for name in names if not name.startswith((self.address, "data:", "blob:"))}
