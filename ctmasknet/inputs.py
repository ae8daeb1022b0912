"""Which slices and scans the names on a command line stand for, and where their results go."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ctmasknet.data.volumes import NIFTI_SUFFIXES, is_dicom
from ctmasknet.errors import InputError

PathLike = str | os.PathLike[str]

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
LEFT_OUT = "left out"


class Work(NamedTuple):
    """One input: a slice or a scan, or a name that is neither."""

    name: str
    scan: bool = False
    error: str = ""


def find_inputs(inputs: Iterable[PathLike], *, slices: bool = False, out: PathLike | None = None) -> Iterator[Work]:
    """The slices and scans that `inputs` name, each file once, in an order that depends on their names only.

    A folder is searched with all below it: pictures (by suffix) are slices, NIfTI files are scans, and the DICOM
    files that lie in one folder are one scan, or with `slices` a slice each. Linked folders are followed once.
    Hidden files, and the folder `out`, are left out. A name with ``*``, ``?`` or ``[`` that is no file is a shell
    pattern (``**`` goes into subfolders). Missing files and folders without a slice come out with an `error`.

    Files of other kinds in the folders come out with the error ``"left out"``.
    """
    seen: set[str] = set()
    folders: dict[str, str] = {}
    avoid = None if out is None else os.path.realpath(out)
    for given in inputs:
        for one in _expand(os.fsdecode(given), slices, avoid):
            identity = _identity(one.name, folders)
            if identity not in seen:
                seen.add(identity)
                yield one


def _expand(name: str, slices: bool, avoid: str | None) -> Iterator[Work]:
    if os.path.isdir(name):  # noqa: PTH112  millions of times
        yield from _search(name, slices, avoid)
    elif glob.has_magic(name) and not os.path.lexists(name):
        matches = sorted(glob.glob(name, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
        if not matches:
            yield Work(name, error=f"{name}: no file matches. Check the pattern, and quote it.")
        for match in (match for match in matches if not _is_below(match, avoid)):
            yield from _search(match, slices, avoid) if Path(match).is_dir() else [Work(match)]
    else:
        yield Work(name, scan=name.lower().endswith(NIFTI_SUFFIXES))


def _identity(name: str, folders: dict[str, str]) -> str:
    """The real path of a file; of a folder it is kept in `folders`, since millions of files may share one."""
    folder, file = os.path.split(name)
    if file in ("", ".", "..") or os.path.islink(name):  # noqa: PTH114
        return os.path.realpath(name)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.join(folders[folder], file)  # noqa: PTH118  as realpath writes it


def _is_below(name: str, folder: str | None) -> bool:
    """Is this a result of an earlier run rather than an input?"""
    return folder is not None and Path(os.path.realpath(name)).is_relative_to(folder)


def _search(root: str, slices: bool, avoid: str | None) -> Iterator[Work]:
    visited: set[str] = set()
    problems: list[OSError] = []
    found = False
    for folder, below, files in os.walk(root, followlinks=True, onerror=problems.append):
        identity = os.path.realpath(folder)
        if identity in visited or identity == avoid:
            below.clear()
            continue
        visited.add(identity)
        below[:] = sorted(name for name in below if not name.startswith("."))
        other = []
        for file in sorted(name for name in files if not name.startswith(".")):
            path = os.path.join(folder, file)  # noqa: PTH118  keeps "./" and trailing parts as given
            if file.lower().endswith(PICTURE_SUFFIXES):
                found = True
                yield Work(path)
            elif file.lower().endswith(NIFTI_SUFFIXES):
                if not file.lower().endswith(".img"):  # its header is the one to open
                    found = True
                    yield Work(path, scan=True)
            elif slices and is_dicom(Path(path)):
                found = True
                yield Work(path)
            else:
                other.append(path)
        if not slices and any(is_dicom(Path(path)) for path in other):
            found = True
            yield Work(folder, scan=True)
        else:
            yield from (Work(path, error=LEFT_OUT) for path in other)
    for problem in problems:
        yield Work(str(problem.filename), error=f"{problem.filename}: cannot be listed ({problem.strerror})")
    if not found and not problems:
        yield Work(root, error=f"{root}: no readable slices in this folder. Give one with pictures, DICOM or NIfTI.")


def read_list(path: Path) -> Iterator[str]:
    """The names in a text file (UTF-8), one per line; empty lines are skipped.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as stream:
            yield from (name for line in stream if (name := line.rstrip("\r\n")).strip())
    except OSError as error:
        raise InputError(f"{path}: the list cannot be read ({error.strerror}). Check the path.") from error


def place_of(name: str) -> Path:
    """Where results of a file go below the output folder: its path from here, or from the root if it lies elsewhere."""
    absolute = Path(os.path.realpath(name))
    here = Path.cwd().resolve()
    return absolute.relative_to(here if absolute.is_relative_to(here) else absolute.anchor)
