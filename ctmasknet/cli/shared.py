"""What the commands share: flags become arguments, and text is printed alike."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable
from typing import Any

_LONGEST_LINE = 600


def arguments_of(function: Callable[..., Any], options: argparse.Namespace) -> dict[str, Any]:
    """What the flags say about the function's arguments, which have their names; None stands for a flag not given."""
    given = {name: getattr(options, name, None) for name in inspect.signature(function).parameters}
    return {name: value for name, value in given.items() if value is not None}


def say(options: argparse.Namespace, facts: Any, *texts: object) -> None:
    """Print `facts` as JSON if asked to (NaN is refused, which JSON does not know), else `texts`, line by line."""
    if options.json:
        print(json.dumps(facts, indent=2, allow_nan=False))
        return
    for line in "\n".join(map(str, texts)).split("\n"):
        print(printable(line))


def printable(text: str) -> str:
    """One line for a terminal: control characters and what is no Unicode, as file names may hold, are escaped, and
    the middle is left out where it is long: names stand at the beginning, what to do at the end."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    half = _LONGEST_LINE // 2
    return text if len(text) <= _LONGEST_LINE else f"{text[:half]} ... {text[-half:]}"


def as_flags(text: str, options: argparse.Namespace) -> str:
    """A text of the library with its arguments as this command spells them: ``units="hu"`` reads ``--units hu``."""

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], re.sub("[\"'(),]", "", match[2])
        if name not in vars(options):
            return match[0]
        spelled = f"--{name.replace('_', '-')}"
        return spelled if value == "True" else f"{spelled} {value}"

    return re.sub(r"""(?<![\w/.=-])([a-z_]+)=("[^"]*"|'[^']*'|\([^()]*\)|[-+\w.]+)""", flag, text)
