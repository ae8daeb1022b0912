"""tools/train_bundled.py: from two folders of slices to a pair of weights in the package."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import bundle_weights
import pytest
import torch
import torchvision
import train_bundled
from phantom import write_classes, write_lesions

from ctmasknet import DataError, create_model, evaluate, open_dataset


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


def test_every_slice_gets_the_class_of_what_it_shows_and_patients_set_aside_stay_apart(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    write_lesions(data / "lesions" / "train", 6, size=256)  # patient0 and patient4 have no lesions
    write_lesions(data / "lesions" / "val", 1, 6, size=256)
    write_classes(data / "classes" / "train", 4, size=256)
    write_classes(data / "classes" / "val", 1, 50, size=256)
    arguments = Namespace(data=data, out=out, aside=["patient4", "patient5"])
    for _ in range(2):  # the second time, links of the first are there
        train_bundled.link_slices(arguments)
    found = {part: open_dataset("classification", out / "slices" / part) for part in ("learnt", "aside", "val")}
    labels = {
        part: sorted((patient, slices.labels_of(index)[0]) for index, patient in enumerate(slices.patients))
        for part, slices in found.items()
    }
    sample = [("control-control0", 0), ("covid-covid0", 2), ("pneumonia-pneumonia0", 1)]
    lesions = [("patient0", 0), ("patient1", 2), ("patient2", 2), ("patient3", 2)]
    assert labels["learnt"] == sorted(3 * sample + lesions)
    assert labels["aside"] == sorted([*sample, ("patient4", 0), ("patient5", 2)]), "of four slices the last"
    assert [name for name in found["aside"].names if "control0" in name] == ["0_control-control0_classification_3"]
    assert len(labels["val"]) == 4


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
        if model.variant.task == "segmentation":
            measured = evaluate(model, data / "lesions" / "val").metrics["operating_point"]["ap50"]
            assert entry["metrics"]["ap50"] == pytest.approx(measured, abs=1e-4)
            continue
        measured = evaluate(model, out / "slices" / "val").metrics["slice"]["accuracy"]
        assert entry["metrics"]["accuracy"] == pytest.approx(measured, abs=1e-4)
        assert model.temperature > 0
        assert model.temperature == json.loads((folder / "config.json").read_text())["metadata"]["temperature"]
        for key in ("auc_covid_against_control_module_s", "auc_covid_against_control_lesion_area"):
            assert 0 <= entry["metrics"][key] <= 1
