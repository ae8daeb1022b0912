"""Figure 4: boxplots of the RoIs above a score."""

from __future__ import annotations

from typing import Any

import numpy as np

from ctmasknet.evaluation.evaluate import Table
from ctmasknet.registry import class_title
from paper.drawing import FAINT, FONT, INK, matplotlib_of, style_of
from paper.request import Made, Request
from paper.roi_counts import RoICounts, roi_counts


def make(request: Request) -> Made:
    counts, model = roi_counts(request, "Figure 4")
    rows: list[tuple[Any, ...]] = []
    for label, name in enumerate(counts.class_names):
        for column, threshold in enumerate(counts.thresholds):
            own = counts.counts[counts.labels == label, column]
            quartiles = np.percentile(own, (0, 25, 50, 75, 100)).tolist() if len(own) else [None] * 5
            rows.append((class_title(name), threshold, len(own), *quartiles))
    columns = [("class", "s"), ("RoI score above", ".1f"), ("slices", "d")]
    columns += [(part, ".1f") for part in ("smallest", "lower quartile", "median", "upper quartile", "largest")]
    table = Table(f"Figure 4. RoIs per slice above a score, {model}", tuple(columns), tuple(rows))
    return Made(table, roi_boxplots(counts))


def roi_boxplots(counts: RoICounts) -> Any:
    """Figure 4: boxplots of the number of RoIs above each score, per class.

    Boxes span the quartiles, whiskers reach 1.5 interquartile ranges, circles lie beyond, diamonds are means. Each
    panel has its own scale: the counts differ by orders of magnitude.

    Returns:
        A matplotlib figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = matplotlib_of()
    order: list[str] = [name for name in ("covid", "pneumonia", "control") if name in counts.class_names]
    order += [name for name in counts.class_names if name not in order]
    groups = [counts.counts[counts.labels == counts.class_names.index(name)] for name in order]
    with matplotlib.rc_context(FONT):
        figure = matplotlib.figure.Figure(figsize=(7.2, 2.7), layout="constrained")
        panels = figure.subplots(1, len(counts.thresholds), squeeze=False)[0]
        for column, (axis, threshold) in enumerate(zip(panels, counts.thresholds, strict=True)):
            parts = axis.boxplot(
                [group[:, column] for group in groups],
                patch_artist=True,
                showmeans=True,
                widths=0.6,
                medianprops={"color": INK, "linewidth": 1.4},
                meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": INK, "markersize": 4},
                flierprops={"marker": "o", "markersize": 2.5, "markerfacecolor": "none", "markeredgecolor": FAINT},
                boxprops={"linewidth": 0.7},
                whiskerprops={"linewidth": 0.7},
                capprops={"linewidth": 0.7},
            )
            for box, name in zip(parts["boxes"], order, strict=True):
                colour, hatch, _ = style_of(name)
                box.set(facecolor=colour, hatch=hatch, edgecolor=INK)
            axis.set_xticks(range(1, len(order) + 1), [_short(class_title(name)) for name in order])
            axis.set(title=f"RoI score > {threshold}", ylabel="RoIs per slice" if column == 0 else "")
            axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
            axis.yaxis.get_major_locator().set_params(integer=True)
            axis.spines[["top", "right"]].set_visible(False)
            for index, group in enumerate(groups, start=1):
                if len(group) == 0:
                    axis.text(index, 0, "N/A", ha="center", va="bottom", fontsize=7)
        sizes = ", ".join(f"{class_title(name)} {len(group)}" for name, group in zip(order, groups, strict=True))
        figure.supxlabel(f"slices: {sizes}", fontsize=7)
    return figure


def _short(title: str) -> str:
    return title.replace("common ", "")
