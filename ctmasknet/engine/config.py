"""Everything a training run is told, as one dataclass of plain values, and the recipes that fill its gaps."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
import yaml

from ctmasknet.data.augment import Augmentation
from ctmasknet.data.layouts import LesionClasses
from ctmasknet.errors import ConfigError, typed
from ctmasknet.models.config import model_config
from ctmasknet.registry import Task, get_variant

# All of them, so that a run owes none to the weights it starts from (paper, section 3, and its released code).
# Classifiers train no RPN and no RoI heads.
PAPER_SAMPLING = {
    "rpn_pre_nms_top_n_train": 2000,
    "rpn_post_nms_top_n_train": 2000,
    "rpn_fg_iou_thresh": 0.7,
    "rpn_bg_iou_thresh": 0.3,
    "rpn_batch_size_per_image": 256,
    "rpn_positive_fraction": 0.75,
    "box_fg_iou_thresh": 0.75,
    "box_bg_iou_thresh": 0.5,
    "box_batch_size_per_image": 256,
    "box_positive_fraction": 0.75,
}
"""The options of `ModelConfig` that matter in training alone, with the paper's values."""

_PAPER: dict[str, Any] = {
    "optimizer": "adam",
    "lr": 1e-5,
    "weight_decay": 1e-3,
    "schedule": "constant",
    "clip_norm": 0.0,
    "ema": 0.0,
    "augment": False,
    "weights_backbone": False,
}
_FAST: dict[str, Any] = {
    "optimizer": "adamw",
    "weight_decay": 1e-2,
    "schedule": "cosine",
    "clip_norm": 5.0,
    "augment": True,
    "weights_backbone": False,
}
RECIPES: dict[Task, dict[str, dict[str, Any]]] = {
    "segmentation": {
        # Slices without lesions, which the released code skipped, stay in.
        "paper": {**_PAPER, "batch_size": 1, "epochs": 100, "model_options": PAPER_SAMPLING},
        # RoI sampling as in torchvision: with the paper's foreground IoU of 0.75 an untrained RPN offers almost no
        # positive RoI, so training from random values starts slowly.
        "fast": {
            **_FAST,
            "lr": 5e-4,
            "ema": 0.998,
            "batch_size": 4,
            "epochs": 24,
            "weights_backbone": "auto",
            "model_options": PAPER_SAMPLING
            | {
                "rpn_pre_nms_top_n_train": 1000,
                "rpn_post_nms_top_n_train": 500,
                "box_fg_iou_thresh": 0.5,
                "box_batch_size_per_image": 128,
                "box_positive_fraction": 0.25,
            },
        },
    },
    "classification": {
        "paper": {**_PAPER, "batch_size": 8, "epochs": 50, "model_options": {}},
        "fast": {**_FAST, "lr": 3e-4, "ema": 0.99, "batch_size": 8, "epochs": 20, "model_options": {}},
    },
}
"""Per task, the fields of `TrainConfig` that a recipe sets; `fast` is the default, `paper` the paper's."""

PathLike = str | Path
_FROM_RECIPE: Any = None


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Fields marked (recipe) come from `RECIPES` unless given; after construction none is open.

    Attributes:
        model: variant to train, one of `list_models()`.
        data: training data, a path or several; layouts as in `ctmasknet.data.datasets.open_dataset`.
        out: folder of the run, made if missing: checkpoints, weights, logs, record. All processes must see it.
        val: validation data, a path or several. None: no validation, `best` is the last epoch.
        names, val_names: restrict data and val to these names: a text file that lists them, or the names.
        classes: ``"merge"`` (lesion), ``"both"`` (GGO and consolidation) or ``"ggo"``; segmentation only.
        min_area: instances of so many pixels or fewer join the background.
        weights: where to start: None (random values), ``"default"`` (the variant's own), or what `open_model` takes: a
            variant, folder, safetensors file, Hub repository or author's `.pth`. A classifier also takes its
            segmenter's: module S then starts anew.
        partial_weights: copy whatever has the same name and shape, from any variant, and log what starts anew.
        weights_backbone: (recipe) where the body starts if there are no `weights`: True: from timm's ImageNet weights,
            downloaded once; a file: from those in it; ``"auto"``: from timm's if they can be had, else from random
            values, and the log says so; False: from random values.
        model_options: options of `ModelConfig`, added to those of the recipe.
        recipe: ``"fast"`` or ``"paper"``.
        optimizer: (recipe) ``"adamw"`` (no decay on biases and normalisation) or ``"adam"`` (decay on all, coupled).
        lr: (recipe) highest learning rate.
        weight_decay: (recipe) of the optimizer.
        schedule: (recipe) ``"cosine"`` to zero, after a linear warm-up, or ``"constant"``.
        warmup: fraction of all steps in which the rate of a cosine schedule rises from zero.
        balance: draw slices at random, so that all classes come as often, and in each all patients (segmentation: the
            classes are lesions and none). An epoch then repeats some slices and leaves out others.
        batch_size: (recipe) slices per process and forward pass.
        accumulate: forward passes per optimizer step.
        epochs: (recipe) passes over the training data.
        clip_norm: (recipe) largest gradient norm, 0 for no clipping.
        ema: (recipe) decay of the moving average of the weights, which is what is validated and saved; 0: none.
        precision: of body and FPN: ``"float32"`` or ``"bfloat16"``. Boxes and losses are float32 always.
        augment: (recipe) change training slices at random.
        augmentation: fields of `Augmentation` that differ from its defaults.
        train_min_size: shorter image side in training, pixels; None: the model's own, as in validation.
        cache_rois: classifiers: compute RoI batches once and train module S alone on them.
        roi_views: with cache_rois, RoI batches per slice: one plain, the others augmented.
        seed: fixes order, augmentation and sampling.
        device: any torch device; None: a GPU if there is one. Of several processes each takes a GPU of its own.
        workers: processes that read and augment slices; 0 does it in the training process.
        cache_gb: decoded slices are kept in so many GB of RAM per process; but, without `workers`, on a GPU that holds
            them in a quarter of its free memory.
        resume: ``"auto"`` continues a run that `out` holds and starts one otherwise; False starts only in a folder
            without a run; a path continues from that checkpoint or run folder.
        checkpoint_minutes: write a checkpoint at least this often; one is written after every epoch anyway. Two are
            kept: if the last is damaged, the one before is used.
        validate_every: epochs between validations; the last epoch is always validated.
        validation_loss: also compute losses on the validation data, at the price of a second forward pass.
        score_threshold, nms_threshold: of the detections that are validated.
        operating_point: at the end, choose the thresholds stored with `best` on the validation data; for a classifier,
            fit the temperature of its probabilities.
        patience: stop after this many validations without improvement; 0: never.
        max_bad_steps: stop after this many steps in a row whose loss or gradient is NaN or infinite.
        tensorboard: write TensorBoard scalars and overlays to `out/tensorboard`.
        progress: show a progress bar.
        dataset, license, note, caveat: for the weights' metadata and card: what they were trained on, their terms, what
            to say of them, and a line to show with every prediction.
    """

    model: str
    data: PathLike | list[PathLike]
    out: PathLike
    val: PathLike | list[PathLike] | None = None
    names: PathLike | list[PathLike] | None = None
    val_names: PathLike | list[PathLike] | None = None
    classes: LesionClasses = "merge"
    min_area: int = 100
    weights: PathLike | None = None
    partial_weights: bool = False
    weights_backbone: PathLike | bool = _FROM_RECIPE
    model_options: dict[str, Any] = field(default_factory=dict)
    recipe: Literal["fast", "paper"] = "fast"
    optimizer: Literal["adamw", "adam"] = _FROM_RECIPE
    lr: float = _FROM_RECIPE
    weight_decay: float = _FROM_RECIPE
    schedule: Literal["cosine", "constant"] = _FROM_RECIPE
    warmup: float = 0.05
    balance: bool = False
    batch_size: int = _FROM_RECIPE
    accumulate: int = 1
    epochs: int = _FROM_RECIPE
    clip_norm: float = _FROM_RECIPE
    ema: float = _FROM_RECIPE
    precision: Literal["float32", "bfloat16"] = "float32"
    augment: bool = _FROM_RECIPE
    augmentation: dict[str, Any] = field(default_factory=dict)
    train_min_size: int | None = None
    cache_rois: bool = False
    roi_views: int = 8
    seed: int = 0
    device: str | None = None
    workers: int = 0
    cache_gb: float = 4.0
    resume: PathLike | bool = "auto"
    checkpoint_minutes: float = 10.0
    validate_every: int = 1
    validation_loss: bool = True
    score_threshold: float = 0.3
    nms_threshold: float = 0.5
    operating_point: bool = True
    patience: int = 0
    max_bad_steps: int = 10
    tensorboard: bool = True
    progress: bool = True
    dataset: str | None = None
    license: str | None = None
    note: str | None = None
    caveat: str | None = None

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if getattr(self, name) is not None or name not in RECIPES["segmentation"]["fast"]:
                object.__setattr__(self, name, typed(name, getattr(self, name), kind))
        variant = get_variant(self.model)
        recipes = RECIPES[variant.task]
        for name, value in recipes[self.recipe].items():
            if name == "model_options":
                object.__setattr__(self, name, {**value, **self.model_options})
            elif getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _check_ranges(self)
        model_config(variant, **self.model_options)
        _augmentation(self.augmentation)

    @property
    def task(self) -> Task:
        """Task of the variant."""
        return get_variant(self.model).task

    @property
    def settings(self) -> Augmentation | None:
        """How training slices are changed; None: not at all."""
        return _augmentation(self.augmentation) if self.augment else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `TrainConfig.from_dict` takes them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config") -> TrainConfig:
        """A config from plain values; errors begin with `source`, where they come from.

        Raises:
            ConfigError: unknown, missing or ill-typed fields, impossible values; the text names the field.
        """
        fields = cls.__dataclass_fields__
        for name in values:
            if name not in fields:
                near = difflib.get_close_matches(str(name), fields, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known fields: {', '.join(fields)}"
                raise ConfigError(f"{source}: unknown field {name!r}; {hint}")
        for name in ("model", "data", "out"):
            if name not in values:
                raise ConfigError(f"{source}: field {name!r} is missing")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **overrides: Any) -> TrainConfig:
        """A config from a YAML or JSON file of fields; `overrides` replace what it says.

        Raises:
            ConfigError: unreadable, not a mapping, or as `from_dict`.
        """
        path = Path(path)
        parse = json.loads if path.suffix.lower() == ".json" else yaml.safe_load
        try:
            values = parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: needs lines of the form field: value")
        return cls.from_dict({**values, **overrides}, source=str(path))


_LEAST = {
    **dict.fromkeys(("batch_size", "accumulate", "epochs", "roi_views", "validate_every", "max_bad_steps"), 1),
    **dict.fromkeys(("min_area", "lr", "weight_decay", "clip_norm", "seed", "workers"), 0),
    **dict.fromkeys(("cache_gb", "checkpoint_minutes", "patience"), 0),
    "train_min_size": 32,
}
_FRACTIONS = ("warmup", "ema", "score_threshold", "nms_threshold")


def _check_ranges(config: TrainConfig) -> None:
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(f"{name}={value}: must be at least {least}")
    for name in _FRACTIONS:
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name}={getattr(config, name)}: must lie in 0..1")
    if config.cache_rois and config.task != "classification":
        raise ConfigError(f"cache_rois is for classifiers; {config.model} is a segmenter")
    if config.weights_backbone not in (False, "auto") and config.weights is not None:
        raise ConfigError("give weights or weights_backbone, not both: weights include a body")
    try:
        torch.device(config.device or "cpu")
    except RuntimeError as error:
        raise ConfigError(f"device={config.device!r}: {str(error).splitlines()[0]}") from None
    if config.resume is True:
        raise ConfigError('resume=True: use "auto", False, or the path of a checkpoint')


def _augmentation(values: Mapping[str, Any]) -> Augmentation:
    """`Augmentation` with some fields replaced, their types checked."""
    kinds = get_type_hints(Augmentation)
    for name in values:
        if name not in kinds:
            raise ConfigError(f"augmentation: unknown field {name!r}; known: {', '.join(kinds)}")
    return Augmentation(**{name: typed(f"augmentation.{name}", value, kinds[name]) for name, value in values.items()})
