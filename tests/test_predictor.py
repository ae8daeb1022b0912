"""Predictor: the bundled weights on phantoms and real slices, thresholds, kinds of input, bad input."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from matching import assert_same_detections
from phantom import phantom
from PIL import Image

import ctmasknet
from ctmasknet import (
    ConfigError,
    InputError,
    Prediction,
    Predictor,
    WeightsError,
    create_model,
    from_pretrained,
    predict,
)
from ctmasknet.data.slices import Slice
from ctmasknet.models.inference import Inference
from ctmasknet.registry import DEFAULT_CLASSIFIER, DEFAULT_SEGMENTER
from ctmasknet.weights.publish import write_weights
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
    thresholds = {"box_score_thresh": point["score_threshold"], "box_nms_thresh": point["nms_threshold"]}
    result = segmenter(made.image)
    assert len(result.scores) >= 3
    for options in ({}, thresholds):  # what create_model returns is set to it already
        model = create_model(DEFAULT_SEGMENTER, weights="default", **options)
        with torch.inference_mode():
            expected = model([torch.from_numpy(made.image).float().div(255).expand(3, -1, -1)])[0]
        for row, pair in assert_same_detections(vars(result), expected):
            assert (result.masks[pair] != (expected["masks"][row, 0].numpy() > 0.5)).mean() < 1e-4


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
    predictor = Predictor(*small_pair(), batch_size=4, device="cpu", score_threshold=0.1)
    made = [phantom(seed, size=512).image for seed in range(4)]
    images = [made[0][56:456], made[1][:, 96:416], made[2], made[3][:256, :256]]  # 400 x 512, 512 x 320, ...
    for image, result in zip(images, predictor.batch(iter(images)), strict=True):
        single = predictor(image)
        assert result.image_size == image.shape
        np.testing.assert_allclose(result.scores, single.scores, atol=1e-4)
        np.testing.assert_allclose(result.boxes, single.boxes, atol=1e-3)
        assert result.class_probabilities == pytest.approx(single.class_probabilities, abs=1e-4)


def test_a_threshold_given_replaces_the_stored_one(segmenter):
    image = phantom(0).image
    assert segmenter.score_threshold == operating_point()["score_threshold"]
    loose = Predictor(classifier=None, score_threshold=0.05, device="cpu")(image)
    strict = Predictor(classifier=None, score_threshold=0.5, device="cpu")(image)
    assert len(loose.scores) > len(segmenter(image).scores) >= len(strict.scores)
    assert strict.score_threshold == 0.5
    assert (strict.scores > 0.5).all()


@pytest.mark.parametrize("given", [{}, {"score": 0.75}, {"nms": 0.75}, {"score": 0.6, "nms": 0.3}])
def test_each_threshold_by_itself_and_what_is_given_wins_even_if_it_is_the_papers(given):
    point = operating_point()
    assert point["score_threshold"] != 0.75 != point["nms_threshold"]
    expected = {"score": point["score_threshold"], "nms": point["nms_threshold"]} | given
    model = create_model(DEFAULT_SEGMENTER, weights="default", **{f"box_{key}_thresh": v for key, v in given.items()})
    assert (model.roi_heads.score_thresh, model.roi_heads.nms_thresh) == (expected["score"], expected["nms"])
    assert (model.config.box_score_thresh, model.config.box_nms_thresh) == (expected["score"], expected["nms"])
    named = {f"{key}_threshold": value for key, value in given.items()}
    for predictor in (Predictor(model, None, device="cpu"), Predictor(classifier=None, device="cpu", **named)):
        assert (predictor.score_threshold, predictor.nms_threshold) == (expected["score"], expected["nms"])


def test_a_threshold_given_to_create_model_survives_saving(tmp_path):
    create_model(DEFAULT_SEGMENTER, weights="default", box_score_thresh=0.75).save_pretrained(tmp_path / "w")
    again = from_pretrained(tmp_path / "w")
    assert again.config.box_score_thresh == 0.75
    assert again.config.box_nms_thresh == operating_point()["nms_threshold"]


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
        golden=False,
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


def small_pair():
    options = {"min_size": 128, "weights": "default"}
    return create_model(DEFAULT_SEGMENTER, **options), create_model(DEFAULT_CLASSIFIER, **options)


@pytest.mark.parametrize("place", ["body", "fc6", "mask head"])
def test_a_model_trained_on_after_a_prediction_is_used_as_it_is_now(place):
    model, _ = small_pair()
    predictor = Predictor(model, None, device="cpu", score_threshold=0.0)
    image = phantom(0, size=128).image
    before = predictor(image)
    weight = {
        "body": model.backbone.body.layer1[0].conv1.weight,
        "fc6": model.roi_heads.box_head.fc6.weight,
        "mask head": model.roi_heads.mask_head[0][0].weight,
    }[place]
    with torch.no_grad():
        weight *= 0.8
    after = predictor(image)
    fresh = Predictor(model, None, device="cpu", score_threshold=0.0)(image)
    if place == "mask head":
        assert not np.array_equal(before.masks, after.masks)
    else:
        assert not np.array_equal(before.scores, after.scores)
    for key in ("boxes", "scores", "labels", "masks"):
        np.testing.assert_array_equal(getattr(after, key), getattr(fresh, key))


def test_training_mode_of_a_model_changes_nothing():
    segmenter, classifier = small_pair()
    predictor = Predictor(segmenter, classifier, device="cpu", score_threshold=0.0)
    image = phantom(0, size=128).image
    before = predictor(image)
    assert len(before.scores) > 3
    segmenter.train()
    classifier.train()
    for after in (predictor(image), predictor(image)):
        assert after.class_probabilities == before.class_probabilities
        np.testing.assert_array_equal(after.masks, before.masks)
        np.testing.assert_array_equal(after.boxes, before.boxes)
    assert segmenter.training
    assert classifier.module_s.training


def test_four_threads_share_one_predictor():
    segmenter, classifier = small_pair()
    predictor = Predictor(segmenter, classifier, device="cpu", score_threshold=0.0)
    images = [phantom(seed, size=128).image for seed in range(4)]
    alone = [Predictor(segmenter, classifier, device="cpu", score_threshold=0.0)(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        for expected, found in zip(alone * 3, pool.map(predictor, images * 3), strict=True):
            assert found.class_probabilities == pytest.approx(expected.class_probabilities, abs=1e-6)
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
            np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-4)


def test_the_default_precision_is_float32_on_every_processor():
    predictor = Predictor(*small_pair(), device="cpu")
    assert predictor.precision == "float32"
    predictor(phantom(0, size=128).image)
    networks = [inference._network for inference in predictor._prepare()[0].values()]
    assert {parameter.dtype for network in networks for parameter in network.parameters()} == {torch.float32}


def test_a_slice_with_nan_is_named_and_the_others_of_a_stream_go_on():
    predictor = Predictor(create_model("maskrcnn_resnet18_t2", min_size=64), None, device="cpu", batch_size=3)
    good = Slice(np.zeros((64, 64), np.float32), "good.png", "png")
    bad = Slice(np.full((64, 64), np.nan, np.float32), "bad.png", "png")
    hounsfield = Slice(np.full((64, 64), -1000, np.float32), "hu.png", "png")
    with pytest.raises(InputError, match=r"bad\.png: 4096 of 4096 values are NaN"):
        list(predictor.batch([good, bad]))
    found = list(predictor.stream(enumerate([good, bad, hounsfield, "no slice", good])))
    assert [key for key, _ in found] == [0, 1, 2, 3, 4]
    assert [type(result) for _, result in found] == [Prediction, InputError, InputError, str, Prediction]
    assert "hu.png: values outside 0..1" in str(found[2][1])


def test_a_scan_is_no_slice(segmenter, tmp_path):
    for name in ("scan.nii.gz", "scan.nii"):
        (tmp_path / name).write_bytes(bytes(400))
    for path in (tmp_path, tmp_path / "scan.nii.gz", str(tmp_path / "scan.nii")):
        with pytest.raises(InputError, match=r"Predictor\.volume"):
            segmenter(path)


def test_repr_says_what_runs_in_a_line(predictor):
    text = repr(predictor)
    assert "\n" not in text
    assert len(text) < 200
    assert DEFAULT_SEGMENTER in text
    assert "score_threshold=" in text


def test_one_detector_is_run_once_for_both_tasks_and_only_then(monkeypatch):
    passes = []
    read = Inference.read
    monkeypatch.setattr(Inference, "read", lambda self, images: passes.append(self.model) or read(self, images))
    small = {"min_size": 128, "weights": "default"}
    segmenter, classifier = small_pair()
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
        ({"nms_threshold": -0.1}, ConfigError, r"nms_threshold=-0\.1: must lie in 0\.\.1"),
        ({"precision": "auto"}, ConfigError, "precision='auto': use 'float32'"),
        ({"precision": "float16", "device": "cpu"}, ConfigError, "needs a GPU"),
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_host_waits_for_each_nms_and_else_once_in_a_while():
    predictor = Predictor(device="cuda", batch_size=8)
    images = [phantom(seed).image for seed in range(8)]
    list(predictor.batch(images))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            list(predictor.batch(images))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(warning.message) for warning in caught)
    # NMS of proposals and of regions, for each of two models; the rest is per batch.
    assert waits <= 4 * len(images) + 16
