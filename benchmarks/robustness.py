"""The picture of docs/robustness.md: accuracy over learning rates, from the committed outcomes.

    python benchmarks/robustness.py

A dot a run, a line through the means over seeds, a panel for each share of wrong labels and batch size; and, dashed,
what runs reach that found their rate themselves. Full fine-tuning stands at ten times its rate.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from monteclora.system.atomic import write_file

DOCS = Path(__file__).parent.parent / "docs"
STUDY, NO_SWEEP = (
    DOCS / "results" / name / "results.parquet" for name in ("helpdesk-six-methods", "no-sweep-helpdesk")
)
PICTURE = DOCS / "assets" / "robustness.svg"
ARMS = {
    "LoRA": ("#c84e00", "o", 1),
    "MonteCLoRA": ("#1f86c8", "s", 1),
    "Full": ("#7d5fb2", "D", 10),
    "DoRA": ("#2f9e44", "^", 1),
    "AdaLoRA": ("#b8860b", "v", 1),
    "peft's MonteCLoRA": ("#d6408f", "x", 1),
}
_INK = "#7a7a7a"  # readable on white and on black

Rows = Sequence[Mapping[str, Any]]


def picture(study: Rows, no_sweep: Rows) -> bytes:
    """SVG of the rows of two ``results.parquet``."""
    matplotlib.rcParams.update({"svg.hashsalt": "monteclora", "svg.fonttype": "none", "font.size": 10})
    for part in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"):
        matplotlib.rcParams[part] = _INK
    rows, no_sweep = _read(study), _read(no_sweep)
    noises, sizes = (sorted({row[key] for row in rows}) for key in ("data.label_noise", "training.batch_size"))
    figure = Figure(figsize=(8.5, 1.0 + 2.7 * len(noises)), layout="constrained")
    figure.patch.set_visible(False)
    grid = figure.subplots(len(noises), len(sizes), sharex=True, sharey=True, squeeze=False)
    for panels, noise in zip(grid, noises, strict=True):
        for axes, size in zip(panels, sizes, strict=True):
            here = [row for row in rows if (row["data.label_noise"], row["training.batch_size"]) == (noise, size)]
            _panel(axes, here, [row for row in no_sweep if row["data.label_noise"] == noise])
            labels = "all labels right" if noise == 0 else f"{noise:.0%} of the labels wrong"
            axes.set_title(f"batch size {size}, {labels}", loc="left", fontsize=10)
        panels[0].set_ylabel("accuracy")
    for axes in grid[-1]:
        axes.set_xlabel("learning rate (full fine-tuning: a tenth of it)")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, names, frameon=False, loc="outside lower center", ncols=4, labelcolor="linecolor", fontsize=9
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _panel(axes: Axes, rows: Rows, no_sweep: Rows) -> None:
    axes.patch.set_visible(False)
    for number, (arm, (colour, marker, times)) in enumerate(ARMS.items()):
        mine = [row for row in rows if row["arm"] == arm]
        rates = sorted({row["training.learning_rate"] for row in mine})
        shift = 1.04 ** (number - (len(ARMS) - 1) / 2) * times  # side by side on the logarithmic scale
        means = [mean(row["accuracy"] for row in mine if row["training.learning_rate"] == rate) for rate in rates]
        axes.plot([rate * shift for rate in rates], means, color=colour, linewidth=1.2, label=arm)
        places = [row["training.learning_rate"] * shift for row in mine]
        axes.scatter(places, [row["accuracy"] for row in mine], s=14, color=colour, marker=marker, alpha=0.7)
        found = [row["accuracy"] for row in no_sweep if row["arm"] == f"{arm}, auto"]
        if found:
            axes.axhline(mean(found), color=colour, linewidth=1, linestyle=(0, (4, 3)), label=f"{arm}, no sweep")
    axes.set(xscale="log", ylim=(0, 0.8))
    axes.grid(axis="y", alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _read(rows: Rows) -> Rows:
    """With the values of settings, which ``results.parquet`` has as JSON."""
    return [{key: json.loads(value) if "." in key else value for key, value in row.items()} for row in rows]


def main() -> None:
    study, no_sweep = (pq.read_table(path).to_pylist() for path in (STUDY, NO_SWEEP))
    write_file(PICTURE, picture(study, no_sweep))


if __name__ == "__main__":
    main()
