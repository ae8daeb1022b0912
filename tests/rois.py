"""Boxes for the tests of what happens inside them."""

from __future__ import annotations

import torch
from torch import Tensor


def awkward_boxes(count: int, extent: float, seed: int = 2) -> Tensor:
    """(count, 4) xyxy: small and large ones at random, two empty, one far outside of (0, extent)."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * extent
    size = torch.rand(count, 2, generator=generator) ** 3 * extent
    made = torch.cat([corner, corner + size], dim=1)
    made[0] = 0.0
    made[1, 2:] = made[1, :2]
    made[2] = torch.tensor([-40.0, -40.0, extent * 3, extent * 3])
    return made
