"""Comparisons that no rounding upsets: it differs between processors and numbers of threads, and exchanges ranks of
detections of nearly the same score. Detections are compared by what they are, not by their rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def matches(expected: Mapping[str, Any], found: Mapping[str, Any], *, box: float, score: float) -> list[int | None]:
    """For each expected detection the number of the nearest found one, each used once; None without one.

    Args:
        expected, found: boxes (N, 4), scores (N,), labels (N,); arrays or tensors.
        box, score: largest difference, in pixels and as a score.
    """
    (b1, s1, l1), (b2, s2, l2) = (
        [torch.as_tensor(result[key]) for key in ("boxes", "scores", "labels")] for result in (expected, found)
    )
    far = (b1[:, None] - b2).abs().amax(-1) / box
    cost: Tensor = torch.maximum(far, (s1[:, None] - s2).abs() / score)
    cost[l1[:, None] != l2] = torch.inf
    pairs: list[int | None] = [None] * len(b1)
    taken = torch.zeros(len(b2), dtype=torch.bool)
    for value, place in zip(*cost.flatten().sort(), strict=True):
        row, column = divmod(int(place), len(b2))
        if value > 1:
            break
        if pairs[row] is None and not taken[column]:
            pairs[row], taken[column] = column, True
    return pairs


def assert_same_detections(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    box: float = 0.05,
    score: float = 1e-3,
    last: float = 0.0,
    allowed: int = 0,
) -> list[tuple[int, int]]:
    """Every detection of either has its match in the other, but for those at the verge of the last place.

    Args:
        last: where only so many detections are kept, or those above a threshold, those at most so far above the
            lowest score may be missing on one side.
        allowed: so many more may be missing on either side: two boxes whose overlap is the NMS threshold up to
            rounding are kept or dropped by chance, which random weights bring about.

    Returns:
        The pairs, (number in `expected`, number in `found`).
    """
    pairs = matches(expected, found, box=box, score=score)
    scores = {name: torch.as_tensor(result["scores"]) for name, result in (("expected", expected), ("found", found))}
    lowest = max([float(s.min()) for s in scores.values() if len(s)], default=0.0)
    alone = {
        "expected": [row for row, pair in enumerate(pairs) if pair is None],
        "found": sorted(set(range(len(scores["found"]))) - set(pairs)),
    }
    for name, rows in alone.items():
        lonely = [(row, float(scores[name][row])) for row in rows if scores[name][row] > lowest + last]
        assert len(lonely) <= allowed, f"{name} detections (number, score) without a match: {lonely[:5]}"
    return [(row, pair) for row, pair in enumerate(pairs) if pair is not None]


def logits_up_to_ties(classifier: Any, result: Mapping[str, Tensor], *, gap: float = 2e-5) -> list[Tensor]:
    """A classifier's logits for a slice, and those it would give were two neighbours of nearly the same score swapped.

    Module S reads RoIs in rank order, so that which of two equals comes first changes its logits, by 0.03 in the
    recorded ones.

    Args:
        result: of a slice whose RoIs fill the batch without copies.
    """
    batch = torch.cat([result["scores"][:, None], result["deltas"]], dim=1)
    batches = [batch]
    for row in (batch[:-1, 0] - batch[1:, 0] < gap).nonzero().flatten().tolist():
        order = torch.arange(len(batch))
        order[row], order[row + 1] = row + 1, row
        batches.append(batch[order])
    with torch.inference_mode():
        return list(classifier.module_s(torch.stack(batches)))
