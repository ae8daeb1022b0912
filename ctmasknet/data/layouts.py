"""What lies in the folders of a data set: layouts recognised, files matched by name, every problem collected.

`list_slices` gathers a data set's faults, for `open_dataset` to raise or a report to list.

The instances of a mask of class codes follow the rules of the released code: connected components (8-connected) of
a class, small ones left to the background. The label is the one of the pixel value, so a slice that holds
consolidation only is labelled consolidation.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor
from torchvision.ops import masks_to_boxes

from ctmasknet.data.slices import PICTURE_SUFFIXES, open_file, read_slice, reading, require_size
from ctmasknet.errors import ConfigError, CTMaskNetError, DataError, import_extra, typed
from ctmasknet.output import PathLike
from ctmasknet.registry import IMAGE_CLASSES, LESION_CLASSES, Task

BACKGROUND, LUNG, GGO, CONSOLIDATION = 0, 1, 2, 3
"""CNCB coding of the mask pixels."""

LesionClasses = Literal["merge", "both", "ggo"]
"""``"merge"``: GGO and consolidation are one class, lesion; ``"both"``: two classes; ``"ggo"``: GGO only."""

_MASK_VALUES: dict[str, tuple[tuple[int, ...], ...]] = {
    "merge": ((GGO, CONSOLIDATION),),
    "both": ((GGO,), (CONSOLIDATION,)),
    "ggo": ((GGO,),),
}
"""Mask values of each detector class, label 1 first."""

MAX_TARGET = 1 << 30  # pixels in all masks of a slice: 4096 lesions of 512 x 512
MAX_OUTLINE = 1_000_000  # pixels; length of a polygon, and largest of its coordinates


def instances(
    class_mask: np.ndarray, *, classes: LesionClasses = "merge", min_area: int = 100, source: str = "class mask"
) -> dict[str, Tensor]:
    """Split a mask of class codes into instances (paper, section 3; released code).

    Args:
        class_mask: (H, W) integers in the CNCB coding: 0 background, 1 lung, 2 GGO, 3 consolidation.
        classes: ``"merge"`` joins GGO and consolidation before components are taken and labels them 1;
            ``"both"`` labels GGO 1 and consolidation 2; ``"ggo"`` labels GGO 1 and ignores consolidation.
        min_area: components of this many pixels or fewer join the background; 0 keeps all.

    Returns:
        ``boxes`` (N, 4) float32, xyxy in pixels, half-open (x2 and y2 are one past the last pixel);
        ``labels`` (N,) int64; ``masks`` (N, H, W) uint8 in {0, 1}. Ordered by label, then in raster order.

    Raises:
        DataError: more lesions than a slice can have.
        MissingExtraError: there are lesions, and scipy (extra ``train``) is not installed.
    """
    masks: list[np.ndarray] = []
    labels: list[int] = []
    for label, values in enumerate(_MASK_VALUES[classes], start=1):
        wanted = np.isin(class_mask, values)
        if not wanted.any():
            continue
        ndimage = import_extra("scipy.ndimage", "train", "splitting masks into instances")
        components, _ = ndimage.label(wanted, structure=np.ones((3, 3), dtype=bool))
        areas = np.bincount(components.ravel())
        areas[0] = 0  # the background is no component
        kept = np.flatnonzero(areas > min_area)
        _require_few(len(labels) + len(kept), class_mask.shape, source)
        masks.append(components[None] == kept[:, None, None])
        labels += [label] * len(kept)
    return _target(masks, labels, class_mask.shape)


def _require_few(count: int, size: tuple[int, ...], source: str) -> None:
    if count * math.prod(size) > MAX_TARGET:
        raise DataError(f"{source}: {count} lesions in one slice cannot be right; draw them again")


def _target(masks: list[np.ndarray], labels: list[int], size: tuple[int, ...]) -> dict[str, Tensor]:
    """The target of a slice of `size` (H, W) from masks (N, H, W), several of them after each other."""
    stacked = torch.from_numpy(np.concatenate([np.zeros((0, *size), np.uint8), *masks]).astype(np.uint8, copy=False))
    return {"boxes": half_open_boxes(stacked), "labels": torch.tensor(labels, dtype=torch.int64), "masks": stacked}


def half_open_boxes(masks: Tensor) -> Tensor:
    """The tightest half-open boxes round `masks`, (N, H, W) of any dtype, none of them empty: (N, 4) float32."""
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1  # it gives the last pixel itself: a lesion one pixel wide had no width
    return boxes


def lesion_class_names(classes: LesionClasses) -> tuple[str, ...]:
    """Names of the detector's classes, background first, as the registry spells them."""
    return LESION_CLASSES[2] if classes == "merge" else LESION_CLASSES[3][: len(_MASK_VALUES[classes]) + 1]


def classes_of(class_names: Sequence[str]) -> LesionClasses:
    """The lesion classes that a segmenter of these class names (background first) tells apart in masks of class codes.

    Names that are none of ours say nothing of such masks: ``"merge"``, so that data and model are seen to differ.
    """
    fits = (classes for classes in get_args(LesionClasses) if same_names(class_names, lesion_class_names(classes)))
    return next(fits, "merge")


def same_names(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether class names mean the same classes, in the same order."""
    return [name.casefold() for name in one] == [name.casefold() for name in other]


Data = PathLike | Sequence[PathLike]
"""A folder or file, or several."""

Names = Data
"""Which slices to use: a text file that lists names, one per line, or the names themselves."""

IMAGE_SUFFIXES = (*PICTURE_SUFFIXES, ".dcm")

IMAGE_CLASS_WORDS = {
    "control": 0, "normal": 0, "healthy": 0,
    "pneumonia": 1, "commonpneumonia": 1, "cp": 1, "cap": 1,
    "covid": 2, "covid19": 2, "ncp": 2,
}  # fmt: skip
"""Words in file and folder names, lower case without punctuation, and the image class they mean."""

_CNCB = "[Class]_[PatientID]_[ScanNum]_[SliceNum]"
_CNCB_NAME = re.compile(r"(?P<image_class>[^_]+)_(?P<patient>[^_]+)_(?P<scan>[^_]+)_(?P<slice>[^_]+)")
_RELEASED_NAME = re.compile(r"(?P<patient>\d+)_\d+")
_SPLIT_FOLDERS = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file, and the fix; a list of names that leaves out the slice `name` leaves it out, too."""

    source: str
    reason: str
    name: str | None = None

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass(frozen=True)
class _Record:
    """A slice: its name, its image and, if known, its patient."""

    name: str
    image: Path
    patient: str | None


@dataclass(frozen=True)
class LesionRecord(_Record):
    """A slice of a CNCB folder, with a mask of class codes."""

    mask: Path
    classes: LesionClasses
    min_area: int

    def target(self) -> dict[str, Tensor]:
        codes = read_class_mask(self.mask)
        return instances(codes, classes=self.classes, min_area=self.min_area, source=str(self.mask))


@dataclass(frozen=True)
class CocoRecord(_Record):
    """A slice of a COCO file, with its annotations as (annotation id, label, segmentation)."""

    source: Path
    size: tuple[int, int]
    annotations: tuple[tuple[Any, int, Any], ...]
    min_area: int

    def target(self) -> dict[str, Tensor]:
        _require_few(len(self.annotations), self.size, str(self.source))
        masks: list[np.ndarray] = []
        labels: list[int] = []
        for identifier, label, segmentation in self.annotations:
            mask = decode_segmentation(segmentation, self.size, f"{self.source}: annotation {identifier}")
            if mask.sum() > self.min_area:
                masks.append(mask[None])
                labels.append(label)
        return _target(masks, labels, self.size)


@dataclass(frozen=True)
class ImageRecord(_Record):
    """A slice with a class of its own."""

    label: int


Record = LesionRecord | CocoRecord | ImageRecord


@dataclass
class Listing:
    """What is there, by names alone: usable `records`, `class_names`, and every problem on the way."""

    task: Task
    sources: list[Path]
    layouts: list[str] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def begin(self, layout: str, source: Path, class_names: tuple[str, ...]) -> None:
        """Say what the next records come from; their classes must be those of the records before."""
        self.layouts += [] if layout in self.layouts else [layout]
        if not self.records:
            self.class_names = class_names
        elif class_names != self.class_names:
            before = f"those of {self.sources[0]} {', '.join(self.class_names)}"
            self.report(source, f"its classes are {', '.join(class_names)}, {before}; give both the same")

    def report(self, source: PathLike, reason: str, name: str | None = None) -> None:
        """Add a problem."""
        self.problems.append(Problem(os.fspath(source), reason, name))

    @contextmanager
    def reading(self, path: Path, what: str) -> Iterator[None]:
        """Read a file; one that cannot be read is a problem, and the listing goes on without it."""
        try:
            with reading(str(path), what, DataError):
                yield
        except CTMaskNetError as error:
            self.report(path, str(error).removeprefix(f"{path}: "))


def read_image(path: Path) -> Tensor:
    """A slice as (1, H, W) uint8; 8-bit files keep their grey values exactly."""
    pixels = read_slice(path).pixels
    return torch.from_numpy(np.rint(pixels * 255).astype(np.uint8))[None]


def read_class_mask(path: Path) -> np.ndarray:
    """A mask file as (H, W) uint8 class codes, from grey or palette pixels; a DataError if it holds others."""
    with reading(str(path), "mask", DataError), open_file(str(path)) as stream:
        image = PngImageFile(stream)
        require_size((image.height, image.width), str(path))
        pixels = np.asarray(image)
    if pixels.dtype == bool:  # its 1 would pass for lung
        raise DataError(f"{path}: a mask of 1 bit has no class codes; save it with 8 bits, lesions as 2")
    if pixels.ndim == 3:
        colours = pixels[..., : 3 if pixels.shape[-1] >= 3 else 1]  # without alpha
        if (colours != colours[..., :1]).any():
            raise DataError(f"{path}: the mask is coloured; save the class codes 0 to 3 as a grey PNG")
        pixels = colours[..., 0]
    unknown = np.setdiff1d(pixels, (BACKGROUND, LUNG, GGO, CONSOLIDATION))
    if unknown.size:
        shown = ", ".join(map(str, unknown[:5])) + (", …" if unknown.size > 5 else "")
        raise DataError(
            f"{path}: unknown mask values {shown}; recode it to 0 background, 1 lung, "
            "2 ground glass opacity (or any lesion), 3 consolidation"
        )
    return pixels.astype(np.uint8)


def check_sizes(record: LesionRecord | CocoRecord, image_size: tuple[int, ...], mask_size: tuple[int, ...]) -> None:
    """Raise a DataError that names both files where the (H, W) of image and mask differ."""
    if image_size != mask_size:
        one, two = (f"{width}x{height}" for height, width in (image_size, mask_size))
        other = f"mask {record.mask}" if isinstance(record, LesionRecord) else f"its entry in {record.source}"
        raise DataError(f"{record.image}: the image is {one} pixels but {other} is {two}; export both from one slice")


def patient_of(name: str) -> str | None:
    """The patient in a CNCB file name `[Class]_[PatientID]_[ScanNum]_[SliceNum]`, None for other names."""
    match = _CNCB_NAME.fullmatch(slice_name(name))
    return match["patient"] if match and image_class_of(match["image_class"]) is not None else None


def shared_patients(one: Iterable[str | None], other: Iterable[str | None]) -> list[str]:
    """The known patients that two splits have in common, sorted."""
    theirs = set(other)
    return sorted({patient for patient in one if patient is not None and patient in theirs})


def image_class_of(word: str) -> int | None:
    """0 control, 1 pneumonia, 2 COVID-19 for a number or a word that means one; None for any other."""
    plain = re.sub(r"[^a-z0-9]", "", word.lower())
    if plain.isdigit():
        return int(plain) if int(plain) < len(IMAGE_CLASSES) else None
    return IMAGE_CLASS_WORDS.get(plain)


def list_slices(
    task: Task, data: Data, *, classes: LesionClasses = "merge", min_area: int = 100, names: Names | None = None
) -> Listing:
    """As `open_dataset`, but names what is wrong in `problems` instead of raising the first."""
    typed("task", task, Task)
    typed("classes", classes, LesionClasses)
    if min_area < 0:
        raise ConfigError(f"min_area is {min_area}: it is an area in pixels, use 0 to keep every component")
    found = Listing(task, _as_paths(data))
    with reading(", ".join(map(str, found.sources)), "data set", DataError):
        if task == "classification":
            _list_classification(found)
        for path in found.sources if task == "segmentation" else ():
            if json_path := _coco_file(path):
                _list_coco(found, json_path, min_area)
            else:
                _list_lesion_folder(found, path, classes, min_area)
        _finish(found, names)
    return found


def guess_task(data: Data) -> Task:
    """``"segmentation"`` for a COCO file or a folder with masks, else ``"classification"``."""
    first = _as_paths(data)[0]
    lesions = (first / "masks").is_dir() or (first / "imgs").is_dir() or _coco_file(first)
    return "segmentation" if lesions else "classification"


def _list_lesion_folder(found: Listing, root: Path, classes: LesionClasses, min_area: int) -> None:
    """Pair images `root/imgs/NAME.*` with masks of class codes `root/masks/NAME.png` (CNCB folders).

    Patients come from CNCB file names, else from an `index.csv` in the root or next to it (columns `name`, `patient`,
    optionally `split`, equal to the name of the root), else from names `PATIENT_SLICE` of two numbers, as the
    released lists have them.
    """
    found.begin("CNCB folders", root, lesion_class_names(classes))
    if not _is_cncb(root):
        found.report(root, _wrong_layout(root, "segmentation"))
        return
    images = _by_stem(_image_files(root / "imgs"), found)
    masks = _by_stem(sorted((root / "masks").glob("*.png")), found)
    if not images and not masks:
        found.report(root, "no images in imgs/; is it the right folder?")
    patients = _patient_index(root, found)
    for stem in sorted(images.keys() | masks.keys()):
        if stem not in masks:
            reason = f"no mask masks/{stem}.png; add it (all 0 if there is no lesion) or remove the image"
            found.report(images[stem], reason, stem)
        elif stem not in images:
            found.report(masks[stem], f"no image imgs/{stem}.*; add it or remove the mask", stem)
        else:
            released = _RELEASED_NAME.fullmatch(stem)
            patient = patient_of(stem) or patients.get(stem) or (released["patient"] if released else None)
            found.records.append(LesionRecord(stem, images[stem], patient, masks[stem], classes, min_area))


def _list_coco(found: Listing, json_path: Path, min_area: int) -> None:
    """Match the images and annotations of a COCO file: instances as polygons or RLE.

    Categories are numbered from 1 in the order of their ids. Boxes are taken from the masks. Crowd regions (`iscrowd`)
    are left out. Images lie in the folder of the JSON file, its `images` or `imgs`, or the same one folder up.
    """
    of_image: dict[Any, list[tuple[Any, int, Any]]] = defaultdict(list)
    with found.reading(json_path, "COCO file"), open_file(str(json_path)) as stream:
        content = json.load(stream)
        categories = {typed("category id", one["id"], int): str(one["name"]) for one in content["categories"]}
        labels = {identifier: label for label, identifier in enumerate(sorted(categories), start=1)}
        found.begin("COCO instances", json_path, ("background", *(categories[identifier] for identifier in labels)))
        images = {}
        for entry in content["images"]:
            size = (typed("height", entry["height"], int), typed("width", entry["width"], int))
            require_size(size, f"{json_path}: image {entry['file_name']}")
            images[entry["id"]] = (str(entry["file_name"]), size)
        for annotation in content["annotations"]:
            number, image_id, category = (annotation.get(key) for key in ("id", "image_id", "category_id"))
            if image_id not in images or category not in labels:
                reason = f"is of image {image_id} and category {category}, which are not both in the file"
                found.report(f"{json_path}: annotation {number}", reason)
            elif not annotation.get("iscrowd"):
                of_image[image_id].append((number, labels[category], annotation.get("segmentation")))

        homes = (json_path.parent, Path(os.path.realpath(json_path)).parent.parent)
        folders = [folder for home in homes for folder in (home, home / "images", home / "imgs")]
        for image_id, (file_name, size) in images.items():
            name, drawn = slice_name(file_name), tuple(of_image[image_id])
            image = next((folder / file_name for folder in folders if (folder / file_name).is_file()), None)
            if image is None:
                reason = f"image {file_name} is not in {folders[0]}; put the images there, or into images/"
                found.report(json_path, reason, name)
            else:
                found.records.append(CocoRecord(name, image, patient_of(name), json_path, size, drawn, min_area))


def _list_file_names(found: Listing, root: Path) -> None:
    """Take classes from CNCB names `[Class]_[PatientID]_[ScanNum]_[SliceNum]`, Class a number or a word."""
    found.begin("CNCB file names", root, IMAGE_CLASSES)
    files = _by_stem(_image_files(root), found)
    if not files:
        found.report(root, _wrong_layout(root, "classification"))
    for stem, path in files.items():
        match = _CNCB_NAME.fullmatch(stem)
        label = image_class_of(match["image_class"]) if match else None
        if label is None:
            found.report(path, f"the name does not tell the class; name it {_CNCB}, or use class folders", stem)
        else:
            found.records.append(ImageRecord(stem, path, patient_of(stem), label))


def _list_covidx(found: Listing, list_file: Path) -> None:
    """Take names and classes from a COVIDx-CT list: `FILENAME CLASS XMIN YMIN XMAX YMAX`; the box is not used.

    Its images lie in the folder `images` beside it or, without one, beside it.
    """
    found.begin("COVIDx-CT list", list_file, IMAGE_CLASSES)
    root = list_file.parent / "images"
    root = root if root.is_dir() else list_file.parent
    by_stem = _by_stem(_image_files(root), found)
    listed: Counter[str] = Counter()
    for number, (file_name, label) in enumerate(_list_entries(list_file, found), start=1):
        source, name = f"{list_file}, entry {number}", slice_name(file_name)
        image = root / file_name if (root / file_name).is_file() else by_stem.get(name)
        listed[file_name] += 1
        if label is None or label >= len(IMAGE_CLASSES):
            found.report(source, f"{file_name} has no class 0, 1 or 2; write FILENAME CLASS XMIN YMIN XMAX YMAX")
        elif image is None:
            found.report(source, f"{file_name} is not in {root}; correct the list or add the image")
        elif listed[file_name] > 1:
            found.report(source, f"{file_name} is listed twice; remove one")
        else:
            found.records.append(ImageRecord(name, image, patient_of(name), label))


def _list_class_folders(found: Listing, roots: Sequence[Path]) -> None:
    """Take classes from folder names (`class_folder_names` numbers them); images lie at any depth below."""
    folders = [folder for root in roots for folder in _class_folders(root)]
    numbering, class_names = class_folder_names(folder.name for folder in folders)
    found.begin("class folders", roots[0], class_names)
    for folder in folders:
        for path in _image_files(folder, deep=True):
            # A folder between class and image is a patient's; p1 of one class is not p1 of another.
            below = path.relative_to(folder).parts[:-1]
            patient = patient_of(path.stem) or (f"{folder.name}/{below[0]}" if below else None)
            found.records.append(ImageRecord(path.stem, path, patient, numbering[folder.name]))


def class_folder_names(folders: Iterable[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Number class folders: their labels, and the class names in order.

    Names that all mean control, pneumonia or COVID-19 (`image_class_of`) get these numbers, whichever are present.
    Whole numbers below 1000 are their own labels. Others are numbered as they sort, with a word for control at 0.
    """
    names = sorted(set(folders))
    known = [image_class_of(name) for name in names]
    if None not in known:
        return {name: cast(int, label) for name, label in zip(names, known, strict=True)}, IMAGE_CLASSES
    if all(re.fullmatch("[0-9]{1,3}", name) for name in names):
        numbers = {name: int(name) for name in names}
        return numbers, tuple(str(number) for number in range(max(numbers.values()) + 1))
    names.sort(key=lambda name: image_class_of(name) != 0)
    return {name: label for label, name in enumerate(names)}, tuple(names)


def _list_classification(found: Listing) -> None:
    with_class_folders: list[Path] = []  # whose classes are numbered together
    for path in found.sources:
        if path.suffix == ".txt" and path.is_file():
            _list_covidx(found, path)
        elif not _image_files(path) and _class_folders(path):
            with_class_folders.append(path)
        else:
            _list_file_names(found, path)
    if with_class_folders:
        _list_class_folders(found, with_class_folders)


def _finish(found: Listing, names: Names | None) -> None:
    """Keep what `names` tells, make names unique, and see that something is left."""
    if names is not None:
        if isinstance(names, str | os.PathLike):
            source, given = str(names), [name for name, _ in _list_entries(Path(names), found)]
        else:
            source, given = "names", [str(name) for name in names]
        wanted = {slice_name(name) for name in given}
        there = {record.image.stem for record in found.records} | {problem.name for problem in found.problems}
        found.records = [record for record in found.records if record.image.stem in wanted]
        found.problems = [problem for problem in found.problems if problem.name is None or problem.name in wanted]
        where = ", ".join(map(str, found.sources))
        for name in sorted(wanted - there):
            found.report(source, f"{name} is listed but not in {where}; correct the list or add the file")
    counts = Counter(record.name for record in found.records)
    if any(count > 1 for count in counts.values()):
        files = Counter(os.path.realpath(record.image) for record in found.records)
        for path, count in files.items():
            if count > 1:
                found.report(path, f"this file is in the data {count} times; pass every folder once")
        found.records = [
            replace(record, name=record.image.as_posix()) if counts[record.name] > 1 else record
            for record in found.records
        ]
    if not found.records and not found.problems:
        found.report(", ".join(map(str, found.sources)), "no slices found; is it the right folder?")


def _as_paths(data: Data) -> list[Path]:
    paths = [Path(data)] if isinstance(data, str | os.PathLike) else [Path(path) for path in data]
    if not paths:
        raise ConfigError("no data: pass a folder or a file")
    return paths


def slice_name(name: str) -> str:
    """The name without folders and without an image's ending; dots elsewhere are part of the name."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    return last[: -len(Path(last).suffix)] if Path(last).suffix.lower() in IMAGE_SUFFIXES else last


def _image_files(folder: Path, *, deep: bool = False) -> list[Path]:
    if not folder.is_dir():
        return []
    files = folder.rglob("*") if deep else folder.iterdir()
    return sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))


def _by_stem(files: Iterable[Path], found: Listing) -> dict[str, Path]:
    """Files by their stem; two of one stem in a folder are a problem."""
    by_stem: dict[str, Path] = {}
    for path in files:
        first = by_stem.setdefault(path.stem, path)
        if first != path:
            found.report(path, f"same name as {first.name} in the same folder; keep one of the two", path.stem)
    return by_stem


def _class_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    splits = {path.name.lower() for path in folders} & (_SPLIT_FOLDERS | {"imgs", "masks"})
    return [] if splits else [path for path in folders if _image_files(path, deep=True)]


def _list_entries(list_file: Path, found: Listing) -> list[tuple[str, int | None]]:
    """File names of a list and, where it says them, classes. Empty lines and comments (#) are skipped."""
    lines: list[str] = []
    with found.reading(list_file, "list of names"), open_file(str(list_file)) as stream:
        # A name that is no Unicode is a name all the same.
        lines = stream.read().decode("utf-8", errors="surrogateescape").splitlines()
    entries: list[tuple[str, int | None]] = []
    for line in map(str.strip, lines):
        if not line or line.startswith("#"):
            continue
        # From the right, because names may hold blanks.
        match = re.fullmatch(r"(.+?)\s+(\d{1,9})(?:\s+-?\d+){4}", line) or re.fullmatch(r"(\S+)\s+(\d{1,9})", line)
        entries.append((match[1], int(match[2])) if match else (line, None))
    return entries


def _patient_index(root: Path, found: Listing) -> dict[str, str]:
    """Patients by name from index.csv in `root` or the folder that holds it; empty without one."""
    home = Path(os.path.realpath(root))
    path = next((path for path in (home / "index.csv", home.parent / "index.csv") if path.is_file()), None)
    if path is None:
        return {}
    rows: list[dict[str, str]] = []
    with found.reading(path, "index of patients"), path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("name") and row.get("patient")]
    of_split = [row for row in rows if row.get("split") == home.name]
    nobody = {"unknown", "none", "nan", "-", "?"}
    return {slice_name(row["name"]): row["patient"] for row in of_split or rows if row["patient"].lower() not in nobody}


def _coco_file(path: Path) -> Path | None:
    """The COCO file that `path` is or, unless it has CNCB folders, the only JSON file in it."""
    if path.suffix.lower() == ".json":
        return path
    files = [] if _is_cncb(path) else list(path.glob("*.json"))
    return files[0] if len(files) == 1 else None


def _is_cncb(path: Path) -> bool:
    return (path / "imgs").is_dir() and (path / "masks").is_dir()


def _wrong_layout(root: Path, task: Task) -> str:
    """Why `root` is none of the layouts of `task`, and what may be meant."""
    if not root.exists():
        return "there is no such file or folder"
    if not root.is_dir():
        return f"neither a folder nor {'a COCO .json' if task == 'segmentation' else 'a COVIDx-CT .txt list'}"
    inside = sorted(path.name for path in root.iterdir())
    if not inside:
        return "the folder is empty"
    splits = [name for name in inside if name.lower() in _SPLIT_FOLDERS]
    if splits:
        return f"holds several splits; pass one of them, such as {root / splits[0]}"
    if task == "segmentation":
        return "no CNCB folders (imgs/ and masks/) and no COCO .json in it"
    if "masks" in inside:
        return "holds lesion masks, which train a segmentation variant; classification needs an image class"
    return f"no images in it; give images named {_CNCB}, class folders, or a COVIDx-CT list"


def decode_segmentation(segmentation: Any, size: tuple[int, int], source: str) -> np.ndarray:
    """COCO polygons, RLE or compressed RLE as a mask (H, W) uint8.

    Raises:
        DataError: none of these, or of another size; the text starts with `source`.
        MissingExtraError: polygons need pycocotools (extra ``train``).
    """
    height, width = size
    with reading(source, "mask", DataError):
        if not segmentation:
            raise ValueError("it has no segmentation; a box alone is not enough")
        if not isinstance(segmentation, dict):
            for polygon in segmentation:
                corners = np.array(polygon, np.float64).reshape(-1, 2)
                outline = np.abs(np.diff(corners, axis=0, append=corners[:1])).max(axis=1).sum()
                if len(corners) < 3:
                    raise ValueError("a polygon needs an even number of coordinates, at least 6")
                if not (outline <= MAX_OUTLINE and np.abs(corners).max() <= MAX_OUTLINE):
                    raise ValueError(f"a polygon reaches over {MAX_OUTLINE:,} pixels")
            coco = import_extra("pycocotools.mask", "train", "decoding COCO polygons")
            return coco.decode(coco.merge(coco.frPyObjects(segmentation, height, width)))
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"its RLE is for size {segmentation['size']}, the image is {list(size)}")
        counts = segmentation["counts"]
        runs = np.array(_run_lengths(counts) if isinstance(counts, str) else counts, np.int64)
        if ((runs < 0) | (runs > height * width)).any() or runs.sum() != height * width:
            raise ValueError(f"its RLE covers {runs.sum()} of {height * width} pixels")
        return np.repeat(np.arange(len(runs), dtype=np.uint8) % 2, runs).reshape(width, height).T


def _run_lengths(text: str) -> list[int]:
    """COCO's compressed counts: groups of five bits, lowest first, each the difference to the count before the last."""
    counts: list[int] = []
    value = shift = 0
    for code in text.encode("ascii"):
        bits = code - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{chr(code)!r} in its counts is no RLE")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last group of a count; its highest bit is the sign
            value -= (bits & 16) << (shift - 4)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("its counts break off")
    return counts
