"""The variants as a torchvision user would assemble them: what speed is measured against."""

from __future__ import annotations

import torchvision
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from ctmasknet.registry import get_variant


def plain_model(name: str) -> MaskRCNN:
    """The variant as a torchvision user would assemble it; its state dict has the keys of ours."""
    variant = get_variant(name)
    body = getattr(torchvision.models, variant.backbone)()
    channels = [64, 128, 256, 512] if variant.backbone != "resnet50" else [256, 512, 1024, 2048]
    kept = range(variant.stages - variant.levels, variant.stages)
    names = [str(level) for level in range(variant.levels)]
    backbone = BackboneWithFPN(
        body,
        {f"layer{stage + 1}": names[i] for i, stage in enumerate(kept)},
        [channels[stage] for stage in kept],
        256,
    )
    backbone.fpn.extra_blocks = None  # BackboneWithFPN cannot be told to go without the extra max-pool level
    layers, hidden = ((256,) * 4, 256) if variant.backbone == "resnet50" else ((128,), 128)
    sizes, ratios = (2, 4, 8, 16, 32), (0.1, 0.25, 0.5, 1.0, 1.5, 2.0)
    model = MaskRCNN(
        backbone,
        min_size=512,
        max_size=1024,
        rpn_anchor_generator=AnchorGenerator((sizes,) * variant.levels, (ratios,) * variant.levels),
        rpn_pre_nms_top_n_train=1000,
        rpn_pre_nms_top_n_test=1000,
        rpn_post_nms_top_n_train=1000,
        rpn_post_nms_top_n_test=1000,
        rpn_nms_thresh=0.75,
        rpn_positive_fraction=0.75,
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
        box_head=TwoMLPHead(256 * 49, 128),
        box_predictor=FastRCNNPredictor(128, 2),
        box_score_thresh=0.75,
        box_nms_thresh=0.75,
        box_detections_per_img=128,
        box_fg_iou_thresh=0.75,
        box_bg_iou_thresh=0.5,
        box_batch_size_per_image=256,
        box_positive_fraction=0.75,
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2),
        mask_head=MaskRCNNHeads(256, layers, 1),
        mask_predictor=MaskRCNNPredictor(layers[-1], hidden, 2),
    )
    model.rpn.min_size = 0.0
    return model
