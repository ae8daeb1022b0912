"""What the page shows of a result, as HTML: pictures travel inside it, so that none is ever written to disk."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ctmasknet.errors import import_extra
from ctmasknet.evaluation.contributions import RoIContributions, contribution_figure
from ctmasknet.registry import class_title
from ctmasknet.results import Prediction, VolumePrediction

_drawing = threading.Lock()  # matplotlib's settings belong to the whole process
_DPI = 160


def message(text: str, *, bad: bool = False) -> str:
    """A line of text, or a warning that stands out."""
    role, kind = ("alert", "bad") if bad else ("status", "fine")
    return f'<div class="message {kind}" role="{role}">{escape(text)}</div>'


def picture(image: Image.Image, alt: str) -> str:
    """A PIL image as an HTML image, PNG."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=3)
    return _img(stream.getvalue(), alt)


def plain(pixels: npt.NDArray[np.float32], alt: str) -> str:
    """A slice, (H, W) in 0..1, without anything drawn on it."""
    return picture(Image.fromarray(np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)), alt)


def score_map(prediction: Prediction, logits: npt.NDArray[np.float32]) -> str:
    """The slice with the outlines of its lesions, beside the raw mask logits of all RoIs, (H, W)."""
    matplotlib = import_extra("matplotlib.figure", "demo", "the page")
    with _drawing:
        height, width = prediction.image_size
        figure = matplotlib.Figure(figsize=(8.6, 0.6 + 4 * min(height / width, 2)), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.imshow(prediction.image, cmap="gray", vmin=0, vmax=1)
        lesions = prediction.lesion_mask
        if lesions.any():
            left.contour(lesions.astype(float), levels=[0.5], colors=["#E69F00"], linewidths=1)
        left.set_title(f"lesions scored above {prediction.score_threshold:.2f}", fontsize=9)
        shown = right.imshow(logits, cmap="magma", vmin=0, vmax=max(float(logits.max()), 1e-6))
        right.set_title("score map: mask logits, maximum over all RoIs", fontsize=9)
        for axis in (left, right):
            axis.set(xticks=[], yticks=[])
        bar = figure.colorbar(shown, ax=right, shrink=0.8, aspect=24)
        bar.ax.tick_params(labelsize=8)
        return _figure(figure, f"Score map of {prediction.source}")


def contributions(prediction: Prediction, found: RoIContributions, class_names: Sequence[str]) -> str:
    """What each RoI contributes to the logits of the classes (`contribution_figure`)."""
    with _drawing:
        figure = contribution_figure(prediction.image, found, class_names)
        return _figure(figure, f"Contributions of the RoIs of {prediction.source} to the class logits")


def facts(prediction: Prediction, models: str) -> str:
    """Summary, class probabilities and lesions of a slice, and its JSON to download."""
    parts = [f"<h3>{escape(prediction.source)}: {escape(prediction.summary)}</h3>"]
    if prediction.class_probabilities:
        rows = "".join(
            f"<tr><td>{escape(class_title(name))}</td><td class='bar'><div style='width:{100 * value:.1f}%'></div></td>"
            f"<td>{value:.3f}</td></tr>"
            for name, value in prediction.class_probabilities.items()
        )
        parts.append(f"<table id='classes'><caption>class probabilities of the slice</caption>{rows}</table>")
    if len(prediction.scores):
        rows = "".join(
            f"<tr><td>{number}</td><td>{escape(class_title(prediction.class_name(int(label))))}</td>"
            f"<td>{score:.3f}</td><td>{int(mask.sum())}</td><td>{', '.join(f'{edge:.0f}' for edge in box)}</td></tr>"
            for number, (label, score, mask, box) in enumerate(
                zip(prediction.labels, prediction.scores, prediction.masks, prediction.boxes, strict=True), start=1
            )
        )
        head = "<tr><th></th><th>class</th><th>score</th><th>area, px</th><th>box x1, y1, x2, y2, px</th></tr>"
        parts.append(f"<table id='lesions'><caption>lesions</caption>{head}{rows}</table>")
    parts += _notes([*prediction.caveats, models])
    parts.append(_download(prediction.to_dict(), f"{prediction.source}.json", "Download the JSON of this slice"))
    return "".join(parts)


def scan_facts(scan: VolumePrediction, models: str) -> str:
    """Summary of a scan, what is wrong with it, and its JSON and table to download."""
    table = base64.b64encode(scan.table().encode()).decode()
    return "".join(
        [
            f"<h3>{escape(scan.source)}: {escape(scan.summary)}</h3>",
            *_notes([*scan.problems[:20], *scan.caveats, models]),
            _download(scan.to_dict(), f"{scan.source}.json", "Download the JSON of the scan"),
            _link(f"data:text/csv;base64,{table}", f"{scan.source}.slices.csv", "Table of its slices, CSV"),
        ]
    )


def _notes(lines: Iterable[str]) -> list[str]:
    return [f"<p class='note'>{escape(line)}</p>" for line in lines]


def _download(content: dict[str, Any], name: str, label: str) -> str:
    text = json.dumps(content, allow_nan=False) + "\n"
    data = base64.b64encode(text.encode()).decode()
    return _link(f"data:application/json;base64,{data}", name, label)


def _link(address: str, name: str, label: str) -> str:
    return f'<a class="download" href="{address}" download="{escape(name)}">{escape(label)}</a>'


def _figure(figure: Any, alt: str) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    return _img(stream.getvalue(), alt)


def _img(data: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
