"""Training configs: recipes, files, and the mistakes they catch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctmasknet import ConfigError, create_model
from ctmasknet.engine import RECIPES, TrainConfig
from ctmasknet.engine.setup import initial_model

SEGMENTER, CLASSIFIER = "maskrcnn_resnet18_t1", "ctmasknet_resnet18_t1"
PAPER_SAMPLING = {
    "rpn_pre_nms_top_n_train": 2000,
    "rpn_post_nms_top_n_train": 2000,
    "rpn_batch_size_per_image": 256,
    "rpn_positive_fraction": 0.75,
    "rpn_fg_iou_thresh": 0.7,
    "rpn_bg_iou_thresh": 0.3,
    "box_batch_size_per_image": 256,
    "box_positive_fraction": 0.75,
    "box_fg_iou_thresh": 0.75,
    "box_bg_iou_thresh": 0.5,
}


@pytest.mark.parametrize(("model", "batch_size", "epochs"), [(SEGMENTER, 1, 100), (CLASSIFIER, 8, 50)])
def test_paper_recipe_is_the_papers_schedule(model: str, batch_size: int, epochs: int) -> None:
    config = TrainConfig(model, "data", "out", recipe="paper")
    assert (config.optimizer, config.lr, config.weight_decay) == ("adam", 1e-5, 1e-3)
    assert (config.batch_size, config.epochs, config.schedule) == (batch_size, epochs, "constant")
    assert (config.augment, config.ema, config.clip_norm, config.precision) == (False, 0.0, 0.0, "float32")
    # Paper, section 3, and its released code; a classifier trains neither RPN nor RoI heads.
    assert config.model_options == (PAPER_SAMPLING if model == SEGMENTER else {})


@pytest.mark.parametrize("model", [SEGMENTER, CLASSIFIER])
@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_a_recipe_leaves_no_field_open(model: str, recipe: str) -> None:
    config = TrainConfig(model, "data", "out", recipe=recipe)
    filled = RECIPES[config.task][recipe]
    assert {name: getattr(config, name) for name in filled} == filled


@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_how_training_samples_is_the_recipes_business_not_the_start_weights(recipe: str, tmp_path: Path) -> None:
    other = {"rpn_pre_nms_top_n_train": 500, "rpn_post_nms_top_n_train": 300, "rpn_batch_size_per_image": 8}
    other |= {"rpn_positive_fraction": 0.1, "rpn_fg_iou_thresh": 0.6, "rpn_bg_iou_thresh": 0.2}
    other |= {"box_batch_size_per_image": 64, "box_positive_fraction": 0.1}
    other |= {"box_fg_iou_thresh": 0.4, "box_bg_iou_thresh": 0.4}
    create_model(SEGMENTER, min_size=128, **other).save_pretrained(tmp_path)  # type: ignore[arg-type]
    config = TrainConfig(SEGMENTER, "data", "out", recipe=recipe, weights=tmp_path)
    made = initial_model(config, ("background", "lesion")).config
    assert made.min_size == 128, "what does not belong to training is the weights' own"
    if recipe == "paper":
        assert {name: getattr(made, name) for name in PAPER_SAMPLING} == PAPER_SAMPLING
    assert not any(getattr(made, name) == value for name, value in other.items())


def test_given_fields_win_over_the_recipe() -> None:
    config = TrainConfig(SEGMENTER, "data", "out", lr=1e-3, epochs=3, augment=False, model_options={"min_size": 256})
    assert (config.lr, config.epochs, config.augment) == (1e-3, 3, False)
    assert config.model_options["min_size"] == 256
    assert config.model_options["box_fg_iou_thresh"] == 0.5, "options of the recipe that were not given stay"


def test_plain_values_make_the_same_config(tmp_path: Path) -> None:
    config = TrainConfig(SEGMENTER, [tmp_path / "a", tmp_path / "b"], tmp_path / "out", augmentation={"flip": 1})
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", ["run.json", "run.yaml"])
def test_files_of_both_kinds_are_read(tmp_path: Path, name: str) -> None:
    text = {
        "run.json": f'{{"model": "{SEGMENTER}", "data": ["a", "b"], "out": "o", "lr": 0.001, "val": null}}',
        "run.yaml": f"model: {SEGMENTER}\ndata: [a, b]\nout: o\nlr: 0.001\nval:\n",
    }[name]
    (tmp_path / name).write_text(text)
    config = TrainConfig.from_file(tmp_path / name, epochs=7)
    assert (config.data, config.out, config.lr, config.val, config.epochs) == (["a", "b"], "o", 0.001, None, 7)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("epoch", 3, "did you mean epochs"),
        ("epochs", "three", "whole number"),
        ("epochs", True, "whole number"),
        ("epochs", 2.5, "whole number"),
        ("epochs", 0, "at least 1"),
        ("lr", "1e-4", "number"),
        ("lr", -1.0, "at least 0"),
        ("lr", float("nan"), "finite"),
        ("augment", 1, "true or false"),
        ("precision", "auto", "'float32' or 'bfloat16'"),
        ("device", "gpu", "device"),
        ("names", [1], "text"),
        ("optimizer", "sgd", "'adamw' or 'adam'"),
        ("classes", "all", "'merge' or 'both' or 'ggo'"),
        ("data", 5, "text or a list"),
        ("data", ["a", 5], "text"),
        ("model", "resnet99", "resnet99"),
        ("recipe", "slow", "'fast' or 'paper'"),
        ("model_options", {"box_nms": 0.5}, "box_nms_thresh"),
        ("model_options", [1], "mapping"),
        ("augmentation", {"rotation": 5}, "rotate"),
        ("augmentation", {"flip": "yes"}, "number"),
        ("augmentation", {"flip": 2}, "from 0 to 1"),
        ("score_threshold", 1.5, "0..1"),
        ("cache_rois", True, "segmenter"),
        ("resume", True, "auto"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, field: str, value: object, said: str) -> None:
    fields = {"model": SEGMENTER, "data": "data", "out": "out", field: value}
    with pytest.raises(ConfigError, match="run file") as error:
        TrainConfig.from_dict(fields, source="run file")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["model", "data", "out"])
def test_a_missing_field_is_named(missing: str) -> None:
    fields = {"model": SEGMENTER, "data": "data", "out": "out"}
    del fields[missing]
    with pytest.raises(ConfigError, match=f"'{missing}' is missing"):
        TrainConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", "model: [1,"), ("a.json", "{"), ("a.yaml", "- just\n- a list"), ("a.yaml", "")]
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
        TrainConfig.from_file(tmp_path / name)
    with pytest.raises(ConfigError, match="absent"):
        TrainConfig.from_file(tmp_path / "absent.yaml")
