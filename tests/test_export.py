"""Exported files: run by onnxruntime alone, compared with the models."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_data import class_folder, classifier_config
from huggingface_hub import ModelCard
from phantom import phantom
from torch.nn import functional as F
from torch.onnx.operators import shape_as_tensor

import ctmasknet
from ctmasknet import cli, exporting
from ctmasknet.errors import ConfigError, MissingExtraError
from ctmasknet.exporting import ExportError, batch_rows, resized_size
from ctmasknet.models.classifier import replication_counts
from ctmasknet.output import OutputError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SHARED = Path(__file__).parents[2] / "shared"
SMALL = {"min_size": 96, "max_size": 192, "rpn_pre_nms_top_n_test": 200, "rpn_post_nms_top_n_test": 50}
ATOL = {"boxes": 1e-2, "scores": 1e-4, "logits": 1e-4, "probabilities": 1e-4, "labels": 0, "deltas": 1e-3}


def spread_model(name, **options):
    """Random weights whose scores lie apart, around 0.5: rounding would put nearly equal ones in another order."""
    torch.manual_seed(0)
    model = ctmasknet.create_model(name, **(SMALL | options))
    with torch.no_grad():
        image = slices()[2]
        for level, feature in zip(model.backbone.fpn.layer_blocks, model.backbone(image[None]).values(), strict=True):
            level[0].weight.div_(feature.std())
        model.rpn.head.cls_logits.weight.mul_(8)
        predictor, heads = model.roi_heads.box_predictor, model.roi_heads
        predictor.cls_score.weight.mul_(5)
        predictor.cls_score.bias.zero_()
        threshold, heads.score_thresh = heads.score_thresh, -1.0
        predictor.cls_score.bias[0] += model([image])[0]["scores"].median().logit()
        heads.score_thresh = threshold
    return model


def slices():
    """The phantom, and others of other sizes and sides."""
    image = torch.from_numpy(phantom(1).image).float().div(255).expand(3, -1, -1)
    resized = F.interpolate(image[None], (300, 411), mode="bilinear")[0]
    return [image, resized, image[:, 150:250, 50:450], image[:, 33:433, 201:370]]


def run(path, image):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": image.numpy()}), strict=True))


@torch.no_grad()
def assert_matches(path, model, image):
    """Row by row, masks included; returns the number of regions."""
    expected, given = model([image])[0], run(path, image)
    assert set(given) == set(expected)
    for name, values in expected.items():
        assert given[name].shape == tuple(values.shape), name
        if name == "masks":
            assert given[name].shape[2:] == tuple(image.shape[1:])
            assert np.sum((given[name] > 0.5) != (values.numpy() > 0.5)) <= 1e-4 * values.numel()
        else:
            np.testing.assert_allclose(given[name], values.numpy(), rtol=0, atol=ATOL[name], err_msg=name)
    return len(expected["scores"])


@pytest.fixture(scope="module")
def segmenter_file(tmp_path_factory):
    """A segmenter of two lesion classes."""
    model = spread_model("maskrcnn_resnet18_t2", num_classes=3, box_score_thresh=0.4, box_detections_per_img=20)
    path = tmp_path_factory.mktemp("segmenter") / "model.onnx"
    return model, path, ctmasknet.export(model, path)


def test_the_onnx_segmenter_gives_what_the_model_gives_at_any_image_size(segmenter_file):
    model, path, _ = segmenter_file
    counts = [assert_matches(path, model, image) for image in slices()]
    assert max(counts) > 5


def test_the_onnx_segmenter_gives_empty_outputs_where_nothing_is_found(tmp_path):
    model = spread_model("maskrcnn_resnet18_t2", box_score_thresh=0.9999)
    model.roi_heads.box_predictor.cls_score.bias.data[0] = 50
    ctmasknet.export(model, tmp_path / "model.onnx")
    assert [assert_matches(tmp_path / "model.onnx", model, image) for image in slices()] == [0, 0, 0, 0]


@pytest.mark.parametrize("replicate", [True, False])
def test_the_onnx_classifier_gives_what_the_model_gives_with_few_regions_or_none(tmp_path, replicate):
    model = spread_model("ctmasknet_resnet18_t2", replicate=replicate, box_score_thresh=0.45)
    model.metadata["temperature"] = 2.5
    ctmasknet.export(model, tmp_path / "model.onnx")
    assert min(assert_matches(tmp_path / "model.onnx", model, image) for image in slices()) > 0
    model.roi_heads.score_thresh = 2.0
    ctmasknet.export(model, tmp_path / "none.onnx")
    assert assert_matches(tmp_path / "none.onnx", model, slices()[1]) == 0


def test_a_segmenter_is_exported_at_the_operating_point_of_its_weights(tmp_path):
    model = spread_model("maskrcnn_resnet18_t2")
    model.metadata["operating_point"] = {"score_threshold": 0.3, "nms_threshold": 0.2}
    model = ctmasknet.from_pretrained(model.save_pretrained(tmp_path / "weights"))
    exported = ctmasknet.export(model, tmp_path / "model.onnx")
    thresholds = json.loads(exported.metadata["thresholds"])
    assert (thresholds["score"], thresholds["nms"]) == (0.3, 0.2)
    with torch.no_grad():
        found = len(model(slices()[:1])[0]["scores"])
    assert len(run(tmp_path / "model.onnx", slices()[0])["scores"]) == found > 0


def test_the_onnx_file_carries_its_metadata(segmenter_file):
    model, path, exported = segmenter_file
    stored = {entry.key: entry.value for entry in onnx.load_model(path).metadata_props}
    assert stored == exported.metadata
    assert stored["variant"] == "maskrcnn_resnet18_t2"
    assert stored["task"] == "segmentation"
    assert json.loads(stored["classes"]) == ["background", "GGO", "consolidation"]
    assert json.loads(stored["config"])["min_size"] == 96
    assert json.loads(stored["versions"])["torch"] == torch.__version__
    assert stored["notice"].startswith("Research software, not a medical device")
    with torch.no_grad():
        model.rpn.head.cls_logits.bias[0] += 1
        other = exporting.describe(model)["weights_sha256"]
        model.rpn.head.cls_logits.bias[0] -= 1
    assert stored["weights_sha256"] == exporting.describe(model)["weights_sha256"]
    assert stored["weights_sha256"] != other


def test_export_is_the_function_even_after_every_module_was_imported():
    code = (
        "import importlib, pkgutil, ctmasknet\n"
        "for module in pkgutil.iter_modules(ctmasknet.__path__, 'ctmasknet.'):\n"
        "    module.name.endswith('__main__') or importlib.import_module(module.name)\n"
        "from ctmasknet import export\n"
        "print(export.__qualname__, ctmasknet.export is export)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["export True"], done.stderr


@pytest.mark.parametrize(("shorter", "longer"), [(96, 192), (512, 1024), (800, 1333)])
def test_images_are_resized_to_the_size_that_the_model_takes(tmp_path, shorter, longer):
    class Resized(torch.nn.Module):
        def forward(self, image):
            return resized_size(shape_as_tensor(image), shorter, longer)

    path, sides = tmp_path / "size.onnx", {"image": {0: "height", 1: "width"}}
    arguments = {"dynamo": False, "opset_version": exporting.OPSET, "input_names": ["image"], "dynamic_axes": sides}
    torch.onnx.export(Resized(), (torch.zeros(40, 50),), path, **arguments)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for height, width in [(300, 411), (411, 300), *np.random.default_rng(0).integers(32, 1500, (500, 2)).tolist()]:
        scale = min(shorter / min(height, width), longer / max(height, width))
        expected = [math.floor(height * scale), math.floor(width * scale)]
        assert session.run(None, {"image": np.zeros((height, width), np.float32)})[0].tolist() == expected


@pytest.mark.parametrize("slots", [1, 5, 128])
def test_slots_of_the_batch_are_filled_as_by_the_model(slots):
    for valid in range(1, slots + 3):  # the detector may give more than there are slots
        rows = batch_rows(torch.tensor(valid), slots, replicate=True)
        assert torch.equal(rows.bincount(minlength=valid), replication_counts(valid, slots))
        assert torch.equal(rows, rows.sort()[0])


def test_a_file_that_gives_something_else_is_refused_and_not_written(tmp_path, monkeypatch):
    model = spread_model("maskrcnn_resnet18_t2", box_score_thresh=0.1)
    monkeypatch.setattr(exporting, "check_images", lambda: [slices()[1]])
    honest, check = exporting.Traceable, exporting.check_onnx

    def dishonest(model):
        graph = honest(model)
        graph.model.transform.image_mean = [0.0, 0.0, 0.0]
        return graph

    def restored(onnxruntime, content, model):
        model.transform.image_mean = list(model.config.image_mean)
        return check(onnxruntime, content, model)

    monkeypatch.setattr(exporting, "Traceable", dishonest)
    monkeypatch.setattr(exporting, "check_onnx", restored)
    (tmp_path / "model.onnx").write_bytes(b"before")
    with pytest.raises(ExportError, match=r"maskrcnn_resnet18_t2 in onnxruntime .* differ .* nothing was written"):
        ctmasknet.export(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"before"


def test_regions_of_equal_score_may_change_places_but_not_values():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    one = {"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.5, 0.5])}
    swapped = {name: values.flip(0) for name, values in one.items()}
    assert exporting.compare(one, swapped) == {"boxes": 0, "labels": 0, "scores": 0}
    assert exporting.compare(one, swapped | {"boxes": boxes.flip(0) + 1})["boxes"] == 1
    assert exporting.compare(one, {name: values[:1] for name, values in one.items()})["scores"] == float("inf")
    with pytest.raises(ExportError, match="boxes"):
        exporting.require_close({"boxes": float("nan")}, exporting.TOLERANCES, "x")


def test_what_cannot_be_exported_is_said_before_the_work(tmp_path, monkeypatch):
    model = ctmasknet.create_model("maskrcnn_resnet18_t2", **SMALL)
    monkeypatch.setattr(exporting, "to_onnx", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ConfigError, match="create_model"):
        ctmasknet.export("maskrcnn_resnet18_t2", tmp_path / "m")
    with pytest.raises(OutputError, match="a folder is in the place of the file"):
        ctmasknet.export(model, tmp_path)

    def missing(module, extra, purpose):
        raise MissingExtraError(f"{purpose} needs {module}: pip install 'ctmasknet[{extra}]'")

    monkeypatch.setattr(exporting, "import_extra", missing)
    with pytest.raises(MissingExtraError, match=r"ctmasknet\[export\]"):
        ctmasknet.export(model, tmp_path / "m.onnx")


def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "to_onnx", lambda *_: pytest.fail("work was done"))
    (tmp_path / "file").write_text("in the way")
    model = ctmasknet.create_model("ctmasknet_resnet18_t2", **SMALL)
    with pytest.raises(OutputError, match=r"model.onnx: cannot be written"):
        ctmasknet.export(model, tmp_path / "file" / "model.onnx")


def test_the_command_says_in_one_line_what_it_wrote_or_what_is_wrong(tmp_path, capsys):
    weights = spread_model("maskrcnn_resnet18_t2").save_pretrained(tmp_path / "weights")
    command = ["export", str(weights), "-o"]
    assert cli.main([*command, str(tmp_path / "out" / "m.onnx")]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{tmp_path / 'out' / 'm.onnx'}: ONNX opset 17, ")
    assert said.out.count("\n") == 1
    assert said.err == ""
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["m.onnx"]
    assert (tmp_path / "out" / "m.onnx").stat().st_size > 1_000_000
    assert cli.main([*command, str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_terms_and_origin_of_the_start_weights_reach_card_config_and_onnx_file(tmp_path):
    """Licence CC BY-NC-SA 4.0 and the caveat of the bundled classifier, as docs/weights.md promises."""
    pytest.importorskip("accelerate")
    bundled = ctmasknet.create_model("ctmasknet_resnet18_t1", weights="default").metadata
    slices = class_folder(tmp_path / "slices", 1, per_class=1)
    config = classifier_config(slices, tmp_path / "run", epochs=1, weights="default")
    trained = ctmasknet.train(replace(config, model="ctmasknet_resnet18_t1", dataset="Three phantoms."))
    stored = json.loads((Path(trained.best) / "config.json").read_text())["metadata"]
    card = (Path(trained.best) / "README.md").read_text()
    model = ctmasknet.from_pretrained(trained.best, verify=True)
    ctmasknet.export(model, tmp_path / "model.onnx")
    in_onnx = {entry.key: entry.value for entry in onnx.load_model(tmp_path / "model.onnx").metadata_props}
    for facts in (stored, in_onnx):
        assert facts["license"] == "cc-by-nc-sa-4.0"
        assert facts["caveat"] == bundled["caveat"]
        assert facts["dataset"] == "Three phantoms."
    *earlier, before = stored["derived_from"]
    assert earlier == bundled["derived_from"]
    assert json.loads(in_onnx["derived_from"]) == stored["derived_from"]
    assert before == {key: bundled[key] for key in ("license", "caveat", "dataset")} | {"variant": model.variant.name}
    assert ModelCard(card).data.license == "cc-by-nc-sa-4.0"
    assert all(said in card for said in (bundled["caveat"], bundled["dataset"], "Three phantoms."))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maskrcnn_resnet18_t1", "ctmasknet_resnet18_t1"])
def test_bundled_weights_match_at_full_size_on_real_slices(tmp_path, name):
    files = sorted(SHARED.glob("data/lesions/val/imgs/*.jpg"))[::20] + sorted(SHARED.glob("data/classes/val/*"))[::30]
    if not files:
        pytest.skip("no real slices here")
    from ctmasknet.data.slices import read_slice

    model = ctmasknet.create_model(name, weights="default")
    ctmasknet.export(model, tmp_path / "model.onnx")
    for file in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = torch.from_numpy(read_slice(file).pixels)
        assert_matches(tmp_path / "model.onnx", model, pixels.expand(3, -1, -1).contiguous())
