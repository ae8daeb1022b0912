"""Commands that predict: predict, demo."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ctmasknet.cli.printing import print_json
from ctmasknet.errors import ConfigError
from ctmasknet.output import write_files
from ctmasknet.registry import DISCLAIMER

_LINES_BESIDE_A_BAR = 100  # results; of more than that the bar alone is shown


def predict_command(options: argparse.Namespace) -> int:
    """`ctmasknet predict`; the exit code."""
    from itertools import islice

    from ctmasknet.batch import find_inputs, process_device, process_shard

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


def _predict_one(predictor: Any, file: str, options: argparse.Namespace) -> int:
    """One slice or one scan: its own files, no record of a run."""
    from tqdm import tqdm

    from ctmasknet.batch import place_of
    from ctmasknet.data.scans import is_scan

    place = options.out / place_of(file).parent
    if not Path(file).is_dir() and not is_scan(Path(file)):
        prediction = predictor(file, units=options.units)
        record, picture = prediction.save(place)
        if options.json:
            print_json([{"file": file, "json": str(record), "overlay": str(picture)} | _brief(prediction)])
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
        print_json([{"file": file, **{kind: str(path) for kind, path in paths.items()}} | scan.to_dict()])
    else:
        print(f"{file}: {scan.summary} -> {paths['mask']}")
    return 2 if any(row.error for row in scan.slices) else 0


def _predict_many(predictor: Any, shard: tuple[int, int], options: argparse.Namespace) -> int:
    from itertools import chain

    from tqdm import tqdm

    from ctmasknet.batch import FileResult, RunSummary, predict_files, read_list

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
        print_json(facts)
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


def demo_command(options: argparse.Namespace) -> int:
    """`ctmasknet demo`; the exit code."""
    if options.web:
        return _web(options)
    for flag in ("port", "max_upload_mb"):
        if getattr(options, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')} goes with --web")
    from ctmasknet.evaluation.metrics import mask_iou
    from ctmasknet.example import SLICE, example_slice

    made = example_slice()
    predictor, slice_file = _predictor(options), options.out / SLICE.name
    write_files({slice_file: SLICE.read_bytes()})
    prediction = predictor(slice_file)
    record, picture = prediction.save(options.out, slice_file.stem)
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
        facts = {"slice": str(slice_file), "lesions_drawn": lesions, "found": sum(covered)}
        print_json(facts | {"json": str(record), "overlay": str(picture)} | _brief(prediction))
        return 0
    print(f"A synthetic slice, {slice_file}, with {len(lesions)} lesions:")
    for lesion in lesions:
        verdict = f"found (IoU {lesion['best_iou']:.2f})" if lesion["found"] else "missed"
        print(f"  {lesion['class']}, {lesion['area_px']} px: {verdict}")
    print(f"The models say: {prediction.summary}")
    for caveat in prediction.caveats:
        print(f"  ({caveat})")
    print(f"{sum(covered)} of {len(lesions)} lesions found. Picture: {picture}")
    print(DISCLAIMER)
    return 0


def _web(options: argparse.Namespace) -> int:
    import signal

    from ctmasknet.page import serve

    def started(address: str) -> None:
        print(f"{DISCLAIMER} The page: {address} (Ctrl-C ends it)", flush=True)

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)  # so that uploads are deleted
    serve(
        segmenter=options.segmenter,
        classifier=options.classifier,
        score_threshold=options.threshold,
        device=options.device,
        precision=options.precision,
        port=options.port,
        max_upload_mb=200 if options.max_upload_mb is None else options.max_upload_mb,
        on_start=started,
    )
    return 0
