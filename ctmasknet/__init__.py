"""ctmasknet: lightweight Mask R-CNN models that segment lesions in chest CT slices and classify COVID-19 from them.

Names are resolved when first used, so that importing the package or listing its variants needs no torch.
Research software, not a medical device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctmasknet.batch import FileResult as FileResult
    from ctmasknet.batch import RunSummary as RunSummary
    from ctmasknet.batch import predict_files as predict_files
    from ctmasknet.data.datasets import open_dataset as open_dataset
    from ctmasknet.engine import TrainConfig as TrainConfig
    from ctmasknet.engine import TrainResult as TrainResult
    from ctmasknet.engine import train as train
    from ctmasknet.errors import ConfigError as ConfigError
    from ctmasknet.errors import CTMaskNetError as CTMaskNetError
    from ctmasknet.errors import DataError as DataError
    from ctmasknet.errors import InputError as InputError
    from ctmasknet.errors import MissingExtraError as MissingExtraError
    from ctmasknet.errors import WeightsError as WeightsError
    from ctmasknet.evaluation.evaluate import Evaluation as Evaluation
    from ctmasknet.evaluation.evaluate import evaluate as evaluate
    from ctmasknet.exporting import Exported as Exported
    from ctmasknet.exporting import export as export
    from ctmasknet.predictor import Predictor as Predictor
    from ctmasknet.predictor import predict as predict
    from ctmasknet.registry import Variant as Variant
    from ctmasknet.registry import __version__ as __version__
    from ctmasknet.registry import get_variant as get_variant
    from ctmasknet.registry import list_models as list_models
    from ctmasknet.results import Prediction as Prediction
    from ctmasknet.results import VolumePrediction as VolumePrediction
    from ctmasknet.zoo import create_model as create_model
    from ctmasknet.zoo import from_pretrained as from_pretrained
    from ctmasknet.zoo import load_released as load_released
    from ctmasknet.zoo import open_model as open_model

_HOMES = {
    "ctmasknet.errors": (
        "CTMaskNetError",
        "ConfigError",
        "DataError",
        "InputError",
        "MissingExtraError",
        "WeightsError",
    ),
    "ctmasknet.registry": ("Variant", "__version__", "get_variant", "list_models"),
    "ctmasknet.zoo": ("create_model", "from_pretrained", "load_released", "open_model"),
    "ctmasknet.predictor": ("Predictor", "predict"),
    "ctmasknet.batch": ("FileResult", "RunSummary", "predict_files"),
    "ctmasknet.data.datasets": ("open_dataset",),
    "ctmasknet.results": ("Prediction", "VolumePrediction"),
    "ctmasknet.evaluation.evaluate": ("Evaluation", "evaluate"),
    "ctmasknet.exporting": ("Exported", "export"),
    "ctmasknet.engine": ("TrainConfig", "TrainResult", "train"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'ctmasknet' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
