"""What can go wrong for a user, as exceptions that name the culprit and the fix; the check of plain values' types; the
import of extras."""

from __future__ import annotations

import importlib
import reprlib
import sys
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


class CTMaskNetError(Exception):
    """Base of every error this library raises on purpose; its text is one line meant for people."""


Error = TypeVar("Error", bound=CTMaskNetError)


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


def typed(name: str, value: Any, kind: Any) -> Any:
    """A plain value as its type annotation has it: whole numbers serve as floats, tuples become lists, paths text.

    Args:
        name: of the field, for the error.
        kind: of `str`, `int`, `float`, `bool`, `None`, `Path`, `Literal`, `Any`, lists and tuples of one kind, mappings
            of text to one kind, and unions of these.

    Raises:
        ConfigError: something else, or a number that is not finite.
    """
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for option in options:
        origin, arguments = get_origin(option), get_args(option)
        if option is Any:
            return value
        if origin is Literal:
            if isinstance(value, str) and value in arguments:
                return value
        elif origin in (list, tuple):
            if isinstance(value, list | tuple):
                return [typed(name, item, arguments[0]) for item in value]
        elif origin is dict:
            if isinstance(value, dict):
                return {key: typed(f"{name}[{key!r}]", item, arguments[1]) for key, item in value.items()}
        elif option is float:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and abs(value) <= sys.float_info.max:  # a whole number may be too large for a float
                return float(value)
        elif option is Path:
            if isinstance(value, Path):
                return str(value)
        elif isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    raise ConfigError(f"{name}={shown(value)}: {' or '.join(dict.fromkeys(map(_called, options)))} is needed")


def shown(value: Any) -> str:
    """A value of any size as an error shows it: escaped, in one line, cut."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not print whole numbers of many digits
        return "a number of thousands of digits"


def _called(kind: Any) -> str:
    words = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}
    words |= {Path: "text", type(None): "null", list: "a list", tuple: "a list", dict: "a mapping"}
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return words[get_origin(kind) or kind]


def as_value(error: Error) -> Error:
    """An error that is to be kept: without its traceback, which would keep all that was being read with it."""
    return type(error)(str(error))


def reason_of(error: Exception) -> str:
    """The text of somebody else's exception on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, KeyError):
        text += " is missing"
    return " ".join(text.split())[:200] or type(error).__name__


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
            f"{purpose} needs {module}, which is not installed: pip install 'ctmasknet[{extra}]' "
            f"(in a checkout: '.[{extra}]')"
        ) from error
