"""From an image to a `Prediction`: one object that holds a segmenter and a classifier, and one function."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ctmasknet.data.scans import Volume, open_volume
from ctmasknet.data.slices import Slice, read_slice
from ctmasknet.errors import ConfigError, CTMaskNetError, InputError
from ctmasknet.models import Model
from ctmasknet.models.config import model_config
from ctmasknet.models.detector import LesionMaskRCNN
from ctmasknet.models.inference import (
    FastInference,
    Found,
    Reading,
    computes_bfloat16,
    heads_set_to,
    same_detector,
    score_maps,
)
from ctmasknet.registry import Task
from ctmasknet.results import Prediction, RoIBatch, VolumePrediction, gather
from ctmasknet.zoo import DEFAULT, choose_device, class_names, open_model

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor | Slice
Precision = Literal["auto", "float32", "bfloat16"]
Key = TypeVar("Key")
Other = TypeVar("Other")
Item = TypeVar("Item")


class OutOfMemoryError(InputError):
    """A slice that does not fit into the memory of the device, even alone."""


class Predictor:
    """Segments lesions in chest CT slices and classifies the slices.

    Args:
        segmenter, classifier: the name of a variant (with its default weights), the path of a folder of weights, a
            Hub repository (``"owner/name@revision"``), or a model; None leaves that task out. `DEFAULT` takes the
            bundled ones.
        device: ``"cpu"``, ``"cuda"``, ...; None takes a GPU if there is one. A model passed in is moved there.
        batch_size: slices per forward in `batch`; None takes 1 on the CPU, where larger batches are not faster, and 8
            elsewhere.
        score_threshold: report lesions scored above this, in 0..1. None takes the operating point stored with
            the weights; without one, the model's own setting (the paper's: 0.75).
        precision: of the convolutions of backbone, FPN and RPN; box arithmetic is float32 always. ``"auto"`` takes
            ``"bfloat16"`` where the device has units for it, ``"float32"`` elsewhere.
        score_map: also give `Prediction.score_map`, at the price of another pass of the segmenter.

    Slices go through `ctmasknet.models.inference`, which gives the models' own detections up to rounding; where
    classifier and segmenter hold the same detector, it runs once for both.

    Raises:
        ConfigError: unknown variant, device or precision; a model of the other task; a threshold outside 0..1.
        WeightsError: weights missing or damaged.
    """

    def __init__(
        self,
        segmenter: str | os.PathLike[str] | Model | None = DEFAULT,
        classifier: str | os.PathLike[str] | Model | None = DEFAULT,
        *,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        score_threshold: float | None = None,
        precision: Precision = "auto",
        score_map: bool = False,
    ) -> None:
        if segmenter is None and classifier is None:
            raise ConfigError("nothing to predict: give a segmenter, a classifier, or both")
        if score_threshold is not None and not 0 <= score_threshold <= 1:
            raise ConfigError(f"score_threshold={score_threshold}: must lie in 0..1")
        if precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"precision={precision!r}: use 'auto', 'float32' or 'bfloat16'")
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: must be at least 1")
        self.device = choose_device(device)
        self.batch_size = batch_size or (1 if self.device.type == "cpu" else 8)
        self.segmenter, self.classifier = (
            None if given is None else open_model(given, task=task, device=self.device).eval()
            for given, task in zip((segmenter, classifier), get_args(Task), strict=True)
        )
        self.score_threshold: float | None = None
        self.nms_threshold = 0.0
        if self.segmenter is not None:
            stored, self.nms_threshold = operating_point(self.segmenter)
            self.score_threshold = stored if score_threshold is None else float(score_threshold)
        models = (self.segmenter, self.classifier)
        self.caveats = tuple(m.metadata["caveat"] for m in models if m is not None and "caveat" in m.metadata)
        if precision == "auto":
            precision = "bfloat16" if computes_bfloat16(self.device) else "float32"
        self.precision = precision
        self.score_map = score_map
        self._fast: dict[Task, FastInference] = {}
        self._one_detector = False

    def __call__(self, image: ImageLike, *, units: str | None = None) -> Prediction:
        """Predict one slice.

        Args:
            image: path of a PNG, JPEG, WebP, TIFF or single-slice DICOM file; a PIL image; an array or tensor, uint8
                or float in 0..1, shaped (H, W), (H, W, C) or (C, H, W) with C of 1 or 3.
            units: ``"hu"`` if the values are Hounsfield units, ``"range"`` to stretch the slice's own range.

        Raises:
            InputError: the image cannot be used; names the file and the fix.
        """
        return next(self.batch([image], units=units))

    def batch(self, images: Iterable[ImageLike], *, units: str | None = None) -> Iterator[Prediction]:
        """Predict many slices, in order, `batch_size` at a time; reads them as it goes.

        Raises:
            InputError: at the first image that cannot be used.
        """
        slices = (image if isinstance(image, Slice) else read_slice(image, units=units) for image in images)
        while chunk := list(itertools.islice(slices, self.batch_size)):
            yield from self._predict_in_memory(chunk)

    def stream(
        self, reads: Iterable[tuple[Key, Slice | Other]]
    ) -> Iterator[tuple[Key, Prediction | Other | CTMaskNetError]]:
        """Predict slices that are read elsewhere, in order and in batches, past errors.

        Args:
            reads: pairs of anything to know a slice by and the slice; what is no slice, such as the reason why
                there is none, passes through in its place.

        Yields:
            The key with the prediction, or with the error of a slice too large for the device's memory.
        """
        waiting: list[tuple[Key, Slice | Other]] = []
        for read in reads:
            waiting.append(read)
            if len(waiting) >= self.batch_size:
                yield from self._predict_past_errors(waiting)
                waiting = []
        yield from self._predict_past_errors(waiting)

    def volume(
        self,
        scan: str | os.PathLike[str] | Volume,
        *,
        units: str | None = None,
        series: str | None = None,
        spacing: tuple[float, float, float] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> VolumePrediction:
        """Predict a whole scan, slice by slice (extra ``io``); slices that cannot be used are reported in it.

        Args:
            scan: a folder with a DICOM series, a DICOM file of one or many frames, a NIfTI file, or what `open_volume`
                gave.
            units, series, spacing: see `ctmasknet.data.scans.open_volume`.
            progress: called with the numbers of slices done and in all.

        Raises:
            InputError: not a scan, not on an even grid, or without a usable slice; names the file and the fix.
            MissingExtraError: pydicom, nibabel or the decoder is not installed.
        """
        volume = scan if isinstance(scan, Volume) else open_volume(scan, units=units, series=series, spacing=spacing)
        results = self.stream(volume.slices())
        return gather(
            volume,
            results if progress is None else _counted(results, len(volume.names), progress),
            class_names=("background",) if self.segmenter is None else class_names(self.segmenter),
            score_threshold=self.score_threshold,
            has_segmentation=self.segmenter is not None,
            caveats=self.caveats,
        )

    def _predict_past_errors(
        self, reads: list[tuple[Key, Slice | Other]]
    ) -> Iterator[tuple[Key, Prediction | Other | CTMaskNetError]]:
        slices = [read for _, read in reads if isinstance(read, Slice)]
        try:
            results: Iterator[Prediction | CTMaskNetError] = iter(self._predict_in_memory(slices))
        except OutOfMemoryError:
            results = iter([self._alone(one) for one in slices])
        for key, read in reads:
            yield key, next(results) if isinstance(read, Slice) else read

    def _alone(self, one: Slice) -> Prediction | CTMaskNetError:
        try:
            return self._predict_in_memory([one])[0]
        except OutOfMemoryError as error:
            return error

    def _predict_in_memory(self, slices: list[Slice]) -> list[Prediction]:
        """Predict; where the device's memory does not suffice, halve the batch, for good, and go on.

        Raises:
            OutOfMemoryError: one slice alone is too much.
        """
        results: list[Prediction] = []
        while len(results) < len(slices):
            chunk = slices[len(results) : len(results) + self.batch_size]
            try:
                results += self._predict(chunk)
                continue
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            # Outside the handler, which holds on to the tensors of the failed forward.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(chunk) == 1:
                raise OutOfMemoryError(
                    f"{chunk[0].source}: out of memory on {self.device} with a single slice ({reason}). "
                    "Free the device, or pass device='cpu'."
                )
            self.batch_size = len(chunk) // 2
            warnings.warn(
                f"out of memory on {self.device} with {len(chunk)} slices: going on with batches of {self.batch_size}",
                stacklevel=2,
            )
        return results

    def _predict(self, slices: list[Slice]) -> list[Prediction]:
        tensors = [torch.from_numpy(s.pixels).to(self.device).expand(3, -1, -1) for s in slices]
        self._prepare()
        found: list[Found] | list[None] = [None] * len(slices)
        classified: list[dict[str, Tensor]] | list[None] = [None] * len(slices)
        maps: list[Tensor] | list[None] = [None] * len(slices)
        with torch.inference_mode():
            reading: Reading | None = None
            if isinstance(self.segmenter, LesionMaskRCNN):
                fast = self._fast["segmentation"]
                reading = fast.read(tensors)
                heads = self.segmenter.roi_heads
                with heads_set_to(heads, score_thresh=self.score_threshold, nms_thresh=self.nms_threshold):
                    found = fast.segment(reading)
                if self.score_map:
                    maps = score_maps(self.segmenter, tensors, nms_threshold=self.segmenter.config.box_nms_thresh)
            if self.classifier is not None:
                fast = self._fast["classification"]
                if reading is None or not self._one_detector:
                    reading = fast.read(tensors)
                classified = fast.classify(reading)
            return [self._result(*item) for item in zip(slices, found, classified, maps, strict=True)]

    def _prepare(self) -> None:
        """Make what is fast of the models, again if their weights have changed since."""
        models = [model for model in (self.segmenter, self.classifier) if model is not None]
        fast = [self._fast.get(model.variant.task) for model in models]
        if all(one is not None and one.is_current() for one in fast):
            return
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        self._fast = {model.variant.task: FastInference(model, dtype) for model in models}
        self._one_detector = len(models) == 2 and same_detector(*models)

    def _result(
        self,
        source: Slice,
        found: Found | None,
        classified: dict[str, Tensor] | None,
        score_map: Tensor | None,
    ) -> Prediction:
        height, width = source.pixels.shape
        names: tuple[str, ...] = ("background",)
        if self.segmenter is not None:
            names = class_names(self.segmenter)
        lesions: dict[str, Any] = {
            "boxes": np.zeros((0, 4), np.float32),
            "scores": np.zeros(0, np.float32),
            "labels": np.zeros(0, np.int64),
            "masks": np.zeros((0, height, width), bool),
        }
        if found is not None:
            lesions = {key: getattr(found, key).cpu().numpy() for key in lesions}
        probabilities, roi_batch = None, None
        if classified is not None and self.classifier is not None:
            values = classified["probabilities"].cpu().tolist()
            probabilities = dict(zip(class_names(self.classifier), values, strict=True))
            roi_batch = RoIBatch(*(classified[key].cpu().numpy() for key in ("boxes", "scores", "labels", "deltas")))
        return Prediction(
            image_size=(height, width),
            **lesions,
            class_probabilities=probabilities,
            roi_batch=roi_batch,
            class_names=names,
            image=source.pixels,
            units=source.units,
            source=source.source,
            score_threshold=self.score_threshold,
            has_segmentation=found is not None,
            caveats=self.caveats,
            score_map=None if score_map is None else score_map.cpu().numpy(),
        )


def _counted(items: Iterable[Item], total: int, progress: Callable[[int, int], None]) -> Iterator[Item]:
    for done, item in enumerate(items, start=1):
        progress(done, total)
        yield item


def predict(image: ImageLike, *, units: str | None = None, **options: Any) -> Prediction:
    """Predict one slice with a new `Predictor(**options)`; for many slices, keep a `Predictor`."""
    return Predictor(**options)(image, units=units)


def operating_point(model: Model) -> tuple[float, float]:
    """Score and NMS threshold: the weights' own, unless the model was built with others than the variant's defaults."""
    config, default = model.config, model_config(model.variant)
    own = config.box_score_thresh, config.box_nms_thresh
    if own != (default.box_score_thresh, default.box_nms_thresh):
        return own
    stored = model.metadata.get("operating_point", {})
    return stored.get("score_threshold", own[0]), stored.get("nms_threshold", own[1])
