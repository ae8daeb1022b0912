"""Every table and figure of the paper, made from weights and data, printed and written to a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from phantom import phantom

from ctmasknet.data.datasets import PathLike, open_dataset
from ctmasknet.data.layouts import LesionClasses, LesionRecord, read_class_mask
from ctmasknet.data.slices import read_slice
from ctmasknet.errors import ConfigError, MissingExtraError
from ctmasknet.evaluation.contributions import contribution_figure, roi_contributions
from ctmasknet.evaluation.evaluate import Evaluation, Table, evaluate, title_of
from ctmasknet.models import COVIDCTMaskNet, LesionMaskRCNN
from ctmasknet.predictor import Predictor
from ctmasknet.registry import DEFAULT_CLASSIFIER, DEFAULT_SEGMENTER, VARIANTS, class_title
from ctmasknet.results import RoIBatch
from ctmasknet.zoo import class_names, open_model
from paper import figures, tables
from paper.roi_statistics import PAPER_SAMPLE, RoICounts


@dataclass(frozen=True)
class Request:
    """What to make an item of.

    Attributes:
        weights: names of variants, folders of weights, ``.pth`` files, or (tables) ``.json`` files of predictions;
            empty takes the bundled ones, and all 14 variants for Table 1.
        data: labelled slices, as `open_dataset` takes them; for contributions, one image.
        seed: of every draw, and of the phantoms where there are no data.
        limit: slices: at most so many for Tables 2 and 3, per class for Tables 4 and 5 and Figure 4 (default
            475, the paper's), lines of Figure 2 (default 4).
        classes: lesion classes of the data; None: what the model tells apart.
        rows: folder in which evaluations keep their rows, to go on after a kill.
        device: None takes a GPU if there is one.
    """

    weights: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    seed: int = 0
    limit: int | None = None
    classes: LesionClasses | None = None
    rows: PathLike | None = None
    device: str | None = None


@dataclass(frozen=True, eq=False)
class Made:
    """A table, and the figure it stands under (None for tables)."""

    table: Table
    figure: Any = None


def make(item: str, request: Request, out: PathLike, *, name: str | None = None) -> tuple[Table, list[Path]]:
    """Make a table or a figure of the paper and write it.

    Args:
        item: one of `ITEMS`.
        request: of what.
        out: folder; gets ITEM.md and ITEM.csv, and as ITEM.png the figure, or a picture of the table. Figures
            come as PDF and SVG too. Without matplotlib tables have no picture.
        name: of the files in place of `item`.

    Returns:
        The table and the files written.

    Raises:
        ConfigError: unknown item, or no data where some are needed.
        DataError, WeightsError, MissingExtraError: as `evaluate`.
    """
    if item not in ITEMS:
        raise ConfigError(f"{item!r} is not in the paper: use one of {', '.join(ITEMS)}")
    made = ITEMS[item](request)
    paths = list(made.table.save(out, name or item))
    if made.figure is not None:
        return made.table, paths + figures.save_figure(made.figure, out, name or item)
    try:
        picture = figures.table_figure(made.table)
    except MissingExtraError:
        return made.table, paths
    drawn = figures.save_figure(picture, out, name or item, formats=("png",))
    return made.table, paths + drawn


def _table1(request: Request) -> Made:
    return Made(tables.table1(request.weights or tuple(VARIANTS), device=request.device))


def _table2(request: Request) -> Made:
    return Made(tables.table2(_evaluations(request, DEFAULT_SEGMENTER, "Table 2")))


def _table3(request: Request) -> Made:
    return Made(tables.table3(_evaluations(request, DEFAULT_CLASSIFIER, "Table 3")))


def _table4(request: Request) -> Made:
    counts, model = _roi_counts(request, "Table 4")
    return Made(tables.table4(counts, model=model))


def _table5(request: Request) -> Made:
    counts, model = _roi_counts(request, "Table 5")
    return Made(tables.table5(counts, model=model))


def _figure1(request: Request) -> Made:
    (name,) = _only_one(request.weights or (DEFAULT_CLASSIFIER,), "Figure 1")
    parts = figures.tensor_shapes(name)
    rows = tuple((part, shape.replace("\n", "; ")) for part, shape in parts.items())
    table = Table(f"Figure 1. {VARIANTS[name].title}: shapes", (("part", "s"), ("shape", "s")), rows)
    return Made(table, figures.architecture_figure(name))


def _figure2(request: Request) -> Made:
    segmenter, classifier = _pair(request)
    predictor = Predictor(segmenter, None, device=request.device, score_map=True)
    if classifier is not None:
        classifier.to(predictor.device)
    count = 4 if request.limit is None else request.limit
    drawn = _slices_of(request, count) if request.data else _phantoms(request.seed, count)
    lines, rows = [], []
    for title, pixels, lesions, lungs in drawn:
        prediction = predictor(pixels)
        logits = None
        if classifier is not None:
            with torch.inference_mode():
                tensor = torch.from_numpy(prediction.image).to(predictor.device).expand(3, -1, -1)
                found = classifier([tensor])[0]["logits"].tolist()
            logits = dict(zip(class_names(classifier), found, strict=True))
        truth = "lesions" if len(lesions) else "no lesion"
        lines.append(figures.SliceFigureRow(prediction, lesions, lungs, logits, truth, title))
        best = max(logits, key=logits.__getitem__) if logits else None
        highest = None if prediction.score_map is None else float(prediction.score_map.max())
        numbers = (len(lesions), len(prediction.scores), highest)
        rows.append((title, *numbers, None if best is None else class_title(best)))
    columns = (("slice", "s"), ("lesions", "d"), ("found", "d"), ("highest mask logit", ".2f"), ("called", "s"))
    source = "; ".join(request.data) or f"phantoms from seed {request.seed}"
    notes = [f"{segmenter.variant.name}; {source}. Found: scored above {predictor.score_threshold}."]
    table = Table("Figure 2. Lesions, mask scores and class logits", columns, tuple(rows), tuple(notes))
    return Made(table, figures.slice_figure(lines))


def _figure3(request: Request) -> Made:
    """One slice per class, drawn by the seed."""
    classifier, name = _classifier(request, "Figure 3")
    data = open_dataset("classification", _needed(request, "Figure 3"))
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
        with torch.inference_mode():
            device = next(classifier.parameters()).device
            result = classifier([(sample.image.to(device).float() / 255).expand(3, -1, -1)])[0]
        batch = RoIBatch(*(result[key].cpu().numpy() for key in ("boxes", "scores", "labels", "deltas")))
        batches.append((data.class_names[label], batch))
        sides = batch.boxes[:, 2:] - batch.boxes[:, :2]
        numbers: tuple[Any, ...] = (len(batch.scores), None, None)
        if len(batch.scores):
            numbers = (len(batch.scores), float(batch.scores.max()), float(np.median(sides.prod(1))))
        rows.append((title, sample.name, *numbers))
    columns = (("class", "s"), ("slice", "s"), ("RoIs", "d"), ("best score", ".4f"), ("median area, px", ".0f"))
    table = Table(f"Figure 3. RoI scores and areas, {name}", columns, tuple(rows))
    return Made(table, figures.roi_figure(batches))


def _figure4(request: Request) -> Made:
    counts, model = _roi_counts(request, "Figure 4")
    rows: list[tuple[Any, ...]] = []
    for label, name in enumerate(counts.class_names):
        for column, threshold in enumerate(counts.thresholds):
            own = counts.counts[counts.labels == label, column]
            quartiles = np.percentile(own, (0, 25, 50, 75, 100)).tolist() if len(own) else [None] * 5
            rows.append((class_title(name), threshold, len(own), *quartiles))
    columns = [("class", "s"), ("RoI score above", ".1f"), ("slices", "d")]
    columns += [(part, ".1f") for part in ("smallest", "lower quartile", "median", "upper quartile", "largest")]
    table = Table(f"Figure 4. RoIs per slice above a score, {model}", tuple(columns), tuple(rows))
    return Made(table, figures.roi_boxplots(counts))


def _contributions(request: Request) -> Made:
    """Of one image, or of a phantom."""
    classifier, name = _classifier(request, "contributions")
    if request.data:
        (path,) = _only_one(request.data, "contributions")
        pixels = read_slice(path).pixels
        title = Path(path).name
    else:
        pixels = read_slice(phantom(request.seed).image).pixels
        title = f"phantom {request.seed}"
    device = next(classifier.parameters()).device
    found = roi_contributions(classifier, torch.from_numpy(pixels).to(device).expand(3, -1, -1))
    names = class_names(classifier)
    order = np.argsort(-np.abs(found.contributions).max(axis=1), kind="stable")[:24]
    rows = tuple(
        (
            rank,
            float(found.scores[i]),
            int(found.copies[i]),
            *map(float, found.boxes[i]),
            *map(float, found.contributions[i]),
        )
        for rank, i in enumerate(order, start=1)
    )
    columns = [("rank", "d"), ("score", ".3f"), ("slots", "d")]
    columns += [(edge, ".1f") for edge in ("x1", "y1", "x2", "y2")]
    columns += [(class_title(label), ".4f") for label in names]
    note = "Gradient times input of module S, copies of a region added up."
    table = Table(f"Contribution of each RoI to the class logits, {title}, {name}", tuple(columns), rows, (note,))
    return Made(table, contribution_figure(pixels, found, names))


ITEMS: dict[str, Callable[[Request], Made]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "table5": _table5,
    "figure1": _figure1,
    "figure2": _figure2,
    "figure3": _figure3,
    "figure4": _figure4,
    "contributions": _contributions,
}
"""Name on the command line -> what makes it."""


def _evaluations(request: Request, default: str, item: str) -> list[Evaluation]:
    data = _needed(request, item)
    found = []
    for weights in request.weights or (default,):
        rows = None if request.rows is None else Path(request.rows) / _file_name(weights)
        settings: dict[str, Any] = {"classes": request.classes, "limit": request.limit, "seed": request.seed}
        # The released protocol alone: COCO AP is not in the paper.
        found.append(evaluate(weights, data, **settings, out=rows, device=request.device))
    return found


def _roi_counts(request: Request, item: str) -> tuple[RoICounts, str]:
    data = _needed(request, item)
    (weights,) = _only_one(request.weights or (DEFAULT_CLASSIFIER,), item)
    rows = None if request.rows is None else Path(request.rows) / f"{_file_name(weights)}-per-class"
    per_class = request.limit or PAPER_SAMPLE
    found = evaluate(weights, data, per_class=per_class, seed=request.seed, samples=0, out=rows, device=request.device)
    variant = VARIANTS.get(found.model)
    return RoICounts.of(found.rows, found.class_names), found.model if variant is None else variant.title


def _classifier(request: Request, item: str) -> tuple[COVIDCTMaskNet, str]:
    (weights,) = _only_one(request.weights or (DEFAULT_CLASSIFIER,), item)
    model = open_model(weights, task="classification", device=request.device)
    assert isinstance(model, COVIDCTMaskNet)
    return model, title_of(weights, model)


def _pair(request: Request) -> tuple[LesionMaskRCNN, COVIDCTMaskNet | None]:
    """The segmenter and, if given, the classifier among the weights."""
    models = [open_model(weights) for weights in request.weights or (DEFAULT_SEGMENTER, DEFAULT_CLASSIFIER)]
    segmenters = [model for model in models if isinstance(model, LesionMaskRCNN)]
    classifiers = [model for model in models if isinstance(model, COVIDCTMaskNet)]
    if len(segmenters) != 1 or len(classifiers) > 1:
        raise ConfigError("Figure 2 needs the weights of one segmenter, and of one classifier at most")
    return segmenters[0], classifiers[0] if classifiers else None


def _slices_of(request: Request, count: int) -> list[tuple[str, Any, Any, Any]]:
    """Title, slice, lesions, lungs: half of them with lesions and half without, as far as there are such."""
    data: Any = open_dataset("segmentation", list(request.data), classes=request.classes or "merge")
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


def _phantoms(seed: int, count: int) -> list[tuple[str, Any, Any, Any]]:
    drawn = []
    for number in range(count):
        made = phantom(seed + number, lesions=(4, 6, 0, 0)[number % 4])
        drawn.append((f"phantom {seed + number}", made.image, made.masks, made.lungs))
    return drawn


def _needed(request: Request, item: str) -> list[str]:
    if not request.data:
        raise ConfigError(f"{item} needs data: give --data DIR with labelled slices")
    return list(request.data)


def _only_one(given: Sequence[str], item: str) -> Sequence[str]:
    if len(given) != 1:
        raise ConfigError(f"{item} takes one, not {len(given)}: {', '.join(given)}")
    return given


def _file_name(weights: str) -> str:
    return re.sub(r"[^\w.-]+", "_", weights).strip("_") or "model"
