"""Commands that predict: predict, demo."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from ctmasknet.cli.shared import arguments_of, as_flags, printable, say
from ctmasknet.errors import ConfigError
from ctmasknet.output import write_files
from ctmasknet.registry import DISCLAIMER, LESION_CLASSES


def predict_command(options: argparse.Namespace) -> int:
    """Segment and classify slices and whole scans.

    Slices are PNG, JPEG, WebP, TIFF or DICOM files. Scans are NIfTI files, multi-frame DICOM files and folders
    with a DICOM series. Give any number of them, folders that hold them, URLs (s3://bucket/scan,
    zip://slice.png::slices.zip), or quoted wildcards. This is written:
      per slice  FILE.json (boxes, scores, masks as COCO RLE, class probabilities), FILE.overlay.png
      per scan   .lesions.nii.gz (the mask), .lesion_ids.nii.gz, .lungs.nii.gz, .slices.csv, .lesions.csv,
                 .montage.png, .report.png and .pdf (a page to read), .json
                 with --format dicom also .seg.dcm (the mask) and .sr.dcm (the volumes)
      run.json   what was done, and how
    Each result goes to the path of its input below DIR; for inputs outside the current folder, paths start at
    the folder they all share. With more than one input, scans.csv has a row per scan, and predictions.jsonl
    records the finished files, so that the same command continues a run that was stopped. If a file cannot be
    used, it is reported, the others are predicted, and the exit code is 2.

    Examples:
      ctmasknet predict slice.png -o out
      ctmasknet predict series/ scan.nii.gz -o out
      ctmasknet predict 'scans/**/*.png' -o out --format jsonl --classifier none --score-threshold 0.5
      ctmasknet predict raw16.tif -o out --units hu
      accelerate launch -m ctmasknet predict --names files.txt -o out
    """
    if sys.stderr.isatty():
        _announce("Starting PyTorch and loading the models ...", options)
    from tqdm import tqdm

    from ctmasknet.batch import PREDICTIONS, FileResult, predict_files, process_device, process_shard, read_list

    if not options.inputs:
        if options.names is None:
            raise ConfigError("nothing to predict: name slices, scans or folders, or pass --names FILE")
        options.inputs, options.names = read_list(options.names), None
    options.shard = rank, world = _shard(options.shard) if options.shard else process_shard()
    options.spacing = options.spacing and tuple(options.spacing)
    options.device = options.device or process_device()
    predictor = _predictor(options)
    facts: list[dict[str, Any]] = []

    def show(result: FileResult) -> None:
        record = result.record or {}
        for problem in filter(None, (result.error, *record.get("problems", ()))):
            tqdm.write(f"ctmasknet predict: {printable(as_flags(problem, options))}", file=sys.stderr)
        if options.json:
            paths = {"paths": [str(path) for path in result.paths]} if result.record else {"error": result.error}
            lesions = {"lesions": len(record["lesions"])} if "lesions" in record else {}
            facts.append({"source": result.source, **record, **lesions, **paths})
        elif result.record is not None and not options.quiet:
            pages = [path for path in result.paths if path.name.endswith(".report.pdf")]  # where to begin with a scan
            where = f" -> {(pages or result.paths)[0]}" if result.paths else ""
            tqdm.write(printable(f"{result.source}: {record['summary']}{where}"))

    arguments = arguments_of(predict_files, options)
    summary = predict_files(predictor, **arguments, progress=not options.quiet, on_result=show)
    lines = [f"({caveat})" for caveat in summary.caveats if summary.predicted]
    if world > 1 or (options.out / PREDICTIONS).exists():  # more than a single slice or scan
        mine = f" (process {rank} of {world})" if world > 1 else ""
        lines.append(f"{summary.summary} -> {options.out}{mine}")
    if options.json or (lines and not options.quiet):
        say(options, {**summary.to_dict(), "results": facts}, *lines)
    return 2 if summary.failed or summary.bad_slices else 0


def _announce(text: str, options: argparse.Namespace) -> None:
    if not options.quiet:
        print(printable(text), file=sys.stderr, flush=True)


def _shard(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise ConfigError(f"--shard {text}: write it as I/N, I from 0 to N - 1, for example 0/16")
    return int(first), int(count)


def _predictor(options: argparse.Namespace) -> Any:
    from ctmasknet.predictor import Predictor

    given: dict[str, Any] = arguments_of(Predictor, options)
    given |= {slot: None for slot in ("segmenter", "classifier") if given.get(slot) == "none"}
    predictor = Predictor(**given)
    logging.getLogger("ctmasknet").info("%r", predictor)
    return predictor


def demo_command(options: argparse.Namespace) -> None:
    """Predict a synthetic slice and compare the result with what is in it.

    Uses the bundled weights and a synthetic slice that comes with the package. Prints what is in it, what was
    found, and where the slice and the picture are.
    """
    if options.web:
        _web(options)
        return
    if options.port is not None:
        raise ConfigError("--port goes with --web")
    _announce("Starting PyTorch (the first time, this takes longest) ...", options)
    from ctmasknet.example import SLICE, example_slice

    made, slice_file = example_slice(), options.out / SLICE.name
    write_files({slice_file: SLICE.read_bytes()})
    _announce("Loading the models ...", options)
    predictor = _predictor(options)
    _announce(f"Predicting {slice_file} ...", options)
    prediction = predictor(slice_file)
    paths = prediction.save(options.out)
    # A lesion counts as found if most of it is marked: the models join neighbours and split large ones.
    marked = prediction.lesion_mask
    drawn: list[dict[str, Any]] = []
    for label, mask in zip(made.labels, made.masks, strict=True):
        area, covered = int(mask.sum()), int((mask & marked).sum())
        drawn.append({"class": LESION_CLASSES[3][label], "area_px": area, "found": 2 * covered > area})
    found = sum(lesion["found"] for lesion in drawn)
    facts = prediction.to_dict() | {"lesions": len(prediction.scores), "paths": [str(path) for path in paths]}
    lines = [f"A synthetic slice, {slice_file}, with {len(drawn)} lesions:"]
    for lesion in drawn:
        lines.append(f"  {lesion['class']}, {lesion['area_px']} px: {'found' if lesion['found'] else 'missed'}")
    lines.append(f"The models say: {prediction.summary}")
    lines += [f"  ({caveat})" for caveat in prediction.caveats]
    lines += [f"{found} of {len(drawn)} lesions found. Picture: {paths[0]}", DISCLAIMER]
    say(options, {"lesions_drawn": drawn, "found": found, **facts}, *lines)


def _web(options: argparse.Namespace) -> None:
    import signal

    from ctmasknet.page import serve

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are deleted

    def tell(address: str) -> None:
        print(f"{DISCLAIMER} The page: {address} (Ctrl-C ends it)", flush=True)

    serve(**arguments_of(serve, options), on_start=tell)
