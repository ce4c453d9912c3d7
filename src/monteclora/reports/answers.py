"""What a classifier answers: label by label, which labels it takes for which, and where it was sure and wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monteclora.prediction.predictions import Predictions
from monteclora.reports.cells import draw_cells
from monteclora.reports.formats import count, decimals
from monteclora.reports.page import Column, Figure, Row, Section, Table
from monteclora.reports.svg import Svg, house_style, label, new_figure, to_svg

__all__ = ["confusion_matrix", "label_section"]

_DRAWN = 15  # labels; of more, the table of confusions says which there are
_COMMONEST = 12
_NUMBER = decimals(3)


def label_section(found: Any, names: Sequence[str]) -> Section | None:
    """Precision, recall and F1 of each label, and the confusions; None where answers are not one of some labels.

    Args:
        found: predictions of labelled rows.
        names: of the labels, in the order of the classes.
    """
    if not isinstance(found, Predictions) or found.labels is None or len(names) != found.probs.shape[-1]:
        return None
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (found.labels, found.probs.argmax(1)), 1)
    tables = [_labels(counts, names)]
    figures = []
    if len(names) <= _DRAWN:
        caption = "A row for each right label, a column for each answer: how many rows. Off the diagonal are errors."
        figures.append(Figure([confusion_matrix(counts, names)], caption))
    else:
        tables.append(_confusions(counts, names))
    return Section("Label by label", figures=figures, tables=tables)


def _labels(counts: NDArray[np.int64], names: Sequence[str]) -> Table:
    right, true, answered = counts.diagonal(), counts.sum(1), counts.sum(0)
    rows = [
        Row(
            [
                name,
                int(true[i]),
                int(answered[i]),
                float(right[i] / answered[i]) if answered[i] else None,
                float(right[i] / true[i]) if true[i] else None,
                float(2 * right[i] / (true[i] + answered[i])) if true[i] + answered[i] else None,
            ]
        )
        for i, name in enumerate(names)
    ]
    columns = [Column("Label"), Column("Rows", count), Column("Answered", count)]
    columns += [Column(header, _NUMBER) for header in ("Precision", "Recall", "F1")]
    caption = (
        "Precision: of the rows answered so, the share that are. Recall: of the rows that are, the share answered so. "
        "F1: their harmonic mean."
    )
    return Table(columns, rows, caption)


def _confusions(counts: NDArray[np.int64], names: Sequence[str]) -> Table:
    wrong = counts - np.diag(counts.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[:_COMMONEST]
    pairs = [(int(place) // len(names), int(place) % len(names)) for place in order]
    rows = [Row([names[true], names[given], int(wrong[true, given])]) for true, given in pairs if wrong[true, given]]
    return Table([Column("Label"), Column("Answer"), Column("Rows", count)], rows, "The commonest errors.")


@house_style()
def confusion_matrix(counts: NDArray[np.int64], names: Sequence[str]) -> Svg:
    """How many rows, int (C, C), have which label (first axis) and which answer; coloured by shares of a label's."""
    figure = new_figure(1.5 + 0.32 * len(names))
    axes = figure.add_subplot(xlabel="answer", ylabel="label")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    texts = [[str(value) if value else "" for value in row] for row in counts]
    titles = [label(name) for name in names]
    draw_cells(axes, shares, texts, titles, titles, 0.0, 1.0)
    axes.tick_params(axis="x", labelrotation=90)
    wrong = int(counts.sum() - counts.trace())
    return to_svg(
        figure, f"Confusion matrix of {len(names)} labels: {wrong} of {int(counts.sum())} rows answered wrong"
    )
