"""What an item is asked to be made of, and what several items need."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctmasknet.data.datasets import PathLike
from ctmasknet.data.layouts import LesionClasses
from ctmasknet.errors import ConfigError
from ctmasknet.evaluation.evaluate import MISSING, Evaluation, Table, evaluate, title_of
from ctmasknet.predictor import Predictor
from ctmasknet.registry import DEFAULT_CLASSIFIER, VARIANTS
from ctmasknet.zoo import open_model

PAPER, MEASURED = "paper", "measured"


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


def evaluations(request: Request, default: str, item: str) -> list[Evaluation]:
    """Of the weights asked for, or of the default ones."""
    data = needed(request, item)
    found = []
    for weights in request.weights or (default,):
        rows = None if request.rows is None else Path(request.rows) / file_name(weights)
        settings: dict[str, Any] = {"classes": request.classes, "limit": request.limit, "seed": request.seed}
        found.append(evaluate(weights, data, **settings, out=rows, device=request.device))
    return found


def classifying(request: Request, item: str) -> tuple[Predictor, str]:
    """A `Predictor` of the classifier asked for, or of the default one, and what to call it."""
    (weights,) = only_one(request.weights or (DEFAULT_CLASSIFIER,), item)
    predictor = Predictor(None, open_model(weights, task="classification", device=request.device))
    return predictor, title_of(weights, predictor.classifier)


def needed(request: Request, item: str) -> list[str]:
    if not request.data:
        raise ConfigError(f"{item} needs data: give --data DIR with labelled slices")
    return list(request.data)


def only_one(given: Sequence[str], item: str) -> Sequence[str]:
    if len(given) != 1:
        raise ConfigError(f"{item} takes one, not {len(given)}: {', '.join(given)}")
    return given


def file_name(weights: str) -> str:
    """What the weights are, as the name of a folder."""
    return re.sub(r"[^\w.-]+", "_", weights).strip("_") or "model"


def of_task(evaluations: Sequence[Evaluation], task: str) -> list[Evaluation]:
    for evaluation in evaluations:
        if evaluation.task != task:
            raise ConfigError(f"{evaluation.model}: an evaluation of {evaluation.task}, this table is for {task}")
    return list(evaluations)


def variant_title(evaluation: Evaluation) -> str:
    variant = VARIANTS.get(evaluation.model)
    title = evaluation.model if variant is None else f"{variant.title}, {evaluation.model}"
    apart = evaluation.task == "segmentation" and len(evaluation.class_names) > 2
    return f"{title}, {' and '.join(evaluation.class_names[1:])} apart" if apart else title


def source_notes(evaluations: Sequence[Evaluation], paper: str) -> tuple[str, ...]:
    data = sorted({", ".join(e.data) for e in evaluations})
    patients = [str(e.patients if e.patients is not None else "unknown") for e in evaluations]
    own = f"Measured rows: {'; '.join(data)} ({', '.join(patients)} patients); " if data else ""
    return (
        f"{own}paper rows: its own data ({paper}) and hardware. They are not the same test and are not to be compared.",
        f"95% CI: bootstrap over patients, {MISSING} under five. Training minutes: as the weights' record states.",
    )


def paper_classes(names: Sequence[str], table: str) -> None:
    if not {"control", "pneumonia", "covid"} <= set(names):
        raise ConfigError(f"{table} is about control, pneumonia and covid; the classes are {', '.join(names)}")


def span(interval: tuple[float, float] | None, spec: str = ".4f") -> str | None:
    return None if interval is None else f"{interval[0]:{spec}} to {interval[1]:{spec}}"
