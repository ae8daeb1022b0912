"""`open_model` and the factories' arguments: one answer to "which model", and what it says when there is none."""

from __future__ import annotations

import re

import golden
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from ctmasknet import ConfigError, WeightsError, create_model
from ctmasknet.registry import DEFAULT_CLASSIFIER, DEFAULT_SEGMENTER
from ctmasknet.zoo import open_model

SMALL = "maskrcnn_resnet18_t2"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = create_model(SMALL, num_classes=3)
    return model, model.save_pretrained(tmp_path_factory.mktemp("weights") / "mine")


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    values = other.state_dict()
    return all(torch.equal(value, values[key]) for key, value in one.state_dict().items())


def test_a_name_and_default_stand_for_the_default_weights():
    expected = create_model(DEFAULT_SEGMENTER, weights="default")
    for source in (DEFAULT_SEGMENTER, "default"):
        model = open_model(source, task="segmentation", device="cpu")
        assert same(model, expected)
        assert not model.training
    assert open_model("default", task="classification", device="cpu").variant.name == DEFAULT_CLASSIFIER
    with pytest.raises(ConfigError, match=f"of which task: {DEFAULT_SEGMENTER} or {DEFAULT_CLASSIFIER}"):
        open_model("default", device="cpu")


def test_a_folder_its_file_and_the_model_itself(saved):
    model, folder = saved
    for source in (folder, str(folder), folder / "model.safetensors", str(folder / "model.safetensors")):
        opened = open_model(source, device="cpu")
        assert same(opened, model)
        assert opened.config.num_classes == 3
    model.train()
    assert open_model(model, device="cpu") is model
    assert model.training, "a model passed in keeps its mode"
    model.eval()


def test_an_authors_checkpoint(tmp_path):
    path = golden.checkpoint(tmp_path / "released.pth", SMALL)
    for source in (path, str(path)):
        model = open_model(source, task="segmentation", device="cpu")
        assert model.variant.name == SMALL
    stem = golden.weights(SMALL)["backbone.body.conv1.weight"]
    assert torch.equal(model.backbone.body.conv1.weight, stem)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("maskrcnn_resnet18_t3", ConfigError, "maskrcnn_resnet18_t"),
        ("folder/that/is/not/there", WeightsError, "no such file or folder"),
        ("nowhere.safetensors", WeightsError, r"nowhere\.safetensors: no such file"),
        ("nowhere.pth", WeightsError, r"nowhere\.pth: no such file"),
        (3, ConfigError, "3: give the name of a variant"),
    ],
)
def test_what_is_no_model_is_named_with_the_fix(source, error, message):
    with pytest.raises(error, match=message):
        open_model(source, device="cpu")


def test_a_model_of_the_other_task_and_an_impossible_device_are_refused(saved):
    model, _ = saved
    with pytest.raises(ConfigError, match="is for segmentation, but a model for classification is needed"):
        open_model(model, task="classification", device="cpu")
    with pytest.raises(ConfigError, match="device='nonsense' cannot be used"):
        open_model(model, device="nonsense")


def test_create_model_says_what_to_write_for_pretrained():
    with pytest.raises(ConfigError, match=re.escape(f"create_model('{SMALL}', weights='default')")):
        create_model(SMALL, pretrained=True)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_backbone_takes_a_file_with_torchvisions_names(tmp_path, suffix):
    torch.manual_seed(3)
    body = torchvision.models.resnet18().state_dict()
    # As far as layer3, and without the counters, as some files come.
    kept = {k: v for k, v in body.items() if not k.startswith(("layer4.", "fc.")) and "num_batches" not in k}
    path = tmp_path / f"body{suffix}"
    torch.save(kept, path) if suffix == ".pth" else save_file(kept, path)
    for source in (path, str(path)):
        model = create_model("maskrcnn_resnet18_t1", weights_backbone=source)
        found = model.backbone.body.state_dict()
        assert all(torch.equal(found[key], value) for key, value in kept.items())
    with pytest.raises(WeightsError, match=r"body.*: not a resnet34: lacks layer1.2"):
        create_model("maskrcnn_resnet34_t2", weights_backbone=path)
    with pytest.raises(WeightsError, match=r"gone\.pth: no such file"):
        create_model("maskrcnn_resnet18_t1", weights_backbone="gone.pth")
    torch.save({"weights": kept}, tmp_path / "nested.pth")
    with pytest.raises(WeightsError, match="not a state dict"):
        create_model("maskrcnn_resnet18_t1", weights_backbone=tmp_path / "nested.pth")
