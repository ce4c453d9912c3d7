"""A comparison of runs as a table: for a terminal, Markdown, LaTeX, and as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from monteclora.metrics.registry import METRICS
from monteclora.reports.comparison import Comparison, Estimate
from monteclora.reports.formats import count, duration, size
from monteclora.reports.page import Column, Page, Row, Section, Table, write_page
from monteclora.system.text_tables import latex_table, markdown_table, marked_cells

__all__ = ["TextTable", "latex", "markdown", "plain", "rows_for_people", "text_tables", "write_comparison"]


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Attributes:
        title: what it shows.
        header: names of the columns; the first one's cells are names, all others numbers.
        rows: of as many cells.
        marked: places (row, column) of numbers that are better than all others of their column.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[tuple[int, int]] = frozenset()


def text_tables(comparison: Comparison) -> list[TextTable]:
    """Values with what they cost, and, of two rows or more, their differences from the first."""
    names, compared = comparison.metrics, comparison.compared
    labels = [METRICS[name].label for name in names]
    values = [
        [
            each.label,
            *(_value(each.values[name]) for name in names),
            str(len(each.runs)),
            duration(each.seconds),
            size(each.peak_memory_bytes),
            count(each.trained_parameters),
        ]
        for each in compared
    ]
    marked = {(r, names.index(name) + 1) for r, each in enumerate(compared) for name in each.best}
    title = f"{comparison.task}, {comparison.rows:,} {comparison.split} rows, 95 % intervals"
    header = ["", *labels, "runs", "seconds", "memory", "trained"]
    tables = [TextTable(title, header, values, frozenset(marked))]
    if len(compared) > 1:
        differences = [[each.label, *(_difference(each.differences[name]) for name in names)] for each in compared[1:]]
        title = f"difference from {compared[0].label} on the same rows (* the interval excludes 0)"
        tables.append(TextTable(title, ["", *labels], differences))
    return tables


def _value(estimate: Estimate) -> str:
    return f"{_number(estimate.value)} [{_number(estimate.low)}, {_number(estimate.high)}]"


def _difference(estimate: Estimate) -> str:
    ends = f"[{estimate.low:+.3f}, {estimate.high:+.3f}]"
    return f"{estimate.value:+.3f} {ends}{'*' if estimate.excludes_zero else ''}"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def rows_for_people(table: TextTable) -> list[list[str]]:
    """The rows, with what is better than all others by more than the choice of rows explains called best."""
    return marked_cells(table.rows, table.marked, lambda cell: f"{cell} (best)")


def plain(comparison: Comparison) -> str:
    """Tables with columns side by side, and notes."""
    parts = []
    for table in text_tables(comparison):
        rows = [list(table.header), *rows_for_people(table)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        parts.append("\n".join([table.title, "", *lines]) + "\n")
    return "\n".join(parts) + "\n" + "".join(f"note: {note}\n" for note in comparison.notes)


def markdown(comparison: Comparison) -> str:
    """Tables and notes; what is better than all others by more than the choice of rows explains is bold."""
    parts = [
        f"{table.title}\n\n{markdown_table(table.header, table.rows, marked=table.marked)}"
        for table in text_tables(comparison)
    ]
    return "\n".join(parts) + "\n" + "".join(f"- {note}\n" for note in comparison.notes)


def latex(comparison: Comparison) -> str:
    """Tables for the package booktabs, with titles and notes as comments; bold as in :func:`markdown`."""
    parts = [
        f"% {table.title}\n{latex_table(table.header, table.rows, marked=table.marked)}"
        for table in text_tables(comparison)
    ]
    return "\n".join(parts) + "".join(f"% {note}\n" for note in comparison.notes)


def write_comparison(path: Path, comparison: Comparison, command: str) -> Path:
    """Write the comparison as a page.

    Args:
        path: of the file.
        comparison: to show.
        command: that makes it again.

    Raises:
        CheckpointError: it cannot be written.
    """
    tables = [
        Table(
            columns=[Column(name) for name in table.header],
            rows=[Row(row) for row in rows_for_people(table)],
            caption=table.title,
        )
        for table in text_tables(comparison)
    ]
    page = Page(
        title=f"{comparison.task}: {len(comparison.compared)} ways to train and predict",
        subtitle=f"{comparison.rows:,} rows of the {comparison.split} split",
        summary=[_finding(comparison)],
        sections=[
            Section("Comparison", tables=tables),
            Section("Notes", paragraphs=[f"{note}." for note in comparison.notes]),
        ],
        reproduce=[command],
    )
    return write_page(path, page)


def _finding(comparison: Comparison) -> str:
    found = [
        f"{each.label} in {', '.join(METRICS[name].label for name in comparison.metrics if name in each.best)}"
        for each in comparison.compared
        if each.best
    ]
    if not found:
        return "Nothing is better than all others in any metric by more than the choice of rows explains."
    return f"Better than all others by more than the choice of rows explains: {'; '.join(found)}."
