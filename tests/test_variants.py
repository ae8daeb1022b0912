"""What every variant must do, over the registry: a new variant needs no test of its own."""

from __future__ import annotations

import copy

import golden
import numpy as np
import pytest
import torch
import torchvision
from matching import assert_same_detections, logits_up_to_ties
from small_models import FEW, alone, images, living, pictures, segmentation_targets
from test_registry import RELEASED
from torch.testing import assert_close

from ctmasknet import export, from_pretrained, load_released
from ctmasknet.models.inference import Inference, Protocol
from ctmasknet.registry import VARIANTS

# Every switch, in as few models as they fit.
SWITCHES = [
    {"roi_score": "sigmoid", "mask_score": "logit", "num_classes": 3, "box_detections_per_img": 7},
    {"drop_empty": False, "replicate": False, "image_classes": 5, "box_nms_thresh": 0.3, "rpn_nms_thresh": 0.5},
    {"anchor_sizes": [4, 8, 16], "anchor_ratios": [0.5, 1, 2], "box_score_thresh": 0.6},
]


@pytest.fixture(scope="module", params=VARIANTS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    """One for all tests of the variant, which leave it as it is."""
    few = {"box_score_thresh": 0.0, "box_detections_per_img": 30} if name.startswith("maskrcnn") else {}
    return living(name, **few)


def test_has_as_many_values_as_the_released_code(name, model):
    assert sum(t.numel() for t in model.state_dict().values()) == RELEASED[name]


def test_the_body_is_torchvisions_resnet_cut_at_the_stage(model):
    theirs = getattr(torchvision.models, model.variant.backbone)().state_dict()
    cut = (*tuple(f"layer{stage}." for stage in range(model.variant.stages + 1, 5)), "fc.")
    expected = {key: t.shape for key, t in theirs.items() if not key.startswith(cut)}
    assert {key: t.shape for key, t in model.backbone.body.state_dict().items()} == expected


def test_every_parameter_that_is_trained_gets_a_gradient_and_no_other(model):
    segments = model.variant.task == "segmentation"
    model = copy.deepcopy(model).train()
    if not segments:  # logits of random weights are in the hundreds, where the loss has no slope
        model.module_s.logits.weight.data.mul_(1e-3)
    before = {key: t.clone() for key, t in model.named_buffers()}
    labels = [{"image_label": 1}, {"image_label": torch.tensor(2)}]
    losses = model(images((96, 96), (96, 96)), segmentation_targets([3, 2]) if segments else labels)
    parts = ("classifier", "box_reg", "mask", "objectness", "rpn_box_reg") if segments else ("image",)
    assert set(losses) == {f"loss_{part}" for part in parts}
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()} == trained
    if segments:
        assert len(trained) == len(list(model.parameters()))
    else:
        assert all(key.startswith("module_s.") or ".bn" in key for key in trained)
        assert all(torch.equal(t, before[key]) for key, t in model.named_buffers()), "BatchNorm statistics moved"


def test_saves_and_loads_the_same_values_config_and_outputs(model, tmp_path):
    loaded = from_pretrained(model.save_pretrained(tmp_path / "weights"), verify=True)
    assert (loaded.config, loaded.variant) == (model.config, model.variant)
    values = loaded.state_dict()
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    (before,), (after,) = alone(model, images((96, 96))), alone(loaded, images((96, 96)))
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_images_of_different_sizes_in_one_forward(model):
    sides = [(96, 96), (80, 120), (64, 100)]
    with torch.inference_mode():
        results = model(images(*sides))
    for result, (height, width) in zip(results, sides, strict=True):
        boxes = result["boxes"]
        assert boxes.isfinite().all()
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= width + 1e-3
        assert boxes[:, 3].max() <= height + 1e-3
        assert (result["scores"].diff() <= 0).all()
        if model.variant.task == "segmentation":
            assert result["masks"].shape == (len(boxes), 1, height, width)
            assert result["masks"].isfinite().all()
        else:
            assert result["logits"].shape == (3,)
            assert result["deltas"].shape == (model.variant.roi_batch, 4)


def test_all_switches_work(name):
    for switch in SWITCHES:
        (result,) = alone(living(name, **{"box_score_thresh": 0.0} | FEW | switch), images((96, 96)))
        assert all(value.isfinite().all() for value in result.values())
        if "num_classes" in switch:
            assert set(result["labels"].tolist()) <= {1, 2}
        if "logits" in result:
            assert len(result["logits"]) == switch.get("image_classes", 3)
        elif "box_detections_per_img" in switch:
            assert len(result["scores"]) <= 7


def originals(result):
    """The regions of a RoI batch, each once: a copy stands behind its original."""
    fresh = torch.ones(len(result["scores"]), dtype=torch.bool)
    fresh[1:] = (result["boxes"].diff(dim=0) != 0).any(1) | (result["scores"].diff() != 0)
    return {key: result[key][fresh] for key in ("boxes", "scores", "labels")}


def test_the_inference_gives_what_the_plain_model_gives(model):
    inference, plain = Inference(model), alone(model)
    same_ranks = 0
    spread = max(float(one["logits"].max() - one["logits"].min()) for one in plain) if "logits" in plain[0] else 0.0
    for expected, reading in zip(plain, inference.read(pictures()), strict=True):
        if model.variant.task == "segmentation":
            found = vars(inference.detect(reading, Protocol.of(model))[0])
            assert len(found["scores"]) > 0
            assert (found["scores"].diff() <= 0).all()
            for row, pair in assert_same_detections(found, expected, last=1e-3, allowed=1):
                mask = expected["masks"][row, 0]
                different = (found["masks"][pair] != (mask > 0.5)) & ((mask - 0.5).abs() > 1e-5)
                assert different.sum() <= max(2, 2e-3 * different.numel())
            continue
        found = inference.classify(reading)
        assert_same_detections(originals(found), originals(expected), last=1e-3, allowed=1)
        assert_close(found["logits"], logits_up_to_ties(model, found)[0], atol=1e-3, rtol=1e-3)
        assert_close(found["probabilities"], found["logits"].softmax(0))
        # Module S reads RoIs in rank order: where rounding exchanges two of nearly the same score, logits move.
        if torch.allclose(found["deltas"], expected["deltas"], atol=1e-3, rtol=1e-3):
            same_ranks += 1
            assert_close(found["logits"], expected["logits"], atol=1e-3 * spread, rtol=0)
    assert same_ranks or model.variant.task == "segmentation"


def both(model, image):
    """What the plain model gives for an image, and what the inference gives."""
    inference, (plain,) = Inference(model), alone(model, [image])
    (reading,) = inference.read([image])
    if model.variant.task == "classification":
        return [plain, inference.classify(reading)]
    plain["masks"] = plain["masks"][:, 0] > 0.5
    return [plain, vars(inference.detect(reading, Protocol.of(model))[0])]


def test_a_released_checkpoint_is_recognised_and_gives_the_recorded_outputs(name, tmp_path):
    expected = golden.outputs(name) if name in golden.VARIANTS else {"seed": 0}
    seed = int(expected["seed"])
    path = golden.checkpoint(tmp_path / "released.pth", name, seed=seed)
    model = load_released(path)
    assert model.variant.name == name
    assert sum(t.numel() for t in model.state_dict().values()) == RELEASED[name]
    assert not model.training
    if name not in golden.VARIANTS:
        return
    if model.variant.task == "classification":
        for found in both(model, golden.image(seed)):
            assert len(found["scores"]) == model.variant.roi_batch
            assert_close(found["probabilities"], found["logits"].softmax(0))
            possible = logits_up_to_ties(model, found)
            assert_close(possible[0], found["logits"], atol=1e-5, rtol=0)
            recorded = torch.from_numpy(expected["logits"])
            nearest = min(possible, key=lambda logits: (logits - recorded).abs().max())
            assert_close(nearest, recorded, atol=1e-4, rtol=0)
        return
    for mask_score, area in (("sigmoid", "mask_area"), ("logit", "logit_area")):
        model = load_released(path, box_score_thresh=0.05, box_nms_thresh=0.5, mask_score=mask_score)
        for found in both(model, golden.image(seed)):
            pairs = dict(assert_same_detections(found, expected, box=1e-2, score=1e-4, last=1e-4))
            areas = found["masks"].sum((1, 2)).tolist()
            for row, pair in pairs.items():
                assert areas[pair] == pytest.approx(expected[area][row], rel=0.005, abs=1)
            if mask_score == "sigmoid":
                best = found["masks"][[pairs[row] for row in range(8)]]
                assert np.count_nonzero(np.packbits(best.numpy(), axis=-1) != expected["masks8"]) <= 8


def test_outputs_of_three_variants_of_each_task_were_recorded():
    assert [sum(name.startswith(kind) for name in golden.VARIANTS) for kind in ("maskrcnn", "ctmasknet")] == [3, 3]


@pytest.mark.slow
def test_runs_in_onnxruntime_and_matches(name, tmp_path):
    for library in ("onnx", "onnxruntime"):
        pytest.importorskip(library)
    from test_export import assert_matches, slices, spread_model

    options = {"box_score_thresh": 0.3, "box_detections_per_img": 30} if name.startswith("maskrcnn") else {}
    model = spread_model(name, **options)
    export(model, tmp_path / "model.onnx")
    assert max(assert_matches(tmp_path / "model.onnx", model, image) for image in slices()) > 5
