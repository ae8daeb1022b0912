"""The lines of a run as COCO results, which every COCO evaluation reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctmasknet.errors import DataError
from ctmasknet.output import write_files

PathLike = str | os.PathLike[str]

COCO_RESULTS, COCO_IMAGES = "coco_results.json", "coco_images.json"


def write_coco_results(
    predictions: PathLike, out: PathLike, *, annotations: PathLike | None = None
) -> tuple[Path, Path]:
    """Turn predictions.jsonl into COCO results, which pycocotools' ``loadRes`` reads; scans are left out.

    Args:
        predictions: the lines of a run.
        out: folder for coco_results.json (image_id, category_id, bbox, score, segmentation) and
            coco_images.json, which says what file an image_id stands for.
        annotations: COCO annotation JSON: image ids are those of its images of the same path or file name, and
            categories its own in the order of their ids. Without it ids count from 1 in the order of names, and a
            category is the label.

    Raises:
        DataError: the annotations cannot be read, or do not list a file that was predicted.
    """
    source = Path(predictions)
    names = sorted(line["file"] for line in _lines(source) if line["kind"] == "slice")
    ids: dict[str, int] = {name: number for number, name in enumerate(names, start=1)}
    categories: list[int] | None = None
    if annotations is not None:
        ids, categories = _ids_of(Path(annotations), names)
    images, results = [], []
    for line in _lines(source):
        if line["kind"] != "slice":
            continue
        height, width = line["image_size"]
        identifier = ids[line["file"]]
        images.append({"id": identifier, "file_name": line["file"], "height": height, "width": width})
        for lesion in line["lesions"]:
            x1, y1, x2, y2 = lesion["box"]
            results.append(
                {
                    "image_id": identifier,
                    "category_id": categories[lesion["label"] - 1] if categories else lesion["label"],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": lesion["score"],
                    "segmentation": lesion["rle"],
                }
            )
    paths = Path(out) / COCO_RESULTS, Path(out) / COCO_IMAGES
    write_files({paths[0]: json.dumps(results).encode(), paths[1]: json.dumps({"images": images}).encode()})
    return paths


def compress_counts(counts: list[int]) -> str:
    """Run lengths of COCO's uncompressed RLE -> its string form, which pycocotools decodes.

    From the third count on the difference to the count before last is stored; a number goes in groups of five
    bits, lowest first, a sixth bit says that more follow, and 48 makes each a printable character.
    """
    text = bytearray()
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            text.append(48 + bits + 32 * more)
    return text.decode("ascii")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:
        for line in stream:
            yield json.loads(line)


def _ids_of(annotations: Path, names: list[str]) -> tuple[dict[str, int], list[int]]:
    """Image id of each predicted file, and the categories in the order of labels."""
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        listed = {str(image["file_name"]): image["id"] for image in content["images"]}
        categories = sorted(category["id"] for category in content["categories"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{annotations}: not readable COCO annotations ({error!r})") from None
    by_name: dict[str, list[int]] = {}
    for file, identifier in listed.items():
        by_name.setdefault(Path(file).name, []).append(identifier)
    ids = {}
    for name in names:
        exact = [identifier for file, identifier in listed.items() if Path(name).as_posix().endswith("/" + file)]
        candidates = [listed[name]] if name in listed else by_name.get(Path(name).name, [])
        if len(candidates) != 1:
            candidates = exact
        if len(candidates) != 1:
            raise DataError(f"{annotations}: lists {len(candidates)} images named {Path(name).name}, of {name}")
        ids[name] = candidates[0]
    return ids, categories
