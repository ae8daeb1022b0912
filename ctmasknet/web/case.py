"""What the page holds of one visitor: the slices that were sent, and what the models said of them. In memory only."""

from __future__ import annotations

import secrets
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ctmasknet.data.scans import Volume
from ctmasknet.data.slices import Slice
from ctmasknet.errors import ConfigError, CTMaskNetError, InputError
from ctmasknet.evaluation.contributions import RoIContributions, roi_contributions
from ctmasknet.models.classifier import COVIDCTMaskNet
from ctmasknet.models.detector import LesionMaskRCNN
from ctmasknet.models.inference import score_maps
from ctmasknet.predictor import Precision, Predictor, operating_point
from ctmasknet.registry import Task
from ctmasknet.results import Prediction, VolumePrediction, gather
from ctmasknet.zoo import Model, class_names

LOWEST_THRESHOLD = 0.05
"""The page predicts at this score and filters above it: a change of the threshold then needs no model."""

NONE = "none"
KEPT_BYTES = 1 << 30  # of all visitors; the case unused for longest goes first


class Packed(NamedTuple):
    """An array, compressed without loss: slices shrink to about a third, masks to almost nothing."""

    data: bytes
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: npt.NDArray) -> Packed:
        return cls(zlib.compress(np.ascontiguousarray(array).tobytes(), 1), array.dtype.str, array.shape)

    @property
    def array(self) -> npt.NDArray:
        return np.frombuffer(bytearray(zlib.decompress(self.data)), self.dtype).reshape(self.shape)


@dataclass(eq=False)
class Case:
    """One slice or one scan.

    Attributes:
        name: of the file or files, without a folder.
        slices: by index; a single slice has index 0.
        failed: why the others could not be read, by index.
        volume: the scan; None for a single slice.
        notes: what the visitor should know of the files, a line each.
        result: of the last complete prediction; None before it.
    """

    name: str
    slices: dict[int, tuple[Packed, str, str]]  # pixels, source, kind
    failed: dict[int, str] = field(default_factory=dict)
    volume: Volume | None = None
    notes: tuple[str, ...] = ()
    result: Result | None = None

    @classmethod
    def of_slice(cls, one: Slice, name: str, notes: tuple[str, ...] = ()) -> Case:
        return cls(name, {0: (Packed.of(one.pixels), name, one.kind)}, notes=notes)

    def slice(self, index: int) -> Slice:
        """The slice at `index`, as it was read.

        Raises:
            InputError: there is none, or it could not be read.
        """
        if index not in self.slices:
            raise InputError(self.failed.get(index, f"{self.name}: there is no slice {index}, a gap in the scan"))
        pixels, source, kind = self.slices[index]
        return Slice(pixels.array, source, kind)

    @property
    def bytes(self) -> int:
        """About how much memory it takes."""
        total = sum(len(pixels.data) for pixels, _, _ in self.slices.values())
        if self.volume is not None:
            total += int(np.prod(self.volume.shape))  # the mask of its prediction
        return total


class Cases:
    """The cases of all visitors by an unguessable token; of those too many, the ones unused for longest are dropped."""

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self._limit = limit
        self._cases: OrderedDict[str, Case] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._cases)

    def add(self, case: Case) -> str:
        """Keep a case; returns its token."""
        token = secrets.token_urlsafe(24)
        with self._lock:
            self._cases[token] = case
            while len(self._cases) > 1 and sum(kept.bytes for kept in self._cases.values()) > self._limit:
                self._cases.popitem(last=False)
        return token

    def get(self, token: str | None) -> Case:
        """The case of a token.

        Raises:
            InputError: there is none, or it was dropped.
        """
        if token is None:
            raise InputError("nothing to predict yet: upload a file, or take the example")
        with self._lock:
            if token not in self._cases:
                raise InputError("what you sent is no longer kept: upload it again")
            self._cases.move_to_end(token)
            return self._cases[token]

    def drop(self, token: str | None) -> None:
        """Forget a case; unknown tokens are none."""
        with self._lock:
            if token is not None:
                self._cases.pop(token, None)


class Models:
    """The models on offer, each loaded when first chosen and then kept.

    Args:
        segmenters, classifiers: names (or folders, or Hub repositories) on offer; nothing else is ever loaded.
        device, precision: as for `Predictor`.
    """

    def __init__(
        self,
        segmenters: tuple[str, ...],
        classifiers: tuple[str, ...],
        *,
        device: str | None = None,
        precision: Precision = "auto",
    ) -> None:
        self.names: dict[Task, tuple[str, ...]] = {"segmentation": segmenters, "classification": classifiers}
        self.device = device
        self.precision = precision
        self._loaded: dict[tuple[Task, str], Model | None] = {}
        self._loading = threading.Lock()
        self.forward = threading.Lock()
        """Held around every use of a model: its thresholds are set for the length of a call."""

    def load(self, task: Task, name: str) -> Model | None:
        """A model on offer; None for "none".

        Raises:
            ConfigError: not on offer.
            WeightsError: its weights are missing or damaged.
        """
        if name == NONE:
            return None
        if name not in self.names[task]:
            raise ConfigError(f"{name!r} is not on offer here: choose one of {', '.join(self.names[task])}")
        with self._loading:
            if (task, name) not in self._loaded:
                slots = (name, None) if task == "segmentation" else (None, name)
                predictor = Predictor(*slots, device=self.device)
                self._loaded[task, name] = predictor.segmenter if task == "segmentation" else predictor.classifier
            return self._loaded[task, name]

    def operating_point(self, segmenter: str) -> tuple[float, float] | None:
        """Score and NMS threshold stored with a segmenter's weights; None for "none"."""
        model = self.load("segmentation", segmenter)
        return None if model is None else operating_point(model)

    def predictor(self, segmenter: str, classifier: str, nms_threshold: float | None) -> Predictor:
        """A predictor at the page's lowest threshold, which uses the models kept here.

        Raises:
            ConfigError: both are "none", or one is not on offer; an NMS threshold outside 0..1.
        """
        if nms_threshold is not None and not 0 <= nms_threshold <= 1:
            raise ConfigError(f"NMS threshold {nms_threshold}: must lie in 0..1")
        predictor = Predictor(
            self.load("segmentation", segmenter),
            self.load("classification", classifier),
            device=self.device,
            score_threshold=LOWEST_THRESHOLD,
            precision=self.precision,
        )
        if nms_threshold is not None:
            predictor.nms_threshold = nms_threshold
        return predictor


@dataclass(eq=False)
class Result:
    """What the models said of a case, at every threshold from `LOWEST_THRESHOLD` on.

    Attributes:
        case: what was predicted.
        segmenter, classifier: names of the models, "none" for none.
        predictor: what predicted.
        forward: the lock around the models.
    """

    case: Case
    segmenter: str
    classifier: str
    predictor: Predictor
    forward: threading.Lock
    _found: dict[int, tuple[Prediction, Packed]] = field(default_factory=dict)  # without image; masks
    _errors: dict[int, CTMaskNetError] = field(default_factory=dict)
    _scan: VolumePrediction | None = None
    _maps: dict[int, Packed] = field(default_factory=dict)
    _contributions: dict[int, RoIContributions] = field(default_factory=dict)

    def prediction(self, index: int, threshold: float) -> Prediction:
        """One slice, lesions scored above `threshold`: what the models give when set to it.

        Raises:
            CTMaskNetError: the slice could not be read or predicted, or there is none.
        """
        if index in self._errors:
            raise self._errors[index]
        one = self.case.slice(index)
        bare, masks = self._found[index]
        return above(replace(bare, image=one.pixels, masks=masks.array), threshold)

    def scan(self, threshold: float) -> VolumePrediction | None:
        """The whole scan, lesions scored above `threshold`; None if the case is a single slice."""
        volume = self.case.volume
        if volume is None:
            return None
        if self._scan is None or self._scan.score_threshold != threshold:
            segmenter = self.predictor.segmenter
            self._scan = gather(
                volume,
                ((index, self._prediction_or_reason(index, threshold)) for index in sorted(volume.names)),
                class_names=("background",) if segmenter is None else class_names(segmenter),
                score_threshold=threshold if segmenter is not None else None,
                has_segmentation=segmenter is not None,
                caveats=self.predictor.caveats,
            )
        return self._scan

    def score_map(self, index: int) -> npt.NDArray[np.float32] | None:
        """(H, W) float32, raw mask logits of all RoIs (see `Prediction.score_map`); None without a segmenter."""
        segmenter = self.predictor.segmenter
        if not isinstance(segmenter, LesionMaskRCNN):
            return None
        if index not in self._maps:
            image = self._tensor(index)
            with self.forward, torch.inference_mode():
                (found,) = score_maps(segmenter, [image], nms_threshold=segmenter.config.box_nms_thresh)
            self._maps[index] = Packed.of(found.cpu().numpy())
        return self._maps[index].array

    def contributions(self, index: int) -> tuple[RoIContributions, tuple[str, ...]] | None:
        """What each RoI contributes to the logits of the classes, and their names; None without a classifier."""
        classifier = self.predictor.classifier
        if not isinstance(classifier, COVIDCTMaskNet):
            return None
        if index not in self._contributions:
            image = self._tensor(index)
            with self.forward:
                self._contributions[index] = roi_contributions(classifier, image)
        return self._contributions[index], class_names(classifier)

    def _tensor(self, index: int) -> torch.Tensor:
        pixels = torch.from_numpy(self.case.slice(index).pixels)
        return pixels.to(self.predictor.device).expand(3, -1, -1)

    def _prediction_or_reason(self, index: int, threshold: float) -> Prediction | CTMaskNetError:
        try:
            return self.prediction(index, threshold)
        except CTMaskNetError as error:
            return error

    def _predict(self, index: int) -> None:
        try:
            with self.forward:
                found = self.predictor(self.case.slice(index))
        except CTMaskNetError as error:
            self._errors[index] = error
            return
        bare = replace(found, image=np.zeros((0, 0), np.float32), masks=np.zeros((0, 0, 0), bool))
        self._found[index] = bare, Packed.of(found.masks)


def predict_case(
    case: Case, models: Models, segmenter: str, classifier: str, nms_threshold: float | None
) -> Iterator[tuple[int, int]]:
    """Predict a case slice by slice; yields slices done and in all, and sets `case.result` after the last.

    The models are free for others between two slices. Closed before its end, it leaves the case as it was.

    Raises:
        ConfigError: nothing chosen, not on offer, or an impossible threshold.
        InputError: no slice of the case could be predicted.
    """
    predictor = models.predictor(segmenter, classifier, nms_threshold)
    result = Result(case, segmenter, classifier, predictor, models.forward)
    for done, index in enumerate(case.slices, start=1):
        result._predict(index)
        yield done, len(case.slices)
    if not result._found:
        raise next(iter(result._errors.values()), InputError(f"{case.name}: there is no slice to predict"))
    case.result = result


def above(prediction: Prediction, threshold: float) -> Prediction:
    """The prediction with lesions scored above `threshold` only.

    The same as predicting at that threshold: NMS lets no lesion suppress one of higher score.
    """
    if not prediction.has_segmentation:
        return prediction
    kept = prediction.scores > np.float32(threshold)
    return replace(
        prediction,
        boxes=prediction.boxes[kept],
        scores=prediction.scores[kept],
        labels=prediction.labels[kept],
        masks=prediction.masks[kept],
        score_threshold=threshold,
    )
