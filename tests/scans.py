"""Synthetic scans for the tests: small, asymmetric in every direction, with one bright block as the lesion."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ctmasknet import Prediction, Predictor, create_model
from ctmasknet.data.slices import Slice

MARK = 400  # HU of the block; everything else is softer than the lung window's upper end
SHAPE = (40, 48, 6)  # to the right, to the front, to the head


def block_volume(seed: int = 0) -> np.ndarray:
    """(40, 48, 6) int16 HU in RAS order: noise in air and tissue, and one block of `MARK`."""
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1000, -600, SHAPE)
    hu[10:30, 10:30, 1:] = rng.integers(-100, 100, (20, 20, 5))
    hu[27:33, 8:12, 4] = MARK
    return hu.astype(np.int16)


class BlockPredictor(Predictor):
    """A predictor that finds the block by its brightness, so that only geometry is under test."""

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__(create_model("maskrcnn_resnet18_t2"), None, device="cpu", batch_size=batch_size)
        self.batches: list[int] = []

    def _predict(self, slices: list[Slice]) -> list[Prediction]:
        self.batches.append(len(slices))
        return [self._block(one) for one in slices]

    def _block(self, one: Slice) -> Prediction:
        mask = one.pixels >= 1
        found = mask.any()
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if found else []
        return Prediction(
            image_size=one.pixels.shape,
            boxes=np.array(box, np.float32).reshape(-1, 4),
            scores=np.full(int(found), 0.9, np.float32),
            labels=np.ones(int(found), np.int64),
            masks=mask[None][: int(found)],
            class_probabilities=None,
            roi_batch=None,
            class_names=("background", "lesion"),
            image=one.pixels,
            source=one.source,
            score_threshold=0.5,
        )


class TruthPredictor(Predictor):
    """A predictor that marks what it is told to: class of lesion at each pixel, (S, H, W), scored 0.9."""

    def __init__(self, marks: np.ndarray, class_names: tuple[str, ...] = ("background", "lesion")) -> None:
        model = create_model("maskrcnn_resnet18_t2", num_classes=len(class_names))
        super().__init__(model, None, device="cpu")
        self.marks = marks

    def _predict(self, slices: list[Slice]) -> list[Prediction]:
        return [self._marked(one, self.marks[int(re.findall(r"\d+", one.source)[-1])]) for one in slices]

    def _marked(self, one: Slice, marks: np.ndarray) -> Prediction:
        labels = np.unique(marks[marks > 0]).astype(np.int64)
        boxes, scores = np.zeros((len(labels), 4), np.float32), np.full(len(labels), 0.9, np.float32)
        masks = marks == labels[:, None, None]
        return self._result(one, {"boxes": boxes, "scores": scores, "labels": labels, "masks": masks})


def dicom_dataset(stored: np.ndarray, **tags: Any) -> Any:
    """A CT slice as a pydicom dataset; a tag given as None is left out."""
    import pydicom

    dataset = pydicom.dataset.Dataset()
    values = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "SOPInstanceUID": pydicom.uid.generate_uid(),
        "SeriesInstanceUID": "1.2.3",
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "RescaleSlope": "1",
        "RescaleIntercept": "0",
        "PhotometricInterpretation": "MONOCHROME2",
        "SamplesPerPixel": 1,
        "Rows": stored.shape[-2],
        "Columns": stored.shape[-1],
        "PixelSpacing": [0.7, 0.8],
        "SliceThickness": "2",
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "BitsAllocated": 8 * stored.dtype.itemsize,
        "BitsStored": 8 * stored.dtype.itemsize,
        "HighBit": 8 * stored.dtype.itemsize - 1,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        "PixelData": stored.tobytes(),
        **tags,
    }
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def write_series(
    folder: Path,
    slices: np.ndarray,
    *,
    directions: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    step: tuple[float, float, float] | None = None,
    origin: tuple[float, float, float] = (-100.0, -80.0, 40.0),
    prefix: str = "s",
    **tags: Any,
) -> list[Path]:
    """Write (K, H, W) HU as a DICOM series, slice k at origin + k * step (LPS, mm), under shuffled names."""
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(directions[:3], directions[3:])
    step = tuple(2.0 * normal) if step is None else step
    names = np.random.default_rng(1).permutation(len(slices))
    paths = []
    for k, pixels in enumerate(slices):
        position = [f"{o + k * s:.10g}" for o, s in zip(origin, step, strict=True)]
        place = {"ImagePositionPatient": position, "ImageOrientationPatient": list(directions), "InstanceNumber": k + 1}
        path = folder / f"{prefix}{names[k]:03d} é.dcm"
        dicom_dataset(pixels, **{**place, **tags}).save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def enhanced(path: Path, slices: np.ndarray, order: list[int], **tags: Any) -> Path:
    """A multi-frame CT: everything geometric in functional groups, frames in `order`."""

    import pydicom

    def item(**values: object) -> object:
        made = pydicom.Dataset()
        for keyword, value in values.items():
            setattr(made, keyword, value)
        return made

    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=[0.7, 0.8], SliceThickness="2")],
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
    )
    frames = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[-100, -80, 40 + 2 * k])],
            # Every frame has its own intercept.
            PixelValueTransformationSequence=[item(RescaleSlope="1", RescaleIntercept=str(-k), RescaleType="HU")],
        )
        for k in order
    ]
    dataset = dicom_dataset(
        np.stack([slices[k] + k for k in order]),
        NumberOfFrames=len(order),
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=frames,
        **dict.fromkeys(
            ("PixelSpacing", "SliceThickness", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept")
        ),
        **tags,
    )
    dataset.save_as(path, enforce_file_format=True)
    return path
