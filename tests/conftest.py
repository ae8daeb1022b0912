"""Settings of every test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Tests use the tools of the checkout, tools/phantom.py above all.
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

# Several workers share the cores; set before torch is imported, for the processes that tests start too.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
