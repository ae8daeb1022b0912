"""Speed as ratios, both sides measured in the same run, on the same data, device and weights.

    python tools/benchmark.py predict --data lesions/val -o docs
    python tools/benchmark.py scaling -o docs
    python tools/benchmark.py train --variants maskrcnn_resnet18_t1 maskrcnn_resnet34_t1 --losses 200

`predict`: images per second of `Predictor`, nothing set by the user, against the plain torchvision assembly (eager,
float32, one image at a time) with the same weights, rounds alternating between the two, and how well their outputs
agree. `scaling`: how the cost grows with batch size, image side and number of proposals. `train`: images per second of
`ctmasknet.train` (recipe "fast") against the plain torchvision loop, the released code's way: float32, one image per
step, a DataLoader that decodes with PIL, the paper's RoI sampling; --losses also trains both sides alike (batch 1, no
augmentation, same weights, same optimizer) and compares the mean loss of the last quarter of the steps.

Speeds are those of the fastest round, since whatever else runs on a machine only slows a round down; the ratio of every
round is in the JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import benchmark_predict
import benchmark_scaling
import benchmark_train
import torch
from benchmark_machine import machine

from ctmasknet import CTMaskNetError
from ctmasknet.registry import DEFAULT_SEGMENTER, VARIANTS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    common.add_argument("--rounds", type=int, default=3, help="rounds of one side and the other (default: 3)")

    predicting = commands.add_parser("predict", parents=[common], help="Predictor against the plain assembly")
    predicting.add_argument("--variants", nargs="+", default=list(VARIANTS), help="default: all 14")
    predicting.add_argument("--data", type=Path, help="CNCB folder (default: phantoms)")
    predicting.add_argument("--images", type=int, default=8, help="slices per round and side (default: 8)")
    predicting.add_argument(
        "--precision", default="auto", choices=("auto", "float32", "bfloat16"), help="of Predictor (default: its own)"
    )
    predicting.add_argument("--ap", action="store_true", help="also AP of both sides on all of --data, where trained")
    predicting.add_argument("--no-memory", action="store_true", help="leave out the peak memory (a process each)")
    predicting.add_argument("--profile", action="store_true", help="print where the time of a variant goes")
    predicting.add_argument("-o", "--out", type=Path, metavar="DIR", help="write tables/ and figures/ there")
    predicting.set_defaults(run=benchmark_predict.run)

    scaling = commands.add_parser("scaling", parents=[common], help="cost against batch, image side, proposals")
    scaling.add_argument("--variant", default=DEFAULT_SEGMENTER)
    scaling.add_argument("-o", "--out", type=Path, metavar="DIR", help="write tables/ and figures/ there")
    scaling.set_defaults(run=benchmark_scaling.run)

    training = commands.add_parser("train", parents=[common], help="the training engine against the plain loop")
    training.add_argument(
        "--variants", nargs="+", default=["maskrcnn_resnet18_t1", "maskrcnn_resnet34_t1"], help="segmenters to measure"
    )
    training.add_argument("--data", type=Path, help="CNCB folder (default: phantoms made for the run)")
    training.add_argument("--images", type=int, default=24, help="slices per round and side (default: 24)")
    training.add_argument("--losses", type=int, default=0, metavar="STEPS", help="compare losses over STEPS steps")
    training.set_defaults(run=benchmark_train.run)

    options = parser.parse_args(arguments)
    try:
        report = {"command": options.command, "machine": machine(options.device)} | options.run(options)
    except CTMaskNetError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
