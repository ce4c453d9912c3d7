"""A report page: what it is made of, and how it becomes one HTML file that needs nothing else.

All text is escaped; only ``Svg``, which this package draws, is embedded as it is. The page has no script and
loads nothing, and its Content-Security-Policy says so to the browser.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from monteclora.reports.svg import Svg
from monteclora.system.atomic import write_file

__all__ = [
    "Cell",
    "Column",
    "Figure",
    "Link",
    "Page",
    "Passage",
    "Row",
    "Section",
    "Shaded",
    "Table",
    "render",
    "write_page",
]


@dataclass(frozen=True)
class Link:
    """Text that leads to another page, by its path from this one."""

    text: str
    href: str


Cell = str | int | float | Link | None

_NO_VALUE = "\N{EN DASH}"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        header: its name.
        show: how a number becomes text; text is shown as it is, and None as a dash.
    """

    header: str
    show: Callable[[float], str] = str


@dataclass(frozen=True)
class Row:
    """A row of a table. ``unfinished`` marks its numbers as those of an unfinished run."""

    cells: Sequence[Cell]
    unfinished: bool = False


@dataclass(frozen=True)
class Table:
    """Columns, rows of as many cells, and a caption beneath."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """Drawings that belong together, side by side where there is room, and what they show."""

    panels: Sequence[Svg]
    caption: str


@dataclass(frozen=True)
class Shaded:
    """A piece of a text, coloured more strongly the closer ``shade`` is to 1; ``hint`` is what pointing at it shows."""

    text: str
    shade: float
    hint: str = ""

    @property
    def step(self) -> int:
        """The shade as one of eleven, from 0 to 10."""
        return round(10 * min(max(self.shade, 0.0), 1.0))


@dataclass(frozen=True)
class Passage:
    """A text with shaded pieces behind what it answers, and what the shades say."""

    asked: str
    pieces: Sequence[Shaded]
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, then figures, passages and tables."""

    title: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    passages: Sequence[Passage] = ()


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: what the report is about.
        subtitle: one line under it.
        summary: the findings, a sentence or two each.
        warnings: what a reader must know before any number, such as a run that did not finish; shown first.
        sections: the body.
        environment: versions, devices and settings by name.
        reproduce: shell commands, a line each.
        refresh: seconds after which a browser loads the page again; 0 for a page that stays as it is.
    """

    title: str
    subtitle: str = ""
    summary: Sequence[str] = ()
    warnings: Sequence[str] = ()
    sections: Sequence[Section] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    reproduce: Sequence[str] = ()
    refresh: int = 0


def render(page: Page) -> str:
    """The page as HTML; the same page gives the same text."""
    return _environment().get_template("page.html.j2").render(page=page)


def write_page(path: str | os.PathLike[str], page: Page) -> Path:
    """Write ``page`` to ``path``, at once or not at all, and make the folder it goes into.

    Raises:
        CheckpointError: ``path`` cannot be written; what was there is untouched.
    """
    target = Path(path)
    write_file(target, render(page).encode("utf-8", errors="replace"))  # a lone surrogate has no UTF-8
    return target


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("monteclora.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["embed"] = _embed
    environment.filters["shown"] = _shown
    return environment


def _embed(svg: Svg, prefix: str) -> Markup:
    if not isinstance(svg, Svg):
        raise TypeError(f"a panel is {type(svg).__name__}; only Svg is embedded without escaping")
    return Markup(svg.with_id_prefix(prefix))


def _shown(table: Table) -> dict[str, Any]:
    """The table as the template prints it: texts, which columns are numbers."""
    rows = []
    for row in table.rows:
        cells = []
        for column, value in zip(table.columns, row.cells, strict=True):
            href = value.href if isinstance(value, Link) else None
            cells.append({"header": column.header, "text": _text(column, value), "href": href})
        rows.append({"cells": cells, "unfinished": row.unfinished})
    numbers = [
        any(isinstance(row.cells[index], int | float) for row in table.rows) for index in range(len(table.columns))
    ]
    return {"rows": rows, "numbers": numbers}


def _text(column: Column, value: Cell) -> str:
    if value is None:
        return _NO_VALUE
    if isinstance(value, Link):
        return value.text
    return value if isinstance(value, str) else column.show(value)
