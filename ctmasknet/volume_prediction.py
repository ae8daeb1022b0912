"""What a prediction on a whole scan holds, and how it is written to disk."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ctmasknet.data.volumes import Volume
from ctmasknet.errors import CTMaskNetError, InputError
from ctmasknet.output import write_files
from ctmasknet.plots import CLASS_COLOURS, RESEARCH_NOTE
from ctmasknet.registry import class_title
from ctmasknet.results import Prediction

MONTAGE_TILES, MONTAGE_COLUMNS = 12, 4
_TILE = 288  # pixels
_CAPTION = 20  # pixels
_OTHER_COLOUR = (204, 121, 167)
_TINT = 0.45


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


class _Tile(NamedTuple):
    """A slice as the montage shows it."""

    slice_index: int
    grey: npt.NDArray[np.uint8]  # (H, W)
    labels: npt.NDArray[np.uint8]  # (H, W)
    area_mm2: float


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
    """

    volume: Volume
    mask: npt.NDArray[np.uint8] = field(repr=False)
    slices: tuple[SliceRow, ...] = field(repr=False)
    class_names: tuple[str, ...]
    score_threshold: float | None
    has_segmentation: bool
    problems: tuple[str, ...]
    caveats: tuple[str, ...] = ()
    tiles: tuple[_Tile, ...] = field(default=(), repr=False)

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
        parts = [f"{len(done)} slices"]
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
        probabilities = [row.class_probabilities for row in self.slices]
        return {
            "source": self.source,
            "read_as": self.volume.kind,
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
            "class_shares": self.class_shares if any(probabilities) else None,
            "problems": list(self.problems),
            "caveats": list(self.caveats),
        }

    def table(self) -> str:
        """The rows as CSV, with a header; one column per class of the classifier."""
        classes = next((list(row.class_probabilities) for row in self.slices if row.class_probabilities), [])
        names = ("slice", "source", "height_mm", "lesions", "max_score", "lesion_area_mm2", "lesion_fraction")
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*names, "predicted_class", *(f"p_{name}" for name in classes), "error"])
        for row in self.slices:
            numbers = (row.height_mm, row.lesions, row.max_score, row.lesion_area_mm2, row.lesion_fraction)
            shown = ["" if value is None else f"{value:.6g}" for value in numbers]
            given = row.class_probabilities or {}
            probabilities = [f"{given[name]:.6g}" if name in given else "" for name in classes]
            writer.writerow(
                [row.index, row.source, *shown, row.predicted_class or "", *probabilities, row.error.replace("\n", " ")]
            )
        return text.getvalue()

    def plot(self) -> Image.Image:
        """A montage: of each twelfth of the scan the slice with most lesion, or its middle one."""
        columns = min(MONTAGE_COLUMNS, max(len(self.tiles), 1))
        rows = -(-max(len(self.tiles), 1) // columns)
        cell = _TILE + _CAPTION
        font = ImageFont.load_default(size=13)
        picture = Image.new("RGB", (columns * _TILE, rows * cell + 2 * _CAPTION), (18, 18, 20))
        draw = ImageDraw.Draw(picture)
        for place, tile in enumerate(self.tiles):
            x, y = place % columns * _TILE, place // columns * cell
            shown = self._tinted(tile)
            picture.paste(shown, (x + (_TILE - shown.width) // 2, y + (_TILE - shown.height) // 2))
            area = f": {tile.area_mm2 / 100:.1f} cm2 lesion" if tile.area_mm2 else ""
            draw.text((x + 4, y + _TILE + 2), f"slice {tile.slice_index}{area}", fill=(240, 240, 240), font=font)
        draw.text((4, rows * cell + 1), self.summary, fill=(240, 240, 240), font=font)
        draw.text((4, rows * cell + _CAPTION), RESEARCH_NOTE, fill=(160, 160, 165), font=font)
        return picture

    def _tinted(self, tile: _Tile) -> Image.Image:
        """The slice in grey with its lesions tinted and outlined, its longer side as long as a tile."""
        colours = np.repeat(tile.grey[..., None], 3, axis=2).astype(np.float64)
        for label in np.unique(tile.labels[tile.labels > 0]).tolist():
            name = self.class_names[label] if label < len(self.class_names) else ""
            colour = np.array(CLASS_COLOURS.get(name, _OTHER_COLOUR), np.float64)
            mask = tile.labels == label
            inside = np.pad(mask, 1)
            inside = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
            colours[mask] = (1 - _TINT) * colours[mask] + _TINT * colour
            colours[mask & ~inside] = colour
        picture = Image.fromarray(np.rint(colours).astype(np.uint8))
        scale = _TILE / max(picture.size)
        return picture.resize((max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)))

    def save(self, directory: str | os.PathLike[str], name: str | None = None) -> dict[str, Path]:
        """Write mask, table, montage and record into `directory`, which is created if missing.

        `<name>.lesions.nii.gz` has the scan's geometry, `<name>.slices.csv` a row per slice, `<name>.montage.png`
        the picture, `<name>.json` the facts. Each appears whole or not at all, the JSON last.

        Args:
            directory: where to write.
            name: file name without a folder. Default: that of the scan.

        Returns:
            The paths by ``"mask"``, ``"table"``, ``"montage"``, ``"json"``.

        Raises:
            InputError: `name` holds a folder, or the files cannot be written.
        """
        if name is None:
            name = Path(self.source).resolve().name or "scan"
        elif not name or Path(name).name != name:
            raise InputError(f"{name!r} is not a file name: pass the folder as directory and the name without it")
        folder = Path(directory)
        paths = {
            "mask": folder / f"{name}.lesions.nii.gz",
            "table": folder / f"{name}.slices.csv",
            "montage": folder / f"{name}.montage.png",
            "json": folder / f"{name}.json",
        }
        picture = io.BytesIO()
        self.plot().save(picture, format="PNG")
        contents = {
            # No time stamp: the same mask gives the same file.
            "mask": gzip.compress(self.volume.mask_image(self.mask).to_bytes(), compresslevel=6, mtime=0),
            "table": self.table().encode(),
            "montage": picture.getvalue(),
            "json": (json.dumps(self.to_dict(), allow_nan=False) + "\n").encode(),
        }
        write_files({paths[key]: content for key, content in contents.items()})
        return paths


def gather(
    volume: Volume,
    results: Iterable[tuple[int, Prediction | CTMaskNetError]],
    class_names: tuple[str, ...],
    score_threshold: float | None,
    has_segmentation: bool,
    caveats: tuple[str, ...],
) -> VolumePrediction:
    """Put the predictions of a scan's slices, as they come, on its voxel grid.

    Raises:
        InputError: not one slice could be used.
    """
    mask = np.zeros(volume.shape, np.uint8)
    rows: list[SliceRow] = []
    problems = list(volume.problems)
    segments = np.array_split(np.array(sorted(volume.names)), min(MONTAGE_TILES, len(volume.names)))
    middle = {int(segment[len(segment) // 2]) for segment in segments}
    segment_of = {int(index): number for number, segment in enumerate(segments) for index in segment}
    tiles: dict[int, _Tile] = {}
    for index, result in results:
        row = SliceRow(index, volume.names[index], volume.height_mm(index))
        if not isinstance(result, Prediction):
            problems.append(str(result))
            rows.append(SliceRow(row.index, row.source, row.height_mm, error=str(result)))
            continue
        labels = _label_map(result)
        area = float(np.count_nonzero(labels)) * volume.pixel_mm2
        where: list[Any] = [slice(None)] * 3
        where[volume.axial_axis] = index
        mask[tuple(where)] = volume.to_grid(labels)
        rows.append(
            SliceRow(
                index,
                row.source,
                row.height_mm,
                lesions=len(result.scores) if has_segmentation else None,
                max_score=float(result.scores.max()) if len(result.scores) else None,
                lesion_area_mm2=area if has_segmentation else None,
                lesion_fraction=result.lesion_fraction if has_segmentation else None,
                class_probabilities=result.class_probabilities,
                predicted_class=result.predicted_class,
            )
        )
        before = tiles.get(segment_of[index])
        if before is None or area > before.area_mm2 or (area == before.area_mm2 == 0 and index in middle):
            grey = np.rint(255 * np.clip(result.image, 0, 1)).astype(np.uint8)
            tiles[segment_of[index]] = _Tile(index, grey, labels, area)
    if not any(not row.error for row in rows):
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
        tiles=tuple(tiles[number] for number in sorted(tiles)),
    )


def _label_map(prediction: Prediction) -> npt.NDArray[np.uint8]:
    """(H, W): the label at each pixel; where masks overlap, that of the best score."""
    labels = np.zeros(prediction.image_size, np.uint8)
    for lesion in np.argsort(prediction.scores, kind="stable").tolist():
        labels[prediction.masks[lesion]] = prediction.labels[lesion]
    return labels
