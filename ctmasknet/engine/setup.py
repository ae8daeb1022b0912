"""From a config to what the loop runs on: the model, its training slices, its validation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ctmasknet.data.datasets import SliceDataset, cached, open_dataset, require_trainable
from ctmasknet.engine.config import TrainConfig
from ctmasknet.engine.initial import Model, initial_model
from ctmasknet.engine.rois import ModuleSOnRoIs, RoIViews
from ctmasknet.engine.samples import OnDevice, TrainingSlices
from ctmasknet.engine.validation import (
    Gather,
    draw_example,
    final_figures,
    validate_classifier,
    validate_segmenter,
    validation_losses,
)
from ctmasknet.errors import ConfigError
from ctmasknet.models import COVIDCTMaskNet
from ctmasknet.models.inference import CPURoIAlign, computes_bfloat16, feature_scales

log = logging.getLogger(__name__)

Metrics = dict[str, float]


@dataclass
class Setup:
    """What the loop runs on.

    Attributes:
        model: the whole model, as it is saved.
        trained: what the loop trains: the model, or its module S on cached RoI batches.
        samples: training slices, indexed by (epoch, index).
        names: of the training slices.
        class_names: in the order of the labels.
        validate: metrics of a copy of `trained`; None without validation data.
        finally_validate: a copy of `trained` -> (operating point, metrics there); None where there is no such point
            to choose.
        draw: a copy of `trained` -> the first validation slices with its predictions; None where there are none.
    """

    model: Model
    trained: nn.Module
    samples: Dataset[Any]
    names: list[str]
    class_names: tuple[str, ...]
    validate: Callable[[Any], Metrics] | None = None
    finally_validate: Callable[[Any], tuple[Metrics, Metrics]] | None = None
    draw: Callable[[Any], list[np.ndarray]] | None = None

    def weights_of(self, trained: nn.Module) -> dict[str, Tensor]:
        """The whole model's state dict with the values of a copy of `trained`."""
        return self.model.state_dict() | trained.state_dict()


def prepare(config: TrainConfig, device: torch.device, *, rank: int, world: int, gather: Gather) -> Setup:
    """Open the data, build the model, and put both where they are used.

    Raises:
        DataError, ConfigError, WeightsError: the text names the file and the fix.
    """
    data, held_out = _open(config)
    torch.manual_seed(config.seed)
    model = initial_model(config, data.class_names).to(device)
    speed_up(model, config, device)
    source = _kept(data, config, device)
    samples = TrainingSlices(source, config.settings, config.seed)
    setup = Setup(model, model, samples, data.names, data.class_names)
    kept = None if held_out is None else _kept(held_out, config, device)

    def share() -> Iterator[Any]:
        """This process's part of the validation data."""
        return (kept[index] for index in range(rank, len(kept), world)) if kept is not None else iter(())

    if isinstance(model, COVIDCTMaskNet):
        if config.cache_rois:
            rois = partial(RoIViews, model, settings=config.settings, seed=config.seed)
            rois = partial(rois, rank=rank, world=world, gather=gather)
            setup.samples = rois(source, views=config.roi_views if config.augment else 1)
            setup.trained = ModuleSOnRoIs(model)
            if kept is not None:
                kept = rois(kept, views=1).plain()
        setup.validate = lambda trained: validate_classifier(trained, share(), gather, data.class_names)
    else:
        score, nms = config.score_threshold, config.nms_threshold
        point = {"score_threshold": score, "nms_threshold": nms}
        setup.validate = lambda trained: validate_segmenter(trained, share(), gather, **point)
        if kept is not None:
            shown = [kept[index] for index in range(min(4, len(kept)))] if config.tensorboard else []
            setup.draw = lambda trained: [
                draw_example(trained, slice_, data.class_names, score, nms) for slice_ in shown
            ]
            if config.operating_point:
                setup.finally_validate = lambda trained: final_figures(trained, share, gather)
    if kept is None:
        setup.validate = None
    elif config.validation_loss:
        metrics_of = setup.validate
        setup.validate = lambda trained: metrics_of(trained) | validation_losses(trained, share(), gather)
    return setup


def _open(config: TrainConfig) -> tuple[SliceDataset[Any], SliceDataset[Any] | None]:
    """Training and validation data, with everything checked that can be without reading all of it."""
    rules: dict[str, Any] = {"classes": config.classes, "min_area": config.min_area}
    data = open_dataset(config.task, config.data, list_file=config.list_file, **rules)
    require_trainable(data, source=str(config.data))
    if config.val is None:
        return data, None
    held_out = open_dataset(config.task, config.val, list_file=config.val_list_file, **rules)
    if held_out.class_names != data.class_names:
        raise ConfigError(
            f"{config.val}: its classes are {', '.join(held_out.class_names)}, those of {config.data} are "
            f"{', '.join(data.class_names)}; give both the same"
        )
    return data, held_out


def _kept(data: SliceDataset[Any], config: TrainConfig, device: torch.device) -> Any:
    """`data`, read once and kept where the config wants it."""
    place = config.cache
    if place == "auto":
        place = "device" if config.workers == 0 and _fits(data, device) else "ram"
    if place == "device":
        return OnDevice(data, device)
    if place == "none":
        return data
    kept = cached(data, int(config.cache_gb * 1e9))
    # Workers are copies of this process and cannot fill its cache later.
    return kept.fill() if config.workers else kept


def _fits(data: SliceDataset[Any], device: torch.device) -> bool:
    """Whether a GPU holds all of `data`, as a few samples make it, in a quarter of its free memory."""
    if device.type != "cuda":
        return False
    chosen = np.unique(np.linspace(0, len(data) - 1, num=min(8, len(data))).astype(int)).tolist()
    sizes = []
    for index in chosen:
        sample = data[index]
        target = sample[1] if isinstance(sample[1], dict) else {}
        sizes.append(sample.image.nbytes + sum(value.nbytes for value in target.values()))
    free, _ = torch.cuda.mem_get_info(device)
    return float(np.mean(sizes)) * len(data) < free / 4


def speed_up(model: Model, config: TrainConfig, device: torch.device) -> None:
    """Precision, memory layout and compilation of body and FPN; RoIAlign. Heads and boxes stay in plain float32."""
    if config.precision == "bfloat16" or (config.precision == "auto" and computes_bfloat16(device)):
        model.backbone.autocast_dtype = torch.bfloat16
    # Weight gradients in float32 on a CPU take up to twice as long in that layout.
    plain_cpu = device.type == "cpu" and model.backbone.autocast_dtype is None
    if config.channels_last and not plain_cpu:
        model.backbone.to(memory_format=torch.channels_last)
    if config.compile:
        model.backbone.compile()
    if device.type == "cpu":
        heads, scales = model.roi_heads, feature_scales(model.variant)
        heads.box_roi_pool = CPURoIAlign(heads.box_roi_pool, scales)
        if heads.mask_roi_pool is not None:
            heads.mask_roi_pool = CPURoIAlign(heads.mask_roi_pool, scales)
