"""`save_pretrained` and `push_to_hub` on the models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ctmasknet.models.config import ModelConfig
from ctmasknet.registry import Variant

if TYPE_CHECKING:
    from ctmasknet.models import Model
    from ctmasknet.weights.publish import Published


class Shareable:
    """Base of the models: each can write itself to a folder or to the Hugging Face Hub.

    How weights are stored is not the models' affair: the work is done in `ctmasknet.weights.publish`, imported when a
    method is called, so that importing the models needs no file format and no Hub client.

    huggingface_hub's `PyTorchModelHubMixin` is not used: it loads with strict=False, falls back to a pickled
    `pytorch_model.bin`, rejects ``owner/name@revision`` and cannot put metrics on the card it pushes.

    Attributes:
        variant, config, metadata: set by the models.
        loaded: checksum and metadata of the weights it was loaded with, None if random; by it, saving knows whether
            what was said of them still holds.
    """

    variant: Variant
    config: ModelConfig
    metadata: dict[str, Any]
    loaded: tuple[int, dict[str, Any]] | None = None

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        metrics: Mapping[str, Any] | None = None,
        dataset: str | None = None,
        license: str | None = None,
        dtype: Literal["float32", "float16"] = "float32",
    ) -> Path:
        """Write model.safetensors, config.json, the card README.md and golden.safetensors into a folder.

        `from_pretrained(folder)` gives the same model back, bit for bit in float32. What `metadata` says of the
        weights goes along; if the values have changed since they were loaded (fine-tuning), only what was set since,
        the names of the classes and the licence, which a derivative inherits.

        Args:
            folder: made if missing; files of these names are replaced.
            metrics: measured figures, name -> number; they replace those in `metadata`.
            dataset: what the weights were trained and measured on: a Hub data set id, or a sentence.
            license: SPDX identifier of the weights, lower case as on the Hub (``"cc-by-nc-sa-4.0"``).
            dtype: how values are stored; ``"float16"`` halves the file, and rounds.

        Raises:
            WeightsError: the folder cannot be written.
            ConfigError: metrics that are not numbers, unknown dtype.
        """
        from ctmasknet.weights.publish import save_pretrained

        return save_pretrained(
            cast("Model", self), folder, metrics=metrics, dataset=dataset, license=license, dtype=dtype
        )

    def push_to_hub(
        self,
        repository: str,
        *,
        metrics: Mapping[str, Any] | None = None,
        dataset: str | None = None,
        license: str | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        private: bool = False,
    ) -> Published:
        """Write the model to a Hub repository, made if missing, in one commit.

        Args:
            repository: ``"owner/name"``.
            metrics, dataset, license, dtype: as in `save_pretrained`.
            private: make a new repository private.

        Returns:
            Repository, commit, SHA-256 and size: what a manifest entry or a pinned ``"owner/name@commit"`` needs.

        Raises:
            WeightsError: not a repository id, no permission (HF_TOKEN), no network.
        """
        from ctmasknet.weights.publish import push_to_hub

        options: dict[str, Any] = {"metrics": metrics, "dataset": dataset, "license": license, "dtype": dtype}
        return push_to_hub(cast("Model", self), repository, private=private, **options)
