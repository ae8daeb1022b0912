"""The one inference gives what the plain models and torchvision's own operators give, slice by slice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from matching import assert_same_detections
from rois import awkward_boxes
from small_models import alone, images, living, pictures
from torch.testing import assert_close
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import clip_boxes_to_image

from ctmasknet import ConfigError, InputError, create_model
from ctmasknet.models.inference import PAPER, Inference, Protocol, choose_proposals, fold_batch_norm, paste_masks


def segment(model, precision="float32", protocol=None):
    inference = Inference(model, precision)
    protocol = protocol or Protocol.of(model)
    return [inference.detect(reading, protocol)[0] for reading in inference.read(pictures())]


def test_the_model_is_left_as_it_was():
    model = living("maskrcnn_resnet18_t2")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    segment(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_one_pass_gives_what_the_model_gives_when_built_for_each_protocol():
    protocols = [Protocol(0.45, 0.5), Protocol(0.3, 0.75, "logit"), Protocol(0.0, 0.4, detections=3)]
    inference = Inference(living("maskrcnn_resnet18_t2"))
    found = [inference.detect(reading, *protocols) for reading in inference.read(pictures())]
    assert len({len(one.scores) for one in found[0]}) > 1
    for index, protocol in enumerate(protocols):
        model = living(
            "maskrcnn_resnet18_t2",
            box_score_thresh=protocol.score_threshold,
            box_nms_thresh=protocol.nms_threshold,
            box_detections_per_img=protocol.detections,
            mask_score=protocol.mask_score,
        )
        for mine, expected in zip(found, alone(model), strict=True):
            for row, pair in assert_same_detections(vars(mine[index]), expected, last=1e-3, allowed=1):
                different = mine[index].masks[pair] != (expected["masks"][row, 0] > 0.5)
                assert different.sum() <= max(2, 2e-3 * different.numel())


def test_the_score_map_is_the_maximum_of_all_rois_raw_mask_logits():
    inference = Inference(living("maskrcnn_resnet18_t2"))
    model = living("maskrcnn_resnet18_t2", box_score_thresh=-0.01, box_nms_thresh=0.75, mask_score="logit")
    for reading, expected in zip(inference.read(pictures()), alone(model), strict=True):
        found = inference.score_map(reading)
        assert_close(found, expected["masks"].amax((0, 1)), atol=1e-3, rtol=1e-3)
        none = replace(reading, regions=reading.regions[:0], scores=reading.scores[:0])
        assert not inference.score_map(none).any()


def test_neither_mode_nor_settings_of_the_model_are_changed_or_matter():
    model = living("maskrcnn_resnet18_t2", box_score_thresh=0.3)
    settings = vars(model.roi_heads).copy()
    before = segment(model, protocol=PAPER)
    model.train()
    after = segment(model, protocol=PAPER)
    assert model.training
    assert model.backbone.body.bn1.training
    assert {key: value for key, value in vars(model.roi_heads).items() if key != "training"} == {
        key: value for key, value in settings.items() if key != "training"
    }
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(value, getattr(other, key)) for key, value in vars(one).items())


@pytest.mark.parametrize("name", ["maskrcnn_resnet18_t1", "ctmasknet_resnet50"])
def test_a_slice_does_not_depend_on_its_neighbours(name):
    generator = torch.Generator().manual_seed(2)
    images = [torch.rand(3, *size, generator=generator) for size in ((60, 96), (96, 60), (60, 96), (96, 96))]
    inference = Inference(living(name))
    together = inference.read(images)
    for reading, image in zip(together, images, strict=True):
        (single,) = inference.read([image])
        assert single.size == reading.size == tuple(image.shape[1:])
        assert_close(vars(reading.regions), vars(single.regions), atol=1e-4, rtol=0)


def test_nothing_found_is_empty():
    model = living("maskrcnn_resnet18_t2", box_score_thresh=1.0)
    found = segment(model)[1]
    assert found.masks.shape == (0, 80, 130)
    assert found.boxes.shape == (0, 4)


def test_bfloat16_stays_near():
    model = living("maskrcnn_resnet18_t2", box_score_thresh=0.0)
    exact = segment(model)[0]
    rounded = segment(model, "bfloat16")[0]
    assert rounded.boxes.dtype == torch.float32
    assert_close(rounded.scores[:20], exact.scores[:20], atol=0.05, rtol=0)
    assert rounded.boxes.shape[1] == 4
    assert not torch.equal(rounded.scores, exact.scores)


@pytest.mark.parametrize(("precision", "message"), [("auto", "use 'float32'"), ("float16", "needs a GPU")])
def test_a_precision_that_cannot_be_computed_is_refused(precision, message):
    with pytest.raises(ConfigError, match=message):
        Inference(create_model("maskrcnn_resnet18_t2"), precision)


def test_a_slice_with_nan_is_named_and_so_is_the_other_tasks_model():
    model = living("maskrcnn_resnet18_t2")
    images = pictures()
    images[1][0, 3, 3] = torch.nan
    for run in (Inference(model).read, model):
        with pytest.raises(InputError, match=r"images\[1\] holds NaN"):
            run(images)
    inference = Inference(living("ctmasknet_resnet18_t2"))
    with pytest.raises(TypeError, match="no masks"):
        inference.detect(inference.read(pictures())[0], PAPER)


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
    batch, _ = model.transform(images((96, 96), (96, 96)))
    with torch.inference_mode():
        features = model.backbone(batch.tensors)
        expected, _ = model.rpn(batch, features)
        objectness, deltas = model.rpn.head(list(features.values()))
        maps = [[t.permute(0, 2, 3, 1) for t in made] for made in (objectness, deltas)]
        found = choose_proposals(
            model, model.rpn.anchor_generator.cell_anchors, *maps, batch.tensors.shape[-2], batch.image_sizes[0]
        )
    for a, b in zip(found, expected, strict=True):
        far = torch.cdist(a, b, p=torch.inf)  # equal scores may change places
        assert len(a) == len(b)
        assert (far.amin(0) <= 1e-3).float().mean() > 0.98


@pytest.mark.parametrize("whole", [False, True])  # on a CPU, elsewhere
def test_pasting_is_torchvisions(whole):
    masks = torch.rand(40, 1, 28, 28)
    made = awkward_boxes(40, 120.0)
    made[2] = torch.tensor([0.0, 0.0, 130.0, 110.0])
    made = clip_boxes_to_image(made, (110, 130))
    expected = paste_masks_in_image(masks, made, (110, 130))[:, 0] > 0.5
    assert torch.equal(paste_masks(masks[:, 0], made, (110, 130), whole=whole), expected)
