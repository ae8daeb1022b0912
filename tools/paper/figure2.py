"""Figure 2: lesions, mask scores and class logits of some slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from phantom import phantom

from ctmasknet.data.datasets import open_dataset
from ctmasknet.data.layouts import LesionRecord, classes_of, instances, read_class_mask, same_names
from ctmasknet.data.slices import read_slice
from ctmasknet.errors import ConfigError, DataError
from ctmasknet.evaluation.contributions import roi_contributions
from ctmasknet.evaluation.evaluate import Table
from ctmasknet.models import COVIDCTMaskNet, LesionMaskRCNN
from ctmasknet.predictor import Predictor
from ctmasknet.registry import DEFAULT_CLASSIFIER, DEFAULT_SEGMENTER, class_title
from ctmasknet.results import Prediction
from ctmasknet.zoo import class_names, open_model
from paper.drawing import FONT, INK, ORANGE, SKY, VERMILLION, matplotlib_of
from paper.request import Made, Request


def make(request: Request) -> Made:
    segmenter, classifier = _pair(request)
    predictor = Predictor(segmenter, classifier, device=request.device, score_map=True)
    count = 4 if request.limit is None else request.limit
    drawn = _slices_of(request, segmenter, count) if request.data else _phantoms(request, segmenter, count)
    lines, rows = [], []
    for title, pixels, lesions, lungs in drawn:
        prediction = predictor(pixels)
        logits = None
        if classifier is not None:
            found = roi_contributions(classifier, prediction.roi_batch).logits.tolist()
            logits = dict(zip(class_names(classifier), found, strict=True))
        truth = "lesions" if len(lesions) else "no lesion"
        lines.append(SliceFigureRow(prediction, lesions, lungs, logits, truth, title))
        best = max(logits, key=logits.__getitem__) if logits else None
        highest = None if prediction.score_map is None else float(prediction.score_map.max())
        numbers = (len(lesions), len(prediction.scores), highest)
        rows.append((title, *numbers, None if best is None else class_title(best)))
    columns = (("slice", "s"), ("lesions", "d"), ("found", "d"), ("highest mask logit", ".2f"), ("called", "s"))
    source = "; ".join(request.data) or f"phantoms from seed {request.seed}"
    notes = [f"{segmenter.variant.name}; {source}. Found: scored above {predictor.score_threshold}."]
    table = Table("Figure 2. Lesions, mask scores and class logits", columns, tuple(rows), tuple(notes))
    return Made(table, slice_figure(lines))


def _pair(request: Request) -> tuple[LesionMaskRCNN, COVIDCTMaskNet | None]:
    """The segmenter and, if given, the classifier among the weights."""
    models = [open_model(weights) for weights in request.weights or (DEFAULT_SEGMENTER, DEFAULT_CLASSIFIER)]
    segmenters = [model for model in models if isinstance(model, LesionMaskRCNN)]
    classifiers = [model for model in models if isinstance(model, COVIDCTMaskNet)]
    if len(segmenters) != 1 or len(classifiers) > 1:
        raise ConfigError("Figure 2 needs the weights of one segmenter, and of one classifier at most")
    return segmenters[0], classifiers[0] if classifiers else None


def _slices_of(request: Request, segmenter: LesionMaskRCNN, count: int) -> list[tuple[str, Any, Any, Any]]:
    """Title, slice, lesions, lungs: half of them with lesions and half without, as far as there are such."""
    names = class_names(segmenter)
    data: Any = open_dataset("segmentation", list(request.data), classes=request.classes or classes_of(names))
    nameless = "classes" not in segmenter.metadata and len(data.class_names) == len(names)
    if not nameless and not same_names(data.class_names, names):
        raise DataError(
            f"{', '.join(request.data)}: classes {', '.join(data.class_names)}, but {segmenter.variant.name} tells "
            f"{', '.join(names)} apart; give --classes, or data, of the model's classes"
        )
    order = np.random.default_rng(request.seed).permutation(len(data)).tolist()
    with_lesions: list[int] = []
    without: list[int] = []
    for index in order:
        (with_lesions if data.labels_of(index) else without).append(index)
        if len(with_lesions) >= count and len(without) >= count:
            break
    half = min(len(without), count // 2)
    chosen = with_lesions[: count - half]
    chosen += without[: count - len(chosen)]
    drawn = []
    for index in chosen:
        record, sample = data.records[index], data[index]
        lungs = read_class_mask(record.mask) > 0 if isinstance(record, LesionRecord) else None
        drawn.append((sample.name, read_slice(record.image), sample.target["masks"].numpy() != 0, lungs))
    return drawn


def _phantoms(request: Request, segmenter: LesionMaskRCNN, count: int) -> list[tuple[str, Any, Any, Any]]:
    classes = request.classes or classes_of(class_names(segmenter))
    drawn = []
    for seed in range(request.seed, request.seed + count):
        made = phantom(seed, lesions=(4, 6, 0, 0)[(seed - request.seed) % 4])
        lesions = instances(made.class_mask(), classes=classes)["masks"].numpy() != 0
        drawn.append((f"phantom {seed}", made.image, lesions, made.lungs))
    return drawn


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
    matplotlib = matplotlib_of()
    maps = [row.prediction.score_map for row in rows if row.prediction.score_map is not None]
    highest = max([float(found.max()) for found in maps] + [1e-6])
    with matplotlib.rc_context(FONT):
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
