"""Which weights a name stands for, a local path, a Hub repository or a variant's default; and its files in the cache.

The client is `huggingface_hub`: its cache, its locks (processes may download at the same time), its progress bars and
its environment variables (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, ...). Added here: what the cache holds at a
pinned commit is used without a request; one short request finds out whether the Hub answers, as the client itself
retries for 23 s without a network; and no file whose SHA-256 is wrong stays in the cache.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ctmasknet.errors import WeightsError
from ctmasknet.registry import VARIANTS, Variant, get_variant
from ctmasknet.weights.files import (
    CARD_NAME,
    CONFIG_NAME,
    GOLDEN_NAME,
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
_FILE = re.compile(r"\w[\w-]*(\.[\w-]+)*", re.ASCII)
_FILE_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")  # a misspelt path is no reason to ask the Hub
_TIMEOUT = 2.0  # s, for the first answer of the Hub; HF_HUB_ETAG_TIMEOUT replaces it
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3", "ssl", "socket")

Result = TypeVar("Result")


class HubUnreachableError(WeightsError):
    """The Hub does not answer, or must not be asked."""


class NoSuchFileError(WeightsError):
    """The repository exists, the file does not."""


@dataclass(frozen=True)
class HubSource:
    """A model repository on the Hub at a revision.

    Attributes:
        repository: ``"owner/name"``.
        revision: branch, tag or 40-hex commit; only a commit is pinned.
    """

    repository: str
    revision: str = constants.DEFAULT_REVISION

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, whose files never change."""
        return is_commit(self.revision)

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


def is_commit(revision: str) -> bool:
    """Whether `revision` is a full commit hash: 40 lower-case hexadecimal digits."""
    return _COMMIT.fullmatch(revision) is not None


def hub_source(text: str, revision: str | None = None) -> HubSource | None:
    """What ``"owner/name"`` or ``"owner/name@revision"`` stands for; None if `text` is nothing of that form.

    Args:
        revision: branch, tag or commit, in place of one in `text`.

    Raises:
        WeightsError: two revisions, or a revision that cannot be one.
    """
    repository, at, named = text.partition("@")
    # The Hub forbids ".." and "--" in names, and the first is a way out of a folder.
    forbidden = "--" in repository or ".." in repository or repository.endswith((".git", *_FILE_ENDINGS))
    if _REPOSITORY.fullmatch(repository) is None or forbidden:
        return None
    if at and revision is not None:
        raise WeightsError(f"{text}: names a revision and revision={revision!r} another: give one of them")
    chosen = named if at else revision
    if chosen is None:
        return HubSource(repository)
    if _REVISION.fullmatch(chosen) is None or ".." in chosen:
        raise WeightsError(f"{repository}: {chosen!r} is not a branch, tag or commit")
    return HubSource(repository, chosen)


def fetch(
    source: HubSource,
    names: Sequence[str],
    *,
    sha256: Mapping[str, str] | None = None,
    optional: Sequence[str] = (),
) -> Path:
    """The folder of the local cache that holds the files `names` of a repository, downloading what is missing.

    A file is checked against its SHA-256 whenever one is known: from `sha256`, or from the Hub, which states it for
    every large file. One that fails is removed from the cache, and fetched again if it had come from there.

    Args:
        names: plain file names; the first one finds the commit of a branch or tag.
        sha256: name -> hexadecimal SHA-256 the file must have.
        optional: names that the repository may lack; without a network, the cache.

    Raises:
        WeightsError: no such repository, revision or file; access refused; no network; a file that fails its check.
    """
    for name in (*names, *optional):
        if _FILE.fullmatch(name) is None:
            raise WeightsError(f"{source}: {name!r} is not a plain file name")
    known = sha256 or {}
    commit = source.revision if source.pinned else _commit_of(source, names[0], known)
    pinned = HubSource(source.repository, commit)
    folder: Path | None = None
    for name in (*names, *optional):
        path = _cached(pinned, name)
        if path is not None and not _intact(path, known.get(name)):
            log.warning("%s: the cached %s is damaged and is fetched again", pinned, name)
            _discard(path)
            path = None
        if path is None:
            try:
                _ask(pinned, name)
                path = _download(pinned, name)
            except (NoSuchFileError, HubUnreachableError):
                if name in optional:
                    continue
                raise
            if not _intact(path, known.get(name)):
                found = sha256_of(path)
                _discard(path)
                raise WeightsError(
                    f"{pinned}: {name} has SHA-256 {found[:12]}..., not the one it should have: damaged on the way or "
                    "replaced. It was not kept. Try again, or without a mirror (HF_ENDPOINT)."
                )
        folder = path.parent
    if folder is None:
        raise WeightsError(f"{source}: nothing to fetch")
    return folder


def discard(folder: Path, names: Sequence[str]) -> None:
    """Remove files of a cached commit, so that they are not taken for good ones."""
    for name in names:
        if (folder / name).is_symlink() or (folder / name).exists():
            _discard(folder / name)


def _commit_of(source: HubSource, name: str, sha256: Mapping[str, str]) -> str:
    """The commit that a branch or tag stands for now; without a network, when it was last seen."""
    cached = _cached(source, name)
    if cached is not None and name in sha256 and _intact(cached, sha256[name]):
        return cached.parent.name  # whatever the branch says now, this is the file
    try:
        _ask(source, name)
        return _download(source, name).parent.name
    except HubUnreachableError as error:
        if cached is None:
            raise
        if not constants.HF_HUB_OFFLINE:
            log.warning("%s; using the copy of %s in the cache", error, source)
        return cached.parent.name


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


def _ask(source: HubSource, name: str) -> None:
    """One request that fails at once where the client would go on trying."""
    if constants.HF_HUB_OFFLINE:
        raise HubUnreachableError(
            f"{source}: {name} is not in the cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE forbids downloads: "
            f"fetch it once online with: ctmasknet download {source}"
        )
    changed = constants.HF_HUB_ETAG_TIMEOUT != constants.DEFAULT_ETAG_TIMEOUT
    timeout = constants.HF_HUB_ETAG_TIMEOUT if changed else _TIMEOUT
    url = hf_hub_url(source.repository, name, revision=source.revision)
    metadata = explained(source, lambda: get_hf_file_metadata(url, timeout=timeout), name)
    if metadata.commit_hash is None or not is_commit(metadata.commit_hash):
        raise WeightsError(f"{constants.ENDPOINT}: does not answer like the Hugging Face Hub: check HF_ENDPOINT")


def _download(source: HubSource, name: str) -> Path:
    return Path(explained(source, lambda: hf_hub_download(source.repository, name, revision=source.revision), name))


def explained(source: HubSource, request: Callable[[], Result], name: str | None = None) -> Result:
    """Do a request of the client; its many exceptions become a `WeightsError` of one line that names the fix.

    Raises:
        WeightsError: see `fetch`.
    """
    try:
        return request()
    except GatedRepoError:
        raise WeightsError(
            f"{source.repository}: gated: ask for access at {constants.ENDPOINT}/{source.repository}, then set "
            "HF_TOKEN (or: hf auth login)"
        ) from None
    except RepositoryNotFoundError:
        raise WeightsError(
            f"{source.repository}: no such folder here, and no such repository at {constants.ENDPOINT} or a private "
            "one: check the name; for a private one set HF_TOKEN (or: hf auth login)"
        ) from None
    except RevisionNotFoundError:
        raise WeightsError(f"{source.repository}: has no revision {source.revision!r}") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise HubUnreachableError(f"{source}: {constants.ENDPOINT} cannot be reached ({_reason(error)})") from None
    except EntryNotFoundError:
        raise NoSuchFileError(f"{source}: the repository holds no {name}: not weights of this library?") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status is not None and status >= 500:
            raise HubUnreachableError(f"{source}: {constants.ENDPOINT} is out of order (HTTP {status})") from None
        raise WeightsError(
            f"{source}: {constants.ENDPOINT} refused (HTTP {status}: {_reason(error)}). Is HF_TOKEN valid, and may it?"
        ) from None
    except Exception as error:
        # The transport underneath (requests, httpx, ...) differs between versions of the client.
        if type(error).__module__.split(".")[0] in _TRANSPORTS:
            raise HubUnreachableError(
                f"{source}: {constants.ENDPOINT} cannot be reached ({_reason(error)}): check the network or "
                "HF_ENDPOINT, or give the path of a copy"
            ) from None
        if isinstance(error, OSError):
            raise WeightsError(f"{source}: {name or 'request'} failed ({_reason(error)})") from None
        raise


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def load_stored(
    weights: str | os.PathLike[str],
    variant: Variant | None,
    *,
    revision: str | None = None,
    golden: bool = False,
) -> StoredWeights:
    """Read what `weights` names, in this order: an existing path, the local cache, the Hub.

    Args:
        weights: ``"default"`` (needs a variant), a file, a folder, ``"owner/name"`` or ``"owner/name@revision"``.
        variant: what it must hold; None accepts any.
        revision: branch, tag or commit of a Hub repository.
        golden: also make sure of the golden file beside the weights.

    Raises:
        WeightsError: nothing there, damaged, another variant's, or the Hub cannot be reached.
    """
    if isinstance(weights, str) and weights == "default":
        if variant is None:
            raise WeightsError("'default' needs the name of a variant")
        return _load_entry(default_entry(variant), golden=golden)
    if not isinstance(weights, str | os.PathLike):
        raise WeightsError(f"weights={weights!r}: use None, 'default', or the path of a file or folder")
    source = None
    if isinstance(weights, str) and not Path(weights).exists():
        if weights in VARIANTS:
            raise WeightsError(f"{weights} is a variant, not a path: create_model('{weights}', weights='default')")
        source = hub_source(weights, revision)
    if source is not None:
        stored = _from_hub(source, golden=golden)
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


@dataclass(frozen=True)
class Downloaded:
    """Weights that are on this machine.

    Attributes:
        name: as asked for.
        source: ``"bundled"``, or the Hub repository with its commit.
        folder: where they lie.
        bytes: of the weights file.
    """

    name: str
    source: str
    folder: Path
    bytes: int


def download(name: str) -> Downloaded:
    """Make weights ready for use without a network: config, weights, golden file and card.

    Args:
        name: a variant (its default weights), ``"owner/name"`` or ``"owner/name@revision"``.

    Raises:
        ConfigError: neither a repository nor a variant.
        WeightsError: see `load_stored`.
    """
    source = hub_source(name)
    if source is not None:
        stored = _from_hub(source, golden=False, keep=(GOLDEN_NAME, CARD_NAME))
    else:
        entry = default_entry(get_variant(name))
        stored = _load_entry(entry, golden=False, keep=(GOLDEN_NAME, CARD_NAME))
        if entry.path is not None and stored.path == entry.path:
            return Downloaded(name, "bundled", stored.path.parent, stored.path.stat().st_size)
        source = _place(entry)
    commit = HubSource(source.repository, stored.path.parent.name)
    return Downloaded(name, str(commit), stored.path.parent, stored.path.stat().st_size)


def _load_entry(entry: ManifestEntry, *, golden: bool, keep: tuple[str, ...] = ()) -> StoredWeights:
    if entry.path is not None and (entry.path.exists() or entry.repository is None):
        if not entry.path.is_file() or entry.path.stat().st_size != entry.bytes:
            raise WeightsError(f"{entry.path}: bundled weights are missing or damaged: reinstall ctmasknet")
        if sha256_of(entry.path) != entry.sha256:
            raise WeightsError(f"{entry.path}: bundled weights do not match their hash: reinstall ctmasknet")
        return read_weights(entry.path)
    stored = _from_hub(_place(entry), golden=golden, sha256=entry.sha256, keep=keep)
    if stored.variant != entry.variant:
        raise WeightsError(f"{_place(entry)}: holds {stored.variant}, not {entry.variant}, as the manifest says")
    return stored


def _place(entry: ManifestEntry) -> HubSource:
    if entry.repository is None or entry.revision is None:
        raise WeightsError(f"{entry.variant}: the manifest names no repository: reinstall ctmasknet")
    return HubSource(entry.repository, entry.revision)


def _from_hub(
    source: HubSource, *, golden: bool, sha256: str | None = None, keep: tuple[str, ...] = ()
) -> StoredWeights:
    names = (CONFIG_NAME, WEIGHTS_NAME, *((GOLDEN_NAME,) if golden else ()))
    folder = fetch(source, names, sha256={WEIGHTS_NAME: sha256} if sha256 else {}, optional=keep)
    try:
        return read_weights(folder)
    except WeightsError as error:
        discard(folder, (CONFIG_NAME, WEIGHTS_NAME))
        raise WeightsError(f"{source}: {error} It was not kept in the cache.") from None
