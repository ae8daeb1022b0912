"""ctmasknet.data.slices: every way in gives the same grey slice, all else one line that helps."""

from __future__ import annotations

import gzip
import io
import os
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageFile
from scans import dicom_dataset

from ctmasknet.data.slices import LUNG_WINDOW, MAX_SIDE, MIN_SIDE, Slice, read_slice, window
from ctmasknet.errors import ConfigError, CTMaskNetError, InputError, MissingExtraError

DICOM = Path(__file__).parents[2] / "shared" / "data" / "dicom"
H, W = 40, 48


@pytest.fixture
def grey() -> np.ndarray:
    """(40, 48) uint8 holding every value from 0 to 255."""
    return (np.arange(H * W) * 7 % 256).astype(np.uint8).reshape(H, W)


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def refused(source: Any, *words: str, error: type[CTMaskNetError] = InputError, **options: Any) -> None:
    """`source` is refused with one line that holds `words` and, for a file, its path."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error) as caught:
            read_slice(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    for word in (*words, str(source) if isinstance(source, Path) else ""):
        assert word in text


# Pictures


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_lossless_grey_pictures_read_as_their_bytes_over_255(tmp_path: Path, grey: np.ndarray, kind: str) -> None:
    path = save(Image.fromarray(grey), tmp_path / f"slice.{kind}", **({"lossless": True} if kind == "webp" else {}))
    result = read_slice(path)
    assert isinstance(result, Slice)
    assert (result.kind, result.source) == (kind, str(path))
    assert result.pixels.dtype == np.float32
    assert_array_equal(result.pixels, grey.astype(np.float32) / 255)


def test_jpeg_reads_as_pillow_decodes_it(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(H), 3 * np.arange(W)).astype(np.uint8)
    path = save(Image.fromarray(smooth), tmp_path / "slice.jpg", quality=95)
    assert read_slice(path).kind == "jpeg"
    assert_array_equal(read_slice(path).pixels, np.asarray(Image.open(path), np.float32) / 255)


def test_the_content_counts_not_the_suffix(tmp_path: Path, grey: np.ndarray) -> None:
    path = tmp_path / "slice.dcm"
    Image.fromarray(grey).save(path, format="PNG")
    assert read_slice(os.fspath(path)).kind == "png"


def test_colour_becomes_luminance_and_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    rgba = np.zeros((H, W, 4), np.uint8)
    rgba[:, :16], rgba[:, 16:32], rgba[:, 32:] = (200, 0, 0, 0), (0, 200, 0, 128), (0, 0, 200, 255)
    expected = np.repeat([0.299, 0.587, 0.114], 16)[None].repeat(H, 0) * 200 / 255
    with_alpha = save(Image.fromarray(rgba), tmp_path / "rgba.png")
    assert_allclose(read_slice(with_alpha).pixels, expected, atol=1e-6)
    assert_allclose(read_slice(save(Image.fromarray(rgba[..., :3]), tmp_path / "rgb.png")).pixels, expected, atol=1e-6)
    assert_allclose(read_slice(rgba).pixels, expected, atol=1e-6)


def test_grey_stored_as_la_palette_or_three_equal_channels_is_exactly_grey(grey: np.ndarray, tmp_path: Path) -> None:
    image = Image.fromarray(grey)
    transparent = Image.merge("LA", (image, Image.new("L", image.size, 0)))
    palette = image.convert("RGB").quantize(256)
    colours = np.asarray(palette.convert("RGB"), np.float64) @ [0.299, 0.587, 0.114] / 255
    expected = grey.astype(np.float32) / 255
    assert_array_equal(read_slice(save(transparent, tmp_path / "la.png")).pixels, expected)
    assert_array_equal(read_slice(save(image.convert("RGB"), tmp_path / "rgb.png")).pixels, expected)
    path = save(palette, tmp_path / "palette.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_allclose(read_slice(path).pixels, colours, atol=1e-6)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_pictures_are_stretched_by_their_own_range_with_a_warning(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(1000, 5000, H * W).round().astype(np.uint16).reshape(H, W)
    path = save(Image.fromarray(values), tmp_path / f"deep.{suffix}")
    with pytest.warns(UserWarning, match=f"deep.{suffix}.*1000..5000"):
        pixels = read_slice(path).pixels
    assert_allclose(pixels, (values - 1000.0) / 4000, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_array_equal(read_slice(path, units="range").pixels, pixels)


def test_big_endian_32_bit_and_float_tiffs_can_be_declared_to_be_hu(tmp_path: Path) -> None:
    hu = np.linspace(-2048, 1000, H * W).round().reshape(H, W)
    expected = np.interp(hu, [-1350, 150], [0, 1])
    for dtype in (np.int32, np.float32):
        path = save(Image.fromarray(hu.astype(dtype)), tmp_path / f"{np.dtype(dtype)}.tif")
        assert_allclose(read_slice(path, units="hu").pixels, expected, atol=1e-6)
        with pytest.warns(UserWarning, match=path.name):
            read_slice(path)
    header = struct.pack(">2sHI", b"MM", 42, 8 + 2 * H * W) + hu.astype(">i2").tobytes()
    entries = [
        (256, W),
        (257, H),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, H),
        (279, 2 * H * W),
        (339, 2),
    ]
    tags = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in entries)
    path = tmp_path / "big_endian.tif"
    path.write_bytes(header + struct.pack(">H", len(entries)) + tags + bytes(4))
    assert_allclose(read_slice(path, units="hu").pixels, expected, atol=1e-6)


def test_pil_images_read_like_their_files(tmp_path: Path, grey: np.ndarray) -> None:
    image = Image.fromarray(grey)
    result = read_slice(image)
    assert (result.source, result.kind) == ("PIL image", "pil")
    assert_array_equal(result.pixels, read_slice(save(image, tmp_path / "slice.png")).pixels)
    with pytest.warns(UserWarning, match="PIL image"):
        read_slice(Image.fromarray(grey.astype(np.uint16) * 200))


# Arrays and tensors

TO_SHAPES: list[Callable[[np.ndarray], np.ndarray]] = [
    lambda a: a,
    lambda a: a[..., None],
    lambda a: a[None],
    lambda a: np.stack([a] * 3, -1),
    lambda a: np.stack([a] * 3, 0),
    lambda a: np.stack([a, a, a, np.zeros_like(a)], -1),
]


@pytest.mark.parametrize("to_shape", TO_SHAPES)
@pytest.mark.parametrize("as_float", [False, True])
def test_all_shapes_and_both_dtypes_give_the_same_slice(
    grey: np.ndarray, to_shape: Callable[[np.ndarray], np.ndarray], as_float: bool
) -> None:
    expected = grey.astype(np.float32) / 255
    array = to_shape(expected if as_float else grey)
    assert_array_equal(read_slice(array).pixels, expected)
    assert_array_equal(read_slice(torch.from_numpy(array.copy())).pixels, expected)
    assert read_slice(array).kind == "array"


def test_tensors_with_a_gradient_and_bfloat16_are_accepted() -> None:
    values = torch.linspace(0, 1, H * W).reshape(1, H, W)
    result = read_slice(values.clone().requires_grad_())
    assert (result.source, result.kind) == ("tensor", "tensor")
    assert_array_equal(result.pixels, values[0].numpy())
    assert_allclose(read_slice(values.bfloat16()).pixels, values[0].numpy(), atol=4e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_tensors_are_accepted() -> None:
    values = torch.linspace(0, 1, H * W).reshape(H, W)
    assert_array_equal(read_slice(values.cuda()).pixels, values.numpy())


def test_the_source_is_not_changed_and_not_shared() -> None:
    values = np.full((H, W), 0.5, np.float32)
    read_slice(values).pixels[:] = 1
    assert (values == 0.5).all()


def test_rounding_past_0_and_1_is_clipped() -> None:
    values = np.full((H, W), 1.00001)
    values[0] = -0.00001
    pixels = read_slice(values).pixels
    assert (pixels.min(), pixels.max()) == (0, 1)


@pytest.mark.parametrize(
    ("dtype", "stored_from"), [(np.int16, 0), (np.uint16, 1024), (np.int64, 0), (np.float64, 1024)]
)
def test_other_units_must_be_declared_and_hu_plus_1024_is_put_right(dtype: Any, stored_from: int) -> None:
    hu = np.linspace(-1000, 300, H * W).round().reshape(H, W)
    values = (hu + stored_from).astype(dtype)
    refused(values, "array", 'units="hu"', 'units="range"')
    result = read_slice(values, units="hu")
    assert_allclose(result.pixels, np.interp(hu, [-1350, 150], [0, 1]), atol=1e-6)
    assert result.units == ("hu+1024" if stored_from else "hu")
    stretched = read_slice(values, units="range")
    assert_allclose(stretched.pixels, (hu + 1000) / 1300, atol=1e-6)
    assert stretched.units == "range"


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(0, 255, H * W).astype(np.uint8),  # 8 bits
        np.linspace(-120, 120, H * W).astype(np.int8),
        np.linspace(0, 1, H * W),  # scaled
        np.linspace(-160, 240, H * W),  # clipped to another window
        np.linspace(-2048, -700, H * W),  # 1024 subtracted twice
        np.linspace(0, 65535, H * W),  # stretched to 16 bits
        np.full(H * W, -3000.0),
    ],
)
def test_values_without_air_and_tissue_are_no_hu_even_if_declared(values: np.ndarray, tmp_path: Path) -> None:
    refused(values.reshape(H, W), "array", "no Hounsfield units", 'units="range"', units="hu")
    path = save(Image.fromarray(values.reshape(H, W).astype(np.float32)), tmp_path / "a.tif")
    refused(path, "no Hounsfield units", units="hu")
    assert read_slice(path, units="range").units == "range"


def test_the_lung_window_is_minus_1350_to_150_hu() -> None:
    assert LUNG_WINDOW == (-1350.0, 150.0)
    hu = np.array([-3024, -1350, -1000, -600, 150, 3000], np.int16)
    assert window(hu).dtype == np.float32
    assert_allclose(window(hu), [0, 0, 350 / 1500, 0.5, 1, 1], atol=1e-7)


@pytest.mark.parametrize("source", [np.full((H, W), 7.0), np.full((H, W), -3, np.int16), Image.new("I", (W, H), 9)])
def test_a_constant_slice_stretches_to_zeros(source: Any) -> None:
    assert_array_equal(read_slice(source, units="range").pixels, np.zeros((H, W), np.float32))


@pytest.mark.parametrize("units", ["HU", "", "window", 1])
def test_unknown_units_are_refused(units: Any) -> None:
    refused(np.zeros((H, W)), '"hu"', error=ConfigError, units=units)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((H, W, 2)), ["(40, 48, 2)", "(H, W)"]),
        (np.zeros((5, H, W)), ["(5, 40, 48)"]),
        (np.zeros((4, H, W)), ["(4, 40, 48)"]),
        (np.zeros((1, 3, H, W)), ["(1, 3, 40, 48)"]),
        (np.zeros(9), ["(9,)"]),
        (np.zeros((0, 0)), ["too small"]),
        (np.zeros((1, 1)), ["too small", str(MIN_SIDE)]),
        (np.zeros((3, 1, 1)), ["too small"]),
        (np.zeros((3, MIN_SIDE - 1, 100)), ["100 x 31", "too small"]),
        (np.zeros((MIN_SIDE, MAX_SIDE + 1), np.uint8), ["too large", str(MAX_SIDE)]),
        (np.zeros((H, W), bool), ["bool"]),
        (np.zeros((H, W), complex), ["complex"]),
        (np.full((H, W), "a"), ["<U1"]),
        (np.full((H, W), np.nan), ["1920 of 1920 values are NaN"]),
        (np.full((3, H, W), np.inf), ["NaN or infinite"]),
        (torch.zeros(H, W, dtype=torch.bool), ["tensor", "bool"]),
        (torch.zeros(H, W, device="meta"), ["tensor", "meta"]),
        (torch.zeros(H, W).to_sparse(), ["tensor", "sparse"]),
        (Image.new("CMYK", (W, H)), ["PIL image", "CMYK"]),
        (Image.new("1", (W, H)), ["PIL image", "mode 1"]),
        (Image.new("L", (1, 1)), ["PIL image", "too small"]),
        (None, ["NoneType", "path"]),
        ([[0.0]], ["list"]),
        (7, ["int"]),
    ],
)
def test_what_is_not_a_slice_is_refused(source: Any, words: list[str]) -> None:
    refused(source, *words)


@pytest.mark.parametrize("units", ["hu", "range"])
def test_nan_is_refused_in_every_unit(units: str) -> None:
    values = np.zeros((H, W))
    values[3, 4] = np.nan
    refused(values, "1 of 1920 values are NaN", units=units)
    refused(Image.fromarray(values.astype(np.float32)), "NaN", units=units)


# Bad files


def test_missing_directory_and_empty_files_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.png", "no such file")
    refused(tmp_path, "directory", "Predictor.volume")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "empty")
    refused("a\0b.png", "path")
    refused("a" * 5000, "path")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "regular file")


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii", "scan"])
def test_a_whole_scan_names_what_predicts_it(tmp_path: Path, name: str) -> None:
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image(np.zeros((H, W, 3), np.int16), np.eye(4))
    (tmp_path / name).write_bytes(gzip.compress(image.to_bytes()) if name.endswith(".gz") else image.to_bytes())
    refused(tmp_path / name, "NIfTI holds a whole scan", "Predictor.volume")


def test_a_tiff_whose_pages_are_a_loop_is_refused(tmp_path: Path, grey: np.ndarray) -> None:
    path = save(Image.fromarray(grey), tmp_path / "loop.tif")
    data = bytearray(path.read_bytes())
    (directory,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, directory)
    struct.pack_into("<I", data, directory + 2 + 12 * entries, directory)  # the next page is this one
    path.write_bytes(data)
    refused(path, "several pages")


def test_a_name_that_is_no_unicode_is_a_name(tmp_path: Path, grey: np.ndarray) -> None:
    raw = os.fsencode(tmp_path) + b"/n\xff\xfe.png"
    try:
        Path(os.fsdecode(raw)).write_bytes(encoded(Image.fromarray(grey), "png"))
    except OSError:
        pytest.skip("the file system takes Unicode only")
    result = read_slice(os.fsdecode(raw))
    assert os.fsencode(result.source) == raw
    assert_array_equal(result.pixels, grey.astype(np.float32) / 255)


def test_an_unreadable_file_says_so(tmp_path: Path, grey: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(Image.fromarray(grey), tmp_path / "secret.png")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything

        def denied(*_: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", denied)
    refused(path, "permission")


def test_a_text_file_named_png_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "scan.png"
    path.write_text("this is no picture\n" * 20)
    refused(path, "not a readable image", "PNG header missing", "DICOM")


@pytest.mark.parametrize("suffix", ["gif", "bmp", "jp2"])
def test_other_picture_formats_are_refused(tmp_path: Path, grey: np.ndarray, suffix: str) -> None:
    refused(save(Image.fromarray(grey), tmp_path / f"slice.{suffix}"), "unknown format", "Give a PNG")


@pytest.mark.parametrize("kind", ["tiff", "png", "webp"])
def test_several_pages_or_frames_are_refused(tmp_path: Path, grey: np.ndarray, kind: str) -> None:
    image = Image.fromarray(grey)
    path = tmp_path / f"pages.{kind}"
    image.save(path, save_all=True, append_images=[Image.fromarray(255 - grey)])
    refused(path, "several pages or frames", "Split")
    with Image.open(path) as opened:
        refused(opened, "several pages or frames")


def test_white_is_zero_16_bit_tiff_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "white.tif"
    Image.fromarray(np.zeros((H, W), np.uint16)).save(path, tiffinfo={262: 0})
    refused(path, "white-is-zero", units="range")


def test_8_bit_pictures_cannot_be_declared_to_be_hu(tmp_path: Path, grey: np.ndarray) -> None:
    refused(save(Image.fromarray(grey), tmp_path / "slice.png"), "8-bit", units="hu")


def test_a_1x1_picture_is_too_small(tmp_path: Path) -> None:
    refused(save(Image.new("L", (1, 1)), tmp_path / "dot.png"), "1 x 1", "too small", str(MIN_SIDE))


def png_header(side: int) -> bytes:
    """The first chunks of a PNG that claims `side` x `side` pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100))),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


@pytest.mark.parametrize("side", [MAX_SIDE + 1, 10_000, 30_000])
def test_a_huge_picture_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(side))
    refused(path, f"{side} x {side}", "too large", str(MAX_SIDE))


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp"])
def test_a_picture_that_is_too_large_is_never_decoded(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(Image.new("L", (MAX_SIDE + 1, MIN_SIDE)), tmp_path / f"huge.{kind}")
    monkeypatch.delattr(ImageFile.ImageFile, "load")
    refused(path, f"{MAX_SIDE + 1} x {MIN_SIDE}", "too large")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


ENCODINGS: dict[str, dict[str, Any]] = {
    "png": {},
    "jpeg": {"quality": 90},
    "tiff": {},
    "tiff_lzw": {"compression": "tiff_lzw"},
    "webp": {"lossless": True},
}


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.filterwarnings("ignore")  # Pillow's, on damaged TIFF directories
def test_a_truncated_picture_is_never_half_a_slice(tmp_path: Path, grey: np.ndarray, name: str) -> None:
    kind = name.split("_")[0]
    data = encoded(Image.fromarray(grey), kind, **ENCODINGS[name])
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(data)
    whole = read_slice(path).pixels
    for length in [*range(1, len(data) - 16, max(1, len(data) // 60)), *range(len(data) - 16, len(data))]:
        path.write_bytes(data[:length])
        try:
            pixels = read_slice(path).pixels
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:  # only what comes after the last pixel is missing
            assert_array_equal(pixels, whole)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="not a readable"):
        read_slice(path)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.filterwarnings("ignore")
def test_random_damage_to_pictures_raises_nothing_but_our_errors(tmp_path: Path, grey: np.ndarray, name: str) -> None:
    kind = name.split("_")[0]
    data = encoded(Image.fromarray(grey), kind, **ENCODINGS[name])
    damage(data, tmp_path / f"damaged.{kind}", count=150)


def damage(data: bytes, path: Path, count: int) -> None:
    """Read `count` copies of `data` with flipped bytes, most of them in the header."""
    random = np.random.default_rng(0)
    for _ in range(count):
        copy = bytearray(data)
        reach = len(copy) if random.random() < 0.3 else min(len(copy), 600)
        for place in random.integers(0, reach, random.integers(1, 6)):
            copy[place] = random.integers(0, 256)
        path.write_bytes(copy)
        try:
            pixels = read_slice(path).pixels
        except CTMaskNetError as error:
            assert str(path) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert np.isfinite(pixels).all()


def test_a_png_with_a_wrong_checksum_is_damaged(tmp_path: Path, grey: np.ndarray) -> None:
    data = bytearray(encoded(Image.fromarray(grey), "png"))
    data[data.index(b"IDAT") + 60] ^= 0xFF
    path = tmp_path / "bitrot.png"
    path.write_bytes(data)
    refused(path, "not a readable PNG")


# DICOM

HU = np.linspace(-1024, 1500, H * W).round().reshape(H, W)  # air first, bone last
WINDOWED = np.interp(HU, [-1350, 150], [0, 1])


def make_dicom(path: Path, stored: np.ndarray, *, syntax: Any = None, preamble: Any = True, **tags: Any) -> Path:
    """Write a CT slice with pydicom; a tag given as None is left out."""
    pytest.importorskip("pydicom")
    window = {"WindowCenter": "40", "WindowWidth": "350"}  # mediastinal: must not be used
    dataset = dicom_dataset(stored, **{**window, **tags})
    if preamble:
        dataset.file_meta.TransferSyntaxUID = syntax or dataset.file_meta.TransferSyntaxUID
        dataset.save_as(path, enforce_file_format=True)
    else:
        del dataset.file_meta
        dataset.save_as(path, implicit_vr=True, little_endian=True)
    return path


def test_dicom_is_rescaled_and_put_into_the_lung_window_whatever_window_it_stores(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    stored = np.linspace(0, 1300, H * W).round().astype(np.uint16).reshape(H, W)
    path = make_dicom(tmp_path / "slice", stored, RescaleSlope="2", RescaleIntercept="-1100", BitsStored=12, HighBit=11)
    result = read_slice(path)
    assert (result.kind, result.pixels.dtype) == ("dicom", np.float32)
    hu = pydicom.pixels.apply_rescale(stored, pydicom.dcmread(path))
    assert hu.min() == -1100
    assert hu.max() == 1500
    assert_allclose(result.pixels, np.interp(hu, [-1350, 150], [0, 1]), atol=1e-6)
    assert_array_equal(read_slice(path, units="hu").pixels, result.pixels)
    assert_allclose(read_slice(path, units="range").pixels, stored / 1300, atol=1e-6)


def test_signed_dicom_with_values_outside_the_circle_gives_0_there(tmp_path: Path) -> None:
    stored = HU.astype(np.int16)
    stored[0], stored[1] = -2000, -2048
    pixels = read_slice(make_dicom(tmp_path / "a.dcm", stored)).pixels
    assert (pixels[:2] == 0).all()
    assert_allclose(pixels[2:], WINDOWED[2:], atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "padding", "tags"),
    [
        (np.int16, -2000, {"PixelPaddingValue": -2000}),
        (np.uint16, 63536, {"PixelPaddingValue": 63536}),  # -2000 as unsigned: far above bone if taken for HU
        (np.int16, 30000, {"PixelPaddingValue": 30000}),
        (np.int16, 30500, {"PixelPaddingValue": 30000, "PixelPaddingRangeLimit": 31000}),
        (np.int16, 30500, {"PixelPaddingValue": 31000, "PixelPaddingRangeLimit": 30000}),
    ],
)
def test_pixel_padding_reads_as_0(tmp_path: Path, dtype: Any, padding: int, tags: dict[str, int]) -> None:
    stored = (HU + 1024).astype(dtype)
    stored[:5] = padding
    path = make_dicom(tmp_path / "a.dcm", stored, RescaleIntercept="-1024", **tags)
    for units in (None, "hu"):
        pixels = read_slice(path, units=units).pixels
        assert (pixels[:5] == 0).all()
        assert_allclose(pixels[5:], WINDOWED[5:], atol=1e-6)
    stretched = read_slice(path, units="range").pixels
    assert (stretched[:5] == 0).all()
    assert_allclose(stretched[5:], (HU[5:] - HU[5, 0]) / (1500 - HU[5, 0]), atol=1e-6)


def test_padding_with_the_value_of_air_leaves_air_alone(tmp_path: Path) -> None:
    path = make_dicom(tmp_path / "a.dcm", (HU + 1024).astype(np.uint16), RescaleIntercept="-1024", PixelPaddingValue=0)
    assert_allclose(read_slice(path).pixels, WINDOWED, atol=1e-6)


def test_monochrome1_does_not_change_hu(tmp_path: Path) -> None:
    plain = make_dicom(tmp_path / "1.dcm", HU.astype(np.int16), PhotometricInterpretation="MONOCHROME1")
    assert_allclose(read_slice(plain).pixels, WINDOWED, atol=1e-6)
    # Stored upside down, with the slope that puts it right.
    upside_down = (3000 - HU).astype(np.uint16)
    tags = {"RescaleSlope": "-1", "RescaleIntercept": "3000", "PhotometricInterpretation": "MONOCHROME1"}
    assert_allclose(read_slice(make_dicom(tmp_path / "2.dcm", upside_down, **tags)).pixels, WINDOWED, atol=1e-6)


def test_monochrome1_ct_stored_upside_down_against_the_standard_is_refused(tmp_path: Path) -> None:
    body = np.full((H, W), 24, np.uint16)  # air, -1000 HU
    body[8:32, 8:40] = 1064
    body[12:20, 12:20] = 2000
    tags = {"RescaleIntercept": "-1024", "PhotometricInterpretation": "MONOCHROME1"}
    assert read_slice(make_dicom(tmp_path / "good.dcm", body, **tags)).pixels[0, 0] == pytest.approx(350 / 1500)
    wrong = make_dicom(tmp_path / "wrong.dcm", (2000 - body).astype(np.uint16), **tags)
    refused(wrong, "MONOCHROME1", 'units="hu"', 'units="range"')
    assert_allclose(read_slice(wrong, units="range").pixels, (body - 24) / 1976, atol=1e-6)


def test_monochrome1_secondary_capture_is_inverted_as_viewers_show_it(tmp_path: Path, grey: np.ndarray) -> None:
    tags = {"Modality": "OT", "RescaleSlope": None, "RescaleIntercept": None}
    path = make_dicom(tmp_path / "sc.dcm", grey, PhotometricInterpretation="MONOCHROME1", **tags)
    refused(path, "modality is OT", 'units="range"')
    assert_allclose(read_slice(path, units="range").pixels, (255 - grey.astype(float)) / 255, atol=1e-6)
    flat = make_dicom(tmp_path / "flat.dcm", grey * 0, PhotometricInterpretation="MONOCHROME1", **tags)
    assert (read_slice(flat, units="range").pixels == 0).all()


@pytest.mark.parametrize(
    ("shift", "tags", "words"),
    [
        (0, {"Modality": "NM"}, "modality is NM"),
        (0, {"Modality": None}, "modality is missing"),
        (0, {"RescaleSlope": None, "RescaleIntercept": None}, "no usable rescale"),
        (0, {"RescaleSlope": "0"}, "no usable rescale"),
        (0, {"RescaleType": "US"}, "rescale type is US"),
        (1024, {}, "lowest value is 0 HU"),
        (6000, {"RescaleSlope": "0.5", "RescaleIntercept": "-3200"}, "denser than bone"),
    ],
)
def test_dicom_without_hu_is_refused_with_the_remedy(tmp_path: Path, shift: int, tags: Any, words: str) -> None:
    stored = (HU + shift).astype(np.int16)
    if "bone" in words:
        stored[20:] += 20_000
    path = make_dicom(tmp_path / "a.dcm", stored, **tags)
    refused(path, words, 'units="hu"', 'units="range"')
    low, high = float(stored.min()), float(stored.max())
    assert_allclose(read_slice(path, units="range").pixels, (stored - low) / (high - low), atol=1e-6)
    as_hu = read_slice(path, units="hu")
    assert as_hu.units == ("hu+1024" if shift == 1024 else "hu")
    assert as_hu.pixels.max() == 1
    if shift in (0, 1024):
        assert_allclose(as_hu.pixels, WINDOWED, atol=1e-6)


def test_dicom_localizers_frames_colours_and_sizes_are_refused(tmp_path: Path, grey: np.ndarray) -> None:
    stored = HU.astype(np.int16)
    refused(make_dicom(tmp_path / "1.dcm", stored, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer")
    refused(make_dicom(tmp_path / "2.dcm", np.stack([stored] * 3), NumberOfFrames=3), "3 frames")
    rgb = np.stack([grey] * 3, -1)
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    refused(make_dicom(tmp_path / "3.dcm", rgb, Rows=H, Columns=W, **colour), "RGB", units="range")
    refused(make_dicom(tmp_path / "4.dcm", stored[:1, :1]), "too small")
    refused(make_dicom(tmp_path / "5.dcm", stored, Rows=10_000, Columns=10_000), "10000 x 10000", "too large")
    refused(make_dicom(tmp_path / "6.dcm", stored, Rows=None), "no image")
    refused(make_dicom(tmp_path / "7.dcm", stored, PixelData=None), "DICOM")
    refused(
        make_dicom(tmp_path / "8.dcm", stored, PixelPaddingValue=-2000, PixelPaddingRangeLimit=9999),
        "padding",
    )
    assert_allclose(read_slice(make_dicom(tmp_path / "9.dcm", stored, NumberOfFrames=1)).pixels, WINDOWED, atol=1e-6)


def test_enhanced_ct_keeps_its_rescale_in_functional_groups(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    transformation, group = pydicom.Dataset(), pydicom.Dataset()
    transformation.RescaleSlope, transformation.RescaleIntercept, transformation.RescaleType = (
        "1",
        "-1024",
        "HU",
    )
    group.PixelValueTransformationSequence = [transformation]
    path = make_dicom(
        tmp_path / "a.dcm",
        (HU + 1024).astype(np.uint16),
        RescaleSlope=None,
        RescaleIntercept=None,
        SharedFunctionalGroupsSequence=[group],
    )
    assert_allclose(read_slice(path).pixels, WINDOWED, atol=1e-6)


def test_dicom_without_preamble_is_read_if_named_dcm(tmp_path: Path) -> None:
    path = make_dicom(tmp_path / "bare.dcm", HU.astype(np.int16), preamble=False)
    assert b"DICM" not in path.read_bytes()
    assert_allclose(read_slice(path).pixels, WINDOWED, atol=1e-6)
    refused(path.rename(tmp_path / "bare"), "not a readable image", ".dcm")


def test_a_text_file_named_dcm_is_no_dicom(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    path = tmp_path / "notes.dcm"
    path.write_text("this is no DICOM file\n" * 40)
    refused(path)


def make_jpeg_dicom(path: Path, jpeg: bytes) -> Path:
    pydicom = pytest.importorskip("pydicom")
    return make_dicom(
        path,
        np.zeros((H, W), np.uint8),
        syntax=pydicom.uid.JPEGBaseline8Bit,
        RescaleSlope="10",
        RescaleIntercept="-1200",
        PixelData=pydicom.encaps.encapsulate([jpeg + bytes(len(jpeg) % 2)]),
    )


def test_jpeg_compressed_dicom_is_decoded_before_the_rescale(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(H), 3 * np.arange(W)).astype(np.uint8)
    jpeg = encoded(Image.fromarray(smooth), "jpeg", quality=95)
    pixels = read_slice(make_jpeg_dicom(tmp_path / "a.dcm", jpeg)).pixels
    decoded = np.asarray(Image.open(io.BytesIO(jpeg)), float)
    assert_allclose(pixels, np.interp(decoded * 10 - 1200, [-1350, 150], [0, 1]), atol=11 / 1500)


@pytest.mark.parametrize("segment", [b"\xff\xc0", b"\xff\xc4", b"\xff\xda"])
def test_damaged_jpeg_headers_in_dicom_do_not_reach_a_decoder_that_aborts(tmp_path: Path, segment: bytes) -> None:
    jpeg = bytearray(encoded(Image.new("L", (W, H), 90), "jpeg"))
    place = jpeg.index(segment)
    jpeg[place + 4 : place + 10] = b"\xff" * 6
    refused(make_jpeg_dicom(tmp_path / "a.dcm", bytes(jpeg)), "JPEG", "damaged")


def test_without_pydicom_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(bytes(128) + b"DICM\x02\x00")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(MissingExtraError, match=r"DICOM.*pydicom.*ctmasknet\[io\]"):
        read_slice(path)


def lossless_jpeg_header() -> bytes:
    """Start, frame, one Huffman table with one code, scan: what precedes the pixels in a JPEG Lossless image."""
    frame = struct.pack(">HHBHHBBBB", 0xFFC3, 11, 16, H, W, 1, 1, 0x11, 0)
    table = struct.pack(">HHB", 0xFFC4, 20, 0) + bytes([1, *[0] * 15, 0])
    return b"\xff\xd8" + frame + table + struct.pack(">HH6B", 0xFFDA, 8, 1, 1, 0, 1, 0, 0)


def test_without_a_decoder_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pydicom = pytest.importorskip("pydicom")
    stored = HU.astype(np.int16)
    path = make_dicom(
        tmp_path / "a.dcm",
        stored,
        syntax=pydicom.uid.JPEGLosslessSV1,
        PixelData=pydicom.encaps.encapsulate([lossless_jpeg_header() + bytes(64) + b"\xff\xd9"]),
    )
    monkeypatch.setitem(sys.modules, "gdcm", None)
    monkeypatch.setattr(pydicom.pixels.decoders.JPEGLosslessSV1Decoder, "_available", {})
    refused(path, "gdcm", "ctmasknet[io]", error=MissingExtraError)


@pytest.mark.filterwarnings("ignore")
def test_damaged_and_truncated_dicom_raises_nothing_but_our_errors(tmp_path: Path) -> None:
    data = make_dicom(tmp_path / "a.dcm", HU.astype(np.int16)).read_bytes()
    path = tmp_path / "damaged.dcm"
    for length in [*range(133, 1200, 17), *range(1200, len(data), 401), len(data) - 2]:
        path.write_bytes(data[:length])
        with pytest.raises(InputError) as caught:
            read_slice(path)
        assert str(path) in str(caught.value)
    damage(data, path, count=150)


# Real CT, where it is at hand

needs_real_ct = pytest.mark.skipif(not DICOM.is_dir(), reason="needs the shared CT data")


@needs_real_ct
@pytest.mark.parametrize("name", ["ny-sbu_a002304_135.dcm", "ny-sbu_a046441_23.dcm"])
def test_real_ct_equals_pydicoms_rescale_in_the_lung_window(name: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(DICOM / name)
    hu = pydicom.pixels.apply_rescale(dataset.pixel_array, dataset)
    pixels = read_slice(DICOM / name).pixels
    assert_allclose(pixels, np.interp(hu, [-1350, 150], [0, 1]), atol=1e-6)
    assert pixels[0, 0] == 0  # outside the reconstruction circle


@needs_real_ct
def test_real_jpeg_lossless_series_is_decoded() -> None:
    pytest.importorskip("pydicom")
    pytest.importorskip("gdcm")
    paths = sorted((DICOM / "series").glob("*.dcm"))
    means = [read_slice(path).pixels.mean() for path in paths[:3]]
    assert_allclose(means, 0.56, atol=0.03)  # neighbouring slices of one patient


@needs_real_ct
def test_a_real_malformed_file_is_explained_and_can_be_stretched() -> None:
    pytest.importorskip("pydicom")
    path = DICOM / "malformed_nm.dcm"
    refused(path, "modality is NM", 'units="hu"', 'units="range"')
    pixels = read_slice(path, units="range").pixels
    assert (pixels.shape, pixels.min(), pixels.max()) == ((630, 630), 0, 1)
    assert read_slice(path, units="hu").units == "hu+1024"
