"""Put folders of weights into the package and list them in its manifest; the last named of a variant is its default.

python tools/bundle_weights.py --tag provisional FOLDER [FOLDER ...]
python tools/bundle_weights.py      write the cards of the weights in the package anew
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ctmasknet import CTMaskNetError
from ctmasknet.errors import WeightsError
from ctmasknet.output import write_files
from ctmasknet.registry import get_variant
from ctmasknet.weights.files import (
    CARD_NAME,
    CONFIG_NAME,
    GOLDEN_NAME,
    INT8_NAME,
    WEIGHTS_NAME,
    read_weights,
    sha256_of,
)
from ctmasknet.weights.publish import check_folder, model_card

PACKAGE = Path(__file__).parents[1] / "ctmasknet" / "weights"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders as save_pretrained and training write them")
    parser.add_argument("--tag", help="which training the weights come from")
    options = parser.parse_args(arguments)
    if options.folders and not options.tag:
        parser.error("--tag says which training the weights come from")
    for card in () if options.folders else PACKAGE.glob(f"bundled/*/{CARD_NAME}"):
        stored = read_weights(card.parent)
        card.write_text(model_card(get_variant(stored.variant or ""), stored.metadata))
    manifest = PACKAGE / "manifest.json"
    known: dict[str, Any] = json.loads(manifest.read_text()) if manifest.exists() else {}
    entries: list[dict[str, Any]] = known.get("weights", [])
    try:
        for folder in options.folders:
            entry = bundle(folder, options.tag)
            entries = [entry] + [e for e in entries if e["variant"] != entry["variant"]]
    except CTMaskNetError as error:
        print(f"bundle_weights: {error}", file=sys.stderr)
        return 2
    manifest.write_text(json.dumps(known | {"weights": entries}, indent=2) + "\n")
    return 0


def bundle(folder: Path, tag: str) -> dict[str, Any]:
    """Copy a folder into the package, its card as `model_card` writes it now; its manifest entry."""
    model = check_folder(folder)
    missing = [key for key in ("classes", "metrics", "license") if not model.metadata.get(key)]
    if missing:
        raise WeightsError(f"{folder}: config.json must state {', '.join(missing)}")
    target = PACKAGE / "bundled" / model.variant.name
    names = (WEIGHTS_NAME, CONFIG_NAME, GOLDEN_NAME, *([INT8_NAME] if model.int8_network else []))
    contents = {target / name: (folder / name).read_bytes() for name in names}
    write_files(contents | {target / CARD_NAME: model_card(model.variant, model.metadata).encode()})
    file = target / WEIGHTS_NAME
    return {
        "variant": model.variant.name,
        "tag": tag,
        "file": file.relative_to(PACKAGE).as_posix(),
        "sha256": sha256_of(file),
        "bytes": file.stat().st_size,
        **{key: model.metadata[key] for key in ("classes", "metrics", "license")},
    }


if __name__ == "__main__":
    sys.exit(main())
