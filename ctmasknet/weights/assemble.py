"""From stored tensors to a model: strict, but for heads whose number of classes changed on purpose; ImageNet bodies."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctmasknet.errors import ConfigError, WeightsError
from ctmasknet.models import COVIDCTMaskNet, LesionMaskRCNN, Model, model_config
from ctmasknet.registry import VARIANTS, Variant
from ctmasknet.weights.files import WEIGHTS_NAME, StoredWeights, inherited, is_finite, read_tensors, state_digest
from ctmasknet.weights.hub import HubSource, discard, fetch, hub_source, is_commit
from ctmasknet.weights.manifest import backbone_entry
from ctmasknet.weights.released import read_state_dict

log = logging.getLogger(__name__)

# What depends on the number of classes, and so starts anew when that number changes.
_DETECTOR_HEADS = (
    "roi_heads.box_predictor.cls_score.",
    "roi_heads.box_predictor.bbox_pred.",
    "roi_heads.mask_predictor.mask_fcn_logits.",
)
_IMAGE_HEADS = ("module_s.logits.",)
_OPERATING_POINT = {"score_threshold": "box_score_thresh", "nms_threshold": "box_nms_thresh"}
_BODY_FILES = (".safetensors", ".pth", ".pt")
_RESNET18_BLOCKS = 2  # in each stage; a ResNet34 has 3, 4, 6 and 3
_BEYOND_A_BODY = ("layer2.", "layer3.", "layer4.", "fc.")  # what a cut ResNet may lack


def build(variant: Variant, options: Mapping[str, Any]) -> Model:
    """A model with random weights.

    Raises:
        ConfigError: unknown option, impossible value.
    """
    config = model_config(variant, **options)
    return LesionMaskRCNN(variant, config) if variant.task == "segmentation" else COVIDCTMaskNet(variant, config)


def assemble(variant: Variant, stored: StoredWeights, options: Mapping[str, Any]) -> Model:
    """A model with stored weights, in evaluation mode, set to their operating point; `options` replace what is stored.

    Raises:
        ConfigError: unknown option, impossible value.
        WeightsError: the weights do not fit.
    """
    metadata = dict(stored.metadata)
    point = dict(metadata.get("operating_point", {})) if variant.task == "segmentation" else {}
    for key, option in _OPERATING_POINT.items():
        if option in options:  # the caller's threshold is the model's, and the weights' is no longer
            point.pop(key, None)
            metadata["operating_point"] = point
    thresholds = {_OPERATING_POINT[key]: value for key, value in point.items()}
    try:
        model = build(variant, stored.config | thresholds | dict(options))
    except ConfigError as error:
        raise ConfigError(f"{stored.path.parent / 'config.json'} with the options given: {error}") from None
    new_heads = load(model, stored.tensors, stored.path)
    model.metadata = metadata
    if new_heads:
        # Untrained heads: what was measured no longer holds; the terms of the rest still do.
        model.metadata = inherited(stored.metadata, stored.variant)
    model.loaded = (state_digest(model.state_dict()), dict(model.metadata))
    return model.eval()


def load(model: Model, tensors: Mapping[str, Tensor], path: Path) -> bool:
    """Load a state dict strictly, but for heads of another number of classes, which start anew and are logged.

    Returns:
        Whether there were such heads.

    Raises:
        WeightsError: tensors are missing, unexpected or of another shape, or hold NaN; says what the file holds.
    """
    new_heads = _changed_heads(tensors, model)
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
    damaged = [key for key, t in fitting.items() if not is_finite(t)]
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
    return bool(new_heads)


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


def _variant_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Which variant a state dict belongs to, by its number of values; None if none fits."""
    values = sum(t.numel() for t in tensors.values())
    return next((variant.name for variant in VARIANTS.values() if variant.num_values == values), None)


def load_backbone(model: Model, source: str | os.PathLike[str] | None = None) -> str:
    """Start a model's body from ImageNet weights; FPN, RPN and heads keep their values.

    Args:
        source: None: timm's, downloaded; a file: a state dict of torchvision's names, as safetensors or as `torch.save`
            wrote it, a ResNet34's body also from a ResNet18's; any other string: another commit of timm's repository
            than the manifest's, whose SHA-256 then is not checked.

    Returns:
        The file, or repository and commit, the weights came from.

    Raises:
        WeightsError: no network and not in the cache, damaged, or not a ResNet of this depth.
    """
    path = Path(source or "")
    if source is not None and (not isinstance(source, str) or path.suffix in _BODY_FILES or path.is_file()):
        place, tensors = str(path), read_tensors(path) if path.suffix == ".safetensors" else read_state_dict(path)
    else:
        place, tensors = _timms_body(model.variant.backbone, source)
    body: Any = model.backbone.body
    expected = body.state_dict()
    if model.variant.backbone == "resnet34" and "layer1.2.conv1.weight" not in tensors:
        tensors = _deepened(tensors, expected)
    missing = [k for k in expected if k not in tensors and not k.endswith("num_batches_tracked")]
    extra = [k for k in tensors if k not in expected and not k.startswith(_BEYOND_A_BODY)]
    wrong = [k for k, t in tensors.items() if k in expected and t.shape != expected[k].shape]
    if missing or extra or wrong:
        first = (missing or extra or wrong)[0]
        what = "lacks" if missing else "holds an unexpected" if extra else "holds a misshapen"
        raise WeightsError(f"{place}: not a {model.variant.backbone}: {what} {first}")
    fitting = {key: tensors[key] for key in expected if key in tensors}
    if not all(map(is_finite, fitting.values())):
        raise WeightsError(f"{place}: holds NaN or infinite values")
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


def _timms_body(backbone: str, revision: str | None) -> tuple[str, dict[str, Tensor]]:
    """Repository and commit, and the weights there."""
    entry = backbone_entry(backbone)
    source: HubSource | None = HubSource(entry.repository, entry.revision)
    sha256: dict[str, str] = {WEIGHTS_NAME: entry.sha256}
    if revision is not None:
        source, sha256 = hub_source(entry.repository, revision), {}
    if source is None:
        raise WeightsError(f"{entry.repository}: not a repository id: reinstall ctmasknet")
    folder = fetch(source, (WEIGHTS_NAME,), sha256=sha256)
    place = f"{source.repository}@{folder.name if is_commit(folder.name) else source.revision}"
    try:
        return place, read_tensors(folder / WEIGHTS_NAME)
    except WeightsError as error:
        discard(folder, (WEIGHTS_NAME,))
        raise WeightsError(f"{place}: {error} It was not kept in the cache.") from None
