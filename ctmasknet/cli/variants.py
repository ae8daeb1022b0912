"""Commands about variants and their weights: list, info, download, convert, push, export, doctor."""

from __future__ import annotations

import argparse
import sys

from ctmasknet.cli.printing import print_json
from ctmasknet.registry import Variant, get_variant, list_models


def list_command(options: argparse.Namespace) -> int:
    """`ctmasknet list`; the exit code."""
    from ctmasknet.weights.manifest import variants_with_weights

    names = list_models(options.pattern, task=options.task)
    having = variants_with_weights()
    if options.json:
        print_json([get_variant(name).to_dict() | {"default_weights": name in having} for name in names])
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


def info_command(options: argparse.Namespace) -> int:
    """`ctmasknet info`; the exit code."""
    from ctmasknet.weights.manifest import manifest

    variant = get_variant(options.name)
    entries = [entry for entry in manifest() if entry.variant == variant.name]
    if options.json:
        shown = ("tag", "place", "bytes", "sha256", "license", "metrics")
        weights = [{name: getattr(entry, name) for name in shown} for entry in entries]
        print_json(variant.to_dict() | {"weights": weights})
        return 0
    print(f"{variant.name}: {variant.title}, {variant.task}")
    print(f"  {variant.num_values:,} values; {variant.levels} FPN level(s), coarsest stride {variant.stride} px")
    if variant.roi_batch:
        print(f"  module S reads {variant.roi_batch} RoIs; derived from {variant.segmenter}")
    print(f"  paper (its data, its hardware): {_paper_line(variant)}")
    for entry in entries:
        figures = ", ".join(f"{key} {value}" for key, value in entry.metrics.items())
        print(f"  default weights: {entry.tag}, {entry.place}, {entry.bytes / 1e6:.1f} MB, {entry.license}")
        print(f"    measured: {figures}")
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


def download_command(options: argparse.Namespace) -> int:
    """`ctmasknet download`; the exit code."""
    from ctmasknet.weights.hub import download

    facts = []
    for name in options.names:
        found = download(name)
        facts.append({"name": name, "source": found.source, "folder": str(found.folder), "bytes": found.bytes})
        if not options.json:
            print(f"{name}: {found.source}, {found.bytes / 1e6:.1f} MB in {found.folder}")
    if options.json:
        print_json(facts)
    return 0


def convert_command(options: argparse.Namespace) -> int:
    """`ctmasknet convert`; the exit code."""
    from ctmasknet.weights.files import read_metadata
    from ctmasknet.zoo import load_released

    metadata = {} if options.metadata is None else read_metadata(options.metadata)
    model = load_released(options.checkpoint, options.name)
    model.metadata |= metadata
    folder = model.save_pretrained(options.out, dtype=options.dtype)
    if options.json:
        print_json({"variant": model.variant.name, "folder": str(folder)})
    else:
        print(f'{model.variant.name}: create_model("{model.variant.name}", weights="{folder}") loads it')
    return 0


def push_command(options: argparse.Namespace) -> int:
    """`ctmasknet push`; the exit code."""
    from ctmasknet.weights.publish import push_folder

    published = push_folder(options.folder, options.repository, private=options.private)
    if options.json:
        print_json(published.to_dict())
    else:
        print(f"{published.variant}: {published}, sha256 {published.sha256}")
        print(f'create_model("{published.variant}", weights="{published}") loads it')
    return 0


def export_command(options: argparse.Namespace) -> int:
    """`ctmasknet export`; the exit code."""
    from ctmasknet import export
    from ctmasknet.zoo import open_model

    exported = export(open_model(options.model, device="cpu"), options.out)
    if options.json:
        print_json(exported.to_dict())
    else:
        print(exported)
    return 0


def doctor_command(options: argparse.Namespace) -> int:
    """`ctmasknet doctor`; the exit code."""
    from ctmasknet.doctor import examine

    checks = examine()
    if options.json:
        print_json([check.to_dict() for check in checks])
    else:
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}")
    return 0 if all(check.ok for check in checks) else 1
