"""Random changes of a training slice that keep its instances consistent.

Geometry and pixel operations are torchvision's (`transforms.v2.functional`); here is only what a detector's
target needs on top: masks move with the image by nearest neighbour, boxes are taken anew from the moved
masks, and instances that left the image are dropped. Every random number comes from the generator that is
passed, so that a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from ctmasknet.data.layouts import half_open_boxes
from ctmasknet.errors import ConfigError


@dataclass(frozen=True)
class Augmentation:
    """How much a slice may change. Amounts are drawn evenly from the ranges; 0 switches an operation off.

    Attributes:
        flip: probability of a left-right flip, 0..1.
        rotate: largest rotation about the centre, degrees, either way.
        translate: largest shift as a fraction of width and of height, either way.
        scale: smallest and largest magnification about the centre, drawn evenly in its logarithm.
        shear: largest shear along x, degrees, either way.
        brightness: largest relative change of brightness, 0..1.
        contrast: largest relative change of contrast, 0..1.
        gamma: largest change of the logarithm of gamma; 0.2 draws gamma from 0.82..1.22.
        noise: largest standard deviation of additive Gaussian noise, in grey values of 0..1.
        min_visible: instances of fewer pixels after the change are dropped.
    """

    flip: float = 0.5
    rotate: float = 10.0
    translate: float = 0.05
    scale: tuple[float, float] = (0.8, 1.25)
    shear: float = 3.0
    brightness: float = 0.1
    contrast: float = 0.2
    gamma: float = 0.2
    noise: float = 0.02
    min_visible: int = 20

    def __post_init__(self) -> None:
        most = dict.fromkeys(("flip", "translate", "brightness", "contrast"), 1.0) | {"shear": 89.0}
        for name in (*most, "rotate", "gamma", "noise", "min_visible"):
            value, limit = getattr(self, name), most.get(name, math.inf)
            if not 0 <= value <= limit:
                raise ConfigError(f"augmentation {name}={value}: use a value from 0 to {limit:g}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"augmentation scale={self.scale}: use (smallest, largest), both above 0")


def augment(
    image: Tensor,
    target: dict[str, Any],
    generator: torch.Generator,
    settings: Augmentation = Augmentation(),
) -> tuple[Tensor, dict[str, Any]]:
    """Change one slice at random; its inputs are left as they are.

    Args:
        image: (C, H, W), uint8 or floating point in 0..1, on any device.
        target: ``boxes`` (N, 4), ``labels`` (N,), ``masks`` (N, H, W) as `layouts.instances` gives them, on
            the device of the image; other entries are passed on. Without ``masks`` the image alone changes.
        generator: the only source of randomness, on the CPU (`sample_generator` makes one per sample). It
            advances by the same number of draws whatever the settings are.

    Returns:
        The image with its dtype and size, and the target: boxes half-open round the moved masks, instances
        with no or under `min_visible` pixels left out. What nothing moved into is 0, as air is.
    """
    draws = torch.rand(10, generator=generator, dtype=torch.float64).tolist()
    noise_seed = int(torch.randint(2**62, (), generator=generator))
    flipped = draws[0] < settings.flip
    matrix = _affine_arguments(draws[1:6], image.shape[-1], image.shape[-2], settings)

    moved = transforms.horizontal_flip(image) if flipped else image
    # Pixel operations in floating point: rounding to uint8 between them would add up.
    pixels = transforms.to_dtype(moved, torch.float32, scale=True) if not image.is_floating_point() else moved
    if matrix is not None:
        pixels = transforms.affine(pixels, interpolation=InterpolationMode.BILINEAR, **matrix)
    pixels = _change_intensity(pixels, draws[6:10], noise_seed, settings)
    if not image.is_floating_point():
        pixels = (pixels * 255).round().to(image.dtype)

    if "masks" not in target:
        return pixels, target
    masks = target["masks"].flip(-1) if flipped else target["masks"]
    if matrix is not None:
        masks = _move_masks(masks, matrix)
    kept = (masks != 0).flatten(1).sum(dim=1) >= max(settings.min_visible, 1)
    masks = masks[kept]
    return pixels, {**target, "boxes": half_open_boxes(masks), "labels": target["labels"][kept], "masks": masks}


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """A generator per sample: what it draws depends on no other sample, worker process or interruption."""
    return torch.Generator().manual_seed(seed_of(seed, epoch, index))


def seed_of(*numbers: int) -> int:
    """One seed of several numbers, all of which matter."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _affine_arguments(draws: list[float], width: int, height: int, settings: Augmentation) -> dict[str, object] | None:
    """Arguments of torchvision's affine for five draws in 0..1, or None where it would change nothing."""
    angle, right, down, shear = (2 * draw - 1 for draw in draws[:4])
    smallest, largest = settings.scale
    arguments = {
        "angle": angle * settings.rotate,
        "translate": [right * settings.translate * width, down * settings.translate * height],
        "scale": smallest * (largest / smallest) ** draws[4],
        "shear": [shear * settings.shear, 0.0],
    }
    identity = {"angle": 0.0, "translate": [0.0, 0.0], "scale": 1.0, "shear": [0.0, 0.0]}
    return None if arguments == identity else arguments


def _change_intensity(pixels: Tensor, draws: list[float], noise_seed: int, settings: Augmentation) -> Tensor:
    """Gamma, contrast, brightness and noise on an image in 0..1; clipped to 0..1."""
    gamma, contrast, brightness = (2 * draw - 1 for draw in draws[:3])
    if settings.gamma:
        pixels = transforms.adjust_gamma(pixels, float(np.exp(gamma * settings.gamma)))
    if settings.contrast:
        pixels = transforms.adjust_contrast(pixels, 1 + contrast * settings.contrast)
    if settings.brightness:
        pixels = transforms.adjust_brightness(pixels, 1 + brightness * settings.brightness)
    if settings.noise:
        own = torch.Generator(pixels.device).manual_seed(noise_seed)
        # One plane of noise for all channels: a grey image stays grey.
        plane = torch.randn(pixels.shape[-2:], generator=own, device=pixels.device, dtype=pixels.dtype)
        pixels = (pixels + plane * (draws[3] * settings.noise)).clamp(0, 1)
    return pixels


def _move_masks(masks: Tensor, matrix: dict[str, object]) -> Tensor:
    """Masks (N, H, W) under the affine map, by nearest neighbour."""
    count = masks.shape[0]
    if count > 1 and int((masks != 0).sum(dim=0).max()) <= 1:
        # Instances of a class mask do not overlap: one map of their numbers moves at the price of one mask.
        numbers = torch.arange(1, count + 1, device=masks.device, dtype=torch.float32)
        numbered = ((masks != 0) * numbers[:, None, None]).sum(dim=0, keepdim=True)
        moved = transforms.affine(tv_tensors.Mask(numbered), **matrix).as_subclass(Tensor)
        return (moved == numbers[:, None, None]).to(masks.dtype)
    return transforms.affine(tv_tensors.Mask(masks), **matrix).as_subclass(Tensor)
