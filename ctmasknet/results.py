"""What a prediction on one slice holds, and how it is written to disk: plain numpy, no tensors."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ctmasknet.errors import InputError
from ctmasknet.output import cannot_write
from ctmasknet.registry import class_title

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, eq=False)
class RoIBatch:
    """The ranked, fixed-size batch of regions the classifier looked at (COVID-CT-Mask-Net).

    Attributes:
        boxes: (N, 4) float32, xyxy, pixels of the input image, half-open.
        scores: (N,) float32, the detector's confidence in 0..1.
        labels: (N,) int64, index into the detector's classes.
        deltas: (N, 4) float32, the box head's regression for that class.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    deltas: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Prediction:
    """Lesions of one axial slice and what the slice shows as a whole.

    Two predictions are equal only if they are the same object: compare the arrays you care about.

    Attributes:
        image_size: (H, W) of the input image in pixels.
        boxes: (N, 4) float32, xyxy, pixels of the input image, half-open; N = 0 if nothing was found.
        scores: (N,) float32, confidence in 0..1.
        labels: (N,) int64, index into `class_names`, never 0.
        masks: (N, H, W) bool.
        class_probabilities: probability in 0..1 per class of the whole slice; None without a classifier.
        roi_batch: the regions the classifier looked at; None without a classifier.
        class_names: the detector's classes, index = label, background first.
        image: (H, W) float32 in 0..1, the slice the models saw, kept for plotting.
        source: file name of the slice, or "" if it did not come from a file.
        score_threshold: lesions scored below this were dropped; None if unknown.
        has_segmentation: False if no segmenter ran, so that an empty result does not read as "no lesion".
        caveats: what the weights that made it admit of themselves, a line each, shown wherever it is shown.
        score_map: (H, W) float32, raw mask logits of all RoIs, whatever their score, pasted into the slice and
            combined by their maximum; 0 where no RoI says lesion. None if it was not asked for
            (``Predictor(score_map=True)``) or no segmenter ran.
    """

    image_size: tuple[int, int]
    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    masks: npt.NDArray[np.bool_] = field(repr=False)
    class_probabilities: dict[str, float] | None
    roi_batch: RoIBatch | None = field(repr=False)
    class_names: tuple[str, ...]
    image: npt.NDArray[np.float32] = field(repr=False)
    source: str = ""
    score_threshold: float | None = None
    has_segmentation: bool = True
    caveats: tuple[str, ...] = ()
    score_map: npt.NDArray[np.float32] | None = field(default=None, repr=False)

    @property
    def lesion_mask(self) -> npt.NDArray[np.bool_]:
        """(H, W) bool: pixels that belong to any lesion."""
        return np.any(self.masks, axis=0)

    @property
    def lesion_fraction(self) -> float:
        """Share of the slice, 0..1, that belongs to any lesion; a pixel of several masks counts once."""
        return float(self.lesion_mask.mean()) if len(self.masks) else 0.0

    @property
    def predicted_class(self) -> str | None:
        """The most probable class of the whole slice; None without a classifier."""
        probabilities = self.class_probabilities
        return max(probabilities, key=probabilities.__getitem__) if probabilities else None

    @property
    def summary(self) -> str:
        """One line for people: "3 lesions covering 4.2% of the slice; COVID-19 0.91"."""
        parts = [self._lesion_summary()] if self.has_segmentation else []
        if self.class_probabilities and self.predicted_class is not None:
            probability = self.class_probabilities[self.predicted_class]
            parts.append(f"{class_title(self.predicted_class)} {probability:.2f}")
        return "; ".join(parts)

    def _lesion_summary(self) -> str:
        count = len(self.scores)
        if count == 0:
            above = "found" if self.score_threshold is None else f"above {self.score_threshold:.2f}"
            return f"no lesion {above}"
        percent = 100 * self.lesion_fraction
        # A small lesion must not read as none: below the last digit shown, say so.
        share = "less than 0.1%" if 0 < percent < 0.1 else f"{percent:.1f}%"
        kinds = ""
        if len(self.class_names) > 2:
            counts = ((name, int((self.labels == i).sum())) for i, name in enumerate(self.class_names))
            kinds = " (" + ", ".join(f"{n} {class_title(name)}" for name, n in counts if n) + ")"
        return f"{count} lesion{'' if count == 1 else 's'}{kinds} covering {share} of the slice"

    def class_name(self, label: int) -> str:
        """Name of a detector class; "class 7" for a label that `class_names` does not reach."""
        return self.class_names[label] if label < len(self.class_names) else f"class {label}"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the image as plain values, ready for ``json.dumps(..., allow_nan=False)``.

        Masks are COCO's uncompressed RLE (column-major, the first count is of zeros). `lesion_fraction` is
        None if no segmenter ran. The RoI batch comes as boxes, scores and labels, without its deltas.
        """
        lesions = [
            {
                "label": int(label),
                "class": self.class_name(int(label)),
                "score": score,
                "box": box,
                "area_px": int(np.count_nonzero(mask)),
                "rle": run_length_encode(mask),
            }
            for label, score, box, mask in zip(
                self.labels, _plain(self.scores), _plain(self.boxes), self.masks, strict=True
            )
        ]
        roi_batch = None
        if self.roi_batch is not None:
            roi_batch = {
                "boxes": _plain(self.roi_batch.boxes),
                "scores": _plain(self.roi_batch.scores),
                "labels": self.roi_batch.labels.tolist(),
            }
        probabilities = self.class_probabilities
        return {
            "source": self.source,
            "summary": self.summary,
            "image_size": [int(side) for side in self.image_size],
            "has_segmentation": self.has_segmentation,
            "score_threshold": None if self.score_threshold is None else float(self.score_threshold),
            "lesion_fraction": self.lesion_fraction if self.has_segmentation else None,
            "class_probabilities": None
            if probabilities is None
            else {name: float(value) for name, value in probabilities.items()},
            "predicted_class": self.predicted_class,
            "lesions": lesions,
            "roi_batch": roi_batch,
            "caveats": list(self.caveats),
        }

    def plot(self, *, scale: int | None = None) -> Image.Image:
        """The slice with its lesions, scores and class probabilities drawn on it: see `plots.overlay`."""
        from ctmasknet.plots import overlay  # drawing is not needed to hold or to store a prediction

        return overlay(self, scale=scale)

    def save(self, directory: str | os.PathLike[str], name: str | None = None) -> tuple[Path, Path]:
        """Write `<name>.json` and `<name>.overlay.png` into `directory`, which is created if missing.

        A score map, if there is one, goes to `<name>.score_map.npy` ((H, W) float32, for ``numpy.load``).
        Each file appears whole or not at all, and replaces one of the same name; the JSON appears last.

        Args:
            directory: where to write.
            name: file name without a folder. Default: that of `source` with its suffix, so that x.png and
                x.jpg do not collide; "prediction" if there is no source.

        Returns:
            The paths of the JSON and of the picture.

        Raises:
            InputError: `name` holds a folder, or the files cannot be written (permission, full disk, …).
        """
        folder = Path(directory)
        if name is None:
            name = Path(self.source).name or "prediction"
        elif not name or Path(name).name != name:
            raise InputError(f"{name!r} is not a file name: pass the folder as directory and the name without it")
        record, picture = folder / f"{name}.json", folder / f"{name}.overlay.png"
        text = json.dumps(self.to_dict(), allow_nan=False) + "\n"
        image = self.plot()
        # Short names of their own: a long `name` must not grow past the file system's limit.
        unfinished = [folder / f".ctmasknet-{uuid.uuid4().hex}.tmp" for _ in range(3)]
        target = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            target = picture
            with unfinished[0].open("xb") as stream:
                image.save(stream, format="PNG")
            target = record
            unfinished[1].write_text(text, encoding="utf-8")
            if self.score_map is not None:
                target = folder / f"{name}.score_map.npy"
                with unfinished[2].open("xb") as stream:
                    np.save(stream, self.score_map)
                unfinished[2].replace(target)
            target = picture
            unfinished[0].replace(picture)
            target = record
            unfinished[1].replace(record)
        except OSError as error:
            raise cannot_write(target, error) from error
        finally:
            for path in unfinished:
                with contextlib.suppress(OSError):  # renamed, or never made
                    path.unlink()
        return record, picture


def run_length_encode(mask: npt.NDArray[np.bool_]) -> dict[str, list[int]]:
    """(H, W) bool -> COCO's uncompressed RLE ``{"size": [H, W], "counts": [...]}``.

    Counts run down the columns and alternate, zeros first; pycocotools reads it with ``mask.frPyObjects``.
    """
    pixels = mask.ravel(order="F")
    starts = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    counts = np.diff(starts, prepend=0, append=pixels.size).tolist()
    if pixels.size and pixels[0]:
        counts.insert(0, 0)
    return {"size": [int(side) for side in mask.shape], "counts": counts}


def _plain(values: npt.NDArray[np.float32]) -> list[Any]:
    """float32 array -> nested lists of floats: the shortest decimals that read back as the same float32."""
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [float(str(np.float32(value))) for value in values]
