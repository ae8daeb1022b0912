"""The overlay changes what it should, leaves the rest of the slice alone, and copes with odd inputs."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ctmasknet.errors import ConfigError
from ctmasknet.overlay import Lesion, _enlarge, _place_labels, _scaled, _Style, montage
from ctmasknet.results import Prediction


def a_slice(height: int, width: int) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(height * width)
    return (0.25 + 0.5 * rng.random((height, width))).astype(np.float32)


def discs(height: int, width: int, discs: list[tuple[int, int, int]], **changes: Any) -> Prediction:
    """A prediction of one disc (row, column, radius) per lesion."""
    y, x = np.mgrid[:height, :width]
    masks = np.array([(y - row) ** 2 + (x - column) ** 2 <= r**2 for row, column, r in discs], bool)
    boxes = [[column - r, row - r, column + r + 1, row + r + 1] for row, column, r in discs]
    fields: dict[str, Any] = {
        "image_size": (height, width),
        "boxes": np.array(boxes, np.float32).reshape(-1, 4).clip(0, [width, height, width, height]),
        "scores": np.linspace(0.95, 0.3, len(discs), dtype=np.float32),
        "labels": np.ones(len(discs), np.int64),
        "masks": masks.reshape(-1, height, width),
        "class_probabilities": {"control": 0.02, "pneumonia": 0.07, "covid": 0.91},
        "roi_batch": None,
        "class_names": ("background", "lesion"),
        "image": a_slice(height, width),
        "source": "slice.png",
        "score_threshold": 0.3,
    }
    fields["boxes"] = fields["boxes"].astype(np.float32)
    return Prediction(**{**fields, **changes})


def plain(prediction: Prediction, scale: int) -> npt.NDArray[np.int64]:
    """The slice alone, enlarged by Pillow."""
    height, width = prediction.image_size
    grey = Image.fromarray(np.rint(prediction.image * 255).astype(np.uint8))
    grey = grey.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    return np.asarray(grey.convert("RGB")).astype(np.int64)


def on_slice(picture: Image.Image, prediction: Prediction, scale: int) -> npt.NDArray[np.int64]:
    height, width = prediction.image_size
    left = (picture.width - width * scale) // 2
    return np.asarray(picture).astype(np.int64)[: height * scale, left : left + width * scale]


def test_only_masks_boxes_and_labels_change_the_slice() -> None:
    prediction = discs(400, 400, [(200, 200, 50)])
    difference = np.abs(on_slice(prediction.plot(scale=2), prediction, 2) - plain(prediction, 2)).max(axis=2)
    inside = prediction.masks[0].repeat(2, axis=0).repeat(2, axis=1)
    assert (difference[inside] > 0).mean() > 0.99
    # The label is less than 120 x 40 pixels beside the box, which is 202 pixels wide from (300, 300).
    far = np.ones_like(inside)
    far[300 - 40 : 502 + 40, 300 - 120 : 502 + 120] = False
    assert not difference[far].any()
    # Between disc and box, away from the outline, nothing is drawn.
    assert not difference[306:320, 306:320].any()


def test_ground_glass_stays_visible_under_the_fill() -> None:
    prediction = discs(400, 400, [(200, 200, 50)])
    window = (slice(370, 430), slice(370, 430))
    drawn = on_slice(prediction.plot(scale=2), prediction, 2)[window]
    original = plain(prediction, 2)[window]
    assert drawn.std(axis=(0, 1)).min() > 0.6 * original.std(axis=(0, 1)).min()


def test_overlapping_masks_do_not_pile_up() -> None:
    once = discs(300, 300, [(150, 150, 60)])
    often = discs(300, 300, [(150, 150, 60)] * 20)
    window = (slice(420, 480), slice(420, 480))  # the middle of the disc at scale 3, away from labels
    a, b = (on_slice(p.plot(scale=3), p, 3)[window] for p in (once, often))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("size", "enlarged"),
    [
        ((512, 512), (1024, 1024)),
        ((32, 32), (768, 768)),
        ((768, 600), (768, 600)),
        ((300, 500), (600, 1000)),
        ((900, 1100), (900, 1100)),
    ],
)
def test_small_slices_are_enlarged_and_large_ones_left(size: tuple[int, int], enlarged: tuple[int, int]) -> None:
    picture = discs(*size, [(16, 16, 6)]).plot()
    assert picture.mode == "RGB"
    assert picture.width == enlarged[1]
    assert 60 < picture.height - enlarged[0] < 250  # the strip stands below the slice


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (20, 700), (700, 20), (33, 64)])
def test_odd_sizes_draw(size: tuple[int, int]) -> None:
    prediction = discs(*size, [(size[0] // 2, size[1] // 2, 4), (0, 0, 3)])
    scale = -(-768 // max(size))
    drawn = on_slice(prediction.plot(), prediction, scale)
    assert drawn.shape == (size[0] * scale, size[1] * scale, 3)
    assert (drawn != plain(prediction, scale)).any()


def test_nothing_found_leaves_the_slice_as_it_is() -> None:
    prediction = discs(256, 300, [])
    picture = prediction.plot(scale=3)
    np.testing.assert_array_equal(on_slice(picture, prediction, 3), plain(prediction, 3))
    without_segmenter = dataclasses.replace(prediction, has_segmentation=False)
    assert np.asarray(without_segmenter.plot(scale=3)).tobytes() != np.asarray(picture).tobytes()


def test_without_a_classifier_there_are_no_probabilities() -> None:
    with_classifier = discs(256, 256, [(100, 100, 20)])
    without = dataclasses.replace(with_classifier, class_probabilities=None)
    assert without.plot().height < with_classifier.plot().height


def test_lesion_classes_differ_in_colour() -> None:
    names = ("background", "GGO", "consolidation")
    prediction = discs(
        300,
        300,
        [(150, 75, 40), (150, 225, 40)],
        labels=np.array([1, 2]),
        class_names=names,
        image=np.zeros((300, 300)),
    )
    drawn = on_slice(prediction.plot(scale=3), prediction, 3)
    blue, red = drawn[450, 225], drawn[450, 675]
    assert blue[2] > blue[0]
    assert red[0] > red[2]


def test_a_mask_at_the_border_has_no_contour_along_it() -> None:
    mask = np.zeros((100, 100), bool)
    mask[20:60, :30] = True
    shape, contour = _enlarge(mask, 3, 2)
    differs = shape != mask.repeat(3, axis=0).repeat(3, axis=1)
    assert differs.sum() <= 2  # the two corners are rounded by a pixel
    assert not contour[70:170, :80].any()
    assert contour[70:170, 88:90].all()
    assert contour[60:62, :88].all()


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 7, 24])
def test_a_lesion_of_one_pixel_stays_visible(scale: int) -> None:
    mask = np.zeros((5, 5), bool)
    mask[2, 2] = True
    shape, contour = _enlarge(mask, scale, 1)
    assert shape[2 * scale : 3 * scale, 2 * scale : 3 * scale].mean() > 0.5
    assert contour.any()


def crowd(count: int, size: int = 512) -> Prediction:
    rng = np.random.default_rng(3)
    lesions = [
        (int(row), int(column), int(radius))
        for row, column, radius in zip(
            rng.integers(150, 350, count),
            rng.integers(100, 400, count),
            rng.integers(5, 120, count),
            strict=True,
        )
    ]
    return discs(size, size, lesions)


def placed_labels(prediction: Prediction) -> list[tuple[tuple[int, int, int, int], Lesion]]:
    """Of a 512 x 512 slice enlarged twice."""
    size = (1024, 1024)
    lesions = [
        Lesion(mask, box, f"{score:.2f}", (0, 0, 0))
        for mask, box, score in zip(prediction.masks, prediction.boxes, prediction.scores, strict=True)
    ]
    return _place_labels(lesions, [_scaled(one.box, size, 2) for one in lesions], size, 2, _Style(*size))


def test_labels_overlap_nothing_stay_inside_and_go_to_the_best_scores_first() -> None:
    prediction = crowd(128)
    labels = placed_labels(prediction)
    assert len(labels) > 30
    covered = np.zeros((1024, 1024), int)
    for (x1, y1, x2, y2), _ in labels:
        assert 0 <= x1 < x2 <= 1024
        assert 0 <= y1 < y2 <= 1024
        covered[y1:y2, x1:x2] += 1
    assert covered.max() == 1
    assert labels[0][1].text == "0.95"


def test_two_lesions_in_the_same_place_are_both_labelled() -> None:
    prediction = discs(512, 512, [(200, 200, 30), (200, 200, 30)])
    assert len(placed_labels(prediction)) == 2


def test_labels_avoid_the_lesions_where_there_is_room() -> None:
    prediction = discs(512, 512, [(200, 200, 40)])
    (((x1, y1, x2, y2), _),) = placed_labels(prediction)
    lesion = prediction.masks[0].repeat(2, axis=0).repeat(2, axis=1)
    assert not lesion[y1:y2, x1:x2].any()


def test_128_overlapping_lesions_draw_in_reasonable_time() -> None:
    prediction = crowd(128)
    start = time.process_time()
    prediction.plot()
    assert time.process_time() - start < 5  # a fraction of a second; the margin is for slow, busy machines


def test_a_slice_narrower_than_its_text_is_centred() -> None:
    prediction = discs(768, 60, [(300, 30, 10)], class_probabilities=None)
    picture = np.asarray(prediction.plot())
    assert picture.shape[1] > 300
    left = (picture.shape[1] - 60) // 2
    assert (picture[:768, :left] == picture[0, 0]).all()
    assert (picture[:768, left + 60 :] == picture[0, 0]).all()


@pytest.mark.parametrize("scale", [0, -1, 1.5, "2"])
def test_an_impossible_scale_is_refused(scale: Any) -> None:
    with pytest.raises(ConfigError, match="scale"):
        discs(64, 64, []).plot(scale=scale)


def test_a_montage_shows_its_lesions_its_caption_and_every_note() -> None:
    grey, labels = np.full((100, 80), 60, np.uint8), np.zeros((100, 80), np.uint8)
    labels[40:60, 30:50] = 1
    tiles = [(f"slice {k}", grey, labels * (k % 2)) for k in range(5)]
    bare = np.asarray(montage(tiles, ("background", "lesion"), "5 slices"))
    tiles_end = 2 * (288 + 20)  # with their captions
    assert bare.shape[1] == 4 * 288
    assert (bare[288:308, :288] != bare[288, 0]).any()
    assert (bare[tiles_end:] != bare[-1, 0]).any()
    plain, drawn = bare[:288, :288], bare[:288, 288 : 2 * 288]
    assert (plain[:, 40:240] == 60).all()
    middle = drawn[144, 144]
    assert middle[0] > middle[1] > middle[2]  # orange
    noted = np.asarray(montage(tiles, ("background", "lesion"), "5 slices", ("probabilities are biased",)))
    line = noted.shape[0] - bare.shape[0]
    assert 10 < line < 40
    assert np.array_equal(noted[-line - 12 :], bare[-line - 12 :])  # the disclaimer stays last
    assert (bare[-line - 12 :] != bare[-1, 0]).any()
    assert (noted[-2 * line - 12 : -line - 12] != noted[-1, 0]).any()
