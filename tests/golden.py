"""Recorded outputs of the paper's released code, with the deterministic weights and input that belong to them.

`data/*.npz` were recorded by running the released code (evaluation mode, CPU, float32) with `weights(name)` on
`image()`; `data/state_dict_keys.json` holds the keys and shapes of its checkpoints (torchvision 0.3 names).
"""

from __future__ import annotations

import json
import sys
import types
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATA = Path(__file__).parent / "data"
VARIANTS = sorted(path.stem for path in DATA.glob("*_resnet*.npz"))
GAINS = {"cls_logits": 2.0, "bbox_pred": 0.7, "cls_score": 3.0, "mask_fcn_logits": 3.0}
SIZES = (2, 4, 8, 16, 32)
RATIOS = (0.1, 0.25, 0.5, 1, 1.5, 2)


def outputs(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as stored:
        return dict(stored)


def shapes(name: str) -> dict[str, list[int]]:
    return json.loads((DATA / "state_dict_keys.json").read_text())[name]


def weights(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """One tensor per key, from a generator seeded by the key's own name."""
    return {key: torch.from_numpy(_values(key, shape, seed)) for key, shape in shapes(name).items()}


def _values(key: str, shape: list[int], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
    *_, parent, leaf = key.split(".")
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "running_var":
        return rng.uniform(0.7, 1.4, shape).astype(np.float32)
    if leaf == "running_mean":
        return rng.normal(0, 0.1, shape).astype(np.float32)
    if leaf == "bias":
        return rng.normal(0, 0.05, shape).astype(np.float32)
    if len(shape) == 1:
        return rng.uniform(0.2, 0.7, shape).astype(np.float32)
    fan_in = shape[0] if "conv5_mask" in key else int(np.prod(shape[1:]))
    return rng.normal(0, np.sqrt(GAINS.get(parent, 2.0) / fan_in), shape).astype(np.float32)


def image(seed: int = 0, size: int = 512) -> torch.Tensor:
    """(3, size, size) float32 in 0..1: a body, two lungs, blobs, noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    value = np.where((x / 0.46) ** 2 + (y / 0.36) ** 2 < 1, 150.0, 0.0)
    for side in (-1, 1):
        lung = ((x - side * 0.2) / 0.15) ** 2 + (y / 0.25) ** 2 < 1
        value = np.where(lung, 30.0, value)
        for _ in range(4):
            cx, cy = side * 0.2 + rng.uniform(-0.08, 0.08), rng.uniform(-0.15, 0.15)
            r = rng.uniform(0.02, 0.07)
            blob = np.exp(-(((x - cx) / r) ** 2 + ((y - cy) / r) ** 2))
            value = np.where(lung, value + rng.uniform(30, 110) * blob, value)
    value = np.clip(value + rng.normal(0, 6, value.shape), 0, 255).round().astype(np.uint8)
    return torch.from_numpy(value).float().div(255).expand(3, -1, -1)


def anchor_generator(
    module: str = "models.mask_net.rpn_segmentation", sizes: Any = (SIZES,) * 5, ratios: Any = (RATIOS,) * 5
) -> torch.nn.Module:
    """An object as the author's files pickle it: a module of a class that only the author's code has."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    kind = type("AnchorGenerator", (torch.nn.Module,), {"__module__": module})
    sys.modules[module].AnchorGenerator = kind  # type: ignore[attr-defined]
    generator = kind()
    generator.sizes, generator.aspect_ratios = sizes, ratios
    generator.cell_anchors, generator._cache = None, {}
    return generator


def save_released(path: Path, content: dict[str, Any], *, legacy: bool = True) -> Path:
    """Write as the author did: pre-1.6 serialization, where torch can still read it only with full trust."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Couldn't retrieve source code")
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    for module in [name for name in sys.modules if name == "models" or name.startswith("models.")]:
        del sys.modules[module]
    return path


def checkpoint(path: Path, name: str, *, seed: int = 0, legacy: bool = True, **extra: Any) -> Path:
    """A released checkpoint of `name` with the golden weights."""
    content = {
        "epoch": 7,
        "model_weights": weights(name, seed),
        "model_name": name,
        "optimizer_state": {},
        "lrate": 1e-5,
    } | extra
    if "anchor_generator" not in content:
        content["anchor_generator"] = anchor_generator()
    return save_released(path, content, legacy=legacy)
