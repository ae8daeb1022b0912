"""tools/benchmark.py: the plain assembly is what it claims to be, and disagreement is seen."""

from __future__ import annotations

import json

import benchmark
import pytest
import torch
from phantom import phantom, write_classes, write_lesions
from plain_torchvision import plain_model

from ctmasknet import create_model, evaluate
from ctmasknet.registry import DEFAULT_CLASSIFIER, DEFAULT_SEGMENTER, VARIANTS
from ctmasknet.weights.manifest import manifest

SEGMENTERS = [name for name, variant in VARIANTS.items() if variant.task == "segmentation"]


@pytest.mark.parametrize("name", SEGMENTERS)
def test_the_plain_assembly_has_the_weights_of_the_variant(name):
    with torch.device("meta"):
        plain, ours = plain_model(name), create_model(name)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (plain, ours)]
    assert shapes[0] == shapes[1]


def test_agreement_is_full_with_the_same_weights_and_not_with_others():
    model = create_model(DEFAULT_SEGMENTER, weights="default")
    plain, ours = benchmark.both_sides(model, "cpu", "float32")
    same = benchmark.agree(plain, ours, [phantom(0).image])
    assert same["detections"] >= 5
    assert (same["matched"], same["scores_alike"]) == (1.0, 1.0)
    with torch.no_grad():
        model.roi_heads.box_predictor.bbox_pred.bias += 1.0
    changed = benchmark.both_sides(model, "cpu", "float32")[1]
    assert benchmark.agree(plain, changed, [phantom(0).image])["matched"] < 0.9


def test_agreement_over_data_sets_gives_ap_of_both_sides_and_the_share_of_the_same_class(tmp_path, capsys):
    lesions = write_lesions(tmp_path / "lesions", 2, 3, size=256)
    classes = write_classes(tmp_path / "classes", 1, size=256)
    figures = tmp_path / "figures.json"
    data = ["--segmentation", str(lesions), "--classification", str(classes)]
    assert benchmark.main(["agreement", *data, "--device", "cpu", "--iou", "0.99", "--json", str(figures)]) == 0
    report = json.loads(figures.read_text())["variants"]
    assert set(report) == {entry.variant for entry in manifest()}
    segmenter, classifier = report[DEFAULT_SEGMENTER], report[DEFAULT_CLASSIFIER]
    assert segmenter["matched"] == 1.0
    assert segmenter["ap50"] == segmenter["ap50_plain"] == pytest.approx(own_ap50(lesions))
    assert (classifier["slices"], classifier["same_class"]) == (3, 1.0)
    assert classifier["largest_logit_gap_of_spread"] < 1e-3


def own_ap50(lesions):
    """As `evaluate` measures it."""
    found = evaluate(DEFAULT_SEGMENTER, lesions, samples=0, device="cpu", precision="float32")
    return round(found.metrics["operating_point"]["ap50"], 4)


@pytest.mark.slow
def test_all_fourteen_say_the_same_as_the_plain_assembly(tmp_path):
    figures = tmp_path / "figures.json"
    arguments = [
        "predict",
        "--images",
        "2",
        "--rounds",
        "1",
        "--no-memory",
        "--device",
        "cpu",
    ]
    assert benchmark.main([*arguments, "--json", str(figures), "-o", str(tmp_path)]) == 0
    report = json.loads(figures.read_text())["variants"]
    assert list(report) == list(VARIANTS)
    for facts in report.values():
        agreement = facts["agreement"]
        if "matched" in agreement:
            assert agreement["matched"] >= 0.98
            assert agreement["scores_alike"] >= 0.98
        else:
            assert agreement["same_class"] == 1.0
            assert agreement["largest_logit_gap_of_spread"] < 0.05
    assert (tmp_path / "tables" / "benchmark-predict.md").is_file()
    assert (tmp_path / "figures" / "benchmark-predict.png").is_file()
