"""Make the pictures of docs/gallery.md again: what the bundled weights see, and where they fail.

python tools/docs_pictures.py

Run it whenever the default weights change; each picture records the digests of those it was made with, and a test
compares them. The failures need the extra ``plots``, the picture of the page the extra ``demo``, selenium, chromium
and chromedriver.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from phantom import FIELD_OF_VIEW, GROUND_GLASS, Phantom, phantom, write_scan
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ctmasknet import Predictor, get_variant, predict
from ctmasknet.evaluation.metrics import mask_iou
from ctmasknet.example import SLICE
from ctmasknet.registry import DEFAULT_CLASSIFIER, DEFAULT_SEGMENTER
from ctmasknet.weights.manifest import default_entry

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = ("overlay.png", "montage.png", "report.png", "failures.png", "demo.png")
WINDOW = "1200,1000"  # pixels


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    save(predict(SLICE, device="cpu").plot(), DOCS / "overlay.png")
    montage, report = scan()
    save(montage, DOCS / "montage.png")
    save(report, DOCS / "report.png")
    save(failures(), DOCS / "failures.png")
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


def scan() -> tuple[Image.Image, Image.Image]:
    """The montage and the report of a phantom's scan."""
    with tempfile.TemporaryDirectory() as folder:
        volume = write_scan(Path(folder), 8, seed=3, size=320) / "scan.nii.gz"
        found = Predictor(DEFAULT_SEGMENTER, None, device="cpu").volume(volume)
        return found.plot().quantize(128), found.report().quantize(64)


def failures() -> Image.Image:
    """Phantoms on which the default segmenter fails: what it marks filled, true lesions outlined, counts above."""
    healthy, ill = phantom(2, lesions=0), phantom(0, lesions=4)
    spotted, spots = with_spots(healthy)
    moved = (healthy.hu + np.roll(healthy.hu.astype(np.float64), 6, axis=0)) / 2
    cases = [
        ("Breathing during the scan, no lesion", grey(moved), healthy.masks),
        ("Five spots of ground glass, 5 mm wide", grey(spotted), spots),
        ("Mediastinal window, four lesions", grey(ill.hu, -160, 240), ill.masks),
        ("Black and white exchanged, four lesions", 255 - ill.image, ill.masks),
    ]
    predictor = Predictor(DEFAULT_SEGMENTER, None, device="cpu")
    figure = Figure(figsize=(7.2, 7.2), layout="constrained")
    for axis, (title, image, lesions) in zip(figure.subplots(2, 2).flat, cases, strict=True):
        prediction = predictor(image)
        matched = mask_iou(prediction.masks, lesions) > 0.5
        found, false = int(matched.any(0).sum()), int((~matched.any(1)).sum())
        axis.set_title(f"{title}\nfound: {found} of {len(lesions)}, other marks: {false}", fontsize=8)
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        for mask in prediction.masks:
            axis.contourf(mask, levels=[0.5, 1], colors=["#E69F00"], alpha=0.5)
        for mask in lesions:
            axis.contour(mask, levels=[0.5], colors=["#56B4E9"], linewidths=1.2)
        axis.set(xticks=[], yticks=[])
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return Image.open(stream).convert("RGB").quantize(128)


def grey(hu: np.ndarray, low: float = -1350, high: float = 150) -> np.ndarray:
    """HU in a window, by default that of the lung, as (H, W) uint8."""
    return np.rint(255 * np.clip((hu - low) / (high - low), 0, 1)).astype(np.uint8)


def with_spots(healthy: Phantom, count: int = 5, width: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    """HU of a phantom with round spots of ground glass in its lungs, `width` mm across, and their masks."""
    generator = np.random.default_rng(0)
    hu, masks = healthy.hu.astype(np.float64), []
    rows, columns = np.indices(hu.shape)
    inside = np.argwhere(healthy.lungs)
    while len(masks) < count:
        row, column = generator.choice(inside)
        distance = np.hypot(rows - row, columns - column) * FIELD_OF_VIEW / len(hu)  # mm
        if healthy.lungs[distance < width].all():
            hu += np.clip(1 - (distance - width / 2), 0, 1) * np.maximum(GROUND_GLASS - hu, 0)
            masks.append(distance <= width / 2)
    return hu, np.array(masks)


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
