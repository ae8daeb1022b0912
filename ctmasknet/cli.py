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
from ctmasknet.errors import ConfigError, CTMaskNetError
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

    train = _command(
        commands,
        "train",
        _train,
        "train or fine-tune a variant",
        "Segmenters learn from CNCB folders (imgs/ + masks/) or COCO instance JSON; classifiers from CNCB file names,\n"
        "COVIDx-CT lists or one folder per class. RUN holds checkpoints, best/ and last/ (weights), metrics.csv,\n"
        "curves.png and run.json. The same command continues a run that was ended, at the step it had reached.\n"
        "Several GPUs: accelerate launch -m ctmasknet train ... (docs/train.md).\n\n"
        "Examples:\n"
        "  ctmasknet train maskrcnn_resnet18_t2 --data lesions/train --val lesions/val --weights default --out run\n"
        "  ctmasknet train ctmasknet_resnet18_t2 --data slices --weights run/best --out run2 --cache-rois\n"
        "  ctmasknet train --config run/config.json --out again --set lr=1e-4",
    )
    train.add_argument("name", nargs="?", metavar="NAME", help="variant to train: see ctmasknet list")
    train.add_argument("--data", nargs="+", metavar="DIR", help="training data, one root or several")
    train.add_argument("--val", nargs="+", metavar="DIR", help="validation data")
    train.add_argument("--weights", metavar="W", help="where to start: default, a folder, a .pth of the paper's author")
    train.add_argument("--out", metavar="RUN", help="folder of the run")
    train.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON with any field of TrainConfig")
    train.add_argument("--recipe", choices=("fast", "paper"), help="fast (default) or the paper's")
    train.add_argument("--classes", choices=("merge", "both", "ggo"), help="lesion classes of CNCB masks")
    train.add_argument("--list", dest="list_file", metavar="FILE", help="use only the slices this file names")
    train.add_argument("--val-list", dest="val_list_file", metavar="FILE", help="likewise for --val")
    train.add_argument("--epochs", type=int, help="passes over the data")
    train.add_argument("--batch-size", type=int, help="slices per process and step")
    train.add_argument("--lr", type=float, help="highest learning rate")
    train.add_argument("--seed", type=int, help="fixes order, augmentation and sampling (default: 0)")
    train.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    train.add_argument("--cache-rois", action="store_true", default=None, help="classifiers: train module S alone")
    train.add_argument("--resume", metavar="R", help="auto (default), no, or a checkpoint to continue from")
    train.add_argument(
        "--set",
        dest="fields",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of TrainConfig, for example --set patience=5",
    )
    _json_flag(train)

    data = commands.add_parser("data", help="look at a data set before training on it")
    data_commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    check = _command(
        data_commands,
        "check",
        _data_check,
        "report what a data set holds and what is wrong with it",
        "Reads every file; the exit code is 2 if anything should be put right.\n\n"
        "Example: ctmasknet data check lesions/train --against lesions/val",
    )
    check.add_argument("data", nargs="+", metavar="DIR", help="one root or several")
    check.add_argument("--against", nargs="+", metavar="DIR", help="the other split: report patients in both")
    check.add_argument("--task", choices=("segmentation", "classification"), help="default: tell by looking")
    check.add_argument("--classes", choices=("merge", "both", "ggo"), default="merge", help="default: merge")
    check.add_argument("--min-area", type=int, default=100, metavar="PX", help="default: 100")
    check.add_argument("--list", dest="list_file", metavar="FILE", help="use only the slices this file names")
    _json_flag(check)

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


_TRAIN_FLAGS = (
    "data",
    "val",
    "weights",
    "out",
    "recipe",
    "classes",
    "list_file",
    "val_list_file",
    "epochs",
    "batch_size",
    "lr",
    "seed",
    "device",
    "cache_rois",
)


def _train(options: argparse.Namespace) -> int:
    from ctmasknet.engine import TrainConfig, train

    given = {name: getattr(options, name) for name in _TRAIN_FLAGS if getattr(options, name) is not None}
    if options.name is not None:
        given["model"] = options.name
    if options.resume is not None:
        given["resume"] = False if options.resume == "no" else options.resume
    given |= dict(_field(text) for text in options.fields)
    if options.config is not None:
        config = TrainConfig.from_file(options.config, **given)
    else:
        config = TrainConfig.from_dict(given, source="the command line")
    logging.getLogger("ctmasknet").setLevel(logging.INFO)
    result = train(config)
    if options.json:
        _print_json(result.to_dict())
        return 0
    if not result.finished:
        print(f"Stopped after {result.steps} steps. The same command continues. Run: {result.out}")
        return 0
    figures = ", ".join(f"{key} {value:.3f}" for key, value in result.metrics.items() if isinstance(value, float))
    print(f"Trained {config.model} in {result.seconds / 60:.1f} min, {result.epochs} epochs. {figures}")
    print(f"Weights: create_model({config.model!r}, weights={result.best!r})")
    return 0


def _field(text: str) -> tuple[str, Any]:
    """``"lr=1e-4"`` as a field and its value; values are JSON, or text where they are none."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: needs FIELD=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _data_check(options: argparse.Namespace) -> int:
    from ctmasknet.data.check import check_dataset

    report = check_dataset(
        options.data,
        task=options.task,
        against=options.against,
        classes=options.classes,
        min_area=options.min_area,
        list_file=options.list_file,
    )
    if options.json:
        _print_json(report.to_dict())
    else:
        print(report.table())
    return 0 if report.ok else 2


def _doctor(options: argparse.Namespace) -> int:
    from ctmasknet.doctor import examine

    checks = examine()
    if options.json:
        _print_json([check.to_dict() for check in checks])
    else:
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}")
    return 0 if all(check.ok for check in checks) else 1
