"""Table 1: sizes of the models, with the FLOPs and the latency that the paper omits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from phantom import phantom
from torch.utils.flop_counter import FlopCounterMode

from ctmasknet.errors import ConfigError
from ctmasknet.evaluation.evaluate import Table
from ctmasknet.models import Model
from ctmasknet.models.inference import EVERY_SCORE
from ctmasknet.registry import VARIANTS, get_variant
from ctmasknet.zoo import choose_device, create_model
from paper.request import Made, Request

# Table 1, the paper's: total and trainable parameters, slices for training, validation and test, test / training.
# Its cells for the data of a task span all rows of that task.
_PAPER_SPLITS = {
    "segmentation": ("650", None, "100", "0.16"),
    "classification": ("3K", "20.6K", "21.1K", "7.06"),
}


PAPER_RIVALS: tuple[tuple[str, float, float | None, str | None, str | None, str | None, str | None], ...] = (
    ("COVIDNet-CT (best) [GWW20]", 1.8, None, None, None, None, None),
    ("COVNet [LQX+20]", 25.61, 25.61, "3K", "370", "438", "0.129"),
    ("ResNet18 [BGCB20]", 11.69, 11.69, "528", None, "90", "0.170"),
)
"""Table 1, rows of other authors' models: total and trainable parameters (millions), data columns."""


def make(request: Request) -> Made:
    return Made(table1(request.weights or tuple(VARIANTS), device=request.device))


def table1(
    names: Sequence[str] = tuple(VARIANTS),
    *,
    size: int = 512,
    repeats: int = 3,
    device: str | torch.device | None = None,
) -> Table:
    """Table 1: sizes of the models, the paper's figures for them and its rivals, and the FLOPs and latency it omits.

    FLOPs and latency are of one phantom slice of `size` x `size` px with random weights; every RoI is kept, so a
    segmenter draws as many masks as it ever does (128), the most it can cost. A multiplication and an addition are two
    FLOPs; RoIAlign and NMS are not counted. Latency is the median of `repeats` runs after one that is not timed.

    Raises:
        ConfigError: unknown variant or device, `repeats` below 1.
    """
    if repeats < 1:
        raise ConfigError(f"repeats={repeats}: must be at least 1")
    where = choose_device(device)
    rows: list[tuple[Any, ...]] = []
    for name in names:
        variant = get_variant(name)
        torch.manual_seed(0)
        model = create_model(name, box_score_thresh=EVERY_SCORE).to(where)
        values = sum(t.numel() for t in model.state_dict().values())
        parameters = list(model.parameters())
        flops, seconds = _cost(model, size, repeats)
        rows.append(
            (
                variant.title,
                values / 1e6,
                sum(p.numel() for p in parameters) / 1e6,
                sum(p.numel() for p in parameters if p.requires_grad) / 1e6,
                sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6,
                flops / 1e9,
                1000 * seconds,
                variant.paper.parameters_millions,
                variant.paper.trainable_millions,
                *_PAPER_SPLITS[variant.task],
            )
        )
    rows += [(name, *[None] * 6, total, trainable, *data) for name, total, trainable, *data in PAPER_RIVALS]
    columns = (
        ("model", "s"),
        ("values, M", ".2f"),
        ("parameters, M", ".2f"),
        ("trainable, M", ".2f"),
        ("float32, MB", ".1f"),
        ("GFLOPs", ".1f"),
        ("latency, ms", ".0f"),
        ("paper: total, M", ".2f"),
        ("paper: trainable, M", ".2f"),
        ("paper: training", "s"),
        ("paper: validation", "s"),
        ("paper: test", "s"),
        ("paper: test / training", "s"),
    )
    threads = f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    machine = torch.cuda.get_device_name(where) if where.type == "cuda" else threads
    notes = (
        "Values: all numbers of the state dict, as the paper counts; parameters leave out BatchNorm statistics.",
        f"GFLOPs and latency: one {size} x {size} px phantom slice, batch 1, random weights, float32, every RoI kept "
        f"({machine}, torch {torch.__version__}). RoIAlign and NMS are timed but not counted.",
        "Columns and rows of the paper are quoted from its Table 1; its data columns span the rows of a task.",
    )
    return Table("Table 1. Sizes of the models and data splits", columns, tuple(rows), notes)


def _cost(model: Model, size: int, repeats: int) -> tuple[int, float]:
    """FLOPs, and median seconds, of one slice."""
    device = next(model.parameters()).device
    slice_ = torch.from_numpy(phantom(0, size=size).image).to(device).float() / 255
    images = [slice_.expand(3, -1, -1)]
    durations = []
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            model(images)
        for _ in range(repeats):
            _synchronise(device)
            began = time.perf_counter()
            model(images)
            _synchronise(device)
            durations.append(time.perf_counter() - began)
    return counter.get_total_flops(), statistics.median(durations)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
