"""How good the models are: metrics, evaluation of a model on data, and the paper's tables.

Every collector takes one image (or batch) at a time, keeps small numbers instead of masks, and can be
filled in several processes and merged: ``main.merge(other.state_dict())``. `evaluate` does all of it for a model and a
data set; `table1` to `table5` are the paper's.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ctmasknet.evaluation.classification import ClassificationMetrics
from ctmasknet.evaluation.detection import (
    IOU_THRESHOLDS,
    CocoMetrics,
    OperatingPointSearch,
    SegmentationMetrics,
    mask_iou,
    released_average_precision,
)

if TYPE_CHECKING:
    from ctmasknet.evaluation.bootstrap import patient_intervals
    from ctmasknet.evaluation.measure import Evaluation, evaluate
    from ctmasknet.evaluation.roi_statistics import RoIContributions, RoICounts, roi_contributions
    from ctmasknet.evaluation.table import Table
    from ctmasknet.evaluation.tables import table1, table2, table3, table4, table5

# Resolved when first used: the collectors above need neither the models nor the data sets.
_HOMES = {
    "ctmasknet.evaluation.bootstrap": ("patient_intervals",),
    "ctmasknet.evaluation.measure": ("Evaluation", "evaluate"),
    "ctmasknet.evaluation.roi_statistics": ("RoIContributions", "RoICounts", "roi_contributions"),
    "ctmasknet.evaluation.table": ("Table",),
    "ctmasknet.evaluation.tables": ("table1", "table2", "table3", "table4", "table5"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "IOU_THRESHOLDS",
    "ClassificationMetrics",
    "CocoMetrics",
    "Evaluation",
    "OperatingPointSearch",
    "RoIContributions",
    "RoICounts",
    "SegmentationMetrics",
    "Table",
    "evaluate",
    "mask_iou",
    "patient_intervals",
    "released_average_precision",
    "roi_contributions",
    "table1",
    "table2",
    "table3",
    "table4",
    "table5",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'ctmasknet.evaluation' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value
