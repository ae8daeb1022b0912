"""Whole scans -> axial slices in the lung window, and back onto the voxel grid of the scan.

A scan is a folder with a DICOM series, a DICOM file (of one or many frames), a NIfTI file, or held in memory. Its voxel
grid is never resampled: a slice is a plane of the grid, shown as the models know it, patient's left on the right of the
picture and the back below, and a mask drawn on it returns to the very voxels it was drawn on.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ctmasknet.data.dicom import Floats, find_series, is_dicom, place
from ctmasknet.data.slices import (
    LUNG_WINDOW,
    NIFTI_MAGIC,
    NIFTI_SUFFIXES,
    Slice,
    check_units,
    hu_offset,
    is_dicom_head,
    local,
    not_hu,
    of_the_middle,
    open_file,
    pixels_of_frame,
    read_dicom,
    reading,
    require_chest_hu,
    require_finite,
    require_size,
    taken_for,
    window,
)
from ctmasknet.errors import ConfigError, InputError, as_value, import_extra

READ_AHEAD, READERS = 8, 2  # slices, threads
NOT_SQUARE = 1.2  # ratio of the sides of a pixel; less, the models take in their stride
TILTED = 15.0  # degrees; a gantry is seldom tilted further
MAX_VOXELS = 1 << 31  # of a scan; 2048 slices of 1024 x 1024, and their mask takes 2 GB
MAX_UNPACKED = 1 << 31  # bytes of a .nii.gz, which are held in memory; 4096 slices of 512 x 512 in 16 bits

Spacing = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan as a stack of axial slices over its voxel grid.

    Attributes:
        source: the path as given, or what it was in memory.
        kind: ``"dicom series"``, ``"dicom"``, ``"nifti"`` or ``"memory"``.
        shape: voxels along the three axes of the grid. DICOM: columns, rows, slices by rising position along
            the normal of the slices; NIfTI: as stored.
        affine: (4, 4) float64, voxel indices -> mm, rising left-to-right, back-to-front
            and foot-to-head (RAS+, as in NIfTI).
        names: index of a slice along `axes[0]` -> what it was read from. Positions of the grid that have no
            slice (gaps of a DICOM series) are absent.
        problems: what is wrong with the scan, one line each: gaps, duplicates, files left out.
        header: the NIfTI header it was read with; None for DICOM.
        units: what its values were taken for, if the scan does not say it itself: see `Slice.units`.
        plane: index -> the slice as it lies in the grid, in 0..1.
        frames: index -> the DICOM file of a slice and the frame in it, counted from 0; empty for NIfTI.
    """

    source: str
    kind: str
    shape: tuple[int, int, int]
    affine: Floats
    names: dict[int, str]
    problems: tuple[str, ...]
    header: Any = field(repr=False)
    units: str | None
    plane: Callable[[int], npt.NDArray[np.float32]] = field(repr=False)
    frames: dict[int, tuple[str, int]] = field(default_factory=dict, repr=False)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along each axis of the grid, mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in ml; a sheared grid (tilted gantry) included."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    @property
    def pixel_mm2(self) -> float:
        """Area of a pixel of a slice, mm²."""
        return float(np.linalg.norm(np.cross(*self.stack_steps.T[1:])))

    def height_mm(self, index: int) -> float:
        """How far towards the head the middle of a slice lies, in mm of the scan's coordinates."""
        voxel = [(length - 1) / 2 for length in self.shape]
        voxel[self.axes[0]] = index
        return float((self.affine @ [*voxel, 1.0])[2])

    def read(self, index: int) -> Slice:
        """The slice at `index` along `axes[0]`, patient's left at the right, back below; threads may share this."""
        name = self.names[index]
        (pixels,) = self.stack(np.expand_dims(self.plane(index), self.axes[0]))
        require_size(pixels.shape, name)
        down, across = np.linalg.norm(self.stack_steps[:, 1:], axis=0).tolist()
        return Slice(np.ascontiguousarray(pixels, np.float32), name, self.kind, self.units, (down, across))

    def slices(self) -> Iterator[tuple[int, Slice | InputError]]:
        """Every slice with its index, in the order of the grid, or why it cannot be read; read a little ahead."""

        def read(index: int) -> Slice | InputError:
            try:
                return self.read(index)
            except InputError as error:
                return as_value(error)

        yield from read_ahead(read, sorted(self.names), threads=READERS, depth=READ_AHEAD)

    def stack(self, grid: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A view of an array over the grid as (S, H, W): slices along `axes[0]`, turned as `read` turns them."""
        return np.flip(grid.transpose(self.axes), self._flipped)

    def grid(self, stack: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The inverse of `stack`, a view too."""
        return np.flip(stack, self._flipped).transpose(np.argsort(self.axes))

    @property
    def stack_steps(self) -> Floats:
        """(3, 3): from slice to slice, row to row, column to column of `stack`, in mm, as columns (RAS+)."""
        signs = [-1 if axis in self._flipped else 1 for axis in range(3)]
        return self.affine[:3, list(self.axes)] * signs

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """The axes of the grid in the order of a stack: along the body, across slices; front to back; side to side."""
        return tuple(np.argsort(-_orientation(self.affine)[:, 0]).tolist())

    @cached_property
    def _flipped(self) -> tuple[int, ...]:
        """Axes of a stack to reverse: rows run to the back, columns to the patient's left."""
        return tuple(axis for axis in (1, 2) if _orientation(self.affine)[self.axes[axis], 1] > 0)

    def mask_image(self, mask: npt.NDArray[Any]) -> Any:
        """Whole numbers over the grid as a nibabel image with this scan's geometry, bit for bit for NIfTI."""
        nibabel = import_extra("nibabel", "io", "writing NIfTI files")
        if self.header is None:
            image = nibabel.Nifti1Image(mask, self.affine)
            image.set_sform(self.affine, code="scanner")
            # A quaternion cannot hold the shear of a tilted gantry; without the form readers take the other.
            directions = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
            straight = np.allclose(directions.T @ directions, np.eye(3), atol=1e-4)
            image.set_qform(self.affine if straight else None, code="scanner" if straight else 0)
            image.header.set_xyzt_units("mm")
            return image
        header = self.header.copy()
        header.set_data_dtype(mask.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"], header["cal_max"] = 0, 0
        header["descrip"] = b"lesion mask"
        header.extensions.clear()  # they may hold what identifies a patient
        two = isinstance(header, nibabel.Nifti2Header)
        # affine=None leaves the header's own forms alone, to the last bit.
        return (nibabel.Nifti2Image if two else nibabel.Nifti1Image)(mask, None, header)


def _orientation(affine: Floats) -> Floats:
    """(3, 2): for each axis of a grid the axis of the patient (0 right, 1 front, 2 head) and its sign."""
    nibabel = import_extra("nibabel", "io", "reading whole scans")
    return np.asarray(nibabel.orientations.io_orientation(affine))


def _caveats(volume: Volume) -> Iterator[str]:
    """What the models were not trained on, or what was put right."""
    steps = volume.stack_steps[:, 1:]
    short, long = sorted(np.linalg.norm(steps, axis=0).tolist())
    if long > NOT_SQUARE * short:
        yield f"{volume.source}: pixels of an axial slice are {short:.3g} x {long:.3g} mm, not square"
    tilt = math.degrees(math.acos(min(1.0, abs(np.cross(*steps.T)[2]) / volume.pixel_mm2)))
    if tilt > TILTED:
        yield f"{volume.source}: its slices are tilted by {tilt:.0f} degrees from axial; they are not resampled"
    if volume.units == "hu+1024":
        yield f"{volume.source}: its values are HU + 1024, not HU; 1024 was subtracted"


def open_volume(
    scan: str | os.PathLike[str] | Any,
    *,
    units: str | None = None,
    series: str | None = None,
    spacing: Spacing | None = None,
) -> Volume:
    """Find out what a scan consists of; its pixels are read later, slice by slice.

    Args:
        scan: a folder with DICOM files (any names; its subfolders are not searched), a DICOM file, or a NIfTI
            file (.nii, .nii.gz, or a .hdr/.img pair), or a URL of one of these; in memory an image of nibabel or
            SimpleITK, or an array (S, H, W) with its `spacing`: slices from the feet up, rows to the back, columns to
            the patient's left.
        units: as for single slices: ``"hu"`` where a scan does not say that its values are Hounsfield units,
            ``"range"`` to stretch them (DICOM: each slice's own range; NIfTI: the range of the whole scan).
        series: SeriesInstanceUID of the series to take from a folder. None takes the one of most slices.
        spacing: mm between the columns, rows and slices, used only where the file lacks it.

    Raises:
        InputError: not a scan, or one that cannot be put on an even grid; names the file and the fix.
        ConfigError: unknown `units`, or a spacing that is not three positive numbers.
        MissingExtraError: the extra ``io`` is not installed.
    """
    check_units(units)
    if spacing is not None and (len(spacing) != 3 or not all(math.isfinite(mm) and mm > 0 for mm in spacing)):
        raise ConfigError(f"spacing={spacing}: three positive numbers, mm between columns, rows and slices")
    import_extra("nibabel", "io", "reading whole scans")
    if not isinstance(scan, str | os.PathLike):
        volume = _open_nifti(*_in_memory(scan, spacing), units, spacing)
        return replace(volume, problems=(*volume.problems, *_caveats(volume)))
    file = local(scan)
    with file.naming():
        volume = _open_path(file.path, units, spacing, series)

    def plane(index: int) -> npt.NDArray[np.float32]:
        with file.naming():  # and the file, if it is a copy, stays as long as it is read
            return volume.plane(index)

    names = {index: file.shown(name) for index, name in volume.names.items()}
    problems = tuple(map(file.shown, (*volume.problems, *_caveats(volume))))
    return replace(volume, source=file.name, names=names, problems=problems, plane=plane)


def _open_path(name: str, units: str | None, spacing: Spacing | None, series: str | None) -> Volume:
    """A folder or a file on this machine."""
    if Path(name).is_dir():
        return _open_dicom(name, units, spacing, series, None)
    with open_file(name) as stream:
        head = stream.read(348)
    if is_dicom_head(head, name):
        return _open_dicom(name, units, spacing, None, read_dicom(name))
    if name.lower().endswith(NIFTI_SUFFIXES) or head.startswith(NIFTI_MAGIC):
        return _open_nifti(name, None, units, spacing)
    raise InputError(f"{name}: not a scan. Give a folder with a DICOM series, a DICOM file, or a NIfTI file.")


def is_scan(path: Path) -> bool:
    """Is this file a scan rather than a slice: NIfTI by its name, or a DICOM file of several frames?"""
    if path.name.lower().endswith(NIFTI_SUFFIXES):
        return True
    if not is_dicom(path):
        return False
    with reading(str(path), "DICOM"):
        header = read_dicom(str(path), stop_before_pixels=True, specific_tags=["NumberOfFrames"])
        return int(header.get("NumberOfFrames") or 1) > 1


def _open_dicom(name: str, units: str | None, spacing: Spacing | None, series: str | None, dataset: Any) -> Volume:
    """A folder, or the frames of one `dataset`."""
    group, problems = find_series(name, units, series, dataset)
    planes, affine = place(group, problems, name, spacing)
    indices, (rows, columns) = sorted(planes), group.size
    shape = _bounded((columns, rows, indices[-1] + 1), name)

    def read(index: int, offset: float | None) -> tuple[npt.NDArray[np.float32], float]:
        plane = planes[index]
        with reading(plane.name, "DICOM"):
            file = read_dicom(plane.path) if dataset is None else dataset
            return pixels_of_frame(file, plane.name, units, plane.frame, offset)

    offset = of_the_middle(len(indices), lambda number: read(indices[number], None)[1]) if units == "hu" else 0.0
    return Volume(
        source=name,
        kind="dicom series" if dataset is None else "dicom",
        shape=shape,
        affine=affine,
        names={index: plane.name for index, plane in planes.items()},
        problems=tuple(problems),
        header=None,
        units=taken_for(units, offset),
        plane=lambda index: read(index, offset)[0].T,
        frames={index: (plane.path, plane.frame) for index, plane in planes.items()},
    )


def _bounded(shape: tuple[int, int, int], name: str) -> tuple[int, int, int]:
    if math.prod(shape) > MAX_VOXELS:
        size = " x ".join(map(str, shape))
        raise InputError(f"{name}: {size} voxels are too many. A scan has at most {MAX_VOXELS:,}: split it.")
    return shape


def _in_memory(scan: Any, spacing: Spacing | None) -> tuple[str, Any]:
    """What a scan in memory is, and the scan as an image of nibabel."""
    nibabel = import_extra("nibabel", "io", "reading whole scans")
    name = f"{type(scan).__name__} in memory"
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    if isinstance(scan, np.ndarray):
        if scan.ndim != 3 or spacing is None:
            raise InputError(f"{name}: shape {scan.shape}. Give slices, rows, columns, and spacing=(x, y, z) in mm.")
        voxels, affine = scan.T, to_ras @ np.diag([*spacing, 1.0])
    elif hasattr(scan, "GetDirection") and scan.GetDimension() == 3:
        voxels, affine = import_extra("SimpleITK", "dev", "reading its images").GetArrayFromImage(scan).T, np.eye(4)
        affine[:3, :3] = np.reshape(scan.GetDirection(), (3, 3)) * scan.GetSpacing()
        affine[:3, 3] = scan.GetOrigin()
        affine = to_ras @ affine
    elif isinstance(scan, nibabel.spatialimages.SpatialImage):
        return name, scan
    else:
        raise InputError(f"{name}: not a scan. Give a path, an array, or an image of nibabel or SimpleITK.")
    if voxels.dtype in (np.int64, np.uint64, np.float16):  # which NIfTI has not
        voxels = voxels.astype(np.float32)
    with reading(name, "NIfTI"):
        return name, nibabel.Nifti1Image(voxels, affine)


def _open_nifti(name: str, image: Any, units: str | None, spacing: Spacing | None) -> Volume:
    """A file, or an image in memory."""
    nibabel = import_extra("nibabel", "io", "reading NIfTI files")
    in_memory = image is not None
    with reading(name, "NIfTI"):
        image = image if in_memory else nibabel.load(name)
        if not isinstance(image, nibabel.Nifti1Pair):
            raise InputError(f"{name}: {type(image).__name__}, not NIfTI. Convert it to .nii.gz.")
        shape, dtype = image.shape, image.get_data_dtype()
        if len(shape) < 2 or any(length > 1 for length in shape[3:]):
            raise InputError(f"{name}: shape {shape}, one volume (X, Y, Z) is expected. Split it and give one.")
        if min(shape) < 1:
            raise InputError(f"{name}: shape {shape} holds no voxel. Export it again.")
        if dtype.kind not in "iuf":
            raise InputError(f"{name}: dtype {dtype} is not a CT scan. Export it again.")
        problems: list[str] = []
        affine = _nifti_affine(image, spacing, problems, name, in_memory)
        header = image.header.copy()
        grid = _bounded((int(shape[0]), int(shape[1]), int(shape[2]) if len(shape) > 2 else 1), name)
        header.set_data_shape(grid)
        axis = int(_orientation(affine)[:, 0].argmax())
        require_size(np.delete(grid, axis).tolist(), name)
        if in_memory:
            stored, slope, inter = np.asanyarray(image.dataobj).reshape(grid), 1.0, 0.0
        else:
            stored, slope, inter = _stored(image, grid, name), image.dataobj.slope, image.dataobj.inter
    if stored.shape != grid and axis != 2:
        raise InputError(f"{name}: the file is cut off. Copy or export it again.")
    planes = np.moveaxis(stored, axis, 0)

    def values_of(index: int) -> Floats:
        if index >= len(planes):
            raise InputError(f"{name}[{index}]: the file is cut off before this slice. Copy or export it again.")
        values: Floats = planes[index].astype(np.float64) * slope + inter
        require_finite(values, f"{name}[{index}]")
        return values

    def offset_of(index: int) -> float:
        values = values_of(index)
        if units == "hu":
            return hu_offset(values, name)
        require_chest_hu(values.ravel(), values, name, False)
        return 0.0

    offset = 0.0
    if units == "range":
        extremes: list[float] = []
        for index in range(grid[axis]):
            with contextlib.suppress(InputError):  # reported when its turn comes
                values = values_of(index)
                extremes += [float(values.min()), float(values.max())]
        if not extremes:
            raise InputError(not_hu(name, "no slice can be read"))
        low, high = min(extremes), max(extremes)
    else:
        offset = of_the_middle(grid[axis], offset_of)
        low, high = (limit + offset for limit in LUNG_WINDOW)

    return Volume(
        source=name,
        kind="memory" if in_memory else "nifti",
        shape=grid,
        affine=affine,
        names={index: f"{name}[{index}]" for index in range(grid[axis])},
        problems=tuple(problems),
        header=header,
        units=taken_for(units, offset),
        plane=lambda index: window(values_of(index), low, high),
    )


def _nifti_affine(image: Any, spacing: Spacing | None, problems: list[str], name: str, in_memory: bool) -> Floats:
    """The affine of an image, in mm; `spacing` goes into a header that has none."""
    header = image.header
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        problems.append(f"{name}: no orientation stored (sform and qform codes are 0); left and right may be swapped")
    stored = header
    if not in_memory:
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
    scale = {"meter": 1000.0, "micron": 0.001}.get(header.get_xyzt_units()[0], 1.0)
    return np.diag([scale, scale, scale, 1.0]) @ affine


def _stored(image: Any, grid: tuple[int, int, int], name: str) -> npt.NDArray[Any]:
    """The voxels as stored, of shape `grid`, or of fewer planes along its last axis if the file is cut off.

    A .nii.gz is decompressed whole, with its checksum; other files stay on disk.
    """
    proxy, file = image.dataobj, os.fspath(image.file_map["image"].filename)
    end = proxy.offset + math.prod(grid) * proxy.dtype.itemsize
    if file.lower().endswith(".gz"):
        if end > MAX_UNPACKED:
            raise InputError(f"{name}: {end:,} bytes once unpacked are too many. Unpack it: a .nii is read from disk.")
        with gzip.open(file) as stream:
            data = np.frombuffer(stream.read(end + 1), np.uint8)  # one byte more, for it to look at the checksum
        if len(data) < end:
            raise InputError(f"{name}: the file is cut off. Copy or export it again.")
    else:
        data = np.memmap(file, np.uint8, "r")
    plane = grid[0] * grid[1] * proxy.dtype.itemsize
    planes = max(min((len(data) - proxy.offset) // plane, grid[2]), 0)
    return data[proxy.offset : proxy.offset + planes * plane].view(proxy.dtype).reshape((*grid[:2], planes), order="F")


Item = TypeVar("Item")
Value = TypeVar("Value")


def read_ahead(
    read: Callable[[Item], Value], items: Iterable[Item], *, threads: int, depth: int
) -> Iterator[tuple[Item, Value]]:
    """(item, read(item)) for every item, in their order, read by `threads` threads (decoders release the lock).

    At most `depth` items are being read or wait to be taken. An exception of `read` comes out at its item's turn.
    Leaving early drops what was not begun.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ctmasknet-read")
    waiting: deque[tuple[Item, Future[Value]]] = deque()
    coming = iter(items)
    try:
        while True:
            for item in itertools.islice(coming, depth - len(waiting)):
                waiting.append((item, pool.submit(read, item)))
            if not waiting:
                return
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
