"""What an exported file says of itself."""

from __future__ import annotations

import json
from typing import Any

import torch
import torchvision

from ctmasknet import __version__
from ctmasknet.data.slices import LUNG_WINDOW
from ctmasknet.models import Model
from ctmasknet.predictor import class_names
from ctmasknet.registry import DISCLAIMER, LESION_CLASSES
from ctmasknet.weights.files import state_digest


def describe(model: Model, format: str) -> dict[str, str]:
    """Key -> text, JSON where a value has parts; of a model as it is exported."""
    heads, config = model.roi_heads, model.config
    facts: dict[str, Any] = {
        "library": "ctmasknet",
        "variant": model.variant.name,
        "task": model.variant.task,
        "classes": list(class_names(model)),
        "preprocessing": _preprocessing(model, format),
        "thresholds": {
            "score": heads.score_thresh,
            "nms": heads.nms_thresh,
            "rpn_nms": model.rpn.nms_thresh,
            "detections": heads.detections_per_img,
            "roi_score": heads.roi_score,
        },
        "weights_sha256": state_digest(model.state_dict()),
        "versions": {"ctmasknet": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__},
        "notice": DISCLAIMER,
    }
    if model.variant.task == "segmentation":
        facts["mask_score"] = heads.mask_score
        facts["mask_threshold"] = 0.5
    else:
        facts["lesion_classes"] = list(LESION_CLASSES.get(config.num_classes, ()))
    facts |= {key: model.metadata[key] for key in ("license", "caveat") if key in model.metadata}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def _preprocessing(model: Model, format: str) -> dict[str, Any]:
    config = model.config
    steps = {
        "mean": list(config.image_mean),
        "std": list(config.image_std),
        "min_size": config.min_size,
        "max_size": config.max_size,
        "pad_to_multiple_of": 32,
    }
    source = {"channels": "grey, three times", "range": [0, 1], "window_hu": list(LUNG_WINDOW)}
    return source | {"in_the_file" if format == "onnx" else "before_the_file": steps}
