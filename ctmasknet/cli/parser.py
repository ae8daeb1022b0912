"""The commands, their flags and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ctmasknet.cli import learning, predicting, variants
from ctmasknet.cli.printing import printable
from ctmasknet.registry import DISCLAIMER, __version__


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the commands are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}. See: {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser; `run` of what it returns is the function of the command."""
    parser = _Parser(
        prog="ctmasknet",
        description="Lesions and COVID-19 in chest CT slices: 14 models, one command line. " + DISCLAIMER,
        epilog="Start with: ctmasknet demo. Then: ctmasknet predict slice.png -o out",
    )
    parser.add_argument("--version", action="version", version=f"ctmasknet {__version__}")
    parser.set_defaults(run=_helper(parser), quiet=False, verbose=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    listing = _command(
        commands,
        "list",
        variants.list_command,
        "list the variants",
        'Examples: ctmasknet list; ctmasknet list "*_t1" --task segmentation; ctmasknet list --json',
    )
    listing.add_argument("pattern", nargs="?", default="*", help='shell wildcards, for example "*_t1"')
    listing.add_argument("--task", choices=("segmentation", "classification"), help="only this task")

    info = _command(
        commands,
        "info",
        variants.info_command,
        "show a variant: what it is, what the paper reports for it, and its weights",
        "Example: ctmasknet info maskrcnn_resnet18_t2",
    )
    info.add_argument("name", metavar="NAME", help="a variant: see ctmasknet list")

    predict = _command(
        commands,
        "predict",
        predicting.predict_command,
        "segment and classify slices and whole scans",
        "Slices are PNG, JPEG, WebP, TIFF or DICOM files. Scans are NIfTI files, multi-frame DICOM files and folders\n"
        "with a DICOM series. Give several, folders that hold them, or quoted wildcards. Writes\n"
        "  per slice  FILE.json (boxes, scores, masks as COCO RLE, class probabilities), FILE.overlay.png\n"
        "  per scan   .lesions.nii.gz (the mask), .lesion_ids.nii.gz, .lungs.nii.gz, .slices.csv, .lesions.csv,\n"
        "             .montage.png, .report.png and .pdf (a page to read), .json\n"
        "             with --format dicom also .seg.dcm (the mask) and .sr.dcm (the volumes)\n"
        "  run.json   what was done, and how\n"
        "at the path of each input below DIR; for inputs outside this folder, paths start at the folder they share.\n"
        "With more than one input, scans.csv has a row per scan and predictions.jsonl records what is done, so that\n"
        "the same command continues a run that was stopped. A file that cannot be used is reported and the others\n"
        "are done; the exit code is then 2.\n\n"
        "Examples:\n"
        "  ctmasknet predict slice.png -o out\n"
        "  ctmasknet predict series/ scan.nii.gz -o out\n"
        "  ctmasknet predict 'scans/**/*.png' -o out --format jsonl --classifier none --score-threshold 0.5\n"
        "  ctmasknet predict raw16.tif -o out --units hu\n"
        "  accelerate launch -m ctmasknet predict --names files.txt -o out",
    )
    predict.add_argument("files", nargs="*", metavar="FILE", help="slices, scans, folders, quoted wildcards")
    predict.add_argument("-o", "--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    predict.add_argument(
        "--names", metavar="LIST", help=f"{_NAMES_HELP}; without FILE arguments, LIST has the paths, one per line"
    )
    predict.add_argument("--units", choices=("hu", "range"), help=_UNITS_HELP)
    predict.add_argument(
        "--format",
        choices=("files", "dicom", "jsonl", "coco"),
        default="files",
        help="files (default): JSON and overlay of each; dicom: DICOM scans only, with DICOM SEG and SR (extra dicom); "
        "jsonl: predictions.jsonl alone; coco: it and COCO results",
    )
    predict.add_argument("--annotations", type=Path, metavar="JSON", help="COCO annotations to take image ids from")
    predict.add_argument(
        "--score-map",
        action="store_true",
        help="slices: also write FILE.score_map.npy, the mask logits of all regions, (H, W)",
    )
    predict.add_argument("--slices", action="store_true", help="take DICOM files in folders as slices, not as scans")
    predict.add_argument(
        "--series", metavar="UID", help="the series to take from a scan's folder (default: the longest)"
    )
    predict.add_argument(
        "--spacing",
        nargs=3,
        type=float,
        metavar="MM",
        help="distance of columns, rows and slices, for a scan that does not say",
    )
    predict.add_argument(
        "--keep",
        choices=("all", "lungs"),
        default="all",
        help="lungs: drop lesions of scans that lie outside the lungs",
    )
    predict.add_argument("--batch-size", type=int, metavar="N", help="slices at once (default: 1 on the CPU, else 8)")
    predict.add_argument("--readers", type=int, default=4, metavar="N", help="threads that read ahead (default: 4)")
    predict.add_argument(
        "--shard", metavar="I/N", help="predict only every N-th input, starting with the I-th, counted from 0"
    )
    predict.add_argument("--restart", action="store_true", help="discard an earlier run in DIR and start again")
    _model_flags(predict)

    demo = _command(
        commands,
        "demo",
        predicting.demo_command,
        "predict a synthetic slice and compare the result with what is in it",
        "Predicts a synthetic slice that comes with the package, with the bundled weights. Says what is in it, what\n"
        "was found, and where to find the slice and the picture.",
    )
    demo.add_argument(
        "-o", "--out", type=Path, default=Path("ctmasknet-demo"), metavar="DIR", help="default: ctmasknet-demo"
    )
    demo.add_argument("--web", action="store_true", help="open a page for your browser instead (extra demo)")
    demo.add_argument("--port", type=int, metavar="N", help="with --web: default: the first free one from 7860 on")
    demo.add_argument("--max-upload-mb", type=int, metavar="MB", help="with --web: of one upload (default: 200)")
    _model_flags(demo)

    train = _command(
        commands,
        "train",
        learning.train_command,
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
    train.add_argument("-o", "--out", metavar="RUN", help="folder of the run")
    train.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON with any field of TrainConfig")
    train.add_argument("--recipe", choices=("fast", "paper"), help="fast (default) or the paper's")
    train.add_argument("--classes", choices=("merge", "both", "ggo"), help="lesion classes of CNCB masks")
    train.add_argument("--names", metavar="LIST", help=_NAMES_HELP)
    train.add_argument("--val-names", metavar="LIST", help="likewise for --val")
    train.add_argument("--epochs", type=int, help="passes over the data")
    train.add_argument("--batch-size", type=int, help="slices per process and step")
    train.add_argument("--lr", type=float, help="highest learning rate")
    train.add_argument("--seed", type=int, help="fixes order, augmentation and sampling (default: 0)")
    train.add_argument("--device", help=_DEVICE_HELP)
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

    data = commands.add_parser("data", help="look at a data set before training on it")
    data.set_defaults(run=_helper(data))
    data_commands = data.add_subparsers(dest="data_command", metavar="COMMAND")
    check = _command(
        data_commands,
        "check",
        learning.data_check_command,
        "report what a data set holds and what is wrong with it",
        "Reads every file; the exit code is 2 if anything should be put right.\n\n"
        "Example: ctmasknet data check lesions/train --against lesions/val",
    )
    check.add_argument("data", nargs="+", metavar="DIR", help="one root or several")
    check.add_argument("--against", nargs="+", metavar="DIR", help="the other split: report patients in both")
    check.add_argument("--against-names", metavar="FILE", help="as --names, for --against")
    check.add_argument("--task", choices=("segmentation", "classification"), help="default: tell by looking")
    check.add_argument("--classes", choices=("merge", "both", "ggo"), default="merge", help="default: merge")
    check.add_argument("--min-area", type=int, default=100, metavar="PX", help="default: 100")
    check.add_argument("--names", metavar="LIST", help=_NAMES_HELP)

    download = _command(
        commands,
        "download",
        variants.download_command,
        "fetch weights for use without a network",
        "Default weights by the variant's name, or a Hub repository, better pinned: owner/name@commit. They go to\n"
        "the cache of huggingface_hub (HF_HOME), where create_model, from_pretrained and predict find them.\n\n"
        "Example: ctmasknet download maskrcnn_resnet18_t2",
    )
    download.add_argument("names", nargs="+", metavar="NAME", help="a variant, owner/name or owner/name@revision")

    convert = _command(
        commands,
        "convert",
        variants.convert_command,
        "turn one of the paper author's checkpoints into a folder of weights",
        "Writes model.safetensors, config.json, README.md and golden.safetensors. The variant is recognised from the\n"
        "file, anchors and numbers of classes are taken from it, and nothing in it is executed.\n\n"
        "Example: ctmasknet convert released.pth -o folder",
    )
    convert.add_argument("checkpoint", type=Path, metavar="FILE", help="the author's .pth")
    convert.add_argument("-o", "--out", required=True, type=Path, metavar="DIR", help="the folder to write")
    convert.add_argument("--name", metavar="NAME", help="the variant it must hold (default: recognise it)")
    convert.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="how values are stored (default: float32)"
    )
    convert.add_argument(
        "--metadata",
        type=Path,
        metavar="JSON",
        help="a file with what is known of the weights: classes, operating_point, metrics, dataset, license, note, ...",
    )

    verify = _command(
        commands,
        "verify",
        variants.verify_command,
        "check that a folder of weights is what was saved",
        "Loads the weights strictly, runs the golden input that travels with them, and compares the outputs and the\n"
        "digest of the weights with those recorded in golden.safetensors.\n\n"
        "Example: ctmasknet verify runs/one/best",
    )
    verify.add_argument("folder", type=Path, metavar="DIR", help="a folder of weights, such as a run's best/")

    push = _command(
        commands,
        "push",
        variants.push_command,
        "publish a folder of weights on the Hugging Face Hub",
        "Checks the folder, then pushes model.safetensors, config.json, README.md and golden.safetensors to the\n"
        "repository in one commit, and nothing else. Needs HF_TOKEN or: hf auth login.\n\n"
        "Example: ctmasknet push runs/one/best owner/maskrcnn_resnet18_t2",
    )
    push.add_argument("folder", type=Path, metavar="DIR", help="a folder of weights, such as a run's best/")
    push.add_argument("repository", metavar="REPO", help="owner/name, made if missing")
    push.add_argument("--private", action="store_true", help="make a new repository private")

    evaluate = _command(
        commands,
        "evaluate",
        learning.evaluate_command,
        "measure a model, or other people's predictions, on labelled slices",
        "MODEL is a variant's name (its default weights), a folder of weights, an author's .pth, or a .json of\n"
        "predictions: COCO results, or [{image_id, probabilities}] for classifiers. Segmenters: AP by the released\n"
        "protocol, COCO AP, Dice, lesions found. Classifiers: sensitivity, specificity, AUC, calibration, by slice\n"
        "and patient. 95% intervals over patients. Several processes: torchrun -m ctmasknet evaluate ...\n\n"
        "Examples:\n"
        "  ctmasknet evaluate maskrcnn_resnet18_t2 --data lesions/val\n"
        "  ctmasknet evaluate ctmasknet_resnet18_t1 --data classes/val --json -o work > result.json\n"
        "  ctmasknet evaluate theirs.json --data lesions/val --score-threshold 0.5",
    )
    evaluate.add_argument("model", metavar="MODEL", help="what to measure")
    evaluate.add_argument("--data", nargs="+", required=True, metavar="DIR", help="labelled slices")
    evaluate.add_argument("--names", metavar="LIST", help=_NAMES_HELP)
    evaluate.add_argument("--min-area", type=int, default=100, metavar="PX", help="smaller lesions do not count")
    evaluate.add_argument("--per-class", type=int, metavar="N", help="classifiers: N slices of each class")
    evaluate.add_argument("--samples", type=int, default=1000, metavar="N", help="bootstrap resamples (default: 1000)")
    evaluate.add_argument("--batch-size", type=int, metavar="N", help="slices per forward")
    evaluate.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read slices")
    evaluate.add_argument("--limit", type=int, metavar="N", help="at most N slices, drawn at random")
    evaluate.add_argument("--seed", type=int, default=0, help="of every draw (default: 0)")
    evaluate.add_argument("--classes", choices=("merge", "both", "ggo"), help="lesion classes (default: the model's)")
    evaluate.add_argument(
        "-o", "--out", metavar="DIR", help="write the results here; an interrupted run carries on from them"
    )
    _running_flags(evaluate)

    export = _command(
        commands,
        "export",
        variants.export_command,
        "write a model as an ONNX file, which runs without this library",
        "The whole model: image in, boxes and masks or class probabilities out. The file is written only if it gives\n"
        "what PyTorch gives. Needs the extra export.\n\n"
        "Examples:\n"
        "  ctmasknet export maskrcnn_resnet18_t1 -o model.onnx\n"
        "  ctmasknet export run/best -o model.onnx",
    )
    export.add_argument(
        "model", metavar="MODEL", help="a variant's name, a folder or Hub repository of weights, or an author's .pth"
    )
    export.add_argument("-o", "--out", required=True, type=Path, metavar="FILE", help="the file to write")

    _command(
        commands,
        "doctor",
        variants.doctor_command,
        "check the installation: torch against torchvision, devices, cache, bundled weights",
        "Exit code 0 if everything needed works, 1 if not.",
    )
    return parser


_UNITS_HELP = (
    "what the values are, where a file does not say: hu (Hounsfield units) or range (stretch the slice's own "
    "range, no Hounsfield units claimed)"
)
_NAMES_HELP = "only the slices that this text file names, one per line"
_DEVICE_HELP = "cpu, cuda, cuda:1, ... (default: a GPU if there is one)"


def _helper(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    def show_help(_: argparse.Namespace) -> int:
        parser.print_help()
        return 0

    return show_help


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
    level = parser.add_mutually_exclusive_group()
    level.add_argument("-q", "--quiet", action="store_true", help="no progress and no remarks, errors only")
    level.add_argument("-v", "--verbose", action="store_true", help="say more about what is being done")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    return parser


def _model_flags(parser: argparse.ArgumentParser) -> None:
    models = "a variant's name, a folder, file or Hub repository of weights, an author's .pth, or none"
    parser.add_argument("--segmenter", default="default", metavar="MODEL", help=f"{models} (default: bundled weights)")
    parser.add_argument("--classifier", default="default", metavar="MODEL", help="likewise")
    _running_flags(parser)


def _running_flags(parser: argparse.ArgumentParser) -> None:
    own = "(default: the weights' own operating point)"
    parser.add_argument("--score-threshold", type=float, metavar="T", help=f"report lesions scored above T {own}")
    parser.add_argument(
        "--nms-threshold", type=float, metavar="T", help=f"of boxes that overlap by more, keep the best {own}"
    )
    parser.add_argument("--device", help=_DEVICE_HELP)
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the backbone; less than float32 is faster where the device can, and changes results a little "
        "(float16: GPUs only)",
    )
