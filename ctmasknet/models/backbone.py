"""ResNet body cut at a stage, with a feature pyramid (paper section 2, Figure 1a)."""

from __future__ import annotations

from collections import OrderedDict

import timm
import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from ctmasknet.registry import Variant


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
