"""What a run leaves to read: metrics.csv, TensorBoard, curves.png, run.json; written by one process."""

from __future__ import annotations

import csv
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import ctmasknet
from ctmasknet.errors import CTMaskNetError, import_extra

_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        CTMaskNetError: it cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8", newline=""
        ) as file:
            file.write(text)
        temporary = Path(file.name)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise CTMaskNetError(f"{path}: cannot be written ({error}). Free space, or choose another folder") from None


def write_json(path: Path, values: Any) -> None:
    """Write plain values as JSON, whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """One row per epoch, whole or not at all; a figure that an epoch lacks is left empty."""
    columns = list(dict.fromkeys(key for row in history for key in row))

    class Lines(list[str]):
        write = list.append

    lines = Lines()
    writer = csv.DictWriter(lines, columns)
    writer.writeheader()
    writer.writerows(history)
    write_text(path, "".join(lines))


def plot_curves(path: Path, history: list[dict[str, Any]]) -> None:
    """Losses, validation metrics and learning rate over epochs as a PNG (extra ``plots``)."""
    matplotlib = import_extra("matplotlib.figure", "plots", "drawing curves.png")
    losses = [key for key in history[-1] if "loss" in key]
    scores = [
        key
        for key in dict.fromkeys(key for row in history for key in row)
        if key in ("ap50", "ap75", "ap", "dice_pooled", "dice_mean", "accuracy") or key.startswith("sensitivity")
    ]
    groups = [("Loss", losses), ("Validation", scores), ("Learning rate", ["lr"])]
    figure = matplotlib.Figure(figsize=(12, 3.5), layout="constrained")
    for axis, (title, keys) in zip(figure.subplots(1, 3), groups, strict=True):
        for key in keys:
            points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=key, marker=".", markersize=3)
        axis.set(title=title, xlabel="Epoch")
        if axis.lines:
            axis.legend(fontsize="x-small", loc="upper right")
    figure.savefig(path, dpi=120)


def versions() -> dict[str, str]:
    """Versions of what a run's result depends on."""
    found = {"ctmasknet": ctmasknet.__version__, "python": sys.version.split()[0], "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    """What a run computed on, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> float:
    """Largest memory used so far, GB: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return float("nan")
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class TensorBoard:
    """TensorBoard scalars and pictures in a folder, or nothing if switched off."""

    def __init__(self, folder: Path, *, enabled: bool, purge_step: int) -> None:
        self._writer = None
        if enabled:
            import_extra("tensorboard", "train", "TensorBoard logs")
            from torch.utils.tensorboard import SummaryWriter

            # Entries after purge_step come from before an interruption and will be written again.
            self._writer = SummaryWriter(str(folder), purge_step=purge_step or None)

    def scalars(self, values: dict[str, Any], step: int) -> None:
        """Every number of `values` under its name."""
        if self._writer is not None:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(key, value, step)

    def pictures(self, name: str, make: Callable[[], Sequence[Any]], step: int) -> None:
        """(H, W, 3) uint8 arrays, made only if they are wanted."""
        if self._writer is not None:
            for number, picture in enumerate(make()):
                self._writer.add_image(f"{name}/{number}", picture, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.close()
