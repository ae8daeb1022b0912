"""Predictor: the bundled weights on phantoms and real slices, thresholds, kinds of input, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from phantom import phantom
from PIL import Image

import ctmasknet
from ctmasknet import ConfigError, InputError, Prediction, Predictor, WeightsError, create_model, predict
from ctmasknet.models.inference import FastInference
from ctmasknet.registry import DEFAULT_CLASSIFIER, DEFAULT_SEGMENTER
from ctmasknet.weights.files import write_weights
from ctmasknet.zoo import class_names

SHARED = Path(__file__).parents[2] / "shared"
needs_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the research data")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(device="cpu")


@pytest.fixture(scope="module")
def segmenter() -> Predictor:
    return Predictor(classifier=None, device="cpu")


def operating_point() -> dict[str, float]:
    """What config.json beside the default weights says, read as plain JSON."""
    path = Path(ctmasknet.__file__).parent / "weights" / "bundled" / DEFAULT_SEGMENTER / "config.json"
    return json.loads(path.read_text())["metadata"]["operating_point"]


def test_finds_most_lesions_of_the_phantoms_and_few_where_there_are_none(segmenter):
    found = total = 0
    for seed in range(4):
        made = phantom(seed)
        marked = segmenter(made.image).lesion_mask
        found += sum((mask & marked).sum() * 2 > mask.sum() for mask in made.masks)
        total += len(made.masks)
    assert found / total >= 0.7
    healthy = [segmenter(phantom(seed, lesions=0).image).lesion_fraction for seed in range(3)]
    assert np.mean(healthy) < 0.005


def test_a_prediction_is_what_the_contract_says(predictor):
    made = phantom(0)
    result = predictor(made.image)
    assert isinstance(result, Prediction)
    n = len(result.scores)
    assert n > 0
    assert result.image_size == (512, 512)
    assert (result.boxes.shape, result.boxes.dtype) == ((n, 4), np.float32)
    assert (result.labels.shape, result.labels.dtype) == ((n,), np.int64)
    assert (result.masks.shape, result.masks.dtype) == ((n, 512, 512), bool)
    assert set(result.class_probabilities) == {"control", "pneumonia", "covid"}
    assert abs(sum(result.class_probabilities.values()) - 1) < 1e-5
    assert result.roi_batch.deltas.shape == (128, 4)
    assert result.lesion_fraction == np.any(result.masks, axis=0).mean()
    assert any("demonstration" in caveat for caveat in result.caveats)


def test_the_same_as_the_model_itself_at_the_stored_operating_point(segmenter):
    made = phantom(1)
    point = operating_point()
    model = create_model(
        DEFAULT_SEGMENTER,
        weights="default",
        box_score_thresh=point["score_threshold"],
        box_nms_thresh=point["nms_threshold"],
    )
    tensor = torch.from_numpy(made.image).float().div(255).expand(3, -1, -1)
    with torch.inference_mode():
        expected = model([tensor])[0]
    result = segmenter(made.image)
    assert len(result.scores) >= 3
    np.testing.assert_allclose(result.scores, expected["scores"].numpy(), atol=1e-3)
    np.testing.assert_allclose(result.boxes, expected["boxes"].numpy(), atol=0.05)
    assert (result.masks != (expected["masks"][:, 0].numpy() > 0.5)).mean() < 1e-4


def test_every_kind_of_input_gives_the_same(segmenter, tmp_path):
    image = phantom(2).image
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image).convert("RGBA").save(tmp_path / "b.png")
    reference = segmenter(image)
    inputs = [
        tmp_path / "a.png",
        str(tmp_path / "b.png"),
        Image.fromarray(image),
        torch.from_numpy(image),
        image.astype(np.float32) / 255,
        np.repeat(image[None], 3, 0),
    ]
    for other in inputs:
        np.testing.assert_allclose(segmenter(other).scores, reference.scores, atol=1e-4)


def test_hounsfield_units_are_windowed(segmenter):
    made = phantom(2)
    reference, result = segmenter(made.image), segmenter(made.hu, units="hu")
    assert len(result.scores) == len(reference.scores)
    overlap = (result.lesion_mask & reference.lesion_mask).sum() / reference.lesion_mask.sum()
    assert overlap > 0.9
    with pytest.raises(InputError, match='units="hu"'):
        segmenter(made.hu)


def test_batch_keeps_order_and_equals_one_by_one():
    predictor = Predictor(classifier=None, batch_size=2, device="cpu")
    images = [phantom(0).image, phantom(0, size=256).image, phantom(1, lesions=0).image]
    for image, result in zip(images, predictor.batch(iter(images)), strict=True):
        assert result.image_size == image.shape
        np.testing.assert_allclose(result.scores, predictor(image).scores, atol=1e-4)


def test_a_threshold_given_replaces_the_stored_one(segmenter):
    image = phantom(0).image
    assert segmenter.score_threshold == operating_point()["score_threshold"]
    loose = Predictor(classifier=None, score_threshold=0.05, device="cpu")(image)
    strict = Predictor(classifier=None, score_threshold=0.5, device="cpu")(image)
    assert len(loose.scores) > len(segmenter(image).scores) >= len(strict.scores)
    assert strict.score_threshold == 0.5
    assert (strict.scores > 0.5).all()


def test_a_model_passed_in_keeps_its_own_settings():
    model = create_model("maskrcnn_resnet18_t2", weights="default", box_score_thresh=0.6)
    predictor = Predictor(model, None, device="cpu")
    assert predictor.score_threshold == 0.6
    Predictor(model, None, score_threshold=0.1, device="cpu")(phantom(0).image)
    assert model.roi_heads.score_thresh == 0.6
    plain = create_model("maskrcnn_resnet18_t2")
    assert Predictor(plain, None, device="cpu").score_threshold == 0.75


def test_either_task_may_be_left_out(predictor):
    image = phantom(0).image
    only_class = Predictor(segmenter=None, device="cpu")(image)
    assert not only_class.has_segmentation
    assert only_class.masks.shape == (0, 512, 512)
    both = predictor(image)
    assert only_class.class_probabilities == pytest.approx(both.class_probabilities, abs=1e-6)
    only_lesions = Predictor(classifier=None, device="cpu")(image)
    assert only_lesions.class_probabilities is None
    assert only_lesions.roi_batch is None
    with pytest.raises(ConfigError, match="nothing to predict"):
        Predictor(None, None)


def test_a_folder_of_weights_serves_as_a_model(tmp_path):
    model = create_model("maskrcnn_resnet18_t2", num_classes=3)
    write_weights(
        tmp_path,
        model.state_dict(),
        variant=model.variant.name,
        config=model.config.to_dict(),
        metadata={"operating_point": {"score_threshold": 0.2, "nms_threshold": 0.4}},
    )
    predictor = Predictor(str(tmp_path), None, device="cpu")
    assert predictor.score_threshold == 0.2
    assert predictor(phantom(0).image).class_names == ("background", "GGO", "consolidation")


def test_class_names_follow_the_number_of_classes():
    assert class_names(create_model("ctmasknet_resnet18_t2", image_classes=2)) == ("class 0", "class 1")
    assert class_names(create_model("maskrcnn_resnet18_t2")) == ("background", "lesion")


@pytest.mark.slow  # a minute on a processor without bfloat16 units
def test_bfloat16_finds_the_same_lesions(segmenter):
    image = phantom(0).image
    rounded = Predictor(classifier=None, precision="bfloat16", device="cpu")(image)
    np.testing.assert_allclose(np.sort(rounded.scores), np.sort(segmenter(image).scores), atol=0.1)


def test_bfloat16_is_chosen_where_the_processor_has_units_for_it(monkeypatch):
    for present in (True, False):
        monkeypatch.setattr("ctmasknet.predictor.computes_bfloat16", lambda device, present=present: present)
        assert Predictor(classifier=None, device="cpu").precision == ("bfloat16" if present else "float32")
        assert Predictor(classifier=None, device="cpu", precision="float32").precision == "float32"


def test_a_model_trained_on_after_a_prediction_is_used_as_it_is_now():
    model = create_model(DEFAULT_SEGMENTER, weights="default", min_size=128)
    predictor = Predictor(model, None, device="cpu", score_threshold=0.0)
    image = phantom(0, size=128).image
    before = predictor(image).scores
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[1] += 1.0
    after = predictor(image).scores
    assert after.max() > before.max()
    fresh = Predictor(model, None, device="cpu", score_threshold=0.0)(image).scores
    np.testing.assert_array_equal(after, fresh)


def test_one_detector_is_run_once_for_both_tasks_and_only_then(monkeypatch):
    passes = []
    read = FastInference.read
    monkeypatch.setattr(FastInference, "read", lambda self, images: passes.append(self.model) or read(self, images))
    small = {"min_size": 128, "weights": "default"}
    segmenter, classifier = (create_model(name, **small) for name in (DEFAULT_SEGMENTER, DEFAULT_CLASSIFIER))
    image = phantom(0, size=128).image
    shared = Predictor(segmenter, classifier, device="cpu")(image)
    assert len(passes) == 1
    alone = Predictor(None, classifier, device="cpu")(image)
    assert shared.class_probabilities == alone.class_probabilities
    for change in ({"rpn_nms_thresh": 0.6}, {"min_size": 160}):
        passes.clear()
        other = create_model(DEFAULT_CLASSIFIER, **(small | change))
        Predictor(segmenter, other, device="cpu")(image)
        assert len(passes) == 2
    passes.clear()
    with torch.no_grad():
        classifier.backbone.body.conv1.weight[0] += 0.1
    Predictor(segmenter, classifier, device="cpu")(image)
    assert len(passes) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"segmenter": "maskrcnn_resnet18_t"}, ConfigError, "did you mean"),
        ({"segmenter": DEFAULT_CLASSIFIER}, ConfigError, "is for classification, but a model for segmentation"),
        ({"segmenter": "maskrcnn_resnet50"}, WeightsError, "no trained weights"),
        ({"segmenter": 3}, ConfigError, "name of a variant"),
        ({"score_threshold": 1.5}, ConfigError, r"0\.\.1"),
        ({"precision": "float8"}, ConfigError, "precision='float8'"),
        ({"device": "quantum"}, ConfigError, "device='quantum' cannot be used"),
        ({"batch_size": 0}, ConfigError, "batch_size=0"),
    ],
)
def test_impossible_settings_raise(options, error, message):
    with pytest.raises(error, match=message):
        Predictor(**options)


def test_predict_is_one_line(tmp_path):
    Image.fromarray(phantom(0).image).save(tmp_path / "slice.png")
    result = predict(tmp_path / "slice.png", classifier=None)
    picture, record = result.save(tmp_path / "out")
    assert json.loads(record.read_text())["lesions"]
    assert picture.name == "slice.png.overlay.png"


def test_elongated_and_small_images_do_not_crash(segmenter):
    for shape in ((32, 32), (32, 1000), (700, 40)):
        result = segmenter(np.zeros(shape, np.uint8))
        assert result.image_size == shape


@needs_data
def test_real_dicom_slices_show_lesions_in_the_lungs(segmenter):
    for name in ("ny-sbu_a002304_135.dcm", "ny-sbu_a046441_23.dcm"):
        pytest.importorskip("pydicom")
        result = segmenter(SHARED / "data" / "dicom" / name)
        assert len(result.scores) >= 2
        assert 0.03 < result.lesion_fraction < 0.3


@needs_data
def test_real_slices_with_lesions_are_told_from_those_without(segmenter):
    folder = SHARED / "data" / "lesions" / "val"
    dices = []
    for path in sorted((folder / "imgs").iterdir())[::12]:
        truth = np.asarray(Image.open(folder / "masks" / f"{path.stem}.png")) >= 2
        marked = segmenter(path).lesion_mask
        dices.append((2 * (truth & marked).sum() + 1) / (truth.sum() + marked.sum() + 1))
    assert np.mean(dices) > 0.45
