"""Optimizer, learning rate and moving average of a run."""

from __future__ import annotations

import math

import torch
from timm.utils import ModelEmaV3
from torch import nn

from ctmasknet.engine.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The config's optimizer over the parameters of `model` that require gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adam":
        return torch.optim.Adam(trained, lr=config.lr, weight_decay=config.weight_decay)
    # Decay pulls weights to zero; normalisation scales and biases have no business there.
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of a step, 0 <= step < steps: a function of the step alone, so resuming needs no state."""
    if config.schedule == "constant":
        return config.lr
    warmup = config.warmup * steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def build_average(model: nn.Module, config: TrainConfig) -> ModelEmaV3:
    """A moving average of weights and statistics, short at first; with ``ema=0`` it follows the model."""
    return ModelEmaV3(model, decay=config.ema, use_warmup=config.ema > 0)
