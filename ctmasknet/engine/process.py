"""The processes of a run: accelerate's set-up, and a polite end on SIGTERM."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn

from ctmasknet.engine.config import TrainConfig
from ctmasknet.engine.validation import Gather
from ctmasknet.errors import ConfigError, import_extra


def start_accelerator(config: TrainConfig) -> Any:
    """accelerate's `Accelerator` for this process, on the config's device.

    Raises:
        ConfigError: device="cuda" without a GPU.
        MissingExtraError: accelerate is not installed.
    """
    accelerate = import_extra("accelerate", "train", "training")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device="cuda": torch sees no GPU here; use device="auto"')
    # mixed_precision would autocast box arithmetic too, which moves boxes by whole pixels; the body has its own.
    return accelerate.Accelerator(
        mixed_precision="no",
        gradient_accumulation_steps=config.accumulate,
        cpu=config.device == "cpu" or not torch.cuda.is_available(),
    )


def gatherer(accelerator: Any) -> Gather:
    """A function that collects a picklable value of every process."""
    if accelerator.num_processes == 1:
        return lambda value: [value]
    operations = import_extra("accelerate.utils", "train", "training")
    return lambda value: operations.gather_object([value])


def share_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers: each has BatchNorm statistics of the slices that it saw itself."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)


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
