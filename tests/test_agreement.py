"""On real slices the default Predictor says what the plain models say: every detection, every class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.ops import box_iou

from ctmasknet import Predictor, create_model
from ctmasknet.data.slices import read_slice
from ctmasknet.weights.manifest import variants_with_weights

DATA = next((p / "shared" / "data" for p in Path(__file__).parents if (p / "shared" / "data").is_dir()), None)
SCORE, IOU = 0.05, 0.99
VERGE = 1e-4  # of the score threshold, where rounding decides

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DATA is None, reason="needs the research data"),
    pytest.mark.filterwarnings("ignore"),
]


def slices(name: str) -> list[Path]:
    assert DATA is not None
    folder = DATA / "lesions" / "val" / "imgs" if name.startswith("maskrcnn") else DATA / "classes" / "val"
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", [name for name in variants_with_weights() if name.startswith("maskrcnn")])
def test_every_detection_is_found_again(name):
    predictor = Predictor(name, None, device="cpu", score_threshold=SCORE)
    plain = create_model(name, weights="default", box_score_thresh=SCORE)
    detections, missing = 0, []
    for path in slices(name):
        one = read_slice(path)
        found = predictor(one)
        with torch.inference_mode():
            expected = plain([torch.from_numpy(one.pixels).expand(3, -1, -1)])[0]
        sides = (
            (expected["boxes"], expected["scores"], expected["labels"]),
            tuple(torch.from_numpy(getattr(found, key)) for key in ("boxes", "scores", "labels")),
        )
        for (boxes, scores, labels), (others, _, other_labels) in (sides, sides[::-1]):
            alike = box_iou(boxes, others).masked_fill(labels[:, None] != other_labels, 0)
            best = alike.amax(1) if len(others) else torch.zeros(len(boxes))
            detections += len(boxes)
            missing += [path.name for _ in ((best < IOU) & (scores > SCORE + VERGE)).nonzero()]
    assert detections > 100
    assert not missing


@pytest.mark.parametrize("name", [name for name in variants_with_weights() if name.startswith("ctmasknet")])
def test_every_slice_has_the_same_class(name):
    predictor = Predictor(None, name, device="cpu")
    plain = create_model(name, weights="default")
    paths = slices(name)
    other = []
    for path in paths:
        one = read_slice(path)
        found = list(predictor(one).class_probabilities.values())
        with torch.inference_mode():
            expected = plain([torch.from_numpy(one.pixels).expand(3, -1, -1)])[0]["probabilities"]
        if int(expected.argmax()) != max(range(len(found)), key=found.__getitem__):
            other.append(path.name)
    assert len(paths) > 50
    assert not other
