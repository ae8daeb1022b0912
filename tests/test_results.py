"""What a prediction says of itself, and what it leaves on disk."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ctmasknet import Evaluation, Exported, TrainResult
from ctmasknet.errors import InputError
from ctmasknet.results import Prediction, run_length_encode


def a_prediction(**changes: Any) -> Prediction:
    """40 x 50 slice with a 10 x 10 and a 6 x 10 lesion that share 4 x 10 pixels."""
    masks = np.zeros((2, 40, 50), bool)
    masks[0, 5:15, 20:30] = True
    masks[1, 11:17, 20:30] = True
    fields: dict[str, Any] = {
        "image_size": (40, 50),
        "boxes": np.array([[20, 5, 30, 15], [20, 11, 30.25, 17]], np.float32),
        "scores": np.array([0.91, 0.4], np.float32),
        "labels": np.array([1, 1], np.int64),
        "masks": masks,
        "class_probabilities": {"control": 0.02, "pneumonia": 0.07, "covid": 0.91},
        "roi_batch": None,
        "class_names": ("background", "lesion"),
        "image": np.full((40, 50), 0.5, np.float32),
        "source": "folder/slice.png",
        "score_threshold": 0.3,
    }
    return Prediction(**{**fields, **changes})


def nothing_found(**changes: Any) -> Prediction:
    none: dict[str, Any] = {
        "boxes": np.zeros((0, 4), np.float32),
        "scores": np.zeros(0, np.float32),
        "labels": np.zeros(0, np.int64),
        "masks": np.zeros((0, 40, 50), bool),
    }
    return a_prediction(**{**none, **changes})


def masks_of_all_sorts() -> list[npt.NDArray[np.bool_]]:
    rng = np.random.default_rng(0)
    single = np.zeros((3, 5), bool)
    single[1, 2] = True
    return [
        np.zeros((4, 7), bool),
        np.ones((4, 7), bool),
        single,
        np.array([[True]]),
        rng.random((31, 17)) < 0.5,
        rng.random((512, 480)) < 0.001,
        rng.random((64, 48)) < 0.999,
    ]


@pytest.mark.parametrize("mask", masks_of_all_sorts(), ids=lambda mask: f"{mask.shape}-{int(mask.sum())}")
def test_pycocotools_reads_the_masks_back_exactly(mask: npt.NDArray[np.bool_]) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    rle = json.loads(json.dumps(run_length_encode(mask)))
    np.testing.assert_array_equal(coco.decode(rle).astype(bool), mask)
    assert rle["counts"] == coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def test_a_pixel_of_two_lesions_counts_once() -> None:
    prediction = a_prediction()
    assert prediction.lesion_fraction == pytest.approx(120 / 2000)
    assert prediction.lesion_mask.shape == (40, 50)
    assert prediction.lesion_mask.sum() == 120


def test_no_lesion_is_a_fraction_of_zero_and_an_empty_mask() -> None:
    prediction = nothing_found()
    assert prediction.lesion_fraction == 0.0
    assert prediction.lesion_mask.shape == (40, 50)
    assert not prediction.lesion_mask.any()


@pytest.mark.parametrize(
    ("prediction", "line"),
    [
        (a_prediction(), "2 lesions covering 6.0% of the slice; COVID-19 0.91"),
        (a_prediction(class_probabilities=None), "2 lesions covering 6.0% of the slice"),
        (
            a_prediction(labels=np.array([1, 2]), class_names=("background", "GGO", "consolidation")),
            "2 lesions (1 GGO, 1 consolidation) covering 6.0% of the slice; COVID-19 0.91",
        ),
        (nothing_found(), "no lesion above 0.30; COVID-19 0.91"),
        (nothing_found(score_threshold=None, class_probabilities=None), "no lesion found"),
        (nothing_found(has_segmentation=False), "COVID-19 0.91"),
    ],
)
def test_the_summary_is_one_line_for_people(prediction: Prediction, line: str) -> None:
    assert prediction.summary == line


def test_a_tiny_lesion_does_not_read_as_none() -> None:
    masks = np.zeros((1, 100, 100), bool)
    masks[0, 3, 4] = True
    prediction = a_prediction(
        image_size=(100, 100),
        boxes=np.array([[4, 3, 5, 4]], np.float32),
        scores=np.array([0.5], np.float32),
        labels=np.array([1]),
        masks=masks,
        class_probabilities=None,
    )
    assert prediction.summary == "1 lesion covering less than 0.1% of the slice"


def test_the_most_probable_class_is_the_predicted_one() -> None:
    assert a_prediction(class_probabilities={"control": 0.2, "covid": 0.3, "other": 0.5}).predicted_class == "other"
    assert a_prediction(class_probabilities=None).predicted_class is None


def test_the_record_is_plain_json_that_keeps_float32_exactly() -> None:
    record = json.loads(json.dumps(a_prediction().to_dict(), allow_nan=False))
    assert record["image_size"] == [40, 50]
    assert record["source"] == "folder/slice.png"
    assert record["score_threshold"] == 0.3
    assert record["lesion_fraction"] == pytest.approx(0.06)
    assert record["predicted_class"] == "covid"
    assert record["class_probabilities"] == {"control": 0.02, "pneumonia": 0.07, "covid": 0.91}
    first, second = record["lesions"]
    assert (first["label"], first["class"], first["area_px"]) == (1, "lesion", 100)
    assert second["box"] == [20, 11, 30.25, 17]
    assert first["score"] == 0.91  # not 0.9100000262260437
    assert np.float32(first["score"]) == np.float32(0.91)


def test_the_record_accepts_numpy_scalars() -> None:
    record = a_prediction(
        image_size=(np.int64(40), np.int64(50)),
        class_probabilities={"control": np.float32(0.25), "covid": np.float32(0.75)},
        score_threshold=np.float32(0.5),
    ).to_dict()
    assert json.loads(json.dumps(record, allow_nan=False))["class_probabilities"]["covid"] == 0.75


def test_no_segmenter_and_no_lesion_are_told_apart() -> None:
    without, empty = nothing_found(has_segmentation=False).to_dict(), nothing_found().to_dict()
    assert (without["has_segmentation"], without["lesion_fraction"], without["lesions"]) == (False, None, [])
    assert (empty["has_segmentation"], empty["lesion_fraction"], empty["lesions"]) == (True, 0.0, [])


def test_save_writes_both_files_into_a_new_folder(tmp_path: Path) -> None:
    prediction = a_prediction()
    picture, record = prediction.save(tmp_path / "new" / "folder")
    assert record == tmp_path / "new" / "folder" / "slice.png.json"
    assert picture == tmp_path / "new" / "folder" / "slice.png.overlay.png"
    assert json.loads(record.read_text()) == prediction.to_dict()
    with Image.open(picture) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(prediction.plot()))
    assert sorted(path.name for path in record.parent.iterdir()) == [
        "slice.png.json",
        "slice.png.overlay.png",
    ]


def test_inputs_that_differ_in_suffix_only_do_not_collide(tmp_path: Path) -> None:
    for source in ("x.png", "x.jpg", "x.png"):  # the last replaces the first
        a_prediction(source=source).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "x.jpg.json",
        "x.jpg.overlay.png",
        "x.png.json",
        "x.png.overlay.png",
    ]


def test_a_name_can_be_given_and_is_not_needed(tmp_path: Path) -> None:
    assert a_prediction().save(tmp_path, "mine")[-1].name == "mine.json"
    assert a_prediction(source="").save(tmp_path)[-1].name == "prediction.json"
    with pytest.raises(InputError, match="is not a file name"):
        a_prediction().save(tmp_path, "../elsewhere")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(image: Image.Image, stream: Any, **options: Any) -> None:
        stream.write(b"half a picture")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match=r"slice\.png\.overlay\.png: cannot be written .*free some disk space"):
        a_prediction().save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_files_of_the_run_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = a_prediction().save(tmp_path)
    before = [path.read_bytes() for path in paths]

    def full(stream: Any, image: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match=r"slice\.png\.score_map\.npy: cannot be written"):
        nothing_found(score_map=np.zeros((40, 50), np.float32)).save(tmp_path)
    assert [path.read_bytes() for path in paths] == before
    assert sorted(tmp_path.iterdir()) == sorted(paths)


@pytest.mark.parametrize("below", [".", "deeper"])
def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path, below: str) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(InputError, match=r"taken.*a file is in the place of a folder"):
        a_prediction().save(taken / below)


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root, who runs many a test, may write anywhere
    with pytest.raises(InputError, match=r"closed.*: cannot be written .*choose a folder you may write to"):
        a_prediction().save(tmp_path / "closed")


def test_a_prediction_shows_itself_in_a_few_lines_and_as_a_picture() -> None:
    prediction = a_prediction(caveats=("classes are biased",))
    assert repr(prediction).splitlines() == [
        "Prediction of folder/slice.png, 50 x 40",
        "  2 lesions covering 6.0% of the slice; COVID-19 0.91",
        "  classes are biased",
    ]
    with Image.open(io.BytesIO(prediction._repr_png_())) as shown:
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(prediction.plot()))


def test_every_result_is_shown_in_a_few_lines() -> None:
    metrics = {"paper": {"ap50": 0.5123, "ap75": 0.4, "confusion": [[1]]}, "coco": {"mask_ap": None}}
    evaluation = Evaluation(
        "segmentation", "m", ("d",), 3, None, ("background", "lesion"), metrics, {}, {}, None, 1.0, [{"image_id": "a"}]
    )
    assert repr(evaluation).splitlines()[0] == "Evaluation of m on 3 slices"
    assert "ap50 0.512, ap75 0.400" in repr(evaluation)
    history = [{"epoch": epoch} for epoch in range(1000)]
    run = TrainResult("run", "run/best", "run/last", 7, {}, True, 1000, 9000, 0, 1.0, {}, history, "epoch 7 is best")
    assert "epoch 7 is best" in repr(run)
    exported = Exported(Path("m.onnx"), 10**7, {"boxes": 1e-3}, {"config": "{" + " " * 5000 + "}"})
    for result in (evaluation, run, exported):
        assert len(repr(result)) < 300
        assert len(repr(result).splitlines()) <= 4
