"""Each arm seen around its own best value of a setting, so that spreads are compared between like ranges.

On one grid of learning rates a method can look robust only because its best rate is in the middle, and another one's at
the end, or on a slope. Centred, every arm has the same number of values: its best one and those nearest to it, by their
ratio. The best value is the one with the best mean of a validation metric over the arm's other settings and seeds; the
evaluated rows have no part in it. A diverged run counts as the worst validation of any arm under its condition.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from monteclora.metrics.registry import METRICS, Metric
from monteclora.studies.folder import Outcome
from monteclora.studies.plan import Plan, Trial
from monteclora.studies.summary import primary_metric
from monteclora.studies.wording import condition_in_words, key_in_words

__all__ = ["Centred", "Window", "centre", "describe_window"]


@dataclass(frozen=True)
class Window:
    """The values of one arm under one condition.

    Attributes:
        arm, condition: which.
        key: the setting.
        metric: of the validation rows, that the best value was chosen by.
        best: the best value.
        values: those that count, ascending, the best one among them.
        edge: ``lowest`` or ``highest`` where the best value is an end of the arm's grid, so that a better one may lie
            beyond; else empty.
    """

    arm: str
    condition: Mapping[str, Any]
    key: str
    metric: str
    best: float
    values: tuple[float, ...]
    edge: str


@dataclass(frozen=True)
class Centred:
    """A study around the best values.

    Attributes:
        plan: of the trials inside the windows. The setting of a trial says, in place of its value, how many values of
            the arm's grid it is above the best one, so that comparisons pair what is equally far from it.
        windows: of each arm under each condition.
        notes: what is not centred, and why.
    """

    plan: Plan
    windows: tuple[Window, ...] = ()
    notes: tuple[str, ...] = ()


def centre(plan: Plan, outcomes: Mapping[str, Outcome]) -> Centred:
    """The trials that are near to each arm's best value of the study's ``centre.key``, as far as the study is."""
    wanted = plan.study.centre
    if wanted is None:
        return Centred(replace(plan, trials=()))
    groups: dict[str, list[Trial]] = {}
    for trial in plan.trials:
        if trial.id in outcomes and outcomes[trial.id].status != "failed" and _is_number(trial.settings, wanted.key):
            groups.setdefault(json.dumps(trial.conditions, sort_keys=True), []).append(trial)
    trials: list[Trial] = []
    windows: list[Window] = []
    notes: dict[str, None] = {}
    for group in groups.values():
        found = _windows(plan, group, outcomes)
        if isinstance(found, str):
            notes[f"not centred ({condition_in_words(group[0].conditions)}): {found}"] = None
            continue
        windows += found
        by_arm = {window.arm: window for window in found}
        trials += [near for trial in group if (near := _placed(trial, by_arm[trial.arm], group)) is not None]
    return Centred(replace(plan, trials=tuple(trials)), tuple(windows), tuple(notes))


def _is_number(settings: Mapping[str, Any], key: str) -> bool:
    try:
        return float(settings[key]) > 0
    except (LookupError, TypeError, ValueError):
        return False


def _windows(plan: Plan, group: Sequence[Trial], outcomes: Mapping[str, Outcome]) -> list[Window] | str:
    """Of the arms under one condition; or why there are none."""
    wanted = plan.study.centre
    assert wanted is not None
    by_arm = {arm: _grid(group, arm, wanted.key) for arm in dict.fromkeys(trial.arm for trial in group)}
    count = min(wanted.values, *map(len, by_arm.values()))
    name = key_in_words(wanted.key)
    if count < 2:
        return f"an arm has a single {name}"
    if all(len(grid) == count for grid in by_arm.values()):
        return f"every arm has just {count} values of {name}"
    if any(trial.split == "validation" for trial in group):
        return "the validation rows, by which the best value would be chosen, are those that are evaluated"
    metric = _metric(plan, group, outcomes)
    if metric is None:
        return "there are no validation rows to choose the best value by"
    scores = _scores(group, outcomes, metric)
    sign = 1 if metric.greater_is_better else -1
    found = []
    for arm, grid in by_arm.items():
        measured = {value: [scores[trial.id] for trial in trials] for value, trials in grid.items()}
        means = {value: math.fsum(of_value) / len(of_value) for value, of_value in measured.items()}
        best = max(sorted(means), key=lambda value: sign * means[value])  # of equal ones the lowest
        near = sorted(grid, key=lambda value: (round(abs(math.log(value / best)), 9), value))[:count]
        edge = "lowest" if best == min(grid) else "highest" if best == max(grid) else ""
        values = tuple(sorted(near))
        found.append(Window(arm, group[0].conditions, wanted.key, metric.name, best, values, edge))
    return found


def _grid(group: Sequence[Trial], arm: str, key: str) -> dict[float, list[Trial]]:
    """The trials of an arm by their value of a setting."""
    found: dict[float, list[Trial]] = {}
    for trial in group:
        if trial.arm == arm:
            found.setdefault(float(trial.settings[key]), []).append(trial)
    return found


def _metric(plan: Plan, group: Sequence[Trial], outcomes: Mapping[str, Outcome]) -> Metric | None:
    validated = {name for trial in group for name in outcomes[trial.id].validation}
    names = (primary_metric(plan, outcomes).name, "nll")
    return next((METRICS[name] for name in names if name in validated), None)


def _scores(group: Sequence[Trial], outcomes: Mapping[str, Outcome], metric: Metric) -> dict[str, float]:
    """The validation metric of each trial, by id; of those that have none or a number that is not finite, the worst."""
    measured = {trial.id: outcomes[trial.id].validation.get(metric.name, math.nan) for trial in group}
    finite = [value for value in measured.values() if math.isfinite(value)]
    worst = (min if metric.greater_is_better else max)(finite, default=0.0)
    return {trial: value if math.isfinite(value) else worst for trial, value in measured.items()}


def _placed(trial: Trial, window: Window, group: Sequence[Trial]) -> Trial | None:
    """A trial with its distance from the best value in place of the value; None for one outside the window."""
    value = float(trial.settings[window.key])
    if value not in window.values:
        return None
    grid = sorted(_grid(group, trial.arm, window.key))
    place = grid.index(value) - grid.index(window.best)
    return replace(trial, settings={**trial.settings, window.key: place})


def describe_window(window: Window) -> str:
    """Which values of an arm count, for people."""
    place = f"{window.arm} ({condition_in_words(window.condition)})"
    low, high, name = window.values[0], window.values[-1], key_in_words(window.key)
    beyond = {"lowest": "below", "highest": "above"}
    text = f"{place}: {len(window.values)} values of {name} around {window.best}, from {low} to {high}, "
    text += f"chosen by validation {METRICS[window.metric].label}"
    if window.edge:
        text += f"; the best one is the {window.edge} of the grid, and a better one may lie {beyond[window.edge]}"
    return text
