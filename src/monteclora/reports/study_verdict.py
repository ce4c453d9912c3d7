"""What a study shows, in sentences that say no more than its seeds can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monteclora.metrics.registry import METRICS
from monteclora.reports.formats import decimals, signed
from monteclora.studies.folder import Outcome
from monteclora.studies.plan import Plan
from monteclora.studies.summary import Comparison, Estimate, Summary, compare, primary_metric
from monteclora.studies.wording import values_in_words

__all__ = ["verdict"]

_CLAIM_FROM = 3  # seeds


def verdict(
    plan: Plan, outcomes: Mapping[str, Outcome], summaries: Sequence[Summary], whole: Plan | None = None
) -> list[str]:
    """First what collapsed altogether, then which arms are more or less robust than the first one, then the evidence.

    Arms are compared with the first that shares cells with another; one that shares none with it stands for itself.
    An arm is said to be more robust where the interval of the difference of spreads, over seeds, lies below zero. That
    is a claim from three seeds on: of two, nothing but the assumption that seeds are normal says how far they scatter.

    Args:
        plan: of the trials that count.
        outcomes: of the study.
        summaries: of the plan.
        whole: the plan that it is a part of, see :func:`monteclora.studies.summary.compare`.
    """
    metric = primary_metric(plan, outcomes)
    measured = [summary for summary in summaries if summary.metric == metric.name]
    every = [comparison for comparison in compare(plan, outcomes, whole) if comparison.metric == metric.name]
    compared = {arm for comparison in every for arm in (comparison.first, comparison.second)}
    reference = next((trial.arm for trial in plan.trials if trial.arm in compared), None)
    found = [comparison for comparison in every if reference in (comparison.first, comparison.second)]
    shown = {reference, *(arm for comparison in found for arm in (comparison.first, comparison.second))}
    alone = [_alone(summary) for summary in measured if summary.arm not in shown]
    if reference is None:
        return _collapsed(measured) + alone
    against: dict[str, list[tuple[Comparison, Estimate | None, Estimate]]] = {}
    for comparison in found:
        other = comparison.second if comparison.first == reference else comparison.first
        sign = 1 if comparison.first == other else -1
        spread = None if comparison.spread_difference is None else _times(comparison.spread_difference, sign)
        against.setdefault(other, []).append((comparison, spread, _times(comparison.difference, sign)))
    headlines = [_headline(other, reference, rows) for other, rows in against.items()]
    evidence = [
        _evidence(other, reference, comparison, spread, difference)
        for other, rows in against.items()
        for comparison, spread, difference in rows
    ]
    return _collapsed(measured) + headlines + evidence + alone


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


def _headline(other: str, reference: str, rows: Sequence[tuple[Comparison, Estimate | None, Estimate]]) -> str:
    spreads = [(comparison, spread, difference) for comparison, spread, difference in rows if spread is not None]
    if not spreads:
        return f"{other} against {reference}: one setting for each seed, so no spread to compare."
    measured = [row for row in spreads if row[0].seeds >= _CLAIM_FROM]
    if not measured:
        seeds = max(comparison.seeds for comparison, _, _ in spreads)
        number = "one seed" if seeds == 1 else f"{seeds} seeds"
        return f"{other} against {reference}: {number}, so no claim about which is the more robust."
    narrower = [row for row in measured if _side(row[1]) < 0]
    more, less = len(narrower), sum(_side(spread) > 0 for _, spread, _ in measured)
    if more == less == 0:
        return f"{other} is neither more nor less robust than {reference}, as far as these seeds can tell."
    counts = {"more": more, "less": less, "neither more nor less": len(measured) - more - less}
    of = f" of {len(measured)} conditions" if len(measured) > 1 else ""
    parts = [f"{name} robust{f' in {number}' + of if of else ''}" for name, number in counts.items() if number]
    # an arm that is bad everywhere has a small spread
    worse = sum(
        _side(difference) == (-1 if METRICS[c.metric].greater_is_better else 1) for c, _, difference in narrower
    )
    but = "; there it is worse on average" if worse == more else f"; in {worse} of them it is worse on average"
    return f"{other} against {reference}: {', '.join(parts)}, judged by the spread{but if worse else ''}."


def _side(estimate: Estimate) -> int:
    """Of zero that the interval lies on: -1 or 1, or 0 where it has zero in it or there is none."""
    if estimate.low is None or estimate.high is None:
        return 0
    return int(estimate.low > 0) - int(estimate.high < 0)


def _evidence(other: str, reference: str, comparison: Comparison, spread: Estimate | None, difference: Estimate) -> str:
    label = METRICS[comparison.metric].label
    where = f"{other} against {reference}{_where(comparison.condition)}, on {comparison.cells} shared cells"
    if spread is None:
        return f"{where}: the mean of {label} differs by {_with_interval(difference)}."
    return (
        f"{where}: the spread of {label} differs by {_with_interval(spread)}, its mean by {_with_interval(difference)}."
    )


def _where(condition: Mapping[str, Any]) -> str:
    return f" with {values_in_words(condition)}" if condition else ""


def _times(estimate: Estimate, sign: int) -> Estimate:
    if sign == 1 or estimate.low is None or estimate.high is None:
        return Estimate(sign * estimate.value, estimate.low, estimate.high)
    return Estimate(-estimate.value, -estimate.high, -estimate.low)


def _with_interval(estimate: Estimate) -> str:
    text = signed(estimate.value)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({signed(estimate.low)} to {signed(estimate.high)})"
