"""Prediction speed: `Predictor` against the plain torchvision assembly, and whether they say the same."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_machine import machine, synchronize
from phantom import phantom
from plain_torchvision import plain_model
from torch import Tensor
from torchvision.ops import box_iou

from ctmasknet import Predictor, create_model
from ctmasknet.data.datasets import open_dataset
from ctmasknet.evaluation.evaluate import Table
from ctmasknet.evaluation.metrics import SegmentationMetrics
from ctmasknet.models.inference import FastInference
from ctmasknet.registry import get_variant
from ctmasknet.weights.manifest import manifest
from ctmasknet.zoo import Model, load_released

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import golden

LOW_SCORE, SAME_BOX, SAME_SCORE = 0.05, 0.9, 0.02
"""Detections above this score count; matched are those of this IoU or more; their scores may differ by this."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of every variant asked for; tables and a plot if a folder is given."""
    images = _images(options.data, options.images)
    report: dict[str, Any] = {"data": str(options.data or "phantoms"), "images": len(images), "variants": {}}
    for name in options.variants:
        facts = measure(name, images, options)
        report["variants"][name] = facts
        print(f"{name}: {json.dumps(facts)}", flush=True)
    if options.out:
        for path in write(report, machine(options.device), options.out):
            print(path)
    return report


def measure(name: str, images: list[np.ndarray], options: argparse.Namespace) -> dict[str, Any]:
    model = weighted(name)
    is_segmenter = model.variant.task == "segmentation"
    pair: dict[str, Any] = {"segmenter": None, "classifier": None} | {
        "segmenter" if is_segmenter else "classifier": model
    }
    ours = Predictor(**pair, device=options.device, precision=options.precision)
    exact = Predictor(**pair, device=options.device, precision="float32")
    plain = _plain(model, ours, options.device)
    sides: dict[str, Callable[[], Any]] = {
        "plain": lambda: [plain(image) for image in images],
        "default": lambda: list(ours.batch(images)),
    }
    if ours.precision != "float32":
        sides["float32"] = lambda: list(exact.batch(images))
    if options.device != "cpu":
        sides["network"] = _network_alone(model, images, ours)
    seconds = alternate(sides, options.rounds, options.device)
    # The fastest round: whatever else runs on a machine only ever slows a round down.
    best = {side: min(values) for side, values in seconds.items()}
    rates = {side: len(images) / value for side, value in best.items()}
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["default"], strict=True)]
    facts: dict[str, Any] = {
        "weights": "default" if name in _trained() else "golden",
        "precision": ours.precision,
        "images_per_s": {side: round(rate, 2) for side, rate in rates.items()},
        "ms": {side: round(1000 / rate, 1) for side, rate in rates.items()},
        "ratios": [round(ratio, 2) for ratio in ratios],
        "ratio": round(best["plain"] / best["default"], 2),
        "float32_ratio": round(best["plain"] / best.get("float32", best["default"]), 2),
    }
    if "network" in rates:
        facts["share_of_network_rate"] = round(rates["default"] / rates["network"], 2)
    facts["agreement"] = (
        _same_detections(model, plain, images, ours) if is_segmenter else _same_classes(model, images, ours)
    )
    if options.ap and options.data and is_segmenter and name in _trained():
        facts["ap"] = _average_precisions(plain, ours, options.data)
    if not options.no_memory and options.device == "cpu":
        facts["peak_mb"] = peak_memory(name)
    if options.profile:
        _profile(lambda: ours(images[0]))
    return facts


def weighted(name: str) -> Model:
    """The variant with its trained weights, or else with those of the golden outputs: there are no random figures."""
    if name in _trained():
        return create_model(name, weights="default")
    with tempfile.TemporaryDirectory() as folder:
        return load_released(golden.checkpoint(Path(folder) / f"{name}.pth", name), name).eval()


def alternate(sides: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one that is not counted."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, work in sides.items():
            synchronize(device)
            started = time.perf_counter()
            work()
            synchronize(device)
            if number:
                seconds[side].append(time.perf_counter() - started)
    return seconds


def _plain(model: Model, ours: Predictor, device: str) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """One image through the plain assembly, at the thresholds of `ours`.

    torchvision has no COVID-CT-Mask-Net: for classifiers it is our model's own, plain call, which is assembled from
    torchvision's parts.
    """
    network: Any = model
    if model.variant.task == "segmentation":
        network = plain_model(model.variant.name)
        network.load_state_dict(model.state_dict())
        network = network.to(device).eval()
        network.roi_heads.score_thresh = ours.score_threshold
        network.roi_heads.nms_thresh = ours.nms_threshold

    @torch.inference_mode()
    def predict(image: np.ndarray) -> dict[str, np.ndarray]:
        tensor = torch.from_numpy(image).to(device).float().div(255).expand(3, -1, -1)
        result = network([tensor])[0]
        if "masks" in result:
            result["masks"] = result["masks"][:, 0] > 0.5
        return {key: value.cpu().numpy() for key, value in result.items()}

    predict.network = network  # type: ignore[attr-defined]
    return predict


def _network_alone(model: Model, images: list[np.ndarray], ours: Predictor) -> Callable[[], Any]:
    dtype = torch.bfloat16 if ours.precision == "bfloat16" else torch.float32
    network = FastInference(model, dtype)._network
    batch = torch.zeros(min(ours.batch_size, len(images)), 3, *images[0].shape, device=ours.device)

    @torch.inference_mode()
    def work() -> None:
        for _ in range(0, len(images), len(batch)):
            network(batch)

    return work


@torch.inference_mode()
def _same_detections(model: Model, plain: Any, images: list[np.ndarray], like: Predictor) -> dict[str, Any]:
    ours = Predictor(model, None, device=like.device, precision=like.precision, score_threshold=LOW_SCORE)
    heads = plain.network.roi_heads
    before, heads.score_thresh = heads.score_thresh, LOW_SCORE
    total = matched = alike = 0
    gaps: list[float] = []
    for image in images:
        expected, found = plain(image), ours(image)
        total += len(expected["scores"])
        if not len(found.scores) or not len(expected["scores"]):
            continue
        iou = box_iou(torch.from_numpy(expected["boxes"]), torch.from_numpy(found.boxes))
        iou[torch.from_numpy(expected["labels"][:, None] != found.labels[None])] = 0.0
        gap = np.abs(expected["scores"][:, None] - found.scores[None])
        # Of several boxes that overlap so much, the one that scores nearest is the same one.
        gap[iou.numpy() < SAME_BOX] = np.inf
        nearest = gap.min(1)
        matched += int(np.isfinite(nearest).sum())
        alike += int((nearest <= SAME_SCORE).sum())
        gaps += nearest[np.isfinite(nearest)].tolist()
    heads.score_thresh = before
    return {
        "detections": total,
        "matched": round(matched / total, 4) if total else None,
        "scores_alike": round(alike / matched, 4) if matched else None,
        "largest_score_gap": round(max(gaps, default=0.0), 5),
    }


@torch.inference_mode()
def _same_classes(model: Model, images: list[np.ndarray], ours: Predictor) -> dict[str, Any]:
    fast = FastInference(model, torch.bfloat16 if ours.precision == "bfloat16" else torch.float32)
    tensors = [torch.from_numpy(i).to(ours.device).float().div(255).expand(3, -1, -1) for i in images]
    expected = torch.stack([model([tensor])[0]["logits"] for tensor in tensors])
    found = torch.stack([fast.classify(fast.read([tensor]))[0]["logits"] for tensor in tensors])
    spread = (expected.max() - expected.min()).item()
    return {
        "slices": len(images),
        "same_class": round((expected.argmax(1) == found.argmax(1)).float().mean().item(), 4),
        "largest_logit_gap_of_spread": round((expected - found).abs().max().item() / spread, 5),
    }


def _average_precisions(plain: Any, ours: Predictor, data: Path) -> dict[str, Any]:
    """Released-protocol AP of both sides at the operating point."""
    sides: dict[str, SegmentationMetrics] = {"plain": SegmentationMetrics(), "default": SegmentationMetrics()}
    for image, target, name in open_dataset("segmentation", data):
        pixels = _grey(image)
        given = (target["masks"] != 0, target["labels"])
        expected, found = plain(pixels), ours(pixels)
        sides["plain"].update(*given, expected["masks"], expected["labels"], expected["scores"], image_id=name)
        sides["default"].update(*given, found.masks, found.labels, found.scores, image_id=name)
    return {
        side: {key: round(metrics.compute()[key], 4) for key in ("ap50", "ap75", "ap", "dice_pooled")}
        for side, metrics in sides.items()
    }


def peak_memory(name: str) -> float | None:
    """MB that one prediction of a 512 x 512 slice, every region above score 0, takes above the import."""
    # Loading, which holds the weights twice for a moment, is not part of it: the count starts anew after it.
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import benchmark_machine as m, benchmark_predict as b; "
        "before = m.peak_mb(); model = b.weighted(sys.argv[2]); segments = model.variant.task == 'segmentation'; "
        "open('/proc/self/clear_refs', 'w').write('5'); "
        "p = b.Predictor(model if segments else None, None if segments else model, device='cpu', "
        "score_threshold=0.0 if segments else None); p(b.phantom(0).image); print(m.peak_mb() - before)"
    )
    if not sys.platform.startswith("linux"):
        return None
    command = [sys.executable, "-c", script, str(Path(__file__).parent), name]
    return round(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]), 1)


def _profile(work: Callable[[], Any]) -> None:
    work()
    with torch.profiler.profile() as profile:
        work()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))


def _images(data: Path | None, count: int) -> list[np.ndarray]:
    if data is None:
        return [phantom(seed).image for seed in range(count)]
    dataset = open_dataset("segmentation", data)
    step = max(1, len(dataset) // count)
    return [_grey(dataset[index][0]) for index in range(0, len(dataset), step)][:count]


def _grey(image: Tensor) -> np.ndarray:
    return image.reshape(-1, *image.shape[-2:])[0].numpy()


def _trained() -> set[str]:
    return {entry.variant for entry in manifest()}


def write(report: dict[str, Any], where: dict[str, Any], out: Path) -> list[Path]:
    """The table of all variants, and speed against size and AP."""
    rows = []
    for name, facts in report["variants"].items():
        agreement = facts["agreement"]
        same = agreement.get("matched", agreement.get("same_class"))
        rows.append(
            (
                name,
                facts["weights"],
                facts["ms"]["plain"],
                facts["ms"]["default"],
                facts["images_per_s"]["default"],
                facts["ratio"],
                facts["float32_ratio"],
                facts.get("peak_mb"),
                same,
            )
        )
    columns = (
        ("variant", "s"),
        ("weights", "s"),
        ("plain, ms", ".0f"),
        ("Predictor, ms", ".0f"),
        ("images/s", ".1f"),
        ("ratio", ".2f"),
        ("ratio, float32", ".2f"),
        ("peak memory, MB", ".0f"),
        ("same", ".3f"),
    )
    precision = next(iter(report["variants"].values()))["precision"]
    notes = (
        f"{where['processor']}, {where['threads']} threads, {where['device']}, torch {where['torch']}, torchvision "
        f"{where['torchvision']}; Predictor's own choice of precision: {precision}. {report['images']} slices of "
        f"{Path(report['data']).name} per round, the fastest of the rounds.",
        "same: share of the plain assembly's detections above 0.05 found again at IoU 0.9 (segmenters), of slices with "
        "the same class (classifiers). Peak memory: one 512 x 512 prediction with every region reported, above the "
        "import.",
    )
    table = Table("Prediction speed of the 14 variants", columns, tuple(rows), notes)
    paths = list(table.save(out / "tables", "benchmark-predict"))
    return [*paths, _plot(report, out / "figures" / "benchmark-predict.png")]


def _plot(report: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot as plt

    measured = {n: f for n, f in report["variants"].items() if "ap" in f}
    panels = 2 if measured else 1
    figure, grid = plt.subplots(1, panels, figsize=(5.5 * panels, 4.2), layout="constrained", squeeze=False)
    axes = grid[0]
    markers = {"segmentation": "o", "classification": "^"}
    for name, facts in report["variants"].items():
        variant = get_variant(name)
        millions = sum(p.numel() for p in create_model(name).parameters()) / 1e6
        speed = facts["images_per_s"]
        axes[0].plot([millions] * 2, [speed["plain"], speed["default"]], color="0.75", lw=1, zorder=1)
        for side, face in (("plain", "white"), ("default", "#0072B2")):
            axes[0].plot(millions, speed[side], markers[variant.task], mfc=face, mec="#0072B2", ms=6, zorder=2)
        if variant.task == "segmentation":
            axes[0].annotate(
                name.removeprefix("maskrcnn_"), (millions, speed["default"]), (5, 3), textcoords="offset points", size=7
            )
    for label, marker, face in (
        ("segmenter, Predictor", "o", "#0072B2"),
        ("segmenter, plain", "o", "white"),
        ("classifier, Predictor", "^", "#0072B2"),
        ("classifier, plain", "^", "white"),
    ):
        axes[0].plot([], [], marker, mfc=face, mec="#0072B2", ls="", label=label)
    axes[0].set(xscale="log", xlabel="parameters, millions", ylabel="slices per second", xlim=(3, 50))
    axes[0].set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
    axes[0].minorticks_off()
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=8)
    for name, facts in measured.items():
        axes[1].plot(facts["images_per_s"]["default"], facts["ap"]["default"]["ap50"], "o", color="#0072B2")
        axes[1].annotate(
            name.removeprefix("maskrcnn_"),
            (facts["images_per_s"]["default"], facts["ap"]["default"]["ap50"]),
            (6, 4),
            textcoords="offset points",
            size=8,
        )
    if measured:
        axes[1].set(xlabel="slices per second", ylabel="AP@0.5 at the operating point", ylim=(0, 1))
        fastest = max(facts["images_per_s"]["default"] for facts in measured.values())
        axes[1].set_xlim(0, 1.4 * fastest)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
