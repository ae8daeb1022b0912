"""A model, or somebody else's predictions, against labelled slices: every figure of the paper and more, in one call."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from tqdm import tqdm

from ctmasknet.batch import READERS, process_device, process_shard
from ctmasknet.data.datasets import SliceDataset, open_dataset
from ctmasknet.data.layouts import LesionClasses, Names, classes_of, same_names
from ctmasknet.data.scans import read_ahead
from ctmasknet.errors import ConfigError, DataError, MissingExtraError, import_extra
from ctmasknet.evaluation.metrics import (
    MIN_PATIENTS,
    ClassificationMetrics,
    CocoMetrics,
    Figures,
    Metrics,
    Row,
    SegmentationMetrics,
    nested,
    patient_intervals,
)
from ctmasknet.evaluation.rows import Predictions, Subject, model_subject
from ctmasknet.models import Model
from ctmasknet.models.inference import Precision
from ctmasknet.output import Content, Log, PathLike, csv_table, json_bytes, read_logs, require_writable, write_files
from ctmasknet.registry import VARIANTS, Task, class_title
from ctmasknet.zoo import choose_device, open_model


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured.

    Attributes:
        task: ``"segmentation"`` or ``"classification"``.
        model: name of the variant, its folder, or the file of predictions.
        data: the paths evaluated on.
        images, patients: how many; patients None if some are unknown.
        class_names: in the order of the labels.
        metrics: by group. Segmentation: ``paper`` (score > 0.75, NMS 0.75, mask logits > 0.5), ``operating_point``
            (the weights' own thresholds), both as in `SegmentationMetrics.compute`; ``coco``, as in
            `CocoMetrics.compute`. Classification: ``slice`` and ``patient`` (mean probabilities of a patient's
            slices; patients whose slices differ in label are left out), as in `ClassificationMetrics.compute`.
        intervals: 95% bootstrap intervals over patients, shaped like `metrics`; None under five patients.
        settings: what the figures depend on: thresholds, seed, limit, digest of the weights.
        training_minutes: from the weights' own record, None if unknown.
        seconds: this call's time.
        rows: per slice; the figures are made of these.
    """

    task: str
    model: str
    data: tuple[str, ...]
    images: int
    patients: int | None
    class_names: tuple[str, ...]
    metrics: dict[str, Figures]
    intervals: dict[str, Figures]
    settings: dict[str, Any]
    training_minutes: float | None
    seconds: float
    rows: list[Row] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the rows as plain values, ready for ``json.dumps(..., allow_nan=False)``."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "rows"}

    def save(self, out: PathLike) -> list[Path]:
        """Write ``evaluation.json``, ``evaluation.md`` (the table) and ``slices.csv`` (figures per slice) into `out`.

        Of a classifier ``reliability.png`` too, if matplotlib is installed (extra ``plots``). Returns their paths.

        Raises:
            OutputError: they cannot be written.
        """
        flat = []
        for row in self.rows:
            inner = {f"{g}_{k}": v for g in ("paper", "operating_point") for k, v in row.get(g, {}).items()}
            flat.append({key: value for key, value in row.items() if not isinstance(value, dict)} | inner)
        contents: dict[Path, Content] = {
            Path(out) / EVALUATION: json_bytes(self.to_dict(), indent=2),
            Path(out) / "evaluation.md": f"{self.table()}\n".encode(),
            Path(out) / "slices.csv": csv_table(flat).encode(),
        }
        if self.task == "classification":
            with suppress(MissingExtraError):
                contents[Path(out) / "reliability.png"] = partial(self.reliability_figure().savefig, dpi=140)
        return write_files(contents)

    def reliability_figure(self) -> Any:
        """How often a class is true where the model gives it a probability, by slices and by patients (matplotlib).

        Raises:
            ConfigError: not of a classifier.
            MissingExtraError: matplotlib is not installed.
        """
        groups = {name: figures for name, figures in self.metrics.items() if "reliability" in figures}
        if not groups:
            raise ConfigError("a reliability curve is of a classifier")
        matplotlib = import_extra("matplotlib.figure", "plots", "drawing a reliability curve")
        figure = matplotlib.Figure(figsize=(4 * len(groups), 4), layout="constrained")
        panels = figure.subplots(1, len(groups), squeeze=False)[0]
        for axis, (group, figures) in zip(panels, groups.items(), strict=True):
            axis.plot([0, 1], [0, 1], color="#8A8A8A", linewidth=1, linestyle=":")
            for (name, bins), (colour, line) in zip(figures["reliability"].items(), cycle(_CURVES)):
                points = [[found[key] for found in bins] for key in ("probability", "observed")]
                axis.plot(*points, line, color=colour, label=class_title(name), markersize=5)
            axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="mean probability given", ylabel="fraction true")
            calibration = f"Brier score {figures['brier']:.3f}, ECE {figures['ece']:.3f}"
            axis.set_title(f"{figures['n']} {group}s: {calibration}", fontsize=9)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        return figure

    def __repr__(self) -> str:
        """The first figures of each group; `table` has them all."""
        lines = [f"Evaluation of {self.model} on {self.images} slices"]
        for group, figures in self.metrics.items():
            numbers = [f"{name} {value:.3f}" for name, value in figures.items() if isinstance(value, float)]
            lines.append(f"{_GROUPS[group]}: {', '.join(numbers[:4]) or 'see table()'}")
        return "\n  ".join(lines)

    def table(self) -> Table:
        """All figures, one per line, with their intervals."""
        rows: list[tuple[Any, ...]] = []
        for group, figures in self.metrics.items():
            for name, value in figures.items():
                if name in ("confusion", "images", "mixed_patients", "n", "reliability"):
                    continue
                spread = self.intervals.get(group, {}).get(name)
                by_class = isinstance(value, dict)
                for label, number in value.items() if by_class else [("", value)]:
                    bounds = spread and (spread[label] if by_class else spread)
                    interval = bounds and f"{bounds[0]:.4f} to {bounds[1]:.4f}"
                    rows.append((_GROUPS[group], f"{name} {label}".rstrip(), number, interval))
        who = "unknown patients" if self.patients is None else f"{self.patients} patients"
        notes = [f"{self.images} slices, {who}; {', '.join(self.data)}."]
        if self.task == "segmentation":
            point = self.settings["protocols"]["operating_point"]
            nms = f", NMS at {point['nms_threshold']:g}" if "nms_threshold" in point else ""
            notes.append(f"Operating point: score above {point['score_threshold']:g}{nms}.")
            notes.append(f"Dice: {DICE} (mask > 0.5), of the union of the masks; not averaged over grey levels.")
        if self.patients is None or self.patients < MIN_PATIENTS:
            notes.append(f"Intervals are N/A: they need {MIN_PATIENTS} known patients or more.")
        for group, figures in self.metrics.items():
            if "confusion" in figures:
                notes.append(f"Confusion ({group}s; rows true, columns called): {figures['confusion']}.")
        columns = (("protocol", "s"), ("figure", "s"), ("value", ".4f"), ("95% interval", "s"))
        return Table(f"Evaluation of {self.model}", columns, tuple(rows), tuple(notes))


EVALUATION = "evaluation.json"
DICE = "binary Dice at 0.5"
"""The protocol of every Dice here; many papers average it over 256 thresholds of a grey map instead."""

_CURVES = (("#555555", "^--"), ("#56B4E9", "s-."), ("#D55E00", "o-"))
"""Colour, marker and line of each class, which also differ in grey."""
_GROUPS = {
    "paper": "released AP protocol, paper's thresholds",
    "operating_point": "operating point",
    "coco": "COCO, score > 0.05",
    "slice": "slice",
    "patient": "patient",
}


def evaluate(
    model: str | os.PathLike[str] | Model,
    data: PathLike | Sequence[PathLike] | SliceDataset[Any],
    *,
    classes: LesionClasses | None = None,
    min_area: int = 100,
    names: Names | None = None,
    limit: int | None = None,
    seed: int = 0,
    score_threshold: float | None = None,
    nms_threshold: float | None = None,
    samples: int = 1000,
    out: PathLike | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    precision: Precision = "float32",
    progress: bool = True,
) -> Evaluation:
    """Measure a model, or other people's predictions, on labelled slices.

    Started by ``accelerate launch`` or ``torchrun``, the processes share the slices, each counted once, and all
    return the same. Memory holds a row per slice (a few kB with COCO AP), never all masks.

    Args:
        model: a variant's name (its default weights), a folder of weights, an author's ``.pth``, a model; or a
            ``.json`` of predictions (see `ctmasknet.evaluation.rows`).
        data: labelled slices: paths as `open_dataset` takes them, or a data set, which several threads read.
        classes: ``"merge"``, ``"both"`` or ``"ggo"``; None: what the model tells apart, by the names of its classes.
        min_area: lesions of so many pixels or fewer join the background.
        names: restricts to these names: a text file that lists them, or the names.
        limit: at most so many slices, drawn at random by `seed`; a warning says if there are fewer.
        seed: of this draw and the bootstrap.
        score_threshold, nms_threshold: segmenters: the operating point, each by itself; None takes the weights' own.
            Of predictions, those scored above `score_threshold` (None: 0.5); their NMS is their own.
        samples: bootstrap resamples, 0 for no intervals.
        out: folder for the rows, and in the end for what `Evaluation.save` writes. Slices that have a row of the same
            weights and settings there are not computed again: a killed evaluation goes on.
        device: None takes a GPU if there is one.
        batch_size: slices per forward; None takes 1 on the CPU, 8 elsewhere.
        precision: as for `Predictor`.
        progress: show a progress bar on a terminal.

    Raises:
        ConfigError: unknown model, impossible settings.
        DataError: data or predictions that are incomplete, or do not fit the model.
        WeightsError: weights missing or damaged.
        MissingExtraError: an extra is missing; the text names it.
    """
    began = time.monotonic()
    counts = {"limit": (limit, 1), "batch_size": (batch_size, 1), "seed": (seed, 0), "samples": (samples, 0)}
    for name, (count, least) in counts.items():
        if count is not None and count < least:
            raise ConfigError(f"{name}={count}: must be at least {least}")
    given = {"score_threshold": score_threshold, "nms_threshold": nms_threshold}
    point = {name: value for name, value in given.items() if value is not None}
    for name, value in point.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}={value}: must lie in 0..1")
    if out is not None:
        require_writable(Path(out) / EVALUATION)
    where = choose_device(process_device() if device is None else device)
    rules = {"min_area": min_area, "names": names}
    subject, source = _opened(model, data, classes, rules, point, precision, where)
    chosen = _draw(source, limit, seed)
    settings = subject.facts | {"task": subject.task, "classes": classes, "min_area": min_area}
    if subject.task == "segmentation":
        settings["dice"] = DICE
    size = batch_size or (1 if where.type == "cpu" else 8)
    rows = _measure(subject, source, chosen, settings, out, size, progress)
    rows = [row | {"patient": source.patients[index]} for row, index in zip(rows, chosen, strict=True)]
    patients = [row["patient"] for row in rows]
    known = None not in patients
    by_patient, mixed = _by_patient(rows) if known and subject.task == "classification" else ([], 0)
    # Per group what makes its figures, and the patient of each of the rows they are of.
    groups: dict[str, tuple[Metrics, list[str | None]]] = {}
    if subject.task == "segmentation":
        for group in ("paper", "operating_point"):
            groups[group] = SegmentationMetrics([row[group] for row in rows]), patients
        groups["coco"] = CocoMetrics([row["coco"] for row in rows]), patients
    else:
        groups["slice"] = ClassificationMetrics(subject.class_names, rows), patients
        if by_patient:
            one_each = [row["patient"] for row in by_patient]
            groups["patient"] = ClassificationMetrics(subject.class_names, by_patient), one_each
    metrics = {group: own.compute() for group, (own, _) in groups.items()}
    if mixed:
        metrics.setdefault("patient", {})["mixed_patients"] = mixed
    evaluation = Evaluation(
        task=subject.task,
        model=subject.name,
        data=_shown(data),
        images=len(rows),
        patients=len(set(patients)) if known else None,
        class_names=subject.class_names,
        metrics=metrics,
        intervals={
            group: nested(patient_intervals(whose, own.statistic(), samples=samples, seed=seed))
            for group, (own, whose) in groups.items()
        },
        settings=settings | {"limit": limit, "seed": seed, "bootstrap_samples": samples},
        training_minutes=subject.training_minutes,
        seconds=time.monotonic() - began,
        rows=rows,
    )
    if out is not None and process_shard()[0] == 0:
        evaluation.save(out)
    return evaluation


def title_of(given: str | os.PathLike[str] | Model, opened: Model) -> str:
    """What to call a model that was asked for as `given`."""
    if isinstance(given, Model) or str(given) in VARIANTS:
        return opened.variant.name
    return f"{opened.variant.name} ({Path(given).name})"


def _opened(
    model: str | os.PathLike[str] | Model,
    data: PathLike | Sequence[PathLike] | SliceDataset[Any],
    classes: LesionClasses | None,
    rules: dict[str, Any],
    point: dict[str, float],
    precision: Precision,
    device: torch.device,
) -> tuple[Subject, SliceDataset[Any]]:
    """What is to be measured, and the slices; `rules` of `open_dataset`, `point` as of `model_subject`."""
    if not isinstance(model, Model) and str(model).lower().endswith(".json"):
        predictions = Predictions.read(Path(model))
        if "nms_threshold" in point and predictions.task == "segmentation":
            raise ConfigError("nms_threshold is for models: predictions keep the NMS they were made with")
        source = _slices(data, predictions.task, classes or "merge", rules)
        subject = predictions.subject(source, point.get("score_threshold", 0.5))
    else:
        opened = open_model(model, device=device)
        subject = model_subject(opened, title_of(model, opened), precision, point)
        source = _slices(data, subject.task, classes or classes_of(subject.class_names), rules)
        # Weights that do not name their classes are what the caller says they are.
        said = classes is not None or subject.class_names[0] == "class 0"
        if "classes" not in opened.metadata and said and len(subject.class_names) == len(source.class_names):
            subject.class_names = source.class_names
        if not same_names(source.class_names, subject.class_names):
            fix = "give classes='merge', 'both' or 'ggo', or data" if subject.task == "segmentation" else "give data"
            raise DataError(
                f"{', '.join(_shown(data))}: classes {', '.join(source.class_names)}, but {subject.name} tells "
                f"{', '.join(subject.class_names)} apart; {fix} of the model's classes, by name and in their order"
            )
    if subject.task == "classification" and point:
        raise ConfigError("score_threshold and nms_threshold are for segmentation, not for classification")
    return subject, source


def _slices(
    data: PathLike | Sequence[PathLike] | SliceDataset[Any], task: Task, classes: LesionClasses, rules: dict[str, Any]
) -> SliceDataset[Any]:
    """The slices to evaluate on, each of a name of its own."""
    source = data if isinstance(data, SliceDataset) else open_dataset(task, data, classes=classes, **rules)
    if source.task != task:
        raise ConfigError(f"the data are for {source.task}, the model or the predictions for {task}")
    for name, count in Counter(source.names).most_common(1):
        if count > 1:
            raise DataError(f"{name}: {count} slices of this name; every slice needs its own")
    return source


def _shown(data: PathLike | Sequence[PathLike] | SliceDataset[Any]) -> tuple[str, ...]:
    """Where slices are from, in words."""
    if isinstance(data, SliceDataset):
        return (type(data).__name__,)
    return tuple(str(path) for path in ([data] if isinstance(data, str | os.PathLike) else data))


def _draw(source: SliceDataset[Any], limit: int | None, seed: int) -> list[int]:
    """Indices of the slices to evaluate, in the order of the data."""
    if limit is not None and limit > len(source):
        warnings.warn(f"{limit} slices asked for, but there are {len(source)}: all are taken", stacklevel=3)
    if limit is None or limit >= len(source):
        return list(range(len(source)))
    return sorted(np.random.default_rng(seed).choice(len(source), limit, replace=False).tolist())


def _measure(
    subject: Subject,
    source: SliceDataset[Any],
    chosen: list[int],
    settings: dict[str, Any],
    out: PathLike | None,
    batch_size: int,
    progress: bool,
) -> list[Row]:
    """Rows of the chosen slices, in their order; this process computes its share of those that are not in `out`.

    Rows of other settings, or of data with other slices, stand in files of another name.
    """
    rank, world = process_shard()
    facts = settings | {"slices": source.names, "class_names": subject.class_names}
    key = hashlib.sha256(json_bytes(facts)).hexdigest()[:12]
    kept = sorted(Path(out).glob(f"rows-{key}-*.jsonl")) if out is not None else []
    done = {row["image_id"]: row for row in read_logs(kept, "image_id")}
    gather(None)  # every process has read before one writes
    own = [index for index in chosen if source.names[index] not in done][rank::world]
    reads = read_ahead(source.__getitem__, own, threads=READERS, depth=2 * max(batch_size, READERS))
    fresh: list[Row] = []
    hidden = not progress or rank != 0 or not sys.stderr.isatty()
    with (
        nullcontext() if out is None else Log(Path(out) / f"rows-{key}-{rank}.jsonl", "image_id") as log,
        tqdm(total=len(own), unit="slice", desc=subject.name, disable=hidden) as bar,
    ):
        while samples := [sample for _, sample in islice(reads, batch_size)]:
            rows = subject.rows(samples)
            if log is not None:
                log.append(*rows)
            fresh += rows
            bar.update(len(rows))
    for rows in gather(fresh):
        done |= {row["image_id"]: row for row in rows}
    return [done[source.names[index]] for index in chosen]


def gather(value: Any) -> list[Any]:
    """A value of each process, once all have come here."""
    world = process_shard()[1]
    if world == 1:
        return [value]
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    shares: list[Any] = [None] * world
    torch.distributed.all_gather_object(shares, value)
    return shares


def _by_patient(rows: list[Row]) -> tuple[list[Row], int]:
    """One row per patient of a single label, with mean probabilities; and the number of the others."""
    slices: dict[str, list[Row]] = {}
    for row in rows:
        slices.setdefault(row["patient"], []).append(row)
    patients = []
    for patient, own in slices.items():
        if len({row["label"] for row in own}) == 1:
            mean = np.mean([row["probabilities"] for row in own], axis=0).tolist()
            patients.append({"patient": patient, "label": own[0]["label"], "probabilities": mean})
    return patients, len(slices) - len(patients)


MISSING = "N/A"


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Attributes:
        title: one line.
        columns: name and format specification of each, for example ``("AP@0.5", ".4f")``; ``"s"`` for text.
        rows: values, None where there is none (printed "N/A"); text in a column of numbers stays as it is.
        notes: sentences below the table.
    """

    title: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Any, ...], ...]
    notes: tuple[str, ...] = ()

    def cells(self) -> list[list[str]]:
        """Formatted values, without the header."""

        def text(value: Any, spec: str) -> str:
            return MISSING if value is None else value if isinstance(value, str) else format(value, spec)

        specs = [spec for _, spec in self.columns]
        return [[text(value, spec) for value, spec in zip(row, specs, strict=True)] for row in self.rows]

    def __str__(self) -> str:
        """GitHub's table syntax, its columns aligned, under the title; notes below."""
        rows = [[name for name, _ in self.columns], *self.cells()]
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        pads = [str.ljust if spec == "s" else str.rjust for _, spec in self.columns]
        rows.insert(1, ["---" if pad is str.ljust else "---:" for pad in pads])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = (pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True))
            lines.append(f"| {' | '.join(cells)} |")
        return "\n\n".join([f"**{self.title}**", "\n".join(lines), *self.notes])
