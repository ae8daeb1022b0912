"""One run and its folder: where it is, what it keeps, what it leaves to read."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

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
from ctmasknet.engine.optimization import build_average, build_optimizer, learning_rate
from ctmasknet.engine.process import share_buffers
from ctmasknet.engine.record import (
    TensorBoard,
    device_name,
    peak_memory,
    plot_curves,
    versions,
    write_json,
    write_metrics,
)
from ctmasknet.engine.samples import Batch, EpochBatches
from ctmasknet.engine.setup import Setup
from ctmasknet.errors import ConfigError, CTMaskNetError
from ctmasknet.weights.card import model_card
from ctmasknet.weights.files import read_weights, write_weights

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
    "data", "list_file", "classes", "min_area", "model_options", "optimizer", "lr", "weight_decay", "schedule",
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
