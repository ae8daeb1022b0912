"""The command `ctmasknet`: every subcommand calls one public function and prints what it says.

torch is imported by the subcommands that need it, so that `ctmasknet list` answers at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ctmasknet import __version__
from ctmasknet.errors import CTMaskNetError
from ctmasknet.registry import Variant, get_variant, list_models

_DISCLAIMER = "Research software, not a medical device."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 fine, 1 a check of `doctor` failed, 2 the user has something to mend."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    warnings.showwarning = _show_warning
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except CTMaskNetError as error:
        print(f"ctmasknet {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ctmasknet {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ctmasknet",
        description="Lesions and COVID-19 in chest CT slices: 14 models, one command line. " + _DISCLAIMER,
        epilog="Start with: ctmasknet demo. Then: ctmasknet predict slice.png -o out",
    )
    parser.add_argument("--version", action="version", version=f"ctmasknet {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    listing = _command(
        commands,
        "list",
        _list,
        "list the variants",
        'Examples: ctmasknet list; ctmasknet list "*t1*" --task segmentation; ctmasknet list --json',
    )
    listing.add_argument("pattern", nargs="?", default="*", help='shell wildcards, for example "*t1*"')
    listing.add_argument("--task", choices=("segmentation", "classification"), help="only this task")
    _json_flag(listing)

    info = _command(
        commands,
        "info",
        _info,
        "what one variant is, what the paper reports of it, and its weights",
        "Example: ctmasknet info maskrcnn_resnet18_t2",
    )
    info.add_argument("name", metavar="NAME", help="a variant: see ctmasknet list")
    _json_flag(info)

    predict = _command(
        commands,
        "predict",
        _predict,
        "segment and classify slices",
        "Reads PNG, JPEG, WebP, TIFF and single-slice DICOM files. Writes, per input and under its relative path,\n"
        "FILE.json (boxes, scores, masks as COCO RLE, class probabilities) and FILE.overlay.png. Files that cannot\n"
        "be used are reported, the others done; the exit code is then 2.\n\n"
        "Examples:\n"
        "  ctmasknet predict slice.png -o out\n"
        "  ctmasknet predict scans/*.dcm -o out --classifier none --threshold 0.5\n"
        "  ctmasknet predict raw16.tif -o out --units hu",
    )
    predict.add_argument("files", nargs="+", metavar="FILE", help="slices to predict")
    predict.add_argument("-o", "--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    predict.add_argument("--units", choices=("hu", "range"), help=_UNITS_HELP)
    _model_flags(predict)
    _json_flag(predict)

    demo = _command(
        commands,
        "demo",
        _demo,
        "predict a synthetic slice and compare with what is in it",
        "Makes a phantom (no patient's data), predicts it with the bundled weights, and says what was there, what was\n"
        "found, and where the picture is.",
    )
    demo.add_argument("--seed", type=int, default=0, help="which phantom (default: 0)")
    demo.add_argument("--lesions", type=int, default=4, help="lesions in it, 0 to 8 (default: 4)")
    demo.add_argument(
        "-o", "--out", type=Path, default=Path("ctmasknet-demo"), metavar="DIR", help="default: ctmasknet-demo"
    )
    _model_flags(demo)
    _json_flag(demo)

    doctor = _command(
        commands,
        "doctor",
        _doctor,
        "check the installation: torch against torchvision, devices, cache, bundled weights",
        "Exit code 0 if everything needed works, 1 if not.",
    )
    _json_flag(doctor)
    return parser


_UNITS_HELP = (
    "what the values are, where a file does not say: hu (Hounsfield units) or range (stretch the slice's own "
    "range, no Hounsfield units claimed)"
)


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, more: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{more}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def _model_flags(parser: argparse.ArgumentParser) -> None:
    models = "a variant's name, a folder of weights, or none (default: the bundled weights)"
    parser.add_argument("--segmenter", default="default", metavar="MODEL", help=models)
    parser.add_argument("--classifier", default="default", metavar="MODEL", help=models)
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="report lesions scored above T (default: the weights' own operating point)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="bfloat16 runs the backbone in it (default: auto)",
    )


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"ctmasknet: {message}", file=sys.stderr)


def _print_json(facts: Any) -> None:
    print(json.dumps(facts, indent=2, allow_nan=False))


def _list(options: argparse.Namespace) -> int:
    from ctmasknet.weights.manifest import variants_with_weights

    names = list_models(options.pattern, task=options.task)
    having = variants_with_weights()
    if options.json:
        _print_json([get_variant(name).to_dict() | {"default_weights": name in having} for name in names])
        return 0
    if not names:
        print(f"ctmasknet list: no variant matches {options.pattern!r}", file=sys.stderr)
        return 2
    print(f"{'name':24}{'model':42}{'values':>9}  weights")
    for name in names:
        variant = get_variant(name)
        weights = "default" if name in having else "-"
        print(f"{name:24}{variant.title:42}{variant.num_values / 1e6:8.2f}M  {weights}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from ctmasknet.weights.manifest import manifest

    variant = get_variant(options.name)
    entries = [entry for entry in manifest() if entry.variant == variant.name]
    if options.json:
        weights = [
            {"tag": e.tag, "bytes": e.bytes, "sha256": e.sha256, "license": e.license, "metrics": e.metrics}
            for e in entries
        ]
        _print_json(variant.to_dict() | {"weights": weights})
        return 0
    print(f"{variant.name}: {variant.title}, {variant.task}")
    print(f"  {variant.num_values:,} values; {variant.levels} FPN level(s), coarsest stride {variant.stride} px")
    if variant.roi_batch:
        print(f"  module S reads {variant.roi_batch} RoIs; derived from {variant.segmenter}")
    print(f"  paper (its data, its hardware): {_paper_line(variant)}")
    for entry in entries:
        figures = ", ".join(f"{key} {value}" for key, value in entry.metrics.items())
        print(f"  default weights: {entry.tag}, {entry.bytes / 1e6:.1f} MB, {entry.license}; measured: {figures}")
    if not entries:
        print("  default weights: none yet")
    return 0


def _paper_line(variant: Variant) -> str:
    paper = variant.paper
    if paper.sensitivity is not None and paper.accuracy is not None:
        control, pneumonia, covid = paper.sensitivity
        return (
            f"sensitivity control {control:.2%}, pneumonia {pneumonia:.2%}, COVID-19 {covid:.2%}; "
            f"accuracy {paper.accuracy:.2%}; trained in {paper.minutes} min"
        )
    return f"AP@0.5 {paper.ap50}, AP@0.75 {paper.ap75}, mAP {paper.ap}; trained in {paper.minutes} min"


def _predictor(options: argparse.Namespace) -> Any:
    from ctmasknet.predictor import Predictor

    chosen = [None if model == "none" else model for model in (options.segmenter, options.classifier)]
    return Predictor(*chosen, device=options.device, score_threshold=options.threshold, precision=options.precision)


def _predict(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    predictor = _predictor(options)
    facts, failures = [], 0
    # Drawn on a terminal only: logs and pipes get the lines alone.
    for file in tqdm(options.files, unit="slice", disable=len(options.files) < 2 or not sys.stderr.isatty()):
        try:
            prediction = predictor(file, units=options.units)
            record, picture = prediction.save(options.out / _relative(file).parent)
        except CTMaskNetError as error:
            failures += 1
            facts.append({"file": file, "error": str(error)})
            tqdm.write(f"ctmasknet predict: {error}", file=sys.stderr)
            continue
        facts.append({"file": file, "json": str(record), "overlay": str(picture)} | _brief(prediction))
        if not options.json:
            tqdm.write(f"{file}: {prediction.summary} -> {picture}")
    if options.json:
        _print_json(facts)
    elif len(options.files) > 1:
        print(f"{len(options.files) - failures} of {len(options.files)} slices predicted into {options.out}")
    return 2 if failures else 0


def _relative(file: str) -> Path:
    """Where results of `file` go below the output folder: its path from here, or from the root if it lies elsewhere."""
    absolute = Path(file).absolute().resolve()
    here = Path.cwd().resolve()
    return absolute.relative_to(here if absolute.is_relative_to(here) else absolute.anchor)


def _brief(prediction: Any) -> dict[str, Any]:
    return {
        "summary": prediction.summary,
        "lesions": len(prediction.scores),
        "lesion_fraction": prediction.lesion_fraction if prediction.has_segmentation else None,
        "class_probabilities": prediction.class_probabilities,
        "caveats": list(prediction.caveats),
    }


def _demo(options: argparse.Namespace) -> int:
    from ctmasknet.data import phantom
    from ctmasknet.evaluation.detection import mask_iou

    made = phantom(options.seed, lesions=options.lesions)
    prediction = _predictor(options)(made.image)
    record, picture = prediction.save(options.out, f"phantom-{options.seed}")
    # A lesion counts as found if most of it is marked: the models join neighbours and split large ones.
    marked = prediction.lesion_mask
    covered = [bool((mask & marked).sum() * 2 > mask.sum()) for mask in made.masks]
    best = mask_iou(made.masks, prediction.masks).max(axis=1) if len(prediction.masks) else [0.0] * len(covered)
    names = {1: "GGO", 2: "consolidation"}
    lesions = [
        {"class": names[int(label)], "area_px": int(mask.sum()), "found": found, "best_iou": round(float(iou), 3)}
        for label, mask, found, iou in zip(made.labels, made.masks, covered, best, strict=True)
    ]
    if options.json:
        facts = {"seed": options.seed, "phantom": lesions, "found": sum(covered)}
        _print_json(facts | {"json": str(record), "overlay": str(picture)} | _brief(prediction))
        return 0
    print(f"A synthetic slice (seed {options.seed}) with {len(lesions)} lesions:")
    for lesion in lesions:
        verdict = f"found (IoU {lesion['best_iou']:.2f})" if lesion["found"] else "missed"
        print(f"  {lesion['class']}, {lesion['area_px']} px: {verdict}")
    print(f"The models say: {prediction.summary}")
    for caveat in prediction.caveats:
        print(f"  ({caveat})")
    print(f"{sum(covered)} of {len(lesions)} lesions found. Picture: {picture}")
    print(_DISCLAIMER)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from ctmasknet.doctor import examine

    checks = examine()
    if options.json:
        _print_json([check.to_dict() for check in checks])
    else:
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}")
    return 0 if all(check.ok for check in checks) else 1
