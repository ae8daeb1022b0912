"""Commands that predict: predict, demo."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from ctmasknet.cli.printing import as_flags, printable, say
from ctmasknet.errors import ConfigError
from ctmasknet.output import write_files
from ctmasknet.registry import DISCLAIMER, LESION_CLASSES


def predict_command(options: argparse.Namespace) -> int:
    """`ctmasknet predict`; the exit code."""
    if sys.stderr.isatty():
        _announce("Starting PyTorch ...", options)
    from tqdm import tqdm

    from ctmasknet.batch import PREDICTIONS, FileResult, predict_files, process_device, process_shard, read_list

    if not options.files and options.names is None:
        raise ConfigError("nothing to predict: name slices, scans or folders, or pass --names FILE")
    shard = _shard(options.shard) if options.shard else process_shard()
    inputs, names = (options.files, options.names) if options.files else (list(read_list(options.names)), None)
    options.device = options.device or process_device()
    if sys.stderr.isatty():
        _announce("Loading the models ...", options)
    predictor = _predictor(options, batch_size=options.batch_size, score_map=options.score_map)
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
            where = f" -> {result.paths[0]}" if result.paths else ""
            tqdm.write(printable(f"{result.source}: {record['summary']}{where}"))

    summary = predict_files(
        predictor,
        inputs,
        options.out,
        names=names,
        units=options.units,
        spacing=tuple(options.spacing) if options.spacing else None,
        series=options.series,
        keep=options.keep,
        format=options.format,
        slices=options.slices,
        readers=options.readers,
        shard=shard,
        restart=options.restart,
        annotations=options.annotations,
        progress=not options.quiet,
        on_result=show,
    )
    lines = [f"({caveat})" for caveat in summary.caveats if summary.predicted]
    if shard[1] > 1 or (options.out / PREDICTIONS).exists():  # more than a single slice or scan
        mine = f" (process {shard[0]} of {shard[1]})" if shard[1] > 1 else ""
        lines.append(f"{summary.summary} -> {options.out}{mine}")
    if options.json or (lines and not options.quiet):
        say(options, {**summary.to_dict(), "results": facts}, "\n".join(lines))
    return 2 if summary.failed or summary.bad_slices else 0


def _announce(text: str, options: argparse.Namespace) -> None:
    if not options.quiet:
        print(printable(text), file=sys.stderr, flush=True)


def _shard(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise ConfigError(f"--shard {text}: write it as I/N, I from 0 to N - 1, for example 0/16")
    return int(first), int(count)


def _predictor(options: argparse.Namespace, **more: Any) -> Any:
    from ctmasknet.predictor import Predictor

    chosen = [None if model == "none" else model for model in (options.segmenter, options.classifier)]
    predictor = Predictor(
        *chosen,
        device=options.device,
        score_threshold=options.score_threshold,
        nms_threshold=options.nms_threshold,
        precision=options.precision,
        **more,
    )
    logging.getLogger("ctmasknet").info("%r", predictor)
    return predictor


def demo_command(options: argparse.Namespace) -> int:
    """`ctmasknet demo`; the exit code."""
    if options.web:
        return _web(options)
    for flag in ("port", "max_upload_mb"):
        if getattr(options, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')} goes with --web")
    _announce("Starting PyTorch (the first time, this takes longest) ...", options)
    from ctmasknet.evaluation.metrics import mask_iou
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
    covered = [bool((mask & marked).sum() * 2 > mask.sum()) for mask in made.masks]
    ious = mask_iou(made.masks, prediction.masks).max(axis=1, initial=0).tolist()
    drawn = [
        {"class": LESION_CLASSES[3][label], "area_px": int(mask.sum()), "found": found, "best_iou": round(iou, 3)}
        for label, mask, found, iou in zip(made.labels, made.masks, covered, ious, strict=True)
    ]
    facts = {key: value for key, value in prediction.to_dict().items() if key != "roi_batch"}
    facts |= {"source": str(slice_file), "lesions": len(prediction.scores), "paths": [str(path) for path in paths]}
    lines = [f"A synthetic slice, {slice_file}, with {len(drawn)} lesions:"]
    for lesion in drawn:
        verdict = f"found (IoU {lesion['best_iou']:.2f})" if lesion["found"] else "missed"
        lines.append(f"  {lesion['class']}, {lesion['area_px']} px: {verdict}")
    lines.append(f"The models say: {prediction.summary}")
    lines += [f"  ({caveat})" for caveat in prediction.caveats]
    lines += [f"{sum(covered)} of {len(drawn)} lesions found. Picture: {paths[0]}", DISCLAIMER]
    say(options, {"lesions_drawn": drawn, "found": sum(covered), **facts}, "\n".join(lines))
    return 0


def _web(options: argparse.Namespace) -> int:
    import signal

    from ctmasknet.page import serve

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)  # so that uploads are deleted
    serve(
        segmenter=options.segmenter,
        classifier=options.classifier,
        score_threshold=options.score_threshold,
        nms_threshold=options.nms_threshold,
        device=options.device,
        precision=options.precision,
        port=options.port,
        max_upload_mb=200 if options.max_upload_mb is None else options.max_upload_mb,
        on_start=lambda address: print(f"{DISCLAIMER} The page: {address} (Ctrl-C ends it)", flush=True),
    )
    return 0
