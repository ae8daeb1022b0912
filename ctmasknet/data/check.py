"""Look through a data set before training on it, and say everything that is wrong at once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctmasknet.data.layouts import (
    ImageRecord,
    LesionClasses,
    LesionRecord,
    Listing,
    Names,
    check_sizes,
    guess_task,
    list_slices,
    read_class_mask,
    read_image,
    shared_patients,
)
from ctmasknet.errors import CTMaskNetError, MissingExtraError
from ctmasknet.output import PathLike
from ctmasknet.registry import Task

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


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
        """The report for people: facts in two columns, then the problems, one per line."""
        rows = [
            ("data", ", ".join(self.sources)),
            ("read as", f"{self.task}, {self.layout}"),
            ("slices", str(self.slices)),
            ("image sizes", _counts(self.image_sizes)),
            ("classes", _counts(self.class_counts)),
        ]
        if self.task == "segmentation":
            rows += [
                ("slices without lesions", str(self.empty_slices)),
                ("mask pixels by value", _counts(self.mask_values)),
                (f"components <= {self.min_area} px", f"{self.dropped_instances} (not instances)"),
                ("instance areas, px", _percentiles(self.instance_areas)),
                ("instances per slice", _percentiles(self.instances_per_slice)),
            ]
        unknown = f", unknown for {self.slices_without_patient} slices" if self.slices_without_patient else ""
        rows += [
            ("patients", f"{self.patients}{unknown}"),
            ("patients in both splits", ", ".join(self.shared_patients) or "none"),
            ("images in both splits", str(len(self.shared_images))),
            ("problems", str(len(self.problems))),
        ]
        width = max(len(label) for label, _ in rows)
        lines = [f"{label:<{width}}  {value}" for label, value in rows]
        return "\n".join([*lines, *(f"- {problem}" for problem in self.problems)])


def check_dataset(
    data: PathLike | Sequence[PathLike],
    *,
    task: Task | None = None,
    against: PathLike | Sequence[PathLike] | None = None,
    against_names: Names | None = None,
    classes: LesionClasses = "merge",
    min_area: int = 100,
    names: Names | None = None,
) -> DataReport:
    """Read every file of a data set and report on it; a bad file is an entry of it, never an exception.

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
    found = list_slices(task, data, classes=classes, min_area=min_area, names=names)
    patients = [record.patient for record in found.records]
    report = DataReport(
        task,
        found.layout,
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


@contextmanager
def _noted(report: DataReport) -> Iterator[None]:
    """What is wrong with a file becomes an entry; that an extra is missing does not."""
    try:
        yield
    except MissingExtraError:
        raise
    except CTMaskNetError as error:
        report.problems.append(str(error))


def _read_all(found: Listing, report: DataReport) -> None:
    """Read images and targets, and fill in what they hold."""
    sizes: Counter[str] = Counter()
    values = np.zeros(4, dtype=np.int64)
    classes: Counter[int] = Counter()
    areas: list[int] = []
    per_slice: list[int] = []
    for record in found.records:
        image_size: tuple[int, ...] | None = None
        with _noted(report):
            image_size = tuple(read_image(record.image).shape[1:])
            sizes[f"{image_size[1]}x{image_size[0]}"] += 1
        if isinstance(record, ImageRecord):
            classes[record.label] += 1
            continue
        with _noted(report):
            target = replace(record, min_area=0).target()
            if isinstance(record, LesionRecord):
                values += np.bincount(read_class_mask(record.mask).ravel(), minlength=4)
            here = target["masks"].flatten(1).sum(dim=1, dtype=torch.int64)
            kept = here > report.min_area
            report.dropped_instances += int((~kept).sum())
            report.empty_slices += int(not kept.any())
            areas += here[kept].tolist()
            per_slice += [int(kept.sum())] if kept.any() else []
            classes.update(target["labels"][kept].tolist())
            if image_size is not None:
                check_sizes(record, image_size, tuple(target["masks"].shape[1:]))

    report.image_sizes = dict(sizes.most_common())
    first = 1 if found.task == "segmentation" else 0
    report.class_counts = {name: classes[label] for label, name in enumerate(found.class_names) if label >= first}
    report.instance_areas, report.instances_per_slice = _spread(areas), _spread(per_slice)
    if any(isinstance(record, LesionRecord) for record in found.records):
        report.mask_values = dict(enumerate(values.tolist()))
    missing = [name for name, count in report.class_counts.items() if count == 0]
    reason = f"no sample of class {', '.join(missing)}; add some, or train without it"
    if found.task == "segmentation" and len(missing) == len(report.class_counts):
        reason = (
            f"no slice holds a lesion of more than {report.min_area} px; add slices with lesions, or lower min_area"
        )
    if found.records and missing:
        report.problems.append(f"{', '.join(report.sources)}: {reason}")


def _compare(found: Listing, other: Listing, report: DataReport) -> None:
    """Fill in what two splits share."""
    report.problems += [str(problem) for problem in other.problems]
    report.shared_patients = shared_patients(*([record.patient for record in part.records] for part in (found, other)))
    report.problems += [
        f"patient {patient} is in both splits; keep each patient in one" for patient in report.shared_patients
    ]
    theirs: dict[str, Path] = {}
    for record in other.records:
        theirs.setdefault(_digest(record.image), record.image)
    for record in found.records:
        twin = theirs.get(_digest(record.image))
        if twin is not None:
            report.shared_images.append(str(record.image))
            report.problems.append(f"{record.image}: the same image as {twin} of the other split; remove one")


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return str(path.resolve())  # reported as unreadable; equal to nothing but itself


def _spread(values: list[int]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES} if values else {}


def _percentiles(spread: dict[str, float]) -> str:
    return f"{spread['p0']:.0f} to {spread['p100']:.0f}, median {spread['p50']:.0f}" if spread else "none"


def _counts(counts: dict[Any, int]) -> str:
    shown = [f"{key}: {count}" for key, count in list(counts.items())[:6]]
    return ", ".join(shown + ["…"] * (len(counts) > 6)) or "none"
