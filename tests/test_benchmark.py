"""tools/benchmark.py: the plain assembly is what it claims to be, and disagreement is seen."""

from __future__ import annotations

import json

import benchmark
import benchmark_predict
import pytest
import torch
from phantom import phantom
from plain_torchvision import plain_model

from ctmasknet import Predictor, create_model
from ctmasknet.registry import DEFAULT_SEGMENTER, VARIANTS

SEGMENTERS = [name for name, variant in VARIANTS.items() if variant.task == "segmentation"]


@pytest.mark.parametrize("name", SEGMENTERS)
def test_the_plain_assembly_has_the_weights_of_the_variant(name):
    with torch.device("meta"):
        plain, ours = plain_model(name), create_model(name)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (plain, ours)]
    assert shapes[0] == shapes[1]


def test_agreement_is_full_with_the_same_weights_and_not_with_others():
    model = create_model(DEFAULT_SEGMENTER, weights="default")
    ours = Predictor(model, None, device="cpu")
    plain = benchmark_predict._plain(model, ours, "cpu")
    images = [phantom(0).image]
    same = benchmark_predict._same_detections(model, plain, images, ours)
    assert same["detections"] >= 5
    assert (same["matched"], same["scores_alike"]) == (1.0, 1.0)
    with torch.no_grad():
        model.roi_heads.box_predictor.bbox_pred.bias += 1.0
    assert benchmark_predict._same_detections(model, plain, images, ours)["matched"] < 0.9


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
        "--precision",
        "float32",
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
