"""Publish every trained variant found in some folders, one Hub repository each, and record what the Hub gave back in
the manifest: repository, commit, SHA-256.

    python tools/publish_hub.py --namespace OWNER --tag covid-ct runs/ --dry-run
    python tools/publish_hub.py --namespace OWNER --tag covid-ct runs/ --out ready/
    python tools/publish_hub.py --namespace OWNER --tag covid-ct ready/

With --out nothing is pushed: the folders are written there as they would be, and their hashes into the manifest's list
of what is prepared, which no user is offered; publishing them later takes them off it.

A repository is called OWNER/VARIANT-TAG. Folders below those named count if they hold model.safetensors and
config.json; of a run's best/ and last/, best/ counts. Every folder is checked before the first is pushed. The published
weights become the default of their variant, unless the same file is bundled: then its entry gains the repository. The
weights that docs/failures.png shows take it along, and their card shows it. Needs HF_TOKEN or `hf auth login`, and
metrics, classes and a licence in each config.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from ctmasknet import CTMaskNetError
from ctmasknet.errors import WeightsError
from ctmasknet.models import Model
from ctmasknet.output import write_files
from ctmasknet.weights.files import CONFIG_NAME, WEIGHTS_NAME, sha256_of
from ctmasknet.weights.hub import hub_source
from ctmasknet.weights.manifest import MANIFEST
from ctmasknet.weights.publish import FAILURES_NAME, check_folder, packed, push_folder

BUNDLED = MANIFEST.parent / "bundled"
FAILURES = Path(__file__).parents[1] / "docs" / FAILURES_NAME


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[BUNDLED], help="default: the bundled weights")
    parser.add_argument("--namespace", required=True, metavar="OWNER", help="account or organisation on the Hub")
    parser.add_argument("--tag", required=True, help="which training the weights come from, for example covid-ct")
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument(
        "--dry-run", action="store_true", help="check and say what would be pushed; ask the Hub nothing"
    )
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help="write folders ready to push here instead")
    parser.add_argument("--manifest", type=Path, default=MANIFEST, help="the file to update (default: the package's)")
    options = parser.parse_args(arguments)
    try:
        found = collect(options.folders, options.namespace, options.tag)
        for repository, (folder, model) in found.items():
            size = f"{(folder / WEIGHTS_NAME).stat().st_size / 1e6:.1f} MB"
            print(f"{repository}: {model.variant.name}, {size}, {model.metadata['license']}, {folder}")
        if options.dry_run:
            return 0
        for repository, (folder, model) in found.items():
            facts = {"variant": model.variant.name, "tag": options.tag}
            facts |= {key: model.metadata[key] for key in ("classes", "metrics", "license")}
            if options.out is not None:
                target = options.out / repository.split("/")[1]
                files = packed(folder, repository, failures_of(folder, model.variant.name))[1]
                write_files({target / name: content for name, content in files.items()})
                sha256, size = sha256_of(target / WEIGHTS_NAME), (target / WEIGHTS_NAME).stat().st_size
                record(options.manifest, facts | {"sha256": sha256, "bytes": size}, "prepared")
                print(f"ready to push: {target}")
                continue
            failures = failures_of(folder, model.variant.name)
            published = push_folder(folder, repository, private=options.private, failures=failures)
            facts |= {"sha256": published.sha256, "bytes": published.bytes}
            place = {"repository": published.repository, "revision": published.revision}
            record(options.manifest, facts | place, "weights")
            print(f"published {published}")
    except CTMaskNetError as error:
        print(f"publish_hub: {error}", file=sys.stderr)
        return 2
    return 0


def collect(folders: list[Path], namespace: str, tag: str) -> dict[str, tuple[Path, Model]]:
    """Repository -> folder and checked model, by variant.

    Raises:
        WeightsError: nothing found, a variant twice, damaged weights, or facts missing that the manifest needs.
    """
    candidates = sorted({config.parent for folder in folders for config in folder.rglob(CONFIG_NAME)})
    candidates = [c for c in candidates if (c / WEIGHTS_NAME).is_file()]
    candidates = [c for c in candidates if not (c.name == "last" and c.with_name("best") in candidates)]
    found: dict[str, tuple[Path, Model]] = {}
    for folder in candidates:
        model = check_folder(folder)
        missing = [key for key in ("classes", "metrics", "license") if not model.metadata.get(key)]
        if missing:
            raise WeightsError(f"{folder}: config.json says nothing of {', '.join(missing)}: save_pretrained(...) does")
        repository = f"{namespace}/{model.variant.name}-{tag}"
        if hub_source(repository) is None or not re.fullmatch(r"[\w.-]+", tag):
            raise WeightsError(f"{repository!r} is not a repository id: change --namespace or --tag")
        if repository in found:
            raise WeightsError(f"{folder} and {found[repository][0]}: both hold {model.variant.name}: name one")
        found[repository] = folder, model
    if not found:
        raise WeightsError(f"{', '.join(map(str, folders))}: no folder with {WEIGHTS_NAME} and {CONFIG_NAME}")
    return found


def failures_of(folder: Path, variant: str) -> bytes | None:
    """The picture of failures, if it was made with a folder's weights: it names their SHA-256."""
    with Image.open(FAILURES) as picture:
        shown = picture.info.get(variant)
    return FAILURES.read_bytes() if shown == sha256_of(folder / WEIGHTS_NAME) else None


def record(manifest: Path, entry: dict[str, Any], where: str) -> None:
    """Write a set of weights into a list of the manifest, ``"weights"`` (published) or ``"prepared"``."""
    known: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
    entries = known.setdefault(where, [])
    same = next((e for e in entries if e["variant"] == entry["variant"] and e["sha256"] == entry["sha256"]), None)
    if same is not None:
        same.update({key: value for key, value in entry.items() if key in ("repository", "revision")})
    else:
        known[where] = [entry, *(e for e in entries if (e["variant"], e["tag"]) != (entry["variant"], entry["tag"]))]
    if where == "weights":
        known["prepared"] = [e for e in known.get("prepared", []) if e["sha256"] != entry["sha256"]]
    manifest.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
