"""How figures look, and how they are written (extra ``plots``).

Colours are Okabe and Ito's, which colour-blind people tell apart; where two things must be told apart in grey they
also differ in lightness, hatching or shape.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from ctmasknet.errors import import_extra
from ctmasknet.evaluation import contributions
from ctmasknet.evaluation.evaluate import Table
from ctmasknet.output import csv_text, write_files

ORANGE, SKY, GREEN, BLUE, VERMILLION = contributions.FOR, contributions.AGAINST, "#009E73", "#0072B2", "#D55E00"
INK, FAINT = "#222222", "#8A8A8A"

CLASS_STYLE = {
    "covid": (VERMILLION, "///", "o"),
    "pneumonia": (SKY, "...", "s"),
    "control": ("#BBBBBB", "", "^"),
}
"""Colour, hatching and marker of an image class."""

_OTHER_STYLES = ((GREEN, "xx", "D"), (ORANGE, "\\\\", "v"), (BLUE, "--", "P"))
FONT = contributions.FONT | {"svg.fonttype": "none", "pdf.fonttype": 42, "hatch.linewidth": 0.6}


def save_figure(
    figure: Any, folder: str | Path, name: str, *, formats: Sequence[str] = ("pdf", "svg", "png"), dpi: int = 140
) -> list[Path]:
    """Write a figure, by default as PDF and SVG (vector) and PNG.

    Raises:
        OutputError: it cannot be written.
    """
    matplotlib = matplotlib_of()

    def writer(suffix: str) -> Callable[[BinaryIO], None]:
        # No dates: the same figure gives the same file.
        when = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(suffix)
        return lambda stream: figure.savefig(stream, format=suffix, dpi=dpi, metadata=when)

    with matplotlib.rc_context(FONT):
        return write_files({Path(folder) / f"{name}.{suffix}": writer(suffix) for suffix in formats})


def save_table(table: Table, folder: str | Path, name: str) -> list[Path]:
    """Write ``name.md``, and ``name.csv`` with unrounded values (empty where there is none).

    Raises:
        OutputError: they cannot be written.
    """
    values = csv_text([[column for column, _ in table.columns], *table.rows])
    contents = {"md": f"{table}\n", "csv": values}
    return write_files({Path(folder) / f"{name}.{kind}": text.encode() for kind, text in contents.items()})


def table_figure(table: Table) -> Any:
    """A `Table` as a picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = matplotlib_of()
    header = [name for name, _ in table.columns]
    cells = table.cells()
    widths = [
        max(len(line) for row in [_wrapped(header), *cells] for line in row[i].split("\n")) for i in range(len(header))
    ]
    lines = 2 if any("\n" in name for name in _wrapped(header)) else 1
    letters = sum(widths) + 2 * len(widths)
    notes = [line for note in table.notes for line in textwrap.wrap(note, max(60, round(1.05 * letters)))]
    count = len(cells) + lines + 2.5 + 0.8 * len(notes)
    height = 0.19 * count
    with matplotlib.rc_context(FONT):
        figure = matplotlib.figure.Figure(figsize=(max(4.0, 0.072 * sum(widths) + 0.16 * len(widths)), height))
        axis = figure.add_axes((0.01, 0.01, 0.98, 0.98))
        axis.axis("off")
        axis.set(xlim=(0, letters), ylim=(count, 0))
        axis.text(0, 0.6, table.title, fontsize=8.5, fontweight="bold", va="center")
        left = 0.0
        for index, (name, width) in enumerate(zip(_wrapped(header), widths, strict=True)):
            text = table.columns[index][1] == "s"
            x, align = (left, "left") if text else (left + width, "right")
            axis.text(x, 1.4 + lines / 2, name, fontsize=7, ha=align, va="center", fontweight="bold", linespacing=1.0)
            for row, values in enumerate(cells):
                axis.text(x, row + lines + 2, values[index], fontsize=7, ha=align, va="center")
            left += width + 2
        for row, line in enumerate(notes):
            y = len(cells) + lines + 2.1 + 0.8 * row
            axis.text(0, y, line, fontsize=6, ha="left", va="center", color=INK)
        axis.plot([0, letters], [1.05, 1.05], color=INK, linewidth=0.9)
        axis.plot([0, letters], [lines + 1.5, lines + 1.5], color=INK, linewidth=0.5)
    return figure


def matplotlib_of() -> ModuleType:
    """matplotlib, with the parts that figures need."""
    matplotlib = import_extra("matplotlib", "plots", "drawing figures")
    for part in ("figure", "patches", "lines", "patheffects", "ticker"):
        import_extra(f"matplotlib.{part}", "plots", "drawing figures")
    return matplotlib


def style_of(name: str) -> tuple[str, str, str]:
    """Colour, hatching and marker of an image class, whatever its name."""
    return CLASS_STYLE.get(name, _OTHER_STYLES[sum(name.encode()) % len(_OTHER_STYLES)])


def _wrapped(header: Sequence[str]) -> list[str]:
    """Long column names on two lines, broken in the middle."""
    wrapped = []
    for name in header:
        gaps = [index for index, letter in enumerate(name) if letter == " "]
        if len(name) > 12 and gaps:
            middle = min(gaps, key=lambda index: abs(index - len(name) / 2))
            name = f"{name[:middle]}\n{name[middle + 1 :]}"
        wrapped.append(name)
    return wrapped
