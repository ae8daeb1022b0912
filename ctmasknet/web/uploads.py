"""Files sent to the page -> a `Case` in memory. What was on disk is gone when a call returns.

Whoever reaches the page may send anything, so everything is bounded before it is read: archives by what they unpack
to, scans by their headers.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Lock
from typing import IO, BinaryIO

import numpy as np
import numpy.typing as npt

from ctmasknet.data.scans import NIFTI_SUFFIXES, Volume, is_dicom, is_scan, open_volume
from ctmasknet.data.slices import read_slice, reading
from ctmasknet.errors import CTMaskNetError, InputError, import_extra
from ctmasknet.web.case import Case, Packed

MAX_FILES = 2000
MAX_SLICES = 1000
MAX_VOXELS = 1 << 28  # 1024 slices of 512 x 512
_DIRECTORY_BYTES = 512 * MAX_FILES  # of a zip file's list of its contents
_HIDDEN = ("__MACOSX", "DICOMDIR")
_DEFLATED_DICOM = b"1.2.840.10008.1.2.1.99"
_warnings = Lock()  # recording them is a state of the whole process


@dataclass(frozen=True)
class Limits:
    """How much one upload may hold.

    Attributes:
        upload_mb: of the files as sent, all together, in units of 10^6 bytes.
        unpacked_mb: of what archives hold.
    """

    upload_mb: int

    @property
    def upload_bytes(self) -> int:
        return self.upload_mb * 1_000_000

    @property
    def unpacked_bytes(self) -> int:
        return 4 * self.upload_bytes


def read_upload(
    paths: Sequence[str],
    root: Path,
    limits: Limits,
    *,
    units: str | None = None,
) -> Case:
    """Read what was uploaded, and delete it, whatever happens.

    Args:
        paths: of the files, below `root`: a picture, DICOM files, NIfTI (.hdr and .img too), or zip files of such.
        root: the folder uploads arrive in; a path elsewhere is refused.
        limits: how much is accepted.
        units: as for `read_slice` and `open_volume`.

    Raises:
        InputError: not one slice or scan; the text names the file, without its folder, and the fix.
        MissingExtraError: DICOM or NIfTI, and the extra ``io`` is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="reading-", dir=root.parent) as made:
        folder = Path(made) / "files"
        folder.mkdir()
        files = _claim(paths, root, folder)
        name = files[0].name if len(files) == 1 else f"{len(files)} files"
        try:
            if sum(path.stat().st_size for path in files) > limits.upload_bytes:
                raise InputError(f"{name}: more than {limits.upload_mb} MB. Send less, or use ctmasknet predict.")
            _unpack(files, folder, limits)
            return _read(sorted(folder.iterdir()), folder, name, units)
        except CTMaskNetError as error:
            raise type(error)(_without(folder, str(error), name)) from None


def _claim(paths: Sequence[str], root: Path, folder: Path) -> list[Path]:
    """Move the uploads into a folder of our own, and remove the folders they leave behind."""
    claimed = []
    for given in paths:
        path = Path(given)
        if path.is_symlink() or not path.resolve().is_relative_to(root.resolve()) or path.resolve() == root.resolve():
            raise InputError(f"{path.name}: was not uploaded here")
        target = _free(folder, path.name)
        try:
            path.replace(target)
        except OSError:  # someone else sent the same file and it was read first: they share a place
            raise InputError(f"{path.name}: is no longer here, upload it again") from None
        if path.parent.resolve() != root.resolve():
            with suppress(OSError):  # another file is still in it
                path.parent.rmdir()
        claimed.append(target)
    return claimed


def _free(folder: Path, name: str) -> Path:
    """A path in the folder for this name, or one like it."""
    path, number = folder / name, 1
    while path.exists():
        number += 1
        path = folder / f"{number}-{name}"
    return path


def _without(folder: Path, text: str, name: str) -> str:
    """A message as the visitor knows it: no folders of ours."""
    return text.replace(f"{folder}{os.sep}", "").replace(str(folder), name)


def _unpack(files: Sequence[Path], folder: Path, limits: Limits) -> None:
    """Replace zip files by what they hold, flat, under the members' own file names.

    Raises:
        InputError: damaged, locked, too large, too many files, or a name that leads out of the archive.
    """
    room = limits.unpacked_bytes
    for path in files:
        with path.open("rb") as stream:
            if stream.read(4) not in (b"PK\x03\x04", b"PK\x05\x06"):
                continue
            room = _unpack_one(stream, path, folder, room)
        path.unlink()


def _unpack_one(stream: BinaryIO, path: Path, folder: Path, room: int) -> int:
    _require_short_directory(stream, path)
    try:
        with zipfile.ZipFile(stream) as archive:
            members = [member for member in archive.infolist() if _wanted(member, path)]
            if not members:
                raise InputError(f"{path}: holds no file. Put the slices into it.")
            if len(members) > MAX_FILES:
                raise InputError(f"{path}: holds more than {MAX_FILES} files. Send one series.")
            for member in members:
                with archive.open(member) as source:
                    room -= _copy(source, _free(folder, PurePosixPath(member.filename).name), room, path)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, struct.error, NotImplementedError) as error:
        raise InputError(f"{path}: not a readable zip file ({error}). Pack it again.") from None
    except RuntimeError:  # how zipfile says that a password is needed
        raise InputError(f"{path}: is locked with a password. Pack it without one.") from None
    return room


def _require_short_directory(stream: BinaryIO, path: Path) -> None:
    """Refuse a list of contents so long that reading it would take the memory: zipfile reads it whole."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(size - 65557, 0))  # the record that ends a zip file, and its comment
    tail = stream.read()
    stream.seek(0)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) - end < 22:
        raise InputError(f"{path}: not a readable zip file (it has no end). Pack it again.")
    count, listed = struct.unpack_from("<HI", tail, end + 10)
    if count > MAX_FILES or listed > _DIRECTORY_BYTES or b"PK\x06\x07" in tail[max(end - 20, 0) : end]:
        raise InputError(f"{path}: holds more than {MAX_FILES} files. Send one series.")


def _wanted(member: zipfile.ZipInfo, path: Path) -> bool:
    """Is it a file to read? Refuses names that lead elsewhere, and links."""
    name = member.filename
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts or "\0" in name or name.startswith(("/", "\\")) or PureWindowsPath(name).drive:
        raise InputError(f"{path}: holds a file named {name!r}, which leads out of the archive. Pack it again.")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise InputError(f"{path}: holds a link ({name!r}). Pack the files themselves.")
    hidden = any(part.startswith(".") or part in _HIDDEN for part in parts)
    return not member.is_dir() and not hidden


def _copy(source: IO[bytes], target: Path, room: int, path: Path) -> int:
    """Write a member, no more than `room` bytes of it, whatever its header says; returns how many."""
    written = 0
    with target.open("xb") as stream:
        while block := source.read(1 << 20):
            written += len(block)
            if written > room:
                raise InputError(f"{path}: unpacks to more than is accepted here. Send less, or use ctmasknet predict.")
            stream.write(block)
    return written


def _read(
    files: list[Path],
    folder: Path,
    name: str,
    units: str | None,
) -> Case:
    if len(files) > MAX_FILES:
        raise InputError(f"{name}: more than {MAX_FILES} files. Send one series.")
    for path in files:
        _require_inflated(path)
    if len(files) == 1 and not is_scan(files[0]):
        with _warned(folder, name) as notes:
            one = read_slice(files[0], units=units)
        return Case.of_slice(one, files[0].name, tuple(notes))
    headers = [path for path in files if path.name.lower().endswith(NIFTI_SUFFIXES)]
    if len(files) == 1 or len(headers) == len(files) == 2:
        if headers:
            _require_bounded(headers[0])
        return _read_scan(files[0], folder, name, units)
    if not any(is_dicom(path) for path in files):
        raise InputError(
            f"{name}: {len(files)} files, none of them DICOM. Send one picture, one scan, or the DICOM files of a "
            "series; for many pictures use ctmasknet predict."
        )
    return _read_scan(folder, folder, name, units)


def _read_scan(path: Path, folder: Path, name: str, units: str | None) -> Case:
    volume = open_volume(path, units=units)
    if len(volume.names) > MAX_SLICES or int(np.prod(volume.shape)) > MAX_VOXELS:
        raise InputError(f"{name}: {len(volume.names)} slices of {volume.shape} are too many here: ctmasknet predict")
    slices: dict[int, tuple[Packed, str, str]] = {}
    failed: dict[int, str] = {}
    for index, one in volume.slices():
        if isinstance(one, InputError):
            failed[index] = _without(folder, str(one), name)
        else:
            slices[index] = Packed.of(one.pixels), _without(folder, one.source, name), one.kind
    if not slices:
        raise InputError(f"{name}: no slice of it can be used; the first: {next(iter(failed.values()), 'it has none')}")
    notes = tuple(_without(folder, problem, name) for problem in volume.problems)
    return Case(name, slices, failed, _detached(volume, folder, name, notes), notes)


def _detached(volume: Volume, folder: Path, name: str, problems: tuple[str, ...]) -> Volume:
    """The volume without the files it was read from."""
    names = {index: _without(folder, source, name) for index, source in volume.names.items()}

    def gone(index: int) -> npt.NDArray[np.float32]:
        raise InputError(f"{names[index]}: was deleted after reading")

    return replace(volume, source=name, names=names, problems=problems, plane=gone)


def _require_bounded(path: Path) -> None:
    """Refuse a NIfTI file by its header; a compressed one may claim any size in a few bytes."""
    nibabel = import_extra("nibabel", "io", "reading NIfTI files")
    with reading(str(path), "NIfTI"):
        shape = nibabel.load(path).shape
    if int(np.prod([int(length) for length in shape], dtype=object)) > MAX_VOXELS:
        raise InputError(f"{path}: shape {shape} is too large here. Use ctmasknet predict.")


def _require_inflated(path: Path) -> None:
    """Refuse DICOM files that are compressed as a whole, since pydicom unpacks them without a bound."""
    with path.open("rb") as stream:
        if _DEFLATED_DICOM in stream.read(4096):
            raise InputError(f"{path}: a deflated DICOM file, not accepted here. Use ctmasknet predict.")


@contextmanager
def _warned(folder: Path, name: str) -> Iterator[list[str]]:
    """Collects, as lines for the visitor, what reading warns of; other warnings are passed on."""
    lines: list[str] = []
    with _warnings:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lines
        for warning in caught:
            text = str(warning.message)
            if str(folder) in text:
                lines.append(_without(folder, text, name))
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def sweep(root: Path, older_than: float, now: float) -> None:
    """Delete what was uploaded and never read: `root` is left without files older than so many seconds."""
    for path in sorted(root.rglob("*"), reverse=True):
        try:
            if now - path.lstat().st_mtime < older_than:
                continue
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError:  # gone, or a folder that still holds something younger
            continue


def empty(folder: Path) -> None:
    """Delete a folder and all in it."""
    shutil.rmtree(folder, ignore_errors=True)
