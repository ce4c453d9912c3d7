"""Tables of texts for other documents, as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

__all__ = ["latex_table", "markdown_table", "marked_cells"]

_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)
Rows = Sequence[Sequence[str]]


def markdown_table(
    header: Sequence[str], rows: Rows, *, names: int = 1, marked: Collection[tuple[int, int]] = ()
) -> str:
    """A table for Markdown.

    Args:
        header, rows: of the table.
        names: so many columns, the first ones, hold names and are aligned to the left; the others hold numbers.
        marked: places (row, column) of cells in bold.
    """
    cells = marked_cells(rows, marked, lambda cell: f"**{cell}**", lambda cell: cell.replace("|", "\\|"))
    lines = [[cell.replace("|", "\\|") for cell in header], ["---"] * names + ["---:"] * (len(header) - names), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex_table(header: Sequence[str], rows: Rows, *, names: int = 1, marked: Collection[tuple[int, int]] = ()) -> str:
    """A table for LaTeX with the package booktabs; see :func:`markdown_table`."""
    cells = marked_cells(rows, marked, lambda cell: f"\\textbf{{{cell}}}", lambda cell: cell.translate(_LATEX))
    lines = [
        f"\\begin{{tabular}}{{{'l' * names}{'r' * (len(header) - names)}}}",
        r"\toprule",
        " & ".join(cell.translate(_LATEX) for cell in header) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in cells),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "".join(f"{line}\n" for line in lines)


def marked_cells(
    rows: Rows, marked: Collection[tuple[int, int]], mark: Callable[[str], str], escape: Callable[[str], str] = str
) -> list[list[str]]:
    """The cells of a table, escaped, and those at ``marked`` places (row, column) marked as well."""
    return [
        [mark(escape(cell)) if (r, c) in marked else escape(cell) for c, cell in enumerate(row)]
        for r, row in enumerate(rows)
    ]
