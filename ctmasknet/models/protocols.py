"""One pass of a segmenter, read at several score and NMS thresholds; and its raw mask-score map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from ctmasknet.models.detector import LesionRoIHeads, Regions
from ctmasknet.models.segmentation import LesionMaskRCNN

EVERY_SCORE = -0.01
"""Score threshold that lets every RoI through (paper section 3)."""

_PASTED_AT_ONCE = 16  # RoIs: a pasted one is as large as the image, so a map is put together in parts


@dataclass(frozen=True)
class Protocol:
    """What counts as a detection.

    Attributes:
        score_threshold: detections scored above it.
        nms_threshold: of the RoI NMS, per class.
        mask_score: foreground is above 0.5 in pasted probabilities (``"sigmoid"``) or in pasted raw
            logits (``"logit"``, as the released code does).
    """

    score_threshold: float
    nms_threshold: float
    mask_score: Literal["sigmoid", "logit"] = "sigmoid"


PAPER = Protocol(0.75, 0.75, "logit")
"""How Table 2 was made (paper section 3; the logits: released code)."""


@torch.no_grad()
def detect_at(
    model: LesionMaskRCNN, images: Sequence[Tensor], protocols: Sequence[Protocol]
) -> list[list[dict[str, Tensor]]]:
    """Detections by several protocols from one pass: what the model gives when set to each.

    Args:
        model: a segmenter in evaluation mode; its own thresholds play no part, `detections_per_img` does.
        images: (3, H, W) float in 0..1, sizes may differ.
        protocols: at least one.

    Returns:
        Per image and protocol a dict of boxes (N, 4), labels (N,), scores (N,), masks (N, H, W) bool.
    """
    heads = model.roi_heads
    features, regions, shapes = _ranked_regions(model, images, min(p.score_threshold for p in protocols))
    kept = [[_kept(r, p, heads.detections_per_img) for p in protocols] for r in regions]
    wanted = [torch.cat(rows).unique() for rows in kept]
    logits = _mask_logits(heads, features, [_rows(r, w) for r, w in zip(regions, wanted, strict=True)], shapes)
    results = []
    for index, image in enumerate(images):
        found = []
        for protocol, rows in zip(protocols, kept[index], strict=True):
            chosen = _rows(regions[index], rows)
            masks = logits[index][torch.searchsorted(wanted[index], rows)]
            if protocol.mask_score == "sigmoid":
                masks = masks.sigmoid()
            found.append(_pasted(model, chosen, masks, shapes[index], image))
        results.append(found)
    return results


@torch.no_grad()
def score_maps(
    model: LesionMaskRCNN, images: Sequence[Tensor], *, nms_threshold: float = 0.75, rois: int | None = None
) -> list[Tensor]:
    """Raw mask logits of every RoI, pasted into the image and combined by their maximum (Figure 2, column 2).

    RoIs count whatever their score; each is 0 outside its box, so a pixel that no RoI speaks for is 0.

    Args:
        model: a segmenter in evaluation mode.
        images: (3, H, W) float in 0..1, sizes may differ.
        nms_threshold: of the RoI NMS, per class (the paper's: 0.75).
        rois: the best so many RoIs only; None takes the model's `detections_per_img` (the paper's: 128).

    Returns:
        One (H, W) float32 map per image.
    """
    heads = model.roi_heads
    count = heads.detections_per_img if rois is None else rois
    features, regions, shapes = _ranked_regions(model, images, EVERY_SCORE)
    best = [_rows(r, _kept(r, Protocol(EVERY_SCORE, nms_threshold), count)) for r in regions]
    logits = _mask_logits(heads, features, best, shapes)
    maps = []
    for image, r, masks, shape in zip(images, best, logits, shapes, strict=True):
        size = (int(image.shape[-2]), int(image.shape[-1]))
        combined: Tensor | None = None
        for start in range(0, len(r.scores), _PASTED_AT_ONCE):
            part = slice(start, start + _PASTED_AT_ONCE)
            result = {"boxes": r.boxes[part], "masks": masks[part]}
            pasted = model.transform.postprocess([result], [shape], [size])[0]["masks"][:, 0].amax(0)
            combined = pasted if combined is None else torch.maximum(combined, pasted)
        maps.append(image.new_zeros(size) if combined is None else combined)
    return maps


def _ranked_regions(
    model: LesionMaskRCNN, images: Sequence[Tensor], score_threshold: float
) -> tuple[dict[str, Tensor], list[Regions], list[tuple[int, int]]]:
    """Features, every region above the threshold before NMS, best first, and the sizes of the resized images."""
    batch, _ = model.transform(list(images))
    features = model.backbone(batch.tensors)
    proposals, _ = model.rpn(batch, features)
    # NMS at 1 removes nothing: it is done afterwards, once per protocol.
    with heads_set_to(model.roi_heads, score_thresh=score_threshold, nms_thresh=1.0, detections_per_img=1 << 30):
        regions = model.roi_heads.regions(features, proposals, batch.image_sizes)
    return features, regions, batch.image_sizes


def _kept(regions: Regions, protocol: Protocol, count: int) -> Tensor:
    """Rows that the protocol keeps, best first."""
    rows = (regions.scores > protocol.score_threshold).nonzero().squeeze(1)
    order = batched_nms(regions.boxes[rows], regions.scores[rows], regions.labels[rows], protocol.nms_threshold)
    return rows[order[:count]]


def _rows(regions: Regions, rows: Tensor) -> Regions:
    return Regions(*(getattr(regions, field.name)[rows] for field in fields(Regions)))


def _mask_logits(
    heads: LesionRoIHeads, features: dict[str, Tensor], regions: list[Regions], shapes: list[tuple[int, int]]
) -> tuple[Tensor, ...]:
    with heads_set_to(heads, mask_score="logit"):
        return heads._masks(features, regions, shapes)


def _pasted(
    model: LesionMaskRCNN, regions: Regions, masks: Tensor, shape: tuple[int, int], image: Tensor
) -> dict[str, Tensor]:
    """A result in pixels of the input, masks binary."""
    size = (int(image.shape[-2]), int(image.shape[-1]))
    result = {"boxes": regions.boxes, "labels": regions.labels, "scores": regions.scores, "masks": masks}
    result = model.transform.postprocess([result], [shape], [size])[0]
    return result | {"masks": result["masks"][:, 0] > 0.5}


@contextmanager
def heads_set_to(heads: LesionRoIHeads, **values: object) -> Iterator[None]:
    """RoI heads with other settings for a while; afterwards they are as they were."""
    before = {name: getattr(heads, name) for name in values}
    for name, value in values.items():
        setattr(heads, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(heads, name, value)
