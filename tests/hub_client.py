"""Processes in which the real `huggingface_hub` client is set up by its environment variables, as a user's shell does.

The client reads them once, when imported, so no test in this process can change them.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any


def hub_environment(url: str, home: Path, **more: str) -> dict[str, str]:
    """Variables that send the client to a test server and keep everything it stores in `home`."""
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # the test server speaks LFS only
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }


class Client:
    """Calls functions in other processes; what they raise is raised here."""

    def __init__(self, url: str, home: Path, *, processes: int = 1, **more: str) -> None:
        self.home = home
        self._pool = ProcessPoolExecutor(
            processes,
            mp_context=_context(),
            initializer=_enter,
            initargs=(hub_environment(url, home, **more),),
        )

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return self.submit(function, *arguments, **options).result(timeout=120)

    def submit(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Future[Any]:
        return self._pool.submit(function, *arguments, **options)

    def wipe(self) -> None:
        """Empty the cache."""
        shutil.rmtree(self.home / "hub", ignore_errors=True)

    def cached(self, name: str) -> list[Path]:
        """Files of that name that the cache would serve."""
        return [path for path in self.home.rglob(name) if path.exists()]

    def close(self) -> None:
        self._pool.shutdown()


def _context() -> Any:
    """New processes that have imported torch, where the system can fork, but never the client."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision"])
    return context


def _enter(environment: dict[str, str]) -> None:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN"):
        os.environ.pop(name, None)
    os.environ.update(environment)
