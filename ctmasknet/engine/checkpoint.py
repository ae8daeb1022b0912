"""Checkpoints: one safetensors file each, tensors plus JSON facts, written whole or not at all; never a pickle."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctmasknet.errors import CTMaskNetError, WeightsError

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d+)\.safetensors")


def write_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, keep: int
) -> Path:
    """Write `run`/checkpoints/step-N.safetensors and remove all but the newest `keep`.

    Args:
        tensors: everything that has to be restored, on any device.
        facts: plain values.

    Raises:
        CTMaskNetError: it cannot be written; the checkpoints before it are intact.
    """
    stored = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    header = {"facts": json.dumps(facts), "crc32": str(_crc32(stored))}
    path = run / FOLDER / f"step-{step:09d}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-")
        os.close(handle)
        unfinished = Path(name)
        try:
            save_file(stored, unfinished, metadata=header)
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            unfinished.chmod(0o644)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        for old in list_checkpoints(run)[keep:]:
            old.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise CTMaskNetError(
            f"{path}: the checkpoint cannot be written ({error}). Free space there, or choose another folder; "
            "checkpoints before it are intact"
        ) from None
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
        if not {"facts", "crc32"} <= set(header):
            raise WeightsError(f"{path}: not a training checkpoint (weights? give them as weights, not resume)")
        if header["crc32"] != str(_crc32(tensors)):
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
            tensors, facts = read_checkpoint(path)
        except WeightsError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            log.warning("%s; continuing from the one before, %s", problem, path.name)
        return path, tensors, facts
    raise WeightsError("; ".join(problems) + ". No checkpoint is left: start anew in another folder")


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    folder = run / FOLDER
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, reverse=True)


def remove_unfinished(run: Path) -> None:
    """Delete what a killed process left of a checkpoint that it was writing."""
    folder = run / FOLDER
    for path in folder.glob(".unfinished-*") if folder.is_dir() else ():
        path.unlink(missing_ok=True)


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


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state as flat tensors, ``"<parameter>.<name>"``, and its groups as plain values."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, state["param_groups"]


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Restore what `pack_optimizer` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _crc32(tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for key in sorted(tensors):
        value = zlib.crc32(key.encode(), value)
        value = zlib.crc32(tensors[key].reshape(-1).view(torch.uint8).numpy().data, value)
    return value
