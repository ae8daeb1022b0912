"""Which weights a name stands for: a local path, a Hub repository, or the default of a variant by the manifest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ctmasknet.errors import WeightsError
from ctmasknet.registry import VARIANTS, Variant, get_variant
from ctmasknet.weights.download import HubSource, discard, fetch, hub_source
from ctmasknet.weights.files import (
    CARD_NAME,
    CONFIG_NAME,
    GOLDEN_NAME,
    WEIGHTS_NAME,
    StoredWeights,
    read_weights,
    sha256_of,
)
from ctmasknet.weights.manifest import ManifestEntry, default_entry


def load_stored(
    weights: str | os.PathLike[str],
    variant: Variant | None,
    *,
    revision: str | None = None,
    golden: bool = False,
) -> StoredWeights:
    """Read what `weights` names, in this order: an existing path, the local cache, the Hub.

    Args:
        weights: ``"default"`` (needs a variant), a file, a folder, ``"owner/name"`` or ``"owner/name@revision"``.
        variant: what it must hold; None accepts any.
        revision: branch, tag or commit of a Hub repository.
        golden: also make sure of the golden file beside the weights.

    Raises:
        WeightsError: nothing there, damaged, another variant's, or the Hub cannot be reached.
    """
    if isinstance(weights, str) and weights == "default":
        if variant is None:
            raise WeightsError("'default' needs the name of a variant")
        return _load_entry(default_entry(variant), golden=golden)
    if not isinstance(weights, str | os.PathLike):
        raise WeightsError(f"weights={weights!r}: use None, 'default', or the path of a file or folder")
    source = None
    if isinstance(weights, str) and not Path(weights).exists():
        if weights in VARIANTS:
            raise WeightsError(f"{weights} is a variant, not a path: create_model('{weights}', weights='default')")
        source = hub_source(weights, revision)
    if source is not None:
        stored = _from_hub(source, golden=golden)
    elif revision is not None:
        raise WeightsError(f"{weights}: revision={revision!r} is for Hub repositories ('owner/name'), not for paths")
    else:
        stored = read_weights(weights)
    if variant is not None and stored.variant not in (None, variant.name):
        raise WeightsError(
            f"{source or stored.path}: holds {stored.variant}, not {variant.name}: "
            f"create_model('{stored.variant}', ...)"
        )
    return stored


@dataclass(frozen=True)
class Downloaded:
    """Weights that are on this machine.

    Attributes:
        name: as asked for.
        source: ``"bundled"``, or the Hub repository with its commit.
        folder: where they lie.
        bytes: of the weights file.
    """

    name: str
    source: str
    folder: Path
    bytes: int


def download(name: str) -> Downloaded:
    """Make weights ready for use without a network: config, weights, golden file and card.

    Args:
        name: a variant (its default weights), ``"owner/name"`` or ``"owner/name@revision"``.

    Raises:
        ConfigError: neither a repository nor a variant.
        WeightsError: see `load_stored`.
    """
    source = hub_source(name)
    if source is not None:
        stored = _from_hub(source, golden=False, keep=(GOLDEN_NAME, CARD_NAME))
    else:
        entry = default_entry(get_variant(name))
        stored = _load_entry(entry, golden=False, keep=(GOLDEN_NAME, CARD_NAME))
        if entry.path is not None and stored.path == entry.path:
            return Downloaded(name, "bundled", stored.path.parent, stored.path.stat().st_size)
        source = _place(entry)
    commit = HubSource(source.repository, stored.path.parent.name)
    return Downloaded(name, str(commit), stored.path.parent, stored.path.stat().st_size)


def _load_entry(entry: ManifestEntry, *, golden: bool, keep: tuple[str, ...] = ()) -> StoredWeights:
    if entry.path is not None and (entry.path.exists() or entry.repository is None):
        if not entry.path.is_file() or entry.path.stat().st_size != entry.bytes:
            raise WeightsError(f"{entry.path}: bundled weights are missing or damaged: reinstall ctmasknet")
        if sha256_of(entry.path) != entry.sha256:
            raise WeightsError(f"{entry.path}: bundled weights do not match their hash: reinstall ctmasknet")
        return read_weights(entry.path)
    stored = _from_hub(_place(entry), golden=golden, sha256=entry.sha256, keep=keep)
    if stored.variant != entry.variant:
        raise WeightsError(f"{_place(entry)}: holds {stored.variant}, not {entry.variant}, as the manifest says")
    return stored


def _place(entry: ManifestEntry) -> HubSource:
    if entry.repository is None or entry.revision is None:
        raise WeightsError(f"{entry.variant}: the manifest names no repository: reinstall ctmasknet")
    return HubSource(entry.repository, entry.revision)


def _from_hub(
    source: HubSource, *, golden: bool, sha256: str | None = None, keep: tuple[str, ...] = ()
) -> StoredWeights:
    names = (CONFIG_NAME, WEIGHTS_NAME, *((GOLDEN_NAME,) if golden else ()))
    folder = fetch(source, names, sha256={WEIGHTS_NAME: sha256} if sha256 else {}, optional=keep)
    try:
        return read_weights(folder)
    except WeightsError as error:
        discard(folder, (CONFIG_NAME, WEIGHTS_NAME))
        raise WeightsError(f"{source}: {error} It was not kept in the cache.") from None
