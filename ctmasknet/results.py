"""What a prediction on a slice or a whole scan holds, and how it is written to disk: plain numpy, no tensors."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from ctmasknet.data.dicom_out import LesionMask, dicom_files
from ctmasknet.data.lesions import Detection, Ids, ScanLesion, count_voxels, involvement, join_slices, measure
from ctmasknet.data.lungs import FIELD, find_lungs
from ctmasknet.data.remote import as_path
from ctmasknet.data.slices import LUNG_WINDOW
from ctmasknet.errors import CTMaskNetError, InputError, MissingExtraError
from ctmasknet.output import Content, PathLike, csv_table, json_bytes, write_files
from ctmasknet.overlay import Lesion, Tile, class_colour, grey, montage, overlay, report
from ctmasknet.registry import __version__, class_title

if TYPE_CHECKING:
    from ctmasknet.data.scans import Volume

Keep = Literal["all", "lungs"]

REPORT_TILES, REPORT_LESIONS = 12, 10
SLICE_COLUMNS = (
    "slice", "source", "height_mm", "lesions", "max_score", "lesion_area_mm2", "lesion_fraction", "predicted_class",
    "error",
)  # fmt: skip
NOT_HU, NO_LUNGS = "values are not HU, so lungs were not looked for", "no lungs found"


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
        in_hu: whether the slice was read in HU, so that its lungs can be found.
        steps: mm between its rows and between its columns, as `Slice.steps`; None if unknown.
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
    in_hu: bool = False
    steps: tuple[float, float] | None = None

    @property
    def lesion_mask(self) -> npt.NDArray[np.bool_]:
        """(H, W) bool: pixels that belong to any lesion."""
        return np.any(self.masks, axis=0)

    @property
    def lesion_fraction(self) -> float:
        """Share of the slice, 0..1, that belongs to any lesion; a pixel of several masks counts once."""
        return float(self.lesion_mask.mean())

    @cached_property
    def _lungs(self) -> tuple[npt.NDArray[np.uint8] | None, str]:
        if not self.in_hu:
            return None, NOT_HU
        down, across = self.steps or (FIELD / max(self.image_size),) * 2
        if down * across == 0:
            return None, "not an axial slice, so lungs were not looked for"
        turned = tuple(axis for axis, step in ((1, down), (2, across)) if step < 0)
        try:
            ids = join_slices(self.lesion_mask[None])
            found = find_lungs(
                np.flip(grey(self.image)[None], turned), (1, abs(down), abs(across)), np.flip(ids, turned)
            )
        except MissingExtraError as error:
            return None, str(error)
        lungs = np.flip(found, turned)[0]
        if 2 * (self.lesion_mask & (lungs == 0)).sum() > self.lesion_mask.sum():
            # A consolidated lung holds no air, and there is no neighbouring slice to tell it by.
            return None, "most of the lesions lie outside the lungs found, so these are not to be trusted"
        return (lungs, "") if lungs.any() else (None, NO_LUNGS)

    @property
    def lungs(self) -> npt.NDArray[np.uint8] | None:
        """(H, W): 1 right and 2 left lung, lesions and vessels included, airways not; None if `no_lungs` says why."""
        return self._lungs[0]

    @property
    def no_lungs(self) -> str:
        """Why there are no `lungs`: the values are not HU, or show none; "" if there are."""
        return self._lungs[1]

    @property
    def involvement(self) -> dict[str, float | None] | None:
        """What the lesions take up of the lungs; None without `lungs` or a segmenter.

        As `VolumePrediction.involvement`, but in pixels (``right_lung_px``, …) and, where the pixel spacing is known,
        in mm² (``right_lung_mm2``, …) in place of ml.
        """
        if not self.has_segmentation or self.lungs is None:
            return None
        (counts,) = count_voxels(_label_map(self)[None], self.lungs[None], len(self.class_names))
        facts = involvement(counts, 1, self.class_names, "px")
        if self.steps is not None:
            facts |= involvement(counts, abs(math.prod(self.steps)), self.class_names, "mm2")
        return facts

    @property
    def predicted_class(self) -> str | None:
        """The most probable class of the whole slice; None without a classifier."""
        return _largest(self.class_probabilities)

    @property
    def class_line(self) -> str:
        """One line for people: "control 0.02, common pneumonia 0.07, COVID-19 0.91"; "" without a classifier."""
        return ", ".join(f"{class_title(name)} {p:.2f}" for name, p in (self.class_probabilities or {}).items())

    @property
    def summary(self) -> str:
        """One line for people: "3 lesions covering 4.2% of the slice; COVID-19 0.91"."""
        parts = [self._lesion_summary()] if self.has_segmentation else []
        if self.class_probabilities and (name := self.predicted_class):
            parts.append(f"{class_title(name)} {self.class_probabilities[name]:.2f}")
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
            labels, counts = np.unique(self.labels, return_counts=True)
            kinds = ", ".join(f"{n} {class_title(self.class_names[i])}" for i, n in zip(labels, counts, strict=True))
            kinds = f" ({kinds})"
        found = f"{counted(count, 'lesion')}{kinds} covering {share} of the slice"
        if facts := self.involvement:
            shares = {side: facts[f"{side}_lesion_percent"] for side in ("right", "left")}
            each = [f"{side} {percent:.1f}%" for side, percent in shares.items() if percent is not None]
            found += f", {facts['both_lesion_percent']:.1f}% of the lungs ({', '.join(each)})"
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dumps(..., allow_nan=False)``; without image, score map and RoI batch.

        Masks are COCO's RLE, which ``pycocotools.mask.decode`` reads. `lesion_fraction` is None if no segmenter ran.
        """
        columns = self.labels.tolist(), _plain(self.scores), _plain(self.boxes), self.masks
        lesions = [
            {
                "label": label,
                "class": self.class_names[label],
                "score": score,
                "box": box,
                "area_px": int(np.count_nonzero(mask)),
                "rle": run_length_encode(mask),
            }
            for label, score, box, mask in zip(*columns, strict=True)
        ]
        probabilities = self.class_probabilities
        return {
            "source": self.source,
            "summary": self.summary,
            "units": self.units,
            "image_size": [int(side) for side in self.image_size],
            "has_segmentation": self.has_segmentation,
            "score_threshold": None if self.score_threshold is None else float(self.score_threshold),
            "lesion_fraction": self.lesion_fraction if self.has_segmentation else None,
            "involvement": self.involvement,
            "no_lungs": self.no_lungs,
            "class_probabilities": probabilities and {name: float(p) for name, p in probabilities.items()},
            "predicted_class": self.predicted_class,
            "lesions": lesions,
            "caveats": list(self.caveats),
        }

    def plot(self, *, scale: int | None = None) -> Image.Image:
        """The slice with its lesions and scores drawn on it, best first, and below it summary and probabilities.

        `scale`: pixels of the picture per pixel of the slice. Default: the smallest that makes its longer side 768.
        """
        lesions = []
        for index in np.argsort(-self.scores, kind="stable"):
            label, text = self.labels[index], f"{self.scores[index]:.2f}"
            if len(self.class_names) > 2:
                text = f"{class_title(self.class_names[label])} {text}"
            lesions.append(Lesion(self.masks[index], self.boxes[index], text, class_colour(self.class_names, label)))
        return overlay(
            self.image,
            lesions,
            headlines=[*([self._lesion_summary()] if self.has_segmentation else []), *filter(None, [self.class_line])],
            notes=self.caveats,
            scale=scale,
        )

    def save(self, directory: PathLike, name: str | None = None) -> list[Path]:
        """Write `<name>.overlay.png` and `<name>.json` into `directory`, made if missing; the paths, the JSON last.

        A score map, if there is one, goes to `<name>.score_map.npy` ((H, W) float32, for ``numpy.load``).
        Each file appears whole or not at all, and replaces one of the same name.

        Args:
            name: file name without a folder. Default: that of `source` with its suffix, so that x.png and
                x.jpg do not collide; "prediction" if there is no source.

        Raises:
            InputError: `name` holds a folder, or the files cannot be written (permission, full disk, …).
        """
        stem = _target(directory, name, Path(as_path(self.source)).name or "prediction")
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


@dataclass(frozen=True, eq=False)
class VolumePrediction:
    """Lesions of a whole scan, on its own voxel grid.

    Attributes:
        volume: the scan: source, affine, spacing, what its slices were read from.
        mask: uint8 of the scan's shape, 0 or the label of a lesion; where lesions overlap, that of the best score.
        lesion_ids: of the scan's shape, 0 or the `id` of one of `lesions`.
        lungs: uint8 of the scan's shape, 1 right and 2 left lung, lesions and vessels included, airways not; None
            without a segmenter, and if there are none or the values are not HU: `problems` says which.
        image: (S, H, W) uint8, the slices as the models saw them; `volume.stack` turns the arrays above like it.
        lesions: the largest in the lungs first, those outside last.
        counts: (S, 3, classes), voxels of each slice outside, in the right and in the left lung, by class (0: none).
        slices: a dictionary per slice, in the order of the grid: ``slice`` (its index along the axial axis),
            ``source``, ``height_mm`` (how far towards the head it lies), ``error`` (why it could not be used, or "").
            With a segmenter ``lesions`` (how many of the scan's it cuts), ``max_score`` (of the best detection in it,
            0..1, or None), ``lesion_area_mm2``, ``lesion_fraction`` (of the slice, 0..1) and the keys of `involvement`.
            With a classifier ``class_probabilities`` and ``predicted_class``.
        class_names, score_threshold, caveats: as of a `Prediction`.
        has_segmentation: False if no segmenter ran: the mask is empty then, and `lesion_ml` None.
        problems: what is wrong with the scan and its slices, one line each.
        models: variant and SHA-256 of the weights of its ``"segmenter"`` and ``"classifier"``; None for none.
    """

    volume: Volume
    mask: npt.NDArray[np.uint8] = field(repr=False)
    lesion_ids: Ids = field(repr=False)
    lungs: npt.NDArray[np.uint8] | None = field(repr=False)
    image: npt.NDArray[np.uint8] = field(repr=False)
    lesions: tuple[ScanLesion, ...] = field(repr=False)
    counts: npt.NDArray[np.intp] = field(repr=False)
    slices: tuple[dict[str, Any], ...] = field(repr=False)
    class_names: tuple[str, ...]
    score_threshold: float | None
    has_segmentation: bool
    problems: tuple[str, ...]
    caveats: tuple[str, ...] = ()
    models: Mapping[str, Mapping[str, str] | None] = field(default_factory=dict, repr=False)

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
        return sum(self.lesion_ml_by_class.values()) if self.lesion_ml_by_class is not None else None

    @property
    def lesion_ml_by_class(self) -> dict[str, float] | None:
        """Volume in ml by class of lesion; None without a segmenter."""
        if not self.has_segmentation:
            return None
        volumes = (self.counts.sum((0, 1)) * self.volume.voxel_ml).tolist()
        return dict(zip(self.class_names[1:], volumes[1:], strict=True))

    @property
    def involvement(self) -> dict[str, float | None] | None:
        """What the lesions take up of the lungs; None without `lungs`.

        In ml and percent, for ``right``, ``left`` and ``both``: ``<side>_lung_ml``, ``<side>_lesion_ml``,
        ``<side>_lesion_percent`` (None for a lung that is not there), with several classes of lesion also
        ``<side>_<class>_ml`` and ``<side>_<class>_percent``; and ``outside_lesion_ml``.
        """
        if self.lungs is None:
            return None
        return involvement(self.counts.sum(0), self.volume.voxel_ml, self.class_names)

    @property
    def class_shares(self) -> dict[str, float] | None:
        """Share of the slices, 0..1, per most probable class; None without a classifier."""
        rows = [row for row in self.slices if row.get("class_probabilities")]
        names = rows[0]["class_probabilities"] if rows else None
        return names and {name: sum(row["predicted_class"] == name for row in rows) / len(rows) for name in names}

    @property
    def summary(self) -> str:
        """One line for people: "16 slices; 3 lesions, 31.4 ml in 12 slices, 4.1% of the lungs; COVID-19 in 75% of the
        slices"."""
        done = [row for row in self.slices if not row["error"]]
        parts = [counted(len(done), "slice")]
        if len(done) < len(self.slices):
            parts[0] += f" ({len(self.slices) - len(done)} could not be used)"
        if self.lesion_ml is not None:
            touched = len(self._with_lesions())
            found = f"{counted(len(self.lesions), 'lesion')}, {self.lesion_ml:.1f} ml in {counted(touched, 'slice')}"
            share = (self.involvement or {}).get("both_lesion_percent")
            found += "" if share is None else f", {share:.1f}% of the lungs"
            parts.append(found if touched else "no lesion")
        if (shares := self.class_shares) and (name := _largest(shares)):
            parts.append(f"{class_title(name)} in {shares[name]:.0%} of the slices")
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
            "axial_axis": self.volume.axes[0],
            "classes": list(self.class_names),
            "has_segmentation": self.has_segmentation,
            "score_threshold": self.score_threshold,
            "slices": len(self.slices),
            "slices_failed": sum(bool(row["error"]) for row in self.slices),
            "slices_with_lesions": len(self._with_lesions()) if self.has_segmentation else None,
            "lesion_ml": self.lesion_ml,
            "lesion_ml_by_class": self.lesion_ml_by_class,
            "involvement": self.involvement,
            "lesions": [asdict(lesion) for lesion in self.lesions],
            "class_shares": self.class_shares,
            "models": dict(self.models),
            "version": __version__,
            "problems": list(self.problems),
            "caveats": list(self.caveats),
        }

    def table(self) -> str:
        """`slices` as CSV, with a header; a column per class of the classifier, ``p_<class>``."""
        rows = (
            row | {f"p_{name}": value for name, value in (row.get("class_probabilities") or {}).items()}
            for row in self.slices
        )
        return csv_table(rows, SLICE_COLUMNS, without=["class_probabilities"])

    def lesion_table(self) -> str:
        """`lesions` as CSV, with a header; of several classes also a column of ml per class."""
        rows = []
        for one in self.lesions:
            classes = one.ml_by_class if len(self.class_names) > 2 else {}
            rows.append({"lesion": one.id, **vars(one), **{f"{name}_ml": ml for name, ml in classes.items()}})
        head = ("lesion", *(one.name for one in fields(ScanLesion)))
        return csv_table(rows, head, without=("id", "ml_by_class"))

    def involvement_rows(self) -> list[list[str]]:
        """`involvement` rounded for people: a head, then right, left, both, outside; empty without it."""
        facts = self.involvement
        if facts is None:
            return []
        kinds = ["lesion", *(self.class_names[1:] if len(self.class_names) > 2 else ())]
        head = ["", "lung, ml"] + [f"{class_title(kind)}, {unit}" for kind in kinds for unit in ("ml", "%")]
        keys = ["lung_ml", *(f"{kind}_{unit}" for kind in kinds for unit in ("ml", "percent"))]
        sides = ("right", "left", "both", "outside")
        return [head, *([side, *(_rounded(facts.get(f"{side}_{key}")) for key in keys)] for side in sides)]

    def lesion_rows(self) -> list[list[str]]:
        """`lesions` rounded for people, below a head; empty without them."""
        rows = [["lesion", "side", "ml", "diameter, mm", "slices", "mean HU", "score"]] if self.lesions else []
        for one in self.lesions:
            slices = " to ".join(map(str, dict.fromkeys((one.first_slice, one.last_slice))))
            figures = _rounded(one.ml), _rounded(one.diameter_mm), slices, _rounded(one.mean_hu), f"{one.score:.2f}"
            rows.append([str(one.id), one.side or "unknown", *figures])
        return rows

    def plot(self) -> Image.Image:
        """A montage of all slices that hold lesions; without any, of up to 12 over the scan."""
        return montage(self._tiles(), self.class_names, self.summary, self.caveats)

    def report(self) -> Image.Image:
        """One page (A4, 150 dpi): up to 12 slices, the lungs' and the largest lesions' figures, problems, caveats."""
        lesions = self.lesion_rows()
        if len(lesions) > REPORT_LESIONS + 1:
            more = f"{len(lesions) - REPORT_LESIONS - 1} more"
            lesions[REPORT_LESIONS + 1 :] = [[more, *[""] * (len(lesions[0]) - 1)]]
        tables = [table for table in (self.involvement_rows(), lesions) if table]
        made_by = [f"{model['variant']} {model['sha256'][:12]}" for model in self.models.values() if model]
        x, y, z = self.volume.spacing
        grid = f"{' x '.join(map(str, self.volume.shape))} voxels of {x:.3g} x {y:.3g} x {z:.3g} mm"
        view = "The patient's right is on the left of the pictures, the back below."
        notes = (*self.problems, *self.caveats, view, f"{grid}; ctmasknet {__version__}; {', '.join(made_by)}")
        tiles = self._tiles(REPORT_TILES)
        return report(Path(as_path(self.source)).name, self.summary, tiles, self.class_names, tables, notes)

    def _with_lesions(self) -> list[int]:
        return [row["slice"] for row in self.slices if row.get("lesions")]

    def _tiles(self, most: int | None = None) -> list[Tile]:
        """The slices with lesions, of `most` parts of them the one with most lesion; without any, slices all over."""
        labels, cm2 = self.volume.stack(self.mask), self.counts[:, :, 1:].sum((1, 2)) * self.volume.pixel_mm2 / 100
        indices = self._with_lesions()
        if most or not indices:
            indices = indices or [row["slice"] for row in self.slices if not row["error"]]
            parts = np.array_split(indices, min(most or REPORT_TILES, len(indices)))
            indices = [max(part, key=lambda index: (cm2[index], -abs(index - part[len(part) // 2]))) for part in parts]
        captions = [f"slice {i}: {area:.1f} cm2 lesion" if area else f"slice {i}" for i, area in enumerate(cm2)]
        return [(captions[index], self.image[index], labels[index]) for index in indices]

    def save(self, directory: PathLike, name: str | None = None, *, dicom: bool = False) -> list[Path]:
        """Write masks, tables, pictures and record into `directory`, made if missing; the paths, the mask's first.

        The masks, with the scan's geometry: `<name>.lesions.nii.gz` holds classes, `<name>.lesion_ids.nii.gz` the
        numbers of lesions, `<name>.lungs.nii.gz` the lungs, if there are any. `<name>.slices.csv` has a row per slice,
        `<name>.lesions.csv` one per lesion; `<name>.montage.png` shows all slices with lesions, `<name>.report.png` and
        `.pdf` are a page to read, `<name>.json` holds the facts. Each appears whole or not at all, the JSON last.

        Args:
            name: file name without a folder. Default: that of the scan.
            dicom: also write `<name>.seg.dcm`, the mask as a DICOM SEG, and `<name>.sr.dcm`, the volumes as a DICOM SR,
                before the JSON (extra ``dicom``). They belong to the scan's patient and study, names included.

        Raises:
            InputError: `name` holds a folder, or the files cannot be written; with `dicom`, the scan was not read from
                DICOM, its headers do not allow it, or no segmenter ran.
        """
        stem = _target(directory, name, Path(as_path(self.source)).resolve().name or "scan")
        seg_and_sr = zip((stem(".seg.dcm"), stem(".sr.dcm")), self._dicom_files(), strict=True) if dicom else ()
        picture, page = self.plot(), self.report()
        contents: dict[Path, Content] = {}
        for kind, mask in (("lesions", self.mask), ("lesion_ids", self.lesion_ids), ("lungs", self.lungs)):
            if mask is not None:
                image = self.volume.mask_image(mask).to_bytes()
                contents[stem(f".{kind}.nii.gz")] = gzip.compress(image, 6, mtime=0)
        # No time stamps: the same masks give the same files.
        undated: dict[str, Any] = {"title": "lesions", "resolution": 150, "creationDate": None, "modDate": None}
        contents |= {
            stem(".slices.csv"): self.table().encode("utf-8", "backslashreplace"),
            stem(".lesions.csv"): self.lesion_table().encode(),
            stem(".montage.png"): lambda stream: picture.save(stream, format="PNG", compress_level=3),
            stem(".report.png"): lambda stream: page.save(stream, format="PNG", compress_level=3),
            stem(".report.pdf"): lambda stream: page.save(stream, format="PDF", quality=90, **undated),
            **dict(seg_and_sr),
        }
        return write_files(contents | {stem(".json"): json_bytes(self.to_dict())})

    def _dicom_files(self) -> tuple[bytes, bytes]:
        segmenter = self.models.get("segmenter")
        if segmenter is None:
            raise InputError(f"{self.source}: no segmenter ran, so there are no lesions to write as DICOM")
        return dicom_files(
            LesionMask(
                volume=self.volume,
                mask=self.mask,
                class_names=self.class_names,
                slices=[row["slice"] for row in self.slices if not row["error"]],
                variant=segmenter["variant"],
                digest=segmenter["sha256"],
                parameters={"weights_sha256": segmenter["sha256"], "score_threshold": str(self.score_threshold)},
                involvement=self.involvement,
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
    keep: Keep,
    *,
    class_names: tuple[str, ...],
    has_segmentation: bool,
    **facts: Any,
) -> VolumePrediction:
    """Put the predictions of a scan's slices, as they come, on its voxel grid; join them and find the lungs.

    `facts` are further fields of `VolumePrediction`.

    Raises:
        InputError: not one slice could be used.
    """
    mask, image = (np.zeros([volume.shape[axis] for axis in volume.axes], np.uint8) for _ in range(2))
    rows: list[dict[str, Any]] = []
    detections: list[Detection] = []
    problems = list(volume.problems)
    for index, result in results:
        rows.append({"slice": index, "source": volume.names[index], "height_mm": volume.height_mm(index), "error": ""})
        row = rows[-1]
        if not isinstance(result, Prediction):
            problems.append(str(result))
            row["error"] = str(result)
            continue
        row |= {"class_probabilities": result.class_probabilities, "predicted_class": result.predicted_class}
        mask[index], image[index] = _label_map(result), grey(result.image)
        for pixels, score in zip(result.masks, result.scores, strict=True):
            detections.append(Detection(index, np.flatnonzero(pixels), float(score)))
    if all(row["error"] for row in rows):
        reason = rows[0]["error"] if rows else "it has none"
        raise InputError(f"{volume.source}: no slice of it can be used; the first: {reason}")

    steps, in_hu = volume.stack_steps, volume.units != "range"
    ids = join_slices(mask > 0)
    lungs: npt.NDArray[np.uint8] | None = None
    if has_segmentation and in_hu:
        lungs = find_lungs(image, np.linalg.norm(steps, axis=0).tolist(), ids)
    if has_segmentation and (lungs is None or not lungs.any()):
        why = NO_LUNGS if in_hu else NOT_HU
        problems.append(f"{volume.source}: {why}; no percentages" + ", nothing dropped" * (keep == "lungs"))
        lungs = None
    lesions = measure(mask, ids, lungs, image, detections, class_names, steps, LUNG_WINDOW if in_hu else None)
    if keep == "lungs":
        lesions = tuple(lesion for lesion in lesions if lesion.side != "outside")
        mask[ids > len(lesions)] = 0
        ids[ids > len(lesions)] = 0
    counts = count_voxels(mask, np.zeros_like(mask) if lungs is None else lungs, len(class_names))
    for row in rows:
        index, here = row["slice"], counts[row["slice"]]
        if has_segmentation and not row["error"]:
            area, marked = int(here[:, 1:].sum()), ids[index].ravel()
            row["lesions"] = int(np.count_nonzero(np.bincount(marked)[1:]))
            left = (one.score for one in detections if one.place == index and marked[one.pixels].any())
            row["max_score"] = max(left, default=None)
            row |= {"lesion_area_mm2": area * volume.pixel_mm2, "lesion_fraction": area / int(here.sum())}
            row |= {} if lungs is None else involvement(here, volume.voxel_ml, class_names)

    return VolumePrediction(
        volume=volume,
        mask=volume.grid(mask),
        lesion_ids=volume.grid(ids),
        lungs=None if lungs is None else volume.grid(lungs),
        image=image,
        lesions=lesions,
        counts=counts,
        slices=tuple(rows),
        class_names=class_names,
        has_segmentation=has_segmentation,
        problems=tuple(problems),
        **facts,
    )


def _largest(shares: Mapping[str, float] | None) -> str | None:
    return max(shares, key=shares.__getitem__) if shares else None


def _label_map(prediction: Prediction) -> npt.NDArray[np.uint8]:
    """(H, W): the label at each pixel; where masks overlap, that of the best score."""
    labels = np.zeros(prediction.image_size, np.uint8)
    for lesion in np.argsort(prediction.scores, kind="stable").tolist():
        labels[prediction.masks[lesion]] = prediction.labels[lesion]
    return labels


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) >= 1 else f"{value:.2g}"


def _target(directory: PathLike, name: str | None, default: str) -> Callable[[str], Path]:
    """Suffix -> the path of a result."""
    if name is not None and (not name or Path(name).name != name):
        raise InputError(f"{name!r} is not a file name: pass the folder as directory and the name without it")
    return lambda suffix: Path(directory) / f"{name or default}{suffix}"
