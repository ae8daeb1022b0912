"""Lungs, lesions in three dimensions and the report, on phantoms whose volumes are known."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from phantom import PhantomScan, phantom, phantom_scan
from PIL import Image
from scans import TruthPredictor, write_series

from ctmasknet import ConfigError, InputError, predict
from ctmasknet.data.lesions import join_slices
from ctmasknet.data.lungs import LEFT, RIGHT, find_lungs
from ctmasknet.data.scans import open_volume
from ctmasknet.data.slices import window
from ctmasknet.results import Prediction, VolumePrediction

nibabel = pytest.importorskip("nibabel")

SIZE = 192
BALLS = ((-80.0, 20.0, 0.0, 22.0), (60.0, -30.0, 40.0, 15.0), (-60.0, -40.0, -50.0, 12.0))  # right, left, right; mm
HEART = (0.0, -50.0, 0.0, 14.0)  # between the lungs


def grey(hu: np.ndarray) -> np.ndarray:
    return np.rint(255 * window(hu)).astype(np.uint8)


def ball_ml(radius: float) -> float:
    return 4 / 3 * math.pi * radius**3 / 1000


def volume_ml(mask: np.ndarray, spacing: tuple[float, float, float]) -> float:
    return float(mask.sum()) * math.prod(spacing) / 1000


def predicted(scan: PhantomScan, marks: np.ndarray | None = None, **options: object) -> VolumePrediction:
    """What comes of the scan as an array where exactly its lesions are marked."""
    z, y, x = scan.spacing
    marks = (scan.lesions > 0).astype(np.uint8) if marks is None else marks
    return TruthPredictor(marks).volume(scan.hu, spacing=(x, y, z), **options)


@pytest.fixture(scope="module")
def scan() -> PhantomScan:
    return phantom_scan((*BALLS, HEART), size=SIZE)


@pytest.fixture(scope="module")
def found(scan) -> VolumePrediction:
    return predicted(scan)


# The lungs


def require_lungs(lungs: np.ndarray, truth: np.ndarray, within: float = 0.05) -> None:
    for side in (RIGHT, LEFT):
        there, wanted = lungs == side, truth == side
        assert there.sum() == pytest.approx(wanted.sum(), rel=within)
        assert (there & wanted).sum() > (1 - within) * wanted.sum()


@pytest.mark.parametrize(
    "options",
    [
        {"slices": 24, "thickness": 10.0, "size": 760},  # 0.5 x 0.5 x 10 mm
        {"slices": 3},
        {"slices": 1},
    ],
    ids=["anisotropic", "3 slices", "1 slice"],
)
def test_lungs_of_other_grids(options):
    made = phantom_scan(BALLS, **{"size": SIZE, **options})
    require_lungs(find_lungs(grey(made.hu), made.spacing, made.lesions), made.lungs)


def test_lungs_are_found_without_windpipe_table_arms_and_what_lies_between_them(scan):
    truth = np.where(scan.lesions == len(BALLS) + 1, 0, scan.lungs)
    lungs = find_lungs(grey(scan.hu), scan.spacing, scan.lesions)
    require_lungs(lungs, truth, 0.02)
    assert ((lungs > 0) & (truth == 0)).sum() < 0.01 * (truth > 0).sum()
    # Lesions inside a lung are filled without being told of.
    require_lungs(find_lungs(grey(scan.hu), scan.spacing), truth)


def test_a_white_lung_is_a_lung_where_its_lesion_is_marked():
    made = phantom_scan(size=SIZE, white=LEFT)
    assert not (find_lungs(grey(made.hu), made.spacing) == LEFT).any()
    result = predicted(made)
    require_lungs(result.volume.stack(result.lungs), made.lungs)
    assert result.involvement["left_lesion_percent"] > 99
    assert result.involvement["right_lesion_ml"] < 1
    assert [lesion.side for lesion in result.lesions] == ["left"]


def test_the_consolidated_back_of_both_lungs_is_lung():
    made = phantom_scan(size=128, slices=12, thickness=20.0)
    z, y, x = made.spacing
    last = np.flatnonzero(made.lungs.any((0, 2)))[-1]
    back = (made.lungs > 0) & (np.arange(128)[:, None] > last - 25 / y)
    result = TruthPredictor(back.astype(np.uint8)).volume(np.where(back, 40, made.hu), spacing=(x, y, z))
    for side, number in (("right", RIGHT), ("left", LEFT)):
        lesions = volume_ml(back & (made.lungs == number), made.spacing)
        assert result.involvement[f"{side}_lesion_ml"] == pytest.approx(lesions, rel=0.02)
    assert result.involvement["outside_lesion_ml"] == 0


def test_one_lung_is_one_lung():
    made = phantom_scan(BALLS[:1], size=SIZE, missing=LEFT)
    result = predicted(made)
    assert result.involvement["left_lung_ml"] == 0
    assert result.involvement["left_lesion_percent"] is None
    assert result.involvement["right_lung_ml"] == pytest.approx(volume_ml(made.lungs == RIGHT, made.spacing), rel=0.05)
    result.report()


def test_metal_and_a_body_cut_off_by_the_field_of_view():
    made = phantom_scan(BALLS, slices=24, size=256)
    hu = made.hu.copy()
    hu[8:12, 180:186, 120:140] = 3071
    for row in range(150, 220, 8):  # its streaks
        hu[8:12, row] = np.where(np.arange(256) % 2, hu[8:12, row] - 400, hu[8:12, row] + 400)
    require_lungs(find_lungs(grey(hu), made.spacing, made.lesions), made.lungs)
    cut = slice(52, 210)  # through both lungs
    require_lungs(
        find_lungs(grey(made.hu[:, :, cut]), made.spacing, made.lesions[:, :, cut]), made.lungs[:, :, cut], 0.05
    )


def test_lungs_of_a_drawn_slice():
    made = phantom(0, lesions=0)
    lungs = find_lungs(grey(made.hu)[None], (5.0, 0.742, 0.742))[0] > 0
    assert 2 * (lungs & made.lungs).sum() / (lungs.sum() + made.lungs.sum()) > 0.95


def test_a_scan_without_lungs_says_so(scan):
    made = phantom_scan(size=SIZE, slices=4)
    belly = made.hu.copy()
    belly[made.lungs > 0] = 50
    belly[:, 60:75, 90:105] = -1000  # gas in the bowel
    z, y, x = made.spacing
    result = TruthPredictor(np.zeros(belly.shape, np.uint8)).volume(belly, spacing=(x, y, z), keep="lungs")
    assert (result.lungs, result.involvement) == (None, None)
    (problem,) = result.problems
    assert "no lungs found" in problem
    assert "%" not in result.summary
    result.report()


def test_values_that_are_not_hu_have_no_lungs(scan):
    z, y, x = scan.spacing
    result = TruthPredictor(scan.lesions).volume(scan.hu[20:24], spacing=(x, y, z), units="range")
    assert (result.lungs, result.involvement) == (None, None)
    assert "not HU" in result.problems[-1]
    assert {lesion.side for lesion in result.lesions} <= {None}
    assert {lesion.mean_hu for lesion in result.lesions} <= {None}


# One slice


def predicted_slice(given: object, marks: np.ndarray, **options: object) -> Prediction:
    """What comes of a slice in which exactly these pixels are marked."""
    predictor = TruthPredictor(marks)
    predictor._predict = lambda slices: [predictor._marked(one, marks) for one in slices]
    return predictor(given, **options)


def test_a_slice_in_hu_has_lungs_as_a_slice_of_a_scan_has(scan):
    hu, truth, marks = scan.hu[24], scan.lungs[24], (scan.lesions[24] > 0).astype(np.uint8)
    result = predicted_slice(hu, marks, units="hu")
    require_lungs(result.lungs, truth)
    facts = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert facts["no_lungs"] == ""
    facts = facts["involvement"]
    for side, inside in (("right", truth == RIGHT), ("left", truth == LEFT), ("both", truth > 0)):
        lesions = int((inside & (marks > 0)).sum())
        assert facts[f"{side}_lung_px"] == pytest.approx(inside.sum(), rel=0.05)
        assert facts[f"{side}_lesion_px"] == lesions
        assert facts[f"{side}_lesion_percent"] == pytest.approx(100 * lesions / inside.sum(), rel=0.05)
    assert facts["outside_lesion_px"] == (marks[truth == 0] > 0).sum() > 0  # the heart's
    assert not [key for key in facts if key.endswith("mm2")]  # an array has no spacing
    shares = (f"{facts[f'{side}_lesion_percent']:.1f}%" for side in ("both", "right", "left"))
    assert result.summary.endswith("of the slice, {} of the lungs (right {}, left {})".format(*shares))


@pytest.mark.parametrize("turned", [(), (0,), (1,), (0, 1)])
def test_a_dicom_slice_knows_its_spacing_and_its_sides(tmp_path, scan, turned):
    pytest.importorskip("pydicom")
    hu, lungs, marks = (np.flip(stack[23], turned) for stack in (scan.hu, scan.lungs, scan.lesions > 0))
    directions = (-1 if 1 in turned else 1, 0, 0, 0, -1 if 0 in turned else 1, 0)
    pixel = scan.spacing[1]
    (path,) = write_series(tmp_path, hu[None], directions=directions, PixelSpacing=[pixel, pixel])
    result = predicted_slice(path, marks.astype(np.uint8))
    require_lungs(result.lungs, lungs)
    for side, number in (("right", RIGHT), ("left", LEFT)):
        area = (lungs == number).sum() * pixel**2
        assert result.involvement[f"{side}_lung_mm2"] == pytest.approx(area, rel=0.05)
        inside = (marks & (lungs == number)).sum()
        assert result.involvement[f"{side}_lesion_mm2"] == pytest.approx(inside * pixel**2)
    in_scan = open_volume(scan.hu, spacing=(pixel, pixel, 5.0)).read(23)
    assert (in_scan.in_hu, in_scan.steps) == (True, pytest.approx((pixel, pixel), rel=1e-6))


def test_a_slice_without_lungs_says_why(tmp_path, scan, monkeypatch):
    pytest.importorskip("pydicom")
    hu, none = scan.hu[24], np.zeros(scan.hu[0].shape, np.uint8)
    (sagittal,) = write_series(tmp_path, hu[None], directions=(0, 1, 0, 0, 0, -1))
    (tiny,) = write_series(tmp_path, hu[None], prefix="t", PixelSpacing=["1e-9", "1e-9"])
    belly = np.where((scan.lungs[24] > 0) | (hu < -900) & (np.abs(np.arange(SIZE) - SIZE / 2) < 12), 50, hu)
    heart = (scan.lesions[24] == len(BALLS) + 1).astype(np.uint8)
    for given, marks, units, why in (
        (grey(hu), none, None, "not HU"),
        (hu, none, "range", "not HU"),
        (sagittal, none, None, "not an axial slice"),
        (belly, none, "hu", "no lungs found"),
        (hu, heart, "hu", "most of the lesions lie outside"),
    ):
        result = predicted_slice(given, marks, units=units)
        assert (result.lungs, result.to_dict()["involvement"]) == (None, None)
        assert why in result.to_dict()["no_lungs"]
        assert "of the lungs" not in result.summary
    assert predicted_slice(tiny, none).involvement["both_lesion_px"] == 0  # no CT has such pixels
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    assert "ctmasknet[io]" in predicted_slice(hu, none, units="hu").to_dict()["no_lungs"]


def test_a_scan_that_is_only_classified_is_not_searched_for_lungs(scan, monkeypatch):
    predictor = TruthPredictor(np.zeros_like(scan.lesions))
    predictor.segmenter = None
    monkeypatch.setattr("ctmasknet.results.find_lungs", lambda *_: pytest.fail("searched"))
    z, y, x = scan.spacing
    result = predictor.volume(scan.hu[20:24], spacing=(x, y, z))
    assert (result.has_segmentation, result.lungs, result.lesion_ml, result.problems) == (False, None, None, ())


# Lesions


def test_lesions_are_counted_measured_and_told_left_from_right(scan, found):
    assert [lesion.side for lesion in found.lesions] == ["right", "left", "right", "outside"]
    for lesion, (_, _, height, radius) in zip(found.lesions, (*BALLS, HEART), strict=True):
        assert lesion.ml == pytest.approx(ball_ml(radius), rel=0.05)
        assert lesion.diameter_mm == pytest.approx(2 * radius, abs=4)  # a pixel has a diagonal of 2.8 mm
        hu = np.clip(scan.hu[scan.lesions == lesion.id], -1350, 150).mean()
        assert lesion.mean_hu == pytest.approx(hu, abs=1)
        assert lesion.score == pytest.approx(0.9)
        # The slices whose middle the ball reaches.
        reached = [k for k in range(48) if abs((k - 23.5) * 5 - height) < radius]
        assert (lesion.first_slice, lesion.last_slice) == (reached[0], reached[-1])
    ids = found.volume.stack(found.lesion_ids)
    assert_array_equal(ids, scan.lesions)  # drawn in the order of size


def test_involvement_is_the_share_of_each_lung(scan, found):
    facts = found.involvement
    for side, number, radii in (("right", RIGHT, (22, 12)), ("left", LEFT, (15,))):
        lung, lesions = volume_ml(scan.lungs == number, scan.spacing), sum(map(ball_ml, radii))
        assert facts[f"{side}_lung_ml"] == pytest.approx(lung, rel=0.05)
        assert facts[f"{side}_lesion_ml"] == pytest.approx(lesions, rel=0.05)
        assert facts[f"{side}_lesion_percent"] == pytest.approx(100 * lesions / lung, rel=0.05)
    assert facts["outside_lesion_ml"] == pytest.approx(ball_ml(14), rel=0.05)
    assert found.lesion_ml == pytest.approx(facts["both_lesion_ml"] + facts["outside_lesion_ml"])
    # The rows of the slices add up to the scan.
    for key in ("right_lung_ml", "left_lesion_ml", "outside_lesion_ml"):
        assert sum(row[key] for row in found.slices) == pytest.approx(facts[key])


def test_lesions_outside_the_lungs_can_be_dropped(scan, found):
    result = predicted(scan, keep="lungs")
    assert result.lesions == found.lesions[:3]
    assert_array_equal(result.volume.stack(result.mask), (scan.lesions > 0) & (scan.lesions <= 3))
    assert result.involvement["outside_lesion_ml"] == 0
    assert result.lesion_ml == pytest.approx(found.involvement["both_lesion_ml"])
    with pytest.raises(ConfigError, match="keep='heart'"):
        predicted(scan, keep="heart")


def test_one_missed_slice_is_bridged_two_are_not():
    mask = np.zeros((9, 20, 20), bool)
    mask[[0, 2, 5], 4:8, 4:8] = True
    mask[0, 15, 15] = mask[2, 18, 18] = True  # not over each other
    ids = join_slices(mask)
    assert (ids[0, 5, 5], ids[1, 5, 5]) == (ids[2, 5, 5], 0)
    assert len({int(number) for number in ids[mask]}) == 4
    diagonal = np.zeros((2, 5, 5), bool)
    diagonal[0, 1, 1] = diagonal[1, 2, 2] = True
    assert join_slices(diagonal).max() == 1


def test_classes_are_told_apart_where_a_model_does(scan):
    marks = np.select([scan.lesions == 1, scan.lesions == 2], [1, 2], 0).astype(np.uint8)
    marks[24:][scan.lesions[24:] == 1] = 2  # the upper half of the first ball
    z, y, x = scan.spacing
    predictor = TruthPredictor(marks, ("background", "GGO", "consolidation"))
    result = predictor.volume(scan.hu, spacing=(x, y, z))
    assert len(result.lesions) == 2  # both classes of a lesion are one
    facts = result.involvement
    assert facts["right_GGO_ml"] == pytest.approx(ball_ml(22) / 2, rel=0.05)
    assert facts["left_GGO_ml"] == 0
    assert facts["left_consolidation_percent"] == pytest.approx(facts["left_lesion_percent"])
    assert result.lesions[0].ml_by_class["consolidation"] == pytest.approx(ball_ml(22) / 2, rel=0.05)
    (row, *_) = csv.DictReader(io.StringIO(result.lesion_table()))
    assert float(row["GGO_ml"]) + float(row["consolidation_ml"]) == pytest.approx(float(row["ml"]), rel=1e-4)
    result.report()


def test_slices_missing_in_the_middle_and_two_series_in_a_folder(tmp_path, scan):
    pytest.importorskip("pydicom")
    pixel = scan.spacing[1]
    paths = write_series(tmp_path / "ct", scan.hu, step=(0, 0, 5.0), PixelSpacing=[pixel, pixel])
    write_series(tmp_path / "ct", scan.hu[:5], step=(0, 0, 5.0), prefix="other", SeriesInstanceUID="1.2.4")
    for place in (20, 30, 31):
        paths[place].unlink()
    marks = {str(path): (scan.lesions[place] > 0).astype(np.uint8) for place, path in enumerate(paths)}
    predictor = TruthPredictor(scan.lesions)
    predictor._predict = lambda slices: [predictor._marked(one, marks[one.source]) for one in slices]
    result = predictor.volume(tmp_path / "ct")
    first = result.lesions[0]
    left = [k for k in range(48) if k != 20 and (scan.lesions[k] == 1).any()]
    assert (first.first_slice, first.last_slice) == (left[0], left[-1])  # one missing slice parts nothing
    kept = np.delete(scan.lungs, (20, 30, 31), 0)
    for side, number in (("right", RIGHT), ("left", LEFT)):
        assert result.involvement[f"{side}_lung_ml"] == pytest.approx(volume_ml(kept == number, scan.spacing), rel=0.05)
    assert any("slices missing after" in problem for problem in result.problems)
    assert any("another series" in problem for problem in result.problems)


# In memory


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAR", "PIL"])
def test_sides_do_not_depend_on_how_a_scan_is_stored(orientation):
    made = phantom_scan(BALLS[:1], size=96, slices=24, thickness=10.0)
    z, y, x = made.spacing
    image = nibabel.Nifti1Image(made.hu.T, np.diag([-x, -y, z, 1]))
    wanted = nibabel.orientations.axcodes2ornt(tuple(orientation))
    image = image.as_reoriented(
        nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(image.affine), wanted)
    )
    volume = open_volume(image)
    lungs = find_lungs(grey(volume.stack(np.asarray(image.dataobj))), made.spacing)
    expected = lungs if volume.affine[2, volume.axes[0]] > 0 else lungs[::-1]
    require_lungs(expected, made.lungs, 0.1)
    back = nibabel.Nifti1Image(volume.grid(lungs), volume.affine)
    assert (np.asarray(nibabel.as_closest_canonical(back).dataobj)[:48] == LEFT).sum() > 1000  # RAS: left half first


def test_arrays_nibabel_and_simpleitk_give_one_result(scan):
    sitk = pytest.importorskip("SimpleITK")
    hu, marks = scan.hu[20:26], scan.lesions[20:26]
    z, y, x = scan.spacing
    itk = sitk.GetImageFromArray(hu)
    itk.SetSpacing((x, y, z))
    itk.SetOrigin((-100.0, -90.0, 7.0))
    nifti = nibabel.Nifti1Image(hu.T, np.diag([-x, -y, z, 1]))
    predictor = TruthPredictor((marks > 0).astype(np.uint8))
    results = [predictor.volume(hu.astype(kind), spacing=(x, y, z)) for kind in (np.int16, np.int64, np.float32)]
    results += [predictor.volume(nifti), predictor.volume(itk)]
    for result in results[1:]:
        assert_array_equal(result.mask, results[0].mask)
        assert result.involvement == pytest.approx(results[0].involvement, rel=1e-5)
        assert_allclose(result.affine[:3, :3], results[0].affine[:3, :3], rtol=1e-6)
    assert_allclose(results[-1].affine[:3, 3], (100, 90, 7))
    with pytest.raises(InputError, match="spacing="):
        predictor.volume(hu)
    with pytest.raises(InputError, match="not a scan"):
        predictor.volume(object())


def test_predict_takes_a_scan_for_a_scan(tmp_path, monkeypatch):
    pytest.importorskip("pydicom")
    made = phantom_scan(size=96, slices=2)
    nibabel.save(nibabel.Nifti1Image(made.hu.T, np.diag([-4, -4, 5, 1])), tmp_path / "scan.nii.gz")
    write_series(tmp_path / "series", made.hu)
    predictor = TruthPredictor(made.lesions)
    monkeypatch.setattr("ctmasknet.predictor.Predictor", lambda **options: predictor)
    assert isinstance(predict(tmp_path / "scan.nii.gz"), VolumePrediction)
    assert len(predict(str(tmp_path / "series")).slices) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no DICOM"):
        predict(tmp_path / "empty")


# What is written


def test_every_file_says_the_same(tmp_path, scan, found):
    paths = {"".join(path.suffixes): path for path in found.save(tmp_path, "scan")}
    ids = np.asarray(nibabel.load(paths[".lesion_ids.nii.gz"]).dataobj)
    lungs = nibabel.load(paths[".lungs.nii.gz"])
    rows = list(csv.DictReader(io.StringIO(paths[".lesions.csv"].read_text())))
    assert [row["side"] for row in rows] == ["right", "left", "right", "outside"]
    voxel_ml = math.prod(lungs.header.get_zooms()) / 1000
    for row in rows:
        assert float(row["ml"]) == pytest.approx((ids == int(row["lesion"])).sum() * voxel_ml, rel=1e-3)
    facts = json.loads(paths[".json"].read_text())
    both = (np.asarray(lungs.dataobj) > 0).sum() * voxel_ml
    assert facts["involvement"]["both_lung_ml"] == pytest.approx(both, rel=1e-3)
    assert [lesion["id"] for lesion in facts["lesions"]] == [1, 2, 3, 4]
    slices = list(csv.DictReader(io.StringIO(paths[".slices.csv"].read_text())))
    assert sum(float(row["both_lung_ml"]) for row in slices) == pytest.approx(both, rel=1e-3)
    assert [int(row["lesions"]) for row in slices] == [len(np.unique(plane)) - 1 for plane in scan.lesions]
    with_lesions = sum(plane.any() for plane in scan.lesions)
    with Image.open(paths[".montage.png"]) as picture:
        assert picture.height > math.ceil(with_lesions / 4) * 288  # a tile for each
    with Image.open(paths[".report.png"]) as page:
        assert page.size == (1240, 1754)
    assert b"/Count 1" in paths[".report.pdf"].read_bytes()
    before = paths[".report.pdf"].read_bytes()
    assert {path.name for path in map(Path, found.save(tmp_path, "scan"))} == {path.name for path in paths.values()}
    assert paths[".report.pdf"].read_bytes() == before


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(ImportError, match=r"ctmasknet\[io\]"):
        find_lungs(np.zeros((1, 64, 64), np.uint8), (1.0, 1.0, 1.0))
