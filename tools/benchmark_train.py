"""Training speed: the engine against the plain torchvision loop."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_machine import synchronize, write_phantoms
from PIL import Image
from plain_torchvision import plain_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ctmasknet import TrainConfig, create_model, train
from ctmasknet.data.layouts import instances
from ctmasknet.engine.setup import speed_up

RATE, DECAY = 1e-4, 1e-3
"""Adam in the comparison of losses: the paper's weight decay, its learning rate times ten to see losses move."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of every variant asked for."""
    report: dict[str, Any] = {"data": str(options.data or "phantoms"), "variants": {}}
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or write_phantoms(Path(folder) / "data", max(options.images, 16))
        for name in options.variants:
            facts = measure(name, data, Path(folder), options)
            report["variants"][name] = facts
            print(f"{name}: {json.dumps(facts)}", flush=True)
    return report


def measure(name: str, data: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Images per second of both sides in alternating rounds, their ratios, and optionally both losses."""
    plain_speed, our_speed = [], []
    for number in range(options.rounds):
        start = create_model(name)
        model = plain_model(name).to(options.device)
        model.load_state_dict(start.state_dict())
        plain_speed.append(plain_loop(model, data, options.images, options.device)[0])
        our_speed.append(engine(name, data, folder / f"{name}-{number}", options))
    ratios = [ours / plain for ours, plain in zip(our_speed, plain_speed, strict=True)]
    facts: dict[str, Any] = {
        "plain_images_per_s": round(max(plain_speed), 3),
        "engine_images_per_s": round(max(our_speed), 3),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "ratio": round(max(our_speed) / max(plain_speed), 2),
    }
    if options.losses:
        facts["losses"] = compare_losses(name, data, options.losses, options.device)
    return facts


def engine(name: str, data: Path, out: Path, options: argparse.Namespace) -> float:
    """Images per second of the engine with its default recipe, after a first epoch that sets up what is set up once."""
    result = train(
        TrainConfig(
            model=name,
            data=str(data),
            out=str(out),
            epochs=1 + max(1, options.images // len(list((data / "imgs").iterdir()))),
            device=options.device,
            operating_point=False,
            tensorboard=False,
            progress=False,
        )
    )
    return statistics.median(row["images_per_s"] for row in result.history[1:])


class PilFolder(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Decode image and mask with PIL and find the instances, every time."""

    def __init__(self, root: Path, count: int) -> None:
        files = sorted((root / "imgs").iterdir())
        self.files = [files[i % len(files)] for i in range(count)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        file = self.files[index]
        image = np.asarray(Image.open(file).convert("RGB"))
        mask = np.asarray(Image.open(file.parents[1] / "masks" / f"{file.stem}.png"))
        return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255, instances(mask)


def plain_loop(model: nn.Module, data: Path, images: int, device: str) -> tuple[float, list[float]]:
    """The released code's loop: batch 1, float32, Adam. Images per second after the first step, and the losses."""
    loader = DataLoader(PilFolder(data, images + 1), batch_size=1, collate_fn=list)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, weight_decay=DECAY)
    model.train()
    started, losses = time.perf_counter(), []
    for step, ((image, target),) in enumerate(loader):
        if step == 1:  # the first step pays for what is set up once
            synchronize(device)
            started = time.perf_counter()
        loss = sum(model([image.to(device)], [{k: v.to(device) for k, v in target.items()}]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    synchronize(device)
    return images / (time.perf_counter() - started), losses


def compare_losses(name: str, data: Path, steps: int, device: str) -> dict[str, float]:
    """Mean loss over the last quarter of `steps` of the plain assembly and of our model as the engine sets it up."""
    torch.manual_seed(0)
    ours = create_model(name).to(device)
    plain = plain_model(name).to(device)
    plain.load_state_dict(ours.state_dict())
    speed_up(ours, TrainConfig(model=name, data=str(data), out=""), torch.device(device))
    means = []
    for model in (plain, ours):
        torch.manual_seed(1)
        losses = plain_loop(model, data, steps - 1, device)[1]
        means.append(statistics.mean(losses[-steps // 4 :]))
    return {
        "plain": round(means[0], 4),
        "ours": round(means[1], 4),
        "difference": round(abs(means[1] / means[0] - 1), 4),
    }
