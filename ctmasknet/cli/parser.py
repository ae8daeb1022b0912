"""The commands, their flags and their help."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ctmasknet.cli import learning, predicting, variants
from ctmasknet.cli.shared import printable
from ctmasknet.registry import DISCLAIMER, __version__

Flag = Callable[..., argparse.Action]


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
    parser.set_defaults(run=lambda _: parser.print_help(), quiet=False, verbose=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    flag = _command(commands, "list", variants.list_command)
    flag("pattern", nargs="?", default="*", help='shell wildcards, for example "*_t1"')
    flag("--task", choices=("segmentation", "classification"), help="only this task")

    flag = _command(commands, "info", variants.info_command)
    flag("name", metavar="NAME", help="a variant: see ctmasknet list")

    flag = _command(commands, "predict", predicting.predict_command)
    flag("inputs", nargs="*", metavar="FILE", help="slices, scans, folders, URLs of them, quoted wildcards")
    flag("-o", "--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    flag("--names", metavar="LIST", help=f"{_NAMES_HELP}; without FILE arguments, it lists their paths")
    flag("--units", choices=("hu", "range"), help=_UNITS_HELP)
    flag(
        "--format",
        choices=("files", "dicom", "jsonl", "coco"),
        help="files (default): JSON and overlay of each input; dicom: DICOM SEG and SR as well, for DICOM scans only "
        "(extra dicom); jsonl: only predictions.jsonl; coco: predictions.jsonl and COCO results",
    )
    flag("--score-map", action="store_true", help="also write the mask logits of all regions of a slice (H, W) as .npy")
    flag("--slices", action="store_true", help="predict DICOM files in folders as single slices, not as scans")
    flag("--series", metavar="UID", help="which series of a folder to predict (default: the longest)")
    spacing = "of a scan that does not say it: mm between columns, rows and slices"
    flag("--spacing", nargs=3, type=float, metavar="MM", help=spacing)
    flag("--keep", choices=("all", "lungs"), help="lungs: of scans, drop lesions outside the lungs (default: all)")
    flag("--batch-size", type=int, metavar="N", help="slices per batch (default: 1 on a CPU, else 8)")
    flag("--shard", metavar="I/N", help="predict only every N-th input, starting with the I-th, counted from 0")
    _model_flags(flag)

    flag = _command(commands, "demo", predicting.demo_command)
    flag("-o", "--out", type=Path, default=Path("ctmasknet-demo"), metavar="DIR", help="default: ctmasknet-demo")
    flag("--web", action="store_true", help="open a page for your browser instead (extra demo)")
    flag("--port", type=int, metavar="N", help="with --web: port of the page (default: the first free one from 7860)")
    _model_flags(flag)

    flag = _command(commands, "train", learning.train_command)
    flag("model", nargs="?", metavar="NAME", help="variant to train: see ctmasknet list")
    flag("--data", nargs="+", metavar="DIR", help="training data, one folder or several")
    flag("--val", nargs="+", metavar="DIR", help="validation data")
    flag("--weights", metavar="W", help="weights to start from: default, a folder or an author's .pth")
    flag("-o", "--out", metavar="RUN", help="folder of the run")
    flag("--config", type=Path, metavar="FILE", help="YAML or JSON with any field of TrainConfig")
    flag("--recipe", choices=("fast", "paper"), help="fast (default) or the paper's")
    flag("--classes", choices=("merge", "both", "ggo"), help="lesion classes to learn from CNCB masks (default: merge)")
    flag("--names", metavar="LIST", help=_NAMES_HELP)
    flag("--val-names", metavar="LIST", help="like --names, for --val")
    flag("--epochs", type=int, help="passes over the data")
    flag("--batch-size", type=int, help="slices per process and step")
    flag("--lr", type=float, help="highest learning rate")
    flag("--seed", type=int, help="fixes order, augmentation and sampling (default: 0)")
    flag("--device", help=_DEVICE_HELP)
    flag("--cache-rois", action="store_true", default=None, help="classifiers: train module S alone")
    flag("--resume", metavar="R", help="auto (default), no, or a checkpoint to continue from")
    flag(
        "--set",
        dest="fields",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of TrainConfig, for example --set patience=5",
    )

    data = commands.add_parser("data", help="look at a data set before training on it")
    data.set_defaults(run=lambda _: data.print_help())
    data_commands = data.add_subparsers(dest="data_command", metavar="COMMAND")
    flag = _command(data_commands, "check", learning.data_check_command)
    flag("data", nargs="+", metavar="DIR", help="one folder or several")
    flag("--against", nargs="+", metavar="DIR", help="the other split: report patients and images in both")
    flag("--against-names", metavar="FILE", help="like --names, for --against")
    flag("--task", choices=("segmentation", "classification"), help="default: what the files show")
    flag("--classes", choices=("merge", "both", "ggo"), help="lesion classes (default: merge)")
    flag("--min-area", type=int, metavar="PX", help=_AREA_HELP)
    flag("--names", metavar="LIST", help=_NAMES_HELP)

    flag = _command(commands, "download", variants.download_command)
    flag("names", nargs="+", metavar="NAME", help="a variant, owner/name or owner/name@revision")

    flag = _command(commands, "convert", variants.convert_command)
    flag("checkpoint", type=Path, metavar="FILE", help="the author's .pth")
    flag("-o", "--out", required=True, type=Path, metavar="DIR", help="the folder to write")
    flag("--name", metavar="NAME", help="the variant it must hold (default: recognise it)")
    flag("--dtype", choices=("float32", "float16"), default="float32", help="how values are stored (default: float32)")
    flag("--metadata", type=Path, metavar="JSON", help="what is known of the weights: classes, metrics, license, ...")

    flag = _command(commands, "verify", variants.verify_command)
    flag("folder", type=Path, metavar="DIR", help="a folder of weights, such as a run's best/")

    flag = _command(commands, "push", variants.push_command)
    flag("folder", type=Path, metavar="DIR", help="a folder of weights, such as a run's best/")
    flag("repository", metavar="REPO", help="owner/name; created if it does not exist")
    flag("--private", action="store_true", help="if the repository is created, make it private")

    flag = _command(commands, "evaluate", learning.evaluate_command)
    flag("model", metavar="MODEL", help="what to measure")
    flag("--data", nargs="+", required=True, metavar="DIR", help="labelled slices")
    flag("--names", metavar="LIST", help=_NAMES_HELP)
    flag("--min-area", type=int, metavar="PX", help=_AREA_HELP)
    flag("--samples", type=int, metavar="N", help="bootstrap resamples (default: 1000)")
    flag("--batch-size", type=int, metavar="N", help="slices per batch")
    flag("--limit", type=int, metavar="N", help="at most N slices, drawn at random")
    flag("--seed", type=int, help="for everything drawn at random (default: 0)")
    flag("--classes", choices=("merge", "both", "ggo"), help="lesion classes (default: the model's)")
    flag("-o", "--out", metavar="DIR", help="folder for the results; an interrupted run continues from them")
    _running_flags(flag)

    flag = _command(commands, "export", variants.export_command)
    flag("model", metavar="MODEL", help="a variant's name, a folder or Hub repository of weights, or an author's .pth")
    flag("-o", "--out", required=True, type=Path, metavar="FILE", help="the file to write")
    flag("--format", choices=("onnx", "openvino"), default="onnx", help="kind of file (default: onnx)")

    _command(commands, "doctor", variants.doctor_command)
    return parser


_UNITS_HELP = (
    "what the values are, if a file does not say: hu (Hounsfield units), or range (unknown: each slice is "
    "stretched over its own range)"
)
_NAMES_HELP = "only the slices that this text file names, one per line"
_AREA_HELP = "lesions of up to PX pixels do not count (default: 100)"
_DEVICE_HELP = "cpu, cuda, cuda:1, ... (default: a GPU if there is one)"


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None]) -> Flag:
    """A command that says of itself what its function's docstring says, with the flags of all; what adds its own."""
    text = inspect.cleandoc(run.__doc__ or "")
    summary = text[:1].lower() + text[1:].partition(".\n")[0].rstrip(".")
    raw = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=text, formatter_class=raw)
    parser.set_defaults(run=run)
    level = parser.add_mutually_exclusive_group()
    level.add_argument("-q", "--quiet", action="store_true", help="print no progress and no remarks, only errors")
    level.add_argument("-v", "--verbose", action="store_true", help="print more about what is being done")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    return parser.add_argument


def _model_flags(flag: Flag) -> None:
    models = "a variant's name, a folder, file or Hub repository of weights, an author's .pth, or none"
    flag("--segmenter", metavar="MODEL", help=f"{models} (default: bundled weights)")
    flag("--classifier", metavar="MODEL", help="likewise")
    _running_flags(flag)


def _running_flags(flag: Flag) -> None:
    own = "(default: the weights' own operating point)"
    flag("--score-threshold", type=float, metavar="T", help=f"report lesions scored above T {own}")
    flag("--nms-threshold", type=float, metavar="T", help=f"of lesions that overlap more, keep the best {own}")
    flag("--device", help=_DEVICE_HELP)
    flag(
        "--precision",
        choices=("float32", "bfloat16", "float16", "int8"),
        help="precision of the backbone: bfloat16, float16 (GPUs only) and int8 (CPUs only, extra openvino) are faster "
        "on hardware made for them, and change results a little (default: float32)",
    )
