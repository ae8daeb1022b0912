"""Train the weights that come with the package: a segmenter, and from it the classifier of the same body.

    python tools/train_bundled.py --data ../shared/data --out runs/bundled --backbone resnet18.pth    train both
    python tools/train_bundled.py --out runs/bundled --segmenter runs/t1/best             train the classifier alone
    python tools/train_bundled.py --out runs/bundled --bundle 2026-11                     put them into the package

`--data` holds `lesions/{train,val}` and `classes/{train,val}`. The classifier learns from both: a slice of `lesions` is
COVID-19 where its mask has a lesion and control where it has none. The patients of `lesions/train` that `--aside` names
choose the epochs and, with the last quarter of each patient's slices in `classes/train`, the classifier's temperature;
what is in `val` is looked at once, at the end, and gives the figures of the cards. The segmenter's operating point is
0.5 for score and NMS. A run that was interrupted continues with the same command.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundle_weights import main as bundle

from ctmasknet import CTMaskNetError, DataError, Predictor, evaluate, get_variant, list_models, open_dataset
from ctmasknet.data.datasets import LabelledSlices
from ctmasknet.engine import TrainConfig, train
from ctmasknet.evaluation.metrics import ClassificationMetrics
from ctmasknet.output import write_files
from ctmasknet.registry import IMAGE_CLASSES
from ctmasknet.weights.files import read_weights
from ctmasknet.weights.publish import write_weights

CONTROL, _, COVID = range(len(IMAGE_CLASSES))
UNKNOWN = "unknown"
LICENSE = "cc-by-nc-sa-4.0"
SOURCES = "public COVID-19 CT collections (MedSeg, Radiopaedia, Coronacases; Zenodo 3757476), negatives included"
CLASS_DATA = (
    "{slices} slices with a class: of the COVID-CT-MD sample, which has one patient each of control, common pneumonia "
    f"and COVID-19, and of {SOURCES}: there a slice with lesions is COVID-19 and one without is "
    "control, for what the slice shows, not for who the patient is. Classes come as often in training, and in each the "
    "patients. {aside} slices chose epoch and temperature: those of {patients}, and the last quarter of each patient "
    "of COVID-CT-MD. Validation: other patients, again one with common pneumonia. This is not the data of the paper."
)
CLASS_NOTE = (
    "Demonstration only: it has seen one patient with common pneumonia and one healthy person; its other controls are "
    "slices without lesions of people with COVID-19. It says nothing about anybody's lungs."
)
CLASS_CAVEAT = "Class probabilities: demonstration weights that have seen one patient with common pneumonia."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="maskrcnn_resnet18_t1", choices=list_models(task="segmentation"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with lesions/ and classes/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the two runs")
    parser.add_argument(
        "--aside",
        nargs="+",
        default=["coronacase07", "medseg2_vol6", "medseg2_vol7"],
        metavar="PATIENT",
        help="patients of lesions/train that choose the epoch (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=int, help="of the segmenter (default: 10 on a CPU, 80 on a GPU)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--backbone", type=Path, metavar="FILE", help="torchvision's ImageNet weights of the body")
    start.add_argument("--segmenter", type=Path, metavar="FOLDER", help="trained before: only train the classifier")
    start.add_argument("--start", type=Path, help="weights of another variant to start from: what fits is copied")
    parser.add_argument(
        "--views", type=int, default=4, help="augmented views per slice for the classifier (default: 4)"
    )
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"), help="default: float32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--bundle", metavar="TAG", help="put finished runs into the package under this tag")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    variant = get_variant(options.variant)
    runs = [options.out / str(name) for name in (variant.segmenter, variant.classifier)]
    try:
        if options.bundle:
            return bundle([*(str(run / "bundled") for run in runs), "--tag", options.bundle])
        segmenter = options.segmenter
        if segmenter is None:
            if not train(segmenter_config(options, runs[0])).finished:
                return 0
            segmenter = runs[0] / "best"
            finish(runs[0], segmenter_figures, options.data / "lesions" / "val")
        link_slices(options)
        if train(classifier_config(options, runs[1], segmenter)).finished:
            finish(runs[1], partial(classifier_figures, segmenter), options.out / "slices" / "val")
    except CTMaskNetError as error:
        print(f"train_bundled: {error}", file=sys.stderr)
        return 2
    return 0


def segmenter_config(options: argparse.Namespace, out: Path) -> TrainConfig:
    """On a GPU: long, at full size. On a CPU: what two cores do in two hours, so smaller images and few RoIs."""
    on_gpu = torch.cuda.is_available()
    sampling = {"box_batch_size_per_image": 128 if on_gpu else 64, "rpn_post_nms_top_n_train": 500 if on_gpu else 300}
    folder = options.data / "lesions" / "train"
    learnt, aside = split(folder, options.aside)
    lists = options.out / "learnt.txt", options.out / "aside.txt"
    write_files(
        {path: "".join(f"{n}\n" for n in names).encode() for path, names in zip(lists, (learnt, aside), strict=True)}
    )
    body = get_variant(options.variant).backbone.replace("resnet", "ResNet")
    return TrainConfig(
        options.variant,
        folder,
        out,
        folder,
        names=lists[0],
        val_names=lists[1],
        weights=options.start,
        partial_weights=options.start is not None,
        weights_backbone=options.backbone or False,
        epochs=options.epochs or (80 if on_gpu else 10),
        batch_size=8 if on_gpu else 4,
        lr=1e-3 if on_gpu else 4e-4,
        weight_decay=0.01 if on_gpu else 0.02,
        ema=0.998 if on_gpu else 0.997,
        precision=options.precision,
        train_min_size=None if on_gpu else 448,
        augmentation={"rotate": 15.0, "scale": [0.7, 1.4], "brightness": 0.15, "contrast": 0.3, "gamma": 0.3},
        model_options=sampling,
        validate_every=4 if on_gpu else 3,
        validation_loss=on_gpu,
        score_threshold=0.5,
        operating_point=False,  # three patients have too few lesions to search thresholds on
        dataset=(
            f"One class, lesion (ground-glass opacity and consolidation merged). Training: {len(learnt)} axial slices "
            f"of {SOURCES}; {len(aside)} slices of {len(options.aside)} other patients chose the epoch. "
            "Validation: slices of further patients. This is not the data of the paper."
        ),
        license=LICENSE,
        note=f"Body initialised from torchvision {body} IMAGENET1K_V1." if options.backbone else None,
    )


def split(folder: Path, aside: list[str]) -> tuple[list[str], list[str]]:
    """Names of the slices to learn from, and of those of the patients set aside."""
    data = open_dataset("segmentation", folder)
    missing = set(aside) - set(data.patients)
    if missing:
        known = ", ".join(sorted({patient or "unknown" for patient in data.patients}))
        raise DataError(f"{folder}: no patient {', '.join(sorted(missing))}: name some of {known} with --aside")
    learnt: list[str] = []
    chosen: list[str] = []
    for name, patient in zip(data.names, data.patients, strict=True):
        (chosen if patient in aside else learnt).append(name)
    return learnt, chosen


def link_slices(options: argparse.Namespace) -> None:
    """Folders of links to all slices with a class, in `options.out`/slices: `learnt`, `aside` to choose by, `val`.

    The links are named by the CNCB convention [Class]_[Patient]_[Scan]_[Slice].
    """
    root = options.out / "slices"
    shutil.rmtree(root, ignore_errors=True)  # of a run with other options
    for part in ("train", "val"):
        for task in ("classification", "segmentation"):
            data = open_dataset(
                task, options.data / {"classification": "classes", "segmentation": "lesions"}[task] / part
            )
            for index, (record, last) in enumerate(zip(data.records, last_quarter(data), strict=True)):
                labels, patient = data.labels_of(index), record.patient
                label = labels[0] if task == "classification" else COVID if labels else CONTROL
                aside = last if task == "classification" else patient in options.aside
                words = (str(label), patient or UNKNOWN, task, record.image.stem)
                name = "_".join(re.sub(r"[\W_]+", "-", word) for word in words) + record.image.suffix
                link = root / ("val" if part == "val" else "aside" if aside else "learnt") / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(record.image.resolve())


def last_quarter(data: LabelledSlices) -> list[bool]:
    """Whether each slice is of the last quarter of its patient's, in the order of their names."""
    counts, seen = Counter(data.patients), Counter[str | None]()
    last = []
    for patient in data.patients:  # the names are sorted
        seen[patient] += 1
        last.append(seen[patient] > counts[patient] - counts[patient] // 4)
    return last


def classifier_config(options: argparse.Namespace, out: Path, segmenter: Path) -> TrainConfig:
    """Module S alone: so few people cannot teach the body anything."""
    slices = options.out / "slices"
    learnt, aside = (open_dataset("classification", slices / part) for part in ("learnt", "aside"))
    return TrainConfig(
        get_variant(options.variant).classifier or "",
        slices / "learnt",
        out,
        slices / "aside",
        weights=segmenter,
        cache_rois=True,
        roi_views=options.views,
        balance=True,
        epochs=20,
        lr=5e-4,
        weight_decay=10.0,  # far above the recipe's: chosen on the slices set aside
        dataset=CLASS_DATA.format(slices=len(learnt), aside=len(aside), patients=", ".join(options.aside)),
        license=LICENSE,
        note=CLASS_NOTE,
        caveat=CLASS_CAVEAT,
    )


def finish(run: Path, measure: Callable[[Path, Path], dict[str, float | None]], data: Path) -> None:
    """Write RUN/bundled: the best weights in half the bytes, with figures measured on `data`, which chose nothing."""
    stored, folder = read_weights(run / "best"), run / "bundled"
    figures: dict[str, float] = {}
    for measured in (False, True):
        metadata = stored.metadata | ({"metrics": figures} if measured else {})
        facts = {"variant": str(stored.variant), "config": stored.config, "metadata": metadata}
        write_weights(folder, stored.tensors, **facts, dtype="float16")
        if not measured:
            figures = {key: round(value, 4) for key, value in measure(folder, data).items() if value is not None}
    print(f"{folder}: {figures}")


def segmenter_figures(weights: Path, data: Path) -> dict[str, float | None]:
    """What the card of a segmenter states."""
    found = evaluate(weights, data, samples=0).metrics
    figures = found["operating_point"] | {f"coco_{key}": value for key, value in found["coco"].items()}
    figures.pop("images", None)
    return figures


def classifier_figures(segmenter: Path, weights: Path, data: Path) -> dict[str, float | None]:
    """What the card of a classifier states, by slice and by patient; and whether plain lesion area does as well.

    A patient is of the highest class of the slices, with the mean of their probabilities.
    """
    predictor, slices = Predictor(segmenter, weights), open_dataset("classification", data)
    rows: list[dict[str, Any]] = []
    for record in slices.records:
        found = predictor(record.image)
        probabilities = list((found.class_probabilities or {}).values())
        row = {"image_id": record.name, "label": slices.labels_of(len(rows))[0], "probabilities": probabilities}
        rows.append(row | {"patient": record.patient, "area": found.lesion_fraction})
    patients = [[row for row in rows if row["patient"] == patient] for patient in sorted({r["patient"] for r in rows})]
    by_patient = [
        {
            "image_id": own[0]["patient"],
            "label": max(row["label"] for row in own),
            "probabilities": np.mean([row["probabilities"] for row in own], axis=0).tolist(),
        }
        for own in patients
    ]
    # COVID-19 against control: what module S says between the two, and the part of the slice that is lesion.
    two = [row for row in rows if row["label"] in (CONTROL, COVID)]
    shares = [
        row["probabilities"][COVID] / (row["probabilities"][CONTROL] + row["probabilities"][COVID]) for row in two
    ]
    figures = classified(rows) | {f"patient_{key}": value for key, value in classified(by_patient).items()}
    for name, scores in (("module_s", shares), ("lesion_area", [row["area"] for row in two])):
        compared = [
            {"image_id": row["image_id"], "label": int(row["label"] == COVID), "probabilities": [1 - score, score]}
            for row, score in zip(two, scores, strict=True)
        ]
        names = (IMAGE_CLASSES[CONTROL], IMAGE_CLASSES[COVID])
        figures[f"auc_covid_against_control_{name}"] = ClassificationMetrics(names, compared).compute()["auc"]["covid"]
    return figures


def classified(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Accuracy, calibration, and per class sensitivity and AUC."""
    found = ClassificationMetrics(IMAGE_CLASSES, rows).compute()
    figures: dict[str, float | None] = {key: found[key] for key in ("accuracy", "brier", "ece")}
    for key in ("sensitivity", "auc"):
        figures |= {f"{key}_{name}": value for name, value in found[key].items()}
    return figures


if __name__ == "__main__":
    sys.exit(main())
