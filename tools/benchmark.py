"""Speed as ratios, both sides measured in the same run on the same data, device and weights; and how well they agree.

    python tools/benchmark.py predict --data lesions/val -o docs
    python tools/benchmark.py agreement --precision bfloat16 --segmentation lesions/val
    python tools/benchmark.py scaling -o docs
    python tools/benchmark.py train --variants maskrcnn_resnet18_t1 maskrcnn_resnet34_t1 --losses 200

`predict`: slices per second of `Predictor` against the plain torchvision assembly (eager, float32, one image at a
time) with the same weights, rounds alternating between the two. torchvision has no COVID-CT-Mask-Net: for classifiers
the other side is the model's own plain call. With --onnx the exported file takes its turns, too, in ONNX Runtime on as
many threads. `agreement`: what `Predictor` says of all slices of a data set against
what the plain side says, at a precision. `scaling`: how the cost grows with batch size, image side and number of
proposals. `train`: slices per second of `ctmasknet.train` (recipe "fast") against the plain torchvision loop, the
released code's way: float32, one image per step, a DataLoader that decodes with PIL, the paper's RoI sampling;
--losses also trains both sides alike (batch 1, no augmentation, same weights, same optimizer) and compares the mean
loss of the last quarter of the steps.

Speeds are those of the fastest round, since whatever else runs on a machine only slows a round down; the ratio of
every round is in the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from paper.drawing import save_table
from phantom import phantom, write_lesions
from PIL import Image
from plain_torchvision import plain_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_iou

from ctmasknet import CTMaskNetError, Predictor, TrainConfig, create_model, export, get_variant, train
from ctmasknet.data.datasets import open_dataset
from ctmasknet.data.layouts import instances
from ctmasknet.engine.setup import speed_up
from ctmasknet.evaluation.evaluate import Table
from ctmasknet.evaluation.metrics import segmentation_rows
from ctmasknet.exporting import ExportError
from ctmasknet.models import Model
from ctmasknet.models.inference import Inference, Protocol
from ctmasknet.registry import DEFAULT_SEGMENTER, VARIANTS
from ctmasknet.weights.manifest import manifest
from ctmasknet.zoo import open_model

LOW_SCORE, SAME_BOX, SAME_SCORE = 0.05, 0.9, 0.02
"""Detections above this score count; matched are those of this IoU or more; their scores may differ by this."""

BATCHES, SIDES, PROPOSALS = (1, 2, 4, 8), (256, 384, 512, 768, 1024), (125, 250, 500, 1000)
LABELS = {"batch": "batch size", "side": "side of the image, pixels", "proposals": "proposals kept, at most"}

RATE, DECAY = 1e-4, 1e-3
"""Adam in the comparison of losses: the paper's weight decay, its learning rate times ten to see losses move."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    timed = argparse.ArgumentParser(add_help=False)
    timed.add_argument("--rounds", type=int, default=3, help="rounds of one side and the other (default: 3)")
    written = argparse.ArgumentParser(add_help=False)
    written.add_argument("-o", "--out", type=Path, metavar="DIR", help="write tables/ and figures/ there")
    exact = argparse.ArgumentParser(add_help=False)
    exact.add_argument("--precision", default="float32", help="of Predictor (default: float32)")
    trained = [entry.variant for entry in manifest()]

    predicting = commands.add_parser(
        "predict", parents=[common, timed, written, exact], help="Predictor against the plain assembly"
    )
    predicting.add_argument("--variants", nargs="+", default=list(VARIANTS), help="default: all 14")
    predicting.add_argument("--data", type=Path, help="CNCB folder (default: phantoms)")
    predicting.add_argument("--images", type=int, default=8, help="slices per round and side (default: 8)")
    predicting.add_argument("--no-memory", action="store_true", help="leave out the peak memory (a process each)")
    predicting.add_argument("--onnx", action="store_true", help="also time the exported file in ONNX Runtime (CPU)")
    predicting.add_argument("--profile", action="store_true", help="print where the time of a variant goes")
    predicting.set_defaults(run=predict)

    agreeing = commands.add_parser("agreement", parents=[common, exact], help="do Predictor and the plain side agree")
    agreeing.add_argument("--variants", nargs="+", default=trained, help="default: those with weights")
    agreeing.add_argument("--segmentation", type=Path, metavar="DIR", help="labelled slices for segmenters")
    agreeing.add_argument("--classification", type=Path, metavar="DIR", help="labelled slices for classifiers")
    agreeing.add_argument("--iou", type=float, default=SAME_BOX, help=f"of matching boxes (default: {SAME_BOX})")
    agreeing.set_defaults(run=agreement)

    scaled = commands.add_parser(
        "scaling", parents=[common, timed, written], help="cost against batch, side, proposals"
    )
    scaled.add_argument("--variant", default=DEFAULT_SEGMENTER)
    scaled.add_argument("--only", nargs=2, metavar=("WHAT", "VALUE"), help="one setting, in this process")
    scaled.set_defaults(run=scaling)

    training = commands.add_parser("train", parents=[common, timed], help="the engine against the plain loop")
    training.add_argument(
        "--variants", nargs="+", default=["maskrcnn_resnet18_t1", "maskrcnn_resnet34_t1"], help="segmenters to measure"
    )
    training.add_argument("--data", type=Path, help="CNCB folder (default: phantoms made for the run)")
    training.add_argument("--images", type=int, default=24, help="slices per round and side (default: 24)")
    training.add_argument("--losses", type=int, default=0, metavar="STEPS", help="compare losses over STEPS steps")
    training.set_defaults(run=train_speed)

    options = parser.parse_args(arguments)
    try:
        report = {"command": options.command, "machine": machine(options.device)} | options.run(options)
    except CTMaskNetError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


# ---------------------------------------------------------------------------------- machine and clock


def machine(device: str) -> dict[str, Any]:
    """What was measured on."""
    return {
        "processor": next(_processor(), platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def _processor() -> Iterator[str]:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                yield line.partition(":")[2].strip()


def synchronize(device: str) -> None:
    """Wait for the device, so that a clock read next is true."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


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


def peak_mb() -> float:
    """Most memory this process has held so far, MB; Linux's own count, as getrusage's is inherited from the parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM")


# ------------------------------------------------------------------------------------------ two sides


def weighted(name: str) -> Model:
    """The variant with its trained weights, or else with those of the golden outputs: there are no random figures."""
    if name in {entry.variant for entry in manifest()}:
        return open_model(name, device="cpu")
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import golden

    with tempfile.TemporaryDirectory() as folder:
        return open_model(golden.checkpoint(Path(folder) / f"{name}.pth", name), device="cpu").eval()


def our_side(model: Model, **options: Any) -> Predictor:
    """A `Predictor` of this model alone."""
    segments = model.variant.task == "segmentation"
    return Predictor(model if segments else None, None if segments else model, **options)


class Plain:
    """One image through the plain assembly, at the operating point of the weights or another score threshold."""

    def __init__(self, model: Model, device: str, *, score_threshold: float | None = None) -> None:
        self.device, self.network = device, model
        if model.variant.task == "segmentation":
            self.network = plain_model(model.variant.name)
            self.network.load_state_dict(model.state_dict())
            heads = self.network.roi_heads
            own = Protocol.of(model)
            heads.score_thresh, heads.nms_thresh = own.score_threshold, own.nms_threshold
            if score_threshold is not None:
                heads.score_thresh = score_threshold
        self.network.to(device).eval()

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        tensor = torch.from_numpy(image).to(self.device).float().div(255).expand(3, -1, -1)
        result = self.network([tensor])[0]
        if "masks" in result:
            result["masks"] = result["masks"][:, 0] > 0.5
        return {key: value.cpu().numpy() for key, value in result.items()}


def slices_of(data: Path | None, count: int) -> list[np.ndarray]:
    """(H, W) uint8, evenly drawn from a data set; phantoms without one."""
    if data is None:
        return [phantom(seed).image for seed in range(count)]
    dataset = open_dataset("segmentation", data)
    step = max(1, len(dataset) // count)
    return [_pixels(dataset[index]) for index in range(0, len(dataset), step)][:count]


def _pixels(sample: Any) -> np.ndarray:
    """(H, W) uint8 of a slice, or of a sample of a data set."""
    return sample if isinstance(sample, np.ndarray) else sample.image.reshape(-1, *sample.image.shape[-2:])[0].numpy()


# ------------------------------------------------------------------------------------------ agreement


def agreement(options: argparse.Namespace) -> dict[str, Any]:
    """How `Predictor` and the plain side agree on whole data sets."""
    report: dict[str, Any] = {"precision": options.precision, "variants": {}}
    for name in options.variants:
        task = get_variant(name).task
        data = getattr(options, task)
        if data is None:
            continue
        sides = both_sides(weighted(name), options.device, options.precision)
        report["variants"][name] = facts = agree(*sides, open_dataset(task, data), same_box=options.iou)
        print(f"{name}, {options.precision}: {json.dumps(facts)}", flush=True)
    return report


def both_sides(model: Model, device: str, precision: str) -> tuple[Plain, Predictor]:
    """Both report whatever scores above `LOW_SCORE`."""
    low = {"score_threshold": LOW_SCORE} if model.variant.task == "segmentation" else {}
    return Plain(model, device, **low), our_side(model, device=device, precision=precision, **low)


def agree(plain: Plain, ours: Predictor, slices: Iterable[Any], *, same_box: float = SAME_BOX) -> dict[str, Any]:
    """How what `Predictor` finds agrees with what the plain side finds.

    Args:
        plain, ours: from `both_sides`.
        slices: (H, W) uint8 arrays, or samples of a data set.
        same_box: IoU of boxes that match.

    Returns:
        Of a segmenter: the plain side's ``detections``, the share ``matched`` by one of the same label and box, the
        share of those with ``scores_alike``, the largest gap of scores; of samples also AP@0.5 of both sides at the
        operating point. Of a classifier: the share of slices of the ``same_class``, and the largest difference of a
        logit (less the mean of the slice's) as a fraction of the spread of all logits.
    """
    if ours.segmenter is None:
        return _same_classes(plain, ours, slices)
    threshold = Protocol.of(ours.segmenter).score_threshold
    matched: list[float] = []  # gap of the scores of each detection; infinite without a match
    precisions: list[tuple[float, float]] = []
    for sample in slices:
        image = _pixels(sample)
        expected, prediction = plain(image), ours(image)
        found = {key: getattr(prediction, key) for key in ("boxes", "scores", "labels", "masks")}
        iou = box_iou(torch.from_numpy(expected["boxes"]), torch.from_numpy(found["boxes"])).numpy()
        gap = np.abs(expected["scores"][:, None] - found["scores"])
        # Of several boxes that overlap so much, the one that scores nearest is the same one.
        gap[(iou < same_box) | (expected["labels"][:, None] != found["labels"])] = np.inf
        matched += gap.min(1, initial=np.inf).tolist()
        if not isinstance(sample, np.ndarray):
            precisions.append((_ap50(sample.target, expected, threshold), _ap50(sample.target, found, threshold)))
    gaps = [gap for gap in matched if np.isfinite(gap)]
    facts: dict[str, Any] = {
        "detections": len(matched),
        "matched": round(len(gaps) / len(matched), 4) if matched else None,
        "scores_alike": round(sum(gap <= SAME_SCORE for gap in gaps) / len(gaps), 4) if gaps else None,
        "largest_score_gap": round(max(gaps, default=0.0), 5),
    }
    if precisions:
        both = np.mean(precisions, axis=0).tolist()
        facts |= {"slices": len(precisions), "ap50_plain": round(both[0], 4), "ap50": round(both[1], 4)}
    return facts


def _ap50(target: dict[str, Tensor], found: dict[str, np.ndarray], threshold: float) -> float:
    """AP@0.5 of one slice by the released protocol, of what scores above `threshold`."""
    (row,) = segmentation_rows(target, found, [threshold])
    return float(row["ap"][0])


def _same_classes(plain: Plain, ours: Predictor, slices: Iterable[Any]) -> dict[str, Any]:
    expected, found = [], []
    for image in map(_pixels, slices):
        expected.append(plain(image)["logits"])
        # Logits, less the mean of the slice's.
        found.append(np.log(np.maximum(list(ours(image).class_probabilities.values()), 1e-30)))
    before, after = np.array(expected), np.array(found) * ours.classifier.temperature
    gap = np.abs(before - before.mean(1, keepdims=True) - after + after.mean(1, keepdims=True)).max()
    return {
        "slices": len(before),
        "same_class": round(float((before.argmax(1) == after.argmax(1)).mean()), 4),
        "largest_logit_gap_of_spread": round(float(gap / np.ptp(before)), 5),
    }


# --------------------------------------------------------------------------------------------- predict


def predict(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of every variant asked for; a table and a plot if a folder is given."""
    images = slices_of(options.data, options.images)
    report: dict[str, Any] = {"data": str(options.data or "phantoms"), "images": len(images), "variants": {}}
    for name in options.variants:
        facts = predict_speed(name, images, options)
        report["variants"][name] = facts
        print(f"{name}: {json.dumps(facts)}", flush=True)
    if options.out:
        for path in write_predict(report, machine(options.device), options):
            print(path)
    return report


def predict_speed(name: str, images: list[np.ndarray], options: argparse.Namespace) -> dict[str, Any]:
    model = weighted(name)
    ours = our_side(model, device=options.device, precision=options.precision)
    plain = Plain(model, options.device)
    sides: dict[str, Callable[[], Any]] = {
        "plain": lambda: [plain(image) for image in images],
        "predictor": lambda: list(ours.batch(images)),
    }
    if options.onnx and (session := onnx_session(model)):
        sides["onnx"] = lambda: [session.run(None, {"image": _three(image)}) for image in images]
    if options.device != "cpu":
        sides["network"] = _network_alone(model, images, ours)
    seconds = alternate(sides, options.rounds, options.device)
    best = {side: min(values) for side, values in seconds.items()}
    rates = {side: len(images) / value for side, value in best.items()}
    facts: dict[str, Any] = {
        "weights": "default" if name in {entry.variant for entry in manifest()} else "golden",
        "precision": options.precision,
        "images_per_s": {side: round(rate, 2) for side, rate in rates.items()},
        "ms": {side: round(1000 / rate, 1) for side, rate in rates.items()},
        "ratios": [round(a / b, 2) for a, b in zip(seconds["plain"], seconds["predictor"], strict=True)],
        "ratio": round(best["plain"] / best["predictor"], 2),
    }
    if "network" in rates:
        facts["share_of_network_rate"] = round(rates["predictor"] / rates["network"], 2)
    facts["agreement"] = agree(*both_sides(model, options.device, options.precision), images)
    if not options.no_memory and options.device == "cpu":
        facts["peak_mb"] = peak_memory(name)
    if options.profile:
        with torch.profiler.profile() as profile:
            ours(images[0])
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))
    return facts


def onnx_session(model: Model) -> Any:
    """The exported file in ONNX Runtime; None for weights whose many equal scores let no export pass its check."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = export(model, Path(folder) / "model.onnx").path
        except ExportError as error:
            print(error, file=sys.stderr)
            return None
        return onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])


def _three(image: np.ndarray) -> np.ndarray:
    """(3, H, W) float32 in 0..1."""
    return np.repeat(image[None].astype(np.float32) / 255, 3, axis=0)


def _network_alone(model: Model, images: list[np.ndarray], ours: Predictor) -> Callable[[], Any]:
    network = Inference(model, ours.precision)._network
    batch = torch.zeros(min(ours.batch_size, len(images)), 3, *images[0].shape, device=ours.device)

    @torch.inference_mode()
    def work() -> None:
        for _ in range(0, len(images), len(batch)):
            network(batch)

    return work


def peak_memory(name: str) -> float | None:
    """MB that one prediction of a 512 x 512 slice, every region above score 0, takes above the import."""
    # Loading, which holds the weights twice for a moment, is not part of it: the count starts anew after it.
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import benchmark as b; "
        "before = b.peak_mb(); model = b.weighted(sys.argv[2]); segments = model.variant.task == 'segmentation'; "
        "open('/proc/self/clear_refs', 'w').write('5'); "
        "p = b.our_side(model, device='cpu', score_threshold=0.0 if segments else None); "
        "p(b.phantom(0).image); print(b.peak_mb() - before)"
    )
    if not sys.platform.startswith("linux"):
        return None
    command = [sys.executable, "-c", script, str(Path(__file__).parent), name]
    return round(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]), 1)


def write_predict(report: dict[str, Any], where: dict[str, Any], options: argparse.Namespace) -> list[Path]:
    """The table of all variants, and speed against size."""
    rows = []
    for name, facts in report["variants"].items():
        same = facts["agreement"].get("matched", facts["agreement"].get("same_class"))
        speed = *(facts["ms"].get(side) for side in ("plain", "onnx", "predictor")), facts["ratio"]
        rows.append((name, facts["weights"], *speed, facts.get("peak_mb"), same))
    columns = (
        ("variant", "s"),
        ("weights", "s"),
        ("plain, ms", ".0f"),
        ("ONNX Runtime, ms", ".0f"),
        ("Predictor, ms", ".0f"),
        ("ratio", ".2f"),
        ("peak memory, MB", ".0f"),
        ("same", ".3f"),
    )
    notes = (
        f"{where['processor']}, {where['threads']} threads, {where['device']}, torch {where['torch']}, torchvision "
        f"{where['torchvision']}; {options.precision}. {report['images']} slices of {Path(report['data']).name} per "
        f"round, the fastest of {options.rounds} rounds.",
        "same: share of the plain assembly's detections above 0.05 found again at IoU 0.9 (segmenters), of slices with "
        "the same class (classifiers). Peak memory: one 512 x 512 prediction with every region reported, above the "
        "import.",
    )
    table = Table("Prediction speed of the variants", columns, tuple(rows), notes)
    paths = save_table(table, options.out / "tables", "benchmark-predict")
    return [*paths, _plot_predict(report, options.out / "figures" / "benchmark-predict.png")]


def _plot_predict(report: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 4.2), layout="constrained")
    markers = {"segmentation": "o", "classification": "^"}
    for name, facts in report["variants"].items():
        variant = get_variant(name)
        millions = sum(p.numel() for p in create_model(name).parameters()) / 1e6
        speed = facts["images_per_s"]
        axes.plot([millions] * 2, [speed["plain"], speed["predictor"]], color="0.75", lw=1, zorder=1)
        for side, face in (("plain", "white"), ("predictor", "#0072B2")):
            axes.plot(millions, speed[side], markers[variant.task], mfc=face, mec="#0072B2", ms=6, zorder=2)
        if variant.task == "segmentation":
            place = millions, speed["predictor"]
            axes.annotate(name.removeprefix("maskrcnn_"), place, (5, 3), textcoords="offset points", size=7)
    for label, marker, face in (
        ("segmenter, Predictor", "o", "#0072B2"),
        ("segmenter, plain", "o", "white"),
        ("classifier, Predictor", "^", "#0072B2"),
        ("classifier, plain", "^", "white"),
    ):
        axes.plot([], [], marker, mfc=face, mec="#0072B2", ls="", label=label)
    axes.set(xscale="log", xlabel="parameters, millions", ylabel="slices per second", xlim=(3, 50))
    axes.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


# --------------------------------------------------------------------------------------------- scaling


def scaling(options: argparse.Namespace) -> dict[str, Any]:
    """Slices per second and memory of each setting, in a process of its own."""
    if options.only:
        print(json.dumps(scaling_of(options, options.only[0], int(options.only[1]))))
        return {}
    rows = []
    for what, values in {"batch": BATCHES, "side": SIDES, "proposals": PROPOSALS}.items():
        for value in values:
            command = [sys.executable, __file__, "scaling", "--variant", options.variant, "--device", options.device]
            command += ["--rounds", str(options.rounds), "--only", what, str(value)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"kind": what, "value": value} | json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    if options.out:
        for path in write_scaling(options.variant, rows, machine(options.device), options.out):
            print(path)
    return {"variant": options.variant, "rows": rows}


def scaling_of(options: argparse.Namespace, what: str, value: int) -> dict[str, float]:
    """Slices per second, and MB above the import, of a single setting in this process."""
    before = peak_mb()
    settings: dict[str, Any] = {}
    if what == "side":
        settings = {"min_size": value, "max_size": max(value, 1024)}
    elif what == "proposals":
        settings = {"rpn_post_nms_top_n_test": value, "rpn_pre_nms_top_n_test": 1000}
    model = create_model(options.variant, weights="default", **settings)
    predictor = our_side(model, device=options.device, batch_size=value if what == "batch" else 1)
    images = [phantom(seed, size=value if what == "side" else 512).image for seed in range(max(BATCHES))]
    work = {"predictor": lambda: list(predictor.batch(images))}
    seconds = alternate(work, options.rounds, options.device)["predictor"]
    on_gpu = options.device.startswith("cuda")
    memory = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_mb() - before
    return {"images_per_s": round(len(images) / min(seconds), 2), "peak_mb": round(memory, 1)}


def write_scaling(name: str, rows: list[dict[str, Any]], where: dict[str, Any], out: Path) -> list[Path]:
    """The table, and a figure of each thing varied."""
    from matplotlib import pyplot as plt

    columns = (("varied", "s"), ("value", ".0f"), ("slices/s", ".1f"), ("peak memory, MB", ".0f"))
    cells = tuple((LABELS[row["kind"]], row["value"], row["images_per_s"], row["peak_mb"]) for row in rows)
    note = (
        f"{name} on phantoms; {where['processor']}, {where['threads']} threads, {where['device']}, torch "
        f"{where['torch']}. Not varied: batch 1, side 512, 1000 proposals. Peak memory above the import, each "
        "setting in a process of its own."
    )
    paths = save_table(Table("How cost grows", columns, cells, (note,)), out / "tables", "benchmark-scaling")
    for kind, label in LABELS.items():
        chosen = [row for row in rows if row["kind"] == kind]
        values = [row["value"] for row in chosen]
        figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
        for axis, key, unit in (
            (axes[0], "images_per_s", "slices per second"),
            (axes[1], "peak_mb", "peak memory above the import, MB"),
        ):
            axis.plot(values, [row[key] for row in chosen], "o-", color="#0072B2")
            axis.set(xlabel=label, ylabel=unit, xticks=values)
            axis.set_ylim(bottom=0)
        paths.append(_saved(figure, out / "figures" / f"benchmark-{kind}.png"))
    return paths


# ----------------------------------------------------------------------------------------------- train


def train_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of every variant asked for."""
    report: dict[str, Any] = {"data": str(options.data or "phantoms"), "variants": {}}
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or write_lesions(Path(folder) / "data", max(options.images, 16), lesions=4)
        for name in options.variants:
            facts = train_ratio(name, data, Path(folder), options)
            report["variants"][name] = facts
            print(f"{name}: {json.dumps(facts)}", flush=True)
    return report


def train_ratio(name: str, data: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Images per second of both sides in alternating rounds, their ratios, and optionally both losses."""
    plain_speed, our_speed = [], []
    for number in range(options.rounds):
        start = create_model(name)
        model = plain_model(name).to(options.device)
        model.load_state_dict(start.state_dict())
        plain_speed.append(plain_loop(model, data, options.images, options.device)[0])
        our_speed.append(engine(name, data, folder / f"{name}-{number}", options))
    ratios = [ours / plain for ours, plain in zip(our_speed, plain_speed, strict=True)]
    facts: dict[str, Any] = {
        "plain_images_per_s": round(max(plain_speed), 3),
        "engine_images_per_s": round(max(our_speed), 3),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "ratio": round(max(our_speed) / max(plain_speed), 2),
    }
    if options.losses:
        facts["losses"] = compare_losses(name, data, options.losses, options.device)
    return facts


def engine(name: str, data: Path, out: Path, options: argparse.Namespace) -> float:
    """Images per second of the engine with its default recipe, after a first epoch that sets up what is set up once."""
    result = train(
        TrainConfig(
            model=name,
            data=str(data),
            out=str(out),
            epochs=1 + max(1, options.images // len(list((data / "imgs").iterdir()))),
            weights_backbone=False,
            device=options.device,
            operating_point=False,
            tensorboard=False,
            progress=False,
        )
    )
    return statistics.median(row["images_per_s"] for row in result.history[1:])


class PilFolder(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Decode image and mask with PIL and find the instances, every time."""

    def __init__(self, root: Path, count: int) -> None:
        files = sorted((root / "imgs").iterdir())
        self.files = [files[i % len(files)] for i in range(count)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        file = self.files[index]
        image = np.asarray(Image.open(file).convert("RGB"))
        mask = np.asarray(Image.open(file.parents[1] / "masks" / f"{file.stem}.png"))
        return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255, instances(mask)


def plain_loop(model: nn.Module, data: Path, images: int, device: str) -> tuple[float, list[float]]:
    """The released code's loop: batch 1, float32, Adam. Images per second after the first step, and the losses."""
    loader = DataLoader(PilFolder(data, images + 1), batch_size=1, collate_fn=list)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, weight_decay=DECAY)
    model.train()
    started, losses = time.perf_counter(), []
    for step, ((image, target),) in enumerate(loader):
        if step == 1:  # the first step pays for what is set up once
            synchronize(device)
            started = time.perf_counter()
        loss = sum(model([image.to(device)], [{k: v.to(device) for k, v in target.items()}]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    synchronize(device)
    return images / (time.perf_counter() - started), losses


def compare_losses(name: str, data: Path, steps: int, device: str) -> dict[str, float]:
    """Mean loss over the last quarter of `steps` of the plain assembly and of our model as the engine sets it up."""
    torch.manual_seed(0)
    ours = create_model(name).to(device)
    plain = plain_model(name).to(device)
    plain.load_state_dict(ours.state_dict())
    speed_up(ours, TrainConfig(model=name, data=str(data), out=""), torch.device(device))
    means = []
    for model in (plain, ours):
        torch.manual_seed(1)
        losses = plain_loop(model, data, steps - 1, device)[1]
        means.append(statistics.mean(losses[-steps // 4 :]))
    return {
        "plain": round(means[0], 4),
        "ours": round(means[1], 4),
        "difference": round(abs(means[1] / means[0] - 1), 4),
    }


if __name__ == "__main__":
    sys.exit(main())
