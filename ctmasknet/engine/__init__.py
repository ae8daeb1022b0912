"""Training: one loop for segmenters and classifiers, on a laptop or many GPUs, resumable at any step."""

from ctmasknet.engine.config import RECIPES, TrainConfig
from ctmasknet.engine.loop import train
from ctmasknet.engine.run import TrainResult

__all__ = ["RECIPES", "TrainConfig", "TrainResult", "train"]
