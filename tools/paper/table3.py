"""Table 3: class sensitivity and overall accuracy of classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctmasknet.evaluation.evaluate import Evaluation, Table
from ctmasknet.registry import DEFAULT_CLASSIFIER, VARIANTS
from paper.request import (
    MEASURED,
    PAPER,
    Made,
    Request,
    evaluations,
    of_task,
    paper_classes,
    source_notes,
    span,
    variant_title,
)

PAPER_SEPARATE_TABLE3 = (
    "COVID-CT-Mask-Net (ResNet50 + FPN), GGO and consolidation apart",
    (0.9388, 0.9506, 0.9691),
    0.9564,
    460.0,
)
"""Table 3, the same: sensitivity COVID-19, pneumonia, control; overall accuracy; minutes."""


def make(request: Request) -> Made:
    return Made(table3(evaluations(request, DEFAULT_CLASSIFIER, "Table 3")))


def table3(evaluations: Sequence[Evaluation] = ()) -> Table:
    """Table 3: sensitivity per class and overall accuracy of classifiers on slices.

    Raises:
        ConfigError: an evaluation of other classes than control, pneumonia and COVID-19.
    """
    rows: list[tuple[Any, ...]] = []
    order = ("covid", "pneumonia", "control")
    for evaluation in of_task(evaluations, "classification"):
        paper_classes(evaluation.class_names, "Table 3")
        found, spread = evaluation.metrics["slice"], evaluation.intervals["slice"]
        row: list[Any] = [variant_title(evaluation), MEASURED, evaluation.images]
        for name in order:
            row += [found["sensitivity"][name], span(spread["sensitivity"][name])]
        rows.append((*row, found["accuracy"], span(spread["accuracy"]), evaluation.training_minutes))
    for variant in VARIANTS.values():
        paper = variant.paper
        if paper.sensitivity is not None:
            control, pneumonia, covid = paper.sensitivity
            row = [covid, None, pneumonia, None, control, None, paper.accuracy, None, paper.minutes]
            rows.append((variant.title, PAPER, None, *row))
    title, (covid, pneumonia, control), accuracy, minutes = PAPER_SEPARATE_TABLE3
    rows.append((title, PAPER, None, covid, None, pneumonia, None, control, None, accuracy, None, minutes))
    columns: list[tuple[str, str]] = [("model", "s"), ("source", "s"), ("slices", "d")]
    for title in ("COVID-19", "pneumonia", "normal", "overall"):
        columns += [(title, ".2%"), (f"{title}, 95% CI", "s")]
    columns.append(("training, min", ".2f"))
    notes = source_notes(evaluations, "COVIDx-CT test, 21,192 slices")
    return Table("Table 3. Class sensitivity and overall accuracy", tuple(columns), tuple(rows), notes)
