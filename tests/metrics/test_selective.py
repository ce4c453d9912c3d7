import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from monteclora.errors import ConfigError, DataError
from monteclora.metrics.selective import abstention_threshold, least_examples, risk_coverage, upper_bound


def answers(rows: int, seed: int, classes: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidences, whether each answer is right, and the true probability that it is."""
    generator = np.random.default_rng(seed)
    confidence = generator.beta(2.0, 1.0, size=rows)
    chance = 1.0 - (1.0 - confidence) ** 1.5
    return confidence, generator.random(rows) < chance, chance


class TestRiskCoverage:
    def test_by_hand(self):
        curve = risk_coverage([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0])
        np.testing.assert_allclose(curve.coverage, [0.25, 0.5, 0.75, 1.0])
        np.testing.assert_allclose(curve.risk, [0, 1 / 2, 1 / 3, 1 / 2])
        assert curve.aurc == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 4)
        assert curve.optimum == pytest.approx((1 / 3 + 1 / 2) / 4)  # two errors, at the end
        assert curve.excess == pytest.approx(1 / 8)
        assert [curve.accuracy_at(c) for c in (0.25, 0.3, 0.5, 1.0)] == [1.0, 0.5, 0.5, 0.5]

    @given(st.integers(0, 2**32 - 1), st.integers(1, 40))
    @settings(deadline=None)
    def test_ties_are_the_mean_over_all_orders(self, seed, rows):
        generator = np.random.default_rng(seed)
        confidence, correct = generator.integers(4, size=rows) / 4, generator.integers(2, size=rows)
        found = risk_coverage(confidence, correct)
        shuffled = []
        for _ in range(300):
            order = generator.permutation(rows)
            order = order[np.argsort(-confidence[order], kind="stable")]
            shuffled.append(np.cumsum(1 - correct[order]) / np.arange(1, rows + 1))
        np.testing.assert_allclose(found.risk, np.mean(shuffled, 0), atol=0.2)
        assert found.risk[-1] == pytest.approx(1 - correct.mean())

    @given(st.lists(st.booleans(), min_size=1, max_size=50))
    def test_a_perfect_ranking_has_no_excess(self, correct):
        assert risk_coverage(np.array(correct) + 0.5, correct).excess == pytest.approx(0, abs=1e-12)
        assert risk_coverage(np.random.default_rng(0).random(len(correct)), correct).excess >= -1e-12

    @pytest.mark.parametrize("coverage", [0.0, -1.0, 1.1])
    def test_a_wrong_coverage_is_refused(self, coverage):
        with pytest.raises(ConfigError, match="coverage is"):
            risk_coverage([0.5], [1]).accuracy_at(coverage)


class TestAbstention:
    def test_bound_is_clopper_and_pearsons(self):
        for errors, trials, level in ((0, 22, 0.9), (3, 50, 0.99), (10, 10, 0.5)):
            expected = stats.binomtest(errors, trials, alternative="less").proportion_ci(level, "exact").high
            assert upper_bound(errors, trials, level) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("rows", [180, 600])
    def test_the_promise_is_broken_no_more_often_than_said(self, rows):
        """200 splits: the true risk of what is answered is above 10 % in at most 10 %, within binomial error."""
        confidence, _, chance = answers(400_000, seed=0)
        broken = coverage = 0
        for seed in range(200):
            score, correct, _ = answers(rows, seed + 1)
            found = abstention_threshold(score, correct, risk=0.1, level=0.9)
            answered = ~found.abstains(confidence)
            broken += answered.any() and (1 - chance[answered]).mean() > 0.1
            coverage += found.coverage / 200
        assert broken <= stats.binom.ppf(0.999, 200, 0.1)
        assert coverage > {180: 0.04, 600: 0.2}[rows]  # a threshold that never answers keeps every promise

    def test_the_promise_holds_where_confidence_tells_nothing(self):
        """The hardest case: the risk is 10.5 % at every threshold, so that any answer at all breaks the promise."""
        broken = 0
        for seed in range(200):
            generator = np.random.default_rng(seed)
            found = abstention_threshold(generator.random(300), generator.random(300) > 0.105)
            broken += found.answered > 0
        assert broken <= stats.binom.ppf(0.999, 200, 0.1)

    def test_everything_and_nothing(self):
        nothing = abstention_threshold(np.linspace(0, 1, 20), np.ones(20))  # 0.9^20 is above 1 - 0.99
        assert (nothing.threshold, nothing.coverage, nothing.answered) == (np.inf, 0.0, 0)
        assert nothing.abstains([1.0]).all()
        everything = abstention_threshold(np.linspace(0, 1, 100), np.ones(100))
        assert (everything.threshold, everything.coverage, everything.errors) == (-np.inf, 1.0, 0)
        assert everything.bound == pytest.approx(1 - 0.01 ** (1 / 100))
        assert not everything.abstains([0.0]).any()

    @pytest.mark.parametrize(("risk", "level"), [(0.1, 0.9), (0.5, 0.5), (0.02, 0.99), (0.9, 0.1)])
    def test_the_least_examples_are_just_enough(self, risk, level):
        """So many right answers, all of one confidence, are answered, and one fewer are not."""
        count = least_examples(risk, level)
        assert abstention_threshold(np.ones(count), np.ones(count), risk, level).answered == count
        if count > 1:
            assert not abstention_threshold(np.ones(count - 1), np.ones(count - 1), risk, level).answered

    def test_equal_confidences_are_answered_together_or_not_at_all(self):
        score = np.repeat([0.9, 0.5], [100, 100])
        found = abstention_threshold(score, np.repeat([1, 0], [100, 100]))
        assert (found.threshold, found.answered, found.errors) == (0.5, 100, 0)
        assert found.abstains([0.9, 0.5, 0.4]).tolist() == [False, True, True]

    @pytest.mark.parametrize("wrong", [{"risk": 0.0}, {"risk": 1.0}, {"level": 1.5}])
    def test_wrong_settings_are_refused(self, wrong):
        with pytest.raises(ConfigError, match="expected a value between 0 and 1"):
            abstention_threshold([0.5], [1], **wrong)

    @pytest.mark.parametrize("arrays", [([], []), ([0.5], [1, 0]), ([[0.5]], [[1]]), ([0.5], [2]), ([np.nan], [1])])
    def test_malformed_arrays_are_refused(self, arrays):
        with pytest.raises(DataError):
            abstention_threshold(*arrays)
