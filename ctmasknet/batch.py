"""Many files through one `Predictor`: readers ahead of the model, a record that survives a kill, shards.

A run appends one line per finished file to ``predictions.jsonl``. A line is written in one piece after the file's
other results are in place, so a run killed at any moment loses nothing that has a line and repeats no line: run
again, it goes on where it stopped. Several processes share the work by the position of a file in the list of
inputs; each keeps a ledger of its own below ``parts/``, and the last to finish joins them.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import glob
import hashlib
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torchvision

from ctmasknet import __version__
from ctmasknet.data.scans import NIFTI_SUFFIXES, is_dicom, is_scan, read_ahead
from ctmasknet.data.slices import Slice, read_slice
from ctmasknet.errors import ConfigError, CTMaskNetError, DataError, InputError
from ctmasknet.output import Log, OutputError, PathLike, join_logs, read_logs, write_files
from ctmasknet.predictor import Predictor
from ctmasknet.results import Prediction, VolumePrediction

Format = Literal["files", "jsonl", "coco"]

PREDICTIONS, RUN = "predictions.jsonl", "run.json"
COCO_RESULTS, COCO_IMAGES = "coco_results.json", "coco_images.json"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
LEFT_OUT = "left out"
FAILURES_LISTED = 10_000
WRITERS = 2
READERS = 4
_ONE_FILE_ONLY = (errno.ENAMETOOLONG, errno.EISDIR)  # the next file may still be written


@dataclass(frozen=True)
class FileResult:
    """What became of one input.

    Attributes:
        file: its name as given or found.
        error: why it could not be predicted, "" if it was.
        record: its line in predictions.jsonl, without the masks' codes; None with an error.
        paths: files written for it, by ``"json"``, ``"overlay"``, or for scans ``"mask"``, ``"table"``, ``"montage"``.
    """

    file: str
    error: str = ""
    record: dict[str, Any] | None = None
    paths: Mapping[str, Path] = field(default_factory=dict)


@dataclass
class RunSummary:
    """What a run did; `to_dict` is what run.json holds.

    Attributes:
        status: ``"running"``, ``"complete"``, or ``"stopped"`` with the reason in `stopped_by`.
        inputs: files of this process, the finished ones included.
        predicted, failed, already_done: of them.
        left_out: files in the folders given that are neither pictures nor scans.
        failures: the first 10,000, as (file, reason).
        seconds: spent by this process.
        settings: what must not change when a run is resumed: weights, thresholds, units.
        environment: versions, device, shard.
        list_digest: of the names of all inputs, those of other processes included.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    status: str = "running"
    stopped_by: str = ""
    started: str = ""
    inputs: int = 0
    predicted: int = 0
    failed: int = 0
    already_done: int = 0
    left_out: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    list_digest: str = ""
    caveats: list[str] = field(default_factory=list)

    @property
    def files_per_second(self) -> float | None:
        """Speed of this process, reading and writing included; None before the first file."""
        return self.predicted / self.seconds if self.predicted and self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "library": "ctmasknet",
            "status": self.status,
            "stopped_by": self.stopped_by,
            "started": self.started,
            "seconds": round(self.seconds, 3),
            "counts": {
                "inputs": self.inputs,
                "predicted": self.predicted,
                "already_done": self.already_done,
                "failed": self.failed,
                "left_out": self.left_out,
            },
            "files_per_second": self.files_per_second,
            "settings": self.settings,
            "environment": self.environment,
            "list_digest": self.list_digest,
            "failures": [{"file": file, "error": reason} for file, reason in self.failures],
            "caveats": self.caveats,
        }


def predict_files(
    predictor: Predictor,
    inputs: Iterable[PathLike],
    out: PathLike,
    *,
    units: str | None = None,
    format: Format = "files",
    slices: bool = False,
    spacing: tuple[float, float, float] | None = None,
    readers: int = READERS,
    shard: tuple[int, int] = (0, 1),
    restart: bool = False,
    annotations: PathLike | None = None,
    on_result: Callable[[FileResult], None] | None = None,
    on_start: Callable[[RunSummary], None] | None = None,
) -> RunSummary:
    """Predict files, folders and scans into `out`; run again after a kill, it goes on where it stopped.

    Args:
        predictor: its `batch_size` slices go through the models at once.
        inputs: slices, scans, folders (see `find_inputs`) and shell wildcards.
        out: folder for predictions.jsonl, run.json and the results per file.
        units, spacing: as `Predictor.volume` takes them.
        format: ``"files"`` also writes JSON and overlay of every slice; ``"jsonl"`` writes the lines alone (scans
            get their files all the same); ``"coco"`` also writes COCO results at the end.
        slices: take DICOM files in folders as single slices, not as scans.
        readers: threads that read ahead of the model.
        shard: (i, n): do every n-th file from the i-th on. `process_shard` takes it from torchrun's environment.
        restart: forget what is in `out` of an earlier run, and begin anew.
        annotations: COCO annotation JSON to take image ids from.
        on_result: called with every result, in order.
        on_start: called once the inputs are counted.

    Returns:
        The summary of this process.

    Raises:
        InputError: `out` cannot be written (full disk, permission): the run stops, and may be resumed.
        ConfigError: `out` holds a run with other settings, or is in use by another process.
    """
    rank, world = shard
    if not 0 <= rank < world:
        raise ConfigError(f"shard={rank}/{world}: the first number runs from 0 to the second minus 1")
    if readers < 1:
        raise ConfigError(f"readers={readers}: must be at least 1")
    if format not in ("files", "jsonl", "coco"):
        raise ConfigError(f"format={format!r}: use 'files', 'jsonl' or 'coco'")
    if restart and world > 1:
        raise ConfigError(f"several processes cannot restart together: delete {os.fspath(out)} first")
    folder = Path(out)
    summary = RunSummary(
        settings=_settings(predictor, units),
        environment=_environment(predictor, shard),
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        caveats=list(predictor.caveats),
    )
    if restart:
        _forget(folder)
    _require_same_settings(folder, summary.settings)
    ledger = Log(_part(folder, "predictions", shard, ".jsonl"), "file")
    clock = time.monotonic()
    try:
        work = _my_work(inputs, folder, slices, shard, summary)
        others = [path for path in _ledgers(folder) if path != ledger.path]
        done = ledger.finished | {line["file"] for line in read_logs(others, "file")}
        todo = [one for one in work if one.name not in done]
        summary.inputs, summary.already_done = len(work), len(work) - len(todo)
        _write_run(folder, summary, shard)
        if on_start is not None:
            on_start(summary)
        for result in _results(predictor, todo, folder, units, spacing, format, readers):
            if result.record is None:
                summary.failed += 1
                if len(summary.failures) < FAILURES_LISTED:
                    summary.failures.append((result.file, result.error))
            else:
                ledger.append(result.record)
                summary.predicted += 1
            summary.seconds = time.monotonic() - clock
            if on_result is not None:
                on_result(result)
        summary.status = "complete"
    except BaseException as error:
        summary.status, summary.stopped_by = "stopped", str(error) or type(error).__name__
        raise
    finally:
        summary.seconds = time.monotonic() - clock
        ledger.close()
        with contextlib.suppress(OutputError):  # a full disk has been reported; this file would not fit either
            _write_run(folder, summary, shard)
    _join(folder, summary, world)
    if format == "coco" and (folder / PREDICTIONS).exists() and _all_complete(folder, summary, world):
        write_coco_results(folder / PREDICTIONS, folder, annotations=annotations)
    return summary


def process_shard(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """(rank, number of processes) as torchrun and accelerate set them; (0, 1) without them."""
    environment = os.environ if environment is None else environment
    try:
        return int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    except ValueError:
        raise ConfigError("RANK and WORLD_SIZE in the environment must be numbers: unset them") from None


def process_device(environment: Mapping[str, str] | None = None) -> str | None:
    """The GPU of this process among those on its host; None without torchrun or without GPUs."""
    environment = os.environ if environment is None else environment
    if "LOCAL_RANK" not in environment or not torch.cuda.is_available():
        return None
    return f"cuda:{int(environment['LOCAL_RANK']) % torch.cuda.device_count()}"


# Inputs


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


# One file


def _results(
    predictor: Predictor,
    todo: list[Work],
    out: Path,
    units: str | None,
    spacing: tuple[float, float, float] | None,
    format: Format,
    readers: int,
) -> Iterator[FileResult]:
    """Read, predict and write: three stages with short queues between, in the order of `todo`."""

    def read(one: Work) -> Slice | Work | CTMaskNetError:
        if one.error:
            return InputError(one.error)
        try:
            if one.scan or is_scan(Path(one.name)):
                return one
            return read_slice(one.name, units=units)
        except CTMaskNetError as error:
            return error

    def predicted() -> Iterator[tuple[Work, Prediction | VolumePrediction | CTMaskNetError]]:
        reads = read_ahead(read, todo, threads=readers, depth=2 * max(predictor.batch_size, readers))
        for one, result in predictor.stream(reads):
            if isinstance(result, Prediction | CTMaskNetError):
                yield one, result
                continue
            try:  # a scan brings its own slices
                yield one, predictor.volume(one.name, units=units, spacing=spacing)
            except CTMaskNetError as error:
                yield one, error

    def write(pair: tuple[Work, Prediction | VolumePrediction | CTMaskNetError]) -> FileResult:
        one, result = pair
        if isinstance(result, CTMaskNetError):
            return FileResult(one.name, error=str(result))
        paths: dict[str, Path] = {}
        try:
            place = place_of(one.name)
            if isinstance(result, VolumePrediction):
                paths = result.save(out / place.parent, place.name or "scan")
                return FileResult(one.name, record={"file": one.name, "kind": "scan", **result.to_dict()}, paths=paths)
            if format == "files":
                paths["json"], paths["overlay"] = result.save(out / place.parent)
        except OutputError as error:
            if getattr(error.__cause__, "errno", None) not in _ONE_FILE_ONLY:
                raise
            return FileResult(one.name, error=str(error))
        return FileResult(one.name, record=_record(one.name, result), paths=paths)

    for _, written in read_ahead(write, predicted(), threads=WRITERS, depth=2 * WRITERS):
        yield written


def _record(name: str, prediction: Prediction) -> dict[str, Any]:
    """A slice's line in predictions.jsonl."""
    facts = prediction.to_dict()
    for lesion in facts["lesions"]:
        lesion["rle"] = {"size": lesion["rle"]["size"], "counts": compress_counts(lesion["rle"]["counts"])}
    # The RoI batch is in the file's own JSON; caveats are those of the run.
    return {
        "file": name,
        "kind": "slice",
        **{k: facts[k] for k in facts if k not in ("source", "roi_batch", "caveats")},
    }


# The run


def _my_work(
    inputs: Iterable[PathLike], out: Path, slices: bool, shard: tuple[int, int], summary: RunSummary
) -> list[Work]:
    """This process's share of the inputs; the digest of all of them goes into the summary."""
    rank, world = shard
    digest, mine, place = hashlib.sha256(), [], 0
    for one in find_inputs(inputs, slices=slices, out=out):
        if one.error == LEFT_OUT:
            summary.left_out += 1
            continue
        digest.update(one.name.encode("utf-8", "surrogateescape") + b"\0")
        if place % world == rank:
            mine.append(one)
        place += 1
    summary.list_digest = digest.hexdigest()
    return mine


def _settings(predictor: Predictor, units: str | None) -> dict[str, Any]:
    models = {"segmenter": predictor.segmenter, "classifier": predictor.classifier}
    return {
        **{
            slot: None if model is None else {"variant": model.variant.name, "sha256": _sha256(model.state_dict())}
            for slot, model in models.items()
        },
        "score_threshold": predictor.score_threshold,
        "nms_threshold": predictor.nms_threshold,
        "precision": predictor.precision,
        "units": units,
    }


def _sha256(state: Mapping[str, torch.Tensor]) -> str:
    """Of all values of a model, in float32, by sorted name: the same for a file in float16 and its float32 copy."""
    digest = hashlib.sha256()
    for key in sorted(state):
        values = state[key].detach().cpu()
        digest.update(key.encode())
        digest.update(np.ascontiguousarray((values.float() if values.is_floating_point() else values).numpy()).data)
    return digest.hexdigest()


def _environment(predictor: Predictor, shard: tuple[int, int]) -> dict[str, Any]:
    device = str(predictor.device)
    if predictor.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(predictor.device)})"
    return {
        "ctmasknet": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "host": platform.node(),
        "device": device,
        "batch_size": predictor.batch_size,
        "shard": list(shard),
    }


def _part(out: Path, kind: str, shard: tuple[int, int], suffix: str) -> Path:
    rank, world = shard
    if world == 1:
        return out / (PREDICTIONS if kind == "predictions" else RUN)
    return out / "parts" / f"{kind}-{rank}-of-{world}{suffix}"


def _ledgers(out: Path) -> list[Path]:
    return [out / PREDICTIONS, *sorted((out / "parts").glob("predictions-*.jsonl"))]


def _write_run(out: Path, summary: RunSummary, shard: tuple[int, int]) -> None:
    text = json.dumps(summary.to_dict(), indent=2, allow_nan=False) + "\n"
    write_files({_part(out, "run", shard, ".json"): text.encode("utf-8", "backslashreplace")})


def _runs(out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in (out / RUN, *sorted((out / "parts").glob("run-*.json"))):
        try:
            yield path, json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}). Choose another folder, or pass --restart.") from None


def _require_same_settings(out: Path, settings: dict[str, Any]) -> None:
    for path, before in _runs(out):
        stored = before.get("settings", {})
        differs = [key for key in settings if stored.get(key) != settings[key]]
        if differs and any(ledger.exists() and ledger.stat().st_size for ledger in _ledgers(out)):
            raise ConfigError(
                f"{path}: a run with another {' and '.join(differs)}. Choose another folder, or begin anew: --restart."
            )


def _forget(out: Path) -> None:
    try:
        for path in (out / PREDICTIONS, out / RUN, out / COCO_RESULTS, out / COCO_IMAGES):
            path.unlink(missing_ok=True)
        if (out / "parts").is_dir():
            shutil.rmtree(out / "parts")
    except OSError as error:
        raise OutputError(f"{error.filename}: cannot be removed ({error.strerror}): choose another folder") from error


def _parts_of(out: Path, world: int) -> list[dict[str, Any]]:
    """What the processes of this run say of themselves, those that have begun."""
    names = {_part(out, "run", (rank, world), ".json") for rank in range(world)}
    return [facts for path, facts in _runs(out) if path in names]


def _all_complete(out: Path, summary: RunSummary, world: int) -> bool:
    parts = _parts_of(out, world)
    return len(parts) == world and all(
        part["status"] == "complete" and part["list_digest"] == summary.list_digest for part in parts
    )


def _join(out: Path, summary: RunSummary, world: int) -> None:
    """Join the ledgers if this process is the last to finish; harmless if two are the last together."""
    if world == 1:
        if any((out / "parts").glob("predictions-*.jsonl")):  # of an interrupted run with several processes
            join_logs(_ledgers(out), out / PREDICTIONS, "file")
        return
    if not _all_complete(out, summary, world):
        return
    join_logs(_ledgers(out), out / PREDICTIONS, "file")
    parts = _parts_of(out, world)
    whole = dict(parts[0])
    whole["counts"] = {key: sum(part["counts"][key] for part in parts) for key in whole["counts"]}
    whole["counts"]["left_out"] = parts[0]["counts"]["left_out"]  # each counts all of them
    whole["failures"] = list(itertools.chain.from_iterable(part["failures"] for part in parts))[:FAILURES_LISTED]
    whole["seconds"] = max(part["seconds"] for part in parts)
    whole["files_per_second"] = sum(part["files_per_second"] or 0 for part in parts) or None
    whole["environment"] = {**whole["environment"], "shard": None, "processes": world}
    write_files({out / RUN: (json.dumps(whole, indent=2, allow_nan=False) + "\n").encode()})


# COCO results


def write_coco_results(
    predictions: PathLike, out: PathLike, *, annotations: PathLike | None = None
) -> tuple[Path, Path]:
    """Turn predictions.jsonl into COCO results, which pycocotools' ``loadRes`` reads; scans are left out.

    Args:
        predictions: the lines of a run.
        out: folder for coco_results.json (image_id, category_id, bbox, score, segmentation) and
            coco_images.json, which says what file an image_id stands for.
        annotations: COCO annotation JSON: image ids are those of its images of the same path or file name, and
            categories its own in the order of their ids. Without it ids count from 1 in the order of names, and a
            category is the label.

    Raises:
        DataError: the annotations cannot be read, or do not list a file that was predicted.
    """
    source = Path(predictions)
    names = sorted(line["file"] for line in _lines(source) if line["kind"] == "slice")
    ids: dict[str, int] = {name: number for number, name in enumerate(names, start=1)}
    categories: list[int] | None = None
    if annotations is not None:
        ids, categories = _ids_of(Path(annotations), names)
    images, results = [], []
    for line in _lines(source):
        if line["kind"] != "slice":
            continue
        height, width = line["image_size"]
        identifier = ids[line["file"]]
        images.append({"id": identifier, "file_name": line["file"], "height": height, "width": width})
        for lesion in line["lesions"]:
            x1, y1, x2, y2 = lesion["box"]
            results.append(
                {
                    "image_id": identifier,
                    "category_id": categories[lesion["label"] - 1] if categories else lesion["label"],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": lesion["score"],
                    "segmentation": lesion["rle"],
                }
            )
    paths = Path(out) / COCO_RESULTS, Path(out) / COCO_IMAGES
    write_files({paths[0]: json.dumps(results).encode(), paths[1]: json.dumps({"images": images}).encode()})
    return paths


def compress_counts(counts: list[int]) -> str:
    """Run lengths of COCO's uncompressed RLE -> its string form, which pycocotools decodes.

    From the third count on the difference to the count before last is stored; a number goes in groups of five
    bits, lowest first, a sixth bit says that more follow, and 48 makes each a printable character.
    """
    text = bytearray()
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            text.append(48 + bits + 32 * more)
    return text.decode("ascii")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:
        for line in stream:
            yield json.loads(line)


def _ids_of(annotations: Path, names: list[str]) -> tuple[dict[str, int], list[int]]:
    """Image id of each predicted file, and the categories in the order of labels."""
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        listed = {str(image["file_name"]): image["id"] for image in content["images"]}
        categories = sorted(category["id"] for category in content["categories"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{annotations}: not readable COCO annotations ({error!r})") from None
    by_name: dict[str, list[int]] = {}
    for file, identifier in listed.items():
        by_name.setdefault(Path(file).name, []).append(identifier)
    ids = {}
    for name in names:
        exact = [identifier for file, identifier in listed.items() if Path(name).as_posix().endswith("/" + file)]
        candidates = [listed[name]] if name in listed else by_name.get(Path(name).name, [])
        if len(candidates) != 1:
            candidates = exact
        if len(candidates) != 1:
            raise DataError(f"{annotations}: lists {len(candidates)} images named {Path(name).name}, of {name}")
        ids[name] = candidates[0]
    return ids, categories
