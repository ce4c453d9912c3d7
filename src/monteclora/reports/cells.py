"""Coloured cells with a text in each, as rectangles: an image would not be loaded by the page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from monteclora.reports.svg import INK

__all__ = ["draw_cells"]

_HEAT = "viridis"


def draw_cells(
    axes: Axes,
    values: NDArray[np.float64],
    texts: Sequence[Sequence[str]],
    columns: Sequence[str],
    rows: Sequence[str],
    low: float,
    high: float,
) -> None:
    """Draw a grid, first row on top.

    Args:
        axes: to draw in.
        values: float (rows, columns), which give the colours; NaN for none.
        texts: of as many rows and columns.
        columns, rows: their names.
        low, high: the values of the darkest and the brightest colour.
    """
    edges = [np.arange(size + 1) - 0.5 for size in values.shape]
    masked = np.ma.masked_invalid(values)
    axes.pcolormesh(edges[1], edges[0], masked, cmap=_HEAT, vmin=low, vmax=high, edgecolors="none")
    axes.invert_yaxis()
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        bright = np.isfinite(value) and high > low and (value - low) / (high - low) > 0.6
        colour = INK if np.isnan(value) else ("#000000" if bright else "#ffffff")
        axes.text(column, row, texts[row][column], ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
