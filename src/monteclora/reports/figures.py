"""The figures of a report, each as SVG (see ``svg.Svg``).

A series keeps its colour and marker from figure to figure when it keeps its place in the mapping passed in;
None holds the place of a series that is not in this figure. Each function raises ``DataError`` where there is
nothing to draw or a value can't be drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray

from monteclora.errors import DataError
from monteclora.metrics.calibration import ReliabilityCurve
from monteclora.reports.svg import INK, MARKERS, SERIES, Svg, house_style, label, new_figure, to_svg

__all__ = [
    "TrainingCurve",
    "accuracy_bars",
    "reliability_diagram",
    "training_curves",
    "uncertainty_histogram",
]

T = TypeVar("T")
Points = tuple[NDArray[np.float64], NDArray[np.float64]]

_LEGEND_ROW = 0.21  # inches
_HISTOGRAM_BINS = 24
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)))
_PANELS = {
    "loss": "Task loss",
    "validation_nll": "Validation NLL",
    "tempered_nll": "Validation NLL at the best temperature",
    "kl": "KL to the prior (nats a layer)",
    "pi_norm_squared": "‖π‖², concentration of the weights",
}
_VALIDATED = ("validation_nll", "tempered_nll")
_SMOOTH_FROM = 50  # logged steps; a shorter curve is read better as it is


@dataclass(frozen=True)
class TrainingCurve:
    """What one run logged, float (T,) each; NaN where a value was not finite.

    Attributes:
        steps: optimiser steps, ascending.
        loss: task loss.
        kl: KL divergence of the posterior from the prior, mean over layers, in nats; None for a plain method.
        pi_norm_squared: ||pi||^2, mean over layers, in [1/N, 1]; None for a plain method.
        validation_steps: at which validation rows were predicted, ascending, float (V,).
        validation_nll: their negative log-likelihood, float (V,).
        tempered_nll: the same at the best temperature, float (V,); empty where it did not choose the step.
        kept_step: whose weights the run ended with; None where that is not marked.
    """

    steps: Sequence[float]
    loss: Sequence[float]
    kl: Sequence[float] | None = None
    pi_norm_squared: Sequence[float] | None = None
    validation_steps: Sequence[float] = ()
    validation_nll: Sequence[float] = ()
    tempered_nll: Sequence[float] = ()
    kept_step: float | None = None


@house_style()
def reliability_diagram(curves: Mapping[str, ReliabilityCurve | None]) -> Svg:
    """Accuracy against confidence, one line of dots a method, with the identity and each method's ECE.

    A dot's area grows linearly with the share of the examples that its bin holds; a whisker is the 95 % interval of its
    accuracy.
    """
    drawn = _drawn(curves, "reliability curve")
    figure = new_figure(4.3 + _LEGEND_ROW * len(drawn))
    axes = figure.add_subplot(aspect="equal", xlim=(-0.02, 1.02), ylim=(-0.03, 1.03))
    axes.plot([0, 1], [0, 1], color=INK, alpha=0.5, linewidth=0.9, linestyle=(0, (4, 3)), gid="identity")
    handles = [Line2D([], [], color=INK, alpha=0.5, linewidth=0.9, linestyle=(0, (4, 3)), label="calibrated")]
    largest = max(curve.counts.max() / curve.counts.sum() for _, _, curve in drawn)
    for index, name, curve in drawn:
        colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
        used = curve.counts > 0
        x, y = curve.confidence[used], curve.accuracy[used]
        share = curve.counts[used] / curve.counts.sum()
        area = 10.0 + 120.0 * share / largest
        low, high = curve.accuracy_interval()
        axes.vlines(x, low[used], high[used], color=colour, linewidth=0.9, alpha=0.35, gid=f"intervals-{index}")
        axes.plot(x, y, color=colour, linewidth=1.0, alpha=0.6)
        axes.scatter(x, y, s=area, c=colour, marker=marker, alpha=0.75, linewidths=0, zorder=3, gid=f"dots-{index}")
        text = f"{label(name)} · ECE {curve.ece:.3f}"
        handles.append(Line2D([], [], color=colour, marker=marker, linewidth=1.0, markersize=6, label=text))
    axes.set(xlabel="confidence", ylabel="accuracy")
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.grid(True)
    figure.legend(handles=handles, loc="outside lower left")
    spoken = ", ".join(f"{name} with ECE {curve.ece:.3f}" for _, name, curve in drawn)
    return to_svg(figure, f"Reliability diagram of {spoken}")


def training_curves(runs: Mapping[str, TrainingCurve | None]) -> tuple[Svg, ...]:
    """Panels over optimiser steps: task loss, and validation NLL, KL and ||pi||^2 of the runs that have them.

    A loss of 50 logged values or more is drawn thin, with its moving mean over 1/25 of them drawn thick. A ring marks
    the evaluation of the step that was kept.
    """
    _drawn(runs, "training curve")
    panels = []
    for quantity, title in _PANELS.items():
        curves = {name: _points(name, run, quantity) if run else None for name, run in runs.items()}
        if any(curves.values()):
            kept = [run.kept_step if run and quantity in _VALIDATED else None for run in runs.values()]
            panels.append(_curve_panel(title, curves, kept, smooth=quantity == "loss"))
    return tuple(panels)


def _points(name: str, run: TrainingCurve, quantity: str) -> Points | None:
    values = getattr(run, quantity)
    if values is None or (quantity in _VALIDATED and not len(values)):
        return None
    steps = run.validation_steps if quantity in _VALIDATED else run.steps
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(x) != len(y) or len(x) == 0:
        raise DataError(
            f"the {quantity} of {name} has {len(y)} values for {len(x)} steps; expected one each",
            "Pass the logged steps and values of the same rows.",
        )
    return x, y


@house_style()
def _curve_panel(title: str, curves: Mapping[str, Points | None], kept: Sequence[float | None], smooth: bool) -> Svg:
    drawn = _drawn(curves, "training curve")
    figure = new_figure(2.9 + _LEGEND_ROW * len(drawn))
    axes = figure.add_subplot(title=title, xlabel="optimiser step")
    for index, name, (x, y) in drawn:
        colour, dashes = SERIES[index % len(SERIES)], _DASHES[index % len(_DASHES)]
        if smooth and len(y) >= _SMOOTH_FROM:
            axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.35)
            y = _moving_mean(y, len(y) // 25)
        marker = MARKERS[index % len(MARKERS)] if len(y) == 1 else ""
        axes.plot(
            x,
            y,
            color=colour,
            linewidth=1.6,
            linestyle=dashes,
            marker=marker,
            label=label(name),
            gid=f"curve-{index}",
        )
        here = x == kept[index]
        axes.scatter(x[here], y[here], s=60, facecolors="none", edgecolors=colour, linewidths=1.4, gid=f"kept-{index}")
    axes.grid(True)
    axes.locator_params(axis="x", integer=True, nbins=6)
    axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower left")
    return to_svg(figure, f"{title} over optimiser steps of {', '.join(name for _, name, _ in drawn)}")


def _moving_mean(y: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred mean over ``window`` values, fewer at both ends; a NaN spoils only the windows that hold it."""
    half = window // 2
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])


@house_style()
def uncertainty_histogram(groups: Mapping[str, ArrayLike], quantity: str, series: int = 0, unit: str = "nats") -> Svg:
    """How an uncertainty, float (B,) for each group, is distributed: one row a group.

    Bars are shares of the group, on one scale for all rows; a line marks the group's median.

    Args:
        groups: for instance in-scope, ambiguous and out-of-scope examples.
        quantity: what the horizontal axis shows, for instance "total uncertainty".
        series: place of the run on the page, which gives the colour.
        unit: of the values.
    """
    values = _groups(groups, "group of examples")
    upper = max(float(group.max()) for group in values.values()) or 1.0
    edges = np.linspace(0.0, upper, _HISTOGRAM_BINS + 1)
    shares = {name: np.histogram(group, edges)[0] / len(group) for name, group in values.items()}
    top = max(float(share.max()) for share in shares.values())
    figure = new_figure(0.55 + 0.85 * len(values))
    rows = figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
    for index, (axes, (name, group)) in enumerate(zip(rows, values.items(), strict=True)):
        median = float(np.median(group))
        axes.stairs(
            shares[name],
            edges,
            fill=True,
            color=SERIES[series % len(SERIES)],
            alpha=0.55,
            gid=f"histogram-{index}",
        )
        axes.axvline(median, color=INK, linewidth=1.2, gid=f"median-{index}")
        axes.set_title(f"{label(name)} ({len(group)})")
        axes.set_title(f"median {median:.3g}", loc="right", fontweight="normal")
        axes.set(ylim=(0.0, 1.05 * top), yticks=[], xlim=(0.0, upper))
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=2.5)
    rows[-1].set_xlabel(f"{quantity} ({unit})")
    spoken = ", ".join(f"{name} {np.median(group):.3g}" for name, group in values.items())
    return to_svg(figure, f"Histograms of {quantity}; medians in {unit}: {spoken}")


@house_style()
def accuracy_bars(scores: Mapping[str, Sequence[float]]) -> Svg:
    """Mean accuracy of each method over its runs, in [0, 1]; a dot a run and a line from worst to best."""
    values = _groups(scores, "method")
    figure = new_figure(0.55 + 0.55 * len(values))
    axes = figure.add_subplot(xlim=(0.0, 1.0), ylim=(len(values) - 0.45, -0.75))
    for index, (name, group) in enumerate(values.items()):
        colour = SERIES[index % len(SERIES)]
        axes.barh(index, group.mean(), height=0.36, color=colour, alpha=0.4, gid=f"bar-{index}")
        axes.plot([group.min(), group.max()], [index, index], color=colour, linewidth=1.6)
        axes.scatter(group, np.full(len(group), index), s=14, c=colour, zorder=3, gid=f"runs-{index}")
        spread = f" ({group.min():.3f} to {group.max():.3f})" if len(group) > 1 else ""
        axes.text(0.0, index - 0.3, label(name), va="bottom", fontweight="bold")
        axes.text(1.0, index - 0.3, f"{group.mean():.3f}{spread}", va="bottom", ha="right")
    axes.set(xlabel="accuracy", yticks=[])
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
    spoken = ", ".join(f"{name} {group.mean():.3f}" for name, group in values.items())
    return to_svg(figure, f"Mean accuracy of {spoken}")


def _groups(groups: Mapping[str, ArrayLike], what: str) -> dict[str, NDArray[np.float64]]:
    """Each group as a float64 array (B,), checked."""
    if not groups:
        raise _nothing(what)
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in groups.items()}
    for name, array in arrays.items():
        if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all() or array.min() < 0.0:
            raise DataError(
                f"the values of {name} can't be drawn; expected (B,) finite numbers from 0 up, with B >= 1",
                "Leave out a group without examples, and examples without a finite value.",
            )
    return arrays


def _drawn(series: Mapping[str, T | None], what: str) -> list[tuple[int, str, T]]:
    """Place, name and value of each series that is there."""
    drawn = [(place, name, value) for place, (name, value) in enumerate(series.items()) if value is not None]
    if not drawn:
        raise _nothing(what)
    return drawn


def _nothing(what: str) -> DataError:
    return DataError(f"there is no {what} to draw", "Pass at least one by name.")
