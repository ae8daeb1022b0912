"""Table 2: average precision of segmenters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctmasknet.evaluation.evaluate import Evaluation, Table
from ctmasknet.registry import DEFAULT_SEGMENTER, VARIANTS
from paper.request import MEASURED, PAPER, Made, Request, evaluations, of_task, source_notes, span, variant_title

PAPER_SEPARATE_TABLE2 = ("Mask R-CNN (ResNet50 + FPN), GGO and consolidation apart", 0.5020, 0.4198, 0.3871, 145.54)
"""Table 2, ResNet50 with separate masks: AP@0.5, AP@0.75, AP@[0.5:0.95], minutes."""


def make(request: Request) -> Made:
    return Made(table2(evaluations(request, DEFAULT_SEGMENTER, "Table 2")))


def table2(evaluations: Sequence[Evaluation] = ()) -> Table:
    """Table 2: released-protocol AP of segmenters at the paper's thresholds, measured and as the paper prints it."""
    rows: list[tuple[Any, ...]] = []
    for evaluation in of_task(evaluations, "segmentation"):
        found, spread = evaluation.metrics["paper"], evaluation.intervals["paper"]
        figures = [value for key in ("ap50", "ap75", "ap") for value in (found[key], span(spread[key]))]
        rows.append((variant_title(evaluation), MEASURED, evaluation.images, *figures, evaluation.training_minutes))
    for variant in VARIANTS.values():
        paper = variant.paper
        if variant.task == "segmentation":
            row = (paper.ap50, None, paper.ap75, None, paper.ap, None, paper.minutes)
            rows.append((variant.title, PAPER, None, *row))
    title, ap50, ap75, ap, minutes = PAPER_SEPARATE_TABLE2
    rows.append((title, PAPER, None, ap50, None, ap75, None, ap, None, minutes))
    columns = (
        ("model", "s"),
        ("source", "s"),
        ("slices", "d"),
        ("AP@0.5", ".4f"),
        ("AP@0.5, 95% CI", "s"),
        ("AP@0.75", ".4f"),
        ("AP@0.75, 95% CI", "s"),
        ("AP@[0.5:0.95]", ".4f"),
        ("AP@[0.5:0.95], 95% CI", "s"),
        ("training, min", ".2f"),
    )
    notes = (
        "AP per slice, averaged over slices, as the paper's released code computes it; detections scored above 0.75, "
        "NMS at 0.75, mask logits above 0.5.",
        *source_notes(evaluations, "CNCB, 100 slices in the released lists"),
    )
    return Table("Table 2. Average precision of segmentation models", columns, tuple(rows), notes)
