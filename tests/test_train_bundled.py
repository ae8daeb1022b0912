"""tools/train_bundled.py: from two folders of slices to a pair of weights in the package."""

from __future__ import annotations

import json
from pathlib import Path

import bundle_weights
import pytest
import torch
import torchvision
import train_bundled
from phantom import write_classes, write_lesions

from ctmasknet import DataError, create_model, evaluate


def make_data(root: Path) -> Path:
    """Phantoms in the layout the tool reads."""
    write_lesions(root / "lesions" / "train", 6, size=256)
    write_lesions(root / "lesions" / "val", 2, 6, size=256)
    write_classes(root / "classes" / "train", 1, size=256)
    write_classes(root / "classes" / "val", 1, 50, size=256)
    return root


def options(data: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--out", str(out), "--epochs", "1", "--aside", "patient4", "patient5", *more]


def test_patients_set_aside_choose_and_the_others_are_learnt(tmp_path):
    folder = make_data(tmp_path) / "lesions" / "train"
    learnt, aside = train_bundled.split(folder, ["patient4", "patient5"])
    assert learnt == [f"2_patient{seed}_1_1" for seed in range(4)]
    assert aside == ["2_patient4_1_1", "2_patient5_1_1"]
    with pytest.raises(DataError, match="no patient coronacase07: name some of patient0, patient1"):
        train_bundled.split(folder, ["coronacase07"])


@pytest.mark.slow
def test_trains_a_pair_goes_on_and_puts_it_into_the_package(tmp_path, monkeypatch):
    data, out, package = make_data(tmp_path / "data"), tmp_path / "out", tmp_path / "package"
    body = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), body)
    package.mkdir()
    monkeypatch.setattr(bundle_weights, "PACKAGE", package)
    arguments = options(data, out, "--backbone", str(body))
    assert train_bundled.main(arguments) == 0
    first = (out / "maskrcnn_resnet18_t1" / "best" / "model.safetensors").read_bytes()
    assert train_bundled.main(arguments) == 0, "a finished run is left alone"
    assert (out / "maskrcnn_resnet18_t1" / "best" / "model.safetensors").read_bytes() == first
    assert train_bundled.main(["--out", str(out), "--bundle", "trial"]) == 0
    listed = json.loads((package / "manifest.json").read_text())["weights"]
    assert {entry["variant"] for entry in listed} == {"maskrcnn_resnet18_t1", "ctmasknet_resnet18_t1"}
    for entry in listed:
        folder = (package / entry["file"]).parent
        model = create_model(entry["variant"], weights=folder)
        assert (folder / "golden.safetensors").is_file()
        if model.variant.task == "segmentation":
            assert "torchvision ResNet18 IMAGENET1K_V1" in model.metadata["note"]
        # The figures are of the weights as bundled, on slices that chose nothing.
        task = model.variant.task
        found = evaluate(model, data / {"segmentation": "lesions", "classification": "classes"}[task] / "val").metrics
        measured = found["operating_point"]["ap50"] if task == "segmentation" else found["slice"]["accuracy"]
        assert entry["metrics"]["ap50" if task == "segmentation" else "accuracy"] == pytest.approx(measured, abs=1e-4)
