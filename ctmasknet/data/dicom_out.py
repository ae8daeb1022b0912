"""A lesion mask as DICOM beside its scan: a segmentation (SEG) on the scan's own frames, a report (SR) of its volumes.

Nothing is resampled: each frame of the SEG is a frame of the scan, pixel by pixel, with that frame's position, so
that tilted gantries, gaps and oblique slices are exact. Patient and study are copied from the scan.
"""

from __future__ import annotations

import io
import uuid
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ctmasknet.data.scans import Volume
from ctmasknet.data.slices import reading
from ctmasknet.errors import InputError, import_extra
from ctmasknet.registry import __version__, class_title

MAKER = "ctmasknet"
LUNG = ("39607008", "SCT", "Lung")
LESION = ("52988006", "SCT", "Lesion")
ABNORMAL = ("49755003", "SCT", "Morphologically Abnormal Structure")
FINDINGS = {
    "ggo": ("112120", "DCM", "Ground glass opacity"),
    "consolidation": ("95436008", "SCT", "Lung consolidation"),
}
VOLUME = ("118565006", "SCT", "Volume"), ("ml", "UCUM", "Milliliter")
SHARE = ("lesion-share", "99CTMASKNET", "Volume of lesions by volume of lung"), ("%", "UCUM", "Percent")
MEASURES = {"lung_ml": VOLUME, "lesion_ml": VOLUME, "lesion_percent": SHARE}
SIDES = {"right": ("24028007", "SCT", "Right"), "left": ("7771000", "SCT", "Left")}
Code = tuple[str, str, str]
PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")
STUDY = ("AccessionNumber", "StudyID", "StudyDate", "StudyTime")  # like the patient's, required, if only empty


class LesionMask(NamedTuple):
    """Lesions of a scan, and what drew them.

    Attributes:
        volume: a scan read from DICOM.
        mask: uint8 of its shape, 0 or the label of a class.
        class_names: index = label, background first.
        slices: indices of the slices that were looked at; no others are referred to.
        variant, digest: name of the segmenter, SHA-256 of its weights.
        parameters: what decides the result, such as thresholds.
        involvement: as `VolumePrediction.involvement`; None if the lungs were not found.
    """

    volume: Volume
    mask: npt.NDArray[np.uint8]
    class_names: Sequence[str]
    slices: Sequence[int]
    variant: str
    digest: str
    parameters: Mapping[str, str]
    involvement: Mapping[str, float | None] | None = None

    @property
    def algorithm(self) -> dict[str, str]:
        return {"name": f"{MAKER} {self.variant}", "version": f"{__version__}, weights {self.digest[:16]}"}

    @property
    def distance(self) -> float:
        """Between the planes of neighbouring slices, mm; along their normal, whatever the tilt of the gantry."""
        return 1000 * self.volume.voxel_ml / self.volume.pixel_mm2


def require_frames(volume: Volume) -> None:
    """Refuse, before long work, a scan that was not read from DICOM, and work without highdicom."""
    import_extra("highdicom", "dicom", "writing DICOM")
    if not volume.frames:
        raise InputError(
            f"{volume.source}: not DICOM, so there are no patient, study and frames for a DICOM SEG to refer to. "
            "Give the DICOM series, or choose another format."
        )


def dicom_files(lesions: LesionMask) -> tuple[bytes, bytes]:
    """The SEG and the SR (TID 1500, Comprehensive 3D) of a scan's lesions, as the bytes of two files.

    The SEG has a segment per class; frames without lesions are left out, unless there is no lesion at all. The SR
    states the volume of every class, and of each lung with what lesions take up of it.
    """
    require_frames(lesions.volume)
    hd = import_extra("highdicom", "dicom", "writing DICOM")
    headers = _headers(lesions)
    files = io.BytesIO(), io.BytesIO()
    try:
        seg = _segmentation(hd, lesions, headers)
        seg.save_as(files[0])
        _report(hd, lesions, headers, seg).save_as(files[1])
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # highdicom's, of headers it cannot use
        raise InputError(
            f"{lesions.volume.source}: its headers do not allow a DICOM SEG ({error}). Export the scan again."
        ) from error
    return files[0].getvalue(), files[1].getvalue()


def _headers(lesions: LesionMask) -> dict[str, Any]:
    """The header of each file the slices lie in, with what a SEG cannot do without put in."""
    pydicom = import_extra("pydicom", "io", "reading DICOM files")
    headers: dict[str, Any] = {}
    replaced = set()
    for path in dict.fromkeys(lesions.volume.frames[index][0] for index in lesions.slices):
        with reading(path, "DICOM"):
            header = headers[path] = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            for keyword in (*PATIENT, *STUDY):
                header.setdefault(keyword, None)
            for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"):
                uid = pydicom.uid.UID(str(header.get(keyword) or ""))
                if not uid.is_valid:
                    replaced.add(keyword)
                    of = f"{uid or header.get('SeriesInstanceUID')} {keyword}"
                    of += path if keyword == "SOPInstanceUID" else ""
                    setattr(header, keyword, f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, of).int}")
            if "PerFrameFunctionalGroupsSequence" not in header:
                # Within a series they differ in the last digits, if at all.
                header.ImageOrientationPatient = next(iter(headers.values())).ImageOrientationPatient
                header.SliceThickness = header.get("SliceThickness") or lesions.distance
    if replaced:
        warnings.warn(
            f"{lesions.volume.source}: {', '.join(sorted(replaced))} missing or not valid. SEG and SR hold stand-ins: "
            "a viewer shows them where they belong, but cannot tell which scan they belong to",
            stacklevel=2,
        )
    return headers


def _segmentation(hd: Any, lesions: LesionMask, headers: Mapping[str, Any]) -> Any:
    sources = list(headers.values())
    frames = int(sources[0].get("NumberOfFrames") or 1)
    # A file of many frames has them all, those that were not looked at empty.
    pixels = np.zeros((max(frames, len(lesions.slices)), sources[0].Rows, sources[0].Columns), np.uint8)
    for place, index in enumerate(lesions.slices):
        pixels[lesions.volume.frames[index][1] if frames > 1 else place] = lesions.mask[:, :, index].T
    segments = [
        hd.seg.SegmentDescription(
            segment_number=label,
            segment_label=class_title(name),
            segmented_property_category=hd.sr.CodedConcept(*ABNORMAL),
            segmented_property_type=hd.sr.CodedConcept(*FINDINGS.get(name, LESION)),
            algorithm_type="AUTOMATIC",
            algorithm_identification=hd.AlgorithmIdentificationSequence(
                family=hd.sr.CodedConcept("123110", "DCM", "Artificial Intelligence"),
                source=MAKER,
                parameters=dict(lesions.parameters),
                **lesions.algorithm,
            ),
            tracking_uid=hd.UID(),
            tracking_id=name,
            anatomic_regions=[hd.sr.CodedConcept(*LUNG)],
        )
        for label, name in enumerate(lesions.class_names[1:], start=1)
    ]
    seg = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=pixels,
        segmentation_type="BINARY",
        segment_descriptions=segments,
        content_label="LESIONS",
        content_description="Drawn by software, not verified; not for clinical use",
        device_serial_number=lesions.digest[:16],
        **_instance(hd, lesions, "Lesions"),
    )
    # Neighbouring slices may overlap, so the header's thickness is not the distance that volumes are made of.
    seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = f"{lesions.distance:.10g}"
    return seg


def _report(hd: Any, lesions: LesionMask, headers: Mapping[str, Any], seg: Any) -> Any:
    sr = hd.sr
    parameters = [f"{name}={value}" for name, value in lesions.parameters.items()]
    algorithm = sr.AlgorithmIdentification(parameters=parameters, **lesions.algorithm)

    def measured(name: Code, unit: Code, value: Any) -> Any:
        return sr.Measurement(sr.CodedConcept(*name), value, sr.CodedConcept(*unit), algorithm_id=algorithm)

    groups = []
    for segment in seg.SegmentSequence:
        voxels = lesions.mask == segment.SegmentNumber
        images = []
        for index in [index for index in lesions.slices if voxels[:, :, index].any()] or lesions.slices:
            path, frame = lesions.volume.frames[index]
            of, frames = headers[path], [frame + 1] if "NumberOfFrames" in headers[path] else None
            images.append(sr.SourceImageForSegmentation(of.SOPClassUID, of.SOPInstanceUID, frames))
        groups.append(
            sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(segment.TrackingUID, segment.TrackingID),
                referenced_segment=sr.ReferencedSegment(
                    seg.SOPClassUID, seg.SOPInstanceUID, segment.SegmentNumber, source_images=images
                ),
                finding_type=sr.CodedConcept(*FINDINGS.get(segment.TrackingID, LESION)),
                finding_sites=[sr.FindingSite(sr.CodedConcept(*LUNG))],
                measurements=[measured(*VOLUME, np.count_nonzero(voxels) * lesions.volume.voxel_ml)],
            )
        )
    involvement = lesions.involvement or {}
    for side, laterality in SIDES.items():
        facts = {key: involvement.get(f"{side}_{key}") for key in MEASURES}
        if facts["lesion_percent"] is None:  # no such lung
            continue
        for name, finding, keys in (("lung", LUNG, ["lung_ml"]), ("lesions", LESION, ["lesion_ml", "lesion_percent"])):
            groups.append(
                sr.MeasurementsAndQualitativeEvaluations(
                    tracking_identifier=sr.TrackingIdentifier(hd.UID(), f"{name}, {side}"),
                    finding_type=sr.CodedConcept(*finding),
                    finding_sites=[sr.FindingSite(sr.CodedConcept(*LUNG), sr.CodedConcept(*laterality))],
                    measurements=[measured(*MEASURES[key], facts[key]) for key in keys],
                )
            )
    uid = f"2.25.{int(lesions.digest[:32], 16)}"  # the same for the same weights
    device = sr.DeviceObserverIdentifyingAttributes(uid, name=MAKER, model_name=lesions.variant)
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(
            observer_device_context=sr.ObserverContext(sr.CodedConcept("121007", "DCM", "Device"), device)
        ),
        procedure_reported=sr.CodedConcept("169069000", "SCT", "CT of chest"),
        imaging_measurements=groups,
        title=sr.CodedConcept("126000", "DCM", "Imaging Measurement Report"),
    )
    facts = _instance(hd, lesions, "Lesion volumes")
    return sr.Comprehensive3DSR(evidence=[*headers.values(), seg], content=content, is_complete=True, **facts)


def _instance(hd: Any, lesions: LesionMask, description: str) -> dict[str, Any]:
    """What an instance says of itself; each is alone in its series."""
    return {
        "series_instance_uid": hd.UID(),
        "series_number": 9000,
        "sop_instance_uid": hd.UID(),
        "instance_number": 1,
        "series_description": f"{description} ({MAKER}, research only)",
        "manufacturer": MAKER,
        "manufacturer_model_name": lesions.variant,
        "software_versions": __version__,
    }
