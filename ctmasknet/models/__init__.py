"""The two model families: Mask R-CNN lesion segmenters and the COVID-CT-Mask-Net classifiers derived from them.

Nothing in here knows of weights or files. Uses of torchvision names that are not documented API
(`RegionProposalNetwork`, `RoIHeads`, `GeneralizedRCNN`, `TwoMLPHead`, `FastRCNNPredictor`, `MaskRCNNPredictor`,
`GeneralizedRCNNTransform`, `LevelMapper`) were read in torchvision 0.21 and 0.29.
"""

from ctmasknet.models.classifier import COVIDCTMaskNet
from ctmasknet.models.config import ModelConfig, model_config
from ctmasknet.models.detector import LesionMaskRCNN

Model = LesionMaskRCNN | COVIDCTMaskNet

__all__ = ["COVIDCTMaskNet", "LesionMaskRCNN", "Model", "ModelConfig", "model_config"]
