"""The example slice of the package: a synthetic chest CT slice (no patient's) with four lesions, and what is in it.

`slice.png` is the picture, 512 x 512 px in the lung window. `mask.png` holds the class of each pixel in the CNCB coding
(0 background, 1 lung, 2 ground-glass opacity, 3 consolidation), `lesions.png` the number of the lesion, 0 where there
is none. tools/phantom.py drew them (seed 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SLICE = Path(__file__).parent / "slice.png"


@dataclass(frozen=True, eq=False)
class Example:
    """A slice and the truth about it.

    Attributes:
        image: (H, W) uint8, lung window [-1350, 150] HU.
        masks: (N, H, W) bool, one lesion each.
        labels: (N,) int64, 1 ground-glass opacity, 2 consolidation.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    labels: NDArray[np.int64]


def example_slice() -> Example:
    """Read the example."""
    names = "slice.png", "mask.png", "lesions.png"
    image, codes, numbers = (np.array(Image.open(SLICE.with_name(name))) for name in names)  # reading closes them
    masks = numbers == np.arange(1, numbers.max() + 1)[:, None, None]
    return Example(image, masks, np.array([codes[mask][0] - 1 for mask in masks], np.int64))
