"""Make docs/overlay.png and docs/demo.png again: the example slice as the bundled weights see it.

python tools/docs_pictures.py

Run it whenever the default weights change; each picture records the digests of those it was made with, and a test
compares them. The picture of the page needs the extra ``demo``, selenium, chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import tempfile
import threading
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ctmasknet import get_variant, predict
from ctmasknet.example import SLICE
from ctmasknet.registry import DEFAULT_CLASSIFIER, DEFAULT_SEGMENTER
from ctmasknet.weights.manifest import default_entry

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = ("overlay.png", "demo.png")
WINDOW = "1200,1000"  # pixels


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    save(predict(SLICE, device="cpu").plot(), DOCS / "overlay.png")
    save(page(), DOCS / "demo.png")
    return 0


def weights() -> dict[str, str]:
    """SHA-256 of the default weights by variant."""
    return {name: default_entry(get_variant(name)).sha256 for name in (DEFAULT_SEGMENTER, DEFAULT_CLASSIFIER)}


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture with the digests of the weights it shows."""
    text = PngInfo()
    for name, digest in weights().items():
        text.add_text(name, digest)
    picture.save(path, pnginfo=text, optimize=True)


def page() -> Image.Image:
    """The page after Predict, in headless Chromium."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    from ctmasknet.page import serve

    started, stop, addresses = threading.Event(), threading.Event(), []

    def note(address: str) -> None:
        addresses.append(address)
        started.set()

    thread = threading.Thread(target=serve, kwargs={"device": "cpu", "on_start": note, "stop": stop})
    thread.start()
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory() as profile:
        for switch in ("headless=new", "no-sandbox", "no-proxy-server", "hide-scrollbars", f"window-size={WINDOW}"):
            options.add_argument(f"--{switch}")
        options.add_argument(f"--user-data-dir={profile}")
        try:
            if not started.wait(120):
                raise SystemExit("the page did not start")
            driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
            try:
                driver.get(addresses[0])
                wait = WebDriverWait(driver, 120)
                wait.until(lambda d: "Press Predict" in d.find_element(By.ID, "status").text)
                driver.find_element(By.ID, "predict").click()
                wait.until(lambda d: "predicted" in d.find_element(By.ID, "status").text)
                wait.until(
                    lambda d: d.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth)")
                )
                # The whole page, below the window's edge too: a larger window would enlarge the picture on it.
                shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
                return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
            finally:
                driver.quit()
        finally:
            stop.set()
            thread.join()


if __name__ == "__main__":
    raise SystemExit(main())
