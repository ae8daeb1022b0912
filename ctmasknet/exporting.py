"""Models as ONNX files, which run without this library and are checked against PyTorch before they are written.

Tracing records tensors only: every Python number taken from a shape would be frozen into the graph. So whatever
depends on the size of the image or on the number of regions is written here once more with tensors; layers, weights
and settings are the model's own. Run plainly, a module of this file gives what the model gives
(`tests/test_export.py`). Arithmetic follows torchvision's, as read in 0.21 and 0.29.

The module is not called `export`: importing it would then put it in the place of the function `ctmasknet.export`.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx.operators import shape_as_tensor
from torchvision.ops import nms

from ctmasknet.data.slices import LUNG_WINDOW
from ctmasknet.errors import ConfigError, CTMaskNetError, import_extra
from ctmasknet.example import example_slice
from ctmasknet.models import COVIDCTMaskNet, LesionMaskRCNN, Model
from ctmasknet.models.detector import Regions, rescale
from ctmasknet.models.inference import Inference, Protocol, covered, feature_scales, stretch, stretched
from ctmasknet.output import require_writable, write_files
from ctmasknet.registry import DISCLAIMER, LESION_CLASSES, __version__
from ctmasknet.weights.files import state_digest
from ctmasknet.weights.publish import OF_THE_IMAGE, nearest, still_true
from ctmasknet.zoo import class_names

OPSET = 17
OUTPUTS = {
    "segmentation": ("boxes", "labels", "scores", "masks"),
    "classification": ("logits", "probabilities", "boxes", "scores", "labels", "deltas"),
}

TOLERANCES = {
    "boxes": 1e-2,  # pixels
    "labels": 0.0,
    "scores": 1e-4,
    "masks": 0.05,  # share of the foreground that differs: a rounded box may move the edge of a mask by a pixel
    "logits": 1e-4,
    "probabilities": 1e-4,
    "deltas": 1e-3,
}
_FEW_PIXELS, _VERGE = 4, 0.02
_PAD = 32  # pixels: a resized image is padded to a multiple, as in GeneralizedRCNNTransform
_TOGETHER = 1000  # boxes: torchvision does the NMS of more than so many class by class (4000 numbers, on a CPU)


class ExportError(CTMaskNetError):
    """An exported file that does not give what the model gives."""


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: where.
        bytes: its size.
        differences: output -> how far the file's was from PyTorch's at most, on the slices of the check: pixels for
            boxes, 1 - IoU for masks, else as the output itself.
        metadata: what the file says of itself; text under each key, JSON where a value has parts.
    """

    path: Path
    bytes: int
    differences: dict[str, float]
    metadata: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"path": str(self.path)}

    def __repr__(self) -> str:
        size = f"{self.bytes / 1e6:.1f} MB"
        if not self.differences:
            return f"{self.path} and {self.path.with_suffix('.bin').name}: OpenVINO, {size}; {self.metadata['int8']}"
        found = ", ".join(f"{name} {value:.0e}" for name, value in self.differences.items())
        return f"{self.path}: ONNX opset {OPSET}, {size}; differs from PyTorch by at most: {found}"


def export(model: Model, path: str | os.PathLike[str], *, format: Literal["onnx", "openvino"] = "onnx") -> Exported:
    """Write a model as one ONNX file that describes itself, checked against PyTorch (extra ``export``).

    The file takes ``image (3, H, W)`` float32 in 0..1, any H and W. It gives, of a segmenter at its operating point,
    ``boxes (N, 4)``, ``labels (N,)``, ``scores (N,)`` and ``masks (N, 1, H, W)``; of a classifier ``logits (K,)``,
    ``probabilities (K,)`` and its RoI batch ``boxes``, ``scores``, ``labels``, ``deltas``.

    The model is copied, not changed. The file replaces one of the same name, and only after its outputs on the example
    slice have been compared with PyTorch's.

    Args:
        model: from `create_model`, `from_pretrained` or `load_released`; on any device, in any mode.
        path: the file; folders are made as needed.
        format: ``"openvino"`` instead writes what ``precision="int8"`` runs, as an XML file and a ``.bin`` beside it:
            body, FPN and RPN head in int8. It takes (1, 3, H, W) normalised values, H and W multiples of 32, and gives
            of every level the features (1, C, H, W), objectness (1, H, W, A) and deltas (1, H, W, 4 A). What was
            measured of it stands in `Exported.metadata`; nothing is compared.

    Raises:
        ConfigError: not a model of this library, another format, or weights without an int8 network.
        MissingExtraError: onnx or onnxruntime is not installed.
        ExportError: the file's outputs are not PyTorch's; nothing is written.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if not isinstance(model, LesionMaskRCNN | COVIDCTMaskNet):
        raise ConfigError(f"{type(model).__name__} cannot be exported: give a model made by ctmasknet.create_model")
    if format == "openvino":
        return _export_int8(model, path)
    if format != "onnx":
        raise ConfigError(f"format={format!r}: use 'onnx' or 'openvino'")
    onnx, onnxruntime = (import_extra(name, "export", "ONNX export") for name in ("onnx", "onnxruntime"))
    require_writable(path)
    model = deepcopy(model).cpu().float().eval().requires_grad_(False)
    model.backbone.autocast_dtype = None
    metadata = describe(model)
    content = to_onnx(onnx, model, metadata)
    differences = check_onnx(onnxruntime, content, model)
    write_files({path: content})
    return Exported(path, len(content), differences, metadata)


def _export_int8(model: Model, path: Path) -> Exported:
    if path.suffix != ".xml":
        raise ConfigError(f"{path}: OpenVINO files come as a pair, so name the .xml; the .bin goes beside it")
    if model.int8_network is None:
        raise ConfigError(f"these weights of {model.variant.name} have no int8 network: use format='onnx'")
    network, weights = model.int8_network(model)
    write_files({path: network, path.with_suffix(".bin"): weights})
    facts = {"variant": model.variant.name, "int8": model.metadata["int8"]["measured"]}
    return Exported(path, len(network) + len(weights), {}, facts)


def describe(model: Model) -> dict[str, str]:
    """Key -> text, JSON where a value has parts; of a model as it is exported."""
    heads, config = model.roi_heads, model.config
    facts: dict[str, Any] = {
        "library": "ctmasknet",
        "opset": OPSET,
        "variant": model.variant.name,
        "task": model.variant.task,
        "classes": class_names(model),
        "preprocessing": {"channels": "grey, three times", "range": [0, 1], "window_hu": LUNG_WINDOW},
        "thresholds": {"score": heads.score_thresh, "nms": heads.nms_thresh},
        "config": config.to_dict(),
        "weights_sha256": state_digest(model.state_dict()),
        "versions": {"ctmasknet": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__},
        "notice": DISCLAIMER,
    }
    if model.variant.task == "segmentation":
        facts |= {"mask_score": heads.mask_score, "mask_threshold": 0.5}
    else:
        facts["lesion_classes"] = LESION_CLASSES.get(config.num_classes, ())
    known = still_true(model)
    facts |= {key: known[key] for key in ("license", "caveat", "dataset", "derived_from") if key in known}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def to_onnx(onnx: ModuleType, model: Model, metadata: dict[str, str]) -> bytes:
    """The bytes of an ONNX file with `metadata` in its ``metadata_props``."""
    outputs = OUTPUTS[model.variant.task]
    sides = {"image": {1: "height", 2: "width"}, "masks": {0: "regions", 2: "height", 3: "width"}}
    axes = {name: sides.get(name, {0: "regions"}) for name in ("image", *outputs) if name not in OF_THE_IMAGE}
    with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        # What tracing cannot follow, it warns of; whether it matters here, the check on other sizes tells.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "Constant folding")  # a constant that stays an operation is as good
        # The newer exporter, which torch recommends, cannot trace NMS (docs/export.md).
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            Traceable(model),
            (check_images()[0],),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(outputs),
            dynamic_axes=axes,
        )
        graph = onnx.load_model(file)
    onnx.helper.set_model_props(graph, metadata)
    onnx.checker.check_model(graph)
    return cast("bytes", graph.SerializeToString())


def check_onnx(onnxruntime: ModuleType, content: bytes, model: Model) -> dict[str, float]:
    """Run the file in onnxruntime on the example slice; how far each output is off at most, within `TOLERANCES`."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    inference, worst = Inference(model), dict.fromkeys(OUTPUTS[model.variant.task], 0.0)
    for image in check_images():
        (reading,) = inference.read([image])
        if isinstance(model, COVIDCTMaskNet):
            expected = inference.classify(reading)
        else:
            (lesions,) = inference.detect(reading, Protocol.of(model))
            expected = vars(lesions) | {"masks": lesions.masks[:, None]}
        values = (torch.from_numpy(value) for value in session.run(None, {"image": image.numpy()}))
        found = compare(expected, dict(zip(worst, values, strict=True)))
        worst = {name: max(worst[name], found[name]) for name in worst}
    require_close(worst, TOLERANCES, f"{model.variant.name} in onnxruntime {onnxruntime.__version__}")
    return worst


def check_images() -> list[Tensor]:
    """The example slice and a part of it with other sides, (3, H, W) float32 in 0..1."""
    image = torch.from_numpy(example_slice().image).float().div(255).expand(3, -1, -1).contiguous()
    return [image, image[:, 100:412, 40:470].contiguous()]


def compare(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference of each output, of regions from their nearest; infinite where their number differs."""
    if len(expected["scores"]) != len(given["scores"]):
        return dict.fromkeys(expected, float("inf"))
    rows = nearest(expected, given, box=TOLERANCES["boxes"], score=TOLERANCES["scores"])
    return {
        name: _difference(name, value, given[name] if name in OF_THE_IMAGE else given[name][rows])
        for name, value in expected.items()
    }


def require_close(found: Mapping[str, float], tolerances: Mapping[str, float], what: str) -> None:
    """Raise an ExportError if a difference exceeds its tolerance, or is not a number."""
    far = [f"{name} by {value:.2g}" for name, value in found.items() if not value <= tolerances[name]]
    if far:
        raise ExportError(
            f"{what}: outputs differ from PyTorch's ({', '.join(far)}), so nothing was written. Weights that are "
            "untrained, or give many equal scores, can cause this; if yours are trained, report it."
        )


def _difference(name: str, expected: Tensor, given: Tensor) -> float:
    if expected.shape != given.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if name != "masks":
        return float((expected.double() - given.double()).abs().max())
    one, other = expected.flatten(1), given.flatten(1) > 0.5
    # Pixels on the verge count neither way; and of a mask of a dozen pixels, a rounded edge is a large share.
    clear = (given.flatten(1) - 0.5).abs() > _VERGE
    different, either = ((one != other) & clear).sum(1) - _FEW_PIXELS, (one | other).sum(1)
    return float((different.clamp(min=0) / either.clamp(min=1)).max())


class Traceable(nn.Module):
    """A model on one image, (3, H, W) in 0..1, ready to be traced; it gives its `OUTPUTS`, as the model does."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model.eval()
        self.scales = feature_scales(model.variant)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features, size, padded = self.features(image)
        regions = self.regions(features, size, padded)
        boxes = rescale(regions.boxes, size, _size(image))
        if isinstance(self.model, COVIDCTMaskNet):
            return self.classify(self.model, Regions(boxes, regions.scores, regions.labels, regions.deltas))
        heads = self.model.roi_heads
        logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, [regions.boxes], [padded])))
        chosen = logits.gather(1, regions.labels[:, None, None, None].expand(-1, -1, *logits.shape[-2:]))
        masks = chosen[:, 0].sigmoid() if heads.mask_score == "sigmoid" else chosen[:, 0]
        return boxes, regions.labels, regions.scores, paste(masks, boxes, _size(image))[:, None]

    def classify(self, model: COVIDCTMaskNet, regions: Regions) -> tuple[Tensor, ...]:
        slots = model.module_s.slots
        batch = regions[batch_rows(shape_as_tensor(regions.scores)[0], slots, replicate=model.config.replicate)]
        matrix = torch.cat([batch.scores[:, None], batch.deltas], dim=1)
        logits = model.module_s(torch.cat([matrix, matrix.new_zeros(slots, 5)])[None, :slots])[0]
        probabilities = (logits / model.temperature).softmax(-1)
        return logits, probabilities, batch.boxes, batch.scores, batch.labels, batch.deltas

    def features(self, image: Tensor) -> tuple[dict[str, Tensor], Tensor, torch.Size]:
        """(3, H, W) in 0..1 -> feature maps of the resized image, finest first; its size (h, w), and that when padded.

        The last one serves torchvision's RoIAlign to see the scale of each map, which is the same for every image.
        """
        transform = self.model.transform
        size = resized_size(_size(image), transform.min_size[-1], transform.max_size)
        resized = resize(transform.normalize(image), size)
        below, right = ((-size) % _PAD).unbind()
        padded = F.pad(resized, (0, cast("int", right), 0, cast("int", below)))
        return self.model.backbone(padded[None]), size, padded.shape[-2:]

    def proposals(self, features: list[Tensor], size: Tensor) -> Tensor:
        """(R, 4) boxes of the RPN, best first, in pixels of the resized image, clipped to it."""
        rpn = self.model.rpn
        objectness, deltas = rpn.head(features)
        strides = [[round(1 / scale)] * 2 for scale in self.scales]
        grids = rpn.anchor_generator.grid_anchors([feature.shape[-2:] for feature in features], strides)
        boxes, scores, levels = [], [], []
        for level, anchors in enumerate(grids):
            logits = objectness[level][0].permute(1, 2, 0).reshape(-1)
            best = _best(logits, rpn.pre_nms_top_n())
            chosen = deltas[level][0].permute(1, 2, 0).reshape(-1, 4)[best]
            boxes.append(rpn.box_coder.decode_single(chosen, anchors[best]))
            scores.append(logits[best].sigmoid())
            levels.append(torch.full_like(best, level))
        box, score, level_of = clip(torch.cat(boxes), size), torch.cat(scores), torch.cat(levels)
        valid = (score >= rpn.score_thresh).nonzero().squeeze(1)
        kept = nms_per_class(box[valid], score[valid], level_of[valid], rpn.nms_thresh, range(len(self.scales)))
        return box[valid][kept[: rpn.post_nms_top_n()]]

    def regions(self, features: dict[str, Tensor], size: Tensor, padded: torch.Size) -> Regions:
        """The ranked regions, as `LesionRoIHeads.regions` gives them."""
        heads = self.model.roi_heads
        proposals = self.proposals(list(features.values()), size)
        logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, [proposals], [padded])))
        classes = heads.box_predictor.cls_score.out_features
        scores = logits.softmax(-1) if heads.roi_score == "softmax" else logits.sigmoid()
        boxes = heads.box_coder.decode_single(deltas, proposals).reshape(-1, classes, 4)
        boxes = clip(boxes[:, 1:].reshape(-1, 4), size)
        labels = (torch.zeros_like(scores[:, 1:], dtype=torch.int64) + torch.arange(1, classes)).reshape(-1)
        scores = scores[:, 1:].reshape(-1)
        deltas = deltas.reshape(-1, classes, 4)[:, 1:].reshape(-1, 4)
        valid = scores > heads.score_thresh
        if heads.drop_empty:
            sides = boxes[:, 2:] - boxes[:, :2]
            valid = valid & (sides[:, 0] * sides[:, 1] > 0)
        rows = valid.nonzero().squeeze(1)
        kept = nms_per_class(boxes[rows], scores[rows], labels[rows], heads.nms_thresh, range(1, classes))
        rows = rows[kept[: heads.detections_per_img]]
        return Regions(boxes, scores, labels, deltas)[rows]


def resized_size(size: Tensor, min_size: int, max_size: int) -> Tensor:
    """(2,) int64 -> (2,) int64: the shorter side to `min_size`, unless the longer one would exceed `max_size`."""
    # Quotients of double tensors, as Python does it: float32, and a number by a tensor, which torch takes to be the
    # number times the tensor's reciprocal, are a pixel off for some sizes.
    limits = torch.tensor([min_size, max_size], dtype=torch.float64)
    scale = (limits / torch.stack([size.min(), size.max()]).double()).min()
    return (size.double() * scale).floor().long()


def resize(image: Tensor, size: Tensor) -> Tensor:
    """(3, H, W) -> (3, h, w), bilinear, as `interpolate` without aligned corners.

    ONNX has an operator for it, whose runtimes round the position of a sample otherwise than torch.
    """
    first, last = torch.zeros(2, 1, dtype=torch.int64), size[:, None] - 1
    rows, columns = (stretch(first[a], last[a], _range(size[a]), _size(image)[a]) for a in (0, 1))
    return rows @ image @ columns.transpose(1, 2)


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """(N, 4) boxes cut at the borders of an image of size (h, w)."""
    height, width = size.to(boxes).unbind()
    return torch.minimum(boxes.clamp(min=0), torch.stack([width, height, width, height]))


def nms_per_class(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, known: Sequence[int]) -> Tensor:
    """Rows kept by NMS within each of the `known` classes, best first: `torchvision.ops.batched_nms`, bit for bit.

    torchvision moves boxes of different classes apart and does all at once, unless there are many. The move rounds
    coordinates, which can tip a decision, so it is done here too; then each class by itself comes to the same.
    """
    together = shape_as_tensor(scores)[0] <= _TOGETHER
    largest = torch.cat([boxes.reshape(-1), boxes.new_zeros(1)]).max()  # boxes are not negative, but may be none
    boxes = boxes + (classes.to(boxes) * (largest + 1) * together.to(boxes))[:, None]
    if len(known) == 1:
        return nms(boxes, scores, threshold)
    kept = []
    for number in known:
        rows = (classes == number).nonzero().squeeze(1)
        kept.append(rows[nms(boxes[rows], scores[rows], threshold)])
    rows = torch.cat(kept).sort()[0]
    return rows[scores[rows].sort(descending=True)[1]]


def batch_rows(valid: Tensor, slots: int, *, replicate: bool) -> Tensor:
    """(slots,) int64: which of `valid` ranked regions stands in which slot of the RoI batch, as in `fill_batch`.

    Fewer where slots stay free: (valid,) without replication, (0,) without a region.
    """
    rows = torch.arange(slots)
    if not replicate:
        return rows[:valid]
    some = valid.clamp(min=1)
    each = torch.div(torch.full_like(some, slots), some, rounding_mode="floor")
    more = slots - each * some  # so many ranks, the first ones, stand in once more
    ranks = _range(valid) + 1
    ends = ranks * each + ranks.minimum(more)  # behind the last slot of each rank
    return (rows[:, None] >= ends).sum(1)[: slots * valid.clamp(max=1)]


def paste(masks: Tensor, boxes: Tensor, size: Tensor) -> Tensor:
    """(N, M, M) masks -> (N, H, W) in the image, 0 outside their boxes: torchvision's `paste_masks_in_image`."""
    masks = F.pad(masks, (1, 1, 1, 1))
    return stretched(masks, *covered(boxes, masks.shape[-1]), _range(size[0]), _range(size[1]))


def _best(scores: Tensor, count: int) -> Tensor:
    """Rows of the `count` highest scores, best first; of all, where there are fewer."""
    present = shape_as_tensor(scores)[0].clamp(max=count)
    return scores.topk(cast("int", present))[1]


def _range(count: Tensor) -> Tensor:
    """0..count - 1; the count stays a tensor, so that a trace does not freeze it."""
    return torch.arange(cast("int", count))


def _size(image: Tensor) -> Tensor:
    """(2,) int64: the last two sides, as a tensor, so that a trace does not freeze them."""
    return shape_as_tensor(image)[-2:]
