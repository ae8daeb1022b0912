"""Detection metrics against the released code's figures, pycocotools, torchvision and numbers worked out by
hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms, masks_to_boxes

from ctmasknet.errors import DataError
from ctmasknet.evaluation.metrics import (
    NMS_THRESHOLDS,
    SCORE_THRESHOLDS,
    CocoMetrics,
    SegmentationMetrics,
    coco_row,
    mask_iou,
    operating_points,
    released_average_precision,
    segmentation_rows,
)

GOLDEN = Path(__file__).parent / "data" / "released_ap.npz"
GOLDEN_NAMES = ("gt_masks", "gt_labels", "pred_masks", "pred_labels", "scores")


def strip(*spans: tuple[int, int], width: int = 100) -> np.ndarray:
    """(N, 1, width) masks, each one run of pixels: IoUs one can count on one's fingers."""
    masks = np.zeros((len(spans), 1, width), bool)
    for mask, (start, stop) in zip(masks, spans, strict=True):
        mask[0, start:stop] = True
    return masks


def lesions_of(*images: dict[str, Any]) -> SegmentationMetrics:
    return SegmentationMetrics([row for image in images for row in segmentation_rows(**image)])


def coco_of(*images: dict[str, Any]) -> CocoMetrics:
    return CocoMetrics([coco_row(**image) for image in images])


def ap(gt: np.ndarray, pred: np.ndarray, scores: list[float], iou: float = 0.5, **labels: list[int]) -> float:
    gt_labels, pred_labels = (
        np.array(labels.get(f"{name}_labels", [1] * len(masks))) for name, masks in (("gt", gt), ("pred", pred))
    )
    return float(released_average_precision(mask_iou(pred, gt), gt_labels, pred_labels, np.array(scores), [iou])[0])


def random_image(seed: int, instances: int, predictions: int, size: int = 64) -> dict[str, Any]:
    """Blocky lesions and noisy copies of them, in the keyword arguments of `coco_row`."""
    rng = np.random.default_rng(seed)

    def block(x: int, y: int, w: int, h: int) -> np.ndarray:
        mask = np.zeros((size, size), bool)
        mask[max(y, 0) : y + h, max(x, 0) : x + w] = True
        return mask

    def anywhere() -> np.ndarray:
        return rng.integers([0, 0, 6, 6], [size - 16, size - 16, 16, 16])

    corners = [anywhere() for _ in range(instances)]
    labels = rng.integers(1, 3, instances)
    source = rng.integers(0, instances, predictions) if instances else np.full(predictions, -1)
    moved = [corners[i] + rng.integers(-3, 4, 4) if i >= 0 else anywhere() for i in source]
    pred_labels = np.where(rng.random(predictions) < 0.8, labels[source] if instances else 1, 1)
    pred = np.array([block(*c) for c in moved]).reshape(-1, size, size)
    gt = np.array([block(*c) for c in corners]).reshape(-1, size, size)
    found = {"boxes": boxes_of(pred), "masks": pred, "labels": pred_labels.astype(np.int64)}
    return {
        "target": {"boxes": boxes_of(gt), "masks": gt, "labels": labels},
        "found": found | {"scores": rng.uniform(0.051, 0.99, predictions).astype(np.float32)},
    }


def boxes_of(masks: np.ndarray) -> np.ndarray:
    boxes = masks_to_boxes(torch.from_numpy(masks)).numpy().astype(np.float32)
    return boxes + np.array([0, 0, 1, 1], np.float32)


# --- mask IoU ---


def test_mask_iou_equals_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    image = random_image(0, 7, 19)
    a, b = image["found"]["masks"], image["target"]["masks"]

    def encoded(masks: np.ndarray) -> list[dict[str, Any]]:
        return [coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]

    expected = coco.iou(encoded(a), encoded(b), [0] * len(b))
    np.testing.assert_allclose(mask_iou(a, b), expected, rtol=0, atol=1e-12)


def test_mask_iou_stays_exact_beyond_float32_integers() -> None:
    side = 4200  # 17.6 million pixels, more than float32 can count
    a = np.ones((1, side, side), bool)
    b = a.copy()
    b[0, 0, 0] = False
    assert mask_iou(a, b)[0, 0] == (side * side - 1) / (side * side)


def test_mask_iou_of_empty_masks_is_zero() -> None:
    assert mask_iou(strip((5, 5), (0, 4)), strip((7, 7), (0, 4))).tolist() == [[0, 0], [0, 1]]


# --- released protocol ---


@pytest.mark.parametrize("index", range(40))
def test_released_ap_equals_the_released_code(index: int) -> None:
    with np.load(GOLDEN) as data:
        case = {name: data[f"{name}_{index}"] for name in GOLDEN_NAMES}
        thresholds, expected = data["iou_thresholds"], data["ap"][index]
    gt_masks, pred_masks = (np.unpackbits(case[f"{k}_masks"], axis=-1).astype(bool) for k in ("gt", "pred"))
    iou = mask_iou(pred_masks, gt_masks)
    result = released_average_precision(iou, case["gt_labels"], case["pred_labels"], case["scores"], thresholds)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


def test_rows_are_the_same_of_arrays_and_tensors() -> None:
    image = random_image(9, 3, 8)
    tensors = {part: {k: torch.from_numpy(v) for k, v in given.items()} for part, given in image.items()}
    assert segmentation_rows(**tensors) == segmentation_rows(**image)
    assert coco_row(**tensors) == coco_row(**image)


def test_released_ap_without_instances_or_predictions() -> None:
    none, one = np.zeros((0, 1, 100), bool), strip((0, 10))
    assert ap(none, none, []) == 1
    assert ap(one, none, []) == 0
    assert ap(none, one, [0.9]) == 0


def test_released_ap_needs_the_same_class() -> None:
    one = strip((0, 10))
    assert ap(one, one, [0.9], gt_labels=[1], pred_labels=[2]) == 0
    # The better match is of the other class; the worse one of the same class still counts.
    assert ap(one, strip((0, 10), (0, 8)), [0.4, 0.9], gt_labels=[1], pred_labels=[2, 1]) == 1


def test_released_ap_is_strict_about_the_threshold() -> None:
    assert ap(strip((0, 10)), strip((0, 5)), [0.9], iou=0.5) == 0
    assert ap(strip((0, 10)), strip((0, 6)), [0.9], iou=0.5) == 1
    # 0.7 and 0.8999999999999999 as np.linspace may give them: rounding must not turn an equal into a hit.
    assert ap(strip((0, 10)), strip((0, 9)), [0.9], iou=0.8999999999999999) == 0


def test_released_ap_counts_a_prediction_that_serves_two_instances_once() -> None:
    gt = strip((0, 10), (0, 9))
    assert ap(gt, strip((0, 10)), [0.9]) == 0.5  # one correct prediction over two instances


def test_released_ap_duplicates_are_wrong_predictions() -> None:
    gt = strip((0, 10), (50, 60))
    pred = strip((0, 9), (0, 10), (50, 60))
    # Ranks: worse duplicate (wrong), better duplicate (correct), other lesion (correct): precision 0, 1/2,
    # 2/3.
    assert ap(gt, pred, [0.9, 0.8, 0.7]) == pytest.approx(2 / 3)


def test_released_ap_breaks_ties_as_the_released_code() -> None:
    gt = strip((0, 10))
    twins = strip((0, 9), (0, 9))
    assert ap(gt, twins, [0.9, 0.8]) == 0.5  # equal IoU: the lower-ranked twin is marked
    assert ap(gt, twins, [0.8, 0.9]) == 0.5
    pair = strip((0, 10), (70, 80))
    assert ap(gt, pair, [0.9, 0.9]) == 0.5  # equal score: the later prediction ranks first
    assert ap(gt, pair[::-1], [0.9, 0.9]) == 1


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("found", {"masks": np.zeros((2, 1, 32, 32), bool)}, r"shape \(1, 32, 32\) and \(2, 1, 32, 32\)"),
        ("found", {"masks": np.zeros((2, 16, 32), bool)}, "masks .* of one size"),
        ("found", {"labels": np.array([1])}, "1 and 1 labels"),
        ("target", {"labels": np.array([1, 1])}, "2 and 2 labels"),
        ("found", {"scores": np.array([0.1])}, "1 scores"),
    ],
)
def test_ill_fitting_input_is_named(part: str, change: dict[str, np.ndarray], message: str) -> None:
    good = {
        "target": {"masks": np.zeros((1, 32, 32), bool), "labels": np.array([1])},
        "found": {
            "masks": np.zeros((2, 32, 32), bool),
            "labels": np.array([1, 1]),
            "scores": np.array([0.9, 0.8]),
        },
    }
    with pytest.raises(DataError, match=message):
        segmentation_rows(**{**good, part: good[part] | change})


# --- segmentation metrics ---


def test_segmentation_metrics_equal_numbers_worked_out_by_hand() -> None:
    # Lesions of 10 and 20 px; the first found with IoU 0.8 and again with 0.6, the second with 0.5 only.
    lesions, found = strip((0, 10), (50, 70)), strip((0, 8), (0, 6), (50, 60))
    nothing = {"masks": strip(), "labels": np.zeros(0, int), "scores": np.zeros(0)}
    first = {
        "target": {"masks": lesions, "labels": [1, 1]},
        "found": {"masks": found, "labels": [1, 1, 1], "scores": [0.9, 0.8, 0.7]},
    }
    # Nothing there, one false alarm of 6 px; and a clean slice.
    second = {"target": nothing, "found": {"masks": strip((0, 6)), "labels": [1], "scores": [0.9]}}
    result = lesions_of(first, second, {"target": nothing, "found": nothing}).compute()
    assert result["ap50"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert result["ap75"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert result["ap"] == pytest.approx((0.5 * 6 / 10 + 0 + 1) / 3)  # IoU 0.8 passes 0.5 … 0.75
    assert result["dice_pooled"] == pytest.approx(2 * 18 / (30 + 18 + 6))
    assert result["dice_mean"] == pytest.approx((2 * 18 / 48 + 0 + 1) / 3)
    assert result["iou_pooled"] == pytest.approx(18 / (30 + 6))
    assert result["lesion_sensitivity"] == 0.5
    assert result["false_positives_per_slice"] == pytest.approx(2 / 3)
    assert result["images"] == 3


def test_rows_of_several_processes_give_the_same_figures_in_any_order() -> None:
    images = [random_image(seed, seed % 4, 3 + seed) for seed in range(9)]
    for metrics, kind in ((lesions_of(*images), SegmentationMetrics), (coco_of(*images), CocoMetrics)):
        sent = json.loads(json.dumps([*metrics.rows[1::2], *metrics.rows[::2]]))
        assert kind(sent).compute() == pytest.approx(metrics.compute(), abs=1e-9)
        assert kind(sent[:4]).compute() != metrics.compute()


def test_no_images_and_no_lesions() -> None:
    with pytest.raises(DataError, match="empty"):
        SegmentationMetrics([]).compute()
    nothing = {"masks": torch.zeros(0, 8, 8), "labels": torch.zeros(0), "scores": torch.zeros(0)}
    result = lesions_of({"target": nothing, "found": nothing}).compute()
    assert result["lesion_sensitivity"] is None
    assert result["dice_pooled"] == result["iou_pooled"] == result["ap"] == 1


# --- COCO ---


def coco_by_pycocotools(images: list[dict[str, Any]], iou_type: str) -> list[float]:
    """AP, AP50, AP75 of pycocotools itself, fed dictionaries made here."""
    mask_api = pytest.importorskip("pycocotools.mask")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entries(image_id: int, instances: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        made = []
        for index, mask in enumerate(instances["masks"]):
            x1, y1, x2, y2 = map(float, instances["boxes"][index])
            rle = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
            entry = {"image_id": image_id, "category_id": int(instances["labels"][index]), "segmentation": rle}
            entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": float(mask.sum()), "iscrowd": 0}
            made.append(entry | ({"score": float(instances["scores"][index])} if "scores" in instances else {}))
        return made

    truth = [entry for i, image in enumerate(images) for entry in entries(i, image["target"])]
    detections = [entry for i, image in enumerate(images) for entry in entries(i, image["found"])]
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i, "height": 64, "width": 64} for i in range(len(images))],
        "categories": [{"id": 1}, {"id": 2}],
        "annotations": [{**t, "id": n} for n, t in enumerate(truth, start=1)],
    }
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(detections), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[:3].tolist()


def coco_figures(images: list[dict[str, Any]]) -> dict[str, float]:
    """The figures by pycocotools, named as ours."""
    found = {kind: coco_by_pycocotools(images, iou) for kind, iou in (("box", "bbox"), ("mask", "segm"))}
    names = ("ap", "ap50", "ap75")
    return {f"{kind}_{name}": figures[i] for kind, figures in found.items() for i, name in enumerate(names)}


@pytest.mark.parametrize("ties", [False, True])
def test_coco_metrics_equal_pycocotools(ties: bool) -> None:
    for seed in range(0, 60, 12):
        images = [random_image(seed + i, i % 5, 2 + i) for i in range(12)]
        if ties:
            for image in images:
                image["found"]["scores"] = image["found"]["scores"].round(1).clip(min=np.float32(0.1))
        expected = coco_figures(images)
        assert 0.1 < expected["mask_ap50"] < 1
        assert coco_of(*images).compute() == pytest.approx(expected, abs=1e-12)


def test_coco_metrics_count_the_hundred_best_of_a_class_as_pycocotools_does() -> None:
    images = [random_image(seed, 4, 300, size=48) for seed in range(2)]
    assert coco_of(*images).compute() == pytest.approx(coco_figures(images), abs=1e-12)


def test_weights_count_like_repeated_images() -> None:
    images = [random_image(seed, seed % 5, 3 + seed) for seed in range(8)]
    weights = np.array([0, 2, 1, 3, 0, 1, 1, 2])
    repeated = [image for image, count in zip(images, weights, strict=True) for _ in range(count)]
    found = coco_of(*images).statistic()(weights.astype(float))
    assert found == pytest.approx(coco_figures(repeated), abs=1e-12)
    expected = lesions_of(*repeated).compute()
    assert expected.pop("images") == 10
    assert lesions_of(*images).statistic()(weights.astype(float)) == pytest.approx(expected)


def test_coco_metrics_ignore_scores_up_to_the_threshold() -> None:
    image = random_image(1, 3, 3)
    image["found"]["scores"] = np.full(3, 0.05, np.float32)
    assert coco_of(image).compute()["mask_ap50"] == 0


def test_coco_metrics_without_lesions_are_not_available() -> None:
    assert set(coco_of(random_image(0, 0, 3), random_image(0, 0, 0)).compute().values()) == {None}


# --- operating point ---


def at_point(image: dict[str, Any], score_threshold: float, nms_threshold: float) -> dict[str, Any]:
    """What a model at this operating point keeps: torchvision's order, score first, then NMS."""
    found = image["found"]
    keep = np.flatnonzero(found["scores"] > np.float32(score_threshold))
    survivors = batched_nms(
        *(torch.from_numpy(found[key][keep]) for key in ("boxes", "scores", "labels")), nms_threshold
    ).numpy()
    return image | {"found": {key: value[keep[survivors]] for key, value in found.items()}}


def search_row(image: dict[str, Any]) -> dict[str, Any]:
    """What `operating_points` takes of an image whose detections saw no NMS."""
    points = []
    for nms in NMS_THRESHOLDS:
        kept = at_point(image, -1, nms)
        points.append(segmentation_rows(**kept, score_thresholds=SCORE_THRESHOLDS))
    return {"points": points}


def test_every_operating_point_has_the_figures_of_a_run_at_that_point() -> None:
    images = [random_image(seed, seed % 4, 5 * (seed % 5)) for seed in range(10)]
    table = operating_points([search_row(image) for image in images])
    assert len(table) == len(NMS_THRESHOLDS) * len(SCORE_THRESHOLDS)
    for point in table[::5]:
        kept = [at_point(image, point["score_threshold"], point["nms_threshold"]) for image in images]
        expected = lesions_of(*kept).compute()
        assert {key: point[key] for key in expected} == pytest.approx(expected, abs=1e-12)
        assert point["objective"] == pytest.approx(point["ap50"] + point["dice_pooled"])
    assert table[0]["objective"] == max(point["objective"] for point in table)


def test_the_best_operating_point_drops_the_false_alarm() -> None:
    found = {
        "boxes": np.array([[0, 0, 10, 1], [0, 0, 9, 1], [50, 0, 90, 1]], np.float32),
        "masks": strip((0, 10), (0, 9), (50, 90)),
        "labels": np.array([1, 1, 1]),
        "scores": np.array([0.72, 0.71, 0.48], np.float32),
    }
    image = {"target": {"masks": strip((0, 10)), "labels": np.array([1])}, "found": found}
    best = operating_points([search_row(image)])[0]
    assert best["score_threshold"] == 0.7  # the highest of the equally good ones
    assert best["objective"] == 2


def test_an_empty_validation_set_and_boxes_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="empty"):
        operating_points([])
    image = random_image(0, 1, 3)
    with pytest.raises(DataError, match="boxes"):
        coco_row(image["target"], image["found"] | {"boxes": np.zeros((2, 4))})
