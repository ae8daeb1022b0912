"""Writing results so that nothing half-written looks finished: whole files, and a log that survives kills."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ctmasknet.errors import ConfigError, InputError

try:
    import fcntl
except ImportError:  # Windows, where two runs into one folder are not told apart
    fcntl = None  # type: ignore[assignment]

SYNC_EVERY = 5.0  # seconds; what a power cut, not a kill, may cost
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


class Ledger:
    """A file of lines, open for appending by this process alone.

    Opening it mends what a kill or a power cut left: a last line without its end, a line that is no JSON, a second
    line for one file.

    Attributes:
        path: the file.
        finished: names of the files that have a line.

    Raises:
        ConfigError: another process has it open.
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finished: set[str] = set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            self._lock()
            self._mend()
        except BaseException:
            self.close()
            raise
        self._synced = time.monotonic()

    def append(self, record: dict[str, Any]) -> None:
        """Add a line, whole or not at all.

        Raises:
            OutputError: it cannot be written, for example because the disk is full.
        """
        line = _encode(record)
        before = os.fstat(self._handle).st_size
        try:
            if os.write(self._handle, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if time.monotonic() - self._synced > SYNC_EVERY:
                os.fsync(self._handle)
                self._synced = time.monotonic()
        except OSError as error:
            with contextlib.suppress(OSError):  # if that fails too, the next start mends it
                os.ftruncate(self._handle, before)
            raise cannot_write(self.path, error) from error
        self.finished.add(record["file"])

    def close(self) -> None:
        """Write through to the disk and let go of the file."""
        if self._handle < 0:
            return
        with contextlib.suppress(OSError):  # not every file system can sync
            os.fsync(self._handle)
        os.close(self._handle)
        self._handle = -1

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self.path}: another run is writing here. Wait for it, or choose another folder."
            ) from None
        except OSError:  # some network file systems have no locks
            return

    def _mend(self) -> None:
        """Read all lines and drop what is damaged; most often that is the end, which is cut off in place."""
        sound_end, after_damage = 0, False
        damaged = False
        with self.path.open("rb") as stream:
            for line in stream:
                name = _file_of(line)
                if name is None or name in self.finished:
                    damaged = True
                    continue
                self.finished.add(name)
                after_damage = after_damage or damaged
                if not damaged:
                    sound_end += len(line)
        if not damaged:
            return
        if not after_damage:
            os.ftruncate(self._handle, sound_end)
            return
        join_ledgers([self.path], self.path)
        os.close(self._handle)
        self._handle = os.open(self.path, os.O_RDWR | os.O_APPEND)
        self._lock()


def finished_files(paths: Iterable[Path], *, but: Path | None = None) -> set[str]:
    """Names that have a whole line in any of the ledgers, which others may be writing; missing ones have none."""
    return {name for path in paths if path != but for name, _ in _whole_lines(path)}


def join_ledgers(paths: Iterable[Path], target: Path) -> None:
    """Write every line of the ledgers into `target`, one per file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    unfinished = target.parent / f".ctmasknet-{uuid.uuid4().hex}.tmp"
    seen: set[str] = set()
    try:
        with unfinished.open("xb") as stream:
            for path in paths:
                for name, line in _whole_lines(path):
                    if name not in seen:
                        seen.add(name)
                        stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _whole_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return
    with stream:
        for line in stream:
            name = _file_of(line)
            if name is not None:
                yield name, line


def _encode(record: dict[str, Any]) -> bytes:
    # ASCII: a file name that is no valid Unicode still makes a valid line.
    return (json.dumps(record, allow_nan=False) + "\n").encode("ascii")


def _file_of(line: bytes) -> str | None:
    """The file a line is about; None if it is not a whole line."""
    if not line.endswith(b"\n"):
        return None
    try:
        name = json.loads(line)["file"]
    except (ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None
