"""Inference of the same models, faster: the same detections up to rounding.

What is done differently from the plain path, each with a test against it (`tests/test_fast.py`):

- BatchNorm is folded into the convolutions before it, tensors are channels-last, optionally bfloat16;
- the RPN chooses its best anchors first and decodes those, where torchvision decodes all (read in 0.29);
- on a CPU, RoIAlign is that of `ctmasknet.models.roi_align`;
- masks are pasted inside their boxes only and kept as bool.

Box arithmetic is float32 throughout. The model itself is copied, not changed.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from ctmasknet.models.classification import COVIDCTMaskNet
from ctmasknet.models.detector import Regions
from ctmasknet.models.roi_align import feature_scales, pool
from ctmasknet.models.segmentation import LesionMaskRCNN

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
