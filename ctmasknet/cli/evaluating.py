"""The command that measures."""

from __future__ import annotations

import argparse

from ctmasknet.cli.printing import print_json


def evaluate_command(options: argparse.Namespace) -> int:
    """`ctmasknet evaluate`; the exit code."""
    import os

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
    if int(os.environ.get("RANK", "0")) != 0:  # of several processes one speaks
        return 0
    if options.json:
        print_json(result.to_dict())
    else:
        print(result.table())
    return 0
