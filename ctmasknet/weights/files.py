"""What a folder of weights holds (`model.safetensors`, `config.json`, a card, a golden file), read with checks."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ctmasknet.errors import ConfigError, WeightsError, shown, typed
from ctmasknet.registry import VARIANTS

WEIGHTS_NAME, CONFIG_NAME, CARD_NAME = "model.safetensors", "config.json", "README.md"
GOLDEN_NAME, INT8_NAME = "golden.safetensors", "int8.safetensors"
OWN_STATE_DICT = (
    "A state dict of your own goes into a model first, model.load_state_dict(torch.load(path, weights_only=True)), "
    "and model.save_pretrained(folder) then writes what loads here."
)
"""What to do with a file that torch.save wrote of a state dict, for errors."""
FORMAT = 1
"""Of config.json."""
_CONFIG_TYPES = {"library": str, "format": int, "variant": str, "config": dict[str, Any], "metadata": dict[str, Any]}
_METADATA_TYPES = {
    "classes": list[str],
    "operating_point": dict[str, float],
    "temperature": float,
    "metrics": dict[str, float],
    "training": dict[str, Any],
    "dataset": str,
    "license": str,
    "note": str,
    "caveat": str,
    "derived_from": list[dict[str, str | None]],
    "int8": dict[str, str],
}
_POINT_TYPES = {"score_threshold": float, "nms_threshold": float}
_INT8_TYPES = {"sha256": str, "measured": str}
_JSON_LIMIT, _LONGEST_NAME = 1_000_000, 100
_TERMS = ("license", "caveat")


@dataclass(frozen=True)
class StoredWeights:
    """What a weights file says, before a model is built of it.

    Attributes:
        tensors: key -> tensor, floating-point ones in float32 however they are stored.
        variant: its name, None if no config.json lies beside the file; then `config` and `metadata` are empty.
        config: the options the model was saved with.
        metadata: operating point, metrics, data set, licence; plain values.
    """

    path: Path
    tensors: dict[str, Tensor]
    variant: str | None
    config: dict[str, Any]
    metadata: dict[str, Any]


def read_weights(path: str | os.PathLike[str]) -> StoredWeights:
    """Read a safetensors file, or the one in a folder, with the `config.json` beside it."""
    path = Path(path)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        missing = f"the folder holds no {WEIGHTS_NAME}" if path.is_dir() else "no such file or folder"
        raise WeightsError(f"{path}: {missing}. Give a .safetensors file or a folder with {WEIGHTS_NAME}.")
    tensors = read_tensors(file)
    facts = _read_config(file.with_name(CONFIG_NAME))
    return StoredWeights(file, tensors, facts.get("variant"), facts.get("config", {}), facts.get("metadata", {}))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, floating-point ones in float32; a pickle is refused by its first bytes."""
    try:
        with file.open("rb") as opened:
            head = opened.read(9)  # of safetensors: the length of its header, which begins with a brace
        if head[8:] == b"{" or not head.startswith((b"\x80", b"PK\x03\x04")):
            tensors = load_file(file)
            return {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{file}: not a readable safetensors file ({error}). Download or copy it again.") from None
    raise WeightsError(
        f"{file}: not safetensors but a pickle (torch.save), which could run code when loaded. An author's "
        f"released checkpoint loads with load_released(path) or converts with: ctmasknet convert. {OWN_STATE_DICT}"
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, told by the two extremes: one pass, where `isfinite().all()` takes many."""
    if not tensor.is_floating_point():
        return True
    return tensor.numel() == 0 or all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor))


def state_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 over a state dict: of each tensor, by name, its name in UTF-8 and its little-endian bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def inherited(metadata: Mapping[str, Any], variant: str | None) -> dict[str, Any]:
    """What still holds of the metadata of weights once their values change, or once others are trained from them.

    Their `license` and `caveat`; and `derived_from`, a list of what they were (`variant`, `license`, `caveat`,
    `dataset`, as far as known), with what they in turn came from before them.
    """
    before = {"variant": variant} | {key: metadata[key] for key in (*_TERMS, "dataset") if key in metadata}
    terms = {key: metadata[key] for key in _TERMS if key in metadata}
    origins = metadata.get("derived_from", [])
    return terms | {"derived_from": origins if before in origins else [*origins, before]}


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_metadata(path: Path) -> dict[str, Any]:
    """A JSON file of metadata, checked as those of a config.json are."""
    return checked_metadata(path, _read_json(path))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    facts = _read_json(path)
    if facts.get("library") != "ctmasknet":
        raise WeightsError(f'{path}: not a config.json of this library (no "library": "ctmasknet")')
    _check_types(path, facts, _CONFIG_TYPES)
    if missing := sorted(_CONFIG_TYPES.keys() - facts.keys()):
        raise WeightsError(f"{path}: lacks {', '.join(missing)}")
    if facts["format"] != FORMAT or facts["variant"] not in VARIANTS:
        what = f"format {facts['format']} or variant {shown(facts['variant'])}"
        raise WeightsError(f"{path}: {what} is unknown to this version: update ctmasknet")
    return facts | {"metadata": checked_metadata(path, facts["metadata"])}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise ValueError(f"larger than {_JSON_LIMIT} bytes")
        facts = json.loads(path.read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
        json.dumps(facts, ensure_ascii=False).encode()  # half a surrogate pair cannot be
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(facts, dict):
        raise WeightsError(f"{path}: must hold a JSON object")
    return facts


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"{number[:20]} is not a finite number")
    return float(number)


def _check_types(path: Path, facts: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    for key, value in facts.items():
        if key not in types:
            raise WeightsError(f"{path}: unknown field {shown(key)}")
        try:
            typed(key, value, types[key])
        except ConfigError as error:
            raise WeightsError(f"{path}: {error}") from None


def checked_metadata(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata of weights, if each field has its type; the error names `path`."""
    _check_types(path, metadata, _METADATA_TYPES)
    point = metadata.get("operating_point", {})
    _check_types(path, point, _POINT_TYPES)
    for key, value in point.items():
        if not 0 <= value <= 1:
            raise WeightsError(f"{path}: operating_point.{key}={value}: must lie in 0..1")
    if "int8" in metadata:
        _check_types(path, metadata["int8"], _INT8_TYPES)
        if missing := sorted(_INT8_TYPES.keys() - metadata["int8"].keys()):
            raise WeightsError(f"{path}: int8 lacks {', '.join(missing)}")
    if metadata.get("temperature", 1.0) <= 0:
        raise WeightsError(f"{path}: temperature={metadata['temperature']}: must be above 0")
    for name in metadata.get("classes", ()):
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise WeightsError(f"{path}: class {shown(name)}: a name has up to {_LONGEST_NAME} printable characters")
    return metadata
