"""ctmasknet: lightweight Mask R-CNN models that segment lesions in chest CT slices and classify COVID-19 from them.

Names are resolved when first used, so that importing the package or listing its variants needs no torch.
Research software, not a medical device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ctmasknet.registry import __version__

if TYPE_CHECKING:
    from ctmasknet.batch import FileResult, RunSummary, predict_files
    from ctmasknet.data.datasets import open_dataset
    from ctmasknet.engine import TrainConfig, TrainResult, train
    from ctmasknet.errors import ConfigError, CTMaskNetError, DataError, InputError, MissingExtraError, WeightsError
    from ctmasknet.evaluation.evaluate import Evaluation, evaluate
    from ctmasknet.exporting import Exported, export
    from ctmasknet.predictor import Predictor, predict
    from ctmasknet.registry import Variant, get_variant, list_models
    from ctmasknet.results import Prediction, VolumePrediction
    from ctmasknet.zoo import create_model, from_pretrained, load_released, open_model

_HOMES = {
    "ctmasknet.errors": (
        "CTMaskNetError",
        "ConfigError",
        "DataError",
        "InputError",
        "MissingExtraError",
        "WeightsError",
    ),
    "ctmasknet.registry": ("Variant", "get_variant", "list_models"),
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

__all__ = [
    "CTMaskNetError",
    "ConfigError",
    "DataError",
    "Evaluation",
    "Exported",
    "FileResult",
    "InputError",
    "MissingExtraError",
    "Prediction",
    "Predictor",
    "RunSummary",
    "TrainConfig",
    "TrainResult",
    "Variant",
    "VolumePrediction",
    "WeightsError",
    "__version__",
    "create_model",
    "evaluate",
    "export",
    "from_pretrained",
    "get_variant",
    "list_models",
    "load_released",
    "open_dataset",
    "open_model",
    "predict",
    "predict_files",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'ctmasknet' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
