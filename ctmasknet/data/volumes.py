"""Whole scans -> axial slices in the lung window, and back onto the voxel grid of the scan.

A scan is a folder with a DICOM series, a DICOM file (of one or many frames), or a NIfTI file. Its voxel grid is
never resampled: a slice is a plane of the grid, shown as the models know it, patient's left on the right of the
picture and the back below, and a mask drawn on it returns to the very voxels it was drawn on.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from ctmasknet.data.dicom_series import is_dicom, is_dicom_head, open_dicom_file, open_series
from ctmasknet.data.grid import Volume
from ctmasknet.data.nifti import NIFTI_SUFFIXES, open_nifti
from ctmasknet.data.readers import open_file, reading
from ctmasknet.errors import ConfigError, InputError, import_extra

__all__ = ["NIFTI_SUFFIXES", "Volume", "is_dicom", "is_scan", "open_volume"]


def open_volume(
    path: str | os.PathLike[str],
    *,
    units: str | None = None,
    series: str | None = None,
    spacing: tuple[float, float, float] | None = None,
) -> Volume:
    """Find out what a scan consists of; its pixels are read later, slice by slice.

    Args:
        path: a folder with DICOM files (any names; its subfolders are not searched), a DICOM file, or a NIfTI
            file (.nii, .nii.gz, or a .hdr/.img pair).
        units: as for single slices: ``"hu"`` where a scan does not say that its values are Hounsfield units,
            ``"range"`` to stretch them (DICOM: each slice's own range; NIfTI: the range of the whole scan).
        series: SeriesInstanceUID of the series to take from a folder. None takes the one of most slices.
        spacing: mm between the columns, rows and slices, used only where the file lacks it.

    Raises:
        InputError: not a scan, or one that cannot be put on an even grid; names the file and the fix.
        ConfigError: unknown `units`, or a spacing that is not three positive numbers.
        MissingExtraError: the extra ``io`` is not installed.
    """
    if units not in (None, "hu", "range"):
        raise ConfigError(f'units={units!r} is unknown. Use None, "hu" or "range".')
    if spacing is not None and (len(spacing) != 3 or not all(math.isfinite(mm) and mm > 0 for mm in spacing)):
        raise ConfigError(f"spacing={spacing}: three positive numbers, mm between columns, rows and slices")
    import_extra("nibabel", "io", "reading whole scans")
    name = os.fsdecode(path)
    if Path(name).is_dir():
        return open_series(name, units, series, spacing)
    with open_file(name) as stream:
        head = stream.read(348)
    if is_dicom_head(head, name):
        return open_dicom_file(name, units, spacing)
    if name.lower().endswith(NIFTI_SUFFIXES) or head[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c"):
        return open_nifti(name, units, spacing)
    raise InputError(f"{name}: not a scan. Give a folder with a DICOM series, a DICOM file, or a NIfTI file.")


def is_scan(path: Path) -> bool:
    """Is this file a scan rather than a slice: NIfTI by its name, or a DICOM file of several frames?"""
    if path.name.lower().endswith(NIFTI_SUFFIXES):
        return True
    if not is_dicom(path):
        return False
    pydicom = import_extra("pydicom", "io", "reading DICOM files")
    with reading(str(path), "DICOM"):
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=["NumberOfFrames"])
        return int(header.get("NumberOfFrames") or 1) > 1
