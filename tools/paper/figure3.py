"""Figure 3: RoI scores and areas of one slice per class."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ctmasknet.data.datasets import open_dataset
from ctmasknet.errors import ConfigError
from ctmasknet.evaluation.evaluate import Table
from ctmasknet.registry import class_title
from ctmasknet.results import RoIBatch
from paper.drawing import FONT, INK, matplotlib_of, style_of
from paper.request import Made, Request, classifying, needed


def make(request: Request) -> Made:
    """One slice per class, drawn by the seed."""
    predictor, name = classifying(request, "Figure 3")
    data = open_dataset("classification", needed(request, "Figure 3"))
    generator = np.random.default_rng(request.seed)
    labels = np.array([data.labels_of(index)[0] for index in range(len(data))])
    batches: list[tuple[str, RoIBatch]] = []
    rows: list[tuple[Any, ...]] = []
    for label in reversed(range(len(data.class_names))):
        members = np.flatnonzero(labels == label)
        title = class_title(data.class_names[label])
        if not len(members):
            rows.append((title, None, None, None, None))
            continue
        sample = data[int(generator.choice(members))]
        batch = predictor(sample.image).roi_batch
        batches.append((data.class_names[label], batch))
        sides = batch.boxes[:, 2:] - batch.boxes[:, :2]
        numbers: tuple[Any, ...] = (len(batch.scores), None, None)
        if len(batch.scores):
            numbers = (len(batch.scores), float(batch.scores.max()), float(np.median(sides.prod(1))))
        rows.append((title, sample.name, *numbers))
    columns = (("class", "s"), ("slice", "s"), ("RoIs", "d"), ("best score", ".4f"), ("median area, px", ".0f"))
    table = Table(f"Figure 3. RoI scores and areas, {name}", columns, tuple(rows))
    return Made(table, roi_figure(batches))


def roi_figure(batches: Sequence[tuple[str, RoIBatch]], *, top: int = 16) -> Any:
    """Figure 3: histogram of RoI scores, and RoI area against score; of the best RoIs and of the whole batch.

    Args:
        batches: image class and RoI batch of one slice each, a line per slice.
        top: how many the first two columns show.

    Returns:
        A matplotlib figure.

    Raises:
        ConfigError: no batches, or `top` below 1.
        MissingExtraError: matplotlib is not installed.
    """
    if not batches or top < 1:
        raise ConfigError("Figure 3 needs at least one RoI batch, and top at least 1")
    matplotlib = matplotlib_of()
    with matplotlib.rc_context(FONT):
        figure = matplotlib.figure.Figure(figsize=(7.2, 1.75 * len(batches) + 0.3), layout="constrained")
        grid = figure.subplots(len(batches), 4, squeeze=False)
        # One scale for all areas, so that the panels compare.
        everywhere = np.concatenate([_areas(batch) for _, batch in batches])
        for axes, (name, batch) in zip(grid, batches, strict=True):
            colour, hatch, marker = style_of(name)
            areas = _areas(batch)
            for column, count in ((0, top), (2, len(batch.scores))):
                scores, shown = batch.scores[:count], areas[:count]
                bins = np.linspace(0, 1, 21)
                axes[column].hist(scores, bins=bins, color=colour, hatch=hatch, edgecolor=INK, linewidth=0.5)
                axes[column].set(xlim=(0, 1), xlabel="RoI score", ylabel="RoIs")
                axes[column].yaxis.get_major_locator().set_params(integer=True)
                axes[column + 1].scatter(
                    shown, scores, s=14, marker=marker, facecolor=colour, edgecolor=INK, linewidth=0.4, alpha=0.85
                )
                axes[column + 1].set(xlabel="box area, px", ylabel="RoI score", ylim=(-0.04, 1.04), xscale="symlog")
                _plain_log(matplotlib, axes[column + 1], everywhere)
            best = f"{class_title(name)}: best {min(top, len(batch.scores))} of {len(batch.scores)} RoIs"
            axes[0].set_title(best, loc="left")
            axes[2].set_title(f"{class_title(name)}: all {len(batch.scores)} RoIs", loc="left")
        for axis in grid.flat:
            axis.spines[["top", "right"]].set_visible(False)
    return figure


def _areas(batch: RoIBatch) -> npt.NDArray[np.float32]:
    """Box areas in px."""
    return np.asarray((batch.boxes[:, 2:] - batch.boxes[:, :2]).prod(axis=1))


def _plain_log(matplotlib: ModuleType, axis: Any, areas: np.ndarray) -> None:
    """A logarithmic area axis from the decade below the smallest to that above the largest."""
    positive = areas[areas > 0]
    low = 10 ** np.floor(np.log10(positive.min())) if len(positive) else 1.0
    high = 10 ** np.ceil(np.log10(positive.max() * 1.01)) if len(positive) else 10.0
    axis.set_xscale("log")
    axis.set_xlim(low, max(high, 10 * low))
    axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(base=10, numticks=6))
