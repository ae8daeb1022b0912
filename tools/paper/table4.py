"""Table 4: RoIs in the batch above a score."""

from __future__ import annotations

from typing import Any

from ctmasknet.evaluation.evaluate import Table
from ctmasknet.registry import class_title
from paper.request import MEASURED, PAPER, Made, Request, paper_classes, span
from paper.roi_counts import RoICounts, roi_counts

PAPER_TABLE4 = {
    "covid": ((42.71, 61.06), (17.87, 27.39), (2.40, 5.55)),
    "pneumonia": ((0.65, 3.15), (0.15, 1.25), (0.03, 0.30)),
    "control": ((0.11, 1.25), (0.016, 0.32), (0.0, 0.0)),
}
"""Table 4: mean and what it calls a 95% interval, at RoI scores 0.2, 0.5, 0.9; ResNet34 T1."""


def make(request: Request) -> Made:
    counts, model = roi_counts(request, "Table 4")
    return Made(table4(counts, model=model))


def table4(counts: RoICounts, *, model: str) -> Table:
    """Table 4: mean number of RoIs above each score per class."""
    paper_classes(counts.class_names, "Table 4")
    found = {(row["class"], row["threshold"]): row for row in counts.summary()}
    rows: list[tuple[Any, ...]] = []
    for name in ("covid", "pneumonia", "control"):
        for threshold in counts.thresholds:
            row = found[name, threshold]
            figures = (row["mean"], row["spread"], span(row["interval"], ".2f"), span(row["patient_interval"], ".2f"))
            rows.append((model, MEASURED, class_title(name), threshold, row["n"], *figures))
    for name, printed in PAPER_TABLE4.items():
        for threshold, (mean, spread) in zip((0.2, 0.5, 0.9), printed, strict=True):
            paper = (mean, spread, None, None)
            rows.append(("COVID-CT-Mask-Net (ResNet34 T1 + FPN)", PAPER, class_title(name), threshold, 475, *paper))
    columns = (
        ("model", "s"),
        ("source", "s"),
        ("class", "s"),
        ("RoI score above", ".1f"),
        ("slices", "d"),
        ("mean RoIs", ".2f"),
        ("± 1.96 SD", ".2f"),
        ("95% interval of the mean, slices", "s"),
        ("95% interval of the mean, patients", "s"),
    )
    notes = (
        "The paper prints its ± as a 95% interval; with these counts and sample sizes it can only be about "
        "1.96 standard deviations, so that is given here, and true intervals of the mean beside it: t over slices "
        "(as if they were independent), bootstrap over patients (N/A under five).",
        "Measured and paper rows are on different data and are not to be compared.",
    )
    return Table("Table 4. RoIs in the batch above a score", columns, tuple(rows), notes)
