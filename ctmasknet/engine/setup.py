"""From a config to what the loop runs on: the model, its training slices, its validation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ctmasknet.data.datasets import SliceDataset, cached, open_dataset, require_trainable
from ctmasknet.engine.config import TrainConfig
from ctmasknet.engine.initial import Model, initial_model
from ctmasknet.engine.samples import OnDevice, TrainingSlices
from ctmasknet.engine.validation import (
    Gather,
    choose_operating_point,
    validate_classifier,
    validate_segmenter,
    validation_losses,
)
from ctmasknet.errors import ConfigError

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
        validate: metrics of a copy of `trained`, or None without validation data.
        operating_point: thresholds for a copy of `trained`, or None where there is nothing to choose.
    """

    model: Model
    trained: nn.Module
    samples: Dataset[Any]
    names: list[str]
    class_names: tuple[str, ...]
    validate: Callable[[nn.Module], dict[str, float]] | None
    operating_point: Callable[[nn.Module], dict[str, float]] | None

    def weights_of(self, trained: nn.Module) -> dict[str, Tensor]:
        """The whole model's state dict with the values of a copy of `trained`."""
        if isinstance(trained, type(self.model)):
            return trained.state_dict()
        return self.model.state_dict() | trained.state_dict()


def prepare(config: TrainConfig, device: torch.device, *, rank: int, world: int, gather: Gather) -> Setup:
    """Open the data, build the model, and put both where they are used.

    Raises:
        DataError, ConfigError, WeightsError: the text names the file and the fix.
    """
    data = open_dataset(
        config.task,
        config.data,
        classes=config.classes,
        min_area=config.min_area,
        list_file=config.list_file,
    )
    require_trainable(data, source=str(config.data))
    held_out = None
    if config.val is not None:
        held_out = open_dataset(
            config.task,
            config.val,
            classes=config.classes,
            min_area=config.min_area,
            list_file=config.val_list_file,
        )
        if held_out.class_names != data.class_names:
            raise ConfigError(
                f"{config.val}: its classes are {', '.join(held_out.class_names)}, those of {config.data} are "
                f"{', '.join(data.class_names)}"
            )
    model = initial_model(config, data.class_names).to(device)
    _speed_up(model, config, device)
    source = _kept(data, config, device)
    val_source = None if held_out is None else _kept(held_out, config, device)

    def share() -> Iterator[Any]:
        """This process's part of the validation data."""
        if val_source is None:
            raise ConfigError("there is no validation data")
        return (val_source[index] for index in range(rank, len(val_source), world))

    def validate(trained: Any) -> dict[str, float]:
        if config.task == "segmentation":
            metrics = validate_segmenter(
                trained,
                share(),
                gather,
                score_threshold=config.score_threshold,
                nms_threshold=config.nms_threshold,
            )
        else:
            metrics = validate_classifier(trained, share(), gather, data.class_names)
        if config.validation_loss:
            metrics |= validation_losses(trained, share(), gather)
        return metrics

    choosing = config.operating_point and config.task == "segmentation" and held_out is not None
    return Setup(
        model=model,
        trained=model,
        samples=TrainingSlices(source, config.settings, config.seed),
        names=data.names,
        class_names=data.class_names,
        validate=None if held_out is None else validate,
        operating_point=(lambda trained: choose_operating_point(trained, share(), gather)) if choosing else None,
    )


def _kept(data: SliceDataset[Any], config: TrainConfig, device: torch.device) -> Any:
    if config.cache == "device":
        return OnDevice(data, device)
    if config.cache == "none":
        return data
    kept = cached(data, int(config.cache_gb * 1e9))
    # Workers are forked and cannot fill a common cache later.
    return kept.fill() if config.workers else kept


def _speed_up(model: Model, config: TrainConfig, device: torch.device) -> None:
    """Precision, memory layout and compilation of body and FPN; heads and boxes stay in plain float32."""
    if config.precision == "bfloat16" or (config.precision == "auto" and _computes_bfloat16(device)):
        model.backbone.autocast_dtype = torch.bfloat16
    if config.channels_last:
        model.backbone.to(memory_format=torch.channels_last)
    if config.compile:
        model.backbone.compile()


def _computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 there, not merely possible."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(device.type == "cpu" and supported is not None and supported())
