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
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ctmasknet.batch import COCO_IMAGES, COCO_RESULTS
from ctmasknet.data.datasets import ClassificationSample, SegmentationSample, SliceDataset
from ctmasknet.data.layouts import CocoRecord, decode_segmentation, half_open_boxes
from ctmasknet.errors import ConfigError, DataError, typed
from ctmasknet.evaluation.metrics import (
    COCO_SCORE,
    NMS_THRESHOLDS,
    SCORE_THRESHOLDS,
    Row,
    coco_row,
    segmentation_rows,
)
from ctmasknet.models import COVIDCTMaskNet, LesionMaskRCNN, Model
from ctmasknet.models.inference import PAPER, Inference, Precision, Reading
from ctmasknet.models.inference import Protocol as Detection
from ctmasknet.registry import Task
from ctmasknet.weights.files import sha256_of, state_digest
from ctmasknet.zoo import class_names

ROI_THRESHOLDS = (0.2, 0.5, 0.9)
"""RoI scores of Tables 4 and 5 and of Figure 4."""

Found = dict[str, Tensor]
"""Detections of an image on the CPU: boxes (N, 4), masks (N, H, W) bool, labels (N,), scores (N,)."""


class Subject:
    """What `evaluate` measures: a model, or predictions somebody else made.

    Attributes:
        task, name, class_names: what it is.
        facts: settings that its rows depend on, plain values.
        training_minutes: from the record of its training, None if unknown.
    """

    task: Task
    training_minutes: float | None = None

    def __init__(self, name: str, class_names: tuple[str, ...], facts: dict[str, Any]) -> None:
        self.name, self.class_names, self.facts = name, class_names, facts

    def rows(self, samples: Sequence[Any]) -> list[Row]:
        """One row per sample."""
        raise NotImplementedError


class _ModelSubject(Subject):
    def __init__(self, model: Model, name: str, precision: Precision) -> None:
        digest = state_digest(model.state_dict())[:16]
        facts = {"weights": digest, "config": model.config.to_dict(), "precision": precision}
        super().__init__(name, class_names(model), facts)
        self.training_minutes = model.metadata.get("training", {}).get("minutes")
        self._inference = Inference(model, precision)


class SegmenterSubject(_ModelSubject):
    """A segmenter, read at the paper's settings, at its operating point, and for COCO, in one pass.

    The operating point is the model's own, but for a threshold that is given.
    """

    task = "segmentation"

    def __init__(
        self,
        model: LesionMaskRCNN,
        name: str,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(model, name, precision)
        point = Detection.of(model)
        if score_threshold is not None:
            point = replace(point, score_threshold=score_threshold)
        if nms_threshold is not None:
            point = replace(point, nms_threshold=nms_threshold)
        # COCO AP counts every score; its NMS is that of the operating point.
        coco = replace(point, score_threshold=COCO_SCORE)
        self._protocols = {"paper": PAPER, "operating_point": point, "coco": coco}
        self.facts["protocols"] = {name: asdict(protocol) for name, protocol in self._protocols.items()}

    def rows(self, samples: Sequence[SegmentationSample]) -> list[Row]:
        found = found_on(self._inference, samples, *self._protocols.values())
        return [_segmentation_row(sample, *by_protocol) for sample, by_protocol in zip(samples, found, strict=True)]


class ClassifierSubject(_ModelSubject):
    """A classifier: class probabilities, and how many RoIs of its batch lie above each of `ROI_THRESHOLDS`."""

    task = "classification"

    def __init__(self, model: COVIDCTMaskNet, name: str, precision: Precision = "float32") -> None:
        super().__init__(model, name, precision)
        self.facts["roi_thresholds"] = list(ROI_THRESHOLDS)

    def rows(self, samples: Sequence[ClassificationSample]) -> list[Row]:
        rows = []
        for sample, reading in zip(samples, _readings(self._inference, samples), strict=True):
            result = self._inference.classify(reading)
            scores = result["scores"].cpu().numpy()
            row = classification_row(sample, result["probabilities"].cpu().double().tolist())
            rows.append(row | {"rois_above": [int(np.count_nonzero(scores > np.float32(t))) for t in ROI_THRESHOLDS]})
        return rows


@torch.no_grad()
def found_on(
    inference: Inference, samples: Sequence[SegmentationSample], *protocols: Detection
) -> Iterator[list[Found]]:
    """What a segmenter detects on each slice by each protocol, from one pass."""
    for reading in _readings(inference, samples):
        found = inference.detect(reading, *protocols)
        yield [{key: value.cpu() for key, value in vars(one).items()} for one in found]


def search_rows(inference: Inference, samples: Sequence[SegmentationSample]) -> list[Row]:
    """Per slice what `operating_points` needs to choose among its candidates, and COCO AP at each NMS, from one pass.

    Every candidate has the figures of a run at it.
    """
    own = Detection.of(cast(LesionMaskRCNN, inference.model))
    protocols = [replace(own, score_threshold=SCORE_THRESHOLDS[0], nms_threshold=nms) for nms in NMS_THRESHOLDS]
    return [
        {
            "points": [segmentation_rows(sample.target, found, SCORE_THRESHOLDS) for found in result],
            "coco": [coco_row(sample.target, found) for found in result],
        }
        for sample, result in zip(samples, found_on(inference, samples, *protocols), strict=True)
    ]


def classification_row(sample: ClassificationSample, probabilities: list[float]) -> Row:
    """The row of a slice, from its label and the probability of each class.

    Raises:
        DataError: the label is none of the classes.
    """
    if not 0 <= int(sample.label) < len(probabilities):
        raise DataError(
            f"{sample.name}: labelled {int(sample.label)}, but the classes are 0..{len(probabilities) - 1}; mend the "
            "label or use a model of more classes"
        )
    return {"image_id": sample.name, "label": int(sample.label), "probabilities": probabilities}


def _segmentation_row(sample: SegmentationSample, paper: Found, operating_point: Found, coco: Found) -> Row:
    (paper_row,), (own_row,) = (segmentation_rows(sample.target, found) for found in (paper, operating_point))
    coco_matches = coco_row(sample.target, coco)
    return {"image_id": sample.name, "paper": paper_row, "operating_point": own_row, "coco": coco_matches}


def _readings(inference: Inference, samples: Sequence[Any]) -> list[Reading]:
    """Of slices that hold (1, H, W) uint8."""
    device = next(inference.model.parameters()).device
    return inference.read([(sample.image.to(device).float() / 255).expand(3, -1, -1) for sample in samples])


_FIELDS = {
    "image_id": int | str,
    "category_id": int | str,
    "score": float,
    "bbox": list[float],
    "probabilities": list[float],
}


class Predictions(NamedTuple):
    """A file of predictions somebody else made.

    Attributes:
        path: the file.
        entries: a dict per prediction.
        content: the object around them, with ``images`` and ``categories``; empty if there is none.
    """

    path: Path
    entries: list[Row]
    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Predictions:
        """
        Raises:
            DataError: unreadable, or no list of predictions.
        """
        content, beside = _json(path), path.with_name(COCO_IMAGES)
        outer = content if isinstance(content, dict) else {}
        entries: Any = outer.get("annotations", outer.get("predictions")) if outer else content
        if not outer and path.name == COCO_RESULTS and beside.exists():  # as `ctmasknet predict --format coco` writes
            outer = _json(beside)
        if not isinstance(entries, list) or not all(isinstance(e, dict) and "image_id" in e for e in entries):
            raise DataError(
                f"{path}: not COCO results: a list of objects with image_id, category_id, score, segmentation"
            )
        for number, entry in enumerate(entries):
            try:
                entry |= {key: typed(key, entry[key], kind) for key, kind in _FIELDS.items() if key in entry}
            except ConfigError as error:
                raise DataError(f"{path}: prediction {number}: {error}") from None
        return cls(path, entries, outer)

    @property
    def task(self) -> Task:
        """Those with `probabilities` are for classification."""
        return "classification" if any("probabilities" in entry for entry in self.entries) else "segmentation"

    def by_slice(self, data: SliceDataset[Any]) -> dict[str, list[tuple[str, Row]]]:
        """Name of a slice of the data -> its predictions, each with what to call it in an error.

        Raises:
            DataError: of an image that the data lack, or that could be one of several.
        """
        named: dict[str, set[str]] = defaultdict(set)
        records = getattr(data, "records", [None] * len(data.names))
        for name, record in zip(data.names, records, strict=True):
            for path in (Path(name), *([record.image] if record is not None else [])):
                for key in (str(path), path.name, path.stem):
                    named[key].add(name)
        numbers = {image["id"]: image["file_name"] for image in self._listed("images", "file_name", data) or ()}
        found: dict[str, list[tuple[str, Row]]] = defaultdict(list)
        for number, entry in enumerate(self.entries):
            where = f"{self.path}: prediction {number}: image_id {entry['image_id']!r}"
            path = Path(str(numbers.get(entry["image_id"], entry["image_id"])))
            names = next((named[key] for key in (str(path), path.name, path.stem) if key in named), set())
            if not names:
                raise DataError(f"{where} is no slice of the data; give the slices' names or leave it out")
            if len(names) > 1:
                raise DataError(f"{where} could be {' or '.join(sorted(names)[:3])}; give the path")
            found[min(names)].append((f"{self.path}: prediction {number}", entry))
        return found

    def labels(self, data: SliceDataset[Any]) -> dict[Any, int]:
        """category_id -> label: by the names of the file's categories, else of the data's COCO file, else unchanged."""
        categories = self._listed("categories", "name", data)
        if categories is None:
            return {label: label for label in range(1, len(data.class_names))}
        known = {name.casefold(): label for label, name in enumerate(data.class_names) if label}
        named = {category["id"]: category["name"].casefold() for category in categories}
        if sorted(named.values()) != sorted(known):
            theirs, ours = ", ".join(sorted(named.values())), ", ".join(data.class_names[1:])
            raise DataError(f"{self.path}: categories {theirs}, but the data's are {ours}; give both the same names")
        return {identifier: known[name] for identifier, name in named.items()}

    def _listed(self, key: str, name: str, data: SliceDataset[Any]) -> list[Row] | None:
        """`images` or `categories` of the file, else of the data's COCO file: objects with an id and a name."""
        listed, source = self.content.get(key), self.path
        of_data = {record.source for record in getattr(data, "records", ()) if isinstance(record, CocoRecord)}
        if key not in self.content and len(of_data) == 1:  # several files may use a number twice
            (source,) = of_data
            listed = _json(source)[key]
        if listed is None:
            return None
        try:
            for item in typed(key, listed, list[dict[str, Any]]):
                typed("id", item["id"], int | str)
                typed(name, item[name], str)
        except (ConfigError, KeyError):
            raise DataError(f"{source}: {key} must be a list of objects with id and {name}") from None
        for field in ("id", name):
            for value, count in Counter(item[field] for item in listed).most_common(1):
                if count > 1:
                    raise DataError(f"{source}: {field} {value} appears twice in {key}; each needs its own")
        return listed


class ImportedDetections(Subject):
    """Lesions that another model found.

    The paper's protocol counts those scored above 0.75, the operating point those above `score_threshold`; masks and
    NMS are theirs.
    """

    task = "segmentation"

    def __init__(self, predictions: Predictions, data: SliceDataset[Any], score_threshold: float) -> None:
        point = {"operating_point": {"score_threshold": score_threshold}}
        facts = {"predictions": sha256_of(predictions.path)[:16], "protocols": point}
        super().__init__(predictions.path.stem, data.class_names, facts)
        self._thresholds = (PAPER.score_threshold, score_threshold, COCO_SCORE)
        self._of_slice, self._labels = predictions.by_slice(data), predictions.labels(data)
        for where, entry in (named for own in self._of_slice.values() for named in own):
            category, score = entry.get("category_id"), entry.get("score", math.nan)
            if category not in self._labels:
                known = sorted(self._labels)
                raise DataError(f"{where}: category_id {category!r} is none of {known}; mend or leave it out")
            if not 0 <= score <= 1:
                raise DataError(f"{where}: score {score!r} is no number in 0..1")
            if "segmentation" not in entry:
                raise DataError(f"{where}: no segmentation; masks are needed (COCO's segm results)")
            if len(entry.get("bbox", range(4))) != 4:
                raise DataError(f"{where}: bbox {entry['bbox']!r} is not [x, y, width, height]")

    def rows(self, samples: Sequence[SegmentationSample]) -> list[Row]:
        rows = []
        for sample in samples:
            found = self._detections(sample)
            above = [{k: v[found["scores"] > threshold] for k, v in found.items()} for threshold in self._thresholds]
            rows.append(_segmentation_row(sample, *above))
        return rows

    def _detections(self, sample: SegmentationSample) -> Found:
        height, width = sample.image.shape[-2:]
        own = self._of_slice.get(sample.name, [])
        masks = torch.zeros(len(own), height, width, dtype=torch.bool)
        boxes = torch.zeros(len(own), 4)
        for index, (where, entry) in enumerate(own):
            masks[index] = torch.from_numpy(decode_segmentation(entry["segmentation"], (height, width), where) != 0)
            if "bbox" in entry:
                x, y, box_width, box_height = entry["bbox"]
                boxes[index] = torch.tensor([x, y, x + box_width, y + box_height])
            elif masks[index].any():
                boxes[index] = half_open_boxes(masks[index : index + 1])[0]
        labels = torch.tensor([self._labels[entry["category_id"]] for _, entry in own], dtype=torch.int64)
        scores = torch.tensor([entry["score"] for _, entry in own], dtype=torch.float32)
        return {"boxes": boxes, "masks": masks, "labels": labels, "scores": scores}


class ImportedProbabilities(Subject):
    """Class probabilities that another model gave."""

    task = "classification"

    def __init__(self, predictions: Predictions, data: SliceDataset[Any]) -> None:
        super().__init__(predictions.path.stem, data.class_names, {"predictions": sha256_of(predictions.path)[:16]})
        self._path, self._of_slice = predictions.path, predictions.by_slice(data)

    def rows(self, samples: Sequence[ClassificationSample]) -> list[Row]:
        rows = []
        for sample in samples:
            own = self._of_slice.get(sample.name, [])
            if len(own) != 1:
                raise DataError(f"{self._path}: {len(own)} predictions for image {sample.name}; every slice needs one")
            ((where, entry),) = own
            probabilities, count = entry.get("probabilities", []), len(self.class_names)
            if len(probabilities) != count or min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-2:
                raise DataError(f"{where}: probabilities {probabilities}: {count} numbers that add up to 1 are needed")
            rows.append(classification_row(sample, probabilities))
        return rows


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable JSON ({error})") from None
