"""The command that measures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ctmasknet.cli.printing import print_json
from ctmasknet.output import require_writable, write_files


def evaluate_command(options: argparse.Namespace) -> int:
    """`ctmasknet evaluate`; the exit code."""
    import os

    from ctmasknet.evaluation.evaluate import evaluate

    if options.json not in (None, "-"):
        require_writable(Path(options.json))
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
        out=options.rows,
        device=options.device,
        batch_size=options.batch_size,
        precision=options.precision,
        workers=options.workers,
    )
    if int(os.environ.get("RANK", "0")) != 0:  # of several processes one speaks
        return 0
    if options.json == "-":
        print_json(result.to_dict())
        return 0
    print(result.table())
    if options.json:
        write_files({Path(options.json): (json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n").encode()})
    return 0
