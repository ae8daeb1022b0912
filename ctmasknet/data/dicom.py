"""DICOM headers -> frames in the order of their places, on an even grid, with everything odd reported."""

from __future__ import annotations

import contextlib
import os
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ctmasknet.data.remote import as_path, head, is_url
from ctmasknet.data.slices import is_dicom_head, is_localizer, numbers_of, read_dicom, reading, require_dicom_slice
from ctmasknet.errors import CTMaskNetError, InputError

Floats = npt.NDArray[np.float64]

SAME_POSITION = 0.01  # mm; two slices closer than this lie at one place
SAME_DIRECTION = 0.01  # largest difference of direction cosines within a series
UNEVEN = 0.05  # share of the slice distance by which a position may miss the even grid without a word
MAX_FRAMES = 10_000  # of a file; a scan of the whole body has a tenth
NO_DICOM = (".json", ".csv", ".txt", ".xml", ".npy", ".npz")  # what lies beside slices, often one of them for each
OFF_GRID = 0.25  # share of the slice distance at which a position belongs to no plane of the grid


def is_dicom(path: Path | str) -> bool:
    """Is this a DICOM file, by its first bytes, or by the name .dcm? False for what cannot be read."""
    try:
        if isinstance(path, str) and is_url(path):
            return _is_dicom_there(path)
        path = Path(path)
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return is_dicom_head(stream.read(140), path.name)
    except OSError:
        return False


def _is_dicom_there(url: str) -> bool:
    """The same of a URL, by the name alone where that will do: a look inside is a request to a server."""
    name = as_path(url).lower()
    if name.endswith((".dcm", *NO_DICOM)):
        return name.endswith(".dcm")
    with contextlib.suppress(CTMaskNetError):
        return is_dicom_head(head(url, 140), name)
    return False


class Plane(NamedTuple):
    """Where one frame of a DICOM file lies, in DICOM's own coordinates (LPS, mm)."""

    path: str
    frame: int
    name: str
    position: Floats  # (3,), centre of the first pixel
    directions: Floats  # (2, 3): along a row (rising column), along a column (rising row)

    @property
    def normal(self) -> Floats:
        return np.cross(*self.directions)


class Group(NamedTuple):
    """Frames of one series that share size, pixel spacing and directions."""

    series: str
    size: tuple[int, int]
    pixel_spacing: tuple[float, float] | None  # mm between rows, between columns
    slice_distance: float | None  # mm, as the first header says
    planes: list[Plane]
    refusal: str | None  # why the first of them is no CT slice in HU, if it is not
    caveat: str | None

    @property
    def is_axial(self) -> bool:
        return int(np.abs(self.planes[0].normal).argmax()) == 2

    def __str__(self) -> str:
        return f"series {self.series or 'without a UID'} ({len(self.planes)} slices)"


def find_series(name: str, units: str | None, series: str | None, dataset: Any) -> tuple[Group, list[str]]:
    """The axial frames to take from a folder, or from one `dataset`, and every problem with the others."""
    groups: list[Group] = []
    problems: list[str] = []
    with reading(name, "folder"):
        files = [name] if dataset is not None else sorted(entry.path for entry in os.scandir(name))
    others = 0
    for file in files:
        if dataset is None and not is_dicom(Path(file)):
            others += 0 if Path(file).is_dir() else 1
            continue
        try:
            with reading(file, "DICOM"):
                _sort_in(groups, dataset or read_dicom(file, stop_before_pixels=True), file, units)
        except InputError as error:
            if dataset is not None:
                raise
            problems.append(str(error))
    if others:
        problems.append(f"{name}: files left out because they are not DICOM: {others}")
    return _choose(groups, problems, name, series), problems


def _sort_in(groups: list[Group], header: Any, file: str, units: str | None) -> None:
    """Sort every frame of a header into its group."""
    if is_localizer(header):
        raise InputError(f"{file}: a localizer (scout view), left out")
    frames = int(header.get("NumberOfFrames") or 1)
    if frames > MAX_FRAMES:
        raise InputError(f"{file}: {frames} frames are too many. A scan has at most {MAX_FRAMES:,}: split it.")
    for frame in range(frames):
        name = file if frames == 1 else f"{file}[{frame}]"
        refusal = None
        try:
            require_dicom_slice(header, name, units, frame)
        except InputError as error:
            refusal = str(error)
        position = numbers_of(header, frame, "ImagePositionPatient", 3)
        directions = numbers_of(header, frame, "ImageOrientationPatient", 6)
        directions = None if directions is None else directions.reshape(2, 3)
        if position is None or directions is None or not np.allclose(directions @ directions.T, np.eye(2), atol=0.01):
            nowhere = f"{name}: no ImagePositionPatient and ImageOrientationPatient. Predict it as a single slice."
            raise InputError(refusal or nowhere)  # the more telling of the two
        plane = Plane(file, frame, name, position, directions)
        _group_of(groups, header, plane, refusal, units).planes.append(plane)


def _group_of(groups: list[Group], header: Any, plane: Plane, refusal: str | None, units: str | None) -> Group:
    between = numbers_of(header, plane.frame, "PixelSpacing", 2)
    pixel_spacing = None if between is None or (between <= 0).any() else (float(between[0]), float(between[1]))
    key = (str(header.get("SeriesInstanceUID") or ""), (int(header.Rows), int(header.Columns)), refusal is None)
    for group in groups:
        if (group.series, group.size, group.refusal is None) == key:
            turned = np.abs(group.planes[0].directions - plane.directions).max() > SAME_DIRECTION
            # A spacing that is missing is like another that is missing, and like none that is not.
            if not turned and np.allclose(group.pixel_spacing or (0, 0), pixel_spacing or (0, 0), rtol=1e-3):
                return group
    distances = (numbers_of(header, plane.frame, tag, 1) for tag in ("SpacingBetweenSlices", "SliceThickness"))
    distance = next((float(value[0]) for value in distances if value is not None and value[0] > 0), None)
    modality = str(header.get("Modality") or "missing")
    caveat = None if modality == "CT" else f'DICOM modality is {modality}, not CT; read with units="{units}"'
    groups.append(Group(*key[:2], pixel_spacing, distance, [], refusal, caveat))
    return groups[-1]


def _choose(groups: list[Group], problems: list[str], name: str, series: str | None) -> Group:
    """The axial group to take: the wanted one, or the one of most slices."""
    wanted = [group for group in groups if series in (None, group.series)]
    if series is not None and not wanted:
        known = ", ".join(sorted({group.series for group in groups})) or "none"
        raise InputError(f"{name}: no series {series} in it. There are: {known}.")
    if not wanted:
        reason = problems[0] if problems else "it holds no DICOM file"
        raise InputError(f"{name}: no readable slice of a DICOM series ({reason})")
    across = [group for group in wanted if group.is_axial]
    if not across:
        raise InputError(f"{name}: no axial slices, only sagittal or coronal ones. Give the axial series.")
    chosen = max(across, key=lambda group: (group.refusal is None, len(group.planes), group.series))
    if chosen.refusal is not None:
        raise InputError(chosen.refusal)
    for group in groups:
        why = f"{group}: another series, which series=UID takes"
        if group.refusal is not None:
            why = group.refusal
        elif not group.is_axial:
            why = f"{group}: not axial"
        elif group.series == chosen.series:
            why = f"{group}: another orientation, size or pixel spacing within the series"
        if group is not chosen:
            problems.append(f"{name}: left out, {why}")
    if chosen.caveat is not None:
        problems.append(f"{name}: {chosen.caveat}")
    return chosen


def place(
    group: Group, problems: list[str], name: str, spacing: tuple[float, float, float] | None
) -> tuple[dict[int, Plane], Floats]:
    """The frames of a group by their places on an even grid, and its affine (indices -> mm, RAS+)."""
    between_rows_columns = group.pixel_spacing or (spacing and (spacing[1], spacing[0]))
    if between_rows_columns is None:
        raise InputError(f"{name}: pixel spacing is missing or zero. Pass spacing=(x, y, z) in mm (--spacing).")
    if group.pixel_spacing is None:
        problems.append(f"{name}: pixel spacing is missing or zero, taken as given")
    normal = group.planes[0].normal
    by_height = sorted(group.planes, key=lambda plane: (float(plane.position @ normal), plane.name))
    own = np.diff([plane.position @ normal for plane in by_height], prepend=-np.inf) >= SAME_POSITION
    planes = list(compress(by_height, own))
    if not own.all():
        count, first = np.count_nonzero(~own), Path(by_height[int(own.argmin())].name).name
        problems.append(f"{name}: slices left out because another lies in the same place: {count}, first {first}")
    places, step = _even_grid(planes, group.slice_distance or (spacing and spacing[2]), problems, name)
    (across, down), (between_rows, between_columns) = planes[0].directions, between_rows_columns
    affine = np.eye(4)
    affine[:3] = np.stack([across * between_columns, down * between_rows, step, planes[0].position], axis=1)
    # DICOM's x and y point the other way; 0 minus, because it leaves no negative zeros.
    affine[:2] = 0 - affine[:2]
    return dict(zip(places, planes, strict=True)), affine


def _even_grid(planes: list[Plane], depth: float | None, problems: list[str], name: str) -> tuple[list[int], Floats]:
    """Place of each plane on an even grid, and the step from one place to the next (LPS, mm)."""
    normal = planes[0].normal
    if len(planes) == 1:
        if depth is None:
            raise InputError(f"{name}: one slice of unknown thickness. Pass spacing=(x, y, z) in mm (--spacing).")
        return [0], normal * depth
    positions = np.stack([plane.position for plane in planes])
    heights = (positions - positions[0]) @ normal
    jumps = np.maximum(np.rint(np.diff(heights) / np.median(np.diff(heights))), 1).astype(int)
    places = np.concatenate([[0], np.cumsum(jumps)])
    step = (positions[-1] - positions[0]) / places[-1]
    distance = float(step @ normal)
    off = np.abs(heights - places * distance)
    if off.max() > OFF_GRID * distance or places[-1] >= 4 * len(planes) + 4:
        worst = planes[int(off.argmax())]
        raise InputError(
            f"{name}: the slices are not evenly spaced ({np.diff(heights).min():g} to {np.diff(heights).max():g} mm; "
            f"{Path(worst.name).name} lies {off.max():.2f} mm off). Split the folder, or predict the files as slices."
        )
    if off.max() > max(UNEVEN * distance, 0.1):
        problems.append(f"{name}: slices lie up to {off.max():.2f} mm off an even spacing of {distance:.3f} mm")
    sideways = np.linalg.norm(positions - positions[0] - places[:, None] * step, axis=1)
    if sideways.max() > 1:
        problems.append(f"{name}: slices are shifted against each other by up to {sideways.max():.1f} mm")
    for before in np.flatnonzero(jumps > 1):
        after = f"{Path(planes[before].name).name}: {jumps[before] - 1}"
        problems.append(f"{name}: slices missing after {after}; left empty, not counted in volumes")
    return places.tolist(), step
