"""The lesion detector: ResNet body and FPN, RPN, RoI heads, and Mask R-CNN made of them (paper section 2, Figure 1a).

Built from torchvision's parts; the classifiers share all but the mask branch.
"""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, batched_nms, clip_boxes_to_image

from ctmasknet.errors import ConfigError, InputError
from ctmasknet.models.config import ModelConfig
from ctmasknet.registry import Variant

BOX_HIDDEN = 128
_BOX_POOL, _BOX_SAMPLING = 7, 2
_MASK_POOL, _MASK_SAMPLING = 14, 2
_SLACK = 1e-3  # by which rounding and resampling may leave 0..1; more is another unit


class ResNetFPN(nn.Module):
    """timm ResNet up to the variant's last stage, then FPN: one level, or four for ResNet50.

    Attributes:
        autocast_dtype: run body and FPN under autocast in this dtype, None for the input's own. Features
            leave in float32 either way: box arithmetic in bfloat16 moves boxes by whole pixels.
    """

    out_channels = 256

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        levels = range(variant.stages - variant.levels + 1, variant.stages + 1)
        # zero_init_last=False: the paper's bodies are torchvision's, which start with every residual branch open.
        self.body = timm.create_model(
            variant.backbone, features_only=True, out_indices=tuple(levels), zero_init_last=False
        )
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)
        self.autocast_dtype: torch.dtype | None = None

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) normalised images -> {"0": (B, 256, H / stride, W / stride), ...}, finest level first."""
        enabled = self.autocast_dtype is not None
        with torch.autocast(images.device.type, dtype=self.autocast_dtype, enabled=enabled):
            maps = self.body(images)
            features = self.fpn(OrderedDict((str(level), m) for level, m in enumerate(maps)))
        return OrderedDict((level, feature.float()) for level, feature in features.items())


@dataclass
class Regions:
    """What the box branch says of one image, best score first; one row per RoI and class.

    Attributes:
        boxes: (N, 4) xyxy, pixels of the resized image, clipped to it.
        scores: (N,) in 0..1.
        labels: (N,) int64, 1..num_classes - 1.
        deltas: (N, 4) the encoded box deltas (dx, dy, dw, dh) that the box predictor put out for that class.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    deltas: Tensor

    def __getitem__(self, rows: Tensor) -> Regions:
        """Some of them: row numbers, or a mask."""
        return Regions(self.boxes[rows], self.scores[rows], self.labels[rows], self.deltas[rows])

    def kept(self, above: int, nms_threshold: float, count: int) -> Tensor:
        """Numbers of the rows that NMS per class leaves of the first `above`, best first, so many at most."""
        best = slice(above)
        left = batched_nms(self.boxes[best], self.scores[best].detach(), self.labels[best], nms_threshold)
        return left[:count]


class LesionRoIHeads(RoIHeads):
    """torchvision's RoI heads with the released code's inference and the paper's switches.

    Training is torchvision's. Inference differs: only boxes of area 0 are dropped (torchvision drops sides under
    0.01 px), scores may come from a sigmoid, masks may stay logits, and each region keeps its encoded deltas.
    """

    def __init__(self, config: ModelConfig, variant: Variant) -> None:
        names = [str(level) for level in range(variant.levels)]
        super().__init__(
            box_roi_pool=MultiScaleRoIAlign(names, _BOX_POOL, _BOX_SAMPLING),
            box_head=TwoMLPHead(ResNetFPN.out_channels * _BOX_POOL**2, BOX_HIDDEN),
            box_predictor=FastRCNNPredictor(BOX_HIDDEN, config.num_classes),
            fg_iou_thresh=config.box_fg_iou_thresh,
            bg_iou_thresh=config.box_bg_iou_thresh,
            batch_size_per_image=config.box_batch_size_per_image,
            positive_fraction=config.box_positive_fraction,
            bbox_reg_weights=config.bbox_reg_weights,
            score_thresh=config.box_score_thresh,
            nms_thresh=config.box_nms_thresh,
            detections_per_img=config.box_detections_per_img,
        )
        self.roi_score = config.roi_score
        self.mask_score = config.mask_score
        self.drop_empty = config.drop_empty
        if variant.task == "segmentation":
            # Table 1's lightweight models also shrink the mask branch: one 3x3 layer where ResNet50 has four.
            # Their weights start from torchvision's Kaiming normal (fan-out, ReLU), which is the released code's too.
            layers, hidden = ((256,) * 4, 256) if variant.backbone == "resnet50" else ((128,), 128)
            self.mask_roi_pool = MultiScaleRoIAlign(names, _MASK_POOL, _MASK_SAMPLING)
            self.mask_head = MaskRCNNHeads(ResNetFPN.out_channels, layers, dilation=1)
            self.mask_predictor = MaskRCNNPredictor(layers[-1], hidden, config.num_classes)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Losses in training mode; detections with (N, 1, 28, 28) masks otherwise."""
        if self.training:
            return super().forward(features, proposals, image_shapes, targets)
        regions = self.regions(features, proposals, image_shapes)
        detections = [{"boxes": r.boxes, "labels": r.labels, "scores": r.scores} for r in regions]
        if self.mask_head is not None:
            pooled = self.mask_roi_pool(features, [r.boxes for r in regions], image_shapes)
            logits = self.mask_predictor(self.mask_head(pooled))
            labels = torch.cat([r.labels for r in regions])
            masks = logits[torch.arange(len(labels), device=labels.device), labels, None]
            masks = masks.sigmoid() if self.mask_score == "sigmoid" else masks
            for detection, own in zip(detections, masks.split([len(r.labels) for r in regions]), strict=True):
                detection["masks"] = own
        return detections, {}

    def regions(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[Regions]:
        """The ranked regions of each image, at the thresholds set here: not empty, after NMS per class."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        ranked = self.ranked(logits, deltas, proposals, image_shapes)
        above = [int((r.scores > self.score_thresh).sum()) for r in ranked]
        return [r[r.kept(n, self.nms_thresh, self.detections_per_img)] for r, n in zip(ranked, above, strict=True)]

    def ranked(
        self, logits: Tensor, deltas: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[Regions]:
        """Every region of each image, see `rank`, from what the box predictor says of all proposals in a row."""
        counts = [len(p) for p in proposals]
        boxes = self.box_coder.decode(deltas, proposals)
        per_image = zip(logits.split(counts), deltas.split(counts), boxes.split(counts), image_shapes, strict=True)
        return [self.rank(*image) for image in per_image]

    def rank(self, logits: Tensor, deltas: Tensor, boxes: Tensor, shape: tuple[int, int]) -> Regions:
        """Every region of one image, best first, before NMS; empty ones that are to be dropped stand last, scored -1.

        Args:
            logits, deltas: (R, K) and (R, 4 K), what the box predictor says of the proposals.
            boxes: (R, K, 4), the proposals moved by the deltas.
            shape: (height, width) of the resized image.
        """
        scores = logits.softmax(-1) if self.roi_score == "softmax" else logits.sigmoid()
        labels = torch.arange(1, scores.shape[1], device=scores.device).repeat(len(scores))
        boxes = clip_boxes_to_image(boxes[:, 1:].reshape(-1, 4), shape)
        scores = scores[:, 1:].reshape(-1)
        deltas = deltas.view(len(logits), -1, 4)[:, 1:].reshape(-1, 4)
        if self.drop_empty:
            sides = boxes[:, 2:] - boxes[:, :2]
            scores = scores.masked_fill(sides.prod(1) <= 0, -1.0)
        return Regions(boxes, scores, labels, deltas)[scores.detach().argsort(descending=True, stable=True)]


class Detector(GeneralizedRCNN):
    """Base of the models: what both are built of, and how each writes itself to a folder or to the Hugging Face Hub.

    `ctmasknet.weights.publish` writes, and sets `publisher` to itself: the models know no file format and no Hub
    client. huggingface_hub's `PyTorchModelHubMixin` is not used: it loads with strict=False, falls back to a pickled
    `pytorch_model.bin`, rejects ``owner/name@revision`` and cannot put metrics on the card it pushes.

    Attributes:
        variant: the registry's entry.
        config: the settings it was built with.
        metadata: what is known of its weights (operating point, metrics, ...); plain values.
        loaded: digest and metadata of the weights it was loaded with, None if random: tells whether what was said of
            them still holds.
        int8_network: gives the body, FPN and RPN head of this model, as it is now, in int8; None if its weights came
            without. An OpenVINO model: its XML and its weights.
    """

    loaded: tuple[str, dict[str, Any]] | None = None
    publisher: ClassVar[Any] = None
    int8_network: Callable[[Detector], tuple[bytes, bytes]] | None = None

    def __init__(self, variant: Variant, config: ModelConfig) -> None:
        backbone, heads = ResNetFPN(variant), LesionRoIHeads(config, variant)
        scaling = config.min_size, config.max_size, list(config.image_mean), list(config.image_std)
        super().__init__(backbone, build_rpn(config, variant), heads, GeneralizedRCNNTransform(*scaling))
        self.variant = variant
        self.config = config
        self.metadata: dict[str, Any] = {}

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        metrics: Mapping[str, Any] | None = None,
        dataset: str | None = None,
        license: str | None = None,
        dtype: Literal["float32", "float16"] = "float32",
    ) -> Path:
        """Write model.safetensors, config.json, the card README.md and golden.safetensors into a folder.

        `from_pretrained(folder)` gives the same model back, bit for bit in float32, `metadata` included. If the values
        have changed since they were loaded (fine-tuning), only what was set since goes along, the names of the classes,
        and what a derivative inherits: licence, caveat, and from what data it comes.

        Args:
            folder: made if missing; files of these names are replaced.
            metrics: measured figures, name -> number; they replace those in `metadata`.
            dataset: what the weights were trained and measured on: a Hub data set id, or a sentence.
            license: SPDX identifier of the weights, lower case as on the Hub (``"cc-by-nc-sa-4.0"``).
            dtype: how values are stored; ``"float16"`` halves the file, and rounds.

        Raises:
            OutputError: the folder cannot be written.
            ConfigError: metrics that are not numbers, unknown dtype.
        """
        said = {"metrics": metrics, "dataset": dataset, "license": license}
        return cast("Path", self.publisher.save_pretrained(self, folder, said, dtype))

    def push_to_hub(
        self,
        repository: str,
        *,
        metrics: Mapping[str, Any] | None = None,
        dataset: str | None = None,
        license: str | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        private: bool = False,
    ) -> Any:
        """Write the model to a Hub repository, made if missing, in one commit.

        Args:
            repository: ``"owner/name"``.
            metrics, dataset, license, dtype: as in `save_pretrained`.
            private: make a new repository private.

        Returns:
            A `Published`: what a manifest entry or a pinned ``"owner/name@commit"`` needs.

        Raises:
            WeightsError: not a repository id, no permission (HF_TOKEN), no network.
        """
        options: dict[str, Any] = {"metrics": metrics, "dataset": dataset, "license": license, "dtype": dtype}
        with tempfile.TemporaryDirectory() as folder:
            return self.publisher.push_folder(self.save_pretrained(folder, **options), repository, private=private)


class LesionMaskRCNN(Detector):
    """Mask R-CNN for lesions in chest CT slices, with torchvision's calling convention.

    ``model(images, targets=None)``: `images` a list of (3, H, W) float32 tensors in 0..1, sizes may differ.

    - Training mode: `targets` is a list of dicts with boxes (N, 4) float32 xyxy in pixels, labels (N,) int64 and masks
      (N, H, W); slices without lesions have N = 0. Returns a dict of losses.
    - Evaluation mode: returns per image a dict of boxes (N, 4), labels (N,), scores (N,) falling, and masks
      (N, 1, H, W) float32: probabilities, or raw logits with ``mask_score="logit"``; foreground above 0.5.

    Images of different sizes in one call are padded to the largest, as in torchvision, which changes results a little;
    `Predictor` and `ctmasknet.models.inference` keep each slice's result its own.

    Raises:
        InputError: images of another kind; says which and what to do.
        ConfigError: the model is not in float32.
    """

    def forward(self, images: Sequence[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        require_float32(self)
        return super().forward(checked_images(images), targets)


def build_rpn(config: ModelConfig, variant: Variant) -> RegionProposalNetwork:
    """RPN with the paper's small anchors: 30 per location."""
    sizes, ratios = config.anchors(variant.levels)
    anchors = AnchorGenerator(sizes, ratios)
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(ResNetFPN.out_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=config.rpn_fg_iou_thresh,
        bg_iou_thresh=config.rpn_bg_iou_thresh,
        batch_size_per_image=config.rpn_batch_size_per_image,
        positive_fraction=config.rpn_positive_fraction,
        pre_nms_top_n={"training": config.rpn_pre_nms_top_n_train, "testing": config.rpn_pre_nms_top_n_test},
        post_nms_top_n={"training": config.rpn_post_nms_top_n_train, "testing": config.rpn_post_nms_top_n_test},
        nms_thresh=config.rpn_nms_thresh,
        score_thresh=config.rpn_score_thresh,
    )
    # torchvision drops proposals under 1e-3 px; the released code keeps even empty ones at this stage.
    rpn.min_size = 0.0
    return rpn


def rescale(boxes: Tensor, size: tuple[int, int] | Tensor, target: tuple[int, int] | Tensor) -> Tensor:
    """(N, 4) boxes in an image of size (h, w) -> the same in one of size (H, W)."""
    height, width = target[0] / size[0], target[1] / size[1]
    return torch.stack([side * factor for side, factor in zip(boxes.unbind(1), (width, height) * 2, strict=True)], 1)


def checked_images(images: Sequence[Tensor]) -> list[Tensor]:
    """The images as a list, if they are what a model takes; else the error names the first that is not, and the fix."""
    wanted = "give a list of (3, H, W) float32 tensors with values in 0..1"
    if not isinstance(images, Sequence) and not (isinstance(images, Tensor) and images.dim() == 4):
        raise InputError(f"images is a single {type(images).__name__}: {wanted}")
    if len(images) == 0:
        raise InputError(f"no images: {wanted}")
    fixes = "an array: torch.from_numpy(array); 8 bit: image.float() / 255; grey: image.expand(3, -1, -1)"
    for number, image in enumerate(images):
        floats = isinstance(image, Tensor) and image.dtype == torch.float32
        if not floats or image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            kind = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise InputError(f"images[{number}] is {kind}: {wanted} ({fixes})")
    # One copy to the host for all.
    extremes = torch.stack([torch.stack(image.detach().aminmax()) for image in images]).tolist()
    for number, (low, high) in enumerate(extremes):
        name = f"images[{number}]"
        if not low - low == high - high == 0:
            raise InputError(f"{name} holds NaN or infinite values: replace them first")
        if low < -_SLACK or high > 1 + _SLACK:
            raise InputError(
                f"{name} has values from {low:g} to {high:g}: {wanted} (read_slice puts HU and files there)"
            )
    return list(images)


def require_float32(model: nn.Module) -> None:
    """Raise a ConfigError if the weights have another precision; it says how to compute in a lower one."""
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        raise ConfigError(
            f"the model is in {dtype}, but box arithmetic needs float32: call model.float(). For convolutions of lower "
            "precision set model.backbone.autocast_dtype, or use Predictor(precision=...)"
        )
