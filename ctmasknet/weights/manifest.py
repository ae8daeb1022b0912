"""The one list of known weights (`manifest.json`). Standard library only: listing variants must not import torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ctmasknet.errors import WeightsError
from ctmasknet.registry import VARIANTS, Variant

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class ManifestEntry:
    """One known set of weights.

    Attributes:
        variant: registry name.
        tag: which training they come from.
        file: path of the safetensors file, relative to this package.
        sha256, bytes: of that file.
        classes: names of the detector's classes, or of the image classes for a classifier.
        metrics: figures measured with these weights.
        license: SPDX identifier of the weights (they inherit their training data's terms).
    """

    variant: str
    tag: str
    file: str
    sha256: str
    bytes: int
    classes: tuple[str, ...]
    metrics: dict[str, Any]
    license: str

    @property
    def path(self) -> Path:
        """The bundled file."""
        return _HERE / self.file


@cache
def manifest() -> tuple[ManifestEntry, ...]:
    """Every known set of weights, the default of each variant first."""
    entries = json.loads((_HERE / "manifest.json").read_text(encoding="utf-8"))["weights"]
    return tuple(ManifestEntry(**(entry | {"classes": tuple(entry["classes"])})) for entry in entries)


def default_entry(variant: Variant) -> ManifestEntry:
    """The default weights of a variant.

    Raises:
        WeightsError: none exist; says which variants have some, and how to get weights for this one.
    """
    for entry in manifest():
        if entry.variant == variant.name:
            return entry
    having = ", ".join(dict.fromkeys(entry.variant for entry in manifest()))
    raise WeightsError(
        f"{variant.name} has no trained weights yet; these have: {having}. "
        f"Convert the author's checkpoint with tools/convert_released.py, or give a path: weights='folder'."
    )


def variants_with_weights() -> list[str]:
    """Names of the variants that have default weights, in registry order."""
    having = {entry.variant for entry in manifest()}
    return [name for name in VARIANTS if name in having]
