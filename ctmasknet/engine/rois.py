"""Module S alone, trained on RoI batches that the frozen detector gives once: seconds, not minutes.

What it gives up: the scale and shift of the body's BatchNorm stay as in the segmenter, and augmented slices
repeat from a fixed number of views.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ctmasknet.data.augment import Augmentation, augment, sample_generator
from ctmasknet.data.datasets import ClassificationSample
from ctmasknet.engine.samples import model_input
from ctmasknet.engine.validation import Gather
from ctmasknet.models import COVIDCTMaskNet
from ctmasknet.models.classifier import fill_batch, image_loss
from ctmasknet.models.detector import Regions


class ModuleSOnRoIs(nn.Module):
    """Module S of a classifier with the classifier's calling convention, fed (N, 5) RoIs in place of images.

    An RoI is [score, dx, dy, dw, dh]; rows are ranked, N is at most the variant's `roi_batch`. Its state dict is the
    part of the classifier's that it trains.
    """

    def __init__(self, classifier: COVIDCTMaskNet) -> None:
        super().__init__()
        self.module_s = classifier.module_s
        self.slots = classifier.variant.roi_batch or 0
        self.replicate = classifier.config.replicate

    def forward(self, rois: list[Tensor], targets: list[dict[str, Any]] | None = None) -> Any:
        """``{"loss_image": ...}`` in training mode, else a list of dicts of logits and probabilities."""
        logits = self.module_s(torch.stack([self._filled(found) for found in rois]))
        if self.training and targets is not None:
            return {"loss_image": image_loss(logits, targets)}
        return [{"logits": row, "probabilities": row.softmax(-1)} for row in logits]

    def _filled(self, found: Tensor) -> Tensor:
        nowhere, unknown = found.new_zeros(len(found), 4), torch.zeros(len(found), device=found.device)
        regions = Regions(nowhere, found[:, 0], unknown, found[:, 1:])
        return fill_batch(regions, self.slots, replicate=self.replicate, random=self.training)[0]


class RoIViews(Dataset[tuple[Tensor, dict[str, Any], str]]):
    """The RoIs of a data set's slices, indexed by (epoch, index); the epoch chooses among an index's views.

    Args:
        classifier: its detector finds the RoIs; it stays as it is.
        source: the slices.
        views: how often each slice is seen; the first time as it is, then changed at random.
        settings, seed: of the changes.
        rank, world, gather: each process sees a part of the slices, and all get all RoIs.
    """

    def __init__(
        self,
        classifier: COVIDCTMaskNet,
        source: Any,
        *,
        views: int,
        settings: Augmentation,
        seed: int,
        rank: int,
        world: int,
        gather: Gather,
    ) -> None:
        self.seed, self.views = seed, views
        device = next(classifier.parameters()).device
        mine: dict[int, tuple[list[Tensor], int, str]] = {}
        for index in range(rank, len(source), world):
            sample: ClassificationSample = source[index]
            seen = [sample.image]
            for view in range(1, views):
                changed, _ = augment(sample.image, None, sample_generator(seed, view, index), settings)
                seen.append(changed)
            found = [find_rois(classifier, model_input(image, device)).cpu() for image in seen]
            mine[index] = found, sample.label, sample.name
        self._found = {index: entry for share in gather(mine) for index, entry in share.items()}

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Any], str]:
        epoch, index = key
        found, label, name = self._found[index]
        state = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)
        return found[int(state[0]) % self.views], {"image_label": label}, name

    def plain(self) -> list[ClassificationSample]:
        """The slices in order, RoIs of the first view in place of images."""
        return [ClassificationSample(f[0], label, name) for _, (f, label, name) in sorted(self._found.items())]


@torch.no_grad()
def find_rois(classifier: COVIDCTMaskNet, image: Tensor) -> Tensor:
    """The ranked valid RoIs (N, 5) of a (3, H, W) image, none of them repeated."""
    config = classifier.config
    classifier.eval()
    classifier.config = replace(config, replicate=False)
    try:
        result = classifier([image])[0]
    finally:
        classifier.config = config
    return torch.cat([result["scores"][:, None], result["deltas"]], dim=1)
