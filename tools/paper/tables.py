"""Tables 1 to 5 of the paper: what it prints, as literal data with its source, and what is measured here.

The paper's figures come from its own data (CNCB, COVIDx-CT) and its own hardware. Rows say which source they are from;
figures of different data are not to be compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from phantom import phantom
from torch.utils.flop_counter import FlopCounterMode

from ctmasknet.errors import ConfigError
from ctmasknet.evaluation.evaluate import MISSING, Evaluation, Table
from ctmasknet.models import Model
from ctmasknet.models.inference import EVERY_SCORE
from ctmasknet.registry import VARIANTS, class_title, get_variant
from ctmasknet.zoo import choose_device, create_model
from paper.roi_statistics import RoICounts

PAPER, MEASURED = "paper", "measured"

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

PAPER_SEPARATE_TABLE2 = ("Mask R-CNN (ResNet50 + FPN), GGO and consolidation apart", 0.5020, 0.4198, 0.3871, 145.54)
"""Table 2, ResNet50 with separate masks: AP@0.5, AP@0.75, AP@[0.5:0.95], minutes."""

PAPER_SEPARATE_TABLE3 = (
    "COVID-CT-Mask-Net (ResNet50 + FPN), GGO and consolidation apart",
    (0.9388, 0.9506, 0.9691),
    0.9564,
    460.0,
)
"""Table 3, the same: sensitivity COVID-19, pneumonia, control; overall accuracy; minutes."""

PAPER_TABLE4 = {
    "covid": ((42.71, 61.06), (17.87, 27.39), (2.40, 5.55)),
    "pneumonia": ((0.65, 3.15), (0.15, 1.25), (0.03, 0.30)),
    "control": ((0.11, 1.25), (0.016, 0.32), (0.0, 0.0)),
}
"""Table 4: mean and what it calls a 95% interval, at RoI scores 0.2, 0.5, 0.9; ResNet34 T1."""

PAPER_TABLE5 = {
    ("covid", "pneumonia"): ("0.96 / 1e-10", "0.92 / 1e-10", "0.63 / 1e-10"),
    ("covid", "control"): ("0.98 / 1e-10", "0.94 / 1e-10", None),
    ("pneumonia", "control"): ("0.18 / 2e-08", "0.067 / 0.091", None),
}
"""Table 5: statistic / p; ResNet34 T1."""


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


def table2(evaluations: Sequence[Evaluation] = ()) -> Table:
    """Table 2: released-protocol AP of segmenters at the paper's thresholds, measured and as the paper prints it."""
    rows: list[tuple[Any, ...]] = []
    for evaluation in _of_task(evaluations, "segmentation"):
        found, spread = evaluation.metrics["paper"], evaluation.intervals["paper"]
        figures = [value for key in ("ap50", "ap75", "ap") for value in (found[key], _span(spread[key]))]
        rows.append((_title(evaluation), MEASURED, evaluation.images, *figures, evaluation.training_minutes))
    for variant in VARIANTS.values():
        paper = variant.paper
        if variant.task == "segmentation":
            row = (paper.ap50, None, paper.ap75, None, paper.ap, None, paper.minutes)
            rows.append((variant.title, PAPER, None, *row))
    title, ap50, ap75, ap, minutes = PAPER_SEPARATE_TABLE2
    rows.append((title, PAPER, None, ap50, None, ap75, None, ap, None, minutes))
    columns = (
        ("model", "s"),
        ("source", "s"),
        ("slices", "d"),
        ("AP@0.5", ".4f"),
        ("AP@0.5, 95% CI", "s"),
        ("AP@0.75", ".4f"),
        ("AP@0.75, 95% CI", "s"),
        ("AP@[0.5:0.95]", ".4f"),
        ("AP@[0.5:0.95], 95% CI", "s"),
        ("training, min", ".2f"),
    )
    notes = (
        "AP per slice, averaged over slices, as the paper's released code computes it; detections scored above 0.75, "
        "NMS at 0.75, mask logits above 0.5.",
        *_source_notes(evaluations, "CNCB, 100 slices in the released lists"),
    )
    return Table("Table 2. Average precision of segmentation models", columns, tuple(rows), notes)


def table3(evaluations: Sequence[Evaluation] = ()) -> Table:
    """Table 3: sensitivity per class and overall accuracy of classifiers on slices.

    Raises:
        ConfigError: an evaluation of other classes than control, pneumonia and COVID-19.
    """
    rows: list[tuple[Any, ...]] = []
    order = ("covid", "pneumonia", "control")
    for evaluation in _of_task(evaluations, "classification"):
        _paper_classes(evaluation.class_names, "Table 3")
        found, spread = evaluation.metrics["slice"], evaluation.intervals["slice"]
        row: list[Any] = [_title(evaluation), MEASURED, evaluation.images]
        for name in order:
            row += [found["sensitivity"][name], _span(spread["sensitivity"][name])]
        rows.append((*row, found["accuracy"], _span(spread["accuracy"]), evaluation.training_minutes))
    for variant in VARIANTS.values():
        paper = variant.paper
        if paper.sensitivity is not None:
            control, pneumonia, covid = paper.sensitivity
            row = [covid, None, pneumonia, None, control, None, paper.accuracy, None, paper.minutes]
            rows.append((variant.title, PAPER, None, *row))
    title, (covid, pneumonia, control), accuracy, minutes = PAPER_SEPARATE_TABLE3
    rows.append((title, PAPER, None, covid, None, pneumonia, None, control, None, accuracy, None, minutes))
    columns: list[tuple[str, str]] = [("model", "s"), ("source", "s"), ("slices", "d")]
    for title in ("COVID-19", "pneumonia", "normal", "overall"):
        columns += [(title, ".2%"), (f"{title}, 95% CI", "s")]
    columns.append(("training, min", ".2f"))
    notes = _source_notes(evaluations, "COVIDx-CT test, 21,192 slices")
    return Table("Table 3. Class sensitivity and overall accuracy", tuple(columns), tuple(rows), notes)


def table4(counts: RoICounts, *, model: str) -> Table:
    """Table 4: mean number of RoIs above each score per class."""
    _paper_classes(counts.class_names, "Table 4")
    found = {(row["class"], row["threshold"]): row for row in counts.summary()}
    rows: list[tuple[Any, ...]] = []
    for name in ("covid", "pneumonia", "control"):
        for threshold in counts.thresholds:
            row = found[name, threshold]
            figures = (row["mean"], row["spread"], _span(row["interval"], ".2f"), _span(row["patient_interval"], ".2f"))
            rows.append((model, MEASURED, class_title(name), threshold, row["n"], *figures))
    for name, printed in PAPER_TABLE4.items():
        for threshold, (mean, spread) in zip((0.2, 0.5, 0.9), printed, strict=True):
            paper = (mean, spread, None, None)
            rows.append(("COVID-CT-Mask-Net (ResNet34 T1 + FPN)", PAPER, class_title(name), threshold, 475, *paper))
    columns = (
        ("model", "s"),
        ("source", "s"),
        ("class", "s"),
        ("RoI score above", ".1f"),
        ("slices", "d"),
        ("mean RoIs", ".2f"),
        ("± 1.96 SD", ".2f"),
        ("95% interval of the mean, slices", "s"),
        ("95% interval of the mean, patients", "s"),
    )
    notes = (
        "The paper prints its ± as a 95% interval; with these counts and sample sizes it can only be about "
        "1.96 standard deviations, so that is given here, and true intervals of the mean beside it: t over slices "
        "(as if they were independent), bootstrap over patients (N/A under five).",
        "Measured and paper rows are on different data and are not to be compared.",
    )
    return Table("Table 4. RoIs in the batch above a score", columns, tuple(rows), notes)


def table5(counts: RoICounts, *, model: str) -> Table:
    """Table 5: one-sided two-sample Kolmogorov-Smirnov tests between the classes."""
    _paper_classes(counts.class_names, "Table 5")
    rows: list[tuple[Any, ...]] = []
    sizes = {name: int((counts.labels == label).sum()) for label, name in enumerate(counts.class_names)}
    for test in counts.tests():
        pair = f"{class_title(test['first'])} / {class_title(test['second'])}"
        slices = f"{sizes[test['first']]} / {sizes[test['second']]}"
        significant = None if test["p"] is None else ("yes" if test["p"] < 0.01 else "no")
        rows.append((model, MEASURED, pair, test["threshold"], slices, test["statistic"], test["p"], significant))
    for (first, second), printed in PAPER_TABLE5.items():
        pair = f"{class_title(first)} / {class_title(second)}"
        for threshold, cell in zip((0.2, 0.5, 0.9), printed, strict=True):
            values: tuple[Any, ...] = (None, None, None)
            if cell is not None:
                statistic, p = (float(value) for value in cell.split(" / "))
                values = (statistic, p, "yes" if p < 0.01 else "no")
            rows.append(("COVID-CT-Mask-Net (ResNet34 T1 + FPN)", PAPER, pair, threshold, "475 / 475", *values))
    columns = (
        ("model", "s"),
        ("source", "s"),
        ("classes", "s"),
        ("RoI score above", ".1f"),
        ("slices", "s"),
        ("statistic", ".3f"),
        ("p", ".2g"),
        ("significant at 1%", "s"),
    )
    notes = (
        'scipy.stats.ks_2samp(first, second, alternative="less"): the alternative is that the first class has '
        "more such RoIs. N/A where a class has no RoI above the score. Slices of one patient are alike: with few "
        "patients p is too small.",
        "Measured and paper rows are on different data and are not to be compared.",
    )
    return Table("Table 5. One-sided Kolmogorov-Smirnov tests", columns, tuple(rows), notes)


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


def _of_task(evaluations: Sequence[Evaluation], task: str) -> list[Evaluation]:
    for evaluation in evaluations:
        if evaluation.task != task:
            raise ConfigError(f"{evaluation.model}: an evaluation of {evaluation.task}, this table is for {task}")
    return list(evaluations)


def _title(evaluation: Evaluation) -> str:
    variant = VARIANTS.get(evaluation.model)
    title = evaluation.model if variant is None else f"{variant.title}, {evaluation.model}"
    apart = evaluation.task == "segmentation" and len(evaluation.class_names) > 2
    return f"{title}, {' and '.join(evaluation.class_names[1:])} apart" if apart else title


def _source_notes(evaluations: Sequence[Evaluation], paper: str) -> tuple[str, ...]:
    data = sorted({", ".join(e.data) for e in evaluations})
    patients = [str(e.patients if e.patients is not None else "unknown") for e in evaluations]
    own = f"Measured rows: {'; '.join(data)} ({', '.join(patients)} patients); " if data else ""
    return (
        f"{own}paper rows: its own data ({paper}) and hardware. They are not the same test and are not to be compared.",
        f"95% CI: bootstrap over patients, {MISSING} under five. Training minutes: as the weights' record states.",
    )


def _paper_classes(names: Sequence[str], table: str) -> None:
    if not {"control", "pneumonia", "covid"} <= set(names):
        raise ConfigError(f"{table} is about control, pneumonia and covid; the classes are {', '.join(names)}")


def _span(interval: tuple[float, float] | None, spec: str = ".4f") -> str | None:
    return None if interval is None else f"{interval[0]:{spec}} to {interval[1]:{spec}}"
