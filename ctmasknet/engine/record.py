"""What a run leaves: weights with their card, run.json, metrics.csv, curves.png, TensorBoard, and its result."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctmasknet.engine.batches import EpochBatches
from ctmasknet.engine.checkpoint import State
from ctmasknet.engine.config import TrainConfig
from ctmasknet.engine.setup import Setup
from ctmasknet.errors import import_extra
from ctmasknet.output import csv_table, json_bytes, write_files
from ctmasknet.registry import __version__
from ctmasknet.weights.publish import write_weights


@dataclass
class TrainResult:
    """What came of a run.

    Attributes:
        out: folder of the run.
        best, last: folders of weights, for `create_model(name, weights=...)`; None before the first epoch ended.
        best_epoch: the epoch whose weights are `best`, from 1.
        operating_point: score and NMS threshold stored with `best`; of a classifier, the temperature.
        finished: False if the run was asked to stop; train it again with ``resume="auto"`` to continue.
        epochs, steps: completed.
        skipped_steps: steps left out because loss or gradient was NaN or infinite.
        seconds: of training and validation, interruptions left out.
        metrics: of `best`; empty without validation.
        history: one dict per epoch, as in metrics.csv; epoch 0 has the figures of the weights that the run started
            from, if it started from any and has validation data.
        summary: a line for people: the best epoch, its figures and thresholds, and how the start weights did.
    """

    out: str
    best: str | None
    last: str | None
    best_epoch: int | None
    operating_point: dict[str, float]
    finished: bool
    epochs: int
    steps: int
    skipped_steps: int
    seconds: float
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    summary: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        """What came of it, in a few lines; `history` and `metrics` have the figures."""
        return f"TrainResult of {self.out}: {self.epochs} epochs\n  {self.summary}\n  best weights: {self.best}"


_ON_THE_CARD = (
    "recipe", "weights", "optimizer", "lr", "weight_decay", "schedule", "epochs", "balance", "batch_size", "accumulate",
    "ema", "precision", "augment", "train_min_size", "cache_rois", "seed",
)  # fmt: skip


class Record:
    """Writes what a run leaves to use and to read into its folder."""

    def __init__(self, config: TrainConfig, setup: Setup, batches: EpochBatches) -> None:
        self.config, self.setup, self.batches = config, setup, batches
        self.out = Path(config.out)
        device = device_name(next(setup.trained.parameters()).device)
        self._facts = {"slices": len(setup.names), "processes": batches.world, "device": device}
        self.versions = {
            "ctmasknet": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{package: version(package) for package in ("torch", "torchvision", "timm", "accelerate", "numpy")},
        }

    def write_weights(self, name: str, tensors: dict[str, Tensor], metrics: dict[str, float], state: State) -> Path:
        """A folder of weights with its card, ``best`` or ``last``; with a golden file once the run is finished."""
        config, model = self.config, self.setup.model
        training = {key: getattr(config, key) for key in _ON_THE_CARD} | self._facts
        training |= {"epochs_done": state.history[-1]["epoch"], "minutes": round(state.seconds / 60, 1)}
        training |= {package: self.versions[package] for package in ("ctmasknet", "torch", "torchvision")}
        if config.weights is not None and Path(config.weights).exists():
            # Folders of this machine are nobody's business.
            training["weights"] = Path(config.weights).name
        if state.body is not None:
            training["weights_backbone"] = state.body
        # "score" ranks the epochs of one run, and a loss depends on the recipe: neither belongs on a card.
        measured = {
            key: round(value, 4)
            for key, value in metrics.items()
            if key not in ("score", "images") and not key.startswith("val_loss")
        }
        # What the start weights demand of whatever comes from them (see `initial_model`); the config's word goes first.
        metadata: dict[str, Any] = model.metadata | {"metrics": measured, "training": training}
        point = state.operating_point
        metadata |= {"operating_point": point} if config.task == "segmentation" else point
        said = {key: getattr(config, key) for key in ("dataset", "license", "note", "caveat")}
        metadata |= {key: text for key, text in said.items() if text is not None}
        options: dict[str, Any] = {"config": model.config.to_dict(), "metadata": metadata, "golden": state.finished}
        return write_weights(self.out / name, tensors, variant=config.model, **options)

    def write_figures(self, state: State) -> None:
        """run.json and metrics.csv; a figure that an epoch lacks is left empty."""
        facts = {
            "config": self.config.to_dict(),
            "versions": self.versions,
            **self._facts,
            "steps_per_epoch": self.batches.steps,
            "seconds": state.seconds,
            "minutes": state.seconds / 60,
            "result": self.result(state).to_dict(),
        }
        table = csv_table(state.history, state.history[-1])
        write_files({self.out / "run.json": json_bytes(facts, indent=2), self.out / "metrics.csv": table.encode()})

    def result(self, state: State) -> TrainResult:
        """The run so far, for its caller."""
        return TrainResult(
            out=str(self.out),
            best=None if state.best_epoch is None else str(self.out / "best"),
            last=str(self.out / "last") if state.epoch else None,
            best_epoch=state.best_epoch,
            operating_point=state.operating_point,
            finished=state.finished,
            epochs=state.epoch,
            steps=state.step,
            skipped_steps=state.skipped,
            seconds=state.seconds,
            metrics=state.best_metrics,
            history=state.history,
            summary=self._summary(state),
        )

    def _summary(self, state: State) -> str:
        if not state.finished:
            return f"stopped after {state.step} steps, in epoch {state.epoch + 1}; the same command continues"
        said = f"best is epoch {state.best_epoch} of {state.epoch}"
        rows = {row["epoch"]: row for row in state.history}
        start, best = rows.get(0), rows[state.best_epoch]
        if "score" not in best:
            return f"{said}, the last: there is no validation data"
        said += f": {figures(best)}"
        if start is not None:
            said += f" (the start weights: {figures(start)})"
        if self.config.task == "segmentation":
            said += f", {_thresholds(self.config.score_threshold, self.config.nms_threshold)}"
        if self.setup.validation is not None and self.config.operating_point:
            point = state.operating_point
            chosen = f"temperature {point['temperature']:.3g}" if "temperature" in point else _thresholds(**point)
            said += f"; operating point: {figures(state.best_metrics)}, {chosen}"
        if start is not None and start["score"] >= best["score"]:
            said += "; no epoch did better than the start weights"
        return said


def figures(metrics: dict[str, Any]) -> str:
    """The headline figures of a validation, for people."""
    return ", ".join(f"{key} {metrics[key]:.3f}" for key in ("ap50", "dice_pooled", "accuracy") if key in metrics)


def _thresholds(score_threshold: float, nms_threshold: float) -> str:
    return f"score above {score_threshold:g}, NMS at {nms_threshold:g}"


def plot_curves(path: Path, history: list[dict[str, Any]]) -> None:
    """Losses, validation metrics and learning rate over epochs as a PNG; each curve its own colour."""
    colours = import_extra("matplotlib", "train", "drawing curves.png").colormaps["tab20"].colors
    figure = import_extra("matplotlib.figure", "train", "drawing curves.png").Figure((15, 4), layout="constrained")
    keys = dict.fromkeys(key for row in history for key in row)
    # Neighbours are a dark and a light tone of one hue: a loss in training and in validation.
    losses = [name for key in keys if key.startswith("loss") for name in (key, f"val_{key}")]
    shown = ("ap50", "ap75", "ap", "dice_pooled", "dice_mean", "accuracy")
    scores = [key for key in keys if key in shown or key.startswith("sensitivity")]
    groups = [("Loss", losses, colours), ("Validation", scores, colours[::2] + colours[1::2])]
    groups.append(("Learning rate", ["lr"], colours))
    for axis, (title, names, own) in zip(figure.subplots(1, 3), groups, strict=True):
        for name, colour in zip(names, own, strict=False):
            points = [(row["epoch"], row[name]) for row in history if row.get(name) is not None]
            if points:
                line = "--" if name.startswith("val_") else "-"
                axis.plot(*zip(*points, strict=True), line, color=colour, label=name, marker=".", markersize=3)
        axis.set(title=title, xlabel="Epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.lines:
            axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=120)


def device_name(device: torch.device) -> str:
    """What a run computed on, for people."""
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


class TensorBoard:
    """TensorBoard scalars in a folder, or nothing if switched off."""

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

    def close(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.close()
