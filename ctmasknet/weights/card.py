"""Model cards: the README.md that travels with a set of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from ctmasknet.registry import Variant

DISCLAIMER = "Research software, not a medical device: no output of it may guide the care of a patient."

_USE = {
    "segmentation": "lesions = model([image])[0]  # boxes, labels, scores, masks",
    "classification": "result = model([image])[0]  # logits, probabilities, RoI batch",
}


def model_card(variant: Variant, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """Markdown with the YAML header the Hugging Face Hub reads; only what `metadata` states is claimed."""
    header = ModelCardData(
        license=metadata.get("license"),
        library_name="ctmasknet",
        pipeline_tag="image-segmentation" if variant.task == "segmentation" else "image-classification",
        tags=["chest-ct", "covid-19", "medical-imaging", variant.task, "mask-rcnn"],
    )
    lines = [
        "---",
        header.to_yaml(),
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
        f'model = ctmasknet.create_model("{variant.name}", weights="PATH OF THIS FOLDER")',
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


def _table(head: str, values: Mapping[str, Any]) -> list[str]:
    return [f"| {head} | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in values.items())]
