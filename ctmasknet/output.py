"""Writing results so that nothing half-written looks finished."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from ctmasknet.errors import InputError

WRITE_FIXES = {
    errno.ENOSPC: "free some disk space or choose another folder",
    errno.EDQUOT: "free some of your quota or choose another folder",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a folder you may write to",
    errno.EEXIST: "a file is in the place of a folder, choose another folder",
    errno.ENOTDIR: "a file is in the place of a folder, choose another folder",
    errno.EISDIR: "a folder is in the place of the file, choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class OutputError(InputError):
    """A result that cannot be written: full disk, no permission, a file in the way."""


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The error to raise where writing `path` failed: names it and the fix."""
    fix = WRITE_FIXES.get(error.errno or 0, "choose another folder")
    return OutputError(f"{path}: cannot be written ({error.strerror or error}): {fix}")


def require_writable(path: Path) -> None:
    """See, before long work, that `path` can be written once it is done; its folder is made as needed.

    Raises:
        OutputError: it cannot.
    """
    trial = path.parent / f".ctmasknet-{uuid.uuid4().hex}.tmp"
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise cannot_write(path, error) from error


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write files, each whole or not at all, in the order given; folders are made as needed.

    All are on disk under temporary names before the first is renamed, so a full disk leaves none of them.

    Raises:
        OutputError: one cannot be written; files of the same name that were there before stay as they are.
    """
    # Short names of their own: a long name must not grow past the file system's limit.
    unfinished = {path: path.parent / f".ctmasknet-{uuid.uuid4().hex}.tmp" for path in contents}
    path = Path()
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished[path].write_bytes(content)
        for path, temporary in unfinished.items():
            temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        for temporary in unfinished.values():
            with contextlib.suppress(OSError):  # renamed, or never made
                temporary.unlink()
