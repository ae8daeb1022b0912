"""What can go wrong for a user, as exceptions that name the culprit and the fix, and the import of extras."""

from __future__ import annotations

import importlib
from types import ModuleType


class CTMaskNetError(Exception):
    """Base of every error this library raises on purpose; its text is one line meant for people."""


class InputError(CTMaskNetError, ValueError):
    """An image, array or file to predict on that cannot be used."""


class ConfigError(CTMaskNetError, ValueError):
    """An unknown variant, an unknown option, or an option with an impossible value."""


class WeightsError(CTMaskNetError):
    """Weights that are missing, damaged, unsafe, or belong to another variant."""


class DataError(CTMaskNetError, ValueError):
    """A data set that is incomplete or contradicts itself."""


class MissingExtraError(CTMaskNetError, ImportError):
    """A feature whose optional dependencies are not installed."""


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional `module`; where it is missing, say which extra brings it.

    Args:
        module: dotted import name, for example ``"pydicom"``.
        extra: the extra in pyproject.toml that installs it, for example ``"io"``.
        purpose: what needs it, as the subject of a sentence: ``"reading DICOM files"``.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name):
            raise
        raise MissingExtraError(
            f"{purpose} needs {module}, which is not installed: pip install 'ctmasknet[{extra}]'"
        ) from error
