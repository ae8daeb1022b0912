"""The data report counts what is there and names everything that is wrong, all at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctmasknet.cli import main
from ctmasknet.data.check import check_dataset
from ctmasknet.errors import ConfigError, MissingExtraError


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def add_slice(root: Path, name: str, mask: np.ndarray, level: int = 100) -> None:
    save(root / "imgs" / f"{name}.png", np.full(mask.shape, level))
    save(root / "masks" / f"{name}.png", mask)


def blank() -> np.ndarray:
    return np.zeros((64, 64), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two lesions and a speck in one slice, one consolidation in another, none in the third."""
    first, second, third = blank(), blank(), np.zeros((64, 48), dtype=np.uint8)
    first[:, :5] = 1
    first[0:15, 10:30] = 2  # 300 px
    first[30:42, 30:50] = 2  # 240 px
    first[60:62, 60:62] = 2  # 4 px
    second[20:40, 20:40] = 3  # 400 px
    for index, (name, mask) in enumerate({"2_ann_1_1": first, "2_ann_1_2": second, "plain": third}.items()):
        add_slice(tmp_path / "train", name, mask, level=50 + index)
    return tmp_path / "train"


def test_a_sound_folder_is_counted(root: Path):
    report = check_dataset(root)
    assert report.ok
    assert (report.task, report.layout, report.slices) == ("segmentation", "CNCB folders", 3)
    assert report.image_sizes == {"64x64": 2, "48x64": 1}
    assert report.class_counts == {"lesion": 3}
    assert report.empty_slices == 1
    assert report.dropped_instances == 1
    assert report.mask_values == {0: 3 * 64 * 64 - 16 * 64 - 1264, 1: 320, 2: 544, 3: 400}
    assert (report.instance_areas["p0"], report.instance_areas["p50"], report.instance_areas["p100"]) == (
        240,
        300,
        400,
    )
    assert report.instances_per_slice["p100"] == 2
    assert (report.patients, report.slices_without_patient) == (1, 1)


def test_the_report_is_plain_json_and_a_table(root: Path):
    report = check_dataset(root)
    assert json.loads(json.dumps(report.to_dict()))["instance_areas"]["p50"] == 300
    table = report.table()
    lines = dict(line.split("  ", 1) for line in table.splitlines())
    assert lines["instance areas"].split(", ")[3] == "p50: 300"
    assert (lines["image sizes"].strip(), lines["slices without patient"].strip()) == ("64x64: 2, 48x64: 1", "1")
    assert table.splitlines()[-1].split() == ["problems", "0"]


def test_classes_and_min_area_are_those_of_training(root: Path):
    report = check_dataset(root, classes="both", min_area=300)
    assert report.class_counts == {"GGO": 0, "consolidation": 1}
    assert report.dropped_instances == 3
    assert any("no sample of class GGO" in problem for problem in report.problems)


def test_every_problem_is_reported_at_once(root: Path):
    save(root / "imgs" / "alone.png", blank())
    save(root / "masks" / "widow.png", blank())
    add_slice(root, "wild", np.full((64, 64), 9))
    add_slice(root, "skewed", blank())
    save(root / "masks" / "skewed.png", np.zeros((32, 32)))
    add_slice(root, "torn", blank())
    (root / "imgs" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    add_slice(root, "text", blank())
    (root / "masks" / "text.png").write_text("no mask")

    report = check_dataset(root)
    assert not report.ok
    for words in (
        f"{root / 'imgs' / 'alone.png'}: no mask",
        f"{root / 'masks' / 'widow.png'}: no image",
        f"{root / 'imgs' / 'skewed.png'}: the image is 64x64 pixels but mask",
        f"{root / 'imgs' / 'torn.png'}: not a readable PNG",
        f"{root / 'masks' / 'text.png'}: not a readable mask",
        f"{root / 'masks' / 'wild.png'}: unknown mask values 9; recode",
    ):
        assert sum(problem.startswith(words) for problem in report.problems) == 1, words
    assert len(report.problems) == 6
    assert all(str(root) in problem for problem in report.problems)
    assert report.slices == 7
    assert report.class_counts == {"lesion": 3}
    assert report.table().count("\n- ") == 6


def test_patients_and_images_in_both_splits_are_found(root: Path):
    other = root.parent / "val"
    add_slice(other, "2_ann_9_9", blank(), level=200)
    add_slice(other, "2_bob_1_1", blank(), level=50)  # the very image of 2_ann_1_1
    report = check_dataset(root, against=other)
    assert report.shared_patients == ["ann"]
    assert report.shared_images == [str(root / "imgs" / "2_ann_1_1.png")]
    assert "patient ann is in both splits; keep each patient in one" in report.problems
    assert len(report.problems) == 2


def test_two_lists_over_one_folder_are_two_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lesion = np.pad(np.full((20, 20), 2), 22)
    for number, name in enumerate(("110_104", "110_99", "7_1", "8_1")):
        add_slice(tmp_path / "data", name, lesion, level=50 + number)
    (tmp_path / "train.txt").write_text("110_104.jpg\n7_1.jpg\n")
    (tmp_path / "val.txt").write_text("110_99.jpg\n8_1.jpg\n")
    data, train, val = tmp_path / "data", tmp_path / "train.txt", tmp_path / "val.txt"
    report = check_dataset(data, names=train, against=data, against_names=val)
    assert report.shared_patients == ["110"]
    assert report.problems == ["patient 110 is in both splits; keep each patient in one"]
    assert check_dataset(data, names=["7_1"], against=data, against_names=["8_1"]).ok
    arguments = ["--names", str(train), "--against", str(data), "--against-names", str(val)]
    assert main(["data", "check", str(data), *arguments]) == 2
    assert "patient 110 is in both splits" in capsys.readouterr().out


def test_patients_of_one_folder_name_in_two_classes_are_two(tmp_path: Path):
    for number, folder in enumerate(("train/control/p1", "train/covid/p1", "val/pneumonia/p1", "val/covid/p1")):
        save(tmp_path / folder / "1.png", blank() + number)
    report = check_dataset(tmp_path / "train", against=tmp_path / "val")
    assert report.patients == 2
    assert report.shared_patients == ["covid/p1"]


@pytest.mark.parametrize(("lesion", "suffix", "words"), [(2, "png", "scipy.*[train]"), (0, "dcm", "pydicom.*[io]")])
def test_a_core_install_is_told_the_extra_only_where_one_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lesion: int, suffix: str, words: str
):
    for module in ("scipy", "scipy.ndimage", "pydicom", "pycocotools", "pycocotools.mask"):
        monkeypatch.setitem(sys.modules, module, None)
    add_slice(tmp_path, "a", blank())
    assert check_dataset(tmp_path).slices == 1
    assert check_dataset(tmp_path / "imgs", task="classification").slices == 0
    add_slice(tmp_path, "b", blank() + lesion)
    if suffix == "dcm":
        (tmp_path / "imgs" / "b.png").unlink()
        (tmp_path / "imgs" / "b.dcm").write_bytes(bytes(128) + b"DICM\x02\x00")
    with pytest.raises(MissingExtraError, match=words.replace("[", r"\[").replace("]", r"\]")):
        check_dataset(tmp_path)


def test_slices_without_lesions_only_are_flagged(tmp_path: Path):
    add_slice(tmp_path, "a", blank())
    report = check_dataset(tmp_path)
    assert report.empty_slices == report.slices == 1
    assert "no sample of class lesion; add some, or lower min_area" in report.problems[0]


@pytest.mark.parametrize("task", [None, "segmentation", "classification"])
def test_an_empty_folder_is_a_report_not_a_crash(tmp_path: Path, task: str | None):
    report = check_dataset(tmp_path, task=task)
    assert report.slices == 0
    assert report.problems == [f"{tmp_path}: the folder is empty"]


def test_a_missing_folder_is_a_report_not_a_crash(tmp_path: Path):
    assert check_dataset(tmp_path / "nowhere").problems == [f"{tmp_path / 'nowhere'}: there is no such file or folder"]


def test_classification_is_recognised_and_counted(tmp_path: Path):
    for name in ("0_a_1_1", "0_a_1_2", "2_b_1_1"):
        save(tmp_path / f"{name}.png", blank())
    (tmp_path / "2_c_1_1.png").write_text("no image")
    report = check_dataset(tmp_path)
    assert (report.task, report.slices, report.patients) == ("classification", 4, 3)
    assert report.class_counts == {"control": 2, "pneumonia": 0, "covid": 1}
    assert any(problem.startswith(f"{tmp_path / '2_c_1_1.png'}: not a readable") for problem in report.problems)
    assert any("no sample of class pneumonia" in problem for problem in report.problems)
    assert "empty slices" not in report.table()


def test_coco_annotations_are_checked(tmp_path: Path):
    save(tmp_path / "images" / "a.png", blank())
    polygons = (
        [[10, 10, 40, 10, 40, 30, 10, 30]],
        [[0, 0, 5, 0, 5, 5, 0, 5]],
        [[5, 5, 5, 9, 5, 5]],
        [[1, 1]],
    )
    boxes = ([10, 10, 30, 20], [0, 0, 5, 5], [5, 5, 0, 4], [1, 1, 1, 1])
    annotations = [
        {"id": i, "image_id": 1 + (i == 3), "category_id": 1, "segmentation": polygon, "bbox": box}
        for i, (polygon, box) in enumerate(zip(polygons, boxes, strict=True))
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 64, "width": 64}],
        "categories": [{"id": 1, "name": "lesion"}],
        "annotations": annotations,
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    report = check_dataset(tmp_path / "instances.json")
    assert report.task == "segmentation"
    assert report.class_counts == {"lesion": 1}
    assert report.instance_areas["p50"] == 600
    assert report.dropped_instances == 1
    assert len(report.problems) == 1
    assert "annotation 3: is of image 2 and category 1" in report.problems[0]


def test_an_unknown_task_raises(tmp_path: Path):
    with pytest.raises(ConfigError, match="task='detection'"):
        check_dataset(tmp_path, task="detection")
