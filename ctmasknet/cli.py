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
_LINES_BESIDE_A_BAR = 100  # results; of more than that the bar alone is shown


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
        'Examples: ctmasknet list; ctmasknet list "*_t1" --task segmentation; ctmasknet list --json',
    )
    listing.add_argument("pattern", nargs="?", default="*", help='shell wildcards, for example "*_t1"')
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
        "segment and classify slices and whole scans",
        "Reads PNG, JPEG, WebP, TIFF and DICOM slices; NIfTI files, multi-frame DICOM files and folders with\n"
        "a DICOM series as scans; folders and quoted wildcards for many of them. Writes, per slice and under its\n"
        "relative path, FILE.json (boxes, scores, masks as COCO RLE, class probabilities) and FILE.overlay.png;\n"
        "per scan the lesion mask (.lesions.nii.gz), a table (.slices.csv), a picture (.montage.png) and the facts\n"
        "(.json). Of more than one input, also predictions.jsonl and run.json: the same command again goes on\n"
        "where it was stopped. Files that cannot be used are reported, the others done; the exit code is then 2.\n\n"
        "Examples:\n"
        "  ctmasknet predict slice.png -o out\n"
        "  ctmasknet predict series/ scan.nii.gz -o out\n"
        "  ctmasknet predict 'scans/**/*.png' -o out --format jsonl --classifier none --threshold 0.5\n"
        "  ctmasknet predict raw16.tif -o out --units hu\n"
        "  accelerate launch -m ctmasknet predict --list files.txt -o out",
    )
    predict.add_argument("files", nargs="*", metavar="FILE", help="slices, scans, folders, quoted wildcards")
    predict.add_argument("-o", "--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    predict.add_argument("--list", type=Path, metavar="FILE", help="read more inputs from FILE, one per line")
    predict.add_argument("--units", choices=("hu", "range"), help=_UNITS_HELP)
    predict.add_argument(
        "--format",
        choices=("files", "jsonl", "coco"),
        default="files",
        help="files (default): JSON and overlay of each; jsonl: predictions.jsonl alone; coco: it and COCO results",
    )
    predict.add_argument("--annotations", type=Path, metavar="JSON", help="COCO annotations to take image ids from")
    predict.add_argument(
        "--score-map", action="store_true", help="also write FILE.score_map.npy: raw mask logits of all RoIs, (H, W)"
    )
    predict.add_argument("--slices", action="store_true", help="take DICOM files in folders as slices, not as scans")
    predict.add_argument("--series", metavar="UID", help="the series to take from the folder of a scan")
    predict.add_argument(
        "--spacing", nargs=3, type=float, metavar="MM", help="between columns, rows, slices, where a scan lacks it"
    )
    predict.add_argument("--batch-size", type=int, metavar="N", help="slices at once (default: 1 on the CPU, else 8)")
    predict.add_argument("--readers", type=int, default=4, metavar="N", help="threads that read ahead (default: 4)")
    predict.add_argument("--shard", metavar="I/N", help="do every N-th input from the I-th on, counted from 0")
    predict.add_argument("--restart", action="store_true", help="forget an earlier run in DIR and begin anew")
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
    demo.add_argument("--web", action="store_true", help="serve a page to try it instead (extra demo)")
    demo.add_argument("--host", metavar="H", help="with --web: where to listen (default: 127.0.0.1, this machine)")
    demo.add_argument("--port", type=int, metavar="N", help="with --web: default: the first free one from 7860 on")
    demo.add_argument("--max-upload-mb", type=int, metavar="MB", help="with --web: of one upload (default: 200)")
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

    download = _command(
        commands,
        "download",
        _download,
        "fetch weights for use without a network",
        "Default weights by the variant's name, or a Hub repository, better pinned: owner/name@commit. They go to\n"
        "the cache of huggingface_hub (HF_HOME), where create_model, from_pretrained and predict find them.\n\n"
        "Example: ctmasknet download maskrcnn_resnet18_t2",
    )
    download.add_argument("names", nargs="+", metavar="NAME", help="a variant, owner/name or owner/name@revision")
    _json_flag(download)

    push = _command(
        commands,
        "push",
        _push,
        "publish a folder of weights on the Hugging Face Hub",
        "Checks the folder, then writes model.safetensors, config.json, README.md and golden.safetensors to the\n"
        "repository in one commit; nothing else in the folder travels. Needs HF_TOKEN or: hf auth login.\n\n"
        "Example: ctmasknet push runs/one/best owner/maskrcnn_resnet18_t2",
    )
    push.add_argument("folder", type=Path, metavar="DIR", help="a folder of weights, such as a run's best/")
    push.add_argument("repository", metavar="REPO", help="owner/name, made if missing")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    _json_flag(push)

    evaluate = _command(
        commands,
        "evaluate",
        _evaluate,
        "measure a model, or other people's predictions, on labelled slices",
        "MODEL is a variant's name (its default weights), a folder of weights, an author's .pth, or a .json of\n"
        "predictions: COCO results, or [{image_id, probabilities}] for classifiers. Segmenters: AP by the released\n"
        "protocol, COCO AP, Dice, lesions found; classifiers: sensitivity, specificity, AUC by slice and patient; 95%\n"
        "intervals over patients. Several processes: accelerate launch -m ctmasknet evaluate ...\n\n"
        "Examples:\n"
        "  ctmasknet evaluate maskrcnn_resnet18_t2 --data lesions/val --json result.json\n"
        "  ctmasknet evaluate ctmasknet_resnet18_t1 --data classes/val --rows work\n"
        "  ctmasknet evaluate theirs.json --data lesions/val --threshold 0.5",
    )
    evaluate.add_argument("model", metavar="MODEL", help="what to measure")
    evaluate.add_argument("--data", nargs="+", required=True, metavar="DIR", help="labelled slices")
    evaluate.add_argument("--list", metavar="FILE", help="only the slices that this text file names")
    evaluate.add_argument("--min-area", type=int, default=100, metavar="PX", help="smaller lesions do not count")
    evaluate.add_argument("--per-class", type=int, metavar="N", help="classifiers: N slices of each class")
    evaluate.add_argument(
        "--threshold", type=float, default=0.5, metavar="T", help="predictions: lesions scored above T (default: 0.5)"
    )
    evaluate.add_argument("--samples", type=int, default=1000, metavar="N", help="bootstrap resamples (default: 1000)")
    evaluate.add_argument("--no-coco", action="store_true", help="leave COCO AP out (it needs the extra train)")
    evaluate.add_argument("--batch-size", type=int, metavar="N", help="slices per forward")
    evaluate.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read slices")
    evaluate.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="of the backbone (default: auto)"
    )
    _evaluation_flags(evaluate)
    evaluate.add_argument(
        "--json", nargs="?", const="-", metavar="OUT", help="print the figures as JSON, or write them to the file OUT"
    )

    paper = _command(
        commands,
        "paper",
        _paper,
        "make a table or figure of the paper",
        "Prints the table (of a figure: the numbers behind it) and writes ITEM.md, ITEM.csv, ITEM.png, and for\n"
        "figures ITEM.pdf and ITEM.svg. Table 1 and Figure 1 need no data; Figure 2 and contributions take phantoms\n"
        "if they get none.\n\n"
        "Examples:\n"
        "  ctmasknet paper table1 -o out\n"
        "  ctmasknet paper table2 --weights runs/a/best runs/b/best --data cncb/val -o out\n"
        "  ctmasknet paper figure4 --weights ctmasknet_resnet18_t1 --data classes/val -o out",
    )
    paper.add_argument(
        "item",
        metavar="ITEM",
        help="table1 to table5, figure1 to figure4, or contributions (of every RoI of a slice to the class logits)",
    )
    paper.add_argument("--weights", nargs="+", default=(), metavar="MODEL", help="as MODEL of ctmasknet evaluate")
    paper.add_argument("--data", nargs="+", default=(), metavar="DIR", help="labelled slices; contributions: an image")
    paper.add_argument("-o", "--out", type=Path, default=Path("paper"), metavar="DIR", help="default: paper")
    paper.add_argument("--name", metavar="NAME", help="name of the files (default: the item's)")
    _evaluation_flags(paper)

    export = _command(
        commands,
        "export",
        _export,
        "write a model as a file that runs without this library",
        "onnx (extra export): the whole model, image in, boxes and masks or class probabilities out. pt2: backbone,\n"
        "FPN and RPN head as a torch.export program. The file is written if its outputs are PyTorch's on phantoms.\n\n"
        "Examples:\n"
        "  ctmasknet export maskrcnn_resnet18_t1 -o model.onnx\n"
        "  ctmasknet export maskrcnn_resnet18_t2 --weights run/best --format pt2 -o model.pt2",
    )
    export.add_argument("name", metavar="NAME", help="a variant: see ctmasknet list")
    export.add_argument("--format", choices=("onnx", "pt2"), default="onnx", help="default: onnx")
    export.add_argument("-o", "--out", required=True, type=Path, metavar="FILE", help="the file to write")
    export.add_argument(
        "--weights", default="default", metavar="W", help="default, a file, a folder or a Hub repository of weights"
    )

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
    models = "a variant's name, a folder or Hub repository of weights, or none (default: the bundled weights)"
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


def _evaluation_flags(parser: argparse.ArgumentParser) -> None:
    limit_help = "at most N slices (Tables 4, 5, Figure 4: of each class)"
    parser.add_argument("--limit", type=int, metavar="N", help=limit_help)
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default: 0)")
    parser.add_argument("--classes", choices=("merge", "both", "ggo"), help="lesion classes (default: the model's)")
    parser.add_argument("--rows", metavar="DIR", help="keep what was measured per slice here, to go on after a kill")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


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
    return Predictor(
        *chosen,
        device=options.device,
        score_threshold=options.threshold,
        precision=options.precision,
        score_map=getattr(options, "score_map", False),
    )


def _predict(options: argparse.Namespace) -> int:
    from itertools import islice

    from ctmasknet.batch import process_device, process_shard
    from ctmasknet.inputs import find_inputs

    shard = _shard(options.shard) if options.shard else process_shard()
    options.device = options.device or process_device()
    predictor = _predictor(options)
    if options.batch_size is not None:
        if options.batch_size < 1:
            raise ConfigError(f"--batch-size {options.batch_size}: must be at least 1")
        predictor.batch_size = options.batch_size
    if not options.files and options.list is None:
        raise ConfigError("nothing to predict: name slices, scans or folders, or pass --list FILE")
    alone = options.list is None and shard == (0, 1) and options.format == "files" and not options.restart
    first = list(islice(find_inputs(options.files, slices=options.slices, out=options.out), 2)) if alone else []
    if len(first) == 1 and not first[0].error:
        return _predict_one(predictor, first[0].name, options)
    if options.series:
        raise ConfigError("--series goes with one folder: name that folder alone")
    return _predict_many(predictor, shard, options)


def _shard(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise ConfigError(f"--shard {text}: write it as I/N, I from 0 to N - 1, for example 0/16")
    return int(first), int(count)


def _predict_one(predictor: Any, file: str, options: argparse.Namespace) -> int:
    """One slice or one scan: its own files, no record of a run."""
    from tqdm import tqdm

    from ctmasknet.data.volumes import is_scan
    from ctmasknet.inputs import place_of

    place = options.out / place_of(file).parent
    if not Path(file).is_dir() and not is_scan(Path(file)):
        prediction = predictor(file, units=options.units)
        record, picture = prediction.save(place)
        if options.json:
            _print_json([{"file": file, "json": str(record), "overlay": str(picture)} | _brief(prediction)])
        else:
            print(f"{file}: {prediction.summary} -> {picture}")
        return 0
    with tqdm(unit="slice", disable=not sys.stderr.isatty()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        spacing = tuple(options.spacing) if options.spacing else None
        scan = predictor.volume(file, units=options.units, series=options.series, spacing=spacing, progress=show)
    paths = scan.save(place)
    for problem in scan.problems:
        print(f"ctmasknet predict: {problem}", file=sys.stderr)
    if options.json:
        _print_json([{"file": file, **{kind: str(path) for kind, path in paths.items()}} | scan.to_dict()])
    else:
        print(f"{file}: {scan.summary} -> {paths['mask']}")
    return 2 if any(row.error for row in scan.slices) else 0


def _predict_many(predictor: Any, shard: tuple[int, int], options: argparse.Namespace) -> int:
    from itertools import chain

    from tqdm import tqdm

    from ctmasknet.batch import FileResult, RunSummary, predict_files
    from ctmasknet.inputs import read_list

    facts: list[dict[str, Any]] = []
    # Drawn on a terminal only, and by one process: logs and pipes get the lines alone.
    bar = tqdm(unit="image", disable=not sys.stderr.isatty() or shard[0] > 0)

    def start(summary: RunSummary) -> None:
        bar.total = summary.inputs - summary.already_done
        bar.refresh()
        if summary.already_done and not options.json:
            tqdm.write(f"{summary.already_done} of {summary.inputs} are done already, going on")

    def show(result: FileResult) -> None:
        bar.update()
        paths = {kind: str(path) for kind, path in result.paths.items()}
        if result.record is None:
            tqdm.write(f"ctmasknet predict: {result.error}", file=sys.stderr)
            if options.json:
                facts.append({"file": result.file, "error": result.error})
            return
        for problem in result.record.get("problems", ()):
            tqdm.write(f"ctmasknet predict: {problem}", file=sys.stderr)
        if options.json:
            shown = {key: value for key, value in result.record.items() if key != "lesions"}
            facts.append({"file": result.file, **paths, **shown, "lesions": len(result.record.get("lesions", ()))})
        elif bar.disable or (bar.total or 0) <= _LINES_BESIDE_A_BAR:
            where = paths.get("overlay") or paths.get("mask")
            tqdm.write(f"{result.file}: {result.record['summary']}" + (f" -> {where}" if where else ""))

    listed = [] if options.list is None else read_list(options.list)
    with bar:
        summary = predict_files(
            predictor,
            chain(options.files, listed),
            options.out,
            units=options.units,
            format=options.format,
            slices=options.slices,
            spacing=tuple(options.spacing) if options.spacing else None,
            readers=options.readers,
            shard=shard,
            restart=options.restart,
            annotations=options.annotations,
            on_result=show,
            on_start=start,
        )
    if options.json:
        _print_json(facts)
        return 2 if summary.failed else 0
    speed = f", {summary.files_per_second:.2f} images/s" if summary.files_per_second else ""
    rest = f", {summary.already_done} before" if summary.already_done else ""
    other = f"; {summary.left_out} files of other kinds left out" if summary.left_out else ""
    mine = f" (process {shard[0]} of {shard[1]})" if shard[1] > 1 else ""
    print(
        f"{summary.predicted} of {summary.inputs} slices predicted into {options.out}{mine}{rest}, "
        f"{summary.failed} failed, {summary.seconds:.0f} s{speed}{other}"
    )
    return 2 if summary.failed else 0


def _brief(prediction: Any) -> dict[str, Any]:
    return {
        "summary": prediction.summary,
        "lesions": len(prediction.scores),
        "lesion_fraction": prediction.lesion_fraction if prediction.has_segmentation else None,
        "class_probabilities": prediction.class_probabilities,
        "caveats": list(prediction.caveats),
    }


def _web(options: argparse.Namespace) -> int:
    import signal

    from ctmasknet.web import serve

    def started(address: str) -> None:
        print(f"{_DISCLAIMER} The page: {address} (Ctrl-C ends it)", flush=True)

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)  # so that uploads are deleted
    serve(
        segmenter=options.segmenter,
        classifier=options.classifier,
        threshold=options.threshold,
        device=options.device,
        precision=options.precision,
        seed=options.seed,
        lesions=options.lesions,
        host=options.host or "127.0.0.1",
        port=options.port,
        max_upload_mb=200 if options.max_upload_mb is None else options.max_upload_mb,
        on_start=started,
    )
    return 0


def _demo(options: argparse.Namespace) -> int:
    if options.web:
        return _web(options)
    for flag in ("host", "port", "max_upload_mb"):
        if getattr(options, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')} goes with --web")
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


def _download(options: argparse.Namespace) -> int:
    from ctmasknet.weights.hub import download

    facts = []
    for name in options.names:
        found = download(name)
        facts.append({"name": name, "source": found.source, "folder": str(found.folder), "bytes": found.bytes})
        if not options.json:
            print(f"{name}: {found.source}, {found.bytes / 1e6:.1f} MB in {found.folder}")
    if options.json:
        _print_json(facts)
    return 0


def _push(options: argparse.Namespace) -> int:
    from ctmasknet.weights.publish import push_folder

    published = push_folder(options.folder, options.repository, private=options.private)
    if options.json:
        _print_json(published.to_dict())
    else:
        print(f"{published.variant}: {published}, sha256 {published.sha256}")
        print(f'create_model("{published.variant}", weights="{published}") loads it')
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    import os

    from ctmasknet.evaluation import evaluate

    result = evaluate(
        options.model,
        options.data,
        classes=options.classes,
        min_area=options.min_area,
        list_file=options.list,
        limit=options.limit,
        per_class=options.per_class,
        seed=options.seed,
        score_threshold=options.threshold,
        coco=not options.no_coco,
        samples=options.samples,
        out=options.rows,
        device=options.device,
        batch_size=options.batch_size,
        precision=options.precision,
        workers=options.workers,
    )
    if int(os.environ.get("RANK", "0")) != 0:  # of several processes one speaks
        return 0
    if options.json == "-":
        _print_json(result.to_dict())
        return 0
    print(result.table())
    if options.json:
        try:
            Path(options.json).write_text(json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n", "utf-8")
        except OSError as error:
            raise CTMaskNetError(f"{options.json}: cannot be written ({error}); choose another file") from None
    return 0


def _paper(options: argparse.Namespace) -> int:
    from ctmasknet.paper import Request, make

    request = Request(
        weights=tuple(options.weights),
        data=tuple(options.data),
        seed=options.seed,
        limit=options.limit,
        classes=options.classes,
        rows=options.rows,
        device=options.device,
    )
    table, paths = make(options.item, request, options.out, name=options.name)
    print(table)
    print("\n" + " ".join(str(path) for path in paths))
    return 0


def _export(options: argparse.Namespace) -> int:
    from ctmasknet import create_model, export

    print(export(create_model(options.name, weights=options.weights), options.out, format=options.format))
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
