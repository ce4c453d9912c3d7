import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax, softmax

from monteclora.metrics.calibration import (
    brier_decomposition,
    classwise_calibration_error,
    equal_mass_calibration_error,
    expected_calibration_error,
    fitted_temperature,
    reliability_curve,
    smooth_calibration_error,
    smoothed_nll,
    tempered_nll,
)
from monteclora.metrics.classification import brier, nll


def calibrated(rows: int, seed: int = 0, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and labels drawn from them."""
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.ones(classes), size=rows)
    return probs, (probs.cumsum(1) < generator.random((rows, 1))).sum(1).clip(max=classes - 1)


def two(confidence: np.ndarray) -> np.ndarray:
    """Two classes, class 0 predicted with this confidence of at least a half."""
    return np.stack([confidence, 1 - confidence], 1)


def slow_smooth_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """From the definition, by quadrature and bisection."""
    t = (np.arange(4000) + 0.5) / 4000

    def smoothed(sigma: float) -> float:
        kernel = sum(
            stats.norm.pdf(t[:, None], 2 * k + sign * confidence, sigma) for k in range(-4, 5) for sign in (-1, 1)
        )
        return float(np.abs(kernel @ (correct - confidence) / len(correct)).mean())

    low, high = 1e-4, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if smoothed(middle) < middle else (middle, high)
    return high


@pytest.mark.parametrize("rows", [1, 7, 60])
def test_smooth_error_is_its_definition(rows):
    generator = np.random.default_rng(rows)
    confidence = generator.uniform(0.5, 1.0, rows)
    labels = generator.integers(2, size=rows)
    found = smooth_calibration_error(two(confidence), labels)
    assert found == pytest.approx(slow_smooth_error(confidence, labels == 0), abs=5e-4)


def test_smooth_error_of_a_constant_gap_is_the_gap():
    """With one confidence the integral is the gap at any sigma, however the kernel is reflected."""
    labels = np.repeat([0, 1], [60, 40])
    assert smooth_calibration_error(two(np.full(100, 0.9)), labels) == pytest.approx(0.3, abs=1e-4)
    assert smooth_calibration_error(two(np.ones(5)), np.zeros(5, dtype=int)) == 0.0


def test_errors_of_calibrated_probabilities_vanish_with_rows():
    probs, labels = calibrated(60_000)
    for error in (
        expected_calibration_error,
        equal_mass_calibration_error,
        classwise_calibration_error,
        smooth_calibration_error,
    ):
        assert error(probs, labels) < 0.012
        assert error(probs**3 / (probs**3).sum(1, keepdims=True), labels) > 0.05


def test_equal_mass_by_hand():
    confidence = np.array([0.6, 0.7, 0.8, 0.9])
    curve = reliability_curve(two(confidence), [0, 1, 0, 0], bins=2, binning="mass")
    assert curve.counts.tolist() == [2, 2]
    np.testing.assert_allclose(curve.accuracy, [0.5, 1.0])
    assert curve.ece == pytest.approx((0.15 + 0.15) / 2)


def test_equal_confidences_share_a_bin_of_equal_mass():
    curve = reliability_curve(two(np.full(30, 0.8)), [0] * 20 + [1] * 10, bins=15, binning="mass")
    assert curve.counts.sum() == 30
    assert curve.ece == pytest.approx(0.8 - 2 / 3)


def test_classwise_sees_what_the_predicted_class_does_not():
    """The predicted class is right as often as it is confident; the other two are mixed up."""
    probs = np.tile([0.6, 0.4, 0.0], (100, 1))
    labels = np.repeat([0, 2], [60, 40])
    assert expected_calibration_error(probs, labels) == pytest.approx(0, abs=1e-12)
    assert classwise_calibration_error(probs, labels) == pytest.approx((0.0 + 0.4 + 0.4) / 3)


@pytest.mark.parametrize("bins", [1, 4, 15])
@pytest.mark.parametrize("classes", [2, 5])
def test_brier_parts_add_up_exactly(classes, bins):
    probs, labels = calibrated(200, seed=bins, classes=classes)
    parts = brier_decomposition(probs, labels, bins)
    total = parts.reliability - parts.resolution + parts.uncertainty
    assert total == pytest.approx(brier(probs, labels), abs=1e-12)
    frequencies = np.bincount(labels, minlength=classes) / 200
    assert parts.uncertainty == pytest.approx(1 - np.square(frequencies).sum())


def test_brier_parts_of_the_overall_frequencies():
    labels = np.repeat([0, 1], [30, 70])
    parts = brier_decomposition(np.tile([0.3, 0.7], (100, 1)), labels)
    assert (parts.reliability, parts.resolution) == pytest.approx((0, 0), abs=1e-12)


def test_intervals_of_bins_are_clopper_and_pearsons():
    probs, labels = calibrated(300)
    curve = reliability_curve(probs, labels, bins=10)
    low, high = curve.accuracy_interval(0.9)
    for m, count in enumerate(curve.counts):
        if count == 0:
            assert np.isnan([low[m], high[m]]).all()
            continue
        expected = stats.binomtest(round(curve.accuracy[m] * count), int(count)).proportion_ci(0.9, "exact")
        assert (low[m], high[m]) == pytest.approx((expected.low, expected.high), abs=1e-9)


# -- temperature ------------------------------------------------------------------------------------------------------


def test_tempered_nll_does_not_depend_on_how_sure_the_predictions_are() -> None:
    generator = np.random.default_rng(0)
    logits, labels = 3 * generator.standard_normal((200, 4)), generator.integers(0, 4, 200)
    labels[:120] = logits[:120].argmax(axis=1)  # better than chance
    found = tempered_nll(softmax(logits, axis=1), labels)
    for factor in (0.2, 0.7, 3.0):
        assert tempered_nll(softmax(logits * factor, axis=1), labels) == pytest.approx(found, abs=1e-6)
        assert nll(softmax(logits * factor, axis=1), labels) > found
    best = fitted_temperature(logits, labels)
    assert nll(softmax(logits / best, axis=1), labels) == pytest.approx(found, abs=1e-9)
    lowest = smoothed_nll(log_softmax(logits / best, axis=1), labels)
    for other in (0.97, 1.03):
        assert smoothed_nll(log_softmax(logits / (best * other), axis=1), labels) > lowest


def test_smoothing_is_a_row_of_no_class_in_particular() -> None:
    logs = log_softmax(np.random.default_rng(1).standard_normal((9, 3)), axis=1)
    labels = np.arange(9) % 3
    per_row = 0.9 * -logs[np.arange(9), labels] + 0.1 * -logs.mean(axis=1)
    assert smoothed_nll(logs, labels) == pytest.approx(per_row.mean())


@pytest.mark.parametrize("rows", [10, 100, 1000])
def test_rows_that_are_all_right_do_not_make_certain(rows: int) -> None:
    """Without smoothing, their NLL falls for ever as the temperature falls."""
    logits = np.tile([[2.0, 0.0], [0.0, 2.0]], (rows // 2, 1))
    labels = np.tile([0, 1], rows // 2)
    wrong = softmax(logits / fitted_temperature(logits, labels), axis=1).min(axis=1)
    assert wrong == pytest.approx(0.5 / (rows + 1), rel=1e-3)  # of a row in rows + 1, a half


def test_predictions_worse_than_chance_are_tempered_towards_it() -> None:
    logits = np.array([[4.0, 0.0], [0.0, 4.0]])
    assert tempered_nll(softmax(logits, axis=1), [1, 0]) == pytest.approx(np.log(2), abs=0.05)


def test_a_probability_of_zero_stays_finite() -> None:
    assert np.isfinite(tempered_nll([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [0, 1, 1]))
