"""The whole of a model as ONNX, by PyTorch's TorchScript exporter."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ctmasknet.errors import import_extra
from ctmasknet.exporting.check import TOLERANCES, check_images, compare, require_close
from ctmasknet.exporting.traceable import traceable
from ctmasknet.models import Model

OPSET = 17
OUTPUTS = {
    "segmentation": {"boxes": 1, "labels": 1, "scores": 1, "masks": 4},
    "classification": {"logits": 0, "probabilities": 0, "boxes": 1, "scores": 1, "labels": 1, "deltas": 1},
}
"""Per task the outputs in their order, and how many of their dimensions, from the first on, depend on the image."""

_DIMENSIONS = ("regions", "one", "height", "width")


def import_onnx() -> tuple[ModuleType, ModuleType]:
    """onnx and onnxruntime.

    Raises:
        MissingExtraError: one is not installed.
    """
    onnx, onnxruntime = (import_extra(name, "export", "ONNX export") for name in ("onnx", "onnxruntime"))
    return onnx, onnxruntime


def to_onnx(model: Model, metadata: dict[str, str]) -> bytes:
    """The bytes of an ONNX file with `metadata` in its ``metadata_props``.

    Args:
        model: on the CPU, in evaluation mode and float32.
    """
    onnx, _ = import_onnx()
    outputs = OUTPUTS[model.variant.task]
    axes = {name: dict(enumerate(_DIMENSIONS[:count])) for name, count in outputs.items() if count}
    if "masks" in axes:
        del axes["masks"][1]
    with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        # What tracing cannot follow, it warns of; whether it matters here, the check on other sizes tells.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "Constant folding")  # a constant that stays an operation is as good
        # The newer exporter, which torch recommends, cannot trace NMS (docs/export.md).
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            traceable(model),
            (check_images()[0],),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(outputs),
            dynamic_axes={"image": {1: "height", 2: "width"}} | axes,
        )
        graph = onnx.load_model(file)
    onnx.helper.set_model_props(graph, metadata)
    onnx.checker.check_model(graph)
    content: bytes = graph.SerializeToString()
    return content


def check_onnx(content: bytes, model: Model) -> dict[str, float]:
    """Run the file in onnxruntime on phantoms; the largest difference of each output from the model's.

    Raises:
        ExportError: a difference beyond `TOLERANCES`.
    """
    _, onnxruntime = import_onnx()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    worst = dict.fromkeys(OUTPUTS[model.variant.task], 0.0)
    for image in check_images():
        with torch.no_grad():
            expected: dict[str, Tensor] = model([image])[0]
        values = (torch.from_numpy(value) for value in session.run(None, {"image": image.numpy()}))
        given = dict(zip(worst, values, strict=True))
        found = compare({name: expected[name] for name in worst}, given)
        worst = {name: max(worst[name], found[name]) for name in worst}
    require_close(worst, TOLERANCES, f"{model.variant.name} in onnxruntime {onnxruntime.__version__}")
    return worst
