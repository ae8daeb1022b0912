"""Classification metrics against numbers worked out by hand, counts and scipy."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ctmasknet.errors import DataError
from ctmasknet.evaluation.metrics import ClassificationMetrics

CLASSES = ("control", "pneumonia", "covid")


def metrics(probabilities: np.ndarray, labels: np.ndarray) -> ClassificationMetrics:
    """Of rows as a kept evaluation has them, read back from JSON."""
    pairs = zip(probabilities.tolist(), labels.tolist(), strict=True)
    rows = [{"label": label, "probabilities": row} for row, label in pairs]
    return ClassificationMetrics(CLASSES, json.loads(json.dumps(rows)))


def called(*classes: int) -> np.ndarray:
    """(N, 3) probabilities that call these classes."""
    return np.eye(3)[list(classes)] * 0.7 + 0.1


def random_batch(seed: int, n: int = 200, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities somewhat better than chance; with ties, all multiples of 1/4."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    probabilities = rng.dirichlet(np.ones(3), n) + 0.4 * np.eye(3)[labels]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return (rng.multinomial(4, probabilities) / 4 if ties else probabilities), labels


def test_figures_worked_out_by_hand() -> None:
    result = metrics(called(0, 0, 1, 1, 2, 2, 2, 0), np.array([0, 0, 0, 1, 2, 2, 1, 2])).compute()
    assert result["confusion"] == [[2, 1, 0], [0, 1, 1], [1, 0, 2]]
    assert result["n"] == 8
    assert result["accuracy"] == 5 / 8
    assert result["sensitivity"] == {"control": 2 / 3, "pneumonia": 1 / 2, "covid": 2 / 3}
    assert result["specificity"] == {"control": 4 / 5, "pneumonia": 5 / 6, "covid": 4 / 5}
    assert result["precision"] == {"control": 2 / 3, "pneumonia": 1 / 2, "covid": 2 / 3}
    assert result["f1"] == pytest.approx({"control": 2 / 3, "pneumonia": 1 / 2, "covid": 2 / 3})


@pytest.mark.parametrize("ties", [False, True])
def test_figures_equal_counts(ties: bool) -> None:
    probabilities, labels = random_batch(0, ties=ties)
    result = metrics(probabilities, labels).compute()
    calls = [max(range(3), key=list(row).__getitem__) for row in probabilities]  # the first of equals
    pairs = list(zip(labels.tolist(), calls, strict=True))
    assert result["confusion"] == [[pairs.count((true, called)) for called in range(3)] for true in range(3)]
    assert result["accuracy"] == sum(true == called for true, called in pairs) / len(pairs)
    for index, name in enumerate(CLASSES):
        sensitivity = [called == index for true, called in pairs if true == index]
        specificity = [called != index for true, called in pairs if true != index]
        precision = [true == index for true, called in pairs if called == index]
        s, p = np.mean(sensitivity), np.mean(precision)
        assert result["sensitivity"][name] == pytest.approx(s)
        assert result["specificity"][name] == pytest.approx(np.mean(specificity))
        assert result["precision"][name] == pytest.approx(p)
        assert result["f1"][name] == pytest.approx(2 * s * p / (s + p))


def test_weights_count_like_repeated_images() -> None:
    probabilities, labels = random_batch(3, n=40, ties=True)
    weights = np.random.default_rng(0).integers(0, 4, 40)
    expected = metrics(probabilities.repeat(weights, axis=0), labels.repeat(weights)).compute()
    found = metrics(probabilities, labels).statistic()(weights.astype(float))
    for figure in ("accuracy", "brier", "ece"):
        assert found.pop(figure) == pytest.approx(expected[figure])
    assert found == pytest.approx({f"{key}.{name}": expected[key][name] for key, name in (k.split(".") for k in found)})


def test_auc_equals_the_mann_whitney_statistic_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    probabilities, labels = random_batch(1, ties=True)
    for index, auc in enumerate(metrics(probabilities, labels).compute()["auc"].values()):
        score = probabilities[:, index]
        u = stats.mannwhitneyu(score[labels == index], score[labels != index]).statistic
        assert auc == pytest.approx(u / ((labels == index).sum() * (labels != index).sum()))


def test_calibration_worked_out_by_hand() -> None:
    # Confidence 0.8, 0.8, 0.6, 0.9; right, wrong, right, right.
    probabilities = np.array([[0.8, 0.1, 0.1], [0.8, 0.2, 0.0], [0.2, 0.6, 0.2], [0.0, 0.1, 0.9]])
    result = metrics(probabilities, np.array([0, 1, 1, 2])).compute()
    assert result["brier"] == pytest.approx((0.06 + 1.28 + 0.24 + 0.02) / 4)
    # Bins 0.7 to 0.8: 0.8 said, 0.5 right, two slices; 0.5 to 0.6: 0.6 and 1; 0.8 to 0.9: 0.9 and 1.
    assert result["ece"] == pytest.approx((2 * 0.3 + 0.4 + 0.1) / 4)
    assert result["reliability"]["control"] == [
        {"n": 1, "probability": 0.0, "observed": 0.0},
        {"n": 1, "probability": pytest.approx(0.2), "observed": 0.0},
        {"n": 2, "probability": pytest.approx(0.8), "observed": 0.5},
    ]


@pytest.mark.parametrize("ties", [False, True])
def test_calibration_equals_its_definition_slice_by_slice(ties: bool) -> None:
    probabilities, labels = random_batch(4, ties=ties)
    result = metrics(probabilities, labels).compute()
    squares, bins = 0.0, {}
    for row, label in zip(probabilities, labels, strict=True):
        squares += sum((p - (k == label)) ** 2 for k, p in enumerate(row))
        confidence = max(row)
        step = next(i for i in range(1, 11) if confidence <= i / 10)  # bins (0, 0.1], (0.1, 0.2] and so on
        bins.setdefault(step, []).append((confidence, row.argmax() == label))
    assert result["brier"] == pytest.approx(squares / len(labels))
    gaps = [
        len(found) * abs(np.mean([c for c, _ in found]) - np.mean([r for _, r in found])) for found in bins.values()
    ]
    assert result["ece"] == pytest.approx(sum(gaps) / len(labels))
    for k, name in enumerate(CLASSES):
        curve = result["reliability"][name]
        assert sum(point["n"] for point in curve) == len(labels)
        assert sum(point["n"] * point["observed"] for point in curve) == pytest.approx((labels == k).sum())
        assert sum(point["n"] * point["probability"] for point in curve) == pytest.approx(probabilities[:, k].sum())


def test_probabilities_that_are_always_right_are_calibrated() -> None:
    labels = np.array([0, 1, 2, 2])
    result = metrics(np.eye(3)[labels], labels).compute()
    assert result["brier"] == result["ece"] == 0


def test_what_is_undefined_is_none() -> None:
    result = metrics(called(0, 0, 0), np.array([0, 0, 1])).compute()
    assert result["sensitivity"] == {"control": 1, "pneumonia": 0, "covid": None}
    assert result["precision"] == {"control": 2 / 3, "pneumonia": None, "covid": None}
    assert result["f1"] == {"control": 0.8, "pneumonia": 0, "covid": None}
    assert result["specificity"] == {"control": 0, "pneumonia": 1, "covid": 1}
    assert result["auc"]["covid"] is None
    only = metrics(called(0), np.array([0])).compute()
    assert only["specificity"]["control"] is None
    assert only["auc"]["control"] is None
    with pytest.raises(DataError, match="empty"):
        ClassificationMetrics(CLASSES, []).compute()
