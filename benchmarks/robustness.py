"""The picture of docs/robustness.md: accuracy over learning rates, from the committed outcomes.

    python benchmarks/robustness.py

A dot a run, a line through the means over seeds, a panel for each share of wrong labels; and, dashed, what runs reach
that found their rate themselves.
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
from matplotlib.figure import Figure

from monteclora.system.atomic import write_file

DOCS = Path(__file__).parent.parent / "docs"
STUDY, NO_SWEEP = (DOCS / "results" / name / "results.parquet" for name in ("helpdesk", "no-sweep-helpdesk"))
PICTURE = DOCS / "assets" / "robustness.svg"
BATCH_SIZE = 32  # complete for every rate and seed
ARMS = {"LoRA": ("#c84e00", "o"), "MonteCLoRA": ("#1f86c8", "s")}
_INK = "#7a7a7a"  # readable on white and on black

Rows = Sequence[Mapping[str, Any]]


def picture(study: Rows, no_sweep: Rows) -> bytes:
    """SVG of the rows of two ``results.parquet``."""
    matplotlib.rcParams.update({"svg.hashsalt": "monteclora", "svg.fonttype": "none", "font.size": 10})
    for part in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"):
        matplotlib.rcParams[part] = _INK
    rows, no_sweep = _read(study), _read(no_sweep)
    rows = [row for row in rows if row["training.batch_size"] == BATCH_SIZE]
    noises = sorted({row["data.label_noise"] for row in rows})
    figure = Figure(figsize=(8.5, 3.3), layout="constrained")
    figure.patch.set_visible(False)
    for axes, noise in zip(figure.subplots(1, len(noises), sharey=True, squeeze=False)[0], noises, strict=True):
        axes.patch.set_visible(False)
        for number, (arm, (colour, marker)) in enumerate(ARMS.items()):
            mine = [row for row in rows if row["arm"] == arm and row["data.label_noise"] == noise]
            rates = sorted({row["training.learning_rate"] for row in mine})
            shift = 1.06 ** (2 * number - 1)  # side by side on the logarithmic scale
            means = [mean(row["accuracy"] for row in mine if row["training.learning_rate"] == r) for r in rates]
            axes.plot([rate * shift for rate in rates], means, color=colour, linewidth=1.2, label=arm)
            places = [row["training.learning_rate"] * shift for row in mine]
            axes.scatter(places, [row["accuracy"] for row in mine], s=16, color=colour, marker=marker, alpha=0.7)
            found = [
                row["accuracy"] for row in no_sweep if row["arm"] == f"{arm}, auto" and row["data.label_noise"] == noise
            ]
            if found:
                axes.axhline(mean(found), color=colour, linewidth=1, linestyle=(0, (4, 3)), label=f"{arm}, no sweep")
        axes.set(xscale="log", xlabel="learning rate", ylim=(0, 0.8))
        axes.set_title("all labels right" if noise == 0 else f"{noise:.0%} of the labels wrong", loc="left")
        axes.grid(axis="y", alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("accuracy, 300 test messages")
    figure.axes[0].legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 0.12), labelcolor="linecolor")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _read(rows: Rows) -> Rows:
    """With the values of settings, which ``results.parquet`` has as JSON."""
    return [{key: json.loads(value) if "." in key else value for key, value in row.items()} for row in rows]


def main() -> None:
    study, no_sweep = (pq.read_table(path).to_pylist() for path in (STUDY, NO_SWEEP))
    write_file(PICTURE, picture(study, no_sweep))


if __name__ == "__main__":
    main()
