"""Image files, DICOM files, PIL images, arrays and tensors -> one axial chest CT slice, grey, in 0..1.

The models see slices in the lung window, -1350 to 150 HU. Pictures with 8 bits are taken to be in a lung
window already, as the data sets of the paper are; Hounsfield units (HU) are put into it, whatever window a
DICOM file stores for display.
"""

from __future__ import annotations

import os
import stat
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ctmasknet.data.remote import Local, as_path, fetch, is_url
from ctmasknet.errors import ConfigError, CTMaskNetError, InputError, import_extra, reason_of

LUNG_WINDOW = (-1350.0, 150.0)  # HU
MIN_SIDE = 32  # pixels; two cells of the models' stride 16, less cannot be a chest
MAX_SIDE = 4096  # pixels; eight times a CT slice, more is a mistake or an attack
MAX_PICTURE = 1 << 28  # bytes of a file; four channels of MAX_SIDE x MAX_SIDE with 32 bits
MAX_FETCHED = 1 << 32  # bytes of a scan that is copied here; 8192 slices of 512 x 512 in 16 bits
MAX_SCANS = 100  # of a progressive JPEG, which has about ten; each takes as long as the whole, in 30 bytes
MAX_RLE = 1 << 24  # bytes of a frame; they decode to 64 times as many at most
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")

# What a chest CT in HU must look like; see require_chest_hu and hu_offset.
PADDING_BELOW = -1500.0  # HU; no matter is that thin, scanners write -2000, -2048, -3024 outside the circle
AIR_BELOW = -500.0  # HU; air and lung
DENSER_THAN_BONE = 1500.0  # HU
SOFT_TISSUE = (-200.0, 200.0)  # HU; fat to contrast-enhanced organs
LEAST_SHARE = 0.01  # of the pixels must be air, and soft tissue; a chest slice holds ten times that of each
STORED_OFFSET = 1024.0  # HU; many files store HU + 1024, so as to need no sign

FLOAT_SLACK = 1e-4  # resampling overshoots 0..1 by rounding; more than this is another unit
PHOTOMETRIC_TAG = 262  # TIFF 6.0; 0 is white-is-zero, which Pillow inverts at 8 bits only
LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, Pillow's weights for mode "L"

# The plugins are called directly, since Image.open checks the size by warnings and before we can.
PICTURES: dict[str, tuple[type[ImageFile.ImageFile], tuple[bytes, ...]]] = {  # and the first bytes of their files
    "png": (PngImageFile, (b"\x89PNG\r\n\x1a\n",)),
    "jpeg": (JpegImageFile, (b"\xff\xd8\xff",)),
    "webp": (WebPImageFile, (b"RIFF",)),
    "tiff": (TiffImageFile, (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")),
}

DEFLATED = "1.2.840.10008.1.2.1.99"
DECODERS = {  # transfer syntax: pydicom's plugin, the module it needs, and what starts a frame in JPEG's segments
    "1.2.840.10008.1.2.5": ("pydicom", "pydicom", ()),  # RLE
    "1.2.840.10008.1.2.4.50": ("pillow", "PIL", (0xFFC0, 0xFFC1)),  # JPEG of 8 bits
    "1.2.840.10008.1.2.4.51": ("pillow", "PIL", (0xFFC0, 0xFFC1)),
    "1.2.840.10008.1.2.4.57": ("gdcm", "gdcm", (0xFFC3,)),  # JPEG Lossless
    "1.2.840.10008.1.2.4.70": ("gdcm", "gdcm", (0xFFC3,)),
    "1.2.840.10008.1.2.4.80": ("pyjpegls", "jpeg_ls", (0xFFF7,)),  # JPEG-LS
    "1.2.840.10008.1.2.4.81": ("pyjpegls", "jpeg_ls", (0xFFF7,)),
    "1.2.840.10008.1.2.4.90": ("pylibjpeg", "openjpeg", ()),  # JPEG 2000
    "1.2.840.10008.1.2.4.91": ("pylibjpeg", "openjpeg", ()),
}

NIFTI_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img")
NIFTI_MAGIC = (b"\x5c\x01\0\0", b"\0\0\x01\x5c", b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # sizes of its two headers

Source = str | os.PathLike[str] | Image.Image | np.ndarray | torch.Tensor


@dataclass(frozen=True)
class Slice:
    """One axial slice as the models see it.

    Attributes:
        pixels: (H, W) float32 in 0..1, grey, air dark.
        source: the path as given, or ``"PIL image"``, ``"array"``, ``"tensor"``.
        kind: ``"png"``, ``"jpeg"``, ``"webp"``, ``"tiff"``, ``"dicom"``,
            ``"pil"``, ``"array"``, ``"tensor"``.
        units: what the values were taken for where the source does not say it itself: ``"hu"``, ``"hu+1024"``
            (declared to be HU, found to be HU + 1024 and put right) or ``"range"``; None if it does.
        steps: mm from row to row towards the back, and from column to column towards the patient's left; negative
            the other way, 0 if the slice is not axial. None if they are unknown.
    """

    pixels: np.ndarray
    source: str
    kind: str
    units: str | None = None
    steps: tuple[float, float] | None = None

    @property
    def in_hu(self) -> bool:
        """Whether the pixels are HU in the lung window rather than grey values of a picture."""
        return (self.units or self.kind).startswith(("hu", "dicom", "nifti", "memory"))


def read_slice(source: Source, *, units: str | None = None) -> Slice:
    """Read one axial slice.

    Files are recognised by their content, not by their name: PNG, JPEG, WebP, TIFF (8-bit grey, colour,
    palette; 16- and 32-bit grey) and DICOM (extra ``io``). Colour becomes luminance (ITU-R BT.601); alpha is
    dropped. Arrays and tensors are (H, W), (H, W, 1|3|4), (1, H, W) or (3, H, W); uint8, or float in 0..1.

    Args:
        units: what the values mean.

            - None: 8-bit pixels and floats in 0..1 are taken as they are. Images of 16 or 32 bits are
              stretched from their own minimum..maximum to 0..1, with a UserWarning. A CT DICOM file is
              rescaled to HU and put into the lung window. Everything else is an error.
            - ``"hu"``: values are Hounsfield units (for DICOM: after rescale, if the file has one), or HU + 1024,
              which is recognised, and are put into the lung window. Values that hold no air and soft tissue
              where HU have them are an error, and so are 8-bit pictures, which cannot hold HU.
            - ``"range"``: the slice's own minimum..maximum is stretched to 0..1; a constant slice gives
              zeros. DICOM files stored as MONOCHROME1 are inverted, as every viewer shows them.

    Raises:
        ConfigError: unknown `units`.
        InputError: anything that is not one readable slice; the text names the file and the fix.
        MissingExtraError: a DICOM file, and pydicom or the decoder for its compression is not installed.
    """
    check_units(units)
    if isinstance(source, Image.Image):
        return _read_image(source, "PIL image", "pil", units)
    if isinstance(source, torch.Tensor):
        return _read_array(_to_numpy(source), "tensor", "tensor", units)
    if isinstance(source, np.ndarray):
        return _read_array(source, "array", "array", units)
    if isinstance(source, str | os.PathLike):
        file = local(source, folders=False)
        with file.naming():
            return _read_file(file, units)
    raise InputError(f"{type(source).__name__}: not a slice. Give a path, a PIL image, an array or a tensor.")


def check_units(units: str | None) -> None:
    """Raise a ConfigError for units that are none."""
    if units not in (None, "hu", "range"):
        raise ConfigError(f'units={units!r} is unknown. Use None, "hu" or "range".')


def window(values: np.ndarray, low: float = LUNG_WINDOW[0], high: float = LUNG_WINDOW[1]) -> np.ndarray:
    """Values of any shape -> float32: 0 up to `low`, 1 from `high` on, linear between; all 0 if the two are one."""
    # Halves first: the difference of two large floats may overflow.
    span = high / 2 - low / 2 or 1.0
    return np.clip((np.asarray(values, np.float64) / 2 - low / 2) / span, 0.0, 1.0).astype(np.float32)


def local(source: str | os.PathLike[str], *, folders: bool = True) -> Local:
    """The file or folder on this machine: a path as it is, of a URL a copy, if it is not larger than it may be."""
    if isinstance(source, Local):
        return source
    name = os.fsdecode(source)
    if not is_url(name):
        return Local(name, name)
    limit = MAX_PICTURE if as_path(name).lower().endswith(PICTURE_SUFFIXES) else MAX_FETCHED
    return fetch(name, limit, folders=folders)


def _read_file(file: Local, units: str | None) -> Slice:
    """Hand a file to the reader that its first bytes ask for."""
    with open_file(file.path) as stream:
        kind = _kind_of(stream.read(140), file.path)
        stream.seek(0)
        if kind == "dicom":
            return replace(_read_dicom(file.path, units), source=file.name)
        return _read_image(_open_image(stream, kind, file.path), file.name, kind, units)


def open_file(name: str) -> BinaryIO:
    try:
        status = Path(name).stat()
        if stat.S_ISREG(status.st_mode) and status.st_size > 0:
            return Path(name).open("rb")
    except (OSError, ValueError) as error:  # ValueError: a null byte, or not encodable
        reason = reason_of(error).lower()
        raise InputError(f"{name!r}: cannot be opened ({reason}). Check the path and its permissions.") from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(
            f"{name}: a directory, not a slice. Give one image or DICOM file inside it, or predict a folder with a "
            "DICOM series as a scan: Predictor.volume(path)."
        )
    what = "the file is empty" if stat.S_ISREG(status.st_mode) else "not a regular file"  # a pipe would never open
    raise InputError(f"{name}: {what}. Give an image or a DICOM file.")


def _kind_of(head: bytes, name: str) -> str:
    """The format by the first bytes; `name` decides only for DICOM files without preamble."""
    for kind, (_, beginnings) in PICTURES.items():
        if head.startswith(beginnings) and head[128:132] != b"DICM":  # whose preamble may be a TIFF's head
            return kind
    if is_dicom_head(head, name):
        return "dicom"
    if name.lower().endswith(NIFTI_SUFFIXES) or head.startswith(NIFTI_MAGIC):
        raise InputError(f"{name}: NIfTI holds a whole scan, not a slice. Predict it as one: Predictor.volume(path).")
    suffix = Path(name).suffix.lower()
    missing = f"{suffix[1:].upper()} header missing" if suffix in (*PICTURE_SUFFIXES, ".dcm") else "unknown format"
    raise InputError(
        f"{name}: not a readable image ({missing}). Give a PNG, JPEG, WebP, TIFF or DICOM file; a DICOM file without "
        "preamble must be named .dcm."
    )


def _open_image(stream: BinaryIO, kind: str, name: str) -> Image.Image:
    """Open an image file, its pixels not yet decoded."""
    if os.fstat(stream.fileno()).st_size > MAX_PICTURE:
        raise InputError(f"{name}: a picture of more than {MAX_PICTURE:,} bytes is not one slice. Save it again.")
    if kind == "jpeg" and stream.read().count(b"\xff\xda") > MAX_SCANS:
        raise InputError(f"{name}: a JPEG of more than {MAX_SCANS} scans is not one slice. Save it again.")
    stream.seek(0)
    with reading(name, kind.upper()):
        image = PICTURES[kind][0](stream)
        require_size((image.height, image.width), name)
        if kind == "png":
            image.verify()  # checksums, at which decoding does not look; uses the image up
            stream.seek(0)
            image = PngImageFile(stream)
        return image


def _read_image(image: Image.Image, source: str, kind: str, units: str | None) -> Slice:
    require_size((image.height, image.width), source)
    with reading(source, "image"):
        # Pillow walks through all pages of a TIFF to count them, round and round if they are a loop.
        several = image.tag_v2.next if isinstance(image, TiffImageFile) else getattr(image, "n_frames", 1) > 1
        if several:
            raise InputError(f"{source}: several pages or frames, one slice is expected. Split them.")
        image.load()
    if image.mode in ("L", "LA", "RGB", "RGBX", "RGBA", "P", "PA"):
        if units == "hu":
            raise InputError(f"{source}: 8-bit pixels cannot hold Hounsfield units. Leave units out.")
        # Going to RGBA looks palette colours up and leaves them alone, so alpha is never blended in.
        values = np.asarray(image.convert("RGBA") if image.mode in ("P", "PA") else image)
        return _read_array(values[..., 0] if image.mode == "LA" else values, source, kind, units)
    if not (image.mode in ("I", "F") or image.mode.startswith("I;16")):
        raise InputError(f"{source}: colour mode {image.mode} is not supported. Save it as grey or RGB.")
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_TAG) == 0:
        raise InputError(f"{source}: white-is-zero TIFF of more than 8 bits. Save it as black-is-zero.")
    values = np.asarray(image)
    if units is None:
        require_finite(values, source)
        warnings.warn(
            f"{source}: not an 8-bit image, stretched from its own range "
            f"{values.min():g}..{values.max():g} to 0..1. "
            'Pass units="hu" for Hounsfield units, or units="range" if this is what you want.',
            UserWarning,
            stacklevel=3,
        )
    return _read_array(values, source, kind, units or "range")


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    try:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # sparse, quantised, meta
        raise InputError(
            f"tensor: {tensor.dtype}, {tensor.layout} on {tensor.device} cannot be read. Give a dense tensor with data."
        ) from error


def _read_array(values: np.ndarray, source: str, kind: str, units: str | None) -> Slice:
    shape = values.shape
    if values.ndim == 3 and shape[-1] not in (1, 3, 4) and shape[0] in (1, 3):
        values = np.moveaxis(values, 0, -1)
    if values.ndim != 2 and not (values.ndim == 3 and values.shape[-1] in (1, 3, 4)):
        raise InputError(f"{source}: shape {shape} is no slice. Give (H, W), (H, W, 1|3|4), (1, H, W) or (3, H, W).")
    require_size(values.shape[:2], source)
    if values.dtype.kind not in "uif":
        raise InputError(f"{source}: dtype {values.dtype} is not an image. Give uint8, or float in 0..1.")
    require_finite(values, source)
    low, high = float(values.min()), float(values.max())
    # Luminance, in the units of the values; alpha is dropped.
    grey = values[..., :3] @ LUMINANCE if values.shape[2:] in ((3,), (4,)) else values.reshape(values.shape[:2])
    grey = grey.astype(np.float64)
    if units is None and values.dtype == np.uint8:
        grey /= 255
    elif units is None and (values.dtype.kind != "f" or low < -FLOAT_SLACK or high > 1 + FLOAT_SLACK):
        raise InputError(
            f"{source}: {values.dtype} from {low:g} to {high:g} does not tell its units, as uint8 and 0..1 do. "
            'Pass units="hu" for Hounsfield units, or units="range" to stretch the values to 0..1.'
        )
    if units == "hu":
        offset = hu_offset(grey, source)
        return Slice(window(grey - offset), source, kind, taken_for(units, offset))
    low, high = (grey.min(), grey.max()) if units else (0.0, 1.0)
    return Slice(window(grey, low, high), source, kind, units)


def taken_for(units: str | None, offset: float) -> str | None:
    """`Slice.units` for the units that were asked for and the offset that was found."""
    return "hu+1024" if offset else units


def _read_dicom(name: str, units: str | None) -> Slice:
    with reading(name, "DICOM"):
        header = read_dicom(name, stop_before_pixels=True)
        frames = int(header.get("NumberOfFrames") or 1)
        if frames > 1:
            raise InputError(f"{name}: {frames} frames are no slice. Predict it as a scan: Predictor.volume(path).")
        require_dicom_slice(header, name, units)
        pixels, offset = pixels_of_frame(read_dicom(name), name, units)
        return Slice(pixels, name, "dicom", taken_for(units, offset), _steps_of(header))


def _steps_of(header: Any) -> tuple[float, float] | None:
    """`Slice.steps`; a header without directions is taken to be axial, as viewers show it."""
    spacing, directions = (numbers_of(header, 0, *tag) for tag in (("PixelSpacing", 2), ("ImageOrientationPatient", 6)))
    if spacing is None or not ((spacing > 0.01) & (spacing < 100)).all():  # as no CT has it
        return None
    down, across = spacing * (1 if directions is None else np.rint(directions[[4, 0]]))
    return float(down), float(across)


def read_dicom(name: str, **options: Any) -> Any:
    """A pydicom dataset; `options` are dcmread's."""
    pydicom = import_extra("pydicom", "io", "reading DICOM files")
    reader = pydicom.filereader
    with reading(name, "DICOM"), open_file(name) as stream:
        reader.read_preamble(stream, True)
        meta = reader.read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        if meta.get("TransferSyntaxUID") == DEFLATED:  # pydicom would decompress it without bound
            raise InputError(f"{name}: deflated DICOM is not supported. Save it in another transfer syntax.")
        stream.seek(0)
        return pydicom.dcmread(stream, force=True, **options)


def is_dicom_head(head: bytes, name: str) -> bool:
    """Do these 140 bytes begin a DICOM file, with a preamble or, by its name, without? pydicom reads anything."""
    preamble = head[128:132] == b"DICM"
    first = head[132:134] if preamble else head[:2]
    # File meta information, or identification in either byte order.
    return (preamble or name.lower().endswith(".dcm")) and first in (b"\x02\x00", b"\x08\x00", b"\x00\x08")


def require_dicom_slice(header: Any, name: str, units: str | None, frame: int = 0) -> None:
    """Refuse, by the header alone, what is no image, too large, in colour, or (without `units`) no CT slice in HU."""
    if "Rows" not in header or "Columns" not in header:
        raise InputError(f"{name}: no image in this DICOM file (or no DICOM file at all). Give an image file.")
    require_size((int(header.Rows), int(header.Columns)), name)
    is_monochrome1(header, name)
    if units is not None:
        return
    modality, kind = str(header.get("Modality") or "missing"), str(header.get("RescaleType") or "HU").strip()
    if modality != "CT":
        raise InputError(not_hu(name, f"DICOM modality is {modality}, not CT, so the values may not be HU"))
    if is_localizer(header):
        raise InputError(f"{name}: a localizer (scout view), not an axial slice. Give an axial slice of the series.")
    if rescale_of(header, frame) is None:
        raise InputError(not_hu(name, "no usable rescale slope and intercept, so the values may not be HU"))
    if kind != "HU":
        raise InputError(not_hu(name, f"rescale type is {kind}, so the values are not HU"))


def is_localizer(header: Any) -> bool:
    words = header.get("ImageType") or []
    return "LOCALIZER" in ([words] if isinstance(words, str) else words)


def pixels_of_frame(
    dataset: Any, name: str, units: str | None, frame: int = 0, offset: float | None = None
) -> tuple[np.ndarray, float]:
    """One frame of a pydicom dataset -> (H, W) float32 in 0..1, and what was subtracted from its HU.

    MONOCHROME1 says how values are to be *shown*, the smallest as white, after rescale and display window (DICOM PS3.3
    C.7.6.3.1.2). HU come out of the rescale, before that, so they are never inverted; only units="range", a way of
    showing, inverts. A MONOCHROME1 CT that is dense all along its edge was stored upside down: refused.

    Args:
        offset: to subtract with units="hu", where the scan has told it; None looks at this frame alone.
    """
    inverted = is_monochrome1(dataset, name)
    stored = _decode(dataset, name, frame)
    slope, intercept = rescale_of(dataset, frame) or (1.0, 0.0)
    values = stored.astype(np.float64) * slope + intercept
    require_finite(values, name)
    padding = _padding_of(dataset, stored)
    if padding.all():
        raise InputError(f"{name}: every pixel is padding, there is no slice. Export it again.")
    image = values[~padding]
    if units == "range":
        low, high = image.min(), image.max()
        shown = window(values, low, high)
        return np.where(padding, np.float32(0), 1 - shown if inverted and low < high else shown), 0.0
    if units is None:
        require_chest_hu(image, values, name, inverted)
        offset = 0.0
    elif offset is None:
        offset = hu_offset(image, name)
    values -= offset
    # Padding written with the value of air (stored 0, -1024 HU) cannot be told from air, nor need it be.
    return window(np.where(padding & (values > AIR_BELOW), LUNG_WINDOW[0], values)), offset


def is_monochrome1(header: Any, name: str) -> bool:
    photometric = str(header.get("PhotometricInterpretation") or "MONOCHROME2")
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or int(header.get("SamplesPerPixel") or 1) != 1:
        raise InputError(f"{name}: {photometric} pixels, so not a CT slice. Give the original, or save it as PNG.")
    return photometric == "MONOCHROME1"


def rescale_of(header: Any, frame: int = 0) -> tuple[float, float] | None:
    """Rescale slope and intercept, or None."""
    slope, intercept = (numbers_of(header, frame, f"Rescale{name}", 1) for name in ("Slope", "Intercept"))
    return None if slope is None or intercept is None or slope[0] == 0 else (float(slope[0]), float(intercept[0]))


def numbers_of(header: Any, frame: int, keyword: str, count: int) -> np.ndarray | None:
    """`count` finite numbers of a frame, (count,) float64, or None; Enhanced CT keeps them in functional groups."""
    own = (header.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    groups = [*own, *(header.get("SharedFunctionalGroupsSequence") or [])]
    items = [item for group in groups for element in group if element.VR == "SQ" for item in element.value]
    for holder in (header, *items):
        value = holder.get(keyword)
        try:
            numbers = np.atleast_1d(np.asarray(value, np.float64))  # None is NaN
        except (TypeError, ValueError):
            continue
        if numbers.shape == (count,) and np.isfinite(numbers).all():
            return numbers
    return None


def require_chest_hu(image: np.ndarray, values: np.ndarray, name: str, monochrome1: bool) -> None:
    """Refuse `values` (H, W) that cannot be HU of a chest; `image` (N,) are those that are not padding."""
    matter = image[image >= PADDING_BELOW]
    if matter.size == 0 or matter.min() > AIR_BELOW:
        low = matter.min() if matter.size else image.min()
        maybe = "; it may be HU + 1024, which is put right" if _is_chest(image - STORED_OFFSET) else ""
        raise InputError(not_hu(name, f"the lowest value is {low:g} HU, but a chest holds air (-1000 HU){maybe}"))
    if np.median(matter) > DENSER_THAN_BONE:
        raise InputError(not_hu(name, f"half of it is above {DENSER_THAN_BONE:g} HU, denser than bone"))
    edge = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    if monochrome1 and np.median(edge) > -AIR_BELOW:
        raise InputError(not_hu(name, f"MONOCHROME1, but its edge is at {np.median(edge):g} HU, which is not air"))


def hu_offset(values: np.ndarray, name: str) -> float:
    """What to subtract from values that somebody declared to be HU: 0, or 1024 where they are HU + 1024."""
    for offset in (0.0, STORED_OFFSET):
        if _is_chest(values - offset):
            return offset
    raise InputError(
        f"{name}: values from {values.min():g} to {values.max():g} are no Hounsfield units of a chest, which holds air "
        '(-1000 HU) and soft tissue (0 HU), nor HU + 1024. Pass units="range" to stretch them, or give the original.'
    )


def of_the_middle(count: int, judge: Callable[[int], float]) -> float:
    """What `judge` says of a slice near the middle, since the ends of a scan may be blank; an InputError if of none."""
    refusals = []
    for index in sorted({count // 2, count // 4, 3 * count // 4}, key=lambda index: abs(index - count // 2)):
        try:
            return judge(index)
        except InputError as error:
            refusals.append(error)
    raise refusals[0]


def _is_chest(hu: np.ndarray) -> bool:
    """Do these values, in any number, hold air and soft tissue?"""
    matter = hu[hu >= PADDING_BELOW]
    air, (low, high) = matter <= AIR_BELOW, SOFT_TISSUE
    return matter.size > 0 and min(air.mean(), ((low <= matter) & (matter <= high)).mean()) >= LEAST_SHARE


def not_hu(name: str, what: str) -> str:
    return (
        f'{name}: {what}. Pass units="hu" if they are Hounsfield units, '
        'or units="range" to stretch the slice to its own range.'
    )


def _decode(dataset: Any, name: str, index: int) -> np.ndarray:
    """Stored values of one frame, (H, W), integer or float, before rescale."""
    pydicom = import_extra("pydicom", "io", "reading DICOM files")
    meta, rows, columns = dataset.file_meta, int(dataset.Rows), int(dataset.Columns)
    if "TransferSyntaxUID" not in meta:
        implicit, little_endian = dataset.original_encoding
        explicit = pydicom.uid.ExplicitVRLittleEndian if little_endian else pydicom.uid.ExplicitVRBigEndian
        meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if implicit else explicit
    syntax, plugin = meta.TransferSyntaxUID, ""
    if syntax.is_encapsulated:
        if syntax not in DECODERS:
            raise InputError(f"{name}: pixels compressed as {syntax.name} are not supported. Save it uncompressed.")
        plugin, module, _ = DECODERS[syntax]
        import_extra(module, "io", f"{name}: decoding {syntax.name}")
        frame = pydicom.encaps.get_frame(
            dataset.PixelData, index, number_of_frames=int(dataset.get("NumberOfFrames") or 1)
        )
        if not _is_sound(frame, rows, columns, syntax):
            raise InputError(f"{name}: its pixels ({syntax.name}) are damaged. Copy or export it again.")
    try:
        stored = np.asarray(pydicom.pixels.pixel_array(dataset, index=index, decoding_plugin=plugin))
    except RuntimeError as error:  # its text holds a traceback
        raise InputError(f"{name}: its pixels ({syntax.name}) are damaged. Copy or export it again.") from error
    if stored.shape != (rows, columns):
        raise InputError(f"{name}: pixels have shape {stored.shape}, one (H, W) slice is expected. Export it again.")
    return stored


def _is_sound(frame: bytes, rows: int, columns: int, syntax: str) -> bool:
    """Is a compressed frame one grey component of this size, by its own words? Decoders allocate what it says."""
    plugin, _, starts = DECODERS[syntax]
    if plugin == "pydicom":  # RLE holds no size, and expands at most 64 times
        return len(frame) <= min(5 * rows * columns + 64, MAX_RLE)
    try:
        if plugin != "pylibjpeg":
            return frame[:2] == b"\xff\xd8" and _is_sound_jpeg(frame, rows, columns, starts)
        # JPEG 2000 (ITU-T T.800, A.5.1): ends, starts, tiles, components, sampling.
        right, bottom, left, top, width, height, *rest = struct.unpack_from(">8IHxBB", frame, 8)
        sizes = (bottom, right, left, top, *rest) == (rows, columns, 0, 0, 0, 0, 1, 1, 1)
        # Smaller tiles are a great many.
        return frame[:4] == b"\xff\x4f\xff\x51" and sizes and width * height >= MIN_SIDE**2
    except struct.error:
        return False


def _is_sound_jpeg(frame: bytes, rows: int, columns: int, starts: tuple[int, ...]) -> bool:
    """As `_is_sound`, of the segments before the pixels (ITU-T T.81, B.2; T.87, C.2).

    GDCM ends the whole process on unsound Huffman tables.
    """
    place, tables, component, lossless = 2, set(), None, 0xFFC3 in starts
    while True:
        marker, length = struct.unpack_from(">HH", frame, place)
        body = frame[place + 4 : place + 2 + length]
        if length < 2 or len(body) != length - 2:
            return False
        if marker in starts:
            precision, height, width, components, component, sampling = struct.unpack_from(">BHHBBB", body)
            if (height, width, components, len(body)) != (rows, columns, 1, 9) or not 2 <= precision <= 16:
                return False
            if not (1 <= sampling >> 4 <= 4 and 1 <= sampling & 0x0F <= 4):
                return False
        elif marker == 0xFFC4 and lossless:  # Huffman tables
            while body:
                counts, symbols = body[1:17], body[17 : 17 + sum(body[1:17])]
                codes = sum(count << (16 - bits) for bits, count in enumerate(counts, start=1))
                if len(symbols) != sum(counts) or not symbols or codes > 1 << 16 or max(symbols) > 16:
                    return False
                tables.add(body[0])
                body = body[17 + len(symbols) :]
        elif marker == 0xFFDA:  # start of scan
            if component is None or len(body) != 6 or body[0] != 1 or body[1] != component:
                return False
            return not lossless or (body[2] >> 4 in tables and 1 <= body[3] <= 7)
        elif marker == 0xFFE0 and body[:5] == b"JFIF\0":
            if body[5:6] != b"\x01":  # major version; GDCM stops at others
                return False
        elif not (0xFFE0 <= marker <= 0xFFEF or marker in (0xFFC4, 0xFFDB, 0xFFDD, 0xFFF8, 0xFFFE)):
            return False
        place += 2 + length


def _padding_of(dataset: Any, stored: np.ndarray) -> np.ndarray:
    """(H, W) bool: is the stored value Pixel Padding Value, or between it and Pixel Padding Range Limit?"""
    first = dataset.get("PixelPaddingValue")
    if first is None or stored.dtype.kind not in "ui":
        return np.zeros(stored.shape, bool)
    last = dataset.get("PixelPaddingRangeLimit")
    # Some writers store -2000 as unsigned 63536: wrap both ends into the dtype of the pixels.
    bits, signed = 8 * stored.dtype.itemsize, stored.dtype.kind == "i"
    ends = [int(first) % 2**bits, int(first if last is None else last) % 2**bits]
    low, high = sorted(end - 2**bits if signed and end >= 2 ** (bits - 1) else end for end in ends)
    return (stored >= low) & (stored <= high)


def require_size(size: Sequence[int], source: str) -> None:
    height, width = size
    if min(height, width) < MIN_SIDE or max(height, width) > MAX_SIDE:
        wrong = "small" if min(height, width) < MIN_SIDE else "large"
        raise InputError(f"{source}: {width} x {height} pixels is too {wrong}. A side has {MIN_SIDE} to {MAX_SIDE}.")


def require_finite(values: np.ndarray, source: str) -> None:
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise InputError(f"{source}: {bad} of {values.size} values are NaN or infinite. Replace them first.")


@contextmanager
def reading(source: str, what: str, kind: type[CTMaskNetError] = InputError) -> Iterator[None]:
    """Turn whatever a parser raises on damaged or hostile bytes into one error of ours."""
    try:
        yield
    except CTMaskNetError:
        raise
    except Exception as error:
        problem = f"{source}: not a readable {what} ({reason_of(error)})"
        raise kind(f"{problem}. It is damaged or incomplete: copy or export it again.") from error
