"""Losses of a step over all processes, and what to do when they are not finite."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from ctmasknet.engine.process import StopRequest
from ctmasknet.engine.run import Run
from ctmasknet.engine.validation import Gather
from ctmasknet.errors import CTMaskNetError

log = logging.getLogger(__name__)


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
