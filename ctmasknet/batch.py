"""Many files through one `Predictor`: readers ahead of the model, a record that survives a kill, shards.

A run appends one line per finished file to ``predictions.jsonl``. A line is written in one piece after the file's
other results are in place, so a run killed at any moment loses nothing that has a line and repeats no line: run
again, it goes on where it stopped. Several processes share the work by the position of a file in the list of
inputs; each keeps a log of its own below ``parts/``, and the last to finish joins them.
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
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torchvision
from tqdm import tqdm

from ctmasknet.data.dicom_out import require_frames
from ctmasknet.data.layouts import slice_name
from ctmasknet.data.remote import as_path, is_folder, is_url, joined, walk
from ctmasknet.data.scans import NIFTI_SUFFIXES, is_dicom, is_scan, open_volume, read_ahead
from ctmasknet.data.slices import PICTURE_SUFFIXES, Slice, local, read_slice
from ctmasknet.errors import ConfigError, CTMaskNetError, InputError, as_value, import_extra
from ctmasknet.output import Log, OutputError, PathLike, csv_table, join_logs, json_bytes, read_logs, write_files
from ctmasknet.predictor import Predictor
from ctmasknet.registry import __version__
from ctmasknet.results import Keep, Prediction, VolumePrediction, counted

Format = Literal["files", "dicom", "jsonl", "coco"]

PREDICTIONS, RUN, SCANS = "predictions.jsonl", "run.json", "scans.csv"
COCO_RESULTS, COCO_IMAGES = "coco_results.json", "coco_images.json"
LEFT_OUT = "left out"
FAILURES_LISTED = 10_000
WRITERS = 2
READERS = 4
_ELSEWHERE = "Choose another folder, or delete this one to start again."
_ONE_FILE_ONLY = (errno.ENAMETOOLONG, errno.EISDIR)  # the next file may still be written


@dataclass(frozen=True)
class FileResult:
    """What became of one input.

    Attributes:
        source: its name as given or found.
        scan: whether it is one.
        error: why it could not be predicted, "" if it was.
        record: its line in predictions.jsonl; None with an error.
        paths: files written for it: of a slice first the overlay, of a scan first the mask.
    """

    source: str
    scan: bool = False
    error: str = ""
    record: dict[str, Any] | None = None
    paths: Sequence[Path] = ()


@dataclass
class RunSummary:
    """What a run did; `to_dict` is what run.json holds.

    Attributes:
        settings: what must not change when a run is resumed: weights, thresholds, units, spacing.
        environment: versions, device, shard.
        status: ``"running"``, ``"complete"``, or ``"stopped"`` with the reason in `stopped_by`.
        started: date and time, UTC.
        inputs: files of this process, the finished ones included.
        slices, scans: of them, predicted now.
        scan_slices, bad_slices: slices in those scans; of them, those that could not be used.
        failed, already_done: of the inputs.
        left_out: files in the folders given that are neither pictures nor scans.
        failures: the first 10,000, each a dictionary of source, error, and whether it is a scan.
        seconds: spent by this process.
        root: the folder that results lie relative to, as their inputs do; None for the current one.
        list_digest: of the names of all inputs, those of other processes included.
        caveats: what the weights admit of themselves.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    status: str = "running"
    stopped_by: str = ""
    started: str = ""
    inputs: int = 0
    slices: int = 0
    scans: int = 0
    scan_slices: int = 0
    bad_slices: int = 0
    failed: int = 0
    already_done: int = 0
    left_out: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    root: str | None = None
    list_digest: str = ""
    caveats: list[str] = field(default_factory=list)

    @property
    def predicted(self) -> int:
        """Inputs predicted now, slices and scans."""
        return self.slices + self.scans

    @property
    def files_per_second(self) -> float | None:
        """Speed of this process, reading and writing included; None before the first file."""
        return self.predicted / self.seconds if self.predicted and self.seconds else None

    @property
    def summary(self) -> str:
        """One line for people: "3 slices and 1 scan (40 slices) predicted, 2 done before, 1 failed; 12 s"."""
        done = [counted(self.slices, "slice")] if self.slices or not self.scans else []
        if self.scans:
            done.append(f"{counted(self.scans, 'scan')} ({counted(self.scan_slices, 'slice')})")
        rest = {"done before": self.already_done, "failed": self.failed}
        parts = [f"{' and '.join(done)} predicted", *(f"{count} {what}" for what, count in rest.items() if count)]
        if self.left_out:
            parts.append(f"{counted(self.left_out, 'file')} of other kinds left out")
        return f"{', '.join(parts)}; {self.seconds:.0f} s"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        facts = {"library": "ctmasknet", "summary": self.summary, **asdict(self)}
        counts = ("inputs", "slices", "scans", "scan_slices", "bad_slices", "already_done", "failed", "left_out")
        facts["counts"] = {name: facts.pop(name) for name in counts}
        facts["files_per_second"] = self.files_per_second
        return facts

    def add(self, result: FileResult) -> None:
        """Count one more result."""
        if result.record is None:
            self.failed += 1
            if len(self.failures) < FAILURES_LISTED:
                self.failures.append({"source": result.source, "error": result.error, "scan": result.scan})
        elif result.scan:
            self.scans += 1
            self.scan_slices += result.record["slices"]
            self.bad_slices += result.record["slices_failed"]
        else:
            self.slices += 1


def predict_files(
    predictor: Predictor,
    inputs: Iterable[PathLike],
    out: PathLike,
    *,
    names: PathLike | Sequence[str] | None = None,
    units: str | None = None,
    spacing: tuple[float, float, float] | None = None,
    series: str | None = None,
    keep: Keep = "all",
    format: Format = "files",
    slices: bool = False,
    shard: tuple[int, int] = (0, 1),
    progress: bool = False,
    on_result: Callable[[FileResult], None] | None = None,
) -> RunSummary:
    """Predict files, folders and scans into `out`; run again after a kill, it goes on where it stopped.

    Args:
        predictor: its `batch_size` slices go through the models at once.
        inputs: slices, scans, folders (see `find_inputs`), URLs of these, and shell wildcards. Files behind URLs are
            copied one by one, as they are read, and deleted.
        out: folder for predictions.jsonl, scans.csv (a row per scan), run.json and results per file (see `place_of`).
        names: only these of the inputs, by name without folder and picture suffix: a text file with one name per
            line, or a sequence of names. None: all.
        units, spacing, series, keep: as `Predictor.volume` takes them.
        format: ``"files"`` also writes JSON and overlay of every slice; ``"dicom"`` writes DICOM SEG and SR beside a
            scan's files, and takes DICOM scans only (extra ``dicom``); ``"jsonl"`` writes the lines alone (scans get
            their files all the same); ``"coco"`` also writes COCO results at the end.
        slices: take DICOM files in folders as single slices, not as scans.
        shard: (i, n): do every n-th file from the i-th on. `process_shard` takes it from torchrun's environment.
        progress: show a bar on a terminal.
        on_result: called with every result, in order.

    Returns:
        The summary of this process.

    Raises:
        InputError: `out` cannot be written (full disk, permission): the run stops, and may be resumed.
        ConfigError: `out` holds a run with other settings, or is in use by another process; score maps with another
            format than ``"files"``.
    """
    rank, world = shard
    if not 0 <= rank < world:
        raise ConfigError(f"shard={rank}/{world}: the first number runs from 0 to the second minus 1")
    if format not in get_args(Format):
        raise ConfigError(f"format={format!r}: use 'files', 'dicom', 'jsonl' or 'coco'")
    if format == "dicom":
        import_extra("highdicom", "dicom", "writing DICOM")
        if predictor.segmenter is None:
            raise ConfigError('format="dicom" writes lesions, but no model looks for them. Give a segmenter.')
    if predictor.score_map and format != "files":
        raise ConfigError(f'score_map=True: a map is a file per slice, which needs format="files", not {format!r}')
    folder = Path(out)
    summary = RunSummary(
        settings=_settings(predictor, format, units=units, spacing=spacing, series=series, keep=keep),
        environment=_environment(predictor, shard),
        started=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        caveats=list(predictor.caveats),
    )
    given = [os.fsdecode(name) for name in inputs]
    clock = time.monotonic()
    digest, work = hashlib.sha256(), []
    for place, one in enumerate(_chosen(find_inputs(given, slices=slices, out=folder), names, summary)):
        digest.update(one.name.encode("utf-8", "surrogateescape") + b"\0")
        if place % world == rank:
            work.append(one)
    summary.list_digest = digest.hexdigest()
    # A single slice or scan needs no record of what is done: it is predicted anew each time.
    several = len(work) > 1 or names is not None or world > 1 or format not in ("files", "dicom")
    with contextlib.ExitStack() as closing:
        log = None
        if several or any(path.exists() for path in _logs(folder)):
            log = closing.enter_context(Log(_part(folder, PREDICTIONS, shard)))
        done = set() if log is None else {line["source"] for line in read_logs(_logs(folder))}
        summary.root = common_root(given)
        if done:
            _go_on(folder, summary)
        todo = [one for one in work if one.name not in done]
        summary.inputs, summary.already_done = len(work), len(work) - len(todo)
        run = _part(folder, RUN, shard)
        write_files({run: json_bytes(summary.to_dict(), indent=2)})
        hidden = None if progress and rank == 0 else True  # None: shown on a terminal only
        bar = closing.enter_context(tqdm(total=len(work), initial=summary.already_done, unit="file", disable=hidden))
        reading = {"units": units, "spacing": spacing, "series": series}
        write = partial(_write, out=folder, root=summary.root, format=format)
        try:
            predicted = _predicted(predictor, todo, reading, keep, format, bar)
            for _, result in read_ahead(write, predicted, threads=WRITERS, depth=2 * WRITERS):
                if log is not None and result.record is not None:
                    log.append(result.record)
                summary.add(result)
                bar.update()
                if on_result is not None:
                    on_result(result)
            summary.status = "complete"
        except BaseException as error:
            summary.status, summary.stopped_by = "stopped", str(error) or type(error).__name__
            raise
        finally:
            summary.seconds = time.monotonic() - clock
            with contextlib.suppress(OutputError):  # a full disk has been reported; this file would not fit either
                write_files({run: json_bytes(summary.to_dict(), indent=2)})
    if (series is not None or spacing is not None) and summary.slices and not summary.scans:
        warnings.warn("series and spacing are for scans: these were single slices, read without them", stacklevel=2)
    if _join(folder, summary, world):
        if log is not None:
            _write_scan_table(folder)
        if format == "coco":
            _write_coco_results(folder)
    return summary


def process_shard() -> tuple[int, int]:
    """(rank, number of processes) as torchrun and accelerate set them; (0, 1) without them."""
    try:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise ConfigError("RANK and WORLD_SIZE in the environment must be numbers: unset them") from None


def process_device() -> str | None:
    """The GPU of this process among those on its host; None without torchrun or without GPUs."""
    if "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


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
    pattern (``**`` goes into subfolders); a URL is none. Folders without a slice come out with an `error`, files of
    other kinds in folders with the error ``"left out"``.
    """
    seen: set[str] = set()
    avoid = None if out is None else os.path.realpath(out)
    for given in inputs:
        for one in _expand(os.fsdecode(given), slices, avoid):
            identity = one.name if one.error or is_url(one.name) else os.path.realpath(one.name)
            if identity not in seen:
                seen.add(identity)
                yield one


def _expand(name: str, slices: bool, avoid: str | None) -> Iterator[Work]:
    if "\0" in name:
        yield Work(name, error=f"{name}: no file name holds a NUL character. Correct the list.")
    elif is_url(name):
        yield from _expand_url(name, slices)
    elif os.path.isdir(name):  # noqa: PTH112  millions of times
        yield from _search(name, slices, avoid)
    elif glob.has_magic(name) and not os.path.lexists(name):
        matches = sorted(glob.glob(name, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
        if not matches:
            yield Work(name, error=f"{name}: no file matches. Check the pattern, and quote it.")
        for match in matches:
            if avoid is None or not Path(os.path.realpath(match)).is_relative_to(avoid):
                yield from _search(match, slices, avoid) if Path(match).is_dir() else [Work(match)]
    else:
        yield Work(name, scan=name.lower().endswith(NIFTI_SUFFIXES))


def _expand_url(name: str, slices: bool) -> Iterator[Work]:
    path = as_path(name).lower()
    try:
        # A name that tells saves a request to the server, of which a long list has many.
        if not path.endswith((*PICTURE_SUFFIXES, *NIFTI_SUFFIXES, ".dcm")) and is_folder(name):
            yield from _search(name, slices, None)
        else:
            yield Work(name, scan=path.endswith(NIFTI_SUFFIXES))
    except CTMaskNetError as error:
        yield Work(name, error=str(error))


def _search(root: str, slices: bool, avoid: str | None) -> Iterator[Work]:
    visited: set[str] = set()
    problems: list[OSError] = []
    found = False
    remote = is_url(root)
    join = joined if remote else os.path.join
    for folder, below, files in walk(root) if remote else os.walk(root, followlinks=True, onerror=problems.append):
        identity = folder if remote else os.path.realpath(folder)
        if identity in visited or identity == avoid:
            below.clear()
            continue
        visited.add(identity)
        below[:] = sorted(name for name in below if not name.startswith("."))
        works, other = [], []
        for file in sorted(name for name in files if not name.startswith(".")):
            path = join(folder, file)  # keeps "./" and trailing parts as given
            if file.lower().endswith(NIFTI_SUFFIXES):
                if not file.lower().endswith(".img"):  # its header is the one to open
                    works.append(Work(path, scan=True))
            elif file.lower().endswith(PICTURE_SUFFIXES) or (slices and is_dicom(path)):
                works.append(Work(path))
            else:
                other.append(path)
        if not slices and any(map(is_dicom, other)):
            works.append(Work(folder, scan=True))
            other = []
        found = found or bool(works)
        yield from works
        yield from (Work(path, error=LEFT_OUT) for path in other)
    for problem in problems:
        yield Work(str(problem.filename), error=f"{problem.filename}: cannot be listed ({problem.strerror})")
    if not found and not problems:
        yield Work(root, error=f"{root}: no readable slices in this folder. Give one with pictures, DICOM or NIfTI.")


def read_list(path: PathLike) -> list[str]:
    """The names in a text file (UTF-8), one per line; empty lines are skipped.

    Raises:
        InputError: it cannot be read.
    """
    file = local(path)
    try:
        lines = Path(file).read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise InputError(f"{path}: the list cannot be read ({error.strerror}). Check the path.") from error
    return [line for line in lines if line.strip()]


def place_of(name: str, root: str | None = None) -> Path:
    """Where results of a file go below the output folder: its path from `root`, or from here."""
    return Path(os.path.abspath(as_path(name))).relative_to(root or Path.cwd())  # noqa: PTH100  links stay as they are


def common_root(inputs: Iterable[str]) -> str | None:
    """The folder that all inputs lie in; None if it is the current one, where all lie that are given relative to it.

    Raises:
        ConfigError: there is none: drives differ.
    """
    here, parents = Path.cwd(), set()
    for name in map(as_path, inputs):
        below = not Path(name).is_absolute() and not os.path.normpath(name).startswith("..")
        parent = here if below else Path(os.path.abspath(name)).parent  # noqa: PTH100
        while glob.has_magic(str(parent)) and not os.path.lexists(parent):  # a pattern: the folder it begins with
            parent = parent.parent
        parents.add(parent)
    try:
        return None if parents <= {here} else os.path.commonpath(parents)
    except ValueError:
        raise ConfigError("the inputs lie on several drives: predict those of one drive at a time") from None


# One file


def _predicted(
    predictor: Predictor,
    todo: list[Work],
    reading: Mapping[str, Any],
    keep: Keep,
    format: Format,
    bar: Any,
) -> Iterator[tuple[Work, Prediction | VolumePrediction | CTMaskNetError]]:
    """Read ahead and predict, in the order of `todo`."""

    def read(one: Work) -> Slice | Work | CTMaskNetError:
        if one.error:
            return InputError(one.error)
        try:
            if one.scan:
                return one
            file = local(one.name)
            with file.naming():
                if is_scan(Path(file)):
                    return one
            if format == "dicom":
                return InputError(f"{one.name}: not a scan. DICOM SEG and SR need the folder with its series.")
            return read_slice(file, units=reading["units"])
        except CTMaskNetError as error:
            return as_value(error)

    def show(done: int, total: int) -> None:
        bar.set_postfix_str(f"slice {done} of {total}" if done < total else "")

    reads = read_ahead(read, todo, threads=READERS, depth=2 * max(predictor.batch_size, READERS))
    for one, result in predictor.stream(reads):
        if isinstance(result, Prediction | CTMaskNetError):
            yield one, result
            continue
        one = one._replace(scan=True)
        try:  # it brings its own slices
            volume = open_volume(one.name, **reading)
            if format == "dicom":
                require_frames(volume)
            yield one, predictor.volume(volume, keep=keep, progress=show)
        except CTMaskNetError as error:
            yield one, error


def _write(
    pair: tuple[Work, Prediction | VolumePrediction | CTMaskNetError], *, out: Path, root: str | None, format: Format
) -> FileResult:
    one, result = pair
    if isinstance(result, CTMaskNetError):
        return FileResult(one.name, one.scan, error=str(result))
    paths: list[Path] = []
    place = place_of(one.name, root)
    try:
        if isinstance(result, VolumePrediction):
            paths = result.save(out / place.parent, place.name or None, dicom=format == "dicom")
        elif format == "files":
            paths = result.save(out / place.parent, place.name or None)
    except InputError as error:
        if isinstance(error, OutputError) and getattr(error.__cause__, "errno", None) not in _ONE_FILE_ONLY:
            raise
        return FileResult(one.name, one.scan, error=str(error))
    record = {**result.to_dict(), "source": one.name, "kind": "scan" if one.scan else "slice"}
    del record["caveats"]  # those of the run
    return FileResult(one.name, one.scan, record=record, paths=paths)


# The run


def _chosen(found: Iterable[Work], names: PathLike | Sequence[str] | None, summary: RunSummary) -> Iterator[Work]:
    """Of the inputs found those that are named, and the names that none has."""
    listed = read_list(names) if isinstance(names, str | os.PathLike) else names or ()
    missing = {slice_name(as_path(name)): name for name in listed}
    wanted = set(missing)
    for one in found:
        name = slice_name(as_path(one.name))
        if one.error == LEFT_OUT:
            summary.left_out += 1
        elif names is None or one.error or name in wanted:
            missing.pop(name, None)
            yield one
    for name in missing.values():
        yield Work(name, error=f"{name}: listed in names, but not among the inputs. Correct the list.")


def _settings(predictor: Predictor, format: Format, **reading: Any) -> dict[str, Any]:
    names = ("score_threshold", "nms_threshold", "precision", "score_map")
    facts = {**predictor.models, **{name: getattr(predictor, name) for name in names}}
    files = {"file_per_slice": format == "files", "dicom": format == "dicom"}
    return json.loads(json.dumps({**facts, **files, **reading}))  # as run.json has them


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


def _part(out: Path, name: str, shard: tuple[int, int]) -> Path:
    """Where this process writes what one alone writes to `name`."""
    (rank, world), file = shard, out / name
    return file if world == 1 else out / "parts" / f"{file.stem}-{rank}-of-{world}{file.suffix}"


def _logs(out: Path) -> list[Path]:
    return [out / PREDICTIONS, *sorted((out / "parts").glob("predictions-*.jsonl"))]


def _runs(out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in (out / RUN, *sorted((out / "parts").glob("run-*.json"))):
        try:
            yield path, json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}). Choose another folder.") from None


def _go_on(out: Path, summary: RunSummary) -> None:
    """See that the run in `out` has the same settings. Its results keep their place, further up if it began there."""
    for path, before in _runs(out):
        began, stored = before.get("root"), before.get("settings", {})
        differs = [key for key, value in summary.settings.items() if stored.get(key) != value]
        if began and summary.root and Path(summary.root).is_relative_to(began):
            summary.root = began
        if differs:
            raise ConfigError(f"{path}: a run with another {' and '.join(differs)}. {_ELSEWHERE}")
        if began != summary.root:
            below = began or "the current folder"
            raise ConfigError(f"{path}: a run of files below {below}, where these are not. {_ELSEWHERE}")


def _join(out: Path, summary: RunSummary, world: int) -> bool:
    """Whether all processes have finished; the last joins the logs, which is harmless if two are the last together."""
    names = {_part(out, RUN, (rank, world)) for rank in range(world)}
    parts = [facts for path, facts in _runs(out) if path in names and facts["list_digest"] == summary.list_digest]
    if [part["status"] for part in parts] != ["complete"] * world:
        return False
    if len(_logs(out)) > 1:  # also with one process, after an interrupted run of several
        join_logs(_logs(out), out / PREDICTIONS)
    if world > 1:
        whole = dict(parts[0])
        whole["counts"] = {key: sum(part["counts"][key] for part in parts) for key in whole["counts"]}
        whole["counts"]["left_out"] = parts[0]["counts"]["left_out"]  # each counts all of them
        whole["failures"] = list(itertools.chain.from_iterable(part["failures"] for part in parts))[:FAILURES_LISTED]
        whole["seconds"] = max(part["seconds"] for part in parts)
        whole["files_per_second"] = sum(part["files_per_second"] or 0 for part in parts) or None
        whole["environment"] = {**whole["environment"], "shard": None, "processes": world}
        write_files({out / RUN: json_bytes(whole, indent=2)})
    return True


def _write_scan_table(out: Path) -> None:
    """scans.csv: a row per scan, its figures and what made them; of one that failed, why. None without scans."""
    run = json.loads((out / RUN).read_text(encoding="utf-8"))
    lines = [line for line in read_logs([out / PREDICTIONS]) if line["kind"] == "scan"]
    failed = [one for one in run["failures"] if one["scan"]]
    common = {"models": run["settings"], "version": run["environment"]["ctmasknet"]}
    lines += [{"source": one["source"], "problems": [one["error"]], **common} for one in failed]
    if lines:
        write_files({out / SCANS: csv_table(map(_scan_row, lines)).encode("utf-8", "backslashreplace")})


def _scan_row(line: Mapping[str, Any]) -> dict[str, Any]:
    names = ("source", "slices", "slices_failed", "slices_with_lesions", "lesion_ml", "units", "score_threshold")
    row = {name: line.get(name) for name in names}
    row["lesions"] = len(line["lesions"]) if line.get("has_segmentation") else None
    row |= line.get("involvement") or {}
    row |= {f"{name}_ml": ml for name, ml in (line.get("lesion_ml_by_class") or {}).items()}
    row |= {f"share_{name}": share for name, share in (line.get("class_shares") or {}).items()}
    row |= {f"spacing_{axis}_mm": mm for axis, mm in zip("xyz", line.get("spacing_mm", [None] * 3), strict=True)}
    row["problems"] = " | ".join(line["problems"])
    for slot in ("segmenter", "classifier"):
        model = line["models"][slot] or {}
        row |= {slot: model.get("variant"), f"{slot}_sha256": model.get("sha256")}
    return {**row, "version": line["version"]}


def _write_coco_results(out: Path) -> None:
    """The slices of predictions.jsonl as COCO results, which pycocotools' ``loadRes`` reads.

    coco_images.json says what file an image_id of coco_results.json stands for: they count from 1 by name.
    A category is the label.
    """
    lines = [line for line in read_logs([out / PREDICTIONS]) if line["kind"] == "slice"]
    images, results = [], []
    for image_id, line in enumerate(sorted(lines, key=lambda line: line["source"]), start=1):
        height, width = line["image_size"]
        images.append({"id": image_id, "file_name": line["source"], "height": height, "width": width})
        for lesion in line["lesions"]:
            x1, y1, x2, y2 = lesion["box"]
            what = {"image_id": image_id, "category_id": lesion["label"], "score": lesion["score"]}
            results.append({**what, "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": lesion["rle"]})
    write_files({out / COCO_RESULTS: json_bytes(results), out / COCO_IMAGES: json_bytes({"images": images})})
