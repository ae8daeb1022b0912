"""Every metric: lesion segmentation, the choice of an operating point, slice classification, and 95% intervals.

Masks are (N, H, W) bool, labels (N,) integers (0 is background and never occurs), scores (N,) in 0..1, boxes
(N, 4) xyxy in pixels; all as numpy arrays or torch tensors on any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from ctmasknet.errors import ConfigError, DataError, import_extra

Array: TypeAlias = np.ndarray | torch.Tensor

IOU_THRESHOLDS: tuple[float, ...] = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
SCORE_THRESHOLDS: tuple[float, ...] = tuple(round(0.05 * step, 2) for step in range(1, 19))  # 0.05 … 0.9


def released_average_precision(
    gt_masks: Array,
    gt_labels: Array,
    pred_masks: Array,
    pred_labels: Array,
    scores: Array,
    iou_thresholds: Sequence[float] | np.ndarray = IOU_THRESHOLDS,
) -> np.ndarray:
    """Mask AP of one image as the paper's released code computes it (Table 2); this is not COCO AP.

    For each instance in turn, of the predictions of its class with mask IoU > threshold, the one of highest
    IoU is marked correct; one prediction may serve two instances. Precision and recall count marked
    predictions in falling order of score; precision is made non-increasing and summed over the recall steps.
    No instance and no prediction: 1. Either alone: 0.

    Ties are broken as there: of equal scores the later prediction ranks first, of equal IoUs the prediction
    that ranks last is marked, and IoU is compared with the threshold in float32.

    Args:
        gt_masks: (G, H, W) bool.
        gt_labels: (G,) integers.
        pred_masks: (P, H, W) bool, in any order.
        pred_labels: (P,) integers.
        scores: (P,).
        iou_thresholds: T numbers in 0..1.

    Returns:
        (T,) float64 in 0..1.

    Raises:
        DataError: shapes or types that do not fit together.
    """
    image = _check(gt_masks, gt_labels, pred_masks, pred_labels, scores)
    iou = mask_iou(image.pred_masks, image.gt_masks)
    return _average_precision(iou, image.gt_labels, image.pred_labels, image.scores, iou_thresholds)


def mask_iou(a: Array, b: Array) -> np.ndarray:
    """Intersection over union of every pair of masks; two empty masks have IoU 0.

    Args:
        a: (N, H, W) bool.
        b: (M, H, W) bool; faster if this is the smaller set.

    Returns:
        (N, M) float64, exact to rounding whatever the image size.

    Raises:
        DataError: not masks, or of different image sizes.
    """
    a, b = _masks(a, "first masks"), _masks(b, "second masks")
    if len(a) == 0 or len(b) == 0:
        return np.zeros((len(a), len(b)))
    _same_size(a, b)
    intersection = _intersections(a.reshape(len(a), -1), b.reshape(len(b), -1))
    union = _areas(a)[:, None] + _areas(b)[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def _add_rows(rows: list[dict[str, Any]], more: Sequence[dict[str, Any]]) -> None:
    """Append rows of images that are not there yet; an `image_id` of None is never the same as another.

    Raises:
        DataError: an image is in both, or twice in `more`; `rows` stays as it was.
    """
    seen = {row["image_id"] for row in rows} - {None}
    for row in more:
        if row["image_id"] in seen:
            raise DataError(f"{row['image_id']}: evaluated twice; give every image once, under a unique image_id")
        if row["image_id"] is not None:
            seen.add(row["image_id"])
    rows.extend(more)


class SegmentationMetrics:
    """Per-image rows of segmentation quality, and their summary.

    `rows` holds a few numbers per image: memory does not grow with the masks, and a caller can resample
    images or patients (bootstrap).
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def update(
        self,
        gt_masks: Array,
        gt_labels: Array,
        pred_masks: Array,
        pred_labels: Array,
        scores: Array,
        *,
        image_id: str | None = None,
    ) -> None:
        """Add one image; arguments as in `released_average_precision`.

        Args:
            image_id: unique name of the image; the same name twice raises, so that no image counts twice.

        Raises:
            DataError: shapes or types that do not fit together, or an image seen before.
        """
        image = _check(gt_masks, gt_labels, pred_masks, pred_labels, scores)
        iou = mask_iou(image.pred_masks, image.gt_masks)
        matched = (iou > 0.5) & (image.pred_labels[:, None] == image.gt_labels[None, :])
        gt_union, pred_union = _union(image.gt_masks), _union(image.pred_masks)
        both = 0 if gt_union is None or pred_union is None else np.count_nonzero(gt_union & pred_union)
        ap = _average_precision(iou, image.gt_labels, image.pred_labels, image.scores, IOU_THRESHOLDS)
        row = {
            "image_id": image_id,
            "ap": ap.tolist(),
            "intersection": int(both),
            "pred_pixels": 0 if pred_union is None else int(np.count_nonzero(pred_union)),
            "gt_pixels": 0 if gt_union is None else int(np.count_nonzero(gt_union)),
            "lesions": len(image.gt_masks),
            "lesions_found": int(matched.any(axis=0).sum()),
            "predictions": len(image.pred_masks),
            "false_positives": int((~matched.any(axis=1)).sum()),
        }
        _add_rows(self.rows, [row])

    def compute(self) -> dict[str, float | None]:
        """Summary over all images.

        Returns:
            - ``ap50``, ``ap75``, ``ap``: released-protocol AP at IoU 0.5, 0.75 and the mean over 0.5, 0.55 …
              0.95, each the mean over images (an image without lesions and predictions counts 1).
            - ``dice_pooled``, ``iou_pooled``: of the union of all predicted and the union of all true masks,
              whatever their class, with the pixels of all images pooled; 1 if there are neither.
            - ``dice_mean``: mean over images of the same Dice per image; an image with neither counts 1.
            - ``lesion_sensitivity``: fraction of true lesions that some prediction of their class overlaps
              with mask IoU > 0.5, however low its score; None without any lesion.
            - ``false_positives_per_slice``: mean number of predictions whose mask IoU is > 0.5 with no lesion
              of their class; a second prediction on a found lesion is not one.
            - ``images``: their number.

        Raises:
            DataError: no image was added.
        """
        if not self.rows:
            raise DataError("no image was evaluated: the data set is empty")
        both, pred, gt = (sum(row[key] for row in self.rows) for key in ("intersection", "pred_pixels", "gt_pixels"))
        lesions = sum(row["lesions"] for row in self.rows)
        found = sum(row["lesions_found"] for row in self.rows)
        return {
            "ap50": _mean([row["ap"][0] for row in self.rows]),
            "ap75": _mean([row["ap"][5] for row in self.rows]),
            "ap": _mean([value for row in self.rows for value in row["ap"]]),
            "dice_pooled": _dice(both, pred, gt),
            "dice_mean": _mean([_dice(r["intersection"], r["pred_pixels"], r["gt_pixels"]) for r in self.rows]),
            "iou_pooled": both / (pred + gt - both) if pred + gt else 1.0,
            "lesion_sensitivity": found / lesions if lesions else None,
            "false_positives_per_slice": sum(row["false_positives"] for row in self.rows) / len(self.rows),
            "images": len(self.rows),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything collected, as plain Python values (JSON-ready)."""
        return {"rows": [dict(row) for row in self.rows]}

    def merge(self, state: dict[str, Any]) -> None:
        """Add the images of another collector's `state_dict`; the summary does not depend on the order.

        Raises:
            DataError: an image is in both.
        """
        _add_rows(self.rows, state["rows"])


class CocoMetrics:
    """COCO box and mask AP by torchmetrics and faster-coco-eval (extra ``train``).

    Masks are kept run-length encoded. As in COCO, at most the 100 best detections of an image and class
    count, and classes are averaged.
    """

    def __init__(self, score_threshold: float = 0.05) -> None:
        """Detections with score > `score_threshold` count (torchvision's default 0.05).

        Raises:
            MissingExtraError: torchmetrics or faster-coco-eval is not installed.
        """
        import_extra("faster_coco_eval", "train", "COCO AP")
        detection = import_extra("torchmetrics.detection", "train", "COCO AP")
        self.score_threshold = score_threshold
        # Processes are merged explicitly, as in the other collectors: compute() must not wait for ranks.
        self.metric = detection.MeanAveragePrecision(
            iou_type=("bbox", "segm"),
            # torchmetrics' own are rounded to float32: an IoU of exactly 0.6 would fail where COCO passes it.
            iou_thresholds=list(IOU_THRESHOLDS),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            backend="faster_coco_eval",
            sync_on_compute=False,
        )
        self.metric.warn_on_many_detections = False

    def update(
        self,
        gt_boxes: Array,
        gt_masks: Array,
        gt_labels: Array,
        boxes: Array,
        pred_masks: Array,
        pred_labels: Array,
        scores: Array,
    ) -> None:
        """Add one image; boxes (N, 4) xyxy, the others as in `released_average_precision`.

        Raises:
            DataError: shapes or types that do not fit together.
        """
        image = _check(gt_masks, gt_labels, pred_masks, pred_labels, scores)
        keep = _above(image.scores, self.score_threshold)
        truth = {
            "boxes": torch.from_numpy(_boxes(gt_boxes, len(image.gt_masks), "gt_boxes")),
            "masks": torch.from_numpy(image.gt_masks.copy()),  # may be read-only
            "labels": torch.from_numpy(image.gt_labels),
        }
        detections = {
            "boxes": torch.from_numpy(_boxes(boxes, len(image.pred_masks), "boxes")[keep]),
            "masks": torch.from_numpy(image.pred_masks[keep]),
            "labels": torch.from_numpy(image.pred_labels[keep]),
            "scores": torch.from_numpy(image.scores[keep].astype(np.float32)),
        }
        self.metric.update([detections], [truth])

    def compute(self) -> dict[str, float | None]:
        """``{box,mask}_{ap,ap50,ap75}``: AP over IoU 0.5:0.95, at 0.5, at 0.75; all None without lesions."""
        names = {
            f"{ours}_{ap}": f"{theirs}_{key}"
            for ours, theirs in (("box", "bbox"), ("mask", "segm"))
            for ap, key in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75"))
        }
        if not any(len(labels) for labels in self.metric.groundtruth_labels):
            return dict.fromkeys(names)
        values = self.metric.compute()
        return {name: float(values[key]) for name, key in names.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything collected: lists of small CPU tensors and encoded masks, one entry per image."""
        return {name: list(value) for name, value in self.metric.metric_state.items()}

    def merge(self, state: dict[str, Any]) -> None:
        """Add the images of another collector's `state_dict`."""
        for name, values in state.items():
            getattr(self.metric, name).extend(values)
        self.metric.update([], [])  # an update without images: torchmetrics forgets the result it had cached


class OperatingPointSearch:
    """The score and NMS threshold that suit a validation set, from one pass over it.

    Objective: released-protocol AP at IoU 0.5 (mean over images) + pooled Dice of the unions of masks, both
    as in `SegmentationMetrics`: one rewards lesions told apart, the other the area found. It keeps counts
    only.

    Feed it detections made at the lowest score threshold. With detections made without NMS
    (``box_nms_thresh=1``) the figures are those of a model run at each point. With detections made at NMS
    0.75 they are exact for 0.75 and close for lower thresholds, because greedy NMS is not transitive: a box
    that a middle one removed at 0.75 stays at 0.5 if a third removes the middle one itself. Detections cut
    off by ``box_detections_per_img`` are missing likewise. So report the figures of a run at the chosen
    point.
    """

    def __init__(
        self,
        score_thresholds: Sequence[float] = SCORE_THRESHOLDS,
        nms_thresholds: Sequence[float] = (0.3, 0.5, 0.75),
    ) -> None:
        """Candidates, in 0..1; detections with score > threshold count.

        Raises:
            ConfigError: no candidates, more than 255 score thresholds, or one outside 0..1.
        """
        for name, values in (("score_thresholds", score_thresholds), ("nms_thresholds", nms_thresholds)):
            if not 0 < len(values) < 256 or not all(0 <= value <= 1 for value in values):
                raise ConfigError(f"{name}={values!r}: give 1 to 255 numbers in 0..1")
        self.score_thresholds = tuple(sorted(float(value) for value in score_thresholds))
        self.nms_thresholds = tuple(sorted(float(value) for value in nms_thresholds))
        shape = (len(self.nms_thresholds), len(self.score_thresholds))
        self.images = 0
        self.gt_pixels = 0
        self.ap50_sum = np.zeros(shape)
        self.intersection = np.zeros(shape, np.int64)
        self.pred_pixels = np.zeros(shape, np.int64)

    def update(
        self,
        gt_masks: Array,
        gt_labels: Array,
        boxes: Array,
        pred_masks: Array,
        pred_labels: Array,
        scores: Array,
    ) -> None:
        """Add one image; boxes (P, 4) xyxy, the others as in `released_average_precision`.

        Raises:
            DataError: shapes or types that do not fit together.
        """
        image = _check(gt_masks, gt_labels, pred_masks, pred_labels, scores)
        box = _boxes(boxes, len(image.pred_masks), "boxes")
        iou = mask_iou(image.pred_masks, image.gt_masks)
        gt_union = _union(image.gt_masks)
        # level: how many of the score thresholds a detection passes; it counts at threshold s if level > s.
        thresholds = np.array(self.score_thresholds, np.float32)
        level = np.searchsorted(thresholds, image.scores.astype(np.float32)).astype(np.uint8)
        self.images += 1
        self.gt_pixels += 0 if gt_union is None else int(np.count_nonzero(gt_union))
        for n, nms_threshold in enumerate(self.nms_thresholds):
            kept = _nms(box, image, nms_threshold)
            for s in range(len(self.score_thresholds)):
                chosen = kept[level[kept] > s]
                self.ap50_sum[n, s] += _average_precision(
                    iou[chosen], image.gt_labels, image.pred_labels[chosen], image.scores[chosen], (0.5,)
                )[0]
            if len(kept) == 0:
                continue
            # highest: per pixel, the level of the best mask on it.
            highest = np.zeros(image.pred_masks.shape[1:], np.uint8)
            for index in kept[np.argsort(level[kept])]:
                np.copyto(highest, level[index], where=image.pred_masks[index])
            self.pred_pixels[n] += self._pixels_per_threshold(highest)
            if gt_union is not None:
                self.intersection[n] += self._pixels_per_threshold(highest[gt_union])

    def best(self) -> dict[str, float]:
        """The candidate of highest objective; among equals, the highest score, then NMS, threshold.

        Returns:
            ``score_threshold``, ``nms_threshold``, ``ap50``, ``dice_pooled``, and their sum, ``objective``.

        Raises:
            DataError: no image was added.
        """
        return max(self.table(), key=lambda row: (row["objective"], row["score_threshold"], row["nms_threshold"]))

    def table(self) -> list[dict[str, float]]:
        """All candidates, with the keys of `best`.

        Raises:
            DataError: no image was added.
        """
        if self.images == 0:
            raise DataError("no image to choose an operating point on: the validation set is empty")
        rows = []
        for n, nms_threshold in enumerate(self.nms_thresholds):
            for s, score_threshold in enumerate(self.score_thresholds):
                ap50 = float(self.ap50_sum[n, s]) / self.images
                dice = _dice(int(self.intersection[n, s]), int(self.pred_pixels[n, s]), self.gt_pixels)
                rows.append(
                    {
                        "score_threshold": score_threshold,
                        "nms_threshold": nms_threshold,
                        "ap50": ap50,
                        "dice_pooled": dice,
                        "objective": ap50 + dice,
                    }
                )
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Everything collected, as plain Python values (JSON-ready)."""
        return {
            "score_thresholds": list(self.score_thresholds),
            "nms_thresholds": list(self.nms_thresholds),
            "images": self.images,
            "gt_pixels": self.gt_pixels,
            "ap50_sum": self.ap50_sum.tolist(),
            "intersection": self.intersection.tolist(),
            "pred_pixels": self.pred_pixels.tolist(),
        }

    def merge(self, state: dict[str, Any]) -> None:
        """Add the counts of another search's `state_dict`.

        Raises:
            ConfigError: the other search had other candidates.
        """
        candidates = tuple(state["score_thresholds"]), tuple(state["nms_thresholds"])
        if candidates != (self.score_thresholds, self.nms_thresholds):
            raise ConfigError("operating point searches with different thresholds cannot be merged")
        self.images += state["images"]
        self.gt_pixels += state["gt_pixels"]
        self.ap50_sum += np.asarray(state["ap50_sum"])
        self.intersection += np.asarray(state["intersection"], np.int64)
        self.pred_pixels += np.asarray(state["pred_pixels"], np.int64)

    def _pixels_per_threshold(self, highest: np.ndarray) -> np.ndarray:
        """(S,) number of pixels of `highest` (any shape, uint8 levels) above each score threshold."""
        histogram = np.bincount(highest.ravel(), minlength=len(self.score_thresholds) + 1)
        return histogram[1:][::-1].cumsum()[::-1]


def _average_precision(
    iou: np.ndarray,
    gt_labels: np.ndarray,
    pred_labels: np.ndarray,
    scores: np.ndarray,
    iou_thresholds: Sequence[float] | np.ndarray,
) -> np.ndarray:
    """(T,) released-protocol AP from a (P, G) matrix of mask IoUs."""
    thresholds = np.asarray(iou_thresholds, np.float32).reshape(-1)
    predictions, instances = iou.shape
    if predictions == 0 or instances == 0:
        return np.full(len(thresholds), float(predictions == instances))
    # From the last rank to the first: argmax takes the first of equals, so the one that ranks last.
    lowest_first = np.argsort(scores, kind="stable")
    same_class = pred_labels[lowest_first, None] == gt_labels[None, :]
    candidates = np.where(same_class, iou[lowest_first].astype(np.float32), np.float32(-1))
    best = candidates.argmax(axis=0)
    best_iou = candidates[best, np.arange(instances)]
    # The best candidate of an instance is the same at every threshold; only whether it passes differs.
    correct = np.zeros((len(thresholds), predictions), bool)
    threshold_index, instance = np.nonzero(best_iou[None, :] > thresholds[:, None])
    correct[threshold_index, predictions - 1 - best[instance]] = True
    precision = correct.cumsum(axis=1) / np.arange(1, predictions + 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    # Recall rises by 1 / instances at each correct prediction and nowhere else.
    return np.where(correct, envelope, 0.0).sum(axis=1) / instances


def _intersections(a: np.ndarray, b: np.ndarray, chunk: int = 1 << 17) -> np.ndarray:
    """(N, M) float64 number of pixels in both masks, of flat bool masks (N, pixels) and (M, pixels).

    Only pixels inside some mask of `b` can count. The product is float32, in chunks small enough to be exact.
    """
    total = np.zeros((len(a), len(b)))
    for start in range(0, b.shape[1], chunk):
        part = slice(start, start + chunk)
        pixels = np.flatnonzero(b[:, part].any(axis=0))
        # np.take is five times as fast here as an index in brackets.
        inside_a, inside_b = (np.take(masks[:, part], pixels, axis=1).astype(np.float32) for masks in (a, b))
        total += inside_a @ inside_b.T
    return total


def _areas(masks: np.ndarray) -> np.ndarray:
    return np.array([np.count_nonzero(mask) for mask in masks], np.float64)


def _union(masks: np.ndarray) -> np.ndarray | None:
    """(H, W) bool; None for no masks, whose image size may be unknown."""
    return np.asarray(masks.any(axis=0)) if len(masks) else None


def _dice(intersection: int, pred_pixels: int, gt_pixels: int) -> float:
    return 2 * intersection / (pred_pixels + gt_pixels) if pred_pixels + gt_pixels else 1.0


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)  # fsum: the same figure in whatever order processes were merged


def _nms(boxes: np.ndarray, image: _Image, threshold: float) -> np.ndarray:
    """Indices that survive NMS per class, in falling order of score."""
    kept = batched_nms(
        torch.from_numpy(boxes),
        torch.from_numpy(image.scores.astype(np.float32)),
        torch.from_numpy(image.pred_labels),
        threshold,
    )
    return kept.numpy()


def _above(scores: np.ndarray, threshold: float) -> np.ndarray:
    return scores.astype(np.float32) > np.float32(threshold)  # as the models compare, in float32


class _Image(NamedTuple):
    gt_masks: np.ndarray
    gt_labels: np.ndarray
    pred_masks: np.ndarray
    pred_labels: np.ndarray
    scores: np.ndarray


def _check(gt_masks: Array, gt_labels: Array, pred_masks: Array, pred_labels: Array, scores: Array) -> _Image:
    gt, pred = _masks(gt_masks, "gt_masks"), _masks(pred_masks, "pred_masks")
    if len(gt) and len(pred):
        _same_size(gt, pred)
    score = _numpy(scores).astype(np.float64)
    if score.shape != (len(pred),) or not np.isfinite(score).all():
        raise DataError(f"scores: expected {len(pred)} finite numbers, one per prediction, got shape {score.shape}")
    return _Image(
        gt,
        _labels(gt_labels, len(gt), "gt_labels"),
        pred,
        _labels(pred_labels, len(pred), "pred_labels"),
        score,
    )


def _numpy(value: Array) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def _masks(value: Array, name: str) -> np.ndarray:
    masks = _numpy(value)
    if masks.ndim != 3:
        raise DataError(f"{name}: expected masks of shape (N, H, W), got {masks.shape}")
    if len(masks) and masks.dtype.kind not in "bui":
        raise DataError(f"{name}: expected bool masks, got {masks.dtype}; threshold soft masks first (mask > 0.5)")
    return masks if masks.dtype == bool else masks != 0


def _same_size(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[1:] != b.shape[1:]:
        raise DataError(f"masks of different image sizes: {a.shape[1:]} and {b.shape[1:]} (height, width)")


def _labels(value: Array, count: int, name: str) -> np.ndarray:
    labels = _numpy(value)
    if labels.shape != (count,) or (count and labels.dtype.kind not in "ui"):
        raise DataError(f"{name}: expected {count} integers, one per mask, got shape {labels.shape} {labels.dtype}")
    return labels.astype(np.int64)


def _boxes(value: Array, count: int, name: str) -> np.ndarray:
    boxes = _numpy(value).astype(np.float32)
    if boxes.shape != (count, 4):
        raise DataError(f"{name}: expected boxes of shape ({count}, 4), one per mask, got {boxes.shape}")
    return boxes


class ClassificationMetrics:
    """Per-image rows of class probabilities, and their summary."""

    def __init__(self, class_names: Sequence[str]) -> None:
        """Names of the K classes, in the order of the model's outputs.

        Raises:
            ConfigError: fewer than two names, or a name twice.
        """
        if len(class_names) < 2 or len(set(class_names)) != len(class_names):
            raise ConfigError(f"class_names={list(class_names)!r}: give two or more different names")
        self.class_names = tuple(class_names)
        self.rows: list[dict[str, Any]] = []

    def update(self, probabilities: Array, labels: Array, image_ids: Sequence[str] | None = None) -> None:
        """Add N images.

        Args:
            probabilities: (N, K) in 0..1, each row adding up to 1.
            labels: (N,) integers, the true class of each.
            image_ids: N unique names; the same name twice raises, so that no image counts twice.

        Raises:
            DataError: shapes or values that do not fit, or an image seen before.
        """
        probability, label = _numpy(probabilities).astype(np.float64), _numpy(labels)
        classes = len(self.class_names)
        if probability.ndim != 2 or probability.shape[1] != classes:
            raise DataError(f"probabilities: expected shape (N, {classes}), got {probability.shape}")
        # 1e-2 leaves room for half precision; logits fail.
        if not ((probability >= 0) & (probability <= 1)).all() or (abs(probability.sum(axis=1) - 1) > 1e-2).any():
            raise DataError("probabilities: each row must lie in 0..1 and add up to 1; apply softmax to logits first")
        if label.shape != (len(probability),) or (len(label) and label.dtype.kind not in "ui"):
            raise DataError(f"labels: expected {len(probability)} integers, got shape {label.shape} {label.dtype}")
        if ((label < 0) | (label >= classes)).any():
            raise DataError(f"labels: expected 0..{classes - 1} ({', '.join(self.class_names)}), got {label.tolist()}")
        if image_ids is not None and len(image_ids) != len(probability):
            raise DataError(f"image_ids: expected {len(probability)} names, got {len(image_ids)}")
        names = [None] * len(probability) if image_ids is None else image_ids
        _add_rows(
            self.rows,
            [
                {"image_id": name, "label": int(true), "probabilities": row.tolist()}
                for name, true, row in zip(names, label, probability, strict=True)
            ],
        )

    def compute(self) -> dict[str, Any]:
        """Summary over all images; the class called is the one of highest probability (the first of equals).

        Returns:
            - ``n``: number of images; ``accuracy``: fraction called right.
            - ``confusion``: K lists of K counts, rows the true class, columns the class called.
            - ``sensitivity``, ``specificity``, ``precision``, ``f1``, ``auc`` (ROC): dict from class name to
              a number in 0..1, that class against the rest, or None where undefined: sensitivity, F1 and AUC
              of a class without images, specificity and AUC without images of other classes, precision of a
              class never called.

        Raises:
            DataError: no image was added.
        """
        if not self.rows:
            raise DataError("no image was evaluated: the data set is empty")
        labels = np.array([row["label"] for row in self.rows])
        probabilities = np.array([row["probabilities"] for row in self.rows])
        classes = len(self.class_names)
        confusion = np.zeros((classes, classes), np.int64)
        np.add.at(confusion, (labels, probabilities.argmax(axis=1)), 1)
        result: dict[str, Any] = {
            "n": len(labels),
            "accuracy": int(confusion.trace()) / len(labels),
            "confusion": confusion.tolist(),
            "sensitivity": {},
            "specificity": {},
            "precision": {},
            "f1": {},
            "auc": {},
        }
        for index, name in enumerate(self.class_names):
            true_positives = int(confusion[index, index])
            positives, called = int(confusion[index].sum()), int(confusion[:, index].sum())
            negatives = len(labels) - positives
            true_negatives = negatives - (called - true_positives)
            result["sensitivity"][name] = true_positives / positives if positives else None
            result["specificity"][name] = true_negatives / negatives if negatives else None
            result["precision"][name] = true_positives / called if called else None
            result["f1"][name] = 2 * true_positives / (positives + called) if positives else None
            result["auc"][name] = _auc(probabilities[:, index], labels == index)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Everything collected, as plain Python values (JSON-ready)."""
        return {"class_names": list(self.class_names), "rows": [dict(row) for row in self.rows]}

    def merge(self, state: dict[str, Any]) -> None:
        """Add the images of another collector's `state_dict`; the summary does not depend on the order.

        Raises:
            ConfigError: the other collector has other classes.
            DataError: an image is in both.
        """
        if tuple(state["class_names"]) != self.class_names:
            raise ConfigError(f"cannot merge metrics of classes {state['class_names']} and {list(self.class_names)}")
        _add_rows(self.rows, state["rows"])


def _auc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve as the Mann-Whitney statistic, ties counting half; None if one side is empty.

    Args:
        scores: (N,) float.
        positive: (N,) bool.
    """
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if positives == 0 or negatives == 0:
        return None
    _, group, size = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (size.cumsum() - (size - 1) / 2)[group]  # from 1; the mean rank among equals
    return float((rank[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


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
            figures[f"auc.{name}"] = _weighted_auc(weights[order[index]], true[order[index]], edges[index])
        return figures

    return statistic


def _weighted_auc(weights: np.ndarray, positive: np.ndarray, edges: np.ndarray) -> float | None:
    """Weighted Mann-Whitney statistic of rising scores; `edges` are where a new score begins."""
    above = np.add.reduceat(weights * positive, edges)
    below = np.add.reduceat(weights * ~positive, edges)
    positives, negatives = above.sum(), below.sum()
    if positives == 0 or negatives == 0:
        return None
    before = np.cumsum(below) - below
    return float((above * (before + below / 2)).sum() / (positives * negatives))


MIN_PATIENTS = 5
"""Fewer patients give no interval: their resamples hardly differ."""

Interval: TypeAlias = tuple[float, float]
Statistic: TypeAlias = Callable[[np.ndarray], dict[str, float | None]]

_DEFINED = 0.9  # share of the resamples in which a figure must be defined to get an interval


def patient_intervals(
    patients: Sequence[str | None],
    statistic: Statistic,
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval | None]:
    """Percentile bootstrap intervals, patients drawn with replacement.

    Args:
        patients: of each of N slices; None where unknown.
        statistic: takes N weights (float64, how often each slice's patient was drawn) and gives figures by
            name, None where undefined.
        samples: resamples.
        seed: fixes them.
        level: coverage, in 0..1.

    Returns:
        Lower and upper bound per figure; None with fewer than `MIN_PATIENTS` patients, an unknown patient, or
        a figure that is undefined in more than a tenth of the resamples.
    """
    names = statistic(np.ones(len(patients))) if len(patients) else {}
    if any(patient is None for patient in patients) or len(set(patients)) < MIN_PATIENTS or samples < 1:
        return dict.fromkeys(names)
    _, index = np.unique(np.array([str(patient) for patient in patients]), return_inverse=True)
    count = int(index.max()) + 1
    generator = np.random.default_rng(seed)
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(samples):
        drawn = np.bincount(generator.integers(count, size=count), minlength=count)
        for name, value in statistic(drawn[index].astype(np.float64)).items():
            if value is not None:
                found[name].append(value)
    tail = 100 * (1 - level) / 2
    intervals: dict[str, Interval | None] = {}
    for name, values in found.items():
        enough = names[name] is not None and len(values) >= _DEFINED * samples
        intervals[name] = (
            (float(np.percentile(values, tail)), float(np.percentile(values, 100 - tail))) if enough else None
        )
    return intervals
