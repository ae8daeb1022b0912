"""`precision="int8"`: what the bundled int8 networks find, and that they run only with the weights they belong to."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phantom import phantom
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.ops import box_iou

import ctmasknet
from ctmasknet import ConfigError, Predictor, WeightsError, create_model, export, from_pretrained
from ctmasknet.cli import main
from ctmasknet.models.inference import Inference
from ctmasknet.weights.files import CONFIG_NAME, INT8_NAME, sha256_of

BUNDLED = Path(ctmasknet.__file__).parent / "weights" / "bundled"
HAVING = [path.parent.name for path in sorted(BUNDLED.glob(f"*/{INT8_NAME}"))]
NAME = "maskrcnn_resnet18_t1"

runs = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="needs a processor with AVX-512 VNNI")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLED / NAME, tmp_path / "weights"))


def slices() -> list[Tensor]:
    return [torch.from_numpy(phantom(seed).image).float().div(255).expand(3, -1, -1) for seed in range(4)]


def test_the_default_segmenter_and_classifier_have_one():
    assert {NAME, "ctmasknet_resnet18_t1"} <= set(HAVING)


@runs
@pytest.mark.parametrize("name", HAVING)
@torch.inference_mode()
def test_it_finds_nearly_what_the_plain_model_finds(name: str):
    model = create_model(name, weights="default")
    inference = Inference(model, "int8")
    matched = []
    for image, reading in zip(slices(), inference.read(slices()), strict=True):
        (plain,) = model([image])
        if model.variant.task == "segmentation":
            (found,) = inference.detect(reading, ctmasknet.models.inference.Protocol.of(model))
            best = box_iou(plain["boxes"], found.boxes).amax(1)
            matched += (best[plain["scores"] > 0.6] > 0.7).tolist()
        else:
            gap = (plain["probabilities"] - inference.classify(reading)["probabilities"]).abs()
            matched.append(bool(gap.max() < 0.1))
    assert len(matched) >= 4
    assert np.mean(matched) > 0.85


@runs
def test_threads_may_share_it_and_neighbours_change_nothing():
    predictor = Predictor(precision="int8", device="cpu")
    images = [phantom(seed, size=size).image for seed, size in ((0, 512), (1, 256), (2, 512), (3, 384))]
    alone = [predictor(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(predictor, images))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.scores, other.scores)
        np.testing.assert_array_equal(one.masks, other.masks)
        assert one.class_probabilities == other.class_probabilities


@runs
def test_the_exported_pair_gives_what_inference_runs(tmp_path: Path):
    openvino = pytest.importorskip("openvino")
    model = create_model(NAME, weights="default")
    exported = export(model, tmp_path / "int8.xml", format="openvino")
    assert "AP@0.5" in exported.metadata["int8"]
    compiled = openvino.compile_model(tmp_path / "int8.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    values = torch.rand(1, 3, 256, 320)
    expected = [part for kind in Inference(model, "int8")._network(values) for part in kind]
    names = [f"{kind}.0" for kind in ("features", "objectness", "deltas")]
    found = compiled(values.numpy())
    for name, mine in zip(names, expected, strict=True):
        np.testing.assert_allclose(found[name], mine, atol=1e-5)
    assert [tuple(found[name].shape) for name in names] == [(1, 256, 16, 20), (1, 16, 20, 30), (1, 16, 20, 120)]


def test_the_command_writes_the_pair_or_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", NAME, "--format", "openvino", "-o", str(tmp_path / "a.xml")]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"a.xml", "a.bin"}
    assert "AP@0.5" in capsys.readouterr().out
    assert main(["export", NAME, "--format", "openvino", "-o", str(tmp_path / "a.onnx")]) == 2
    assert "name the .xml" in capsys.readouterr().err


def test_weights_without_one_are_refused(tmp_path: Path):
    model = create_model("maskrcnn_resnet18_t2")
    with pytest.raises(ConfigError, match="have no int8 network"):
        export(model, tmp_path / "a.xml", format="openvino")
    with pytest.raises(ConfigError, match="int8"):
        Inference(model, "int8")


def test_a_processor_that_would_give_other_results_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ConfigError, match="VNNI"):
        Inference(create_model(NAME, weights="default"), "int8")


def test_it_runs_with_no_other_weights(folder: Path):
    model = from_pretrained(folder)
    model.int8_network(model)
    with torch.no_grad():
        model.rpn.head.bbox_pred.bias += 1e-3
    with pytest.raises(WeightsError, match="other weights"):
        model.int8_network(model)


def test_what_is_saved_anew_has_none(folder: Path, tmp_path: Path):
    saved = from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert from_pretrained(saved).int8_network is None
    assert not (saved / INT8_NAME).exists()


@pytest.mark.parametrize("change", ["missing", "cut", "keys"])
def test_a_damaged_file_is_named(change: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    file = folder / INT8_NAME
    if change == "missing":
        file.unlink()
    elif change == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        save_file({"network": load_file(file)["network"]}, file)
        state(folder, sha256_of(file))
    model = from_pretrained(folder)
    with pytest.raises(WeightsError, match=INT8_NAME):
        model.int8_network(model)
    assert main(["verify", str(folder)]) == 2
    assert INT8_NAME in capsys.readouterr().err


@runs
def test_a_network_that_is_none_is_named(folder: Path):
    pytest.importorskip("openvino")
    tensors = load_file(folder / INT8_NAME)
    save_file(tensors | {"network": tensors["network"][:1000].clone()}, folder / INT8_NAME)
    state(folder, sha256_of(folder / INT8_NAME))
    with pytest.raises(WeightsError, match="OpenVINO cannot read"):
        Inference(from_pretrained(folder), "int8")


def state(folder: Path, sha256: str) -> None:
    facts: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text())
    facts["metadata"]["int8"]["sha256"] = sha256
    (folder / CONFIG_NAME).write_text(json.dumps(facts))
