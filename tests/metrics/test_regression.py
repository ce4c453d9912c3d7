"""Metrics of scores against closed forms and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from monteclora.errors import DataError
from monteclora.metrics import regression
from monteclora.metrics.registry import measure

GENERATOR = np.random.default_rng(0)
SCORES = GENERATOR.normal(3.0, 2.0, 4000)
MEAN = SCORES + GENERATOR.normal(0.0, 1.5, 4000)
VARIANCE = np.full(4000, 1.5**2)


def test_they_are_those_of_the_libraries() -> None:
    found = measure("scores", MEAN, VARIANCE, SCORES)
    assert found["rmse"] == pytest.approx(root_mean_squared_error(SCORES, MEAN))
    assert found["mae"] == pytest.approx(mean_absolute_error(SCORES, MEAN))
    assert found["r2"] == pytest.approx(r2_score(SCORES, MEAN))
    assert found["spearman"] == pytest.approx(stats.spearmanr(SCORES, MEAN).statistic)
    assert found["nll"] == pytest.approx(-stats.norm.logpdf(SCORES, MEAN, 1.5).mean())
    assert list(found) == ["rmse", "mae", "r2", "spearman", "nll", "coverage_90"]


def test_coverage_is_the_level_where_the_variance_is_right_and_not_where_it_is_not() -> None:
    tolerance = 4 * np.sqrt(0.9 * 0.1 / 4000)
    assert regression.coverage(MEAN, VARIANCE, SCORES) == pytest.approx(0.9, abs=tolerance)
    for wrong in (0.8, 1.25):  # of the standard deviation
        assert abs(regression.coverage(MEAN, VARIANCE * wrong**2, SCORES) - 0.9) > tolerance


def test_what_is_undefined_is_zero() -> None:
    ones, steps = np.ones(3), np.arange(3.0)
    assert regression.r2(steps, ones, ones) == regression.spearman(steps, ones, ones) == 0.0
    assert regression.spearman(ones, ones, steps) == 0.0
    equal = np.full(7, 0.7)  # whose squared deviations are rounded to a little above 0
    assert regression.r2(np.arange(7.0), np.ones(7), equal) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1.0], [1.0, 2.0]), "shapes"),
        (([1.0], [0.0], [1.0]), r"variance\[0\] is 0"),
        (([np.nan], [1.0], [1.0]), r"mean\[0\] is not finite"),
    ],
)
def test_malformed_arguments_are_named(arguments: tuple[list[float], ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        regression.rmse(*arguments)
