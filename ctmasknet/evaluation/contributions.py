"""What each RoI of a slice contributes to the class logits: gradient times input of module S, as numbers and drawn.

It goes beyond the paper, which counts RoIs (Tables 4 and 5) but does not say which of them decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ctmasknet.errors import import_extra
from ctmasknet.models.classifier import COVIDCTMaskNet
from ctmasknet.registry import class_title
from ctmasknet.results import RoIBatch

FOR, AGAINST = "#E69F00", "#56B4E9"
"""Colours of Okabe and Ito, which colour-blind people tell apart."""

FONT = {"font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8}
FONT |= {"xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7, "axes.linewidth": 0.6}


@dataclass(frozen=True, eq=False)
class RoIContributions:
    """How much each region of a slice speaks for each class: gradient times input of module S.

    Module S is piecewise linear, so the contributions of all RoIs add up to the logits less what S would say of
    its biases alone at this point.

    Attributes:
        boxes: (N, 4) float32 xyxy, pixels of the slice; each region once, copies added up.
        scores: (N,) float32.
        copies: (N,) int64, slots that the region fills.
        contributions: (N, K) float32, to each class logit.
        logits: (K,) float32.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    copies: npt.NDArray[np.int64]
    contributions: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]


def roi_contributions(model: COVIDCTMaskNet, batch: RoIBatch) -> RoIContributions:
    """Contribution of every RoI of a `Prediction.roi_batch` to the class logits of the classifier, in either mode."""
    weight = next(model.parameters())
    entries = weight.new_zeros(model.module_s.slots, 5)
    count = len(batch.scores)
    entries[:count] = torch.from_numpy(np.concatenate([batch.scores[:, None], batch.deltas], axis=1))
    slopes = torch.autograd.functional.jacobian(lambda inputs: model.module_s(inputs[None])[0], entries)
    per_slot = (slopes * entries).sum(-1).T.cpu().numpy()  # from (K, slots, 5)
    # Copies stand behind their original, so a new region begins where box or score changes.
    seen = np.concatenate([batch.boxes, batch.scores[:, None]], axis=1)
    starts = np.flatnonzero(np.r_[[True] * (count > 0), (seen[1:] != seen[:-1]).any(axis=1)])
    return RoIContributions(
        boxes=batch.boxes[starts],
        scores=batch.scores[starts],
        copies=np.diff(np.r_[starts, count]).astype(np.int64),
        contributions=np.add.reduceat(per_slot[:count], starts) if count else per_slot[:0],
        logits=model.module_s(entries[None])[0].detach().cpu().numpy(),
    )


def contribution_figure(
    image: npt.NDArray[np.float32], contributions: RoIContributions, class_names: Sequence[str], *, shown: int = 12
) -> Any:
    """The `shown` largest contributions to each class logit, drawn on the slice, (H, W) in 0..1 (matplotlib).

    One panel per class: solid orange boxes speak for it, dashed blue ones against it, thicker ones more; the strongest
    have their contribution beside them.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = import_extra("matplotlib", "plots", "drawing contributions")
    for part in ("figure", "patches", "lines", "patheffects"):
        import_extra(f"matplotlib.{part}", "plots", "drawing contributions")
    largest = max(float(np.abs(contributions.contributions).max(initial=0)), 1e-9)
    strongest = np.argsort(-np.abs(contributions.contributions), axis=0, kind="stable")[:shown]
    # Every panel shows the square with all drawn boxes in it.
    corners = contributions.boxes[strongest].reshape(-1, 2) if len(strongest) else np.array([(0, 0), image.shape[::-1]])
    low, high = corners.min(axis=0), corners.max(axis=0)
    (x, y), half = (low + high) / 2, 0.55 * (high - low).max() + 4
    with matplotlib.rc_context(FONT):
        figure = matplotlib.figure.Figure(figsize=(2.4 * len(class_names), 2.9), layout="constrained")
        panels = figure.subplots(1, len(class_names), squeeze=False)[0]
        for column, (axis, name) in enumerate(zip(panels, class_names, strict=True)):
            order = strongest[:, column]
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            for rank in reversed(range(len(order))):
                x1, y1, x2, y2 = contributions.boxes[order[rank]].tolist()
                value = float(contributions.contributions[order[rank], column])
                share = abs(value) / largest
                box = matplotlib.patches.Rectangle((x1, y1), max(x2 - x1, 1), max(y2 - y1, 1), fill=False)
                colour, line = (FOR, "-") if value > 0 else (AGAINST, (0, (3, 1.5)))
                box.set(edgecolor=colour, linestyle=line, linewidth=0.5 + 2 * share, alpha=0.35 + 0.65 * share)
                axis.add_patch(box)
                if rank < 5:
                    # Corners in turn: the strongest RoIs often share one.
                    corner = ((x1, y1), (x2, y1), (x2, y2), (x1, y2), ((x1 + x2) / 2, y1))[rank]
                    text = axis.text(*corner, f"{value:+.2f}", color="white", fontsize=6.5, ha="center", va="center")
                    text.set_path_effects([matplotlib.patheffects.withStroke(linewidth=1.6, foreground="black")])
            axis.set(xticks=[], yticks=[], xlim=(x - half, x + half), ylim=(y + half, y - half), facecolor="black")
            axis.set_title(f"{class_title(name)}: logit {contributions.logits[column]:.2f}")
        lines = matplotlib.lines.Line2D
        keys = [lines([], [], color=FOR, linewidth=2), lines([], [], color=AGAINST, linewidth=2, linestyle="--")]
        figure.legend(keys, ["for the class", "against it"], loc="outside lower center", ncols=2, frameon=False)
    return figure
