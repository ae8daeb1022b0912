"""A scan as a stack of axial slices over its voxel grid: turned for the models, and turned back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ctmasknet.data.prefetch import read_ahead
from ctmasknet.data.readers import Slice, require_size
from ctmasknet.errors import InputError, import_extra

Floats = npt.NDArray[np.float64]

READ_AHEAD = 8  # slices
NOT_SQUARE = 1.2  # ratio of the sides of a pixel; less, the models take in their stride
TILTED = 15.0  # degrees; a gantry is seldom tilted further


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan as a stack of axial slices over its voxel grid.

    Attributes:
        source: the path as given.
        kind: ``"dicom series"``, ``"dicom"`` or ``"nifti"``.
        shape: voxels along the three axes of the grid. DICOM: columns, rows, slices by rising position along
            the normal of the slices; NIfTI: as stored.
        affine: (4, 4) float64, voxel indices -> mm, rising left-to-right, back-to-front
            and foot-to-head (RAS+, as in NIfTI).
        names: index of a slice along `axial_axis` -> what it was read from. Positions of the grid that have no
            slice (gaps of a DICOM series) are absent.
        problems: what is wrong with the scan, one line each: gaps, duplicates, files left out.
        header: the header of the NIfTI file it was read from; None for DICOM.
        threads: how many threads may usefully call `read` at once.
    """

    source: str
    kind: str
    shape: tuple[int, int, int]
    affine: Floats
    names: dict[int, str]
    problems: tuple[str, ...]
    header: Any = field(repr=False)
    threads: int
    plane: Callable[[int], npt.NDArray[np.float32]] = field(repr=False)

    @cached_property
    def orientation(self) -> npt.NDArray[np.intp]:
        """(3, 2): for each axis of the grid the axis of the patient (0 right, 1 front, 2 head) and its sign."""
        nibabel = import_extra("nibabel", "io", "reading whole scans")
        return np.asarray(nibabel.orientations.io_orientation(self.affine)).astype(np.intp)

    @property
    def axial_axis(self) -> int:
        """The axis of the grid that runs along the body: slices lie across it."""
        return int(np.flatnonzero(self.orientation[:, 0] == 2)[0])

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
        first, second = (self.affine[:3, axis] for axis in range(3) if axis != self.axial_axis)
        return float(np.linalg.norm(np.cross(first, second)))

    def height_mm(self, index: int) -> float:
        """How far towards the head the middle of a slice lies, in mm of the scan's coordinates."""
        voxel = [(length - 1) / 2 for length in self.shape]
        voxel[self.axial_axis] = index
        return float((self.affine @ [*voxel, 1.0])[2])

    def read(self, index: int) -> Slice:
        """The slice at `index` along `axial_axis`: (H, W) in 0..1, patient's left at the right, back below.

        Safe to call from several threads.

        Raises:
            InputError: the slice is damaged, or does not hold HU of a chest; the text names the file.
        """
        name = self.names[index]
        pixels = self._view(self.plane(index))
        require_size(pixels.shape[0], pixels.shape[1], name)
        return Slice(np.ascontiguousarray(pixels, np.float32), name, self.kind)

    def slices(self) -> Iterator[tuple[int, Slice | InputError]]:
        """Every slice with its index, in the order of the grid, or why it cannot be read; read a little ahead."""
        yield from read_ahead(self._read_or_reason, sorted(self.names), threads=self.threads, depth=READ_AHEAD)

    def _read_or_reason(self, index: int) -> Slice | InputError:
        try:
            return self.read(index)
        except InputError as error:
            return error

    def to_grid(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A (H, W) picture of a slice -> its plane of the grid, the inverse of how `read` turns it."""
        for axis in self._flipped:
            image = np.flip(image, axis)
        return image.T if self._transposed else image

    def _view(self, plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self._transposed:
            plane = plane.T
        for axis in self._flipped:
            plane = np.flip(plane, axis)
        return plane

    @cached_property
    def _transposed(self) -> bool:
        """Does the first axis of a plane run from side to side, so that it must become the columns?"""
        in_plane = [int(self.orientation[axis, 0]) for axis in range(3) if axis != self.axial_axis]
        return in_plane == [0, 1]

    @cached_property
    def _flipped(self) -> tuple[int, ...]:
        """Picture axes to reverse, once transposed: rows run to the back, columns to the patient's left."""
        sign = {int(body): int(direction) for body, direction in self.orientation}
        return tuple(picture for picture, body in ((0, 1), (1, 0)) if sign[body] > 0)

    def mask_image(self, mask: npt.NDArray[np.uint8]) -> Any:
        """A mask over the grid, of `shape`, as a nibabel image with this scan's geometry, bit for bit for NIfTI."""
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
        header.set_data_dtype(np.uint8)
        header.set_slope_inter(1, 0)
        header["cal_min"], header["cal_max"] = 0, 0
        header["descrip"] = b"lesion mask"
        header.extensions.clear()  # they may hold what identifies a patient
        two = isinstance(header, nibabel.Nifti2Header)
        # affine=None leaves the header's own forms alone, to the last bit.
        return (nibabel.Nifti2Image if two else nibabel.Nifti1Image)(mask, None, header)


def report_shape(affine: Floats, axis: int, problems: list[str], name: str) -> None:
    """Say what the models were not trained on: pixels that are not square, slices that are not axial."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    first, second = (float(lengths[index]) for index in range(3) if index != axis)
    if max(first, second) > NOT_SQUARE * min(first, second):
        problems.append(f"{name}: pixels of an axial slice are {first:.3g} x {second:.3g} mm, not square")
    others = [affine[:3, index] for index in range(3) if index != axis]
    normal = np.cross(others[0], others[1])
    tilt = math.degrees(math.acos(min(1.0, abs(float(normal[2])) / float(np.linalg.norm(normal)))))
    if tilt > TILTED:
        problems.append(f"{name}: its slices are tilted by {tilt:.0f} degrees from axial; they are not resampled")
