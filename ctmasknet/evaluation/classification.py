"""Metrics of slice classification: confusion matrix, sensitivity and its kin, ROC AUC (paper, Table 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from ctmasknet.errors import ConfigError, DataError
from ctmasknet.evaluation.row_store import add_rows

Array: TypeAlias = np.ndarray | torch.Tensor


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
        add_rows(
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
        add_rows(self.rows, state["rows"])


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


def _numpy(value: Array) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)
