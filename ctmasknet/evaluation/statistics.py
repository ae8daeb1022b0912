"""The metrics again, as functions of a weight per image: what the bootstrap evaluates a thousand times.

With weights of 1 they give what `SegmentationMetrics`, `CocoMetrics` and `ClassificationMetrics` give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.ops import box_iou

from ctmasknet.evaluation.bootstrap import Statistic
from ctmasknet.evaluation.detection import IOU_THRESHOLDS, mask_iou

_MAX_DETECTIONS = 100  # per image and class, as in COCO
_RECALL = np.linspace(0, 1, 101)


def segmentation_statistic(rows: Sequence[dict[str, Any]]) -> Statistic:
    """Figures of `SegmentationMetrics.compute` from its rows."""
    ap = np.array([row["ap"] for row in rows], np.float64).reshape(len(rows), -1)
    column = {
        key: np.array([row[key] for row in rows], np.float64)
        for key in ("intersection", "pred_pixels", "gt_pixels", "lesions", "lesions_found", "false_positives")
    }
    both, pixels = column["intersection"], column["pred_pixels"] + column["gt_pixels"]
    dice = np.divide(2 * both, pixels, out=np.ones(len(rows)), where=pixels > 0)

    def statistic(weights: np.ndarray) -> dict[str, float | None]:
        total = weights.sum()
        average = weights @ ap / total
        shared, area, lesions = weights @ both, weights @ pixels, weights @ column["lesions"]
        return {
            "ap50": float(average[0]),
            "ap75": float(average[5]),
            "ap": float(average.mean()),
            "dice_pooled": float(2 * shared / area) if area else 1.0,
            "dice_mean": float(weights @ dice / total),
            "iou_pooled": float(shared / (area - shared)) if area else 1.0,
            "lesion_sensitivity": float(weights @ column["lesions_found"] / lesions) if lesions else None,
            "false_positives_per_slice": float(weights @ column["false_positives"] / total),
        }

    return statistic


def coco_matches(target: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Any]:
    """Which detections of an image COCO counts as right, as plain values.

    Args:
        target, found: boxes (N, 4), masks (N, H, W) bool, labels (N,); `found` with scores (N,), above the
            score threshold of the evaluation.

    Returns:
        Per class and kind (box, mask): for each of the best 100 detections, score and a bit per IoU threshold
        (bit 0 is 0.5) that says whether it is right; and the number of lesions per class.
    """
    overlap = {
        "box": box_iou(found["boxes"].double(), target["boxes"].double()).numpy(),
        "mask": mask_iou(found["masks"], target["masks"]),
    }
    scores = found["scores"].numpy()
    labels, true_labels = found["labels"].numpy(), target["labels"].numpy()
    classes = {}
    for label in np.union1d(labels, true_labels).tolist():
        mine, true = np.flatnonzero(labels == label), np.flatnonzero(true_labels == label)
        mine = mine[np.argsort(-scores[mine], kind="stable")][:_MAX_DETECTIONS]
        classes[str(label)] = {
            "lesions": len(true),
            "scores": [float(score) for score in scores[mine]],
            **{kind: _right(iou[np.ix_(mine, true)]) for kind, iou in overlap.items()},
        }
    return classes


def _right(iou: np.ndarray) -> list[int]:
    """COCO's greedy matching: in order of score, each detection takes the free lesion of highest IoU."""
    bits = [0] * len(iou)
    for step, threshold in enumerate(IOU_THRESHOLDS):
        free = np.ones(iou.shape[1], bool)
        for rank, row in enumerate(iou):
            candidates = np.where(free, row, -1.0)
            if len(candidates) and candidates.max() >= threshold:
                free[candidates.argmax()] = False
                bits[rank] |= 1 << step
    return bits


def coco_statistic(matches: Sequence[dict[str, Any]]) -> Statistic:
    """Figures of `CocoMetrics.compute` from the `coco_matches` of every image."""
    tables = [_class_table(matches, label) for label in sorted({key for image in matches for key in image})]

    def statistic(weights: np.ndarray) -> dict[str, float | None]:
        figures: dict[str, float | None] = {}
        for kind in ("box", "mask"):
            per_class = [_coco_ap(table, kind, weights) for table in tables]
            present = np.array([ap for ap in per_class if ap is not None]).reshape(-1, len(IOU_THRESHOLDS))
            average = present.mean(axis=0) if len(present) else None
            figures[f"{kind}_ap"] = None if average is None else float(average.mean())
            figures[f"{kind}_ap50"] = None if average is None else float(average[0])
            figures[f"{kind}_ap75"] = None if average is None else float(average[5])
        return figures

    return statistic


def _class_table(matches: Sequence[dict[str, Any]], label: str) -> dict[str, np.ndarray]:
    """One class over all images, detections in falling order of score: image, and right per IoU threshold."""
    own = [(index, image[label]) for index, image in enumerate(matches) if label in image]
    scores = np.array([score for _, found in own for score in found["scores"]])
    order = np.argsort(-scores, kind="stable")
    lesions = np.zeros(len(matches))
    lesions[[index for index, _ in own]] = [found["lesions"] for _, found in own]
    image = np.array([index for index, found in own for _ in found["scores"]], np.int64)[order]
    table = {"lesions": lesions, "image": image}
    for kind in ("box", "mask"):
        bits = np.array([value for _, found in own for value in found[kind]], np.int64)[order]
        table[kind] = (bits[:, None] >> np.arange(len(IOU_THRESHOLDS))) & 1
    return table


def _coco_ap(table: dict[str, np.ndarray], kind: str, weights: np.ndarray) -> np.ndarray | None:
    """(T,) AP of a class at every IoU threshold; None without lesions."""
    lesions = float(weights @ table["lesions"])
    if lesions == 0:
        return None
    weight = weights[table["image"]]
    right = np.cumsum(table[kind] * weight[:, None], axis=0)
    seen = np.cumsum(weight)[:, None]
    precision = np.divide(right, seen, out=np.zeros_like(right), where=seen > 0)
    envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    ap = np.zeros(right.shape[1])
    for step in range(right.shape[1]):
        # A hair's breadth, so that a recall of exactly 0.3 is not missed for rounding.
        index = np.searchsorted(right[:, step] / lesions, _RECALL - 1e-12)
        ap[step] = np.append(envelope[:, step], 0.0)[index].mean()
    return ap


def classification_statistic(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> Statistic:
    """Figures of `ClassificationMetrics.compute`, named ``"accuracy"`` and ``"sensitivity.covid"``.

    Args:
        labels: (N,) true classes.
        probabilities: (N, K).
    """
    called = probabilities.argmax(axis=1)
    order = [np.argsort(probabilities[:, index], kind="stable") for index in range(len(class_names))]
    edges = [
        np.flatnonzero(np.diff(probabilities[order[index], index], prepend=-1.0)) for index in range(len(class_names))
    ]

    def statistic(weights: np.ndarray) -> dict[str, float | None]:
        total = float(weights.sum())
        figures: dict[str, float | None] = {"accuracy": float(weights[called == labels].sum()) / total}
        for index, name in enumerate(class_names):
            true = labels == index
            positives, calls = float(weights[true].sum()), float(weights[called == index].sum())
            right = float(weights[true & (called == index)].sum())
            negatives = total - positives
            figures[f"sensitivity.{name}"] = right / positives if positives else None
            figures[f"specificity.{name}"] = (negatives - calls + right) / negatives if negatives else None
            figures[f"precision.{name}"] = right / calls if calls else None
            figures[f"f1.{name}"] = 2 * right / (positives + calls) if positives else None
            figures[f"auc.{name}"] = _auc(weights[order[index]], true[order[index]], edges[index])
        return figures

    return statistic


def _auc(weights: np.ndarray, positive: np.ndarray, edges: np.ndarray) -> float | None:
    """Weighted Mann-Whitney statistic of rising scores; `edges` are where a new score begins."""
    above = np.add.reduceat(weights * positive, edges)
    below = np.add.reduceat(weights * ~positive, edges)
    positives, negatives = above.sum(), below.sum()
    if positives == 0 or negatives == 0:
        return None
    before = np.cumsum(below) - below
    return float((above * (before + below / 2)).sum() / (positives * negatives))
