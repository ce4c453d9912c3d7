"""How robust each arm of a study is: statistics over its settings, with intervals over seeds.

Every statistic is taken over the settings of one seed, and averaged over the seeds: more seeds do not widen a spread.
Fewer settings narrow one, so only the seeds with the most results of an arm count: a seed that a limit, a failure or an
unfinished study left with fewer is not used. Two arms are compared on cells that both have, and so on the largest block
of settings that the same seeds all have. A single setting has no spread.
A diverged run counts with what a prediction that does not look at the row is worth, or, where that is unknown, with the
worst value in the study under its condition; it has no calibration error. Failed trials have no value and are counted.
Intervals (95 %) are Student's t over seeds: mean ± t s / √n with n - 1 degrees of freedom. Percentiles of a
bootstrap would be too narrow for so few: with three seeds of pure noise they exclude zero in 32 % of cases.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from monteclora.metrics.registry import METRICS, Metric
from monteclora.studies.folder import Outcome
from monteclora.studies.plan import Plan, Trial

__all__ = [
    "STATISTICS",
    "Comparison",
    "Estimate",
    "Summary",
    "by_condition",
    "compare",
    "primary_metric",
    "summarise",
    "trial_values",
]

FloatArray = NDArray[np.float64]
_Cell = tuple[int, str]  # a seed, and settings as text
_WITHOUT_DIVERGED = ("ece",)
_LEVEL = 0.95
_OF_SEVERAL = ("spread", "iqr", "std")  # say nothing of a single setting


def _worst_decile(values: FloatArray, better: int) -> float:
    return float(np.quantile(values, 0.1 if better > 0 else 0.9))


# of the values of one seed and the direction in which they get better, 1 or -1
STATISTICS: Mapping[str, Callable[[FloatArray, int], float]] = {
    "best": lambda values, better: float(better * (better * values).max()),
    "median": lambda values, better: float(np.median(values)),
    "mean": lambda values, better: float(values.mean()),
    "spread": lambda values, better: float(values.max() - values.min()),
    "iqr": lambda values, better: float(np.quantile(values, 0.75) - np.quantile(values, 0.25)),
    "std": lambda values, better: float(values.std(ddof=1)),
    "worst_decile": _worst_decile,
}


@dataclass(frozen=True)
class Estimate:
    """A statistic and its interval over seeds; the ends are None with a single seed."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Summary:
    """One arm under one condition, in one metric.

    Attributes:
        arm, condition: which.
        metric: by name.
        statistics: by the names in :data:`STATISTICS`, and ``regret``: the mean shortfall from the best run of all
            arms with the same seed under the condition, at least 0. Those of a single setting lack ``spread``,
            ``iqr`` and ``std``.
        seeds: those that the statistics are taken over, see above.
        trials, diverged, failed, collapsed: how many, of all seeds; collapsed runs finished, and are no more than one
            standard error more accurate than the majority class.
        notes: what was done differently from the recipes, each with the number of trials that it holds for.
    """

    arm: str
    condition: Mapping[str, Any]
    metric: str
    statistics: Mapping[str, Estimate]
    seeds: tuple[int, ...]
    trials: int
    diverged: int
    failed: int
    collapsed: int
    notes: Mapping[str, int]


@dataclass(frozen=True)
class Comparison:
    """Two arms on the cells (setting and seed) that both have under a condition: first minus second.

    Settings are the same where they agree in every key that both arms have: an arm without an option is compared with
    each value that the other has of it.

    Attributes:
        first, second, condition, metric: what is compared.
        cells, better, worse: how many cells, and in how many the first is better and worse.
        seeds: how many the intervals are over.
        difference: of the metric's mean.
        spread_difference: of the spread; None where each seed has a single cell.
    """

    first: str
    second: str
    condition: Mapping[str, Any]
    metric: str
    cells: int
    better: int
    worse: int
    seeds: int
    difference: Estimate
    spread_difference: Estimate | None


def primary_metric(plan: Plan, outcomes: Mapping[str, Outcome]) -> Metric:
    """The metric that is shown first: the study's, else accuracy where it is measured, else NLL."""
    if plan.study.metric is not None:
        return METRICS[plan.study.metric]
    measured = {name for outcome in outcomes.values() for name in outcome.metrics}
    return METRICS["nll" if measured and "accuracy" not in measured else "accuracy"]


def summarise(plan: Plan, outcomes: Mapping[str, Outcome], whole: Plan | None = None) -> tuple[Summary, ...]:
    """Each arm under each condition, in the leading metric, NLL and ECE; what is not done yet is left out.

    Args:
        plan: of the trials that count.
        outcomes: of the study.
        whole: the plan that these are a part of; its trials say what the best run is and what diverged ones are worth.
    """
    found = []
    all_trials = {_text(group[0].conditions): group for group in by_condition(whole or plan, outcomes)}
    for group in by_condition(plan, outcomes):
        everything = all_trials[_text(group[0].conditions)]
        for metric in _metrics(plan, outcomes):
            values = trial_values(everything, outcomes, metric)
            best = _best(everything, values, metric)
            for arm in dict.fromkeys(trial.arm for trial in group):
                found.append(_summary(arm, [t for t in group if t.arm == arm], outcomes, metric, values, best))
    return tuple(summary for summary in found if summary is not None)


def compare(plan: Plan, outcomes: Mapping[str, Outcome], whole: Plan | None = None) -> tuple[Comparison, ...]:
    """Every pair of arms on the cells that both have. Arguments as :func:`summarise`."""
    found = []
    all_trials = {_text(group[0].conditions): group for group in by_condition(whole or plan, outcomes)}
    for group in by_condition(plan, outcomes):
        by_arm: dict[str, list[Trial]] = {}
        for trial in group:
            if outcomes[trial.id].status != "failed":
                by_arm.setdefault(trial.arm, []).append(trial)
        pairs = {names: _pairs(by_arm[names[0]], by_arm[names[1]]) for names in itertools.combinations(by_arm, 2)}
        for metric in _metrics(plan, outcomes):
            values = trial_values(all_trials[_text(group[0].conditions)], outcomes, metric)
            for names, of_both in pairs.items():
                measured = [
                    (cell, values[a.id], values[b.id]) for cell, a, b in of_both if {a.id, b.id} <= values.keys()
                ]
                block = _largest_block({cell for cell, _, _ in measured})
                if block:
                    rows = [(cell[0], a, b) for cell, a, b in measured if cell in block]
                    found.append(_comparison(*names, group[0].conditions, metric, rows))
    return tuple(found)


def _pairs(first: Sequence[Trial], second: Sequence[Trial]) -> list[tuple[_Cell, Trial, Trial]]:
    """The trials of two arms with one seed and the same settings."""
    one, other = ({key for trial in trials for key in trial.settings} for trials in (first, second))

    def cell(trial: Trial) -> _Cell:
        return trial.seed, _text({key: value for key, value in trial.settings.items() if key in one & other})

    partners: dict[_Cell, list[Trial]] = {}
    for trial in second:
        partners.setdefault(cell(trial), []).append(trial)
    return [(cell(trial), trial, partner) for trial in first for partner in partners.get(cell(trial), ())]


def _largest_block(cells: Iterable[_Cell]) -> set[_Cell]:
    """Seeds and settings of which every cell is there, as many as are found; of equal blocks one with more settings.

    From each seed on, the one that leaves the most settings in common is added. There is no quick way to be certain of
    the largest block; where seeds lack settings that others lack too, as in a study that is not done, this finds it.
    """
    settings: dict[int, set[str]] = {}
    for seed, setting in cells:
        settings.setdefault(seed, set()).add(setting)
    largest: set[_Cell] = set()
    size = (0, 0)
    for first in sorted(settings):
        block, shared = {first}, settings[first]
        while shared:
            if (found := (len(block) * len(shared), len(shared))) > size:
                size, largest = found, set(itertools.product(block, shared))
            rest = sorted(settings.keys() - block)
            if not rest:
                break
            added = max(rest, key=lambda seed: len(shared & settings[seed]))
            block, shared = block | {added}, shared & settings[added]
    return largest


def _whole_seeds(trials: Iterable[Trial]) -> set[int]:
    """The seeds of which there are the most trials."""
    counts = Counter(trial.seed for trial in trials)
    return {seed for seed, count in counts.items() if count == max(counts.values())}


def _comparison(
    first: str, second: str, condition: Mapping[str, Any], metric: Metric, pairs: Sequence[tuple[int, float, float]]
) -> Comparison:
    sign = 1 if metric.greater_is_better else -1
    gains = [sign * (a - b) for _, a, b in pairs]
    seeds = sorted({seed for seed, _, _ in pairs})
    means, spreads = [], []
    for seed in seeds:
        own = np.array([(a, b) for s, a, b in pairs if s == seed])
        means.append(float((own[:, 0] - own[:, 1]).mean()))
        if len(own) > 1:
            spreads.append(float(np.ptp(own[:, 0]) - np.ptp(own[:, 1])))
    return Comparison(
        first=first,
        second=second,
        condition=condition,
        metric=metric.name,
        cells=len(pairs),
        better=sum(gain > 0 for gain in gains),
        worse=sum(gain < 0 for gain in gains),
        seeds=len(seeds),
        difference=_estimate(means),
        spread_difference=_estimate(spreads) if spreads else None,
    )


def by_condition(plan: Plan, outcomes: Mapping[str, Outcome]) -> list[list[Trial]]:
    """The trials that are done, apart for each condition, in the plan's order."""
    groups: dict[str, list[Trial]] = {}
    for trial in plan.trials:
        if trial.id in outcomes:
            groups.setdefault(_text(trial.conditions), []).append(trial)
    return list(groups.values())


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _metrics(plan: Plan, outcomes: Mapping[str, Outcome]) -> list[Metric]:
    measured = {name for outcome in outcomes.values() for name in outcome.metrics}
    names = dict.fromkeys((primary_metric(plan, outcomes).name, "nll", "ece"))
    return [METRICS[name] for name in names if name in measured]


def trial_values(group: Sequence[Trial], outcomes: Mapping[str, Outcome], metric: Metric) -> dict[str, float]:
    """The metric of each trial that has one, by id; see above for diverged trials."""
    found = [outcomes[trial.id] for trial in group]
    values = {o.trial: o.metrics[metric.name] for o in found if metric.name in o.metrics}
    if metric.name in _WITHOUT_DIVERGED or not values:
        return values
    known = [o.no_skill[metric.name] for o in found if metric.name in o.no_skill]
    worst = min(values.values()) if metric.greater_is_better else max(values.values())
    return values | {o.trial: known[0] if known else worst for o in found if o.status == "diverged"}


def _best(trials: Sequence[Trial], values: Mapping[str, float], metric: Metric) -> dict[int, float]:
    """The best run of each seed."""
    choose = max if metric.greater_is_better else min
    by_seed = _by_seed(trials, values)
    return {seed: choose(found) for seed, found in by_seed.items()}


def _by_seed(trials: Sequence[Trial], values: Mapping[str, float]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for trial in sorted(trials, key=lambda trial: trial.seed):
        if trial.id in values:
            found.setdefault(trial.seed, []).append(values[trial.id])
    return found


def _summary(
    arm: str,
    trials: Sequence[Trial],
    outcomes: Mapping[str, Outcome],
    metric: Metric,
    values: Mapping[str, float],
    best: Mapping[int, float],
) -> Summary | None:
    better = 1 if metric.greater_is_better else -1
    found = [outcomes[trial.id] for trial in trials]
    whole = _whole_seeds(trial for trial in trials if outcomes[trial.id].status != "failed")
    by_seed = _by_seed([trial for trial in trials if trial.seed in whole], values)
    if not by_seed:
        return None
    seeds = {seed: np.array(of_seed) for seed, of_seed in by_seed.items()}
    several = all(len(of_seed) > 1 for of_seed in seeds.values())
    statistics = {
        name: _estimate([function(of_seed, better) for of_seed in seeds.values()])
        for name, function in STATISTICS.items()
        if several or name not in _OF_SEVERAL
    }
    statistics["regret"] = _estimate([float((better * (best[seed] - v)).mean()) for seed, v in seeds.items()])
    return Summary(
        arm=arm,
        condition=trials[0].conditions,
        metric=metric.name,
        statistics=statistics,
        seeds=tuple(seeds),
        trials=len(trials),
        diverged=sum(o.status == "diverged" for o in found),
        failed=sum(o.status == "failed" for o in found),
        collapsed=sum(_collapsed(o) for o in found),
        notes=Counter(note for o in found for note in dict.fromkeys(o.notes)),
    )


def _collapsed(outcome: Outcome) -> bool:
    if "accuracy" not in outcome.no_skill or "accuracy" not in outcome.metrics:
        return False
    chance = outcome.no_skill["accuracy"]
    return outcome.metrics["accuracy"] <= chance + (chance * (1 - chance) / outcome.rows) ** 0.5


def _estimate(by_seed: Sequence[float]) -> Estimate:
    """The mean over seeds with its interval."""
    values = np.array(by_seed)
    count, mean = len(values), float(values.mean())
    if count == 1:
        return Estimate(mean)
    reach = float(stats.t.ppf((1 + _LEVEL) / 2, count - 1) * values.std(ddof=1) / count**0.5)
    return Estimate(mean, mean - reach, mean + reach)
