"""Table 5: one-sided Kolmogorov-Smirnov tests between the classes."""

from __future__ import annotations

from typing import Any

from ctmasknet.evaluation.evaluate import Table
from ctmasknet.registry import class_title
from paper.request import MEASURED, PAPER, Made, Request, paper_classes
from paper.roi_counts import RoICounts, roi_counts

PAPER_TABLE5 = {
    ("covid", "pneumonia"): ("0.96 / 1e-10", "0.92 / 1e-10", "0.63 / 1e-10"),
    ("covid", "control"): ("0.98 / 1e-10", "0.94 / 1e-10", None),
    ("pneumonia", "control"): ("0.18 / 2e-08", "0.067 / 0.091", None),
}
"""Table 5: statistic / p; ResNet34 T1."""


def make(request: Request) -> Made:
    counts, model = roi_counts(request, "Table 5")
    return Made(table5(counts, model=model))


def table5(counts: RoICounts, *, model: str) -> Table:
    """Table 5: one-sided two-sample Kolmogorov-Smirnov tests between the classes."""
    paper_classes(counts.class_names, "Table 5")
    rows: list[tuple[Any, ...]] = []
    sizes = {name: int((counts.labels == label).sum()) for label, name in enumerate(counts.class_names)}
    for test in counts.tests():
        pair = f"{class_title(test['first'])} / {class_title(test['second'])}"
        slices = f"{sizes[test['first']]} / {sizes[test['second']]}"
        significant = None if test["p"] is None else ("yes" if test["p"] < 0.01 else "no")
        rows.append((model, MEASURED, pair, test["threshold"], slices, test["statistic"], test["p"], significant))
    for (first, second), printed in PAPER_TABLE5.items():
        pair = f"{class_title(first)} / {class_title(second)}"
        for threshold, cell in zip((0.2, 0.5, 0.9), printed, strict=True):
            values: tuple[Any, ...] = (None, None, None)
            if cell is not None:
                statistic, p = (float(value) for value in cell.split(" / "))
                values = (statistic, p, "yes" if p < 0.01 else "no")
            rows.append(("COVID-CT-Mask-Net (ResNet34 T1 + FPN)", PAPER, pair, threshold, "475 / 475", *values))
    columns = (
        ("model", "s"),
        ("source", "s"),
        ("classes", "s"),
        ("RoI score above", ".1f"),
        ("slices", "s"),
        ("statistic", ".3f"),
        ("p", ".2g"),
        ("significant at 1%", "s"),
    )
    notes = (
        'scipy.stats.ks_2samp(first, second, alternative="less"): the alternative is that the first class has '
        "more such RoIs. N/A where a class has no RoI above the score. Slices of one patient are alike: with few "
        "patients p is too small.",
        "Measured and paper rows are on different data and are not to be compared.",
    )
    return Table("Table 5. One-sided Kolmogorov-Smirnov tests", columns, tuple(rows), notes)
