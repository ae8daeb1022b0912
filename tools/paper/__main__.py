"""Every table and figure of the paper, made from weights and data.

Prints the table (of a figure: the numbers behind it) and writes ITEM.md, ITEM.csv, ITEM.png, and for figures ITEM.pdf
and ITEM.svg. Table 1 and Figure 1 need no data; Figure 2 and contributions take phantoms if they get none.

    python tools/paper table1 -o out
    python tools/paper table2 --weights runs/a/best runs/b/best --data cncb/val -o out
    python tools/paper figure4 --weights ctmasknet_resnet18_t1 --data classes/val -o out
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a folder: its modules are those of the package `paper`, beside other tools
    sys.path.insert(0, str(Path(__file__).parents[1]))

from ctmasknet.errors import ConfigError, CTMaskNetError, MissingExtraError
from ctmasknet.evaluation.evaluate import Table
from ctmasknet.output import PathLike, require_writable
from paper import contributions, figure1, figure2, figure3, figure4, table1, table2, table3, table4, table5
from paper.drawing import save_figure, save_table, table_figure
from paper.request import Request

ITEMS = {
    module.__name__.removeprefix("paper."): module.make
    for module in (table1, table2, table3, table4, table5, figure1, figure2, figure3, figure4, contributions)
}
"""Name on the command line -> what makes it of a `Request`."""


def make(item: str, request: Request, out: PathLike, *, name: str | None = None) -> tuple[Table, list[Path]]:
    """Make a table or a figure of the paper and write it.

    Args:
        item: one of `ITEMS`.
        request: of what.
        out: folder; gets ITEM.md and ITEM.csv, and as ITEM.png the figure, or a picture of the table. Figures
            come as PDF and SVG too. Without matplotlib tables have no picture.
        name: of the files in place of `item`.

    Returns:
        The table and the files written.

    Raises:
        ConfigError: unknown item, or no data where some are needed.
        DataError, WeightsError, MissingExtraError: as `evaluate`.
    """
    if item not in ITEMS:
        raise ConfigError(f"{item!r} is not in the paper: use one of {', '.join(ITEMS)}")
    made = ITEMS[item](request)
    paths = save_table(made.table, out, name or item)
    if made.figure is not None:
        return made.table, paths + save_figure(made.figure, out, name or item)
    try:
        picture = table_figure(made.table)
    except MissingExtraError:
        return made.table, paths
    return made.table, paths + save_figure(picture, out, name or item, formats=("png",))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tools/paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "item",
        metavar="ITEM",
        help="table1 to table5, figure1 to figure4, or contributions (of every RoI of a slice to the class logits)",
    )
    parser.add_argument("--weights", nargs="+", default=(), metavar="MODEL", help="as MODEL of ctmasknet evaluate")
    parser.add_argument("--data", nargs="+", default=(), metavar="DIR", help="labelled slices; contributions: an image")
    parser.add_argument("-o", "--out", type=Path, default=Path("paper"), metavar="DIR", help="default: paper")
    parser.add_argument("--name", metavar="NAME", help="name of the files (default: the item's)")
    limit_help = "at most N slices (Tables 4, 5, Figure 4: of each class)"
    parser.add_argument("--limit", type=int, metavar="N", help=limit_help)
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default: 0)")
    parser.add_argument("--classes", choices=("merge", "both", "ggo"), help="lesion classes (default: the model's)")
    parser.add_argument("--rows", metavar="DIR", help="keep what was measured per slice here, to go on after a kill")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    options = parser.parse_args(arguments)
    request = Request(
        weights=tuple(options.weights),
        data=tuple(options.data),
        seed=options.seed,
        limit=options.limit,
        classes=options.classes,
        rows=options.rows,
        device=options.device,
    )
    try:
        require_writable(options.out / f"{options.name or options.item}.md")
        table, paths = make(options.item, request, options.out, name=options.name)
    except CTMaskNetError as error:
        print(f"paper: {error}", file=sys.stderr)
        return 2
    print(table)
    print("\n" + " ".join(str(path) for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
