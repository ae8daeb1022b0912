"""The way out: a folder that `from_pretrained` reads, and one commit to a Hub repository."""

from __future__ import annotations

import math
import numbers
import os
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants

from ctmasknet.errors import ConfigError, WeightsError
from ctmasknet.models import Model
from ctmasknet.registry import get_variant
from ctmasknet.weights.assemble import assemble
from ctmasknet.weights.card import FOLDER, model_card
from ctmasknet.weights.download import HubSource, explained, hub_source
from ctmasknet.weights.files import (
    CARD_NAME,
    CONFIG_NAME,
    GOLDEN_NAME,
    WEIGHTS_NAME,
    StoredWeights,
    fingerprint,
    read_weights,
    sha256_of,
    write_weights,
)
from ctmasknet.weights.golden import check_golden, write_golden

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_INHERITED = ("license", "classes")  # what still holds of weights that were trained further


@dataclass(frozen=True)
class Published:
    """Weights on the Hub.

    Attributes:
        variant: registry name.
        repository: ``"owner/name"``.
        revision: the commit, 40 hexadecimal digits.
        sha256, bytes: of `model.safetensors`, as the Hub states them.
    """

    variant: str
    repository: str
    revision: str
    sha256: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def save_pretrained(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    metrics: Mapping[str, Any] | None = None,
    dataset: str | None = None,
    license: str | None = None,
    dtype: str = "float32",
) -> Path:
    """Write a model with its config, card and golden file; see `Shareable.save_pretrained`."""
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r}: use {' or '.join(map(repr, _DTYPES))}")
    metadata = _still_true(model)
    if metrics is not None:
        metadata["metrics"] = _numbers(metrics)
    if dataset is not None:
        metadata["dataset"] = dataset
    if license is not None:
        metadata["license"] = license
    options = model.config.to_dict()
    written = write_weights(
        folder,
        model.state_dict(),
        variant=model.variant.name,
        config=options,
        metadata=metadata,
        card=model_card(model.variant, options, metadata),
        dtype=_DTYPES[dtype],
    )
    copy: Any = model
    if dtype != "float32":  # the outputs belong to the values as stored
        copy = deepcopy(model).cpu()
        copy.load_state_dict(read_weights(written).tensors)
    write_golden(copy, written)
    return written


def push_to_hub(model: Model, repository: str, *, private: bool = False, **options: Any) -> Published:
    """Save a model to a temporary folder and push it; see `Shareable.push_to_hub`."""
    _target(repository)  # before the work
    with tempfile.TemporaryDirectory() as folder:
        return push_folder(save_pretrained(model, folder, **options), repository, private=private)


def push_folder(folder: str | os.PathLike[str], repository: str, *, private: bool = False) -> Published:
    """Publish a folder of weights: model, config, card and golden file, in one commit; nothing else in it travels.

    The folder is checked first, as by `check_folder`. A missing card or golden file is made on the way.

    Args:
        repository: ``"owner/name"``, made if missing.
        private: make a new repository private.

    Raises:
        WeightsError: not weights of this library, damaged, no permission (HF_TOKEN), no network; the Hub holds other
            bytes than were sent.
    """
    target = _target(repository)
    stored = check_folder(folder)
    source = stored.path.parent
    variant = get_variant(stored.variant or "")
    card_file = source / CARD_NAME
    own = card_file.read_text(encoding="utf-8") if card_file.is_file() else None
    card = own or model_card(variant, stored.config, stored.metadata)
    with tempfile.TemporaryDirectory() as temporary:
        golden = source / GOLDEN_NAME
        if not golden.is_file():
            golden = write_golden(assemble(variant, stored, {}), Path(temporary))
        operations = [
            CommitOperationAdd(CARD_NAME, card.replace(FOLDER, repository).encode()),
            CommitOperationAdd(CONFIG_NAME, str(source / CONFIG_NAME)),
            CommitOperationAdd(GOLDEN_NAME, str(golden)),
            CommitOperationAdd(WEIGHTS_NAME, str(stored.path)),
        ]
        if constants.HF_HUB_OFFLINE:
            raise WeightsError(f"{repository}: HF_HUB_OFFLINE forbids to publish")
        api = HfApi()
        explained(target, lambda: api.create_repo(repository, private=private, exist_ok=True))
        message = f"{variant.name} {stored.metadata.get('note', '')}".strip()[:72]
        try:
            commit = explained(target, lambda: api.create_commit(repository, operations, commit_message=message))
        except ValueError as error:  # the client's word for a card whose metadata the Hub refuses
            raise WeightsError(f"{card_file}: the Hub refuses the card: {' '.join(str(error).split())}") from None
    there = explained(target, lambda: api.get_paths_info(repository, [WEIGHTS_NAME], revision=commit.oid))
    sha256 = sha256_of(stored.path)
    lfs = getattr(there[0], "lfs", None) if there else None
    if lfs is None or lfs.sha256 != sha256:
        raise WeightsError(f"{repository}@{commit.oid}: the Hub holds other weights than were sent: push again")
    return Published(variant.name, repository, commit.oid, sha256, lfs.size)


def check_folder(folder: str | os.PathLike[str]) -> StoredWeights:
    """Load a folder as a stranger would, golden file included if there is one.

    Raises:
        WeightsError: not a folder of weights, no config.json, damaged, or outputs other than recorded.
    """
    if not Path(folder).is_dir():
        raise WeightsError(f"{folder}: no such folder. Give one with {WEIGHTS_NAME} and {CONFIG_NAME}.")
    stored = read_weights(folder)
    if stored.variant is None:
        raise WeightsError(f"{folder}: holds no {CONFIG_NAME}, so nobody could tell which variant it is")
    model: Model = assemble(get_variant(stored.variant), stored, {})
    golden = stored.path.with_name(GOLDEN_NAME)
    if golden.is_file():
        check_golden(model, golden)
    return stored


def _target(repository: str) -> HubSource:
    source = hub_source(repository)
    if source is None or "@" in repository:
        raise WeightsError(f"{repository!r} is not a repository id: give owner/name")
    return source


def _still_true(model: Model) -> dict[str, Any]:
    """Metadata that hold for the values as they are now."""
    if model.loaded is None:
        return dict(model.metadata)
    checksum, said = model.loaded
    if fingerprint(model.state_dict()) == checksum:
        return dict(model.metadata)
    return {key: value for key, value in model.metadata.items() if key in _INHERITED or value != said.get(key)}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ConfigError(f"metrics[{name!r}]={value!r}: must be a finite number")
    return {str(name): value if isinstance(value, int) else float(value) for name, value in metrics.items()}
