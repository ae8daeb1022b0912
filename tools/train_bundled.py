"""Train the weights that come with the package: a segmenter, and from it the classifier of the same body.

    python tools/train_bundled.py --data ../shared/data --out runs/bundled --backbone resnet18.pth    train both
    python tools/train_bundled.py --out runs/bundled --bundle 2026-11                     put them into the package

`--data` holds `lesions/{train,val}` and `classes/{train,val}`. The slices of the training patients that `--aside` names
choose epoch and thresholds; what is in `val` is looked at once, at the end, and gives the figures of the card. The
classifier's training data are one patient per class, so nothing can be set aside there and nothing is chosen: its last
epoch counts. A run that was interrupted continues with the same command.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bundle_weights import main as bundle

from ctmasknet import CTMaskNetError, DataError, evaluate, get_variant, list_models
from ctmasknet.data.datasets import open_dataset
from ctmasknet.engine import TrainConfig, TrainResult, train
from ctmasknet.output import write_files
from ctmasknet.weights.files import read_weights
from ctmasknet.weights.publish import write_pretrained

LICENSE = "cc-by-nc-sa-4.0"
SOURCES = "public COVID-19 CT collections (MedSeg, Radiopaedia, Coronacases; Zenodo 3757476), negatives included"
CLASS_DATA = (
    "One patient per class for training and one other per class for validation, slices of the COVID-CT-MD sample. This "
    "is not the data of the paper."
)
CLASS_NOTE = (
    "Demonstration only: it has seen one patient per class. It shows how the classifier works and says nothing about "
    "anybody's lungs."
)
CLASS_CAVEAT = "Class probabilities: demonstration weights that have seen one patient per class."


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
        help="patients of lesions/train that choose epoch and thresholds (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=int, help="of the segmenter (default: 10 on a CPU, 80 on a GPU)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--backbone", type=Path, metavar="FILE", help="torchvision's ImageNet weights of the body")
    start.add_argument("--start", type=Path, help="weights of another variant to start from: what fits is copied")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"), help="default: float32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--bundle", metavar="TAG", help="put finished runs into the package under this tag")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    variant = get_variant(options.variant)
    runs = [options.out / name for name in (variant.segmenter, variant.classifier)]
    try:
        if options.bundle:
            return bundle([*(str(run / "bundled") for run in runs), "--tag", options.bundle])
        segmenter = train(segmenter_config(options, runs[0]))
        classifier = train(classifier_config(options, runs[1], segmenter)) if segmenter.finished else None
        if classifier is not None and classifier.finished:
            for run, data in zip(runs, ("lesions", "classes"), strict=True):
                print(f"{run / 'bundled'}: {finish(run, options.data / data / 'val')}")
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
        dataset=(
            f"One class, lesion (ground-glass opacity and consolidation merged). Training: {len(learnt)} axial slices "
            f"of {SOURCES}; {len(aside)} slices of {len(options.aside)} other patients chose epoch and thresholds. "
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


def classifier_config(options: argparse.Namespace, out: Path, segmenter: TrainResult) -> TrainConfig:
    """Module S alone: three people cannot teach the body anything."""
    return TrainConfig(
        get_variant(options.variant).classifier,
        options.data / "classes" / "train",
        out,
        weights=segmenter.best,
        cache_rois=True,
        roi_views=4,
        epochs=12,
        lr=2e-4,
        weight_decay=0.1,
        dataset=CLASS_DATA,
        license=LICENSE,
        note=CLASS_NOTE,
        caveat=CLASS_CAVEAT,
    )


def finish(run: Path, data: Path) -> dict[str, float]:
    """Write RUN/bundled: the best weights in half the bytes, with figures measured on `data`, which chose nothing."""
    stored = read_weights(run / "best")
    if stored.variant is None:
        raise CTMaskNetError(f"{run / 'best'}: its config.json names no variant")

    def write(metadata: Mapping[str, Any]) -> Path:
        variant = get_variant(str(stored.variant))
        return write_pretrained(
            run / "bundled", stored.tensors, variant=variant, config=stored.config, metadata=metadata, dtype="float16"
        )

    found = evaluate(write(stored.metadata), data, samples=0).metrics
    if "slice" in found:
        figures = {"accuracy": found["slice"]["accuracy"]}
        for key in ("sensitivity", "auc"):
            figures |= {f"{key}_{name}": value for name, value in found["slice"][key].items()}
    else:
        figures = found["operating_point"] | {f"coco_{key}": value for key, value in found["coco"].items()}
        figures.pop("images", None)
    rounded = {key: round(value, 4) for key, value in figures.items() if value is not None}
    write({**stored.metadata, "metrics": rounded})
    return rounded


if __name__ == "__main__":
    sys.exit(main())
