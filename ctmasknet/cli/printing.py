"""What every command prints alike."""

from __future__ import annotations

import json
from typing import Any


def print_json(facts: Any) -> None:
    """Print facts as JSON; NaN is refused, which JSON does not know."""
    print(json.dumps(facts, indent=2, allow_nan=False))
