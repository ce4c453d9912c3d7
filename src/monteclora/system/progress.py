"""A progress bar on standard error, where somebody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

__all__ = ["Progress", "progress_bar"]

Progress = Callable[[int], None]
"""Told how many rows are done, batch by batch."""


@contextmanager
def progress_bar(title: str, total: int, show: bool = True) -> Iterator[Progress]:
    """A function that advances the bar by a number of rows; on anything but a terminal nothing is drawn."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
    remaining = TimeRemainingColumn(elapsed_when_finished=True)
    with Bar(*columns, remaining, console=console, disable=not show or not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda rows: bar.advance(task, rows)
