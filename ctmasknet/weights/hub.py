"""Which weights a name stands for, a local path, a Hub repository or a variant's default; and its files in the cache.

The client is `huggingface_hub`: its cache, its locks (processes may download at the same time), its progress bars and
its environment variables (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, ...). Added here: what the cache holds at a
pinned commit is used without a request; one request for the first bytes of a file finds out whether data flow, as the
client itself tries for half a minute and more; and no file whose SHA-256 is wrong stays in the cache.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from huggingface_hub import constants, get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from ctmasknet.errors import WeightsError, reason_of
from ctmasknet.registry import VARIANTS, Variant, get_variant
from ctmasknet.weights.files import (
    CARD_NAME,
    CONFIG_NAME,
    GOLDEN_NAME,
    INT8_NAME,
    WEIGHTS_NAME,
    StoredWeights,
    read_weights,
    sha256_of,
)
from ctmasknet.weights.manifest import ManifestEntry, default_entry

log = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")  # a misspelt path is no reason to ask the Hub
_DEADLINE = 2.0  # s, until data flow; HF_HUB_ETAG_TIMEOUT replaces it
_FIRST_BYTES = 4096
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3", "ssl", "socket")

Result = TypeVar("Result")


class HubUnreachableError(WeightsError):
    """The Hub does not answer, or must not be asked."""


class NoSuchFileError(WeightsError):
    """The repository exists, the file does not."""


@dataclass(frozen=True)
class HubSource:
    """A model repository ``"owner/name"`` on the Hub at a branch, tag or 40-hex commit; only a commit never changes."""

    repository: str
    revision: str = constants.DEFAULT_REVISION

    def __post_init__(self) -> None:
        if _REVISION.fullmatch(self.revision) is None or ".." in self.revision:
            raise WeightsError(f"{self.repository}: {self.revision!r} is not a branch, tag or commit")

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


def hub_source(text: str, revision: str | None = None) -> HubSource | None:
    """What ``"owner/name"`` or ``"owner/name@revision"`` stands for; None if `text` is nothing of that form."""
    repository, at, named = text.partition("@")
    # The Hub forbids ".." and "--" in names, and the first is a way out of a folder.
    forbidden = "--" in repository or ".." in repository or repository.endswith((".git", *_FILE_ENDINGS))
    if _REPOSITORY.fullmatch(repository) is None or forbidden:
        return None
    if at and revision is not None:
        raise WeightsError(f"{text}: names a revision and revision={revision!r} another: give one of them")
    chosen = named if at else revision
    return HubSource(repository) if chosen is None else HubSource(repository, chosen)


def from_hub(source: HubSource, names: Sequence[str], sha256: str | None = None) -> Path:
    """The folder in the local cache that holds a repository's files, fetched as far as they are not there.

    A file is checked against its SHA-256 whenever there is one: `sha256` for the weights, or what the Hub states for
    every large file. One that fails is removed from the cache, and fetched again if it had come from there.

    Args:
        names: the first one finds the commit of a branch or tag.
    """
    known = {WEIGHTS_NAME: sha256}
    if _COMMIT.fullmatch(source.revision) is None:
        source = HubSource(source.repository, _commit_of(source, names[0], known.get(names[0])))
    return [_fetched(source, name, known.get(name)).parent for name in names][-1]


def _commit_of(source: HubSource, name: str, sha256: str | None) -> str:
    """The commit that a branch or tag stands for now; without a network, when it was last seen."""
    cached = _cached(source, name)
    if cached is not None and sha256 is not None and _intact(cached, sha256):
        return cached.parent.name  # whatever the branch says now, this is the file
    try:
        return _download(source, name).parent.name
    except HubUnreachableError as error:
        if cached is None:
            raise
        if not constants.HF_HUB_OFFLINE:
            log.warning("%s; using the copy of %s in the cache", error, source)
        return cached.parent.name


def _fetched(source: HubSource, name: str, sha256: str | None) -> Path:
    """A file in the cache, whole."""
    path = _cached(source, name)
    if path is not None:
        if _intact(path, sha256):
            return path
        log.warning("%s: the cached %s is damaged and is fetched again", source, name)
        _discard(path)
    path = _download(source, name)
    if not _intact(path, sha256):
        found = sha256_of(path)
        _discard(path)
        raise WeightsError(
            f"{source}: {name} has SHA-256 {found[:12]}..., not the one it should have: damaged on the way or "
            "replaced. It was not kept. Try again, or without a mirror (HF_ENDPOINT)."
        )
    return path


def _cached(source: HubSource, name: str) -> Path | None:
    found = try_to_load_from_cache(source.repository, name, revision=source.revision)
    return Path(found) if isinstance(found, str) else None


def _intact(path: Path, expected: str | None) -> bool:
    # The cache links a large file to a blob named after the SHA-256 that the Hub stated for it. Only the first link
    # tells: the blob may be a link in turn, into a store shared between repositories that goes by other hashes.
    stated = path.readlink().name if path.is_symlink() else ""
    wanted = expected or (stated if _SHA256.fullmatch(stated) else None)
    return wanted is None or sha256_of(path) == wanted


def _discard(path: Path) -> None:
    """Remove a cached file with everything it links to, so that nothing takes it for good."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink(missing_ok=True)
        path = target
    path.unlink(missing_ok=True)


def _download(source: HubSource, name: str) -> Path:
    if constants.HF_HUB_OFFLINE:
        raise HubUnreachableError(
            f"{source}: {name} is not in the cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE forbids downloads: "
            f"fetch it once online with: ctmasknet download {source}"
        )
    explained(source, lambda: _see_data_flow(source, name), name)
    return Path(explained(source, lambda: hf_hub_download(source.repository, name, revision=source.revision), name))


def _see_data_flow(source: HubSource, name: str) -> None:
    """Get the first bytes of a file before a deadline for all of it; a timeout starts anew with every byte."""
    changed = constants.HF_HUB_ETAG_TIMEOUT != constants.DEFAULT_ETAG_TIMEOUT
    deadline = constants.HF_HUB_ETAG_TIMEOUT if changed else _DEADLINE
    url = hf_hub_url(source.repository, name, revision=source.revision)
    part = {"Range": f"bytes=0-{_FIRST_BYTES - 1}", "Accept-Encoding": "identity"}
    answer: Future[Any] = Future()

    def ask() -> None:
        try:
            answer.set_result(get_session().get(url, headers=build_hf_headers() | part, timeout=deadline))
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=ask, daemon=True).start()
    try:
        response = answer.result(deadline)
    except FutureTimeoutError:
        raise TimeoutError(f"no data in {deadline:g} s") from None
    hf_raise_for_status(response)
    if not any(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT in r.headers for r in (*response.history, response)):
        raise WeightsError(f"{constants.ENDPOINT}: does not answer like the Hugging Face Hub: check HF_ENDPOINT")


def explained(source: HubSource, request: Callable[[], Result], name: str | None = None) -> Result:
    """Do a request of the client; its many exceptions become a `WeightsError` of one line that names the fix."""
    try:
        return request()
    except GatedRepoError:
        page = f"{constants.ENDPOINT}/{source.repository}"
        raise WeightsError(f"{source.repository}: gated: ask for access at {page}, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise WeightsError(
            f"{source.repository}: no such folder here, and no such repository at {constants.ENDPOINT} or a private "
            "one: check the name; for a private one set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise WeightsError(f"{source.repository}: has no revision {source.revision!r}") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, TimeoutError) as error:
        raise _unreachable(source, error) from None
    except EntryNotFoundError:
        raise NoSuchFileError(f"{source}: the repository holds no {name}: not weights of this library?") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 429 or (status or 0) >= 500:
            state = "busy" if status == 429 else "out of order"
            raise HubUnreachableError(f"{source}: {constants.ENDPOINT} is {state} (HTTP {status})") from None
        raise WeightsError(
            f"{source}: {constants.ENDPOINT} refused (HTTP {status}: {reason_of(error)}). Does HF_TOKEN allow this?"
        ) from None
    except Exception as error:
        # The transport underneath (requests, httpx, ...) differs between versions of the client.
        if type(error).__module__.split(".")[0] in _TRANSPORTS:
            raise _unreachable(source, error) from None
        if isinstance(error, OSError):
            raise WeightsError(f"{source}: {name or 'request'} failed ({reason_of(error)})") from None
        raise


def _unreachable(source: HubSource, error: Exception) -> HubUnreachableError:
    return HubUnreachableError(
        f"{source}: {constants.ENDPOINT} cannot be reached ({reason_of(error)}): check the network or HF_ENDPOINT, or "
        "give the path of a copy"
    )


def load_stored(
    weights: str | os.PathLike[str], variant: Variant | None, *, revision: str | None = None, golden: bool = False
) -> StoredWeights:
    """Read what `weights` names, in this order: an existing path, the local cache, the Hub.

    Args:
        weights: ``"default"`` (needs a variant), a file, a folder, ``"owner/name"`` or ``"owner/name@revision"``.
        variant: what it must hold; None accepts any.
        golden: also make sure of the golden file beside the weights.
    """
    if not isinstance(weights, str | os.PathLike):
        raise WeightsError(f"weights={weights!r}: use None, 'default', or the path of a file or folder")
    source = None
    if isinstance(weights, str) and not Path(weights).exists():
        if weights in VARIANTS:
            raise WeightsError(f"{weights} is a variant, not a path: create_model('{weights}', weights='default')")
        source = hub_source(weights, revision)
    if weights == "default" and variant is not None:
        stored = _load_entry(default_entry(variant), golden=golden)
    elif source is not None:
        stored = _from_repository(source, golden=golden)
    elif revision is not None:
        raise WeightsError(f"{weights}: revision={revision!r} is for Hub repositories ('owner/name'), not for paths")
    else:
        stored = read_weights(weights)
    if variant is not None and stored.variant not in (None, variant.name):
        raise WeightsError(
            f"{source or stored.path}: holds {stored.variant}, not {variant.name}: "
            f"create_model('{stored.variant}', ...)"
        )
    return stored


def download(name: str) -> tuple[str, Path]:
    """Make weights ready for use without a network: config, weights, golden file and card.

    Args:
        name: a variant (its default weights), ``"owner/name"`` or ``"owner/name@revision"``.

    Returns:
        Where they are from, ``"bundled"`` or the Hub repository with its commit; and the weights file.
    """
    source = hub_source(name)
    if source is not None:
        file = _from_repository(source).path
    else:
        entry = default_entry(get_variant(name))
        file = _load_entry(entry).path
        if file == entry.path:
            return "bundled", file
        source = HubSource(entry.repository or "")
    pinned = HubSource(source.repository, file.parent.name)
    for beside in (GOLDEN_NAME, CARD_NAME):
        with suppress(NoSuchFileError, HubUnreachableError):  # older weights lack them
            _fetched(pinned, beside, None)
    return str(pinned), file


def _load_entry(entry: ManifestEntry, *, golden: bool = False) -> StoredWeights:
    if entry.path is not None and (entry.path.exists() or entry.repository is None):
        if not entry.path.is_file() or sha256_of(entry.path) != entry.sha256:
            raise WeightsError(f"{entry.path}: bundled weights are missing or damaged: reinstall ctmasknet")
        return read_weights(entry.path)
    source = HubSource(entry.repository or "", entry.revision or "")
    return _from_repository(source, golden=golden, sha256=entry.sha256)


def _from_repository(source: HubSource, *, golden: bool = False, sha256: str | None = None) -> StoredWeights:
    folder = from_hub(source, (CONFIG_NAME, WEIGHTS_NAME, *((GOLDEN_NAME,) if golden else ())), sha256)
    try:
        stored = read_weights(folder)
    except WeightsError as error:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            _discard(folder / name)
        raise WeightsError(f"{source.repository}@{folder.name}: {error} It was not kept in the cache.") from None
    if "int8" in stored.metadata:
        _fetched(HubSource(source.repository, folder.name), INT8_NAME, stored.metadata["int8"]["sha256"])
    return stored
