"""Commands on labelled slices: train, evaluate, data check."""

from __future__ import annotations

import argparse
import json
import logging
import os
from typing import Any

from ctmasknet.cli.printing import say
from ctmasknet.errors import ConfigError

_TRAIN_FLAGS = (
    "data",
    "val",
    "weights",
    "out",
    "recipe",
    "classes",
    "names",
    "val_names",
    "epochs",
    "batch_size",
    "lr",
    "seed",
    "device",
    "cache_rois",
)


def train_command(options: argparse.Namespace) -> int:
    """`ctmasknet train`; the exit code."""
    from ctmasknet.engine import TrainConfig, train

    given = {name: getattr(options, name) for name in _TRAIN_FLAGS if getattr(options, name) is not None}
    if options.name is not None:
        given["model"] = options.name
    if options.resume is not None:
        given["resume"] = False if options.resume == "no" else options.resume
    given |= dict(_field(text) for text in options.fields)
    if options.config is not None:
        config = TrainConfig.from_file(options.config, **given)
    else:
        config = TrainConfig.from_dict(given, source="the command line")
    if not options.quiet:
        logging.getLogger("ctmasknet").setLevel(logging.INFO)
    result = train(config)
    if _speaks() and (options.json or not options.quiet):
        weights = f"Weights: create_model({config.model!r}, weights={result.best!r})\n" if result.finished else ""
        say(options, result.to_dict(), f"{weights}{config.model}, {result.seconds / 60:.1f} min: {result.summary}")
    return 0


def _speaks() -> bool:
    """Of several processes the first speaks."""
    return os.environ.get("RANK", "0") == "0"


def _field(text: str) -> tuple[str, Any]:
    """``"lr=1e-4"`` as a field and its value; values are JSON, or text where they are none."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: needs FIELD=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def evaluate_command(options: argparse.Namespace) -> int:
    """`ctmasknet evaluate`; the exit code."""
    from ctmasknet.evaluation.evaluate import evaluate

    result = evaluate(
        options.model,
        options.data,
        classes=options.classes,
        min_area=options.min_area,
        names=options.names,
        limit=options.limit,
        per_class=options.per_class,
        seed=options.seed,
        score_threshold=options.score_threshold,
        nms_threshold=options.nms_threshold,
        samples=options.samples,
        out=options.out,
        device=options.device,
        batch_size=options.batch_size,
        precision=options.precision,
        workers=options.workers,
        progress=not options.quiet,
    )
    if _speaks():
        say(options, result.to_dict(), result.table())
    return 0


def data_check_command(options: argparse.Namespace) -> int:
    """`ctmasknet data check`; the exit code."""
    from ctmasknet.data.check import check_dataset

    report = check_dataset(
        options.data,
        task=options.task,
        against=options.against,
        against_names=options.against_names,
        classes=options.classes,
        min_area=options.min_area,
        names=options.names,
    )
    say(options, report.to_dict(), report.table())
    return 0 if report.ok else 2
