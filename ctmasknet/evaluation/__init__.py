"""How good the models are: segmentation, detection and classification metrics.

Every collector takes one image (or batch) at a time, keeps small numbers instead of masks, and can be
filled in several processes and merged: ``main.merge(other.state_dict())``.
"""

from ctmasknet.evaluation.classification import ClassificationMetrics
from ctmasknet.evaluation.detection import (
    IOU_THRESHOLDS,
    CocoMetrics,
    OperatingPointSearch,
    SegmentationMetrics,
    mask_iou,
    released_average_precision,
)

__all__ = [
    "IOU_THRESHOLDS",
    "ClassificationMetrics",
    "CocoMetrics",
    "OperatingPointSearch",
    "SegmentationMetrics",
    "mask_iou",
    "released_average_precision",
]
