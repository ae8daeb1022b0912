"""Every metric, each once: lesions found, the operating point, slices classified, and 95% intervals over patients.

`segmentation_rows` and `coco_row` make of a slice a row of plain values. A collector takes the rows of all slices:
`statistic` makes of them a function that gives the figures for a weight per row, `compute` is that function for weights
of one, and the bootstrap draws other weights.

A slice's lesions, `target`, and what was found on it, `found`, are dicts as torchvision's detectors have them:
``masks`` (N, H, W) bool, ``labels`` (N,) integers (0 is background and never occurs), ``boxes`` (N, 4) xyxy in pixels
(needed for COCO AP alone) and, found ones, ``scores`` (N,) in 0..1; numpy arrays or torch tensors on any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torchvision.ops import box_iou

from ctmasknet.errors import DataError

Array: TypeAlias = np.ndarray | torch.Tensor
Instances: TypeAlias = Mapping[str, Array]
"""Masks, labels, boxes and scores of a slice, as above."""
Row: TypeAlias = dict[str, Any]
"""What is kept of a slice: plain values, ready for JSON."""
Figures: TypeAlias = dict[str, Any]
"""Figure name -> number, or None where undefined; per class a dict from class name to number."""
Statistic: TypeAlias = Callable[[np.ndarray], dict[str, float]]
"""Weight of each of N rows (float64) -> figures by name, NaN where undefined; ``"sensitivity.covid"`` is of a class."""

IOU_THRESHOLDS: tuple[float, ...] = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
SCORE_THRESHOLDS: tuple[float, ...] = tuple(round(0.05 * step, 2) for step in range(1, 19))  # 0.05 … 0.9
"""Candidates for the score threshold of an operating point."""
NMS_THRESHOLDS: tuple[float, ...] = (0.3, 0.5, 0.75)
"""Candidates for its NMS threshold."""
COCO_SCORE = 0.05
"""COCO AP counts what is scored above this (torchvision's default)."""
MIN_PATIENTS = 5
"""Fewer patients give no interval: their resamples hardly differ."""

_COCO_IOU = np.linspace(0.5, 0.95, 10)  # pycocotools' own: one differs from the decimal number by a rounding
_COCO_RECALL = np.linspace(0, 1, 101)
_COCO_DETECTIONS = 100  # per image and class
_BIN_EDGES = np.linspace(0, 1, 11)[1:-1]  # of the bins of probability that calibration is measured in
_DEFINED = 0.9  # share of the resamples in which a figure must be defined to get an interval


def released_average_precision(
    iou: np.ndarray,
    gt_labels: np.ndarray,
    pred_labels: np.ndarray,
    scores: np.ndarray,
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
        iou: (P, G) mask IoU of P predictions, in any order, with G instances.
        iou_thresholds: T numbers in 0..1; the result is (T,) float64 in 0..1.
    """
    thresholds = np.asarray(iou_thresholds, np.float32)
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
    correct = np.zeros((predictions, len(thresholds)), bool)
    instance, threshold_index = np.nonzero(best_iou[:, None] > thresholds[None, :])
    correct[predictions - 1 - best[instance], threshold_index] = True
    precision = correct.cumsum(axis=0) / np.arange(1, predictions + 1)[:, None]
    # Recall rises by 1 / instances at each correct prediction and nowhere else.
    return np.where(correct, _envelope(precision), 0.0).T.sum(axis=1) / instances


def mask_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair of masks, (N, H, W) and (M, H, W) bool, as (N, M) float64.

    Exact to rounding whatever the image size; two empty masks have IoU 0. It is faster if `b` is the smaller set.
    """
    flat = a.reshape(len(a), math.prod(a.shape[1:]))
    shared = np.zeros((len(a), len(b)))
    for column, mask in enumerate(b):
        # np.take is five times as fast here as an index in brackets.
        shared[:, column] = np.count_nonzero(np.take(flat, np.flatnonzero(mask), axis=1), axis=1)
    areas = [np.array([np.count_nonzero(mask) for mask in masks], np.float64) for masks in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


class Metrics:
    """Figures of rows: what `segmentation_rows`, `coco_row` or a classifier gives of each slice."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def statistic(self) -> Statistic:
        """The figures as a function of a weight per row."""
        raise NotImplementedError

    def compute(self) -> Figures:
        """The figures of all rows.

        Raises:
            DataError: no rows.
        """
        if not self.rows:
            raise DataError("no image was evaluated: the data set is empty")
        values = self.statistic()(np.ones(len(self.rows)))
        return nested({name: None if math.isnan(value) else value for name, value in values.items()})


class SegmentationMetrics(Metrics):
    """Lesions found on slices: AP of the released protocol, Dice, sensitivity, false positives.

    Figures:

    - ``ap50``, ``ap75``, ``ap``: released-protocol AP at IoU 0.5, 0.75 and the mean over 0.5, 0.55 … 0.95, each the
      mean over images (an image without lesions and predictions counts 1).
    - ``dice_pooled``, ``iou_pooled``: of the union of all predicted and the union of all true masks, whatever their
      class, with the pixels of all images pooled; 1 if there are neither. Masks are binary: this is no Dice averaged
      over the thresholds of a grey map.
    - ``dice_mean``: mean over images of the same Dice per image; an image with neither counts 1.
    - ``lesion_sensitivity``: fraction of true lesions that some prediction of their class overlaps with mask IoU > 0.5,
      however low its score; None without any lesion.
    - ``false_positives_per_slice``: mean number of predictions whose mask IoU is > 0.5 with no lesion of their class;
      a second prediction on a found lesion is not one.
    """

    def compute(self) -> Figures:
        """The figures, and ``images``, the number of rows."""
        return super().compute() | {"images": len(self.rows)}

    def statistic(self) -> Statistic:
        keys = ("intersection", "pred_pixels", "gt_pixels", "lesions", "lesions_found", "false_positives")
        both, found, true, lesions, hits, alarms = (np.array([r[k] for r in self.rows], np.float64) for k in keys)
        ap = np.array([row["ap"] for row in self.rows], np.float64)
        pixels = found + true
        dice = np.divide(2 * both, pixels, out=np.ones(len(self.rows)), where=pixels > 0)

        def figures(weights: np.ndarray) -> dict[str, float]:
            total = weights.sum()
            average = weights @ ap / total
            shared, area, number = weights @ both, weights @ pixels, weights @ lesions
            return {
                "ap50": float(average[0]),
                "ap75": float(average[5]),
                "ap": float(average.mean()),
                "dice_pooled": float(2 * shared / area) if area else 1.0,
                "dice_mean": float(weights @ dice / total),
                "iou_pooled": float(shared / (area - shared)) if area else 1.0,
                "lesion_sensitivity": float(weights @ hits / number) if number else math.nan,
                "false_positives_per_slice": float(weights @ alarms / total),
            }

        return figures


def segmentation_rows(target: Instances, found: Instances, score_thresholds: Sequence[float] = (-np.inf,)) -> list[Row]:
    """What `SegmentationMetrics` takes of one slice, for each of several score thresholds.

    Args:
        score_thresholds: in rising order; predictions with score > threshold count, all of them by default.

    Raises:
        DataError: shapes or types that do not fit together.
    """
    gt_masks, gt_labels, masks, labels, scores, iou = _compare(target, found)
    matched = (iou > 0.5) & (labels[:, None] == gt_labels[None, :])
    # level: how many of the thresholds a prediction passes, compared in float32 as the models do.
    level = np.searchsorted(np.array(score_thresholds, np.float32), scores.astype(np.float32)).astype(np.uint8)
    true = gt_masks.any(axis=0)
    # highest: per pixel, the level of the best mask on it.
    highest = np.zeros(true.shape, np.uint8)
    for index in np.argsort(level):
        np.copyto(highest, level[index], where=masks[index])
    rows = []
    for step in range(len(score_thresholds)):
        chosen = level > step
        ap = released_average_precision(iou[chosen], gt_labels, labels[chosen], scores[chosen])
        rows.append(
            {
                "ap": ap.tolist(),
                "intersection": int(np.count_nonzero(highest[true] > step)),
                "pred_pixels": int(np.count_nonzero(highest > step)),
                "gt_pixels": int(np.count_nonzero(true)),
                "lesions": len(gt_masks),
                "lesions_found": int(matched[chosen].any(axis=0).sum()),
                "predictions": int(chosen.sum()),
                "false_positives": int((~matched[chosen].any(axis=1)).sum()),
            }
        )
    return rows


class CocoMetrics(Metrics):
    """COCO box and mask AP of detections scored above `COCO_SCORE`, as pycocotools computes it.

    Figures: ``{box,mask}_{ap,ap50,ap75}``, AP over IoU 0.5:0.95, at 0.5, at 0.75; all None without lesions. At most the
    100 best detections of an image and class count, and classes are averaged.
    """

    def statistic(self) -> Statistic:
        flat = [(image, *one) for image, row in enumerate(self.rows) for one in row["detections"]]
        detections = np.array(sorted(flat, key=lambda one: -one[2])).reshape(-1, 5)
        # Per class: (N,) lesions of each image; of its P detections in falling order of score (P,) which image each is
        # of, and (P, 2, T) whether its box and its mask are right.
        tables = []
        for label in sorted({label for row in self.rows for label in row["lesions"]}):
            own = detections[detections[:, 1] == int(label)].astype(np.float64)
            right = own[:, 3:, None].astype(np.int64) >> np.arange(len(_COCO_IOU)) & 1
            lesions = np.array([row["lesions"].get(label, 0) for row in self.rows])
            tables.append((lesions, own[:, 0].astype(np.int64), right))

        def figures(weights: np.ndarray) -> dict[str, float]:
            found = {}
            for column, kind in enumerate(("box", "mask")):
                per_class = [
                    _coco_average_precision(right[:, column], weights[image_of], weights @ lesions)
                    for lesions, image_of, right in tables
                    if weights @ lesions
                ]
                average = np.mean(per_class, axis=0) if per_class else np.full(len(_COCO_IOU), math.nan)
                found[f"{kind}_ap"] = float(average.mean())
                found[f"{kind}_ap50"] = float(average[0])
                found[f"{kind}_ap75"] = float(average[5])
            return found

        return figures


def coco_row(target: Instances, found: Instances) -> Row:
    """What `CocoMetrics` takes of one slice: of each class how many lesions, and all detections.

    Of each detection there are label and score and, for its box and for its mask, a bit per IoU threshold (bit 0 is
    0.5) that is 1 if it is right.

    Raises:
        DataError: shapes or types that do not fit together.
    """
    _, gt_labels, _, labels, scores, iou = _compare(target, found)
    boxes = (torch.as_tensor(given["boxes"]).double().cpu() for given in (found, target))
    overlap = box_iou(*boxes).nan_to_num().numpy()
    if overlap.shape != iou.shape:
        raise DataError(f"boxes: one per mask is needed, but they are {overlap.shape} to masks {iou.shape}")
    counts = scores.astype(np.float32) > np.float32(COCO_SCORE)
    lesions, detections = {}, []
    for label in np.union1d(labels[counts], gt_labels).astype(int).tolist():
        mine, true = np.flatnonzero(counts & (labels == label)), np.flatnonzero(gt_labels == label)
        mine = mine[np.argsort(-scores[mine], kind="stable")][:_COCO_DETECTIONS]
        lesions[str(label)] = len(true)
        bits = [_right(pairs[np.ix_(mine, true)]) for pairs in (overlap, iou)]
        detections += [[label, *one] for one in zip(scores[mine].tolist(), *bits, strict=True)]
    return {"lesions": lesions, "detections": detections}


def operating_points(rows: Sequence[Row]) -> list[Figures]:
    """How each candidate for an operating point does on a validation set, best first.

    The objective is released-protocol AP at IoU 0.5 + pooled Dice, both as in `SegmentationMetrics`: one rewards
    lesions told apart, the other the area found. Among equals, the higher score, then NMS, threshold comes first.

    Args:
        rows: as `evaluation.rows.search_rows` makes them: ``points`` has for each of `NMS_THRESHOLDS` what
            `segmentation_rows` gives at `SCORE_THRESHOLDS`.

    Returns:
        Per candidate ``score_threshold``, ``nms_threshold``, ``objective`` and the figures of `SegmentationMetrics`.
    """
    table = []
    for n, nms in enumerate(NMS_THRESHOLDS):
        for s, score in enumerate(SCORE_THRESHOLDS):
            figures = SegmentationMetrics([row["points"][n][s] for row in rows]).compute()
            objective = figures["ap50"] + figures["dice_pooled"]
            table.append({"score_threshold": score, "nms_threshold": nms, "objective": objective} | figures)
    return sorted(table, key=lambda p: (p["objective"], p["score_threshold"], p["nms_threshold"]), reverse=True)


class ClassificationMetrics(Metrics):
    """Slices classified (paper, Table 3); the class called is the one of highest probability (the first of equals).

    Figures:

    - ``accuracy``: the fraction called right.
    - ``brier``: mean over images of the squared differences between the probabilities and 1 for the true class, 0 for
      the others, summed over the classes: 0 at best, 2 at worst.
    - ``ece``: expected calibration error of the class called. Images are put into ten bins by its probability, each 0.1
      wide; the difference between the mean probability and the fraction called right, averaged over the images.
    - per class, against the rest, ``sensitivity``, ``specificity``, ``precision``, ``f1`` and ``auc`` (ROC), in 0..1 or
      None where undefined: sensitivity, F1 and AUC of a class without images, specificity and AUC without images of
      other classes, precision of a class never called.
    """

    def __init__(self, class_names: Sequence[str], rows: Sequence[Row]) -> None:
        """Rows hold ``label``, the true class 0..K-1, and ``probabilities``, K numbers that add up to 1."""
        super().__init__(rows)
        self.class_names = tuple(class_names)
        self._labels = np.array([row["label"] for row in rows], np.int64)
        self._probabilities = np.array([row["probabilities"] for row in rows]).reshape(-1, len(self.class_names))
        # Where in the flat confusion matrix each slice counts.
        self._cells = self._labels * len(self.class_names) + self._probabilities.argmax(axis=1)

    def compute(self) -> Figures:
        """The figures, and of all rows:

        ``n``, their number; ``confusion``, K lists of K counts, rows the true class; ``reliability``, per class and bin
        of its probability, as for `ece`, ``n`` images, their mean ``probability`` and the ``observed`` fraction of
        the class among them; empty bins are left out.
        """
        figures = super().compute()
        confusion = self._confusion(np.ones(len(self.rows))).astype(int).tolist()
        reliability = {}
        for index, name in enumerate(self.class_names):
            probability = self._probabilities[:, index]
            n, predicted, observed = _binned(probability, self._labels == index, np.ones(len(self.rows)))
            bins = zip(n.astype(int).tolist(), (predicted / n).tolist(), (observed / n).tolist(), strict=True)
            reliability[name] = [{"n": count, "probability": p, "observed": o} for count, p, o in bins]
        return figures | {"n": len(self.rows), "confusion": confusion, "reliability": reliability}

    def statistic(self) -> Statistic:
        ranked = []
        for index in range(len(self.class_names)):
            scores = self._probabilities[:, index]
            order = scores.argsort(kind="stable")
            edges = np.flatnonzero(np.diff(scores[order], prepend=-1.0))  # where a new score begins
            ranked.append((order, self._labels[order] == index, edges))
        truth = np.eye(len(self.class_names))[self._labels]
        squares = ((self._probabilities - truth) ** 2).sum(axis=1)
        confidence, correct = self._probabilities.max(axis=1), self._probabilities.argmax(axis=1) == self._labels

        def figures(weights: np.ndarray) -> dict[str, float]:
            confusion = self._confusion(weights)
            right, positives, called = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
            total = confusion.sum()
            negatives = total - positives
            with np.errstate(invalid="ignore", divide="ignore"):
                by_class = {
                    "sensitivity": right / positives,
                    "specificity": (negatives - called + right) / negatives,
                    "precision": right / called,
                    "f1": np.where(positives > 0, 2 * right / (positives + called), math.nan),
                    "auc": [_auc(weights[order], positive, edges) for order, positive, edges in ranked],
                }
            _, predicted, observed = _binned(confidence, correct, weights)
            found = {
                "accuracy": float(right.sum() / total),
                "brier": float(weights @ squares / total),
                "ece": float(abs(predicted - observed).sum() / total),
            }
            for figure, values in by_class.items():
                found |= {f"{figure}.{name}": float(v) for name, v in zip(self.class_names, values, strict=True)}
            return found

        return figures

    def _confusion(self, weights: np.ndarray) -> np.ndarray:
        classes = len(self.class_names)
        return np.bincount(self._cells, weights, classes**2).reshape(classes, classes)


def patient_intervals(
    patients: Sequence[str | None], statistic: Statistic, *, samples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float] | None]:
    """Bounds of 95% percentile bootstrap intervals, patients drawn with replacement: slices of one patient are alike.

    A figure has None with fewer than `MIN_PATIENTS` patients, an unknown one (None), or if it is undefined in more than
    a tenth of the resamples.

    Args:
        patients: of each of N slices.
        statistic: takes N weights: how often each slice's patient was drawn.
    """
    names = list(statistic(np.ones(len(patients)))) if patients else []
    if None in patients or len(set(patients)) < MIN_PATIENTS or samples < 1:
        return dict.fromkeys(names)
    index = np.unique(np.array(patients), return_inverse=True)[1]
    count = int(index.max()) + 1
    generator = np.random.default_rng(seed)
    drawn = (np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(samples))
    values = np.array([list(statistic(times[index].astype(np.float64)).values()) for times in drawn])
    intervals: dict[str, tuple[float, float] | None] = dict.fromkeys(names)
    for name, column in zip(names, values.T, strict=True):
        defined = column[~np.isnan(column)]
        if len(defined) >= _DEFINED * samples:
            low, high = np.percentile(defined, (2.5, 97.5)).tolist()
            intervals[name] = (low, high)
    return intervals


def nested(flat: Mapping[str, Any]) -> Figures:
    """``{"sensitivity.covid": x}`` -> ``{"sensitivity": {"covid": x}}``."""
    figures: Figures = {}
    for name, value in flat.items():
        figure, dot, label = name.partition(".")
        if dot:
            figures.setdefault(figure, {})[label] = value
        else:
            figures[figure] = value
    return figures


def _envelope(precision: np.ndarray) -> np.ndarray:
    """(P, T) precision by rank, made non-increasing from the last rank on."""
    return np.maximum.accumulate(precision[::-1], axis=0)[::-1]


def _right(iou: np.ndarray) -> list[int]:
    """COCO's greedy matching: in order of score, each detection takes the free lesion of highest IoU (P, G)."""
    bits = [0] * len(iou)
    for step, threshold in enumerate(_COCO_IOU):
        free = np.ones(iou.shape[1], bool)
        for rank, row in enumerate(iou):
            candidates = np.where(free, row, -1.0)[::-1]  # the last of equals, as pycocotools
            if len(candidates) and candidates.max() >= threshold:
                free[len(candidates) - 1 - candidates.argmax()] = False
                bits[rank] |= 1 << step
    return bits


def _coco_average_precision(right: np.ndarray, weights: np.ndarray, lesions: float) -> np.ndarray:
    """(T,) AP of P detections in falling order of score, (P, T) of them right, for so many lesions."""
    hits, seen = np.cumsum(right * weights[:, None], axis=0), np.cumsum(weights)[:, None]
    envelope = _envelope(np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0))
    reached = [np.searchsorted(recall, _COCO_RECALL) for recall in (hits / lesions).T]
    return np.array([np.append(column, 0.0)[at].mean() for column, at in zip(envelope.T, reached, strict=True)])


def _binned(
    probability: np.ndarray, positive: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each bin that is not empty: the sum of the weights, of the probabilities, and of the positive ones."""
    index = np.searchsorted(_BIN_EDGES, probability)  # an edge belongs to the bin below it
    sums = [np.bincount(index, weights * values, len(_BIN_EDGES) + 1) for values in (1, probability, positive)]
    return sums[0][sums[0] > 0], sums[1][sums[0] > 0], sums[2][sums[0] > 0]


def _auc(weights: np.ndarray, positive: np.ndarray, edges: np.ndarray) -> float:
    """Area under the ROC curve as the Mann-Whitney statistic, ties counting half; NaN if one side is empty.

    All in rising order of score; `edges` are where each of the different scores begins.
    """
    above = np.add.reduceat(weights * positive, edges)
    below = np.add.reduceat(weights * ~positive, edges)
    before = np.cumsum(below) - below
    pairs = above.sum() * below.sum()
    return float((above * (before + below / 2)).sum() / pairs) if pairs else math.nan


def _compare(target: Instances, found: Instances) -> tuple[np.ndarray, ...]:
    """Masks and labels of G lesions and of P predictions, scores (P,) float64, mask IoU (P, G), if shapes fit."""
    gt_masks, gt_labels = _numpy(target["masks"]) != 0, _numpy(target["labels"])
    masks, labels, scores = _numpy(found["masks"]) != 0, _numpy(found["labels"]), _numpy(found["scores"])
    fit = masks.ndim == 3 and gt_masks.shape == (len(gt_labels), *masks.shape[1:])
    if not fit or not len(masks) == len(labels) == len(scores):
        raise DataError(
            f"masks (N, H, W) of one size with a label each, and scores of those found, are needed, got masks of shape "
            f"{gt_masks.shape} and {masks.shape}, {len(gt_labels)} and {len(labels)} labels, {len(scores)} scores"
        )
    return gt_masks, gt_labels, masks, labels, scores.astype(np.float64), mask_iou(masks, gt_masks)


def _numpy(value: Array) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
