"""What every benchmark needs: the machine in words, data to run on, a clock that waits for the device."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from phantom import phantom
from PIL import Image


def write_phantoms(root: Path, count: int) -> Path:
    """`count` phantoms as a CNCB folder."""
    for kind in ("imgs", "masks"):
        (root / kind).mkdir(parents=True)
    for seed in range(count):
        made = phantom(seed)
        Image.fromarray(made.image).save(root / "imgs" / f"{seed}.png")
        Image.fromarray(made.class_mask()).save(root / "masks" / f"{seed}.png")
    return root


def machine(device: str) -> dict[str, Any]:
    """What was measured on."""
    return {
        "processor": next(_processor(), platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def _processor() -> Iterator[str]:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                yield line.partition(":")[2].strip()


def synchronize(device: str) -> None:
    """Wait for the device, so that a clock read next is true."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_mb() -> float:
    """Most memory this process has held so far, MB; Linux's own count, as getrusage's is inherited from the parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM")
