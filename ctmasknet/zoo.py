"""Every way to a model: the 14 factories, `create_model`, `from_pretrained`, `load_released`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctmasknet.errors import ConfigError, WeightsError
from ctmasknet.models.classification import COVIDCTMaskNet
from ctmasknet.models.config import model_config
from ctmasknet.models.segmentation import LesionMaskRCNN
from ctmasknet.registry import VARIANTS, Variant, get_variant
from ctmasknet.weights.hub import load_stored
from ctmasknet.weights.released import read_released

Model = LesionMaskRCNN | COVIDCTMaskNet
WeightsLike = str | os.PathLike[str] | None

log = logging.getLogger(__name__)

# What depends on the number of classes, and so starts anew when that number changes.
_DETECTOR_HEADS = (
    "roi_heads.box_predictor.cls_score.",
    "roi_heads.box_predictor.bbox_pred.",
    "roi_heads.mask_predictor.mask_fcn_logits.",
)
_IMAGE_HEADS = ("module_s.logits.",)


def create_model(
    name: str,
    *,
    weights: WeightsLike = None,
    num_classes: int | None = None,
    image_classes: int | None = None,
    **config: Any,
) -> Model:
    """Build a variant, in evaluation mode, on the CPU, in float32.

    Args:
        name: one of `list_models()`.
        weights: None (random values, for training), ``"default"``, or the path of a safetensors file or
            of a folder with `model.safetensors` and `config.json`.
        num_classes: detector classes, background included (default 2: lesion).
        image_classes: outputs of module S (default 3: control, pneumonia, COVID-19).
        config: any option of `ModelConfig`; what is not given comes from the weights' config.json, else from the
            paper's evaluation settings.

    A number of classes other than the weights' keeps every weight but the heads it changes, and logs which.

    Raises:
        ConfigError: unknown variant or option, impossible value.
        WeightsError: the weights are missing, damaged, or another variant's.
    """
    variant = get_variant(name)
    given = dict(config)
    if num_classes is not None:
        given["num_classes"] = num_classes
    if image_classes is not None:
        given["image_classes"] = image_classes
    if weights is None:
        return _build(variant, given).eval()
    model_config(variant, **given)  # the caller's mistakes first, before a file is read
    stored = load_stored(weights, variant)
    try:
        model = _build(variant, stored.config | given)
    except ConfigError as error:
        raise ConfigError(f"{stored.path.parent / 'config.json'} with the options given: {error}") from None
    _load(model, stored.tensors, stored.path, new_heads=_changed_heads(stored.tensors, model))
    model.metadata = dict(stored.metadata)
    return model.eval()


def from_pretrained(path: str | os.PathLike[str], *, device: str | torch.device | None = None, **config: Any) -> Model:
    """A model from a folder of weights; its class and variant come from the folder's `config.json`.

    Args:
        path: folder with `model.safetensors` and `config.json`.
        device: where to put the model, None for the CPU.
        config: options that replace the stored ones.

    Raises:
        WeightsError: no such folder, no config.json, or damaged.
        ConfigError: unknown option, impossible value.
    """
    stored = load_stored(path, None)
    if stored.variant is None:
        raise WeightsError(f"{stored.path.parent}: no config.json names the variant: create_model(name, weights=path)")
    return create_model(stored.variant, weights=path, **config).to(device or "cpu")


def load_released(path: str | os.PathLike[str], name: str | None = None, **config: Any) -> Model:
    """A model from one of the paper author's `.pth` checkpoints; nothing in the file is executed.

    Args:
        path: the checkpoint.
        name: the variant it must hold; None recognises it from keys and shapes.
        config: any option of `ModelConfig`; anchors and numbers of classes come from the file.

    Returns:
        The model in evaluation mode; its `metadata` is empty, so `Predictor` uses the paper's thresholds.

    Raises:
        WeightsError: not such a checkpoint, damaged, unsafe, or another variant's.
        ConfigError: unknown variant or option, impossible value.
    """
    path = Path(path)
    checkpoint = read_released(path, None if name is None else get_variant(name))
    stored: dict[str, Any] = {"num_classes": checkpoint.num_classes} | checkpoint.anchors
    if checkpoint.image_classes is not None:
        stored["image_classes"] = checkpoint.image_classes
    model = _build(checkpoint.variant, stored | config)
    _load(model, checkpoint.weights, path, new_heads=_changed_heads(checkpoint.weights, model))
    return model.eval()


def _build(variant: Variant, options: Mapping[str, Any]) -> Model:
    config = model_config(variant, **options)
    return LesionMaskRCNN(variant, config) if variant.task == "segmentation" else COVIDCTMaskNet(variant, config)


def _changed_heads(tensors: Mapping[str, Tensor], model: Model) -> tuple[str, ...]:
    """Prefixes of the heads whose number of classes in the file differs from the model's."""
    expected = model.state_dict()
    changed: tuple[str, ...] = ()
    for head, key in (
        (_DETECTOR_HEADS, "roi_heads.box_predictor.cls_score.bias"),
        (_IMAGE_HEADS, "module_s.logits.bias"),
    ):
        if key in tensors and key in expected and tensors[key].shape != expected[key].shape:
            changed += head
    return changed


def _load(model: Model, tensors: Mapping[str, Tensor], path: Path, *, new_heads: tuple[str, ...]) -> None:
    """Strict load, but for the heads named; errors say what the file holds."""
    expected = model.state_dict()
    fitting = {key: t for key, t in tensors.items() if not (new_heads and key.startswith(new_heads))}
    wanted = {key for key in expected if not (new_heads and key.startswith(new_heads))}
    missing, extra = sorted(wanted - set(fitting)), sorted(set(fitting) - wanted)
    wrong = [key for key in sorted(wanted & set(fitting)) if fitting[key].shape != expected[key].shape]
    if missing or extra or wrong:
        details = [
            f"{len(keys)} {what} (first: {keys[0]})"
            for what, keys in (("missing", missing), ("unexpected", extra), ("of another shape", wrong))
            if keys
        ]
        holder = _variant_of(tensors)
        hint = f" It holds {holder}." if holder not in (None, model.variant.name) else ""
        raise WeightsError(
            f"{path}: not weights of {model.variant.name} as configured: tensors {', '.join(details)}.{hint}"
        )
    damaged = [key for key, t in fitting.items() if t.is_floating_point() and not t.isfinite().all()]
    if damaged:
        raise WeightsError(f"{path}: NaN or infinite values in {damaged[0]}: the file is damaged")
    model.load_state_dict(fitting, strict=False)
    if new_heads:
        log.warning(
            "%s: other numbers of classes than in %s, so these start from random values: %s",
            model.variant.name,
            path,
            ", ".join(sorted(set(expected) - wanted)),
        )


def _variant_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Which variant a state dict belongs to, by its number of values; None if none fits."""
    values = sum(t.numel() for t in tensors.values())
    return next((variant.name for variant in VARIANTS.values() if variant.num_values == values), None)


_SHARED_HELP = """
    Args:
        weights: None (random values), "default" (trained weights, where the variant has some: `ctmasknet list`),
            or the path of a safetensors file or of a folder with model.safetensors and config.json.
        pretrained: True is another word for weights="default".
        config: num_classes (detector classes with background: 2 lesion, 3 GGO and consolidation apart), image_classes
            (outputs of module S), box_score_thresh, box_nms_thresh, roi_score, mask_score, and every other option
            of ctmasknet.models.ModelConfig; unknown ones raise.

    Returns:
        The model in evaluation mode. Call it with a list of (3, H, W) float tensors in 0..1. {returns}

    Research software, not a medical device.
"""
_SEGMENTER_RETURNS = (
    "It returns per image a dict\n"
    "        of boxes (N, 4) xyxy in pixels, labels (N,), scores (N,) and masks (N, 1, H, W), foreground above 0.5;\n"
    "        in training mode, given targets, a dict of losses."
)
_CLASSIFIER_RETURNS = (
    "It returns per image a dict\n"
    "        of logits (K,), probabilities (K,) and its RoI batch: boxes (N, 4), scores (N,), labels (N,) and\n"
    "        deltas (N, 4); in training mode, given targets with image_label, a dict of losses."
)

Factory = Callable[..., Model]


def _factory(function: Factory) -> Factory:
    """Complete a factory's docstring with what all of them share."""
    returns = _SEGMENTER_RETURNS if function.__name__.startswith("maskrcnn") else _CLASSIFIER_RETURNS
    function.__doc__ = f"{function.__doc__}\n{_SHARED_HELP.format(returns=returns)}"
    return function


def _make(name: str, weights: WeightsLike, pretrained: bool, config: dict[str, Any]) -> Model:
    if pretrained and weights is not None:
        raise ConfigError(f"{name}: give weights={weights!r} or pretrained=True, not both")
    return create_model(name, weights="default" if pretrained else weights, **config)


@_factory
def maskrcnn_resnet50(*, weights: WeightsLike = None, pretrained: bool = False, **config: Any) -> Model:
    """Mask R-CNN on ResNet50 with four FPN levels, the paper's reference: 31.78M values."""
    return _make("maskrcnn_resnet50", weights, pretrained, config)


@_factory
def maskrcnn_resnet18(*, weights: WeightsLike = None, pretrained: bool = False, **config: Any) -> Model:
    """Mask R-CNN on the full ResNet18, one FPN level at stride 32: 14.52M values."""
    return _make("maskrcnn_resnet18", weights, pretrained, config)


@_factory
def maskrcnn_resnet18_t1(*, weights: WeightsLike = None, pretrained: bool = False, **config: Any) -> Model:
    """Mask R-CNN on ResNet18 without its last block (T1), one FPN level at stride 16: 6.06M values."""
    return _make("maskrcnn_resnet18_t1", weights, pretrained, config)


@_factory
def maskrcnn_resnet18_t2(*, weights: WeightsLike = None, pretrained: bool = False, **config: Any) -> Model:
    """Mask R-CNN on ResNet18 without its last two blocks (T2), one FPN level at stride 8: 3.92M values."""
    return _make("maskrcnn_resnet18_t2", weights, pretrained, config)


@_factory
def maskrcnn_resnet34(*, weights: WeightsLike = None, pretrained: bool = False, **config: Any) -> Model:
    """Mask R-CNN on the full ResNet34, one FPN level at stride 32: 24.64M values."""
    return _make("maskrcnn_resnet34", weights, pretrained, config)


@_factory
def maskrcnn_resnet34_t1(*, weights: WeightsLike = None, pretrained: bool = False, **config: Any) -> Model:
    """Mask R-CNN on ResNet34 without its last block (T1), the paper's best lightweight segmenter: 11.45M values."""
    return _make("maskrcnn_resnet34_t1", weights, pretrained, config)


@_factory
def maskrcnn_resnet34_t2(*, weights: WeightsLike = None, pretrained: bool = False, **config: Any) -> Model:
    """Mask R-CNN on ResNet34 without its last two blocks (T2), one FPN level at stride 8: 4.59M values."""
    return _make("maskrcnn_resnet34_t2", weights, pretrained, config)


@_factory
def ctmasknet_resnet50(*, weights: WeightsLike = None, pretrained: bool = False, **config: Any) -> Model:
    """COVID-CT-Mask-Net on ResNet50 with four FPN levels and a batch of 256 RoIs: 31.52M values."""
    return _make("ctmasknet_resnet50", weights, pretrained, config)


@_factory
def ctmasknet_resnet18(*, weights: WeightsLike = None, pretrained: bool = False, **config: Any) -> Model:
    """COVID-CT-Mask-Net on the full ResNet18 with a batch of 128 RoIs: 14.75M values."""
    return _make("ctmasknet_resnet18", weights, pretrained, config)


@_factory
def ctmasknet_resnet18_t1(*, weights: WeightsLike = None, pretrained: bool = False, **config: Any) -> Model:
    """COVID-CT-Mask-Net on ResNet18 T1, the paper's most accurate lightweight classifier: 6.29M values."""
    return _make("ctmasknet_resnet18_t1", weights, pretrained, config)


@_factory
def ctmasknet_resnet18_t2(*, weights: WeightsLike = None, pretrained: bool = False, **config: Any) -> Model:
    """COVID-CT-Mask-Net on ResNet18 T2, the smallest classifier: 4.15M values."""
    return _make("ctmasknet_resnet18_t2", weights, pretrained, config)


@_factory
def ctmasknet_resnet34(*, weights: WeightsLike = None, pretrained: bool = False, **config: Any) -> Model:
    """COVID-CT-Mask-Net on the full ResNet34 with a batch of 128 RoIs: 24.87M values."""
    return _make("ctmasknet_resnet34", weights, pretrained, config)


@_factory
def ctmasknet_resnet34_t1(*, weights: WeightsLike = None, pretrained: bool = False, **config: Any) -> Model:
    """COVID-CT-Mask-Net on ResNet34 T1, the paper's highest COVID-19 sensitivity among light models: 11.68M values."""
    return _make("ctmasknet_resnet34_t1", weights, pretrained, config)


@_factory
def ctmasknet_resnet34_t2(*, weights: WeightsLike = None, pretrained: bool = False, **config: Any) -> Model:
    """COVID-CT-Mask-Net on ResNet34 T2, one FPN level at stride 8: 4.82M values."""
    return _make("ctmasknet_resnet34_t2", weights, pretrained, config)
