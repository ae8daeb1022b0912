"""Fuzz the readers of files: `python tools/fuzz/readers.py TARGET [options of libFuzzer]`.

Needs Atheris (`pip install atheris`) and the extra `dev`. TARGET is png, jpeg, webp, tiff, dicom, nifti or nifti.gz; a
compressed frame in a sound DICOM file: jpeg8, lossless, jpegls, jpeg2000, rle; or of weights pth (both serializations),
config, safetensors. Anything but what the file holds or one line of ours is a find: libFuzzer writes the input to
`crash-...`, which belongs into tests/test_hostile_data.py, test_released.py or test_weights.py.
"""

from __future__ import annotations

import gzip
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris
import jpeg_ls
import nibabel
import numpy as np
import pydicom
import torch
from openjpeg.utils import encode_array
from PIL import Image
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
with atheris.instrument_imports(include=["ctmasknet.data", "ctmasknet.weights", "ctmasknet.models.config", "pickle"]):
    from golden import anchor_generator, save_released
    from scans import block_volume, dicom_dataset

    from ctmasknet.data.scans import open_volume
    from ctmasknet.data.slices import read_slice
    from ctmasknet.errors import CTMaskNetError
    from ctmasknet.models.config import model_config
    from ctmasknet.registry import get_variant
    from ctmasknet.weights.files import read_weights
    from ctmasknet.weights.publish import model_card, write_weights
    from ctmasknet.weights.released import read_released

SIZE = 40, 48
STORED = np.linspace(0, 2000, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(SIZE)
FRAMES = {  # transfer syntax, and a frame to begin with
    "jpeg2000": ("1.2.840.10008.1.2.4.90", lambda: bytes(encode_array(STORED, photometric_interpretation=2))),
    "jpegls": ("1.2.840.10008.1.2.4.80", lambda: bytes(jpeg_ls.encode_array(STORED))),
    "rle": ("1.2.840.10008.1.2.5", lambda: bytes([2]) + bytes(3) + b"\x40" + bytes(59) + b"\x81\x07\x03abcd"),
    "jpeg8": ("1.2.840.10008.1.2.4.50", lambda: picture("jpeg")),
    "lossless": ("1.2.840.10008.1.2.4.70", lambda: lossless_jpeg()),
}


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((STORED >> 3).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def lossless_jpeg() -> bytes:
    frame = b"\xff\xc3\0\x0b\x10" + bytes([0, SIZE[0], 0, SIZE[1]]) + b"\1\1\x11\0"
    table = b"\xff\xc4\0\x14\0" + bytes([1, *[0] * 15, 0])
    return b"\xff\xd8" + frame + table + b"\xff\xda\0\x08\1\1\0\1\0\0" + bytes(300) + b"\xff\xd9"


def dicom(frame: bytes | None = None, syntax: str = "1.2.840.10008.1.2.1") -> bytes:
    pixels = {} if frame is None else {"PixelData": pydicom.encaps.encapsulate([frame + b"\0" * (len(frame) % 2)])}
    dataset = dicom_dataset(STORED, RescaleIntercept="-1024", ImagePositionPatient=[0, 0, 0], **pixels)
    dataset["PixelData"].VR = "OW" if frame is None else "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def checkpoint(folder: Path, *, legacy: bool) -> bytes:
    """A segmenter's checkpoint, but for the sizes of its tensors."""
    names = ["backbone.body.conv1", "backbone.body.layer1.0.conv1", "backbone.body.layer1.1.conv1"]
    names += ["backbone.body.layer2.0.conv1", "backbone.fpn.inner_blocks.0", "roi_heads.box_predictor.cls_score"]
    content = {"model_weights": {f"{name}.weight": torch.zeros(2) for name in names}, "epoch": 1}
    content["anchor_generator"] = anchor_generator("torchvision.models.detection.rpn", ((2, 4),), ((1.0, 2.0),))
    return save_released(folder / "released.pth", content, legacy=legacy).read_bytes()


def read_config(path: Path) -> None:
    """All that is made of a config.json before a model is built."""
    stored = read_weights(path.parent)
    variant = get_variant(stored.variant or "")
    model_config(variant, **stored.config)
    model_card(variant, stored.metadata)


def main() -> None:
    """Fuzz one target until it fails or is told to stop."""
    target, *options = sys.argv[1:]
    folder = Path(tempfile.mkdtemp())
    facts = {"variant": "maskrcnn_resnet18_t2", "config": {"anchor_sizes": [1.0]}, "metadata": {"note": "x"}}
    write_weights(folder, {}, **facts, golden=False)
    nifti = nibabel.Nifti1Image(block_volume(), np.eye(4)).to_bytes()
    seeds: dict[str, Callable[[], bytes]] = {
        **{kind: lambda kind=kind: picture(kind) for kind in ("png", "jpeg", "webp", "tiff")},
        "dicom": dicom,
        "nifti": lambda: nifti,
        "nifti.gz": lambda: gzip.compress(nifti),
        **{name: frame for name, (_, frame) in FRAMES.items()},
        "pth": lambda: checkpoint(folder, legacy=True),
        "config": (folder / "config.json").read_bytes,
        "safetensors": lambda: save({"a": torch.zeros(2), "b": torch.zeros(1, 2, dtype=torch.int64)}),
    }
    names = {"nifti": "a.nii", "nifti.gz": "a.nii.gz", "config": "config.json", "safetensors": "model.safetensors"}
    readers: dict[str, list[Callable[[Path], object]]] = {
        "pth": [read_released],
        "config": [read_config],
        "safetensors": [read_config],
    }
    images = [read_slice, lambda path: open_volume(path, units="range").read(0)]
    (folder / "corpus").mkdir()
    (folder / "corpus" / "seed").write_bytes(seeds[target]())
    if target == "pth":
        (folder / "corpus" / "zip").write_bytes(checkpoint(folder, legacy=False))
    path = folder / names.get(target, "a.dcm")

    def once(data: bytes) -> None:
        path.write_bytes(dicom(data or b"\0", FRAMES[target][0]) if target in FRAMES else data)
        for read in readers.get(target, images):
            try:
                read(path)
            except CTMaskNetError as error:
                if "\n" in str(error) or "Traceback" in str(error):
                    raise AssertionError(f"not one line: {error}") from error

    warnings.simplefilter("ignore")
    logging.disable()
    atheris.Setup([sys.argv[0], str(folder / "corpus"), "-rss_limit_mb=2048", "-timeout=20", *options], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
