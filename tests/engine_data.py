"""Small training data made of phantoms, and settings that keep training on it short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phantom import phantom
from PIL import Image

from ctmasknet.engine import TrainConfig

SMALL = {
    "min_size": 128,
    "rpn_pre_nms_top_n_train": 100,
    "rpn_post_nms_top_n_train": 50,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_test": 30,
    "box_batch_size_per_image": 16,
}


def lesion_folder(root: Path, seeds: range) -> Path:
    """A CNCB folder of 128 px phantoms; every fourth is without lesions."""
    for name in ("imgs", "masks"):
        (root / name).mkdir(parents=True)
    for seed in seeds:
        drawn = phantom(seed, lesions=seed % 4, size=128)
        Image.fromarray(drawn.image).save(root / "imgs" / f"slice{seed}.png")
        Image.fromarray(drawn.class_mask()).save(root / "masks" / f"slice{seed}.png")
    return root


def class_folder(root: Path, patient: int, per_class: int = 2) -> Path:
    """CNCB-named phantoms of three classes with 0, 2 and 4 lesions."""
    root.mkdir(parents=True)
    for image_class in range(3):
        for number in range(per_class):
            drawn = phantom(100 * patient + 10 * image_class + number, lesions=2 * image_class, size=128)
            Image.fromarray(drawn.image).save(root / f"{image_class}_p{patient}_1_{number}.png")
    return root


def segmenter_config(data: Path | list[Path], out: Path, **changes: Any) -> TrainConfig:
    """A short run of the smallest segmenter."""
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 2, "validation_loss": False, "operating_point": False}
    settings |= {"min_area": 5, "tensorboard": False, "progress": False, "device": "cpu", "model_options": SMALL}
    settings["weights_backbone"] = False
    return TrainConfig("maskrcnn_resnet18_t2", data, out, **(settings | changes))


def classifier_config(data: Path | list[Path], out: Path, **changes: Any) -> TrainConfig:
    """A short run of the smallest classifier's module S on cached RoI batches."""
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 2, "roi_views": 1, "cache_rois": True}
    settings |= {"tensorboard": False, "progress": False, "device": "cpu", "model_options": SMALL}
    return TrainConfig("ctmasknet_resnet18_t2", data, out, **(settings | changes))
