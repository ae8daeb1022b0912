"""What one slice gives: rows of plain values, a few kB instead of the masks, ready for a line of JSON.

Of a model, or of predictions somebody else made: a COCO results file, evaluated like a model.

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
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctmasknet.batch import COCO_IMAGES, COCO_RESULTS
from ctmasknet.data.datasets import ClassificationSample, SegmentationSample, SliceDataset
from ctmasknet.data.layouts import CocoRecord, decode_segmentation, half_open_boxes, slice_name
from ctmasknet.errors import ConfigError, DataError, shown, typed
from ctmasknet.evaluation.metrics import (
    COCO_SCORE,
    NMS_THRESHOLDS,
    SCORE_THRESHOLDS,
    Row,
    coco_row,
    segmentation_rows,
)
from ctmasknet.models import LesionMaskRCNN, Model
from ctmasknet.models.inference import PAPER, Inference, Precision, Reading
from ctmasknet.models.inference import Protocol as Detection
from ctmasknet.registry import Task
from ctmasknet.weights.files import sha256_of, state_digest
from ctmasknet.zoo import class_names

ROI_THRESHOLDS = (0.2, 0.5, 0.9)
"""RoI scores of Tables 4 and 5 and of Figure 4."""

Found = dict[str, Tensor]
"""Detections of an image on the CPU: boxes (N, 4), masks (N, H, W) bool, labels (N,), scores (N,)."""


@dataclass
class Subject:
    """What `evaluate` measures: a model, or predictions somebody else made.

    Attributes:
        task, name, class_names: what it is.
        facts: settings that its rows depend on, plain values.
        rows: one row per sample.
        training_minutes: from the record of its training, None if unknown.
    """

    task: Task
    name: str
    class_names: tuple[str, ...]
    facts: dict[str, Any]
    rows: Callable[[Sequence[Any]], list[Row]]
    training_minutes: float | None = None


# --- models ---------------------------------------------------------------------------------------------------


def model_subject(model: Model, name: str, precision: Precision, point: dict[str, Any]) -> Subject:
    """A segmenter, read at the paper's settings, at its operating point, and for COCO, in one pass; or a classifier.

    Args:
        point: score and NMS threshold that replace those of a segmenter's own operating point.
    """
    inference = Inference(model, precision)
    digest = state_digest(model.state_dict())[:16]
    facts: dict[str, Any] = {"weights": digest, "config": model.config.to_dict(), "precision": precision}
    protocols: dict[str, Detection] = {}
    if isinstance(model, LesionMaskRCNN):
        own = replace(Detection.of(model), **point)
        # COCO AP counts every score; its NMS is that of the operating point.
        protocols = {"paper": PAPER, "operating_point": own, "coco": replace(own, score_threshold=COCO_SCORE)}
        facts["protocols"] = {key: asdict(protocol) for key, protocol in protocols.items()}
    else:
        facts["roi_thresholds"] = list(ROI_THRESHOLDS)

    def segmented(samples: Sequence[SegmentationSample]) -> list[Row]:
        found = found_on(inference, samples, *protocols.values())
        return [_segmentation_row(sample, *by_protocol) for sample, by_protocol in zip(samples, found, strict=True)]

    def classified(samples: Sequence[ClassificationSample]) -> list[Row]:
        rows = []
        for sample, reading in zip(samples, _readings(inference, samples), strict=True):
            result = inference.classify(reading)
            scores = result["scores"].cpu().numpy()
            row = classification_row(sample, result["probabilities"].cpu().double().tolist())
            rows.append(row | {"rois_above": [int(np.count_nonzero(scores > np.float32(t))) for t in ROI_THRESHOLDS]})
        return rows

    task = model.variant.task
    minutes = model.metadata.get("training", {}).get("minutes")
    return Subject(task, name, class_names(model), facts, segmented if protocols else classified, minutes)


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
    own = replace(Detection.of(inference.model), score_threshold=SCORE_THRESHOLDS[0])
    found = found_on(inference, samples, *(replace(own, nms_threshold=nms) for nms in NMS_THRESHOLDS))
    return [
        {
            "points": [segmentation_rows(sample.target, one, SCORE_THRESHOLDS) for one in by_nms],
            "coco": [coco_row(sample.target, one) for one in by_nms],
        }
        for sample, by_nms in zip(samples, found, strict=True)
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


# --- other people's predictions -------------------------------------------------------------------------------

_FIELDS: dict[str, Any] = {"image_id": int | str, "category_id": int | str, "score": float}
_FIELDS |= {"bbox": list[float], "probabilities": list[float]}


class Predictions(NamedTuple):
    """A file of predictions somebody else made.

    Attributes:
        path: the file.
        entries: a dict per prediction; ``where`` says which it is, for errors.
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
            entry["where"] = f"{path}: prediction {number}"
            try:
                entry |= {key: typed(key, entry[key], kind) for key, kind in _FIELDS.items() if key in entry}
            except ConfigError as error:
                raise DataError(f"{entry['where']}: {error}") from None
        return cls(path, entries, outer)

    @property
    def task(self) -> Task:
        """Those with `probabilities` are for classification."""
        return "classification" if any("probabilities" in entry for entry in self.entries) else "segmentation"

    def subject(self, data: SliceDataset[Any], score_threshold: float) -> Subject:
        """What they say of the slices of `data`.

        Of detections, the paper's protocol counts those scored above 0.75, the operating point those above
        `score_threshold`; masks and NMS are theirs.

        Raises:
            DataError: a prediction of an image that the data lack, or one that is no detection.
        """
        of_slice, count = self._by_slice(data), len(data.class_names)
        labels = self._labels(data) if self.task == "segmentation" else {}

        def detected(sample: SegmentationSample) -> Row:
            found = _detections(of_slice[sample.name], labels, sample)
            thresholds = (PAPER.score_threshold, score_threshold, COCO_SCORE)
            above = [{k: v[found["scores"] > threshold] for k, v in found.items()} for threshold in thresholds]
            return _segmentation_row(sample, *above)

        def classified(sample: ClassificationSample) -> Row:
            given = [entry.get("probabilities", []) for entry in of_slice[sample.name]]
            found = given[0] if len(given) == 1 else []
            if len(found) != count or min(found) < 0 or abs(sum(found) - 1) > 1e-2:
                need = f"one prediction of {count} probabilities that add up to 1 is needed"
                raise DataError(f"{self.path}: image {sample.name}: {need}, not {shown(given)}")
            return classification_row(sample, found)

        facts: dict[str, Any] = {"predictions": sha256_of(self.path)[:16]}
        row: Callable[[Any], Row] = classified
        if self.task == "segmentation":
            for entry in self.entries:
                _require_detection(entry, labels)
            facts["protocols"] = {"operating_point": {"score_threshold": score_threshold}}
            row = detected
        return Subject(self.task, self.path.stem, data.class_names, facts, lambda samples: list(map(row, samples)))

    def _by_slice(self, data: SliceDataset[Any]) -> dict[str, list[Row]]:
        """Name of a slice of the data -> its predictions."""
        known, named = set(data.names), defaultdict(list)
        for name in data.names:
            named[slice_name(name)].append(name)
        numbers = self._listed("images", "file_name", data) or {}
        found: dict[str, list[Row]] = defaultdict(list)
        for entry in self.entries:
            name = str(numbers.get(entry["image_id"], entry["image_id"]))
            names = [name] if name in known else named[slice_name(name)]
            if len(names) != 1:
                what = f"image_id {shown(entry['image_id'])} is {' or '.join(names[:3]) or 'no slice of the data'}"
                raise DataError(f"{entry['where']}: {what}; give the name or path of one")
            found[names[0]].append(entry)
        return found

    def _labels(self, data: SliceDataset[Any]) -> dict[Any, int]:
        """category_id -> label: by the names of the file's categories, else of the data's COCO file, else unchanged."""
        categories = self._listed("categories", "name", data)
        if categories is None:
            return {label: label for label in range(1, len(data.class_names))}
        known = {name.casefold(): label for label, name in enumerate(data.class_names) if label}
        named = {identifier: name.casefold() for identifier, name in categories.items()}
        if sorted(named.values()) != sorted(known):
            theirs, ours = ", ".join(sorted(named.values())), ", ".join(data.class_names[1:])
            raise DataError(f"{self.path}: categories {theirs}, but the data's are {ours}; give both the same names")
        return {identifier: known[name] for identifier, name in named.items()}

    def _listed(self, key: str, name: str, data: SliceDataset[Any]) -> dict[int | str, str] | None:
        """id -> name of the file's `images` or `categories`, else of those in the data's COCO file."""
        content, source = self.content, self.path
        of_data = {record.source for record in getattr(data, "records", ()) if isinstance(record, CocoRecord)}
        if key not in content and len(of_data) == 1:  # several files may use a number twice
            (source,) = of_data
            content = _json(source)
        if key not in content:
            return None
        try:
            listed = typed(key, content[key], list[dict[str, Any]])
            names = {typed("id", one["id"], int | str): typed(name, one[name], str) for one in listed}
        except (ConfigError, KeyError):
            listed, names = [{}], {}  # which says so below
        if len(set(names.values())) < len(listed):
            raise DataError(f"{source}: {key} must be a list of objects, each with an id and a {name} of its own")
        return names


def _require_detection(entry: Row, labels: dict[Any, int]) -> None:
    scored = "segmentation" in entry and 0 <= entry.get("score", math.nan) <= 1
    if not scored or entry.get("category_id") not in labels or len(entry.get("bbox", range(4))) != 4:
        need = f"a segmentation, a score in 0..1, a category_id of {sorted(labels)}, a bbox of four numbers or none"
        raise DataError(f"{entry['where']}: needs {need}, as COCO's segm results have them")


def _detections(own: list[Row], labels: dict[Any, int], sample: SegmentationSample) -> Found:
    height, width = sample.image.shape[-2:]
    masks = torch.zeros(len(own), height, width, dtype=torch.bool)
    boxes = torch.zeros(len(own), 4)
    for index, entry in enumerate(own):
        mask = decode_segmentation(entry["segmentation"], (height, width), entry["where"])
        masks[index] = torch.from_numpy(mask != 0)
        if "bbox" in entry:
            x, y, box_width, box_height = entry["bbox"]
            boxes[index] = torch.tensor([x, y, x + box_width, y + box_height])
        elif masks[index].any():
            boxes[index] = half_open_boxes(masks[index : index + 1])[0]
    return {
        "boxes": boxes,
        "masks": masks,
        "labels": torch.tensor([labels[entry["category_id"]] for entry in own], dtype=torch.int64),
        "scores": torch.tensor([entry["score"] for entry in own], dtype=torch.float32),
    }


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable JSON ({error})") from None
