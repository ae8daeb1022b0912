"""One run and its folder: where it begins or continues, its steps and epochs, what stops it."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ctmasknet.engine.batches import Batch, EpochBatches
from ctmasknet.engine.checkpoint import (
    FOLDER,
    KEPT,
    State,
    checkpoints_from,
    list_checkpoints,
    newest_readable,
    pack_optimizer,
    unpack_optimizer,
    write_checkpoint,
)
from ctmasknet.engine.config import TrainConfig
from ctmasknet.engine.record import Record, TensorBoard, TrainResult, figures, plot_curves
from ctmasknet.engine.setup import Setup, build_optimizer, learning_rate
from ctmasknet.errors import ConfigError, CTMaskNetError
from ctmasknet.evaluation.evaluate import gather
from ctmasknet.output import json_bytes, require_writable, write_files
from ctmasknet.weights.files import read_weights, state_digest

log = logging.getLogger(__name__)


class Run:
    """A run's model, optimizer, average and state, and its folder, in which the process with `writes` alone writes."""

    def __init__(self, config: TrainConfig, setup: Setup, batches: EpochBatches, *, writes: bool) -> None:
        self.config, self.setup, self.batches, self.writes = config, setup, batches, writes
        self.out = Path(config.out)
        self.optimizer = build_optimizer(setup.trained, config)
        # Short at first; with ``ema=0`` it follows the model.
        self.average = ModelEmaV3(setup.trained, decay=config.ema, use_warmup=config.ema > 0)
        if config.train_min_size is not None:  # the average, which is validated, keeps the model's own
            setup.model.transform.min_size = (config.train_min_size,)
        learnt = setup.trained.state_dict()
        self._untrained = state_digest({k: v for k, v in setup.model.state_dict().items() if k not in learnt})[:12]
        self.state = State(body=setup.model.metadata.pop("body", None))
        self.record = Record(config, setup, batches)
        self._started = self._saved = self._epoch_started = time.monotonic()
        self._images = 0

    # --- beginning ------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Continue what the config's `resume` names, or begin: and prove that checkpoints can be written.

        Raises:
            ConfigError, WeightsError: there is something else than `resume` expects, or processes that do not see it.
            CTMaskNetError: the folder cannot be written, or has too little space.
        """
        candidates = self._candidates()
        if candidates:
            self._restore(candidates)
        enabled = self.writes and self.config.tensorboard and not self.state.finished
        self.tensorboard = TensorBoard(self.out / "tensorboard", enabled=enabled, purge_step=self.state.step)
        if self.state.finished:
            self._log("%s: this run is complete; nothing is changed. Raise epochs to continue it", self.out)
            return
        if not candidates and self.config.weights is not None and self.setup.validation is not None:
            self._log("validating the weights to start from")
            self.state.history.append({"epoch": 0, "step": 0} | self._validated())
            self._log("start weights: %s", figures(self.state.history[0]))
        if self.writes:
            write_files({self.out / "config.json": json_bytes(self.config.to_dict(), indent=2)})
            if not candidates:
                self.save()

    def _candidates(self) -> list[Path]:
        """Checkpoints to continue from, newest first: the first process looks, before it writes any, and all follow."""
        found: list[Path] = []
        problem: CTMaskNetError | None = None
        token = self.out / f".seen-by-all-{os.getpid()}"
        if self.writes:
            try:
                self._require_space()
                resume, own = self.config.resume, list_checkpoints(self.out)
                if resume is False and own:
                    raise ConfigError(
                        f'{self.out}: holds a run; continue it with resume="auto", or choose another folder'
                    )
                found = own if resume in (False, "auto") else checkpoints_from(Path(str(resume)))
                write_files({token: b""})
            except CTMaskNetError as error:
                problem = error
        found, problem, token = gather((found, problem, token))[0]
        if problem is not None:
            raise problem
        seen = all(gather(_appears(token)))
        if self.writes:
            token.unlink()
        if not seen:
            raise ConfigError(f"{self.out}: some processes do not see this folder: all hosts of a run must share it")
        return found

    def _restore(self, candidates: list[Path]) -> None:
        path, tensors, facts = newest_readable(candidates)
        for what, here in self._must_match().items():
            if facts[what] != here:
                raise ConfigError(
                    f"{path}: made with {what.replace('_', ' ')} {facts[what]}, here it is {here}: the run cannot "
                    "continue; restore the settings, or choose another folder and start from its weights"
                )
        now, before = self.config.to_dict(), facts["config"]
        changed = [key for key in now if now[key] != before[key] and key not in ("out", "resume")]
        if changed and self.writes:
            said = ", ".join(f"{key} {before[key]!r} -> {now[key]!r}" for key in changed)
            log.warning("%s: continuing with other settings than before: %s", path, said)

        def part(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}

        try:
            self.setup.trained.load_state_dict(part("model/"))
            self.average.module.load_state_dict(part("average/"))
            unpack_optimizer(self.optimizer, part("optimizer/"))
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{path}: does not fit these settings ({reason}); restore them") from None
        state = self.state = State(**facts["state"])
        if "epochs" in changed:  # a finished run that is given more epochs goes on
            state.done = state.epoch >= self.config.epochs
            state.finished = state.finished and state.done
        if path.resolve().parent.parent != self.out.resolve():
            if state.done:
                raise ConfigError(f"{path}: that run is complete; raise epochs to continue it in {self.out}")
            state.best_epoch, state.best_score, state.best_metrics, state.validations_since_best = None, None, {}, 0
        if not state.finished:
            self._log("continuing from %s: epoch %d, step %d", path, state.epoch + 1, state.step)

    def _must_match(self) -> dict[str, Any]:
        return {
            "variant": self.config.model,
            "number_of_slices": len(self.setup.names),
            "slices_per_step": self.batches.per_step,
            # Batches are counted from the start of an epoch: of another size, they would be other slices.
            "batches_per_step": self.config.accumulate,
            "classes": list(self.setup.class_names),
            "optimizer": self.config.optimizer,
            "cache_rois": self.config.cache_rois,
            # What a checkpoint lacks because it is not trained: with cache_rois, the detector.
            "weights_that_are_not_trained": self._untrained,
        }

    def _require_space(self) -> None:
        require_writable(self.out / "run.json")
        free = shutil.disk_usage(self.out).free / 1e9
        # A checkpoint holds weights, their average and two moments; one more than are kept exists while writing.
        needed = (4 * (KEPT + 1) + 3) * sum(t.nbytes for t in self.setup.model.state_dict().values()) / 1e9
        if free < needed:
            raise CTMaskNetError(
                f"{self.out}: {free:.2f} GB are free, the run needs {needed:.2f} GB for checkpoints and weights; free "
                "some or choose another folder"
            )

    # --- steps ----------------------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Go to the state's epoch, and to the batch where it was left."""
        self.batches.epoch, self.batches.start = self.state.epoch, self.state.batch
        self._images, self._epoch_started = 0, time.monotonic()

    def progress(self, loader: DataLoader[Any]) -> Iterator[Batch]:
        """The batches that are left of this epoch, under a progress bar."""
        state, size = self.state, self.batches.batch_size * self.batches.world
        with tqdm(
            total=len(self.batches) * size,
            initial=state.batch * size,
            desc=f"epoch {state.epoch + 1}/{self.config.epochs}",
            unit="slice",
            disable=not (self.writes and self.config.progress),
            leave=False,
        ) as self._bar:
            for batch in loader:
                yield batch
                self._images += size
                self._bar.update(size)

    def count_step(self, losses: dict[str, float]) -> None:
        """Take in the losses of a good step."""
        state = self.state
        state.bad_in_row = 0
        state.loss_steps += 1
        for key, value in losses.items():
            state.loss_sums[key] = state.loss_sums.get(key, 0.0) + value
        self._bar.set_postfix(loss=f"{sum(losses.values()):.3f}", refresh=False)
        self.tensorboard.scalars({f"step/{key}": value for key, value in losses.items()}, state.step)

    # --- ends -----------------------------------------------------------------------------------------------

    def end_epoch(self, steps: int) -> None:
        """Validate, log, and keep the weights; `steps` is the length of the schedule."""
        state, config = self.state, self.config
        speed = self._images / max(time.monotonic() - self._epoch_started, 1e-9)
        last = state.epoch + 1 == config.epochs
        validated = self.setup.validation is not None and (last or (state.epoch + 1) % config.validate_every == 0)
        row: dict[str, Any] = {"epoch": state.epoch + 1, "step": state.step}
        row["lr"] = learning_rate(config, max(state.step - 1, 0), steps)
        means = {key: value / max(state.loss_steps, 1) for key, value in state.loss_sums.items()}
        row |= {"loss": sum(means.values()), **means} if means else {}
        metrics = self._validated() if validated else {}
        self._tick()
        row |= metrics
        row |= {"images_per_s": round(speed, 3), "skipped": state.skipped, "minutes": round(state.seconds / 60, 2)}
        state.history.append(row)
        self._judge(metrics)
        state.epoch, state.batch, state.loss_sums, state.loss_steps = state.epoch + 1, 0, {}, 0
        state.done = state.done or state.epoch >= config.epochs
        if self.writes:
            self.record.write_weights("last", self.setup.weights_of(self.average.module), metrics, state)
            self.record.write_figures(state)
            self.tensorboard.scalars({f"epoch/{key}": value for key, value in row.items()}, state.step)
        said = ", ".join(f"{key} {row[key]:.4g}" for key in ("loss", "val_loss", "minutes") if key in row)
        self._log("epoch %d/%d: %s", state.epoch, config.epochs, ", ".join(filter(None, (figures(row), said))))

    def _validated(self) -> dict[str, float]:
        """Metrics of the average as it is; a figure that is not finite is left out."""
        assert self.setup.validation is not None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Each process has BatchNorm statistics of the slices that it saw itself; those of the first are saved.
            for buffer in self.average.module.buffers():
                torch.distributed.broadcast(buffer, 0)
        metrics = self.setup.validation.metrics(self.average.module)
        return {key: value for key, value in metrics.items() if math.isfinite(value)}

    def _judge(self, metrics: dict[str, float]) -> None:
        """Keep the best weights; decide on an early stop."""
        state, config = self.state, self.config
        better = metrics and (state.best_score is None or metrics["score"] > state.best_score)
        if better or self.setup.validation is None:
            state.best_epoch, state.best_score, state.best_metrics = state.epoch + 1, metrics.get("score"), metrics
            state.validations_since_best = 0
            thresholds = ("score_threshold", "nms_threshold") if config.task == "segmentation" else ()
            state.operating_point = {key: getattr(config, key) for key in thresholds}
            if self.writes:
                self.record.write_weights("best", self.setup.weights_of(self.average.module), metrics, state)
        elif metrics:
            state.validations_since_best += 1
            state.done = 0 < config.patience <= state.validations_since_best

    def checkpoint_is_due(self) -> bool:
        """Whether the last checkpoint is old."""
        return time.monotonic() - self._saved >= 60 * self.config.checkpoint_minutes

    def save(self) -> None:
        """Write a checkpoint, but not amid steps that are not finite: what spoils them would outlive good ones."""
        self._tick()
        if not self.writes or self.state.bad_in_row:
            return
        parts = {
            "model": self.setup.trained.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": pack_optimizer(self.optimizer),
        }
        tensors = {f"{part}/{key}": value for part, named in parts.items() for key, value in named.items()}
        facts = {"config": self.config.to_dict(), "state": asdict(self.state), **self._must_match()}
        write_checkpoint(self.out, self.state.step, tensors, facts)
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Give `best` its operating point, the figures there and a golden file, and write what is left to read."""
        state = self.state
        if state.finished:
            return
        best = read_weights(self.out / "best").tensors
        if self.setup.validation is not None and self.config.operating_point:
            module = deepcopy(self.average.module)
            module.load_state_dict({key: best[key] for key in module.state_dict()})
            state.operating_point, state.best_metrics = self.setup.validation.choose(module)
        self._tick()
        state.finished = True
        if self.writes:
            self.record.write_weights("best", best, state.best_metrics, state)
            self.record.write_figures(state)
            plot_curves(self.out / "curves.png", state.history)
            self.save()

    def result(self) -> TrainResult:
        """The run so far, for its caller."""
        return self.record.result(self.state)

    def _log(self, text: str, *values: Any) -> None:
        if self.writes:
            log.info(text, *values)

    def _tick(self) -> None:
        now = time.monotonic()
        self.state.seconds += now - self._started
        self._started = now


def _appears(path: Path, seconds: float = 10.0) -> bool:
    """Whether a file can be seen here, within the time that a network file system may need."""
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return path.exists()


class Watch:
    """Averages the losses of a step over its batches and processes; skips and counts the steps that are not finite."""

    def __init__(self, run: Run, accelerator: Any) -> None:
        self._run, self._accelerator = run, accelerator
        self._passes: list[tuple[dict[str, Tensor], list[str]]] = []
        # BatchNorm's running statistics take in every forward pass, those of a skipped step too.
        self._buffers = list(run.setup.trained.buffers())
        self._good = [buffer.clone() for buffer in self._buffers]

    def add(self, losses: dict[str, Tensor], names: list[str]) -> None:
        """Take in the losses of one forward pass, and the slices they come from."""
        self._passes.append(({key: value.detach() for key, value in losses.items()}, names))

    def step_is_finite(self, norm: Tensor, stop: StopRequest) -> bool:
        """Whether losses and gradients of the step are finite on every process; all get the same answer.

        One small reduction also carries the wish to stop from any process to all.

        Raises:
            CTMaskNetError: too many steps in a row were not finite.
        """
        own = torch.stack([torch.stack([*losses.values()]) for losses, _ in self._passes])
        # The gradients are the same everywhere; the losses and the wish are not.
        asked = torch.tensor(float(stop.received), device=norm.device)
        *values, wish = self._accelerator.reduce(torch.stack([*own.mean(dim=0), asked]), "mean").tolist()
        stop.agreed = wish > 0
        finite = all(map(math.isfinite, [*values, float(norm)]))
        for buffer, good in zip(self._buffers, self._good, strict=True):
            good.copy_(buffer) if finite else buffer.copy_(good)
        passes, self._passes = self._passes, []
        if finite:
            self._run.count_step(dict(zip(passes[0][0], values, strict=True)))
        else:
            self._skip([(bool(row.isfinite().all()), names) for (_, names), row in zip(passes, own, strict=True)])
        return finite

    def _skip(self, passes: list[tuple[bool, list[str]]]) -> None:
        """Count a step that is skipped, and name the slices of its bad passes, or of all where its gradient is bad."""
        run, everywhere = self._run, [one for share in gather(passes) for one in share]
        guilty = [names for finite, names in everywhere if not finite] or [names for _, names in everywhere]
        names = [name for batch in guilty for name in batch]
        run.state.skipped += 1
        run.state.bad_in_row += 1
        text = f"step {run.state.step}: loss or gradient is NaN or infinite on {', '.join(names)}"
        if run.state.bad_in_row >= run.config.max_bad_steps:
            raise CTMaskNetError(
                f"{text}; {run.state.bad_in_row} steps in a row, training stopped. Check these slices or lower lr; the "
                f"last good checkpoint is in {run.out / FOLDER}"
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
            numbers = (signal.SIGTERM, signal.SIGINT)
            self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = True
