"""Augmented slices stay consistent: image, masks and boxes move together, and the seed alone decides how."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from phantom import phantom
from torch import Tensor
from torchvision.ops import masks_to_boxes

from ctmasknet.data.augment import Augmentation, augment, sample_generator
from ctmasknet.errors import ConfigError

AMOUNTS = ("flip", "rotate", "translate", "shear", "brightness", "contrast", "gamma", "noise")
NONE = Augmentation(**dict.fromkeys(AMOUNTS, 0.0), scale=(1.0, 1.0), min_visible=0)


@pytest.fixture(scope="module")
def sample() -> tuple[Tensor, dict[str, Tensor]]:
    truth = phantom(1, lesions=5, size=256)
    target = {
        "boxes": torch.from_numpy(truth.boxes),
        "labels": torch.from_numpy(truth.labels),
        "masks": torch.from_numpy(truth.masks.astype(np.uint8)),
    }
    return torch.from_numpy(truth.image)[None], target


def discs(*centres: tuple[int, int], size: int = 101, radius: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    """White discs on black, with their masks, at (x, y)."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    masks = torch.stack([(x - cx) ** 2 + (y - cy) ** 2 <= radius**2 for cx, cy in centres])
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1
    labels = torch.arange(1, len(centres) + 1)
    image = masks.any(dim=0, keepdim=True).to(torch.uint8) * 255
    return image, {"boxes": boxes, "labels": labels, "masks": masks.to(torch.uint8)}


@pytest.mark.parametrize("seed", range(12))
def test_boxes_fit_the_moved_masks(sample, seed: int):
    image, target = augment(*sample, sample_generator(0, 0, seed))
    assert image.shape == sample[0].shape
    assert image.dtype == torch.uint8
    assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
    assert target["masks"].dtype == torch.uint8
    assert target["masks"].max() <= 1
    expected = masks_to_boxes(target["masks"])
    expected[:, 2:] += 1
    assert torch.equal(target["boxes"], expected)


@pytest.mark.parametrize("seed", range(12))
def test_masks_stay_on_what_they_mark(seed: int):
    image, target = discs((30, 40), (70, 35), (50, 75))
    strong = replace(NONE, flip=0.5, rotate=45, translate=0.05, scale=(0.8, 1.25), shear=10)
    moved, after = augment(image, target, sample_generator(seed, 0, 0), strong)
    white, marked = moved[0] > 127, after["masks"].any(dim=0)
    overlap = (white & marked).sum() / (white | marked).sum()
    assert overlap > 0.93  # bilinear and nearest differ on the rim


def test_labels_stay_with_their_masks():
    image, target = discs((20, 50), (80, 50))
    image, after = augment(image, target, sample_generator(0, 0, 0), replace(NONE, flip=1.0))
    assert after["labels"].tolist() == [1, 2]
    assert after["boxes"].tolist() == [[72, 42, 89, 59], [12, 42, 29, 59]]


def test_a_flip_is_torchs_and_twice_is_none(sample):
    flip = replace(NONE, flip=1.0)
    once = augment(*sample, sample_generator(0, 0, 0), flip)
    assert torch.equal(once[0], sample[0].flip(-1))
    assert torch.equal(once[1]["masks"], sample[1]["masks"].flip(-1))
    twice = augment(*once, sample_generator(0, 0, 1), flip)
    assert torch.equal(twice[0], sample[0])
    assert torch.equal(twice[1]["boxes"], sample[1]["boxes"])


def test_none_changes_nothing(sample):
    image, target = augment(*sample, sample_generator(0, 0, 0), NONE)
    assert torch.equal(image, sample[0])
    assert all(torch.equal(target[key], sample[1][key]) for key in sample[1])


def test_inputs_are_left_as_they_are(sample):
    before = sample[0].clone(), {key: value.clone() for key, value in sample[1].items()}
    augment(*sample, sample_generator(0, 0, 0))
    assert torch.equal(sample[0], before[0])
    assert all(torch.equal(sample[1][key], before[1][key]) for key in before[1])


def test_equal_seeds_give_equal_slices_and_others_others(sample):
    one, same, other = (augment(*sample, sample_generator(7, 2, index)) for index in (5, 5, 6))
    assert torch.equal(one[0], same[0])
    assert torch.equal(one[1]["masks"], same[1]["masks"])
    assert not torch.equal(one[0], other[0])


def test_the_global_random_state_is_neither_read_nor_changed(sample):
    torch.manual_seed(1)
    one = augment(*sample, sample_generator(0, 0, 3))[0]
    state = torch.get_rng_state()
    augment(*sample, sample_generator(0, 0, 4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(augment(*sample, sample_generator(0, 0, 3))[0], one)


def test_settings_do_not_shift_later_draws(sample):
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    augment(*sample, generators[0], NONE)
    augment(*sample, generators[1], Augmentation())
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_every_argument_of_the_sample_seed_matters():
    seeds = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)]
    assert len({sample_generator(*seed).initial_seed() for seed in seeds}) == 4


def test_instances_that_leave_the_image_are_dropped():
    image, target = discs((8, 50), (50, 50))
    for index in range(20):
        moved, after = augment(image, target, sample_generator(0, 0, index), replace(NONE, translate=0.5))
        visible = [(mask.sum() > 0).item() for mask in after["masks"]]
        assert all(visible)
        assert after["boxes"].min() >= 0 if len(after["boxes"]) else True
        assert (moved.max() > 0) == (len(after["labels"]) > 0)
        if len(after["labels"]) < 2:
            return
    pytest.fail("no draw moved a disc out of the image")


def test_instances_too_small_to_see_are_dropped():
    image, target = discs((30, 50), (70, 50), radius=2)  # 13 pixels each
    shrink = replace(NONE, scale=(0.5, 0.5), min_visible=8)
    assert len(augment(image, target, sample_generator(0, 0, 0), shrink)[1]["labels"]) == 0
    assert len(augment(image, target, sample_generator(0, 0, 0), replace(shrink, min_visible=1))[1]["labels"]) == 2


def test_overlapping_masks_move_as_disjoint_ones_do():
    image, target = discs((40, 50), (52, 50))  # they overlap
    settings = replace(NONE, rotate=30, scale=(0.9, 1.1))
    together = augment(image, target, sample_generator(0, 0, 2), settings)[1]["masks"]
    for index in range(2):
        alone = {key: value[index : index + 1] for key, value in target.items()}
        assert torch.equal(augment(image, alone, sample_generator(0, 0, 2), settings)[1]["masks"][0], together[index])


def test_disjoint_masks_move_together_as_one_by_one(sample):
    settings = replace(NONE, rotate=30, translate=0.05, shear=5)
    together = augment(*sample, sample_generator(0, 0, 2), settings)[1]["masks"]
    for index, mask in enumerate(together):
        alone = {key: value[index : index + 1] for key, value in sample[1].items()}
        assert torch.equal(augment(sample[0], alone, sample_generator(0, 0, 2), settings)[1]["masks"][0], mask)


def test_a_slice_without_lesions_is_augmented_too(sample):
    empty = {key: value[:0] for key, value in sample[1].items()}
    image, target = augment(sample[0], empty, sample_generator(0, 0, 0))
    assert not torch.equal(image, sample[0])
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 256, 256)


def test_a_classification_target_passes_through(sample):
    target = {"image_label": torch.tensor(2)}
    assert augment(sample[0], target, sample_generator(0, 0, 0))[1] is target


@pytest.mark.parametrize("name", ["brightness", "contrast", "gamma", "noise"])
def test_intensity_changes_leave_the_geometry(sample, name: str):
    image, target = augment(*sample, sample_generator(0, 0, 0), replace(NONE, **{name: 0.2}))
    assert not torch.equal(image, sample[0])
    assert torch.equal(target["masks"], sample[1]["masks"])


def test_floating_point_images_stay_in_range_and_agree_with_8_bits(sample):
    image = sample[0].float() / 255
    moved, _ = augment(image, sample[1], sample_generator(0, 0, 0))
    assert moved.dtype == torch.float32
    assert 0 <= moved.min() <= moved.max() <= 1
    bytes_, _ = augment(*sample, sample_generator(0, 0, 0))
    assert (bytes_.float() / 255 - moved).abs().max() <= 0.5 / 255 + 1e-6


def test_three_channels_stay_grey(sample):
    moved, _ = augment(sample[0].repeat(3, 1, 1), sample[1], sample_generator(0, 0, 0))
    assert torch.equal(moved[0], moved[1])
    assert torch.equal(moved[0], moved[2])


@pytest.mark.parametrize(
    "bad", [{"flip": 1.5}, {"rotate": -1}, {"scale": (0, 1)}, {"scale": (2, 1)}, {"noise": float("nan")}]
)
def test_impossible_settings_raise(bad: dict):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Augmentation(**bad)
