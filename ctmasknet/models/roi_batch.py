"""The classifier's RoI batch: the best regions of a slice, in rank order, in a fixed number of slots.

Paper section 3, item 2: valid predictions fill missing slots *maintaining their ranking order*, so that each copy
stands beside its original.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctmasknet.models.detector import Regions


def replication_counts(valid: int, slots: int, *, random: bool = False) -> Tensor:
    """How often each of `valid` ranked predictions stands in a batch of `slots`.

    Deterministic: every rank floor(slots / valid) times, the first ``slots mod valid`` once more ([3, 1, 2] in five
    slots is [3, 3, 1, 1, 2]). Random: the missing copies are drawn with replacement, every rank stands at least once
    ([3, 3, 1, 2, 2] is one outcome).

    Args:
        valid: 1..slots.

    Returns:
        (valid,) int64, at least 1 each, summing to `slots`.
    """
    if not 1 <= valid <= slots:
        raise ValueError(f"{valid} predictions do not fit {slots} slots")
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
    rows = torch.arange(found, device=regions.scores.device)
    if replicate and found:
        counts = replication_counts(found, slots, random=random)
        rows = rows.repeat_interleave(counts.to(rows.device))
    batch = Regions(regions.boxes[rows], regions.scores[rows], regions.labels[rows], regions.deltas[rows])
    matrix = torch.cat([batch.scores[:, None], batch.deltas], dim=1)
    padding = matrix.new_zeros(slots - len(matrix), 5)
    return torch.cat([matrix, padding]), batch
