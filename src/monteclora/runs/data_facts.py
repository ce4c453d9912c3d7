"""What a run was trained on, out of its ``environment.json``: the one place that reads it and finds it damaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from monteclora.data.columns import Columns
from monteclora.data.kinds import Kind
from monteclora.data.scores import ScoreScale
from monteclora.errors import CheckpointError
from monteclora.runs.run_folder import RunFolder
from monteclora.tasks.kinds import KINDS

__all__ = ["DataFacts", "data_facts"]

_FORMAT = 1  # of run folders
_SCALE = ("centre", "spread")


@dataclass(frozen=True)
class DataFacts:
    """The data of a run.

    Attributes:
        name: of the task.
        kind: of the task.
        label_names: in the order of the classes; None where the task has none.
        scale: on which scores were learned; None for other kinds.
        columns: of the training data, where it was no task with a name; earlier versions did not write them down.
        sha256: of the rows of each split.
        rows: how many each split has.
    """

    name: str
    kind: Kind
    label_names: tuple[str, ...] | None
    columns: Columns | None
    sha256: Mapping[str, str]
    scale: ScoreScale | None = None
    rows: Mapping[str, int] = field(default_factory=dict)


def data_facts(run: RunFolder) -> DataFacts:
    """Read them.

    Raises:
        CheckpointError: the run has not come that far, or its environment is damaged or of a later format.
    """
    environment = run.environment
    try:
        version = int(environment.get("format", 1))  # the first runs wrote no number
        if version > _FORMAT:
            raise CheckpointError(
                f"the run {run.path} has format {version}, this version reads format {_FORMAT}", "Upgrade monteclora."
            )
        about = environment["data"]
        name, kind, labels, columns = about["name"], about["kind"], about["label_names"], about.get("columns")
        if columns is not None:
            lists = {name: tuple(columns.get(name, ())) for name in ("text", "flags")}
            columns = Columns(**{**columns, **lists})
        if kind not in KINDS or not KINDS[kind].accepts(labels) or not isinstance(name, str):
            raise ValueError("it names no kind of task with its labels")
        scale = None if about.get("scale") is None else ScoreScale(*(float(about["scale"][n]) for n in _SCALE))
        if (scale is None) == (kind == "regression"):
            raise ValueError("scores have a scale, and nothing else has one")
        sha256 = {split: source["sha256"] for split, source in about["splits"].items()}
        rows = {split: int(source["rows"]) for split, source in about["splits"].items() if "rows" in source}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{run.path / 'environment.json'} is damaged ({type(error).__name__}: {error})",
            "Take the folder from a backup, or remove it and run `monteclora train` again.",
        ) from None
    return DataFacts(name, kind, tuple(labels) if labels else None, columns, sha256, scale, rows)
