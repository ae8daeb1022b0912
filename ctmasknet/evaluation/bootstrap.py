"""95% intervals of a metric over patients: slices of one patient are alike, so patients are what is resampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

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
