"""The models: sizes, switches, gradients, odd inputs; independent of any trained weights."""

from __future__ import annotations

import pytest
import torch
import torchvision
from small_models import images, segmentation_targets

from ctmasknet import ConfigError, InputError, create_model
from ctmasknet.models.detector import ResNetFPN
from ctmasknet.registry import VARIANTS

SMALL = {"min_size": 96, "max_size": 128}
# Module S plus the scale and shift of every BatchNorm named bn*, counted in the released code.
TRAINABLE = {"ctmasknet_resnet18_t1": 596_099, "ctmasknet_resnet34_t1": 601_475, "ctmasknet_resnet50": 2_409_859}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_the_body_computes_what_torchvisions_resnet_computes():
    theirs = torchvision.models.resnet18().eval()
    variant = VARIANTS["maskrcnn_resnet18"]
    ours = ResNetFPN(variant).body.eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = images((64, 96))[0][None]
    trunk = torch.nn.Sequential(*list(theirs.children())[:-2])
    with torch.inference_mode():
        torch.testing.assert_close(ours(x)[-1], trunk(x))


@pytest.mark.parametrize("name", TRAINABLE)
def test_trains_what_the_released_classifier_trains(name):
    model = create_model(name)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == TRAINABLE[name]
    assert not any("downsample" in key for key, p in model.named_parameters() if p.requires_grad)


def test_a_classifier_in_training_keeps_its_detector_in_evaluation():
    model = create_model("ctmasknet_resnet18_t2").train()
    assert model.module_s.training
    assert not any(m.training for part in (model.backbone, model.rpn, model.roi_heads) for m in part.modules())


@pytest.mark.parametrize("counts", [[0, 0], [0, 2], [0]])
def test_slices_without_lesions_train(counts):
    model = create_model("maskrcnn_resnet18_t2", **SMALL).train()
    losses = model(images(*[(96, 96)] * len(counts)), segmentation_targets(counts))
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_batch_gives_what_its_images_give_alone():
    model = create_model("maskrcnn_resnet18_t2", box_score_thresh=0.3, **SMALL)
    batch = images((96, 96), (96, 96))
    with torch.inference_mode():
        together, alone = model(batch), [model([image])[0] for image in batch]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a["scores"], b["scores"], atol=1e-5, rtol=0)
        torch.testing.assert_close(a["boxes"], b["boxes"], atol=1e-2, rtol=0)


def test_sigmoid_scores_rois_independently():
    options = {"box_score_thresh": 0.0, "num_classes": 3, "box_nms_thresh": 1.0, **SMALL}
    model = create_model("maskrcnn_resnet18_t2", roi_score="sigmoid", **options)
    torch.nn.init.zeros_(model.roi_heads.box_predictor.cls_score.weight)
    model.roi_heads.box_predictor.cls_score.bias.data = torch.tensor([9.0, 1.0, 2.0])
    with torch.inference_mode():
        scores = model(images((96, 96)))[0]["scores"]
    torch.testing.assert_close(scores.max(), torch.tensor(2.0).sigmoid())
    model.roi_heads.roi_score = "softmax"
    with torch.inference_mode():
        scores = model(images((96, 96)))[0]["scores"]
    torch.testing.assert_close(scores.max(), torch.tensor([9.0, 1.0, 2.0]).softmax(0)[2])


def test_drop_empty_removes_boxes_of_area_zero_and_only_those():
    model = create_model("ctmasknet_resnet18_t2")
    boxes = torch.tensor([[0.0, 0, 1, 1], [5, 5, 5, 9], [3, 3, 3.004, 3.004], [600, 0, 700, 9]])
    deltas = torch.zeros(4, 8)
    deltas[:, 4:] = torch.arange(4.0)[:, None] / 1000
    for drop_empty, rows in ((True, [0, 2]), (False, [0, 1, 2, 3])):
        model.roi_heads.drop_empty = drop_empty
        logits = torch.tensor([[0.0, 4.0], [0.0, 3.0], [0.0, 2.0], [0.0, 1.0]])
        regions = model.roi_heads.rank(logits, deltas, boxes[:, None].repeat(1, 2, 1), (512, 512))
        assert regions.deltas[regions.scores > 0, 0].mul(1000).round().int().tolist() == rows
        assert (regions.scores.diff() <= 0).all()


def test_class_zero_is_never_predicted():
    model = create_model("maskrcnn_resnet18_t2", box_score_thresh=0.0, **SMALL)
    with torch.inference_mode():
        assert 0 not in model(images((96, 96)))[0]["labels"]


@pytest.mark.parametrize("replicate", [True, False])
def test_an_image_without_any_valid_box_has_a_defined_result(replicate):
    model = create_model("ctmasknet_resnet18_t2", box_score_thresh=2.0, replicate=replicate, **SMALL)
    with torch.inference_mode():
        result = model(images((96, 96)))[0]
        zeros = model.module_s(torch.zeros(1, 128, 5))[0]
    assert result["boxes"].shape == (0, 4)
    assert result["deltas"].shape == (0, 4)
    torch.testing.assert_close(result["logits"], zeros)
    torch.testing.assert_close(result["probabilities"].sum(), torch.tensor(1.0))
    loss = model.train()(images((96, 96)), [{"image_label": 0}])["loss_image"]
    loss.backward()
    assert torch.isfinite(loss)


def test_the_classifiers_loss_is_binary_cross_entropy_on_one_hot_labels():
    model = create_model("ctmasknet_resnet18_t2", box_score_thresh=2.0, **SMALL)
    with torch.no_grad():
        logits = model(images((96, 96)))[0]["logits"]
        loss = model.train()(images((96, 96)), [{"image_label": 2}])["loss_image"]
    one_hot = torch.tensor([0.0, 0.0, 1.0])
    p = logits.sigmoid()
    expected = -(one_hot * p.log() + (1 - one_hot) * (1 - p).log()).mean()
    torch.testing.assert_close(loss, expected)


def test_bfloat16_touches_the_backbone_only():
    model = create_model("maskrcnn_resnet18_t2", box_score_thresh=0.0, **SMALL)
    model.backbone.autocast_dtype = torch.bfloat16
    seen = []
    model.backbone.body.register_forward_hook(lambda module, args, out: seen.append(out[-1].dtype))
    with torch.inference_mode():
        result = model(images((96, 96)))[0]
    assert seen == [torch.bfloat16]
    assert {value.dtype for key, value in result.items() if key != "labels"} == {torch.float32}
    boxes = result["boxes"]
    assert not torch.equal(boxes, boxes.bfloat16().float()), "boxes were rounded to bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box_score_tresh": 0.5}, "did you mean box_score_thresh"),
        ({"nonsense": 1}, "unknown option 'nonsense'"),
        ({"num_classes": 1}, "at least 2"),
        ({"num_classes": 2.5}, "whole number"),
        ({"num_classes": True}, "whole number"),
        ({"image_classes": 1}, "at least 2"),
        ({"roi_score": "tanh"}, "'softmax' or 'sigmoid'"),
        ({"mask_score": None}, "'sigmoid' or 'logit'"),
        ({"drop_empty": 1}, "true or false"),
        ({"box_nms_thresh": 1.5}, r"0\.\.1"),
        ({"box_score_thresh": float("nan")}, "finite"),
        ({"min_size": 0}, r"1\.\.8192"),
        ({"min_size": 2000}, "exceeds max_size"),
        ({"image_mean": [0.5]}, "3 numbers"),
        ({"anchor_sizes": []}, "list of numbers"),
        ({"anchor_sizes": [0, 1]}, "above 0"),
        ({"anchor_sizes": "8"}, "a list is needed"),
        ({"anchor_sizes": [[8], 4]}, "one for each FPN level"),
    ],
)
def test_impossible_options_raise(options, message):
    with pytest.raises(ConfigError, match=message):
        create_model("ctmasknet_resnet18_t2", **options)


def test_levels_that_disagree_raise():
    with pytest.raises(ConfigError, match="same number of anchors"):
        create_model("maskrcnn_resnet50", anchor_sizes=[[2], [4], [8], [16, 32]])
    with pytest.raises(ConfigError, match="lists 2 FPN levels"):
        create_model("maskrcnn_resnet50", anchor_sizes=[[2], [4]])


def test_training_without_or_with_wrong_targets_raises():
    model = create_model("ctmasknet_resnet18_t2", **SMALL).train()
    with pytest.raises(InputError, match="image_label"):
        model(images((96, 96)))
    with pytest.raises(InputError, match=r"0\.\.2"):
        model(images((96, 96)), [{"image_label": 3}])


@pytest.mark.parametrize("name", ["ctmasknet_resnet18_t1", "maskrcnn_resnet18_t1", "maskrcnn_resnet50"])
def test_module_s_and_the_mask_branch_start_as_in_the_released_code(name):
    model = create_model(name)
    parts = (
        (model.module_s,)
        if name.startswith("ctmasknet")
        else (model.roi_heads.mask_head, model.roi_heads.mask_predictor)
    )
    weights = {key: p for part in parts for key, p in part.named_parameters() if key.endswith("weight")}
    for key, weight in weights.items():
        # Fan-out as torch counts it: of a transposed convolution the roles of the first two sides are exchanged.
        fan_out = weight.shape[0] * weight[0, 0].numel() if weight.dim() == 4 else weight.shape[0]
        expected = (2 / fan_out) ** 0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.1), key
    if name.startswith("ctmasknet"):
        assert weights["logits.weight"].std().item() == pytest.approx(0.816, rel=0.05)


@pytest.mark.parametrize("name", ["maskrcnn_resnet18_t2", "ctmasknet_resnet18_t2"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image * 255, r"images\[0\] has values from .*: give a list of .* in 0\.\.1"),
        (lambda image: image.half(), r"images\[0\] is torch\.float16"),
        (lambda image: (image * 255).byte(), r"image\.float\(\) / 255"),
        (lambda image: image.numpy(), r"images\[0\] is ndarray"),
        (lambda image: image[0], r"images\[0\] is torch\.float32 \(96, 96\)"),
        (lambda image: image / 0, r"images\[0\] holds NaN"),
    ],
)
def test_images_of_another_kind_are_refused(name, change, message):
    model = create_model(name, **SMALL)
    with pytest.raises(InputError, match=message):
        model([change(images((96, 96))[0])])


def test_a_single_image_no_image_and_half_a_model_are_refused():
    model = create_model("maskrcnn_resnet18_t2", **SMALL)
    image = images((96, 96))[0]
    with pytest.raises(InputError, match="images is a single Tensor"):
        model(image)
    with pytest.raises(InputError, match="no images"):
        model([])
    assert len(model(image[None])) == 1
    with pytest.raises(ConfigError, match=r"torch\.float16.*autocast_dtype"):
        model.half()([image])
