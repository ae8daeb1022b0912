"""What a prediction on a slice or a whole scan holds, and how it is written to disk: plain numpy, no tensors."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ctmasknet.data.dicom_out import LesionMask, dicom_files
from ctmasknet.errors import CTMaskNetError, InputError
from ctmasknet.output import Content, PathLike, csv_text, json_bytes, write_files
from ctmasknet.overlay import Lesion, Tile, class_colour, montage, overlay
from ctmasknet.registry import class_title

if TYPE_CHECKING:
    from ctmasknet.data.scans import Volume

MONTAGE_TILES = 12


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

    Two predictions are equal only if they are the same object: compare their arrays.

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
        units: what the slice's values were taken for, if it does not say it itself: ``"hu"``, ``"hu+1024"`` (HU + 1024,
            put right) or ``"range"``.
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
    units: str | None = None

    @property
    def lesion_mask(self) -> npt.NDArray[np.bool_]:
        """(H, W) bool: pixels that belong to any lesion."""
        return np.any(self.masks, axis=0)

    @property
    def lesion_fraction(self) -> float:
        """Share of the slice, 0..1, that belongs to any lesion; a pixel of several masks counts once."""
        return float(self.lesion_mask.mean())

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
        return f"{counted(count, 'lesion')}{kinds} covering {share} of the slice"

    def class_name(self, label: int) -> str:
        """Name of a detector class; "class 7" for a label that `class_names` does not reach."""
        return self.class_names[label] if label < len(self.class_names) else f"class {label}"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the image as plain values, ready for ``json.dumps(..., allow_nan=False)``.

        Masks are COCO's RLE, which ``pycocotools.mask.decode`` reads. `lesion_fraction` is None if no segmenter ran.
        The RoI batch comes as boxes, scores and labels, without its deltas.
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
        batch, probabilities = self.roi_batch, self.class_probabilities
        return {
            "source": self.source,
            "summary": self.summary,
            "units": self.units,
            "image_size": [int(side) for side in self.image_size],
            "has_segmentation": self.has_segmentation,
            "score_threshold": None if self.score_threshold is None else float(self.score_threshold),
            "lesion_fraction": self.lesion_fraction if self.has_segmentation else None,
            "class_probabilities": probabilities and {name: float(value) for name, value in probabilities.items()},
            "predicted_class": self.predicted_class,
            "lesions": lesions,
            "roi_batch": batch
            and {"boxes": _plain(batch.boxes), "scores": _plain(batch.scores), "labels": batch.labels.tolist()},
            "caveats": list(self.caveats),
        }

    def plot(self, *, scale: int | None = None) -> Image.Image:
        """The slice with its lesions and scores drawn on it, best first, and below it summary and probabilities.

        Without a segmenter the slice stays as it is; without a classifier there are no probabilities.

        Args:
            scale: pixels of the picture per pixel of the slice, see `overlay`.
        """
        several = len(self.class_names) > 2
        found = np.unique(self.labels).tolist()
        classes = {n: (class_title(self.class_name(n)), class_colour(self.class_names, n)) for n in found}
        lesions = []
        for index in np.argsort(-self.scores, kind="stable").tolist():
            title, colour = classes[int(self.labels[index])]
            text = f"{title} {self.scores[index]:.2f}" if several else f"{self.scores[index]:.2f}"
            lesions.append(Lesion(self.masks[index], self.boxes[index], text, colour))
        return overlay(
            self.image,
            lesions,
            headline=self.summary,
            legend=dict(classes.values()) if several else {},
            probabilities={class_title(name): value for name, value in (self.class_probabilities or {}).items()},
            notes=self.caveats,
            scale=scale,
        )

    def save(self, directory: PathLike, name: str | None = None) -> list[Path]:
        """Write `<name>.overlay.png` and `<name>.json` into `directory`, which is created if missing.

        A score map, if there is one, goes to `<name>.score_map.npy` ((H, W) float32, for ``numpy.load``).
        Each file appears whole or not at all, and replaces one of the same name; the JSON appears last.

        Args:
            directory: where to write.
            name: file name without a folder. Default: that of `source` with its suffix, so that x.png and
                x.jpg do not collide; "prediction" if there is no source.

        Returns:
            The paths written, the picture first and the JSON last.

        Raises:
            InputError: `name` holds a folder, or the files cannot be written (permission, full disk, …).
        """
        stem = _target(directory, name, Path(self.source).name or "prediction")
        picture, score_map = self.plot(), self.score_map
        contents: dict[Path, Content] = {stem(".overlay.png"): lambda stream: picture.save(stream, format="PNG")}
        if score_map is not None:
            contents[stem(".score_map.npy")] = lambda stream: np.save(stream, score_map)
        return write_files({**contents, stem(".json"): json_bytes(self.to_dict())})

    def __repr__(self) -> str:
        height, width = self.image_size
        title = f"Prediction of {self.source or 'a slice'}, {width} x {height}"
        return "\n  ".join((title, self.summary, *self.caveats))

    def _repr_png_(self) -> bytes | None:
        return self.plot()._repr_png_()


def counted(number: int, thing: str) -> str:
    """A number and its noun: 1 slice, 2 slices."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def run_length_encode(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """(H, W) bool -> COCO's RLE ``{"size": [H, W], "counts": "..."}``, which ``pycocotools.mask.decode`` reads.

    Runs go down the columns and alternate, zeros first. From the fourth on, the difference to the run before last is
    stored; a number goes in groups of five bits, lowest first, a sixth bit says that more follow, and 48 makes each a
    printable character.
    """
    pixels = mask.ravel(order="F")
    starts = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    counts = np.diff(starts, prepend=0, append=pixels.size).tolist()
    if pixels.size and pixels[0]:
        counts.insert(0, 0)
    text = bytearray()
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            text.append(48 + bits + 32 * more)
    return {"size": [int(side) for side in mask.shape], "counts": text.decode("ascii")}


def _plain(values: npt.NDArray[np.float32]) -> list[Any]:
    """float32 array -> nested lists of floats: the shortest decimals that read back as the same float32."""
    plain: list[Any] = values.astype(np.float32).astype(str).astype(np.float64).tolist()
    return plain


@dataclass(frozen=True)
class SliceRow:
    """A line of the table of a scan.

    Attributes:
        index: along the axial axis of the scan's grid.
        source: what the slice was read from.
        height_mm: how far towards the head it lies, in the scan's coordinates.
        lesions: how many; None without a segmenter, or if the slice could not be used.
        max_score: the best of them, 0..1; None if there is none.
        lesion_area_mm2: the union of the lesions.
        lesion_fraction: of the slice, 0..1.
        class_probabilities: of the slice; None without a classifier.
        predicted_class: the most probable of them.
        error: why the slice could not be used, "" if it could.
    """

    index: int
    source: str
    height_mm: float
    lesions: int | None = None
    max_score: float | None = None
    lesion_area_mm2: float | None = None
    lesion_fraction: float | None = None
    class_probabilities: dict[str, float] | None = None
    predicted_class: str | None = None
    error: str = ""


@dataclass(frozen=True, eq=False)
class VolumePrediction:
    """Lesions of a whole scan, on its own voxel grid.

    Attributes:
        volume: the scan: source, affine, spacing, what its slices were read from.
        mask: uint8 of the scan's shape, 0 or the label of a lesion; where lesions overlap, that of the best score.
        slices: a row per slice, in the order of the grid; unusable slices have an `error`.
        class_names: the detector's classes, index = label, background first.
        score_threshold: lesions scored below this were dropped; None if unknown.
        has_segmentation: False if no segmenter ran: the mask is empty then, and `lesion_ml` None.
        problems: what is wrong with the scan and its slices, one line each.
        caveats: what the weights admit of themselves.
        models: variant and SHA-256 of the weights of its ``"segmenter"`` and ``"classifier"``; None for none.
        tiles: the slices that `plot` shows.
    """

    volume: Volume
    mask: npt.NDArray[np.uint8] = field(repr=False)
    slices: tuple[SliceRow, ...] = field(repr=False)
    class_names: tuple[str, ...]
    score_threshold: float | None
    has_segmentation: bool
    problems: tuple[str, ...]
    caveats: tuple[str, ...] = ()
    models: Mapping[str, Mapping[str, str] | None] = field(default_factory=dict, repr=False)
    tiles: tuple[Tile, ...] = field(default=(), repr=False)

    @property
    def source(self) -> str:
        """The path of the scan, as given."""
        return self.volume.source

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """(4, 4): voxel indices of `mask` -> mm, RAS+."""
        return self.volume.affine

    @property
    def lesion_ml(self) -> float | None:
        """Volume of all lesions in ml; None without a segmenter."""
        return float(np.count_nonzero(self.mask)) * self.volume.voxel_ml if self.has_segmentation else None

    @property
    def lesion_ml_by_class(self) -> dict[str, float] | None:
        """Volume in ml by class of lesion; None without a segmenter."""
        if not self.has_segmentation:
            return None
        counts = np.bincount(self.mask.ravel(), minlength=len(self.class_names))
        return {
            name: float(counts[label]) * self.volume.voxel_ml for label, name in enumerate(self.class_names) if label
        }

    @property
    def class_shares(self) -> dict[str, float] | None:
        """Share of the slices, 0..1, per most probable class; None without a classifier."""
        rows = [row for row in self.slices if row.class_probabilities is not None]
        if not rows:
            return None
        names = rows[0].class_probabilities or {}
        return {name: sum(row.predicted_class == name for row in rows) / len(rows) for name in names}

    @property
    def summary(self) -> str:
        """One line for people: "16 slices; lesions 31.4 ml in 12 of them; COVID-19 in 75% of the slices"."""
        done = [row for row in self.slices if not row.error]
        parts = [counted(len(done), "slice")]
        if len(done) < len(self.slices):
            parts[0] += f" ({len(self.slices) - len(done)} could not be used)"
        if self.lesion_ml is not None:
            touched = sum(bool(row.lesions) for row in done)
            parts.append(f"lesions {self.lesion_ml:.1f} ml in {touched} of them" if touched else "no lesion")
        if self.class_shares:
            name = max(self.class_shares, key=self.class_shares.__getitem__)
            parts.append(f"{class_title(name)} in {self.class_shares[name]:.0%} of the slices")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the mask, as plain values for JSON."""
        return {
            "source": self.source,
            "read_as": self.volume.kind,
            "units": self.volume.units,
            "summary": self.summary,
            "shape": list(self.volume.shape),
            "spacing_mm": list(self.volume.spacing),
            "affine": self.affine.tolist(),
            "axial_axis": self.volume.axial_axis,
            "classes": list(self.class_names),
            "has_segmentation": self.has_segmentation,
            "score_threshold": None if self.score_threshold is None else float(self.score_threshold),
            "slices": len(self.slices),
            "slices_failed": sum(bool(row.error) for row in self.slices),
            "slices_with_lesions": sum(bool(row.lesions) for row in self.slices) if self.has_segmentation else None,
            "lesion_ml": self.lesion_ml,
            "lesion_ml_by_class": self.lesion_ml_by_class,
            "class_shares": self.class_shares,
            "models": dict(self.models),
            "problems": list(self.problems),
            "caveats": list(self.caveats),
        }

    def table(self) -> str:
        """The rows as CSV, with a header; one column per class of the classifier."""
        classes = next((list(row.class_probabilities) for row in self.slices if row.class_probabilities), [])
        names = ("slice", "source", "height_mm", "lesions", "max_score", "lesion_area_mm2", "lesion_fraction")
        lines: list[list[Any]] = [[*names, "predicted_class", *(f"p_{name}" for name in classes), "error"]]
        for row in self.slices:
            given = row.class_probabilities or {}
            figures = [row.height_mm, row.lesions, row.max_score, row.lesion_area_mm2, row.lesion_fraction]
            shown = [None if value is None else f"{value:.6g}" for value in (*figures, *map(given.get, classes))]
            shown.insert(len(figures), row.predicted_class)
            lines.append([row.index, row.source, *shown, row.error.replace("\n", " ")])
        return csv_text(lines)

    def plot(self) -> Image.Image:
        """A montage: of each twelfth of the scan the slice with most lesion, or its middle one."""
        return montage(self.tiles, self.class_names, self.summary, self.caveats)

    def save(self, directory: PathLike, name: str | None = None, *, dicom: bool = False) -> list[Path]:
        """Write mask, table, montage and record into `directory`, which is created if missing.

        `<name>.lesions.nii.gz` has the scan's geometry, `<name>.slices.csv` a row per slice, `<name>.montage.png`
        the picture, `<name>.json` the facts. Each appears whole or not at all, the JSON last.

        Args:
            directory: where to write.
            name: file name without a folder. Default: that of the scan.
            dicom: also write `<name>.seg.dcm`, the mask as a DICOM SEG, and `<name>.sr.dcm`, the volumes as a DICOM SR,
                before the JSON (extra ``dicom``). They belong to the scan's patient and study, names included.

        Returns:
            The paths, in that order.

        Raises:
            InputError: `name` holds a folder, or the files cannot be written; with `dicom`, the scan was not read from
                DICOM, its headers do not allow it, or no segmenter ran.
        """
        stem = _target(directory, name, Path(self.source).resolve().name or "scan")
        picture = self.plot()
        seg_and_sr = zip((stem(".seg.dcm"), stem(".sr.dcm")), self._dicom_files(), strict=True) if dicom else ()
        return write_files(
            {
                # No time stamp: the same mask gives the same file.
                stem(".lesions.nii.gz"): gzip.compress(self.volume.mask_image(self.mask).to_bytes(), 6, mtime=0),
                stem(".slices.csv"): self.table().encode("utf-8", "backslashreplace"),
                stem(".montage.png"): lambda stream: picture.save(stream, format="PNG"),
                **dict(seg_and_sr),
                stem(".json"): json_bytes(self.to_dict()),
            }
        )

    def _dicom_files(self) -> tuple[bytes, bytes]:
        segmenter = self.models.get("segmenter")
        if segmenter is None:
            raise InputError(f"{self.source}: no segmenter ran, so there are no lesions to write as DICOM")
        return dicom_files(
            LesionMask(
                volume=self.volume,
                mask=self.mask,
                class_names=self.class_names,
                slices=[row.index for row in self.slices if not row.error],
                variant=segmenter["variant"],
                digest=segmenter["sha256"],
                parameters={"weights_sha256": segmenter["sha256"], "score_threshold": str(self.score_threshold)},
            )
        )

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.volume.shape))
        return "\n  ".join((f"VolumePrediction of {self.source}, {size} voxels", self.summary, *self.caveats))

    def _repr_png_(self) -> bytes | None:
        return self.plot()._repr_png_()


def gather(
    volume: Volume,
    results: Iterable[tuple[int, Prediction | CTMaskNetError]],
    class_names: tuple[str, ...],
    score_threshold: float | None,
    has_segmentation: bool,
    caveats: tuple[str, ...],
    models: Mapping[str, Mapping[str, str] | None],
) -> VolumePrediction:
    """Put the predictions of a scan's slices, as they come, on its voxel grid.

    Raises:
        InputError: not one slice could be used.
    """
    mask = np.zeros(volume.shape, np.uint8)
    planes = np.moveaxis(mask, volume.axial_axis, 0)
    rows: list[SliceRow] = []
    problems = list(volume.problems)
    segments = np.array_split(sorted(volume.names), min(MONTAGE_TILES, len(volume.names)))
    middle = {int(segment[len(segment) // 2]) for segment in segments}
    segment_of = {int(index): number for number, segment in enumerate(segments) for index in segment}
    tiles: dict[int, tuple[tuple[float, bool], Tile]] = {}
    for index, result in results:
        row = SliceRow(index, volume.names[index], volume.height_mm(index))
        if not isinstance(result, Prediction):
            problems.append(str(result))
            rows.append(replace(row, error=str(result)))
            continue
        labels = _label_map(result)
        planes[index] = volume.to_grid(labels)
        area = float(np.count_nonzero(labels)) * volume.pixel_mm2
        row = replace(row, class_probabilities=result.class_probabilities, predicted_class=result.predicted_class)
        if has_segmentation:
            best = float(result.scores.max()) if len(result.scores) else None
            row = replace(row, lesions=len(result.scores), max_score=best)
            row = replace(row, lesion_area_mm2=area, lesion_fraction=result.lesion_fraction)
        rows.append(row)
        worth, segment = (area, index in middle), segment_of[index]
        if segment not in tiles or worth > tiles[segment][0]:
            grey = np.rint(255 * np.clip(result.image, 0, 1)).astype(np.uint8)
            caption = f"slice {index}" + (f": {area / 100:.1f} cm2 lesion" if area else "")
            tiles[segment] = worth, (caption, grey, labels)
    if all(row.error for row in rows):
        reason = rows[0].error if rows else "it has none"
        raise InputError(f"{volume.source}: no slice of it can be used; the first: {reason}")
    return VolumePrediction(
        volume=volume,
        mask=mask,
        slices=tuple(rows),
        class_names=class_names,
        score_threshold=score_threshold,
        has_segmentation=has_segmentation,
        problems=tuple(problems),
        caveats=caveats,
        tiles=tuple(tiles[number][1] for number in sorted(tiles)),
        models=models,
    )


def _label_map(prediction: Prediction) -> npt.NDArray[np.uint8]:
    """(H, W): the label at each pixel; where masks overlap, that of the best score."""
    labels = np.zeros(prediction.image_size, np.uint8)
    for lesion in np.argsort(prediction.scores, kind="stable").tolist():
        labels[prediction.masks[lesion]] = prediction.labels[lesion]
    return labels


def _target(directory: PathLike, name: str | None, default: str) -> Callable[[str], Path]:
    """Suffix -> the path of a result.

    Raises:
        InputError: `name` is no file name.
    """
    if name is not None and (not name or Path(name).name != name):
        raise InputError(f"{name!r} is not a file name: pass the folder as directory and the name without it")
    return lambda suffix: Path(directory) / f"{name or default}{suffix}"
