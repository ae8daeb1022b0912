"""Train the weights that come with the package: a segmenter, and from it the classifier of the same body.

python tools/train_bundled.py --data ../shared/data --out runs/bundled            train both
python tools/train_bundled.py --out runs/bundled --bundle 2026-11                 put them into the package

`--data` holds `lesions/{train,val}` and `classes/{train,val}`. A run that was interrupted continues with the same
command.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
from bundle_weights import main as bundle

from ctmasknet import CTMaskNetError, get_variant, list_models
from ctmasknet.engine import TrainConfig, TrainResult, train
from ctmasknet.weights.files import read_weights
from ctmasknet.weights.publish import write_pretrained

LICENSE = "cc-by-nc-sa-4.0"
LESION_DATA = (
    "One class, lesion (ground-glass opacity and consolidation merged). Training: 636 axial slices of public COVID-19 "
    "CT collections (MedSeg, Radiopaedia, Coronacases; Zenodo 3757476), negatives included. Validation: 73 slices of "
    "other patients. This is not the data of the paper."
)
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
    parser.add_argument("--epochs", type=int, help="of the segmenter (default: 8 on a CPU, 80 on a GPU)")
    parser.add_argument("--start", type=Path, help="weights of another variant to start from: what fits is copied")
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
            return bundle([*(str(in_half_precision(run)) for run in runs), "--tag", options.bundle])
        segmenter = train(segmenter_config(options, runs[0]))
        if segmenter.finished:
            train(classifier_config(options, runs[1], segmenter))
    except CTMaskNetError as error:
        print(f"train_bundled: {error}", file=sys.stderr)
        return 2
    return 0


def segmenter_config(options: argparse.Namespace, out: Path) -> TrainConfig:
    """On a GPU: long, at full size. On a CPU: what two cores do in two hours, so smaller images and few RoIs."""
    on_gpu = torch.cuda.is_available()
    sampling = {"box_batch_size_per_image": 128 if on_gpu else 64, "rpn_post_nms_top_n_train": 500 if on_gpu else 300}
    return TrainConfig(
        options.variant,
        options.data / "lesions" / "train",
        out,
        options.data / "lesions" / "val",
        weights=options.start,
        partial_weights=options.start is not None,
        epochs=options.epochs or (80 if on_gpu else 8),
        batch_size=8 if on_gpu else 4,
        lr=1e-3 if on_gpu else 4e-4,
        weight_decay=0.01 if on_gpu else 0.02,
        ema=0.998 if on_gpu else 0.997,
        train_min_size=None if on_gpu else 448,
        augmentation={"rotate": 15.0, "scale": [0.7, 1.4]} if on_gpu else {"rotate": 10.0},
        model_options=sampling,
        validate_every=4 if on_gpu else 2,
        validation_loss=on_gpu,
        dataset=LESION_DATA,
        license=LICENSE,
    )


def classifier_config(options: argparse.Namespace, out: Path, segmenter: TrainResult) -> TrainConfig:
    """Module S alone: three people cannot teach the body anything."""
    return TrainConfig(
        get_variant(options.variant).classifier,
        options.data / "classes" / "train",
        out,
        options.data / "classes" / "val",
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


def in_half_precision(run: Path) -> Path:
    """A copy of a run's best weights in half the bytes, for the package; they are read back as float32."""
    stored = read_weights(run / "best")
    if stored.variant is None:
        raise CTMaskNetError(f"{run / 'best'}: its config.json names no variant")
    variant, metadata = get_variant(stored.variant), stored.metadata
    return write_pretrained(
        run / "bundled", stored.tensors, variant=variant, config=stored.config, metadata=metadata, dtype="float16"
    )


if __name__ == "__main__":
    sys.exit(main())
