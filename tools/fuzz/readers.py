"""Fuzz the readers of image files: `python tools/fuzz/readers.py TARGET [options of libFuzzer]`.

Needs Atheris (`pip install atheris`) and the extra `dev`. TARGET is png, jpeg, webp, tiff, dicom, nifti or nifti.gz,
or a compressed frame in a sound DICOM file: jpeg8, lossless, jpegls, jpeg2000, rle. Anything but a slice or one line of
ours is a find: libFuzzer writes the input to `crash-...`, which belongs into tests/test_hostile_data.py.
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
from openjpeg.utils import encode_array
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
with atheris.instrument_imports(include=["ctmasknet.data"]):
    from scans import block_volume, dicom_dataset

    from ctmasknet.data.scans import open_volume
    from ctmasknet.data.slices import read_slice
    from ctmasknet.errors import CTMaskNetError

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


def main() -> None:
    """Fuzz one target until it fails or is told to stop."""
    target, *options = sys.argv[1:]
    nifti = nibabel.Nifti1Image(block_volume(), np.eye(4)).to_bytes()
    seeds: dict[str, Callable[[], bytes]] = {
        **{kind: lambda kind=kind: picture(kind) for kind in ("png", "jpeg", "webp", "tiff")},
        "dicom": dicom,
        "nifti": lambda: nifti,
        "nifti.gz": lambda: gzip.compress(nifti),
        **{name: frame for name, (_, frame) in FRAMES.items()},
    }
    folder = Path(tempfile.mkdtemp())
    (folder / "corpus").mkdir()
    (folder / "corpus" / "seed").write_bytes(seeds[target]())
    path = folder / {"nifti": "a.nii", "nifti.gz": "a.nii.gz"}.get(target, "a.dcm")

    def once(data: bytes) -> None:
        path.write_bytes(dicom(data, FRAMES[target][0]) if target in FRAMES else data)
        for read in (read_slice, lambda path: open_volume(path, units="range").read(0)):
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
