"""`open_model` and the factories' arguments: one answer to "which model", and what it says when there is none."""

from __future__ import annotations

import pathlib
import re

import golden
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from ctmasknet import ConfigError, WeightsError, create_model, from_pretrained
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
    with pytest.raises(ConfigError, match=f"for which task: give {DEFAULT_SEGMENTER} or {DEFAULT_CLASSIFIER}"):
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
    model, folder = saved
    with pytest.raises(ConfigError, match="is for segmentation, but a model for classification is needed"):
        open_model(model, task="classification", device="cpu")
    for load, source in ((open_model, model), (from_pretrained, folder)):
        with pytest.raises(ConfigError, match="device='nonsense' cannot be used"):
            load(source, device="nonsense")


def test_create_model_says_what_to_write_for_pretrained():
    with pytest.raises(ConfigError, match=re.escape(f"create_model('{SMALL}', weights='default')")):
        create_model(SMALL, pretrained=True)


def resnet18_file(path):
    """A ResNet18 with statistics of its own, as torchvision names its values, cut after the third stage.

    The counters of BatchNorm are left out of the file, as from some.
    """
    torch.manual_seed(0)
    body = torchvision.models.resnet18()
    for module in body.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.6, 1.4)
    kept = {key: t for key, t in body.state_dict().items() if not re.search(r"^layer4|^fc|num_batches", key)}
    if path.suffix == ".safetensors":
        save_file(kept, path)
    else:
        torch.save(kept, path)
    return body.eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_resnet18_body_starts_from_a_file_and_a_resnet34_computes_the_same(tmp_path, suffix):
    path = tmp_path / f"body{suffix}"
    theirs = resnet18_file(path)
    image = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        expected = theirs.layer2(theirs.layer1(x))
        for name in ("maskrcnn_resnet18_t2", "maskrcnn_resnet34_t2"):
            body = create_model(name, weights_backbone=path).backbone.body
            torch.testing.assert_close(body(image)[-1], expected, atol=1e-5, rtol=1e-4)
        third = create_model("maskrcnn_resnet34_t1", weights_backbone=str(path)).backbone.body(image)[-1]
        torch.testing.assert_close(third, theirs.layer3(expected), atol=1e-5, rtol=1e-4)
    with pytest.raises(WeightsError, match="not a resnet50"):
        create_model("maskrcnn_resnet50", weights_backbone=path)
    with pytest.raises(WeightsError, match=r"not a resnet18: tensors \d+ missing \(first: layer4"):
        create_model("maskrcnn_resnet18", weights_backbone=path)


def test_a_body_that_is_a_pickle_of_something_else_is_refused_and_not_run(tmp_path):
    path = tmp_path / "body.pth"
    torch.save({"conv1.weight": torch.zeros(1), "x": pathlib.PurePosixPath("x")}, path)
    with pytest.raises(WeightsError, match=r"body\.pth"):
        create_model(SMALL, weights_backbone=path)
    torch.save({"weights": {"conv1.weight": torch.zeros(1)}}, path)
    with pytest.raises(WeightsError, match=r"body\.pth: not a state dict"):
        create_model(SMALL, weights_backbone=path)
    with pytest.raises(WeightsError, match=r"gone\.pth: no such file"):
        create_model(SMALL, weights_backbone="gone.pth")
