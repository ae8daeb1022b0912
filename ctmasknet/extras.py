"""Optional dependencies, imported where they are used, with an error that names the extra."""

from __future__ import annotations

import importlib
from types import ModuleType

from ctmasknet.errors import MissingExtraError


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
