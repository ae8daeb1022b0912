"""Commands about variants and their weights: list, info, download, convert, verify, push, export, doctor."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ctmasknet.cli.shared import say
from ctmasknet.errors import ConfigError
from ctmasknet.registry import get_variant, list_models


def list_command(options: argparse.Namespace) -> None:
    """List the variants.

    Examples: ctmasknet list; ctmasknet list "*_t1" --task segmentation; ctmasknet list --json
    """
    from ctmasknet.weights.manifest import variants_with_weights

    variants = [get_variant(name) for name in list_models(options.pattern, task=options.task)]
    if not variants and not options.json:
        raise ConfigError(f"no variant matches {options.pattern!r}")
    having = variants_with_weights()
    lines = [f"{'name':24}{'model':42}{'values':>9}  weights"]
    for variant in variants:
        weights = "default" if variant.name in having else "-"
        lines.append(f"{variant.name:24}{variant.title:42}{variant.num_values / 1e6:8.2f}M  {weights}")
    facts = [variant.to_dict() | {"default_weights": variant.name in having} for variant in variants]
    say(options, facts, *lines)


def info_command(options: argparse.Namespace) -> None:
    """Show a variant: what it is, what the paper reports for it, and its weights.

    Example: ctmasknet info maskrcnn_resnet18_t2
    """
    from ctmasknet.weights.manifest import manifest

    variant = get_variant(options.name)
    entries = [entry for entry in manifest() if entry.variant == variant.name]
    lines = [
        f"{variant.name}: {variant.title}, {variant.task}",
        f"  {variant.num_values:,} values; {variant.levels} FPN level(s), coarsest stride {variant.stride} px",
    ]
    if variant.roi_batch:
        lines.append(f"  module S reads {variant.roi_batch} RoIs; derived from {variant.segmenter}")
    lines.append(f"  paper (its data, its hardware): {_figures(asdict(variant.paper))}")
    for entry in entries:
        lines.append(f"  default weights: {entry.tag}, {entry.place}, {entry.bytes / 1e6:.1f} MB, {entry.license}")
        lines.append(f"    measured: {_figures(entry.metrics)}")
    if not entries:
        lines.append("  default weights: none yet")
    shown = ("tag", "place", "bytes", "sha256", "license", "metrics")
    weights = [{name: getattr(entry, name) for name in shown} for entry in entries]
    say(options, variant.to_dict() | {"weights": weights}, *lines)


def _figures(known: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)


def download_command(options: argparse.Namespace) -> None:
    """Fetch weights for use without a network.

    Give a variant's name for its default weights, or a Hub repository, best pinned: owner/name@commit. Weights
    go to the cache of huggingface_hub (HF_HOME), where create_model, from_pretrained and predict find them.

    Example: ctmasknet download maskrcnn_resnet18_t2
    """
    from ctmasknet.weights.hub import download

    facts, lines = [], []
    for name in options.names:
        source, file = download(name)
        size = file.stat().st_size
        facts.append({"name": name, "source": source, "folder": str(file.parent), "bytes": size})
        lines.append(f"{name}: {source}, {size / 1e6:.1f} MB in {file.parent}")
    say(options, facts, *lines)


def convert_command(options: argparse.Namespace) -> None:
    """Turn one of the paper author's checkpoints into a folder of weights.

    Writes model.safetensors, config.json, README.md and golden.safetensors. The variant is recognised from the
    file, anchors and numbers of classes are taken from it, and nothing in it is executed.

    Example: ctmasknet convert released.pth -o folder
    """
    from ctmasknet.weights.files import read_metadata
    from ctmasknet.zoo import load_released

    metadata = {} if options.metadata is None else read_metadata(options.metadata)
    model = load_released(options.checkpoint, options.name)
    model.metadata |= metadata
    name, folder = model.variant.name, model.save_pretrained(options.out, dtype=options.dtype)
    facts = {"variant": name, "folder": str(folder)}
    say(options, facts, f'{name}: create_model("{name}", weights="{folder}") loads it')


def push_command(options: argparse.Namespace) -> None:
    """Publish a folder of weights on the Hugging Face Hub.

    Checks the folder, then pushes model.safetensors, config.json, README.md and golden.safetensors to the
    repository in one commit, and nothing else. Needs HF_TOKEN or: hf auth login.

    Example: ctmasknet push runs/one/best owner/maskrcnn_resnet18_t2
    """
    from ctmasknet.weights.publish import push_folder

    pushed = push_folder(options.folder, options.repository, private=options.private)
    use = f'create_model("{pushed.variant}", weights="{pushed}") loads it'
    say(options, pushed._asdict(), f"{pushed.variant}: {pushed}, sha256 {pushed.sha256}", use)


def verify_command(options: argparse.Namespace) -> None:
    """Check that a folder of weights is as it was saved.

    Loads the weights strictly, runs the golden input saved with them, and compares the outputs and the digest
    of the weights with those recorded in golden.safetensors.

    Example: ctmasknet verify runs/one/best
    """
    from ctmasknet.weights.files import read_weights, sha256_of
    from ctmasknet.weights.manifest import known_as
    from ctmasknet.weights.publish import verified

    stored = read_weights(options.folder)
    variant, sha256 = verified(stored).variant.name, sha256_of(stored.path)
    known = known_as(sha256)
    place = f"sha256 {sha256}: {known or 'not in the manifest'}"
    facts = {"variant": variant, "sha256": sha256, "manifest": known}
    say(options, facts, f"{options.folder}: {variant}: golden outputs and digest match", place)


def export_command(options: argparse.Namespace) -> None:
    """Write a model as an ONNX file, which runs without this library.

    The file holds the whole model: image in, boxes and masks or class probabilities out. It is written only if
    it gives the same results as PyTorch. Needs the extra export. With --format openvino, writes what
    --precision int8 runs, backbone to proposals, as .xml and .bin.

    Examples:
      ctmasknet export maskrcnn_resnet18_t1 -o model.onnx
      ctmasknet export run/best -o model.onnx
    """
    from ctmasknet import export
    from ctmasknet.zoo import open_model

    exported = export(open_model(options.model, device="cpu"), options.out, format=options.format)
    say(options, exported.to_dict(), exported)


def doctor_command(options: argparse.Namespace) -> int:
    """Check the installation: torch against torchvision, devices, cache, bundled weights.

    The exit code is 0 if all that is needed works, and 1 if not.
    """
    from ctmasknet.doctor import examine

    checks = examine()
    lines = [f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}" for check in checks]
    say(options, [check._asdict() for check in checks], *lines)
    return 0 if all(check.ok for check in checks) else 1
