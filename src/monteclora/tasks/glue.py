"""GLUE: MRPC, CoLA and RTE (Wang et al. 2018). The test labels of CoLA and RTE are not public."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monteclora.data.files import Table
from monteclora.data.sources import HubData, convert, open_split
from monteclora.tasks.registry import Task, register

__all__: list[str] = []


def _register(
    name: str, columns: tuple[str, ...], labels: tuple[str, str], splits: tuple[str, ...], about: str
) -> None:
    standard = ("text", "text_pair")[: len(columns)]

    def convert_row(row: dict[str, Any]) -> dict[str, Any]:
        texts = {ours: row[theirs] for ours, theirs in zip(standard, columns, strict=True)}
        return {**texts, "label": row["label"]}

    def load(split: str, folder: Path | None) -> Table:
        table = open_split(name, split, folder, HubData("nyu-mll/glue", name))
        return convert(table, (*standard, "label"), convert_row)

    register(Task(name, "classification", columns, labels, splits, about, load))


_register(
    "mrpc",
    ("sentence1", "sentence2"),
    ("not_equivalent", "equivalent"),
    ("train", "validation", "test"),
    "GLUE: do two news sentences say the same?",
)
_register(
    "cola",
    ("sentence",),
    ("unacceptable", "acceptable"),
    ("train", "validation"),
    "GLUE: is the sentence grammatical English?",
)
_register(
    "rte",
    ("sentence1", "sentence2"),
    ("entailment", "not_entailment"),
    ("train", "validation"),
    "GLUE: does the second text follow from the first?",
)
