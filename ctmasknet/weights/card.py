"""Model cards: the README.md that travels with a set of weights."""

from __future__ import annotations

import numbers
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ctmasknet.registry import Variant

DISCLAIMER = "Research software, not a medical device: no output of it may guide the care of a patient."

FOLDER = "PATH OF THIS FOLDER"
"""Stands in a card for the place the weights are loaded from, until they are pushed to a repository."""

_DATASET_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)

_USE = {
    "segmentation": "lesions = model([image])[0]  # boxes, labels, scores, masks",
    "classification": "result = model([image])[0]  # logits, probabilities, RoI batch",
}


def model_card(variant: Variant, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """Markdown with the YAML header the Hugging Face Hub reads; only what `metadata` states is claimed.

    A `dataset` that is a Hub id also goes into the header's list; a sentence only names the data of the figures.
    """
    lines = [
        "---",
        _header(variant, metadata).to_yaml(),
        "---",
        "",
        f"# {variant.name}",
        "",
        f"{variant.title}, after *Lightweight Model For The Prediction of COVID-19 Through The Detection And "
        "Segmentation of Lesions in Chest CT Scans* (A. Ter-Sarkisov, 2020).",
        "",
        DISCLAIMER,
    ]
    if metadata.get("note"):
        lines += ["", str(metadata["note"])]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "import ctmasknet",
        "",
        f'model = ctmasknet.create_model("{variant.name}", weights="{FOLDER}")',
        _USE[variant.task],
        "```",
        "",
        "Input: a list of (3, H, W) float tensors in 0..1, the lung window [-1350, 150] HU mapped to 0..1 and repeated "
        "over three channels.",
    ]
    if metadata.get("classes"):
        lines += ["", "Classes: " + ", ".join(f"{i} {name}" for i, name in enumerate(metadata["classes"])) + "."]
    if metadata.get("operating_point"):
        point = metadata["operating_point"]
        lines += [
            "",
            f"Operating point, used by `Predictor`: score above {point['score_threshold']}, NMS at "
            f"{point['nms_threshold']}.",
        ]
    if metadata.get("dataset"):
        lines += ["", "## Data", "", str(metadata["dataset"])]
    if metadata.get("training"):
        lines += ["", "## Training", "", *_table("setting", metadata["training"])]
    if metadata.get("metrics"):
        lines += ["", "## Measured", "", *_table("metric", metadata["metrics"])]
    lines += ["", "## Licence", "", f"{metadata.get('license', 'not stated')} (weights)."]
    return "\n".join(lines) + "\n"


def _header(variant: Variant, metadata: Mapping[str, Any]) -> ModelCardData:
    task = "image-segmentation" if variant.task == "segmentation" else "image-classification"
    dataset = str(metadata.get("dataset") or "")
    known_id = _DATASET_ID.fullmatch(dataset) is not None
    measured = {
        name: value
        for name, value in metadata.get("metrics", {}).items()
        if isinstance(value, numbers.Real) and not isinstance(value, bool)
    }
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset if known_id else "other",
            dataset_name=textwrap.shorten(dataset or "not stated", 200, placeholder=" ..."),
            metric_type=name,
            metric_value=value,
        )
        for name, value in measured.items()
    ]
    return ModelCardData(
        license=metadata.get("license"),
        library_name="ctmasknet",
        pipeline_tag=task,
        tags=["chest-ct", "covid-19", "medical-imaging", variant.task, "mask-rcnn"],
        datasets=[dataset] if known_id else None,
        metrics=list(measured) or None,
        model_name=variant.name if results else None,
        eval_results=results or None,
    )


def _table(head: str, values: Mapping[str, Any]) -> list[str]:
    return [f"| {head} | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in values.items())]
