"""Which slices a step sees, in which order, and how they reach the device.

Order and augmentation are functions of (seed, epoch, index) alone: a run that was interrupted continues with
the slices, and the changes to them, that it would have seen without the interruption.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ctmasknet.data.augment import Augmentation, augment, sample_generator
from ctmasknet.data.datasets import ClassificationSample, SegmentationSample, SliceDataset
from ctmasknet.engine.config import TrainConfig


@dataclass(frozen=True)
class Batch:
    """Slices of one forward pass.

    Attributes:
        images: (1, H, W) uint8 each; a cached RoI batch (N, 5) float32 instead with `cache_rois`.
        targets: the model's targets.
        names: of the slices.
    """

    images: list[Tensor]
    targets: list[dict[str, Any]]
    names: list[str]

    def to(self, device: torch.device) -> Batch:
        """On `device`, with images as the models take them: (3, H, W) float32 in 0..1."""
        images = [model_input(image, device) for image in self.images]
        targets = [{key: _moved(value, device) for key, value in target.items()} for target in self.targets]
        return Batch(images, targets, self.names)


def model_input(image: Tensor, device: torch.device) -> Tensor:
    """(1, H, W) uint8 -> (3, H, W) float32 in 0..1 on `device`; floating-point tensors are only moved."""
    image = image.to(device, non_blocking=True)
    return image if image.is_floating_point() else (image.float() / 255).expand(3, -1, -1)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for this process, a function of seed and epoch.

    All processes together go through one permutation of the data. Its end is filled up from its start, so that every
    process takes the same number of full batches and the last step of an epoch is a whole one.

    Attributes:
        epoch: the epoch that the next iteration gives.
        start: batches of it to leave out, because they were trained on before an interruption.
        per_step, steps: slices per step, all processes together; steps per epoch.
    """

    def __init__(self, size: int, config: TrainConfig, *, rank: int = 0, world: int = 1) -> None:
        self.size, self.batch_size, self.seed = size, config.batch_size, config.seed
        self.rank, self.world = rank, world
        self.per_step = config.batch_size * config.accumulate * world
        self.steps = -(-size // self.per_step)
        self.epoch = self.start = 0
        self._batches = self.steps * config.accumulate

    def __len__(self) -> int:
        """Batches per epoch and process."""
        return self._batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, self.epoch]))
        order = np.resize(generator.permutation(self.size), self.steps * self.per_step)
        # Neighbours in the permutation form a batch of all processes together.
        mine = order.reshape(-1, self.world, self.batch_size)[:, self.rank]
        for batch in mine[self.start :].tolist():
            yield [(self.epoch, index) for index in batch]


class TrainingSlices(Dataset[tuple[Tensor, dict[str, Any], str]]):
    """Augmented slices of a data set, indexed by (epoch, index)."""

    def __init__(self, source: SliceDataset[Any], settings: Augmentation, seed: int) -> None:
        self.source, self.settings, self.seed = source, settings, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Any], str]:
        epoch, index = key
        image, target, name = as_target(self.source[index])
        generator = sample_generator(self.seed, epoch, index)
        image, changed = augment(image, target, generator, self.settings)
        return image, target if changed is None else changed, name


def as_target(sample: SegmentationSample | ClassificationSample) -> tuple[Tensor, dict[str, Any], str]:
    """A data set's sample as (image, the model's target, name)."""
    if isinstance(sample, ClassificationSample):
        return sample.image, {"image_label": sample.label}, sample.name
    return sample.image, sample.target, sample.name


class OnDevice(Dataset[Any]):
    """A data set's samples, all read once and kept on `device`."""

    def __init__(self, source: SliceDataset[Any], device: torch.device) -> None:
        self.names = source.names
        self.samples = [self._moved(sample, device) for sample in source]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> SegmentationSample | ClassificationSample:
        return self.samples[index]

    @staticmethod
    def _moved(
        sample: SegmentationSample | ClassificationSample, device: torch.device
    ) -> SegmentationSample | ClassificationSample:
        image = sample.image.to(device)
        if isinstance(sample, ClassificationSample):
            return ClassificationSample(image, sample.label, sample.name)
        target = {key: value.to(device) for key, value in sample.target.items()}
        return SegmentationSample(image, target, sample.name)


def collate(samples: list[tuple[Tensor, dict[str, Any], str]]) -> Batch:
    """Sizes differ between slices, so a batch stays a list."""
    images, targets, names = zip(*samples, strict=True)
    return Batch(list(images), list(targets), list(names))


def make_loader(dataset: Dataset[Any], batches: EpochBatches, *, workers: int, device: torch.device) -> DataLoader[Any]:
    """A loader that asks `batches` for its keys; workers stay alive between epochs."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda" and workers > 0,
    )


def seed_step(seed: int, epoch: int, batch: int, rank: int) -> None:
    """Seed torch for one forward pass, so that what it samples does not depend on what ran before it."""
    state = np.random.SeedSequence([seed, epoch, batch, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))
