"""The parts both model families share, built from torchvision's: transform, RPN, RoI heads."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, batched_nms, clip_boxes_to_image

from ctmasknet.models.config import ModelConfig
from ctmasknet.models.sharing import Shareable
from ctmasknet.registry import Variant

BOX_HIDDEN = 128
_BOX_POOL, _BOX_SAMPLING = 7, 2


@dataclass
class Regions:
    """What the box branch says of one image, best score first, after NMS; one row per RoI and class.

    Attributes:
        boxes: (N, 4) xyxy, pixels of the resized image, clipped to it.
        scores: (N,) in 0..1.
        labels: (N,) int64, 1..num_classes - 1.
        deltas: (N, 4) the encoded box deltas (dx, dy, dw, dh) that the box predictor put out for that class.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    deltas: Tensor


class LesionRoIHeads(RoIHeads):
    """torchvision's RoI heads with the released code's inference and the paper's switches.

    Training is torchvision's. Inference differs: only boxes of area 0 are dropped (torchvision drops sides under
    0.01 px), scores may come from a sigmoid, masks may stay logits, and each region keeps its encoded deltas.
    """

    def __init__(self, config: ModelConfig, levels: int, channels: int) -> None:
        names = [str(level) for level in range(levels)]
        super().__init__(
            box_roi_pool=MultiScaleRoIAlign(names, _BOX_POOL, _BOX_SAMPLING),
            box_head=TwoMLPHead(channels * _BOX_POOL**2, BOX_HIDDEN),
            box_predictor=FastRCNNPredictor(BOX_HIDDEN, config.num_classes),
            fg_iou_thresh=config.box_fg_iou_thresh,
            bg_iou_thresh=config.box_bg_iou_thresh,
            batch_size_per_image=config.box_batch_size_per_image,
            positive_fraction=config.box_positive_fraction,
            bbox_reg_weights=config.bbox_reg_weights,
            score_thresh=config.box_score_thresh,
            nms_thresh=config.box_nms_thresh,
            detections_per_img=config.box_detections_per_img,
        )
        self.roi_score = config.roi_score
        self.mask_score = config.mask_score
        self.drop_empty = config.drop_empty

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Losses in training mode; detections with (N, 1, 28, 28) masks otherwise."""
        if self.training:
            return super().forward(features, proposals, image_shapes, targets)
        regions = self.regions(features, proposals, image_shapes)
        detections = [{"boxes": r.boxes, "labels": r.labels, "scores": r.scores} for r in regions]
        if self.mask_head is not None:
            for detection, masks in zip(detections, self._masks(features, regions, image_shapes), strict=True):
                detection["masks"] = masks
        return detections, {}

    def regions(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[Regions]:
        """The ranked regions of each image: above the score threshold, not empty, after NMS per class."""
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, deltas = self.box_predictor(pooled)
        return self.rank(logits, deltas, proposals, image_shapes)

    def rank(
        self, logits: Tensor, deltas: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[Regions]:
        """The ranked regions that the box predictor's (R, K) logits and (R, 4 K) deltas give for R proposals."""
        scores = logits.softmax(-1) if self.roi_score == "softmax" else logits.sigmoid()
        boxes = self.box_coder.decode(deltas, proposals)
        counts = [len(p) for p in proposals]
        per_image = zip(
            boxes.split(counts),
            scores.split(counts),
            deltas.view(len(boxes), -1, 4).split(counts),
            image_shapes,
            strict=True,
        )
        return [self._rank(*image) for image in per_image]

    def _rank(self, boxes: Tensor, scores: Tensor, deltas: Tensor, shape: tuple[int, int]) -> Regions:
        lesion_classes = scores.shape[1] - 1
        labels = torch.arange(1, lesion_classes + 1, device=scores.device).repeat(len(scores))
        boxes = clip_boxes_to_image(boxes[:, 1:].reshape(-1, 4), shape)
        scores = scores[:, 1:].reshape(-1)
        deltas = deltas[:, 1:].reshape(-1, 4)
        valid = scores > self.score_thresh
        if self.drop_empty:
            sides = boxes[:, 2:] - boxes[:, :2]
            valid &= sides.prod(1) > 0
        rows = valid.nonzero().squeeze(1)
        kept = batched_nms(boxes[rows], scores[rows].detach(), labels[rows], self.nms_thresh)
        rows = rows[kept[: self.detections_per_img]]
        return Regions(boxes[rows], scores[rows], labels[rows], deltas[rows])

    def _masks(
        self, features: dict[str, Tensor], regions: list[Regions], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, ...]:
        pooled = self.mask_roi_pool(features, [r.boxes for r in regions], image_shapes)
        logits = self.mask_predictor(self.mask_head(pooled))
        labels = torch.cat([r.labels for r in regions])
        chosen = logits[torch.arange(len(labels), device=logits.device), labels, None]
        if self.mask_score == "sigmoid":
            chosen = chosen.sigmoid()
        return chosen.split([len(r.labels) for r in regions])


def build_transform(config: ModelConfig) -> GeneralizedRCNNTransform:
    """Normalise, resize, pad to a batch; and the way back."""
    return GeneralizedRCNNTransform(config.min_size, config.max_size, list(config.image_mean), list(config.image_std))


def build_rpn(config: ModelConfig, variant: Variant) -> RegionProposalNetwork:
    """RPN with the paper's small anchors: 30 per location."""
    sizes, ratios = config.anchors(variant.levels)
    anchors = AnchorGenerator(sizes, ratios)
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(ResNetFPN.out_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=config.rpn_fg_iou_thresh,
        bg_iou_thresh=config.rpn_bg_iou_thresh,
        batch_size_per_image=config.rpn_batch_size_per_image,
        positive_fraction=config.rpn_positive_fraction,
        pre_nms_top_n={"training": config.rpn_pre_nms_top_n_train, "testing": config.rpn_pre_nms_top_n_test},
        post_nms_top_n={"training": config.rpn_post_nms_top_n_train, "testing": config.rpn_post_nms_top_n_test},
        nms_thresh=config.rpn_nms_thresh,
        score_thresh=config.rpn_score_thresh,
    )
    # torchvision drops proposals under 1e-3 px; the released code keeps even empty ones at this stage.
    rpn.min_size = 0.0
    return rpn


def freeze(module: nn.Module) -> None:
    """Exclude every parameter of `module` from training."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)


class ResNetFPN(nn.Module):
    """timm ResNet up to the variant's last stage, then FPN: one level, or four for ResNet50.

    Attributes:
        autocast_dtype: run body and FPN under autocast in this dtype, None for the input's own. Features
            leave in float32 either way: box arithmetic in bfloat16 moves boxes by whole pixels.
    """

    out_channels = 256

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        levels = range(variant.stages - variant.levels + 1, variant.stages + 1)
        # zero_init_last=False: the paper's bodies are torchvision's, which start with every residual branch open.
        self.body = timm.create_model(
            variant.backbone, features_only=True, out_indices=tuple(levels), zero_init_last=False
        )
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)
        self.autocast_dtype: torch.dtype | None = None

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) normalised images -> {"0": (B, 256, H / stride, W / stride), ...}, finest level first."""
        enabled = self.autocast_dtype is not None
        with torch.autocast(images.device.type, dtype=self.autocast_dtype, enabled=enabled):
            maps = self.body(images)
            features = self.fpn(OrderedDict((str(level), m) for level, m in enumerate(maps)))
        return OrderedDict((level, feature.float()) for level, feature in features.items())


_MASK_POOL, _MASK_SAMPLING = 14, 2


class LesionMaskRCNN(Shareable, GeneralizedRCNN):
    """Lesion detector and segmenter with torchvision's calling convention.

    ``model(images, targets=None)``: `images` a list of (3, H, W) float tensors in 0..1, sizes may differ.

    - Training mode: `targets` is a list of dicts with boxes (N, 4) float32 xyxy in pixels, labels (N,) int64 and masks
      (N, H, W); slices without lesions have N = 0. Returns a dict of losses.
    - Evaluation mode: returns per image a dict of boxes (N, 4), labels (N,), scores (N,) falling, and masks
      (N, 1, H, W) float32: probabilities, or raw logits with ``mask_score="logit"``; foreground above 0.5.

    Attributes:
        variant: the registry's entry.
        config: the settings it was built with.
        metadata: what is known of its weights (operating point, metrics, ...); plain values.
    """

    def __init__(self, variant: Variant, config: ModelConfig) -> None:
        backbone = ResNetFPN(variant)
        roi_heads = LesionRoIHeads(config, variant.levels, backbone.out_channels)
        # Table 1's lightweight models also shrink the mask branch: one 3x3 layer where ResNet50 has four.
        layers, hidden = ((256,) * 4, 256) if variant.backbone == "resnet50" else ((128,), 128)
        names = [str(level) for level in range(variant.levels)]
        roi_heads.mask_roi_pool = MultiScaleRoIAlign(names, _MASK_POOL, _MASK_SAMPLING)
        roi_heads.mask_head = MaskRCNNHeads(backbone.out_channels, layers, dilation=1)
        roi_heads.mask_predictor = MaskRCNNPredictor(layers[-1], hidden, config.num_classes)
        super().__init__(backbone, build_rpn(config, variant), roi_heads, build_transform(config))
        self.variant = variant
        self.config = config
        self.metadata: dict[str, Any] = {}
