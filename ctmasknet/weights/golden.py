"""Golden files: an input and the outputs that weights gave when they were saved, to check them after a journey.

`golden.safetensors` holds `image` (H, W) uint8, a phantom (no patient's data), and what the model made of it on the CPU
in float32. A segmenter: the best `RECORDED` detections without a score threshold, NMS at 0.5, as boxes (N, 4), scores
(N,), labels (N,) and mask areas (N,) in pixels. A classifier: logits and probabilities (K,), and boxes, scores and
labels of the best `RECORDED` RoIs of its batch.

Rounding differs between processors and versions of torch, and may exchange detections of nearly the same score, so a
recorded detection counts as found again if any detection lies within the tolerances below. Wrong weights miss by more.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctmasknet.errors import WeightsError
from ctmasknet.models import Model
from ctmasknet.weights.files import GOLDEN_NAME, replace_file

RECORDED = 16
BOX_TOLERANCE = 0.5  # pixels
SCORE_TOLERANCE = 0.01  # scores and probabilities
LOGIT_TOLERANCE = 0.01, 0.05  # fraction of the logit, plus so much
AREA_TOLERANCE = 0.05, 8.0  # fraction of the area, plus pixels
_PHANTOM_SIZE = 256  # pixels
_NMS_THRESHOLD = 0.5


def write_golden(model: Model, folder: Path) -> Path:
    """Write `golden.safetensors` for the weights `model` holds; the model is left as it is.

    Raises:
        WeightsError: the folder cannot be written.
    """
    # Here, not above: weights know nothing of data, but for this picture.
    from ctmasknet.data.phantom import phantom

    image = torch.from_numpy(phantom(0, size=_PHANTOM_SIZE).image)
    recorded = {key: t[:RECORDED].contiguous() for key, t in _outputs(model, image, RECORDED).items()}
    path = folder / GOLDEN_NAME
    try:
        replace_file(path, lambda temporary: save_file({"image": image, **recorded}, temporary))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: cannot be written ({error}). Choose another folder.") from None
    return path


def check_golden(model: Model, path: Path) -> None:
    """Compare what the model makes of a golden file's input with the outputs recorded there.

    Args:
        model: as configured when it was saved.

    Raises:
        WeightsError: no such file, unreadable, or outputs that differ by more than the tolerances.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file, so the weights cannot be verified: load them without verify=True")
    try:
        recorded = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error}). Download or copy it again.") from None
    image = recorded.pop("image", None)
    if image is None or image.dim() != 2 or image.dtype != torch.uint8:
        raise WeightsError(f"{path}: holds no (H, W) uint8 image: not a golden file of this library")
    found = _outputs(model, image, 2 * RECORDED)
    if set(found) != set(recorded):
        raise WeightsError(f"{path}: holds {', '.join(sorted(recorded))}, not {', '.join(sorted(found))}")
    per_region = [key for key in recorded if key not in ("logits", "probabilities")]
    if any(recorded[key].shape != (len(recorded["scores"]), *found[key].shape[1:]) for key in per_region):
        raise WeightsError(f"{path}: the shapes in it contradict each other: not a golden file of this library")
    difference = _difference(recorded, found)
    if difference is not None:
        raise WeightsError(
            f"{path}: the model does not reproduce its recorded outputs: {difference}. The weights or this "
            "installation are damaged: ctmasknet doctor, then download them again"
        )


def _outputs(model: Model, image: Tensor, count: int) -> dict[str, Tensor]:
    """What is recorded, of a copy of the model on the CPU."""
    model = deepcopy(model).cpu().float().eval()
    model.backbone.autocast_dtype = None
    if model.variant.task == "segmentation":
        heads = model.roi_heads
        heads.score_thresh, heads.nms_thresh, heads.detections_per_img = 0.0, _NMS_THRESHOLD, count
    with torch.inference_mode():
        result = model([(image.float() / 255).expand(3, -1, -1)])[0]
    if model.variant.task == "segmentation":
        areas = (result["masks"] > 0.5).flatten(1).sum(1).float()
        return {key: result[key].clone() for key in ("boxes", "scores", "labels")} | {"areas": areas.clone()}
    return {key: result[key][:count].clone() for key in ("logits", "probabilities", "boxes", "scores", "labels")}


def _difference(recorded: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    for key, (fraction, rest) in (("logits", LOGIT_TOLERANCE), ("probabilities", (0.0, SCORE_TOLERANCE))):
        if key in recorded:
            if recorded[key].shape != found[key].shape:
                return f"{len(found[key])} {key} instead of {len(recorded[key])}"
            gap = (recorded[key] - found[key]).abs()
            if not (gap <= fraction * recorded[key].abs() + rest).all():
                return f"{key} differ by up to {gap.max().item():.3g}"
    for row in range(len(recorded["scores"])):
        box, score = recorded["boxes"][row], recorded["scores"][row]
        same = (found["boxes"] - box).abs().amax(1) <= BOX_TOLERANCE
        same &= (found["scores"] - score).abs() <= SCORE_TOLERANCE
        same &= found["labels"] == recorded["labels"][row]
        if "areas" in recorded:
            area = recorded["areas"][row]
            same &= (found["areas"] - area).abs() <= AREA_TOLERANCE[0] * area + AREA_TOLERANCE[1]
        if not same.any():
            corners = ", ".join(f"{value:.1f}" for value in box.tolist())
            return f"the region [{corners}] with score {score.item():.3f} is not found again"
    return None
