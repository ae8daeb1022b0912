"""Fast inference gives what the plain models and torchvision's own operators give."""

from __future__ import annotations

import pytest
import torch
from rois import awkward_boxes
from torch import Tensor
from torch.testing import assert_close
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import clip_boxes_to_image

from ctmasknet import create_model
from ctmasknet.models.inference import FastInference, choose_proposals, fold_batch_norm, paste_masks
from ctmasknet.registry import VARIANTS

SMALL = {"min_size": 96, "max_size": 160, "rpn_post_nms_top_n_test": 100, "rpn_pre_nms_top_n_test": 300}


def living(name: str, **options):
    """A model whose BatchNorms have statistics of their own, as trained ones do."""
    torch.manual_seed(0)
    model = create_model(name, **SMALL, **options)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var") or ("bn" in key and key.endswith("weight")):
            tensor.uniform_(0.6, 1.4)
        elif key.endswith("running_mean") or ("bn" in key and key.endswith("bias")):
            tensor.normal_(0, 0.1)
    return model


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in ((96, 96), (80, 130), (200, 150))]


def segment(model, dtype=torch.float32):
    fast = FastInference(model, dtype)
    return fast.segment(fast.read(pictures()))


def classify(model):
    fast = FastInference(model)
    return fast.classify(fast.read(pictures()))


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.task == "segmentation"])
@pytest.mark.parametrize("mask_score", ["sigmoid", "logit"])
def test_segments_as_the_plain_model(name, mask_score):
    if mask_score == "logit" and not name.endswith("t2"):
        pytest.skip("the branch does not depend on the body")
    model = living(name, box_score_thresh=0.0, box_detections_per_img=30, mask_score=mask_score)
    with torch.inference_mode():
        plain = model(pictures())
    assert sum(len(p["scores"]) for p in plain) >= 5
    for expected, found in zip(plain, segment(model), strict=True):
        assert_close(found.scores, expected["scores"], atol=1e-3, rtol=0)
        assert_close(found.boxes, expected["boxes"], atol=5e-2, rtol=0)
        assert torch.equal(found.labels, expected["labels"])
        different = (found.masks != (expected["masks"][:, 0] > 0.5)).sum()
        assert different <= 2e-4 * found.masks.numel()


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.task == "classification"])
def test_classifies_as_the_plain_model(name):
    model = living(name)
    with torch.inference_mode():
        plain = model(pictures())
    for expected, found in zip(plain, classify(model), strict=True):
        assert_close(found["logits"], expected["logits"], atol=1e-4, rtol=0)
        assert_close(found["probabilities"], expected["probabilities"], atol=1e-4, rtol=0)
        assert_close(found["scores"], expected["scores"], atol=1e-3, rtol=0)
        assert_close(found["boxes"], expected["boxes"], atol=5e-2, rtol=0)


def test_the_model_is_left_as_it_was():
    model = living("maskrcnn_resnet18_t2")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    segment(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_thresholds_may_change_between_calls():
    model = living("maskrcnn_resnet18_t2", box_score_thresh=0.3)
    fast = FastInference(model)
    many = sum(len(found.scores) for found in fast.segment(fast.read(pictures())))
    model.roi_heads.score_thresh = 0.99
    assert sum(len(found.scores) for found in fast.segment(fast.read(pictures()))) < many


def test_nothing_found_is_empty():
    model = living("maskrcnn_resnet18_t2", box_score_thresh=1.0)
    found = segment(model)[1]
    assert found.masks.shape == (0, 80, 130)
    assert found.boxes.shape == (0, 4)


def test_bfloat16_stays_near():
    model = living("maskrcnn_resnet18_t2", box_score_thresh=0.0)
    exact = segment(model)[0]
    rounded = segment(model, torch.bfloat16)[0]
    assert rounded.boxes.dtype == torch.float32
    assert_close(rounded.scores[:20], exact.scores[:20], atol=0.05, rtol=0)
    assert not torch.equal(rounded.scores, exact.scores)


def test_folding_leaves_no_batch_norm_and_the_same_values():
    model = living("maskrcnn_resnet50")
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model.backbone.body(x)
        fold_batch_norm(model.backbone.body)
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.backbone.body.modules())
        for a, b in zip(model.backbone.body(x), expected, strict=True):
            assert_close(a, b, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["maskrcnn_resnet18_t1", "maskrcnn_resnet50"])
def test_proposals_are_the_rpns(name):
    model = living(name)
    batch, _ = model.transform(pictures())
    with torch.inference_mode():
        features = model.backbone(batch.tensors)
        expected, _ = model.rpn(batch, features)
        objectness, deltas = model.rpn.head(list(features.values()))
        rows = (
            [t.permute(0, 2, 3, 1).reshape(len(t), -1, n) for t in made] for made, n in ((objectness, 1), (deltas, 4))
        )
        scores, shifts = rows
        found = choose_proposals(
            model.rpn, [s.squeeze(2) for s in scores], shifts, ImageList(batch.tensors, batch.image_sizes)
        )
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, atol=1e-3, rtol=0)


def test_pasting_is_torchvisions():
    masks = torch.rand(40, 1, 28, 28)
    made = awkward_boxes(40, 120.0)
    made[2] = torch.tensor([0.0, 0.0, 130.0, 110.0])
    made = clip_boxes_to_image(made, (110, 130))
    expected = paste_masks_in_image(masks, made, (110, 130))[:, 0] > 0.5
    assert torch.equal(paste_masks(masks[:, 0], made, (110, 130)), expected)
