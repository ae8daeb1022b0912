"""Put folders of weights into the package and list them in its manifest; the last named of a variant is its default.

python tools/bundle_weights.py --tag provisional FOLDER [FOLDER ...]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from ctmasknet import CTMaskNetError
from ctmasknet.errors import WeightsError
from ctmasknet.weights.files import CARD_NAME, CONFIG_NAME, GOLDEN_NAME, WEIGHTS_NAME, sha256_of
from ctmasknet.weights.publish import check_folder

PACKAGE = Path(__file__).parents[1] / "ctmasknet" / "weights"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders as save_pretrained and training write them")
    parser.add_argument("--tag", required=True, help="which training the weights come from")
    options = parser.parse_args(arguments)
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
    """Copy a folder into the package; its manifest entry."""
    model = check_folder(folder)
    missing = [key for key in ("classes", "metrics", "license") if not model.metadata.get(key)]
    if missing:
        raise WeightsError(f"{folder}: config.json must state {', '.join(missing)}")
    target = PACKAGE / "bundled" / model.variant.name
    target.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, GOLDEN_NAME):
        shutil.copyfile(folder / name, target / name)
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
