"""The one list of known weights (`manifest.json`). Standard library only: listing variants must not import torch."""

from __future__ import annotations

import json
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

    @property
    def path(self) -> Path | None:
        """The bundled file; None if not bundled."""
        return None if self.file is None else MANIFEST.parent / self.file

    @property
    def place(self) -> str:
        """Where the weights are, for people."""
        on_hub = f"{self.repository}@{self.revision}"
        return ", ".join(["bundled"] * bool(self.file) + [on_hub] * bool(self.repository))


@cache
def manifest() -> tuple[ManifestEntry, ...]:
    """Every known set of weights, the default of each variant first."""
    return tuple(ManifestEntry(**(entry | {"classes": tuple(entry["classes"])})) for entry in _lists()["weights"])


def known_as(sha256: str) -> str | None:
    """Variant and tag of the weights file with this hash, published or only prepared for it; None if unknown."""
    entries = _lists()["weights"] + _lists().get("prepared", [])
    return next((f"{entry['variant']}, {entry['tag']}" for entry in entries if entry["sha256"] == sha256), None)


def backbone_entry(backbone: str) -> tuple[str, str, str]:
    """Where timm's ImageNet weights of a body are: repository, revision, and the SHA-256 of its `model.safetensors`.

    The revision is ``"main"`` where no commit could be verified; the hash pins the content either way.
    """
    entry = _lists()["backbones"][backbone]
    return entry["repository"], entry["revision"], entry["sha256"]


@cache
def _lists() -> dict[str, Any]:
    return json.loads(MANIFEST.read_text(encoding="utf-8"))


def default_entry(variant: Variant) -> ManifestEntry:
    """The default weights of a variant; the error says which have some, and how to get weights for this one."""
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
