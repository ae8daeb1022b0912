"""Writing results so that nothing half-written looks finished: whole files, and a log that survives kills."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ctmasknet.errors import ConfigError, InputError

try:
    import fcntl
except ImportError:  # Windows, where two runs into one folder are not told apart
    fcntl = None  # type: ignore[assignment]

PathLike = str | os.PathLike[str]
Content = bytes | Callable[[BinaryIO], object]
"""What a file is to hold: its bytes, or a function that writes them into a stream."""

_WRITE_FIXES = {
    errno.ENOSPC: "free some disk space or choose another folder",
    errno.EDQUOT: "free some of your quota or choose another folder",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder you may write to"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "a file is in the place of a folder, choose another folder"),
    errno.EISDIR: "a folder is in the place of the file, choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class OutputError(InputError):
    """A result that cannot be written: full disk, no permission, a file in the way."""


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The error to raise where writing `path` failed: names it and the fix."""
    fix = _WRITE_FIXES.get(error.errno or 0, "choose another folder")
    return OutputError(f"{path}: cannot be written ({error.strerror or error}): {fix}")


def require_writable(path: Path) -> None:
    """See, before long work, that `path` can be written once it is done, else raise; its folder is made as needed."""
    trial = _beside(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise cannot_write(path, error) from error


def write_files(contents: Mapping[Path, Content], *, sync: bool = False) -> list[Path]:
    """Write files, each whole or not at all, in the order given; folders are made as needed.

    All are on disk under temporary names before the first is renamed, so a full disk leaves none of them.

    Args:
        sync: see that the contents outlast a power cut before they take their names.

    Raises:
        OutputError: one cannot be written; files of the same name that were there before stay as they are.
    """
    unfinished = {path: _beside(path) for path in contents}
    path = Path()
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished[path].open("xb") as stream:
                if callable(content):
                    content(stream)
                else:
                    stream.write(content)
                if sync:
                    stream.flush()
                    os.fsync(stream.fileno())
        for path, temporary in unfinished.items():
            temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        for temporary in unfinished.values():
            with contextlib.suppress(OSError):  # renamed, or never made
                temporary.unlink()
    return list(contents)


def json_bytes(facts: Any, *, indent: int | None = None) -> bytes:
    """Facts as a file of JSON: ASCII, so that names that are no valid Unicode fit in, too.

    Raises:
        ValueError: a NaN or an infinity, which JSON does not know.
    """
    return (json.dumps(facts, indent=indent, allow_nan=False) + "\n").encode("ascii")


def csv_table(rows: Iterable[Mapping[str, Any]], columns: Iterable[str] = (), without: Iterable[str] = ()) -> str:
    """Rows as CSV below a head: `columns`, then what else they have; `without` are left out.

    Numbers get six digits, what is not there none.
    """
    rows = list(rows)
    head = [name for name in dict.fromkeys([*columns, *(key for row in rows for key in row)]) if name not in without]
    cells = ([f"{value:.6g}" if isinstance(value, float) else value for value in map(row.get, head)] for row in rows)
    return csv_text([head, *cells])


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV, a line each; None is an empty field."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


class Log(contextlib.AbstractContextManager["Log"]):
    """A file of JSON objects, a line each, one per thing; open for appending by this process alone.

    A line is written in one piece. Opening mends what a kill or a power cut left: a last line without its end, a line
    that is no JSON, a second line for one thing, which its field `key` names.

    Raises:
        ConfigError: another process has it open.
        OutputError: it, or later a line, cannot be written.
    """

    def __init__(self, path: Path, key: str = "source") -> None:
        self.path, self.key = path, key
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

    def append(self, *records: Mapping[str, Any]) -> None:
        """Add lines, all of them or none."""
        lines = b"".join(map(json_bytes, records))
        before = os.fstat(self._handle).st_size
        try:
            if os.write(self._handle, lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):  # if that fails too, the next start mends it
                os.ftruncate(self._handle, before)
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Let go of the file."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            if fcntl is not None:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self.path}: another run is writing here. Wait for it, or choose another folder."
            ) from None
        except OSError:  # some network file systems have no locks
            return

    def _mend(self) -> None:
        """Read all lines; where one is damaged, write the others anew."""
        lines = {record[self.key]: len(line) for record, line in _lines([self.path], self.key)}
        if sum(lines.values()) == os.fstat(self._handle).st_size:
            return
        join_logs([self.path], self.path, self.key)
        os.close(self._handle)
        self._handle = os.open(self.path, os.O_RDWR | os.O_APPEND)
        self._lock()


def read_logs(paths: Iterable[Path], key: str = "source") -> Iterator[dict[str, Any]]:
    """Every whole line of logs, which others may be writing; a log that is missing has none."""
    return (record for record, _ in _lines(paths, key))


def join_logs(paths: Iterable[Path], target: Path, key: str = "source") -> None:
    """Write every whole line of the logs into `target`, one per thing, whole or not at all."""

    def lines_into(stream: BinaryIO) -> None:
        seen: set[str] = set()
        for record, line in _lines(paths, key):
            if record[key] not in seen:
                seen.add(record[key])
                stream.write(line)

    write_files({target: lines_into}, sync=True)


def _lines(paths: Iterable[Path], key: str) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Of each whole line about something, its object and itself."""
    for path in paths:
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            continue
        with stream:
            for line in stream:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get(key), str):
                    yield record, line


def _beside(path: Path) -> Path:
    """A temporary name in the same folder, short: a long name must not grow past the file system's limit."""
    return path.parent / f".ctmasknet-{uuid.uuid4().hex}.tmp"
