"""The page of `ctmasknet demo --web`: what it reads, keeps and refuses; and the page itself in a browser."""

from __future__ import annotations

import http.client
import io
import shutil
import stat
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from phantom import phantom
from PIL import Image

from ctmasknet import Predictor
from ctmasknet.cli import main
from ctmasknet.errors import ConfigError, InputError

pytest.importorskip("gradio")
pytest.importorskip("matplotlib")

from scans import block_volume, write_series

from ctmasknet.web import serve
from ctmasknet.web.case import Case, Cases, Models, predict_case
from ctmasknet.web.uploads import Limits, read_upload, sweep

SEGMENTER = "maskrcnn_resnet18_t2"


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "work" / "uploads"
    folder.mkdir(parents=True)
    return folder


def put(root: Path, name: str, content: bytes) -> str:
    """As gradio does: every upload in a folder named by its content."""
    folder = root / f"{abs(hash(content)):x}"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return str(folder / name)


def png(size: int = 128) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(phantom(0, size=size).image).save(stream, format="PNG")
    return stream.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def left(root: Path) -> list[Path]:
    return [path for path in root.parent.rglob("*") if path != root]


def test_a_picture_is_read_without_loss_and_deleted(root):
    case = read_upload([put(root, "a b.png", png())], root, Limits(1))
    expected = np.asarray(phantom(0, size=128).image, np.float32) / 255
    np.testing.assert_allclose(case.slice(0).pixels, expected, atol=1e-6)
    assert case.name == "a b.png"
    assert not left(root)


def test_a_bad_file_gives_one_line_without_our_folders_and_is_deleted(root):
    with pytest.raises(InputError) as caught:
        read_upload([put(root, "x.png", b"no picture")], root, Limits(1))
    assert str(caught.value).startswith("x.png: not a readable image")
    assert "\n" not in str(caught.value)
    assert not left(root)


@pytest.mark.parametrize("packed", [False, True])
def test_a_series_is_read_as_a_scan_from_files_and_from_a_zip(root, tmp_path, packed):
    pytest.importorskip("pydicom")
    pytest.importorskip("nibabel")
    slices = np.flip(block_volume().transpose(2, 1, 0), 1)
    files = write_series(tmp_path / "series", np.ascontiguousarray(slices))
    members = {f"deep/{path.name}": path.read_bytes() for path in files} | {"__MACOSX/x": b"?"}
    if packed:
        paths = [put(root, "scan.zip", zipped(members))]
    else:
        paths = [put(root, path.name, path.read_bytes()) for path in files]
    case = read_upload(paths, root, Limits(10))
    assert sorted(case.slices) == list(range(6))
    assert case.slice(4).pixels.max() == 1
    assert case.volume is not None
    assert "work" not in repr(case.volume)
    assert not left(root)


@pytest.mark.parametrize("name", ["../out.png", "/out.png", "a/../../out.png", "..\\out.png", "C:\\out.png"])
def test_zip_names_that_lead_elsewhere_are_refused(root, name):
    with pytest.raises(InputError, match="leads out of the archive"):
        read_upload([put(root, "z.zip", zipped({name: png()}))], root, Limits(1))
    assert not left(root)


def test_a_zip_bomb_is_refused(root):
    with pytest.raises(InputError, match="unpacks to more"):
        read_upload([put(root, "z.zip", zipped({"a.dcm": bytes(5_000_000)}))], root, Limits(1))
    assert not left(root)


def test_a_zip_of_very_many_files_and_one_with_a_link_are_refused(root):
    with pytest.raises(InputError, match="more than 2000 files"):
        read_upload([put(root, "z.zip", zipped({str(number): b"" for number in range(2001)}))], root, Limits(1))
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="holds a link"):
        read_upload([put(root, "l.zip", stream.getvalue())], root, Limits(1))


def test_more_than_the_limit_is_refused(root):
    with pytest.raises(InputError, match="more than 1 MB"):
        read_upload([put(root, "x.png", bytes(1_000_001))], root, Limits(1))
    assert not left(root)


def test_files_that_were_not_uploaded_are_neither_read_nor_deleted(root, tmp_path):
    other = tmp_path / "private.png"
    other.write_bytes(png())
    for path in (other, root.parent / "uploads" / ".." / ".." / "private.png"):
        with pytest.raises(InputError, match="was not uploaded here"):
            read_upload([str(path)], root, Limits(1))
    assert other.exists()


def test_forgotten_uploads_are_swept(root):
    put(root, "x.png", png())
    sweep(root, 600, time.time())
    assert left(root)
    sweep(root, 600, time.time() + 601)
    assert not left(root)


def test_filtering_equals_predicting_at_that_threshold():
    models = Models((SEGMENTER,), (), device="cpu")
    case = Case.of_slice(_slice(), "p")
    assert list(predict_case(case, models, SEGMENTER, "none", None)) == [(1, 1)]
    for threshold in (0.1, 0.3, 0.6):
        expected = Predictor(SEGMENTER, None, device="cpu", score_threshold=threshold)(_slice())
        found = case.result.prediction(0, threshold)
        np.testing.assert_array_equal(found.scores, expected.scores)
        np.testing.assert_array_equal(found.boxes, expected.boxes)
        np.testing.assert_array_equal(found.masks, expected.masks)
        assert found.to_dict()["score_threshold"] == threshold


def _slice():
    from ctmasknet.data.slices import read_slice

    return read_slice(phantom(0, size=256).image)


def test_only_models_on_offer_are_loaded(tmp_path):
    models = Models((SEGMENTER,), ())
    with pytest.raises(ConfigError, match="not on offer"):
        models.load("segmentation", str(tmp_path))


def test_old_cases_make_room_and_say_so():
    cases = Cases(limit=1)
    tokens = [cases.add(Case.of_slice(_slice(), "p")) for _ in range(2)]
    assert len(cases) == 1
    with pytest.raises(InputError, match="upload it again"):
        cases.get(tokens[0])


def test_options_of_the_page_need_it(capsys):
    assert main(["demo", "--port", "7000"]) == 2
    assert "--port goes with --web" in capsys.readouterr().err


@pytest.fixture
def address():
    """A running page, on this machine only."""
    started, stop, found = threading.Event(), threading.Event(), []
    failed = []

    def run():
        try:
            serve(
                segmenter=SEGMENTER,
                classifier="ctmasknet_resnet18_t1",
                device="cpu",
                max_upload_mb=2,
                on_start=lambda url: (found.append(url), started.set()),
                stop=stop,
            )
        except Exception as error:
            failed.append(error)
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    if failed:
        raise failed[0]
    yield found[0]
    stop.set()
    thread.join(30)
    assert not thread.is_alive()


def _status(request) -> int:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_page_serves_itself_and_nothing_else(address):
    assert _status(address) == 200
    for path in ("file=/etc/passwd", "file=http://example.com/", "proxy=http://example.com/", "runs", "info"):
        assert _status(f"{address}gradio_api/{path}") == 404
    # The length alone decides: the answer comes before, and without, the body.
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=20)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Length", "3100000")
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=20) as reply:
        assert "default-src 'self'" in reply.headers["content-security-policy"]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium")
def test_the_page_in_a_browser(address, tmp_path):
    pytest.importorskip("selenium")
    good, bad = tmp_path / "phantom.png", tmp_path / "bad.png"
    good.write_bytes(png(256))
    bad.write_bytes(b"no picture")
    first, second = Browser(address, tmp_path / "1"), Browser(address, tmp_path / "2")
    try:
        first.upload(good)
        first.wait_for("#status", "1 slice read")
        first.click("#predict")
        second.upload(good)  # while the first runs
        second.wait_for("#status", "1 slice read")
        second.click("#predict")
        for browser in (first, second):
            browser.wait_for("#status", "phantom.png: predicted")
            browser.wait_for("#facts", "class probabilities")
        before = first.text("#facts")
        first.to_the_end("#threshold input[type=range]")
        first.wait_for("#facts", "no lesion above 1.00")
        assert before != first.text("#facts")
        first.upload(bad)
        first.wait_for("#status", "bad.png: not a readable image")
        assert "Traceback" not in first.text("body")
        assert first.other_hosts() == set()
    finally:
        first.driver.quit()
        second.driver.quit()


class Browser:
    """Headless Chromium on the page."""

    def __init__(self, address: str, profile: Path) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        switches = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        switches += (
            f" disable-component-update disable-sync no-proxy-server window-size=1400,1300 user-data-dir={profile}"
        )
        for switch in switches.split():
            options.add_argument(f"--{switch}")
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.address = address
        self.driver = webdriver.Chrome(options, service)
        self.driver.get(address)
        self.wait_for("#status", "Upload a file")

    def text(self, css: str) -> str:
        return self.driver.execute_script(
            "const e = document.querySelector(arguments[0]); return e ? e.innerText : ''", css
        )

    def wait_for(self, css: str, text: str) -> None:
        end = time.monotonic() + 90
        while text not in self.text(css):
            assert time.monotonic() < end, f"{css} does not say {text!r} but {self.text(css)!r}"
            time.sleep(0.2)

    def click(self, css: str) -> None:
        self.driver.execute_script("document.querySelector(arguments[0]).click()", css)

    def upload(self, path: Path) -> None:
        self.driver.find_element("css selector", "input[type=file]").send_keys(str(path))

    def to_the_end(self, css: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.driver.find_element("css selector", css).send_keys(Keys.END)

    def other_hosts(self) -> set[str]:
        """Hosts other than the page's that it loaded anything from."""
        names = self.driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        return {name for name in names if not name.startswith((self.address, "data:", "blob:"))}
