"""How the cost of a prediction grows: batch size, side of the image, number of proposals; time and memory."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from benchmark_machine import machine, peak_mb
from benchmark_predict import alternate
from phantom import phantom

from ctmasknet import Predictor, create_model
from ctmasknet.evaluation.evaluate import Table

BATCHES = (1, 2, 4, 8)
SIDES = (256, 384, 512, 768, 1024)
PROPOSALS = (125, 250, 500, 1000)
LABELS = {"batch": "batch size", "side": "side of the image, pixels", "proposals": "proposals kept, at most"}


def run(options: argparse.Namespace) -> dict[str, Any]:
    points = (
        [("batch", value) for value in BATCHES]
        + [("side", value) for value in SIDES]
        + [("proposals", value) for value in PROPOSALS]
    )
    rows = []
    for kind, value in points:
        facts = measure(options.variant, options.device, kind, value, options.rounds)
        rows.append({"kind": kind, "value": value} | facts)
        print(json.dumps(rows[-1]), flush=True)
    if options.out:
        for path in write(options.variant, rows, machine(options.device), options.out):
            print(path)
    return {"variant": options.variant, "rows": rows}


def measure(name: str, device: str, kind: str, value: int, rounds: int) -> dict[str, float]:
    """Slices per second, and MB above the import, of a process of its own."""
    command = [sys.executable, __file__, name, device, kind, str(value), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def one(name: str, device: str, kind: str, value: int, rounds: int) -> dict[str, float]:
    """A single setting, in this process."""
    before = peak_mb()
    settings: dict[str, Any] = {}
    if kind == "side":
        settings = {"min_size": value, "max_size": max(value, 1024)}
    elif kind == "proposals":
        settings = {"rpn_post_nms_top_n_test": value, "rpn_pre_nms_top_n_test": 1000}
    model = create_model(name, weights="default", **settings)
    task = "segmenter" if model.variant.task == "segmentation" else "classifier"
    both: dict[str, Any] = {"segmenter": None, "classifier": None} | {task: model}
    batch = value if kind == "batch" else 1
    predictor = Predictor(**both, device=device, batch_size=batch)
    images = [phantom(seed, size=value if kind == "side" else 512).image for seed in range(max(BATCHES))]
    seconds = alternate({"default": lambda: list(predictor.batch(images))}, rounds, device)["default"]
    memory = torch.cuda.max_memory_allocated() / 2**20 if device.startswith("cuda") else peak_mb() - before
    return {"images_per_s": round(len(images) / min(seconds), 2), "peak_mb": round(memory, 1)}


def write(name: str, rows: list[dict[str, Any]], where: dict[str, Any], out: Path) -> list[Path]:
    """The table, and a figure of three panels."""
    from matplotlib import pyplot as plt

    columns = (("varied", "s"), ("value", ".0f"), ("slices/s", ".1f"), ("peak memory, MB", ".0f"))
    cells = tuple((LABELS[row["kind"]], row["value"], row["images_per_s"], row["peak_mb"]) for row in rows)
    note = (
        f"{name} on phantoms; {where['processor']}, {where['threads']} threads, {where['device']}, torch "
        f"{where['torch']}. Not varied: batch 1, side 512, 1000 proposals. Peak memory above the import, each "
        "setting in a process of its own."
    )
    paths = list(Table("How cost grows", columns, cells, (note,)).save(out / "tables", "benchmark-scaling"))
    for kind in LABELS:
        chosen = [row for row in rows if row["kind"] == kind]
        values = [row["value"] for row in chosen]
        figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
        for axis, key, label in (
            (axes[0], "images_per_s", "slices per second"),
            (axes[1], "peak_mb", "peak memory above the import, MB"),
        ):
            axis.plot(values, [row[key] for row in chosen], "o-", color="#0072B2")
            axis.set(xlabel=LABELS[kind], ylabel=label, xticks=values)
            axis.set_ylim(bottom=0)
        path = out / "figures" / f"benchmark-{kind}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
        paths.append(path)
    return paths


if __name__ == "__main__":
    variant, where, kind, value, rounds = sys.argv[1:]
    print(json.dumps(one(variant, where, kind, int(value), int(rounds))))
