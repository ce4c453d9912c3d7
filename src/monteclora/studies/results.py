"""``results.parquet``: a row for each trial that is done, from which its outcome can be read back without loss.

Beside the columns that people and other tools read (the arm, the values of the grid's keys as JSON) there is one for
each field of an :class:`~monteclora.studies.folder.Outcome`, and one for each entry of those of its fields that are
mappings. The metadata of these columns say which one they hold, so that no name of a metric or key can be mistaken for
another. An entry that an outcome does not have is null, which a number that is not finite is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from monteclora.errors import CheckpointError
from monteclora.studies.folder import Outcome, Status
from monteclora.studies.plan import Plan
from monteclora.system.atomic import replacing

__all__ = ["read_results", "write_results"]

_FORMAT = 1
_VERSION, _HOLDS = b"monteclora_results_format", b"monteclora_outcome"
# what the columns of a field's entries begin with
_PREFIXES = {"metrics": "", "point": "mean_", "validation": "validation_", "no_skill": "no_skill_"}
_TYPES = {"str": pa.string(), "Status": pa.string(), "int": pa.int64(), "float": pa.float64()}
_FIELDS = {
    field.name: _TYPES.get(str(field.type), pa.list_(pa.string()))
    for field in fields(Outcome)
    if field.name not in _PREFIXES
}
_REQUIRED = ("trial", "status")


def write_results(path: Path, plan: Plan, outcomes: Mapping[str, Outcome]) -> None:
    """Write a row for each trial of the plan that has an outcome, in the plan's order."""
    trials = [trial for trial in plan.trials if trial.id in outcomes]
    found = [outcomes[trial.id] for trial in trials]
    columns = [_column("trial", [outcome.trial for outcome in found], pa.string(), "trial")]
    columns.append(_column("arm", [trial.arm for trial in trials], pa.string()))
    columns.append(_column("seed", [trial.seed for trial in trials], pa.int64()))
    values = [{**trial.conditions, **trial.settings} for trial in trials]
    for key in dict.fromkeys(key for of_trial in values for key in of_trial):
        texts = [json.dumps(of_trial[key]) if key in of_trial else None for of_trial in values]
        columns.append(_column(key, texts, pa.string()))
    for name, kind in _FIELDS.items():
        if name != "trial":
            columns.append(_column(name, [getattr(outcome, name) for outcome in found], kind, name))
    for name, prefix in _PREFIXES.items():
        entries = [getattr(outcome, name) for outcome in found]
        for entry in dict.fromkeys(entry for of_trial in entries for entry in of_trial):
            numbers = [of_trial.get(entry) for of_trial in entries]
            taken = {field.name for field, _ in columns}
            header = prefix + entry if prefix + entry not in taken else f"{name}.{entry}"
            columns.append(_column(header, numbers, pa.float64(), f"{name}.{entry}"))
    schema = pa.schema([field for field, _ in columns], {_VERSION: str(_FORMAT).encode()})
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_arrays([array for _, array in columns], schema=schema), temporary)


def _column(name: str, values: list[Any], kind: pa.DataType, holds: str | None = None) -> tuple[pa.Field, pa.Array]:
    metadata = None if holds is None else {_HOLDS: holds.encode()}
    return pa.field(name, kind, metadata=metadata), pa.array(values, kind)


def read_results(path: Path) -> dict[str, Outcome]:
    """The outcomes in such a file, by trial; fields that an earlier version did not write have their defaults.

    Raises:
        CheckpointError: there is no such file, it is damaged, no study's results, or of a later version.
    """
    try:
        table = pq.ParquetFile(path).read()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", "Give the results.parquet of a study.") from None
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from None
    _check_format(path, table.schema)
    found: dict[str, Outcome] = {}
    try:
        for values in _rows(table):
            if values["status"] not in get_args(Status):
                raise ValueError(values["status"])
            found[values["trial"]] = Outcome(**values)
    except (ValueError, TypeError, LookupError, pa.ArrowException) as error:
        raise _damaged(path, error) from None
    return found


def _check_format(path: Path, schema: pa.Schema) -> None:
    about = schema.metadata or {}
    held = {(field.metadata or {}).get(_HOLDS, b"").decode() for field in schema}
    if _VERSION not in about or not held.issuperset(_REQUIRED):
        raise CheckpointError(
            f"{path} is not the results.parquet of a study, or one of an earlier version",
            "Run the study's command once more where its folder is: it writes the file again.",
        )
    if not about[_VERSION].isdigit() or int(about[_VERSION]) > _FORMAT:
        raise CheckpointError(
            f"{path} has format {about[_VERSION].decode(errors='replace')}, and this version reads up to {_FORMAT}",
            "Update monteclora.",
        )


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The arguments of each row's outcome."""
    scalars: dict[str, list[Any]] = {}
    entries: dict[str, dict[str, list[Any]]] = {name: {} for name in _PREFIXES}
    for index, field in enumerate(table.schema):
        name, _, entry = (field.metadata or {}).get(_HOLDS, b"").decode().partition(".")
        if name in entries:
            entries[name][entry] = table.column(index).cast(pa.float64()).to_pylist()
        elif name in _FIELDS:
            scalars[name] = table.column(index).cast(_FIELDS[name]).to_pylist()
    for row in range(table.num_rows):
        values = {name: column[row] for name, column in scalars.items() if column[row] is not None}
        for name, columns in entries.items():
            values[name] = {entry: column[row] for entry, column in columns.items() if column[row] is not None}
        yield values


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({type(error).__name__})", "Take it from a backup, or leave it out.")
