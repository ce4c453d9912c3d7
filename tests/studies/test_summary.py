"""Statistics against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from monteclora.studies.folder import Outcome
from monteclora.studies.plan import Plan, Trial
from monteclora.studies.summary import _estimate, compare, summarise

# accuracy of (arm, learning rate, seed)
TABLE: dict[tuple[str, int, int], float | None] = {
    ("a", 1, 0): 0.9, ("a", 2, 0): 0.8, ("a", 3, 0): 0.5,
    ("a", 1, 1): 0.8, ("a", 2, 1): 0.7, ("a", 3, 1): 0.6,
    ("b", 1, 0): 0.7, ("b", 2, 0): 0.7, ("b", 3, 0): None,
    ("b", 1, 1): 0.6, ("b", 2, 1): 0.7, ("b", 3, 1): 0.8,
}  # fmt: skip


def made(table: dict[tuple[str, int, int], float | None] = TABLE) -> tuple[Plan, dict[str, Outcome]]:
    trials, outcomes = [], {}
    for (arm, rate, seed), accuracy in table.items():
        name = f"{arm}{rate}{seed}"
        trials.append(Trial(name, arm, {}, {"training.learning_rate": rate}, seed, cast(Any, None)))
        skill = {"no_skill": {"accuracy": 0.5}, "rows": 100}
        if accuracy is None:
            outcomes[name] = Outcome(name, "diverged", **skill)
        else:
            outcomes[name] = Outcome(name, "finished", metrics={"accuracy": accuracy}, **skill)
    study = SimpleNamespace(metric=None)
    return Plan(cast(Any, study), tuple(trials)), outcomes


def test_statistics_of_a_toy_study() -> None:
    a, b = summarise(*made())
    # seed 0: 0.9, 0.8, 0.5, the best of all is 0.9; seed 1: 0.8, 0.7, 0.6, the best of all is 0.8
    expected = {
        "best": 0.85, "median": 0.75, "mean": (2.2 / 3 + 0.7) / 2, "spread": 0.3, "iqr": (0.2 + 0.1) / 2,
        "std": ((0.13 / 3) ** 0.5 + 0.1) / 2, "worst_decile": (0.56 + 0.62) / 2,
        "regret": (0.9 - 2.2 / 3 + 0.1) / 2,
    }  # fmt: skip
    assert {name: e.value for name, e in a.statistics.items()} == pytest.approx(expected)
    # 0.4 and 0.2: s = 0.2 / sqrt(2), s / sqrt(2) = 0.1; t of one degree of freedom is 12.7062
    spread = a.statistics["spread"]
    assert (spread.low, spread.high) == pytest.approx((0.3 - 1.27062, 0.3 + 1.27062), abs=1e-6)
    # the diverged run counts with the majority class's accuracy, 0.5
    assert b.statistics["spread"].value == pytest.approx(0.2)
    assert (a.trials, a.diverged, a.collapsed) == (6, 0, 1)  # 0.5 is within 0.05 of 0.5
    assert (b.trials, b.diverged, b.failed) == (6, 1, 0)
    # seed 0: 0.7, 0.7, 0.5 under 0.9; seed 1: 0.6, 0.7, 0.8 under 0.8
    assert b.statistics["regret"].value == pytest.approx((0.9 - 1.9 / 3 + 0.1) / 2)


def test_paired_comparison_of_a_toy_study() -> None:
    (found,) = compare(*made())
    # a - b, seed 0: 0.2, 0.1, 0.0; seed 1: 0.2, 0.0, -0.2
    assert (found.cells, found.better, found.worse) == (6, 3, 1)
    assert found.difference.value == pytest.approx(0.05)
    assert found.spread_difference is not None
    assert found.spread_difference.value == pytest.approx((0.4 - 0.2 + 0.2 - 0.2) / 2)


def test_intervals_over_three_seeds_exclude_zero_in_one_case_of_twenty() -> None:
    # 0.2, 0.4, 0.6: s = 0.2, t of two degrees of freedom is 4.302653
    (a,) = summarise(*made({("a", rate, seed): 0.1 * rate * (seed + 1) for rate in (1, 3) for seed in (0, 1, 2)}))
    reach = 4.302653 * 0.2 / 3**0.5
    spread = a.statistics["spread"]
    assert (spread.low, spread.high) == pytest.approx((0.4 - reach, 0.4 + reach), abs=1e-6)
    noise = np.random.default_rng(0).normal(size=(2000, 3))
    found = [_estimate(list(values)) for values in noise]
    excluded = np.mean([e.low > 0 or e.high < 0 for e in found if e.low is not None and e.high is not None])
    assert excluded == pytest.approx(0.05, abs=0.015)  # three standard errors; a bootstrap has 0.32


def test_a_single_seed_has_no_interval() -> None:
    plan, outcomes = made()
    kept = tuple(trial for trial in plan.trials if trial.seed == 0)
    a, _ = summarise(Plan(plan.study, kept), {t.id: outcomes[t.id] for t in kept})
    assert (a.statistics["spread"].value, a.statistics["spread"].low) == (pytest.approx(0.4), None)


def test_seeds_with_fewer_settings_do_not_narrow_a_spread() -> None:
    """A study that was cut, or is not done: the statistics are those of the whole seeds."""
    whole = summarise(*made())
    partial = {("a", 1, 2): 0.1, ("b", 1, 2): 0.2, ("b", 2, 2): 0.9}
    cut = summarise(*made({**TABLE, **partial}))
    for before, after in zip(whole, cut, strict=True):
        assert after.statistics == before.statistics
        assert after.seeds == (0, 1)
    assert [after.trials for after in cut] == [7, 8]
    before, after = compare(*made()), compare(*made({**TABLE, **partial}))
    assert after == before


def test_arms_are_compared_on_the_largest_block_that_is_done() -> None:
    """A study that is not done: what one seed alone has does not keep the others from being compared."""
    cells = [(rate, seed) for seed in (0, 1, 2) for rate in (1, 2)] + [(3, 0)]
    table = {(arm, rate, seed): 0.1 * rate * (1 + (arm == "a")) for arm in ("a", "b") for rate, seed in cells}
    (found,) = compare(*made(table))
    assert (found.cells, found.seeds) == (6, 3)
    assert found.spread_difference is not None
    assert found.spread_difference.value == pytest.approx(0.1)  # rates 1 and 2: 0.2 and 0.1
    (found,) = compare(*made({key: value for key, value in table.items() if key[1:] != (2, 1)}))
    # seed 0 with rates 1 to 3, seeds 0 and 2 with 1 and 2, or all three with rate 1: 3, 4 and 3 cells
    assert (found.cells, found.seeds) == (4, 2)
    # seeds 0 and 2 share three settings, and the seed with the most has none of them
    cells = [(rate, 0) for rate in (1, 2, 3)] + [(rate, 2) for rate in (1, 2, 3)] + [(rate, 1) for rate in (4, 5, 6, 7)]
    (found,) = compare(*made({(arm, rate, seed): 0.1 * rate for arm in ("a", "b") for rate, seed in cells}))
    assert (found.cells, found.seeds) == (6, 2)


def test_a_single_setting_has_no_spread() -> None:
    table = {(arm, 1, seed): 0.1 * seed for arm in ("a", "b") for seed in (0, 1, 2)}
    for arm in summarise(*made(table)):
        assert set(arm.statistics) == {"best", "median", "mean", "worst_decile", "regret"}
        assert arm.statistics["mean"].value == pytest.approx(0.1)
    (found,) = compare(*made(table))
    assert (found.cells, found.seeds, found.spread_difference) == (3, 3, None)


def test_an_arm_without_an_option_is_compared_with_each_of_its_values() -> None:
    plan, outcomes = made()
    trials = []
    for trial in plan.trials:
        if trial.arm == "a":
            trials.append(trial)
            continue
        for width in (8, 32):
            name = f"{trial.id}-{width}"
            trials.append(replace(trial, id=name, settings={**trial.settings, "method.width": width}))
            outcomes[name] = replace(outcomes[trial.id], trial=name)
    (found,) = compare(Plan(plan.study, tuple(trials)), outcomes)
    (once,) = compare(plan, outcomes)
    assert (found.cells, found.better, found.worse) == (2 * once.cells, 2 * once.better, 2 * once.worse)
    assert found.difference.value == pytest.approx(once.difference.value)
    assert found.spread_difference == once.spread_difference
