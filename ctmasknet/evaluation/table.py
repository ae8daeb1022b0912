"""A table that prints itself: aligned text, Markdown, CSV."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ctmasknet.errors import CTMaskNetError

MISSING = "N/A"


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Attributes:
        title: one line.
        columns: name and format specification of each, for example ``("AP@0.5", ".4f")``; ``"s"`` for text.
        rows: values, None where there is none (printed "N/A"); text in a column of numbers stays as it is.
        notes: sentences below the table.
    """

    title: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Any, ...], ...]
    notes: tuple[str, ...] = ()

    def cells(self) -> list[list[str]]:
        """Formatted values, without the header."""
        return [
            [_formatted(value, spec) for value, (_, spec) in zip(row, self.columns, strict=True)] for row in self.rows
        ]

    def markdown(self) -> str:
        """GitHub's table syntax under the title, notes below."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(name for name, _ in self.columns) + " |"]
        lines.append("| " + " | ".join("---" if spec == "s" else "---:" for _, spec in self.columns) + " |")
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.cells()]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Unrounded values; empty where there is none."""
        stream = StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([name for name, _ in self.columns])
        writer.writerows([["" if value is None else value for value in row] for row in self.rows])
        return stream.getvalue()

    def save(self, folder: str | Path, name: str) -> tuple[Path, Path]:
        """Write ``name.md`` and ``name.csv`` into `folder`, which is made if missing.

        Raises:
            CTMaskNetError: they cannot be written.
        """
        markdown, values = Path(folder) / f"{name}.md", Path(folder) / f"{name}.csv"
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            markdown.write_text(self.markdown(), encoding="utf-8")
            values.write_text(self.csv(), encoding="utf-8")
        except OSError as error:
            raise CTMaskNetError(f"{folder}: cannot be written ({error}); choose another folder") from None
        return markdown, values

    def __str__(self) -> str:
        header = [name for name, _ in self.columns]
        cells = self.cells()
        widths = [max(len(row[index]) for row in [header, *cells]) for index in range(len(header))]

        def line(row: list[str]) -> str:
            aligned = [
                cell.ljust(width) if spec == "s" else cell.rjust(width)
                for cell, width, (_, spec) in zip(row, widths, self.columns, strict=True)
            ]
            return "  ".join(aligned).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join(
            [self.title, "", line(header), rule, *map(line, cells), *([""] if self.notes else []), *self.notes]
        )


def _formatted(value: Any, spec: str) -> str:
    if value is None:
        return MISSING
    return str(value) if isinstance(value, str) else format(value, spec)
