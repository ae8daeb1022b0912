"""Instances from class masks, against torchvision, masks made by hand and the truth of the phantom."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from phantom import phantom

from ctmasknet.data.layouts import half_open_boxes, instances, lesion_class_names
from ctmasknet.errors import MissingExtraError

MIXED = np.array(
    [
        [1, 2, 2, 0, 0, 0, 3],
        [1, 2, 3, 0, 0, 3, 0],
        [1, 0, 3, 0, 0, 0, 0],
        [1, 0, 0, 0, 2, 0, 0],
    ],
    dtype=np.uint8,
)


def test_merge_joins_ground_glass_and_consolidation_before_it_takes_components():
    target = instances(MIXED, classes="merge", min_area=0)
    assert target["boxes"].tolist() == [[1, 0, 3, 3], [5, 0, 7, 2], [4, 3, 5, 4]]
    assert target["labels"].tolist() == [1, 1, 1]
    assert target["masks"].sum(dim=(1, 2)).tolist() == [5, 2, 1]


def test_both_labels_by_pixel_value():
    target = instances(MIXED, classes="both", min_area=0)
    assert target["labels"].tolist() == [1, 1, 2, 2]
    assert target["boxes"].tolist() == [[1, 0, 3, 2], [4, 3, 5, 4], [5, 0, 7, 2], [2, 1, 3, 3]]


def test_consolidation_alone_keeps_its_own_label():
    only = np.where(MIXED == 3, MIXED, 0)
    assert instances(only, classes="both", min_area=0)["labels"].tolist() == [2, 2]


def test_ggo_ignores_consolidation():
    target = instances(MIXED, classes="ggo", min_area=0)
    assert target["labels"].tolist() == [1, 1]
    assert target["masks"].sum().item() == (MIXED == 2).sum()


def test_diagonal_neighbours_are_one_instance():
    assert len(instances(2 * np.eye(5, dtype=np.uint8), min_area=0)["labels"]) == 1


@pytest.mark.parametrize(("pixels", "found"), [(100, 0), (101, 1)])
def test_components_of_a_hundred_pixels_join_the_background(pixels: int, found: int):
    mask = np.zeros((12, 12), dtype=np.uint8)
    mask.ravel()[:pixels] = 2
    assert len(instances(mask)["labels"]) == found


@pytest.mark.parametrize("value", [0, 1])
def test_a_slice_without_lesions_has_empty_tensors_of_the_right_shape(value: int):
    target = instances(np.full((8, 9), value, dtype=np.uint8))
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["masks"].shape == (0, 8, 9)
    assert (target["boxes"].dtype, target["labels"].dtype) == (torch.float32, torch.int64)
    assert target["masks"].dtype == torch.uint8


def test_a_lesion_one_pixel_wide_has_a_width():
    mask = np.zeros((6, 6), dtype=np.uint8)
    mask[1:4, 2] = 3
    assert instances(mask, min_area=0)["boxes"].tolist() == [[2, 1, 3, 4]]


def test_boxes_hold_the_first_and_the_last_pixel():
    masks = torch.rand((20, 17, 23), generator=torch.Generator().manual_seed(0)) > 0.98
    masks = masks[masks.flatten(1).any(dim=1)]
    places = [np.argwhere(mask) for mask in masks.numpy()]
    expected = [[*place.min(0)[::-1], *place.max(0)[::-1] + 1] for place in places]
    for dtype in (torch.bool, torch.uint8):
        assert half_open_boxes(masks.to(dtype)).tolist() == expected


def test_a_phantoms_lesions_are_found_again():
    truth = phantom(3, lesions=5)
    target = instances(truth.class_mask(), classes="both")
    order = sorted(range(5), key=lambda i: (truth.labels[i], np.flatnonzero(truth.masks[i])[0]))
    assert target["labels"].tolist() == truth.labels[order].tolist()
    assert np.array_equal(target["masks"].numpy().astype(bool), truth.masks[order])
    assert np.array_equal(target["boxes"].numpy(), truth.boxes[order])


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(MissingExtraError, match=r"ctmasknet\[train\]"):
        instances(MIXED)
    assert len(instances(np.where(MIXED > 1, 0, MIXED))["labels"]) == 0  # no lesion, no need of it


def test_class_names_follow_the_labels():
    assert lesion_class_names("merge") == ("background", "lesion")
    assert lesion_class_names("both") == ("background", "GGO", "consolidation")
    assert lesion_class_names("ggo") == ("background", "GGO")
