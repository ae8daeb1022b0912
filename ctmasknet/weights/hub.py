"""Which weights a name stands for: a local path, or the default of a variant as the manifest lists it."""

from __future__ import annotations

import os

from ctmasknet.errors import WeightsError
from ctmasknet.registry import Variant
from ctmasknet.weights.files import StoredWeights, read_weights, sha256_of
from ctmasknet.weights.manifest import default_entry


def load_stored(weights: str | os.PathLike[str], variant: Variant | None) -> StoredWeights:
    """Read what `weights` names: ``"default"`` (needs a variant), a file, or a folder.

    Raises:
        WeightsError: nothing there, damaged, or another variant's.
    """
    if isinstance(weights, str) and weights == "default":
        if variant is None:
            raise WeightsError("'default' needs the name of a variant")
        entry = default_entry(variant)
        if not entry.path.is_file() or entry.path.stat().st_size != entry.bytes:
            raise WeightsError(f"{entry.path}: bundled weights are missing or damaged: reinstall ctmasknet")
        if sha256_of(entry.path) != entry.sha256:
            raise WeightsError(f"{entry.path}: bundled weights do not match their hash: reinstall ctmasknet")
        return read_weights(entry.path)
    if not isinstance(weights, str | os.PathLike):
        raise WeightsError(f"weights={weights!r}: use None, 'default', or the path of a file or folder")
    stored = read_weights(weights)
    if variant is not None and stored.variant not in (None, variant.name):
        raise WeightsError(
            f"{stored.path}: holds {stored.variant}, not {variant.name}: create_model('{stored.variant}', ...)"
        )
    return stored
