"""Inference of the same models, faster: the same detections up to rounding.

What is done differently from the plain path, each with a test against it (`tests/test_fast.py`):

- BatchNorm is folded into the convolutions before it, tensors are channels-last, optionally bfloat16;
- the RPN chooses its best anchors first and decodes those, where torchvision decodes all (read in 0.29);
- on a CPU, RoIAlign is that of `ctmasknet.models.inference`;
- masks are pasted inside their boxes only and kept as bool.

Box arithmetic is float32 throughout. The model itself is copied, not changed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import MultiScaleRoIAlign, batched_nms, clip_boxes_to_image, remove_small_boxes, roi_align

from ctmasknet.models.classifier import COVIDCTMaskNet
from ctmasknet.models.detector import LesionMaskRCNN, LesionRoIHeads, Regions
from ctmasknet.registry import Variant

_READING_SETTINGS = (
    "num_classes",
    "anchor_sizes",
    "anchor_ratios",
    "min_size",
    "max_size",
    "image_mean",
    "image_std",
    "rpn_pre_nms_top_n_test",
    "rpn_post_nms_top_n_test",
    "rpn_nms_thresh",
    "rpn_score_thresh",
)


@dataclass
class Found:
    """What a segmenter says of one image: boxes (N, 4) in its pixels, labels, scores (N,), masks (N, H, W) bool."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor


@dataclass
class Reading:
    """What the detector up to its box predictor makes of some images, before any threshold.

    Attributes:
        features: (B, C, H, W) float32 per level, finest first.
        proposals: (N, 4) per image, pixels of the resized image.
        logits, deltas: (R, K) and (R, 4 K), one row per proposal of all images.
        resized, sizes: (height, width) of each image, as the network saw it and as given.
    """

    features: list[Tensor]
    proposals: list[Tensor]
    logits: Tensor
    deltas: Tensor
    resized: list[tuple[int, int]]
    sizes: list[tuple[int, int]]


class FastInference:
    """Inference of one model.

    Args:
        model: in evaluation mode; later changes of its weights are not seen (`is_current` tells), those of its
            thresholds are.
        dtype: of the convolutions of body, FPN and RPN head: ``torch.float32`` or ``torch.bfloat16``.
    """

    def __init__(self, model: LesionMaskRCNN | COVIDCTMaskNet, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self._stamp = _stamp(model)
        self._network = _Network(model, dtype)
        heads = model.roi_heads
        size = heads.box_roi_pool.output_size[0]
        # Pooled rows come as (7 * 7, C), not (C, 7 * 7): the first layer's weights are put in that order.
        weight = heads.box_head.fc6.weight.detach()
        channels = weight.shape[1] // size**2
        self._fc6 = weight.view(len(weight), channels, size**2).transpose(1, 2).reshape(len(weight), -1).contiguous()
        self._scales = feature_scales(model.variant)
        self._mask_head: nn.Module | None = None
        if heads.mask_head is not None:
            self._mask_head = copy.deepcopy(heads.mask_head).to(memory_format=torch.channels_last)

    def is_current(self) -> bool:
        """Whether the model's weights are still those this was made from."""
        return self._stamp == _stamp(self.model)

    @torch.inference_mode()
    def read(self, images: list[Tensor]) -> Reading:
        """Everything before the thresholds, for (3, H, W) images in 0..1."""
        batch, _ = self.model.transform(list(images))
        # On a CPU one image at a time is as fast as several, and holds less memory.
        chunks = batch.tensors.split(1 if batch.tensors.device.type == "cpu" else len(batch.tensors))
        outputs = [self._network(chunk) for chunk in chunks]
        features, objectness, rpn_deltas = (
            [torch.cat(level) for level in zip(*(output[part] for output in outputs), strict=True)] for part in range(3)
        )
        proposals = choose_proposals(self.model.rpn, objectness, rpn_deltas, batch)
        logits, deltas = self._box_branch(features, proposals)
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        return Reading(features, proposals, logits, deltas, batch.image_sizes, sizes)

    @torch.inference_mode()
    def segment(self, reading: Reading) -> list[Found]:
        """A segmenter's detections, at the thresholds of the model's RoI heads."""
        regions = self._rank(reading)
        results = []
        for r, mask, resized, size in zip(
            regions, self._masks(reading.features, regions), reading.resized, reading.sizes, strict=True
        ):
            boxes = resize_boxes(r.boxes, list(resized), list(size))
            results.append(Found(boxes, r.labels, r.scores, paste_masks(mask, boxes, size)))
        return results

    @torch.inference_mode()
    def classify(self, reading: Reading) -> list[dict[str, Tensor]]:
        """What the classifier gives in evaluation mode."""
        model = self.model
        if not isinstance(model, COVIDCTMaskNet):
            raise TypeError(f"{model.variant.name} is not a classifier")
        return model.classify(self._rank(reading), reading.resized, reading.sizes)

    def _box_branch(self, features: list[Tensor], proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        heads = self.model.roi_heads
        aligned = heads.box_roi_pool
        hidden = features[0].new_empty(sum(len(p) for p in proposals), len(self._fc6))
        for part, rows in pool(features, proposals, self._scales, aligned.output_size[0], aligned.sampling_ratio):
            hidden[part] = F.linear(rows.flatten(1), self._fc6, heads.box_head.fc6.bias)
        return heads.box_predictor(F.relu(heads.box_head.fc7(F.relu(hidden))))

    def _rank(self, reading: Reading) -> list[Regions]:
        return self.model.roi_heads.rank(reading.logits, reading.deltas, reading.proposals, reading.resized)

    def _masks(self, features: list[Tensor], regions: list[Regions]) -> list[Tensor]:
        """(N, 28, 28) scores of each image's regions, probabilities or logits as the model is set."""
        heads = self.model.roi_heads
        labels = torch.cat([r.labels for r in regions])
        if self._mask_head is None or len(labels) == 0:
            side = 2 * heads.mask_roi_pool.output_size[0]
            return [features[0].new_zeros(len(r.labels), side, side) for r in regions]
        aligned = heads.mask_roi_pool
        side = aligned.output_size[0]
        chosen = features[0].new_empty(len(labels), 2 * side, 2 * side)
        boxes = [r.boxes for r in regions]
        for part, rows in pool(features, boxes, self._scales, side, aligned.sampling_ratio):
            maps = rows.view(len(rows), side, side, -1).permute(0, 3, 1, 2)
            logits = heads.mask_predictor(self._mask_head(maps))
            chosen[part] = logits[torch.arange(len(part), device=logits.device), labels[part]]
        if heads.mask_score == "sigmoid":
            chosen = chosen.sigmoid()
        return list(chosen.split([len(r.labels) for r in regions]))


def same_detector(one: LesionMaskRCNN | COVIDCTMaskNet, other: LesionMaskRCNN | COVIDCTMaskNet) -> bool:
    """Whether a `Reading` of one model serves the other: the same network, weights and proposals.

    So it is with a classifier whose training left its segmenter's weights as they were (`cache_rois`).
    """
    if any(getattr(one.config, name) != getattr(other.config, name) for name in _READING_SETTINGS):
        return False
    mine, theirs = (_reading_weights(model) for model in (one, other))
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in mine.items())


def _reading_weights(model: LesionMaskRCNN | COVIDCTMaskNet) -> dict[str, Tensor]:
    parts = ("backbone.", "rpn.", "roi_heads.box_")
    return {key: value for key, value in model.state_dict().items() if key.startswith(parts)}


def _stamp(model: nn.Module) -> list[tuple[int, int]]:
    """Changes whenever a weight is replaced or written to (inference tensors keep no count of writes)."""
    return [
        (t.data_ptr(), 0 if t.is_inference() else t._version)
        for t in itertools.chain(model.parameters(), model.buffers())
    ]


class _Network(nn.Module):
    """Body, FPN and RPN head with BatchNorm folded, channels-last, in `dtype`; results in float32."""

    def __init__(self, model: LesionMaskRCNN | COVIDCTMaskNet, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = copy.deepcopy(model.backbone.body).eval()
        self.fpn = copy.deepcopy(model.backbone.fpn)
        self.rpn_head = copy.deepcopy(model.rpn.head)
        fold_batch_norm(self.body)
        self.dtype = dtype
        self.to(dtype=dtype).to(memory_format=torch.channels_last).requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per level: features (B, C, H, W), objectness (B, H * W * A), deltas (B, H * W * A, 4)."""
        x = images.to(dtype=self.dtype, memory_format=torch.channels_last)
        maps = self.body(x)
        features = list(self.fpn({str(level): m for level, m in enumerate(maps)}).values())
        objectness, deltas = self.rpn_head(features)
        return (
            [f.float() for f in features],
            [_rows_of(o, 1).squeeze(2).float() for o in objectness],
            [_rows_of(d, 4).float() for d in deltas],
        )


def _rows_of(output: Tensor, columns: int) -> Tensor:
    """(B, A * columns, H, W) -> (B, H * W * A, columns), the order of torchvision's anchors."""
    return output.permute(0, 2, 3, 1).reshape(len(output), -1, columns)


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
    rpn: RegionProposalNetwork, objectness: list[Tensor], deltas: list[Tensor], batch: ImageList
) -> list[Tensor]:
    """The RPN's proposals, (N, 4) per image, from its head's (B, H * W * A) and (B, H * W * A, 4) rows per level.

    As torchvision's `filter_proposals`, but the best anchors of each level are chosen before any is decoded.
    """
    generator = rpn.anchor_generator
    height, width = batch.tensors.shape[-2:]
    boxes, scores, levels = [], [], []
    for level, (scored, rows, cells) in enumerate(zip(objectness, deltas, generator.cell_anchors, strict=True)):
        cells = cells.to(rows)
        count = min(rpn.pre_nms_top_n(), scored.shape[1])
        best, index = scored.topk(count, dim=1)
        # The grid of a level: its cells are the image's divided by a whole stride.
        grid_width, stride_y, stride_x = _grid(rows.shape[1] // len(cells), height, width)
        cell = index // len(cells)
        shift = torch.stack([(cell % grid_width) * stride_x, (cell // grid_width) * stride_y], dim=-1).to(rows)
        anchors = cells[index % len(cells)] + shift.repeat(1, 1, 2)
        chosen = rows.gather(1, index[..., None].expand(-1, -1, 4))
        decoded = rpn.box_coder.decode_single(chosen.reshape(-1, 4), anchors.reshape(-1, 4))
        boxes.append(decoded.view(len(rows), count, 4))
        scores.append(best.sigmoid())
        levels.append(torch.full((count,), level, device=rows.device))
    all_boxes, all_scores, all_levels = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels)
    return [
        _suppress(rpn, b, s, all_levels, size)
        for b, s, size in zip(all_boxes, all_scores, batch.image_sizes, strict=True)
    ]


def _grid(cells: int, height: int, width: int) -> tuple[int, int, int]:
    """Width and strides of a level's grid, from its number of cells: strides are equal powers of two."""
    stride = 1
    while (height // stride) * (width // stride) > cells:
        stride *= 2
    return width // stride, stride, stride


def _suppress(
    rpn: RegionProposalNetwork, boxes: Tensor, scores: Tensor, levels: Tensor, size: tuple[int, int]
) -> Tensor:
    boxes = clip_boxes_to_image(boxes, size)
    if rpn.min_size > 0 or rpn.score_thresh > 0:
        kept = remove_small_boxes(boxes, rpn.min_size)
        kept = kept[scores[kept] >= rpn.score_thresh]
        boxes, scores, levels = boxes[kept], scores[kept], levels[kept]
    kept = batched_nms(boxes, scores, levels, rpn.nms_thresh)
    return boxes[kept[: rpn.post_nms_top_n()]]


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 28, 28) mask scores -> (N, H, W) bool, above 0.5; torchvision's pasting, inside each box only."""
    height, width = size
    result = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    if len(masks) == 0:
        return result
    side = masks.shape[-1]
    padded = F.pad(masks, (1, 1, 1, 1))
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((side + 2) / side)
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    corners = torch.cat([centre - half, centre + half], dim=1).to(torch.int64).tolist()
    for canvas, mask, (x1, y1, x2, y2) in zip(result, padded, corners, strict=True):
        w, h = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
        resized = F.interpolate(mask[None, None], size=(h, w), mode="bilinear", align_corners=False)[0, 0] > 0.5
        left, top = max(x1, 0), max(y1, 0)
        right, bottom = min(x2 + 1, width), min(y2 + 1, height)
        canvas[top:bottom, left:right] = resized[top - y1 : bottom - y1, left - x1 : right - x1]
    return result


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for bfloat16, so that it is faster than float32, not merely possible."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private in torch 2.6 to 2.15; there is no public query.
    queries = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return device.type == "cpu" and any(query is not None and query() for query in queries)


_CANONICAL_SIZE, _CANONICAL_LEVEL = 224.0, 4  # of the FPN paper, as in torchvision's MultiScaleRoIAlign
_AT_ONCE = 512  # boxes, to bound the memory


def pool(
    features: list[Tensor], boxes: list[Tensor], scales: list[float], side: int, samples: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """RoIAlign (not aligned, as torchvision's Mask R-CNN has it) of every box, a part of the boxes at a time.

    Args:
        features: (B, C, H, W) per level, finest first.
        boxes: (N, 4) per image, in pixels of the resized image.
        scales: see `feature_scales`.
        side: bins per axis.
        samples: sampling points per bin and axis.

    Yields:
        Which boxes, (R,) of all images' boxes in a row, and what is pooled in them: (R, side * side, C).
    """
    device = features[0].device
    image = torch.cat([torch.full((len(b),), i, device=device) for i, b in enumerate(boxes)])
    every = torch.cat(boxes)
    if device.type != "cpu":
        yield torch.arange(len(every)), _pool_by_torchvision(features, every, image, scales, side, samples)
        return
    plan = _Plan.of(features, every, image, scales, side, samples)
    table = _table(features)
    for start in range(0, len(every), _AT_ONCE):
        part = torch.arange(start, min(start + _AT_ONCE, len(every)))
        cells, weights = plan.samples(part)
        bins = F.embedding_bag(cells, table, per_sample_weights=weights, mode="sum")
        yield part, bins.view(len(part), side * side, -1)


def feature_scales(variant: Variant) -> list[float]:
    """Cells per pixel of each level of the pyramid, finest first."""
    # Levels double the stride; the registry names the coarsest one's.
    return [2 ** (variant.levels - 1 - level) / variant.stride for level in range(variant.levels)]


class CPURoIAlign(nn.Module):
    """Stands in for a `MultiScaleRoIAlign` on a CPU, in training.

    Args:
        replaced: what it stands in for; levels, bins and samples are taken from it.
        scales: see `feature_scales`.
    """

    def __init__(self, replaced: MultiScaleRoIAlign, scales: list[float]) -> None:
        super().__init__()
        self.featmap_names = replaced.featmap_names
        self.output_size = replaced.output_size
        self.sampling_ratio = replaced.sampling_ratio
        self.scales = scales

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """As `MultiScaleRoIAlign`: (R, C, side, side), channels-last in memory."""
        features = [x[name] for name in self.featmap_names]
        image = torch.cat([torch.full((len(b),), i) for i, b in enumerate(boxes)])
        side = self.output_size[0]
        every = torch.cat(boxes).detach()
        plan = _Plan.of(features, every, image, self.scales, side, self.sampling_ratio)
        bins = _WeightedRows.apply(_table(features), *plan.samples(torch.arange(len(every))))
        return bins.view(len(every), side, side, bins.shape[1]).permute(0, 3, 1, 2)


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


@dataclass
class _Plan:
    """Which cells the bins of R boxes read, and how much of each."""

    first: Tensor  # (R,) row of the table where the box's feature map begins
    widths: Tensor  # (R,) of that map
    rows: tuple[Tensor, Tensor]  # see _axis
    columns: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls, features: list[Tensor], boxes: Tensor, image: Tensor, scales: list[float], side: int, samples: int
    ) -> _Plan:
        level = _levels(boxes, scales)
        heights = torch.tensor([f.shape[2] for f in features])[level]
        widths = torch.tensor([f.shape[3] for f in features])[level]
        sizes = [f.shape[0] * f.shape[2] * f.shape[3] for f in features]
        first = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])[level] + image * heights * widths
        scale = torch.tensor(scales)[level]
        rows = _axis(boxes[:, 1] * scale, boxes[:, 3] * scale, heights, side, samples)
        columns = _axis(boxes[:, 0] * scale, boxes[:, 2] * scale, widths, side, samples)
        return cls(first, widths, rows, columns)

    def samples(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """(R * side * side, 4 * samples ** 2) cells and weights of some boxes."""
        (y, y_weight), (x, x_weight) = ((index[part], weight[part]) for index, weight in (self.rows, self.columns))
        y = self.first[part, None, None] + y * self.widths[part, None, None]
        cells = y[:, :, None, :, None] + x[:, None, :, None, :]
        weights = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
        return cells.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)


def _table(features: list[Tensor]) -> Tensor:
    """Every cell of every level and image as a row: (cells, C)."""
    return torch.cat([f.permute(0, 2, 3, 1).reshape(-1, f.shape[1]) for f in features])


def _levels(boxes: Tensor, scales: list[float]) -> Tensor:
    """The FPN level of each box, by its size (FPN paper, equation 1)."""
    if len(scales) == 1:
        return torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    finest = -torch.tensor(scales[0]).log2().item()
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = torch.floor(_CANONICAL_LEVEL + torch.log2(sides / _CANONICAL_SIZE) + 1e-6)
    return level.clamp(finest, finest + len(scales) - 1).to(torch.int64) - int(finest)


def _axis(start: Tensor, end: Tensor, cells: Tensor, side: int, samples: int) -> tuple[Tensor, Tensor]:
    """Along one axis: the cells each bin reads, (R, side, 2 * samples), and their weights; they average the samples.

    Boxes reach from `start` to `end`, (R,) in cells, on an axis of so many cells, (R,).
    """
    step = (end - start).clamp(min=1.0) / side
    offsets = (torch.arange(side * samples) + 0.5) / samples
    at = start[:, None] + step[:, None] * offsets
    last = (cells - 1)[:, None]
    outside = (at < -1) | (at > cells[:, None])
    at = at.clamp(min=0)
    low = torch.minimum(at.to(torch.int64), last)
    high = torch.minimum(low + 1, last)
    fraction = torch.where(low == last, torch.zeros_like(at), at - low)
    weight = torch.stack([1 - fraction, fraction], dim=-1) / samples
    weight = weight.masked_fill(outside[..., None], 0.0)
    index = torch.stack([low, high], dim=-1)
    shape = len(start), side, 2 * samples
    return index.view(shape), weight.view(shape)


def _pool_by_torchvision(
    features: list[Tensor], boxes: Tensor, image: Tensor, scales: list[float], side: int, samples: int
) -> Tensor:
    rois = torch.cat([image[:, None].to(boxes), boxes], dim=1)
    if len(scales) == 1:
        return roi_align(features[0], rois, side, scales[0], samples).flatten(2).transpose(1, 2)
    level = _levels(boxes, scales)
    pooled = boxes.new_zeros(len(boxes), features[0].shape[1], side, side)
    for number, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        rows = (level == number).nonzero().squeeze(1)
        pooled[rows] = roi_align(feature, rois[rows], side, scale, samples)
    return pooled.flatten(2).transpose(1, 2)


EVERY_SCORE = -0.01
"""Score threshold that lets every RoI through (paper section 3)."""

_PASTED_AT_ONCE = 16  # RoIs: a pasted one is as large as the image, so a map is put together in parts


@dataclass(frozen=True)
class Protocol:
    """What counts as a detection.

    Attributes:
        score_threshold: detections scored above it.
        nms_threshold: of the RoI NMS, per class.
        mask_score: foreground is above 0.5 in pasted probabilities (``"sigmoid"``) or in pasted raw
            logits (``"logit"``, as the released code does).
    """

    score_threshold: float
    nms_threshold: float
    mask_score: Literal["sigmoid", "logit"] = "sigmoid"


PAPER = Protocol(0.75, 0.75, "logit")
"""How Table 2 was made (paper section 3; the logits: released code)."""


@torch.no_grad()
def detect_at(
    model: LesionMaskRCNN, images: Sequence[Tensor], protocols: Sequence[Protocol]
) -> list[list[dict[str, Tensor]]]:
    """Detections by several protocols from one pass: what the model gives when set to each.

    Args:
        model: a segmenter in evaluation mode; its own thresholds play no part, `detections_per_img` does.
        images: (3, H, W) float in 0..1, sizes may differ.
        protocols: at least one.

    Returns:
        Per image and protocol a dict of boxes (N, 4), labels (N,), scores (N,), masks (N, H, W) bool.
    """
    heads = model.roi_heads
    features, regions, shapes = _ranked_regions(model, images, min(p.score_threshold for p in protocols))
    kept = [[_kept(r, p, heads.detections_per_img) for p in protocols] for r in regions]
    wanted = [torch.cat(rows).unique() for rows in kept]
    logits = _mask_logits(heads, features, [_rows(r, w) for r, w in zip(regions, wanted, strict=True)], shapes)
    results = []
    for index, image in enumerate(images):
        found = []
        for protocol, rows in zip(protocols, kept[index], strict=True):
            chosen = _rows(regions[index], rows)
            masks = logits[index][torch.searchsorted(wanted[index], rows)]
            if protocol.mask_score == "sigmoid":
                masks = masks.sigmoid()
            found.append(_pasted(model, chosen, masks, shapes[index], image))
        results.append(found)
    return results


@torch.no_grad()
def score_maps(
    model: LesionMaskRCNN, images: Sequence[Tensor], *, nms_threshold: float = 0.75, rois: int | None = None
) -> list[Tensor]:
    """Raw mask logits of every RoI, pasted into the image and combined by their maximum (Figure 2, column 2).

    RoIs count whatever their score; each is 0 outside its box, so a pixel that no RoI speaks for is 0.

    Args:
        model: a segmenter in evaluation mode.
        images: (3, H, W) float in 0..1, sizes may differ.
        nms_threshold: of the RoI NMS, per class (the paper's: 0.75).
        rois: the best so many RoIs only; None takes the model's `detections_per_img` (the paper's: 128).

    Returns:
        One (H, W) float32 map per image.
    """
    heads = model.roi_heads
    count = heads.detections_per_img if rois is None else rois
    features, regions, shapes = _ranked_regions(model, images, EVERY_SCORE)
    best = [_rows(r, _kept(r, Protocol(EVERY_SCORE, nms_threshold), count)) for r in regions]
    logits = _mask_logits(heads, features, best, shapes)
    maps = []
    for image, r, masks, shape in zip(images, best, logits, shapes, strict=True):
        size = (int(image.shape[-2]), int(image.shape[-1]))
        combined: Tensor | None = None
        for start in range(0, len(r.scores), _PASTED_AT_ONCE):
            part = slice(start, start + _PASTED_AT_ONCE)
            result = {"boxes": r.boxes[part], "masks": masks[part]}
            pasted = model.transform.postprocess([result], [shape], [size])[0]["masks"][:, 0].amax(0)
            combined = pasted if combined is None else torch.maximum(combined, pasted)
        maps.append(image.new_zeros(size) if combined is None else combined)
    return maps


def _ranked_regions(
    model: LesionMaskRCNN, images: Sequence[Tensor], score_threshold: float
) -> tuple[dict[str, Tensor], list[Regions], list[tuple[int, int]]]:
    """Features, every region above the threshold before NMS, best first, and the sizes of the resized images."""
    batch, _ = model.transform(list(images))
    features = model.backbone(batch.tensors)
    proposals, _ = model.rpn(batch, features)
    # NMS at 1 removes nothing: it is done afterwards, once per protocol.
    with heads_set_to(model.roi_heads, score_thresh=score_threshold, nms_thresh=1.0, detections_per_img=1 << 30):
        regions = model.roi_heads.regions(features, proposals, batch.image_sizes)
    return features, regions, batch.image_sizes


def _kept(regions: Regions, protocol: Protocol, count: int) -> Tensor:
    """Rows that the protocol keeps, best first."""
    rows = (regions.scores > protocol.score_threshold).nonzero().squeeze(1)
    order = batched_nms(regions.boxes[rows], regions.scores[rows], regions.labels[rows], protocol.nms_threshold)
    return rows[order[:count]]


def _rows(regions: Regions, rows: Tensor) -> Regions:
    return Regions(*(getattr(regions, field.name)[rows] for field in fields(Regions)))


def _mask_logits(
    heads: LesionRoIHeads, features: dict[str, Tensor], regions: list[Regions], shapes: list[tuple[int, int]]
) -> tuple[Tensor, ...]:
    with heads_set_to(heads, mask_score="logit"):
        return heads._masks(features, regions, shapes)


def _pasted(
    model: LesionMaskRCNN, regions: Regions, masks: Tensor, shape: tuple[int, int], image: Tensor
) -> dict[str, Tensor]:
    """A result in pixels of the input, masks binary."""
    size = (int(image.shape[-2]), int(image.shape[-1]))
    result = {"boxes": regions.boxes, "labels": regions.labels, "scores": regions.scores, "masks": masks}
    result = model.transform.postprocess([result], [shape], [size])[0]
    return result | {"masks": result["masks"][:, 0] > 0.5}


@contextmanager
def heads_set_to(heads: LesionRoIHeads, **values: object) -> Iterator[None]:
    """RoI heads with other settings for a while; afterwards they are as they were."""
    before = {name: getattr(heads, name) for name in values}
    for name, value in values.items():
        setattr(heads, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(heads, name, value)
