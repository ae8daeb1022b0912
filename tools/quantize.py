"""Put the body, FPN and RPN head of weights into int8, once, and store them in the folder, for `precision="int8"`.

    python tools/quantize.py FOLDER --data lesions/train --check lesions/val

Needs `pip install nncf` and the extra `openvino`. NNCF quantizes as it does by default; the ranges of the activations
come from the slices of --data, on which the weights were trained. Then both precisions are measured on --check, slice
by slice: AP@0.5 at the operating point, or for classifiers the share of slices that are right. The difference, with a
bootstrap interval over slices, goes into config.json and onto the card. If it is a loss of more than --most, nothing is
written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
import torch
from torch import Tensor, nn

from ctmasknet import CTMaskNetError, evaluate
from ctmasknet.data.datasets import SliceDataset, open_dataset
from ctmasknet.errors import WeightsError
from ctmasknet.models import Model
from ctmasknet.models.inference import Inference
from ctmasknet.output import json_bytes, write_files
from ctmasknet.weights.assemble import int8_file
from ctmasknet.weights.files import CARD_NAME, CONFIG_NAME, INT8_NAME, WEIGHTS_NAME
from ctmasknet.weights.publish import check_folder, model_card

RESAMPLES = 2000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="weights as save_pretrained writes them")
    parser.add_argument("--data", type=Path, required=True, help="labelled slices to calibrate with")
    parser.add_argument("--check", type=Path, required=True, help="labelled slices to measure the difference on")
    parser.add_argument("--most", type=float, default=0.01, help="largest loss of AP@0.5 or accuracy (default: 0.01)")
    parser.add_argument("--task", default="segmentation", help="what --data is labelled for (default: segmentation)")
    options = parser.parse_args(arguments)
    try:
        print(quantize(options.folder, open_dataset(options.task, options.data), options.check, options.most))
    except CTMaskNetError as error:
        print(f"quantize: {error}", file=sys.stderr)
        return 2
    return 0


def quantize(folder: Path, data: SliceDataset[Any], check: Path, most: float) -> str:
    """Write the int8 network of a folder; returns what was measured, as the card says it."""
    model = check_folder(folder)
    content = int8_file(model, *calibrated(model, data))
    contents = {name: (folder / name).read_bytes() for name in (WEIGHTS_NAME, CONFIG_NAME)}
    with tempfile.TemporaryDirectory() as trial:
        write_files({Path(trial) / name: kept for name, kept in contents.items()})
        write_files(described(Path(trial), model, content, "not measured yet"))
        difference, measured = compared(trial, check, model.variant.task)
    if difference < -most:
        raise WeightsError(f"{folder}: {measured} That is beyond --most {most}, so nothing is written.")
    write_files(described(folder, model, content, f"Calibrated on {len(data)} training slices. {measured}"))
    return measured


class Flat(nn.Module):
    """A network of lists as one of a tuple, which a trace can give."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features, objectness, deltas = self.network(images)
        return (*features, *objectness, *deltas)


def calibrated(model: Model, data: SliceDataset[Any]) -> tuple[bytes, bytes]:
    """The XML and the weights of an OpenVINO model that takes any height and width."""

    def prepared(sample: Any) -> np.ndarray:
        resized = inference._resized((sample.image / 255 - inference._mean) / inference._std)
        return inference._transform.batch_images([resized], 32).contiguous().numpy()

    inference = Inference(model)
    example = torch.rand(1, 3, 512, 512)
    network = openvino.convert_model(Flat(inference._network), example_input=example, input=[1, 3, -1, -1])
    for kind, names in zip(("features", "objectness", "deltas"), np.array_split(network.outputs, 3), strict=True):
        for level, output in enumerate(names):
            output.get_tensor().set_names({f"{kind}.{level}"})
    quantized = nncf.quantize(network, nncf.Dataset(data, prepared), subset_size=len(data))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "int8.xml"
        openvino.save_model(quantized, file)
        return file.read_bytes(), file.with_suffix(".bin").read_bytes()


def described(folder: Path, model: Model, content: bytes, measured: str) -> dict[Path, bytes]:
    """The files that say a folder has this int8 network."""
    facts = json.loads((folder / CONFIG_NAME).read_text())
    facts["metadata"]["int8"] = {"sha256": hashlib.sha256(content).hexdigest(), "measured": measured}
    card = model_card(model.variant, facts["metadata"]).encode()
    return {
        folder / INT8_NAME: content,
        folder / CONFIG_NAME: json_bytes(facts, indent=2),
        folder / CARD_NAME: card,
    }


def compared(folder: str, data: Path, task: str) -> tuple[float, str]:
    """How int8 differs from float32, and a sentence about it."""
    figures = []
    for precision in ("float32", "int8"):
        rows = evaluate(folder, data, samples=0, precision=precision).rows
        if task == "segmentation":
            figures.append([row["operating_point"]["ap"][0] for row in rows])
        else:
            figures.append([float(np.argmax(row["probabilities"]) == row["label"]) for row in rows])
    before, after = np.array(figures)
    difference = after - before
    draws = np.random.default_rng(0).integers(0, len(difference), (RESAMPLES, len(difference)))
    low, high = np.percentile(difference[draws].mean(1), [2.5, 97.5])
    name = "AP@0.5 at the operating point" if task == "segmentation" else "Accuracy"
    sentence = (
        f"{name} on {len(before)} validation slices: {after.mean():.3f}, in float32 {before.mean():.3f}; the "
        f"difference, slice by slice, is {difference.mean():+.3f} (95% bootstrap interval over slices {low:+.3f} to "
        f"{high:+.3f})."
    )
    return float(difference.mean()), sentence


if __name__ == "__main__":
    sys.exit(main())
