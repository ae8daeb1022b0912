"""Figures 1 to 4 and the contributions: what is drawn is what was measured, in files that print well."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from paper.__main__ import make
from paper.drawing import CLASS_STYLE, save_figure, table_figure
from paper.figure1 import architecture_figure, tensor_shapes
from paper.figure2 import SliceFigureRow, slice_figure
from paper.figure3 import roi_figure
from paper.figure4 import roi_boxplots
from paper.request import Request
from paper.roi_counts import RoICounts
from phantom import phantom, write_lesions

from ctmasknet import ConfigError, DataError, create_model
from ctmasknet.evaluation.contributions import RoIContributions, contribution_figure
from ctmasknet.evaluation.evaluate import Table
from ctmasknet.results import Prediction, RoIBatch

NAMES = ("control", "pneumonia", "covid")
QUICK: dict[str, Any] = {"min_size": 128, "rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 30}


def words(figure: Any) -> str:
    """Everything written on a figure."""
    import matplotlib.text

    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def batch(count: int = 40) -> RoIBatch:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 80, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(4, 40, (count, 2))], 1).astype(np.float32)
    scores = np.sort(rng.uniform(0, 1, count)).astype(np.float32)[::-1]
    return RoIBatch(boxes, scores, np.ones(count, np.int64), np.zeros((count, 4), np.float32))


def prediction(*, score_map: bool = True) -> Prediction:
    made = phantom(0, size=128)
    return Prediction(
        image_size=(128, 128),
        boxes=made.boxes,
        scores=np.linspace(0.9, 0.4, len(made.masks)).astype(np.float32),
        labels=made.labels,
        masks=made.masks,
        class_probabilities=None,
        roi_batch=None,
        class_names=("background", "GGO", "consolidation"),
        image=made.image.astype(np.float32) / 255,
        score_map=made.masks.any(0).astype(np.float32) * 3 if score_map else None,
    )


def test_a_figure_is_written_as_vector_graphics_and_png(tmp_path: Path) -> None:
    paths = save_figure(roi_figure([("covid", batch())]), tmp_path / "new", "f")
    assert [path.suffix for path in paths] == [".pdf", ".svg", ".png"]
    assert paths[0].read_bytes().startswith(b"%PDF")
    assert "<svg" in paths[1].read_text()
    with Image.open(paths[2]) as picture:
        assert picture.width > 1000
    again = save_figure(roi_figure([("covid", batch())]), tmp_path / "again", "f", formats=("png",))
    assert paths[2].read_bytes() == again[0].read_bytes()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("maskrcnn_resnet18_t1", ("256 x 32 x 32", "left out", "logits 2 x 28 x 28", "6.06M values")),
        ("ctmasknet_resnet18_t2", ("128 x 64 x 64", "640, 512, 512, 3", "128 ranked RoIs x 5", "module S")),
        ("maskrcnn_resnet50", ("2048 x 16 x 16", "256 maps of side 128, 64, 32, 16", "30 scores, 120 deltas")),
    ],
)
def test_figure1_shows_the_real_shapes(name: str, expected: tuple[str, ...]) -> None:
    # Expected: strides 4 to 32 of 512 px, channels of ResNet18 and ResNet50, head sizes of the released code.
    text = words(architecture_figure(name))
    for part in expected:
        assert part in text
    assert ("left out" in text) == ("_t" in name)
    assert ("module S" in text) == name.startswith("ctmasknet")


def test_shapes_are_recorded_per_part() -> None:
    shapes = tensor_shapes("maskrcnn_resnet18_t2")
    assert shapes["block 1"] == "64 x 128 x 128"
    assert "block 3" not in shapes


def test_figure2_shows_prediction_map_truth_and_logits() -> None:
    made = phantom(0, size=128)
    logits = {"control": -1.5, "pneumonia": 0.25, "covid": 2.0}
    row = SliceFigureRow(prediction(), made.masks, made.lungs, logits, "lesions", "phantom 0")
    bare = SliceFigureRow(prediction(score_map=False))
    figure = slice_figure([row, bare])
    text = words(figure)
    for part in ("0.90", "COVID-19  2.00", "true: lesions", "phantom 0", "no score map", "not known", "no classifier"):
        assert part in text
    first = figure.axes[:4]
    assert len(first[0].patches) == len(made.masks)  # a box per lesion
    shown = first[1].images[0].get_array()
    np.testing.assert_array_equal(shown, row.prediction.score_map)
    truth = np.asarray(first[2].images[0].get_array())
    np.testing.assert_array_equal(truth.any(-1), made.lungs | made.masks.any(0))


def test_figure3_draws_every_roi_once() -> None:
    figure = roi_figure([("covid", batch(40)), ("control", batch(10))], top=16)
    axes = figure.axes
    assert [sum(bar.get_height() for bar in axes[i].patches) for i in (0, 2, 4, 6)] == [16, 40, 10, 10]
    offsets = axes[3].collections[0].get_offsets()
    sides = batch(40).boxes[:, 2:] - batch(40).boxes[:, :2]
    np.testing.assert_allclose(offsets, np.stack([sides.prod(1), batch(40).scores], 1), rtol=1e-6)
    assert "COVID-19: best 16 of 40 RoIs" in words(figure)
    assert "control: best 10 of 10 RoIs" in words(figure)


def test_figure3_survives_a_slice_without_rois() -> None:
    empty = RoIBatch(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros((0, 4)))
    save = roi_figure([("control", empty)])
    assert "all 0 RoIs" in words(save)
    with pytest.raises(ConfigError, match="at least one RoI batch"):
        roi_figure([])


def test_figure4_boxes_are_numpys_quartiles() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 2], 20)  # no pneumonia slice
    values = rng.integers(0, 30, (40, 3))
    figure = roi_boxplots(RoICounts(NAMES, labels, values, (None,) * 40))
    assert [axis.get_title() for axis in figure.axes] == [f"RoI score > {t}" for t in (0.2, 0.5, 0.9)]
    for column, axis in enumerate(figure.axes):
        box = axis.patches[0].get_path().vertices[:, 1]
        expected = np.percentile(values[labels == 2, column], (25, 75))
        assert (box.min(), box.max()) == pytest.approx(tuple(expected))
        assert "N/A" in [text.get_text() for text in axis.texts]
    assert "COVID-19 20, common pneumonia 0, control 20" in words(figure)


def test_contributions_are_drawn_for_and_against() -> None:
    rng = np.random.default_rng(0)
    found = RoIContributions(
        boxes=batch(20).boxes,
        scores=batch(20).scores,
        copies=np.ones(20, np.int64),
        contributions=rng.normal(size=(20, 3)).astype(np.float32),
        logits=np.array([1, -2, 0.5], np.float32),
    )
    figure = contribution_figure(phantom(0, size=128).image / np.float32(255), found, NAMES, shown=6)
    assert "COVID-19: logit 0.50" in words(figure)
    for column in range(3):
        boxes = figure.axes[column].patches
        assert len(boxes) == 6
        order = np.argsort(-np.abs(found.contributions[:, column]))[:6]
        beside = [text.get_text() for text in reversed(figure.axes[column].texts)]
        assert beside == [f"{value:+.2f}" for value in found.contributions[order[:5], column]]
        dashed = [box.get_linestyle() != "-" for box in reversed(boxes)]
        assert dashed == [bool(value < 0) for value in found.contributions[order, column]]


def test_classes_differ_in_grey_by_lightness_or_hatching() -> None:
    styles = list(CLASS_STYLE.values())
    lightness = []
    for colour, _, _ in styles:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        lightness.append(float(np.dot(channels, (0.299, 0.587, 0.114))))
        assert colorsys.rgb_to_hls(*channels)[1] < 0.8  # not lost on white paper
    for a in range(3):
        for b in range(a):
            assert abs(lightness[a] - lightness[b]) > 0.15 or styles[a][1] != styles[b][1]
    assert len({marker for _, _, marker in styles}) == 3


def test_a_table_becomes_a_picture_with_its_notes() -> None:
    table = Table("Title", (("a rather long name", "s"), ("x", ".1f")), (("one", 1.0), ("two", None)), ("A note.",))
    text = words(table_figure(table))
    for part in ("Title", "1.0", "N/A", "A note."):
        assert part in text


@pytest.mark.slow
def test_figure2_of_phantoms_needs_no_data(tmp_path: Path) -> None:
    table, paths = make("figure2", Request(limit=1, device="cpu"), tmp_path)
    assert table.rows[0][:2] == ("phantom 0", 4)
    assert all(path.stat().st_size < 400_000 for path in paths if path.suffix == ".png")


@pytest.mark.parametrize(
    ("names", "codes"),
    [(("background", "GGO"), (2,)), (("background", "GGO", "consolidation"), (2, 3)), (None, (2, 3))],
)
def test_figure2_shows_the_lesions_of_the_classes_that_the_model_tells_apart(tmp_path: Path, names, codes) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    model = create_model("maskrcnn_resnet18_t2", num_classes=len(names or "12"), **QUICK)
    model.metadata = {"classes": list(names)} if names else {}
    weights = tmp_path / "weights"
    model.save_pretrained(weights)
    data = write_lesions(tmp_path / "data", 2, lesions=6, size=256)
    expected = {}
    for mask in (data / "masks").iterdir():
        groups = [codes] if names is None else [(code,) for code in codes]  # merged, or each class by itself
        found = [ndimage.label(np.isin(Image.open(mask), group), np.ones((3, 3)))[0] for group in groups]
        expected[mask.stem] = sum(int((np.bincount(f.ravel())[1:] > 100).sum()) for f in found)
    for source in ((str(data),), ()):
        table, _ = make("figure2", Request((str(weights),), source, limit=2, device="cpu"), tmp_path / "out")
        shown = dict(row[:2] for row in table.rows)
        if source:
            assert shown == expected
        else:
            drawn = phantom(0, lesions=4)
            assert shown["phantom 0"] == (4 if 3 in codes else int((drawn.labels == 1).sum()))
    assert min(expected.values()) > 0


def test_figure2_refuses_data_of_other_classes_than_the_models(tmp_path: Path) -> None:
    model = create_model("maskrcnn_resnet18_t2", **QUICK)
    model.metadata = {"classes": ["background", "GGO"]}
    weights = tmp_path / "weights"
    model.save_pretrained(weights)
    data = write_lesions(tmp_path / "data", 1, size=256)
    request = Request((str(weights),), (str(data),), classes="merge", limit=1, device="cpu")
    with pytest.raises(DataError, match="classes background, lesion, but maskrcnn_resnet18_t2 tells background, GGO"):
        make("figure2", request, tmp_path / "out")
