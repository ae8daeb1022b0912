"""From an image to a `Prediction`: one object that holds a segmenter and a classifier, and one function."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ctmasknet.data.scans import Volume, is_scan, open_volume
from ctmasknet.data.slices import Slice, local, read_slice, require_finite
from ctmasknet.errors import ConfigError, CTMaskNetError, InputError
from ctmasknet.models import Model
from ctmasknet.models.detector import LesionMaskRCNN
from ctmasknet.models.inference import Inference, Precision, Protocol, Reading, dtype_of, same_detector
from ctmasknet.registry import Task
from ctmasknet.results import Keep, Prediction, RoIBatch, VolumePrediction, counted, gather
from ctmasknet.weights.files import state_digest
from ctmasknet.zoo import DEFAULT, choose_device, class_names, open_model

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor | Slice
Key = TypeVar("Key")
Other = TypeVar("Other")
Item = TypeVar("Item")


class Predictor:
    """Segments lesions in chest CT slices and classifies the slices.

    Args:
        segmenter, classifier: the name of a variant (with its default weights), a folder or file of weights, a Hub
            repository (``"owner/name@revision"``), an author's ``.pth``, or a model; None leaves that task out.
            `DEFAULT` takes the bundled ones.
        device: ``"cpu"``, ``"cuda"``, ...; None takes a GPU if there is one. A model passed in is moved there.
        batch_size: slices per forward in `batch`; None takes 1 on the CPU, where larger batches are not faster, and 8
            elsewhere. A slice's result does not depend on it.
        score_threshold: report lesions scored above this, in 0..1. None takes the model's own: the operating point
            stored with its weights; without one, or for a model built otherwise, what it was built with (0.75).
        nms_threshold: drop lesions that overlap a better one of their class by more than this IoU; None as above.
        precision: of the convolutions of backbone, FPN and RPN; box arithmetic is float32 always. ``"float32"`` gives
            the models' own results up to rounding; ``"bfloat16"`` and, on a GPU, ``"float16"`` are faster where the
            device has units for them, and change results (docs/predict.md).
        score_map: also give `Prediction.score_map`.

    Slices go through `ctmasknet.models.inference`; where classifier and segmenter hold the same detector, it runs once
    for both. Several threads may use one Predictor; a model passed in keeps its mode and settings, and changes of its
    weights are seen.

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
        nms_threshold: float | None = None,
        precision: Precision = "float32",
        score_map: bool = False,
    ) -> None:
        if segmenter is None and classifier is None:
            raise ConfigError("nothing to predict: give a segmenter, a classifier, or both")
        for name, value in (("score_threshold", score_threshold), ("nms_threshold", nms_threshold)):
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name}={value}: must lie in 0..1")
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: must be at least 1")
        self.device = choose_device(device)
        dtype_of(precision, self.device)
        self.precision = precision
        self.batch_size = batch_size or (1 if self.device.type == "cpu" else 8)
        self.segmenter, self.classifier = (
            None if given is None else open_model(given, task=task, device=self.device)
            for given, task in zip((segmenter, classifier), get_args(Task), strict=True)
        )
        self.score_threshold: float | None = None
        self.nms_threshold: float | None = None
        if isinstance(self.segmenter, LesionMaskRCNN):
            own = Protocol.of(self.segmenter)
            self.score_threshold = own.score_threshold if score_threshold is None else float(score_threshold)
            self.nms_threshold = own.nms_threshold if nms_threshold is None else float(nms_threshold)
        models = (self.segmenter, self.classifier)
        self.caveats = tuple(m.metadata["caveat"] for m in models if m is not None and "caveat" in m.metadata)
        self.score_map = score_map
        self._class_names = ("background",) if self.segmenter is None else class_names(self.segmenter)
        self._prepared: tuple[dict[Task, Inference], bool] = ({}, False)

    def __repr__(self) -> str:
        """What it runs, in a line."""
        names = [None if model is None else model.variant.name for model in (self.segmenter, self.classifier)]
        options = [f"{name}={getattr(self, name)!r}" for name in ("score_threshold", "nms_threshold", "precision")]
        return f"Predictor({', '.join([*map(repr, names), *options])}, device={str(self.device)!r})"

    @property
    def models(self) -> dict[str, dict[str, Any] | None]:
        """Its segmenter and classifier: variant, SHA-256 of the weights as they are now, config; None for none."""

        def facts(model: Model | None) -> dict[str, Any] | None:
            if model is None:
                return None
            digest = state_digest(model.state_dict())
            return {"variant": model.variant.name, "sha256": digest, "config": model.config.to_dict()}

        return {"segmenter": facts(self.segmenter), "classifier": facts(self.classifier)}

    def __call__(self, image: ImageLike, *, units: str | None = None) -> Prediction:
        """Predict one slice.

        Args:
            image: path or URL of a PNG, JPEG, WebP, TIFF or single-slice DICOM file; a PIL image; an array or tensor,
                uint8 or float in 0..1, shaped (H, W), (H, W, C) or (C, H, W) with C of 1 or 3. For a scan, see
                `volume`.
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
        reads = ((None, image if isinstance(image, Slice) else read_slice(image, units=units)) for image in images)
        for _, result in self.stream(reads):
            if isinstance(result, CTMaskNetError):
                raise result
            yield result

    def stream(
        self, reads: Iterable[tuple[Key, Slice | Other]]
    ) -> Iterator[tuple[Key, Prediction | Other | CTMaskNetError]]:
        """Predict slices that are read elsewhere, in order and in batches, past errors.

        Args:
            reads: pairs of anything to know a slice by and the slice; what is no slice, such as the reason why
                there is none, passes through in its place.

        Yields:
            The key with the prediction, or with the error of a slice that holds NaN or is too large for the device's
            memory.
        """
        waiting = iter(reads)
        while chunk := list(itertools.islice(waiting, self.batch_size)):
            items = [_checked(item) if isinstance(item, Slice) else item for _, item in chunk]
            results = iter(self._predict_in_memory([item for item in items if isinstance(item, Slice)]))
            for (key, _), item in zip(chunk, items, strict=True):
                yield key, next(results) if isinstance(item, Slice) else item

    def volume(
        self,
        scan: str | os.PathLike[str] | Volume | Any,
        *,
        units: str | None = None,
        series: str | None = None,
        spacing: tuple[float, float, float] | None = None,
        keep: Keep = "all",
        progress: bool | Callable[[int, int], None] = False,
    ) -> VolumePrediction:
        """Predict a whole scan, slice by slice (extra ``io``); slices that cannot be used are reported in it.

        Args:
            scan: whatever `ctmasknet.data.scans.open_volume` takes, or what it gave: a folder with a DICOM series, a
                DICOM file of one or many frames, a NIfTI file, an image of nibabel or SimpleITK, an array (S, H, W).
            units, series, spacing: see `ctmasknet.data.scans.open_volume`.
            keep: ``"lungs"`` drops lesions that lie outside the lungs, where lungs are found.
            progress: True shows a bar on a terminal; a function is called with the numbers of slices done and in all.

        Raises:
            InputError: not a scan, not on an even grid, or without a usable slice; names the file and the fix. Or the
                Predictor was made to give score maps, which scans do not have.
            MissingExtraError: pydicom, nibabel or the decoder is not installed.
        """
        if keep not in get_args(Keep):
            raise ConfigError(f"keep={keep!r}: use 'all' or 'lungs'")
        volume = scan if isinstance(scan, Volume) else open_volume(scan, units=units, series=series, spacing=spacing)
        if self.score_map:
            raise InputError(f"{volume.source}: a scan has no score map: predict it without score_map=True")
        models = self.models.items()
        return gather(
            volume,
            _counted(self.stream(volume.slices()), len(volume.names), progress),
            keep,
            class_names=self._class_names,
            score_threshold=self.score_threshold,
            has_segmentation=self.segmenter is not None,
            caveats=self.caveats,
            models={slot: one and {key: one[key] for key in ("variant", "sha256")} for slot, one in models},
        )

    def _predict_in_memory(self, slices: list[Slice]) -> list[Prediction | InputError]:
        """Predict; where the device's memory does not suffice, halve the batch, for good, and go on.

        The result of a slice that is too much alone is the error.
        """
        results: list[Prediction | InputError] = []
        while len(results) < len(slices):
            chunk = slices[len(results) : len(results) + self.batch_size]
            try:
                results += self._predict(chunk)
                continue
            except torch.OutOfMemoryError as error:
                seen = counted(len(chunk), "slice")
                reason = f"out of memory on {self.device} with {seen} ({str(error).splitlines()[0]})"
            # Outside the handler, which holds on to the tensors of the failed forward.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(chunk) == 1:
                results.append(InputError(f"{chunk[0].source}: {reason}. Free the device, or pass device='cpu'."))
            else:
                self.batch_size = len(chunk) // 2
                warnings.warn(f"{reason}: going on with batches of {self.batch_size}", stacklevel=2)
        return results

    def _predict(self, slices: list[Slice]) -> list[Prediction]:
        on_gpu = self.device.type == "cuda"
        pixels = [torch.from_numpy(s.pixels) for s in slices]
        pixels = [p.pin_memory() for p in pixels] if on_gpu else pixels
        tensors = [p.to(self.device, non_blocking=True).expand(3, -1, -1) for p in pixels]
        inferences, one_detector = self._prepare()
        segmenter, classifier = inferences.get("segmentation"), inferences.get("classification")
        found: list[dict[str, Tensor]] = [{} for _ in slices]
        readings: list[Reading] | None = None
        if segmenter is not None:
            thresholds: dict[str, Any] = {key: getattr(self, key) for key in ("score_threshold", "nms_threshold")}
            protocol = replace(Protocol.of(segmenter.model), **thresholds)
            readings = segmenter.read(tensors)
            for one, reading in zip(found, readings, strict=True):
                one |= vars(segmenter.detect(reading, protocol)[0])
                if self.score_map:
                    one["score_map"] = segmenter.score_map(reading)
        if classifier is not None:
            if readings is None or not one_detector:
                readings = classifier.read(tensors)
            for one, reading in zip(found, readings, strict=True):
                one |= {f"roi_{key}": value for key, value in classifier.classify(reading).items()}
        # From a GPU into pinned memory, and one wait for all.
        hosts = [{key: value.to("cpu", non_blocking=True) for key, value in one.items()} for one in found]
        if on_gpu:
            torch.cuda.current_stream(self.device).synchronize()
        arrays = [{key: value.numpy() for key, value in one.items()} for one in hosts]
        return list(map(self._result, slices, arrays))

    def _prepare(self) -> tuple[dict[Task, Inference], bool]:
        """What runs the models, and whether a reading of the segmenter's serves the classifier.

        Made again if their weights have changed since. In threads the last made stays.
        """
        models = [model for model in (self.segmenter, self.classifier) if model is not None]
        prepared = self._prepared
        made = [prepared[0].get(model.variant.task) for model in models]
        if not all(one is not None and one.is_current() for one in made):
            inferences = {model.variant.task: Inference(model, self.precision) for model in models}
            prepared = self._prepared = inferences, len(models) == 2 and same_detector(*models)
        return prepared

    def _result(self, source: Slice, found: dict[str, np.ndarray]) -> Prediction:
        height, width = source.pixels.shape
        probabilities, roi_batch = None, None
        if self.classifier is not None:
            names, values = class_names(self.classifier), found["roi_probabilities"].tolist()
            probabilities = dict(zip(names, values, strict=True))
            roi_batch = RoIBatch(*(found[f"roi_{key}"] for key in ("boxes", "scores", "labels", "deltas")))
        return Prediction(
            image_size=(height, width),
            boxes=found.get("boxes", np.zeros((0, 4), np.float32)),
            scores=found.get("scores", np.zeros(0, np.float32)),
            labels=found.get("labels", np.zeros(0, np.int64)),
            masks=found.get("masks", np.zeros((0, height, width), bool)),
            class_probabilities=probabilities,
            roi_batch=roi_batch,
            class_names=self._class_names,
            image=source.pixels,
            units=source.units,
            in_hu=source.in_hu,
            steps=source.steps,
            source=source.source,
            score_threshold=self.score_threshold,
            has_segmentation=self.segmenter is not None,
            caveats=self.caveats,
            score_map=found.get("score_map"),
        )


def _checked(one: Slice) -> Slice | InputError:
    """The slice, if its values are what the models take; read_slice sees to it, others may not."""
    try:
        require_finite(one.pixels, one.source)
    except InputError as error:
        return error
    if one.pixels.min() < 0 or one.pixels.max() > 1:
        return InputError(f"{one.source}: values outside 0..1; read it with read_slice, which puts HU into the window")
    return one


def _counted(items: Iterable[Item], total: int, progress: bool | Callable[[int, int], None]) -> Iterator[Item]:
    bar = tqdm(items, total=total, unit="slice", disable=None if progress is True else True)
    for done, item in enumerate(bar, start=1):
        if callable(progress):
            progress(done, total)
        yield item


def predict(image: ImageLike, *, units: str | None = None, **options: Any) -> Prediction | VolumePrediction:
    """Predict one slice, or the scan that a folder or file holds, with a new `Predictor(**options)`.

    For many, keep a `Predictor`: it takes slices when called, and scans by its `volume`.
    """
    predictor = Predictor(**options)
    if not isinstance(image, str | os.PathLike):
        return predictor(image, units=units)
    file = local(image)
    with file.naming():
        scan = Path(file).is_dir() or is_scan(Path(file))
    return predictor.volume(file, units=units) if scan else predictor(file, units=units)
