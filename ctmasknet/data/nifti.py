"""NIfTI files -> planes across the body, read one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ctmasknet.data.grid import Floats, Volume, report_shape
from ctmasknet.data.readers import not_hu, reading, require_chest_hu, require_finite, require_size, window
from ctmasknet.errors import InputError, import_extra

NIFTI_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img")
_TO_MM = {"meter": 1000.0, "micron": 0.001}


def open_nifti(name: str, units: str | None, spacing: tuple[float, float, float] | None) -> Volume:
    nibabel = import_extra("nibabel", "io", "reading NIfTI files")
    with reading(name, "NIfTI"):
        # Kept open, a gzip stream read in order is decompressed once.
        image = nibabel.load(name, keep_file_open=True)
        if not isinstance(image, nibabel.Nifti1Pair):
            raise InputError(f"{name}: {type(image).__name__}, not NIfTI. Convert it to .nii.gz.")
        shape = image.shape
        if len(shape) < 2 or any(length > 1 for length in shape[3:]):
            raise InputError(f"{name}: shape {shape}, one volume (X, Y, Z) is expected. Split it and give one.")
        if min(shape) < 1:
            raise InputError(f"{name}: shape {shape} holds no voxel. Export it again.")
        if image.get_data_dtype().kind not in "iuf":
            raise InputError(f"{name}: dtype {image.get_data_dtype()} is not a CT scan. Export it again.")
        problems: list[str] = []
        affine = _nifti_affine(image, spacing, problems, name)
        header = image.header.copy()
        grid = (int(shape[0]), int(shape[1]), int(shape[2]) if len(shape) > 2 else 1)
        header.set_data_shape(grid)
    axis = int(np.flatnonzero(nibabel.orientations.io_orientation(affine)[:, 0] == 2)[0])
    first, second = (length for index, length in enumerate(grid) if index != axis)
    require_size(first, second, name)
    values_of = _nifti_planes(image, grid, axis, name)
    low, high = (0.0, 0.0)
    if units == "range":
        low, high = _range(values_of, grid[axis], name)
    elif units is None:
        _require_hu(values_of, grid[axis], name)
    report_shape(affine, axis, problems, name)

    def plane_of(index: int) -> npt.NDArray[np.float32]:
        values = values_of(index)
        if units == "range":
            return np.clip((values - low) / ((high - low) or 1), 0, 1).astype(np.float32)
        return window(values)

    return Volume(
        source=name,
        kind="nifti",
        shape=grid,
        affine=affine,
        names={index: f"{name}[{index}]" for index in range(grid[axis])},
        problems=tuple(problems),
        header=header,
        threads=1,  # one stream
        plane=plane_of,
    )


def _nifti_affine(image: Any, spacing: tuple[float, float, float] | None, problems: list[str], name: str) -> Floats:
    """The affine of an image, in mm; `spacing` goes into a header that has none."""
    header = image.header
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        problems.append(f"{name}: no orientation stored (sform and qform codes are 0); left and right may be swapped")
    held = image.file_map.get("header", image.file_map["image"])  # a pair, or one file
    with held.get_prepare_fileobj("rb") as stream:
        stored = type(header).from_fileobj(stream, check=False)  # unchecked: nibabel mends a zero spacing to 1 mm
    between = np.asarray(stored["pixdim"][1:4], np.float64)
    lacking = int(stored["sform_code"]) == 0 and not (np.isfinite(between) & (between != 0)).all()
    if lacking and spacing is not None:
        header["pixdim"][1:4] = spacing
        problems.append(f"{name}: voxel spacing is missing or zero, taken as given")
        lacking = False
    affine = np.asarray(header.get_best_affine(), np.float64)
    if lacking or not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise InputError(
            f"{name}: voxel spacing is missing or zero in its header, so sizes and orientation are unknown. "
            "Export it again, or, if it has no sform either, pass spacing=(x, y, z) in mm (--spacing)."
        )
    scale = _TO_MM.get(header.get_xyzt_units()[0], 1.0)
    return np.diag([scale, scale, scale, 1.0]) @ affine


def _nifti_planes(image: Any, grid: tuple[int, int, int], axis: int, name: str) -> Callable[[int], Floats]:
    """Index along `axis` -> the plane there, float64, scaled as the header says."""
    proxy = image.dataobj
    whole: npt.NDArray[Any] | None = None
    if axis != 2 and str(image.file_map["image"].filename).endswith((".gz", ".bz2", ".zst")):
        # Planes lie scattered over the stream, which cannot be sought: hold it, in its stored dtype.
        with reading(name, "NIfTI"):
            whole = proxy.get_unscaled().reshape(grid)
    where: list[Any] = [slice(None)] * len(proxy.shape)
    for extra in range(3, len(proxy.shape)):
        where[extra] = 0

    def values_of(index: int) -> Floats:
        with reading(f"{name}[{index}]", "NIfTI"):
            if whole is not None:
                values = np.take(whole, index, axis).astype(np.float64) * proxy.slope + proxy.inter
            elif len(proxy.shape) == 2:
                values = np.asarray(proxy[:, :], np.float64)
                values = np.take(values[:, :, None], index, axis)
            else:
                here = list(where)
                here[axis] = index
                values = np.asarray(proxy[tuple(here)], np.float64)
            require_finite(values, f"{name}[{index}]")
            return values

    return values_of


def _require_hu(values_of: Callable[[int], Floats], count: int, name: str) -> None:
    """Refuse a scan unless a slice near its middle can be HU of a chest; the ends may be blank."""
    reasons = []
    for index in sorted({count // 2, count // 4, 3 * count // 4}, key=lambda index: abs(index - count // 2)):
        try:
            values = values_of(index)
            require_chest_hu(values.ravel(), values, name, False)
            return
        except InputError as error:
            reasons.append(error)
    raise reasons[0]


def _range(values_of: Callable[[int], Floats], count: int, name: str) -> tuple[float, float]:
    extremes = []
    for index in range(count):
        try:
            values = values_of(index)
        except InputError:  # reported when its turn comes
            continue
        extremes.append((float(values.min()), float(values.max())))
    if not extremes:
        raise InputError(not_hu(name, "no slice can be read"))
    return min(low for low, _ in extremes), max(high for _, high in extremes)
