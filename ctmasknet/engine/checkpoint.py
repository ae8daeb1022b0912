"""Checkpoints: one safetensors file each, tensors plus JSON facts, written whole or not at all; never a pickle."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctmasknet.errors import CTMaskNetError, WeightsError
from ctmasknet.output import OutputError, write_files
from ctmasknet.weights.files import state_digest

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
KEPT = 2
_FORMAT = "4"


@dataclass
class State:
    """Where a run is. With the tensors of its checkpoint, all that resuming needs.

    Attributes:
        epoch: the epoch in training, from 0.
        batch: batches of it that are done, per process.
        step: steps so far, skipped ones included.
        skipped, bad_in_row: steps whose loss or gradient was not finite: all, and since the last good one.
        seconds: of training and validation.
        loss_sums, loss_steps: losses of this epoch so far.
        best_epoch, best_score, best_metrics, validations_since_best: of the validations.
        operating_point: of `best`.
        body: file or repository of the ImageNet weights that the body started from, None for others.
        done: nothing is left to train: all epochs, or stopped early.
        finished: `best` has its final metadata.
        history: one row per epoch; epoch 0 are the start weights.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    skipped: int = 0
    bad_in_row: int = 0
    seconds: float = 0.0
    loss_sums: dict[str, float] = field(default_factory=dict)
    loss_steps: int = 0
    best_epoch: int | None = None
    best_score: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    operating_point: dict[str, float] = field(default_factory=dict)
    body: str | None = None
    validations_since_best: int = 0
    done: bool = False
    finished: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


def write_checkpoint(run: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write `run`/checkpoints/step-N.safetensors, tensors and plain values, and remove all but the newest `KEPT`.

    Raises:
        CTMaskNetError: it cannot be written; the checkpoints before it are intact.
    """
    stored = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    header = {"format": _FORMAT, "facts": json.dumps(facts), "sha256": state_digest(stored)}
    path = run / FOLDER / f"step-{step:09d}.safetensors"
    try:
        write_files({path: lambda stream: save_file(stored, stream.name, metadata=header)}, sync=True)
        killed_amid_writing = path.parent.glob(".ctmasknet-*.tmp")
        for old in [*list_checkpoints(run)[KEPT:], *killed_amid_writing]:
            old.unlink(missing_ok=True)
    except (OSError, OutputError, SafetensorError) as error:
        raise CTMaskNetError(f"{path}: {error}; the checkpoints before it are intact") from None
    return path


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and facts of a checkpoint.

    Raises:
        WeightsError: missing, damaged, or not a checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if "facts" not in header:
            raise WeightsError(f"{path}: not a training checkpoint (weights? give them as weights, not resume)")
        if header.get("format") != _FORMAT:
            raise WeightsError(f"{path}: a checkpoint of another version of ctmasknet; start from its weights instead")
        if header["sha256"] != state_digest(tensors):
            raise WeightsError(f"{path}: damaged: its checksum does not match")
        return tensors, json.loads(header["facts"])
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(f"{path}: not a readable checkpoint ({error})") from None


def newest_readable(candidates: list[Path]) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The first checkpoint that can be read; the damaged ones before it are named in a warning.

    Raises:
        WeightsError: none can be read.
    """
    problems = []
    for path in candidates:
        try:
            return path, *read_checkpoint(path)
        except WeightsError as error:
            problems.append(str(error))
            log.warning("%s; the one before is tried", error)
    raise WeightsError("; ".join(problems) + ". No checkpoint is left: start again in another folder")


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    return sorted((run / FOLDER).glob("step-*.safetensors"), reverse=True)


def checkpoints_from(path: Path) -> list[Path]:
    """What a `resume` path stands for, newest first: a run folder's checkpoints, or a file and those before it.

    Raises:
        WeightsError: there is nothing.
    """
    found = list_checkpoints(path)
    if path.is_file():
        siblings = list_checkpoints(path.parent.parent)
        found = [path, *[other for other in siblings if other.name < path.name]]
    if not found:
        raise WeightsError(f"{path}: no checkpoint there; give a run folder or a file in its {FOLDER}/")
    return found


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors, ``"<parameter>.<name>"``."""
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `pack_optimizer` gave; parameter groups and their settings stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
