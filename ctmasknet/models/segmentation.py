"""Mask R-CNN for lesions in chest CT slices (paper section 2, Figure 1a)."""

from __future__ import annotations

from typing import Any

from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from ctmasknet.models.backbone import ResNetFPN
from ctmasknet.models.config import ModelConfig
from ctmasknet.models.detector import LesionRoIHeads, build_rpn, build_transform
from ctmasknet.models.sharing import Shareable
from ctmasknet.registry import Variant

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
