"""The figures of the paper as vector graphics and PNG (extra ``plots``).

Colours are Okabe and Ito's, which colour-blind people tell apart; where two things must be told apart in grey they
also differ in lightness, hatching or shape.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ctmasknet.errors import ConfigError, CTMaskNetError, import_extra
from ctmasknet.models.config import model_config
from ctmasknet.registry import class_title, get_variant
from ctmasknet.results import Prediction, RoIBatch
from ctmasknet.zoo import create_model
from paper.roi_statistics import RoICounts

ORANGE, SKY, GREEN, BLUE, VERMILLION = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
INK, FAINT = "#222222", "#8A8A8A"

CLASS_STYLE = {
    "covid": (VERMILLION, "///", "o"),
    "pneumonia": (SKY, "...", "s"),
    "control": ("#BBBBBB", "", "^"),
}
"""Colour, hatching and marker of an image class."""

_OTHER_STYLES = ((GREEN, "xx", "D"), (ORANGE, "\\\\", "v"), (BLUE, "--", "P"))
_FONT = {"font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8}
_FONT |= {"xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7, "axes.linewidth": 0.6}
_FONT |= {"svg.fonttype": "none", "pdf.fonttype": 42, "hatch.linewidth": 0.6}


@dataclass(frozen=True, eq=False)
class SliceFigureRow:
    """One line of Figure 2.

    Attributes:
        prediction: of the slice, with masks and, by preference, its score map.
        lesions: (N, H, W) bool, true lesions; None if unknown.
        lungs: (H, W) bool, true lung fields; None if unknown.
        logits: class logits by name, None without a classifier.
        truth: what the slice is, for example ``"COVID-19"``; None if unknown.
        title: of the line.
    """

    prediction: Prediction
    lesions: npt.NDArray[np.bool_] | None = None
    lungs: npt.NDArray[np.bool_] | None = None
    logits: dict[str, float] | None = None
    truth: str | None = None
    title: str = ""


def save_figure(
    figure: Any, folder: str | Path, name: str, *, formats: Sequence[str] = ("pdf", "svg", "png"), dpi: int = 140
) -> list[Path]:
    """Write a figure, by default as PDF and SVG (vector) and PNG.

    Raises:
        CTMaskNetError: it cannot be written.
    """
    paths = [Path(folder) / f"{name}.{suffix}" for suffix in formats]
    matplotlib = _matplotlib()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(_FONT):
            for path in paths:
                # No dates: the same figure gives the same file.
                when = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(path.suffix[1:])
                figure.savefig(path, dpi=dpi, metadata=when)
    except OSError as error:
        raise CTMaskNetError(f"{folder}: cannot be written ({error}); choose another folder") from None
    return paths


def architecture_figure(name: str) -> Any:
    """Figure 1: the parts of a variant with the shapes of their tensors for a 512 x 512 slice.

    Shapes are recorded in a forward pass, not written down; parts that a truncated body leaves out are dashed.

    Args:
        name: one of `list_models()`.

    Returns:
        A matplotlib figure.

    Raises:
        ConfigError: unknown variant.
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    variant = get_variant(name)
    shapes = tensor_shapes(name)
    config = model_config(variant)
    with matplotlib.rc_context(_FONT):
        figure, axes = _canvas(matplotlib, 7.2, 4.1)
        draw = _Blocks(matplotlib, axes)
        axes.set(xlim=(0, 100), ylim=(0, 57))
        axes.axis("off")
        axes.set_title(f"{variant.title}: {variant.num_values / 1e6:.2f}M values", loc="left", pad=2)
        # Body, left to right; FPN below it.
        names = ["stem", "block 1", "block 2", "block 3", "block 4"]
        starts = [16.5 + 16.6 * index for index in range(len(names))]
        draw.box(1, 40, 12, 11, "slice", shapes["input"], "#FFFFFF")
        for index, (part, start) in enumerate(zip(names, starts, strict=True)):
            kept = index <= variant.stages
            label = shapes[part] if kept else "left out"
            draw.box(start, 40, 13, 11, part, label, "#D6E9F5" if kept else "#FFFFFF", dashed=not kept)
            draw.arrow(13 if index == 0 else starts[index - 1] + 13, 45.5, start, 45.5, kept)
        draw.bracket(starts[0], starts[-1] + 13, 53, f"{variant.backbone.replace('resnet', 'ResNet')} body")
        levels = variant.levels
        height = 9
        draw.box(1, 25, 30, height, "feature pyramid", shapes["fpn"], "#FCE8C5")
        for index in range(variant.stages - levels + 1, variant.stages + 1):
            middle = starts[index] + 6.5
            if index < variant.stages:
                draw.line([(middle, 40), (middle, 36.5)])
            else:
                draw.line([(middle, 40), (middle, 36.5), (16, 36.5)])
                draw.arrow(16, 36.5, 16, 25 + height)
        draw.box(36, 25, 27, height, "RPN", shapes["rpn"], "#D9EFE7")
        draw.arrow(31, 29.5, 36, 29.5)
        draw.box(68, 25, 31, height, "RoIAlign, box head", shapes["box"], "#D9EFE7")
        draw.arrow(63, 29.5, 68, 29.5)
        if variant.task == "segmentation":
            draw.box(68, 6, 31, 11, "mask head", shapes["mask"], "#F6D9C6")
            draw.arrow(83.5, 25, 83.5, 17)
            draw.box(30, 6, 31, 11, "lesions", "boxes, scores, labels, masks", "#FFFFFF")
            draw.arrow(68, 11.5, 61, 11.5)
        else:
            draw.box(
                68, 6, 31, 11, "RoI batch", f"{variant.roi_batch} ranked RoIs x 5\nscore, dx, dy, dw, dh", "#F6D9C6"
            )
            draw.arrow(83.5, 25, 83.5, 17)
            draw.box(33, 6, 29, 11, "module S", shapes["s"], "#F6D9C6")
            draw.arrow(68, 11.5, 62, 11.5)
            draw.box(1, 6, 26, 11, "class logits", f"{config.image_classes}: control,\npneumonia, COVID-19", "#FFFFFF")
            draw.arrow(33, 11.5, 27, 11.5)
        anchors = len(config.anchors(levels)[0][0]) * len(config.anchors(levels)[1][0])
        note = f"Maps as channels x height x width. {anchors} anchors per cell, stride {variant.stride} px"
        note += f" at the coarsest of {levels} levels." if levels > 1 else "."
        axes.text(1, 1, note, fontsize=7, color=INK, va="bottom")
    return figure


def slice_figure(rows: Sequence[SliceFigureRow]) -> Any:
    """Figure 2: slice with boxes, scores and masks; raw mask-score map; true lesions and lungs; class logits.

    Args:
        rows: at least one, drawn below each other; all score maps share one scale.

    Returns:
        A matplotlib figure.

    Raises:
        ConfigError: no rows.
        MissingExtraError: matplotlib is not installed.
    """
    if not rows:
        raise ConfigError("Figure 2 needs at least one slice")
    matplotlib = _matplotlib()
    maps = [row.prediction.score_map for row in rows if row.prediction.score_map is not None]
    highest = max([float(found.max()) for found in maps] + [1e-6])
    with matplotlib.rc_context(_FONT):
        figure = matplotlib.figure.Figure(figsize=(7.2, 1.95 * len(rows) + 0.45), layout="constrained")
        grid = figure.subplots(len(rows), 4, squeeze=False, gridspec_kw={"width_ratios": (1, 1, 1, 0.8)})
        image = None
        for axes, row in zip(grid, rows, strict=True):
            _draw_slice(matplotlib, axes[0], row.prediction)
            if row.prediction.score_map is None:
                axes[1].text(0.5, 0.5, "no score map", ha="center", va="center", transform=axes[1].transAxes)
            else:
                image = axes[1].imshow(row.prediction.score_map, cmap="magma", vmin=0, vmax=highest)
            _draw_truth(matplotlib, axes[2], row)
            _draw_logits(matplotlib, axes[3], row)
            axes[0].set_ylabel(row.title, fontsize=7)
            for axis in axes[:3]:
                axis.set(xticks=[], yticks=[])
        for axis, title in zip(grid[0], ("prediction", "raw mask scores", "truth", "class logits"), strict=True):
            axis.set_title(title)
        if image is not None:
            bar = figure.colorbar(image, ax=grid[:, 1], location="bottom", shrink=0.9, pad=0.02, aspect=30)
            bar.set_label("mask logit, maximum over RoIs")
    return figure


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
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_FONT):
        figure = matplotlib.figure.Figure(figsize=(7.2, 1.75 * len(batches) + 0.3), layout="constrained")
        grid = figure.subplots(len(batches), 4, squeeze=False)
        # One scale for all areas, so that the panels compare.
        everywhere = np.concatenate([_areas(batch) for _, batch in batches])
        for axes, (name, batch) in zip(grid, batches, strict=True):
            colour, hatch, marker = _style(name)
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


def roi_boxplots(counts: RoICounts) -> Any:
    """Figure 4: boxplots of the number of RoIs above each score, per class.

    Boxes span the quartiles, whiskers reach 1.5 interquartile ranges, circles lie beyond, diamonds are means. Each
    panel has its own scale: the counts differ by orders of magnitude.

    Returns:
        A matplotlib figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    order: list[str] = [name for name in ("covid", "pneumonia", "control") if name in counts.class_names]
    order += [name for name in counts.class_names if name not in order]
    groups = [counts.counts[counts.labels == counts.class_names.index(name)] for name in order]
    with matplotlib.rc_context(_FONT):
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
                colour, hatch, _ = _style(name)
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


def table_figure(table: Any) -> Any:
    """A `Table` as a picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    header = [name for name, _ in table.columns]
    cells = table.cells()
    widths = [
        max(len(line) for row in [_wrapped(header), *cells] for line in row[i].split("\n")) for i in range(len(header))
    ]
    lines = 2 if any("\n" in name for name in _wrapped(header)) else 1
    letters = sum(widths) + 2 * len(widths)
    notes = [line for note in table.notes for line in textwrap.wrap(note, max(60, round(1.05 * letters)))]
    count = len(cells) + lines + 2.5 + 0.8 * len(notes)
    height = 0.19 * count
    with matplotlib.rc_context(_FONT):
        figure = matplotlib.figure.Figure(figsize=(max(4.0, 0.072 * sum(widths) + 0.16 * len(widths)), height))
        axis = figure.add_axes((0.01, 0.01, 0.98, 0.98))
        axis.axis("off")
        axis.set(xlim=(0, letters), ylim=(count, 0))
        axis.text(0, 0.6, table.title, fontsize=8.5, fontweight="bold", va="center")
        left = 0.0
        for index, (name, width) in enumerate(zip(_wrapped(header), widths, strict=True)):
            text = table.columns[index][1] == "s"
            x, align = (left, "left") if text else (left + width, "right")
            axis.text(x, 1.4 + lines / 2, name, fontsize=7, ha=align, va="center", fontweight="bold", linespacing=1.0)
            for row, values in enumerate(cells):
                axis.text(x, row + lines + 2, values[index], fontsize=7, ha=align, va="center")
            left += width + 2
        for row, line in enumerate(notes):
            y = len(cells) + lines + 2.1 + 0.8 * row
            axis.text(0, y, line, fontsize=6, ha="left", va="center", color=INK)
        axis.plot([0, letters], [1.05, 1.05], color=INK, linewidth=0.9)
        axis.plot([0, letters], [lines + 1.5, lines + 1.5], color=INK, linewidth=0.5)
    return figure


class _Blocks:
    """Boxes and arrows of Figure 1."""

    def __init__(self, matplotlib: ModuleType, axes: Any) -> None:
        self._patches, self._axes = matplotlib.patches, axes

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        title: str,
        text: str,
        colour: str,
        *,
        dashed: bool = False,
    ) -> None:
        ink = FAINT if dashed else INK
        style = {"linestyle": "--" if dashed else "-", "edgecolor": ink, "facecolor": colour, "linewidth": 0.8}
        shape = "round,pad=0,rounding_size=1"
        self._axes.add_patch(self._patches.FancyBboxPatch((x, y), width, height, boxstyle=shape, **style))
        lines = text.count("\n") + 1
        middle = y + height / 2
        self._axes.text(
            x + width / 2,
            middle + 1.35 * lines,
            title,
            ha="center",
            va="center",
            fontsize=8,
            color=ink,
            fontweight="bold",
        )
        self._axes.text(
            x + width / 2, middle - 1.5, text, ha="center", va="center", fontsize=6.8, color=ink, linespacing=1.15
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, solid: bool = True) -> None:
        style = {"arrowstyle": "-|>", "color": INK if solid else FAINT, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
        style["linestyle"] = "-" if solid else "--"
        self._axes.annotate("", (x2, y2), (x1, y1), arrowprops=style)

    def line(self, points: Sequence[tuple[float, float]]) -> None:
        self._axes.plot(*zip(*points, strict=True), color=INK, linewidth=0.9, solid_joinstyle="miter")

    def bracket(self, x1: float, x2: float, y: float, text: str) -> None:
        self._axes.plot([x1, x1, x2, x2], [y - 1, y, y, y - 1], color=INK, linewidth=0.7)
        self._axes.text((x1 + x2) / 2, y + 0.6, text, ha="center", va="bottom", fontsize=7.5)


def _matplotlib() -> ModuleType:
    matplotlib = import_extra("matplotlib", "plots", "drawing figures")
    for part in ("figure", "patches", "lines", "patheffects", "ticker"):
        import_extra(f"matplotlib.{part}", "plots", "drawing figures")
    return matplotlib


def _canvas(matplotlib: ModuleType, width: float, height: float) -> tuple[Any, Any]:
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


@torch.no_grad()
def tensor_shapes(name: str) -> dict[str, str]:
    """Shapes of what each part puts out, seen in a forward pass of a 512 x 512 slice."""
    variant = get_variant(name)
    # Two RoIs are enough to see the shapes, and quick.
    few: dict[str, Any] = {"rpn_pre_nms_top_n_test": 2, "rpn_post_nms_top_n_test": 2, "box_score_thresh": -0.01}
    model = create_model(name, **few)
    seen: dict[str, tuple[int, ...]] = {}
    watched = {"stem": model.backbone.body.maxpool, "rpn": model.rpn.head, "box": model.roi_heads.box_roi_pool}
    watched |= {f"block {n}": getattr(model.backbone.body, f"layer{n}") for n in range(1, variant.stages + 1)}
    watched |= {"box head": model.roi_heads.box_head}
    if variant.task == "segmentation":
        watched |= {"mask in": model.roi_heads.mask_roi_pool, "mask": model.roi_heads.mask_predictor}
    features: list[tuple[int, ...]] = []

    def record(part: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            first = output[0][0] if part == "rpn" else output
            seen[part] = tuple(first.shape)

        return hook

    hooks = [module.register_forward_hook(record(part)) for part, module in watched.items()]
    levels = model.backbone.register_forward_hook(
        lambda _, __, out: features.extend(tuple(v.shape) for v in out.values())
    )
    model([torch.zeros(3, 512, 512)])
    for hook in [*hooks, levels]:
        hook.remove()
    text = {part: _times(shape[1:]) for part, shape in seen.items()}
    fpn = f"{_times(features[0][1:])}"
    if len(features) > 1:
        sides = ", ".join(str(shape[-1]) for shape in features)
        fpn = f"{features[0][1]} maps of side {sides}"
    anchors = seen["rpn"][1]
    text |= {
        "input": "3 x 512 x 512",
        "fpn": fpn,
        "rpn": f"{anchors} scores, {4 * anchors} deltas\nper cell; up to 1000 RoIs",
    }
    hidden = seen["box head"][1]
    text["box"] = f"{_times(seen['box'][1:])} per RoI\n{hidden} {hidden}, class and box".replace(
        f"{hidden} {hidden}", f"{hidden}, {hidden}"
    )
    if variant.task == "segmentation":
        text["mask"] = f"{_times(seen['mask in'][1:])} per RoI\nlogits {_times(seen['mask'][1:])}"
    else:
        s = model.module_s
        text["s"] = f"{s.fc1.in_features}, {s.fc1.out_features}, {s.fc2.out_features}, {s.logits.out_features}"
    return text


def _times(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)


def _draw_slice(matplotlib: ModuleType, axis: Any, prediction: Prediction) -> None:
    axis.imshow(prediction.image, cmap="gray", vmin=0, vmax=1)
    for mask in prediction.masks:
        _fill(matplotlib, axis, mask, ORANGE, 0.35)
    for box, score in zip(prediction.boxes, prediction.scores, strict=True):
        x1, y1, x2, y2 = box.tolist()
        rectangle = matplotlib.patches.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=SKY, linewidth=0.8)
        axis.add_patch(rectangle)
        text = axis.text(x1, y1 - 3, f"{score:.2f}", color="white", fontsize=5.5, ha="left", va="bottom")
        text.set_path_effects([matplotlib.patheffects.withStroke(linewidth=1.5, foreground="black")])


def _draw_truth(matplotlib: ModuleType, axis: Any, row: SliceFigureRow) -> None:
    height, width = row.prediction.image_size
    if row.lesions is None and row.lungs is None:
        axis.imshow(np.full((height, width), 0.95), cmap="gray", vmin=0, vmax=1)
        axis.text(0.5, 0.5, "not known", ha="center", va="center", transform=axis.transAxes)
        return
    shown = np.zeros((height, width, 3))
    if row.lungs is not None:
        shown[row.lungs] = 0.45
    if row.lesions is not None and len(row.lesions):
        shown[row.lesions.any(axis=0)] = (0.98, 0.75, 0.20)
    axis.imshow(shown)


def _draw_logits(matplotlib: ModuleType, axis: Any, row: SliceFigureRow) -> None:
    if row.truth is not None:
        axis.text(0.02, 0.97, f"true: {row.truth}", color="#00694C", va="top", fontsize=7.5, transform=axis.transAxes)
    axis.spines[["top", "right", "left"]].set_visible(False)
    if not row.logits:
        axis.axis("off")
        axis.text(0.02, 0.5, "no classifier", va="center", transform=axis.transAxes)
        return
    names = list(row.logits)
    values = [row.logits[name] for name in names]
    best = int(np.argmax(values))
    bars = axis.barh(range(len(names)), values, height=0.35, color="#D9D9D9", edgecolor=INK, linewidth=0.5)
    bars[best].set(facecolor=VERMILLION, hatch="///")
    axis.axvline(0, color=INK, linewidth=0.6)
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.1 * (high - low or 1)
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        words = f"{class_title(name)}  {value:.2f}"
        text = axis.text(low - room / 2, index - 0.38, words, va="center", ha="left", fontsize=6.5)
        text.set_path_effects([matplotlib.patheffects.withStroke(linewidth=2.5, foreground="white")])
    axis.set(yticks=[], ylim=(len(names) - 0.4, -1.3), xlim=(low - room, high + room))


def _fill(matplotlib: ModuleType, axis: Any, mask: np.ndarray, colour: str, alpha: float) -> None:
    if not mask.any():
        return
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    layer = np.zeros((*mask.shape, 4))
    layer[mask] = (red, green, blue, alpha)
    axis.imshow(layer)
    axis.contour(mask.astype(float), levels=[0.5], colors=[colour], linewidths=0.7)


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


def _style(name: str) -> tuple[str, str, str]:
    return CLASS_STYLE.get(name, _OTHER_STYLES[sum(name.encode()) % len(_OTHER_STYLES)])


def _short(title: str) -> str:
    return title.replace("common ", "")


def _wrapped(header: Sequence[str]) -> list[str]:
    """Long column names on two lines, broken in the middle."""
    wrapped = []
    for name in header:
        gaps = [index for index, letter in enumerate(name) if letter == " "]
        if len(name) > 12 and gaps:
            middle = min(gaps, key=lambda index: abs(index - len(name) / 2))
            name = f"{name[:middle]}\n{name[middle + 1 :]}"
        wrapped.append(name)
    return wrapped
