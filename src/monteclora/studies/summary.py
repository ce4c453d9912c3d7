"""How robust each arm of a study is: statistics over its settings, with intervals over seeds.

Every statistic is taken over the settings of one seed, and averaged over the seeds: more seeds do not widen a spread.
A diverged run counts with what a prediction that does not look at the row is worth, or, where that is unknown, with the
worst value in the study under its condition; it has no calibration error. Failed trials have no value and are counted.
Intervals (95 %) are percentiles of the bootstrap that resamples seeds; all resamples are taken where there are at most
five seeds.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monteclora.metrics.registry import METRICS, Metric
from monteclora.studies.folder import Outcome
from monteclora.studies.plan import Plan, Trial

__all__ = ["STATISTICS", "Comparison", "Estimate", "Summary", "compare", "primary_metric", "summarise"]

FloatArray = NDArray[np.float64]
_WITHOUT_DIVERGED = ("ece",)
_LEVEL, _RESAMPLES, _ENUMERATED = 0.95, 2000, 5


def _worst_decile(values: FloatArray, better: int) -> float:
    return float(np.quantile(values, 0.1 if better > 0 else 0.9))


# of the values of one seed and the direction in which they get better, 1 or -1
STATISTICS: Mapping[str, Callable[[FloatArray, int], float]] = {
    "best": lambda values, better: float(better * (better * values).max()),
    "median": lambda values, better: float(np.median(values)),
    "mean": lambda values, better: float(values.mean()),
    "spread": lambda values, better: float(values.max() - values.min()),
    "iqr": lambda values, better: float(np.quantile(values, 0.75) - np.quantile(values, 0.25)),
    "std": lambda values, better: float(values.std(ddof=1)) if len(values) > 1 else 0.0,
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
        statistics: by the names in :data:`STATISTICS`, and ``regret``: the mean shortfall from the best setting of all
            arms under the condition, at least 0.
        trials, diverged, failed, collapsed: how many; collapsed runs finished, and are no more than one standard error
            more accurate than the majority class.
    """

    arm: str
    condition: Mapping[str, Any]
    metric: str
    statistics: Mapping[str, Estimate]
    trials: int
    diverged: int
    failed: int
    collapsed: int

    @property
    def shares(self) -> tuple[float, float]:
        """Of diverged and of collapsed runs among those with a result."""
        count = max(self.trials - self.failed, 1)
        return self.diverged / count, self.collapsed / count


@dataclass(frozen=True)
class Comparison:
    """Two arms on the cells (setting and seed) that both have under a condition: first minus second."""

    first: str
    second: str
    condition: Mapping[str, Any]
    metric: str
    cells: int
    better: int
    worse: int
    difference: Estimate
    spread_difference: Estimate


def primary_metric(plan: Plan, outcomes: Mapping[str, Outcome]) -> Metric:
    """The metric that is shown first: the study's, else accuracy where it is measured, else NLL."""
    if plan.study.metric is not None:
        return METRICS[plan.study.metric]
    measured = {name for outcome in outcomes.values() for name in outcome.metrics}
    return METRICS["nll" if measured and "accuracy" not in measured else "accuracy"]


def summarise(plan: Plan, outcomes: Mapping[str, Outcome]) -> tuple[Summary, ...]:
    """Each arm under each condition, in the leading metric, NLL and ECE; what is not done yet is left out."""
    found = []
    for group in _conditions(plan, outcomes):
        for metric in _metrics(plan, outcomes):
            values = _values(group, outcomes, metric)
            best = _best(values, metric)
            for arm in dict.fromkeys(trial.arm for trial in group):
                found.append(_summary(arm, [t for t in group if t.arm == arm], outcomes, metric, values, best))
    return tuple(summary for summary in found if summary is not None)


def compare(plan: Plan, outcomes: Mapping[str, Outcome]) -> tuple[Comparison, ...]:
    """Every pair of arms on the cells that both have."""
    found = []
    for group in _conditions(plan, outcomes):
        for metric in _metrics(plan, outcomes):
            values = _values(group, outcomes, metric)
            by_arm: dict[str, dict[tuple[int, str], float]] = {}
            for trial in group:
                if trial.id in values:
                    by_arm.setdefault(trial.arm, {})[trial.seed, _text(trial.settings)] = values[trial.id]
            for first, second in itertools.combinations(by_arm, 2):
                common = sorted(by_arm[first].keys() & by_arm[second].keys())
                if common:
                    pairs = [(seed, by_arm[first][seed, s], by_arm[second][seed, s]) for seed, s in common]
                    found.append(_comparison(first, second, group[0].conditions, metric, pairs))
    return tuple(found)


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
        spreads.append(float(np.ptp(own[:, 0]) - np.ptp(own[:, 1])))
    return Comparison(
        first=first,
        second=second,
        condition=condition,
        metric=metric.name,
        cells=len(pairs),
        better=sum(gain > 0 for gain in gains),
        worse=sum(gain < 0 for gain in gains),
        difference=_estimate(means),
        spread_difference=_estimate(spreads),
    )


def _conditions(plan: Plan, outcomes: Mapping[str, Outcome]) -> list[list[Trial]]:
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


def _values(group: Sequence[Trial], outcomes: Mapping[str, Outcome], metric: Metric) -> dict[str, float]:
    """The metric of each trial that has one, by id."""
    found = [outcomes[trial.id] for trial in group]
    values = {o.trial: o.metrics[metric.name] for o in found if metric.name in o.metrics}
    if metric.name in _WITHOUT_DIVERGED or not values:
        return values
    known = [o.no_skill[metric.name] for o in found if metric.name in o.no_skill]
    worst = min(values.values()) if metric.greater_is_better else max(values.values())
    return values | {o.trial: known[0] if known else worst for o in found if o.status == "diverged"}


def _best(values: Mapping[str, float], metric: Metric) -> float:
    found = list(values.values()) or [0.0]
    return max(found) if metric.greater_is_better else min(found)


def _summary(
    arm: str,
    trials: Sequence[Trial],
    outcomes: Mapping[str, Outcome],
    metric: Metric,
    values: Mapping[str, float],
    best: float,
) -> Summary | None:
    better = 1 if metric.greater_is_better else -1
    by_seed: dict[int, list[float]] = {}
    for trial in trials:
        if trial.id in values:
            by_seed.setdefault(trial.seed, []).append(values[trial.id])
    seeds = [np.array(by_seed[seed]) for seed in sorted(by_seed)]
    if not seeds:
        return None
    statistics = {name: _estimate([function(v, better) for v in seeds]) for name, function in STATISTICS.items()}
    statistics["regret"] = _estimate([float((better * (best - v)).mean()) for v in seeds])
    found = [outcomes[trial.id] for trial in trials]
    return Summary(
        arm=arm,
        condition=trials[0].conditions,
        metric=metric.name,
        statistics=statistics,
        trials=len(trials),
        diverged=sum(o.status == "diverged" for o in found),
        failed=sum(o.status == "failed" for o in found),
        collapsed=sum(_collapsed(o) for o in found),
    )


def _collapsed(outcome: Outcome) -> bool:
    if "accuracy" not in outcome.no_skill or "accuracy" not in outcome.metrics:
        return False
    chance = outcome.no_skill["accuracy"]
    return outcome.metrics["accuracy"] <= chance + (chance * (1 - chance) / outcome.rows) ** 0.5


def _estimate(by_seed: Sequence[float]) -> Estimate:
    """The mean over seeds with its bootstrap interval."""
    values = np.array(by_seed)
    count = len(values)
    if count == 1:
        return Estimate(float(values[0]))
    if count <= _ENUMERATED:
        chosen = np.array(list(itertools.product(range(count), repeat=count)))
    else:
        chosen = np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))
    ends = np.quantile(values[chosen].mean(1), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(float(values.mean()), float(ends[0]), float(ends[1]))
