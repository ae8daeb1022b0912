"""Every switch of a model in one frozen dataclass: torchvision's names where torchvision has one."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ctmasknet.errors import ConfigError, shown, typed
from ctmasknet.registry import Variant


@dataclass(frozen=True)
class ModelConfig:
    """Plain values that, with a variant, determine a model. Defaults are the paper's evaluation settings.

    Both tasks share the class, so that a segmenter's config also serves the classifier derived from it;
    `mask_score` has no effect on classifiers, nor `image_classes` and `replicate` on segmenters.

    Attributes:
        num_classes: detector classes, background included (2: lesion; 3: GGO and consolidation apart).
        image_classes: outputs of module S.
        roi_score: how a RoI's class logits become scores; the paper tried ``"sigmoid"`` (section 3, item 1).
        mask_score: ``"sigmoid"`` pastes probabilities into the image; ``"logit"`` pastes the raw mask logits, as
            the released code does. Either way a pixel belongs to the mask above 0.5.
        drop_empty: remove predictions whose clipped box has area 0 before NMS (section 3, item 2).
        replicate: fill the classifier's RoI batch by repeating valid RoIs in rank order (section 3, item 2);
            otherwise free slots are zeros.
        anchor_sizes: side in pixels of the anchors of every FPN level, or one tuple per level.
        anchor_ratios: height / width of the anchors of every FPN level, or one tuple per level.
        min_size: the shorter image side is resized to this many pixels,
        max_size: unless the longer one would exceed this.
        image_mean, image_std: per channel, for inputs in 0..1.
        rpn_*, box_*, bbox_reg_weights: as in `torchvision.models.detection.MaskRCNN`. A classifier feeds at most
            `box_detections_per_img` distinct RoIs to module S.
    """

    num_classes: int = 2
    image_classes: int = 3
    roi_score: Literal["softmax", "sigmoid"] = "softmax"
    mask_score: Literal["sigmoid", "logit"] = "sigmoid"
    drop_empty: bool = True
    replicate: bool = True
    anchor_sizes: tuple[Any, ...] = (2, 4, 8, 16, 32)
    anchor_ratios: tuple[Any, ...] = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0)
    min_size: int = 512
    max_size: int = 1024
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    rpn_pre_nms_top_n_train: int = 1000
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 1000
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_thresh: float = 0.75
    rpn_fg_iou_thresh: float = 0.7
    rpn_bg_iou_thresh: float = 0.3
    rpn_batch_size_per_image: int = 256
    rpn_positive_fraction: float = 0.75
    rpn_score_thresh: float = 0.0
    box_score_thresh: float = 0.75
    box_nms_thresh: float = 0.75
    box_detections_per_img: int = 128
    box_fg_iou_thresh: float = 0.75
    box_bg_iou_thresh: float = 0.5
    box_batch_size_per_image: int = 256
    box_positive_fraction: float = 0.75
    bbox_reg_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _checked(name, kind, getattr(self, name)))
        if min(self.num_classes, self.image_classes) < 2:
            counts = f"num_classes={self.num_classes}, image_classes={self.image_classes}"
            raise ConfigError(f"{counts}: at least 2 each are needed; num_classes counts the background")
        if self.min_size > self.max_size:
            raise ConfigError(f"min_size={self.min_size} exceeds max_size={self.max_size}")
        if min(self.image_std) <= 0 or min(self.bbox_reg_weights) <= 0:
            raise ConfigError("image_std and bbox_reg_weights must be above 0")

    def anchors(self, levels: int) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]:
        """Sizes and ratios per FPN level. Level lists longer than `levels` are cut, as the released code's are."""
        sizes, ratios = (_per_level(name, getattr(self, name), levels) for name in ("anchor_sizes", "anchor_ratios"))
        if len({len(s) * len(r) for s, r in zip(sizes, ratios, strict=True)}) != 1:
            raise ConfigError("every FPN level needs the same number of anchors (sizes x ratios)")
        if len(sizes[0]) * len(ratios[0]) > _MOST_ANCHORS:
            raise ConfigError(
                f"{len(sizes[0])} anchor sizes x {len(ratios[0])} ratios: at most {_MOST_ANCHORS} anchors"
            )
        return sizes, ratios

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; tuples become lists there."""
        return asdict(self)


_MOST = {"num_classes": 1000, "image_classes": 1000, "min_size": 8192, "max_size": 8192}
_MOST_OF_OTHERS, _MOST_ANCHORS = 100_000, 256  # whole numbers; anchors per cell


def model_config(variant: Variant, /, **overrides: Any) -> ModelConfig:
    """The variant's default config with `overrides`.

    A segmenter keeps detections above the paper's score 0.75; a classifier lets every RoI enter its batch
    (score above -0.01) and reads as many as its module S has slots.
    """
    known = list(ModelConfig.__dataclass_fields__)
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known options: {', '.join(known)}"
            raise ConfigError(f"{variant.name}: unknown option {shown(name)}; {hint}")
    if variant.roi_batch is not None:
        overrides = {"box_score_thresh": -0.01, "box_detections_per_img": variant.roi_batch} | overrides
    config = ModelConfig(**overrides)
    config.anchors(variant.levels)
    return config


def _checked(name: str, kind: Any, value: Any) -> Any:
    if name.startswith("anchor_"):
        return _levels(name, value)
    value = typed(name, value, kind)
    if get_origin(kind) is tuple:
        if len(value) != len(get_args(kind)):
            raise ConfigError(f"{name} takes {len(get_args(kind))} numbers, got {len(value)}")
        return tuple(value)
    most = _MOST.get(name, _MOST_OF_OTHERS)
    if kind is int and not 1 <= value <= most:
        raise ConfigError(f"{name}={shown(value)}: must lie in 1..{most}")
    if name.endswith(("nms_thresh", "iou_thresh", "_fraction")) and not 0 <= value <= 1:
        raise ConfigError(f"{name}={value}: must lie in 0..1")
    return value


def _levels(name: str, value: Any) -> tuple[Any, ...]:
    """Anchor sizes or ratios, of all FPN levels or level by level."""
    levels = typed(name, value, list[list[float] | float])
    rows = [level for level in levels if isinstance(level, list)]
    if not levels or (rows and len(rows) < len(levels)) or [] in rows or min(map(min, rows or [levels])) <= 0:
        raise ConfigError(f"{name}={shown(value)}: a list of numbers above 0 is needed, or one for each FPN level")
    return tuple(map(tuple, rows)) if rows else tuple(levels)


def _per_level(name: str, value: tuple[Any, ...], levels: int) -> tuple[tuple[float, ...], ...]:
    if not isinstance(value[0], tuple):
        return (value,) * levels
    if len(value) < levels:
        raise ConfigError(f"{name} lists {len(value)} FPN levels, the model has {levels}")
    return value[:levels]
