"""Where the rows of a task come from: a data folder, else the Hugging Face hub.

The folder is the one given, else the environment variable ``MONTECLORA_DATA``; it holds
``<task>/<split>.jsonl.gz`` with the columns that the data set has on the hub.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monteclora.data.files import Attempt, Table, open_table
from monteclora.errors import DataError, NotAtHandError, UnsafeCodeError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["DATA_FOLDER_VARIABLE", "SPLITS", "HubData", "convert", "hub_splits", "local_splits", "open_split"]

DATA_FOLDER_VARIABLE = "MONTECLORA_DATA"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class HubData:
    """A data set on the hub; ``splits`` maps our split names to its own where they differ."""

    name: str
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}:{self.config}" if self.config else self.name


def local_splits(task: str, folder: Path | None) -> tuple[str, ...]:
    """The splits of a task that are in the data folder."""
    root = folder or os.environ.get(DATA_FOLDER_VARIABLE)
    names = SPLITS if root else ()
    return tuple(split for split in names if _split_file(Path(str(root)), task, split).is_file())


def open_split(task: str, split: str, folder: Path | None, hub: HubData | None = None) -> Table:
    """Open one split of a task, from the folder if it is there, else from the hub.

    Raises:
        NotAtHandError: it is in neither place; the message names both remedies.
        UnsafeCodeError: the hub's data set is a program.
    """
    root = folder or os.environ.get(DATA_FOLDER_VARIABLE)
    if root and _split_file(Path(root), task, split).is_file():
        return open_table(_split_file(Path(root), task, split))
    try:
        if hub is None:
            raise DataError("it is not on the hub")
        dataset = _load_from_hub(hub.name, hub.config, hub.splits.get(split, split))
    except DataError as error:
        raise NotAtHandError(
            f"the {split} split of {task} is not available: {error.message}",
            f"Set {DATA_FOLDER_VARIABLE} to a folder with {task}/{split}.jsonl.gz, or run where the hub is reachable.",
        ) from None
    return hub_table(str(hub), split, dataset)


def _split_file(root: Path, task: str, split: str) -> Path:
    return root / task / f"{split}.jsonl.gz"


def convert(table: Table, columns: tuple[str, ...], function: Callable[[dict[str, Any]], dict[str, Any]]) -> Table:
    """``table`` with ``function`` applied to each row; DataError for a row that lacks a column or that it refuses."""

    def converted(number: int, row: dict[str, Any]) -> dict[str, Any] | DataError:
        try:
            return function(row)
        except KeyError as error:
            return DataError(f"{table.place(number)} has no column {error}", "Is this the file of another task?")
        except (ValueError, TypeError) as error:
            return DataError(f"{table.place(number)}: {error}", "Correct the row or remove it.")

    def attempts() -> Iterator[Attempt]:
        for number, row in table.each():
            yield number, row if isinstance(row, DataError) else converted(number, row)

    return Table.of_attempts(table.name, columns, attempts, unit=table.unit, notes=table.notes)


def hub_splits(name: str, config: str | None) -> dict[str, Table]:
    """Every split of a data set on the hub, by its own name. Raises DataError or UnsafeCodeError."""
    source = str(HubData(name, config))
    return {split: hub_table(source, split, data) for split, data in _load_from_hub(name, config, None).items()}


def hub_table(source: str, split: str, dataset: Dataset) -> Table:
    """A ``datasets.Dataset`` as a table, with the names of its class labels."""
    names = {
        column: tuple(feature.names) for column, feature in dataset.features.items() if getattr(feature, "names", None)
    }
    return Table(
        name=f"{source} ({split})",
        columns=tuple(dataset.column_names),
        rows=lambda: enumerate(iter(dataset), start=1),
        unit="row",
        class_names=names,
    )


def _load_from_hub(name: str, config: str | None, split: str | None) -> Any:
    import datasets

    source = str(HubData(name, config))
    try:
        return datasets.load_dataset(name, config, split=split)
    except RuntimeError as error:
        if "script" in str(error):
            raise UnsafeCodeError(
                f"the data set {source} is a program", "Export it as .parquet or .jsonl and give that file."
            ) from None
        raise
    except (OSError, ValueError) as error:
        # ConnectionError and DatasetNotFoundError are OSErrors; an unknown config or split is a ValueError.
        reason = str(error).strip().partition("\n")[0]
        kind = NotAtHandError if isinstance(error, OSError) else DataError
        raise kind(f"cannot load {source} from the hub: {reason}", "Check the name and the network.") from None
