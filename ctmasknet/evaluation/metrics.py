"""Every metric, each once: lesions found, the operating point, slices classified, and 95% intervals over patients.

A collector keeps a row of plain values per image. `statistic` makes of the rows a function that gives the figures for a
weight per image; `compute` is that function for weights of one, and the bootstrap draws other weights.

An image's lesions, `target`, and what was found on it, `found`, are dicts as torchvision's detectors have them:
``masks`` (N, H, W) bool, ``labels`` (N,) integers (0 is background and never occurs), ``boxes`` (N, 4) xyxy in pixels
(needed for COCO AP alone) and, found ones, ``scores`` (N,) in 0..1; numpy arrays or torch tensors on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from ctmasknet.errors import ConfigError, DataError

Array: TypeAlias = np.ndarray | torch.Tensor
Instances: TypeAlias = Mapping[str, Array]
"""Masks, labels, boxes and scores of an image, as above."""
Row: TypeAlias = dict[str, Any]
"""What is kept of an image: plain values, ready for JSON."""
Figures: TypeAlias = dict[str, Any]
"""Figure name -> number, or None where undefined; per class a dict from class name to number."""
Interval: TypeAlias = tuple[float, float]
Statistic: TypeAlias = Callable[[np.ndarray], dict[str, float | None]]
"""Weight of each of N images (float64) -> figures by name; ``"sensitivity.covid"`` is one of a class."""

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
_DEFINED = 0.9  # share of the resamples in which a figure must be defined to get an interval


def released_average_precision(
    target: Instances, found: Instances, iou_thresholds: Sequence[float] | np.ndarray = IOU_THRESHOLDS
) -> np.ndarray:
    """Mask AP of one image as the paper's released code computes it (Table 2); this is not COCO AP.

    For each instance in turn, of the predictions of its class with mask IoU > threshold, the one of highest
    IoU is marked correct; one prediction may serve two instances. Precision and recall count marked
    predictions in falling order of score; precision is made non-increasing and summed over the recall steps.
    No instance and no prediction: 1. Either alone: 0.

    Ties are broken as there: of equal scores the later prediction ranks first, of equal IoUs the prediction
    that ranks last is marked, and IoU is compared with the threshold in float32.

    Args:
        target, found: masks, labels, and scores of what was found, in any order.
        iou_thresholds: T numbers in 0..1.

    Returns:
        (T,) float64 in 0..1.

    Raises:
        DataError: shapes or types that do not fit together.
    """
    image = _check(target, found)
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


class Collector:
    """Rows of plain values, one per image, and figures made of them.

    Memory does not grow with the masks, rows can be resampled by patient, and those of several processes are joined
    by `add`.

    Attributes:
        rows: per image a dict; ``image_id`` is its unique name, or None.
    """

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self.rows: list[Row] = []
        self.add(rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows that another collector made; an `image_id` of None is never the same as another.

        Raises:
            DataError: an image is in both, or twice in `rows`; what was collected stays as it was.
        """
        seen = {row["image_id"] for row in self.rows} - {None}
        for row in rows:
            if row["image_id"] in seen:
                raise DataError(f"{row['image_id']}: evaluated twice; give every image once, under a unique image_id")
            if row["image_id"] is not None:
                seen.add(row["image_id"])
        self.rows.extend(rows)

    def statistic(self) -> Statistic:
        """The figures as a function of a weight per row."""
        raise NotImplementedError

    def compute(self) -> Figures:
        """The figures of all rows.

        Raises:
            DataError: no image was added.
        """
        if not self.rows:
            raise DataError("no image was evaluated: the data set is empty")
        return nested(self.statistic()(np.ones(len(self.rows))))


class SegmentationMetrics(Collector):
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

    def update(self, target: Instances, found: Instances, *, image_id: str | None = None) -> None:
        """Add one image.

        Args:
            image_id: unique name of the image; the same name twice raises, so that no image counts twice.

        Raises:
            DataError: shapes or types that do not fit together, or an image seen before.
        """
        (row,) = segmentation_rows(target, found)
        self.add([{"image_id": image_id} | row])

    def compute(self) -> Figures:
        """The figures, and ``images``, the number of rows."""
        return super().compute() | {"images": len(self.rows)}

    def statistic(self) -> Statistic:
        """As `Collector.statistic`."""
        keys = ("intersection", "pred_pixels", "gt_pixels", "lesions", "lesions_found", "false_positives")
        both, found, true, lesions, hits, alarms = (np.array([r[k] for r in self.rows], np.float64) for k in keys)
        ap = np.array([row["ap"] for row in self.rows], np.float64).reshape(len(self.rows), -1)
        pixels = found + true
        dice = np.divide(2 * both, pixels, out=np.ones(len(self.rows)), where=pixels > 0)

        def figures(weights: np.ndarray) -> dict[str, float | None]:
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
                "lesion_sensitivity": float(weights @ hits / number) if number else None,
                "false_positives_per_slice": float(weights @ alarms / total),
            }

        return figures


def segmentation_rows(target: Instances, found: Instances, score_thresholds: Sequence[float] = (-np.inf,)) -> list[Row]:
    """What `SegmentationMetrics` keeps of one image, for each of several score thresholds.

    Args:
        score_thresholds: in rising order; predictions with score > threshold count, all of them by default.

    Raises:
        DataError: shapes or types that do not fit together.
    """
    image = _check(target, found)
    iou = mask_iou(image.pred_masks, image.gt_masks)
    matched = (iou > 0.5) & (image.pred_labels[:, None] == image.gt_labels[None, :])
    # level: how many of the thresholds a prediction passes, compared in float32 as the models do.
    level = np.searchsorted(np.array(score_thresholds, np.float32), image.scores.astype(np.float32)).astype(np.uint8)
    # highest: per pixel, the level of the best mask on it.
    highest = np.zeros((image.pred_masks if len(image.pred_masks) else image.gt_masks).shape[1:], np.uint8)
    for index in np.argsort(level):
        np.copyto(highest, level[index], where=image.pred_masks[index])
    true = image.gt_masks.any(axis=0) if len(image.gt_masks) else np.zeros_like(highest, bool)
    rows = []
    for step in range(len(score_thresholds)):
        chosen = level > step
        labels = image.gt_labels, image.pred_labels[chosen]
        rows.append(
            {
                "ap": _average_precision(iou[chosen], *labels, image.scores[chosen], IOU_THRESHOLDS).tolist(),
                "intersection": int(np.count_nonzero(highest[true] > step)),
                "pred_pixels": int(np.count_nonzero(highest > step)),
                "gt_pixels": int(np.count_nonzero(true)),
                "lesions": len(image.gt_masks),
                "lesions_found": int(matched[chosen].any(axis=0).sum()),
                "predictions": int(chosen.sum()),
                "false_positives": int((~matched[chosen].any(axis=1)).sum()),
            }
        )
    return rows


class CocoMetrics(Collector):
    """COCO box and mask AP of detections scored above `COCO_SCORE`, as pycocotools computes it.

    Figures: ``{box,mask}_{ap,ap50,ap75}``, AP over IoU 0.5:0.95, at 0.5, at 0.75; all None without lesions. At most the
    100 best detections of an image and class count, and classes are averaged.
    """

    def update(self, target: Instances, found: Instances, *, image_id: str | None = None) -> None:
        """As `SegmentationMetrics.update`; boxes are needed, too."""
        self.add([{"image_id": image_id} | coco_row(target, found)])

    def statistic(self) -> Statistic:
        """As `Collector.statistic`."""
        images = [row["classes"] for row in self.rows]
        tables = [_ClassTable.of(images, label) for label in sorted({label for image in images for label in image})]

        def figures(weights: np.ndarray) -> dict[str, float | None]:
            found: dict[str, float | None] = {}
            for kind in ("box", "mask"):
                per_class = [ap for table in tables if (ap := table.average_precision(kind, weights)) is not None]
                average = np.mean(per_class, axis=0) if per_class else None
                found[f"{kind}_ap"] = None if average is None else float(average.mean())
                found[f"{kind}_ap50"] = None if average is None else float(average[0])
                found[f"{kind}_ap75"] = None if average is None else float(average[5])
            return found

        return figures


def coco_row(target: Instances, found: Instances) -> Row:
    """What `CocoMetrics` keeps of one image: of each class how many lesions, and its detections.

    Of each detection there are the score and a bit per IoU threshold (bit 0 is 0.5) that is 1 if it is right.

    Raises:
        DataError: shapes or types that do not fit together.
    """
    image = _check(target, found)
    overlap = {
        "box": _box_iou(_boxes(found, len(image.pred_masks)), _boxes(target, len(image.gt_masks))),
        "mask": mask_iou(image.pred_masks, image.gt_masks),
    }
    counts = image.scores.astype(np.float32) > np.float32(COCO_SCORE)
    classes = {}
    for label in np.union1d(image.pred_labels[counts], image.gt_labels).tolist():
        mine, true = np.flatnonzero(counts & (image.pred_labels == label)), np.flatnonzero(image.gt_labels == label)
        mine = mine[np.argsort(-image.scores[mine], kind="stable")][:_COCO_DETECTIONS]
        classes[str(label)] = {
            "lesions": len(true),
            "scores": image.scores[mine].tolist(),
            **{kind: _right(iou[np.ix_(mine, true)]) for kind, iou in overlap.items()},
        }
    return {"classes": classes}


def operating_points(rows: Sequence[Row]) -> list[Figures]:
    """How each candidate for an operating point does on a validation set, best first.

    The objective is released-protocol AP at IoU 0.5 + pooled Dice, both as in `SegmentationMetrics`: one rewards
    lesions told apart, the other the area found. Among equals, the higher score, then NMS, threshold comes first.

    Args:
        rows: per image ``points``: for each of `NMS_THRESHOLDS` what `segmentation_rows` gives at `SCORE_THRESHOLDS`;
            and ``coco``, for each what `coco_row` gives (`evaluation.rows.search_rows` makes them).

    Returns:
        Per candidate ``score_threshold``, ``nms_threshold``, ``objective`` and the figures of `SegmentationMetrics`.

    Raises:
        DataError: no images.
    """
    table = []
    for n, nms in enumerate(NMS_THRESHOLDS):
        for s, score in enumerate(SCORE_THRESHOLDS):
            figures = SegmentationMetrics(
                [{"image_id": row["image_id"]} | row["points"][n][s] for row in rows]
            ).compute()
            objective = figures["ap50"] + figures["dice_pooled"]
            table.append({"score_threshold": score, "nms_threshold": nms, "objective": objective} | figures)
    return sorted(table, key=lambda p: (p["objective"], p["score_threshold"], p["nms_threshold"]), reverse=True)


class ClassificationMetrics(Collector):
    """Slices classified (paper, Table 3); the class called is the one of highest probability (the first of equals).

    Figures: ``accuracy``, the fraction called right; and per class, against the rest, ``sensitivity``, ``specificity``,
    ``precision``, ``f1`` and ``auc`` (ROC), in 0..1 or None where undefined: sensitivity, F1 and AUC of a class without
    images, specificity and AUC without images of other classes, precision of a class never called.
    """

    def __init__(self, class_names: Sequence[str], rows: Sequence[Row] = ()) -> None:
        """Names of the K classes, in the order of the model's outputs.

        Raises:
            ConfigError: fewer than two names, or a name twice.
            DataError: as `add`.
        """
        if len(class_names) < 2 or len(set(class_names)) != len(class_names):
            raise ConfigError(f"class_names={list(class_names)!r}: give two or more different names")
        self.class_names = tuple(class_names)
        super().__init__(rows)

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
        self.add(
            [
                {"image_id": name, "label": int(true), "probabilities": row.tolist()}
                for name, true, row in zip(names, label, probability, strict=True)
            ]
        )

    def compute(self) -> Figures:
        """The figures, ``n``, the number of rows, and ``confusion``: K lists of K counts, rows the true class."""
        figures, classes = super().compute(), len(self.class_names)
        confusion = np.bincount(self._cells(*self._arrays()), minlength=classes**2).reshape(classes, classes)
        return figures | {"n": len(self.rows), "confusion": confusion.tolist()}

    def statistic(self) -> Statistic:
        """As `Collector.statistic`."""
        labels, probabilities = self._arrays()
        cells, classes = self._cells(labels, probabilities), len(self.class_names)
        ranked = []
        for index in range(classes):
            order = probabilities[:, index].argsort(kind="stable")
            edges = np.flatnonzero(np.diff(probabilities[order, index], prepend=-1.0))  # where a new score begins
            ranked.append((order, labels[order] == index, edges))

        def figures(weights: np.ndarray) -> dict[str, float | None]:
            confusion = np.bincount(cells, weights, classes**2).reshape(classes, classes)
            total = float(confusion.sum())
            found: dict[str, float | None] = {"accuracy": float(confusion.trace()) / total}
            for index, name in enumerate(self.class_names):
                right = float(confusion[index, index])
                positives, called = float(confusion[index].sum()), float(confusion[:, index].sum())
                negatives = total - positives
                found[f"sensitivity.{name}"] = right / positives if positives else None
                found[f"specificity.{name}"] = (negatives - called + right) / negatives if negatives else None
                found[f"precision.{name}"] = right / called if called else None
                found[f"f1.{name}"] = 2 * right / (positives + called) if positives else None
                order, positive, edges = ranked[index]
                found[f"auc.{name}"] = _auc(weights[order], positive, edges)
            return found

        return figures

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Labels (N,) and probabilities (N, K)."""
        labels = np.array([row["label"] for row in self.rows], np.int64)
        return labels, np.array([row["probabilities"] for row in self.rows]).reshape(-1, len(self.class_names))

    def _cells(self, labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        """(N,) where in the flat confusion matrix each image counts."""
        return labels * len(self.class_names) + probabilities.argmax(axis=1)


def patient_intervals(
    patients: Sequence[str | None],
    statistic: Statistic,
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval | None]:
    """Percentile bootstrap intervals, patients drawn with replacement: slices of one patient are alike.

    Args:
        patients: of each of N slices; None where unknown.
        statistic: takes N weights (how often each slice's patient was drawn).
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
    # Recall rises by 1 / instances at each correct prediction and nowhere else.
    return np.where(correct, _envelope(precision.T).T, 0.0).sum(axis=1) / instances


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


class _ClassTable(NamedTuple):
    """One class over all N images, its P detections in falling order of score.

    Attributes:
        lesions: (N,) their number.
        image: (P,) index of the image.
        box, mask: (P, T) 1 where a detection is right.
    """

    lesions: np.ndarray
    image: np.ndarray
    box: np.ndarray
    mask: np.ndarray

    @classmethod
    def of(cls, images: Sequence[Row], label: str) -> _ClassTable:
        own = [(index, image[label]) for index, image in enumerate(images) if label in image]
        scores = np.array([score for _, found in own for score in found["scores"]])
        order = np.argsort(-scores, kind="stable")
        lesions = np.zeros(len(images))
        lesions[[index for index, _ in own]] = [found["lesions"] for _, found in own]
        image = np.array([index for index, found in own for _ in found["scores"]], np.int64)[order]
        bits = (np.array([v for _, found in own for v in found[kind]], np.int64)[order] for kind in ("box", "mask"))
        return cls(lesions, image, *((b[:, None] >> np.arange(len(_COCO_IOU))) & 1 for b in bits))

    def average_precision(self, kind: str, weights: np.ndarray) -> np.ndarray | None:
        """(T,) AP at every IoU threshold; None without lesions."""
        lesions = float(weights @ self.lesions)
        if lesions == 0:
            return None
        weight = weights[self.image]
        right = np.cumsum(getattr(self, kind) * weight[:, None], axis=0)
        seen = np.cumsum(weight)[:, None]
        envelope = _envelope(np.divide(right, seen, out=np.zeros_like(right), where=seen > 0))
        reached = [np.searchsorted(recall, _COCO_RECALL) for recall in (right / lesions).T]
        return np.array([np.append(column, 0.0)[at].mean() for column, at in zip(envelope.T, reached, strict=True)])


def _auc(weights: np.ndarray, positive: np.ndarray, edges: np.ndarray) -> float | None:
    """Area under the ROC curve as the Mann-Whitney statistic, ties counting half; None if one side is empty.

    Args:
        weights: (N,), in rising order of score.
        positive: (N,) bool.
        edges: where in it each of the different scores begins.
    """
    above = np.add.reduceat(weights * positive, edges)
    below = np.add.reduceat(weights * ~positive, edges)
    positives, negatives = above.sum(), below.sum()
    if positives == 0 or negatives == 0:
        return None
    before = np.cumsum(below) - below
    return float((above * (before + below / 2)).sum() / (positives * negatives))


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


def _box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, M) IoU of boxes, 0 where both have no area."""
    corner, far = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (far - corner).clip(min=0).prod(axis=2)
    area_a, area_b = ((box[:, 2:] - box[:, :2]).prod(axis=1) for box in (a, b))
    union = area_a[:, None] + area_b[None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


class _Image(NamedTuple):
    gt_masks: np.ndarray
    gt_labels: np.ndarray
    pred_masks: np.ndarray
    pred_labels: np.ndarray
    scores: np.ndarray


def _check(target: Instances, found: Instances) -> _Image:
    gt, pred = _masks(target["masks"], "target masks"), _masks(found["masks"], "masks found")
    if len(gt) and len(pred):
        _same_size(gt, pred)
    score = _numpy(found["scores"]).astype(np.float64)
    if score.shape != (len(pred),) or not np.isfinite(score).all():
        raise DataError(f"scores: expected {len(pred)} finite numbers, one per mask, got shape {score.shape}")
    labels = _labels(target["labels"], len(gt), "target labels"), _labels(found["labels"], len(pred), "labels found")
    return _Image(gt, labels[0], pred, labels[1], score)


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


def _boxes(instances: Instances, count: int) -> np.ndarray:
    boxes = _numpy(instances["boxes"]).astype(np.float64)
    if boxes.shape != (count, 4):
        raise DataError(f"boxes: expected shape ({count}, 4), one per mask, got {boxes.shape}")
    return boxes
