"""Speed as ratios, both sides measured in the same run, on the same data, device and start weights.

    python tools/benchmark.py train --variants maskrcnn_resnet18_t1 maskrcnn_resnet34_t1

`train`: images per second of `ctmasknet.train` (recipe "fast") against the plain torchvision loop, the released code's
way: float32, one image per step, a DataLoader that decodes with PIL, the paper's RoI sampling. Rounds alternate
between the two; the ratio is given for each round, so that a machine whose speed drifts still tells. --losses also
trains both sides alike (batch 1, no augmentation, same weights, same optimizer) and compares the mean loss of the
last quarter of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from ctmasknet import CTMaskNetError, TrainConfig, create_model, train
from ctmasknet.data import phantom
from ctmasknet.data.targets import instances
from ctmasknet.registry import get_variant

RATE, DECAY = 1e-4, 1e-3
"""Adam in the comparison of losses: the paper's weight decay, its learning rate times ten to see losses move."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="the training engine against the plain loop")
    training.add_argument(
        "--variants", nargs="+", default=["maskrcnn_resnet18_t1", "maskrcnn_resnet34_t1"], help="segmenters to measure"
    )
    training.add_argument("--data", type=Path, help="CNCB folder (default: phantoms made for the run)")
    training.add_argument("--images", type=int, default=24, help="slices per round and side (default: 24)")
    training.add_argument("--rounds", type=int, default=3, help="rounds of plain loop and engine (default: 3)")
    training.add_argument("--losses", type=int, default=0, metavar="STEPS", help="compare losses over STEPS steps")
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    training.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = options.data or write_phantoms(Path(folder) / "data", max(options.images, 16))
            report = {"machine": machine(options.device), "data": str(options.data or "phantoms"), "variants": {}}
            for name in options.variants:
                facts = measure(name, data, Path(folder), options)
                report["variants"][name] = facts
                print(f"{name}: {json.dumps(facts)}", flush=True)
    except CTMaskNetError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


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
        "plain_images_per_s": round(statistics.median(plain_speed), 3),
        "engine_images_per_s": round(statistics.median(our_speed), 3),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 2),
    }
    if options.losses:
        facts["losses"] = compare_losses(name, data, options.losses, options.device)
    return facts


def engine(name: str, data: Path, out: Path, options: argparse.Namespace) -> float:
    """Images per second of one epoch of the engine with its default recipe, decoding included."""
    result = train(
        TrainConfig(
            model=name,
            data=str(data),
            out=str(out),
            epochs=max(1, options.images // len(list((data / "imgs").iterdir()))),
            device=options.device,
            operating_point=False,
            tensorboard=False,
            progress=False,
        )
    )
    return statistics.median(row["images_per_s"] for row in result.history)


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
    """Mean loss over the last quarter of `steps` of the plain assembly and of our model, trained alike."""
    torch.manual_seed(0)
    ours = create_model(name).to(device)
    plain = plain_model(name).to(device)
    plain.load_state_dict(ours.state_dict())
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


def plain_model(name: str) -> MaskRCNN:
    """The variant as a torchvision user would assemble it; its state dict has the keys of ours."""
    variant = get_variant(name)
    body = getattr(torchvision.models, variant.backbone)()
    channels = [64, 128, 256, 512] if variant.backbone != "resnet50" else [256, 512, 1024, 2048]
    kept = range(variant.stages - variant.levels, variant.stages)
    names = [str(level) for level in range(variant.levels)]
    backbone = BackboneWithFPN(
        body,
        {f"layer{stage + 1}": names[i] for i, stage in enumerate(kept)},
        [channels[stage] for stage in kept],
        256,
    )
    backbone.fpn.extra_blocks = None  # BackboneWithFPN cannot be told to go without the extra max-pool level
    layers, hidden = ((256,) * 4, 256) if variant.backbone == "resnet50" else ((128,), 128)
    sizes, ratios = (2, 4, 8, 16, 32), (0.1, 0.25, 0.5, 1.0, 1.5, 2.0)
    model = MaskRCNN(
        backbone,
        min_size=512,
        max_size=1024,
        rpn_anchor_generator=AnchorGenerator((sizes,) * variant.levels, (ratios,) * variant.levels),
        rpn_pre_nms_top_n_train=1000,
        rpn_pre_nms_top_n_test=1000,
        rpn_post_nms_top_n_train=1000,
        rpn_post_nms_top_n_test=1000,
        rpn_nms_thresh=0.75,
        rpn_positive_fraction=0.75,
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
        box_head=TwoMLPHead(256 * 49, 128),
        box_predictor=FastRCNNPredictor(128, 2),
        box_score_thresh=0.75,
        box_nms_thresh=0.75,
        box_detections_per_img=128,
        box_fg_iou_thresh=0.75,
        box_bg_iou_thresh=0.5,
        box_batch_size_per_image=256,
        box_positive_fraction=0.75,
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2),
        mask_head=MaskRCNNHeads(256, layers, 1),
        mask_predictor=MaskRCNNPredictor(layers[-1], hidden, 2),
    )
    model.rpn.min_size = 0.0
    return model


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


if __name__ == "__main__":
    sys.exit(main())
