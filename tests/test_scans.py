"""Whole scans: geometry against nibabel and SimpleITK, reports on imperfect ones, and what comes out."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import itertools
import json
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from phantom import phantom
from PIL import Image

from ctmasknet import ConfigError, InputError, MissingExtraError, Predictor
from ctmasknet.cli import main
from ctmasknet.data.scans import Volume, open_volume
from ctmasknet.data.slices import read_slice, window

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

from scans import MARK, BlockPredictor, block_volume, dicom_dataset, enhanced, write_series  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"
SERIES = SHARED / "data" / "dicom" / "series"
needs_series = pytest.mark.skipif(not SERIES.is_dir(), reason="needs the shared CT data")
ALL_ORIENTATIONS = [
    "".join(signs) for axes in itertools.permutations(("LR", "PA", "IS")) for signs in itertools.product(*axes)
]
PLAIN = np.array([[0.8, 0, 0, -15.0], [0, 0.7, 0, -20], [0, 0, 2.5, 130], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def predictor() -> BlockPredictor:
    return BlockPredictor()


def rotation(x: float, y: float, z: float) -> np.ndarray:
    """Turn by degrees about the three axes; (4, 4)."""
    turned = np.eye(4)
    turned[:3, :3] = nibabel.eulerangles.euler2mat(*np.radians([z, y, x]))
    return turned


def nifti(orientation: str = "RAS", affine: np.ndarray = PLAIN, hu: np.ndarray | None = None) -> nibabel.Nifti1Image:
    """The block volume stored in another orientation: the same patient, another order of voxels."""
    image = nibabel.Nifti1Image(block_volume() if hu is None else hu, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    change = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(tuple(orientation))
    )
    return image.as_reoriented(change)


def require_same_geometry(a: nibabel.Nifti1Image, b: nibabel.Nifti1Image) -> None:
    """Every field of the header that says where voxels lie, bit for bit."""
    assert a.shape == b.shape
    assert a.affine.tobytes() == b.affine.tobytes()
    fields = ("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d")
    for name in (*fields, "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units"):
        assert_array_equal(a.header[name], b.header[name], err_msg=name)


# NIfTI


@pytest.mark.parametrize("orientation", ALL_ORIENTATIONS)
def test_a_mask_returns_to_the_voxels_it_was_drawn_on_in_every_orientation(tmp_path, predictor, orientation):
    image = nifti(orientation)
    nibabel.save(image, tmp_path / "scan.nii")
    paths = predictor.volume(tmp_path / "scan.nii").save(tmp_path / "out")
    mask = nibabel.load(paths[0])
    require_same_geometry(mask, nibabel.load(tmp_path / "scan.nii"))
    assert mask.get_data_dtype() == np.uint8
    assert_array_equal(np.asarray(mask.dataobj), np.asarray(image.dataobj) == MARK)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PSL", "SAR", "IRP"])
@pytest.mark.parametrize("turn", [(0, 0, 0), (12, -7, 9), (-20, 5, -30)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_oblique_scans_are_seen_as_simpleitk_orients_them(tmp_path, predictor, orientation, turn, suffix):
    sitk = pytest.importorskip("SimpleITK")
    path = tmp_path / f"scan{suffix}"
    image = nifti(orientation, rotation(*turn) @ PLAIN)
    nibabel.save(image, path)
    # ITK's LPS order is (head, back, left): what a slice for the models is, from the feet up.
    expected = window(sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")))
    volume = open_volume(path)
    seen = {volume.height_mm(index): one.pixels for index, one in volume.slices()}
    assert_array_equal(np.stack([seen[height] for height in sorted(seen)]), expected)
    mask = nibabel.load(predictor.volume(path).save(tmp_path / "out")[0])
    require_same_geometry(mask, nibabel.load(path))
    assert_array_equal(np.asarray(mask.dataobj), np.asarray(image.dataobj) == MARK)


def test_the_volume_of_lesions_and_the_table_are_those_of_hand_counted_voxels(tmp_path, predictor):
    nibabel.save(nifti("LAS"), tmp_path / "scan.nii.gz")
    result = predictor.volume(tmp_path / "scan.nii.gz")
    assert result.lesion_ml == pytest.approx(6 * 4 * 0.8 * 0.7 * 2.5 / 1000)
    assert result.lesion_ml_by_class == {"lesion": pytest.approx(result.lesion_ml)}
    paths = {"".join(path.suffixes[2:]): path for path in result.save(tmp_path / "out")}
    rows = list(csv.DictReader(io.StringIO(paths[".slices.csv"].read_text())))
    assert [row["lesions"] for row in rows] == ["0", "0", "0", "0", "1", "0"]
    assert float(rows[4]["lesion_area_mm2"]) == pytest.approx(24 * 0.8 * 0.7)
    assert [float(row["height_mm"]) for row in rows] == [130 + 2.5 * k for k in range(6)]
    facts = json.loads(paths[".json"].read_text())
    assert (facts["slices"], facts["slices_with_lesions"]) == (6, 1)
    assert facts["problems"] == [f"{tmp_path / 'scan.nii.gz'}: no lungs found; no percentages"]
    assert Image.open(paths[".montage.png"]).size[0] >= 600


def test_slope_intercept_and_units_of_length_are_those_of_the_header(tmp_path, predictor):
    image = nifti()
    stored = nibabel.Nifti1Image(((np.asarray(image.dataobj) + 1024) / 2).astype(np.int16), None, image.header)
    stored.header.set_slope_inter(2, -1024)
    stored.header.set_xyzt_units("meter")
    for form in (stored.set_sform, stored.set_qform):
        form(np.diag([0.001, 0.001, 0.001, 1]) @ PLAIN, code=1)
    nibabel.save(stored, tmp_path / "a.nii")
    volume = open_volume(tmp_path / "a.nii")
    expected = window(np.asarray(nibabel.load(tmp_path / "a.nii").dataobj)[:, ::-1, 3][::-1].T)
    assert_allclose(volume.read(3).pixels, expected, atol=1e-6)
    assert_allclose(volume.spacing, (0.8, 0.7, 2.5), rtol=1e-5)
    require_same_geometry(
        nibabel.load(predictor.volume(tmp_path / "a.nii").save(tmp_path)[0]), nibabel.load(tmp_path / "a.nii")
    )


def test_nifti_2_and_header_pairs_are_read(tmp_path, predictor):
    nibabel.save(nibabel.Nifti2Image(block_volume(), PLAIN), tmp_path / "two.nii")
    nibabel.save(nibabel.Nifti1Pair(block_volume(), PLAIN), tmp_path / "pair.hdr")
    for name in ("two.nii", "pair.hdr"):
        mask = nibabel.load(predictor.volume(tmp_path / name).save(tmp_path / "out")[0])
        assert_array_equal(np.asarray(mask.dataobj), block_volume() == MARK)
        assert_allclose(mask.affine, PLAIN, atol=1e-6)


def test_what_a_nifti_file_cannot_be_is_said(tmp_path):
    def refused(image: nibabel.Nifti1Image, *words: str, **options: object) -> None:
        nibabel.save(image, tmp_path / "bad.nii")
        with pytest.raises(InputError) as caught:
            open_volume(tmp_path / "bad.nii", **options)
        assert str(caught.value).startswith(str(tmp_path / "bad.nii"))
        assert all(word in str(caught.value) for word in words), caught.value

    refused(nibabel.Nifti1Image(np.zeros((40, 40, 4, 3), np.int16), PLAIN), "(40, 40, 4, 3)", "Split")
    refused(nibabel.Nifti1Image(np.zeros((40, 40, 4), np.complex64), PLAIN), "complex64")
    refused(nibabel.Nifti1Image(np.zeros((8, 40, 4), np.int16), PLAIN), "too small")
    refused(nibabel.Nifti1Image(block_volume() + 1024, PLAIN), 'units="hu"', 'units="range"')
    refused(nibabel.Nifti1Image(np.full((40, 40, 4), np.nan, np.float32), PLAIN), "NaN")
    nibabel.save(nibabel.Nifti1Image((block_volume()[..., None]), PLAIN), tmp_path / "four.nii")
    assert open_volume(tmp_path / "four.nii").shape == (40, 48, 6)


def damaged(path: Path, **fields: object) -> Path:
    """The block volume with fields of its header set behind nibabel's back."""
    data = bytearray(nifti().to_bytes())
    header = np.ndarray((), nibabel.nifti1.header_dtype, data)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("spacing", [0, np.nan, np.inf])
def test_a_zero_spacing_is_taken_from_the_caller(tmp_path, predictor, spacing):
    path = damaged(tmp_path / "a.nii", sform_code=0, pixdim=[1, spacing, spacing, 2.5, 0, 0, 0, 0])
    with pytest.raises(InputError, match=r"a\.nii: voxel spacing is missing or zero.*--spacing"):
        open_volume(path)
    result = predictor.volume(path, spacing=(0.8, 0.7, 2.5))
    assert result.lesion_ml == pytest.approx(24 * 0.8 * 0.7 * 2.5 / 1000)
    assert any("taken as given" in problem for problem in result.problems)
    with pytest.raises(ConfigError, match="three positive numbers"):
        open_volume(path, spacing=(0.8, 0.7, 0))


def test_an_affine_that_is_flat_is_refused(tmp_path):
    path = damaged(tmp_path / "a.nii", qform_code=0, srow_x=[0, 0, 0, 5])
    with pytest.raises(InputError, match="spacing is missing or zero"):
        open_volume(path)


def test_units_range_stretches_over_the_whole_scan(tmp_path):
    nibabel.save(nibabel.Nifti1Image(block_volume() + 1024, PLAIN), tmp_path / "a.nii")
    volume = open_volume(tmp_path / "a.nii", units="range")
    values = block_volume().astype(float)
    expected = (values - values.min()) / (values.max() - values.min())
    assert_allclose(volume.read(2).pixels, expected[::-1, ::-1, 2].T, atol=1e-6)


def no_rescale(folder: Path, stored: np.ndarray) -> Path:
    write_series(folder, np.moveaxis(stored, 2, 0).astype(np.int16), RescaleSlope=None, RescaleIntercept=None)
    return folder


def saved(path: Path, stored: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(stored, PLAIN), path)
    return path


def test_hu_stored_from_0_are_put_right_if_they_are_declared(tmp_path, predictor):
    stored = (block_volume() + 1024).astype(np.uint16)
    for wrong, right in (
        (saved(tmp_path / "a.nii.gz", stored), saved(tmp_path / "b.nii.gz", block_volume())),
        (no_rescale(tmp_path / "c", stored), no_rescale(tmp_path / "d", block_volume())),
    ):
        with pytest.raises(InputError, match='units="hu"'):
            open_volume(wrong)
        result, expected = predictor.volume(wrong, units="hu"), predictor.volume(right, units="hu")
        assert np.count_nonzero(result.mask) == 24
        assert_array_equal(result.mask, expected.mask)
        assert (result.volume.units, expected.volume.units) == ("hu+1024", "hu")
        assert any("HU + 1024" in problem for problem in result.problems)
        assert not any("1024" in problem for problem in expected.problems)
        assert (result.to_dict()["units"], expected.to_dict()["units"]) == ("hu+1024", "hu")
        assert result.volume.read(2).units == "hu+1024"
    assert open_volume(tmp_path / "b.nii.gz").units is None


@pytest.mark.parametrize(
    "change",
    [
        lambda hu: np.clip((hu + 1350) / 1500 * 255, 0, 255).astype(np.uint8),
        lambda hu: np.clip((hu + 1350) / 1500, 0, 1).astype(np.float32),
        lambda hu: np.clip(hu, -160, 240),
        lambda hu: hu - 1024,
    ],
    ids=["8 bits", "scaled", "clipped", "shifted twice"],
)
def test_values_that_cannot_be_hu_are_refused_even_if_declared(tmp_path, change):
    stored = change(block_volume())
    scans = [saved(tmp_path / "a.nii.gz", stored)]
    if stored.dtype != np.float32:  # DICOM stores integers
        scans.append(no_rescale(tmp_path / "b", stored))
    for scan in scans:
        with pytest.raises(InputError, match=r'no Hounsfield units.*units="range"'):
            open_volume(scan, units="hu")


def test_a_truncated_nifti_loses_its_last_slices_and_says_so(tmp_path, predictor):
    nibabel.save(nifti(), tmp_path / "a.nii")
    data = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "cut.nii").write_bytes(data[: len(data) - 40 * 48 * 2])
    result = predictor.volume(tmp_path / "cut.nii")
    assert [bool(row["error"]) for row in result.slices] == [False] * 5 + [True]
    assert any("cut.nii[5]" in problem for problem in result.problems)
    packed = gzip.compress(data)
    (tmp_path / "cut.nii.gz").write_bytes(packed[: len(packed) // 10])
    with pytest.raises(InputError, match=r"cut\.nii\.gz"):
        predictor.volume(tmp_path / "cut.nii.gz")


def test_missing_orientation_codes_are_reported(tmp_path):
    image = nifti()
    image.header["qform_code"], image.header["sform_code"] = 0, 0
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), None, image.header), tmp_path / "a.nii")
    assert any("left and right may be swapped" in problem for problem in open_volume(tmp_path / "a.nii").problems)


# DICOM


@pytest.mark.parametrize(
    "directions",
    [
        (1, 0, 0, 0, 1, 0),
        (-1, 0, 0, 0, -1, 0),
        (0, 1, 0, -1, 0, 0),
        (1, 0, 0, 0, -1, 0),
        (0.96, 0.28, 0, -0.28, 0.96, 0),
    ],
)
@pytest.mark.parametrize("upwards", [True, False])
def test_a_series_lies_where_simpleitk_puts_it(tmp_path, predictor, directions, upwards):
    sitk = pytest.importorskip("SimpleITK")
    slices = np.moveaxis(block_volume(), 2, 0)
    normal = np.cross(directions[:3], directions[3:])
    step = tuple((2.0 if upwards else -2.0) * normal)
    write_series(tmp_path / "a b", slices, directions=directions, step=step)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "a b")))
    expected = reader.Execute()
    result = predictor.volume(tmp_path / "a b")
    assert result.problems == (f"{tmp_path / 'a b'}: no lungs found; no percentages",)
    mask = sitk.ReadImage(str(result.save(tmp_path / "out")[0]))
    assert mask.GetSize() == expected.GetSize()
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert_allclose(getattr(mask, get)(), getattr(expected, get)(), atol=1e-4)
    assert_array_equal(sitk.GetArrayFromImage(mask), sitk.GetArrayFromImage(expected) == MARK)
    view = sitk.GetArrayFromImage(sitk.DICOMOrient(expected, "LPS"))
    seen = {result.volume.height_mm(index): one.pixels for index, one in result.volume.slices()}
    assert_array_equal(np.stack([seen[height] for height in sorted(seen)]), window(view))


def test_a_tilted_gantry_keeps_its_shear(tmp_path):
    write_series(tmp_path / "a", np.moveaxis(block_volume(), 2, 0), step=(0, 0.5, 2))
    volume = open_volume(tmp_path / "a")
    assert_allclose(volume.affine[:3, 2], [0, -0.5, 2])
    assert volume.voxel_ml == pytest.approx(0.7 * 0.8 * 2 / 1000)  # of a parallelepiped: base times height
    header = volume.mask_image(np.zeros(volume.shape, np.uint8)).header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 0)


def test_gaps_duplicates_other_series_localizers_and_strangers_are_reported(tmp_path, predictor):
    slices = np.moveaxis(block_volume(), 2, 0)
    folder = tmp_path / "scan"
    paths = write_series(folder, slices)
    paths[2].unlink()
    shutil.copy(paths[3], folder / "zz copy.dcm")
    write_series(folder, slices[:2], prefix="other", SeriesInstanceUID="9.9")
    write_series(folder, slices[:3], prefix="cor", directions=(1, 0, 0, 0, 0, -1))
    dicom_dataset(slices[0], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]).save_as(
        folder / "scout.dcm", enforce_file_format=True
    )
    (folder / "notes.txt").write_text("hello")
    (folder / "broken.dcm").write_bytes(paths[3].read_bytes()[:500])
    (folder / "folder inside").mkdir()
    result = predictor.volume(folder)
    text = "\n".join(result.problems)
    for words in (
        "slices missing after",
        "another lies in the same place: 1, first",
        "series 9.9 (2 slices): another series",
        "not axial",
        "scout.dcm: a localizer",
        "because they are not DICOM: 1",
        "broken.dcm",
    ):
        assert words in text, text
    assert result.volume.shape == (48, 40, 6)
    assert sorted(result.volume.names) == [0, 1, 3, 4, 5]
    expected = slices == MARK
    assert_array_equal(np.moveaxis(result.mask, (0, 1, 2), (2, 1, 0)), expected)
    assert predictor.volume(folder, series="9.9").volume.shape == (48, 40, 2)
    with pytest.raises(InputError, match=r"no series 7\.7.*1\.2\.3, 9\.9"):
        predictor.volume(folder, series="7.7")


def test_one_corrupt_slice_is_reported_and_the_rest_done(tmp_path, predictor):
    paths = write_series(tmp_path / "a", np.moveaxis(block_volume(), 2, 0))
    paths[1].write_bytes(paths[1].read_bytes()[:-500])
    result = predictor.volume(tmp_path / "a")
    assert [bool(row["error"]) for row in result.slices] == [False, True, False, False, False, False]
    assert paths[1].name in result.slices[1]["error"]
    assert "1 could not be used" in result.summary
    assert np.count_nonzero(result.mask) == 24


def test_series_without_a_place_a_spacing_or_hu_are_explained(tmp_path):
    slices = np.moveaxis(block_volume(), 2, 0)

    def refused(name: str, words: str, **tags: object) -> None:
        write_series(tmp_path / name, slices, **tags)
        with pytest.raises(InputError, match=words):
            open_volume(tmp_path / name)

    refused("a", "--spacing", PixelSpacing=None)
    refused("b", "--spacing", PixelSpacing=[0, 0])
    assert open_volume(tmp_path / "a", spacing=(0.8, 0.7, 2)).spacing == pytest.approx((0.8, 0.7, 2))
    refused("c", "ImagePositionPatient", ImagePositionPatient=None)
    refused("d", "modality is MR.*units", Modality="MR")
    assert any("MR" in problem for problem in open_volume(tmp_path / "d", units="hu").problems)
    refused("e", "no usable rescale", RescaleSlope=None)
    refused("f", "only sagittal or coronal", directions=(1, 0, 0, 0, 0, -1))
    refused("g", "--spacing", PixelSpacing=None)
    uneven = tmp_path / "h"
    for k, z in enumerate((0, 2, 3, 7.3)):
        write_series(uneven, slices[k : k + 1], origin=(0, 0, z), prefix=f"{k}-")
    with pytest.raises(InputError, match="not evenly spaced"):
        open_volume(uneven)
    single = tmp_path / "i"
    write_series(single, slices[:1], SliceThickness=None)
    with pytest.raises(InputError, match="--spacing"):
        open_volume(single)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").write_text("x")
    with pytest.raises(InputError, match="no readable slice"):
        open_volume(tmp_path / "empty")


def test_positions_rounded_in_the_header_are_no_gap(tmp_path):
    slices = np.zeros((30, 40, 48), np.int16)
    for k in range(30):
        write_series(tmp_path / "a", slices[k : k + 1], origin=(0, 0, round(0.625 * k, 1)), prefix=f"{k}-")
    volume = open_volume(tmp_path / "a")
    assert volume.shape == (48, 40, 30)
    assert volume.spacing[2] == pytest.approx(0.625, abs=0.005)
    assert volume.problems == ()


def test_a_multi_frame_file_equals_the_series_of_its_frames(tmp_path, predictor):
    slices = np.moveaxis(block_volume(), 2, 0)
    write_series(tmp_path / "series", slices)
    single = open_volume(tmp_path / "series")
    multi = open_volume(enhanced(tmp_path / "multi.dcm", slices, [3, 0, 5, 1, 4, 2]))
    assert_allclose(multi.affine, single.affine)
    assert multi.kind == "dicom"
    for index in range(6):
        assert_array_equal(multi.read(index).pixels, single.read(index).pixels)
    assert_array_equal(predictor.volume(tmp_path / "multi.dcm").mask, predictor.volume(tmp_path / "series").mask)


@pytest.mark.parametrize("syntax", ["JPEG2000Lossless", "JPEGLosslessProcess14_1", "RLELossless"])
def test_compressed_series_decode_to_the_same_slices(tmp_path, syntax):
    gdcm = pytest.importorskip("gdcm")
    paths = write_series(tmp_path / "plain", np.moveaxis(block_volume(), 2, 0))
    (tmp_path / "packed").mkdir()
    for path in paths:
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        writer.SetFileName(str(tmp_path / "packed" / path.name))
        assert writer.Write()
        # GDCM drops what it does not know: the tag that says that values are HU by default.
        dataset = pydicom.dcmread(tmp_path / "packed" / path.name)
        dataset.RescaleType = "HU"
        dataset.save_as(tmp_path / "packed" / path.name)
    plain, packed = open_volume(tmp_path / "plain"), open_volume(tmp_path / "packed")
    header = pydicom.dcmread(next((tmp_path / "packed").iterdir()))
    assert header.file_meta.TransferSyntaxUID.is_compressed
    for index in range(6):
        assert_array_equal(packed.read(index).pixels, plain.read(index).pixels)


# Any scan


def test_out_of_device_memory_halves_the_batch_and_says_so(tmp_path, monkeypatch):
    import torch

    nibabel.save(nifti(), tmp_path / "a.nii")
    small = BlockPredictor(batch_size=4)
    plain = small._predict

    def limited(slices):
        if len(slices) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return plain(slices)

    monkeypatch.setattr(small, "_predict", limited)
    with pytest.warns(UserWarning, match=r"out of memory on cpu with 4 slices \(CUDA.*\): going on with batches of 2"):
        result = small.volume(tmp_path / "a.nii")
    assert small.batch_size == 1
    assert np.count_nonzero(result.mask) == 24

    def always(slices):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(small, "_predict", always)
    with pytest.raises(InputError, match=r"no slice of it can be used.*with 1 slice"):
        small.volume(tmp_path / "a.nii")


def test_not_a_scan_a_missing_file_and_odd_names(tmp_path, predictor):
    (tmp_path / "x.txt").write_text("hello " * 100)
    with pytest.raises(InputError, match=r"x\.txt: not a scan"):
        open_volume(tmp_path / "x.txt")
    with pytest.raises(InputError, match="no such file"):
        open_volume(tmp_path / "missing.nii")
    (tmp_path / "text.nii").write_text("hello " * 100)
    with pytest.raises(InputError, match=r"text\.nii"):
        open_volume(tmp_path / "text.nii")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="cannot be opened"):
        open_volume(tmp_path / "loop")
    nibabel.save(nifti(), tmp_path / "Größe & 肺 .nii.gz")
    paths = predictor.volume(tmp_path / "Größe & 肺 .nii.gz").save(tmp_path / "aus gabe")
    assert paths[0].name == "Größe & 肺 .nii.gz.lesions.nii.gz"
    with pytest.raises(ConfigError, match="units"):
        open_volume(tmp_path / "x.txt", units="mm")


def test_files_of_2_gb_take_no_memory_and_no_time(tmp_path):
    for name, head in (
        ("a.dcm", bytes(128) + b"DICM"),
        ("b.dcm", b""),
        ("c.png", b"\x89PNG\r\n\x1a\n"),
        ("d.nii", b""),
    ):
        with (tmp_path / name).open("wb") as stream:
            stream.write(head)
            stream.truncate(2 << 30)  # sparse: zeros that take no disk
        begin = time.monotonic()
        with pytest.raises(InputError, match=name):
            open_volume(tmp_path / name)
        if name != "d.nii":
            with pytest.raises(InputError, match=name):
                read_slice(tmp_path / name)
        assert time.monotonic() - begin < 5
    header = nibabel.Nifti1Header()
    header.set_data_shape((512, 512, 4096))
    header.set_data_dtype(np.int16)
    header.set_slope_inter(1, -1024)
    header.set_sform(PLAIN, 1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    with (tmp_path / "e.nii").open("wb") as stream:
        stream.write(header.binaryblock + bytes(4))
        stream.truncate(352 + (2 << 30))
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert open_volume(tmp_path / "e.nii").read(4000).pixels.max() == pytest.approx((1350 - 1024) / 1500)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_without_nibabel_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(MissingExtraError, match=r"nibabel.*ctmasknet\[io\]"):
        open_volume(tmp_path)


def test_a_full_disk_leaves_no_file_that_looks_finished(tmp_path, predictor, monkeypatch):
    nibabel.save(nifti(), tmp_path / "a.nii")
    result = predictor.volume(tmp_path / "a.nii")
    plain, opened = Path.open, itertools.count()

    class Full(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def full_at_the_second(path: Path, mode: str = "r", *options: object) -> object:
        return Full(path, mode) if mode == "xb" and next(opened) == 1 else plain(path, mode, *options)

    monkeypatch.setattr(Path, "open", full_at_the_second)
    with pytest.raises(InputError, match="disk space"):
        result.save(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_lesion_of_a_phantom_comes_back_on_its_side_and_slice(tmp_path):
    segmenter = Predictor(classifier=None, device="cpu")
    made, healthy = phantom(0, lesions=2), phantom(0, lesions=0)
    # Pictures show the patient's left on the right: RAS order reverses both picture axes.
    as_ras = [np.flip(hu.T, (0, 1)) for hu in (healthy.hu, made.hu, healthy.hu)]
    affine = rotation(6, -4, 3) @ np.diag([0.75, 0.75, 5, 1])
    image = nifti("PIR", affine, np.stack(as_ras, axis=2))
    nibabel.save(image, tmp_path / "scan.nii.gz")
    result = segmenter.volume(tmp_path / "scan.nii.gz")
    mask = nibabel.load(result.save(tmp_path / "out")[0])
    back = np.asarray(nibabel.as_closest_canonical(mask).dataobj) > 0
    truth = np.flip(np.any(made.masks, axis=0).T, (0, 1))
    mirrored = truth[::-1]
    found = back[:, :, 1]
    dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    assert dice > 0.5
    assert dice > 2 * (2 * (found & mirrored).sum() / (found.sum() + mirrored.sum()))
    assert found.sum() > 5 * max(back[:, :, 0].sum(), back[:, :, 2].sum())


@needs_series
def test_a_real_series_becomes_a_mask_on_simpleitks_grid(tmp_path, predictor):
    sitk = pytest.importorskip("SimpleITK")
    pytest.importorskip("gdcm")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(SERIES)))
    expected = reader.Execute()
    hu = sitk.GetArrayFromImage(expected)
    result = predictor.volume(SERIES)  # marks all above the lung window: bones
    assert result.problems == ()
    assert [Path(row["source"]).name for row in result.slices] == [f"IM{n:04d}.dcm" for n in range(66, 50, -1)]
    mask = sitk.ReadImage(str(result.save(tmp_path)[0]))
    for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert_allclose(getattr(mask, get)(), getattr(expected, get)(), atol=1e-5)
    assert_array_equal(sitk.GetArrayFromImage(mask), hu >= 150)
    assert result.lesion_ml == pytest.approx((hu >= 150).sum() * 0.603515625**2 * 2 / 1000)


def test_simpleitk_lays_the_mask_on_the_scan(tmp_path, predictor):
    sitk = pytest.importorskip("SimpleITK")

    def lay(scan: object, mask: object) -> np.ndarray:
        shown = sitk.Cast(sitk.RescaleIntensity(scan), sitk.sitkUInt8)
        sitk.LabelOverlay(shown, mask)  # refuses origins that differ by more than a millionth of a voxel
        return sitk.GetArrayFromImage(sitk.Mask(scan, mask, 0))

    for number, turn in enumerate((rotation(0, 0, 0), rotation(6, -4, 3))):
        affine = turn @ np.diag([0.7421875, 0.6, 2.5, 1])
        affine[:3, 3] = -162.19824, 293.1982421875, -303.7
        nibabel.save(nifti("LPS", affine), tmp_path / f"{number}.nii.gz")
        mask = sitk.ReadImage(str(predictor.volume(tmp_path / f"{number}.nii.gz").save(tmp_path / "out")[0]))
        scan = sitk.ReadImage(str(tmp_path / f"{number}.nii.gz"))
        for get in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(mask, get)() == getattr(scan, get)()
        assert (lay(scan, mask) == MARK).sum() == 24

    write_series(tmp_path / "series", np.moveaxis(block_volume(), 2, 0), origin=(-162.19824, -293.1982421875, -303.7))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "series")))
    scan = reader.Execute()
    mask = sitk.ReadImage(str(predictor.volume(tmp_path / "series").save(tmp_path / "out")[0]))
    with pytest.raises(RuntimeError, match="same physical space"):  # NIfTI keeps 7 digits, DICOM all of them
        lay(scan, mask)
    mask.CopyInformation(scan)  # what docs/scans.md says
    assert (lay(scan, mask) == MARK).sum() == 24


def test_a_volume_is_read_in_order_and_ahead(tmp_path):
    nibabel.save(nifti(), tmp_path / "a.nii")
    volume = open_volume(tmp_path / "a.nii")
    assert isinstance(volume, Volume)
    assert [index for index, _ in volume.slices()] == list(range(6))


def test_odd_uids_are_no_line_per_file_on_the_command_line(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, plane in enumerate(np.moveaxis(block_volume(), 2, 0)):
            uids = {"SeriesInstanceUID": "1.2.odd..03", "SOPInstanceUID": f"1.2.odd.{k}"}
            write_series(tmp_path / "series", plane[None], origin=(0, 0, 2.0 * k), prefix=str(k), **uids)
    arguments = [str(tmp_path / "series"), "-o", str(tmp_path / "out"), "--classifier", "none"]
    command = [sys.executable, "-m", "ctmasknet", "predict", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr.count("UI") <= 1, result.stderr


@pytest.mark.parametrize(
    ("stored", "code", "words"),
    [
        (lambda hu: hu + 1024, 0, "1024 was subtracted"),
        (lambda hu: np.clip(hu, 0, 255).astype(np.uint8), 2, "--units range"),
    ],
    ids=["HU + 1024", "8 bits"],
)
def test_forced_units_on_the_command_line(tmp_path, capsys, stored, code, words):
    made = np.stack([phantom(0, lesions=2, size=256).hu.T] * 2, -1)[::-1, ::-1].copy()
    scan = saved(tmp_path / "scan.nii.gz", stored(made).astype(np.int16))
    arguments = ["predict", str(scan), "-o", str(tmp_path / "out"), "--classifier", "none"]
    assert main(arguments) == 2
    assert "--units hu" in capsys.readouterr().err
    assert main([*arguments, "--units", "hu", "--json"]) == code
    output = capsys.readouterr()
    assert words in output.err
    assert 'units="' not in output.err
    if code == 0:
        (facts,) = json.loads(output.out)["results"]
        assert facts["units"] == "hu+1024"
        assert facts["slices_with_lesions"] == 2
