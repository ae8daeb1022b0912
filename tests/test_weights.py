"""Weights: files written and read whole, every damage reported, heads replaced when classes differ."""

from __future__ import annotations

import json
import logging
import os
import struct
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train_bundled
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ctmasknet import (
    ConfigError,
    CTMaskNetError,
    WeightsError,
    create_model,
    evaluate,
    from_pretrained,
    get_variant,
    zoo,
)
from ctmasknet.cli import main
from ctmasknet.models.config import ModelConfig, model_config
from ctmasknet.output import OutputError
from ctmasknet.registry import DEFAULT_CLASSIFIER, DEFAULT_SEGMENTER
from ctmasknet.weights import hub
from ctmasknet.weights.files import is_finite, read_weights, sha256_of
from ctmasknet.weights.manifest import manifest
from ctmasknet.weights.publish import model_card, write_weights

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
NAME = "ctmasknet_resnet18_t2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return create_model(NAME).save_pretrained(tmp_path_factory.mktemp("weights"))


def copy_of(folder: Path, tmp_path: Path) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_float16_is_storage_only(tmp_path):
    model = create_model(NAME)
    model.save_pretrained(tmp_path, dtype="float16")
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
def test_the_figures_of_the_bundled_weights_are_what_evaluate_gives(name, tmp_path):
    if not (SHARED / "data").is_dir():
        pytest.skip("no real slices here")
    stated = next(entry.metrics for entry in manifest() if entry.variant == name)
    if name == DEFAULT_SEGMENTER:
        found = evaluate(name, SHARED / "data" / "lesions" / "val", device="cpu", samples=0, progress=False).metrics
        figures = found["operating_point"] | {f"coco_{key}": value for key, value in found["coco"].items()}
    else:
        train_bundled.link_slices(Namespace(data=SHARED / "data", out=tmp_path, aside=[]))
        figures = train_bundled.classifier_figures(DEFAULT_SEGMENTER, name, tmp_path / "slices" / "val")
    assert {key: figures[key] for key in stated} == pytest.approx(stated, abs=0.002)


def test_the_page_of_results_says_what_the_cards_say():
    rows = (ROOT / "docs" / "results.md").read_text().splitlines()
    for entry in manifest():
        row = next(row for row in rows if row.startswith(f"| `{entry.variant}` "))
        names = ("ap50", "ap75", "ap", "dice_pooled", "dice_mean", "false_positives_per_slice")
        if get_variant(entry.variant).task == "classification":
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


@pytest.mark.parametrize("length", [0x80, 0x280])
def test_a_header_whose_length_begins_like_a_pickle_is_read(length, tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + header + struct.pack("<f", 7))
    assert read_weights(tmp_path / "a.safetensors").tensors["a"].item() == 7


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
        ("variant", "resnet999", "variant 'resnet999' is unknown"),
        ("config", [], "a mapping is needed"),
        ("surprise", 1, "unknown field 'surprise'"),
        ("metadata", {"surprise": 1}, "unknown field 'surprise'"),
        ("metadata", {"operating_point": {"score_threshold": "low"}}, "a finite number is needed"),
        ("metadata", {"operating_point": {"nms_threshold": 3}}, "must lie in 0..1"),
        ("metadata", {"derived_from": [3]}, "a mapping is needed"),
        ("metadata", {"metrics": {"ap50": None}}, r"metrics\['ap50'\]=None: a finite number"),
        ("metadata", {"derived_from": [{"variant": []}]}, "text or null is needed"),
        ("metadata", {"classes": ["a", "\x1b[2J"]}, r"class '\\x1b\[2J'"),
        ("metadata", {"classes": ["a", "b" * 10_000]}, r"class 'b+\.\.\.b+'"),
        ("variant", ["x" * 10_000] * 10, "text is needed"),
        ("config", {"num_classes": 10**6}, r"num_classes=1000000: must lie in 1\.\.1000"),
        ("config", {"image_classes": 10**6}, r"image_classes=1000000: must lie in 1\.\.1000"),
        ("config", {"max_size": 10**9}, r"1\.\.8192"),
        ("config", {"box_detections_per_img": 10**9}, r"1\.\.100000"),
        ("config", {"anchor_sizes": [1] * 10**4}, "10000 anchor sizes x 6 ratios: at most 256"),
        ("config", {"anchor_sizes": [[[1]]]}, "is needed"),
        ("config", {"box_score_thresh": None}, "a finite number is needed"),
        ("config", {"image_mean": [0.5, None, 0.5]}, "a finite number is needed"),
        ("config", {"nonsense": 1}, "unknown option 'nonsense'"),
        ("config", {"variant": "maskrcnn_resnet18_t2"}, "unknown option 'variant'"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ('{"a": ' + "[" * 10**5, "recursion"),
        ('{"a": ' + "1" * 5000 + "}", "digits"),
        ('{"a": Infinity}', "Infinity is not a finite number"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"a": [' + "1," * 10**6, "larger than 1000000 bytes"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_a_config_that_is_no_json_is_refused(content, message, folder, tmp_path):
    copy_of(folder, tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WeightsError, match=rf"config\.json: .*{message}") as caught:
        create_model(NAME, weights=tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (2**60, b"{}"),
        (None, b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'),
        (None, b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,4]}}'),
        (None, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}'),
        (None, b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}'),
        (None, b'{"a":' + b"[" * 10**5),
        (None, b"\xff\xfe"),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(length, header, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(4))
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a readable"):
        read_weights(file)


def test_weights_that_compute_nothing_finite_are_not_saved(tmp_path):
    model = create_model(NAME)
    with torch.no_grad():
        model.backbone.fpn.layer_blocks[0][0].weight.mul_(1e38)
    with pytest.raises(WeightsError, match="not finite"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_what_was_there(folder, tmp_path, monkeypatch):
    copy_of(folder, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"model\.safetensors: cannot be written \(No space left on device\)"):
        write_weights(tmp_path, {}, variant=NAME, config={}, metadata={"note": "other"}, golden=False)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_changed_bundled_file_is_not_loaded(folder, monkeypatch):
    entry = next(entry for entry in manifest() if entry.variant == DEFAULT_SEGMENTER)
    monkeypatch.setattr(hub, "default_entry", lambda variant: replace(entry, sha256="0" * 64))
    with pytest.raises(WeightsError, match="missing or damaged"):
        create_model(DEFAULT_SEGMENTER, weights="default")
    monkeypatch.setattr(hub, "default_entry", lambda variant: replace(entry, file="bundled/gone.safetensors"))
    with pytest.raises(WeightsError, match="missing or damaged"):
        create_model(DEFAULT_SEGMENTER, weights="default")


def test_verify_tells_a_sound_folder_from_a_changed_one(tmp_path, capsys):
    model = create_model("maskrcnn_resnet18_t2", min_size=64, max_size=128)
    folder = model.save_pretrained(tmp_path / "saved")
    assert main(["verify", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    sha256 = sha256_of(folder / "model.safetensors")
    assert said == {"variant": "maskrcnn_resnet18_t2", "sha256": sha256, "manifest": None}
    tensors = load_file(folder / "model.safetensors")
    tensors["rpn.head.cls_logits.bias"] += 1e-6  # far too little for the outputs to tell
    save_file(tensors, folder / "model.safetensors")
    assert main(["verify", str(folder)]) == 2
    assert "recorded of other weights" in capsys.readouterr().err
    (folder / "golden.safetensors").unlink()
    assert main(["verify", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


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
    assert "## Known failures" in model_card(get_variant("maskrcnn_resnet50"), {})
    assert "## Known failures" not in bare  # they are of what segmenters mark


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


# --- properties


def plain(leaves: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[Any]:
    """Any value of JSON."""
    leaves = leaves or st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    return st.recursive(
        leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9), inner), max_leaves=9
    )


FIELDS = [field.name for field in fields(ModelConfig)]
FACTS = {"library": "ctmasknet", "format": 1, "variant": "maskrcnn_resnet50", "config": {}, "metadata": {}}
METADATA = ("classes", "operating_point", "metrics", "training", "dataset", "license", "note", "derived_from")


@given(
    facts=st.dictionaries(st.sampled_from([*FACTS, "x"]), plain(), max_size=2),
    config=st.dictionaries(st.sampled_from([*FIELDS, "x"]), plain(), max_size=3),
    metadata=st.dictionaries(st.sampled_from(METADATA), plain(), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_whatever_a_config_says_it_is_taken_or_refused_by_name(tmp_path_factory, facts, config, metadata):
    folder = tmp_path_factory.getbasetemp() / "said"
    folder.mkdir(exist_ok=True)
    save_file({}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(FACTS | {"config": config, "metadata": metadata} | facts))
    try:
        stored = read_weights(folder)
        variant = get_variant(stored.variant)
        config = model_config(variant, **stored.config)
        model_card(variant, stored.metadata).encode()
    except CTMaskNetError as error:
        config = None
        said = str(error)
    else:
        said = json.dumps(config.to_dict(), allow_nan=False)
    assert len(said) < 5000


POSITIVE = st.floats(1e-3, 1e6)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "num_classes": st.integers(2, 1000),
        "image_classes": st.integers(2, 1000),
        "roi_score": st.sampled_from(["softmax", "sigmoid"]),
        "drop_empty": st.booleans(),
        "anchor_sizes": st.lists(POSITIVE, min_size=1, max_size=8).map(tuple),
        "anchor_ratios": st.lists(POSITIVE, min_size=1, max_size=8).map(tuple),
        "box_score_thresh": st.floats(-1, 2),
        "box_nms_thresh": st.floats(0, 1),
        "min_size": st.integers(1, 1024),
        "image_std": st.tuples(POSITIVE, POSITIVE, POSITIVE),
    },
)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool])
SHAPES = st.lists(st.integers(0, 4), max_size=4)


@given(config=CONFIGS, shapes=st.dictionaries(st.text(max_size=30), st.tuples(DTYPES, SHAPES)), text=st.text())
@settings(max_examples=100, deadline=None)
def test_configs_and_tensors_come_back_as_they_were(tmp_path_factory, config, shapes, text):
    generator = torch.Generator().manual_seed(len(text))
    tensors = {
        key: (torch.randn(shape, generator=generator) * 100).to(dtype)
        for key, (dtype, shape) in shapes.items()
        if key != "__metadata__" and key.isprintable()
    }
    options = model_config(get_variant(NAME), **config).to_dict()
    metadata = {"note": text.encode("utf-8", "ignore").decode(), "metrics": {"ap50": 0.1}, "training": {"lr": 1e-5}}
    folder = tmp_path_factory.getbasetemp() / "trip"
    write_weights(folder, tensors, variant=NAME, config=options, metadata=metadata, golden=False)
    stored = read_weights(folder)
    assert stored.metadata == metadata
    assert model_config(get_variant(NAME), **stored.config).to_dict() == options
    assert stored.tensors.keys() == tensors.keys()
    for key, tensor in tensors.items():
        expected = tensor.float() if tensor.is_floating_point() else tensor
        assert stored.tensors[key].dtype == expected.dtype
        assert torch.equal(stored.tensors[key], expected)
