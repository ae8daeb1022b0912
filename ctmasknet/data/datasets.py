"""Labelled slices as map-style torch datasets: lesion masks for segmenters, image classes for classifiers.

`open_dataset` recognises the layout of a folder or file by looking at it; the classes below are for those who
know what they have. All give 8-bit grey images (deeper ones, DICOM included, are rounded to 256 levels) and
leave the conversion to three floating-point channels to the consumer, which can do it on the device.

Opening a data set lists files and compares names; that finds what is missing. Contents are read when a
sample is asked for. `list_slices` is the first half alone and collects every problem instead of raising the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ctmasknet.data.layouts import (
    CocoRecord,
    ImageRecord,
    LesionClasses,
    LesionRecord,
    Listing,
    PathLike,
    Record,
    as_paths,
    check_sizes,
    finish,
    list_class_folders,
    list_coco,
    list_covidx,
    list_file_names,
    list_lesion_folders,
    list_slices,
    read_image,
)
from ctmasknet.errors import DataError
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


Sample = TypeVar("Sample", SegmentationSample, ClassificationSample)


class SliceDataset(Dataset[Sample], Generic[Sample]):
    """What the data sets have in common.

    Attributes:
        task: ``"segmentation"`` or ``"classification"``.
        class_names: names in the order of the labels; for segmentation the background comes first.
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

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def labels_of(self, index: int) -> list[int]:
        """Labels that occur in a sample, background excluded for segmentation; does not read the image."""
        raise NotImplementedError


class SegmentationSlices(SliceDataset[SegmentationSample]):
    """Slices with lesion instances, from the records of a listing."""

    task: Task = "segmentation"

    def __init__(self, records: Sequence[Record], class_names: tuple[str, ...]) -> None:
        self.records = cast(list[LesionRecord | CocoRecord], list(records))
        self.class_names = class_names
        self.names = [record.name for record in records]
        self.patients = [record.patient for record in records]

    def __getitem__(self, index: int) -> SegmentationSample:
        record = self.records[index]
        image, target = read_image(record.image), record.target()
        check_sizes(record, tuple(image.shape[1:]), tuple(target["masks"].shape[1:]))
        return SegmentationSample(image, target, record.name)

    def labels_of(self, index: int) -> list[int]:
        return self.records[index].target()["labels"].unique().tolist()


class LesionFolder(SegmentationSlices):
    """CNCB folders: images `root/imgs/NAME.*` with masks of class codes `root/masks/NAME.png`.

    Slices without lesions are negatives and stay. Patients come from CNCB file names, else from an
    `index.csv` in the root or next to it (columns `name`, `patient`, optionally `split`, equal to the name
    of the root).

    Args:
        roots: a folder or several.
        classes, min_area: see `layouts.instances`.
        names: a text file of names, one per line, with or without folder and ending; only these are used,
            in the order of the files. A name that several roots hold selects all of them.

    Raises:
        DataError: no slices, an image without mask or the reverse, two files of one name in a root, listed
            names that do not exist. On reading a sample: sizes that differ, unknown mask values, an
            unreadable mask.
    """

    def __init__(
        self,
        roots: PathLike | Sequence[PathLike],
        *,
        classes: LesionClasses = "merge",
        min_area: int = 100,
        names: PathLike | None = None,
    ) -> None:
        found = list_lesion_folders(as_paths(roots), classes, min_area)
        finish(found, names).require_complete()
        super().__init__(found.records, found.class_names)


class CocoInstances(SegmentationSlices):
    """COCO instance JSON with polygons or RLE; categories are numbered from 1 in the order of their ids.

    Boxes are taken from the masks, half-open, whatever `bbox` says. Crowd regions (`iscrowd`) are left out,
    and so are annotations whose `bbox` has no width or height, with a warning that names the first.

    Args:
        json_path: the annotation file.
        images_dir: what its file names are relative to; None looks in the folder of the JSON file, its
            `images` and `imgs`, and the same one folder up.
        min_area: annotations of this many pixels or fewer are left out.

    Raises:
        DataError: not COCO instance JSON, no images, missing image files, annotations of unknown images or
            categories or without a mask. On reading a sample: sizes that differ, undecodable masks.
        MissingExtraError: on reading a sample with annotations, without faster-coco-eval (extra ``train``).
    """

    def __init__(self, json_path: PathLike, images_dir: PathLike | None = None, *, min_area: int = 100) -> None:
        found = list_coco(Path(json_path), images_dir, min_area)
        finish(found).require_complete()
        super().__init__(found.records, found.class_names)


class ClassificationImages(SliceDataset[ClassificationSample]):
    """Slices with one class each, told by `from_file_names`, `from_list` or `from_class_folders`.

    Attributes:
        labels: one per sample, indices into `class_names`.
    """

    task: Task = "classification"

    def __init__(self, records: Sequence[Record], class_names: tuple[str, ...]) -> None:
        self.records = cast(list[ImageRecord], list(records))
        self.class_names = class_names
        self.names = [record.name for record in records]
        self.patients = [record.patient for record in records]
        self.labels = [record.label for record in self.records]

    @classmethod
    def from_file_names(
        cls, roots: PathLike | Sequence[PathLike], *, names: PathLike | None = None
    ) -> ClassificationImages:
        """Folders of images named `[Class]_[PatientID]_[ScanNum]_[SliceNum]`, Class a number or a word."""
        return cls._complete(list_file_names(as_paths(roots)), names)

    @classmethod
    def from_list(cls, list_file: PathLike, images_dir: PathLike | Sequence[PathLike]) -> ClassificationImages:
        """A COVIDx-CT list: `FILENAME CLASS XMIN YMIN XMAX YMAX` per line; the box is not used."""
        return cls._complete(list_covidx(Path(list_file), as_paths(images_dir)))

    @classmethod
    def from_class_folders(
        cls, roots: PathLike | Sequence[PathLike], *, names: PathLike | None = None
    ) -> ClassificationImages:
        """One subfolder per class, images at any depth below; see `class_folder_names` for the numbering."""
        return cls._complete(list_class_folders(as_paths(roots)), names)

    @classmethod
    def _complete(cls, found: Listing, names: PathLike | None = None) -> ClassificationImages:
        finish(found, names).require_complete()
        return cls(found.records, found.class_names)

    def __getitem__(self, index: int) -> ClassificationSample:
        record = self.records[index]
        return ClassificationSample(read_image(record.image), record.label, record.name)

    def labels_of(self, index: int) -> list[int]:
        return [self.labels[index]]


def open_dataset(
    task: Task,
    data: PathLike | Sequence[PathLike],
    *,
    classes: LesionClasses = "merge",
    min_area: int = 100,
    list_file: PathLike | None = None,
) -> SegmentationSlices | ClassificationImages:
    """Open labelled slices, whatever their layout, several folders or files as one data set.

    Args:
        task: ``"segmentation"`` or ``"classification"``.
        data: paths. Segmentation: CNCB folders, COCO JSON files or folders with one. Classification:
            folders of CNCB-named images, folders of class folders, COVIDx-CT lists (`.txt`, images beside
            it or in `images/`).
        classes: see `layouts.instances`; COCO files bring their own.
        min_area: smaller or equal instances join the background, pixels.
        list_file: restricts to the names it lists. For classification a COVIDx-CT list also brings the
            classes; `data` are then the folders of its images.

    Raises:
        DataError: nothing usable there, or incomplete; the text names the file and the fix.
        ConfigError: unknown `task` or `classes`, a negative `min_area`.
    """
    found = list_slices(task, data, classes=classes, min_area=min_area, list_file=list_file)
    found.require_complete()
    if task == "segmentation":
        return SegmentationSlices(found.records, found.class_names)
    return ClassificationImages(found.records, found.class_names)


def require_trainable(
    dataset: SliceDataset[Any], *, allow_missing_classes: bool = False, source: str = "the training data"
) -> None:
    """Raise a DataError if a class of `dataset` has no sample, or no slice has a lesion.

    Stops at the first sample of each class, so it is quick on data that are in order. One slice is enough.
    """
    wanted = set(range(1 if dataset.task == "segmentation" else 0, len(dataset.class_names)))
    missing = set(wanted)
    for index in range(len(dataset)):
        missing -= set(dataset.labels_of(index))
        if not missing:
            return
    if missing == wanted:
        raise DataError(
            f"{source}: none of the {len(dataset)} slices holds a lesion (above min_area); "
            "add slices with lesions, or lower min_area"
        )
    if not allow_missing_classes:
        names = ", ".join(f"{label} ({dataset.class_names[label]})" for label in sorted(missing))
        fix = (
            "add some, or train on one class (classes='merge')"
            if dataset.task == "segmentation"
            else "add some, or give class folders names of your own, which are numbered as they come"
        )
        raise DataError(f"{source}: no sample of class {names}; {fix}")


class CachedDataset(SliceDataset[Sample]):
    """Keeps decoded samples in memory; a hit equals the first reading, tensor for tensor.

    Masks are kept as bits within their boxes: about 1% of their size. Samples beyond the limit are read anew
    every time. Fill it before worker processes fork, or each of them fills its own.

    Attributes:
        source: the data set that it reads.
        limit: bytes it may hold, None for any number.
        nbytes: bytes it holds now.
    """

    def __init__(self, source: SliceDataset[Sample], limit: int | None = None) -> None:
        self.source: SliceDataset[Sample] = source
        self.task = source.task
        self.class_names = source.class_names
        self.names = source.names
        self.patients = source.patients
        self.limit = limit
        self.nbytes = 0
        self._kept: dict[int, _Packed] = {}

    def __getitem__(self, index: int) -> Sample:
        kept = self._kept.get(index)
        if kept is not None:
            return cast(Sample, kept.sample())
        sample = self.source[index]
        packed = _Packed.of(sample)
        if self.limit is None or self.nbytes + packed.nbytes <= self.limit:
            self._kept[index] = packed
            self.nbytes += packed.nbytes
        return sample

    def labels_of(self, index: int) -> list[int]:
        return self.source.labels_of(index)

    @property
    def labels(self) -> list[int]:
        """Labels of a classification data set, one per sample."""
        return cast(Any, self.source).labels

    def estimate(self) -> int:
        """Bytes that the whole data set would take, from at most eight samples spread over it."""
        indices = np.unique(np.linspace(0, len(self) - 1, num=min(8, len(self))).astype(int))
        return int(np.mean([_Packed.of(self.source[int(i)]).nbytes for i in indices]) * len(self))

    def fill(self) -> CachedDataset[Sample]:
        """Read all samples that fit, in order, and return itself."""
        for index in range(len(self)):
            if index not in self._kept:
                held = self.nbytes
                self[index]
                if self.nbytes == held:
                    break
        return self


def cached(dataset: SliceDataset[Sample], limit: int | None = None) -> CachedDataset[Sample]:
    """`dataset` with its decoded samples kept in memory, up to `limit` bytes."""
    return CachedDataset(dataset, limit)


@dataclass(frozen=True)
class _Packed:
    """A sample in few bytes."""

    image: Tensor
    name: str
    label: int | None
    boxes: Tensor | None
    labels: Tensor | None
    masks: tuple[np.ndarray, ...]
    nbytes: int

    @classmethod
    def of(cls, sample: SegmentationSample | ClassificationSample) -> _Packed:
        if isinstance(sample, ClassificationSample):
            return cls(sample.image.clone(), sample.name, sample.label, None, None, (), sample.image.nbytes)
        boxes, labels = sample.target["boxes"].clone(), sample.target["labels"].clone()
        bits = tuple(
            np.packbits(mask[y1:y2, x1:x2].numpy())
            for mask, (x1, y1, x2, y2) in zip(sample.target["masks"], boxes.int().tolist(), strict=True)
        )
        nbytes = sample.image.nbytes + boxes.nbytes + labels.nbytes + sum(part.nbytes for part in bits)
        return cls(sample.image.clone(), sample.name, None, boxes, labels, bits, nbytes)

    def sample(self) -> SegmentationSample | ClassificationSample:
        image = self.image.clone()  # whoever changes what he was given must not change the cache
        if self.boxes is None or self.labels is None:
            return ClassificationSample(image, cast(int, self.label), self.name)
        masks = torch.zeros((len(self.masks), *image.shape[1:]), dtype=torch.uint8)
        for mask, bits, (x1, y1, x2, y2) in zip(masks, self.masks, self.boxes.int().tolist(), strict=True):
            area = (y2 - y1) * (x2 - x1)
            mask[y1:y2, x1:x2] = torch.from_numpy(np.unpackbits(bits, count=area).reshape(y2 - y1, x2 - x1))
        target = {"boxes": self.boxes.clone(), "labels": self.labels.clone(), "masks": masks}
        return SegmentationSample(image, target, self.name)
