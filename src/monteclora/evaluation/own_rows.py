"""The rows that a run was trained and validated on, loaded again, and refused where they are others by now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from monteclora.data.splitting import carve_validation
from monteclora.errors import DataError
from monteclora.runs.run_folder import RunFolder
from monteclora.tasks import DataSpec, SplitSource, TaskData, load

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["FIT_SPLIT", "changed", "halves", "own_rows", "own_split"]

FIT_SPLIT = "validation"


def own_rows(folder: Path, spec: DataSpec, *splits: str) -> TaskData:
    """The run's own rows of these splits, as far as it has them.

    Args:
        folder: of the run.
        spec: its recipe's data.
        splits: which are needed.

    Raises:
        DataError: rows are gone, not known, or not those that the run was trained with.
    """
    if not (spec.task or spec.train_file or spec.validation_file):
        raise DataError(f"{folder} is an adapter that does not say which rows it was trained on", "Load its run.")
    data = load(spec, splits)
    for split, source in data.sources.items():
        if changed(folder, split, source):
            raise DataError(
                f"the {split} rows of {source.origin} changed since {folder} was trained",
                "Restore them, or train again.",
            )
    return data


def changed(folder: Path, split: str, source: SplitSource) -> bool:
    """Whether a split had other rows when the run in ``folder`` was trained."""
    before = RunFolder(folder).environment["data"]["splits"].get(split)
    return before is not None and before["sha256"] != source.sha256


def own_split(folder: Path, split: str, source: SplitSource, task: str | None) -> str | None:
    """Which split of the run's own data an evaluated one is; None where it is none of them.

    Args:
        folder: of the run.
        split: what is evaluated.
        source: of its rows.
        task: that they are of; None for the run's own data.
    """
    if task is None:
        return split
    own = RunFolder(folder).environment["data"]["splits"]
    return next((name for name, each in own.items() if each["sha256"] == source.sha256), None)


def halves(rows: Dataset, name: str) -> tuple[Dataset, Dataset]:
    """Validation rows, divided: what the posterior's scale is chosen on, and what that leaves for other choices.

    Raises:
        DataError: there are too few rows.
    """
    return carve_validation(rows, 0.5, 0, name)
