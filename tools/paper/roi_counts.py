"""What module S sees: RoIs above a score, per class (Tables 4 and 5, Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctmasknet.data.datasets import open_dataset
from ctmasknet.errors import ConfigError, DataError, import_extra
from ctmasknet.evaluation.evaluate import evaluate
from ctmasknet.evaluation.metrics import patient_intervals
from ctmasknet.evaluation.rows import ROI_THRESHOLDS, Row
from ctmasknet.registry import DEFAULT_CLASSIFIER, VARIANTS
from paper.request import Request, file_name, needed, only_one

PAPER_SAMPLE = 475
"""Slices per class in the paper (section 3.2)."""


PAPER_PAIRS = ((2, 1), (2, 0), (1, 0))
"""Table 5: COVID-19 / CP, COVID-19 / Normal, CP / Normal, as labels."""


@dataclass(frozen=True, eq=False)
class RoICounts:
    """How many RoIs of each slice's batch score above each threshold.

    Attributes:
        class_names: in the order of the labels.
        thresholds: T RoI scores.
        labels: (N,) true class of each slice.
        counts: (N, T) int; copies that fill a batch count, as they stand in it.
        patients: of each slice, None where unknown.
    """

    class_names: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    patients: tuple[str | None, ...]
    thresholds: tuple[float, ...] = ROI_THRESHOLDS

    @classmethod
    def of(cls, rows: Sequence[Row], class_names: Sequence[str]) -> RoICounts:
        """From the rows of a classifier's `Evaluation`.

        Raises:
            DataError: rows without RoI counts: those of a segmenter, or of imported predictions.
        """
        if not rows or any("rois_above" not in row for row in rows):
            raise DataError("no RoI batches: Tables 4 and 5 and Figure 4 need a COVID-CT-Mask-Net classifier")
        return cls(
            tuple(class_names),
            np.array([row["label"] for row in rows]),
            np.array([row["rois_above"] for row in rows]),
            tuple(row.get("patient") for row in rows),
        )

    def summary(self) -> list[dict[str, Any]]:
        """Table 4: per class and threshold ``n``, ``mean``, ``spread``, ``interval`` and ``patient_interval``.

        `spread` is 1.96 standard deviations, which the paper prints as a 95% interval; `interval` is the 95%
        t interval of the mean over slices; `patient_interval` the bootstrap interval over patients. None
        where there are too few slices or patients, and everything but n for a class without slices.
        """
        stats = import_extra("scipy.stats", "train", "Table 4")
        rows = []
        for label, name in enumerate(self.class_names):
            chosen = self.labels == label
            for column, threshold in enumerate(self.thresholds):
                counts = self.counts[chosen, column].astype(np.float64)
                row: dict[str, Any] = {"class": name, "threshold": threshold, "n": len(counts)}
                row |= dict.fromkeys(("mean", "spread", "interval", "patient_interval"))
                if len(counts):
                    row["mean"] = float(counts.mean())
                    own = [p for p, mine in zip(self.patients, chosen, strict=True) if mine]
                    row["patient_interval"] = patient_intervals(own, _mean_of(counts))["mean"]
                if len(counts) > 1:
                    deviation = float(counts.std(ddof=1))
                    row["spread"] = 1.96 * deviation
                    half = float(stats.t.ppf(0.975, len(counts) - 1)) * deviation / len(counts) ** 0.5
                    row["interval"] = (row["mean"] - half, row["mean"] + half)
                rows.append(row)
        return rows

    def tests(self, pairs: Sequence[tuple[int, int]] = PAPER_PAIRS) -> list[dict[str, Any]]:
        """Table 5: one-sided two-sample Kolmogorov-Smirnov, per pair of labels and threshold.

        The alternative is that the first class has more such RoIs: ``scipy.stats.ks_2samp(first, second,
        alternative="less")``. `statistic` and `p` are None where a class has no slice or no RoI above the threshold.
        """
        stats = import_extra("scipy.stats", "train", "Table 5")
        rows = []
        for first, second in pairs:
            if max(first, second) >= len(self.class_names):
                raise ConfigError(f"pair {(first, second)}: there are {len(self.class_names)} classes")
            for column, threshold in enumerate(self.thresholds):
                a, b = (self.counts[self.labels == label, column] for label in (first, second))
                row = {"first": self.class_names[first], "second": self.class_names[second], "threshold": threshold}
                row |= {"statistic": None, "p": None}
                if a.any() and b.any():
                    result = stats.ks_2samp(a, b, alternative="less")
                    row |= {"statistic": float(result.statistic), "p": float(result.pvalue)}
                rows.append(row)
        return rows


def roi_counts(request: Request, item: str) -> tuple[RoICounts, str]:
    """Of equally many slices of each class, and what to call the model."""
    (weights,) = only_one(request.weights or (DEFAULT_CLASSIFIER,), item)
    data = open_dataset("classification", needed(request, item))
    labels = np.array([data.labels_of(index)[0] for index in range(len(data))])
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    count = min([request.limit or PAPER_SAMPLE, *map(len, members)])
    generator = np.random.default_rng(request.seed)
    drawn = np.sort(np.concatenate([generator.choice(own, count, replace=False) for own in members]))
    names = [data.names[index] for index in drawn]
    rows = None if request.rows is None else Path(request.rows) / f"{file_name(weights)}-per-class"
    found = evaluate(weights, request.data, names=names, samples=0, out=rows, device=request.device)
    variant = VARIANTS.get(found.model)
    return RoICounts.of(found.rows, found.class_names), found.model if variant is None else variant.title


def _mean_of(values: np.ndarray) -> Any:
    return lambda weights: {"mean": float(weights @ values / weights.sum())}
