"""What an evaluation leaves in its run folder: ``predictions.parquet`` and ``evaluation.json``.

Both hold every split that was evaluated, the last time it was, for the adapter and for the base model apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from monteclora.errors import CheckpointError
from monteclora.runs.documents import read_document, write_document
from monteclora.system.atomic import replacing

__all__ = [
    "EVALUATION_FILE",
    "PREDICTIONS_FILE",
    "add_evaluation",
    "add_predictions",
    "read_evaluations",
    "read_predictions",
]

EVALUATION_FILE = "evaluation.json"
PREDICTIONS_FILE = "predictions.parquet"
_FORMAT = 1


def add_predictions(folder: Path, table: pa.Table) -> Path:
    """Put rows into the run's predictions, in the place of earlier ones of the same split and model.

    Args:
        folder: of the run.
        table: with the columns ``split`` and ``model``, each the same in every row.
    """
    path = folder / PREDICTIONS_FILE
    kept = _other_rows(path, table)
    with replacing(path) as temporary:
        pq.write_table(pa.concat_tables([*kept, table], promote_options="default"), temporary)
    return path


def _other_rows(path: Path, table: pa.Table) -> list[pa.Table]:
    if not path.is_file():
        return []
    try:
        before = pq.read_table(path)
        split, model = table["split"][0], table["model"][0]
        same = pa.compute.and_(pa.compute.equal(before["split"], split), pa.compute.equal(before["model"], model))
        kept = before.filter(pa.compute.invert(same))
        pa.concat_tables([kept, table], promote_options="default")
    except (pa.ArrowException, KeyError):
        return []  # not ours any more: predictions can be made again, so nothing is lost by making them again
    return [kept]


def add_evaluation(folder: Path, about: Mapping[str, Any], split: str, model: str, facts: Mapping[str, Any]) -> Path:
    """Put one evaluation into the run's ``evaluation.json``.

    Args:
        folder: of the run.
        about: what is the same for every evaluation of the run.
        split: what was evaluated.
        model: ``adapter`` or ``base``.
        facts: how, and what came out.

    Raises:
        CheckpointError: the file is there and damaged, or of a later format.
    """
    path = folder / EVALUATION_FILE
    splits = read_document(path, _FORMAT, _splits) or {}
    splits.setdefault(split, {})[model] = dict(facts)
    write_document(path, _FORMAT, {**about, "splits": splits})
    return path


def read_evaluations(folder: str | Path) -> dict[str, dict[str, Any]]:
    """What a run was evaluated on: the facts by split and model; empty where it never was.

    Raises:
        CheckpointError: ``evaluation.json`` is damaged, or of a later format.
    """
    return read_document(Path(folder) / EVALUATION_FILE, _FORMAT, _splits) or {}


def read_predictions(folder: str | Path, split: str, model: str) -> pa.Table:
    """The rows that one evaluation left, in their order.

    Raises:
        CheckpointError: the file is missing or damaged, or has none of them.
    """
    path = Path(folder) / PREDICTIONS_FILE
    try:
        table = pq.read_table(path, filters=[("split", "=", split), ("model", "=", model)])
        if not table.num_rows:
            raise LookupError("it has no such rows")
        return table.sort_by("index")
    except (OSError, LookupError, pa.ArrowException) as error:
        raise CheckpointError(
            f"{path} has no predictions of {split} by {model} ({type(error).__name__})", "Evaluate the run again."
        ) from None


def _splits(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: dict(models) for name, models in document["splits"].items()}
