"""What one slice gives: rows of plain values, a few kB instead of the masks, ready for a line of JSON.

Of a segmenter, a classifier, or predictions somebody else made: a COCO results file, evaluated like a model.

Detections there: ``[{"image_id", "category_id", "score", "segmentation", "bbox"}, …]``, as COCO's servers take them;
`bbox` (x, y, width, height) may be missing and is then that of the mask. Classes:
``[{"image_id", "probabilities"}, …]``. Either list may also be the ``annotations`` (or ``predictions``) of an object
with its own ``images`` and ``categories``.

An `image_id` is the name of a slice, with or without folder and ending, or the number that it has in ``images`` of the
file, in the `coco_images.json` beside a `coco_results.json`, or in the COCO file of the data.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from ctmasknet.batch import COCO_IMAGES, COCO_RESULTS
from ctmasknet.data.datasets import ClassificationSample, SegmentationSample, SliceDataset
from ctmasknet.data.layouts import CocoRecord, decode_segmentation, half_open_boxes
from ctmasknet.errors import DataError
from ctmasknet.evaluation.metrics import (
    COCO_SCORE,
    NMS_THRESHOLDS,
    SCORE_THRESHOLDS,
    Row,
    coco_row,
    segmentation_rows,
)
from ctmasknet.models import COVIDCTMaskNet, LesionMaskRCNN
from ctmasknet.models.inference import PAPER, Inference, Precision, Reading
from ctmasknet.models.inference import Protocol as Detection
from ctmasknet.registry import Task
from ctmasknet.weights.files import sha256_of, state_digest
from ctmasknet.zoo import class_names

ROI_THRESHOLDS = (0.2, 0.5, 0.9)
"""RoI scores of Tables 4 and 5 and of Figure 4."""

Found = dict[str, Tensor]
"""Detections of an image on the CPU: boxes (N, 4), masks (N, H, W) bool, labels (N,), scores (N,)."""


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
    """A segmenter, read at the paper's settings, at its operating point, and for COCO, in one pass.

    A threshold of None is the operating point's own.
    """

    task: Task = "segmentation"

    def __init__(
        self,
        model: LesionMaskRCNN,
        name: str,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        precision: Precision = "float32",
    ) -> None:
        """The operating point is the model's own, but for a threshold that is given."""
        self.name, self.class_names = name, class_names(model)
        self.training_minutes = _minutes(model)
        self._inference = Inference(model, precision)
        point = Detection.of(model)
        if score_threshold is not None:
            point = replace(point, score_threshold=score_threshold)
        if nms_threshold is not None:
            point = replace(point, nms_threshold=nms_threshold)
        # COCO AP counts every score; its NMS is that of the operating point.
        self._protocols = {
            "paper": PAPER,
            "operating_point": point,
            "coco": replace(point, score_threshold=COCO_SCORE),
        }
        self.facts = {
            "weights": digest(model),
            "config": model.config.to_dict(),
            "protocols": {name: asdict(protocol) for name, protocol in self._protocols.items()},
            "precision": precision,
        }

    def rows(self, samples: Sequence[SegmentationSample]) -> list[Row]:
        found = found_on(self._inference, samples, *self._protocols.values())
        return [segmentation_row(sample, *by_protocol) for sample, by_protocol in zip(samples, found, strict=True)]


class ClassifierSubject:
    """A classifier: class probabilities, and how many RoIs of its batch lie above each of `ROI_THRESHOLDS`."""

    task: Task = "classification"

    def __init__(self, model: COVIDCTMaskNet, name: str, precision: Precision = "float32") -> None:
        self.name, self.class_names = name, class_names(model)
        self.training_minutes = _minutes(model)
        self._inference = Inference(model, precision)
        self.facts = {
            "weights": digest(model),
            "config": model.config.to_dict(),
            "precision": precision,
            "roi_thresholds": list(ROI_THRESHOLDS),
        }

    def rows(self, samples: Sequence[ClassificationSample]) -> list[Row]:
        rows = []
        for sample, reading in zip(samples, _readings(self._inference, samples), strict=True):
            check_label(sample, len(self.class_names))
            result = self._inference.classify(reading)
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


@torch.no_grad()
def found_on(
    inference: Inference, samples: Sequence[SegmentationSample], *protocols: Detection
) -> Iterator[list[Found]]:
    """What a segmenter detects on each slice by each protocol, from one pass."""
    for reading in _readings(inference, samples):
        found = inference.detect(reading, *protocols)
        yield [{key: value.cpu() for key, value in vars(one).items()} for one in found]


def segmentation_row(sample: SegmentationSample, paper: Found, operating_point: Found, coco: Found) -> Row:
    """The row of a slice, from its lesions and what was detected by each protocol of `evaluate`."""
    row: Row = {"image_id": sample.name}
    for key, found in (("paper", paper), ("operating_point", operating_point)):
        (row[key],) = segmentation_rows(sample.target, found)
    return row | {"coco": coco_row(sample.target, coco)}


def search_rows(inference: Inference, samples: Sequence[SegmentationSample]) -> list[Row]:
    """Per slice what `operating_points` needs to choose among its candidates, and COCO AP at each NMS, from one pass.

    Every candidate has the figures of a run at it.
    """
    own = Detection.of(cast(LesionMaskRCNN, inference.model))
    protocols = [replace(own, score_threshold=SCORE_THRESHOLDS[0], nms_threshold=nms) for nms in NMS_THRESHOLDS]
    return [
        {
            "image_id": sample.name,
            "points": [segmentation_rows(sample.target, found, SCORE_THRESHOLDS) for found in result],
            "coco": [coco_row(sample.target, found) for found in result],
        }
        for sample, result in zip(samples, found_on(inference, samples, *protocols), strict=True)
    ]


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


def _readings(inference: Inference, samples: Sequence[Any]) -> list[Reading]:
    """Of slices that hold (1, H, W) uint8."""
    device = next(inference.model.parameters()).device
    return inference.read([(sample.image.to(device).float() / 255).expand(3, -1, -1) for sample in samples])


def _minutes(model: LesionMaskRCNN | COVIDCTMaskNet) -> float | None:
    minutes = model.metadata.get("training", {}).get("minutes")
    return None if minutes is None else float(minutes)


class ImportedDetections:
    """Lesions that another model found.

    The paper's protocol counts those scored above 0.75, the operating point those above `score_threshold`; masks and
    NMS are theirs.
    """

    task: Task = "segmentation"
    training_minutes: float | None = None

    def __init__(self, path: Path, data: SliceDataset[Any], score_threshold: float) -> None:
        self.name, self.class_names = path.stem, data.class_names
        self._path, self._threshold = path, score_threshold
        entries, content = _read(path)
        image_name = _ImageNames(path, content, data)
        labels = _labels(path, content, data)
        self._of_image: dict[str, list[tuple[int, Row, int]]] = defaultdict(list)
        for number, entry in enumerate(entries):
            where = f"{path}: prediction {number}"
            category = entry.get("category_id")
            if category not in labels:
                raise DataError(f"{where}: category_id {category!r} is none of {sorted(labels)}; mend or leave it out")
            score = entry.get("score")
            if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
                raise DataError(f"{where}: score {score!r} is no number in 0..1")
            if "segmentation" not in entry:
                raise DataError(f"{where}: no segmentation; masks are needed (COCO's segm results)")
            self._of_image[image_name(entry.get("image_id"), where)].append((number, entry, labels[category]))
        self.facts = {
            "predictions": _digest(path),
            "protocols": {"operating_point": {"score_threshold": score_threshold}},
        }

    def rows(self, samples: Sequence[SegmentationSample]) -> list[Row]:
        thresholds = (PAPER.score_threshold, self._threshold, COCO_SCORE)
        rows = []
        for sample in samples:
            found = self._detections(sample)
            above = [_chosen(found, found["scores"] > threshold) for threshold in thresholds]
            rows.append(segmentation_row(sample, *above))
        return rows

    def _detections(self, sample: SegmentationSample) -> dict[str, Tensor]:
        height, width = sample.image.shape[-2:]
        entries = self._of_image.get(sample.name, [])
        masks = [
            decode_segmentation(entry["segmentation"], (height, width), f"{self._path}: prediction {number}")
            for number, entry, _ in entries
        ]
        stacked = torch.from_numpy(np.array(masks, bool).reshape(-1, height, width))
        boxes = torch.zeros(len(entries), 4)
        for index, (number, entry, _) in enumerate(entries):
            if "bbox" in entry:
                boxes[index] = _box(entry["bbox"], f"{self._path}: prediction {number}")
            elif stacked[index].any():
                boxes[index] = half_open_boxes(stacked[index : index + 1])[0]
        return {
            "boxes": boxes,
            "masks": stacked,
            "labels": torch.tensor([label for _, _, label in entries], dtype=torch.int64),
            "scores": torch.tensor([entry["score"] for _, entry, _ in entries], dtype=torch.float32),
        }


class ImportedProbabilities:
    """Class probabilities that another model gave."""

    task: Task = "classification"
    training_minutes: float | None = None

    def __init__(self, path: Path, data: SliceDataset[Any]) -> None:
        self.name, self.class_names = path.stem, data.class_names
        entries, content = _read(path)
        image_name = _ImageNames(path, content, data)
        self._path = path
        self._of_image: dict[str, list[float]] = {}
        for number, entry in enumerate(entries):
            where = f"{path}: prediction {number}"
            name = image_name(entry.get("image_id"), where)
            if name in self._of_image:
                raise DataError(f"{where}: image {name} is predicted twice; keep one")
            self._of_image[name] = _probabilities(entry.get("probabilities"), len(data.class_names), where)
        self.facts = {"predictions": _digest(path)}

    def rows(self, samples: Sequence[ClassificationSample]) -> list[Row]:
        rows = []
        for sample in samples:
            check_label(sample, len(self.class_names))
            if sample.name not in self._of_image:
                raise DataError(f"{self._path}: no prediction for image {sample.name}; every slice needs one")
            rows.append(
                {
                    "image_id": sample.name,
                    "label": int(sample.label),
                    "probabilities": self._of_image[sample.name],
                }
            )
        return rows


def task_of_predictions(path: Path) -> Task:
    """What a file of predictions is for: one with `probabilities` is for classification.

    Raises:
        DataError: unreadable, or no list of predictions.
    """
    entries, _ = _read(path)
    return "classification" if any("probabilities" in entry for entry in entries) else "segmentation"


class _ImageNames:
    """Finds the slice that an `image_id` means."""

    def __init__(self, path: Path, content: dict[str, Any], data: SliceDataset[Any]) -> None:
        self._path = path
        self._names: dict[str, set[str]] = defaultdict(set)
        records = getattr(data, "records", [None] * len(data.names))
        for name, record in zip(data.names, records, strict=True):
            known = {name, Path(name).name, Path(name).stem}
            if record is not None:
                known |= {str(record.image), record.image.name, record.image.stem}
            for key in known:
                self._names[key].add(name)
        self._numbers: dict[Any, str] = {}
        images, source = _listed("images", path, content, data)
        if images is None:
            return
        if not isinstance(images, list) or not all(isinstance(i, dict) and _plain_id(i.get("id")) for i in images):
            raise DataError(f"{source}: images must be a list of objects with id and file_name")
        named = [(image["id"], str(image.get("file_name"))) for image in images]
        for what, values in zip(("id", "file_name"), zip(*named, strict=True), strict=False):
            (value, count), *_ = Counter(values).most_common(1)
            if count > 1:
                raise DataError(f"{source}: {what} {value} stands twice in images; every image needs its own")
        self._numbers = dict(named)

    def __call__(self, image_id: Any, where: str) -> str:
        """The name of a slice of the data.

        Raises:
            DataError: unknown, or it could mean several.
        """
        word = str(self._numbers.get(image_id, image_id))
        for key in (word, Path(word).name, Path(word).stem):
            names = self._names.get(key)
            if names:
                break
        else:
            raise DataError(
                f"{where}: image_id {image_id!r} is no slice of the data; give the slices' names or leave it out"
            )
        if len(names) > 1:
            raise DataError(f"{where}: image_id {image_id!r} could be {' or '.join(sorted(names)[:3])}; give the path")
        return next(iter(names))


def _read(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Predictions, and the object around them if there is one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON ({error})") from None
    outer = content if isinstance(content, dict) else {}
    entries = outer.get("annotations", outer.get("predictions")) if outer else content
    beside = path.with_name(COCO_IMAGES)
    if not outer and path.name == COCO_RESULTS and beside.exists():  # what `ctmasknet predict --format coco` writes
        outer = json.loads(beside.read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and _plain_id(entry.get("image_id")) and _plain_id(entry.get("category_id", 0))
        for entry in entries
    ):
        raise DataError(f"{path}: not COCO results: a list of objects with image_id, category_id, score, segmentation")
    return entries, outer


def _listed(key: str, path: Path, content: dict[str, Any], data: SliceDataset[Any]) -> tuple[Any, Path]:
    """`images` or `categories` of the file of predictions, else of the data's COCO file if there is one; and which."""
    sources = {record.source for record in getattr(data, "records", ()) if isinstance(record, CocoRecord)}
    if key in content or len(sources) != 1:  # several files may use a number twice
        return content.get(key), path
    (source,) = sources
    return json.loads(source.read_text(encoding="utf-8"))[key], source


def _plain_id(value: Any) -> bool:
    return isinstance(value, int | str)


def _labels(path: Path, content: dict[str, Any], data: SliceDataset[Any]) -> dict[Any, int]:
    """category_id -> label: by the names of the file's categories, else of the data's COCO file, else unchanged."""
    categories, _ = _listed("categories", path, content, data)
    if categories is None:
        return {label: label for label in range(1, len(data.class_names))}
    known = {name.casefold(): label for label, name in enumerate(data.class_names) if label}
    try:
        named = {category["id"]: category["name"].casefold() for category in categories}
    except (AttributeError, KeyError, TypeError):
        raise DataError(f"{path}: categories must be a list of objects with id and name") from None
    if sorted(named.values()) != sorted(known):
        theirs, ours = ", ".join(sorted(named.values())), ", ".join(data.class_names[1:])
        raise DataError(f"{path}: categories {theirs}, but the data's are {ours}; give both the same names")
    return {identifier: known[name] for identifier, name in named.items()}


def _box(value: Any, where: str) -> Tensor:
    """COCO (x, y, width, height) -> xyxy."""
    numbers = isinstance(value, list) and len(value) == 4 and all(isinstance(v, int | float) for v in value)
    if not numbers or not all(math.isfinite(v) for v in value):
        raise DataError(f"{where}: bbox {value!r} is not [x, y, width, height]")
    x, y, width, height = value
    return torch.tensor([x, y, x + width, y + height], dtype=torch.float32)


def _probabilities(value: Any, classes: int, where: str) -> list[float]:
    numbers = isinstance(value, list) and all(isinstance(v, int | float) and 0 <= v <= 1 for v in value)
    if not numbers or len(value) != classes or abs(sum(value) - 1) > 1e-2:
        raise DataError(f"{where}: probabilities {value!r}: expected {classes} numbers in 0..1 that add up to 1")
    return [float(v) for v in value]


def _chosen(found: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in found.items()}


def _digest(path: Path) -> str:
    return sha256_of(path)[:16]
