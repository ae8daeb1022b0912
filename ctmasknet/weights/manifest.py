"""The one list of known weights (`manifest.json`). Standard library only: listing variants must not import torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ctmasknet.errors import WeightsError
from ctmasknet.registry import VARIANTS, Variant

MANIFEST = Path(__file__).with_name("manifest.json")


@dataclass(frozen=True)
class ManifestEntry:
    """One known set of weights: bundled with the package, on the Hub, or both.

    Attributes:
        tag: which training they come from.
        sha256, bytes: of the safetensors file.
        license: SPDX identifier of the weights (they inherit their training data's terms).
        file: path of the bundled safetensors file, relative to this package; None if not bundled.
        repository, revision: on the Hub, ``"owner/name"`` and 40-hex commit; None if not published.
    """

    variant: str
    tag: str
    sha256: str
    bytes: int
    classes: tuple[str, ...]
    metrics: dict[str, Any]
    license: str
    file: str | None = None
    repository: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        problem = None
        if self.file is None and self.repository is None:
            problem = "neither file nor repository says where the weights are"
        elif self.file is not None and (".." in Path(self.file).parts or Path(self.file).is_absolute()):
            problem = f"file {self.file!r} leaves the package"
        elif self.repository is not None and not re.fullmatch("[0-9a-f]{40}", self.revision or ""):
            problem = f"{self.repository} is not pinned to a 40-hex commit"
        elif not re.fullmatch("[0-9a-f]{64}", self.sha256):
            problem = "sha256 must have 64 hexadecimal digits"
        if problem is not None:
            raise WeightsError(f"manifest.json: {self.variant}: {problem}")

    @property
    def path(self) -> Path | None:
        """The bundled file; None if not bundled."""
        return None if self.file is None else MANIFEST.parent / self.file

    @property
    def place(self) -> str:
        """Where the weights are, for people."""
        on_hub = f"{self.repository}@{self.revision}"
        return ", ".join(["bundled"] * bool(self.file) + [on_hub] * bool(self.repository))


@dataclass(frozen=True)
class BackboneEntry:
    """ImageNet weights of a ResNet body.

    Attributes:
        repository: timm's Hub repository.
        revision: commit, or ``"main"`` where no commit could be verified; `sha256` pins the content either way.
        sha256, bytes: of its `model.safetensors`.
    """

    repository: str
    revision: str
    sha256: str
    bytes: int


@cache
def manifest() -> tuple[ManifestEntry, ...]:
    """Every known set of weights, the default of each variant first."""
    entries = json.loads(MANIFEST.read_text(encoding="utf-8"))["weights"]
    return tuple(ManifestEntry(**(entry | {"classes": tuple(entry["classes"])})) for entry in entries)


def known_as(sha256: str) -> str | None:
    """Variant and tag of the weights file with this hash, published or only prepared for it; None if unknown."""
    lists = json.loads(MANIFEST.read_text(encoding="utf-8"))
    entries = lists["weights"] + lists.get("prepared", [])
    return next((f"{entry['variant']}, {entry['tag']}" for entry in entries if entry["sha256"] == sha256), None)


def backbone_entry(backbone: str) -> BackboneEntry:
    """The ImageNet weights of a body, by timm's name (``"resnet18"``)."""
    return BackboneEntry(**json.loads(MANIFEST.read_text(encoding="utf-8"))["backbones"][backbone])


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
        f"{variant.name} has no trained weights yet; these have: {having}. Train it (ctmasknet train {variant.name} "
        "--data DIR --out RUN), convert the author's checkpoint (ctmasknet convert), or give a path or a "
        "Hub repository: weights='folder'."
    )


def variants_with_weights() -> list[str]:
    """Names of the variants that have default weights, in registry order."""
    having = {entry.variant for entry in manifest()}
    return [name for name in VARIANTS if name in having]
