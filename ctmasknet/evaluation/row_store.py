"""Rows of an evaluation, and on disk one line of JSON per slice, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctmasknet.errors import ConfigError, CTMaskNetError, DataError, import_extra

Row = dict[str, Any]
_SETTINGS = "settings.json"


def add_rows(rows: list[Row], more: Sequence[Row]) -> None:
    """Append rows of images that are not there yet; an `image_id` of None is never the same as another.

    Raises:
        DataError: an image is in both, or twice in `more`; `rows` stays as it was.
    """
    seen = {row["image_id"] for row in rows} - {None}
    for row in more:
        if row["image_id"] in seen:
            raise DataError(f"{row['image_id']}: evaluated twice; give every image once, under a unique image_id")
        if row["image_id"] is not None:
            seen.add(row["image_id"])
    rows.extend(more)


class RowStore:
    """A folder with `settings.json` and one `rows-RANK.jsonl` per process.

    Every line is written at once and a line that a kill cut short is dropped, so whatever is read is whole.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], rank: int) -> None:
        """Open or make the folder.

        Raises:
            ConfigError: it holds rows of an evaluation with other settings.
            CTMaskNetError: it cannot be written.
        """
        self.folder, self._path = folder, folder / f"rows-{rank}.jsonl"
        wanted = json.loads(json.dumps(settings))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = _read_settings(folder / _SETTINGS)
            if before is None and rank == 0:
                unfinished = folder / f".{_SETTINGS}.tmp"
                unfinished.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
                unfinished.replace(folder / _SETTINGS)
        except OSError as error:
            raise CTMaskNetError(f"{folder}: cannot be written ({error}); choose another folder") from None
        if before is not None and before != wanted:
            differ = sorted(key for key in {*before, *wanted} if before.get(key) != wanted.get(key))
            raise ConfigError(
                f"{folder}: holds an evaluation with another {', '.join(differ)}; choose another folder or delete it"
            )

    def read(self) -> dict[str, Row]:
        """Whole rows of all processes by image."""
        rows: dict[str, Row] = {}
        for path in sorted(self.folder.glob("rows-*.jsonl")):
            whole, _, _ = path.read_bytes().rpartition(b"\n")
            for line in whole.splitlines():
                row = json.loads(line)
                rows[row["image_id"]] = row
        return rows

    def start(self) -> None:
        """Cut off what a kill left unfinished; after every process has read."""
        if self._path.exists():
            whole, newline, _ = self._path.read_bytes().rpartition(b"\n")
            os.truncate(self._path, len(whole) + len(newline))

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows behind the others.

        Raises:
            CTMaskNetError: the disk is full or gone.
        """
        text = "".join(json.dumps(row) + "\n" for row in rows)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise CTMaskNetError(f"{self._path}: cannot be written ({error}); free space and run again") from None


@dataclass(frozen=True)
class Processes:
    """The processes that share an evaluation, by accelerate; alone, one.

    Attributes:
        rank, world: which of how many this is.
        gather: value -> list of the values of all processes.
        wait: returns when all processes have called it.
    """

    rank: int
    world: int
    gather: Callable[[Any], list[Any]]
    wait: Callable[[], None]


def processes(*, cpu: bool) -> Processes:
    """Join the processes that ``accelerate launch`` or ``torchrun`` started.

    Args:
        cpu: compute on the CPU even where there is a GPU.

    Raises:
        MissingExtraError: several processes, but accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes(0, 1, lambda value: [value], lambda: None)
    accelerate = import_extra("accelerate", "train", "evaluation in several processes")
    operations = import_extra("accelerate.utils", "train", "evaluation in several processes")
    state = accelerate.PartialState(cpu=cpu)
    return Processes(
        state.process_index,
        state.num_processes,
        lambda value: operations.gather_object([value]),
        state.wait_for_everyone,
    )


def _read_settings(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not readable JSON ({error}); delete the folder or choose another") from None
    return found if isinstance(found, dict) else {}
