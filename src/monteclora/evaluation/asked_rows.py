"""Which rows an evaluation is asked for: a split of the run's own data, of another task, or a file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from monteclora.data.sources import local_splits
from monteclora.data.splitting import subset
from monteclora.errors import ConfigError, DataError
from monteclora.evaluation.own_rows import changed, own_split
from monteclora.runs.loading import LoadedRun
from monteclora.runs.resumption import overrides_of
from monteclora.runs.run_folder import RunFolder
from monteclora.tasks import DataSpec, SplitSource, TaskData, check_pair, get_task, load
from monteclora.tasks.local import looks_like_file

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["AskedRows", "asked_rows"]


@dataclass(frozen=True)
class AskedRows:
    """The rows to evaluate.

    Attributes:
        name: of the split, after the task's where it is another task than the run's.
        rows: those chosen.
        source: of them.
        own: the split of the run's own data that they are, None if they are none of it.
        split_rows: how many there are to choose from.
        notes: what a reader of the numbers must know of them.
    """

    name: str
    rows: Dataset
    source: SplitSource
    own: str | None
    split_rows: int
    notes: list[str]


def asked_rows(loaded: LoadedRun, split: str | None, task: str | None, count: int | None) -> AskedRows:
    """The rows of an evaluation; see :func:`monteclora.evaluation.run.evaluate` for the arguments.

    Raises:
        ConfigError: split or task does not fit the run.
        DataError: the split is missing or wrong.
    """
    data, split = _load_split(loaded, split, task)
    rows = subset(data.split(split), count, seed=0)
    source = data.sources[split]
    own = own_split(loaded.folder, split, source, task)
    leaks = [note for note in data.leaks if note.startswith(f"{split}:")]
    notes = [*data.file_notes.get(split, ()), *_past(loaded, own, source)]
    notes += leaks if task is None else [f"{task}:{note}" for note in leaks]
    split_rows = source.rows
    if len(rows) < split_rows:
        source = SplitSource(source.origin, len(rows), rows)
    return AskedRows(split if task is None else f"{Path(task).name}:{split}", rows, source, own, split_rows, notes)


def _load_split(loaded: LoadedRun, split: str | None, task: str | None) -> tuple[TaskData, str]:
    spec, trained = loaded.recipe.data, None
    if task is not None and looks_like_file(task):
        if split not in (None, "test"):
            raise ConfigError(f"split is {split}, and {task} is one file of rows", "Leave the split out.")
        spec, trained, split = _of_file(loaded, task), loaded.columns, "test"
    elif task is not None:
        kind = get_task(task).kind
        if kind != loaded.kind:
            raise ConfigError(
                f"{task} is a task of {kind}, and the run is one of {loaded.kind}", "Choose another task."
            )
        spec = DataSpec(task, folder=spec.folder, max_length=spec.max_length, truncation=spec.truncation)
        if split is None:  # none of its rows is learned here, so none is read that is not scored
            available = local_splits(task, spec.local_folder) or get_task(task).splits
            split = "test" if "test" in available else "validation"
    data = load(spec, None if split is None else (split,), trained)
    if trained is None and data.columns is not None:
        check_pair(data.name, data.columns, loaded.recipe.data)
    if data.label_names != loaded.label_names:
        raise DataError(
            f"{data.name} has other labels than the run {loaded.folder} was trained with",
            "Restore the data, or list the labels in data.label_names and train again.",
        )
    return data, split or ("test" if "test" in data.splits else "validation")


def _of_file(loaded: LoadedRun, file: str) -> DataSpec:
    """A file with the columns and labels of the run's own data, as its test rows."""
    return dataclasses.replace(
        loaded.recipe.data,
        task=None,
        subset=None,
        train_file=None,
        validation_file=None,
        test_file=file,
        label_names=list(loaded.label_names or ()),
        train_rows=None,
        kind=loaded.kind,
    )


def _past(loaded: LoadedRun, own: str | None, source: SplitSource) -> list[str]:
    """What of the run's past its numbers have to be read with; ``own`` is the evaluated split of the run's own data."""
    anew = own is not None and changed(loaded.folder, own, source)
    notes = [f"the {own} rows of {source.origin} changed since the run was trained"] if anew else []
    for folder in loaded.members:
        notes += [f"the run {folder} {note}" for note in overrides_of(RunFolder(folder).environment)]
    environment = RunFolder(loaded.folder).environment
    return notes if loaded.members else notes + [f"the run {note}" for note in overrides_of(environment)]
