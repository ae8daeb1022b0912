"""Commands on labelled slices: train, evaluate, data check."""

from __future__ import annotations

import argparse
import json
import logging
import os
from typing import Any

from ctmasknet.cli.shared import arguments_of, say
from ctmasknet.errors import ConfigError


def train_command(options: argparse.Namespace) -> None:
    """Train or fine-tune a variant.

    Segmenters learn from CNCB folders (imgs/ + masks/) or COCO instance JSON; classifiers from CNCB file names,
    COVIDx-CT lists or one folder per class. RUN holds checkpoints, best/ and last/ (weights), metrics.csv,
    curves.png and run.json. If a run is interrupted, the same command continues it where it stopped.
    Several GPUs: accelerate launch -m ctmasknet train ... (docs/train.md).

    Examples:
      ctmasknet train maskrcnn_resnet18_t2 --data lesions/train --val lesions/val --weights default --out run
      ctmasknet train ctmasknet_resnet18_t2 --data slices --weights run/best --out run2 --cache-rois
      ctmasknet train --config run/config.json --out again --set lr=1e-4
    """
    from ctmasknet.engine import TrainConfig, train

    given = arguments_of(TrainConfig, options) | dict(map(_field, options.fields))
    if options.resume == "no":
        given["resume"] = False
    if options.config is None:
        config = TrainConfig.from_dict(given, source="the command line")
    else:
        config = TrainConfig.from_file(options.config, **given)
    if not options.quiet:
        logging.getLogger("ctmasknet").setLevel(logging.INFO)
    result = train(config)
    if _speaks() and (options.json or not options.quiet):
        lines = [f"Weights: create_model({config.model!r}, weights={result.best!r})"] if result.finished else []
        lines.append(f"{config.model}, {result.seconds / 60:.1f} min: {result.summary}")
        say(options, result.to_dict(), *lines)


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


def evaluate_command(options: argparse.Namespace) -> None:
    """Measure a model, or other people's predictions, on labelled slices.

    MODEL is a variant's name (its default weights), a folder of weights, an author's .pth, or a .json of
    predictions: COCO results, or [{image_id, probabilities}] for classifiers. Segmenters get AP by the released
    protocol, COCO AP, Dice and lesions found; classifiers get sensitivity, specificity, AUC and calibration, by
    slice and by patient. Intervals are 95%, over patients. Several processes: torchrun -m ctmasknet evaluate ...

    Examples:
      ctmasknet evaluate maskrcnn_resnet18_t2 --data lesions/val
      ctmasknet evaluate ctmasknet_resnet18_t1 --data classes/val --json -o work > result.json
      ctmasknet evaluate theirs.json --data lesions/val --score-threshold 0.5
    """
    from ctmasknet.evaluation.evaluate import evaluate

    result = evaluate(**arguments_of(evaluate, options), progress=not options.quiet)
    if _speaks():
        say(options, result.to_dict(), result.table())


def data_check_command(options: argparse.Namespace) -> int:
    """Report what a data set holds and what is wrong with it.

    Reads every file. If anything should be put right, the exit code is 2.

    Example: ctmasknet data check lesions/train --against lesions/val
    """
    from ctmasknet.data.check import check_dataset

    report = check_dataset(**arguments_of(check_dataset, options))
    say(options, report.to_dict(), report.table())
    return 0 if report.ok else 2
