"""Metrics of a model in training on its validation data, every slice counted once however many processes there are."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ctmasknet.data.datasets import ClassificationSample, SegmentationSample
from ctmasknet.engine.batches import as_target, model_input
from ctmasknet.errors import import_extra
from ctmasknet.evaluation.evaluate import gather
from ctmasknet.evaluation.metrics import (
    NMS_THRESHOLDS,
    ClassificationMetrics,
    CocoMetrics,
    Row,
    SegmentationMetrics,
    operating_points,
    segmentation_rows,
)
from ctmasknet.evaluation.rows import found_on, search_rows
from ctmasknet.models import COVIDCTMaskNet, LesionMaskRCNN
from ctmasknet.models.inference import Inference, Protocol
from ctmasknet.predictor import Predictor


def validate_segmenter(
    model: LesionMaskRCNN,
    samples: Iterator[SegmentationSample],
    *,
    score_threshold: float,
    nms_threshold: float,
) -> dict[str, float]:
    """Released-protocol AP, Dice and their kin (`SegmentationMetrics`); `score` is AP@0.5 + pooled Dice.

    Args:
        samples: this process's part of the data.
    """
    inference = Inference(model)
    protocol = replace(Protocol.of(model), score_threshold=score_threshold, nms_threshold=nms_threshold)
    rows = []
    for sample in samples:
        ((found,),) = found_on(inference, [sample], protocol)
        rows += segmentation_rows(sample.target, found)
    results = SegmentationMetrics(_all(rows)).compute()
    values = {key: value for key, value in results.items() if value is not None}
    return values | {"score": values["ap50"] + values["dice_pooled"]}


def choose_thresholds(
    model: LesionMaskRCNN, samples: Iterator[SegmentationSample]
) -> tuple[dict[str, float], dict[str, float]]:
    """The operating point of highest AP@0.5 + pooled Dice, and the metrics of a run at it, from one pass.

    Args:
        samples: this process's part of the data.

    Returns:
        Score and NMS threshold as in a model's metadata; metrics as `validate_segmenter` gives them, with COCO box and
        mask AP of the detections above score 0.05.
    """
    inference = Inference(model)
    rows = _all([row for sample in samples for row in search_rows(inference, [sample])])
    best = operating_points(rows)[0]
    score = best.pop("objective")
    point = {key: best.pop(key) for key in ("score_threshold", "nms_threshold")}
    nms = NMS_THRESHOLDS.index(point["nms_threshold"])
    coco = CocoMetrics([row["coco"][nms] for row in rows]).compute()
    figures = best | {f"coco_{key}": value for key, value in coco.items()} | {"score": score}
    return point, {key: value for key, value in figures.items() if value is not None}


def draw_examples(model: LesionMaskRCNN, samples: list[SegmentationSample], **thresholds: Any) -> list[np.ndarray]:
    """Slices with what the model finds on them, (H, W, 3) uint8; `thresholds` as the `Predictor` takes them."""
    predictor = Predictor(model, None, device=next(model.parameters()).device, **thresholds)
    return [np.asarray(predictor(sample.image).plot()) for sample in samples]


def validate_classifier(
    model: nn.Module,
    samples: Iterator[ClassificationSample],
    class_names: tuple[str, ...],
) -> dict[str, float]:
    """Accuracy, calibration (`ClassificationMetrics`), per class sensitivity and AUC; `score` is the mean sensitivity.

    Args:
        model: a classifier, or its module S alone, whose samples are RoIs.
    """
    return _classified(*_logits(model, samples), class_names)


def choose_temperature(
    model: nn.Module, samples: Iterator[ClassificationSample], class_names: tuple[str, ...]
) -> tuple[dict[str, float], dict[str, float]]:
    """The temperature of least log loss (Guo et al. 2017), between 0.05 and 20, and the metrics with it."""
    optimize = import_extra("scipy.optimize", "train", "fitting a temperature")
    logits, labels, names = _logits(model, samples)

    def loss(logarithm: float) -> float:
        return float(nn.functional.cross_entropy(logits / math.exp(logarithm), labels))

    fitted = math.exp(optimize.minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded").x)
    return {"temperature": fitted}, _classified(logits / fitted, labels, names, class_names)


@torch.no_grad()
def _logits(model: nn.Module, samples: Iterator[ClassificationSample]) -> tuple[Tensor, Tensor, list[str]]:
    """Logits (N, K), labels (N,) and names of all processes' samples."""
    inference = Inference(model) if isinstance(model, COVIDCTMaskNet) else None
    model.eval()
    device = next(model.parameters()).device
    own = []
    for image, label, name in samples:
        images = [model_input(image, device)]
        found = model(images)[0] if inference is None else inference.classify(inference.read(images)[0])
        own.append((found["logits"].tolist(), label, name))
    logits, labels, names = zip(*_all(own), strict=True)
    return torch.tensor(logits, dtype=torch.float64), torch.tensor(labels), list(names)


def _classified(logits: Tensor, labels: Tensor, names: list[str], class_names: tuple[str, ...]) -> dict[str, float]:
    of_each = zip(names, labels.tolist(), logits.softmax(-1).tolist(), strict=True)
    rows: list[Row] = [{"image_id": name, "label": label, "probabilities": row} for name, label, row in of_each]
    results = ClassificationMetrics(class_names, rows).compute()
    values = {key: results[key] for key in ("accuracy", "brier", "ece")} | {"images": results["n"]}
    for figure in ("sensitivity", "auc"):
        values |= {f"{figure}_{name}": value for name, value in results[figure].items() if value is not None}
    present = [value for value in results["sensitivity"].values() if value is not None]
    return values | {"score": sum(present) / len(present)}


@torch.no_grad()
def validation_losses(model: nn.Module, samples: Iterator[Any]) -> dict[str, float]:
    """Mean training losses of `model` on data it does not train on; its BatchNorm statistics stay as they are."""
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    count = 0
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    with torch.random.fork_rng():
        for image, target, name in map(as_target, samples):
            # The RoIs that the losses sample depend on the slice, not on what was drawn before.
            torch.manual_seed(zlib.crc32(name.encode()))
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in target.items()}
            for key, value in model([model_input(image, device)], [moved]).items():
                sums[key] = sums.get(key, 0.0) + float(value)
            count += 1
    model.eval()
    shares = gather((sums, count))
    total = sum(share[1] for share in shares)
    keys = sorted({key for share in shares for key in share[0]})
    return {f"val_{key}": sum(share[0].get(key, 0.0) for share in shares) / total for key in keys}


def _all(rows: list[Any]) -> list[Any]:
    """The rows of all processes."""
    return [row for share in gather(rows) for row in share]
