"""Labelled slices in every layout, on phantoms and files made by hand, and what is said of bad ones."""

from __future__ import annotations

import csv
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from phantom import phantom
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.ops import masks_to_boxes

from ctmasknet.data.datasets import (
    CachedDataset,
    SliceDataset,
    open_dataset,
    require_trainable,
)
from ctmasknet.data.layouts import class_folder_names, instances, patient_of, read_class_mask
from ctmasknet.errors import ConfigError, CTMaskNetError, DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"
SIZE = 256


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def grey(level: int = 100, shape: tuple[int, int] = (64, 64)) -> np.ndarray:
    return np.full(shape, level, dtype=np.uint8)


def labels(dataset: SliceDataset) -> list[int]:
    return [label for index in range(len(dataset)) for label in dataset.labels_of(index)]


def lesion_root(root: Path, **masks: np.ndarray) -> Path:
    """A CNCB folder with these masks and flat images."""
    for name, mask in masks.items():
        save(root / "imgs" / f"{name}.png", grey(shape=mask.shape))
        save(root / "masks" / f"{name}.png", mask)
    return root


def square(value: int = 2, side: int = 20) -> np.ndarray:
    mask = grey(0)
    mask[10 : 10 + side, 30 : 30 + side] = value
    return mask


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    """Three phantom slices, the last without lesions."""
    root = tmp_path_factory.mktemp("phantoms")
    for seed, lesions in enumerate((4, 2, 0)):
        truth = phantom(seed, lesions=lesions, size=SIZE)
        save(root / "imgs" / f"p{seed}.png", truth.image)
        save(root / "masks" / f"p{seed}.png", truth.class_mask())
    return root


# --- CNCB folders -------------------------------------------------------------------------------------------


def test_a_lesion_folder_gives_back_the_phantoms(phantoms: Path):
    dataset = open_dataset("segmentation", phantoms, classes="both")
    assert dataset.names == ["p0", "p1", "p2"]
    assert dataset.class_names == ("background", "GGO", "consolidation")
    for seed, lesions in enumerate((4, 2, 0)):
        truth, (image, target, name) = phantom(seed, lesions=lesions, size=SIZE), dataset[seed]
        assert name == f"p{seed}"
        assert image.dtype == torch.uint8
        assert np.array_equal(image[0].numpy(), truth.image)
        assert sorted(target["labels"].tolist()) == sorted(truth.labels.tolist())
        assert np.array_equal(target["masks"].numpy().any(0), truth.masks.any(0))
        assert sorted(target["boxes"].tolist()) == sorted(truth.boxes.tolist())


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "tif", "PNG"])
def test_images_may_have_any_usual_format(tmp_path: Path, suffix: str):
    lesion_root(tmp_path, a=square())
    (tmp_path / "imgs" / "a.png").unlink()
    save(tmp_path / "imgs" / f"a.{suffix}", grey(100))
    image = open_dataset("segmentation", tmp_path)[0].image
    assert image.shape == (1, 64, 64)
    assert (image.int() - 100).abs().max() <= 2


def test_palette_masks_are_read_by_index(tmp_path: Path):
    lesion_root(tmp_path, a=square(3))
    palette = Image.fromarray(square(3)).convert("P")
    palette.putdata(square(3).ravel().tolist())
    palette.putpalette([0, 0, 0, 90, 90, 90, 0, 255, 0, 255, 0, 0])
    palette.save(tmp_path / "masks" / "a.png")
    assert open_dataset("segmentation", tmp_path, classes="both")[0].target["labels"].tolist() == [2]


def test_several_roots_are_joined_and_equal_names_told_apart(tmp_path: Path):
    roots = [
        lesion_root(tmp_path / "one", a=square(), b=square()),
        lesion_root(tmp_path / "two", a=square(1)),
    ]
    dataset = open_dataset("segmentation", roots)
    assert len(dataset) == len(set(dataset.names)) == 3
    assert dataset.names[1] == "b"
    assert dataset.names[2] == (tmp_path / "two/imgs/a.png").as_posix()
    assert [len(sample.target["labels"]) for sample in dataset] == [1, 1, 0]


def test_the_same_root_twice_is_refused(tmp_path: Path):
    lesion_root(tmp_path, a=square())
    with pytest.raises(DataError, match=r"a\.png: this file is in the data 2 times; pass every folder once"):
        open_dataset("segmentation", [tmp_path, tmp_path / "imgs" / ".."])


def test_a_list_restricts_to_its_names_and_excuses_the_rest(tmp_path: Path):
    root = lesion_root(tmp_path / "data", a=square(), b=square(), c=square())
    (root / "masks" / "c.png").unlink()
    names = tmp_path / "train.txt"
    names.write_text("# split of the paper\nimgs/b.png\n\na\n")
    assert open_dataset("segmentation", root, names=names).names == ["a", "b"]
    assert open_dataset("segmentation", root, names=str(names)).names == ["a", "b"]
    assert open_dataset("segmentation", root, names=["imgs/b.png", Path("a")]).names == ["a", "b"]
    with pytest.raises(DataError, match=r"names: gone is listed but not in .*data; correct the list"):
        open_dataset("segmentation", root, names=["a", "gone"])


def test_listed_names_that_are_missing_are_named(tmp_path: Path):
    root = lesion_root(tmp_path / "data", a=square())
    names = tmp_path / "train.txt"
    names.write_text("a\ngone.png\n")
    with pytest.raises(DataError, match=r"train\.txt: gone is listed but not in .*data; correct the list or add"):
        open_dataset("segmentation", root, names=names)


def test_a_missing_list_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere\.txt.*no such file"):
        open_dataset("segmentation", lesion_root(tmp_path, a=square()), names=tmp_path / "nowhere.txt")


def test_one_slice_is_enough(tmp_path: Path):
    dataset = open_dataset("segmentation", lesion_root(tmp_path, a=square()))
    assert len(dataset) == 1
    assert dataset[0].target["boxes"].tolist() == [[30, 10, 50, 30]]
    require_trainable(dataset)


def test_patients_come_from_cncb_names_and_from_index_csv(tmp_path: Path):
    root = lesion_root(tmp_path / "val", **{"2_77_1_0040": square(), "x1": square(), "x2": square(), "x3": square()})
    with (tmp_path / "index.csv").open("w", newline="") as file:
        rows = [("train", "x1", "wrong"), ("val", "x1", "ann"), ("val", "x2", "unknown")]
        csv.writer(file).writerows([("split", "name", "patient"), *rows])
    dataset = open_dataset("segmentation", root)
    assert dict(zip(dataset.names, dataset.patients, strict=True)) == {
        "2_77_1_0040": "77",
        "x1": "ann",
        "x2": None,
        "x3": None,
    }


def test_patients_come_from_the_names_of_the_released_lists(tmp_path: Path):
    root = lesion_root(tmp_path / "data", **{"110_104": square(), "110_99": square(), "7_1": square(), "a_1": square()})
    names = tmp_path / "train.txt"
    names.write_text("110_104.jpg\n110_99.jpg\n7_1.jpg\na_1.jpg\n")
    dataset = open_dataset("segmentation", root, names=names)
    assert dict(zip(dataset.names, dataset.patients, strict=True)) == {
        "110_104": "110",
        "110_99": "110",
        "7_1": "7",
        "a_1": None,
    }
    (root / "index.csv").write_text("name,patient\n7_1,seven\n")  # who writes one knows better
    assert open_dataset("segmentation", root, names=["7_1"]).patients == ["seven"]


def test_a_name_that_is_no_unicode_is_a_name(tmp_path: Path):
    root, raw = lesion_root(tmp_path / "data", a=square(), b=square()), b"n\xff\xfe"
    try:
        for folder in ("imgs", "masks"):
            (root / folder / "b.png").rename(root / folder / os.fsdecode(raw + b".png"))
    except OSError:
        pytest.skip("the file system takes Unicode only")
    (tmp_path / "names.txt").write_bytes(b"a.png\n" + raw + b".png\n")
    dataset = open_dataset("segmentation", root, names=tmp_path / "names.txt")
    assert sorted(map(os.fsencode, dataset.names)) == [b"a", raw]
    assert [len(sample.target["labels"]) for sample in dataset] == [1, 1]


def test_samples_survive_pickling_and_worker_processes(phantoms: Path):
    dataset = pickle.loads(pickle.dumps(open_dataset("segmentation", phantoms)))
    loader = DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=list)
    assert [sample.name for batch in loader for sample in batch] == dataset.names


def break_image(root: Path) -> None:
    (root / "imgs" / "a.png").unlink()


def break_mask(root: Path) -> None:
    (root / "masks" / "a.png").unlink()


def two_images(root: Path) -> None:
    save(root / "imgs" / "a.jpg", grey())


def no_files(root: Path) -> None:
    for path in root.rglob("*.png"):
        path.unlink()


def no_folders(root: Path) -> None:
    no_files(root)
    (root / "imgs").rmdir()
    (root / "masks").rmdir()


def no_masks_folder(root: Path) -> None:
    (root / "masks").rename(root / "labels")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_mask, r"imgs/a\.png: no mask masks/a\.png; add it .* or remove the image"),
        (break_image, r"masks/a\.png: no image imgs/a\.\*; add it or remove the mask"),
        (two_images, r"imgs/a\.png: same name as a\.jpg in the same folder; keep one"),
        (no_files, r"root: no images in imgs/"),
        (no_folders, r"root: the folder is empty"),
        (no_masks_folder, r"root: no CNCB folders \(imgs/ and masks/\) and no COCO"),
    ],
)
def test_incomplete_folders_are_refused_with_the_file_and_the_fix(
    tmp_path: Path, damage: Callable[[Path], None], message: str
):
    root = lesion_root(tmp_path / "root", a=square(), b=square())
    damage(root)
    with pytest.raises(DataError, match=message):
        open_dataset("segmentation", root)


def test_the_error_counts_the_other_problems(tmp_path: Path):
    root = lesion_root(tmp_path, a=square(), b=square())
    (root / "masks" / "a.png").unlink()
    (root / "imgs" / "b.png").unlink()
    with pytest.raises(DataError, match=r"and 1 more problems: `ctmasknet data check` lists them"):
        open_dataset("segmentation", root)


def test_a_folder_of_splits_says_which_to_pass(tmp_path: Path):
    lesion_root(tmp_path / "train", a=square())
    with pytest.raises(DataError, match=r"holds several splits; pass one of them, such as .*train"):
        open_dataset("segmentation", tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere: there is no such file or folder"):
        open_dataset("segmentation", tmp_path / "nowhere")


def test_sizes_that_differ_name_both_files(tmp_path: Path):
    root = lesion_root(tmp_path, a=square())
    save(root / "masks" / "a.png", grey(0, (64, 60)))
    with pytest.raises(DataError, match=r"imgs/a\.png: the image is 64x64 pixels but mask .*masks/a\.png is 60x64"):
        open_dataset("segmentation", root)[0]


def test_unknown_mask_values_name_the_mask(tmp_path: Path):
    dataset = open_dataset("segmentation", lesion_root(tmp_path, a=square(255)))
    with pytest.raises(DataError, match=r"masks/a\.png: unknown mask values 255; recode"):
        dataset[0]


def test_coloured_and_corrupt_masks_name_the_mask(tmp_path: Path):
    root = lesion_root(tmp_path, a=square(), b=square())
    save(root / "masks" / "a.png", np.dstack([square(), grey(0), grey(0)]))
    (root / "masks" / "b.png").write_bytes(b"not a PNG")
    dataset = open_dataset("segmentation", root)
    with pytest.raises(DataError, match=r"masks/a\.png: the mask is coloured"):
        dataset[0]
    with pytest.raises(DataError, match=r"masks/b\.png: not a readable mask"):
        dataset[1]


def test_masks_of_one_bit_are_not_taken_for_lung(tmp_path: Path):
    root = lesion_root(tmp_path, a=square())
    Image.fromarray(square(255)).convert("1").save(root / "masks" / "a.png")
    with pytest.raises(DataError, match=r"masks/a\.png: a mask of 1 bit has no class codes; save it with 8 bits"):
        open_dataset("segmentation", root)[0]


def test_a_corrupt_image_names_the_image(tmp_path: Path):
    root = lesion_root(tmp_path, a=square())
    (root / "imgs" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(CTMaskNetError, match=r"imgs/a\.png"):
        open_dataset("segmentation", root)[0]


def test_slices_without_lesions_open_but_cannot_be_trained_on(tmp_path: Path):
    dataset = open_dataset("segmentation", lesion_root(tmp_path, a=square(1), b=square(2, side=10)))
    assert [sample.target["boxes"].shape for sample in dataset] == [(0, 4), (0, 4)]
    with pytest.raises(DataError, match=r"no sample of class lesion; add some, or lower min_area"):
        require_trainable(dataset)


def test_a_lesion_class_without_a_sample_is_named(tmp_path: Path):
    dataset = open_dataset("segmentation", lesion_root(tmp_path, a=square(2)), classes="both")
    with pytest.raises(DataError, match=r"no sample of class consolidation; .*classes='merge'"):
        require_trainable(dataset)


@pytest.mark.parametrize("wrong", [{"task": "detection"}, {"classes": "all"}, {"min_area": -5}])
def test_impossible_options_raise(tmp_path: Path, wrong: dict):
    with pytest.raises(ConfigError):
        open_dataset(**{"task": "segmentation", "data": tmp_path, **wrong})


# --- COCO ---------------------------------------------------------------------------------------------------


def coco(root: Path, annotations: list[dict], **changes: object) -> Path:
    """One 64x64 image, categories 7 and 3, and these annotations."""
    save(root / "images" / "a.png", grey())
    content = {
        "images": [{"id": 5, "file_name": "a.png", "height": 64, "width": 64}],
        "categories": [{"id": 7, "name": "consolidation"}, {"id": 3, "name": "GGO"}],
        "annotations": [{"id": i, "image_id": 5, "category_id": 3, **a} for i, a in enumerate(annotations)],
        **changes,
    }
    path = root / "instances.json"
    path.write_text(json.dumps(content))
    return path


def rectangle(x1: int, y1: int, x2: int, y2: int) -> list[float]:
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def counts(mask: np.ndarray) -> list[int]:
    """Uncompressed RLE: lengths of runs down the columns, zeros first."""
    flat = np.concatenate([[0], mask.T.ravel(), [2]])
    edges = np.flatnonzero(np.diff(flat.astype(int)) != 0)
    runs = np.diff(np.concatenate([[0], edges])).tolist()
    return runs


def test_coco_polygons_and_rle_become_masks(tmp_path: Path):
    mask = square(1)
    path = coco(
        tmp_path,
        [
            {"segmentation": [rectangle(30, 10, 50, 30)], "category_id": 7, "bbox": [30, 10, 20, 20]},
            {"segmentation": {"size": [64, 64], "counts": counts(mask)}, "bbox": [0, 0, 1, 1]},
            {"segmentation": [rectangle(0, 0, 12, 12), rectangle(40, 40, 52, 52)]},
            {"segmentation": [rectangle(0, 0, 40, 40)], "iscrowd": 1},
        ],
    )
    dataset = open_dataset("segmentation", path)
    assert dataset.class_names == ("background", "GGO", "consolidation")
    target = dataset[0].target
    assert target["labels"].tolist() == [2, 1, 1]
    assert target["boxes"].tolist() == [[30, 10, 50, 30], [30, 10, 50, 30], [0, 0, 52, 52]]
    assert np.array_equal(target["masks"][0].numpy(), mask)
    assert np.array_equal(target["masks"][1].numpy(), mask)
    assert int(target["masks"][2].sum()) == 288
    for opened in (open_dataset("segmentation", path), open_dataset("segmentation", tmp_path)):
        assert torch.equal(opened[0].target["masks"], target["masks"])


def test_coco_compressed_rle_is_pycocotools(tmp_path: Path):
    reference = pytest.importorskip("pycocotools.mask")
    truth = phantom(0, lesions=3, size=SIZE)
    annotations = []
    for mask in truth.masks:
        rle = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
        annotations.append({"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}})
    images = [{"id": 5, "file_name": "a.png", "height": SIZE, "width": SIZE}]
    path = coco(tmp_path, annotations, images=images)
    save(tmp_path / "images" / "a.png", truth.image)
    sample = open_dataset("segmentation", path)[0]
    assert np.array_equal(sample.target["masks"].numpy().astype(bool), truth.masks)
    assert np.array_equal(sample.target["boxes"].numpy(), truth.boxes)


def test_coco_small_annotations_and_images_without_any_are_kept_in_mind(tmp_path: Path):
    path = coco(tmp_path, [{"segmentation": [rectangle(0, 0, 10, 10)]}])
    assert open_dataset("segmentation", path)[0].target["masks"].shape == (0, 64, 64)
    assert len(open_dataset("segmentation", path, min_area=99)[0].target["labels"]) == 1


def test_coco_annotations_without_width_are_too_small(tmp_path: Path):
    good = {"segmentation": [rectangle(30, 10, 50, 30)], "bbox": [30, 10, 20, 20]}
    flat = {"segmentation": [rectangle(5, 5, 5, 30)], "bbox": [5, 5, 0, 25]}
    path = coco(tmp_path, [good, flat])
    for min_area in (0, 100):
        target = open_dataset("segmentation", path, min_area=min_area)[0].target
        assert target["boxes"].tolist() == [[30, 10, 50, 30]]


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"segmentation": [rectangle(0, 0, 20, 20)], "image_id": 6}, "annotation 0: is of image 6 and category 3"),
        ({"segmentation": [rectangle(0, 0, 20, 20)], "category_id": 1}, "annotation 0: is of image 5 and category 1"),
        ({"bbox": [0, 0, 20, 20]}, r"annotation 0: not a readable mask \(it has no segmentation"),
        ({"segmentation": [[0, 0, 9, 9]]}, r"annotation 0: not a readable mask \(a polygon needs"),
        (
            {"segmentation": {"size": [60, 64], "counts": [3840]}},
            r"annotation 0: not a readable mask \(its RLE is for size",
        ),
        (
            {"segmentation": {"size": [64, 64], "counts": [5]}},
            r"annotation 0: not a readable mask \(its RLE covers 5 of",
        ),
        ({"segmentation": {"size": [64, 64], "counts": "zzz"}}, "annotation 0: not a readable mask"),
        ({"segmentation": [["a"] * 6]}, "annotation 0: not a readable mask"),
    ],
)
def test_coco_annotations_that_make_no_sense_are_named(tmp_path: Path, annotation: dict, message: str):
    path = coco(tmp_path, [annotation])
    with pytest.raises(DataError, match=f"instances.json: {message}"):
        open_dataset("segmentation", path)[0]


def test_coco_files_that_are_none_are_refused(tmp_path: Path):
    path = coco(tmp_path, [])
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(DataError, match=r"image a\.png is not in .*; put the images there"):
        open_dataset("segmentation", path)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"instances\.json: not a readable COCO file \('categories' is missing\)"):
        open_dataset("segmentation", path)
    path.write_text("nonsense")
    with pytest.raises(DataError, match="not a readable COCO file"):
        open_dataset("segmentation", path)


def test_coco_sizes_that_differ_are_named(tmp_path: Path):
    path = coco(tmp_path, [])
    save(tmp_path / "images" / "a.png", grey(shape=(64, 60)))
    with pytest.raises(DataError, match=r"a\.png: the image is 60x64 pixels but its entry in .*json is 64x64"):
        open_dataset("segmentation", path)[0]


# --- classification -----------------------------------------------------------------------------------------


def test_classes_and_patients_come_from_cncb_names(tmp_path: Path):
    for level, name in enumerate(("0_n1_1_0001.png", "1_c1_1_0001.jpg", "NCP_p1_2_0003.png", "2_p1_2_0004.png")):
        save(tmp_path / name, grey(10 * level))
    dataset = open_dataset("classification", tmp_path)
    assert dataset.class_names == ("control", "pneumonia", "covid")
    assert labels(dataset) == [0, 1, 2, 2]
    assert dataset.patients == ["n1", "c1", "p1", "p1"]
    image, label, name = dataset[2]
    assert (image.shape, image.dtype, label, name) == ((1, 64, 64), torch.uint8, 2, "2_p1_2_0004")
    assert image.unique().tolist() == [30]


def test_a_name_without_a_class_is_refused(tmp_path: Path):
    save(tmp_path / "0_n1_1_0001.png", grey())
    save(tmp_path / "scan7.png", grey())
    with pytest.raises(DataError, match=r"scan7\.png: the name does not tell the class; name it \[Class\]"):
        open_dataset("classification", tmp_path)


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("2_P002_1_0040.jpg", "P002"),
        ("NCP_96_1328_0035.png", "96"),
        ("coronacases_01_080", None),
        ("x_1_2_3", None),
    ],
)
def test_patient_of(name: str, patient: str | None):
    assert patient_of(name) == patient


def covidx(folder: Path) -> Path:
    save(folder / "CP_1_2_0001.png", grey())
    save(folder / "a volume 7.png", grey())
    save(folder / "unlisted.png", grey())
    path = folder / "train.txt"
    path.write_text("CP_1_2_0001.png 1 9 94 512 405\na volume 7.png 2 0 0 64 64\n")
    return path


@pytest.mark.parametrize("images", [".", "images"])
def test_covidx_lists_bring_names_and_classes(tmp_path: Path, images: str):
    path = covidx(tmp_path / images)
    dataset = open_dataset("classification", path.rename(tmp_path / "train.txt"))
    assert dataset.names == ["CP_1_2_0001", "a volume 7"]
    assert labels(dataset) == [1, 2]
    assert dataset.patients == ["1", None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gone.png 0 1 2 3 4", r"entry 3: gone\.png is not in"),
        ("unlisted.png 3 1 2 3 4", r"entry 3: unlisted\.png has no class 0, 1 or 2"),
        ("unlisted.png", r"entry 3: unlisted\.png has no class"),
        ("CP_1_2_0001.png 1 9 94 512 405", r"entry 3: CP_1_2_0001\.png is listed twice"),
    ],
)
def test_covidx_entries_that_make_no_sense_are_named(tmp_path: Path, line: str, message: str):
    path = covidx(tmp_path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        open_dataset("classification", path)


def test_class_folders_known_by_word_keep_the_papers_numbers(tmp_path: Path):
    for folder in ("COVID-19", "CAP", "Normal"):
        save(tmp_path / folder / "patient1" / "s1.png", grey())
    dataset = open_dataset("classification", tmp_path)
    assert dataset.class_names == ("control", "pneumonia", "covid")
    assert {Path(name).parts[-3]: label for name, label in zip(dataset.names, labels(dataset), strict=True)} == {
        "COVID-19": 2,
        "CAP": 1,
        "Normal": 0,
    }
    assert dataset.patients == ["CAP/patient1", "COVID-19/patient1", "Normal/patient1"]


@pytest.mark.parametrize(
    ("folders", "numbers", "names"),
    [
        (["0", "2"], {"0": 0, "2": 2}, ("control", "pneumonia", "covid")),
        (["0", "1", "3"], {"0": 0, "1": 1, "3": 3}, ("0", "1", "2", "3")),
        (["mild", "none", "severe"], {"mild": 0, "none": 1, "severe": 2}, ("mild", "none", "severe")),
        (["fibrosis", "normal"], {"normal": 0, "fibrosis": 1}, ("normal", "fibrosis")),
    ],
)
def test_class_folders_are_numbered(folders: list[str], numbers: dict[str, int], names: tuple[str, ...]):
    assert class_folder_names(folders) == (numbers, names)


def test_a_class_missing_from_the_data_is_named(tmp_path: Path):
    save(tmp_path / "covid" / "a.png", grey())
    save(tmp_path / "control" / "b.png", grey())
    dataset = open_dataset("classification", tmp_path)
    with pytest.raises(DataError, match=r"train: no sample of class pneumonia; add some, or give class folders"):
        require_trainable(dataset, source="train")


def test_class_folders_of_several_roots_are_numbered_together(tmp_path: Path):
    save(tmp_path / "one" / "a" / "1.png", grey())
    save(tmp_path / "two" / "b" / "2.png", grey())
    dataset = open_dataset("classification", [tmp_path / "one", tmp_path / "two"])
    assert dataset.class_names == ("a", "b")
    assert labels(dataset) == [0, 1]


def test_a_list_of_names_restricts_classification_too(tmp_path: Path):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        save(tmp_path / "data" / name, grey())
    (tmp_path / "names.txt").write_text("2\n3.png\n")
    assert open_dataset("classification", tmp_path / "data", names=tmp_path / "names.txt").names == [
        "2",
        "3",
    ]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([], r"data: the folder is empty"),
        (["imgs/a.png", "masks/a.png"], r"data: holds lesion masks, which train a segmentation variant"),
        (["train/0/a.png", "val/0/b.png"], r"data: holds several splits; pass one of them, such as .*train"),
        (["notes.csv"], r"data: no images in it; give images named \[Class\]"),
    ],
)
def test_folders_without_classes_are_refused(tmp_path: Path, layout: list[str], message: str):
    (tmp_path / "data").mkdir()
    for name in layout:
        if name.endswith(".csv"):
            (tmp_path / "data" / name).write_text("x")
        else:
            save(tmp_path / "data" / name, grey())
    with pytest.raises(DataError, match=message):
        open_dataset("classification", tmp_path / "data")


# --- cache --------------------------------------------------------------------------------------------------


def test_the_cache_gives_what_the_files_gave(phantoms: Path, monkeypatch):
    plain, kept = (
        open_dataset("segmentation", phantoms, classes="both"),
        CachedDataset(open_dataset("segmentation", phantoms, classes="both")).fill(),
    )
    monkeypatch.setattr("ctmasknet.data.datasets.read_image", lambda path: pytest.fail("read again"))
    hits = [kept[index] for index in range(3)]
    monkeypatch.undo()
    for hit, fresh in zip(hits, plain, strict=True):
        assert hit.name == fresh.name
        assert torch.equal(hit.image, fresh.image)
        assert all(torch.equal(hit.target[key], fresh.target[key]) for key in fresh.target)
        assert all(hit.target[key].dtype == fresh.target[key].dtype for key in fresh.target)
    assert kept.class_names == plain.class_names
    assert 3 * SIZE**2 <= kept.nbytes < 6 * SIZE**2  # a bit for each pixel of a mask


def test_changing_a_sample_does_not_change_the_cache(phantoms: Path):
    kept = CachedDataset(open_dataset("segmentation", phantoms))
    for _ in range(2):  # the first reading and a hit
        sample = kept[0]
        sample.image.zero_()
        sample.target["boxes"].zero_()
    assert kept[0].image.max() > 0
    assert kept[0].target["boxes"].max() > 0


def test_the_cache_keeps_to_its_limit(phantoms: Path):
    kept = CachedDataset(open_dataset("segmentation", phantoms), limit=int(1.9 * SIZE**2)).fill()
    assert SIZE**2 <= kept.nbytes <= 1.9 * SIZE**2
    assert [sample.name for sample in kept] == ["p0", "p1", "p2"]


def test_the_cache_serves_classification(tmp_path: Path):
    save(tmp_path / "0_a_1_1.png", grey(7))
    kept = CachedDataset(open_dataset("classification", tmp_path))
    for _ in range(2):
        assert kept[0].label == 0
        assert kept[0].image.unique().tolist() == [7]
    assert labels(kept) == [0]


# --- real slices --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "lesions").is_dir(), reason="needs the real slices")
def test_real_slices_open_and_agree_with_their_index():
    with (SHARED / "lesions" / "index.csv").open(newline="") as file:
        rows = {(row["split"], row["name"]): row for row in csv.DictReader(file)}
    without = {}
    for split, count in (("train", 636), ("val", 73)):
        dataset = open_dataset("segmentation", SHARED / "lesions" / split)
        assert len(dataset) == count
        positive = 0
        for record, patient in zip(dataset.records, dataset.patients, strict=True):
            row, pixels = rows[split, record.name], read_class_mask(record.mask)
            assert int((pixels >= 2).sum()) == int(row["ggo_or_lesion_px"]) + int(row["consolidation_px"])
            assert patient == (None if row["patient"] == "unknown" else row["patient"])
            positive += bool((pixels >= 2).any())
            target = instances(pixels)
            if len(target["masks"]):
                expected = masks_to_boxes(target["masks"])
                expected[:, 2:] += 1
                assert torch.equal(target["boxes"], expected)
        without[split] = count - positive
    assert without == {"train": 87, "val": 3}


@pytest.mark.skipif(not (SHARED / "lesions").is_dir(), reason="needs the real slices")
def test_real_validation_slices_match_their_masks():
    for image, target, _ in open_dataset("segmentation", SHARED / "lesions" / "val"):
        assert image.shape[1:] == target["masks"].shape[1:]
        assert (target["masks"].flatten(1).sum(dim=1) > 100).all()


@pytest.mark.skipif(not (SHARED / "classes").is_dir(), reason="needs the real slices")
def test_real_classes_are_read_from_their_names():
    dataset = open_dataset("classification", SHARED / "classes" / "val")
    assert [labels(dataset).count(label) for label in range(3)] == [42, 8, 34]
    assert set(dataset.patients) == {"normal002", "cap002", "P002"}
