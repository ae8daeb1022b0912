"""Classification metrics against numbers worked out by hand, counts and scipy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ctmasknet.errors import ConfigError, DataError
from ctmasknet.evaluation.metrics import ClassificationMetrics

CLASSES = ("control", "pneumonia", "covid")


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
    metrics = ClassificationMetrics(CLASSES)
    metrics.update(called(0, 0, 1, 1, 2, 2, 2, 0), np.array([0, 0, 0, 1, 2, 2, 1, 2]))
    result = metrics.compute()
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
    metrics = ClassificationMetrics(CLASSES)
    metrics.update(probabilities[:77], labels[:77])
    metrics.update(torch.from_numpy(probabilities[77:]), torch.from_numpy(labels[77:]))
    result = metrics.compute()
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
    once, again = ClassificationMetrics(CLASSES), ClassificationMetrics(CLASSES)
    once.update(probabilities, labels)
    again.update(probabilities.repeat(weights, axis=0), labels.repeat(weights))
    expected = again.compute()
    found = once.statistic()(weights.astype(float))
    assert found.pop("accuracy") == pytest.approx(expected["accuracy"])
    assert found == pytest.approx({f"{key}.{name}": expected[key][name] for key, name in (k.split(".") for k in found)})


def test_auc_equals_the_mann_whitney_statistic_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    probabilities, labels = random_batch(1, ties=True)
    metrics = ClassificationMetrics(CLASSES)
    metrics.update(probabilities, labels)
    for index, auc in enumerate(metrics.compute()["auc"].values()):
        score = probabilities[:, index]
        u = stats.mannwhitneyu(score[labels == index], score[labels != index]).statistic
        assert auc == pytest.approx(u / ((labels == index).sum() * (labels != index).sum()))


def test_what_is_undefined_is_none() -> None:
    metrics = ClassificationMetrics(CLASSES)
    metrics.update(called(0, 0, 0), np.array([0, 0, 1]))
    result = metrics.compute()
    assert result["sensitivity"] == {"control": 1, "pneumonia": 0, "covid": None}
    assert result["precision"] == {"control": 2 / 3, "pneumonia": None, "covid": None}
    assert result["f1"] == {"control": 0.8, "pneumonia": 0, "covid": None}
    assert result["specificity"] == {"control": 0, "pneumonia": 1, "covid": 1}
    assert result["auc"]["covid"] is None
    only = ClassificationMetrics(CLASSES)
    only.update(called(0), np.array([0]))
    assert only.compute()["specificity"]["control"] is None
    assert only.compute()["auc"]["control"] is None


def test_merging_gives_the_figures_of_one_process() -> None:
    probabilities, labels = random_batch(2, n=40)
    names = [f"{i}.png" for i in range(40)]
    whole, first, second = (ClassificationMetrics(CLASSES) for _ in range(3))
    whole.update(probabilities, labels, names)
    first.update(probabilities[::2], labels[::2], names[::2])
    second.update(probabilities[1::2], labels[1::2], names[1::2])
    first.add(json.loads(json.dumps(second.rows)))
    assert first.compute() == whole.compute()
    with pytest.raises(DataError, match=r"1\.png"):
        first.add(second.rows)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.full((1, 2), 0.5), [0], "shape"),
        (np.array([[3.0, -1.0, -1.0]]), [0], "softmax"),
        (np.array([[np.nan, 0.5, 0.5]]), [0], "softmax"),
        (np.array([[0.9, 0.9, 0.9]]), [0], "softmax"),
        (called(0), [3], "labels"),
        (called(0), [-1], "labels"),
        (called(0), [0, 1], "labels"),
        (called(0), [0.0], "labels"),
    ],
)
def test_ill_fitting_input_is_named(probabilities: np.ndarray, labels: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ClassificationMetrics(CLASSES).update(probabilities, np.array(labels))


def test_half_precision_probabilities_are_accepted() -> None:
    metrics = ClassificationMetrics(CLASSES)
    metrics.update(torch.randn(50, 3).softmax(1).bfloat16(), torch.zeros(50, dtype=torch.int64))
    assert metrics.compute()["n"] == 50


def test_no_images_no_class_names_and_repeated_names() -> None:
    with pytest.raises(DataError, match="empty"):
        ClassificationMetrics(CLASSES).compute()
    with pytest.raises(ConfigError, match="class_names"):
        ClassificationMetrics(["covid"])
    with pytest.raises(DataError, match=r"a\.png"):
        ClassificationMetrics(CLASSES).update(called(0, 1), np.array([0, 1]), ["a.png", "a.png"])
    with pytest.raises(DataError, match="image_ids"):
        ClassificationMetrics(CLASSES).update(called(0, 1), np.array([0, 1]), ["a.png"])
