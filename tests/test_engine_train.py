"""Training: what a run leaves, where it may start, how it is interrupted and continued, what it does with bad input."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from engine_data import SMALL, class_folder, classifier_config, lesion_folder, segmenter_config
from phantom import write_lesions
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctmasknet import ConfigError, CTMaskNetError, DataError, Predictor, WeightsError, create_model, from_pretrained
from ctmasknet.data.datasets import open_dataset
from ctmasknet.engine import TrainConfig, TrainResult, loop, train
from ctmasknet.engine.batches import ModuleSOnRoIs, find_rois
from ctmasknet.engine.record import plot_curves
from ctmasknet.engine.setup import initial_model
from ctmasknet.evaluation.metrics import SegmentationMetrics, segmentation_rows
from ctmasknet.models.detector import ResNetFPN
from ctmasknet.models.inference import Inference
from ctmasknet.weights.files import read_weights

pytest.importorskip("accelerate")

SEGMENTER, CLASSIFIER = "maskrcnn_resnet18_t2", "ctmasknet_resnet18_t2"


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lesion_folder(tmp_path_factory.mktemp("lesions") / "train", range(1, 5))


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folder(tmp_path_factory.mktemp("classes") / "train", 1)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to start from: random ones, but with terms and origin."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("started")
    model = create_model(SEGMENTER, **SMALL)  # type: ignore[arg-type]
    model.metadata["caveat"] = "Of phantoms only."
    return model.save_pretrained(folder, license="cc-by-nc-sa-4.0", dataset="Drawn slices.")


@pytest.fixture(scope="module")
def segmented(lesions: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A finished run with everything switched on."""
    out = tmp_path_factory.mktemp("segmenter") / "run"
    options: dict[str, Any] = {"validation_loss": True, "operating_point": True, "tensorboard": True}
    return train(segmenter_config(lesions, out, val=lesions, license="CC0-1.0", **options))


@pytest.fixture(scope="module")
def classified(started: Path, classes: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A finished run of one epoch on cached RoIs."""
    return train(classifier_config(classes, tmp_path_factory.mktemp("classifier") / "run", weights=started, epochs=1))


def losses_of(result: TrainResult) -> list[dict[str, float]]:
    """Everything of a history that is not a matter of time and memory."""
    timing = ("images_per_s", "minutes")
    return [{key: value for key, value in row.items() if key not in timing} for row in result.history]


def same_weights(one: str | None, other: str | None) -> bool:
    assert one is not None
    assert other is not None
    first, second = read_weights(one).tensors, read_weights(other).tensors
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class Interrupter:
    """Does something when the loop asks for the learning rate of a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.actions: dict[int, Any] = {}
        self._rate = loop.learning_rate
        monkeypatch.setattr(loop, "learning_rate", self._learning_rate)

    def _learning_rate(self, config: TrainConfig, step: int, steps: int) -> float:
        self.actions.pop(step, lambda: None)()
        return self._rate(config, step, steps)


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Any]]:
    interrupter = Interrupter(monkeypatch)
    yield interrupter.actions
    assert not interrupter.actions, "the run never came to that step"


# --- what a run leaves --------------------------------------------------------------------------------------


def test_best_and_last_are_loadable_with_config_card_and_operating_point(segmented: TrainResult) -> None:
    assert segmented.finished
    for folder in (segmented.best, segmented.last):
        assert folder is not None
        model = create_model(SEGMENTER, weights=folder)
        assert model.config.min_size == 128
        assert set(model.metadata["operating_point"]) == {"score_threshold", "nms_threshold"}
        assert model.metadata["classes"] == ["background", "lesion"]
        card = Path(folder, "README.md").read_text()
        assert "license: cc0-1.0" in card.lower()
        assert SEGMENTER in card


def test_best_carries_the_metrics_of_its_operating_point(segmented: TrainResult, lesions: Path) -> None:
    assert segmented.best is not None
    stored = read_weights(segmented.best).metadata
    point = stored["operating_point"]
    options = {"box_score_thresh": point["score_threshold"], "box_nms_thresh": point["nms_threshold"]}
    model, rows = from_pretrained(segmented.best, **options), []
    for image, target, _ in open_dataset("segmentation", lesions, min_area=5):
        with torch.no_grad():
            found = model([image.expand(3, -1, -1) / 255])[0]
        rows += segmentation_rows(target, found | {"masks": found["masks"][:, 0] > 0.5})
    for key, value in SegmentationMetrics(rows).compute().items():
        if value is not None and key != "images":
            assert stored["metrics"][key] == pytest.approx(value, abs=1e-4), key
    assert {"coco_box_ap", "coco_mask_ap"} <= set(stored["metrics"])
    assert not {"score", "images", "val_loss"} & set(stored["metrics"])


def test_the_run_folder_tells_what_happened(segmented: TrainResult, lesions: Path) -> None:
    out = Path(segmented.out)
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for key in ("loss", "loss_mask", "val_loss_mask", "ap50", "ap75", "ap", "dice_pooled", "lr", "images_per_s"):
        assert float(rows[-1][key]) >= 0, key
    record = json.loads((out / "run.json").read_text())
    assert TrainConfig.from_dict(record["config"]).data == str(lesions)
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert record["seconds"] > 0
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((out / "tensorboard").glob("events.*"))


def test_best_has_a_golden_file_that_it_passes(segmented: TrainResult) -> None:
    assert segmented.best is not None
    from_pretrained(segmented.best, verify=True)


def test_a_classifier_gets_the_temperature_that_fits_its_validation_data_best(classes: Path, tmp_path: Path) -> None:
    val = class_folder(tmp_path / "val", 2)
    result = train(classifier_config(classes, tmp_path / "run", val=val, lr=1e-2, epochs=3, balance=True))
    model = from_pretrained(str(result.best), verify=True)
    assert result.operating_point == {"temperature": model.metadata["temperature"]}
    assert f"temperature {model.temperature:.3g}" in result.summary
    losses: dict[float, float] = {}
    with torch.no_grad():
        found = [model([s.image.expand(3, -1, -1) / 255])[0] for s in open_dataset("classification", val)]
    labels = torch.tensor([s.label for s in open_dataset("classification", val)])
    logits = torch.stack([one["logits"] for one in found])
    for temperature in (*torch.logspace(-1.3, 1.3, 200).tolist(), model.temperature):
        losses[temperature] = float(torch.nn.functional.nll_loss((logits / temperature).log_softmax(-1), labels))
    assert losses[model.temperature] <= min(losses.values()) + 1e-4
    probabilities = torch.stack([one["probabilities"] for one in found])
    torch.testing.assert_close(probabilities, (logits / model.temperature).softmax(-1))
    # What is trained from these weights has no temperature of its own yet, and other values none at all.
    again = train(classifier_config(classes, tmp_path / "again", weights=result.best, epochs=1))
    assert "temperature" not in read_weights(str(again.best)).metadata


def test_a_temperature_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = create_model(CLASSIFIER, **SMALL).save_pretrained(tmp_path)  # type: ignore[arg-type]
    config = json.loads((folder / "config.json").read_text())
    for wrong in (0.0, -1, "warm"):
        config["metadata"]["temperature"] = wrong
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(WeightsError, match="temperature"):
            from_pretrained(folder)


def test_a_run_from_weights_says_how_they_did_and_which_epoch_is_best(
    started: Path, lesions: Path, tmp_path: Path
) -> None:
    result = train(segmenter_config(lesions, tmp_path / "run", weights=started, val=lesions, operating_point=True))
    start, *rows = result.history
    assert [start["epoch"], *(row["epoch"] for row in rows)] == [0, 1, 2]
    found_rows = []
    model = from_pretrained(started, box_score_thresh=0.3, box_nms_thresh=0.5)
    for image, target, _ in open_dataset("segmentation", lesions, min_area=5):
        with torch.no_grad():
            found = model([image.expand(3, -1, -1) / 255])[0]
        found_rows += segmentation_rows(target, found | {"masks": found["masks"][:, 0] > 0.5})
    expected = SegmentationMetrics(found_rows).compute()
    assert start["ap50"] == pytest.approx(expected["ap50"], abs=1e-4)
    assert start["dice_pooled"] == pytest.approx(expected["dice_pooled"], abs=1e-4)

    best = max(rows, key=lambda row: row["score"])
    assert result.best_epoch == best["epoch"]
    assert f"best is epoch {best['epoch']} of 2: ap50 {best['ap50']:.3f}" in result.summary
    assert f"start weights: ap50 {start['ap50']:.3f}" in result.summary
    assert f"score above {result.operating_point['score_threshold']:g}, NMS at" in result.summary
    assert result.operating_point == read_weights(str(result.best)).metadata["operating_point"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"]["summary"] == result.summary


def test_terms_and_origin_of_the_start_weights_go_along(started: Path, classes: Path, tmp_path: Path) -> None:
    for out, license in ((tmp_path / "silent", None), (tmp_path / "own", "mit")):
        result = train(classifier_config(classes, out, weights=started, epochs=1, license=license))
        stored = read_weights(str(result.best)).metadata
        assert stored["license"] == (license or "cc-by-nc-sa-4.0")
        assert stored["caveat"] == "Of phantoms only."
        card = Path(str(result.best), "README.md").read_text()
        assert "cc-by-nc-sa-4.0" in card
        assert "Drawn slices." in card


def test_every_curve_has_its_colour_and_no_legend_lies_on_one(
    segmented: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    plot_curves(tmp_path / "curves.png", segmented.history)
    losses = drawn[0].axes[0]
    assert {line.get_label() for line in losses.lines} == {key for key in segmented.history[-1] if "loss" in key}
    for axis in drawn[0].axes:
        assert len({line.get_color() for line in axis.lines}) == len(axis.lines)
        assert not axis.get_legend().get_window_extent().overlaps(axis.get_window_extent())


def test_training_lowers_the_loss(segmented: TrainResult) -> None:
    first, second = (row["loss"] for row in segmented.history)
    assert second < 0.9 * first


def test_the_average_is_what_is_saved(classes: Path, tmp_path: Path) -> None:
    averaged = train(classifier_config(classes, tmp_path / "ema", ema=0.999))
    followed = train(classifier_config(classes, tmp_path / "none", ema=0.0))
    assert losses_of(averaged)[0]["loss"] == losses_of(followed)[0]["loss"], "averaging does not change training"
    assert not same_weights(averaged.last, followed.last)


# --- where it starts ----------------------------------------------------------------------------------------


def test_runs_with_one_seed_are_equal(classes: Path, tmp_path: Path) -> None:
    one, two, other = (
        train(classifier_config(classes, tmp_path / str(number), seed=seed)) for number, seed in enumerate((1, 1, 2))
    )
    assert losses_of(one) == losses_of(two)
    assert same_weights(one.last, two.last)
    assert losses_of(one) != losses_of(other)


def test_a_classifier_takes_its_segmenters_weights_and_a_new_module_s(
    segmented: TrainResult, classes: Path, tmp_path: Path
) -> None:
    config = classifier_config(classes, tmp_path / "run", weights=segmented.best, cache_rois=False, epochs=1)
    result = train(config)
    assert segmented.best is not None
    assert result.last is not None
    before, after = read_weights(segmented.best).tensors, read_weights(result.last).tensors
    changed = {key for key in after if key in before and not torch.equal(before[key], after[key])}
    # Scale and shift of the body's bn layers; not those of the shortcuts, and no statistics.
    trained = {
        key
        for key in before
        if key.startswith("backbone.body.") and ".bn" in f".{key}" and key.endswith(("weight", "bias"))
    }
    assert changed <= trained
    assert len(changed) > len(trained) / 2
    assert {key for key in after if key not in before} == {
        f"module_s.{layer}.{kind}" for layer in ("fc1", "fc2", "logits") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("name", "trained", "alone"),
    [
        ("ctmasknet_resnet18_t1", 596_099, None),
        ("ctmasknet_resnet34_t1", 601_475, None),
        ("ctmasknet_resnet50", 2_409_859, 2_364_419),
    ],
)
def test_as_many_values_are_trained_as_in_the_released_code(name: str, trained: int, alone: int | None) -> None:
    model = create_model(name)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    only_s = sum(p.numel() for p in ModuleSOnRoIs(model).parameters() if p.requires_grad)  # type: ignore[arg-type]
    assert alone is None or only_s == alone


def test_weights_of_another_variant_need_a_word(segmented: TrainResult, lesions: Path, tmp_path: Path) -> None:
    config = segmenter_config(lesions, tmp_path / "run", weights=segmented.best, epochs=1).to_dict()
    config["model"] = "maskrcnn_resnet18_t1"
    with pytest.raises(WeightsError, match="partial_weights"):
        train(TrainConfig.from_dict(config))


def test_partial_weights_copy_what_fits_and_say_what_is_new(
    segmented: TrainResult, lesions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = segmenter_config(lesions, tmp_path / "run", weights=segmented.best, partial_weights=True).to_dict()
    config["model"] = "maskrcnn_resnet18_t1"
    with caplog.at_level(logging.WARNING):
        model = initial_model(TrainConfig.from_dict(config), ("background", "lesion"))
    assert segmented.best is not None
    donor, mine = read_weights(segmented.best).tensors, model.state_dict()
    copied = {key for key in mine if key in donor and torch.equal(mine[key], donor[key])}
    assert all(key in copied for key in mine if ".layer1." in key or ".layer2." in key or key.startswith("rpn."))
    assert not any(".layer3." in key for key in copied)
    assert "layer3" in caplog.text


def test_other_classes_keep_all_but_their_heads(segmented: TrainResult, lesions: Path, tmp_path: Path) -> None:
    config = segmenter_config(lesions, tmp_path / "run", weights=segmented.best, classes="both")
    model = initial_model(config, ("background", "GGO", "consolidation"))
    assert segmented.best is not None
    donor, mine = read_weights(segmented.best).tensors, model.state_dict()
    new = {key for key in mine if donor[key].shape != mine[key].shape}
    assert {key.rsplit(".", 2)[-2] for key in new} == {"cls_score", "bbox_pred", "mask_fcn_logits"}
    assert all(torch.equal(donor[key], mine[key]) for key in mine if key not in new)


def test_the_body_starts_from_a_file_and_the_card_says_so(lesions: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    body = torchvision.models.resnet18().state_dict()
    torch.save(body, tmp_path / "resnet18.pth")
    config = segmenter_config(lesions, tmp_path / "run", weights_backbone=tmp_path / "resnet18.pth", epochs=1, lr=0.0)
    result = train(config)
    stored = read_weights(str(result.best))
    torch.testing.assert_close(stored.tensors["backbone.body.layer2.1.conv2.weight"], body["layer2.1.conv2.weight"])
    assert stored.metadata["training"]["weights_backbone"] == "resnet18.pth"


def test_the_recipes_start_from_imagenet_goes_on_without_a_network_and_says_how_it_is_left_out(
    lesions: Path, tmp_path: Path, started: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise WeightsError("the Hub cannot be reached")

    def initial(**changes: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        config = segmenter_config(lesions, tmp_path, **changes)
        return initial_model(config, ("background", "lesion")).state_dict()

    monkeypatch.setattr("ctmasknet.weights.assemble.from_hub", unreachable)
    assert TrainConfig(SEGMENTER, "data", "out").weights_backbone == "auto"
    random = initial(weights_backbone=False)
    initial(weights_backbone="auto", weights=started)
    assert not caplog.text, "who starts from weights is not concerned"
    tried = initial(weights_backbone="auto")
    assert all(torch.equal(tried[key], random[key]) for key in random)
    assert "could not be had (the Hub cannot be reached)" in caplog.text
    assert "weights_backbone=False" in caplog.text
    with pytest.raises(WeightsError, match="cannot be reached"):
        initial(weights_backbone=True)
    with pytest.raises(ConfigError, match="not both"):
        segmenter_config(lesions, tmp_path, weights_backbone=True, weights="default")


# --- interruptions ------------------------------------------------------------------------------------------


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_checkpoints_and_the_rest_is_as_if_nothing_happened(
    lesions: Path, tmp_path: Path, at_step: dict[int, Any]
) -> None:
    options: dict[str, Any] = {"batch_size": 1, "val": lesions}
    whole = train(segmenter_config(lesions, tmp_path / "whole", **options))
    handler = signal.getsignal(signal.SIGTERM)
    at_step |= {1: stop}
    first = train(segmenter_config(lesions, tmp_path / "cut", **options))
    assert not first.finished
    assert (first.epochs, 1 < first.steps < 4) == (0, True)
    at_step |= {5: stop}
    second = train(segmenter_config(lesions, tmp_path / "cut", **options))
    assert (second.finished, second.epochs) == (False, 1)
    last = train(segmenter_config(lesions, tmp_path / "cut", **options))
    assert last.finished
    assert losses_of(last) == losses_of(whole), "to the last bit"
    assert same_weights(last.last, whole.last)
    assert same_weights(last.best, whole.best)
    assert signal.getsignal(signal.SIGTERM) == handler


def test_ctrl_c_checkpoints_and_a_second_one_stops_at_once(
    lesions: Path, tmp_path: Path, at_step: dict[int, Any]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    at_step |= {1: lambda: os.kill(os.getpid(), signal.SIGINT)}
    once = train(segmenter_config(lesions, tmp_path / "once", batch_size=1))
    assert (once.finished, 1 < once.steps < 4) == (False, True)

    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    at_step |= {1: twice}
    with pytest.raises(KeyboardInterrupt):
        train(segmenter_config(lesions, tmp_path / "twice", batch_size=1))
    assert signal.getsignal(signal.SIGINT) == before


def test_accumulation_resumes_at_a_whole_step(classes: Path, tmp_path: Path, at_step: dict[int, Any]) -> None:
    options: dict[str, Any] = {"batch_size": 1, "accumulate": 2}
    whole = train(classifier_config(classes, tmp_path / "whole", **options))
    at_step |= {1: stop}
    assert not train(classifier_config(classes, tmp_path / "cut", **options)).finished
    last = train(classifier_config(classes, tmp_path / "cut", **options))
    assert losses_of(last) == losses_of(whole)
    assert same_weights(last.last, whole.last)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    classes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(classifier_config(classes, tmp_path / "run"))
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        again = train(classifier_config(classes, tmp_path / "run"))
    assert newest.name in caplog.text
    assert losses_of(again) == losses_of(whole)


def test_a_finished_run_is_left_alone_and_can_be_given_more_epochs(classes: Path, tmp_path: Path) -> None:
    first = train(classifier_config(classes, tmp_path / "run"))
    assert train(classifier_config(classes, tmp_path / "run")).history == first.history
    more = train(classifier_config(classes, tmp_path / "run", epochs=3))
    assert more.history[:2] == first.history
    assert (more.epochs, more.finished) == (3, True)


def test_a_finished_run_is_said_to_be_complete_and_not_touched(
    lesions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = segmenter_config(lesions, tmp_path / "run", epochs=1, tensorboard=True)
    first = train(config)

    def files() -> dict[str, tuple[int, bytes]]:
        found = sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file())
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}

    before = files()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = train(config)
    assert again == first
    assert files() == before
    assert "complete" in caplog.text
    assert "continuing" not in caplog.text


def test_more_epochs_go_on_from_the_last_average_not_from_the_best(lesions: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": "constant", "ema": 0.9, "val": lesions, "operating_point": True}
    options["score_threshold"] = 1.0  # nothing is detected, so no epoch is better than the first
    first = train(segmenter_config(lesions, tmp_path / "more", epochs=2, **options))
    assert first.best_epoch == 1, "otherwise this shows nothing"
    more = train(segmenter_config(lesions, tmp_path / "more", epochs=3, **options))
    whole = train(segmenter_config(lesions, tmp_path / "whole", epochs=3, **options))
    assert same_weights(more.last, whole.last)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 1, "accumulate": 2}, "batches per step 1, here it is 2"),
        ({"optimizer": "adam"}, "made with optimizer adamw, here it is adam"),
        ({"cache_rois": False}, "cache rois True, here it is False"),
        ({"weights": "other"}, "weights that are not trained"),
        ({"data": ["", "more"]}, "number of slices 6, here it is 12"),
        ({"model": "ctmasknet_resnet18_t1"}, f"made with variant {CLASSIFIER}, here it is ctmasknet_resnet18_t1"),
        ({"resume": False}, "holds a run"),
    ],
)
def test_a_run_is_not_continued_on_other_steps_than_it_began_with(
    classified: TrainResult, started: Path, classes: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    if "weights" in changes:
        torch.manual_seed(6)
        changes = {"weights": create_model(SEGMENTER, **SMALL).save_pretrained(tmp_path / "other")}  # type: ignore[arg-type]
    elif "data" in changes:
        changes = {"data": [str(classes), str(class_folder(tmp_path / "more", 2))]}
    elif "model" in changes:
        changes = changes | {"weights": None}
    config = classifier_config(classes, Path(classified.out), weights=started, epochs=2).to_dict()
    with pytest.raises(ConfigError, match=said):
        train(TrainConfig.from_dict(config | changes))


def test_a_checkpoint_of_another_version_is_named(classes: Path, tmp_path: Path) -> None:
    train(classifier_config(classes, tmp_path / "run", epochs=1))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        with safe_open(path, "pt") as file:
            header = {key: value for key, value in file.metadata().items() if key != "format"}
        save_file(load_file(path), path, metadata=header)
    with pytest.raises(WeightsError, match="another version of ctmasknet"):
        train(classifier_config(classes, tmp_path / "run", epochs=2))


def test_a_run_can_be_continued_in_another_folder(classes: Path, tmp_path: Path) -> None:
    train(classifier_config(classes, tmp_path / "one", epochs=1))
    with pytest.raises(ConfigError, match="raise epochs"):
        train(classifier_config(classes, tmp_path / "two", epochs=1, resume=tmp_path / "one"))
    result = train(classifier_config(classes, tmp_path / "two", epochs=2, resume=tmp_path / "one", val=classes))
    assert (result.epochs, result.best) == (2, str(tmp_path / "two" / "best"))


# --- what can go wrong --------------------------------------------------------------------------------------


class Spoiled:
    """Makes the loss of chosen forward passes NaN or infinite."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, value: float, calls: set[int]) -> None:
        self.value, self.calls, self.count = value, calls, 0
        forward = ModuleSOnRoIs.forward

        def spoiled(module: ModuleSOnRoIs, rois: list[Tensor], targets: Any = None) -> Any:
            result = forward(module, rois, targets)
            if module.training:
                self.count += 1
                if self.count in self.calls:
                    result = {key: loss * self.value for key, loss in result.items()}
            return result

        monkeypatch.setattr(ModuleSOnRoIs, "forward", spoiled)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_counted_and_named(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: float
) -> None:
    Spoiled(monkeypatch, value, {2, 5})
    with caplog.at_level(logging.WARNING):
        result = train(classifier_config(classes, tmp_path / "run"))
    assert (result.finished, result.steps, result.skipped_steps) == (True, 6, 2)
    assert caplog.text.count("_p1_1_") == 4, "two steps of two slices"
    assert result.last is not None
    assert all(value.isfinite().all() for value in read_weights(result.last).tensors.values())
    assert all(0 < row["loss"] < float("inf") for row in result.history), "they do not count in the mean"


def test_a_skipped_step_leaves_nothing_in_batch_normalisation(
    lesions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = ResNetFPN.forward, iter(range(100))

    def spoiled(backbone: ResNetFPN, images: Tensor) -> Any:
        nan = backbone.training and next(calls) == 1
        return forward(backbone, images * float("nan") if nan else images)

    monkeypatch.setattr(ResNetFPN, "forward", spoiled)
    result = train(segmenter_config(lesions, tmp_path / "run"))
    assert (result.steps, result.skipped_steps) == (4, 1)
    create_model(SEGMENTER, weights=result.last)


def test_a_patient_in_both_splits_is_named(classes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for val, said in ((class_folder(tmp_path / "same", 1), True), (class_folder(tmp_path / "other", 2), False)):
        caplog.clear()
        train(classifier_config(classes, tmp_path / f"run{said}", val=val, epochs=1))
        assert ("are in both (p1)" in caplog.text) is said


def test_a_validation_slice_may_have_a_name_that_is_no_unicode(classes: Path, tmp_path: Path) -> None:
    val = class_folder(tmp_path / "val", 2)
    try:
        (val / "2_p2_1_1.png").rename(val / os.fsdecode(b"2_p2_1_\xff.png"))
    except OSError:
        pytest.skip("the file system takes Unicode only")
    result = train(classifier_config(classes, tmp_path / "run", val=val, epochs=1))
    assert result.history[0]["val_loss_image"] > 0


def test_too_many_in_a_row_stop_the_run_with_file_names_and_the_last_good_checkpoint(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Spoiled(monkeypatch, float("nan"), set(range(4, 100)))
    config = classifier_config(classes, tmp_path / "run", epochs=9, max_bad_steps=5, checkpoint_minutes=0)
    with pytest.raises(CTMaskNetError, match=r"[012]_p1_1_[01].*5 steps in a row.*checkpoint") as error:
        train(config)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    result = train(config)
    assert (result.finished, result.skipped_steps) == (True, 0), "goes on from before the first bad step"


def test_early_stopping(classes: Path, tmp_path: Path) -> None:
    # With a rate of zero nothing improves after the first validation.
    result = train(classifier_config(classes, tmp_path / "run", val=classes, lr=0.0, epochs=9, patience=2))
    assert (result.finished, result.epochs) == (True, 3)
    assert train(classifier_config(classes, tmp_path / "run", val=classes, lr=0.0, epochs=9, patience=2)).epochs == 3


def test_a_full_disk_is_reported_before_training(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(CTMaskNetError, match=r"run: 0\.00 GB are free"):
        train(classifier_config(classes, tmp_path / "run"))


def test_a_folder_that_cannot_be_made_is_reported_before_training(classes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CTMaskNetError, match="file"):
        train(classifier_config(classes, tmp_path / "file" / "run"))


def test_slices_without_lesions_train_and_a_folder_of_nothing_else_does_not(tmp_path: Path) -> None:
    mixed = lesion_folder(tmp_path / "mixed", range(4, 6))
    result = train(segmenter_config(mixed, tmp_path / "run", epochs=1, batch_size=1, augment=False))
    assert result.skipped_steps == 0
    empty = lesion_folder(tmp_path / "empty", range(4, 5))
    with pytest.raises(DataError, match="lesion"):
        train(segmenter_config(empty, tmp_path / "none"))


def test_a_single_slice_is_enough(tmp_path: Path) -> None:
    data = lesion_folder(tmp_path / "one", range(2, 3))
    result = train(segmenter_config(data, tmp_path / "run", epochs=1, batch_size=2))
    assert (result.finished, result.steps) == (True, 1)


# --- the fast ways ------------------------------------------------------------------------------------------


def test_cached_rois_give_the_whole_models_outputs_and_gradients(classes: Path) -> None:
    torch.manual_seed(0)
    model = create_model(CLASSIFIER, replicate=False, **{k: v for k, v in SMALL.items() if "test" in k or "min" in k})
    images = [sample.image.expand(3, -1, -1) / 255 for sample in open_dataset("classification", classes)][:3]
    targets = [{"image_label": label} for label in (0, 1, 2)]
    alone = ModuleSOnRoIs(model)  # type: ignore[arg-type]
    inference = Inference(model.eval())
    rois = [find_rois(inference, image) for image in images]

    model.eval(), alone.eval()
    with torch.no_grad():
        expected = torch.stack([model([image])[0]["logits"] for image in images])
        torch.testing.assert_close(torch.stack([out["logits"] for out in alone(rois)]), expected, rtol=1e-4, atol=1e-4)
    model.train(), alone.train()
    gradients = []
    for module, inputs in ((model, images), (alone, rois)):
        module.zero_grad()
        module(inputs, targets)["loss_image"].backward()
        gradients.append([p.grad.clone() for p in model.module_s.parameters()])
    for whole, cached in zip(*gradients, strict=True):
        torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-6)


def test_training_size_applies_to_training_only(lesions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    seen: set[tuple[bool, int]] = set()
    resize = GeneralizedRCNNTransform.resize

    def watched(transform: Any, image: Tensor, target: Any = None) -> Any:
        resized, changed = resize(transform, image, target)
        seen.add((transform.training, min(resized.shape[-2:])))
        return resized, changed

    monkeypatch.setattr(GeneralizedRCNNTransform, "resize", watched)
    train(segmenter_config(lesions, tmp_path / "a", epochs=1, val=lesions, train_min_size=96))
    assert seen == {(True, 96), (False, 128)}


def test_bfloat16_stays_in_body_and_pyramid(lesions: Path, tmp_path: Path) -> None:
    result = train(segmenter_config(lesions, tmp_path / "run", epochs=1, precision="bfloat16"))
    assert result.skipped_steps == 0
    assert result.last is not None
    assert all(t.dtype in (torch.float32, torch.int64) for t in read_weights(result.last).tensors.values())


def test_workers_do_not_change_the_result(lesions: Path, tmp_path: Path) -> None:
    alone = train(segmenter_config(lesions, tmp_path / "alone", epochs=1))
    helped = train(segmenter_config(lesions, tmp_path / "helped", epochs=1, workers=1))
    assert losses_of(helped) == losses_of(alone)


@pytest.mark.slow
def test_the_first_try_of_the_tutorial_looks_like_success(tmp_path: Path) -> None:
    write_lesions(tmp_path / "mine", 8, size=256)
    write_lesions(tmp_path / "mine_val", 4, first=8, size=256)
    settings: dict[str, Any] = {"epochs": 4, "lr": 1e-4, "batch_size": 2, "model_options": {"min_size": 256}}
    config = TrainConfig(
        "maskrcnn_resnet18_t1", tmp_path / "mine", tmp_path / "run", val=tmp_path / "mine_val", weights="default",
        validation_loss=False, tensorboard=False, **settings,
    )  # fmt: skip
    result = train(config)
    assert result.best_epoch is not None
    start, best = result.history[0], result.history[result.best_epoch]
    assert best["ap50"] > start["ap50"]
    assert best["dice_pooled"] > start["dice_pooled"]
    predictor = Predictor(segmenter=result.best, classifier=None, device="cpu")
    assert len(predictor(tmp_path / "mine_val" / "imgs" / "2_patient10_1_1.png").scores) > 0
