"""Labelled slices as map-style torch datasets: lesion masks for segmenters, image classes for classifiers.

`open_dataset` recognises the layout of a folder or file by looking at it. The images are 8-bit grey (deeper ones,
DICOM included, are rounded to 256 levels); the consumer makes three floating-point channels of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ctmasknet.data.layouts import ImageRecord, LesionClasses, Listing, Names, check_sizes, list_slices, read_image
from ctmasknet.errors import DataError
from ctmasknet.output import PathLike
from ctmasknet.registry import Task


class SegmentationSample(NamedTuple):
    """A slice with its instances: image (1, H, W) uint8, target as `layouts.instances` gives it, name."""

    image: Tensor
    target: dict[str, Tensor]
    name: str


class ClassificationSample(NamedTuple):
    """A slice with its class: image (1, H, W) uint8, label (an index into `class_names`), name."""

    image: Tensor
    label: int
    name: str

    @property
    def target(self) -> dict[str, Any]:
        """The label as a classifier's training takes it."""
        return {"image_label": self.label}


AnySample = SegmentationSample | ClassificationSample
Sample = TypeVar("Sample", SegmentationSample, ClassificationSample)


class SliceDataset(Dataset[Sample]):
    """What the data sets have in common, and what one of your own for `evaluate` needs.

    Attributes:
        task: ``"segmentation"`` or ``"classification"``.
        class_names: in the order of the labels; for segmentation the background comes first.
        names: one per sample, unique; the file name without its ending, or the whole path where
            several files share that.
        patients: one per sample, None where unknown.
    """

    task: Task
    class_names: tuple[str, ...]
    names: list[str]
    patients: list[str | None]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def labels_of(self, index: int) -> list[int]:
        """Labels that occur in a sample, background excluded."""
        sample = self[index]
        return [sample.label] if isinstance(sample, ClassificationSample) else sample.target["labels"].unique().tolist()


class LabelledSlices(SliceDataset[Any]):
    """The slices of a listing, with lesion instances or a class each; those without lesions are negatives and stay."""

    def __init__(self, found: Listing) -> None:
        self.task, self.class_names, self.records = found.task, found.class_names, found.records
        self.names = [record.name for record in self.records]
        self.patients = [record.patient for record in self.records]

    def __getitem__(self, index: int) -> AnySample:
        record = self.records[index]
        image = read_image(record.image)
        if isinstance(record, ImageRecord):
            return ClassificationSample(image, record.label, record.name)
        target = record.target()
        check_sizes(record, tuple(image.shape[1:]), tuple(target["masks"].shape[1:]))
        return SegmentationSample(image, target, record.name)

    def labels_of(self, index: int) -> list[int]:  # without reading the image
        record = self.records[index]
        return [record.label] if isinstance(record, ImageRecord) else record.target()["labels"].unique().tolist()


def open_dataset(
    task: Task,
    data: PathLike | Sequence[PathLike],
    *,
    classes: LesionClasses = "merge",
    min_area: int = 100,
    names: Names | None = None,
) -> LabelledSlices:
    """Open labelled slices, whatever their layout, several folders or files as one data set.

    Args:
        task: ``"segmentation"`` or ``"classification"``.
        data: paths. Segmentation: CNCB folders, COCO JSON files or folders with one. Classification:
            folders of CNCB-named images, folders of class folders, COVIDx-CT lists (`.txt`, images beside
            it or in `images/`).
        classes: see `layouts.instances`; COCO files bring their own.
        min_area: smaller or equal instances join the background, pixels.
        names: restricts to these names, with or without folder and ending: a text file that lists them, one per
            line, or a sequence of them. The order stays that of the files. A name that several folders hold
            selects all of them.

    Raises:
        DataError: nothing usable there, or incomplete: an image without mask, names that do not exist, …; the text
            names the file and the fix. On reading a sample: sizes that differ, unknown mask values, damaged files.
        ConfigError: unknown `task` or `classes`, a negative `min_area`.
        MissingExtraError: on reading a sample with lesions, without the extra ``train``.
    """
    found = list_slices(task, data, classes=classes, min_area=min_area, names=names)
    if found.problems:
        more = f" (and {len(found.problems) - 1} more problems: `ctmasknet data check` lists them)"
        raise DataError(f"{found.problems[0]}{more if len(found.problems) > 1 else ''}")
    return LabelledSlices(found)


def require_trainable(dataset: SliceDataset[Any], *, source: str = "the training data") -> None:
    """Raise a DataError if a class of `dataset` has no sample; quick where every class has one early."""
    missing = set(range(1 if dataset.task == "segmentation" else 0, len(dataset.class_names)))
    for index in range(len(dataset)):
        missing -= set(dataset.labels_of(index))
        if not missing:
            return
    raise DataError(f"{source}: {lacking(dataset.task, [dataset.class_names[label] for label in sorted(missing)])}")


def lacking(task: Task, classes: Sequence[str]) -> str:
    """What to say of `classes` that no slice shows."""
    fix = "or lower min_area; classes='merge' makes GGO and consolidation one class"
    if task == "classification":
        fix = "or give class folders names of your own, which are numbered as they come"
    return f"no sample of class {', '.join(classes)}; add some, {fix}"


class CachedDataset(SliceDataset[Any]):
    """Keeps decoded samples in memory, their masks at a bit a pixel; a hit equals the first reading, tensor for tensor.

    Samples beyond the `limit` in bytes (None: any number) are read anew every time. Fill it before worker processes
    fork, or each of them fills its own.
    """

    def __init__(self, source: SliceDataset[Any], limit: int | None = None) -> None:
        self.source, self.limit, self.nbytes = source, limit, 0
        self.task, self.class_names = source.task, source.class_names
        self.names, self.patients = source.names, source.patients
        self._kept: dict[int, AnySample] = {}

    def __getitem__(self, index: int) -> AnySample:
        if index in self._kept:
            return _unpacked(self._kept[index])
        sample: AnySample = self.source[index]
        kept = _packed(sample)
        nbytes = bytes_of(kept)
        if self.limit is None or self.nbytes + nbytes <= self.limit:
            self._kept[index] = kept
            self.nbytes += nbytes
        return sample

    def fill(self) -> CachedDataset:
        """Read all samples that fit, in order, and return itself."""
        for index in range(len(self)):
            self[index]
            if index not in self._kept:
                break
        return self


def bytes_of(sample: AnySample) -> int:
    """How much memory the tensors of a sample take."""
    return sum(value.nbytes for value in (sample.image, *sample.target.values()) if isinstance(value, Tensor))


def _packed(sample: AnySample) -> AnySample:
    """A copy whose masks take a bit a pixel."""
    packed = copy.deepcopy(sample)
    if isinstance(packed, SegmentationSample):
        packed.target["masks"] = torch.from_numpy(np.packbits(packed.target["masks"].numpy(), axis=-1))
    return packed


def _unpacked(packed: AnySample) -> AnySample:
    """The sample anew: whoever changes what he was given must not change the cache."""
    sample = copy.deepcopy(packed)
    if isinstance(sample, SegmentationSample):
        masks = np.unpackbits(sample.target["masks"].numpy(), axis=-1, count=sample.image.shape[-1])
        sample.target["masks"] = torch.from_numpy(masks)
    return sample
