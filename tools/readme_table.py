"""Write the table of variants in README.md and docs/models.md from registry, manifest and benchmark; --check compares.

python tools/readme_table.py
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from ctmasknet.registry import VARIANTS, Variant
from ctmasknet.weights.manifest import ManifestEntry, manifest

ROOT = Path(__file__).parents[1]
SPEED = ROOT / "docs" / "tables" / "benchmark-predict.csv"  # of tools/benchmark.py predict
PAGES = (ROOT / "README.md", ROOT / "docs" / "models.md")
BEGIN, END = "<!-- variants: tools/readme_table.py -->", "<!-- end of variants -->"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page is not up to date")
    options = parser.parse_args(arguments)
    stale = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        updated = f"{before}{BEGIN}\n\n{table()}\n{END}{after}"
        if updated == text:
            continue
        stale += 1
        if options.check:
            print(f"{page.name}: the table of variants is not up to date: python tools/readme_table.py")
        else:
            page.write_text(updated, encoding="utf-8")
    return int(options.check and stale > 0)


def table() -> str:
    """Two Markdown tables, segmenters and classifiers; ours and the paper's figures in columns of their own."""
    with SPEED.open(encoding="utf-8", newline="") as stream:
        speed = {row["variant"]: float(row["Predictor, ms"]) for row in csv.DictReader(stream)}
    entries = {entry.variant: entry for entry in reversed(manifest())}
    segmenters = ["| segmenter | values | ms | weights: AP@0.5 · Dice | paper: parameters | paper: AP@0.5 · mAP |"]
    classifiers = [
        "| classifier | values | ms | weights: sensitivity | paper: parameters | paper: COVID-19 · overall |"
    ]
    rule = "| --- | ---: | ---: | --- | ---: | --- |"
    segmenters.append(rule)
    classifiers.append(rule)
    for variant in VARIANTS.values():
        rows = segmenters if variant.task == "segmentation" else classifiers
        rows.append(_row(variant, speed[variant.name], entries.get(variant.name)))
    return "\n".join([*segmenters, "", *classifiers]) + "\n"


def _row(variant: Variant, milliseconds: float, entry: ManifestEntry | None) -> str:
    paper = variant.paper
    ours = "–"
    if variant.task == "segmentation":
        reported = f"{paper.ap50:.3f} · {paper.ap:.3f}"
        if entry is not None:
            ours = f"{entry.tag}: {entry.metrics['ap50']:.3f} · {entry.metrics['dice_pooled']:.3f}"
    else:
        assert paper.sensitivity is not None  # every classifier's row in the registry has it
        reported = f"{paper.sensitivity[2]:.2%} · {paper.accuracy:.2%}"
        if entry is not None:
            rates = [entry.metrics[f"sensitivity_{name}"] for name in entry.classes]
            ours = f"{entry.tag}: " + " / ".join(f"{rate:.2f}" for rate in rates)
    values = f"{variant.num_values / 1e6:.2f}M"
    return (
        f"| `{variant.name}` | {values} | {milliseconds:.0f} | {ours} | {paper.parameters_millions:.2f}M | {reported} |"
    )


if __name__ == "__main__":
    sys.exit(main())
