"""RoIAlign on all threads of a CPU, forward and backward; torchvision's runs on one (read in 0.29).

Every bin is a weighted sum of feature rows, the four cells around each of its samples, and `embedding_bag` computes
such sums; the transpose, a weighted sum of bins for every cell, is the gradient. Values and gradients are
torchvision's up to rounding (`tests/test_roi_align.py`). On other devices torchvision's operator is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import MultiScaleRoIAlign, roi_align

from ctmasknet.registry import Variant

_CANONICAL_SIZE, _CANONICAL_LEVEL = 224.0, 4  # of the FPN paper, as in torchvision's MultiScaleRoIAlign
_AT_ONCE = 512  # boxes, to bound the memory


def pool(
    features: list[Tensor], boxes: list[Tensor], scales: list[float], side: int, samples: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """RoIAlign (not aligned, as torchvision's Mask R-CNN has it) of every box, a part of the boxes at a time.

    Args:
        features: (B, C, H, W) per level, finest first.
        boxes: (N, 4) per image, in pixels of the resized image.
        scales: see `feature_scales`.
        side: bins per axis.
        samples: sampling points per bin and axis.

    Yields:
        Which boxes, (R,) of all images' boxes in a row, and what is pooled in them: (R, side * side, C).
    """
    device = features[0].device
    image = torch.cat([torch.full((len(b),), i, device=device) for i, b in enumerate(boxes)])
    every = torch.cat(boxes)
    if device.type != "cpu":
        yield torch.arange(len(every)), _pool_by_torchvision(features, every, image, scales, side, samples)
        return
    plan = _Plan.of(features, every, image, scales, side, samples)
    table = _table(features)
    for start in range(0, len(every), _AT_ONCE):
        part = torch.arange(start, min(start + _AT_ONCE, len(every)))
        cells, weights = plan.samples(part)
        bins = F.embedding_bag(cells, table, per_sample_weights=weights, mode="sum")
        yield part, bins.view(len(part), side * side, -1)


def feature_scales(variant: Variant) -> list[float]:
    """Cells per pixel of each level of the pyramid, finest first."""
    # Levels double the stride; the registry names the coarsest one's.
    return [2 ** (variant.levels - 1 - level) / variant.stride for level in range(variant.levels)]


class CPURoIAlign(nn.Module):
    """Stands in for a `MultiScaleRoIAlign` on a CPU, in training.

    Args:
        replaced: what it stands in for; levels, bins and samples are taken from it.
        scales: see `feature_scales`.
    """

    def __init__(self, replaced: MultiScaleRoIAlign, scales: list[float]) -> None:
        super().__init__()
        self.featmap_names = replaced.featmap_names
        self.output_size = replaced.output_size
        self.sampling_ratio = replaced.sampling_ratio
        self.scales = scales

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """As `MultiScaleRoIAlign`: (R, C, side, side), channels-last in memory."""
        features = [x[name] for name in self.featmap_names]
        image = torch.cat([torch.full((len(b),), i) for i, b in enumerate(boxes)])
        side = self.output_size[0]
        every = torch.cat(boxes).detach()
        plan = _Plan.of(features, every, image, self.scales, side, self.sampling_ratio)
        bins = _WeightedRows.apply(_table(features), *plan.samples(torch.arange(len(every))))
        return bins.view(len(every), side, side, bins.shape[1]).permute(0, 3, 1, 2)


class _WeightedRows(torch.autograd.Function):
    """Rows of a (T, C) table, summed with weights: cells (N, S) int64, weights (N, S) -> (N, C)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(cells, weights)
        ctx.rows = len(table)
        return F.embedding_bag(cells, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cells, weights = ctx.saved_tensors
        if len(cells) == 0:
            return gradient.new_zeros(ctx.rows, gradient.shape[1]), None, None
        by_cell, order = cells.flatten().sort()
        starts = torch.searchsorted(by_cell, torch.arange(ctx.rows))
        bins = order.div(cells.shape[1], rounding_mode="floor")
        table = F.embedding_bag(
            bins, gradient.contiguous(), starts, per_sample_weights=weights.flatten()[order], mode="sum"
        )
        return table, None, None


@dataclass
class _Plan:
    """Which cells the bins of R boxes read, and how much of each."""

    first: Tensor  # (R,) row of the table where the box's feature map begins
    widths: Tensor  # (R,) of that map
    rows: tuple[Tensor, Tensor]  # see _axis
    columns: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls, features: list[Tensor], boxes: Tensor, image: Tensor, scales: list[float], side: int, samples: int
    ) -> _Plan:
        level = _levels(boxes, scales)
        heights = torch.tensor([f.shape[2] for f in features])[level]
        widths = torch.tensor([f.shape[3] for f in features])[level]
        sizes = [f.shape[0] * f.shape[2] * f.shape[3] for f in features]
        first = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])[level] + image * heights * widths
        scale = torch.tensor(scales)[level]
        rows = _axis(boxes[:, 1] * scale, boxes[:, 3] * scale, heights, side, samples)
        columns = _axis(boxes[:, 0] * scale, boxes[:, 2] * scale, widths, side, samples)
        return cls(first, widths, rows, columns)

    def samples(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """(R * side * side, 4 * samples ** 2) cells and weights of some boxes."""
        (y, y_weight), (x, x_weight) = ((index[part], weight[part]) for index, weight in (self.rows, self.columns))
        y = self.first[part, None, None] + y * self.widths[part, None, None]
        cells = y[:, :, None, :, None] + x[:, None, :, None, :]
        weights = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
        return cells.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)


def _table(features: list[Tensor]) -> Tensor:
    """Every cell of every level and image as a row: (cells, C)."""
    return torch.cat([f.permute(0, 2, 3, 1).reshape(-1, f.shape[1]) for f in features])


def _levels(boxes: Tensor, scales: list[float]) -> Tensor:
    """The FPN level of each box, by its size (FPN paper, equation 1)."""
    if len(scales) == 1:
        return torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    finest = -torch.tensor(scales[0]).log2().item()
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = torch.floor(_CANONICAL_LEVEL + torch.log2(sides / _CANONICAL_SIZE) + 1e-6)
    return level.clamp(finest, finest + len(scales) - 1).to(torch.int64) - int(finest)


def _axis(start: Tensor, end: Tensor, cells: Tensor, side: int, samples: int) -> tuple[Tensor, Tensor]:
    """Along one axis: the cells each bin reads, (R, side, 2 * samples), and their weights; they average the samples.

    Boxes reach from `start` to `end`, (R,) in cells, on an axis of so many cells, (R,).
    """
    step = (end - start).clamp(min=1.0) / side
    offsets = (torch.arange(side * samples) + 0.5) / samples
    at = start[:, None] + step[:, None] * offsets
    last = (cells - 1)[:, None]
    outside = (at < -1) | (at > cells[:, None])
    at = at.clamp(min=0)
    low = torch.minimum(at.to(torch.int64), last)
    high = torch.minimum(low + 1, last)
    fraction = torch.where(low == last, torch.zeros_like(at), at - low)
    weight = torch.stack([1 - fraction, fraction], dim=-1) / samples
    weight = weight.masked_fill(outside[..., None], 0.0)
    index = torch.stack([low, high], dim=-1)
    shape = len(start), side, 2 * samples
    return index.view(shape), weight.view(shape)


def _pool_by_torchvision(
    features: list[Tensor], boxes: Tensor, image: Tensor, scales: list[float], side: int, samples: int
) -> Tensor:
    rois = torch.cat([image[:, None].to(boxes), boxes], dim=1)
    if len(scales) == 1:
        return roi_align(features[0], rois, side, scales[0], samples).flatten(2).transpose(1, 2)
    level = _levels(boxes, scales)
    pooled = boxes.new_zeros(len(boxes), features[0].shape[1], side, side)
    for number, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        rows = (level == number).nonzero().squeeze(1)
        pooled[rows] = roi_align(feature, rois[rows], side, scale, samples)
    return pooled.flatten(2).transpose(1, 2)
