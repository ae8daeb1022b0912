"""Backbone, FPN and RPN head of a model as a `torch.export` program."""

from __future__ import annotations

import io
import json

import torch
from torch import Tensor, nn
from torch.export import Dim

from ctmasknet.exporting.check import require_close
from ctmasknet.models import Model

METADATA_NAME = "metadata.json"
_STEP = 32  # pixels: the sides of a batch are multiples of it, as GeneralizedRCNNTransform pads them
_TOLERANCES = {"features": 1e-4, "objectness": 1e-4, "deltas": 1e-4}


class Dense(nn.Module):
    """``(B, 3, h, w)`` -> features, objectness, deltas: per FPN level (B, C, h / s, w / s) each, finest first."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.head = model.rpn.head

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        features = list(self.backbone(images).values())
        objectness, deltas = self.head(features)
        return features, objectness, deltas


def to_pt2(model: Model, metadata: dict[str, str]) -> bytes:
    """The bytes of a PT2 archive with `metadata` as the extra file ``metadata.json``.

    Args:
        model: on the CPU, in evaluation mode and float32.
    """
    sides = {2: _STEP * Dim("rows", min=1, max=256), 3: _STEP * Dim("columns", min=1, max=256)}
    with torch.no_grad():
        program = torch.export.export(
            Dense(model),
            (torch.zeros(2, 3, 3 * _STEP, 4 * _STEP),),
            dynamic_shapes={"images": {0: Dim("batch", min=1, max=1024)} | sides},
        )
    written = io.BytesIO()
    torch.export.save(program, written, extra_files={METADATA_NAME: json.dumps(metadata)})
    return written.getvalue()


def check_pt2(content: bytes, model: Model) -> dict[str, float]:
    """Load the archive and run it on noise of another size; the largest difference of each output from the model's.

    Raises:
        ExportError: a difference beyond 1e-4.
    """
    program = torch.export.load(io.BytesIO(content)).module()
    images = torch.randn(1, 3, 5 * _STEP, 2 * _STEP, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, given = Dense(model)(images), program(images)
    found = {
        name: max(float((one - other).abs().max()) for one, other in zip(*levels, strict=True))
        for name, *levels in zip(_TOLERANCES, expected, given, strict=True)
    }
    require_close(found, _TOLERANCES, f"{model.variant.name} as a torch.export program")
    return found
