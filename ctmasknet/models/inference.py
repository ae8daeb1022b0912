"""Inference outside training, the one way everything that predicts or measures runs a model: read, rank, paste.

    inference = Inference(model)                              # once per model and precision
    for reading in inference.read(images):                    # body, FPN, RPN, box branch: once per slice
        found, = inference.detect(reading, Protocol(0.35, 0.5))    # a segmenter's detections
        strict, every = inference.detect(reading, PAPER, Protocol(0.05, 0.5))  # at several settings, from the same pass
        scores = inference.score_map(reading)                 # its raw mask scores
        result = inference.classify(reading)                  # a classifier's probabilities and RoI batch

Thresholds are arguments, and neither the model's mode nor its settings are changed, so that one `Inference` serves
several threads. A slice's result depends on that slice alone: only slices that are of one shape after resizing are
batched, so nothing is padded for a neighbour's sake, and on a CPU each goes alone.

The models' own `forward` is for training, and the reference for this: detections are the same up to rounding. What is
done differently:

- BatchNorm is folded into the convolutions before it, and so are ReLU and sums on a CPU; tensors are channels-last,
  optionally in lower precision;
- the RPN chooses its best anchors first and decodes those, where torchvision decodes all (read in 0.29);
- RoIAlign sums weighted feature rows, which on a CPU runs on all threads;
- masks are pasted by products of matrices and kept as bool;
- on a GPU the host waits for the device once per batch and once per NMS.

Box arithmetic is float32 throughout. The model itself is copied, not changed.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import MultiScaleRoIAlign, batched_nms, clip_boxes_to_image
from torchvision.ops.poolers import LevelMapper

from ctmasknet.errors import ConfigError, WeightsError, import_extra
from ctmasknet.models import COVIDCTMaskNet, Model
from ctmasknet.models.detector import Regions, checked_images, require_float32, rescale
from ctmasknet.registry import Variant

Precision = Literal["float32", "bfloat16", "float16", "int8"]

EVERY_SCORE = -0.01
"""Score threshold that lets every RoI through (paper section 3)."""

_READING_SETTINGS = (
    "num_classes", "roi_score", "drop_empty", "bbox_reg_weights", "anchor_sizes", "anchor_ratios", "min_size",
    "max_size", "image_mean", "image_std", "rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_test", "rpn_nms_thresh",
    "rpn_score_thresh",
)  # fmt: skip
_READING_WEIGHTS = ("backbone.", "rpn.", "roi_heads.box_")


@dataclass(frozen=True)
class Protocol:
    """What counts as a detection, and as its mask.

    Attributes:
        score_threshold: detections scored above it.
        nms_threshold: of the RoI NMS, per class.
        mask_score: foreground is above 0.5 in pasted probabilities (``"sigmoid"``) or in pasted raw
            logits (``"logit"``, as the released code does).
        detections: so many per image at most, the best.
    """

    score_threshold: float
    nms_threshold: float
    mask_score: Literal["sigmoid", "logit"] = "sigmoid"
    detections: int = 128

    @classmethod
    def of(cls, model: Model) -> Protocol:
        """As the model is set: its weights' operating point, unless it was built with other thresholds."""
        heads = model.roi_heads
        return cls(heads.score_thresh, heads.nms_thresh, heads.mask_score, heads.detections_per_img)


PAPER = Protocol(0.75, 0.75, "logit")
"""How Table 2 was made (paper section 3; the logits: released code)."""


@dataclass(frozen=True)
class Detections:
    """What a segmenter says of one image, best score first.

    Attributes:
        boxes: (N, 4) float32 xyxy in pixels of the image.
        labels: (N,) int64.
        scores: (N,) float32.
        masks: (N, H, W) bool.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Reading:
    """What the detector up to its box predictor makes of one image, before any threshold.

    Attributes:
        features: (1, C, H, W) float32 per level, finest first.
        regions: of every proposal and class, best first, in pixels of the resized image: see `LesionRoIHeads.rank`.
        scores: theirs, on the host.
        resized, size: (height, width) as the network saw it and as given.
    """

    features: list[Tensor]
    regions: Regions
    scores: Tensor
    resized: tuple[int, int]
    size: tuple[int, int]

    def kept(self, score_threshold: float, nms_threshold: float, count: int) -> Tensor:
        """Numbers of the regions scored above a threshold that NMS per class leaves, best first, so many at most."""
        return self.regions.kept(int((self.scores > score_threshold).sum()), nms_threshold, count)


class Inference:
    """Inference of one model.

    Args:
        model: in float32, on its device, in either mode; later changes of its weights are not seen (`is_current`
            tells).
        precision: of the convolutions of body, FPN and RPN head; ``"float16"`` on a GPU only, ``"int8"`` on a CPU only,
            by OpenVINO (extra ``openvino``), with weights that bring such a network.

    Raises:
        ConfigError: unknown precision, or one that the device or the weights do not have; a model that is not in
            float32.
        WeightsError: the int8 network is damaged, or made from other weights.
        MissingExtraError: OpenVINO is not installed.
    """

    def __init__(self, model: Model, precision: Precision = "float32") -> None:
        require_float32(model)
        device = next(model.parameters()).device
        self.model = model
        self._stamp = _stamp(model)
        dtype = dtype_of(precision, device)
        self._network = _Int8Network(model) if dtype == torch.int8 else _Network(model, dtype)
        self._transform = copy.deepcopy(model.transform).eval()
        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (model.config.image_mean, model.config.image_std)
        )
        self._cells = [cell.to(device) for cell in model.rpn.anchor_generator.cell_anchors]
        heads = model.roi_heads
        size = heads.box_roi_pool.output_size[0]
        # Pooled rows come as (7 * 7, C), not (C, 7 * 7): the first layer's weights are put in that order.
        weight = heads.box_head.fc6.weight.detach()
        self._fc6 = weight.view(len(weight), -1, size**2).transpose(1, 2).reshape(len(weight), -1).contiguous()
        self._scales = feature_scales(model.variant)
        self._mask_head: nn.Module | None = None
        if heads.mask_head is not None:
            self._mask_head = copy.deepcopy(heads.mask_head).to(memory_format=torch.channels_last)

    def is_current(self) -> bool:
        """Whether the model's weights are still those this was made from."""
        return self._stamp == _stamp(self.model)

    @torch.inference_mode()
    def read(self, images: Sequence[Tensor]) -> list[Reading]:
        """Everything before the thresholds, of each image: (3, H, W) float32 in 0..1, on the model's device.

        Sizes may differ. Images of another kind, or with NaN, are refused by their number.
        """
        images = checked_images(images)
        resized = [self._resized((image - self._mean) / self._std) for image in images]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(resized):
            # On a CPU one image at a time is as fast as several, and holds less memory.
            groups.setdefault((*image.shape, index if image.device.type == "cpu" else 0), []).append(index)
        readings: dict[int, Reading] = {}
        for members in groups.values():
            sizes = [(int(images[index].shape[-2]), int(images[index].shape[-1])) for index in members]
            readings |= zip(members, self._read([resized[index] for index in members], sizes), strict=True)
        return [readings[index] for index in range(len(images))]

    @torch.inference_mode()
    def detect(self, reading: Reading, *protocols: Protocol) -> list[Detections]:
        """A segmenter's detections by each protocol; at least one is needed."""
        kept = [reading.kept(p.score_threshold, p.nms_threshold, p.detections) for p in protocols]
        wanted = kept[0] if len(kept) == 1 else torch.cat(kept).unique()
        logits = self._mask_logits(reading, reading.regions[wanted])
        results = []
        for protocol, rows in zip(protocols, kept, strict=True):
            found = reading.regions[rows]
            masks = logits if len(kept) == 1 else logits[torch.searchsorted(wanted, rows)]
            if protocol.mask_score == "sigmoid":
                masks = masks.sigmoid()
            boxes = rescale(found.boxes, reading.resized, reading.size)
            results.append(Detections(boxes, found.labels, found.scores, paste_masks(masks, boxes, reading.size)))
        return results

    @torch.inference_mode()
    def classify(self, reading: Reading) -> dict[str, Tensor]:
        """What a classifier gives in evaluation mode: logits, probabilities (K,) and its RoI batch."""
        if not isinstance(self.model, COVIDCTMaskNet):
            raise TypeError(f"{self.model.variant.name} is not a classifier")
        return self.model.classify(self.regions(reading), reading.resized, reading.size)

    @torch.inference_mode()
    def regions(self, reading: Reading) -> Regions:
        """The regions that a classifier's RoI batch is made of, at the model's thresholds: ranked, none repeated."""
        heads = self.model.roi_heads
        return reading.regions[reading.kept(heads.score_thresh, heads.nms_thresh, heads.detections_per_img)]

    @torch.inference_mode()
    def score_map(self, reading: Reading) -> Tensor:
        """(H, W) float32: a segmenter's raw mask logits, pasted and combined by their maximum (Figure 2, column 2).

        The best RoIs count, whatever their score; each is 0 outside its box, so a pixel that none speaks for is 0.
        """
        best = reading.regions[reading.kept(EVERY_SCORE, PAPER.nms_threshold, PAPER.detections)]
        logits = self._mask_logits(reading, best)
        combined = logits.new_full(reading.size, -torch.inf)
        speaking = torch.zeros_like(combined)
        boxes = rescale(best.boxes, reading.resized, reading.size)
        for (part, *place), values in _pasted(logits, boxes, reading.size):
            where = tuple(place)
            combined[where] = torch.maximum(combined[where], values.amax(0))
            speaking[where] += len(logits[part])
        return torch.where(speaking < max(len(logits), 1), combined.clamp(min=0), combined)

    def _resized(self, image: Tensor) -> Tensor:
        config, (shorter, longer) = self.model.config, sorted(image.shape[-2:])
        if shorter == config.min_size and longer <= config.max_size:
            return image
        return cast("Tensor", self._transform.resize(image, None)[0])

    def _read(self, images: list[Tensor], sizes: list[tuple[int, int]]) -> list[Reading]:
        """Resized images of one shape."""
        shape = (int(images[0].shape[-2]), int(images[0].shape[-1]))
        tensors = self._transform.batch_images(images, self._transform.size_divisible)
        features, objectness, rpn_deltas = self._network(tensors)
        proposals = choose_proposals(self.model, self._cells, objectness, rpn_deltas, tensors.shape[-2], shape)
        logits, deltas = self._box_branch(features, proposals)
        ranked = self.model.roi_heads.ranked(logits, deltas, proposals, [shape] * len(images))
        scores = torch.cat([regions.scores for regions in ranked]).cpu().split([len(r.scores) for r in ranked])
        return [
            Reading([level[index : index + 1] for level in features], ranked[index], scores[index], shape, size)
            for index, size in enumerate(sizes)
        ]

    def _box_branch(self, features: list[Tensor], proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        heads = self.model.roi_heads
        hidden = features[0].new_empty(sum(len(p) for p in proposals), len(self._fc6))
        for part, rows in pool(features, proposals, self._scales, heads.box_roi_pool):
            hidden[part] = F.linear(rows.flatten(1), self._fc6, heads.box_head.fc6.bias)
        return heads.box_predictor(F.relu(heads.box_head.fc7(F.relu(hidden))))

    def _mask_logits(self, reading: Reading, regions: Regions) -> Tensor:
        """(N, 28, 28) raw mask scores."""
        if self._mask_head is None:
            raise TypeError(f"{self.model.variant.name} is a classifier: it has no masks")
        heads, labels = self.model.roi_heads, regions.labels
        side = heads.mask_roi_pool.output_size[0]
        chosen = reading.features[0].new_empty(len(labels), 2 * side, 2 * side)
        for part, rows in pool(reading.features, [regions.boxes], self._scales, heads.mask_roi_pool):
            logits = heads.mask_predictor(self._mask_head(rows.view(len(rows), side, side, -1).permute(0, 3, 1, 2)))
            chosen[part] = logits[torch.arange(len(rows), device=logits.device), labels[part]]
        return chosen


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """The torch type of a precision; unknown names and ``"float16"`` without fast units for it are refused."""
    if precision not in get_args(Precision):
        raise ConfigError(f"precision={precision!r}: use {', '.join(map(repr, get_args(Precision)))}")
    if precision == "float16" and device.type == "cpu":
        raise ConfigError("precision='float16' needs a GPU: on a CPU use 'float32', or 'bfloat16' where it has units")
    if precision == "int8" and device.type != "cpu":
        raise ConfigError(f"precision='int8' is for CPUs, not for {device}: use 'float16', or device='cpu'")
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def same_detector(one: Model, other: Model) -> bool:
    """Whether a `Reading` of one model serves the other: the same network, weights and proposals.

    So it is with a classifier whose training left its segmenter's weights as they were (`cache_rois`).
    """
    if any(getattr(one.config, name) != getattr(other.config, name) for name in _READING_SETTINGS):
        return False
    mine, theirs = (
        {key: value for key, value in model.state_dict().items() if key.startswith(_READING_WEIGHTS)}
        for model in (one, other)
    )
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in mine.items())


def _stamp(model: nn.Module) -> list[tuple[int, int]]:
    """Changes whenever a weight is replaced or written to (inference tensors keep no count of writes)."""
    return [
        (t.data_ptr(), 0 if t.is_inference() else t._version)
        for module in model.modules()  # their own dictionaries, as parameters() takes a millisecond
        for t in (*module._parameters.values(), *module._buffers.values())
        if t is not None
    ]


class _Network(nn.Module):
    """Body, FPN and RPN head with BatchNorm folded, channels-last, in `dtype`; results in float32."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = copy.deepcopy(model.backbone.body).eval()
        self.fpn = copy.deepcopy(model.backbone.fpn)
        self.rpn_head = copy.deepcopy(model.rpn.head)
        fold_batch_norm(self.body)
        self.stages, self.levels = model.variant.stages, model.variant.levels
        self.dtype = dtype
        self.to(dtype=dtype).to(memory_format=torch.channels_last).requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per level: features (B, C, H, W), objectness (B, H, W, A), deltas (B, H, W, A * 4)."""
        x = images.to(dtype=self.dtype, memory_format=torch.channels_last)
        body = self.body
        x = body["maxpool"](_convolve(body["conv1"], x, relu=True))
        maps = []
        for stage in range(1, self.stages + 1):
            for block in body[f"layer{stage}"]:
                shortcut = x if block.downsample is None else block.downsample(x)
                *first, last = (getattr(block, name) for name in ("conv1", "conv2", "conv3") if hasattr(block, name))
                for convolution in first:
                    x = _convolve(convolution, x, relu=True)
                x = _convolve(last, x, relu=True, add=shortcut)
            maps.append(x)
        features = list(self.fpn({str(level): m for level, m in enumerate(maps[-self.levels :])}).values())
        objectness, deltas = self.rpn_head(features)
        return (
            [f.float() for f in features],
            [o.permute(0, 2, 3, 1).float() for o in objectness],
            [d.permute(0, 2, 3, 1).float() for d in deltas],
        )


class _Int8Network:
    """The same in int8, by OpenVINO. Products are summed as whole numbers, so all processors that can, agree."""

    def __init__(self, model: Model) -> None:
        if not torch.cpu._is_vnni_supported():  # then sums overflow, and float32 is as fast; read in 2.14
            raise ConfigError("precision='int8' needs a processor with AVX-512 VNNI: use precision='float32'")
        if model.int8_network is None:
            raise ConfigError(f"precision='int8': these weights of {model.variant.name} have no int8 network")
        openvino = import_extra("openvino", "openvino", "precision='int8'")
        core, (network, weights) = openvino.Core(), model.int8_network(model)
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        try:
            self._compiled = core.compile_model(core.read_model(network, weights), "CPU", settings)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise WeightsError(f"{model.variant.name}: OpenVINO cannot read its int8 network ({reason})") from None
        self._levels = model.variant.levels

    def __call__(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        request = self._compiled.create_infer_request()  # one each, as threads may share this
        maps = list(map(torch.from_numpy, request.infer([images.contiguous().numpy()]).values()))
        return maps[: self._levels], maps[self._levels : -self._levels], maps[-self._levels :]


def _convolve(layer: nn.Conv2d, x: Tensor, *, relu: bool, add: Tensor | None = None) -> Tensor:
    """A convolution, the sum with another map, and ReLU: on a CPU in one pass over memory where torch has oneDNN."""
    fused = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)  # of torch.compile's CPU backend; read in 2.14
    if fused is None or x.device.type != "cpu" or x.dtype != torch.float32 or torch.jit.is_tracing():
        y = layer(x) if add is None else layer(x) + add
        return F.relu(y, inplace=True) if relu else y
    settings = layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups
    if add is None:
        return fused(x, layer.weight, *settings, "relu" if relu else "none", [], "")
    return fused(x, add, layer.weight, *settings, "add", 1.0, "relu" if relu else None, [], None)


def fold_batch_norm(body: nn.Module) -> None:
    """Fold every BatchNorm of a timm ResNet into the convolution it follows, in place."""
    for module in body.modules():
        children = dict(module.named_children())
        for name, bn in children.items():
            if not isinstance(bn, nn.BatchNorm2d):
                continue
            before = name.replace("bn", "conv") if name.startswith("bn") else str(int(name) - 1)
            convolution = children[before]
            if not isinstance(convolution, nn.Conv2d):
                raise TypeError(f"{name} follows {type(convolution).__name__}, not a convolution")
            setattr(module, before, fuse_conv_bn_eval(convolution, bn))
            setattr(module, name, nn.Identity())


def choose_proposals(
    model: Model,
    cells: list[Tensor],
    objectness: list[Tensor],
    deltas: list[Tensor],
    height: int,
    size: tuple[int, int],
) -> list[Tensor]:
    """The RPN's proposals, (N, 4) per image, from what its head says of every level.

    As torchvision's `filter_proposals`, but the best anchors of each level are chosen before any is decoded.

    Args:
        cells: (A, 4) anchors round the corner of a cell, per level.
        objectness, deltas: (B, H, W, A) and (B, H, W, A * 4), per level.
        height: of the padded images.
        size: (height, width) of the images in them.
    """
    rpn, config = model.rpn, model.config  # the RPN's own counts depend on its mode
    boxes, scores, levels = [], [], []
    for level, (cell, scored, rows) in enumerate(zip(cells, objectness, deltas, strict=True)):
        images, grid_height, grid_width, _ = scored.shape
        count = min(config.rpn_pre_nms_top_n_test, scored[0].numel())
        best, index = scored.flatten(1).topk(count, dim=1)
        place = index // len(cell)
        shift = torch.stack([place % grid_width, place // grid_width], dim=-1) * (height // grid_height)
        anchors = cell[index % len(cell)] + shift.repeat(1, 1, 2)
        chosen = rows.reshape(images, -1, 4).gather(1, index[..., None].expand(-1, -1, 4))
        decoded = rpn.box_coder.decode_single(chosen.flatten(0, 1), anchors.flatten(0, 1))
        boxes.append(clip_boxes_to_image(decoded, size).view(images, count, 4))
        scores.append(best.sigmoid())
        levels.append(torch.full_like(index[0], level))
    level_of = torch.cat(levels)
    proposals = []
    for box, score in zip(torch.cat(boxes, 1), torch.cat(scores, 1), strict=True):
        own_level = level_of
        if rpn.score_thresh > 0:
            likely = score >= rpn.score_thresh
            box, score, own_level = box[likely], score[likely], level_of[likely]
        kept = batched_nms(box, score, own_level, rpn.nms_thresh)
        proposals.append(box[kept[: config.rpn_post_nms_top_n_test]])
    return proposals


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], *, whole: bool | None = None) -> Tensor:
    """(N, 28, 28) mask scores -> (N, H, W) bool, above 0.5; torchvision's `paste_masks_in_image`."""
    result = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    for place, values in _pasted(masks, boxes, size, whole):
        result[place] = values > 0.5
    return result


def _pasted(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], whole: bool | None = None
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Which masks, rows and columns of the image, and the masks' values there, 0 outside their boxes.

    Args:
        whole: all masks over the whole image, which asks the device nothing, or one at a time inside its box; None
            takes this on a CPU and that elsewhere.
    """
    height, width = size
    padded = F.pad(masks, (1, 1, 1, 1))
    first, last = covered(boxes, padded.shape[-1])
    windows = [(slice(0, len(masks)), slice(0, height), slice(0, width))] if len(masks) else []
    if not (masks.device.type != "cpu" if whole is None else whole):
        windows = [
            (slice(row, row + 1), slice(max(y1, 0), min(y2 + 1, height)), slice(max(x1, 0), min(x2 + 1, width)))
            for row, (x1, y1, x2, y2) in enumerate(torch.cat([first, last], dim=1).tolist())
        ]
    for window in windows:
        part, *sides = window
        rows, columns = (torch.arange(s.start, s.stop, device=masks.device) for s in sides)
        yield window, stretched(padded[part], first[part], last[part], rows, columns)


# torchvision stretches a mask with a border of zeros over its box, widened by as much and cut to whole pixels.
# Bilinear stretching is separable, so here it is a product of matrices.


def covered(boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """(N, 2) int64 each: first and last column and row over which a mask of `side` cells, border included, is put."""
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * (side / (side - 2))
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    return (centre - half).to(torch.int64), (centre + half).to(torch.int64)


def stretched(masks: Tensor, first: Tensor, last: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(N, R, C): the values of masks (N, M, M), stretched over what is `covered`, at these rows and columns."""
    side = masks.shape[-1]
    y, x = (stretch(first[:, axis], last[:, axis], pixels, side) for axis, pixels in ((1, rows), (0, columns)))
    return y @ (masks @ x.transpose(1, 2))


def stretch(first: Tensor, last: Tensor, pixels: Tensor, side: Any) -> Tensor:
    """(N, P, side): the weight of each of `side` cells at each of (P,) pixels, 0 outside (N,) first..last.

    Everything may be a tensor, `side` too, so that a trace (`ctmasknet.exporting`) freezes no size.
    """
    extent = (last - first + 1)[:, None]
    place = pixels - first[:, None]
    at = ((place + 0.5) * (side / extent.float()) - 0.5).clamp(min=0).clamp(max=side - 1)[:, :, None]
    low, cell = at.floor(), torch.arange(side, device=at.device)
    weights = (cell == low) * (1 - (at - low)) + (cell == low + 1) * (at - low)
    return weights * ((place >= 0) & (place < extent))[:, :, None]


# RoIAlign on all threads of a CPU, forward and backward; torchvision's runs on one (read in 0.29). Every bin is a
# weighted sum of feature rows, the four cells around each of its samples, and `embedding_bag` computes such sums; the
# transpose, a weighted sum of bins for every cell, is the gradient. Values and gradients are torchvision's up to
# rounding.
_AT_ONCE = {"cpu": 512, "cuda": 8192}  # boxes, to bound the memory


def pool(
    features: list[Tensor], boxes: list[Tensor], scales: list[float], pooler: MultiScaleRoIAlign
) -> Iterator[tuple[slice, Tensor]]:
    """RoIAlign (not aligned, as torchvision's Mask R-CNN has it) of every box, a part of the boxes at a time.

    Args:
        features: (B, C, H, W) per level, finest first, of `scales` as `feature_scales` gives them.
        boxes: (N, 4) per image, in pixels of the resized image.
        pooler: has the numbers of bins and samples.

    Yields:
        Which of all images' boxes in a row, and what is pooled in them: (R, side * side, C).
    """
    table, every = _table(features), torch.cat(boxes)
    image = torch.cat([torch.full_like(b[:, 0], number, dtype=torch.int64) for number, b in enumerate(boxes)])
    axes = _axes(features, every, image, scales, pooler)
    step = _AT_ONCE.get(every.device.type, 512)
    for start in range(0, len(every), step):
        part = slice(start, min(start + step, len(every)))
        cells, weights = _samples(*(axis[part] for axis in axes))
        bins = F.embedding_bag(cells, table, per_sample_weights=weights, mode="sum")
        yield part, bins.view(-1, pooler.output_size[0] ** 2, bins.shape[1])


def feature_scales(variant: Variant) -> list[float]:
    """Cells per pixel of each level of the pyramid, finest first."""
    # Levels double the stride; the registry names the coarsest one's.
    return [2 ** (variant.levels - 1 - level) / variant.stride for level in range(variant.levels)]


class CPURoIAlign(MultiScaleRoIAlign):
    """Stands in for another on a CPU, in training, with its levels, bins and samples; `scales`: `feature_scales`."""

    def __init__(self, replaced: MultiScaleRoIAlign, scales: list[float]) -> None:
        super().__init__(replaced.featmap_names, replaced.output_size, replaced.sampling_ratio)
        self.scales = scales

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """(R, C, side, side), channels-last in memory."""
        features = [x[name] for name in self.featmap_names]
        image = torch.cat([torch.full((len(b),), i) for i, b in enumerate(boxes)])
        cells, weights = _samples(*_axes(features, torch.cat(boxes).detach(), image, self.scales, self))
        bins = _WeightedRows.apply(_table(features), cells, weights)
        return bins.view(len(image), *self.output_size, bins.shape[1]).permute(0, 3, 1, 2)


class _WeightedRows(torch.autograd.Function):
    """Rows of a (T, C) table, summed with weights: cells (N, S) int64, weights (N, S) -> (N, C)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(cells, weights)
        ctx.rows = len(table)
        return F.embedding_bag(cells, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cells, weights = ctx.saved_tensors
        if len(cells) == 0:
            return gradient.new_zeros(ctx.rows, gradient.shape[1]), None, None
        by_cell, order = cells.flatten().sort()
        starts = torch.searchsorted(by_cell, torch.arange(ctx.rows))
        bins = order.div(cells.shape[1], rounding_mode="floor")
        table = F.embedding_bag(
            bins, gradient.contiguous(), starts, per_sample_weights=weights.flatten()[order], mode="sum"
        )
        return table, None, None


def _axes(
    features: list[Tensor], boxes: Tensor, image: Tensor, scales: list[float], pooler: MultiScaleRoIAlign
) -> tuple[Tensor, Tensor]:
    """What the bins of R boxes read along y and x: cells and weights, (R, 2, side, 2 * samples) each.

    A cell's row in the `_table` is the sum of its y and x. Weights average the samples.
    """
    level, side, samples = fpn_levels(boxes, scales), pooler.output_size[0], pooler.sampling_ratio
    sizes = [f.shape[0] * f.shape[2] * f.shape[3] for f in features]
    heights, widths = (_of_level([f.shape[axis] for f in features], level) for axis in (2, 3))
    first = _of_level([0, *itertools.accumulate(sizes[:-1])], level) + image * heights * widths
    cells = torch.stack([heights, widths], dim=1)[:, :, None]
    start, end = (boxes * _of_level(scales, level)[:, None]).view(-1, 2, 2).flip(2).unbind(1)
    step = (end - start).clamp(min=1.0) / side
    offsets = (torch.arange(side * samples, device=boxes.device) + 0.5) / samples
    at = start[:, :, None] + step[:, :, None] * offsets
    outside = (at < -1) | (at > cells)
    at = at.clamp(min=0)
    low = torch.minimum(at.to(torch.int64), cells - 1).clamp(min=0)  # of a box that is NaN
    fraction = torch.where(low == cells - 1, torch.zeros_like(at), at - low)
    weights = torch.stack([1 - fraction, fraction], dim=-1) / samples
    read = torch.stack([low, torch.minimum(low + 1, cells - 1)], dim=-1)
    read[:, 0] = first[:, None, None] + read[:, 0] * widths[:, None, None]
    shape = len(boxes), 2, side, 2 * samples
    return read.view(shape), weights.masked_fill(outside[..., None], 0.0).view(shape)


def _samples(cells: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(R * side * side, 4 * samples ** 2) cells that the bins read, and their weights, from those of `_axes`."""
    (y, x), (y_weight, x_weight) = cells.unbind(1), weights.unbind(1)
    both = y[:, :, None, :, None] + x[:, None, :, None, :]
    weight = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
    return both.flatten(3).flatten(0, 2), weight.flatten(3).flatten(0, 2)


def _of_level(values: Sequence[float], level: Tensor) -> Tensor:
    """(N,): the value of each box's level, without a copy from the host."""
    chosen = torch.full(level.shape, values[0], device=level.device)
    for number, value in enumerate(values[1:], start=1):
        chosen = chosen.masked_fill(level == number, value)
    return chosen


def _table(features: list[Tensor]) -> Tensor:
    """Every cell of every level and image as a row: (cells, C)."""
    return torch.cat([f.permute(0, 2, 3, 1).reshape(-1, f.shape[1]) for f in features])


def fpn_levels(boxes: Tensor, scales: list[float]) -> Tensor:
    """(N,) int64: the FPN level of each (N, 4) box by its size, 0 the finest (FPN paper, equation 1)."""
    if len(scales) == 1:
        return torch.zeros_like(boxes[:, 0], dtype=torch.int64)
    finest = -int(math.log2(scales[0]))
    return cast("Tensor", LevelMapper(finest, finest + len(scales) - 1)([boxes]))
