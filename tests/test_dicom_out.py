"""DICOM SEG and SR of a scan's lesions, read back by highdicom and pydicom and held against the scan's own files."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scans import MARK, BlockPredictor, block_volume, enhanced, write_series

from ctmasknet import VolumePrediction, predict_files
from ctmasknet.cli import main
from ctmasknet.errors import InputError, MissingExtraError

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")
hd = pytest.importorskip("highdicom")

PATIENT = {
    "PatientName": "Müller^Zoë",
    "PatientID": "4711",
    "SpecificCharacterSet": "ISO_IR 100",
    "StudyInstanceUID": "1.2.3.4",
    "FrameOfReferenceUID": "1.2.3.5",
    "StudyDate": "20200401",
    "StudyTime": "101112",
    "StudyID": "1",
}
SLICES = np.moveaxis(block_volume(), 2, 0)  # (6, 40, 48); the block lies in slice 4 alone
AXIAL = (1, 0, 0, 0, 1, 0)
OBLIQUE = (0.96, 0.28, 0, -0.28, 0.96, 0)


@pytest.fixture(scope="module")
def predictor() -> BlockPredictor:
    return BlockPredictor()


def several_slices() -> np.ndarray:
    """The block in slices 1 to 4, in each another part of it."""
    slices = np.where(SLICES == MARK, 0, SLICES)
    for k in range(1, 5):
        slices[k, 27 : 27 + k, 8:12] = MARK
    return slices


def saved(prediction: VolumePrediction, folder: Path) -> tuple[Any, Any, Any]:
    """SEG by highdicom, SR by highdicom, mask by nibabel; DICOM's own checker finds no error in the first two."""
    paths = {"".join(path.suffixes[-2:]): path for path in prediction.save(folder, "scan", dicom=True)}
    for name in (".seg.dcm", ".sr.dcm"):
        if checker := shutil.which("dciodvfy"):
            said = subprocess.run([checker, paths[name]], capture_output=True, check=False).stderr
            assert b"Error" not in said, said
    seg, sr = hd.seg.segread(paths[".seg.dcm"]), hd.sr.srread(paths[".sr.dcm"])
    return seg, sr, nibabel.load(folder / "scan.lesions.nii.gz")


def frames_of(seg: Any) -> dict[str, np.ndarray]:
    """Source instance -> (H, W) label map, of the frames that the SEG has."""
    frames: dict[str, np.ndarray] = {}
    for item, pixels in zip(seg.PerFrameFunctionalGroupsSequence, np.atleast_3d(seg.pixel_array.T).T, strict=True):
        source = item.DerivationImageSequence[0].SourceImageSequence[0]
        shared = seg.SharedFunctionalGroupsSequence[0]
        of = (item if "SegmentIdentificationSequence" in item else shared).SegmentIdentificationSequence[0]
        key = f"{source.ReferencedSOPInstanceUID}/{source.get('ReferencedFrameNumber', '')}"
        frames[key] = np.maximum(frames.get(key, 0), pixels * of.ReferencedSegmentNumber)
    return frames


def volumes_of(sr: Any) -> dict[str, float]:
    """Tracking identifier -> ml."""
    groups = sr.content.get_volumetric_roi_measurement_groups()
    return {
        g.tracking_identifier: g.get_measurements(hd.sr.CodedConcept("118565006", "SCT", "Volume"))[0].value
        for g in groups
    }


@pytest.mark.parametrize(
    ("directions", "step"),
    [
        (AXIAL, (0, 0, 2)),
        (AXIAL, (0, 0, -2)),
        (AXIAL, (0, 0.5, 2)),
        (OBLIQUE, (0, 0, 2)),
        ((-1, 0, 0, 0, 0.98, 0.199), (0.1, 0.3, 2)),
    ],
)
def test_every_frame_lies_on_its_source_pixel_by_pixel_and_volumes_agree(tmp_path, predictor, directions, step):
    directions = (*directions[:3], *(np.array(directions[3:]) / np.linalg.norm(directions[3:])))
    # Slices overlap: their thickness is not their distance.
    paths = write_series(
        tmp_path / "scan", several_slices(), directions=directions, step=step, SliceThickness="5", **PATIENT
    )
    seg, sr, nifti = saved(predictor.volume(tmp_path / "scan"), tmp_path / "out")
    sources = {f"{source.SOPInstanceUID}/": source for source in map(pydicom.dcmread, paths)}
    frames = frames_of(seg)
    for uid, source in sources.items():
        assert_array_equal(frames.get(uid, np.zeros((40, 48))), source.pixel_array == MARK)
    for item in seg.PerFrameFunctionalGroupsSequence:
        uid = item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        position = item.PlanePositionSequence[0].ImagePositionPatient
        assert_allclose(position, sources[f"{uid}/"].ImagePositionPatient)
    shared = seg.SharedFunctionalGroupsSequence[0]
    assert_allclose(shared.PlaneOrientationSequence[0].ImageOrientationPatient, directions, atol=1e-6)
    measures = shared.PixelMeasuresSequence[0]
    assert_allclose(measures.PixelSpacing, [0.7, 0.8])
    normal_distance = abs(np.dot(np.cross(directions[:3], directions[3:]), step))
    expected = 40 * 0.7 * 0.8 * normal_distance / 1000  # 40 marked pixels in all
    voxel = float(np.prod(measures.PixelSpacing)) * measures.SpacingBetweenSlices / 1000
    assert sum(map(np.count_nonzero, frames.values())) * voxel == pytest.approx(expected, rel=1e-3)
    assert volumes_of(sr) == {"lesion": pytest.approx(expected, rel=1e-3)}
    nifti_ml = np.count_nonzero(nifti.get_fdata()) * abs(np.linalg.det(nifti.affine)) / 1000
    assert nifti_ml == pytest.approx(expected, rel=1e-3)


def test_patient_study_and_algorithm_are_named(tmp_path, predictor):
    write_series(tmp_path / "scan", SLICES, **PATIENT)
    prediction = predictor.volume(tmp_path / "scan")
    seg, sr, _ = saved(prediction, tmp_path / "out")
    for file in (seg, sr):
        assert (str(file.PatientName), file.PatientID, file.StudyInstanceUID) == ("Müller^Zoë", "4711", "1.2.3.4")
    assert (seg.FrameOfReferenceUID, sr.PreliminaryFlag, sr.VerificationFlag) == (
        "1.2.3.5",
        "PRELIMINARY",
        "UNVERIFIED",
    )
    (segment,) = seg.SegmentSequence
    code = segment.SegmentedPropertyTypeCodeSequence[0]
    assert (code.CodeValue, code.CodingSchemeDesignator) == ("52988006", "SCT")
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    digest = predictor.models["segmenter"]["sha256"]
    assert algorithm.AlgorithmName == "ctmasknet maskrcnn_resnet18_t2"
    assert digest[:16] in algorithm.AlgorithmVersion
    assert digest in algorithm.AlgorithmParameters
    (group,) = sr.content.get_volumetric_roi_measurement_groups()
    assert group.tracking_uid == segment.TrackingUID
    (referenced,) = [item for item in group[0].ContentSequence if item.name.value == "121191"]
    assert referenced.referenced_sop_instance_uid == seg.SOPInstanceUID
    assert referenced.referenced_segment_numbers == [1]


def test_classes_have_their_codes_and_one_that_is_absent_has_0_ml(tmp_path, predictor):
    write_series(tmp_path / "scan", SLICES, **PATIENT)
    found = predictor.volume(tmp_path / "scan")
    names = ("background", "ggo", "consolidation")
    counts = np.insert(found.counts, 1, 0, axis=2)
    made = dataclasses.replace(found, mask=2 * found.mask, counts=counts, lesions=(), class_names=names)
    seg, sr, _ = saved(made, tmp_path / "out")
    codes = [segment.SegmentedPropertyTypeCodeSequence[0] for segment in seg.SegmentSequence]
    assert [(code.CodeValue, code.CodingSchemeDesignator) for code in codes] == [("112120", "DCM"), ("95436008", "SCT")]
    (labels,) = frames_of(seg).values()
    assert_array_equal(labels, 2 * (SLICES[4] == MARK))
    assert volumes_of(sr) == {"ggo": 0, "consolidation": pytest.approx(found.lesion_ml)}


def test_a_scan_without_lesions_has_an_empty_seg_and_0_ml(tmp_path, predictor):
    paths = write_series(tmp_path / "scan", np.where(SLICES == MARK, 0, SLICES), **PATIENT)
    seg, sr, _ = saved(predictor.volume(tmp_path / "scan"), tmp_path / "out")
    frames = frames_of(seg)
    assert set(frames) == {f"{pydicom.dcmread(path).SOPInstanceUID}/" for path in paths}
    assert not any(map(np.any, frames.values()))
    assert volumes_of(sr) == {"lesion": 0}


def test_only_slices_that_were_looked_at_are_referred_to(tmp_path, predictor):
    folder = tmp_path / "scan"
    paths = write_series(folder, several_slices(), **PATIENT)
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in paths]
    paths[2].unlink()  # a gap
    whole = paths[3].read_bytes()
    paths[3].write_bytes(whole[:-1000])  # cut off in its pixels
    write_series(folder, SLICES[:2], prefix="other", **{**PATIENT, "SeriesInstanceUID": "9.9"})
    prediction = predictor.volume(folder)
    assert sum(bool(row["error"]) for row in prediction.slices) == 1
    seg, sr, _ = saved(prediction, tmp_path / "out")
    looked_at = {uids[k] for k in (0, 1, 4, 5)}
    (series,) = seg.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == "1.2.3"
    assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} == looked_at
    assert {key[:-1] for key in frames_of(seg)} == {uids[1], uids[4]}
    assert {uid for _, series, uid, _ in sr.get_evidence() if series == "1.2.3"} == looked_at


def test_frames_of_a_multi_frame_file_are_referred_to_one_by_one(tmp_path, predictor):
    order = [3, 0, 5, 1, 4, 2]
    file = enhanced(
        tmp_path / "multi.dcm",
        several_slices(),
        order,
        SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1",
        **PATIENT,
    )
    seg, sr, _ = saved(predictor.volume(file), tmp_path / "out")
    uid = pydicom.dcmread(file).SOPInstanceUID
    expected = several_slices() == MARK
    frames = frames_of(seg)
    assert set(frames) == {f"{uid}/{order.index(k) + 1}" for k in range(1, 5)}
    for k in range(1, 5):
        assert_array_equal(frames[f"{uid}/{order.index(k) + 1}"], expected[k])
    assert volumes_of(sr) == {"lesion": pytest.approx(40 * 0.7 * 0.8 * 2 / 1000)}


def test_uids_that_are_missing_or_none_get_stand_ins_and_it_is_said(tmp_path, predictor):
    uids = {"StudyInstanceUID": "896911bf-1143-4c8d-8f04-f3cd1a7f6204", "FrameOfReferenceUID": ""}
    paths = write_series(tmp_path / "scan", SLICES, **{**PATIENT, **uids})
    for path in paths:
        dataset = pydicom.dcmread(path)
        dataset.SOPInstanceUID = ""
        dataset.save_as(path)
    prediction = predictor.volume(tmp_path / "scan")
    with pytest.warns(UserWarning, match=r"FrameOfReferenceUID, SOPInstanceUID, StudyInstanceUID"):
        seg, sr, _ = saved(prediction, tmp_path / "out")
    with pytest.warns(UserWarning, match="SOPInstanceUID"):
        again, _, _ = saved(prediction, tmp_path / "again")
    assert seg.StudyInstanceUID == sr.StudyInstanceUID == again.StudyInstanceUID
    assert seg.StudyInstanceUID.is_valid
    (series,) = seg.ReferencedSeriesSequence
    assert len({item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence}) == 6
    assert set(frames_of(seg)) == set(frames_of(again))


def test_what_no_dicom_can_be_made_of_is_refused_and_the_others_are_done(tmp_path, predictor, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_series(tmp_path / "series", SLICES, **PATIENT)
    write_series(tmp_path / "sex", SLICES, **PATIENT, PatientSex="unknown")
    nibabel.save(nibabel.Nifti1Image(block_volume(), np.eye(4)), "scan.nii.gz")
    shutil.copy(sorted((tmp_path / "series").iterdir())[0], "slice.dcm")
    results: dict[str, Any] = {}
    inputs = ["scan.nii.gz", "series", "sex", "slice.dcm"]
    predict_files(predictor, inputs, "out", format="dicom", on_result=lambda one: results.update({one.source: one}))
    assert "not DICOM" in results["scan.nii.gz"].error
    assert "not a scan" in results["slice.dcm"].error
    assert "its headers do not allow a DICOM SEG" in results["sex"].error
    written = {path.name for path in Path("out").iterdir() if path.name.startswith("s")}
    assert written == {"scans.csv", *(path.name for path in results["series"].paths)}
    assert {path.name for path in results["series"].paths} >= {"series.seg.dcm", "series.sr.dcm"}
    with pytest.raises(InputError, match="not DICOM"):
        predictor.volume("scan.nii.gz").save("out", dicom=True)


def test_the_command_writes_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_series(tmp_path / "series", SLICES, **PATIENT)
    assert main(["predict", "series", "-o", "out", "--format", "dicom", "--classifier", "none"]) == 0
    assert {path.name for path in Path("out").glob("*.dcm")} == {"series.seg.dcm", "series.sr.dcm"}
    assert main(["predict", "series", "-o", "out", "--format", "dicom", "--segmenter", "none"]) == 2
    assert "Give a segmenter" in capsys.readouterr().err


def test_without_highdicom_the_extra_is_named(tmp_path, predictor, monkeypatch):
    write_series(tmp_path / "scan", SLICES, **PATIENT)
    prediction = predictor.volume(tmp_path / "scan")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(MissingExtraError, match=r"highdicom.*ctmasknet\[dicom\]"):
        prediction.save(tmp_path / "out", dicom=True)
    assert not (tmp_path / "out").exists()


def test_each_lung_has_its_volume_and_what_lesions_take_up_of_it(tmp_path, predictor):
    write_series(tmp_path / "scan", SLICES, **PATIENT)
    found = predictor.volume(tmp_path / "scan")
    lungs = np.zeros_like(found.mask)
    lungs[25:35, 5:15, 4] = 2  # around the block, which is 4 x 6 voxels of 100
    counts = np.zeros_like(found.counts)
    for label in (0, 1):
        for side in (0, 1, 2):
            counts[:, side, label] = ((found.mask == label) & (lungs == side)).sum((0, 1))
    _, sr, _ = saved(dataclasses.replace(found, lungs=lungs, counts=counts), tmp_path / "out")
    groups = sr.content.get_image_measurement_groups()
    stated = {
        (group.tracking_identifier, one.name.meaning, one.unit.value): one.value
        for group in groups
        for one in group.get_measurements()
    }
    assert {key[0] for key in stated} == {"lung, left", "lesions, left"}
    sites = [group.finding_sites[0].laterality.meaning for group in groups]
    assert sites == ["Left", "Left"]
    ml = 0.7 * 0.8 * 2 / 1000
    assert stated["lung, left", "Volume", "ml"] == pytest.approx(100 * ml)
    assert stated["lesions, left", "Volume", "ml"] == pytest.approx(np.count_nonzero(found.mask & (lungs > 0)) * ml)
    assert stated["lesions, left", "Volume of lesions by volume of lung", "%"] == np.count_nonzero(
        found.mask & (lungs > 0)
    )
