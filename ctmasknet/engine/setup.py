"""From a config to what the loop runs on: processes, the model and where it starts, its data, its optimizer."""

from __future__ import annotations

import logging
import math
import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import Dataset

from ctmasknet.data.datasets import CachedDataset, SliceDataset, bytes_of, open_dataset, require_trainable
from ctmasknet.data.layouts import shared_patients
from ctmasknet.engine.batches import ModuleSOnRoIs, RoIViews, TrainingSlices, balanced, on_device
from ctmasknet.engine.config import PAPER_SAMPLING, TrainConfig
from ctmasknet.engine.validation import ClassifierValidation, SegmenterValidation, Validation
from ctmasknet.errors import ConfigError, WeightsError, import_extra
from ctmasknet.models import Model
from ctmasknet.models.inference import CPURoIAlign, feature_scales
from ctmasknet.registry import get_variant
from ctmasknet.weights.assemble import load, load_backbone
from ctmasknet.weights.files import inherited
from ctmasknet.zoo import choose_device, create_model, open_model

log = logging.getLogger(__name__)


@dataclass
class Setup:
    """What the loop runs on.

    Attributes:
        model: the whole model, as it is saved.
        trained: what the loop trains: the model, or its module S on cached RoI batches.
        samples: training slices, indexed by (epoch, index).
        names: of the training slices.
        class_names: in the order of the labels.
        weights: probabilities by which slices are drawn; None: each once an epoch.
        validation: of copies of `trained`; None without validation data.
    """

    model: Model
    trained: nn.Module
    samples: Dataset[Any]
    names: list[str]
    class_names: tuple[str, ...]
    weights: np.ndarray | None
    validation: Validation | None

    def weights_of(self, trained: nn.Module) -> dict[str, Tensor]:
        """The whole model's state dict with the values of a copy of `trained`."""
        return self.model.state_dict() | trained.state_dict()


def prepare(config: TrainConfig, device: torch.device, *, rank: int, world: int) -> Setup:
    """Open the data, build the model, and put both where they are used.

    Raises:
        DataError, ConfigError, WeightsError: the text names the file and the fix.
    """
    data, held_out = _open(config)
    torch.manual_seed(config.seed)
    model = initial_model(config, data.class_names).to(device)
    model.metadata["classes"] = list(data.class_names)
    speed_up(model, config, device)
    trained: nn.Module = model
    samples: Any = TrainingSlices(_kept(data, config, device), config.settings, config.seed)
    kept = None if held_out is None else _kept(held_out, config, device)
    if config.cache_rois:
        cached = partial(RoIViews, model, rank=rank, world=world)
        trained, samples = ModuleSOnRoIs(model), cached(samples, views=config.roi_views if config.augment else 1)
        if kept is not None:
            kept = cached(TrainingSlices(kept, config.settings, config.seed), views=1).plain()
    validation = None
    if kept is not None:
        kind = SegmenterValidation if config.task == "segmentation" else ClassifierValidation
        validation = kind(config, data.class_names, kept, rank=rank, world=world)
    weights = balanced(data) if config.balance else None
    return Setup(model, trained, samples, data.names, data.class_names, weights, validation)


def _open(config: TrainConfig) -> tuple[SliceDataset[Any], SliceDataset[Any] | None]:
    """Training and validation data, with everything checked that can be without reading all of it."""
    rules: dict[str, Any] = {"classes": config.classes, "min_area": config.min_area}
    data = open_dataset(config.task, config.data, names=config.names, **rules)
    require_trainable(data, source=str(config.data))
    if config.val is None:
        return data, None
    held_out = open_dataset(config.task, config.val, names=config.val_names, **rules)
    shared = shared_patients(data.patients, held_out.patients)
    if shared:
        named = textwrap.shorten(", ".join(shared), 60, placeholder=", ...")
        log.warning(
            f"{config.data} and {config.val}: {len(shared)} patients are in both ({named}), so validation flatters the "
            "model; keep each in one"
        )
    if held_out.class_names != data.class_names:
        raise ConfigError(
            f"{config.val}: its classes are {', '.join(held_out.class_names)}, those of {config.data} are "
            f"{', '.join(data.class_names)}; give both the same"
        )
    return data, held_out


def _kept(data: SliceDataset[Any], config: TrainConfig, device: torch.device) -> Any:
    """`data`, read once and kept: on a GPU that holds them in a quarter of its free memory, else in RAM."""
    if device.type == "cuda" and not config.workers:  # which could not share what is on a GPU
        chosen = [data[index] for index in range(0, len(data), -(-len(data) // 8))]
        held = sum(map(bytes_of, chosen)) / len(chosen) * len(data)
        if held < torch.cuda.mem_get_info(device)[0] / 4:
            return on_device(data, device)
    kept = CachedDataset(data, int(config.cache_gb * 1e9))
    # Workers are copies of this process and cannot fill its cache later.
    return kept.fill() if config.workers else kept


def speed_up(model: Model, config: TrainConfig, device: torch.device) -> None:
    """Precision and memory layout of body and FPN; RoIAlign. Heads and boxes stay in plain float32."""
    if config.precision == "bfloat16":
        model.backbone.autocast_dtype = torch.bfloat16
    # Weight gradients in float32 on a CPU take up to twice as long in that layout.
    if device.type != "cpu" or model.backbone.autocast_dtype is not None:
        model.backbone.to(memory_format=torch.channels_last)
    if device.type == "cpu":
        heads, scales = model.roi_heads, feature_scales(model.variant)
        heads.box_roi_pool = CPURoIAlign(heads.box_roi_pool, scales)
        if heads.mask_roi_pool is not None:
            heads.mask_roi_pool = CPURoIAlign(heads.mask_roi_pool, scales)


_SHARED = {
    "num_classes", "anchor_sizes", "anchor_ratios", "image_mean", "image_std", "min_size", "max_size", "roi_score",
    "bbox_reg_weights",
}  # fmt: skip
"""Options that a classifier takes over from its segmenter, or a variant from another."""
_MASK_BRANCH = ("roi_heads.mask_head.", "roi_heads.mask_predictor.")


def initial_model(config: TrainConfig, class_names: tuple[str, ...]) -> Model:
    """The config's variant, with as many classes as the data has, from the weights it names.

    Its metadata hold what still holds of those weights, or under ``body`` where an ImageNet body came from.

    Raises:
        WeightsError: the weights are missing, damaged, or do not fit.
    """
    classes = "num_classes" if config.task == "segmentation" else "image_classes"
    options = {**config.model_options, classes: len(class_names)}
    if config.weights is None:
        return _start_body(create_model(config.model, **options), config.weights_backbone)
    weights = str(config.model if config.weights == "default" else config.weights)
    donor = open_model(weights, device="cpu")
    stored, tensors, holder = donor.config.to_dict(), donor.state_dict(), donor.variant.name
    # How training samples is the recipe's business; another variant's thresholds and RoI counts are not this one's.
    taken = set(stored) - set(PAPER_SAMPLING) if holder == config.model else _SHARED
    model = create_model(config.model, **{key: stored[key] for key in taken} | options)
    # Terms and origin of the start weights go along into what is trained from them.
    model.metadata = inherited(donor.metadata, holder)
    state, new = model.state_dict(), set[str]()
    if config.partial_weights:
        tensors = {key: t for key, t in tensors.items() if key in state and t.shape == state[key].shape}
        new = state.keys() - tensors.keys()
    elif config.task == "classification" and holder == get_variant(config.model).segmenter:
        tensors = {key: t for key, t in tensors.items() if not key.startswith(_MASK_BRANCH)}
        new = {key for key in state if key.startswith("module_s.")}
    elif holder != config.model:
        raise WeightsError(f"{weights}: of {holder}, not of {config.model}; partial_weights=True copies what fits")
    load(model, tensors | {key: state[key] for key in new}, Path(weights))
    if new:
        said = ", ".join(sorted({".".join(key.split(".")[:3]) for key in new}))
        log.warning(f"{config.model}: from random values start {said}; all else comes from {weights}")
    return model


def _start_body(model: Model, source: str | Path | bool) -> Model:
    """The model with its body from ImageNet, as the config's `weights_backbone` has it."""
    if source is False:
        return model
    try:
        place = load_backbone(model, None if source is True or source == "auto" else source)
    except WeightsError as error:
        if source != "auto":
            raise
        log.warning(
            f"{model.variant.name}: the body starts from random values: ImageNet weights could not be had ({error}). "
            "Give a file of them, or weights_backbone=False (--set weights_backbone=false) to start so on purpose"
        )
    else:
        # For the card. Folders of this machine are nobody's business.
        model.metadata["body"] = Path(place).name if Path(place).exists() else place
    return model


def start_accelerator(config: TrainConfig) -> Any:
    """accelerate's `Accelerator` for this process, on the config's device.

    Raises:
        ConfigError: the device cannot be used.
        MissingExtraError: accelerate is not installed.
    """
    accelerate = import_extra("accelerate", "train", "training")
    wanted = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    processes = accelerate.PartialState(cpu=wanted.type == "cpu")
    if processes.num_processes == 1:
        processes.device = choose_device(config.device)  # accelerate would take the first GPU
    elif config.device and (wanted.index is not None or wanted.type != processes.device.type):
        raise ConfigError(
            f"device={config.device!r}: {processes.num_processes} processes take a device each, here "
            f"{processes.device.type}; leave device out"
        )
    # mixed_precision would autocast box arithmetic too, which moves boxes by whole pixels; the body has its own.
    return accelerate.Accelerator(
        mixed_precision="no", gradient_accumulation_steps=config.accumulate, cpu=wanted.type == "cpu"
    )


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The config's optimizer over the parameters of `model` that require gradients."""
    if config.optimizer == "adam":
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.Adam(trained, lr=config.lr, weight_decay=config.weight_decay)
    # Decay pulls weights to zero; normalisation scales and biases have no business there.
    return torch.optim.AdamW(param_groups_weight_decay(model, config.weight_decay), lr=config.lr)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of a step, 0 <= step < steps: a function of the step alone, so resuming needs no state."""
    if config.schedule == "constant":
        return config.lr
    warmup = config.warmup * steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
