"""The figures of a study's page, each as SVG (see ``svg.Svg``).

An arm keeps its colour and marker from figure to figure when it keeps its place in the mapping passed in. Each
function raises ``DataError`` where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from monteclora.errors import DataError
from monteclora.reports.cells import draw_cells
from monteclora.reports.figures import TrainingCurve
from monteclora.reports.svg import INK, MARKERS, SERIES, Svg, house_style, label, new_figure, to_svg

__all__ = ["Dot", "HeatMap", "heat_map", "loss_curves", "scatter_plot", "strip_plot"]

_LEGEND_ROW = 0.21  # inches
_CROSS: dict[str, Any] = {"marker": "x", "c": INK, "linewidths": 1.2}  # a diverged trial


@dataclass(frozen=True)
class Dot:
    """A trial in a figure: where it lies, and whether it diverged. ``x`` is not used by :func:`strip_plot`."""

    y: float
    x: float = 0.0
    diverged: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Values over two settings.

    Attributes:
        title: what is shown, for instance an arm's name.
        x, y: names of the settings.
        columns, rows: their values as text, in the order drawn.
        values: float (rows, columns); NaN where no trial is done.
        diverged: bool (rows, columns): some trial of the cell diverged.
    """

    title: str
    x: str
    y: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: NDArray[np.float64]
    diverged: NDArray[np.bool_]


@house_style()
def strip_plot(
    arms: Mapping[str, Sequence[Dot]], quantity: str, spreads: Mapping[str, float], reference: float | None = None
) -> Svg:
    """Every trial of each arm on one scale: a dot a trial, a bar from worst to best, a tick at the median.

    Args:
        arms: at least one, each with its trials; an arm without any is an empty row.
        quantity: what the horizontal axis shows.
        spreads: written beside the arms that have one: over the settings of a seed, so at most the bar's length.
        reference: marked by a dashed line, for instance what a prediction without skill reaches.
    """
    if not any(arms.values()):
        raise _nothing("trial")
    figure = new_figure(0.75 + 0.52 * len(arms))
    axes = figure.add_subplot(ylim=(len(arms) - 0.45, -0.7))
    if reference is not None:
        axes.axvline(reference, color=INK, alpha=0.6, linewidth=0.9, linestyle=(0, (4, 3)), gid="reference")
    spoken = []
    for index, (name, dots) in enumerate(arms.items()):
        colour = SERIES[index % len(SERIES)]
        axes.text(0.0, index - 0.22, label(name), va="bottom", fontweight="bold", transform=axes.get_yaxis_transform())
        values = np.array([dot.y for dot in dots if np.isfinite(dot.y)])
        if not len(values):
            continue
        text = f"spread {spreads[name]:.3f}" if name in spreads else ""
        axes.text(1.0, index - 0.22, text, va="bottom", ha="right", transform=axes.get_yaxis_transform())
        axes.plot([values.min(), values.max()], [index, index], color=colour, linewidth=5, alpha=0.25)
        axes.vlines(np.median(values), index - 0.18, index + 0.18, color=INK, linewidth=1.4, gid=f"median-{index}")
        _dots(axes, [Dot(index, dot.y, dot.diverged) for dot in dots if np.isfinite(dot.y)], index)
        spoken.append(f"{name} {values.min():.3f} to {values.max():.3f}")
    axes.set(xlabel=quantity, yticks=[])
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
    return to_svg(figure, f"{quantity} of every trial: {', '.join(spoken)}")


def _dots(axes: Axes, dots: Sequence[Dot], index: int) -> None:
    colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
    finished = [dot for dot in dots if not dot.diverged]
    axes.scatter(
        [dot.x for dot in finished],
        [dot.y for dot in finished],
        s=18,
        c=colour,
        marker=marker,
        alpha=0.75,
        linewidths=0,
        zorder=3,
        gid=f"dots-{index}",
    )
    crossed = [dot for dot in dots if dot.diverged]
    if crossed:
        axes.scatter([d.x for d in crossed], [d.y for d in crossed], s=26, zorder=4, gid=f"diverged-{index}", **_CROSS)


@house_style()
def heat_map(grid: HeatMap, low: float, high: float) -> Svg:
    """Values over two settings with their numbers; maps with the same ``low`` and ``high`` share their colours."""
    if not np.isfinite(grid.values).any():
        raise _nothing("value")
    height = 1.15 + 0.42 * len(grid.rows)
    figure = new_figure(height)
    axes = figure.add_subplot(title=label(grid.title), xlabel=grid.x, ylabel=grid.y)
    texts = [
        [_shown(value, diverged) for value, diverged in zip(*row, strict=True)]
        for row in zip(grid.values, grid.diverged, strict=True)
    ]
    draw_cells(axes, grid.values, texts, grid.columns, grid.rows, low, high)
    return to_svg(figure, f"{grid.title}: values over {grid.x} and {grid.y}")


def _shown(value: float, diverged: bool) -> str:
    shown = "\N{EN DASH}" if np.isnan(value) else f"{value:.3f}"
    return f"{shown} \N{MULTIPLICATION SIGN}" if diverged else shown


@house_style()
def scatter_plot(arms: Mapping[str, Sequence[Dot]], x: str, y: str, *, logarithmic: bool = False) -> Svg:
    """Two quantities of every trial against each other, an arm a colour and marker.

    Args:
        arms: each with its trials.
        x, y: what the axes show.
        logarithmic: whether the horizontal axis is.
    """
    lowest = 0.0 if logarithmic else -np.inf
    found = {n: [d for d in dots if np.isfinite([d.x, d.y]).all() and d.x > lowest] for n, dots in arms.items()}
    if not any(found.values()):
        raise _nothing("trial")
    figure = new_figure(3.1 + _LEGEND_ROW * len(arms))
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")  # matplotlib's own writes powers, which need its maths
    handles = []
    for index, (name, dots) in enumerate(found.items()):
        _dots(axes, dots, index)
        colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
        handles.append(Line2D([], [], color=colour, marker=marker, linewidth=0, markersize=6, label=label(name)))
    axes.grid(True)
    figure.legend(handles=handles, loc="outside lower left")
    return to_svg(figure, f"{y} against {x} of every trial of {', '.join(found)}")


@house_style()
def loss_curves(title: str, curves: Sequence[tuple[TrainingCurve, bool]], index: int, highest: float) -> Svg:
    """The training loss of every run of an arm; those that diverged end in a cross.

    Args:
        title: the arm's name.
        curves: each with whether the run diverged.
        index: the arm's place, which gives the colour.
        highest: the top of the vertical axis; a loss above it is drawn at it.
    """
    drawn = [(curve, diverged) for curve, diverged in curves if len(curve.steps)]
    if not drawn:
        raise _nothing("training curve")
    figure = new_figure(2.7)
    axes = figure.add_subplot(title=label(title), xlabel="share of the run's steps", ylabel="training loss (nats)")
    for number, (curve, diverged) in enumerate(drawn):
        steps = np.asarray(curve.steps, dtype=np.float64) / max(curve.steps)
        loss = np.clip(np.nan_to_num(np.asarray(curve.loss, dtype=np.float64), nan=highest), None, highest)
        colour = SERIES[index % len(SERIES)]
        axes.plot(steps, loss, color=colour, linewidth=0.8, alpha=0.55, gid=f"curve-{number}")
        if diverged:
            axes.scatter(steps[-1:], loss[-1:], s=30, zorder=4, gid=f"diverged-{number}", **_CROSS)
    axes.set_ylim(0.0, 1.03 * highest)
    axes.grid(True)
    count = sum(diverged for _, diverged in drawn)
    return to_svg(figure, f"Training loss of {len(drawn)} runs of {title}, {count} of which diverged")


def _nothing(what: str) -> DataError:
    return DataError(f"there is no {what} to draw", "Run the study first.")
