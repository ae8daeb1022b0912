"""Is this installation sound? Checks that name the fix when it is not."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from ctmasknet.errors import CTMaskNetError
from ctmasknet.registry import __version__, get_variant
from ctmasknet.weights.manifest import default_entry, variants_with_weights

_FOR_DEVELOPERS = ("all", "dev", "docs", "notebook")  # sums of extras, and what users have no need of
_EXTRA_OF = re.compile(r"""^([\w.-]+)(?:\[(\w+)\])?.*\bextra\s*==\s*["'](\w+)["']""", re.MULTILINE)
_MISSING = "is not installed"


class Check(NamedTuple):
    """One finding: what was looked at, whether it works, and what was seen or how to mend it."""

    name: str
    ok: bool
    detail: str


def examine() -> list[Check]:
    """Every check, in the order a person would want them. Never raises for a broken installation."""
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    checks = [Check("ctmasknet", True, f"{__version__}, {machine}"), _torch()]
    if checks[-1].ok:
        checks += [_devices(), *map(_weights, variants_with_weights())]
    return [*checks, _cache(), *_extras()]


def _torch() -> Check:
    # A CUDA build of one with a CPU build of the other imports, or fails to, with an operator that does not exist.
    installed = ", ".join(f"{name} {_version(name)}" for name in ("torch", "torchvision", "timm"))
    try:
        import torch
        from torchvision.ops import nms

        nms(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([0.9]), 0.5)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        detail = (
            f"{installed}: do not work together ({reason}). Reinstall both from one place: "
            "pip install --force-reinstall torch torchvision"
        )
        return Check("torch and torchvision", False, detail)
    return Check("torch and torchvision", True, f"{installed} work together")


def _devices() -> Check:
    import torch

    names = [f"cpu ({torch.get_num_threads()} threads)"]
    names += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return Check("devices", True, ", ".join(names))


def _weights(variant: str) -> Check:
    from ctmasknet.weights.hub import load_stored
    from ctmasknet.weights.publish import verified

    entry, name = default_entry(get_variant(variant)), f"weights of {variant}"
    facts = f"{entry.tag}, {entry.bytes / 1e6:.1f} MB"
    if entry.path is None:  # nothing is downloaded to find out whether an installation is sound
        return Check(name, True, f"{facts}, on the Hub: {entry.place}")
    try:
        verified(load_stored("default", get_variant(variant)))
    except CTMaskNetError as error:
        return Check(name, False, str(error))
    return Check(name, True, f"{facts}, hash and golden outputs match")


def _cache() -> Check:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    ok = os.access(next((one for one in (folder, *folder.parents) if one.exists()), folder), os.W_OK)
    return Check("cache", ok, f"{folder}{'' if ok else ' cannot be written: set HF_HOME to a folder that can'}")


def _extras() -> list[Check]:
    """What each extra would add, by the package's own metadata."""
    try:
        requirements = "\n".join(requires("ctmasknet") or ())
    except PackageNotFoundError:  # a checkout that was never installed
        return []
    wanted: dict[str, list[str]] = {}
    for package, other, extra in _EXTRA_OF.findall(requirements):
        if extra not in _FOR_DEVELOPERS:
            wanted.setdefault(extra, []).extend(wanted[other] if package == "ctmasknet" else [package])
    checks = []
    for extra, packages in wanted.items():
        missing = [package for package in packages if _version(package) == _MISSING]
        detail = f"pip install 'ctmasknet[{extra}]' (in a checkout: '.[{extra}]') adds {', '.join(missing)}"
        checks.append(Check(f"extra {extra}", True, detail if missing else "installed"))
    return checks


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _MISSING
