"""Where a run starts: random values, trained weights, or what fits of another variant's."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ctmasknet.engine.config import TrainConfig
from ctmasknet.errors import WeightsError
from ctmasknet.models import COVIDCTMaskNet, LesionMaskRCNN
from ctmasknet.registry import Variant, get_variant
from ctmasknet.weights.files import is_finite
from ctmasknet.weights.hub import load_stored
from ctmasknet.zoo import create_model, load_released

log = logging.getLogger(__name__)

Model = LesionMaskRCNN | COVIDCTMaskNet

_MODULE_S = "module_s."
_NOT_IN_CLASSIFIERS = ("roi_heads.mask_head.", "roi_heads.mask_predictor.")
_SHARED = (
    "num_classes", "anchor_sizes", "anchor_ratios", "image_mean", "image_std", "min_size", "max_size", "roi_score",
    "bbox_reg_weights",
)  # fmt: skip
"""Options that a classifier takes over from its segmenter, or a variant from another."""


def initial_model(config: TrainConfig, class_names: tuple[str, ...]) -> Model:
    """The config's variant, with as many classes as the data has, from the weights it names.

    Raises:
        WeightsError: the weights are missing, damaged, or do not fit.
    """
    classes = "num_classes" if config.task == "segmentation" else "image_classes"
    options = {**config.model_options, classes: len(class_names)}
    if config.weights is None:
        return create_model(config.model, weights_backbone=config.weights_backbone, **options)
    variant = get_variant(config.model)
    tensors, holder, stored = _donor(config.weights, variant)
    if holder != variant.name:
        # Another variant's thresholds and RoI counts are not this one's.
        stored = {key: stored[key] for key in _SHARED if key in stored}
    model = create_model(config.model, **{**stored, **options})
    from_segmenter = config.task == "classification" and holder == variant.segmenter
    new, changed = _copy(model, tensors)
    heads = ("cls_score.", "bbox_pred.", "mask_fcn_logits.", f"{_MODULE_S}logits.")
    unexpected = [
        key
        for key in sorted(new | changed)
        if not (from_segmenter and key.startswith(_MODULE_S))
        and not (key in changed and any(head in key for head in heads))
    ]
    left_over = set(tensors) - set(model.state_dict())
    if from_segmenter:
        left_over = {key for key in left_over if not key.startswith(_NOT_IN_CLASSIFIERS)}
    if (unexpected or left_over) and not config.partial_weights:
        what = f"{len(unexpected)} tensors of {config.model} are not in it" if unexpected else "it holds more"
        first = (unexpected or sorted(left_over))[0]
        raise WeightsError(
            f"{config.weights}: weights of {holder or 'an unknown variant'}, not of {config.model}: {what} "
            f"(first: {first}). partial_weights=True copies what fits"
        )
    if new | changed:
        groups = Counter(".".join(key.split(".")[:3]) for key in new | changed)
        log.warning(
            "%s: %d of %d tensors come from %s; from random values start %s",
            config.model,
            len(model.state_dict()) - len(new | changed),
            len(model.state_dict()),
            config.weights,
            ", ".join(f"{name} ({count})" for name, count in sorted(groups.items())),
        )
    return model


def _donor(weights: str | Path, variant: Variant) -> tuple[Mapping[str, Tensor], str | None, dict[str, Any]]:
    """Tensors, variant and options of what `weights` names."""
    if Path(weights).suffix == ".pth":
        model = load_released(weights)
        return model.state_dict(), model.variant.name, model.config.to_dict()
    stored = load_stored(weights, variant if weights == "default" else None)
    return stored.tensors, stored.variant, dict(stored.config)


def _copy(model: Model, tensors: Mapping[str, Tensor]) -> tuple[set[str], set[str]]:
    """Copy what has the same name and shape; returns the names that are missing and those of another shape."""
    expected = model.state_dict()
    fitting = {k: t for k, t in tensors.items() if k in expected and t.shape == expected[k].shape}
    for key, tensor in fitting.items():
        if not is_finite(tensor):
            raise WeightsError(f"weights to start from: NaN or infinite values in {key}: the file is damaged")
    model.load_state_dict(fitting, strict=False)
    new = set(expected) - set(tensors)
    return new, set(expected) - set(fitting) - new
