"""SuperGLUE: WiC and BoolQ (Wang et al. 2019).

The hub hides the test labels of both; a data folder may hold the published ones of WiC.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from monteclora.data.files import Table
from monteclora.data.sources import HubData, convert, open_split
from monteclora.tasks.registry import Task, register

__all__: list[str] = []

_COLUMNS = ("text", "text_pair", "label")


def _wic_row(row: dict[str, Any]) -> dict[str, Any]:
    # The model must know which word is meant: it stands before the first sentence.
    return {
        "text": f"{row['word']}: {row['sentence1']}",
        "text_pair": row["sentence2"],
        "label": row["label"],
    }


def _boolq_row(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": row["question"], "text_pair": row["passage"], "label": row["label"]}


def _load(name: str, convert_row: Callable[[dict[str, Any]], dict[str, Any]], split: str, folder: Path | None) -> Table:
    return convert(open_split(name, split, folder, HubData("aps/super_glue", name)), _COLUMNS, convert_row)


register(
    Task(
        name="wic",
        kind="classification",
        text_columns=("sentence1", "sentence2"),
        label_names=("different", "same"),
        splits=("train", "validation"),
        description="SuperGLUE: has the word the same sense in both sentences?",
        loader=partial(_load, "wic", _wic_row),
    )
)
register(
    Task(
        name="boolq",
        kind="classification",
        text_columns=("question", "passage"),
        label_names=("no", "yes"),
        splits=("train", "validation"),
        description="SuperGLUE: a yes/no question about a passage",
        loader=partial(_load, "boolq", _boolq_row),
    )
)
