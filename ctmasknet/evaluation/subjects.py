"""What can be evaluated: a segmenter, a classifier, or predictions somebody else made (see `imports`).

Each turns slices into rows of plain values, a few kB instead of the masks, ready for a line of JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ctmasknet.data.datasets import ClassificationSample, SegmentationSample
from ctmasknet.errors import DataError
from ctmasknet.evaluation.detection import CocoMetrics, SegmentationMetrics
from ctmasknet.evaluation.statistics import coco_matches
from ctmasknet.models import COVIDCTMaskNet, LesionMaskRCNN
from ctmasknet.models.protocols import PAPER, detect_at
from ctmasknet.models.protocols import Protocol as Detection
from ctmasknet.predictor import class_names, operating_point
from ctmasknet.registry import Task
from ctmasknet.weights.files import state_digest

ROI_THRESHOLDS = (0.2, 0.5, 0.9)
"""RoI scores of Tables 4 and 5 and of Figure 4."""

Row = dict[str, Any]


class Subject(Protocol):
    """What `evaluate` needs to know of anything it evaluates.

    Attributes:
        task, name, class_names: what it is.
        facts: settings that its rows depend on, plain values.
        training_minutes: from the record of its training, None if unknown.
    """

    task: Task
    name: str
    class_names: tuple[str, ...]
    facts: dict[str, Any]
    training_minutes: float | None

    def rows(self, samples: Sequence[Any]) -> list[Row]:
        """One row per sample."""
        ...


class SegmenterSubject:
    """A segmenter, read at the paper's settings, at its operating point, and for COCO, in one pass."""

    task: Task = "segmentation"

    def __init__(self, model: LesionMaskRCNN, name: str, *, coco: bool, autocast: torch.dtype | None) -> None:
        self.model, self.name, self.class_names = model.eval(), name, class_names(model)
        self.training_minutes = _minutes(model)
        self._autocast = autocast
        score, nms = operating_point(model)
        self._rows = SegmentationRows(coco=coco)
        # COCO AP counts everything above 0.05; NMS is that of the operating point.
        self._protocols = [PAPER, Detection(score, nms, model.config.mask_score), Detection(0.05, nms)]
        names = ("paper", "operating_point", "coco")
        protocols = {key: asdict(value) for key, value in zip(names, self._protocols, strict=True)}
        self.facts = {
            "weights": digest(model),
            "config": model.config.to_dict(),
            "protocols": protocols,
            "precision": str(autocast or torch.float32),
            "coco": coco,
        }

    def rows(self, samples: Sequence[SegmentationSample]) -> list[Row]:
        device = next(self.model.parameters()).device
        images = [_input(sample.image, device) for sample in samples]
        with _precision(self.model, self._autocast):
            results = detect_at(self.model, images, self._protocols if self._rows.coco else self._protocols[:2])
        found = [[{key: value.cpu() for key, value in one.items()} for one in result] for result in results]
        return [self._rows(sample, *result) for sample, result in zip(samples, found, strict=True)]


class ClassifierSubject:
    """A classifier: class probabilities, and how many RoIs of its batch lie above each of `ROI_THRESHOLDS`."""

    task: Task = "classification"

    def __init__(self, model: COVIDCTMaskNet, name: str, *, autocast: torch.dtype | None) -> None:
        self.model, self.name, self.class_names = model.eval(), name, class_names(model)
        self.training_minutes = _minutes(model)
        self._autocast = autocast
        self.facts = {
            "weights": digest(model),
            "config": model.config.to_dict(),
            "precision": str(autocast or torch.float32),
            "roi_thresholds": list(ROI_THRESHOLDS),
        }

    @torch.no_grad()
    def rows(self, samples: Sequence[ClassificationSample]) -> list[Row]:
        device = next(self.model.parameters()).device
        with _precision(self.model, self._autocast):
            results = self.model([_input(sample.image, device) for sample in samples])
        rows = []
        for sample, result in zip(samples, results, strict=True):
            check_label(sample, len(self.class_names))
            scores = result["scores"].cpu().numpy()
            rows.append(
                {
                    "image_id": sample.name,
                    "label": int(sample.label),
                    "probabilities": result["probabilities"].cpu().double().tolist(),
                    "rois_above": [int(np.count_nonzero(scores > np.float32(t))) for t in ROI_THRESHOLDS],
                }
            )
        return rows


class SegmentationRows:
    """Makes the row of a slice out of its lesions and the detections of up to three protocols."""

    def __init__(self, *, coco: bool) -> None:
        """COCO AP needs the extra ``train``.

        Raises:
            MissingExtraError: it is not installed.
        """
        self.coco = CocoMetrics() if coco else None

    def __call__(
        self,
        sample: SegmentationSample,
        paper: dict[str, Tensor],
        operating_point: dict[str, Tensor],
        low: dict[str, Tensor] | None = None,
    ) -> Row:
        """Detections on the CPU: boxes (N, 4), masks (N, H, W) bool, labels (N,), scores (N,)."""
        truth = {**sample.target, "masks": sample.target["masks"] != 0}
        row: Row = {"image_id": sample.name}
        for key, found in (("paper", paper), ("operating_point", operating_point)):
            metrics = SegmentationMetrics()
            metrics.update(truth["masks"], truth["labels"], found["masks"], found["labels"], found["scores"])
            row[key] = {name: value for name, value in metrics.rows[0].items() if name != "image_id"}
        if self.coco is not None and low is not None:
            given = (truth["boxes"], truth["masks"], truth["labels"])
            self.coco.update(*given, low["boxes"], low["masks"], low["labels"], low["scores"])
            row["coco"] = _plain_state(self.coco.state_dict())
            self.coco.metric.reset()
            above = low["scores"] > self.coco.score_threshold
            row["matches"] = coco_matches(truth, {key: value[above] for key, value in low.items()})
        return row


def coco_state(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The state of a `CocoMetrics` that has seen the images of `rows`."""
    return {key: [_restored(key, row["coco"][key]) for row in rows] for key in (rows[0]["coco"] if rows else ())}


def check_label(sample: ClassificationSample, classes: int) -> None:
    """Raise a DataError if the label is not one of so many classes."""
    if not 0 <= int(sample.label) < classes:
        raise DataError(
            f"{sample.name}: labelled {int(sample.label)}, but the classes are 0..{classes - 1}; mend the label or "
            "use a model of more classes"
        )


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of a model's values, shortened: tells two sets of weights apart."""
    return state_digest(model.state_dict())[:16]


def _input(image: Tensor, device: torch.device) -> Tensor:
    """(1, H, W) uint8 -> (3, H, W) float32 in 0..1."""
    return (image.to(device).float() / 255).expand(3, -1, -1)


def _minutes(model: LesionMaskRCNN | COVIDCTMaskNet) -> float | None:
    minutes = model.metadata.get("training", {}).get("minutes")
    return None if minutes is None else float(minutes)


@contextmanager
def _precision(model: LesionMaskRCNN | COVIDCTMaskNet, dtype: torch.dtype | None) -> Any:
    before = model.backbone.autocast_dtype
    model.backbone.autocast_dtype = dtype
    try:
        yield
    finally:
        model.backbone.autocast_dtype = before


def _plain_state(state: dict[str, Any]) -> dict[str, Any]:
    """The last image of a torchmetrics detection state, as plain values."""
    return {key: _plain_value(values[-1]) for key, values in state.items()}


def _plain_value(value: Tensor | tuple[Any, ...]) -> list[Any]:
    if isinstance(value, Tensor):
        return value.tolist()
    return [[list(size), counts.decode("ascii")] for size, counts in value]


def _restored(key: str, values: list[Any]) -> Any:
    if key.endswith("_mask"):
        return tuple((tuple(size), counts.encode("ascii")) for size, counts in values)
    if key.endswith("_box"):
        return torch.tensor(values, dtype=torch.float32).reshape(-1, 4)
    return torch.tensor(values, dtype=torch.float32 if key.endswith("_scores") else torch.int64)
