"""Decoded slices kept in memory, masks as bits inside their boxes, so that an epoch reads no file twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ctmasknet.data.datasets import ClassificationSample, Sample, SegmentationSample, SliceDataset


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
