"""The classifier's RoI batch: rank order kept, slots filled, random only in training."""

from __future__ import annotations

import pytest
import torch

from ctmasknet.models.classifier import fill_batch, replication_counts
from ctmasknet.models.detector import Regions


def regions(scores: list[float]) -> Regions:
    n = len(scores)
    values = torch.tensor(scores)
    rows = torch.arange(n, dtype=torch.float32)
    return Regions(rows[:, None].expand(n, 4), values, torch.ones(n, dtype=torch.int64), rows[:, None].repeat(1, 4))


def test_three_predictions_in_five_slots():
    ranked = torch.tensor([3, 1, 2])
    assert ranked.repeat_interleave(replication_counts(3, 5)).tolist() == [3, 3, 1, 1, 2]


def test_the_papers_example_is_a_possible_draw_of_training():
    torch.manual_seed(0)
    ranked = torch.tensor([3, 1, 2])
    draws = {tuple(ranked.repeat_interleave(replication_counts(3, 5, random=True)).tolist()) for _ in range(200)}
    # Two copies over three ranks: six compositions, all of them drawn, nothing else.
    assert draws == {
        (3, 3, 3, 1, 2),
        (3, 1, 1, 1, 2),
        (3, 1, 2, 2, 2),
        (3, 3, 1, 1, 2),
        (3, 3, 1, 2, 2),
        (3, 1, 1, 2, 2),
    }


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize(
    ("valid", "slots"), [(1, 1), (1, 128), (5, 128), (64, 128), (100, 128), (127, 128), (128, 128)]
)
def test_every_rank_stands_at_least_once_and_all_slots_are_full(valid, slots, random):
    counts = replication_counts(valid, slots, random=random)
    assert counts.shape == (valid,)
    assert counts.sum() == slots
    assert counts.min() >= 1
    if not random:
        expected = [slots // valid + (rank < slots % valid) for rank in range(valid)]
        assert counts.tolist() == expected


def test_the_matrix_is_score_and_deltas_in_rank_order():
    matrix, batch = fill_batch(regions([0.9, 0.5, 0.1]), 5, replicate=True, random=False)
    expected = [[0.9, 0, 0, 0, 0], [0.9, 0, 0, 0, 0], [0.5, 1, 1, 1, 1], [0.5, 1, 1, 1, 1], [0.1, 2, 2, 2, 2]]
    torch.testing.assert_close(matrix, torch.tensor(expected))
    assert batch.boxes[:, 0].tolist() == [0, 0, 1, 1, 2]


def test_evaluation_is_deterministic_and_training_is_not():
    few = regions([0.9, 0.8, 0.7])
    evaluated = [fill_batch(few, 64, replicate=True, random=False)[0] for _ in range(3)]
    assert torch.equal(evaluated[0], evaluated[1])
    assert torch.equal(evaluated[0], evaluated[2])
    trained = [fill_batch(few, 64, replicate=True, random=True)[0] for _ in range(5)]
    assert any(not torch.equal(trained[0], other) for other in trained[1:])


def test_without_replication_free_slots_are_zero():
    matrix, batch = fill_batch(regions([0.9, 0.5]), 4, replicate=False, random=False)
    assert matrix[2:].abs().sum() == 0
    assert len(batch.scores) == 2


@pytest.mark.parametrize("replicate", [True, False])
def test_no_region_at_all_is_zeros(replicate):
    matrix, batch = fill_batch(regions([]), 4, replicate=replicate, random=True)
    assert matrix.shape == (4, 5)
    assert matrix.abs().sum() == 0
    assert batch.boxes.shape == (0, 4)


def test_more_regions_than_slots_keep_the_best():
    matrix, batch = fill_batch(regions([0.9, 0.5, 0.1]), 2, replicate=True, random=True)
    torch.testing.assert_close(matrix[:, 0], torch.tensor([0.9, 0.5]))
    assert len(batch.scores) == 2
