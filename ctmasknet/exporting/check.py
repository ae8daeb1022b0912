"""Are the outputs of an exported file those of the model it was made of?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ctmasknet.data.phantom import phantom
from ctmasknet.errors import CTMaskNetError

TOLERANCES = {
    "boxes": 1e-2,  # pixels
    "labels": 0.0,
    "scores": 1e-4,
    "masks": 0.05,  # share of the foreground that differs: a rounded box may move the edge of a mask by a pixel
    "logits": 1e-4,
    "probabilities": 1e-4,
    "deltas": 1e-3,
}
_FEW_PIXELS, _VERGE = 4, 0.02
_ROWS = ("boxes", "labels", "scores", "masks", "deltas")  # one row per region


class ExportError(CTMaskNetError):
    """An exported file that does not give what the model gives."""


def check_images() -> list[Tensor]:
    """A phantom and a part of it with other sides, (3, H, W) float32 in 0..1."""
    image = torch.from_numpy(phantom(0).image).float().div(255).expand(3, -1, -1).contiguous()
    return [image, image[:, 100:412, 40:470].contiguous()]


def compare(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference of each output; infinite where the number of regions differs.

    Regions are compared with their nearest: the order of equal scores means nothing.
    """
    if len(expected["scores"]) != len(given["scores"]):
        return dict.fromkeys(expected, float("inf"))
    rows = _pairs(expected, given)
    return {
        name: _difference(name, value, given[name][rows] if name in _ROWS else given[name])
        for name, value in expected.items()
    }


def require_close(found: Mapping[str, float], tolerances: Mapping[str, float], what: str) -> None:
    """Raises:
    ExportError: a difference exceeds its tolerance, or is not a number.
    """
    far = [f"{name} by {value:.2g}" for name, value in found.items() if not value <= tolerances[name]]
    if far:
        raise ExportError(
            f"{what}: outputs differ from PyTorch's ({', '.join(far)}), so nothing was written. Weights that are "
            "untrained, or give many equal scores, can cause this; if yours are trained, report it."
        )


def _pairs(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
    """(N,) for each expected region the given one that is nearest, each once."""
    distance = (expected["boxes"][:, None] - given["boxes"]).abs().amax(-1) / TOLERANCES["boxes"]
    distance += (expected["scores"][:, None] - given["scores"]).abs() / TOLERANCES["scores"]
    distance[expected["labels"][:, None] != given["labels"]] += 1e9
    rows = torch.zeros(len(distance), dtype=torch.int64)
    for row in range(len(distance)):
        rows[row] = distance[row].argmin()
        distance[:, rows[row]] = float("inf")
    return rows


def _difference(name: str, expected: Tensor, given: Tensor) -> float:
    if expected.shape != given.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if name != "masks":
        return float((expected.double() - given.double()).abs().max())
    one, other = expected.flatten(1) > 0.5, given.flatten(1) > 0.5
    # Pixels on the verge count neither way; and of a mask of a dozen pixels, a rounded edge is a large share.
    clear = (expected.flatten(1) - 0.5).abs() > _VERGE
    different, either = ((one != other) & clear).sum(1) - _FEW_PIXELS, (one | other).sum(1)
    return float((different.clamp(min=0) / either.clamp(min=1)).max())
