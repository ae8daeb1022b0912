"""The phantom: a chest slice whose lesions are known exactly."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from phantom import Phantom, main, phantom
from PIL import Image
from torchvision.ops import masks_to_boxes

from ctmasknet.data.datasets import open_dataset
from ctmasknet.data.scans import open_volume
from ctmasknet.errors import ConfigError
from ctmasknet.example import example_slice

EIGHT = np.ones((3, 3), int)


@cache
def made(seed: int = 0, lesions: int = 4, size: int = 256) -> Phantom:
    return phantom(seed, lesions=lesions, size=size)


def median_hu(slice_: Phantom, where: np.ndarray) -> float:
    return float(np.median(slice_.hu[where]))


def test_seed_and_size_fix_every_pixel() -> None:
    again = phantom(0, lesions=4, size=256)
    for field in dataclasses.fields(Phantom):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(made(), field.name))
    assert (made(1).hu != made(0).hu).mean() > 0.5


def test_default_is_a_512_slice_with_four_lesions_of_both_classes() -> None:
    default = phantom()
    assert default.hu.shape == default.lungs.shape == (512, 512)
    assert default.hu.dtype == np.int16
    assert default.lungs.dtype == default.masks.dtype == bool
    assert default.masks.shape == (4, 512, 512)
    assert default.labels.dtype == np.int64
    assert set(default.labels.tolist()) == {1, 2}


def test_the_result_cannot_be_reassigned() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        made().hu = np.zeros((1, 1), np.int16)  # type: ignore[misc]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("lesions", range(9))
def test_places_exactly_the_lesions_asked_for_as_separate_components(seed: int, lesions: int) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    one = made(seed, lesions)
    assert one.masks.shape == (lesions, 256, 256)
    assert one.labels.shape == (lesions,)
    labelled, count = ndimage.label(one.masks.any(0), EIGHT)
    assert count == lesions
    for mask in one.masks:
        (component,) = np.unique(labelled[mask])
        np.testing.assert_array_equal(mask, labelled == component)
        assert mask.sum() > 100


@pytest.mark.parametrize("size", [256, 384, 512])
def test_lesions_are_disjoint_large_enough_and_inside_the_lungs(size: int) -> None:
    one = made(3, 8, size)
    assert one.hu.shape == (size, size)
    assert one.masks.sum(0).max() == 1
    assert one.masks.sum((1, 2)).min() > 100
    assert not (one.masks & ~one.lungs).any()


@pytest.mark.parametrize("size", [128, 129, 200])
def test_small_and_odd_sizes_still_hold_every_lesion(size: int) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    one = made(0, 8, size)
    assert one.hu.shape == (size, size)
    assert ndimage.label(one.masks.any(0), EIGHT)[1] == 8


def test_a_seed_shows_the_same_body_at_every_size() -> None:
    small, large = made(5, 0, 256), made(5, 0, 512)
    reduced = large.lungs[::2, ::2]
    dice = 2 * (small.lungs & reduced).sum() / (small.lungs.sum() + reduced.sum())
    assert dice > 0.97


def test_lesions_change_the_slice_only_about_themselves() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    healthy, ill = made(2, 0, 512), made(2, 4, 512)
    np.testing.assert_array_equal(healthy.lungs, ill.lungs)
    changed = np.abs(healthy.hu.astype(int) - ill.hu) > 5
    assert not (changed & ~ndimage.binary_dilation(ill.masks.any(0), EIGHT, iterations=10)).any()
    assert changed[ill.masks.any(0)].mean() > 0.8


@pytest.mark.parametrize("seed", range(4))
def test_tissues_have_their_attenuation(seed: int) -> None:
    one = made(seed, 5, 512)
    lung = median_hu(one, one.lungs & ~one.masks.any(0))
    assert -900 < lung < -800
    for mask, label in zip(one.masks, one.labels, strict=True):
        if label == 1:
            assert -700 < median_hu(one, mask) < -400
            assert median_hu(one, mask) > lung + 150
        else:
            assert -110 < median_hu(one, mask) < 50
    assert np.median(one.hu[:20]) < -1000  # air above the patient
    assert one.hu.min() >= -1024
    soft = (one.hu > -20) & (one.hu < 120) & ~one.lungs
    assert soft.mean() > 0.1  # muscle, heart
    assert (one.hu > 400).sum() > 500  # cortical bone


def test_lungs_are_two_and_about_a_fifth_of_the_slice() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    for seed in range(4):
        labelled, count = ndimage.label(made(seed).lungs, EIGHT)
        areas = np.bincount(labelled.ravel())[1:]
        assert count == 2
        assert areas.min() > 0.3 * areas.sum()
        assert 0.12 < made(seed).lungs.mean() < 0.35


def test_a_healthy_slice_has_empty_annotations() -> None:
    healthy = made(0, 0)
    assert healthy.masks.shape == (0, 256, 256)
    assert healthy.boxes.shape == (0, 4)
    assert healthy.boxes.dtype == np.float32
    assert healthy.labels.shape == (0,)
    np.testing.assert_array_equal(healthy.class_mask(), healthy.lungs)


@pytest.mark.parametrize("seed", [0, 7])
def test_boxes_are_half_open(seed: int) -> None:
    one = made(seed)
    inclusive = masks_to_boxes(torch.from_numpy(one.masks)).numpy()
    assert one.boxes.dtype == np.float32
    np.testing.assert_array_equal(one.boxes, inclusive + np.array([0, 0, 1, 1]))


def test_class_mask_has_the_cncb_coding() -> None:
    one = made(1, 6)
    coded = one.class_mask()
    ggo, consolidation = (one.masks[one.labels == label].any(0) for label in (1, 2))
    assert coded.dtype == np.uint8
    np.testing.assert_array_equal(coded == 2, ggo)
    np.testing.assert_array_equal(coded == 3, consolidation)
    np.testing.assert_array_equal(coded == 1, one.lungs & ~ggo & ~consolidation)
    np.testing.assert_array_equal(coded == 0, ~one.lungs)


def test_image_is_the_lung_window() -> None:
    one = made()
    expected = np.clip((one.hu.astype(float) + 1350) / 1500, 0, 1) * 255
    assert one.image.dtype == np.uint8
    np.testing.assert_allclose(one.image, expected, atol=0.51)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ({"lesions": -1}, "lesions=-1"),
        ({"lesions": 9}, "lesions=9"),
        ({"lesions": 2.0}, "lesions=2.0"),
        ({"size": 127}, "size=127"),
        ({"size": "512"}, "size='512'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
    ],
)
def test_impossible_arguments_are_named(arguments: dict, culprit: str) -> None:
    with pytest.raises(ConfigError, match=culprit):
        phantom(**arguments)


# --- what the tool writes -------------------------------------------------------------------------------------------


def test_the_example_slice_of_the_package_is_the_phantom_of_seed_0() -> None:
    found, drawn = example_slice(), phantom()
    np.testing.assert_array_equal(found.image, drawn.image)
    np.testing.assert_array_equal(found.masks, drawn.masks)
    np.testing.assert_array_equal(found.labels, drawn.labels)


def test_lesion_folders_hold_slices_and_class_masks(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--slices", "3", "--first", "2", "--size", "256"]) == 0
    data = open_dataset("segmentation", tmp_path)
    assert data.names == [f"2_patient{seed}_1_1" for seed in (2, 3, 4)]
    assert data.patients == ["patient2", "patient3", "patient4"]
    for seed, sample in zip((2, 3, 4), data, strict=True):
        drawn = phantom(seed, lesions=seed % 4, size=256)
        np.testing.assert_array_equal(sample.image.squeeze(), drawn.image)
        np.testing.assert_array_equal(sample.target["masks"].any(0), drawn.masks.any(0))


def test_class_folders_hold_slices_of_a_patient_per_class(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--slices", "2", "--layout", "classes", "--first", "7", "--size", "128"]
    assert main(arguments) == 0
    data = open_dataset("classification", tmp_path)
    assert [(data.patients[index], data.labels_of(index)) for index in range(0, 6, 2)] == [
        ("control/control7", [0]),
        ("covid/covid7", [2]),
        ("pneumonia/pneumonia7", [1]),
    ]
    pixels = np.asarray(Image.open(tmp_path / "covid" / "covid7" / "1.png"))
    np.testing.assert_array_equal(pixels, phantom(28, lesions=4, size=128).image)


def test_a_scan_is_written_as_nifti_and_as_a_dicom_series(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    pytest.importorskip("pydicom")
    assert main(["--out", str(tmp_path), "--slices", "3", "--layout", "scan", "--size", "128"]) == 0
    planes = [phantom(0, lesions=count, size=128) for count in range(3)]
    stored = np.asarray(nibabel.load(tmp_path / "scan.nii.gz").dataobj)
    np.testing.assert_array_equal(stored.transpose(2, 1, 0), [plane.hu for plane in planes])
    for source in ("scan.nii.gz", "series"):
        scan = open_volume(tmp_path / source)
        assert scan.spacing == pytest.approx((380 / 128, 380 / 128, 5))
        assert len(scan.names) == 3
        assert not scan.problems


def test_what_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["--out", str(tmp_path / "file"), "--slices", "1", "--size", "128"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--size", "5"]) == 2
    assert "size=5 is not possible" in capsys.readouterr().err
