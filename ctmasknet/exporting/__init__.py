"""Models as files that run without this library: ONNX (the whole model) and PT2 (its convolutional part)."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ctmasknet.errors import ConfigError
from ctmasknet.exporting.check import ExportError
from ctmasknet.exporting.metadata import describe
from ctmasknet.exporting.onnx_file import OPSET, check_onnx, import_onnx, to_onnx
from ctmasknet.exporting.pt2_file import check_pt2, to_pt2
from ctmasknet.models import Model
from ctmasknet.models.classifier import COVIDCTMaskNet
from ctmasknet.models.detector import LesionMaskRCNN
from ctmasknet.output import require_writable, write_files
from ctmasknet.predictor import operating_point

__all__ = ["ExportError", "Exported", "export"]

FORMATS = ("onnx", "pt2")


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: where.
        format: ``"onnx"`` or ``"pt2"``.
        bytes: its size.
        differences: output -> how far the file's was from PyTorch's at most, on the slices of the check: pixels for
            boxes, 1 - IoU for masks, else as the output itself.
        metadata: what the file says of itself; text under each key, JSON where a value has parts.
    """

    path: Path
    format: str
    bytes: int
    differences: dict[str, float]
    metadata: dict[str, str]

    def __str__(self) -> str:
        found = ", ".join(f"{name} {value:.0e}" for name, value in self.differences.items())
        opset = f" opset {self.metadata['opset']}" if "opset" in self.metadata else ""
        return f"{self.path}: {self.format}{opset}, {self.bytes / 1e6:.1f} MB; differs from PyTorch by at most: {found}"


def export(model: Model, path: str | os.PathLike[str], *, format: Literal["onnx", "pt2"] = "onnx") -> Exported:
    """Write a model as one file that describes itself, checked against PyTorch.

    - ``"onnx"`` (extra ``export``): the whole model, ``image (3, H, W)`` float32 in 0..1, any H and W. Outputs of a
      segmenter, at its operating point: ``boxes (N, 4)``, ``labels (N,)``, ``scores (N,)``, ``masks (N, 1, H, W)``; of
      a classifier: ``logits (K,)``, ``probabilities (K,)`` and its RoI batch ``boxes``, ``scores``, ``labels``,
      ``deltas``.
    - ``"pt2"``: backbone, FPN and RPN head as a `torch.export` program; ``images (B, 3, h, w)`` float32, normalised, h
      and w multiples of 32. Gives per FPN level the feature map, the objectness and the box deltas.

    The model is copied, not changed. The file replaces one of the same name, and only after its outputs on phantoms
    have been compared with PyTorch's.

    Args:
        model: from `create_model`, `from_pretrained` or `load_released`; on any device, in any mode.
        path: the file; folders are made as needed.
        format: ``"onnx"`` or ``"pt2"``.

    Raises:
        ConfigError: unknown format, or not a model of this library.
        MissingExtraError: onnx or onnxruntime is not installed.
        ExportError: the file's outputs are not PyTorch's; nothing is written.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ConfigError(f"format={format!r}: use {' or '.join(map(repr, FORMATS))}")
    if not isinstance(model, LesionMaskRCNN | COVIDCTMaskNet):
        raise ConfigError(f"{type(model).__name__} cannot be exported: give a model made by ctmasknet.create_model")
    if format == "onnx":
        import_onnx()
    require_writable(path)
    model = _frozen(model)
    metadata = describe(model, format) | ({"opset": str(OPSET)} if format == "onnx" else {})
    make, check = (to_onnx, check_onnx) if format == "onnx" else (to_pt2, check_pt2)
    content = make(model, metadata)
    differences = check(content, model)
    write_files({path: content})
    return Exported(path, format, len(content), differences, metadata)


def _frozen(model: Any) -> Model:
    """A copy as it predicts: on the CPU, in float32, a segmenter at its operating point."""
    copy: Model = deepcopy(model).cpu().float().eval().requires_grad_(False)
    copy.backbone.autocast_dtype = None
    if isinstance(copy, LesionMaskRCNN):
        copy.roi_heads.score_thresh, copy.roi_heads.nms_thresh = operating_point(copy)
    return copy
