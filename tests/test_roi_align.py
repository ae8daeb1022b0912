"""RoIAlign on the CPU gives torchvision's values and gradients."""

from __future__ import annotations

import pytest
import torch
from rois import awkward_boxes
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from ctmasknet.models import inference as ours
from ctmasknet.models.inference import CPURoIAlign, pool
from ctmasknet.registry import VARIANTS

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def pyramid() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {str(i): torch.rand(2, 5, 128 >> i, 96 >> i, generator=generator) for i in range(4)}


def pooled(features: list[Tensor], made: list[Tensor], scales: list[float], side: int) -> Tensor:
    found = list(pool(features, made, scales, MultiScaleRoIAlign(["0"], side, 2)))
    rows = list(range(sum(len(b) for b in made)))
    assert [row for part, _ in found for row in rows[part]] == rows
    return torch.cat([rows for _, rows in found])


@pytest.mark.parametrize("side", [7, 14])
@pytest.mark.parametrize("at_once", [16, 512])
def test_one_level_is_torchvisions_roi_align(side, at_once, monkeypatch):
    monkeypatch.setitem(ours._AT_ONCE, "cpu", at_once)
    feature = torch.rand(2, 6, 16, 20)
    made = [awkward_boxes(40, 300.0), awkward_boxes(25, 300.0)]
    rois = torch.cat([torch.cat([torch.full((len(b), 1), float(i)), b], 1) for i, b in enumerate(made)])
    expected = roi_align(feature, rois, side, 1 / 16, 2)
    found = pooled([feature], made, [1 / 16], side)
    assert_close(found, expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_several_levels_are_torchvisions_multi_scale_roi_align():
    features, made = pyramid(), [awkward_boxes(60, 500.0).clamp(min=0), awkward_boxes(30, 500.0).clamp(min=0)]
    expected = MultiScaleRoIAlign(list(features), 7, 2)(features, made, [(512, 384), (500, 380)])
    found = pooled(list(features.values()), made, SCALES, 7)
    assert_close(found, expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_levels_are_torchvisions():
    made = awkward_boxes(200, 900.0)[3:]
    assert torch.equal(ours.fpn_levels(made, SCALES), LevelMapper(2, 5)([made]))


@pytest.mark.parametrize("side", [7, 14])
def test_gradients_are_torchvisions(side):
    plain = MultiScaleRoIAlign(["0", "1", "2", "3"], side, 2)
    made, shapes = (
        [awkward_boxes(60, 500.0).clamp(min=0), awkward_boxes(30, 500.0, seed=5).clamp(min=0)],
        [(512, 384), (512, 384)],
    )
    results = []
    for module in (plain, CPURoIAlign(plain, SCALES)):
        features = {name: value.requires_grad_() for name, value in pyramid().items()}
        found = module(features, made, shapes)
        weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(4))
        (found * weights).sum().backward()
        results.append((found.detach(), *(features[name].grad for name in features)))
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert all(gradient.abs().sum() > 0 for gradient in results[1][1:])


def test_no_box_at_all_is_no_row_and_no_gradient():
    plain = MultiScaleRoIAlign(["0"], 7, 2)
    feature = torch.rand(1, 4, 8, 8, requires_grad=True)
    found = CPURoIAlign(plain, [1 / 16])({"0": feature}, [torch.zeros(0, 4)], [(128, 128)])
    assert found.shape == (0, 4, 7, 7)
    found.sum().backward()
    assert torch.equal(feature.grad, torch.zeros_like(feature))


@pytest.mark.parametrize(
    "name", ["maskrcnn_resnet18_t1", "maskrcnn_resnet18_t2", "maskrcnn_resnet18", "maskrcnn_resnet50"]
)
def test_scales_are_those_torchvision_infers(name):
    variant = VARIANTS[name]
    sides = [int(512 * scale) for scale in ours.feature_scales(variant)]
    plain = MultiScaleRoIAlign([str(i) for i in range(len(sides))], 7, 2)
    features = {str(i): torch.zeros(1, 1, side, side) for i, side in enumerate(sides)}
    plain(features, [torch.tensor([[0.0, 0.0, 9.0, 9.0]])], [(512, 512)])
    assert plain.scales == ours.feature_scales(variant)
