"""Contribution of every RoI of a slice to the class logits, which goes beyond the paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from phantom import phantom

from ctmasknet.data.slices import read_slice
from ctmasknet.evaluation.contributions import contribution_figure, roi_contributions
from ctmasknet.evaluation.evaluate import Table
from ctmasknet.registry import class_title
from ctmasknet.zoo import class_names
from paper.request import Made, Request, classifier_of, only_one


def make(request: Request) -> Made:
    """Of one image, or of a phantom."""
    classifier, name = classifier_of(request, "contributions")
    if request.data:
        (path,) = only_one(request.data, "contributions")
        pixels = read_slice(path).pixels
        title = Path(path).name
    else:
        pixels = read_slice(phantom(request.seed).image).pixels
        title = f"phantom {request.seed}"
    device = next(classifier.parameters()).device
    found = roi_contributions(classifier, torch.from_numpy(pixels).to(device).expand(3, -1, -1))
    names = class_names(classifier)
    order = np.argsort(-np.abs(found.contributions).max(axis=1), kind="stable")[:24]
    rows = tuple(
        (
            rank,
            float(found.scores[i]),
            int(found.copies[i]),
            *map(float, found.boxes[i]),
            *map(float, found.contributions[i]),
        )
        for rank, i in enumerate(order, start=1)
    )
    columns = [("rank", "d"), ("score", ".3f"), ("slots", "d")]
    columns += [(edge, ".1f") for edge in ("x1", "y1", "x2", "y2")]
    columns += [(class_title(label), ".4f") for label in names]
    note = "Gradient times input of module S, copies of a region added up."
    table = Table(f"Contribution of each RoI to the class logits, {title}, {name}", tuple(columns), rows, (note,))
    return Made(table, contribution_figure(pixels, found, names))
