"""One run and its folder: where it is, what it keeps, what it leaves to read."""

from __future__ import annotations

import csv
import json
import logging
import math
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import ctmasknet
from ctmasknet.engine.batches import Batch, EpochBatches, Gather
from ctmasknet.engine.checkpoint import (
    checkpoints_from,
    list_checkpoints,
    newest_readable,
    pack_optimizer,
    remove_unfinished,
    unpack_optimizer,
    write_checkpoint,
)
from ctmasknet.engine.config import TrainConfig
from ctmasknet.engine.setup import Setup, build_average, build_optimizer, learning_rate, share_buffers
from ctmasknet.errors import ConfigError, CTMaskNetError, import_extra
from ctmasknet.weights.files import read_weights, write_weights
from ctmasknet.weights.publish import model_card

log = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What came of a run.

    Attributes:
        out: folder of the run.
        best, last: folders of weights, for `create_model(name, weights=...)`; None before the first epoch ended.
        finished: False if the run was asked to stop; train it again with ``resume="auto"`` to continue.
        epochs, steps: completed.
        skipped_steps: steps left out because loss or gradient was NaN or infinite.
        seconds: of training and validation, interruptions left out.
        metrics: of `best`; empty without validation.
        history: one dict per epoch, as in metrics.csv.
    """

    out: str
    best: str | None
    last: str | None
    finished: bool
    epochs: int
    steps: int
    skipped_steps: int
    seconds: float
    metrics: dict[str, float]
    history: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


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
        best_score, best_metrics, validations_since_best: of the validations.
        done: nothing is left to train: all epochs, or stopped early.
        finished: `best` has its final metadata.
        history: one row per epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    skipped: int = 0
    bad_in_row: int = 0
    seconds: float = 0.0
    loss_sums: dict[str, float] = field(default_factory=dict)
    loss_steps: int = 0
    best_score: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    validations_since_best: int = 0
    done: bool = False
    finished: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


class Run:
    """A run's model, optimizer, average and state, and its folder. Only the process with `writes` writes."""

    def __init__(self, config: TrainConfig, setup: Setup, batches: EpochBatches, *, writes: bool) -> None:
        self.config, self.setup, self.batches, self.writes = config, setup, batches, writes
        self.out = Path(config.out)
        self.optimizer = build_optimizer(setup.trained, config)
        self.average = build_average(setup.trained, config)
        self.state = State()
        self.tensorboard = TensorBoard(self.out / "tensorboard", enabled=False, purge_step=0)
        self._own_size = tuple(setup.model.transform.min_size)
        self._started = self._saved = time.monotonic()
        self._images = 0
        self._epoch_started = time.monotonic()
        self._bar: Any = None

    # --- beginning ------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Continue what the config's `resume` names, or begin: and prove that checkpoints can be written.

        Raises:
            ConfigError, WeightsError: there is something else than `resume` expects.
            CTMaskNetError: the folder cannot be written, or has too little space.
        """
        if self.writes:
            self._require_space()
            remove_unfinished(self.out)
        resume, own = self.config.resume, list_checkpoints(self.out)
        if resume is False and own:
            raise ConfigError(f'{self.out}: holds a run; continue it with resume="auto", or choose another folder')
        candidates = own if resume in (False, "auto") else checkpoints_from(Path(str(resume)))
        if candidates:
            self._restore(candidates)
        if self.writes:
            write_json(self.out / "config.json", self.config.to_dict())
            if not candidates:
                self.save()
        enabled = self.writes and self.config.tensorboard
        self.tensorboard = TensorBoard(self.out / "tensorboard", enabled=enabled, purge_step=self.state.step)

    def _restore(self, candidates: list[Path]) -> None:
        path, tensors, facts = newest_readable(candidates)
        if facts["variant"] != self.config.model:
            raise ConfigError(
                f"{path}: a checkpoint of {facts['variant']}, not of {self.config.model}; choose another folder, "
                "or start from its weights with weights="
            )
        for what, here in self._must_match().items():
            if facts[what] != here:
                raise ConfigError(
                    f"{path}: made with {what.replace('_', ' ')} {facts[what]}, here it is {here}: the run cannot "
                    "continue; restore the setting or choose another folder"
                )
        now = self.config.to_dict()
        changed = {k: old for k, old in facts["config"].items() if k in _CHANGES_TRAINING and now[k] != old}
        if changed:
            said = ", ".join(f"{key} {old!r} -> {now[key]!r}" for key, old in changed.items())
            log.warning("%s: continuing with other settings than before: %s", path, said)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for key, value in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = value
        self.setup.trained.load_state_dict(parts["model"])
        self.average.module.load_state_dict(parts["average"])
        unpack_optimizer(self.optimizer, parts["optimizer"], facts["optimizer_groups"])
        state = self.state = State(**{f.name: facts["state"][f.name] for f in fields(State)})
        if "epochs" in changed:  # a finished run that is given more epochs goes on
            state.done = state.epoch >= self.config.epochs
            state.finished = state.finished and state.done
        if path.resolve().parent.parent != self.out.resolve():
            if state.done:
                raise ConfigError(f"{path}: that run is complete; raise epochs to continue it in {self.out}")
            state.best_score, state.best_metrics, state.validations_since_best = None, {}, 0
        log.info("continuing from %s: epoch %d, step %d", path, state.epoch + 1, state.step)

    def _must_match(self) -> dict[str, Any]:
        return {
            "number_of_slices": len(self.setup.names),
            "slices_per_step": self.batches.per_step,
            "classes": list(self.setup.class_names),
        }

    def _require_space(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.out).free
        except OSError as error:
            raise CTMaskNetError(f"{self.out}: the run folder cannot be made ({error}); choose another") from None
        weights = sum(t.nbytes for t in self.setup.model.state_dict().values())
        # A checkpoint holds weights, their average and two moments; one more than are kept exists while writing.
        needed = 4 * weights * (self.config.keep_checkpoints + 1) + 3 * weights
        if free < needed:
            raise CTMaskNetError(
                f"{self.out}: {free / 1e9:.2f} GB are free, the run needs {needed / 1e9:.2f} GB for checkpoints and "
                "weights; free some or choose another folder"
            )

    # --- steps ----------------------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Order of slices and image size of the state's epoch."""
        state, config = self.state, self.config
        self.batches.epoch, self.batches.start = state.epoch, state.batch
        reduced = config.train_min_size and state.epoch < config.epochs - config.full_size_epochs
        self.setup.model.transform.min_size = (config.train_min_size,) if reduced else self._own_size
        self._images, self._epoch_started = 0, time.monotonic()

    def progress(self, loader: DataLoader[Any]) -> Iterator[Batch]:
        """The batches that are left of this epoch, under a progress bar."""
        state = self.state
        with tqdm(
            total=len(self.batches),
            initial=state.batch,
            desc=f"epoch {state.epoch + 1}/{self.config.epochs}",
            unit="batch",
            disable=not (self.writes and self.config.progress),
            leave=False,
        ) as self._bar:
            for batch in loader:
                yield batch
                self._images += len(batch.names) * self.batches.world
                self._bar.update()

    def count_step(self, losses: dict[str, float]) -> None:
        """Take in the losses of a good step."""
        state = self.state
        state.bad_in_row = 0
        state.loss_steps += 1
        for key, value in losses.items():
            state.loss_sums[key] = state.loss_sums.get(key, 0.0) + value
        total = sum(losses.values())
        self._bar.set_postfix(loss=f"{total:.3f}", images_per_s=f"{self._speed():.1f}", refresh=False)
        self.tensorboard.scalars({f"step/{key}": value for key, value in losses.items()}, state.step)

    def _speed(self) -> float:
        return self._images / max(time.monotonic() - self._epoch_started, 1e-9)

    # --- ends -----------------------------------------------------------------------------------------------

    def end_epoch(self, steps: int) -> None:
        """Validate, log, and keep the weights; `steps` is the length of the schedule."""
        state, config = self.state, self.config
        speed = self._speed()
        last = state.epoch + 1 == config.epochs
        validated = self.setup.validate is not None and (last or (state.epoch + 1) % config.validate_every == 0)
        row: dict[str, Any] = {"epoch": state.epoch + 1, "step": state.step}
        row["lr"] = learning_rate(config, max(state.step - 1, 0), steps)
        means = {key: value / max(state.loss_steps, 1) for key, value in state.loss_sums.items()}
        row |= {"loss": sum(means.values()), **means}
        metrics: dict[str, float] = {}
        if validated and self.setup.validate is not None:
            share_buffers(self.average.module)  # what is validated is what the first process saves
            metrics = self.setup.validate(self.average.module)
            row |= metrics
        row |= {
            "images_per_s": round(speed, 3),
            "skipped": state.skipped,
            "peak_gb": round(peak_memory(self._device), 3),
        }
        self._tick()
        row["minutes"] = round(state.seconds / 60, 2)
        state.history.append(row)
        self._judge(metrics)
        state.epoch, state.batch, state.loss_sums, state.loss_steps = state.epoch + 1, 0, {}, 0
        state.done = state.done or state.epoch >= config.epochs
        if self.writes:
            self._write_weights("last", metrics)
            write_metrics(self.out / "metrics.csv", state.history)
            write_json(self.out / "run.json", self.record())
            self.tensorboard.scalars({f"epoch/{key}": value for key, value in row.items()}, state.step)
            draw = self.setup.draw
            if metrics and draw is not None:
                self.tensorboard.pictures("validation", lambda: draw(self.average.module), state.step)
        log.info("%s", _line(row, config.epochs))

    def _judge(self, metrics: dict[str, float]) -> None:
        """Keep the best weights; decide on an early stop."""
        state = self.state
        if self.setup.validate is None:
            if self.writes:
                self._write_weights("best", {})
        elif metrics:
            if state.best_score is None or metrics["score"] > state.best_score:
                state.best_score, state.best_metrics = metrics["score"], metrics
                state.validations_since_best = 0
                if self.writes:
                    self._write_weights("best", metrics)
            else:
                state.validations_since_best += 1
                state.done = 0 < self.config.patience <= state.validations_since_best

    def checkpoint_is_due(self) -> bool:
        """Whether the last checkpoint is old."""
        return time.monotonic() - self._saved >= 60 * self.config.checkpoint_minutes

    def save(self) -> None:
        """Write a checkpoint, but not amid steps that are not finite: what spoils them would outlive good ones."""
        self._tick()
        if not self.writes or self.state.bad_in_row:
            return
        packed, groups = pack_optimizer(self.optimizer)
        parts = {
            "model": self.setup.trained.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": packed,
        }
        tensors = {f"{part}/{key}": value for part, named in parts.items() for key, value in named.items()}
        facts = {
            "variant": self.config.model,
            "config": self.config.to_dict(),
            "state": asdict(self.state),
            "optimizer_groups": groups,
            **self._must_match(),
        }
        keep = self.config.keep_checkpoints
        write_checkpoint(self.out, self.state.step, tensors, facts, keep=keep)
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Give `best` its operating point and the figures there, and write what is left to read."""
        state = self.state
        if not state.finished:
            best = read_weights(self.out / "best").tensors
            point = None
            if self.setup.finally_validate is not None:
                self.average.module.load_state_dict(best)
                point, state.best_metrics = self.setup.finally_validate(self.average.module)
            self._tick()
            state.finished = True
            if self.writes:
                self._write_weights("best", state.best_metrics, tensors=best, point=point)
                self.save()
        if self.writes:
            write_json(self.out / "run.json", self.record())
            write_metrics(self.out / "metrics.csv", state.history)
            plot_curves(self.out / "curves.png", state.history)

    def _write_weights(
        self,
        name: str,
        metrics: dict[str, float],
        *,
        tensors: dict[str, Tensor] | None = None,
        point: dict[str, float] | None = None,
    ) -> None:
        config, model = self.config, self.setup.model
        metadata: dict[str, Any] = {
            "classes": list(self.setup.class_names),
            # "score" ranks the epochs of one run, and a loss depends on the recipe: neither belongs on a card.
            "metrics": {
                key: round(value, 4)
                for key, value in metrics.items()
                if key not in ("score", "images") and not key.startswith("val_loss")
            },
            "training": self._training(),
        }
        if config.task == "segmentation":
            own = {"score_threshold": config.score_threshold, "nms_threshold": config.nms_threshold}
            metadata["operating_point"] = point or own
        for key in ("dataset", "license", "note", "caveat"):
            if getattr(config, key) is not None:
                metadata[key] = getattr(config, key)
        options = model.config.to_dict()
        write_weights(
            self.out / name,
            tensors or self.setup.weights_of(self.average.module),
            variant=config.model,
            config=options,
            metadata=metadata,
            card=model_card(model.variant, options, metadata),
        )

    def _training(self) -> dict[str, Any]:
        """How the weights came about, for their card; `run.json` says everything."""
        said = {key: getattr(self.config, key) for key in _ON_THE_CARD}
        if self.config.weights is not None and Path(self.config.weights).exists():
            said["weights"] = Path(self.config.weights).name  # folders of this machine are nobody's business
        found = versions()
        return {
            **said,
            "slices": len(self.setup.names),
            "processes": self.batches.world,
            "device": device_name(self._device),
            "epochs_done": len(self.state.history),
            "minutes": round(self.state.seconds / 60, 1),
            **{package: found[package] for package in ("ctmasknet", "torch", "torchvision")},
        }

    @property
    def _device(self) -> torch.device:
        return next(self.setup.trained.parameters()).device

    def record(self) -> dict[str, Any]:
        """The run in plain values: config, versions, device, time, result."""
        return {
            "config": self.config.to_dict(),
            "versions": versions(),
            "device": device_name(self._device),
            "processes": self.batches.world,
            "threads": torch.get_num_threads(),
            "slices": len(self.setup.names),
            "steps_per_epoch": self.batches.steps,
            "seconds": self.state.seconds,
            "minutes": self.state.seconds / 60,
            "peak_gb": peak_memory(self._device),
            "result": self.result().to_dict(),
        }

    def result(self) -> TrainResult:
        """The run so far, for its caller."""
        state, ended = self.state, bool(self.state.history)
        return TrainResult(
            out=str(self.out),
            best=str(self.out / "best") if state.best_score is not None or (ended and not self.config.val) else None,
            last=str(self.out / "last") if ended else None,
            finished=state.finished,
            epochs=state.epoch,
            steps=state.step,
            skipped_steps=state.skipped,
            seconds=state.seconds,
            metrics=state.best_metrics,
            history=state.history,
        )

    def _tick(self) -> None:
        now = time.monotonic()
        self.state.seconds += now - self._started
        self._started = now


_CHANGES_TRAINING = (
    "data", "names", "classes", "min_area", "model_options", "optimizer", "lr", "weight_decay", "schedule",
    "warmup", "batch_size", "accumulate", "epochs", "clip_norm", "ema", "precision", "augment", "augmentation",
    "train_min_size", "full_size_epochs", "cache_rois", "roi_views", "seed",
)  # fmt: skip


_ON_THE_CARD = (
    "recipe", "weights", "optimizer", "lr", "weight_decay", "schedule", "epochs", "batch_size", "accumulate", "ema",
    "precision", "augment", "train_min_size", "cache_rois", "seed",
)  # fmt: skip


def _line(row: dict[str, Any], epochs: int) -> str:
    shown = ("loss", "val_loss", "ap50", "ap75", "ap", "dice_pooled", "accuracy", "score", "lr", "images_per_s")
    figures = [f"{key} {row[key]:.4g}" for key in shown if key in row]
    return f"epoch {row['epoch']}/{epochs}: {', '.join(figures)}, {row['minutes']:.1f} min, {row['peak_gb']:.1f} GB"


class Watch:
    """Averages the losses of a step over its batches and processes; skips and counts the steps that are not finite."""

    def __init__(self, run: Run, accelerator: Any, gather: Gather) -> None:
        self._run, self._accelerator, self._gather = run, accelerator, gather
        self._keys: list[str] = []
        self._losses: list[Tensor] = []
        self._names: list[str] = []
        self._suspects: list[str] = []

    def add(self, losses: dict[str, Tensor], names: list[str]) -> None:
        """Take in the losses of one forward pass, and the slices they come from."""
        values = torch.stack([value.detach() for value in losses.values()])
        self._keys = list(losses)
        self._losses.append(values)
        self._names += names
        if not bool(values.isfinite().all()):
            self._suspects += names

    def step_is_finite(self, norm: Tensor, stop: StopRequest) -> bool:
        """Whether losses and gradients of the step are finite on every process; all get the same answer.

        One small reduction also carries the wish to stop from any process to all.

        Raises:
            CTMaskNetError: too many steps in a row were not finite.
        """
        means = torch.stack(self._losses).mean(dim=0)
        # The gradients are the same everywhere; the losses and the wish are not.
        asked = torch.tensor(float(stop.received), device=norm.device)
        *values, wish = self._accelerator.reduce(torch.stack([*means, asked]), "mean").tolist()
        stop.agreed = wish > 0
        if all(map(math.isfinite, [*values, float(norm)])):
            self._run.count_step(dict(zip(self._keys, values, strict=True)))
        else:
            self._report()
        finite = self._run.state.bad_in_row == 0
        self._losses, self._names, self._suspects = [], [], []
        return finite

    def _report(self) -> None:
        run = self._run
        names = [name for share in self._gather(self._suspects) for name in share]
        names = names or [name for share in self._gather(self._names) for name in share]
        run.state.skipped += 1
        run.state.bad_in_row += 1
        text = f"step {run.state.step}: loss or gradient is NaN or infinite on {', '.join(names)}"
        if run.state.bad_in_row >= run.config.max_bad_steps:
            raise CTMaskNetError(
                f"{text}; {run.state.bad_in_row} steps in a row, training stopped. Check these slices or lower lr; the "
                f"last good checkpoint is in {run.out / 'checkpoints'}"
            )
        log.warning("%s; the step is skipped", text)


class StopRequest:
    """SIGTERM, or a first Ctrl-C, as a wish that the loop grants at its next step; a second Ctrl-C stops at once.

    Attributes:
        received: this process was asked to stop.
        agreed: some process was; all know it.
    """

    def __init__(self) -> None:
        self.received = self.agreed = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread only, and lets only it install handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = True


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
