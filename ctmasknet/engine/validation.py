"""Metrics of a model in training on its validation data, every slice counted once however many processes there are."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ctmasknet.engine.batches import Batch, model_input
from ctmasknet.engine.config import TrainConfig
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
from ctmasknet.models import COVIDCTMaskNet
from ctmasknet.models.inference import Inference, Protocol

Figures = dict[str, float]


class Validation:
    """What is measured on a run's validation data; models are of the kind that the run trains.

    Args:
        samples: of all processes, as a data set gives them.
        rank, world: this process's part of them.
    """

    def __init__(
        self, config: TrainConfig, class_names: tuple[str, ...], samples: Sequence[Any], *, rank: int, world: int
    ) -> None:
        self.config, self.class_names = config, class_names
        self._samples, self._own = samples, range(rank, len(samples), world)

    def metrics(self, model: Any) -> Figures:
        """The figures of an epoch; ``score`` tells which epoch is best."""
        figures = self._figures(model)
        return figures | self._losses(model) if self.config.validation_loss else figures

    def choose(self, model: Any) -> tuple[Figures, Figures]:
        """What is stored with the weights, in the words of their metadata, and the figures with it."""
        raise NotImplementedError

    def _figures(self, model: Any) -> Figures:
        raise NotImplementedError

    def _share(self) -> Iterator[Any]:
        return (self._samples[index] for index in self._own)

    @torch.no_grad()
    def _losses(self, model: nn.Module) -> Figures:
        """Mean training losses; BatchNorm statistics stay as they are."""
        device = next(model.parameters()).device
        sums: Figures = {}
        model.train()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        with torch.random.fork_rng():
            for sample in self._share():
                # The RoIs that the losses sample depend on the slice, not on what was drawn before.
                torch.manual_seed(zlib.crc32(os.fsencode(sample.name)))
                batch = Batch([sample.image], [sample.target], [sample.name]).to(device)
                for key, value in model(batch.images, batch.targets).items():
                    sums[key] = sums.get(key, 0.0) + float(value)
        model.eval()
        shares = gather(sums)
        keys = sorted({key for share in shares for key in share})
        return {f"val_{key}": sum(share.get(key, 0.0) for share in shares) / len(self._samples) for key in keys}


class SegmenterValidation(Validation):
    """Released-protocol AP, Dice and their kin (`SegmentationMetrics`); the score is AP@0.5 + pooled Dice."""

    def _figures(self, model: Any) -> Figures:
        inference, config = Inference(model), self.config
        protocol = replace(
            Protocol.of(model), score_threshold=config.score_threshold, nms_threshold=config.nms_threshold
        )
        rows = []
        for sample in self._share():
            ((found,),) = found_on(inference, [sample], protocol)
            rows += segmentation_rows(sample.target, found)
        values = _defined(SegmentationMetrics(_all(rows)).compute())
        return values | {"score": values["ap50"] + values["dice_pooled"]}

    def choose(self, model: Any) -> tuple[Figures, Figures]:
        """The thresholds of highest score, and the figures of a run at them with COCO AP, from one pass."""
        inference = Inference(model)
        rows = _all([row for sample in self._share() for row in search_rows(inference, [sample])])
        best = operating_points(rows)[0]
        point = {key: best.pop(key) for key in ("score_threshold", "nms_threshold")}
        nms = NMS_THRESHOLDS.index(point["nms_threshold"])
        coco = CocoMetrics([row["coco"][nms] for row in rows]).compute()
        score = {"score": best.pop("objective")}
        return point, _defined(best | {f"coco_{key}": value for key, value in coco.items()} | score)


class ClassifierValidation(Validation):
    """Accuracy, calibration, per class sensitivity and AUC (`ClassificationMetrics`); the score is mean sensitivity.

    Models are classifiers, or module S alone, whose samples are RoIs.
    """

    def _figures(self, model: Any) -> Figures:
        return self._classified(*self._logits(model))

    def choose(self, model: Any) -> tuple[Figures, Figures]:
        """The temperature of least log loss (Guo et al. 2017), between 0.05 and 20, and the figures with it."""
        optimize = import_extra("scipy.optimize", "train", "fitting a temperature")
        logits, labels = self._logits(model)

        def loss(logarithm: float) -> float:
            return float(nn.functional.cross_entropy(logits / math.exp(logarithm), labels))

        fitted = math.exp(optimize.minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded").x)
        return {"temperature": fitted}, self._classified(logits / fitted, labels)

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits (N, K) and labels (N,) of all processes' samples."""
        inference = Inference(model) if isinstance(model, COVIDCTMaskNet) else None
        model.eval()
        device = next(model.parameters()).device
        own = []
        for image, label, _ in self._share():
            images = [model_input(image, device)]
            found = model(images)[0] if inference is None else inference.classify(inference.read(images)[0])
            own.append((found["logits"].tolist(), label))
        logits, labels = zip(*_all(own), strict=True)
        return torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)

    def _classified(self, logits: Tensor, labels: Tensor) -> Figures:
        of_each = zip(labels.tolist(), logits.softmax(-1).tolist(), strict=True)
        rows: list[Row] = [{"label": label, "probabilities": row} for label, row in of_each]
        results = ClassificationMetrics(self.class_names, rows).compute()
        values = {key: results[key] for key in ("accuracy", "brier", "ece")} | {"images": results["n"]}
        for figure in ("sensitivity", "auc"):
            values |= _defined({f"{figure}_{name}": value for name, value in results[figure].items()})
        present = _defined(results["sensitivity"]).values()
        return values | {"score": sum(present) / len(present)}


def _all(rows: list[Any]) -> list[Any]:
    """The rows of all processes."""
    return [row for share in gather(rows) for row in share]


def _defined(figures: dict[str, Any]) -> Figures:
    return {key: value for key, value in figures.items() if value is not None}
