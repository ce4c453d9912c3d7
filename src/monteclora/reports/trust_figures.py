"""Figures about when a run's answers can be trusted, each as SVG; see ``figures``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from monteclora.metrics.selective import RiskCoverage
from monteclora.reports.svg import INK, MARKERS, SERIES, Svg, house_style, label, new_figure, to_svg

__all__ = ["accuracy_by_coverage", "corruption_lines", "scale_curve"]


@house_style()
def accuracy_by_coverage(curve: RiskCoverage) -> Svg:
    """The share of right answers against the share of rows that are answered, the most confident first."""
    figure = new_figure(3.0)
    axes = figure.add_subplot(xlabel="share of rows answered, most confident first", ylabel="share answered right")
    accuracy = 1.0 - curve.risk
    axes.plot(curve.coverage, accuracy, color=SERIES[0], linewidth=1.6, gid="accuracy-by-coverage")
    axes.axhline(accuracy[-1], color=INK, alpha=0.5, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set(xlim=(0.0, 1.0), ylim=(min(0.98 * accuracy.min(), accuracy[-1] - 0.05), 1.005))
    axes.grid(True)
    return to_svg(figure, f"Share of right answers by coverage; of all rows {accuracy[-1]:.3f}")


@house_style()
def scale_curve(scales: Sequence[float], values: Sequence[float], name: str, chosen: float) -> Svg:
    """A metric against the posterior's scale, float (T,) each, in any order; a vertical line at the chosen scale."""
    order = np.argsort(scales)
    x, y = np.asarray(scales, float)[order], np.asarray(values, float)[order]
    figure = new_figure(2.7)
    axes = figure.add_subplot(title=name, xlabel="scale, in multiples of the trained one")
    axes.plot(x, y, color=SERIES[0], marker="o", markersize=4, linewidth=1.2, gid="scale-curve")
    axes.axvline(chosen, color=INK, linewidth=1.0, alpha=0.7, gid="chosen-scale")
    if x.max() > 10 * (smallest := x[x > 0].min()):
        axes.set_xscale("symlog", linthresh=smallest)
    axes.set_xlim(left=0.0)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(True)
    return to_svg(figure, f"{name} against the posterior's scale; chosen is {chosen:.3g}")


@house_style()
def corruption_lines(lines: Mapping[str, Sequence[float]], name: str) -> Svg:
    """A metric of clean rows and at each strength of a corruption, one line a corruption.

    Args:
        lines: by corruption; the first value is that of clean rows.
        name: of the metric.
    """
    figure = new_figure(2.9 + 0.21 * ((len(lines) + 1) // 2))
    axes = figure.add_subplot(title=name, xlabel="strength of the corruption")
    handles = []
    for index, (title, values) in enumerate(lines.items()):
        style: dict[str, Any] = {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}
        axes.plot(range(len(values)), values, linewidth=1.4, markersize=5, gid=f"corruption-{index}", **style)
        handles.append(Line2D([], [], linewidth=1.4, markersize=5, label=label(title), **style))
    most = max(map(len, lines.values()))
    axes.set_xticks(range(most), ["clean", *map(str, range(1, most))])
    axes.grid(True)
    figure.legend(handles=handles, loc="outside lower left", ncols=2)
    last = ", ".join(f"{title} {values[-1]:.3f}" for title, values in lines.items())
    return to_svg(figure, f"{name} by strength of corruption; at the strongest: {last}")
