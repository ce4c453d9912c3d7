"""Metrics of several labels of a row against scikit-learn, and against those of two classes."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss

from monteclora.errors import DataError
from monteclora.metrics.calibration import expected_calibration_error
from monteclora.metrics.multi_label import decisions, f1_macro, subset_accuracy
from monteclora.metrics.registry import measure

GENERATOR = np.random.default_rng(0)
LABELS = (GENERATOR.random((300, 4)) < [0.5, 0.3, 0.1, 0.02]).astype(int)
PROBS = np.clip(0.6 * LABELS + GENERATOR.random((300, 4)) * 0.5, 0.001, 0.999)


def test_they_are_those_of_the_library() -> None:
    found = measure("labels", PROBS, LABELS)
    predicted = PROBS > 0.5
    assert found["subset_accuracy"] == pytest.approx(accuracy_score(LABELS, predicted))
    assert found["f1_micro"] == pytest.approx(f1_score(LABELS, predicted, average="micro"))
    assert found["f1_macro"] == pytest.approx(f1_score(LABELS, predicted, average="macro", zero_division=0))
    assert found["nll"] == pytest.approx(np.mean([log_loss(y, p) for y, p in zip(LABELS.T, PROBS.T, strict=True)]))
    assert found["ece"] == pytest.approx(expected_calibration_error(*decisions(PROBS, LABELS)))
    assert measure("labels", PROBS, LABELS, bins=3)["ece"] != found["ece"]


def test_a_probability_of_one_half_predicts_nothing() -> None:
    assert subset_accuracy([[0.5, 0.51]], [[0, 1]]) == 1.0
    probs, labels = decisions([[0.5, 0.51]], [[0, 1]])
    assert probs.argmax(1).tolist() == [0, 1] == labels.tolist()


def test_one_label_alone_is_no_two_classes() -> None:
    assert f1_macro([[0.9], [0.1]], [[1], [0]]) == 1.0
    assert f1_macro([[0.1], [0.1]], [[0], [0]]) == 0.0


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        ([[0.5]], [[0, 1]], "shape"),
        ([[1.5]], [[1]], r"probs\[0, 0\] is 1.5"),
        ([[0.5]], [[2]], "another number than 0 and 1"),
    ],
)
def test_malformed_arguments_are_named(probs: list[list[float]], labels: list[list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        subset_accuracy(probs, labels)
