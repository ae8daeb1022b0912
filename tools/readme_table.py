"""Write the table of variants in README.md from the registry and the manifest; --check only compares.

python tools/readme_table.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ctmasknet.registry import VARIANTS, Variant
from ctmasknet.weights.manifest import ManifestEntry, manifest

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- variants: tools/readme_table.py -->", "<!-- end of variants -->"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if README.md is not up to date")
    options = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    updated = f"{before}{BEGIN}\n{table()}{END}{after}"
    if options.check:
        if updated != text:
            print("README.md: the table of variants is not up to date: python tools/readme_table.py")
        return int(updated != text)
    README.write_text(updated, encoding="utf-8")
    return 0


def table() -> str:
    """Two Markdown tables, segmenters and classifiers; ours and the paper's figures in columns of their own."""
    entries = {entry.variant: entry for entry in reversed(manifest())}
    segmenters = ["| segmenter | values | weights: AP@0.5 · Dice | paper: parameters | paper: AP@0.5 · mAP |"]
    classifiers = ["| classifier | values | weights: sensitivity | paper: parameters | paper: COVID-19 · overall |"]
    rule = "| --- | ---: | --- | ---: | --- |"
    segmenters.append(rule)
    classifiers.append(rule)
    for variant in VARIANTS.values():
        rows = segmenters if variant.task == "segmentation" else classifiers
        rows.append(_row(variant, entries.get(variant.name)))
    return "\n".join([*segmenters, "", *classifiers]) + "\n"


def _row(variant: Variant, entry: ManifestEntry | None) -> str:
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
    return f"| `{variant.name}` | {values} | {ours} | {paper.parameters_millions:.2f}M | {reported} |"


if __name__ == "__main__":
    sys.exit(main())
