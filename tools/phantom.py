"""A synthetic axial chest CT slice with ground-glass and consolidation lesions and their exact masks.

`phantom` stands in for patient data in demonstrations, documentation and tests. No part of it is taken from a
patient's picture; only its grey levels were set by the statistics of clinical slices. Anatomy is drawn in
millimetres, in Hounsfield units (HU), as signed distances (negative inside), so that a seed shows the same body
at every size.

The lesions follow the usual description of COVID-19 on CT: multifocal, mostly peripheral and posterior; ground
glass is hazy and lets the vessels through, consolidation hides them.

    python tools/phantom.py --out data --slices 8                            imgs/ and masks/, to train on
    python tools/phantom.py --out classes --slices 2 --layout classes        one folder per class and patient
    python tools/phantom.py --out . --layout scan --slices 4 --size 256      scan.nii.gz and series/ (extra io)
    python tools/phantom.py --example                                        the example slice of the package
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ctmasknet.data.layouts import CONSOLIDATION, GGO
from ctmasknet.data.slices import window
from ctmasknet.errors import ConfigError, CTMaskNetError, import_extra
from ctmasknet.example import SLICE
from ctmasknet.registry import IMAGE_CLASSES

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

FIELD_OF_VIEW = 380.0  # mm across the square image
MAX_LESIONS = 8
MIN_SIZE = 128
MIN_LESION_AREA = 240.0  # mm²; 435 px at size 512, still more than 100 px at 256
STREAM = 7  # which set of slices the seeds stand for; in this one seed 0 makes a clear picture
LESION_GAP = 4.0  # mm kept free between two lesions, and never less than 2 px

# Typical attenuation in HU.
AIR, FAT, MUSCLE, BLOOD, SKIN = -1024.0, -95.0, 50.0, 42.0, 10.0
CORTEX, MARROW, CORD = 650.0, 105.0, 30.0
PARENCHYMA, GROUND_GLASS, CONSOLIDATED = -855.0, -530.0, 10.0


@dataclass(frozen=True)
class Phantom:
    """One synthetic slice and the truth about it.

    Attributes:
        hu: (H, W) int16, Hounsfield units.
        lungs: (H, W) bool, both lung fields, vessels and lesions included.
        masks: (N, H, W) bool, one lesion each; each is one 8-connected component and touches no other.
        labels: (N,) int64, 1 ground-glass opacity, 2 consolidation; one less than the code in a class mask.
    """

    hu: NDArray[np.int16]
    lungs: Bools
    masks: Bools
    labels: NDArray[np.int64]

    @property
    def image(self) -> NDArray[np.uint8]:
        """The slice in the lung window [-1350, 150] HU, (H, W) uint8."""
        return np.rint(255 * window(self.hu)).astype(np.uint8)

    @property
    def boxes(self) -> Floats:
        """(N, 4) float32 xyxy in pixels, half-open: the last row and column of a lesion are y2 - 1 and x2 - 1."""
        boxes = np.zeros((len(self.masks), 4), np.float32)
        for box, mask in zip(boxes, self.masks, strict=True):
            columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return boxes

    def class_mask(self) -> NDArray[np.uint8]:
        """(H, W) uint8 in the CNCB coding: 0 background, 1 lung, 2 ground-glass opacity, 3 consolidation."""
        coded = self.lungs.astype(np.uint8)
        for mask, label in zip(self.masks, self.labels, strict=True):
            coded[mask] = label + 1
        return coded


def phantom(seed: int = 0, *, lesions: int = 4, size: int = 512) -> Phantom:
    """Draw the synthetic chest slice of a seed.

    Seed and size fix every pixel (another numpy version may round a few of them to the next HU). The same seed with
    another number of lesions shows the same body. From two lesions on, both classes occur; about one lesion in
    three is a consolidation.

    Args:
        seed: which slice, >= 0.
        lesions: how many, 0 (a healthy slice) to 8.
        size: height and width in pixels, >= 128. From 256 on, each lesion has more than 100 pixels.

    Returns:
        The slice in HU with its lung field, lesion masks and labels.

    Raises:
        ConfigError: an argument outside these ranges or not an integer.
    """
    _check("seed", seed, 0, None)
    _check("lesions", lesions, 0, MAX_LESIONS)
    _check("size", size, MIN_SIZE, None)
    # One stream each, so that a change in one part leaves the others as they are.
    anatomy, vascular, disease, scanner = (np.random.default_rng([int(seed), part, STREAM]) for part in range(4))
    grid = _Grid.of(int(size))

    chest = _Chest.draw(anatomy, grid)
    tree = _pulmonary_tree(vascular, grid, chest)
    found = _place_lesions(disease, grid, chest, int(lesions))
    parenchyma = _parenchyma(anatomy, grid, chest)
    for lesion in found:
        parenchyma += lesion.weight * (lesion.hu - parenchyma)
    lung = tree.paint(grid, parenchyma)

    hu = chest.hu + _cover(-chest.depth, grid) * (lung - chest.hu)
    masks = np.stack([lesion.mask for lesion in found]) if found else np.zeros((0, *hu.shape), bool)
    labels = np.array([lesion.code - 1 for lesion in found], np.int64)
    return Phantom(_scan(scanner, grid, hu), chest.depth > 0, masks, labels)


@dataclass(frozen=True)
class PhantomScan:
    """A synthetic scan of simple shapes and the truth about it: rows run to the back, columns to the patient's left.

    Attributes:
        hu: (S, H, W) int16, from the feet up.
        lungs: (S, H, W) uint8, 1 right and 2 left lung, vessels and lesions included, windpipe not.
        lesions: (S, H, W) uint8, the number of a lesion, from 1 in the order given; a white lung comes last.
        spacing: mm between slices, rows, columns.
    """

    hu: NDArray[np.int16]
    lungs: NDArray[np.uint8]
    lesions: NDArray[np.uint8]
    spacing: tuple[float, float, float]


LUNG_CENTRES, LUNG_AXES = (-72.0, 72.0), (62.0, 84.0, 110.0)  # mm; across, from front to back, along the body
WINDPIPE = 9.0  # mm, radius


def phantom_scan(
    lesions: Sequence[tuple[float, float, float, float]] = (),
    *,
    slices: int = 48,
    thickness: float = 5.0,
    size: int = 256,
    white: int = 0,
    missing: int = 0,
    seed: int = 0,
) -> PhantomScan:
    """A chest on a table, arms at its sides: lungs are ellipsoids, lesions consolidated balls in them or elsewhere.

    Args:
        lesions: x (to the patient's left), y (to the back) and z (to the head) of the middle, and radius, in mm, the
            origin in the middle of the scan.
        slices, thickness: how many, and mm from one to the next.
        size: height and width in pixels of 380 mm.
        white, missing: 1 the right, 2 the left lung is wholly consolidated, or is not there.
        seed: of the noise.
    """
    rng, grid = np.random.default_rng(seed), _Grid.of(size)
    heights = (np.arange(slices) - (slices - 1) / 2) * thickness
    hu = np.empty((slices, size, size), np.int16)
    lungs, found = np.zeros(hu.shape, np.uint8), np.zeros(hu.shape, np.uint8)
    tissue = np.full_like(grid.x, AIR)
    _paint_table(tissue, grid, 122.0)
    for side in (-1, 1):
        _paint(tissue, _superellipse(grid.x - np.float32(side * 186), grid.y, 14, 40), MUSCLE, grid)
    body = _superellipse(grid.x, grid.y, 168, 121, 2.4)
    _paint(tissue, body, FAT, grid)
    _paint(tissue, body + 9, MUSCLE, grid)
    _paint(tissue, _superellipse(grid.x, grid.y - 76, 20, 18), CORTEX, grid)
    for place, z in enumerate(heights):
        plane = tissue.copy()
        _paint(plane, np.hypot(grid.x, grid.y + 2) - WINDPIPE, -1000.0, grid)
        level = np.float32(max(1 - (z / LUNG_AXES[2]) ** 2, 0)) ** np.float32(0.5)
        for number, x in enumerate(LUNG_CENTRES, start=1):
            if level == 0 or number == missing:
                continue
            lung = _superellipse(grid.x - np.float32(x), grid.y, LUNG_AXES[0] * level, LUNG_AXES[1] * level)
            _paint(plane, lung, CONSOLIDATED if number == white else PARENCHYMA, grid)
            lungs[place][lung < 0] = number
            if number == white:
                found[place][lung < 0] = len(lesions) + 1
            for vessel in (-30, -10, 15, 40):
                _paint(
                    plane, np.maximum(np.hypot(grid.x - np.float32(0.9 * x), grid.y - vessel) - 3, lung), BLOOD, grid
                )
        for number, (x, y, height, radius) in enumerate(lesions, start=1):
            across = radius**2 - (z - height) ** 2
            if across > 0:
                ball = np.hypot(grid.x - np.float32(x), grid.y - np.float32(y)) - np.float32(across**0.5)
                _paint(plane, ball, CONSOLIDATED, grid)
                found[place][ball < 0] = number
        hu[place] = _scan(rng, grid, plane)
    return PhantomScan(hu, lungs, found, (thickness, grid.pixel, grid.pixel))


# --------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class _Grid:
    """Pixel centres in mm from the middle of the slice: x to the patient's left, y towards the back."""

    size: int
    pixel: float
    x: Floats
    y: Floats

    @classmethod
    def of(cls, size: int) -> _Grid:
        pixel = FIELD_OF_VIEW / size
        axis = ((np.arange(size) + 0.5) * pixel - FIELD_OF_VIEW / 2).astype(np.float32)
        y, x = np.meshgrid(axis, axis, indexing="ij")
        return cls(size, pixel, x, y)

    def index(self, mm: NDArray[np.floating]) -> NDArray[np.intp]:
        """The pixel that holds a coordinate, clipped to the image."""
        return np.clip((mm + FIELD_OF_VIEW / 2) / self.pixel, 0, self.size - 1).astype(np.intp)

    def field(self, rng: np.random.Generator, length: float) -> Floats:
        """Smooth noise, mean 0, variance about 1, Gaussian correlation of `length` mm, the same at every size."""
        cells = 128
        spectrum = np.fft.fft2(rng.standard_normal((cells, cells)))
        frequency = np.fft.fftfreq(cells, FIELD_OF_VIEW / cells)
        decay = np.exp(-((np.pi * length * frequency) ** 2) / 2)
        spectrum *= decay[:, None] * decay
        spectrum /= np.sqrt((decay**2).sum() ** 2 / cells**2)
        # Fourier interpolation: the spectrum in the middle of a larger or smaller one.
        keep = min(cells, self.size) // 2
        padded = np.zeros((self.size, self.size // 2 + 1), complex)
        padded[:keep, :keep] = spectrum[:keep, :keep]
        padded[-keep:, :keep] = spectrum[-keep:, :keep]
        smooth = np.fft.irfft2(padded, (self.size, self.size)) * (self.size / cells) ** 2
        return smooth.astype(np.float32)


def _superellipse(x: Floats, y: Floats, a: float, b: float, power: float = 2.0, tilt: float = 0.0) -> Floats:
    """Signed distance along the ray from the centre, mm; semi-axes a, b in mm, tilt in radians."""
    cos, sin = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    u, v = np.abs(cos * x + sin * y) / np.float32(a), np.abs(cos * y - sin * x) / np.float32(b)
    level = (u**power + v**power) ** np.float32(1 / power) + np.float32(1e-6)
    return np.hypot(x, y) * (1 - 1 / level)


def _capsule(x: Floats, y: Floats, start: tuple[float, float], end: tuple[float, float], radius: float) -> Floats:
    """Signed distance to a segment thickened by a radius, mm."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
    return np.hypot(x - start[0] - along * dx, y - start[1] - along * dy) - np.float32(radius)


def _union(a: Floats, b: Floats, rounding: float) -> Floats:
    """Union of two shapes with their junction rounded over about `rounding` mm."""
    blend = np.maximum(rounding - np.abs(a - b), 0) / np.float32(rounding)
    return np.minimum(a, b) - blend * blend * np.float32(rounding / 4)


def _cover(distance: Floats, grid: _Grid) -> Floats:
    """How much of each pixel a shape covers, 0 to 1."""
    return np.clip(0.5 - distance / np.float32(grid.pixel), 0, 1)


def _paint(hu: Floats, distance: Floats, value: Floats | float, grid: _Grid) -> None:
    cover = _cover(distance, grid)
    hu += cover * (value - hu)


# ---------------------------------------------------------------------------------------- anatomy


@dataclass(frozen=True)
class _Chest:
    """The slice around the lungs; the distance from the pleura (`depth`) and from the ribs' side of it (`costal`)
    in mm, positive inside a lung."""

    hu: Floats
    depth: Floats
    costal: Floats

    @classmethod
    def draw(cls, rng: np.random.Generator, grid: _Grid) -> _Chest:
        # A slow random displacement of the whole plane makes every outline a little irregular.
        x = grid.x + 2.6 * grid.field(rng, 45)
        y = grid.y + 2.2 * grid.field(rng, 45)
        fine = grid.field(rng, 9)
        x, y = x / np.float32(rng.uniform(0.95, 1.03)), y / np.float32(rng.uniform(0.95, 1.02))

        # Body wall: skin, fat, then muscle with streaks of fat between its layers.
        body = _superellipse(x, y, 170, 121, 2.4)
        fat = rng.uniform(9, 16)
        wall = _superellipse(x, y - 2, 170 - fat, 120 - fat, 2.45) + 1.5 * fine
        hu = np.full_like(x, AIR)
        _paint_table(hu, grid, float(grid.y[body < 0].max()))
        _paint(hu, body, SKIN, grid)
        _paint(hu, body + 2.0, FAT + 8 * fine, grid)
        streak = np.exp(-((grid.field(rng, 10) / np.float32(0.13)) ** 2))
        _paint(hu, wall, MUSCLE + 0.75 * (FAT - MUSCLE) * streak + 5 * fine, grid)

        # Lungs: the two halves of the chest less the mediastinum and the spine between them.
        halves = [_superellipse(x - np.float32(side * 67), y + 10, 67, 91, 2.25, -0.10 * side) for side in (-1, 1)]
        size = rng.uniform(0.85, 1.0)
        heart = _superellipse(x - 23, y + 44, 60 * size, 45 * size, 2.1, 0.38)
        centre = _capsule(x, y, (0, -30), (3, 34), 20)
        front = _capsule(x, y, (4, -100), (6, -55), rng.uniform(9, 20))
        aorta = _capsule(x, y, (21, 23), (21, 24), rng.uniform(11, 13.5))
        spine = _superellipse(x, y - 66, 26, 46, 2.4)
        soft = _union(_union(_union(heart, centre, 22), front, 18), aorta - 2.5, 10) + 0.8 * fine
        costal = -np.minimum(halves[0], halves[1])
        depth = _union(costal, _union(soft, spine, 14), 9)

        # Mediastinum: fat round heart, aorta, oesophagus and the great vessels at the hila.
        cage = _union(halves[0], halves[1], 25)
        _paint(hu, np.maximum(soft, cage), FAT + 10 + 8 * fine, grid)
        _paint(hu, np.maximum(heart + 3 + 1.2 * fine, cage), BLOOD + 4 * fine, grid)
        _paint(hu, _union(centre + 5, _capsule(x, y, (-14, -6), (16, -2), 11), 8), BLOOD + 4 * fine, grid)
        _paint(hu, aorta, BLOOD, grid)
        _paint(hu, _capsule(x, y, (6, 19), (9, 19), 5), 35.0, grid)
        _paint(hu, _capsule(x, y, (7, 19), (8.5, 19), 1.2), -700.0, grid)
        for place, radius in (((-22, 2), 5.0), ((24, 4), 4.6)):  # lower-lobe bronchi
            _paint(hu, _capsule(x, y, place, (place[0] + 2, place[1] + 3), radius), 20.0, grid)
            _paint(hu, _capsule(x, y, place, (place[0] + 2, place[1] + 3), radius - 1.2), -985.0, grid)

        cls._skeleton(rng, grid, hu, x, y, cage)
        return cls(hu, depth, costal)

    @staticmethod
    def _skeleton(rng: np.random.Generator, grid: _Grid, hu: Floats, x: Floats, y: Floats, cage: Floats) -> None:
        """Vertebra with its canal, ribs cut obliquely, breastbone and the tips of the shoulder blades."""
        trabeculae = MARROW + 45 * grid.field(rng, 4)

        def bone(distance: Floats, shell: float) -> None:
            _paint(hu, distance, CORTEX, grid)
            _paint(hu, distance + shell, trabeculae, grid)

        for side in (-1, 1):
            bone(_capsule(x, y, (side * 9, 66), (side * 30, 75), 4.5), 1.4)  # transverse processes
            bone(_capsule(x, y, (side * 8, 77), (0, 84), 3.5), 1.3)  # laminae
        bone(_capsule(x, y, (0, 82), (1, 102), 3.4), 1.2)  # spinous process
        bone(_superellipse(x, y - 45, 19, 17, 2.6), 1.3)
        bone(_superellipse(x, y - 69, 15, 13, 2.0), 1.5)
        _paint(hu, _superellipse(x, y - 69, 10, 8.5, 2.0), CORD, grid)

        angle, radius = np.arctan2(y + 11, x), np.hypot(x, y + 11)
        for side in (-1, 1):
            for bearing in np.deg2rad(np.array([-38, -12, 17, 44, 66]) + rng.uniform(-6, 6, 5)):
                centre = bearing if side > 0 else np.pi - bearing
                turn = (angle - np.float32(centre) + np.pi) % (2 * np.pi) - np.pi
                along = np.maximum(np.abs(turn * radius) - np.float32(rng.uniform(6, 19)), 0)
                across = cage - np.float32(rng.uniform(5.5, 7.5)) - turn * radius * np.float32(rng.uniform(-0.12, 0.12))
                bone(np.hypot(along, across) - np.float32(rng.uniform(2.7, 3.8)), 1.3)
            tip = rng.uniform(0, 8)
            bone(_capsule(x, y, (side * 136, 32 + tip), (side * 112, 62 + tip), 2.8), 1.1)
        bone(_superellipse(x - 2, y + 108, 21, 4.5, 2.6), 1.3)


def _paint_table(hu: Floats, grid: _Grid, top: float) -> None:
    """The patient table: a thin curved shell round light foam, its surface at `top` in the midline."""
    bend = 620.0  # mm, radius of curvature
    surface = np.hypot(grid.x, grid.y - (top - bend)) - bend
    half_width = np.abs(grid.x) - 200
    _paint(hu, np.maximum(np.maximum(-surface, surface - 26), half_width), -960.0, grid)
    _paint(hu, np.maximum(np.abs(surface - 1.0) - 1.0, half_width), -150.0, grid)
    _paint(hu, np.maximum(np.abs(surface - 26) - 1.2, half_width), -60.0, grid)


def _parenchyma(rng: np.random.Generator, grid: _Grid, chest: _Chest) -> Floats:
    """Aerated lung in HU: denser towards the back, mottled, with the oblique fissures as faint lines."""
    hu = np.full_like(grid.x, PARENCHYMA + rng.uniform(-12, 12))
    hu += np.float32(0.35) * grid.y + 11 * grid.field(rng, 22) + 24 * grid.field(rng, 4.2)
    for side in (-1, 1):
        bow = np.abs(grid.x) - np.float32(rng.uniform(70, 95))
        line = grid.y - np.float32(rng.uniform(-14, 12)) + bow * np.float32(rng.uniform(0.25, 0.5))
        line = line - bow * bow * np.float32(0.0035) + 1.5 * grid.field(rng, 16)
        hu += 130 * np.exp(-((line / np.float32(0.8)) ** 2)) * (side * grid.x > 0)
    return hu


@dataclass(frozen=True)
class _Tree:
    """Vessels and bronchi as segments in space: ends (S, 2, 3) mm, radii there (S, 2) mm, HU (S,), drawn in order."""

    ends: Floats
    radii: Floats
    hu: Floats

    def paint(self, grid: _Grid, lung: Floats) -> Floats:
        """The lung with the part of the tree that the slice cuts."""
        hu = lung.copy()
        for (start, end), radius, value in zip(self.ends, self.radii, self.hu, strict=True):
            reach = radius[0] + grid.pixel
            left, right = grid.index(np.array([min(start[0], end[0]) - reach, max(start[0], end[0]) + reach]))
            top, bottom = grid.index(np.array([min(start[1], end[1]) - reach, max(start[1], end[1]) + reach]))
            here = slice(top, bottom + 1), slice(left, right + 1)
            x, y = grid.x[here] - start[0], grid.y[here] - start[1]
            dx, dy, dz = end - start
            along = np.clip((x * dx + y * dy - start[2] * dz) / (dx * dx + dy * dy + dz * dz + 1e-9), 0, 1)
            across = np.sqrt((x - along * dx) ** 2 + (y - along * dy) ** 2 + (start[2] + along * dz) ** 2)
            _paint(hu[here], across - (radius[0] + along * (radius[1] - radius[0])), value, grid)
        return hu


def _pulmonary_tree(rng: np.random.Generator, grid: _Grid, chest: _Chest) -> _Tree:
    """Arteries with their bronchi and veins of both lungs, cut by the plane z = 0.

    Each tree joins random points of the lung, nearest to the hilum first, to the node that is close to it and not
    far from the hilum; the radii follow Murray's law (the cube of a vessel is the sum of the cubes of its branches).
    """
    parts: list[tuple[Floats, Floats, float]] = []
    for side in (-1, 1):
        for artery in (True, False, False):
            points = rng.uniform((0, -105, -1), (136, 85, 1), (1150, 3)) * (side, 1, 1)
            points[:, 2] = rng.normal(0, 15, len(points))
            hilum = np.array([side * 36.0, rng.uniform(-8, 10), rng.uniform(-7, 7)])
            inside = chest.depth[grid.index(points[:, 1]), grid.index(points[:, 0])] > rng.uniform(3, 5)
            points = points[inside & (points[:, 0] * side > 20)]
            points = points[np.argsort(np.linalg.norm(points - hilum, axis=1))]
            nodes, parent = _grow(np.concatenate([hilum[None], points]).astype(np.float32))
            radius = _murray(parent, 0.33)
            nodes = _smooth(nodes, parent, radius)
            ends = np.stack([nodes[parent[1:]], nodes[1:]], 1)
            radii = np.stack([np.minimum(radius[parent[1:]], 1.5 * radius[1:]), radius[1:]], 1)
            cut = (np.abs(ends[..., 2]).min(1) <= radii[:, 0]) | (ends[..., 2].prod(1) <= 0)
            ends, radii = ends[cut], radii[cut]
            if artery:
                wide = radii[:, 1] > 1.3
                shift = np.array([0.7 * side, -0.7, 0], np.float32)
                beside = ends[wide] + shift * 1.8 * radii[wide].max(1)[:, None, None]
                parts += [(beside, radii[wide], -150.0), (beside, 0.68 * radii[wide], -960.0)]
            parts.append((ends, radii, BLOOD))
    return _Tree(
        np.concatenate([ends for ends, _, _ in parts]),
        np.concatenate([radii for _, radii, _ in parts]),
        np.concatenate([np.full(len(ends), value, np.float32) for ends, _, value in parts]),
    )


def _grow(nodes: Floats) -> tuple[Floats, NDArray[np.intp]]:
    """Join every node to an earlier one; (N, 3) nodes in order of distance from the root -> nodes, parents (N,)."""
    parent = np.zeros(len(nodes), np.intp)
    path = np.zeros(len(nodes), np.float32)
    for new in range(1, len(nodes)):
        step = nodes[:new] - nodes[new]
        length = np.sqrt(np.einsum("ij,ij->i", step, step))
        parent[new] = best = int(np.argmin(length + np.float32(0.45) * path[:new]))
        path[new] = path[best] + length[best]
    return nodes, parent


def _murray(parent: NDArray[np.intp], tip: float) -> Floats:
    """Radius of each node, mm: the cube is the sum of the branches' cubes, `tip` at the ends, at most 5."""
    flow = np.full(len(parent), tip**3)
    for child in range(len(parent) - 1, 0, -1):
        flow[parent[child]] += flow[child]
    return np.minimum(np.cbrt(flow), 5.0).astype(np.float32)


def _smooth(nodes: Floats, parent: NDArray[np.intp], radius: Floats) -> Floats:
    """Round the kinks: move each node towards the middle between its parent and its widest branch."""
    onward = np.arange(len(nodes))
    order = np.argsort(radius[1:], kind="stable") + 1
    onward[parent[order]] = order  # the widest branch is written last
    for _ in range(3):
        middle = (nodes[parent] + nodes[onward]) / 2
        nodes = np.where((onward != np.arange(len(nodes)))[:, None], (nodes + middle) / 2, nodes)
    return nodes


# ---------------------------------------------------------------------------------------- lesions


@dataclass(frozen=True)
class _Lesion:
    """A lesion: mask, code of its class, and how far (`weight`, 0 to 1) the lung's HU give way to its own `hu`."""

    mask: Bools
    code: int
    weight: Floats
    hu: Floats


def _place_lesions(rng: np.random.Generator, grid: _Grid, chest: _Chest, count: int) -> list[_Lesion]:
    """`count` lesions apart from each other, most of them at the pleura and towards the back."""
    if count == 0:
        return []
    codes = [CONSOLIDATION if n < (count + 1) // 3 else GGO for n in range(count)]
    slope = np.stack([np.gradient(chest.costal, grid.pixel, axis=axis) for axis in (1, 0)])  # (x, y), inwards
    texture = [grid.field(rng, length) for length in (16, 7, 3.4)]
    free = chest.depth > 0
    gap = max(2, round(LESION_GAP / grid.pixel))
    found: list[_Lesion] = []
    for code in codes:
        ys, xs = np.nonzero(free & (chest.depth > 4))
        odds = np.exp(grid.y[ys, xs] / 24 - chest.costal[ys, xs] / 9).cumsum(dtype=np.float64)
        for attempt in range(400):
            pick = np.searchsorted(odds, rng.random() * odds[-1], side="right")
            # Smaller after each failure: the room that earlier lesions left takes a small one.
            shrink = max(0.97**attempt, 0.6)
            centre = int(ys[pick]), int(xs[pick])
            lesion = _lesion(rng, grid, chest, slope, texture, free, centre, code, shrink)
            if lesion is not None:
                found.append(lesion)
                free &= ~_dilate(lesion.mask, gap)
                break
        else:  # boxed in by its neighbours, which hardly ever happens: start over, further down the stream
            return _place_lesions(rng, grid, chest, count)
    return found


def _lesion(
    rng: np.random.Generator,
    grid: _Grid,
    chest: _Chest,
    slope: Floats,
    texture: list[Floats],
    free: Bools,
    centre: tuple[int, int],
    code: int,
    shrink: float,
) -> _Lesion | None:
    """A lesion about a pixel, bent along the pleura; None if it comes out too small or leaves the free room."""
    row, column = centre
    half = round(52 / grid.pixel)
    here = (
        slice(max(row - half, 0), row + half + 1),
        slice(max(column - half, 0), column + half + 1),
    )
    coarse, middle, fine = (field[here] for field in texture)
    if code == GGO:
        length, thickness, border = rng.uniform(17, 32), rng.uniform(15, 23), rng.uniform(5, 8)
        ragged = 0.22 * coarse + 0.24 * middle + 0.12 * fine
    else:
        length, thickness, border = rng.uniform(18, 28), rng.uniform(13, 19), rng.uniform(2, 3.5)
        ragged = 0.18 * coarse + 0.18 * middle + 0.12 * fine
    level = chest.costal[row, column]
    if level > 18:  # away from the pleura lesions are rounder
        length = min(length, 1.3 * thickness)
    length, thickness = length * shrink, thickness * shrink

    normal = slope[:, row, column] / (np.linalg.norm(slope[:, row, column]) + 1e-6)
    x, y = grid.x[here] - grid.x[row, column], grid.y[here] - grid.y[row, column]
    along = x * normal[1] - y * normal[0]
    inwards = chest.costal[here] - level if level <= 18 else x * normal[0] + y * normal[1]
    radius = np.hypot(along / length, inwards / thickness)
    radius = np.maximum(radius, np.hypot(x, y) / (1.2 * length)) * (1 + np.clip(ragged, -0.4, 0.6))
    inside = ((1 - radius) * thickness).astype(np.float32)  # mm, roughly

    part = _component((inside >= 0) & (chest.depth[here] > 0), (row - here[0].start, column - here[1].start))
    part = ~_component(np.pad(~part, 1, constant_values=True), (0, 0))[1:-1, 1:-1]  # no holes
    inside = np.where(part, np.maximum(inside, 0), inside)
    if part.sum() * grid.pixel**2 < MIN_LESION_AREA or (part & ~free[here]).any():
        return None
    ramp = np.clip(0.5 + inside / np.float32(border), 0, 1)
    ramp = ramp * ramp * (3 - 2 * ramp)
    near = _dilate(part, max(1, round(border / 2 / grid.pixel)))
    ramp = np.where(part, ramp, np.minimum(ramp, 0.49) * near)

    if code == GGO:
        septa = np.exp(-((fine / np.float32(0.3)) ** 2))  # thickened septa: crazy paving
        grain = 35 * coarse + 80 * middle + 60 * fine + 60 * septa
        hu = np.full_like(grain, GROUND_GLASS + rng.uniform(-45, 55))
    else:
        solid = np.clip(inside / 6 + 0.25, 0, 1)  # a hazy rim
        grain = 45 * coarse + 70 * middle + 60 * fine
        hu = GROUND_GLASS + solid * (CONSOLIDATED - GROUND_GLASS)
    hu += grain - np.median(grain[part])
    mask, weight, value = np.zeros(chest.hu.shape, bool), np.zeros_like(chest.hu), np.zeros_like(chest.hu)
    mask[here], weight[here], value[here] = part, ramp, hu
    return _Lesion(mask, code, weight, value)


def _dilate(mask: Bools, steps: int) -> Bools:
    """Every pixel within `steps` of the mask, diagonals included."""
    grown = mask.copy()
    for _ in range(steps):
        wide = grown.copy()
        wide[:, 1:] |= grown[:, :-1]
        wide[:, :-1] |= grown[:, 1:]
        grown = wide.copy()
        grown[1:] |= wide[:-1]
        grown[:-1] |= wide[1:]
    return grown


def _component(mask: Bools, seed: tuple[int, int]) -> Bools:
    """The part of a mask that is joined to the seed through pixel edges; empty if the mask lacks the seed."""
    part = np.zeros_like(mask)
    part[seed] = mask[seed]
    # Numbers of the unbroken runs along rows and along columns; whole runs are reached at once.
    gaps = np.pad(~mask, 1, constant_values=True)
    runs = (
        gaps.ravel().cumsum().reshape(gaps.shape)[1:-1, 1:-1],
        gaps.T.ravel().cumsum().reshape(gaps.T.shape).T[1:-1, 1:-1],
    )
    area = 0
    while area < (area := int(part.sum())):
        for run in runs:
            reached = np.zeros(gaps.size + 1, bool)
            reached[run[part]] = True
            part = mask & reached[run]
    return part


# ---------------------------------------------------------------------------------------- scanner


def _scan(rng: np.random.Generator, grid: _Grid, hu: Floats) -> NDArray[np.int16]:
    """Point spread of the scanner, noise with the grain of a filtered back projection, 12-bit range."""
    fy = np.fft.fftfreq(grid.size, grid.pixel)[:, None]
    fx = np.fft.rfftfreq(grid.size, grid.pixel)
    frequency = np.hypot(fx, fy)  # per mm
    spread = np.exp(-2 * (np.pi * 0.5 * frequency) ** 2)
    # The ramp filter leaves little noise at low frequencies.
    grain = np.sqrt(frequency) * np.exp(-((frequency / 0.55) ** 2))
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(hu.shape)) * grain, hu.shape)
    noise *= rng.uniform(22, 34) / noise.std()
    sharp = np.fft.irfft2(np.fft.rfft2(hu) * spread, hu.shape)
    return np.clip(np.rint(sharp + noise), -1024, 3071).astype(np.int16)


def _check(name: str, value: object, low: int, high: int | None) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):  # type: ignore[operator]
        limits = f">= {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"phantom: {name}={value!r} is not possible; give an integer {limits}.")


# ------------------------------------------------------------------------------------------ files


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write into")
    parser.add_argument("--slices", type=int, default=8, metavar="N", help="how many, or of each class (default: 8)")
    parser.add_argument("--layout", choices=("lesions", "classes", "scan"), default="lesions", help="default: lesions")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="of the first slice (default: 0)")
    parser.add_argument("--lesions", type=int, metavar="N", help="in each slice (default: 0 to 3 in turn)")
    parser.add_argument("--size", type=int, default=512, metavar="PX", help="side of a slice (default: 512)")
    parser.add_argument("--example", action="store_true", help="draw the package's example slice anew")
    options = parser.parse_args(arguments)
    if (options.out is None) != options.example:
        parser.error("give --out DIR, or --example")
    try:
        if options.example:
            write_example(SLICE.parent)
        elif options.layout == "lesions":
            write_lesions(options.out, options.slices, options.first, lesions=options.lesions, size=options.size)
        elif options.layout == "classes":
            write_classes(options.out, options.slices, options.first, size=options.size)
        else:
            write_scan(options.out, options.slices, options.first, size=options.size)
    except CTMaskNetError as error:
        print(f"phantom: {error}", file=sys.stderr)
        return 2
    return 0


def write_lesions(root: Path, count: int, first: int = 0, *, lesions: int | None = None, size: int = 512) -> Path:
    """Slices and class masks as CNCB lays them out; each seed is a patient, its lesions 0 to 3 in turn if not given."""
    for seed in range(first, first + count):
        drawn = phantom(seed, lesions=seed % 4 if lesions is None else lesions, size=size)
        name = f"2_patient{seed}_1_1.png"  # [Class]_[Patient]_[Scan]_[Slice]
        _save(drawn.image, root / "imgs" / name)
        _save(drawn.class_mask(), root / "masks" / name)
    return root


def write_classes(root: Path, count: int, first: int = 0, *, size: int = 512) -> Path:
    """A folder per class and in it one of a patient with `count` slices; of 0, 2 and 4 lesions."""
    for label, name in enumerate(IMAGE_CLASSES):
        for number in range(count):
            drawn = phantom(first + 10 * label + number, lesions=2 * label, size=size)
            _save(drawn.image, root / name / f"{name}{first}" / f"{number}.png")
    return root


def write_scan(root: Path, count: int, seed: int = 0, *, size: int = 512) -> Path:
    """A scan of `count` slices, 5 mm apart, as scan.nii.gz and as a DICOM series; more lesions towards the head."""
    nibabel = import_extra("nibabel", "io", "writing scans")
    dataset = import_extra("pydicom.dataset", "io", "writing scans")
    uid = import_extra("pydicom.uid", "io", "writing scans")
    planes = [phantom(seed, lesions=min(number, MAX_LESIONS), size=size).hu for number in range(count)]
    pixel = FIELD_OF_VIEW / size
    (root / "series").mkdir(parents=True, exist_ok=True)
    # NIfTI counts columns to the patient's left and rows to the back, so both axes of its affine are negative.
    affine = np.diag([-pixel, -pixel, 5, 1])
    nibabel.save(nibabel.Nifti1Image(np.stack(planes, -1).swapaxes(0, 1), affine), root / "scan.nii.gz")
    series, study, frame = (uid.generate_uid() for _ in range(3))
    for number, plane in enumerate(planes):
        one = dataset.Dataset()
        one.SOPClassUID, one.SOPInstanceUID = uid.CTImageStorage, uid.generate_uid()
        one.SeriesInstanceUID, one.StudyInstanceUID, one.FrameOfReferenceUID = series, study, frame
        one.PatientName, one.PatientID = "Phantom", "phantom"
        one.Modality, one.PhotometricInterpretation = "CT", "MONOCHROME2"
        one.Rows, one.Columns = plane.shape
        one.SamplesPerPixel, one.PixelRepresentation = 1, 1
        one.BitsAllocated, one.BitsStored, one.HighBit = 16, 16, 15
        one.RescaleSlope, one.RescaleIntercept, one.RescaleType = 1, 0, "HU"
        one.PixelSpacing, one.SliceThickness = [pixel, pixel], 5
        one.ImageOrientationPatient, one.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 5 * number]
        one.PixelData = plane.tobytes()
        one.file_meta = dataset.FileMetaDataset()
        one.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        one.save_as(root / "series" / f"{number}.dcm", enforce_file_format=True)
    return root


def write_example(folder: Path) -> None:
    """What `ctmasknet.example` reads."""
    drawn = phantom()
    numbers = np.zeros(drawn.hu.shape, np.uint8)
    for number, mask in enumerate(drawn.masks, start=1):
        numbers[mask] = number
    for name, pixels in {"slice": drawn.image, "mask": drawn.class_mask(), "lesions": numbers}.items():
        _save(pixels, folder / f"{name}.png")


def _save(pixels: NDArray[np.uint8], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, optimize=True)
    except OSError as error:
        raise CTMaskNetError(f"{path}: cannot be written ({error}); choose another folder") from None


if __name__ == "__main__":
    sys.exit(main())
