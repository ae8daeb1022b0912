"""Which slices a step sees, in which order, and how they reach the device.

Order and augmentation are functions of (seed, epoch, index) alone: a run that was interrupted continues with
the slices, and the changes to them, that it would have seen without the interruption.

`RoIViews` has RoI batches in place of slices, which the frozen detector gives once, and `ModuleSOnRoIs` learns from
them alone: seconds, not minutes. What that gives up: the scale and shift of the body's BatchNorm stay as in the
segmenter, and augmented slices repeat from a fixed number of views.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ctmasknet.data.augment import Augmentation, augment, sample_generator, seed_of
from ctmasknet.data.datasets import AnySample, ClassificationSample, SliceDataset
from ctmasknet.engine.config import TrainConfig
from ctmasknet.errors import import_extra
from ctmasknet.evaluation.evaluate import gather
from ctmasknet.models import COVIDCTMaskNet
from ctmasknet.models.classifier import fill_batch, image_loss
from ctmasknet.models.detector import Regions
from ctmasknet.models.inference import Inference


class Batch(NamedTuple):
    """Slices of one forward pass; torch pins the memory of a tuple's tensors."""

    images: list[Tensor]  # (1, H, W) uint8 each; with `cache_rois` RoIs, (N, 5) float32
    targets: list[dict[str, Any]]
    names: list[str]

    def to(self, device: torch.device) -> Batch:
        """On `device`, with images as the models take them: (3, H, W) float32 in 0..1."""
        images = [model_input(image, device) for image in self.images]
        return self._replace(images=images, targets=_sent(self.targets, device))


def model_input(image: Tensor, device: torch.device) -> Tensor:
    """(1, H, W) uint8 -> (3, H, W) float32 in 0..1 on `device`; floating-point tensors are only moved."""
    image = image.to(device, non_blocking=True)
    return image if image.is_floating_point() else (image.float() / 255).expand(3, -1, -1)


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for this process, a function of seed and epoch.

    All processes together go through one permutation of the data. Its end is filled up from its start, so that every
    process takes the same number of full batches and the last step of an epoch is a whole one. With `weights` (N,), the
    slices are drawn with these probabilities instead.

    Attributes:
        epoch: the epoch that the next iteration gives.
        start: batches of it to leave out, because they were trained on before an interruption.
        per_step, steps: slices per step, all processes together; steps per epoch.
    """

    def __init__(
        self, size: int, config: TrainConfig, *, rank: int = 0, world: int = 1, weights: np.ndarray | None = None
    ) -> None:
        self.size, self.batch_size, self.seed, self.weights = size, config.batch_size, config.seed, weights
        self.rank, self.world = rank, world
        self.per_step = config.batch_size * config.accumulate * world
        self.steps = -(-size // self.per_step)
        self.epoch = self.start = 0

    def __len__(self) -> int:
        """Batches per epoch and process."""
        return self.steps * self.per_step // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        if self.weights is None:
            order = np.resize(generator.permutation(self.size), self.steps * self.per_step)
        else:
            order = generator.choice(self.size, self.steps * self.per_step, p=self.weights)
        # Neighbours in the permutation form a batch of all processes together.
        mine = order.reshape(-1, self.world, self.batch_size)[:, self.rank]
        for batch in mine[self.start :].tolist():
            yield [(self.epoch, index) for index in batch]


def balanced(data: SliceDataset[Any]) -> np.ndarray:
    """Probabilities (N,) that draw all classes as often, and in each all patients; the unknown ones count as one."""
    groups = [(tuple(data.labels_of(index)), patient) for index, patient in enumerate(data.patients)]
    slices = Counter(groups)
    patients = Counter(labels for labels, _ in slices)
    weights = np.array([1 / (len(patients) * patients[group[0]] * slices[group]) for group in groups])
    return weights / weights.sum()


TrainingSample = tuple[Tensor, dict[str, Any], str]
"""Image or RoIs, the model's target, name."""


class TrainingSlices(Dataset[TrainingSample]):
    """Slices of a data set, augmented if there are settings, indexed by (epoch, index)."""

    def __init__(self, source: SliceDataset[Any] | list[Any], settings: Augmentation | None, seed: int) -> None:
        self.source, self.settings, self.seed = source, settings, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> TrainingSample:
        epoch, index = key
        sample = self.source[index]
        image, target = sample.image, sample.target
        if self.settings is not None:
            image, target = augment(image, target, sample_generator(self.seed, epoch, index), self.settings)
        return image, target, sample.name


def on_device(source: SliceDataset[Any], device: torch.device) -> list[AnySample]:
    """A data set's samples, all read once and kept on `device`."""
    return [_sent(sample, device) for sample in source]


def _sent(value: Any, device: torch.device) -> Any:
    """Lists, mappings and samples with their tensors on `device`."""
    return import_extra("accelerate.utils", "train", "training").send_to_device(value, device, non_blocking=True)


def make_loader(dataset: Dataset[Any], batches: EpochBatches, *, workers: int, device: torch.device) -> DataLoader[Any]:
    """A loader that asks `batches` for its keys; workers stay alive between epochs."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_batch,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda" and workers > 0,
    )


def _batch(samples: list[TrainingSample]) -> Batch:
    """Sizes differ between slices, so nothing is stacked."""
    return Batch(*map(list, zip(*samples, strict=True)))


def seed_step(seed: int, epoch: int, batch: int, rank: int) -> None:
    """Seed torch for one forward pass, so that what it samples does not depend on what ran before it."""
    torch.manual_seed(seed_of(seed, epoch, batch, rank))


class ModuleSOnRoIs(nn.Module):
    """Module S of a classifier with the classifier's calling convention, fed (N, 5) RoIs in place of images.

    An RoI is [score, dx, dy, dw, dh]; rows are ranked. Its state dict is the part of the classifier's that it trains.
    """

    def __init__(self, classifier: COVIDCTMaskNet) -> None:
        super().__init__()
        self.module_s = classifier.module_s
        self.slots = classifier.variant.roi_batch or 0
        self.replicate = classifier.config.replicate

    def forward(self, rois: list[Tensor], targets: list[dict[str, Any]] | None = None) -> Any:
        """``{"loss_image": ...}`` in training mode, else a list of dicts of logits."""
        logits = self.module_s(torch.stack([self._filled(found) for found in rois]))
        if self.training and targets is not None:
            return {"loss_image": image_loss(logits, targets)}
        return [{"logits": row} for row in logits]

    def _filled(self, found: Tensor) -> Tensor:
        nowhere, unknown = found.new_zeros(len(found), 4), torch.zeros(len(found), device=found.device)
        regions = Regions(nowhere, found[:, 0], unknown, found[:, 1:])
        return fill_batch(regions, self.slots, replicate=self.replicate, random=self.training)[0]


class RoIViews(Dataset[TrainingSample]):
    """The RoIs of slices, indexed by (epoch, index); the epoch chooses among an index's views.

    Args:
        classifier: its detector finds the RoIs; it stays as it is.
        slices: where the views come from.
        views: how often each slice is seen; the first time as it is, then changed at random.
        rank, world: each process sees a part of the slices, and all get all RoIs.
    """

    def __init__(
        self, classifier: COVIDCTMaskNet, slices: TrainingSlices, *, views: int, rank: int, world: int
    ) -> None:
        self.seed, self.views = slices.seed, views
        device = next(classifier.parameters()).device
        inference = Inference(classifier)
        mine: dict[int, tuple[list[Tensor], int, str]] = {}
        for index in range(rank, len(slices), world):
            plain: ClassificationSample = slices.source[index]
            seen = [plain.image, *(slices[view, index][0] for view in range(1, views))]
            found = [find_rois(inference, model_input(image, device)).cpu() for image in seen]
            mine[index] = found, plain.label, plain.name
        self._found = {index: entry for share in gather(mine) for index, entry in share.items()}

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, key: tuple[int, int]) -> TrainingSample:
        epoch, index = key
        found, label, name = self._found[index]
        return found[seed_of(self.seed, epoch, index) % self.views], {"image_label": label}, name

    def plain(self) -> list[ClassificationSample]:
        """The slices in order, RoIs of the first view in place of images."""
        return [ClassificationSample(f[0], label, name) for _, (f, label, name) in sorted(self._found.items())]


def find_rois(inference: Inference, image: Tensor) -> Tensor:
    """The ranked valid RoIs (N, 5) of a (3, H, W) image, none of them repeated, as prediction finds them."""
    (reading,) = inference.read([image])
    regions = inference.regions(reading)
    return torch.cat([regions.scores[:, None], regions.deltas], dim=1)
