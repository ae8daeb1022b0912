"""What can go wrong for a user, as exceptions that name the culprit and the fix."""

from __future__ import annotations


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
