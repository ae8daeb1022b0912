"""From a mask of class codes to the instances that a Mask R-CNN trains on.

The rules are those of the released code: pixels carry the CNCB coding, connected components (8-connected)
of a class are its instances, and small components join the background. The label is the one of the pixel
value, so a slice that holds consolidation only is labelled consolidation.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ctmasknet.errors import ConfigError, DataError, import_extra
from ctmasknet.registry import LESION_CLASSES

BACKGROUND, LUNG, GGO, CONSOLIDATION = 0, 1, 2, 3
"""CNCB coding of the mask pixels."""

LesionClasses = Literal["merge", "both", "ggo"]
"""``"merge"``: GGO and consolidation are one class, lesion; ``"both"``: two classes; ``"ggo"``: GGO only."""

_MASK_VALUES: dict[str, tuple[tuple[int, ...], ...]] = {
    "merge": ((GGO, CONSOLIDATION),),
    "both": ((GGO,), (CONSOLIDATION,)),
    "ggo": ((GGO,),),
}
"""Mask values of each detector class, label 1 first."""


def instances(
    class_mask: np.ndarray,
    *,
    classes: LesionClasses = "merge",
    min_area: int = 100,
    source: str = "class mask",
) -> dict[str, Tensor]:
    """Split a mask of class codes into instances (paper, section 3; released code).

    Args:
        class_mask: (H, W) integers in the CNCB coding: 0 background, 1 lung, 2 GGO, 3 consolidation.
        classes: ``"merge"`` joins GGO and consolidation before components are taken and labels them 1;
            ``"both"`` labels GGO 1 and consolidation 2; ``"ggo"`` labels GGO 1 and ignores consolidation.
        min_area: components of this many pixels or fewer join the background; 0 keeps all.
        source: what the mask was read from, for the error messages.

    Returns:
        ``boxes`` (N, 4) float32, xyxy in pixels, half-open (x2 and y2 are one past the last pixel);
        ``labels`` (N,) int64; ``masks`` (N, H, W) uint8 in {0, 1}. Ordered by label, then in raster order.
        A slice without lesions has N = 0.

    Raises:
        DataError: the mask is not two-dimensional or holds other values than 0 to 3.
        ConfigError: unknown `classes` or a negative `min_area`.
        MissingExtraError: scipy (extra ``train``) is not installed.
    """
    check_target_options(classes, min_area)
    check_class_mask(class_mask, source)
    ndimage = import_extra("scipy.ndimage", "train", "splitting masks into instances")

    height, width = class_mask.shape
    masks: list[np.ndarray] = [np.zeros((0, height, width), dtype=bool)]
    labels: list[int] = []
    for label, values in enumerate(_MASK_VALUES[classes], start=1):
        wanted = np.isin(class_mask, values)
        if not wanted.any():
            continue
        components, _ = ndimage.label(wanted, structure=np.ones((3, 3), dtype=bool))
        areas = np.bincount(components.ravel())
        areas[0] = 0  # the background is no component
        kept = np.flatnonzero(areas > min_area)
        masks.append(components[None] == kept[:, None, None])
        labels += [label] * len(kept)

    stacked = torch.from_numpy(np.concatenate(masks).astype(np.uint8))
    return {
        "boxes": half_open_boxes(stacked),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": stacked,
    }


def half_open_boxes(masks: Tensor) -> Tensor:
    """The tightest half-open boxes round `masks`, (N, H, W) of any dtype, none of them empty: (N, 4) float32.

    `torchvision.ops.masks_to_boxes` gives the last pixel itself, so a lesion one pixel wide has no width.
    """
    set_pixels = masks != 0
    columns, rows = set_pixels.any(dim=1).to(torch.uint8), set_pixels.any(dim=2).to(torch.uint8)
    if masks.shape[0] == 0:
        return torch.zeros((0, 4), dtype=torch.float32, device=masks.device)
    height, width = masks.shape[1:]
    return torch.stack(
        (
            columns.argmax(dim=1),
            rows.argmax(dim=1),
            width - columns.flip(1).argmax(dim=1),
            height - rows.flip(1).argmax(dim=1),
        ),
        dim=1,
    ).to(torch.float32)


def lesion_class_names(classes: LesionClasses) -> tuple[str, ...]:
    """Names of the detector's classes, background first, as the registry spells them."""
    check_target_options(classes, 0)
    if classes == "ggo":
        return LESION_CLASSES[3][:2]
    return LESION_CLASSES[2] if classes == "merge" else LESION_CLASSES[3]


def check_class_mask(class_mask: np.ndarray, source: str) -> None:
    """Raise a DataError that names `source` unless the mask is (H, W) with values 0 to 3 only."""
    if class_mask.ndim != 2:
        raise DataError(f"{source}: a mask needs the shape (H, W), got {class_mask.shape}")
    unknown = np.setdiff1d(np.unique(class_mask), (BACKGROUND, LUNG, GGO, CONSOLIDATION))
    if unknown.size:
        shown = ", ".join(str(value) for value in unknown[:5]) + (", …" if unknown.size > 5 else "")
        raise DataError(
            f"{source}: unknown mask values {shown}; recode it to 0 background, 1 lung, "
            "2 ground glass opacity (or any lesion), 3 consolidation"
        )


def check_target_options(classes: str, min_area: int) -> None:
    """Raise a ConfigError for an unknown `classes` or a negative `min_area`."""
    if classes not in get_args(LesionClasses):
        raise ConfigError(f"unknown classes {classes!r}: use one of {', '.join(get_args(LesionClasses))}")
    if min_area < 0:
        raise ConfigError(f"min_area is {min_area}: it is an area in pixels, use 0 to keep every component")
