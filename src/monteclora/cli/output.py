"""Results on standard output: tables for people, JSON for machines. Notes on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from monteclora.errors import visible

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Flag", "Json", "note", "print_facts", "print_json", "print_line", "print_table"]

_WIDTH_OF_A_FILE = 200  # where nobody's window says how wide a line may be

Flag = Annotated[bool, Parameter(show_default=False)]
Json = Annotated[bool, Parameter(name="--json", help="print JSON for machines.", show_default=False)]


def _console() -> Console:
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDTH_OF_A_FILE
    return Console(markup=False, highlight=False, emoji=False, width=width)


def print_json(data: Any) -> None:
    """A document; what JSON does not know, such as a path, as text."""
    # what the stream cannot write is escaped as JSON has it
    plain = "utf" not in (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    print(json.dumps(data, indent=2, ensure_ascii=plain, default=str))


def print_line(text: str) -> None:
    """A line as it is, however long."""
    print(text, flush=True)  # before what rich writes next, and before anything on standard error


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", left: int = 1) -> None:
    """A table of texts under a line that says what it is; ``left`` columns are words, the others numbers."""
    from rich import box
    from rich.table import Table

    if title:
        print_line(title)
    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(visible(cell, "\n\t") for cell in row))
    _console().print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Names with what there is to say of each."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in facts:
        grid.add_row(name, visible(text, "\n\t"))
    _console().print(grid)


def note(text: str) -> None:
    """Something to know about the results, on standard error."""
    print(f"note: {visible(text)}", file=sys.stderr)
