"""Lesions of a scan in three dimensions, and how much of each lung they take up (scipy, extra ``io``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ctmasknet.data.lungs import SIDES
from ctmasknet.errors import import_extra

Ids = npt.NDArray[np.unsignedinteger[Any]]


class Detection(NamedTuple):
    """What the detector marked: the slice by its place in the stack, indices into its flattened pixels, the score."""

    place: int
    pixels: npt.NDArray[np.intp]
    score: float


@dataclass(frozen=True)
class ScanLesion:
    """A lesion of a scan: marked pixels that touch within a slice, from slice to slice, or across one empty slice.

    Attributes:
        id: its number in `VolumePrediction.lesion_ids`; 1 is the largest in the lungs, those outside come last.
        side: ``"right"`` or ``"left"``, the lung that holds most of it; ``"outside"`` the lungs; None if they are
            unknown.
        ml: volume.
        ml_by_class: the same by class of lesion.
        diameter_mm: the largest distance between two points of it.
        first_slice, last_slice: indices along the axial axis of the scan's grid.
        mean_hu: mean attenuation within the lung window, so at most 150; None if the values are not HU.
        score: of the best detection in it, 0..1.
    """

    id: int
    side: str | None
    ml: float
    ml_by_class: Mapping[str, float]
    diameter_mm: float
    first_slice: int
    last_slice: int
    mean_hu: float | None
    score: float


def join_slices(mask: npt.NDArray[np.bool_]) -> Ids:
    """(S, H, W): marked pixels -> a number per lesion, 0 elsewhere.

    Pixels of a lesion touch, corners included; across one slice that has none they must lie over each other.
    """
    ndimage = import_extra("scipy.ndimage", "io", "joining lesions")
    box = _bounds(mask)
    mask_there = mask[box]
    bridged = mask_there.copy()
    bridged[1:-1] |= mask_there[:-2] & mask_there[2:]
    parts, count = ndimage.label(bridged, np.ones((3, 3, 3), bool))
    ids = np.zeros(mask.shape, np.min_scalar_type(count))
    ids[box] = parts * mask_there
    return ids


def _bounds(mask: npt.NDArray[Any]) -> tuple[slice, ...]:
    """The part of an array that holds all that is not 0."""
    used = (np.flatnonzero(mask.any(tuple({0, 1, 2} - {axis}))) for axis in range(3))
    return tuple(slice(places[0], places[-1] + 1) if len(places) else slice(0) for places in used)


def measure(
    mask: npt.NDArray[np.uint8],
    ids: Ids,
    lungs: npt.NDArray[np.uint8] | None,
    image: npt.NDArray[np.uint8],
    detections: Sequence[Detection],
    class_names: Sequence[str],
    axes: npt.NDArray[np.float64],
    hu: tuple[float, float] | None,
) -> tuple[ScanLesion, ...]:
    """What there is to say of each lesion, the largest in the lungs first; `ids` are renumbered in place.

    Args:
        mask, ids, lungs, image: (S, H, W): class, number, lung (see `find_lungs`) and grey value of each pixel.
        detections: what was marked.
        class_names: index = class, background first.
        axes: (3, 3), the steps from slice to slice, row to row and column to column in mm, as columns.
        hu: what grey values 0 and 255 stand for; None if they are not HU.
    """
    ndimage = import_extra("scipy.ndimage", "io", "measuring lesions")
    if not ids.any():
        return ()
    box, whole = _bounds(ids), ids
    mask, ids, image = mask[box], ids[box], image[box]
    count = int(ids.max())
    marked = ids > 0
    numbers, sides = ids[marked], 0 if lungs is None else lungs[box][marked]
    table = np.bincount(numbers * np.intp(len(SIDES)) + sides, minlength=len(SIDES) * (count + 1))
    in_side = table.reshape(-1, len(SIDES))
    size, side = in_side.sum(1), in_side.argmax(1)
    order = np.lexsort((-size, (side == 0) & (lungs is not None), np.arange(count + 1) > 0))
    renumber = np.empty(count + 1, ids.dtype)
    renumber[order] = np.arange(count + 1)
    ids[marked] = renumber[numbers]
    scores = np.zeros(count + 1)
    for place, pixels, score in detections:
        touched = whole[place].ravel()[pixels]
        scores[touched] = np.maximum(scores[touched], score)
    voxel_ml = abs(float(np.linalg.det(axes))) / 1000
    found = []
    for number, where in enumerate(ndimage.find_objects(ids), start=1):
        inside = ids[where] == number
        classes = np.bincount(mask[where][inside], minlength=len(class_names)) * voxel_ml
        grey = float(image[where][inside].mean())
        found.append(
            ScanLesion(
                id=number,
                side=None if lungs is None else SIDES[side[order[number]]],
                ml=float(classes.sum()),
                ml_by_class={name: float(ml) for name, ml in zip(class_names[1:], classes[1:], strict=True)},
                diameter_mm=_diameter(inside, axes),
                first_slice=int(box[0].start + where[0].start),
                last_slice=int(box[0].start + where[0].stop - 1),
                mean_hu=None if hu is None else hu[0] + grey * (hu[1] - hu[0]) / 255,
                score=float(scores[number]),
            )
        )
    return tuple(found)


def _diameter(inside: npt.NDArray[np.bool_], axes: npt.NDArray[np.float64]) -> float:
    """The largest distance in mm between two points of a lesion; in a slice its pixels count from edge to edge."""
    spatial = import_extra("scipy.spatial", "io", "measuring lesions")
    # The ends of its rows hold every corner of the convex hull.
    rows = inside.reshape(-1, inside.shape[2])
    used = np.flatnonzero(rows.any(1))
    place, row = np.divmod(used, inside.shape[1])
    ends = rows[used].argmax(1), inside.shape[2] - rows[used, ::-1].argmax(1)
    points = np.concatenate([np.stack([place, row + down, end], 1) for down in (0, 1) for end in ends])
    corners = points if inside.shape[0] > 1 else points[:, 1:]
    hull = points[spatial.ConvexHull(corners).vertices] @ axes.T
    return float(spatial.distance.pdist(hull).max())


def count_voxels(mask: npt.NDArray[np.uint8], lungs: npt.NDArray[np.uint8], classes: int) -> npt.NDArray[np.intp]:
    """(S, 3, classes): how many pixels of each slice lie in each lung (see `find_lungs`) and class, 0 for no lesion."""
    size = len(SIDES) * classes
    counts = [np.bincount((s * classes + m).ravel(), minlength=size) for s, m in zip(lungs, mask, strict=True)]
    return np.stack(counts).reshape(-1, len(SIDES), classes)


def involvement(
    counts: npt.NDArray[np.intp], size: float, class_names: Sequence[str], unit: str = "ml"
) -> dict[str, float | None]:
    """Sizes of the lungs and of the lesions in them, and what share these take, in percent.

    Args:
        counts: (3, classes), see `count_voxels`.
        size: of a voxel or pixel, in `unit`.
        class_names: index = class, background first.

    Returns:
        For ``right``, ``left`` and ``both``: ``<side>_lung_ml``, ``<side>_lesion_ml``, ``<side>_lesion_percent``
        (None without lung), of several classes also ``<side>_<class>_ml`` and ``_percent``; ``outside_lesion_ml``.
    """
    facts: dict[str, float | None] = {}
    for side, of_class in zip((*SIDES, "both"), (*counts, counts[1:].sum(0)), strict=True):
        sizes = of_class * size
        parts = {"lesion": sizes[1:].sum().item()}
        if len(class_names) > 2:
            parts |= dict(zip(class_names[1:], sizes[1:].tolist(), strict=True))
        if side == SIDES[0]:
            facts[f"{side}_lesion_{unit}"] = parts["lesion"]
            continue
        facts[f"{side}_lung_{unit}"] = lung = sizes.sum().item()
        for part, value in parts.items():
            facts[f"{side}_{part}_{unit}"] = value
            facts[f"{side}_{part}_percent"] = 100 * value / lung if lung else None
    return facts
