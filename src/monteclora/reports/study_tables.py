"""Tables of a study's page: what its verdict rests on, and the statistics of each arm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from monteclora.metrics.registry import METRICS
from monteclora.reports.formats import count, decimals, signed
from monteclora.reports.page import Cell, Column, Row, Table
from monteclora.reports.study_verdict import Verdict
from monteclora.studies.summary import Estimate, Summary
from monteclora.studies.wording import condition_in_words

__all__ = ["evidence_table", "statistics_table"]

_STATISTICS = {
    "best": "Best",
    "median": "Median",
    "spread": "Spread",
    "iqr": "IQR",
    "worst_decile": "Worst decile",
    "regret": "Regret",
}
_show = decimals(3)


def evidence_table(found: Verdict) -> Table:
    """What the verdict rests on: every arm against the reference."""
    conditions = any(row.condition for row in found.evidence)
    rows = [
        Row(
            [
                *([condition_in_words(row.condition)] if conditions else []),
                row.arm,
                row.cells,
                row.seeds,
                _interval(row.spread, signed),
                _interval(row.difference, signed),
            ]
        )
        for row in found.evidence
    ]
    label = METRICS[found.evidence[0].metric].label
    columns = [
        *([Column("Condition")] if conditions else []),
        Column("Arm"),
        Column("Shared cells", count),
        Column("Seeds", count),
        Column("Spread"),
        Column("Mean"),
    ]
    caption = (
        f"Spread and mean of {label} less those of {found.reference}, on the cells that both have; in brackets are "
        "95 % intervals over seeds."
    )
    return Table(columns, rows, caption)


def statistics_table(summaries: Sequence[Summary], *, conditions: bool = False) -> Table:
    """The statistics of each arm, with or without a column that names the condition."""
    rows = []
    for summary in summaries:
        condition = [condition_in_words(summary.condition)] if conditions else []
        texts = [_interval(summary.statistics.get(name)) for name in _STATISTICS]
        counts: list[Cell] = [summary.diverged, summary.collapsed, summary.failed, summary.trials]
        rows.append(Row([*condition, summary.arm, METRICS[summary.metric].label, *texts, *counts]))
    columns = [
        *([Column("Condition")] if conditions else []),
        Column("Arm"),
        Column("Metric"),
        *(Column(header) for header in _STATISTICS.values()),
        *(Column(header, count) for header in ("Diverged", "Collapsed", "Failed", "Trials")),
    ]
    caption = (
        "Spread is best minus worst; the worst decile is what one run in ten is worse than; regret is the mean "
        "shortfall from the best run of all arms with the same seed; a collapsed run is no better than the majority "
        "class."
    )
    return Table(columns, rows, caption)


def _interval(estimate: Estimate | None, show: Callable[[float], str] = _show) -> str:
    if estimate is None:
        return "-"
    text = show(estimate.value)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({show(estimate.low)} to {show(estimate.high)})"
