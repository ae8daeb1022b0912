"""tools/train_bundled.py: from two folders of slices to a pair of weights in the package."""

from __future__ import annotations

import json
from pathlib import Path

import bundle_weights
import pytest
import train_bundled
from phantom import phantom
from PIL import Image

from ctmasknet import create_model


def make_data(root: Path) -> Path:
    """Phantoms in the layout the tool reads."""
    for split, seeds in (("train", range(6)), ("val", range(6, 8))):
        for kind in ("imgs", "masks"):
            (root / "lesions" / split / kind).mkdir(parents=True)
        (root / "classes" / split).mkdir(parents=True)
        for seed in seeds:
            drawn = phantom(seed)
            Image.fromarray(drawn.image).save(root / "lesions" / split / "imgs" / f"slice{seed}.png")
            Image.fromarray(drawn.class_mask()).save(root / "lesions" / split / "masks" / f"slice{seed}.png")
        for image_class in range(3):
            drawn = phantom(10 + image_class + len(seeds), lesions=2 * image_class)
            Image.fromarray(drawn.image).save(root / "classes" / split / f"{image_class}_p{image_class}{split}_1_0.png")
    return root


@pytest.mark.slow
def test_trains_a_pair_goes_on_and_puts_it_into_the_package(tmp_path, monkeypatch):
    data, out, package = make_data(tmp_path / "data"), tmp_path / "out", tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(bundle_weights, "PACKAGE", package)
    arguments = ["--data", str(data), "--out", str(out), "--epochs", "1"]
    assert train_bundled.main(arguments) == 0
    first = (out / "maskrcnn_resnet18_t1" / "best" / "model.safetensors").read_bytes()
    assert train_bundled.main(arguments) == 0, "a finished run is left alone"
    assert (out / "maskrcnn_resnet18_t1" / "best" / "model.safetensors").read_bytes() == first
    assert train_bundled.main(["--out", str(out), "--bundle", "trial"]) == 0
    listed = json.loads((package / "manifest.json").read_text())["weights"]
    assert {entry["variant"] for entry in listed} == {"maskrcnn_resnet18_t1", "ctmasknet_resnet18_t1"}
    for entry in listed:
        folder = (package / entry["file"]).parent
        assert create_model(entry["variant"], weights=folder).variant.name == entry["variant"]
        assert (folder / "golden.safetensors").is_file()
