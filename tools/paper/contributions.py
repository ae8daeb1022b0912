"""Contribution of every RoI of a slice to the class logits, which goes beyond the paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from phantom import phantom

from ctmasknet.evaluation.contributions import contribution_figure, roi_contributions
from ctmasknet.evaluation.evaluate import Table
from ctmasknet.registry import class_title
from ctmasknet.zoo import class_names
from paper.request import Made, Request, classifying, only_one


def make(request: Request) -> Made:
    """Of one image, or of a phantom."""
    predictor, name = classifying(request, "contributions")
    image, title = phantom(request.seed).image, f"phantom {request.seed}"
    if request.data:
        (image,) = only_one(request.data, "contributions")
        title = Path(image).name
    prediction = predictor(image)
    found = roi_contributions(predictor.classifier, prediction.roi_batch)
    names = class_names(predictor.classifier)
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
    return Made(table, contribution_figure(prediction.image, found, names))
