"""Hostile and broken files: each gives one line that names it, in little time and memory; good ones go through."""

from __future__ import annotations

import gzip
import json
import math
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ctmasknet.data.check import check_dataset
from ctmasknet.data.datasets import CachedDataset, open_dataset
from ctmasknet.data.layouts import class_folder_names, decode_segmentation, list_slices, read_class_mask
from ctmasknet.data.scans import MAX_VOXELS, open_volume
from ctmasknet.data.slices import MAX_SIDE, read_slice
from ctmasknet.errors import CTMaskNetError, DataError, InputError

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
resource = pytest.importorskip("resource")

from scans import block_volume, dicom_dataset  # noqa: E402

HU = np.linspace(-1024, 1500, 40 * 48).round().reshape(40, 48).astype(np.int16)
STORED = (HU.astype(int) + 1024).astype(np.uint16)
WINDOWED = np.interp(HU, [-1350, 150], [0, 1])


@contextmanager
def little(megabytes: int = 200) -> Iterator[None]:
    """What happens inside takes under 10 s of this process and at most so much memory more than anything before."""
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - begin < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes * 1024


def refused(read: Callable[[Path], Any], path: Path, words: str, error: type[CTMaskNetError] = InputError) -> None:
    with little(), pytest.raises(error, match=words) as caught:
        read(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert "Traceback" not in text
    assert len(text) < 400 + 3 * len(str(path))


# DICOM


def written(path: Path, **tags: Any) -> Path:
    dicom_dataset(HU, **tags).save_as(path, enforce_file_format=True)
    return path


def compressed(path: Path, syntax: str, *frames: bytes, stored: np.ndarray = STORED) -> Path:
    packed = pydicom.encaps.encapsulate([frame + b"\0" * (len(frame) % 2) for frame in frames])
    dataset = dicom_dataset(stored, RescaleIntercept="-1024", PixelData=packed)
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path, enforce_file_format=True)
    return path


def jpeg_2000(pixels: np.ndarray) -> bytes:
    return bytes(pytest.importorskip("openjpeg.utils").encode_array(pixels, photometric_interpretation=2))


def jpeg_ls(pixels: np.ndarray) -> bytes:
    return bytes(pytest.importorskip("jpeg_ls").encode_array(pixels))


def rle(pixels: np.ndarray) -> bytes:
    encoder = pydicom.pixels.encoders.RLELosslessEncoder
    options = {"rows": pixels.shape[0], "columns": pixels.shape[1], "samples_per_pixel": 1, "number_of_frames": 1}
    depth = {"bits_allocated": 16, "bits_stored": 16, "pixel_representation": 0}
    return encoder.encode(pixels, photometric_interpretation="MONOCHROME2", **options, **depth)


CODECS = {
    "1.2.840.10008.1.2.4.90": jpeg_2000,
    "1.2.840.10008.1.2.4.80": jpeg_ls,
    "1.2.840.10008.1.2.5": rle,
}


@pytest.mark.parametrize("syntax", CODECS)
def test_every_codec_gives_the_stored_pixels_back(tmp_path: Path, syntax: str) -> None:
    path = compressed(tmp_path / "a.dcm", syntax, CODECS[syntax](STORED))
    np.testing.assert_allclose(read_slice(path).pixels, WINDOWED, atol=1e-6)


@pytest.mark.parametrize("syntax", CODECS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_frames_raise_nothing_but_our_errors(tmp_path: Path, syntax: str) -> None:
    random, frame = np.random.default_rng(0), CODECS[syntax](STORED)
    for number in range(12):
        copy = bytearray(frame)
        for place in random.integers(0, len(copy) if number % 2 else 100, 3):
            copy[place] = random.integers(0, 256)
        path = compressed(tmp_path / "a.dcm", syntax, bytes(copy))
        try:
            read_slice(path)
        except InputError as error:
            assert "Traceback" not in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
    refused(read_slice, compressed(tmp_path / "a.dcm", syntax, frame[:-30]), "are damaged")


@pytest.mark.slow
def test_a_frame_that_keeps_its_decoder_counting_is_damaged_in_the_end(tmp_path: Path) -> None:
    frame = bytes.fromhex(  # found by tools/fuzz
        "ffd8fff7000b0b0028003001011100ffda0008010100000000a18618c67feffea281040082fe633333336d11114512922404"
        "7e21495552aaaabfff"
    )
    path = compressed(tmp_path / "a.dcm", "1.2.840.10008.1.2.4.80", frame, stored=STORED[:40, :48])
    refused(read_slice, path, "are damaged")


def test_a_frame_that_claims_another_size_never_reaches_its_decoder(tmp_path: Path) -> None:
    frame = bytearray(jpeg_2000(STORED))
    struct.pack_into(">2I", frame, 8, 60_000, 60_000)
    refused(read_slice, compressed(tmp_path / "a.dcm", "1.2.840.10008.1.2.4.90", bytes(frame)), "are damaged")
    frame = bytearray(jpeg_2000(STORED))
    struct.pack_into(">2I", frame, 24, 1, 1)  # tiles of one pixel
    refused(read_slice, compressed(tmp_path / "b.dcm", "1.2.840.10008.1.2.4.90", bytes(frame)), "are damaged")
    frame = bytearray(jpeg_ls(STORED))
    struct.pack_into(">2H", frame, frame.index(b"\xff\xf7") + 5, 65_535, 65_535)
    refused(read_slice, compressed(tmp_path / "c.dcm", "1.2.840.10008.1.2.4.80", bytes(frame)), "are damaged")
    for syntax, encode in (("70", jpeg_2000), ("70", jpeg_ls), ("90", jpeg_ls), ("80", jpeg_2000)):
        path = compressed(tmp_path / "e.dcm", f"1.2.840.10008.1.2.4.{syntax}", encode(STORED))
        refused(read_slice, path, "are damaged")
    segment = b"\x81\x00" * (1 << 20)  # 128 MB of zeros
    frame = struct.pack("<16I", 2, 64, 64 + len(segment), *[0] * 13) + segment + segment
    refused(read_slice, compressed(tmp_path / "d.dcm", "1.2.840.10008.1.2.5", bytes(frame)), "are damaged")


def test_gdcm_gets_jpeg_lossless_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gdcm", None)
    for syntax, encode in CODECS.items():
        read_slice(compressed(tmp_path / "a.dcm", syntax, encode(STORED)))
    video = compressed(tmp_path / "b.dcm", "1.2.840.10008.1.2.4.102", b"\0\0\0\1")
    refused(read_slice, video, "MPEG-4.*are not supported")


def test_frames_that_are_not_there_are_not_looked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "a.dcm", NumberOfFrames=2**31 - 1)
    refused(open_volume, path, "2147483647 frames are too many")
    refused(read_slice, path, "2147483647 frames")
    refused(open_volume, written(tmp_path / "b.dcm", NumberOfFrames=9_999), r"b\.dcm")


def test_deflated_dicom_is_not_inflated(tmp_path: Path) -> None:
    dataset = dicom_dataset(HU)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    for read in (read_slice, open_volume):
        refused(read, tmp_path / "a.dcm", "deflated DICOM is not supported")


def test_sequences_in_sequences_end_somewhere(tmp_path: Path) -> None:
    item = pydicom.Dataset()
    path = written(tmp_path / "a.dcm", RequestAttributesSequence=[item])
    data = path.read_bytes()
    place = data.index(struct.pack("<2H", 0x0040, 0x0275))
    opening = struct.pack("<2H2sHI", 0x0040, 0x0275, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<2HI", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    path.write_bytes(data[:place] + opening * 100_000)
    refused(read_slice, path, "not a readable DICOM")


# NIfTI


def nifti(path: Path, shape: tuple[int, ...], *, size: int | None = None, dtype: type = np.int16) -> Path:
    """A header of this shape, and a file of this size, mostly holes."""
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header.set_sform(np.diag([1, 1, 1, 1]), 1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    head = header.binaryblock + bytes(4)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(head + bytes(size or 0)))
        return path
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(352 + (size or 0))
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_scan_of_a_terabyte_is_refused_by_its_header(tmp_path: Path, name: str) -> None:
    shape = (4096, 4096, 32_767)
    refused(open_volume, nifti(tmp_path / name, shape, size=1000), f"{MAX_VOXELS:,}")


def test_a_packed_scan_of_gigabytes_is_not_unpacked(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii.gz", (1024, 1024, 1024), dtype=np.float64, size=1000)
    refused(open_volume, path, "8,589,934,944 bytes once unpacked are too many")


def test_a_claim_of_gigabytes_takes_the_memory_of_what_is_there(tmp_path: Path) -> None:
    refused(open_volume, nifti(tmp_path / "a.nii.gz", (1024, 1024, 1000), size=10_000_000), "cut off")
    refused(open_volume, nifti(tmp_path / "a.nii", (1024, 1024, 1024), size=10_000_000), "cut off")
    with little():  # a bomb behind a small scan is not read
        path = nifti(tmp_path / "b.nii.gz", (40, 40, 4), size=60_000_000)
        assert path.stat().st_size < 100_000
        with pytest.raises(InputError, match="lowest value"):
            open_volume(path)


@pytest.mark.parametrize("lost", [1, 8, 200])
def test_a_packed_scan_that_is_cut_is_refused_even_in_its_checksum(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(block_volume(), np.eye(4)), path)
    assert open_volume(path).shape == (40, 48, 6)
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    refused(open_volume, path, "not a readable NIfTI|cut off")
    path.write_bytes(whole[:-8] + bytes(4) + whole[-4:])
    refused(open_volume, path, "CRC")


@pytest.mark.parametrize("field", ["vox_offset", "dim", "datatype", "scl_slope", "qoffset_x", "srow_x", "sizeof_hdr"])
def test_headers_of_extremes_raise_nothing_but_our_errors(tmp_path: Path, field: str) -> None:
    image = nibabel.Nifti1Image(block_volume(), np.eye(4))
    for value in (-(2**15), -1, 0, 1, 2**15 - 1, np.nan, np.inf, 1e30, -1e30):
        data = bytearray(image.to_bytes())
        header = np.ndarray((), nibabel.nifti1.header_dtype, data)
        if header[field].dtype.kind == "i" and not -(2**15) <= value < 2**15:
            continue
        header[field] = value
        (tmp_path / "a.nii").write_bytes(data)
        with little():
            try:
                open_volume(tmp_path / "a.nii").read(3)
            except InputError as error:
                assert "a.nii" in str(error)  # noqa: PT017


# Pictures


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_a_jpeg_of_a_thousand_scans_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("L", (MAX_SIDE, MAX_SIDE), 90).save(path, progressive=True)
    assert read_slice(path).pixels.shape == (MAX_SIDE, MAX_SIDE)
    data = path.read_bytes()
    last = data[data.rindex(b"\xff\xda") : -2]
    path.write_bytes(data[:-2] + last * 10_000 + b"\xff\xd9")
    refused(read_slice, path, "more than 100 scans")


def test_a_picture_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as stream:
        stream.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 64, 64, 8, 0, 0, 0, 0)))
        stream.write(struct.pack(">I", 2**31 - 1) + b"tEXt")
        stream.truncate(1 << 31)
    refused(read_slice, tmp_path / "a.png", "268,435,456 bytes")


def test_a_mask_of_gigapixels_is_refused_by_its_header(tmp_path: Path) -> None:
    header = struct.pack(">2I5B", 60_000, 60_000, 8, 0, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))))
    refused(read_class_mask, path, "60000 x 60000.*too large")


def test_a_mask_of_a_million_specks_is_not_a_million_masks(tmp_path: Path) -> None:
    specks = np.zeros((2048, 2048), np.uint8)
    specks[::2, ::2] = 2
    for folder, pixels in (("imgs", specks * 0 + 90), ("masks", specks)):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "a.png")
    with little(), pytest.raises(DataError, match=r"masks/a\.png: 1048576 lesions in one slice cannot be right"):
        open_dataset("segmentation", tmp_path, min_area=0)[0]
    assert not check_dataset(tmp_path).ok


# Plain data

ENTRY = {"id": 5, "file_name": "a.png", "height": 64, "width": 64}
ANNOTATION = {"id": 1, "image_id": 5, "category_id": 3, "segmentation": [[30, 10, 50, 10, 50, 30, 30, 30]]}


def coco(folder: Path, *, text: str | None = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("L", (64, 64), 90).save(folder / "a.png")
    content = {"images": [ENTRY], "categories": [{"id": 3, "name": "GGO"}], "annotations": [ANNOTATION]}
    path = folder / "a.json"
    path.write_text(json.dumps({**content, **changes}) if text is None else text)
    return path


def read_all(path: Path) -> list[Any]:
    return list(open_dataset("segmentation", path))


@pytest.mark.parametrize(
    "changes",
    [
        {"text": "[" * 100_000},
        {"text": '{"images": [' + "9" * 5000 + "]}"},
        {"text": ""},
        {"text": "\0\xff"},
        {"images": None},
        {"images": [{**ENTRY, "height": 1_000_000}]},
        {"images": [{**ENTRY, "height": math.inf}]},
        {"images": [{**ENTRY, "height": [64]}]},
        {"images": [{**ENTRY, "id": [5]}]},
        {"images": [{**ENTRY, "file_name": "x" * 5000}]},
        {"images": [{**ENTRY, "file_name": "\udc80\0\x1b[2J.png"}]},
        {"categories": [{"id": None, "name": "GGO"}]},
        {"annotations": {"a": 1}},
        {"annotations": [None]},
        {"annotations": [{**ANNOTATION, "image_id": [5]}]},
        {"annotations": [{**ANNOTATION, "segmentation": [[0, 0, 1e9, 0, 1e9, 1e9]]}]},
        {"annotations": [{**ANNOTATION, "segmentation": [[0, 0, math.inf, 0, 5, math.nan]]}]},
        {"annotations": [{**ANNOTATION, "segmentation": [[0, 0, 4000, 4000] * 1000]}]},
        {"annotations": [{**ANNOTATION, "segmentation": [[[0, 1], [2, 3]]]}]},
        {"annotations": [{**ANNOTATION, "segmentation": {"size": [64, 64], "counts": "o" * 100_000}}]},
        {"annotations": [{**ANNOTATION, "segmentation": {"size": [64, 64], "counts": [2**70]}}]},
        {"annotations": [{**ANNOTATION, "segmentation": {"size": 64, "counts": []}}]},
        {"images": [{**ENTRY, "height": 4096, "width": 4096}], "annotations": [ANNOTATION] * 100},
    ],
    ids=lambda changes: str(changes)[:60].encode("ascii", "replace").decode(),
)
def test_coco_files_that_make_no_sense_are_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    refused(read_all, coco(tmp_path / "data", **changes), "data", DataError)


def test_an_odd_index_of_patients_is_reported(tmp_path: Path) -> None:
    for folder in ("imgs", "masks"):
        (tmp_path / folder).mkdir()
        Image.new("L", (64, 64)).save(tmp_path / folder / "a.png")
    for content in (b"name,patient\n\xff\xfe,1\n", b"name,patient\n" + b"a" * 200_000 + b",1\n"):
        (tmp_path / "index.csv").write_bytes(content)
        refused(read_all, tmp_path, r"index\.csv: not a readable index", DataError)


def test_links_in_a_circle_and_things_that_are_no_files_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    Image.new("L", (64, 64)).save(tmp_path / "control" / "a.png")
    (tmp_path / "control" / "round").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert open_dataset("classification", tmp_path).names == ["a"]
    refused(read_all, tmp_path / "self", "no such file", DataError)
    os.mkfifo(tmp_path / "a.json")
    refused(read_all, tmp_path / "a.json", "not a regular file", DataError)


TEXTS = st.text(max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.just(5) | st.just("a.png"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
ENTRIES = st.lists(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("id", "file_name", "height", "width", "name", "image_id", "category_id", "segmentation", "bbox"), VALUES
        ),
    )
    | VALUES,
    max_size=3,
)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(st.fixed_dictionaries({"images": ENTRIES, "categories": ENTRIES, "annotations": ENTRIES}) | VALUES)
def test_any_json_is_a_data_set_or_one_line(tmp_path: Path, content: Any) -> None:
    path = coco(tmp_path, text=json.dumps(content))
    found = list_slices("segmentation", path)
    assert found.records or found.problems
    assert all("\n" not in problem.reason for problem in found.problems)


@quick
@given(VALUES)
def test_any_segmentation_is_a_mask_or_one_line(segmentation: Any) -> None:
    try:
        assert decode_segmentation(segmentation, (40, 48), "here").shape == (40, 48)
    except DataError as error:
        assert str(error).startswith("here: ")  # noqa: PT017


@quick
@given(st.binary(max_size=200))
def test_any_bytes_are_a_list_of_names(tmp_path: Path, content: bytes) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "0_a_1_1.png")
    (tmp_path / "names.lst").write_bytes(content)
    found = list_slices("classification", tmp_path, names=tmp_path / "names.lst")
    assert found.records or found.problems


@quick
@given(st.sets(TEXTS.filter(bool), min_size=1, max_size=5))
def test_any_folders_are_numbered_once_each(names: set[str]) -> None:
    numbering, classes = class_folder_names(names)
    assert numbering.keys() == names
    assert all(0 <= label < len(classes) <= 1000 for label in numbering.values())


masks = st.tuples(st.integers(32, 60), st.integers(32, 60), st.integers(0, 2**32 - 1)).map(
    lambda drawn: np.random.default_rng(drawn[2]).random(drawn[:2]) < drawn[2] % 7 / 6
)


@quick
@given(masks)
def test_rle_comes_back_as_pycocotools_wrote_it(mask: np.ndarray) -> None:
    written_by = pytest.importorskip("pycocotools.mask").encode(np.asfortranarray(mask.astype(np.uint8)))
    compressed_rle = {"size": list(mask.shape), "counts": written_by["counts"].decode()}
    np.testing.assert_array_equal(decode_segmentation(compressed_rle, mask.shape, ""), mask)


@quick
@given(masks)
def test_the_cache_gives_back_every_mask(tmp_path: Path, mask: np.ndarray) -> None:
    for folder, pixels in (("imgs", mask * 50), ("masks", mask * 2)):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / folder / "a.png")
    data = open_dataset("segmentation", tmp_path, min_area=0)
    kept = CachedDataset(data).fill()
    np.testing.assert_array_equal(kept[0].target["masks"], data[0].target["masks"])
    np.testing.assert_array_equal(kept[0].target["masks"].any(0), mask)


@quick
@given(
    st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.float32]),
    st.integers(1, 5),
    st.sampled_from([".nii", ".nii.gz"]),
)
def test_every_dtype_of_nifti_reads_as_nibabel_reads_it(tmp_path: Path, dtype: type, depth: int, suffix: str) -> None:
    values = np.random.default_rng(depth).integers(0, 200, (33, 40, depth)).astype(dtype)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / f"a{suffix}")
    volume = open_volume(tmp_path / f"a{suffix}", units="range")
    expected = np.asarray(nibabel.load(tmp_path / f"a{suffix}").dataobj, float)
    low, high = expected.min(), expected.max()
    for index in range(depth):
        shown = volume.grid(volume.read(index).pixels[None])[:, :, 0]
        np.testing.assert_allclose(shown, (expected[:, :, index] - low) / (high - low), atol=1e-6)


def test_the_largest_side_is_the_documented_one() -> None:
    text = (Path(__file__).parents[1] / "docs" / "scans.md").read_text()
    assert f"32 to {MAX_SIDE} pixels" in text
    assert f"{MAX_VOXELS:,} voxels" in text
