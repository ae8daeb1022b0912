"""Weights: files written and read whole, every damage reported, heads replaced when classes differ."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctmasknet import ConfigError, WeightsError, create_model, evaluate, from_pretrained, zoo
from ctmasknet.output import OutputError
from ctmasknet.registry import DEFAULT_CLASSIFIER, DEFAULT_SEGMENTER
from ctmasknet.weights import hub
from ctmasknet.weights.files import is_finite, read_weights, sha256_of, write_weights
from ctmasknet.weights.manifest import manifest
from ctmasknet.weights.publish import model_card

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
NAME = "ctmasknet_resnet18_t2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = create_model(NAME)
    return write_weights(
        tmp_path_factory.mktemp("weights"), model.state_dict(), variant=NAME, config=model.config.to_dict()
    )


def copy_of(folder: Path, tmp_path: Path) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_float32_round_trip_is_exact(tmp_path):
    model = create_model("maskrcnn_resnet18_t2", num_classes=3)
    write_weights(tmp_path, model.state_dict(), variant=model.variant.name, config=model.config.to_dict())
    again = from_pretrained(tmp_path)
    assert again.config == model.config
    assert type(again) is type(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def test_float16_is_storage_only(tmp_path):
    model = create_model(NAME)
    write_weights(tmp_path, model.state_dict(), variant=NAME, config=model.config.to_dict(), dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["module_s.fc1.weight"].dtype == torch.float16
    assert stored["backbone.body.bn1.num_batches_tracked"].dtype == torch.int64
    loaded = create_model(NAME, weights=tmp_path).state_dict()["module_s.fc1.weight"]
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, model.state_dict()["module_s.fc1.weight"], atol=1e-3, rtol=1e-3)


def test_a_file_alone_loads_too(folder, tmp_path):
    (tmp_path / "only.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert create_model(NAME, weights=tmp_path / "only.safetensors").variant.name == NAME
    with pytest.raises(WeightsError, match=r"no config\.json names the variant"):
        from_pretrained(tmp_path / "only.safetensors")


@pytest.mark.parametrize("name", [DEFAULT_SEGMENTER, DEFAULT_CLASSIFIER])
def test_the_bundled_weights_are_what_the_manifest_says(name):
    entry = next(entry for entry in manifest() if entry.variant == name)
    assert entry.path.stat().st_size == entry.bytes
    assert sha256_of(entry.path) == entry.sha256
    model = create_model(name, weights="default")
    assert model.metadata["license"] == entry.license == "cc-by-nc-sa-4.0"
    assert model.metadata["metrics"] == entry.metrics
    assert tuple(model.metadata["classes"]) == entry.classes
    card = (entry.path.parent / "README.md").read_text()
    assert card.startswith("---\n")
    assert "not a medical device" in card
    assert all(f"| {name} | {value} |" in card for name, value in entry.metrics.items())
    stored = read_weights(entry.path)
    assert card == model_card(model.variant, stored.metadata)


@pytest.mark.slow
@pytest.mark.parametrize("name", [DEFAULT_SEGMENTER, DEFAULT_CLASSIFIER])
def test_the_figures_of_the_bundled_weights_are_what_evaluate_gives(name):
    data = SHARED / "data" / ("lesions" if name == DEFAULT_SEGMENTER else "classes") / "val"
    if not data.is_dir():
        pytest.skip("no real slices here")
    stated = next(entry.metrics for entry in manifest() if entry.variant == name)
    found = evaluate(name, data, device="cpu", samples=0, progress=False).metrics
    if name == DEFAULT_SEGMENTER:
        figures = found["operating_point"] | {f"coco_{key}": value for key, value in found["coco"].items()}
    else:
        parts = {
            f"{part}_{key}": value for part in ("sensitivity", "auc") for key, value in found["slice"][part].items()
        }
        figures = {"accuracy": found["slice"]["accuracy"]} | parts
    assert {key: figures[key] for key in stated} == pytest.approx(stated, abs=0.002)


def test_the_page_of_results_says_what_the_cards_say():
    rows = (ROOT / "docs" / "results.md").read_text().splitlines()
    for entry in manifest():
        if entry.variant not in (DEFAULT_SEGMENTER, DEFAULT_CLASSIFIER):
            continue
        (row,) = (row for row in rows if row.startswith(f"| `{entry.variant}` (default)"))
        names = ("ap50", "ap75", "ap", "dice_pooled", "dice_mean", "false_positives_per_slice")
        if entry.variant == DEFAULT_CLASSIFIER:
            names = (*(f"sensitivity_{name}" for name in entry.classes), "accuracy")
        cells = [cell.strip() for cell in row.strip("|").split("|")][-len(names) :]
        rounded = [
            f"{entry.metrics[name]:.{len(cell.split('.')[1])}f}" for name, cell in zip(names, cells, strict=True)
        ]
        assert cells == rounded


def test_factories_and_create_model_give_the_same_weights():
    by_name = create_model(DEFAULT_SEGMENTER, weights="default").state_dict()
    by_factory = getattr(zoo, DEFAULT_SEGMENTER)(pretrained=True).state_dict()
    assert all(torch.equal(tensor, by_factory[key]) for key, tensor in by_name.items())


def test_weights_and_pretrained_together_raise():
    with pytest.raises(ConfigError, match="not both"):
        zoo.maskrcnn_resnet18_t2(weights="default", pretrained=True)


def test_a_variant_without_weights_says_which_have_some():
    with pytest.raises(WeightsError, match=f"no trained weights.*{DEFAULT_SEGMENTER}.*ctmasknet convert"):
        create_model("maskrcnn_resnet50", weights="default")


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_another_number_of_lesion_classes_keeps_all_but_the_heads(classes, caplog):
    stored = create_model(DEFAULT_SEGMENTER, weights="default").state_dict()
    with caplog.at_level(logging.WARNING):
        model = create_model(DEFAULT_SEGMENTER, weights="default", num_classes=classes)
    heads = ("cls_score", "roi_heads.box_predictor.bbox_pred", "mask_fcn_logits")
    for key, tensor in model.state_dict().items():
        if classes != 2 and any(head in key for head in heads):
            assert tensor.shape != stored[key].shape
            assert key in caplog.text
        else:
            assert torch.equal(tensor, stored[key]), key
    assert bool(caplog.records) == (classes != 2)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_another_number_of_image_classes_keeps_all_but_the_last_layer(classes, caplog):
    stored = create_model(DEFAULT_CLASSIFIER, weights="default").state_dict()
    model = create_model(DEFAULT_CLASSIFIER, weights="default", image_classes=classes)
    for key, tensor in model.state_dict().items():
        if classes != 3 and key.startswith("module_s.logits."):
            assert len(tensor) == classes
            assert key in caplog.text
        else:
            assert torch.equal(tensor, stored[key]), key


def test_an_impossible_number_of_classes_raises():
    with pytest.raises(ConfigError, match="num_classes=0"):
        create_model(DEFAULT_SEGMENTER, weights="default", num_classes=0)


def test_weights_of_another_variant_are_named(folder, tmp_path):
    with pytest.raises(WeightsError, match=f"holds {NAME}, not ctmasknet_resnet34_t2"):
        create_model("ctmasknet_resnet34_t2", weights=folder)
    file = tmp_path / "alone.safetensors"
    file.write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=rf"alone\.safetensors.*It holds {NAME}"):
        create_model("ctmasknet_resnet34_t2", weights=file)
    with pytest.raises(WeightsError, match="tensors"):
        create_model("maskrcnn_resnet18_t2", weights=file)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "nan", "complex", "whole"])
def test_loading_is_strict(change, folder, tmp_path):
    copy_of(folder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "module_s.fc1.weight"
    if change == "missing":
        del tensors[key]
    elif change == "extra":
        tensors["extra.weight"], key = torch.zeros(1), "extra.weight"
    elif change == "shape":
        tensors[key] = torch.zeros(2, 2)
    elif change == "nan":
        tensors[key][0, 0] = torch.nan
    else:
        tensors[key] = tensors[key].to(torch.complex64 if change == "complex" else torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=f"model.safetensors.*{key}"):
        create_model(NAME, weights=tmp_path)


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("name", ["model.safetensors", "weights.pth", "pytorch_model.bin"])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_posing_as_weights_is_refused_and_not_run(name, legacy, tmp_path):
    target = tmp_path / "executed"
    torch.save({"weights": Payload(target)}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=rf"{name}: not safetensors but a pickle.*load_released"):
        create_model(NAME, weights=tmp_path / name)
    assert not target.exists()


@pytest.mark.parametrize("size", [0, 5, 4000, -10])
def test_truncated_files_are_refused(size, folder, tmp_path):
    copy_of(folder, tmp_path)
    file = tmp_path / "model.safetensors"
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a readable"):
        create_model(NAME, weights=tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(WeightsError, match="nowhere: no such file"):
        create_model(NAME, weights=tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"holds no model\.safetensors"):
        create_model(NAME, weights=tmp_path)
    with pytest.raises(WeightsError, match="use None, 'default', or the path"):
        create_model(NAME, weights=7)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("library", "other", "not a config.json of this library"),
        ("format", 99, "format 99"),
        ("format", "1", "format='1': a whole number is needed"),
        ("variant", "resnet999", "unknown variant"),
        ("config", [], "a mapping is needed"),
        ("surprise", 1, "unknown field 'surprise'"),
        ("metadata", {"surprise": 1}, "unknown field 'surprise'"),
        ("metadata", {"operating_point": {"score_threshold": "low"}}, "a finite number is needed"),
        ("metadata", {"operating_point": {"nms_threshold": 3}}, "must lie in 0..1"),
        ("metadata", {"derived_from": [3]}, "a mapping is needed"),
        ("config", {"nonsense": 1}, "unknown option 'nonsense'"),
        ("config", {"num_classes": "two"}, "whole number"),
        ("config", {"roi_score": "__import__('os')"}, "'softmax' or 'sigmoid'"),
    ],
)
def test_a_config_is_data_and_checked(field, value, message, folder, tmp_path):
    copy_of(folder, tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises((WeightsError, ConfigError), match=message) as caught:
        create_model(NAME, weights=tmp_path)
    assert "config.json" in str(caught.value)


def test_a_config_that_is_no_json_is_refused(folder, tmp_path):
    copy_of(folder, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="not readable JSON"):
        create_model(NAME, weights=tmp_path)


def test_a_failed_write_leaves_what_was_there(folder, tmp_path, monkeypatch):
    copy_of(folder, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"model\.safetensors: cannot be written \(No space left on device\)"):
        write_weights(tmp_path, {}, variant=NAME, config={}, card="other")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_changed_bundled_file_is_not_loaded(folder, monkeypatch):
    entry = next(entry for entry in manifest() if entry.variant == DEFAULT_SEGMENTER)
    monkeypatch.setattr(hub, "default_entry", lambda variant: replace(entry, sha256="0" * 64))
    with pytest.raises(WeightsError, match="do not match their hash"):
        create_model(DEFAULT_SEGMENTER, weights="default")
    monkeypatch.setattr(hub, "default_entry", lambda variant: replace(entry, bytes=1))
    with pytest.raises(WeightsError, match="missing or damaged"):
        create_model(DEFAULT_SEGMENTER, weights="default")


def test_read_weights_tells_what_the_config_says(folder):
    stored = read_weights(folder)
    assert stored.variant == NAME
    assert stored.config["num_classes"] == 2


def test_a_card_claims_only_what_is_stated():
    model = create_model(NAME)
    bare = model_card(model.variant, {})
    assert "## Measured" not in bare
    assert "## Data" not in bare
    stated = model_card(model.variant, {"metrics": {"accuracy": 0.5}, "license": "mit"})
    assert "| accuracy | 0.5 |" in stated
    assert "license: mit" in stated
    point = model_card(model.variant, {"operating_point": {"nms_threshold": 0.3}})  # either threshold may be missing
    assert "is set: NMS at 0.3." in point


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint16, torch.bool])
def test_is_finite_is_torchs_isfinite(dtype):
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(3, 50, generator=generator) * 200 - 100).to(dtype)
    assert is_finite(values)
    assert is_finite(values[:0])
    assert is_finite(values[0, 0])
    if dtype.is_floating_point:
        for bad in (float("nan"), float("inf"), -float("inf")):
            spoilt = values.clone()
            spoilt[1, 20] = bad
            assert not is_finite(spoilt)
            assert not spoilt.isfinite().all()
