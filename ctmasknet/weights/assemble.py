"""From stored tensors to a model: strict, but for heads whose number of classes changed on purpose; ImageNet bodies."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ctmasknet.errors import ConfigError, WeightsError, shown
from ctmasknet.models import COVIDCTMaskNet, LesionMaskRCNN, Model, model_config
from ctmasknet.registry import Variant, get_variant
from ctmasknet.weights.files import (
    CONFIG_NAME,
    INT8_NAME,
    WEIGHTS_NAME,
    StoredWeights,
    inherited,
    is_finite,
    read_tensors,
    sha256_of,
    state_digest,
)
from ctmasknet.weights.hub import HubSource, from_hub
from ctmasknet.weights.manifest import backbone_entry
from ctmasknet.weights.released import read_state_dict, recognised

log = logging.getLogger(__name__)

# By the tensor that tells it: what depends on the number of classes, and so starts anew when that number changes.
_BOX = "roi_heads.box_predictor."
_HEADS = {
    f"{_BOX}cls_score.bias": (f"{_BOX}cls_score.", f"{_BOX}bbox_pred.", "roi_heads.mask_predictor.mask_fcn_logits."),
    "module_s.logits.bias": ("module_s.logits.",),
}
_OPERATING_POINT = {"score_threshold": "box_score_thresh", "nms_threshold": "box_nms_thresh"}
_RESNET18_BLOCKS = 2  # in each stage; a ResNet34 has 3, 4, 6 and 3
_BEYOND_A_BODY = ("layer2.", "layer3.", "layer4.", "fc.")  # what a cut ResNet may lack


def build(variant: Variant, options: Mapping[str, Any]) -> Model:
    """A model with random weights."""
    config = model_config(variant, **options)
    return LesionMaskRCNN(variant, config) if variant.task == "segmentation" else COVIDCTMaskNet(variant, config)


def assemble(stored: StoredWeights, options: Mapping[str, Any], variant: Variant | None = None) -> Model:
    """A model with stored weights, in evaluation mode, set to their operating point; `options` replace what is stored.

    Raises:
        ConfigError: unknown option, impossible value.
        WeightsError: the weights do not fit, or name no variant and none is given.
    """
    if variant is None and stored.variant is None:
        raise WeightsError(f"{stored.path.parent}: no config.json names the variant: create_model(name, weights=path)")
    variant = variant or get_variant(stored.variant or "")
    metadata = dict(stored.metadata)
    if variant.task == "segmentation" and "operating_point" in metadata:
        # A threshold that the caller gives is the model's, and the weights' is no longer.
        point = metadata["operating_point"]
        metadata["operating_point"] = point = {k: v for k, v in point.items() if _OPERATING_POINT[k] not in options}
        options = {_OPERATING_POINT[key]: value for key, value in point.items()} | dict(options)
    try:
        model = build(variant, stored.config | dict(options))
    except ConfigError as error:
        raise ConfigError(f"{stored.path}: its config.json or the options given: {error}") from None
    if load(model, stored.tensors, stored.path):
        # Untrained heads: what was measured no longer holds; the terms of the rest still do.
        metadata = inherited(stored.metadata, stored.variant)
    model.metadata = metadata
    model.loaded = (state_digest(model.state_dict()), dict(metadata))
    if "int8" in metadata:
        model.int8_network = partial(
            read_int8, path=stored.path.with_name(INT8_NAME), sha256=metadata["int8"]["sha256"]
        )
    return model.eval()


def int8_file(model: Model, network: bytes, weights: bytes) -> bytes:
    """The content of `int8.safetensors`: an OpenVINO model, and the digest of the weights that it was made from."""
    parts = {"network": network, "weights": weights, "digest": bytes.fromhex(state_digest(model.state_dict()))}
    return save({key: torch.frombuffer(bytearray(part), dtype=torch.uint8) for key, part in parts.items()})


def read_int8(model: Model, *, path: Path, sha256: str) -> tuple[bytes, bytes]:
    """The XML and the weights in an `int8.safetensors`.

    Raises:
        WeightsError: missing, damaged, or made from other weights than the model's.
    """
    if not path.is_file() or sha256_of(path) != sha256:
        raise WeightsError(f"{path}: missing or damaged, by the SHA-256 in {CONFIG_NAME}. Download or copy it again.")
    tensors = read_tensors(path)
    if tensors.keys() != {"network", "weights", "digest"}:
        raise WeightsError(f"{path}: holds {shown(sorted(tensors))}: not an int8 network of this library")
    network, weights, digest = (tensors[key].numpy().tobytes() for key in ("network", "weights", "digest"))
    if digest.hex() != state_digest(model.state_dict()):
        raise WeightsError(f"{path}: made from other weights than the model's: quantize these with tools/quantize.py")
    return network, weights


def load(model: Model, tensors: Mapping[str, Tensor], path: Path) -> bool:
    """Load a state dict strictly, but for heads of another number of classes, which start anew and are logged.

    Returns whether there were such heads. The error says what does not fit, and which variant the file holds.
    """
    state = model.state_dict()
    changed: tuple[str, ...] = ()
    for key, head in _HEADS.items():
        if key in tensors and key in state and tensors[key].shape != state[key].shape:
            changed += head
    expected = {key: t for key, t in state.items() if not key.startswith(changed)}
    fitting = {key: t for key, t in tensors.items() if not key.startswith(changed)}
    if misfits := _misfits(fitting, expected):
        holder = recognised(tensors)
        hint = f" It holds {holder.name}." if holder not in (None, model.variant) else ""
        raise WeightsError(f"{path}: not weights of {model.variant.name} as configured: tensors {misfits}.{hint}")
    model.load_state_dict(fitting, strict=False)
    if changed:
        log.warning(
            "%s: other numbers of classes than in %s, so these start from random values: %s",
            model.variant.name,
            path,
            ", ".join(sorted(state.keys() - expected.keys())),
        )
    return bool(changed)


def _misfits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Which tensors do not fit, and why; empty if all do."""
    common = expected.keys() & tensors.keys()
    unlike = {key for key in common if tensors[key].is_floating_point() != expected[key].is_floating_point()}
    kinds = {
        "missing": expected.keys() - tensors.keys(),
        "unexpected": tensors.keys() - expected.keys(),
        "of another shape": {key for key in common if tensors[key].shape != expected[key].shape},
        "of another type": unlike,
        "with NaN or infinite values": {key for key in common - unlike if not is_finite(tensors[key])},
    }
    return ", ".join(f"{len(keys)} {what} (first: {shown(min(keys))[1:-1]})" for what, keys in kinds.items() if keys)


def load_backbone(model: Model, source: str | os.PathLike[str] | None = None) -> str:
    """Start a model's body from ImageNet weights; FPN, RPN and heads keep their values.

    Args:
        source: None: timm's, downloaded; a file: a state dict of torchvision's names, as safetensors or as `torch.save`
            wrote it, a ResNet34's body also from a ResNet18's.

    Returns:
        The file, or repository and commit, the weights came from.

    Raises:
        WeightsError: no network and not in the cache, damaged, or not a ResNet of this depth.
    """
    if source is None:
        repository, revision, sha256 = backbone_entry(model.variant.backbone)
        path = from_hub(HubSource(repository, revision), (WEIGHTS_NAME,), sha256) / WEIGHTS_NAME
        place = f"{repository}@{path.parent.name}"
    else:
        path, place = Path(source), str(source)
    tensors = read_tensors(path) if path.suffix == ".safetensors" else read_state_dict(path)
    body: Any = model.backbone.body
    state = body.state_dict()
    if model.variant.backbone == "resnet34" and "layer1.2.conv1.weight" not in tensors:
        tensors = _deepened(tensors, state)
    fitting = {key: t for key, t in tensors.items() if key in state or not key.startswith(_BEYOND_A_BODY)}
    expected = {key: t for key, t in state.items() if key in tensors or not key.endswith("num_batches_tracked")}
    if misfits := _misfits(fitting, expected):
        raise WeightsError(f"{place}: not a {model.variant.backbone}: tensors {misfits}")
    body.load_state_dict(fitting, strict=False)
    log.info("%s: the body starts from %s (ImageNet)", model.variant.name, place)
    return place


def _deepened(resnet18: Mapping[str, Tensor], resnet34: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet34's body that computes what a ResNet18's does: the blocks that are more begin as the identity."""
    tensors = dict(resnet18)
    for key, value in resnet34.items():
        stage, _, rest = key.partition(".")
        if stage.startswith("layer") and int(rest.split(".")[0]) >= _RESNET18_BLOCKS:
            closed = rest.endswith(("bn2.weight", "bn2.bias"))
            tensors[key] = torch.zeros_like(value) if closed else value
    return tensors
