"""The lungs in CT slices, found by thresholds and shapes: no model, nothing to download (scipy, extra ``io``).

Air inside the body that is neither airway nor gas of the bowel, each lung closed over its vessels and hollows, the two
told apart. Shapes are worked out on pixels of about 2 mm, the edge is that of the slice itself. Consolidated lung
has no air: it counts where lesions are given that lie where a lung should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ctmasknet.data.slices import LUNG_WINDOW
from ctmasknet.errors import import_extra

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Pixel = tuple[float, float]  # mm between rows, between columns

RIGHT, LEFT = 1, 2
SIDES = ("outside", "right", "left")  # by the numbers of a lung mask

WORKING_PIXEL = 2.0  # mm
TISSUE_ABOVE = -300.0  # HU
AIR_BELOW = -400.0  # HU; half-way between lung and soft tissue
GAS_BELOW = -920.0  # HU; airways, bowel, and the air round the patient
PADDING_BELOW = -1300.0  # HU; outside the circle of the scanner
LUNG_MEDIAN = (-945.0, -550.0)  # HU; of the air of a lung
AIRWAY_AREA = (25.0, 1200.0)  # mm2; a bronchus outside the lung, the widest windpipe and its fork
WALL, AIRWAY_WALL = 2.5, -500.0  # mm, of an airway, and HU beyond it
VESSELS = 8.0  # mm; hollows of this radius are closed
PLEURA = 25.0  # mm; how far from air a lesion still lies in the lung
GAP = (15.0, 40.0)  # mm; half of what lies free between patient and table, and where it goes from side to side
LEAST_PIECE, LEAST_SHARE = 40.0, 0.02  # mm2; of the largest piece's voxels
LEAST_AREA = 2500.0  # mm2; a scan with less lung in its best slice shows none
FIELD = 360.0  # mm; across a slice whose spacing is unknown


def find_lungs(
    image: npt.NDArray[np.uint8],
    spacing: Sequence[float],
    lesions: npt.NDArray[np.unsignedinteger] | None = None,
) -> npt.NDArray[np.uint8]:
    """The lungs of a scan or of a slice, airways left out.

    Args:
        image: (S, H, W), slices one after the other in the lung window: ``np.rint(255 * window(hu))`` of
            `ctmasknet.data.slices`; rows run to the back and columns to the patient's left. Black where there is none.
        spacing: mm between slices, rows, columns.
        lesions: (S, H, W), a number per lesion, 0 elsewhere. One that lies for the most part within 25 mm of the air
            of a lung and not between the two, or where the other lung mirrored has it, belongs to that lung; others are
            cut out of the lungs.

    Returns:
        (S, H, W), 0 outside, 1 right lung, 2 left lung; all 0 if no slice shows 25 cm2 of lung.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    ndimage = import_extra("scipy.ndimage", "io", "finding the lungs")
    factors = [max(1, round(min(WORKING_PIXEL / mm, n))) for mm, n in zip(spacing[1:], image.shape[1:], strict=True)]
    pixel = (spacing[1] * factors[0], spacing[2] * factors[1])
    hu = np.stack([_reduced(plane, factors) for plane in image])
    air = np.stack([_air_in_body(plane, pixel, ndimage) for plane in hu])
    pieces = _lung_pieces(hu, air, pixel, ndimage)
    lungs = np.zeros(image.shape, np.uint8)
    if pieces.sum((1, 2)).max() * pixel[0] * pixel[1] < LEAST_AREA:
        return lungs
    places = np.flatnonzero(pieces.any((1, 2)))
    middle = _middle(hu[places])
    sides = _sides(pieces, middle, pixel, ndimage)
    limit = (AIR_BELOW - LUNG_WINDOW[0]) * 255 / (LUNG_WINDOW[1] - LUNG_WINDOW[0])
    for place in places:
        for side in (LEFT, RIGHT):
            sides[place][_closed(sides[place] == side, pixel, ndimage)] = side
        mask = sides[place] > 0
        edge = mask & ~ndimage.binary_erosion(mask)
        dense = edge & ~ndimage.binary_dilation(pieces[place])
        sure = _enlarged((mask & ~edge) | dense, factors)
        widened = _enlarged(ndimage.maximum_filter(sides[place], 3), factors)
        whole = tuple(map(slice, sure.shape))  # but for what fills no pixel of the working grid
        lungs[place][whole] = widened * (sure | (image[place][whole] < limit))
    if lesions is not None and lesions.any():
        _add_lesions(lungs, lesions, sides, middle, pixel, factors, ndimage)
    return lungs


def _reduced(plane: npt.NDArray[np.uint8], factors: list[int]) -> Floats:
    """HU, averaged over blocks of pixels."""
    rows, columns = (length // factor for length, factor in zip(plane.shape, factors, strict=True))
    blocks = plane[: rows * factors[0], : columns * factors[1]].reshape(rows, factors[0], columns, factors[1])
    low, high = LUNG_WINDOW
    return blocks.mean((1, 3), dtype=np.float32) * np.float32((high - low) / 255) + np.float32(low)


def _enlarged(mask: npt.NDArray[Any], factors: list[int]) -> npt.NDArray[Any]:
    return mask.repeat(factors[0], 0).repeat(factors[1], 1)


def _distance(mask: Bools, pixel: Pixel, ndimage: Any, *, indices: bool = False) -> Any:
    """mm to the nearest pixel of a mask that is not empty, and which that is."""
    return ndimage.distance_transform_edt(~mask, sampling=pixel, return_indices=indices)


def _shares(parts: npt.NDArray[np.int32], count: int, *marks: Bools) -> list[npt.NDArray[np.float64]]:
    """Per labelled part, the share of its pixels that each mask marks; part 0 is the background."""
    inside = parts > 0
    numbers = parts[inside]
    size = np.maximum(np.bincount(numbers, minlength=count + 1), 1)
    return [np.bincount(numbers, mark[inside], minlength=count + 1) / size for mark in marks]


def _air_in_body(hu: Floats, pixel: Pixel, ndimage: Any) -> Bools:
    """Air of a slice, less that round the patient and that of airways."""
    parts, count = ndimage.label(hu < AIR_BELOW)
    border = ndimage.binary_dilation(hu < PADDING_BELOW)
    border[[0, -1]] = border[:, [0, -1]] = True
    gas = hu < GAS_BELOW
    outside = np.zeros(count + 1, bool)
    outside[np.unique(parts[border])] = True
    gaseous = _shares(parts, count, gas)[0] > 0.5
    for cut in np.flatnonzero(outside & ~gaseous):  # a lung cut by the field of view, or a gap of the table
        part = parts == cut
        narrow = GAP[1] if part[:, 0].any() and part[:, -1].any() else GAP[0]
        outside[cut] = ndimage.distance_transform_edt(np.pad(part, 1), sampling=pixel).max() < narrow
    outside[0] = True
    air = ~outside[parts]
    parts, count = ndimage.label(ndimage.binary_opening(gas & air))
    area = np.bincount(parts.ravel()) * pixel[0] * pixel[1]
    margin = [round(2 * WALL / mm) + 1 for mm in pixel]
    for number, where in enumerate(ndimage.find_objects(parts), start=1):
        if not AIRWAY_AREA[0] <= area[number] <= AIRWAY_AREA[1]:
            continue
        wider = tuple(
            slice(max(side.start - more, 0), side.stop + more) for side, more in zip(where, margin, strict=True)
        )
        if (hu[wider] > AIRWAY_WALL).mean() < 0.2:  # in a lung, as most are
            continue
        away = _distance(parts[wider] == number, pixel, ndimage)
        wall = hu[wider][(away > WALL) & (away <= WALL + 1.5)]
        if 2 * (wall > AIRWAY_WALL).sum() > wall.size:
            air[wider] &= away > WALL
    return air


def _lung_pieces(hu: Floats, air: Bools, pixel: Pixel, ndimage: Any) -> Bools:
    """The pieces of air, joined through the slices, that are as large, dense and embedded in tissue as lungs are."""
    parts, count = ndimage.label(air)
    if not count:
        return air
    gas, thin = _shares(parts, count, hu < LUNG_MEDIAN[0], hu < LUNG_MEDIAN[1])
    tissue, around = np.zeros(count + 1), np.zeros(count + 1)
    for plane, part, mask in zip(hu, parts, air, strict=True):
        if mask.any():
            away, nearest = _distance(mask, pixel, ndimage, indices=True)
            ring = (away > 3) & (away <= 7)  # mm: beyond the shell of a table there is air again
            whose = part[tuple(nearest[:, ring])]
            tissue += np.bincount(whose, plane[ring] > TISSUE_ABOVE, minlength=count + 1)
            around += np.bincount(whose, minlength=count + 1)
    size = np.bincount(parts.ravel())
    fits = (gas < 0.5) & (thin > 0.5) & (tissue > 0.7 * around) & (size * pixel[0] * pixel[1] >= LEAST_PIECE)
    fits[0] = False
    fits &= size >= LEAST_SHARE * size[fits].max(initial=0)
    return fits[parts]


def _closed(pieces: Bools, pixel: Pixel, ndimage: Any, radius: float = VESSELS) -> Bools:
    """The pieces of a slice closed over hollows of this radius and filled."""
    if not pieces.any():
        return pieces
    where = ndimage.find_objects(pieces.astype(np.uint8))[0]  # closing never leaves it
    margin = [(int(radius / mm) + 2,) * 2 for mm in pixel]
    padded = np.pad(pieces[where], margin)
    wide = _distance(padded, pixel, ndimage) <= radius
    shut = _distance(~wide, pixel, ndimage) > radius
    closed = pieces.copy()
    filled = ndimage.binary_fill_holes(shut | padded)
    closed[where] = filled[tuple(slice(before, -before) for before, _ in margin)]
    return closed


def _middle(hu: Floats) -> float:
    """The column between the halves of the body."""
    profile = (hu > TISSUE_ABOVE).sum((0, 1))
    return float(np.average(np.arange(len(profile)), weights=profile)) if profile.any() else len(profile) / 2


def _sides(lungs: Bools, middle: float, pixel: Pixel, ndimage: Any) -> npt.NDArray[np.uint8]:
    """Which lung each pixel belongs to: that of the nearest piece that lies in one half of the body.

    Where the two touch, they are worn away from their edge until they come apart; a piece that never does is one lung.
    """
    left = np.broadcast_to(np.arange(lungs.shape[2]) > middle, lungs.shape)
    depth = np.stack([ndimage.distance_transform_edt(np.pad(plane, 1), sampling=pixel) for plane in lungs])
    depth = depth[:, 1:-1, 1:-1]
    for radius in (0, 2, 4, 8):  # mm
        parts, count = ndimage.label(depth > radius)
        share = _shares(parts, count, left)[0]
        size = np.bincount(parts.ravel(), minlength=count + 1)
        size[0] = 0
        large = size > 0.05 * size.sum()
        if not (large & (share > 0.2) & (share < 0.8)).any():
            break
    marks = (np.where(share > 0.5, LEFT, RIGHT) * large).astype(np.uint8)[parts]
    sides = np.where(left, LEFT, RIGHT).astype(np.uint8)
    for mark, side in zip(marks, sides, strict=True):
        if mark.any():
            nearest = _distance(mark > 0, pixel, ndimage, indices=True)[1]
            side[:] = mark[tuple(nearest)]
    return sides * lungs


def _between(sides: npt.NDArray[np.uint8]) -> Bools:
    """What lies between the lungs in the front half of a slice, where the heart is; at the back, a lobe may be."""
    up_to_right = np.maximum.accumulate((sides == RIGHT)[:, ::-1], axis=1)[:, ::-1]
    from_left = np.maximum.accumulate(sides == LEFT, axis=1)
    shows_both = up_to_right.any(1) & from_left.any(1)
    in_front = np.arange(len(sides)) < np.average(np.arange(len(sides)), weights=(sides > 0).sum(1) + 1e-9)
    return (shows_both & in_front)[:, None] & ~up_to_right & ~from_left


def _add_lesions(
    lungs: npt.NDArray[np.uint8],
    lesions: npt.NDArray[np.unsignedinteger],
    sides: npt.NDArray[np.uint8],
    middle: float,
    pixel: Pixel,
    factors: list[int],
    ndimage: Any,
) -> None:
    """Give lesions that lie where a lung should be to that lung, cut the others out; `sides` is on the working grid."""
    inside = np.zeros((3, int(lesions.max()) + 1))  # pixels of each lesion outside, and where each lung should be
    _, height, width = sides.shape
    columns = np.arange(width)
    opposite = np.rint(2 * middle - columns).astype(int).clip(0, width - 1)
    marked = []
    for place in np.flatnonzero(lesions.any((1, 2))):
        home = np.zeros((height, width), np.uint8)
        area = np.bincount(sides[place].ravel(), minlength=3)
        between = _between(sides[place])
        for side in (RIGHT, LEFT):
            lung = sides[place] == side
            reach = _closed(lung, pixel, ndimage, PLEURA)
            own_half = (columns > middle) == (side == LEFT)
            if area[1:].min() >= area[1:].max() / 2 > 0:  # the consolidated back of a lung lies beyond its closed air
                reach |= (_distance(lung, pixel, ndimage) <= PLEURA) & own_half & ~between
            elif area[side] < area[3 - side] / 2:
                reach |= (sides[place] == 3 - side)[:, opposite] & own_half
            home[reach & (home == 0)] = side
        y, x = np.argwhere(lesions[place]).T
        numbers = lesions[place, y, x]
        side_there = home[np.minimum(y // factors[0], height - 1), np.minimum(x // factors[1], width - 1)]
        np.add.at(inside, (side_there, numbers), 1)
        marked.append((lungs[place], (y, x), numbers, side_there))
    belongs = inside[1:].sum(0) > inside[0]
    majority = np.where(inside[LEFT] > inside[RIGHT], LEFT, RIGHT).astype(np.uint8)
    for lung, at, numbers, side_there in marked:
        given = np.where(side_there > 0, side_there, majority[numbers])
        lung[at] = belongs[numbers] * np.where(lung[at] > 0, lung[at], given)
