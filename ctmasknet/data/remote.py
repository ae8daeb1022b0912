"""URLs such as s3://bucket/scan or zip://slice.png::scans.zip -> copies on this machine, for the readers to open.

fsspec, on which huggingface_hub is built, fetches them; some protocols need a package more. Only what a caller gives is
taken for a URL, never what a file holds, and no name that a folder or an archive lists leads out of it.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

from ctmasknet.errors import CTMaskNetError, InputError, MissingExtraError, reason_of

FETCHERS = 8  # threads for the files of a folder
MAX_FILES = 10_000  # of a folder that is a scan
ARCHIVE_AGE = 60  # seconds, after which an archive is opened anew
FOLLOWING = {"reference", "dvc"}  # protocols that go where a file says
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]+::)*[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # one letter is a drive of Windows
_PAIRS = {".hdr": ".img", ".img": ".hdr"}


@dataclass(frozen=True, eq=False)
class Local(os.PathLike[str]):
    """A file or folder to read: where it lies on this machine, and what it is called in results and errors.

    A copy is deleted with the last reference to this object.
    """

    path: str
    name: str

    def __fspath__(self) -> str:
        return self.path

    def shown(self, text: str) -> str:
        """A text of the readers with the URL in place of the path."""
        if self.path == self.name:
            return text
        inside = joined(self.name.partition("::")[0], "")
        return text.replace(self.path + os.sep, inside).replace(self.path, self.name)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Let errors name the URL."""
        try:
            yield
        except CTMaskNetError as error:
            if (text := self.shown(str(error))) == str(error):
                raise
            raise type(error)(text) from error


def is_url(name: str) -> bool:
    return _URL.match(name) is not None


def as_path(name: str) -> str:
    """A URL as an absolute path, by which results are placed: /s3/bucket/scans.zip/slice.png; other names stay."""
    if not is_url(name):
        return name
    inner, _, outer = name.rpartition("::")
    if outer.startswith("http"):
        outer = outer.partition("?")[0]  # signatures and the like
    if "://" not in outer:  # an archive on this machine
        outer = os.path.splitdrive(os.path.abspath(outer))[1]  # noqa: PTH100
    parts = [outer.replace("://", "/"), *(part.partition("://")[2] for part in reversed(inner.split("::")))]
    steps = [step for step in _steps("/".join(parts)) if step not in ("", ".", "..")]
    return os.path.abspath("/" + "/".join(steps))  # noqa: PTH100


def joined(folder: str, name: str) -> str:
    """The URL of what lies in a folder."""
    first, chain, rest = folder.partition("::")
    return first + ("" if first.endswith("/") else "/") + name + chain + rest


def fetch(url: str, limit: int, *, folders: bool = True) -> Local:
    """Copy the file behind a URL, or the files of a folder, which have at most `limit` bytes together.

    Args:
        folders: False leaves the copy of a folder empty.

    Raises:
        InputError: there is nothing, it is too large, or it cannot be had.
        MissingExtraError: the package that its protocol needs is not installed.
    """
    with _fetching(url):
        system, path = _opened(url)
        info = system.info(path)
        folder = tempfile.mkdtemp(prefix="ctmasknet-")
        copy = Local(os.path.join(folder, os.path.basename(as_path(url))), url)  # noqa: PTH118, PTH119
        weakref.finalize(copy, shutil.rmtree, folder, ignore_errors=True)
        found = {copy.path: info}
        if info["type"] == "directory":
            os.mkdir(copy.path)  # noqa: PTH102
            entries = [entry for entry in system.ls(path, detail=True) if entry["type"] == "file"] if folders else []
            # Last parts alone, for an archive may list ../../name.
            named = [(os.path.basename(entry["name"]), entry) for entry in entries]  # noqa: PTH119
            found = {os.path.join(copy.path, name): entry for name, entry in named if name}  # noqa: PTH118
        elif (other := _PAIRS.get(path[-4:])) and system.exists(path[:-4] + other):
            found[copy.path[:-4] + other] = system.info(path[:-4] + other)
        sizes = [limit if entry.get("size") is None else int(entry["size"]) for entry in found.values()]
        if len(found) > MAX_FILES:
            raise InputError(f"{url}: {len(found):,} files are too many. A scan has {MAX_FILES:,} at most: split it.")
        if sum(sizes) > limit:
            raise _too_large(url, limit)
        # Without async_impl a file system is not made for several threads.
        with ThreadPoolExecutor(FETCHERS if getattr(system, "async_impl", False) else 1) as pool:
            paths = [entry["name"] for entry in found.values()]
            list(pool.map(partial(_copy, system, url), paths, found, sizes))
        return copy


def is_folder(url: str) -> bool:
    """Is there a folder behind a URL? It raises what `fetch` does."""
    with _fetching(url):
        system, path = _opened(url)
        return bool(system.info(path)["type"] == "directory")


def head(url: str, size: int) -> bytes:
    """The first bytes of a file. It raises what `fetch` does."""
    with _fetching(url):
        system, path = _opened(url)
        return bytes(system.cat_file(path, start=0, end=size))


def walk(url: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Every folder below a URL, but for hidden ones, as os.walk has it: its URL, no folders, its files. It raises what
    `fetch` does."""
    with _fetching(url):
        system, path = _opened(url)
        inside = [name[len(path) :].lstrip("/") for name in _files(system, path) if not name.endswith("/")]
    if outside := [name for name in inside if "::" in name or ".." in _steps(name)]:
        raise InputError(f"{url}: a name in it leads elsewhere ({outside[0]}). Rename that file.")
    for folder, files in groupby(sorted(name.rpartition("/") for name in inside), key=lambda parts: parts[0]):
        if not any(step.startswith(".") for step in _steps(folder)):
            yield joined(url, folder) if folder else url, [], [file for *_, file in files]


def _opened(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path on it."""
    from fsspec.core import url_to_fs

    if refused := FOLLOWING.intersection(part.partition("://")[0] for part in url.split("::")):
        raise InputError(f"{url}: {refused.pop()} files lead to other addresses. Give those.")
    first, chain, rest = url.partition("::")
    if not (chain and "://" in first):
        return url_to_fs(url)
    system = _archive(f"{first.partition('://')[0]}://::{rest}", threading.get_ident(), time.monotonic() // ARCHIVE_AGE)
    return system, system._strip_protocol(first)


def _files(system: Any, path: str) -> Iterator[str]:
    """All files below a folder."""
    from fsspec import AbstractFileSystem

    if getattr(system, "async_impl", False) or type(system).find is not AbstractFileSystem.find:
        yield from system.find(path)  # its own, in few requests
        return
    for entry in system.ls(path, detail=True):  # where the common one passes over folders that cannot be listed
        if entry["type"] != "directory":
            yield entry["name"]
        elif entry["name"].rstrip("/") != path.rstrip("/"):
            yield from _files(system, entry["name"])


@lru_cache(maxsize=16)
def _archive(url: str, thread: int, age: float) -> Any:
    """The file system of an archive, opened once for many of its files; few of them bear several threads."""
    from fsspec.core import url_to_fs

    return url_to_fs(url)[0]


def _copy(system: Any, url: str, path: str, target: str, size: int) -> None:
    """Copy a file of `size` bytes at most, whatever its server said of it."""
    left = size
    with system.open(path, "rb") as source, open(target, "xb") as copy:  # noqa: PTH123
        while chunk := source.read(1 << 20):
            left -= len(chunk)
            if left < 0:
                raise _too_large(url, size)
            copy.write(chunk)


def _too_large(url: str, limit: int) -> InputError:
    return InputError(f"{url}: larger than {limit:,} bytes, too large to be copied here. Give a file on this machine.")


def _steps(path: str) -> list[str]:
    return re.split(r"[/\\]", path)


@contextmanager
def _fetching(url: str) -> Iterator[None]:
    """Turn whatever fsspec and the packages for its protocols raise into one error of ours."""
    try:
        yield
    except CTMaskNetError:
        raise
    except ImportError as error:
        raise MissingExtraError(f"{url}: a package for this address is missing. {error}.") from error
    except FileNotFoundError as error:
        # HTTP has this error for whatever a server answers.
        why = f" ({reason_of(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
        raise InputError(f"{url}: nothing is there{why}. Check the address.") from error
    except Exception as error:
        reason = reason_of(error)
        raise InputError(f"{url}: cannot be had ({reason}). Check the address and your access to it.") from error
