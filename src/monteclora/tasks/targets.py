"""What is learned of the rows of texts: labels, scores or several labels, derived from what is in the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from monteclora.data.coded import distinct
from monteclora.data.columns import Columns
from monteclora.data.kinds import Kind
from monteclora.data.labels import LabelSet, Targets, describe_labels, refuse_scores
from monteclora.data.multi_labels import MultiLabelSet, describe_label_sets, separator_of
from monteclora.data.scores import ScoreSet, describe_scores
from monteclora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["check_targets", "describe_targets", "find_targets"]


def find_targets(
    columns: Columns, names: Sequence[str], keys: Mapping[str, Sequence[Any]], data: str
) -> tuple[Targets | None, list[str]]:
    """How what stands in the files becomes the column ``label``, and in words what was recognised; None for prompts.

    Args:
        columns: in use.
        names: of the labels, where they are known.
        keys: what stands in the files, by split.
        data: the name of it.

    Raises:
        DataError: there are no training rows to take the names from, or they hold scores for labels.
    """
    if columns.kind == "causal_lm":
        return None, []
    if columns.kind == "regression":
        return ScoreSet(), []
    if columns.flags:
        return MultiLabelSet(columns.flags), []
    if not names and "train" not in keys:
        raise DataError(f"{data} has no training rows to take the label names from", "Set data.label_names.")
    if columns.kind == "multi_label":
        # training and evaluation load different splits, and must divide the labels alike
        found, notes = columns.separator, []
        if found is None:
            found = separator_of(distinct(keys.get("train", ())), names)
            if found is None:  # lists, or no rows; what other rows do not show stays unknown
                found = separator_of((key for split in keys.values() for key in distinct(split)), names) or None
            notes = [f"labels are separated by {found!r}"] if found else []
        if names:
            return MultiLabelSet(names, found, columns.ids_count), notes
        return MultiLabelSet.from_keys(keys["train"], found), notes
    if names:
        return LabelSet(names, columns.ids_count), []
    refuse_scores(keys["train"], data)
    return LabelSet.from_labels(keys["train"]), []


def check_targets(kind: Kind, targets: Targets | None, data: Mapping[str, Dataset], name: str) -> None:
    """Raises DataError where the training rows have nothing to tell apart; of scores their scale does."""
    if targets is None or targets.names is None or "train" not in data:
        return
    if kind == "classification":
        present = set(data["train"].unique("label"))
        if len(present) < 2:
            only = ", ".join(targets.names[i] for i in present)
            raise DataError(f"all training rows of {name} have the label {only}", "Give rows of two labels or more.")
    elif not any(any(row) for row in data["train"]["label"]):
        raise DataError(f"no training row of {name} has a label", "Give rows with labels.")


def describe_targets(kind: Kind, targets: Targets | None, splits: Mapping[str, Dataset]) -> list[str]:
    """The labels or scores of each split, in words."""
    if targets is None:
        return []
    if kind == "multi_label":
        return describe_label_sets(targets.names or (), {split: rows["label"][:] for split, rows in splits.items()})
    values = {split: rows.with_format("arrow")["label"][:].to_numpy() for split, rows in splits.items()}
    return describe_scores(values) if targets.names is None else describe_labels(targets.names, values)
