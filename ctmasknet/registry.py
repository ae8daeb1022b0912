"""The 14 variants as literal data: what each is built of, how large it is, what the paper reports of it.

Standard library only: listing variants must not import torch. The factories, hubconf, the command line,
the README table and the tests are all fed from here.
"""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from ctmasknet.errors import ConfigError

Task = Literal["segmentation", "classification"]

LESION_CLASSES = {2: ("background", "lesion"), 3: ("background", "GGO", "consolidation")}
"""Names of the detector's classes by `num_classes`; class 0 is background everywhere."""

IMAGE_CLASSES = ("control", "pneumonia", "covid")
"""Names of the classifier's three classes in the order of its logits (COVIDx-CT and CNCB coding)."""

try:
    __version__ = version("ctmasknet")
except PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "0+unknown"

DISCLAIMER = "Research software, not a medical device: no output of it may guide the care of a patient."

DEFAULT_SEGMENTER = "maskrcnn_resnet18_t1"
DEFAULT_CLASSIFIER = "ctmasknet_resnet18_t1"
"""What `Predictor` and the command line use when no variant is named; their weights are bundled."""


@dataclass(frozen=True)
class PaperFigures:
    """What the paper prints for one variant: its own data and hardware, not reproduced here.

    Attributes:
        parameters_millions, trainable_millions: Table 1, of classifiers the trainable ones too.
        minutes: Tables 2 and 3, training time.
        ap50, ap75, ap: Table 2, average precision at IoU 0.5, 0.75 and 0.5:0.95 (segmenters).
        sensitivity, accuracy: Table 3, fractions; sensitivity in the order of `IMAGE_CLASSES` (classifiers).
    """

    parameters_millions: float
    minutes: float
    trainable_millions: float | None = None
    ap50: float | None = None
    ap75: float | None = None
    ap: float | None = None
    sensitivity: tuple[float, float, float] | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Variant:
    """One model of the zoo.

    Attributes:
        name: the factory's name, for example ``"maskrcnn_resnet18_t1"``.
        task: ``"segmentation"`` (Mask R-CNN) or ``"classification"`` (COVID-CT-Mask-Net).
        backbone: the ResNet body, as timm names it.
        truncation: ``"full"``, ``"t1"`` (last block removed) or ``"t2"`` (last two removed).
        stages: residual stages kept (4, 3 or 2).
        levels: FPN levels fed to RPN and RoI heads (4 for ResNet50, else 1).
        stride: input pixels per cell of the coarsest feature map.
        num_values: values in the state dict, parameters and buffers, with default class counts.
        roi_batch: RoIs that module S reads (classifiers), None for segmenters.
        hidden: width of module S's two hidden layers (classifiers), None for segmenters.
        paper: the paper's figures for this variant.
    """

    name: str
    task: Task
    backbone: str
    truncation: str
    stages: int
    levels: int
    stride: int
    num_values: int
    paper: PaperFigures
    roi_batch: int | None = None
    hidden: int | None = None

    @property
    def segmenter(self) -> str:
        """Name of the segmentation variant with this body (itself for a segmenter)."""
        return self.name.replace("ctmasknet_", "maskrcnn_")

    @property
    def classifier(self) -> str:
        """Name of the classification variant with this body (itself for a classifier)."""
        return self.name.replace("maskrcnn_", "ctmasknet_")

    @property
    def title(self) -> str:
        """The paper's way of writing the model, for example ``"Mask R-CNN (ResNet18 T1 + FPN)"``."""
        model = "Mask R-CNN" if self.task == "segmentation" else "COVID-CT-Mask-Net"
        cut = "" if self.truncation == "full" else f" {self.truncation.upper()}"
        return f"{model} ({self.backbone.replace('resnet', 'ResNet')}{cut} + FPN)"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"title": self.title}


def _variant(name: str, num_values: int, paper: PaperFigures) -> Variant:
    architecture, _, body = name.partition("_")
    backbone, _, cut = body.partition("_")
    stages = {"": 4, "t1": 3, "t2": 2}[cut]
    large, classifier = backbone == "resnet50", architecture == "ctmasknet"
    return Variant(
        name=name,
        task="classification" if classifier else "segmentation",
        backbone=backbone,
        truncation=cut or "full",
        stages=stages,
        levels=4 if large else 1,
        stride=2 ** (stages + 1),
        num_values=num_values,
        paper=paper,
        roi_batch=(256 if large else 128) if classifier else None,
        hidden=(1024 if large else 512) if classifier else None,
    )


def _table2(millions: float, minutes: float, ap50: float, ap75: float, ap: float) -> PaperFigures:
    return PaperFigures(millions, minutes, ap50=ap50, ap75=ap75, ap=ap)


def _table3(
    millions: float, minutes: float, recalls: tuple[float, float, float], accuracy: float, trainable: float = 0.6
) -> PaperFigures:
    return PaperFigures(millions, minutes, trainable, sensitivity=recalls, accuracy=accuracy)


# Values per state dict: counted in the released code. Paper figures: Tables 1, 2 and 3 (ResNet50 rows: merged masks).
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _variant("maskrcnn_resnet50", 31_781_015, _table2(31.78, 137.38, 0.6192, 0.4522, 0.4468)),
        _variant("maskrcnn_resnet18", 14_520_694, _table2(14.52, 128.75, 0.3699, 0.2898, 0.3137)),
        _variant("maskrcnn_resnet18_t1", 6_056_305, _table2(6.12, 108.8, 0.4995, 0.3778, 0.3932)),
        _variant("maskrcnn_resnet18_t2", 3_921_260, _table2(4.02, 126.9, 0.4993, 0.3852, 0.3759)),
        _variant("maskrcnn_resnet34", 24_636_294, _table2(24.63, 119.23, 0.5357, 0.3333, 0.3465)),
        _variant("maskrcnn_resnet34_t1", 11_449_215, _table2(11.45, 134.01, 0.5988, 0.4506, 0.4476)),
        _variant("maskrcnn_resnet34_t2", 4_587_378, _table2(4.68, 129.2, 0.4491, 0.3118, 0.3404)),
        _variant("ctmasknet_resnet50", 31_522_200, _table3(34.14, 430, (0.9774, 0.9669, 0.9268), 0.9663, 2.36)),
        _variant("ctmasknet_resnet18", 14_752_119, _table3(14.75, 151.2, (0.7457, 0.7731, 0.8751), 0.7818)),
        _variant("ctmasknet_resnet18_t1", 6_287_730, _table3(6.35, 106.6, (0.9698, 0.9163, 0.9135), 0.9395)),
        _variant("ctmasknet_resnet18_t2", 4_152_685, _table3(4.25, 113.66, (0.9301, 0.8581, 0.8405), 0.8866)),
        _variant("ctmasknet_resnet34", 24_867_719, _table3(24.86, 163.81, (0.7112, 0.9427, 0.8698), 0.8245)),
        _variant("ctmasknet_resnet34_t1", 11_680_640, _table3(11.74, 144.73, (0.9436, 0.9170, 0.9176), 0.9289)),
        _variant("ctmasknet_resnet34_t2", 4_818_803, _table3(4.92, 112.6, (0.9211, 0.9332, 0.8925), 0.9199)),
    )
}


def list_models(pattern: str = "*", *, task: Task | None = None) -> list[str]:
    """Names of the variants that match, in registry order. Imports no torch.

    Args:
        pattern: shell wildcards, for example ``"*_t1"``.
        task: ``"segmentation"`` or ``"classification"``; None lists both.

    Raises:
        ConfigError: no such task.
    """
    if task not in (None, "segmentation", "classification"):
        raise ConfigError(f"unknown task {task!r}: use 'segmentation' or 'classification'")
    return [name for name in fnmatch.filter(VARIANTS, pattern) if task in (None, VARIANTS[name].task)]


def get_variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        ConfigError: no such variant; the message suggests the nearest names.
    """
    try:
        return VARIANTS[name]
    except (KeyError, TypeError):
        near = difflib.get_close_matches(str(name), VARIANTS, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "see ctmasknet list"
        raise ConfigError(f"unknown variant {name!r}: {hint}") from None


def class_title(name: str) -> str:
    """`name` as a sentence or a picture shows it: "covid" reads "COVID-19"."""
    return {"covid": "COVID-19", "pneumonia": "common pneumonia"}.get(name, name)
