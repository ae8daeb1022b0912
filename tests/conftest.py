"""Settings of every test."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def exact_predictions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Predictor` stays in float32: tests compare numbers, and which processors compute in bfloat16 differs."""
    if "own_precision" not in request.keywords:
        monkeypatch.setattr("ctmasknet.predictor.computes_bfloat16", lambda device: False)
