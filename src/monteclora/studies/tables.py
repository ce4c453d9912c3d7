"""What a study leaves for other tools: every trial and every statistic as Parquet, Markdown and LaTeX."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from monteclora.metrics.registry import METRICS
from monteclora.studies.centring import Centred, describe_window
from monteclora.studies.folder import Outcome
from monteclora.studies.plan import Plan
from monteclora.studies.results import write_results
from monteclora.studies.summary import Comparison, Estimate, Summary, compare, summarise
from monteclora.studies.wording import condition_in_words
from monteclora.system.atomic import replacing, write_file
from monteclora.system.text_tables import latex_table, markdown_table

__all__ = ["write_tables"]

_HEADERS = {
    "best": "Best",
    "median": "Median",
    "mean": "Mean",
    "spread": "Spread",
    "iqr": "IQR",
    "std": "Std. dev.",
    "worst_decile": "Worst decile",
    "regret": "Regret",
}


def write_tables(
    folder: Path, plan: Plan, outcomes: Mapping[str, Outcome], summaries: Sequence[Summary], centred: Centred
) -> None:
    """Write ``results.parquet`` (a row a trial), ``paired.parquet``, and ``summary`` as Parquet, Markdown and LaTeX.

    Summaries and comparisons are those of all trials, as given, and of those near to each arm's best value, centred.
    """
    write_results(folder / "results.parquet", plan, outcomes)
    of_centred = summarise(centred.plan, outcomes, plan)
    views = {"as given": summaries, "centred": of_centred}
    _parquet(folder / "summary.parquet", [{"view": view, **_flat(s)} for view, found in views.items() for s in found])
    pairs = {"as given": compare(plan, outcomes), "centred": compare(centred.plan, outcomes, plan)}
    _parquet(folder / "paired.parquet", [{"view": view, **_pair(c)} for view, found in pairs.items() for c in found])
    header = ["Condition", "Arm", "Metric", *_HEADERS.values(), "Diverged", "Collapsed", "Failed", "Trials"]
    notes = [*_notes(plan, summaries), *centred.notes]
    rows = [_texts(summary) for summary in summaries]
    text = markdown_table(header, rows, names=3) + _bullets(notes)
    write_file(folder / "summary.tex", latex_table(header, rows, names=3).encode())
    second = folder / "summary_centred.tex"
    if of_centred:
        rows = [_texts(summary) for summary in of_centred]
        text += f"\nCentred: each arm around its own best value\n\n{markdown_table(header, rows, names=3)}"
        text += _bullets([*map(describe_window, centred.windows), *_notes(centred.plan, of_centred)])
        write_file(second, latex_table(header, rows, names=3).encode())
    else:
        second.unlink(missing_ok=True)
    write_file(folder / "summary.md", text.encode())


def _pair(found: Comparison) -> dict[str, Any]:
    return {
        "first": found.first,
        "second": found.second,
        "condition": json.dumps(found.condition),
        "metric": found.metric,
        "cells": found.cells,
        "better": found.better,
        "worse": found.worse,
        "seeds": found.seeds,
        **_ends("difference", found.difference),
        **_ends("spread_difference", found.spread_difference),
    }


def _bullets(notes: Sequence[str]) -> str:
    return "\n" + "".join(f"- {note}\n" for note in notes) if notes else ""


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def _flat(summary: Summary) -> dict[str, Any]:
    found: dict[str, Any] = {
        "condition": json.dumps(summary.condition),
        "arm": summary.arm,
        "metric": summary.metric,
        "seeds": len(summary.seeds),
        "trials": summary.trials,
        "diverged": summary.diverged,
        "collapsed": summary.collapsed,
        "failed": summary.failed,
    }
    for name, estimate in summary.statistics.items():
        found |= _ends(name, estimate)
    return found


def _ends(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    value, low, high = (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _notes(plan: Plan, summaries: Sequence[Summary]) -> list[str]:
    """What a reader of the summary must know: seeds that do not count, and what trials did differently."""
    found: dict[str, None] = {}
    for summary in summaries:
        place = f"{summary.arm} ({condition_in_words(summary.condition)})"
        seeds = {t.seed for t in plan.trials if t.arm == summary.arm and t.conditions == summary.condition}
        if unused := sorted(seeds - set(summary.seeds)):
            metric = METRICS[summary.metric].label
            text = ", ".join(map(str, unused))
            found[f"{place}, {metric}: left out, with fewer results than other seeds: seed {text}"] = None
        for note, trials in summary.notes.items():
            found[f"{place}, {trials} of {summary.trials} trials: {note}"] = None
    return list(found)


def _texts(summary: Summary) -> list[str]:
    numbers = [_text(summary.statistics.get(name)) for name in _HEADERS]
    counts = [summary.diverged, summary.collapsed, summary.failed, summary.trials]
    names = [condition_in_words(summary.condition), summary.arm, METRICS[summary.metric].label]
    return [*names, *numbers, *map(str, counts)]


def _text(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    if estimate.low is None:
        return f"{estimate.value:.4f}"
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"
