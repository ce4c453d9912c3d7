"""What a study shows, in sentences that say no more than its seeds can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monteclora.metrics.registry import METRICS
from monteclora.reports.formats import decimals
from monteclora.studies.folder import Outcome
from monteclora.studies.plan import Plan
from monteclora.studies.summary import Comparison, Estimate, Summary, compare, primary_metric
from monteclora.studies.wording import values_in_words

__all__ = ["Evidence", "Verdict", "verdict"]

_CLAIM_FROM = 3  # seeds


@dataclass(frozen=True)
class Evidence:
    """An arm against the reference under a condition, on the cells that both have.

    Attributes:
        arm: which is compared.
        condition: keys and values.
        cells: how many.
        seeds: how many they are of.
        metric: by name.
        spread: the arm's less the reference's; None where a seed has one setting.
        difference: of the metric's means, likewise.
    """

    arm: str
    condition: Mapping[str, Any]
    cells: int
    seeds: int
    metric: str
    spread: Estimate | None
    difference: Estimate


@dataclass(frozen=True)
class Verdict:
    """What a study shows.

    Attributes:
        reference: the arm that the others are compared with; None where no two arms share a cell.
        sentences: first what collapsed altogether, then which arms are more or less robust than the reference, then
            what is known of those that share no cell with it.
        evidence: of what the sentences say, arm by arm.
    """

    reference: str | None
    sentences: list[str]
    evidence: list[Evidence]


def verdict(
    plan: Plan, outcomes: Mapping[str, Outcome], summaries: Sequence[Summary], whole: Plan | None = None
) -> Verdict:
    """Compare every arm with the first one that shares cells with another.

    An arm is said to be more robust where the interval of the difference of spreads, over seeds, lies below zero. That
    is a claim from three seeds on: of two, nothing but the assumption that seeds are normal says how far they scatter.

    Args:
        plan: of the trials that count.
        outcomes: of the study.
        summaries: of the plan.
        whole: the plan that it is a part of, see :func:`monteclora.studies.summary.compare`.
    """
    metric = primary_metric(plan, outcomes)
    every = [comparison for comparison in compare(plan, outcomes, whole) if comparison.metric == metric.name]
    compared = {arm for comparison in every for arm in (comparison.first, comparison.second)}
    reference = next((trial.arm for trial in plan.trials if trial.arm in compared), None)
    evidence: dict[str, list[Evidence]] = {}
    for comparison in every:
        if reference in (comparison.first, comparison.second):
            row = _evidence(comparison, reference)
            evidence.setdefault(row.arm, []).append(row)
    arms_by_finding: dict[str, list[str]] = {}
    for arm, rows in evidence.items():
        arms_by_finding.setdefault(_finding(rows), []).append(arm)
    measured = [summary for summary in summaries if summary.metric == metric.name]
    findings = [f"{'; '.join(arms)} against {reference}: {finding}" for finding, arms in arms_by_finding.items()]
    alone = [_alone(summary) for summary in measured if summary.arm not in {reference, *evidence}]
    return Verdict(
        reference, _collapsed(measured) + findings + alone, [row for rows in evidence.values() for row in rows]
    )


def _evidence(comparison: Comparison, reference: str | None) -> Evidence:
    arm = comparison.second if comparison.first == reference else comparison.first
    sign = 1 if comparison.first == arm else -1
    spread = comparison.spread_difference
    return Evidence(
        arm=arm,
        condition=comparison.condition,
        cells=comparison.cells,
        seeds=comparison.seeds,
        metric=comparison.metric,
        spread=None if spread is None else _times(spread, sign),
        difference=_times(comparison.difference, sign),
    )


def _collapsed(summaries: Sequence[Summary]) -> list[str]:
    """Where no trial, or none of an arm, learned anything: there a small spread is no sign of robustness."""
    by_condition: dict[str, list[Summary]] = {}
    for summary in summaries:
        by_condition.setdefault(_where(summary.condition), []).append(summary)
    found = []
    for where, here in by_condition.items():
        lost = [each for each in here if each.collapsed + each.diverged == each.trials - each.failed]
        if len(lost) == len(here):
            found.append(
                f"No trial{where} beats the majority class: nothing was learned, and no spread tells anything."
            )
        else:
            found += [
                f"No trial of {summary.arm}{where} beats the majority class: its spread tells nothing."
                for summary in lost
            ]
    return found


def _alone(summary: Summary) -> str:
    show = decimals(3)
    spread = summary.statistics.get("spread")
    return (
        f"{summary.arm}{_where(summary.condition)}: median {METRICS[summary.metric].label} "
        f"{show(summary.statistics['median'].value)}{f', spread {show(spread.value)}' if spread else ''} "
        f"over {summary.trials} trials{f', {summary.collapsed} of them collapsed' if summary.collapsed else ''}."
    )


def _finding(rows: Sequence[Evidence]) -> str:
    """What the conditions together say of an arm, after its name and the reference's."""
    spreads = [row for row in rows if row.spread is not None]
    if not spreads:
        return "one setting for each seed, so no spread to compare."
    measured = [row for row in spreads if row.seeds >= _CLAIM_FROM]
    if not measured:
        seeds = max(row.seeds for row in spreads)
        number = "one seed" if seeds == 1 else f"{seeds} seeds"
        return f"{number}, so no claim about which is the more robust."
    narrower = [row for row in measured if _side(row.spread) < 0]
    more, less = len(narrower), sum(_side(row.spread) > 0 for row in measured)
    if more == less == 0:
        return "neither more nor less robust, as far as these seeds can tell."
    counts = {"more": more, "less": less, "neither more nor less": len(measured) - more - less}
    of = f" of {len(measured)} conditions" if len(measured) > 1 else ""
    parts = [f"{name} robust{f' in {number}' + of if of else ''}" for name, number in counts.items() if number]
    # an arm that is bad everywhere has a small spread
    worse = sum(_side(row.difference) == (-1 if METRICS[row.metric].greater_is_better else 1) for row in narrower)
    but = "; there it is worse on average" if worse == more else f"; in {worse} of them it is worse on average"
    return f"{', '.join(parts)}, judged by the spread{but if worse else ''}."


def _side(estimate: Estimate | None) -> int:
    """Of zero that the interval lies on: -1 or 1, or 0 where it has zero in it or there is none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return 0
    return int(estimate.low > 0) - int(estimate.high < 0)


def _where(condition: Mapping[str, Any]) -> str:
    return f" with {values_in_words(condition)}" if condition else ""


def _times(estimate: Estimate, sign: int) -> Estimate:
    if sign == 1 or estimate.low is None or estimate.high is None:
        return Estimate(sign * estimate.value, estimate.low, estimate.high)
    return Estimate(-estimate.value, -estimate.high, -estimate.low)
