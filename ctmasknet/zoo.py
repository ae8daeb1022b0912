"""Every way to a model: the 14 factories, `create_model`, `from_pretrained`, `load_released`; `open_model` for all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from ctmasknet.errors import ConfigError
from ctmasknet.models import COVIDCTMaskNet, LesionMaskRCNN, Model
from ctmasknet.models.config import model_config
from ctmasknet.registry import (
    DEFAULT_CLASSIFIER,
    DEFAULT_SEGMENTER,
    IMAGE_CLASSES,
    LESION_CLASSES,
    VARIANTS,
    Task,
    get_variant,
)
from ctmasknet.weights.assemble import assemble, build, load_backbone
from ctmasknet.weights.hub import load_stored
from ctmasknet.weights.publish import verified
from ctmasknet.weights.released import read_released

WeightsLike = str | os.PathLike[str] | None

DEFAULT: Final = "default"
"""The default weights of a variant; for `open_model`, the default segmenter or classifier with them."""

# What torch.save writes: read as an author's checkpoint, safely.
_PICKLED = (".pth", ".pt", ".pth.tar", ".ckpt", ".bin")


def open_model(
    source: str | os.PathLike[str] | Model, *, task: Task | None = None, device: str | torch.device | None = None
) -> Model:
    """The model that `source` names, whatever way it names it; everything that takes a model asks here.

    Args:
        source: a variant's name (with its default weights), ``"default"`` (the task's default variant), a folder of
            weights or a safetensors file with its config.json beside it, a Hub repository (``"owner/name@revision"``),
            one of the paper author's ``.pth`` files, or a model, which is returned itself. An existing path goes before
            a repository.
        task: what it must be for; None accepts both.
        device: where to put it; None takes a GPU if there is one. A model passed in is moved there, too.

    Returns:
        The model, in evaluation mode if it was not passed in.

    Raises:
        ConfigError: neither of these (the text names the nearest variant), for the other task, unknown device.
        WeightsError: weights missing or damaged, or the Hub cannot be reached.
    """
    where = choose_device(device)
    if isinstance(source, LesionMaskRCNN | COVIDCTMaskNet):
        model = source
    elif not isinstance(source, str | os.PathLike):
        raise ConfigError(f"{source!r}: give the name of a variant, a folder or repository of weights, or a model")
    elif source == DEFAULT:
        if task is None:
            raise ConfigError(
                f"'default' alone does not say for which task: give {DEFAULT_SEGMENTER} or {DEFAULT_CLASSIFIER}"
            )
        model = create_model(DEFAULT_SEGMENTER if task == "segmentation" else DEFAULT_CLASSIFIER, weights=DEFAULT)
    elif source in VARIANTS:
        model = create_model(str(source), weights=DEFAULT)
    elif str(source).lower().endswith(_PICKLED):
        model = load_released(source)
    elif not isinstance(source, str) or Path(source).exists() or any(mark in source for mark in ("/", os.sep, ".")):
        model = from_pretrained(source)
    else:
        model = create_model(get_variant(source).name, weights=DEFAULT)  # unknown: names the nearest
    if task is not None and model.variant.task != task:
        raise ConfigError(f"{model.variant.name} is for {model.variant.task}, but a model for {task} is needed")
    return model.to(where)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device by its name; None is a GPU if there is one, else the CPU.

    Raises:
        ConfigError: it cannot be used; says why.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={device!r} cannot be used ({reason}). ctmasknet doctor lists them.") from None
    return chosen


def class_names(model: Model) -> tuple[str, ...]:
    """Names of the detector's classes (background first), or of a classifier's image classes."""
    stored, config = model.metadata.get("classes", ()), model.config
    lesions = model.variant.task == "segmentation"
    count = config.num_classes if lesions else config.image_classes
    known = LESION_CLASSES if lesions else {len(IMAGE_CLASSES): IMAGE_CLASSES}
    return tuple(stored) if len(stored) == count else known.get(count, tuple(f"class {n}" for n in range(count)))


def create_model(
    name: str,
    *,
    weights: WeightsLike = None,
    weights_backbone: bool | str | os.PathLike[str] = False,
    num_classes: int | None = None,
    image_classes: int | None = None,
    **config: Any,
) -> Model:
    """Build a variant, in evaluation mode, on the CPU, in float32.

    Args:
        name: one of `list_models()`.
        weights: None (random values, for training), ``"default"``, the path of a safetensors file or of a folder with
            `model.safetensors` and `config.json`, or a Hub repository: ``"owner/name"``, better pinned to a commit:
            ``"owner/name@revision"``. An existing path goes first; then the local cache, then the Hub.
        weights_backbone: True starts the body from timm's ImageNet weights (downloaded once, pinned by the manifest); a
            file: from the state dict in it (torchvision's names, safetensors or `torch.save`). Not together with
            `weights`.
        num_classes: detector classes, background included (default 2: lesion).
        image_classes: outputs of module S (default 3: control, pneumonia, COVID-19).
        config: any option of `ModelConfig`; what is not given comes from the weights' config.json, else from the
            paper's evaluation settings.

    A number of classes other than the weights' keeps every weight but the heads it changes, and logs which.

    Raises:
        ConfigError: unknown variant or option, impossible value.
        WeightsError: the weights are missing, damaged, or another variant's; the Hub cannot be reached.
    """
    variant = get_variant(name)
    if "pretrained" in config:
        raise ConfigError(
            f"pretrained is for the factories ({name}(pretrained=True)): create_model({name!r}, weights='default')"
        )
    if weights is not None and weights_backbone:
        raise ConfigError("give weights or weights_backbone, not both: weights include a body")
    classes = {"num_classes": num_classes, "image_classes": image_classes}
    given = config | {key: count for key, count in classes.items() if count is not None}
    if weights is None:
        model = build(variant, given).eval()
        if weights_backbone:
            load_backbone(model, None if weights_backbone is True else weights_backbone)
        return model
    model_config(variant, **given)  # the caller's mistakes first, before a file is read
    return assemble(load_stored(weights, variant), given, variant)


def from_pretrained(
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    verify: bool = False,
    **config: Any,
) -> Model:
    """A model from a folder or a Hub repository of weights; its class and variant come from the `config.json` there.

    Args:
        path_or_repo: folder with `model.safetensors` and `config.json`, ``"owner/name"`` or ``"owner/name@revision"``.
        revision: branch, tag or commit of a repository; a 40-hex commit never changes and, once in the cache, is
            loaded without a request.
        device: where to put the model, None for the CPU.
        verify: first run the golden input that travels with the weights and compare with the outputs recorded there.
        config: options that replace the stored ones.

    Returns:
        The model in evaluation mode, in float32.

    Raises:
        WeightsError: no such folder or repository, no network, no config.json, damaged, or `verify` failed.
        ConfigError: unknown option, impossible value, a device that cannot be used.
    """
    stored = load_stored(path_or_repo, None, revision=revision, golden=verify)
    if verify:  # as saved: options given here may change the outputs
        verified(stored)
    return assemble(stored, config).to(choose_device(device or "cpu"))


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
    return assemble(read_released(path, None if name is None else get_variant(name)), config)


_FACTORY_HELP = """{title}, {levels} at stride {stride}: {millions:.2f}M values.

    Args:
        weights: None (random values), "default" (trained weights, where the variant has some: `ctmasknet list`),
            the path of a safetensors file or of a folder with model.safetensors and config.json, or a Hub
            repository, "owner/name" or "owner/name@revision".
        pretrained: True is another word for weights="default".
        weights_backbone: True starts the body from timm's ImageNet weights instead.
        config: num_classes (detector classes with background: 2 lesion, 3 GGO and consolidation apart), image_classes
            (outputs of module S), box_score_thresh, box_nms_thresh, roi_score, mask_score, and every other option
            of ctmasknet.models.ModelConfig; unknown ones raise.

    Returns:
        The model in evaluation mode. Call it with a list of (3, H, W) float tensors in 0..1. It returns per image a
        dict of {returns}.

    Research software, not a medical device.
"""
_RETURNS = {
    "segmentation": (
        "boxes (N, 4) xyxy in pixels, labels (N,), scores (N,) and masks (N, 1, H, W), foreground above 0.5;\n"
        "        in training mode, given targets, a dict of losses"
    ),
    "classification": (
        "logits (K,), probabilities (K,) and its RoI batch: boxes (N, 4), scores (N,), labels (N,) and\n"
        "        deltas (N, 4); in training mode, given targets with image_label, a dict of losses"
    ),
}


def _factory(name: str) -> Callable[..., Model]:
    """`create_model` for one variant, with `pretrained`, as torch.hub knows it; its help comes from the registry."""
    variant = get_variant(name)

    def factory(*, weights: WeightsLike = None, pretrained: bool = False, **config: Any) -> Model:
        if pretrained and weights is not None:
            raise ConfigError(f"{name}: give weights={weights!r} or pretrained=True, not both")
        return create_model(name, weights=DEFAULT if pretrained else weights, **config)

    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = _FACTORY_HELP.format(
        title=variant.title,
        levels="four FPN levels, the coarsest" if variant.levels > 1 else "one FPN level",
        stride=variant.stride,
        millions=variant.num_values / 1e6,
        returns=_RETURNS[variant.task],
    )
    return factory


maskrcnn_resnet50 = _factory("maskrcnn_resnet50")
maskrcnn_resnet18 = _factory("maskrcnn_resnet18")
maskrcnn_resnet18_t1 = _factory("maskrcnn_resnet18_t1")
maskrcnn_resnet18_t2 = _factory("maskrcnn_resnet18_t2")
maskrcnn_resnet34 = _factory("maskrcnn_resnet34")
maskrcnn_resnet34_t1 = _factory("maskrcnn_resnet34_t1")
maskrcnn_resnet34_t2 = _factory("maskrcnn_resnet34_t2")
ctmasknet_resnet50 = _factory("ctmasknet_resnet50")
ctmasknet_resnet18 = _factory("ctmasknet_resnet18")
ctmasknet_resnet18_t1 = _factory("ctmasknet_resnet18_t1")
ctmasknet_resnet18_t2 = _factory("ctmasknet_resnet18_t2")
ctmasknet_resnet34 = _factory("ctmasknet_resnet34")
ctmasknet_resnet34_t1 = _factory("ctmasknet_resnet34_t1")
ctmasknet_resnet34_t2 = _factory("ctmasknet_resnet34_t2")
