"""Predict public scans that you have downloaded, and compare with what the bundled segmenter gave us.

    python tools/reproduce.py DIR             scans anywhere below DIR, as the archives unpack
    python tools/reproduce.py DIR --record    write down what is found as expected, whenever the default weights change

One line per scan; the exit code is 0 if all agree, 1 if one does not, 2 if there is none. Looked for are the scans
that the bundled weights were validated on, those they were trained on would flatter: coronacases_008.nii.gz of
https://zenodo.org/records/3757476 beside Infection_Mask/, and volume 4 of MedSeg's second set (rp_im/, rp_msk/); or
the slices of either as pictures in imgs/ and masks/, which is what the expected figures are of. Pictures have lost a
little to JPEG and eight bits, so whole scans agree less closely. Scans need the extra ``io``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ctmasknet import CTMaskNetError, Predictor, get_variant
from ctmasknet.errors import import_extra
from ctmasknet.output import json_bytes, write_files
from ctmasknet.registry import DEFAULT_SEGMENTER
from ctmasknet.weights.manifest import default_entry

EXPECTED = Path(__file__).with_suffix(".json")
CLOSE = {"pictures": 0.005, "scan": 0.05}
"""How far Dice may be from the expected one."""


class Case(NamedTuple):
    """A public scan.

    Attributes:
        title: of its line.
        scan, truth: its files as downloaded, and where they lie; lesions are coded 1 (and 2) in `truth`.
        picture: name of a slice as a picture, by its index in the scan.
        slices: the indices that have pictures.
    """

    title: str
    scan: str
    truth: str
    picture: str
    slices: tuple[int, ...]


CASES = (
    Case(
        "Zenodo 3757476, coronacases_008",
        "coronacases_008.nii.gz",
        "Infection_Mask/coronacases_008.nii.gz",
        "coronacases_08_{:03d}",
        tuple(range(63, 240, 4)),
    ),
    Case("MedSeg set 2, volume 4", "rp_im/4.nii.gz", "rp_msk/4.nii.gz", "medseg2_v4_{:03d}", (1, *range(6, 32), 36)),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DIR", help="where the scans or pictures are")
    parser.add_argument("--record", action="store_true", help="write tools/reproduce.json anew, from pictures")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    options = parser.parse_args(arguments)
    weights = default_entry(get_variant(DEFAULT_SEGMENTER)).sha256
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    if not options.record and expected["weights"] != weights:
        print(f"reproduce: {EXPECTED} is of other weights than the default ones: --record it anew", file=sys.stderr)
        return 2
    found = {}
    agrees = True
    try:
        predictor = Predictor(DEFAULT_SEGMENTER, None, device=options.device)
        for case, kind, figures in measured(options.data, predictor, pictures_only=options.record):
            found[case.title] = figures
            line = f"{case.title}, {kind}: {figures['slices']} slices, Dice {figures['dice']:.4f}"
            if not options.record:
                wanted = expected["cases"][case.title]
                # Other slices, or masks that were drawn anew, are another question.
                same = abs(figures["lesion_pixels"] / wanted["lesion_pixels"] - 1) < 0.02
                near = abs(figures["dice"] - wanted["dice"]) <= CLOSE[kind]
                line += f", expected {wanted['dice']:.4f}: "
                line += ("agrees" if near else "DIFFERS") if same else "OTHER LESIONS than ours in these slices"
                agrees = agrees and same and near
            print(line, flush=True)
    except CTMaskNetError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    if not found:
        print(f"reproduce: {options.data}: none of {', '.join(case.scan for case in CASES)}", file=sys.stderr)
        return 2
    if options.record:
        write_files({EXPECTED: json_bytes({"weights": weights, "cases": found}, indent=2)})
    return 0 if agrees else 1


def measured(
    data: Path, predictor: Predictor, *, pictures_only: bool = False
) -> Iterator[tuple[Case, str, dict[str, Any]]]:
    """Each case that is below `data`, ``"pictures"`` or ``"scan"``, and its figures."""
    for case in CASES:
        pictures = [next(data.rglob(f"imgs/{case.picture.format(index)}.*"), None) for index in case.slices]
        if None not in pictures:
            truth = [_picture(next(image.parents[1].glob(f"masks/{image.stem}.*"))) > 1 for image in pictures]
            yield case, "pictures", _figures([one.lesion_mask for one in predictor.batch(pictures)], truth)
        scans = [path for path in sorted(data.rglob(case.scan)) if "mask" not in path.parent.name.lower()]
        masks = sorted(data.rglob(case.truth))
        if scans and masks and not pictures_only:
            nibabel = import_extra("nibabel", "io", "reading scans")
            marked = predictor.volume(scans[0], progress=True).mask
            lesions = np.isin(np.asarray(nibabel.load(masks[0]).dataobj), (1, 2))  # 3 is pleural effusion
            yield case, "scan", _figures(*(np.moveaxis(m[..., case.slices], -1, 0) for m in (marked > 0, lesions)))


def _figures(marked: Iterable[np.ndarray], lesions: Iterable[np.ndarray]) -> dict[str, Any]:
    """Of bool masks of the same slices: their binary Dice, all pixels pooled."""
    marked, lesions = np.stack(list(marked)), np.stack(list(lesions))
    both, found, true = (int(pixels.sum()) for pixels in (marked & lesions, marked, lesions))
    facts = {"slices": len(lesions), "marked_pixels": found, "lesion_pixels": true}
    return facts | {"dice": round(2 * both / max(found + true, 1), 4)}


def _picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


if __name__ == "__main__":
    sys.exit(main())
