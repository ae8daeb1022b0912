"""COVID-CT-Mask-Net: a slice's class from the ranked regions of its lesion detector (paper section 2, Figure 1b)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctmasknet.errors import InputError
from ctmasknet.models.config import ModelConfig
from ctmasknet.models.detector import Detector, Regions, checked_images, require_float32, rescale
from ctmasknet.registry import Variant


class ModuleS(nn.Module):
    """The paper's module S: (B, slots, 5) RoI batches -> (B, image_classes) logits."""

    def __init__(self, slots: int, hidden: int, image_classes: int) -> None:
        super().__init__()
        self.slots = slots
        self.fc1 = nn.Linear(5 * slots, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.logits = nn.Linear(hidden, image_classes)
        for layer in (self.fc1, self.fc2, self.logits):  # as the released code; biases are torch's
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, batches: Tensor) -> Tensor:
        return self.logits(F.relu(self.fc2(F.relu(self.fc1(batches.flatten(1))))))


class COVIDCTMaskNet(Detector):
    """Image classifier on top of a lesion detector without its mask head.

    ``model(images, targets=None)``: `images` a list of (3, H, W) float32 tensors in 0..1, sizes may differ.

    - Training mode: `targets` is a list of dicts with `image_label` (an int or an int64 scalar tensor). Returns
      ``{"loss_image": ...}``, binary cross-entropy with logits on one-hot labels. The detector stays in evaluation
      behaviour.
    - Evaluation mode: returns per image a dict of logits (K,), probabilities (K,) = softmax(logits / `temperature`),
      and its RoI batch: boxes (N, 4) in pixels of the input, scores (N,), labels (N,), deltas (N, 4).
      N is the variant's `roi_batch`. A slice on which no region is valid has N = 0, and module S reads zeros.

    Only module S and the scale and shift of every BatchNorm named ``bn*`` are trainable; all else, and every
    BatchNorm statistic, stays as in the segmenter it came from.

    Raises:
        InputError: images or targets of another kind; says which and what to do.
        ConfigError: the model is not in float32.
    """

    def __init__(self, variant: Variant, config: ModelConfig) -> None:
        super().__init__(variant, config)
        if variant.roi_batch is None or variant.hidden is None:
            raise ValueError(f"{variant.name} is not a classifier")
        self.module_s = ModuleS(variant.roi_batch, variant.hidden, config.image_classes)
        for name, parameter in self.named_parameters():
            normalises = name.startswith("backbone.body.") and "bn" in name
            parameter.requires_grad_(normalises or name.startswith("module_s."))

    def train(self, mode: bool = True) -> COVIDCTMaskNet:
        """Training mode for module S alone; the detector never leaves evaluation behaviour."""
        super().train(mode)
        for module in (self.transform, self.backbone, self.rpn, self.roi_heads):
            module.eval()
        return self

    @property
    def temperature(self) -> float:
        """By what logits are divided before the softmax: fitted for these weights (`metadata`), else 1."""
        return float(self.metadata.get("temperature", 1.0))

    def forward(self, images: Sequence[Tensor], targets: list[dict[str, Any]] | None = None) -> Any:
        if self.training and targets is None:
            raise InputError("training needs targets: a list of dicts with image_label, one per image")
        require_float32(self)
        images = checked_images(images)
        batch, _ = self.transform(images)
        features = self.backbone(batch.tensors)
        proposals, _ = self.rpn(batch, features)
        regions = self.roi_heads.regions(features, proposals, batch.image_sizes)
        if self.training and targets is not None:
            logits = [self.read(r, random=True)[0] for r in regions]
            return {"loss_image": image_loss(torch.stack(logits), targets)}
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        return [self.classify(*one) for one in zip(regions, batch.image_sizes, sizes, strict=True)]

    def read(self, regions: Regions, *, random: bool = False) -> tuple[Tensor, Regions]:
        """Module S's (K,) logits for the ranked regions of an image, and those that stand in its RoI batch."""
        matrix, batch = fill_batch(regions, self.module_s.slots, replicate=self.config.replicate, random=random)
        return self.module_s(matrix[None])[0], batch

    def classify(self, regions: Regions, resized: tuple[int, int], size: tuple[int, int]) -> dict[str, Tensor]:
        """The result of evaluation mode, from ranked regions; `resized` and `size` are (height, width) of the image."""
        logits, batch = self.read(regions)
        return {
            "logits": logits,
            "probabilities": (logits / self.temperature).softmax(-1),
            "boxes": rescale(batch.boxes, resized, size),
            "scores": batch.scores,
            "labels": batch.labels,
            "deltas": batch.deltas,
        }


def image_loss(logits: Tensor, targets: list[dict[str, Any]]) -> Tensor:
    """Binary cross-entropy of (B, K) logits with the one-hot `image_label` of each target (paper, released code)."""
    labels = torch.as_tensor([int(target["image_label"]) for target in targets], device=logits.device)
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise InputError(f"image_label {labels.tolist()}: must lie in 0..{logits.shape[1] - 1}")
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, logits.shape[1]).to(logits))


def replication_counts(valid: int, slots: int, *, random: bool = False) -> Tensor:
    """How often each of `valid` ranked predictions stands in a batch of `slots`.

    Deterministic: every rank floor(slots / valid) times, the first ``slots mod valid`` once more ([3, 1, 2] in five
    slots is [3, 3, 1, 1, 2]). Random: the missing copies are drawn with replacement, every rank stands at least once
    ([3, 3, 1, 2, 2] is one outcome). (valid,) int64, at least 1 each, summing to `slots`.
    """
    if random:
        drawn = torch.randint(valid, (slots - valid,))
        return 1 + torch.bincount(drawn, minlength=valid)
    counts = torch.full((valid,), slots // valid)
    counts[: slots % valid] += 1
    return counts


def fill_batch(regions: Regions, slots: int, *, replicate: bool, random: bool) -> tuple[Tensor, Regions]:
    """The (slots, 5) matrix [score, dx, dy, dw, dh] module S reads, and the regions that stand in it.

    With `replicate` the regions are repeated until the slots are full. Without it, and for a slice that has no valid
    region at all, the free slots at the end are zeros (score 0, no shift), and the regions are only those found.
    """
    found = min(len(regions.scores), slots)
    rows = torch.arange(found)
    if replicate and found:
        rows = rows.repeat_interleave(replication_counts(found, slots, random=random))
    batch = regions[rows.to(regions.scores.device, non_blocking=True)]
    matrix = torch.cat([batch.scores[:, None], batch.deltas], dim=1)
    return F.pad(matrix, (0, 0, 0, slots - len(matrix))), batch
