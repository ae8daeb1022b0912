"""`evaluate`: figures against independent references, resumption, processes, other people's predictions, bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_data import class_folder, lesion_folder
from phantom import phantom
from PIL import Image

from ctmasknet import ConfigError, DataError, MissingExtraError, Predictor, create_model, evaluate
from ctmasknet.cli import main
from ctmasknet.data.datasets import (
    ClassificationSample,
    LabelledSlices,
    SegmentationSample,
    SliceDataset,
    open_dataset,
)
from ctmasknet.data.layouts import list_slices
from ctmasknet.evaluation.metrics import SegmentationMetrics, operating_points, patient_intervals, segmentation_rows
from ctmasknet.evaluation.rows import search_rows
from ctmasknet.models import Model
from ctmasknet.models.inference import Inference
from ctmasknet.output import OutputError
from ctmasknet.registry import DEFAULT_CLASSIFIER, DEFAULT_SEGMENTER
from ctmasknet.results import run_length_encode

QUICK: dict[str, Any] = {"min_size": 128, "rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 30}


def segmenter(**options: Any) -> Model:
    """Bundled weights on small images, where they find next to nothing."""
    return create_model(DEFAULT_SEGMENTER, weights="default", **(QUICK | options))


def seeing_segmenter(**options: Any) -> Model:
    """On images large enough to find some lesions and miss others."""
    return segmenter(min_size=384, **options)


def classifier(**options: Any) -> Model:
    return create_model(DEFAULT_CLASSIFIER, weights="default", **(QUICK | options))


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lesion_folder(tmp_path_factory.mktemp("data") / "lesions", range(6))


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "classes"
    class_folder(root, patient=1)
    for path in sorted(root.iterdir()):  # class_folder takes a folder that does not exist: one patient per class
        image_class, _, scan, number = path.name.split("_")
        path.rename(root / f"{image_class}_p{image_class}{number[0]}_{scan}_{number}")
    return root


def input_of(image: torch.Tensor) -> torch.Tensor:
    return (image.float() / 255).expand(3, -1, -1)


def figures_of(model: Model, data: Any) -> dict[str, Any]:
    """The figures of what a model's own forward finds."""
    rows = []
    for image, target, _ in data:
        with torch.inference_mode():
            found = model([input_of(image)])[0]
        rows += segmentation_rows(target, found | {"masks": found["masks"][:, 0] > 0.5})
    return SegmentationMetrics(rows).compute()


# --- score maps ---------------------------------------------------------------------------------------------


def test_one_pass_gives_every_candidate_the_figures_of_a_run_at_it(lesions: Path) -> None:
    data = list(open_dataset("segmentation", lesions, min_area=5))
    table = operating_points(search_rows(Inference(seeing_segmenter()), data))
    for point in table[:: len(table) // 4]:
        model = seeing_segmenter(box_score_thresh=point["score_threshold"], box_nms_thresh=point["nms_threshold"])
        expected = figures_of(model, data)
        assert {key: point[key] for key in expected} == pytest.approx(expected)


def test_score_map_is_the_maximum_of_all_rois_raw_mask_logits(tmp_path: Path) -> None:
    image = phantom(0, size=128).image
    prediction = Predictor(seeing_segmenter(), None, score_map=True)(image)
    with torch.inference_mode():
        everything = seeing_segmenter(box_score_thresh=-0.01, box_nms_thresh=0.75, mask_score="logit")(
            [input_of(torch.from_numpy(image))]
        )[0]
    assert len(everything["scores"]) > len(prediction.scores)
    assert prediction.score_map is not None
    assert prediction.score_map.dtype == np.float32
    np.testing.assert_allclose(prediction.score_map, everything["masks"].amax((0, 1)).numpy(), atol=1e-3)
    prediction.save(tmp_path, "slice")
    np.testing.assert_array_equal(np.load(tmp_path / "slice.score_map.npy"), prediction.score_map)


def test_no_score_map_unless_asked_for_or_without_a_segmenter() -> None:
    image = phantom(0, size=128).image
    assert Predictor(segmenter(), None)(image).score_map is None
    assert Predictor(None, classifier(), score_map=True)(image).score_map is None


# --- weighted statistics and intervals ----------------------------------------------------------------------


def test_interval_of_a_mean_is_scipys_percentile_bootstrap() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).normal(3, 1, 40)
    mine = patient_intervals(
        [f"p{i}" for i in range(40)], lambda w: {"mean": float(w @ values / w.sum())}, samples=4000
    )["mean"]
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", random_state=0
    ).confidence_interval
    assert mine == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_slices_of_a_patient_are_drawn_together() -> None:
    # Ten slices each of five patients: the interval is that of five values, far wider than that of fifty.
    values = np.repeat([0.0, 0.0, 1.0, 1.0, 1.0], 10)
    patients = np.repeat(["a", "b", "c", "d", "e"], 10).tolist()
    mean = lambda w: {"mean": float(w @ values / w.sum())}  # noqa: E731
    low, high = patient_intervals(patients, mean)["mean"] or (0.0, 0.0)
    assert (low, high) == pytest.approx((0.2, 1.0), abs=0.01)


@pytest.mark.parametrize("patients", [["a", "b", "c", "d"] * 2, ["a", "b", "c", "d", "e", None], []])
def test_no_interval_under_five_or_with_unknown_patients(patients: list[str | None]) -> None:
    statistic = lambda w: {"mean": float(w.mean())}  # noqa: E731
    assert patient_intervals(patients, statistic) in ({"mean": None}, {})


# --- evaluate ---------------------------------------------------------------------------------------------------


def test_segmenter_figures_are_those_of_the_collectors(lesions: Path) -> None:
    model = seeing_segmenter(box_score_thresh=0.2, box_nms_thresh=0.5)
    result = evaluate(model, lesions, min_area=5)
    assert result.metrics["operating_point"] == figures_of(model, open_dataset("segmentation", lesions, min_area=5))
    assert result.metrics["operating_point"]["dice_pooled"] > 0
    assert result.metrics["operating_point"] != result.metrics["paper"]
    assert set(result.metrics["coco"]) >= {"box_ap", "mask_ap50"}
    assert result.images == 6
    assert json.dumps(result.to_dict(), allow_nan=False)
    assert "lesion_sensitivity" in str(result.table())


def test_what_is_measured_is_what_predict_gives_whatever_the_batch(lesions: Path, tmp_path: Path) -> None:
    for folder in ("imgs", "masks"):
        (tmp_path / folder).mkdir()
        for index, path in enumerate(sorted((lesions / folder).iterdir())):
            with Image.open(path) as image:  # half of the slices have another shape
                image.crop((0, 0, 128 - 32 * (index % 2), 128)).save(tmp_path / folder / path.name)
    predictor, rows = Predictor(seeing_segmenter(), None), []
    for _, target, name in open_dataset("segmentation", tmp_path, min_area=5):
        found = predictor(tmp_path / "imgs" / f"{name}.png")
        rows += segmentation_rows(target, {"masks": found.masks, "labels": found.labels, "scores": found.scores})
    for batch_size in (1, 6):
        result = evaluate(seeing_segmenter(), tmp_path, min_area=5, samples=0, batch_size=batch_size)
        assert result.metrics["operating_point"] == pytest.approx(SegmentationMetrics(rows).compute(), abs=1e-9)
    assert result.metrics["operating_point"]["dice_pooled"] > 0


def test_classifier_figures_by_slice_and_patient(slices: Path) -> None:
    model = classifier()
    result = evaluate(model, slices, samples=50)
    rows = {}
    for image, label, name in open_dataset("classification", slices):
        with torch.inference_mode():
            rows[name] = (label, model([input_of(image)])[0]["probabilities"].numpy())
    called = [int(label == probability.argmax()) for label, probability in rows.values()]
    assert result.metrics["slice"]["accuracy"] == pytest.approx(sum(called) / len(called))
    patients: dict[str, list[Any]] = {}
    for name, value in rows.items():
        patients.setdefault(name.split("_")[1], []).append(value)
    right = [int(np.mean([p for _, p in own], 0).argmax() == own[0][0]) for own in patients.values()]
    assert result.patients == len(patients) == 6
    assert result.metrics["patient"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert result.intervals["slice"]["accuracy"] is not None
    assert all(len(row["rois_above"]) == 3 for row in result.rows)


def test_patients_whose_slices_differ_in_label_are_left_out(tmp_path: Path) -> None:
    data = class_folder(tmp_path / "data", patient=1, per_class=1)  # one patient, three classes
    result = evaluate(classifier(), data, samples=20)
    assert result.metrics["patient"] == {"mixed_patients": 1}
    assert result.metrics["slice"]["n"] == 3
    assert "patient" not in [row[0] for row in result.table().rows]


def test_a_finished_evaluation_is_saved_beside_its_rows(slices: Path, lesions: Path, tmp_path: Path) -> None:
    result = evaluate(classifier(), slices, samples=0, out=tmp_path / "classes")
    lines = (tmp_path / "classes" / "slices.csv").read_text().splitlines()
    assert len(lines) == 1 + result.images
    assert lines[0].startswith("image_id,label")
    saved = json.loads((tmp_path / "classes" / "evaluation.json").read_text())
    assert saved == json.loads(json.dumps(result.to_dict()))
    assert set(saved["metrics"]["patient"]["auc"]) == {"control", "pneumonia", "covid"}
    table = (tmp_path / "classes" / "evaluation.md").read_text()
    for group in ("slice", "patient"):
        for figure in ("auc covid", "brier", "ece"):
            assert re.search(rf"\| {group} +\| {figure} +\|", table)
    written = evaluate(segmenter(), lesions, limit=2, samples=0).save(tmp_path / "lesions")
    assert sorted(written) == sorted((tmp_path / "lesions").iterdir())
    text = (tmp_path / "lesions" / "evaluation.md").read_text()
    assert "binary Dice at 0.5" in text
    point = segmenter().metadata["operating_point"]
    assert f"score above {point['score_threshold']:g}, NMS at {point['nms_threshold']:g}" in text


def test_the_reliability_curve_shows_the_bins_of_slices_and_patients(slices: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = evaluate(classifier(), slices, samples=0, out=tmp_path)
    with Image.open(tmp_path / "reliability.png") as picture:
        assert picture.width > picture.height > 400
    panels = result.reliability_figure().axes
    for panel, group in zip(panels, ("slice", "patient"), strict=True):
        assert panel.get_title().startswith(f"6 {group}s: Brier score {result.metrics[group]['brier']:.3f}")
        for line, bins in zip(panel.lines[1:], result.metrics[group]["reliability"].values(), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), [found["probability"] for found in bins])
            np.testing.assert_array_equal(line.get_ydata(), [found["observed"] for found in bins])


def test_limit_draws_the_same_slices_for_the_same_seed(lesions: Path) -> None:
    names = [[r["image_id"] for r in evaluate(segmenter(), lesions, limit=3, seed=s).rows] for s in (1, 1, 2)]
    assert names[0] == names[1] != names[2]
    assert len(names[0]) == 3


# --- resuming -------------------------------------------------------------------------------------------------


class Fragile(SliceDataset[SegmentationSample]):
    """A data set whose reading fails at one slice, and which counts what was read."""

    task = "segmentation"

    def __init__(self, source: Any, fails_at: int | None) -> None:
        self.source, self.fails_at, self.read = source, fails_at, 0
        self.class_names, self.names, self.patients = source.class_names, source.names, source.patients

    def __getitem__(self, index: int) -> SegmentationSample:
        if index == self.fails_at:
            raise KeyboardInterrupt
        self.read += 1
        return self.source[index]


def test_an_interrupted_evaluation_goes_on_where_it_was(lesions: Path, tmp_path: Path) -> None:
    source = open_dataset("segmentation", lesions)
    whole = evaluate(segmenter(), Fragile(source, None))
    with pytest.raises(KeyboardInterrupt):
        evaluate(segmenter(), Fragile(source, 4), out=tmp_path / "rows")
    (file,) = (tmp_path / "rows").glob("rows-*.jsonl")
    file.write_bytes(file.read_bytes() + b'{"image_id": "slice5", "paper": {"ap": [0.')  # a kill in mid-write
    rest = Fragile(source, None)
    resumed = evaluate(segmenter(), rest, out=tmp_path / "rows")
    assert rest.read == 2
    assert resumed.metrics == whole.metrics
    assert resumed.rows == whole.rows
    again = Fragile(source, None)
    assert evaluate(segmenter(), again, out=tmp_path / "rows").metrics == whole.metrics
    assert again.read == 0


def test_rows_of_other_settings_are_not_taken_for_these(lesions: Path, tmp_path: Path) -> None:
    few = evaluate(segmenter(), lesions, out=tmp_path / "rows", limit=2)
    source = Fragile(open_dataset("segmentation", lesions), None)
    other = segmenter()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    changed = evaluate(other, source, out=tmp_path / "rows")
    assert source.read == 6, "of other weights none is of use"
    assert changed.rows != evaluate(segmenter(), source, out=tmp_path / "rows").rows
    assert source.read == 6 + 4, "which slices are drawn changes no row"
    assert few.images == 2


@pytest.mark.slow
def test_two_processes_give_what_one_gives(lesions: Path, slices: Path, tmp_path: Path) -> None:
    for name, data in ((DEFAULT_SEGMENTER, lesions), (DEFAULT_CLASSIFIER, slices)):
        command = ["ctmasknet", "evaluate", name, "--data", str(data), "--device", "cpu", "--samples", "20", "--json"]
        one = subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True, text=True)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
        two = subprocess.run(
            [*launch, *command, "--out", str(tmp_path / name)],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        first, second = (json.loads(done.stdout) for done in (one, two))  # one process speaks
        assert first["metrics"] == second["metrics"]
        assert first["intervals"] == second["intervals"]
        assert len(list((tmp_path / name).glob("rows-*.jsonl"))) == 2


LARGE = """
import sys
from pathlib import Path
import numpy as np, torch
from ctmasknet import create_model, evaluate
from ctmasknet.data.datasets import SegmentationSample, SliceDataset
from phantom import phantom

class Large(SliceDataset):
    task = "segmentation"
    class_names = ("background", "lesion")
    names = [f"slice{i:05d}" for i in range(2000)]
    patients = [f"p{i % 40}" for i in range(2000)]
    made = [phantom(seed, lesions=4, size=512) for seed in range(4)]
    def __getitem__(self, index):
        p = self.made[index % 4]
        target = {"boxes": torch.from_numpy(p.boxes), "masks": torch.from_numpy(p.masks.astype(np.uint8))}
        target["labels"] = torch.ones(len(p.masks), dtype=torch.int64)
        return SegmentationSample(torch.from_numpy(p.image)[None], target, self.names[index])

torch.set_num_threads(1)
torch.manual_seed(0)
model = create_model("maskrcnn_resnet18_t2", min_size=64, max_size=64, rpn_post_nms_top_n_test=8)
result = evaluate(model, Large(), out=sys.argv[1], samples=20, device="cpu")
assert result.images == 2000
# The kernel's own count: getrusage's is inherited from the parent.
status = Path("/proc/self/status").read_text().split()
print(status[status.index("VmHWM:") + 1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory in Linux's unit")
def test_two_thousand_slices_stay_under_two_gigabytes_and_survive_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LARGE, str(tmp_path / "rows")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # tools/phantom.py
    first = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 300
    while sum(path.read_bytes().count(b"\n") for path in (tmp_path / "rows").glob("rows-*.jsonl")) < 50:
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    (file,) = (tmp_path / "rows").glob("rows-*.jsonl")
    kept = file.read_bytes().rpartition(b"\n")[0]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert file.read_bytes().startswith(kept)  # gone on, not begun again
    assert int(done.stdout) * 1024 < 2e9


def test_a_place_that_cannot_be_written_is_named_before_the_work(
    lesions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctmasknet.evaluation.evaluate.open_model", lambda *_, **__: pytest.fail("work was done"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"file.*result.*cannot be written"):
        evaluate("maskrcnn_resnet18_t2", lesions, out=tmp_path / "file" / "result")


def test_a_core_install_measures_what_it_can_and_names_the_extra(
    slices: Path, lesions: Path, coco_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("scipy", "scipy.ndimage", "pycocotools", "pycocotools.mask", "accelerate", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert evaluate(classifier(), slices, samples=20).images == 6
    truth, predictions = coco_files
    assert evaluate(predictions, truth, samples=20).metrics["coco"]["mask_ap50"] > 0  # RLE needs no extra
    with pytest.raises(MissingExtraError, match=r"ctmasknet\[train\]"):
        evaluate(segmenter(), lesions)


# --- other people's predictions -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coco_files(lesions: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Ground truth and imperfect results in COCO's format, as pycocotools reads them."""
    folder = tmp_path_factory.mktemp("coco")
    data = open_dataset("segmentation", lesions, min_area=5)
    images, annotations, results = [], [], []
    rng = np.random.default_rng(3)
    for number, (image, target, name) in enumerate(data, start=10):
        height, width = image.shape[1:]
        images.append({"id": number, "file_name": f"{name}.png", "height": height, "width": width})
        for mask in target["masks"].numpy() != 0:
            rle = run_length_encode(mask)
            ys, xs = np.nonzero(mask)
            box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
            entry = {"image_id": number, "category_id": 7, "segmentation": rle, "bbox": box}
            annotations.append(entry | {"id": len(annotations) + 1, "area": int(mask.sum()), "iscrowd": 0})
            shift = int(rng.integers(0, 3))
            moved = run_length_encode(np.roll(mask, shift, axis=1))
            box = [box[0] + shift, *box[1:]]
            score = float(rng.uniform(0.3, 1))
            results.append({"image_id": number, "category_id": 7, "segmentation": moved, "bbox": box, "score": score})
    categories = [{"id": 7, "name": "lesion"}]
    truth, predictions = folder / "truth.json", folder / "theirs.json"
    truth.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    predictions.write_text(json.dumps(results))
    for image in images:
        Image.open(lesions / "imgs" / image["file_name"]).save(folder / image["file_name"])
    return truth, predictions


def test_imported_results_give_pycocotools_ap(coco_files: tuple[Path, Path], capsys: Any) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    truth, predictions = coco_files
    result = evaluate(predictions, truth, min_area=0)
    reference = coco.COCO()
    reference.dataset = json.loads(truth.read_text())
    found = json.loads(predictions.read_text())
    reference.createIndex()
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        evaluated = cocoeval.COCOeval(reference, reference.loadRes(found), kind)
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
        figures = result.metrics["coco"]
        mine = [figures[f"{name}_{key}"] for key in ("ap", "ap50", "ap75")]
        assert mine == pytest.approx(evaluated.stats[:3].tolist(), abs=1e-6)
        assert 0.05 < mine[0] < 0.99
    capsys.readouterr()


def test_imported_results_find_slices_by_name_too(coco_files: tuple[Path, Path], lesions: Path, tmp_path: Path) -> None:
    truth, predictions = coco_files
    names = {image["id"]: image["file_name"] for image in json.loads(truth.read_text())["images"]}
    renamed = [
        entry | {"image_id": names[entry["image_id"]], "category_id": 1}
        for entry in json.loads(predictions.read_text())
    ]
    (tmp_path / "named.json").write_text(json.dumps(renamed))
    by_name = evaluate(tmp_path / "named.json", lesions, min_area=0)
    assert by_name.metrics == evaluate(predictions, truth, min_area=0).metrics


def test_perfect_predictions_get_full_marks(coco_files: tuple[Path, Path], tmp_path: Path) -> None:
    truth, _ = coco_files
    content = json.loads(truth.read_text())
    (tmp_path / "same.json").write_text(json.dumps([entry | {"score": 0.9} for entry in content["annotations"]]))
    metrics = evaluate(tmp_path / "same.json", truth, min_area=0).metrics
    assert metrics["paper"]["ap"] == metrics["operating_point"]["dice_pooled"] == 1
    assert metrics["coco"]["mask_ap"] == pytest.approx(1)
    assert metrics["operating_point"]["false_positives_per_slice"] == 0


def test_imported_probabilities(slices: Path, tmp_path: Path) -> None:
    data = open_dataset("classification", slices)
    rows = [{"image_id": s.name, "probabilities": np.eye(3)[s.label].tolist()} for s in data]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    result = evaluate(tmp_path / "p.json", slices, samples=20)
    assert result.metrics["slice"]["accuracy"] == 1
    assert result.intervals["patient"]["accuracy"] == (1, 1)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 99}, "theirs.json: prediction 0: image_id 99 is no slice of the data; give"),
        ({"category_id": 3}, r"prediction 0: needs .* a category_id of \[7\]"),
        ({"image_id": [1]}, r"prediction 0: image_id=\[1\]: a whole number or text is needed"),
        ({"category_id": [1]}, r"prediction 0: category_id=\[1\]: a whole number or text is needed"),
        ({"score": 1.5}, "prediction 0: needs .* a score in 0..1"),
        ({"score": float("nan")}, "prediction 0: score=nan: a finite number is needed"),
        ({"segmentation": None}, "prediction 0: needs a segmentation"),
        ({"bbox": [1, 2, 3]}, "prediction 0: needs .* a bbox of four numbers"),
        ({"segmentation": {"size": [4, 4], "counts": [16]}}, "prediction 0: not a readable mask"),
    ],
)
def test_a_bad_prediction_is_named(
    coco_files: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    truth, predictions = coco_files
    entries = json.loads(predictions.read_text())
    entries[0] = {key: value for key, value in (entries[0] | change).items() if value is not None}
    (tmp_path / "theirs.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=message):
        evaluate(tmp_path / "theirs.json", truth, min_area=0)


def test_a_missing_file_is_named_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"theirs.json: no such file$"):
        evaluate(tmp_path / "theirs.json", tmp_path / "nowhere")


def test_categories_are_matched_by_name(coco_files: tuple[Path, Path], tmp_path: Path) -> None:
    truth, predictions = coco_files
    entries = json.loads(predictions.read_text())
    theirs = tmp_path / "theirs.json"

    def with_categories(*names: str) -> Path:
        categories = [{"id": 7 + index, "name": name} for index, name in enumerate(names)]
        theirs.write_text(json.dumps({"annotations": entries, "categories": categories}))
        return theirs

    result = evaluate(with_categories("Lesion"), truth, min_area=0, samples=0)
    assert result.metrics == evaluate(predictions, truth, min_area=0, samples=0).metrics
    with pytest.raises(DataError, match="categories nodule, but the data's are lesion"):
        evaluate(with_categories("nodule"), truth)


def test_predictions_keep_the_nms_they_were_made_with(coco_files: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="nms_threshold is for models"):
        evaluate(coco_files[1], coco_files[0], nms_threshold=0.5)


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '{"annotations": 3}', '[{"category_id": 1}]'],
)
def test_what_is_no_results_file_is_refused(lesions: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "theirs.json").write_text(content)
    with pytest.raises(DataError, match=r"theirs.json: not"):
        evaluate(tmp_path / "theirs.json", lesions)


def test_duplicate_names_are_refused(coco_files: tuple[Path, Path], lesions: Path, tmp_path: Path) -> None:
    entries = json.loads(coco_files[1].read_text())
    images = [{"id": 1, "file_name": "slice1.png"}, {"id": 2, "file_name": "slice1.png"}]
    (tmp_path / "theirs.json").write_text(json.dumps({"images": images, "annotations": entries}))
    with pytest.raises(DataError, match=r"theirs.json: images must be .* each with an id and a file_name of its own"):
        evaluate(tmp_path / "theirs.json", lesions)
    twice = Fragile(open_dataset("segmentation", lesions), None)
    twice.names = [*twice.names[:-1], twice.names[0]]
    with pytest.raises(DataError, match="slice0: 2 slices of this name"):
        evaluate(segmenter(), twice)


def test_a_name_that_several_slices_share_is_ambiguous(tmp_path: Path) -> None:
    for root in ("a", "b"):
        lesion_folder(tmp_path / root, range(1, 2))
    data = [tmp_path / "a", tmp_path / "b"]
    mask = run_length_encode(np.ones((128, 128), bool))
    entry = {"image_id": "slice1", "category_id": 1, "score": 0.9, "segmentation": mask}
    (tmp_path / "theirs.json").write_text(json.dumps([entry]))
    with pytest.raises(
        DataError,
        match=r"image_id 'slice1' is .*/a/imgs/slice1.png or .*/b/imgs/slice1.png; give",
    ):
        evaluate(tmp_path / "theirs.json", data)


def test_probabilities_twice_missing_or_impossible_are_refused(slices: Path, tmp_path: Path) -> None:
    data = open_dataset("classification", slices)
    rows = [{"image_id": name, "probabilities": [0.2, 0.3, 0.5]} for name in data.names]
    file = tmp_path / "p.json"
    for changed, message in (
        ([*rows, rows[0]], r"not \[\[0.2, 0.3, 0.5\], \[0.2, 0.3, 0.5\]\]"),
        (rows[1:], r"not \[\]"),
        ([rows[0] | {"probabilities": [0.2, 0.3, 0.9]}], r"not \[\[0.2, 0.3, 0.9\]\]"),
        ([rows[0] | {"probabilities": [0.5, 0.5]}], r"not \[\[0.5, 0.5\]\]"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(DataError, match=f"image {data.names[0]}: one prediction of 3 probabilities .*{message}"):
            evaluate(file, slices)


def test_data_without_slices_are_refused(lesions: Path) -> None:
    empty = open_dataset("segmentation", lesions)
    empty.names.clear()
    with pytest.raises(DataError, match="the data set is empty"):
        evaluate(segmenter(), empty)


def test_labels_outside_the_classes_are_refused(slices: Path) -> None:
    class Mislabelled(SliceDataset[ClassificationSample]):
        task = "classification"
        class_names = ("control", "pneumonia", "covid")
        names = ("strange",)  # type: ignore[assignment]
        patients = (None,)  # type: ignore[assignment]

        def __getitem__(self, index: int) -> ClassificationSample:
            return ClassificationSample(torch.zeros(1, 128, 128, dtype=torch.uint8), 3, "strange")

    with pytest.raises(DataError, match=r"strange: labelled 3, but the classes are 0..2"):
        evaluate(classifier(), Mislabelled())


def named(model: Model, *classes: str) -> Model:
    """Weights that name their classes."""
    model.metadata = {**model.metadata, "classes": list(classes)}
    return model


def test_data_of_other_classes_than_the_models_are_refused(lesions: Path, slices: Path) -> None:
    with pytest.raises(DataError, match=f"classes background, GGO, consolidation, but {DEFAULT_SEGMENTER} tells"):
        evaluate(segmenter(), lesions, classes="both")
    with pytest.raises(DataError, match=r"classes background, lesion, but .* tells background, GGO apart"):
        evaluate(named(segmenter(), "background", "GGO"), lesions, classes="merge")
    with pytest.raises(DataError, match=r"classes control, pneumonia, covid, but .* tells x, y, z apart"):
        evaluate(named(classifier(), "x", "y", "z"), slices)
    with pytest.raises(DataError, match="tells covid, pneumonia, control apart"):  # the same in another order
        evaluate(named(classifier(), "covid", "pneumonia", "control"), slices)
    with pytest.raises(ConfigError, match="the data are for classification"):
        evaluate(segmenter(), open_dataset("classification", slices))


def test_a_model_of_ggo_alone_is_measured_on_ggo_alone(tmp_path: Path) -> None:
    root = lesion_folder(tmp_path / "mixed", range(1, 3))
    pixels = {"lesion": 0, "GGO": 0}
    for path in (root / "masks").iterdir():
        mask = np.array(Image.open(path))
        mask[mask > 1] = 2
        mask[::2][mask[::2] > 1] = 3  # every other row of a lesion is consolidation
        Image.fromarray(mask).save(path)
        pixels["lesion"] += int((mask > 1).sum())
        pixels["GGO"] += int((mask == 2).sum())
    assert 0 < pixels["GGO"] < pixels["lesion"]
    for name, count in pixels.items():
        result = evaluate(named(segmenter(), "background", name), root, min_area=0, samples=0)
        assert result.class_names == ("background", name)
        assert sum(row["paper"]["gt_pixels"] for row in result.rows) == count


def test_thresholds_are_not_for_classifiers(slices: Path) -> None:
    with pytest.raises(ConfigError, match="are for segmentation"):
        evaluate(classifier(), slices, score_threshold=0.5)


def test_both_classes_by_name(lesions: Path) -> None:
    model = named(create_model("maskrcnn_resnet18_t2", num_classes=3, **QUICK), "background", "GGO", "consolidation")
    assert evaluate(model, lesions, limit=1, samples=0).class_names == ("background", "GGO", "consolidation")
    nameless = create_model("maskrcnn_resnet18_t2", **QUICK)  # nobody says what its one class is: the caller does
    assert evaluate(nameless, lesions, classes="ggo", limit=1, samples=0).class_names == ("background", "GGO")


def test_thresholds_count_for_models_each_by_itself(lesions: Path) -> None:
    def found(**thresholds: float) -> dict[str, Any]:
        return evaluate(seeing_segmenter(), lesions, samples=0, min_area=5, **thresholds).metrics

    own = seeing_segmenter().metadata["operating_point"]
    score, nms = own["score_threshold"], own["nms_threshold"]
    as_trained = found()
    assert found(score_threshold=score, nms_threshold=nms) == as_trained
    assert found(score_threshold=0.05)["operating_point"] != as_trained["operating_point"]
    # The paper's protocol keeps its own; and a threshold that equals the paper's is taken like any other.
    changed = found(score_threshold=0.75)
    assert changed["paper"] == as_trained["paper"]
    for point in ({"score_threshold": 0.75}, {"nms_threshold": 0.9}, {"score_threshold": 0.1}):
        both = {"score_threshold": score, "nms_threshold": nms} | point
        model = seeing_segmenter(box_score_thresh=both["score_threshold"], box_nms_thresh=both["nms_threshold"])
        expected = figures_of(model, open_dataset("segmentation", lesions, min_area=5))
        assert found(**point)["operating_point"] == pytest.approx(expected)


def test_a_class_without_slices_is_none_not_nan(slices: Path) -> None:
    found = list_slices("classification", slices)
    found.records = [record for record in found.records if record.label != 1]
    result = evaluate(classifier(), LabelledSlices(found), samples=30)
    for group in ("slice", "patient"):
        assert result.metrics[group]["sensitivity"]["pneumonia"] is None
        assert result.intervals[group]["sensitivity"]["pneumonia"] is None
    assert "nan" not in str(result.table()).lower()
    assert "N/A" in str(result.table())
    json.dumps(result.to_dict(), allow_nan=False)


def test_data_without_any_lesion_have_no_sensitivity(tmp_path: Path) -> None:
    data = lesion_folder(tmp_path / "healthy", range(0, 8, 4))  # every fourth is without lesions
    result = evaluate(segmenter(), data)
    assert result.metrics["operating_point"]["lesion_sensitivity"] is None
    assert set(result.metrics["coco"].values()) == {None}
    json.dumps(result.to_dict(), allow_nan=False)


def test_asking_for_more_slices_than_there_are_warns_and_takes_all(lesions: Path) -> None:
    with pytest.warns(UserWarning, match="50 slices asked for, but there are 6"):
        assert evaluate(segmenter(), lesions, limit=50).images == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"samples": -1}, "samples=-1"),
        ({"precision": "half"}, "precision='half'"),
        ({"device": "nowhere"}, "nowhere"),
        ({"score_threshold": 1.5}, "score_threshold=1.5"),
        ({"nms_threshold": -1}, "nms_threshold=-1"),
        ({"nms_threshold": float("nan")}, "nms_threshold=nan"),
    ],
)
def test_impossible_settings_are_refused(lesions: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(segmenter(), lesions, **options)


# --- the command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segmenter().save_pretrained(tmp_path_factory.mktemp("weights") / "small")


def test_cli_evaluates_and_states_facts_as_json(small_weights: Path, lesions: Path, capsys: Any) -> None:
    assert main(["evaluate", str(small_weights), "--data", str(lesions), "--limit", "2"]) == 0
    assert "lesion_sensitivity" in capsys.readouterr().out
    assert main(["evaluate", str(small_weights), "--data", str(lesions), "--limit", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 2
    assert facts["intervals"]["paper"]["ap50"] is None


def test_cli_names_the_mistake(lesions: Path, capsys: Any) -> None:
    assert main(["evaluate", "maskrcnn_resnet18_t9", "--data", str(lesions)]) == 2
    assert "did you mean maskrcnn_resnet18_t" in capsys.readouterr().err


def test_cli_predicts_score_maps_and_its_coco_results_can_be_evaluated(
    small_weights: Path, lesions: Path, tmp_path: Path, capsys: Any
) -> None:
    chosen = ["--segmenter", str(small_weights), "--classifier", "none"]
    slices = [str(path) for path in sorted((lesions / "imgs").iterdir())]
    one = tmp_path / "one"
    assert main(["predict", slices[0], "-o", str(one), "--score-map", *chosen]) == 0
    assert np.load(next(one.rglob("*.score_map.npy"))).shape == (128, 128)
    many = tmp_path / "many"
    assert main(["predict", *slices, "-o", str(many), "--format", "coco", "--score-threshold", "0.01", *chosen]) == 0
    capsys.readouterr()
    result = evaluate(many / "coco_results.json", lesions, score_threshold=0.01)
    nms = json.loads((small_weights / "config.json").read_text())["metadata"]["operating_point"]["nms_threshold"]
    model = segmenter(box_score_thresh=0.01, box_nms_thresh=nms)
    expected = evaluate(model, lesions).metrics["operating_point"]
    assert result.metrics["operating_point"] == pytest.approx(expected)
