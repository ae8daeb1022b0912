"""Settings of every test."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests use the tools of the checkout, tools/phantom.py above all.
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

# Several workers share the cores; set before torch is imported, for the processes that tests start too.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))


@pytest.fixture(autouse=True)
def _process_settings_of_the_command_line() -> Iterator[None]:
    """The command line sets log levels for its process; here it shares one with tests."""
    package, pydicom = logging.getLogger("ctmasknet"), logging.getLogger("pydicom")
    level, disabled = package.level, pydicom.disabled
    yield
    package.setLevel(level)
    pydicom.disabled = disabled
