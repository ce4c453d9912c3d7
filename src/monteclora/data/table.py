"""Named columns and their rows, whatever file they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from monteclora.config import brief
from monteclora.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Row", "Table", "check_columns", "with_rows"]

Row = tuple[int, dict[str, Any]]
Attempt = tuple[int, dict[str, Any] | DataError]


@dataclass(frozen=True)
class Table:
    """Named columns and their rows.

    ``unit`` is what the row numbers count: lines of a text file from 1 (a csv header is line 1), or rows from
    1. ``class_names`` holds the label names that come with the data, by column. ``notes`` says in words what was found
    out about the file. ``attempts``, where a broken row can be skipped, gives the error in its place. ``places``
    and ``short`` name the row of a number where a table is of several files. ``keyed`` says that rows name their
    columns themselves, and may lack some. ``columnar`` gives some of the columns of all rows at once, as ``rows``
    would; None where only ``rows`` can tell.
    """

    name: str
    columns: tuple[str, ...]
    rows: Callable[[], Iterator[Row]]
    unit: Literal["line", "row"] = "line"
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    attempts: Callable[[], Iterator[Attempt]] | None = None
    places: Callable[[int], str] | None = None
    short: Callable[[int], str] | None = None
    keyed: bool = False
    columnar: Callable[[Sequence[str]], pa.Table | None] | None = None

    @classmethod
    def of_attempts(
        cls, name: str, columns: tuple[str, ...], attempts: Callable[[], Iterator[Attempt]], **more: Any
    ) -> Table:
        """A table of rows that may be broken; to read its ``rows`` raises the first error."""

        def rows() -> Iterator[Row]:
            for number, row in attempts():
                if isinstance(row, DataError):
                    raise row
                yield number, row

        return cls(name, columns, rows, attempts=attempts, **more)

    def each(self) -> Iterator[Attempt]:
        """The rows with their numbers, those that are broken as the error that says how."""
        return iter(self.rows()) if self.attempts is None else self.attempts()

    def place(self, number: int) -> str:
        """How messages name a row: ``reviews.csv, line 12``."""
        return f"{self.name}, {self.unit} {number}" if self.places is None else self.places(number)

    def listed(self, numbers: Sequence[int], count: int) -> str:
        """``lines 3, 9, ...``: the first of ``count`` rows, by their numbers."""
        shown = ", ".join(map(self.short or str, numbers))
        return f"{self.unit if count == 1 else self.unit + 's'} {shown}{', ...' if count > len(numbers) else ''}"


def check_columns(name: str, columns: list[str]) -> tuple[str, ...]:
    """The columns; DataError when two have the same name."""
    column, times = Counter(columns).most_common(1)[0] if columns else ("", 0)
    if times > 1:
        what = f"the column {brief(column)}" if column else "a column without a name"
        raise DataError(f"{name} has {what} more than once", "Give every column its own name.")
    return tuple(columns)


def with_rows(table: Table, message: str) -> Table:
    """``table``, or DataError when it has no row."""
    if next(table.each(), None) is None:
        raise DataError(f"{table.name} {message}", "Give a file with rows.")
    return table
