"""Models with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctmasknet import create_model

SMALL = {"min_size": 96, "max_size": 160, "rpn_post_nms_top_n_test": 100, "rpn_pre_nms_top_n_test": 300}
FEW = {"rpn_post_nms_top_n_test": 60, "rpn_pre_nms_top_n_test": 200}


def living(name: str, **options: Any) -> Any:
    """A small model whose BatchNorms have statistics of their own, as trained ones do."""
    torch.manual_seed(0)
    model = create_model(name, **SMALL | options)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var") or ("bn" in key and key.endswith("weight")):
            tensor.uniform_(0.6, 1.4)
        elif key.endswith("running_mean") or ("bn" in key and key.endswith("bias")):
            tensor.normal_(0, 0.1)
    return model


def images(*sides: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *side, generator=generator) for side in sides]


def pictures() -> list[Tensor]:
    return images((96, 96), (80, 130), (200, 150), seed=1)


def alone(model: Any, images: list[Tensor] | None = None) -> list[dict[str, Tensor]]:
    """What the plain model gives for each image in a call of its own."""
    with torch.inference_mode():
        return [model([image])[0] for image in images or pictures()]


def segmentation_targets(counts: list[int], side: int = 96) -> list[dict[str, Tensor]]:
    """Square lesions of 24 px, `counts[i]` of them in image i."""
    targets = []
    for count in counts:
        corners = torch.tensor([[4.0, 4.0], [40.0, 8.0], [20.0, 50.0]])[:count]
        boxes = torch.cat([corners, corners + 24], 1).reshape(-1, 4)
        masks = torch.zeros(count, side, side, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        targets.append({"boxes": boxes, "labels": torch.ones(count, dtype=torch.int64), "masks": masks})
    return targets
