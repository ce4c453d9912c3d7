import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    log_loss,
    matthews_corrcoef,
    mean_squared_error,
)

from monteclora.errors import ConfigError, DataError
from monteclora.metrics.calibration import expected_calibration_error, reliability_curve
from monteclora.metrics.classification import accuracy, brier, f1, matthews, nll, nll_per_example
from monteclora.metrics.intervals import bootstrap_interval
from monteclora.metrics.registry import measure


def random_case(seed: int, examples: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.full(classes, 0.7), size=examples)
    return probs, generator.integers(classes, size=examples)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    return random_case(draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 60)), draw(st.integers(2, 7)))


class TestAgainstScikitLearn:
    @pytest.mark.parametrize("classes", [2, 3, 12])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_every_metric_it_has(self, classes, dtype):
        probs, labels = random_case(classes, 400, classes)
        predicted = probs.argmax(axis=1)
        average = "binary" if classes == 2 else "macro"
        expected = {
            "accuracy": accuracy_score(labels, predicted),
            "f1": f1_score(labels, predicted, average=average),
            "mcc": matthews_corrcoef(labels, predicted),
            "nll": log_loss(labels, probs, labels=range(classes)),
            "brier": classes * mean_squared_error(np.eye(classes)[labels], probs),
        }
        measured = measure("classes", probs.astype(dtype), labels)
        assert measured.pop("ece") == expected_calibration_error(probs.astype(dtype), labels)
        assert measured == pytest.approx(expected, rel=1e-5)


class TestByHand:
    probs = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    labels = np.array([0, 1, 1, 1])

    def test_counts(self):
        assert accuracy(self.probs, self.labels) == 0.75
        assert f1(self.probs, self.labels) == pytest.approx(0.8)  # precision 1, recall 2/3
        # true positives 2, true negatives 1, false negatives 1
        assert matthews(self.probs, self.labels) == pytest.approx(2 / math.sqrt(2 * 3 * 1 * 2))

    def test_proper_scores(self):
        assert nll(self.probs, self.labels) == pytest.approx(-math.log(0.9 * 0.4 * 0.8 * 0.7) / 4)
        assert brier(self.probs, self.labels) == pytest.approx(2 * (0.01 + 0.36 + 0.04 + 0.09) / 4)

    def test_calibration(self):
        curve = reliability_curve(self.probs, self.labels, bins=5)
        assert curve.counts.tolist() == [0, 0, 1, 2, 1]  # 0.6 and 0.8 close their bins
        assert curve.confidence[2:] == pytest.approx([0.6, 0.75, 0.9])
        assert curve.accuracy[2:].tolist() == [0.0, 1.0, 1.0]
        assert np.isnan(curve.confidence[:2]).all()
        assert curve.ece == pytest.approx((0.6 + 2 * 0.25 + 0.1) / 4)

    def test_macro_f1_is_over_classes_that_occur(self):
        probs = np.eye(4)[[0, 0, 1]]
        assert f1(probs, [0, 1, 1]) == pytest.approx(2 / 3)  # classes 2 and 3 do not occur

    def test_an_underflowed_label_costs_a_finite_amount_and_nothing_else_changes(self):
        losses = nll_per_example([[1.0, 0.0], [1.0, 1e-30]], [1, 1])
        assert losses == pytest.approx([87.3365, 30 * math.log(10)], rel=1e-5)

    def test_one_class_everywhere_is_defined(self):
        measured = measure("classes", [[0.8, 0.2], [0.9, 0.1]], [0, 0])
        assert (measured["accuracy"], measured["f1"], measured["mcc"]) == (1.0, 0.0, 0.0)


class TestProperties:
    @given(cases(), st.randoms(use_true_random=False))
    @settings(deadline=None, max_examples=60)
    def test_the_order_of_examples_does_not_matter(self, case, random):
        probs, labels = case
        order = list(range(len(labels)))
        random.shuffle(order)
        shuffled = measure("classes", probs[order], labels[order])
        assert shuffled == pytest.approx(measure("classes", probs, labels), abs=1e-12)

    @given(cases(), st.randoms(use_true_random=False))
    @settings(deadline=None, max_examples=60)
    def test_the_names_of_classes_do_not_matter_beyond_binary_f1(self, case, random):
        probs, labels = case
        classes = list(range(probs.shape[1]))
        random.shuffle(classes)
        renamed = measure("classes", probs[:, classes], np.argsort(classes)[labels])
        original = measure("classes", probs, labels)
        if len(classes) == 2:
            del renamed["f1"], original["f1"]
        assert renamed == pytest.approx(original, abs=1e-12)

    @given(cases())
    @settings(deadline=None, max_examples=60)
    def test_ranges(self, case):
        probs, labels = case
        measured = measure("classes", probs, labels)
        assert 0.0 <= measured["accuracy"] <= 1.0
        assert 0.0 <= measured["f1"] <= 1.0
        assert -1.0 <= measured["mcc"] <= 1.0
        assert measured["nll"] >= 0.0
        assert 0.0 <= measured["brier"] <= 2.0
        assert 0.0 <= measured["ece"] <= 1.0

    @given(cases(), st.integers(1, 40))
    @settings(deadline=None, max_examples=60)
    def test_the_curve_accounts_for_every_example(self, case, bins):
        probs, labels = case
        curve = reliability_curve(probs, labels, bins)
        used = curve.counts > 0
        assert curve.counts.sum() == len(labels)
        assert len(curve.edges) == bins + 1
        assert (curve.confidence[used] > curve.edges[:-1][used]).all()
        assert (curve.confidence[used] <= curve.edges[1:][used] + 1e-12).all()
        assert np.sum(curve.accuracy[used] * curve.counts[used]) == pytest.approx(accuracy(probs, labels) * len(labels))

    @given(st.integers(1, 50), st.integers(1, 30))
    @settings(deadline=None, max_examples=60)
    def test_a_perfectly_calibrated_model_has_no_error(self, repeats, bins):
        # Confidence k/10 on ten examples, of which exactly k are right.
        probs, labels = [], []
        for k in range(5, 11):
            probs += [[k / 10, 1 - k / 10]] * 10 * repeats
            labels += ([0] * k + [1] * (10 - k)) * repeats
        assert expected_calibration_error(probs, labels, bins) == pytest.approx(0.0, abs=1e-12)

    def test_certain_and_wrong_is_the_worst_case(self):
        probs, labels = np.eye(3)[[0, 1, 2]], np.array([1, 2, 0])
        measured = measure("classes", probs, labels)
        assert (measured["accuracy"], measured["brier"], measured["ece"]) == (0.0, 2.0, 1.0)


class TestBootstrap:
    def test_matches_the_normal_interval_on_many_values(self):
        values = np.random.default_rng(0).normal(3.0, 2.0, size=4000)
        interval = bootstrap_interval(values, seed=1)
        half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
        assert interval.mean == pytest.approx(values.mean())
        assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
        assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)

    def test_covers_the_true_mean_about_as_often_as_it_says(self):
        generator = np.random.default_rng(5)
        intervals = [
            bootstrap_interval(generator.normal(size=80), seed=i, level=0.8, resamples=400) for i in range(300)
        ]
        covered = np.mean([interval.low <= 0.0 <= interval.high for interval in intervals])
        assert 0.72 < covered < 0.87  # 0.8 within three standard errors, less the percentile method's small bias

    def test_depends_on_the_seed_alone(self):
        values = np.random.default_rng(0).normal(size=200)
        np.random.seed(7)
        before = np.random.get_state()[1].copy()
        assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
        assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
        assert (np.random.get_state()[1] == before).all()

    def test_a_higher_level_is_wider(self):
        values = np.random.default_rng(0).normal(size=200)
        narrow, wide = (bootstrap_interval(values, seed=0, level=level) for level in (0.5, 0.99))
        assert wide.low < narrow.low < narrow.high < wide.high

    def test_constant_values_leave_no_doubt(self):
        interval = bootstrap_interval([0.25] * 10, seed=0)
        assert (interval.low, interval.high) == (0.25, 0.25)

    @pytest.mark.parametrize(
        ("values", "options", "error", "named"),
        [
            ([1.0], {}, DataError, r"values has shape \(1,\)"),
            ([[1.0, 2.0]], {}, DataError, r"values has shape \(1, 2\)"),
            ([1.0, math.nan], {}, DataError, r"values\[1\] is not finite"),
            ([1.0, 2.0], {"level": 1.0}, ConfigError, "level is 1.0"),
            ([1.0, 2.0], {"resamples": 0}, ConfigError, "resamples is 0"),
        ],
    )
    def test_refusals(self, values, options, error, named):
        with pytest.raises(error, match=named):
            bootstrap_interval(values, seed=0, **options)


@pytest.mark.parametrize(
    "metric", [accuracy, f1, matthews, nll, brier, expected_calibration_error, partial(measure, "classes")]
)
@pytest.mark.parametrize(
    ("probs", "labels", "named"),
    [
        ([0.5, 0.5], [0], r"probs has shape \(2,\)"),
        ([[1.0], [1.0]], [0, 0], r"probs has shape \(2, 1\)"),
        (np.empty((0, 2)), [], r"probs has shape \(0, 2\)"),
        ([[0.5, 0.5], [1.0]], [0, 0], "probs is not a rectangular array"),
        ([[0.5, 0.5], [math.nan, 1.0]], [0, 0], r"probs\[1, 0\] is not finite"),
        ([[0.5, 0.5], [-0.2, 1.2]], [0, 0], r"probs\[1, 0\] is -0.2"),
        ([[3.1, 0.4]], [0], r"probs\[0, 0\] is 3.1"),
        ([[0.5, 0.5], [0.4, 0.4]], [0, 0], r"probs\[1\] sums to 0.8"),
        ([[0.5, 0.5]], [0, 1], r"labels has shape \(2,\)"),
        ([[0.5, 0.5]], [0.0], "labels has type float64"),
        ([[0.5, 0.5], [0.5, 0.5]], [0, 2], r"labels\[1\] is 2; expected 0 to 1"),
        ([[0.5, 0.5]], [-100], r"labels\[0\] is -100"),
    ],
)
def test_malformed_input_is_refused_by_name(metric, probs, labels, named):
    with pytest.raises(DataError, match=named) as caught:
        metric(probs, labels)
    assert caught.value.hint


def test_bins_must_be_positive():
    with pytest.raises(ConfigError, match="bins is 0"):
        reliability_curve([[0.5, 0.5]], [0], bins=0)
