"""Look through a data set before training on it, and say everything that is wrong at once."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctmasknet.data.datasets import ClassificationSample, LabelledSlices, lacking
from ctmasknet.data.layouts import (
    Data,
    LesionClasses,
    LesionRecord,
    Listing,
    Names,
    guess_task,
    list_slices,
    read_class_mask,
    shared_patients,
)
from ctmasknet.errors import DataError, InputError
from ctmasknet.registry import Task


@dataclass
class DataReport:
    """What a data set holds and what is wrong with it.

    Attributes:
        task, layout, sources: what it was read as, and from where.
        slices: how many have everything they need.
        image_sizes: slices by ``"WIDTHxHEIGHT"``.
        class_counts: instances (segmentation) or slices (classification) by class, 0 included.
        empty_slices: slices without an instance (segmentation).
        mask_values: pixels by value over all masks (CNCB folders).
        min_area: components of this many pixels or fewer are not instances, but `dropped_instances`.
        instance_areas, instances_per_slice: percentiles ``"p0"`` to ``"p100"``; areas in pixels, slices that have any.
        patients: how many are known; `slices_without_patient` have none.
        shared_patients, shared_images: those of the other split, too; images by their bytes.
        problems: everything that should be put right, one line each, file and fix.
    """

    task: Task
    layout: str
    sources: list[str]
    slices: int = 0
    image_sizes: dict[str, int] = field(default_factory=dict)
    class_counts: dict[str, int] = field(default_factory=dict)
    empty_slices: int = 0
    mask_values: dict[int, int] = field(default_factory=dict)
    min_area: int = 0
    dropped_instances: int = 0
    instance_areas: dict[str, float] = field(default_factory=dict)
    instances_per_slice: dict[str, float] = field(default_factory=dict)
    patients: int = 0
    slices_without_patient: int = 0
    shared_patients: list[str] = field(default_factory=list)
    shared_images: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing needs to be put right."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON; `ok` included."""
        return {**asdict(self), "ok": self.ok}

    def table(self) -> str:
        """The report for people: a fact a line, by its name in `to_dict`, then the problems."""
        facts = self.to_dict() | {"problems": len(self.problems)}
        hidden = {"ok", *(_OF_MASKS if self.task == "classification" else ())}
        lines = [f"{name.replace('_', ' '):<23} {_shown(value)}" for name, value in facts.items() if name not in hidden]
        return "\n".join([*lines, *(f"- {problem}" for problem in self.problems)])


_OF_MASKS = (
    "empty_slices", "mask_values", "min_area", "dropped_instances", "instance_areas", "instances_per_slice",
)  # fmt: skip


def _shown(value: Any) -> str:
    """A fact in a line; of many things, the first eight."""
    if not isinstance(value, list | dict):
        return str(value)
    items = [f"{key}: {number:.10g}" for key, number in value.items()] if isinstance(value, dict) else value
    return ", ".join([*items[:8], *["…"] * (len(items) > 8)]) or "none"


def check_dataset(
    data: Data,
    *,
    task: Task | None = None,
    against: Data | None = None,
    against_names: Names | None = None,
    classes: LesionClasses = "merge",
    min_area: int = 100,
    names: Names | None = None,
) -> DataReport:
    """Read every file of a data set and report on it; a slice that cannot be read is an entry of it, not an exception.

    Args:
        data, classes, min_area, names: as `open_dataset` takes them.
        task: None looks for masks to tell.
        against: the other split; patients and images that occur in both are reported.
        against_names: as `names`, for the other split. The splits may be two lists over one folder.

    Raises:
        ConfigError: unknown `task` or `classes`, a negative `min_area`.
        MissingExtraError: scipy or the COCO decoder (extra ``train``) is needed and not installed.
    """
    task = task or guess_task(data)
    # Instances of any size, for the small ones are counted, too; what is below 0 is refused there.
    found = list_slices(task, data, classes=classes, min_area=min(min_area, 0), names=names)
    patients = [record.patient for record in found.records]
    report = DataReport(
        task,
        " + ".join(found.layouts),
        [str(source) for source in found.sources],
        slices=len(found.records),
        min_area=min_area,
        patients=len(set(patients) - {None}),
        slices_without_patient=patients.count(None),
        problems=[str(problem) for problem in found.problems],
    )
    _read_all(found, report)
    if against is not None:
        other = list_slices(task, against, classes=classes, min_area=min_area, names=against_names)
        _compare(found, other, report)
    return report


def _read_all(found: Listing, report: DataReport) -> None:
    """Read images and targets, and fill in what they hold."""
    sizes: Counter[str] = Counter()
    values = np.zeros(4, dtype=np.int64)
    classes: Counter[int] = Counter()
    areas: list[int] = []
    per_slice: list[int] = []
    slices = LabelledSlices(found)
    for index, record in enumerate(found.records):
        try:
            sample = slices[index]
        except (InputError, DataError) as error:
            report.problems.append(str(error))
            continue
        height, width = sample.image.shape[1:]
        sizes[f"{width}x{height}"] += 1
        if isinstance(sample, ClassificationSample):
            classes[sample.label] += 1
            continue
        if isinstance(record, LesionRecord):
            values += np.bincount(read_class_mask(record.mask).ravel(), minlength=4)
        here = sample.target["masks"].flatten(1).sum(dim=1, dtype=torch.int64)
        kept = here > report.min_area
        report.dropped_instances += int((~kept).sum())
        areas += here[kept].tolist()
        per_slice.append(int(kept.sum()))
        classes.update(sample.target["labels"][kept].tolist())

    report.image_sizes = dict(sizes.most_common())
    first = 1 if found.task == "segmentation" else 0
    report.class_counts = {name: classes[label] for label, name in enumerate(found.class_names) if label >= first}
    report.empty_slices = per_slice.count(0)
    report.instance_areas, report.instances_per_slice = _spread(areas), _spread(list(filter(None, per_slice)))
    if values.any():
        report.mask_values = dict(enumerate(values.tolist()))
    missing = [name for name, count in report.class_counts.items() if count == 0]
    if found.records and missing:
        report.problems.append(f"{', '.join(report.sources)}: {lacking(found.task, missing)}")


def _compare(found: Listing, other: Listing, report: DataReport) -> None:
    """Fill in what two splits share."""
    report.problems += [str(problem) for problem in other.problems]
    report.shared_patients = shared_patients(*([record.patient for record in part.records] for part in (found, other)))
    report.problems += [
        f"patient {patient} is in both splits; keep each patient in one" for patient in report.shared_patients
    ]
    theirs = {_digest(record.image): record.image for record in other.records}
    for record in found.records:
        if twin := theirs.get(_digest(record.image)):
            report.shared_images.append(str(record.image))
            report.problems.append(f"{record.image}: the same image as {twin} of the other split; remove one")


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return str(path.resolve())  # reported as unreadable; equal to nothing but itself


def _spread(values: list[int]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(values, p)) for p in (0, 5, 25, 50, 75, 95, 100)} if values else {}
