"""Metrics of a model in training on its validation data, every slice counted once however many processes there are."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ctmasknet.data.datasets import ClassificationSample, SegmentationSample
from ctmasknet.engine.batches import Gather, as_target, model_input
from ctmasknet.evaluation.metrics import ClassificationMetrics, CocoMetrics, OperatingPointSearch, SegmentationMetrics
from ctmasknet.models import LesionMaskRCNN
from ctmasknet.overlay import overlay
from ctmasknet.results import Prediction


@torch.no_grad()
def validate_segmenter(
    model: LesionMaskRCNN,
    samples: Iterator[SegmentationSample],
    gather: Gather,
    *,
    score_threshold: float,
    nms_threshold: float,
) -> dict[str, float]:
    """Released-protocol AP, Dice and their kin (`SegmentationMetrics`); `score` is AP@0.5 + pooled Dice.

    Args:
        samples: this process's part of the data.
    """
    metrics = SegmentationMetrics()
    model.eval()
    with thresholds(model, score_threshold, nms_threshold):
        for image, target, name in samples:
            found = predict_masks(model, image)
            truth = (target["masks"] != 0, target["labels"])
            metrics.update(*truth, found["masks"], found["labels"], found["scores"], image_id=name)
    results = _merged(metrics, SegmentationMetrics(), gather).compute()
    values = {key: value for key, value in results.items() if value is not None}
    return values | {"score": values["ap50"] + values["dice_pooled"]}


@torch.no_grad()
def final_figures(
    model: LesionMaskRCNN, share: Callable[[], Iterator[SegmentationSample]], gather: Gather
) -> tuple[dict[str, float], dict[str, float]]:
    """The operating point of highest AP@0.5 + pooled Dice, and the metrics of a run at it.

    Args:
        share: gives this process's part of the data anew at every call.

    Returns:
        Score and NMS threshold as in a model's metadata; metrics as `validate_segmenter` gives them, with COCO box and
        mask AP of the detections above score 0.05.
    """
    search = OperatingPointSearch()
    model.eval()
    with thresholds(model, search.score_thresholds[0], search.nms_thresholds[-1]):
        for image, target, _ in share():
            found = predict_masks(model, image)
            truth = (target["masks"] != 0, target["labels"])
            search.update(*truth, found["boxes"], found["masks"], found["labels"], found["scores"])
    best = _merged(search, OperatingPointSearch(), gather).best()
    point = {key: best[key] for key in ("score_threshold", "nms_threshold")}
    metrics = validate_segmenter(model, share(), gather, **point)
    return point, metrics | _coco(model, share(), gather, point["nms_threshold"])


def _coco(
    model: LesionMaskRCNN, samples: Iterator[SegmentationSample], gather: Gather, nms_threshold: float
) -> dict[str, float]:
    metrics = CocoMetrics()
    with thresholds(model, metrics.score_threshold, nms_threshold):
        for image, target, _ in samples:
            found = predict_masks(model, image)
            truth = (target["boxes"], target["masks"] != 0, target["labels"])
            metrics.update(*truth, found["boxes"], found["masks"], found["labels"], found["scores"])
    results = _merged(metrics, CocoMetrics(), gather).compute()
    return {f"coco_{key}": value for key, value in results.items() if value is not None}


@torch.no_grad()
def draw_example(
    model: LesionMaskRCNN, sample: SegmentationSample, class_names: tuple[str, ...], score: float, nms: float
) -> np.ndarray:
    """A slice with what the model finds on it, (H, W, 3) uint8."""
    model.eval()
    with thresholds(model, score, nms):
        found = {key: value.numpy() for key, value in predict_masks(model, sample.image).items()}
    image = sample.image[0].cpu().numpy().astype(np.float32) / np.float32(255)
    prediction = Prediction(
        image_size=(image.shape[0], image.shape[1]),
        boxes=found["boxes"],
        scores=found["scores"],
        labels=found["labels"],
        masks=found["masks"],
        class_probabilities=None,
        roi_batch=None,
        class_names=class_names,
        image=image,
        source=sample.name,
        score_threshold=score,
    )
    return np.asarray(overlay(prediction).convert("RGB"))


@torch.no_grad()
def validate_classifier(
    model: nn.Module, samples: Iterator[ClassificationSample], gather: Gather, class_names: tuple[str, ...]
) -> dict[str, float]:
    """Accuracy, and per class sensitivity and AUC; `score` is the mean sensitivity."""
    metrics = ClassificationMetrics(class_names)
    model.eval()
    device = next(model.parameters()).device
    for image, label, name in samples:
        probabilities = model([model_input(image, device)])[0]["probabilities"]
        metrics.update(probabilities[None].cpu(), torch.tensor([label]), [name])
    results = _merged(metrics, ClassificationMetrics(class_names), gather).compute()
    values = {"accuracy": results["accuracy"], "images": results["n"]}
    for figure in ("sensitivity", "auc"):
        for name, value in results[figure].items():
            if value is not None:
                values[f"{figure}_{name}"] = value
    present = [value for value in results["sensitivity"].values() if value is not None]
    return values | {"score": sum(present) / len(present)}


@torch.no_grad()
def validation_losses(model: nn.Module, samples: Iterator[Any], gather: Gather) -> dict[str, float]:
    """Mean training losses of `model` on data it does not train on; its BatchNorm statistics stay as they are."""
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    count = 0
    with torch.random.fork_rng(), _training_without_statistics(model):
        for image, target, name in map(as_target, samples):
            # The RoIs that the losses sample depend on the slice, not on what was drawn before.
            torch.manual_seed(zlib.crc32(name.encode()))
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in target.items()}
            for key, value in model([model_input(image, device)], [moved]).items():
                sums[key] = sums.get(key, 0.0) + float(value)
            count += 1
    shares = gather((sums, count))
    total = sum(share[1] for share in shares)
    keys = sorted({key for share in shares for key in share[0]})
    return {f"val_{key}": sum(share[0].get(key, 0.0) for share in shares) / total for key in keys}


def predict_masks(model: LesionMaskRCNN, image: Tensor) -> dict[str, Tensor]:
    """Detections of a (1, H, W) uint8 slice on the CPU, masks (N, H, W) bool."""
    found = model([model_input(image, next(model.parameters()).device)])[0]
    found["masks"] = found["masks"][:, 0] > 0.5
    return {key: value.cpu() for key, value in found.items()}


@contextmanager
def thresholds(model: LesionMaskRCNN, score: float, nms: float) -> Iterator[None]:
    """`model` with other score and NMS thresholds for a while."""
    heads = model.roi_heads
    own = heads.score_thresh, heads.nms_thresh
    heads.score_thresh, heads.nms_thresh = score, nms
    try:
        yield
    finally:
        heads.score_thresh, heads.nms_thresh = own


@contextmanager
def _training_without_statistics(model: nn.Module) -> Iterator[None]:
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    try:
        yield
    finally:
        model.eval()


def _merged(metrics: Any, empty: Any, gather: Gather) -> Any:
    """The collectors of all processes as one."""
    for state in gather(metrics.state_dict()):
        empty.merge(state)
    return cast(Any, empty)
