"""The one way to data: a :class:`DataSpec` from the recipe in, a :class:`TaskData` out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from monteclora.data.coded import distinct
from monteclora.data.columns import Columns, columns_as_trained, find_columns, listed, named
from monteclora.data.files import Table
from monteclora.data.kinds import TEXT_KINDS, Kind
from monteclora.data.label_noise import with_label_noise
from monteclora.data.labels import LabelSet, Targets
from monteclora.data.multi_labels import MultiLabelSet
from monteclora.data.parts import open_files
from monteclora.data.rows import CheckedRows, Reading, read_rows
from monteclora.data.scores import ScoreScale
from monteclora.data.sources import SPLITS, local_splits
from monteclora.data.splitting import carve_validation, content_sha256, shared_inputs, subset
from monteclora.errors import ConfigError, DataError
from monteclora.tasks.local import file_tables, hub_tables, is_hub_name, looks_like_file
from monteclora.tasks.registry import Task, get_task
from monteclora.tasks.spec import DataSpec
from monteclora.tasks.targets import check_targets, describe_targets, find_targets

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SplitSource", "TaskData", "check_pair", "load", "load_inputs"]


@dataclass(frozen=True, eq=False)
class SplitSource:
    """Where the rows of a split came from (path or hub name), and their number.

    ``content`` is the sha256 of the rows, or the rows, which are then hashed when it is asked for.
    """

    origin: str
    rows: int
    content: str | Dataset = field(repr=False)

    @cached_property
    def sha256(self) -> str:
        """Of the rows' content."""
        return self.content if isinstance(self.content, str) else content_sha256(self.content)


@dataclass(frozen=True)
class TaskData:
    """Loaded data.

    ``splits`` holds datasets with the columns that :mod:`monteclora.data.rows` describes; ``notes`` says in
    words what was set aside or left out, ``leaks`` what of other splits stands in the training rows. ``columns`` are
    those of own data, which rows to be predicted must have too; None for a task with a name. ``scale`` is the one on
    which training learns scores; None for labels, and where the training rows are not loaded. ``file_notes`` are those
    of ``notes`` that are on the files of a split: how they were read, and what was left out.
    """

    name: str
    kind: Kind
    label_names: tuple[str, ...] | None
    splits: Mapping[str, Dataset]
    sources: Mapping[str, SplitSource]
    description: str
    notes: tuple[str, ...] = ()
    columns: Columns | None = None
    leaks: tuple[str, ...] = ()
    scale: ScoreScale | None = None
    file_notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def split(self, name: str) -> Dataset:
        """The rows of one split. Raises DataError that names the splits there are."""
        if name not in self.splits:
            raise DataError(f"{self.name} has no {name} split; it has {', '.join(self.splits)}", "Choose one.")
        return self.splits[name]


@dataclass(frozen=True)
class _Plan:
    """What will be read."""

    name: str
    tables: dict[str, Table]
    columns: Columns
    label_names: tuple[str, ...]
    description: str
    has_validation: bool
    own: bool = False


def load(spec: DataSpec, splits: Sequence[str] | None = None, trained: Columns | None = None) -> TaskData:
    """Load the data of a recipe.

    Args:
        spec: what to load.
        splits: the splits that are needed; by default all there are.
        trained: the columns of a run, where the files are others than its own: they must have the same ones, and
            nothing is recognised anew. ``spec`` then has the names of its labels.

    Raises:
        ConfigError: there is no such task.
        DataError: files, columns, rows or labels are wrong or missing.
        UnsafeCodeError: the data set is a program.
    """
    plan = _plan(spec, splits, trained)
    if spec.class_weights is not None and plan.columns.kind not in ("classification", "multi_label"):
        raise ConfigError("data.class_weights is given, and the rows have no labels", "Leave it out.")
    reading = Reading(spec.on_bad_row, spec.roles, spec.learned_turns, by_recipe=trained is None)
    checked = {split: read_rows(table, plan.columns, reading) for split, table in plan.tables.items()}
    file_notes = {split: (*table.notes, *checked[split].notes) for split, table in plan.tables.items()}
    notes = [note for table in plan.tables.values() for note in table.notes]
    notes += [note for rows in checked.values() for note in rows.notes]
    unused = _unused(plan.tables.values(), plan.columns) if plan.own else []
    notes += unused
    if trained is not None:  # of a run's own data, training has said so
        file_notes = {split: (*found, *unused) for split, found in file_notes.items()}
    hidden = _hidden(checked)
    notes += [f"{split}: left out, its labels are hidden" for split in hidden]
    checked = {split: rows for split, rows in checked.items() if split not in hidden}
    if not checked:
        raise DataError(f"all labels of {plan.name} are -1, the mark of hidden labels", "Give rows with labels.")
    keys = {split: rows.label_keys for split, rows in checked.items()}
    targets, found = find_targets(plan.columns, plan.label_names, keys, plan.name)
    notes += found
    data = {split: rows.to_dataset(targets) for split, rows in checked.items()}
    origins = {split: rows.table.name for split, rows in checked.items()}
    check_targets(plan.columns.kind, targets, data, plan.name)
    has_validation = plan.has_validation and "validation" not in hidden
    if "train" in data and not has_validation and spec.validation_fraction:
        data["train"], data["validation"] = carve_validation(
            data["train"], spec.validation_fraction, spec.seed, origins["train"], checked["train"].groups
        )
        origins["validation"] = origins["train"]
        notes.append(
            f"validation: {len(data['validation'])} rows ({spec.validation_fraction:.0%}, seed {spec.seed}) "
            f"set aside from {origins['train']}"
        )
    leaks = _leaks(data)
    for split, count in (("train", spec.train_rows), ("validation", spec.validation_rows)):
        if split in data:
            data[split] = subset(data[split], count, spec.seed)
    if "train" in data and spec.train_fraction is not None:
        whole = len(data["train"])
        data["train"] = subset(data["train"], max(round(spec.train_fraction * whole), 1), spec.seed)
        notes.append(f"train: {len(data['train'])} of {whole} rows are used (seed {spec.seed})")
    if "train" in data and spec.label_noise:
        classes = len(targets.names) if isinstance(targets, LabelSet) else None
        data["train"], changed = with_label_noise(data["train"], spec.label_noise, spec.seed, classes)
        notes.append(f"train: {changed} of {len(data['train'])} rows have a wrong label (seed {spec.seed})")
    ordered = {split: data[split] for split in SPLITS if split in data and _wanted(split, splits)}
    notes += describe_targets(plan.columns.kind, targets, ordered)
    scored = plan.columns.kind == "regression" and "train" in ordered
    return TaskData(
        name=plan.name,
        kind=plan.columns.kind,
        label_names=targets.names if targets else None,
        splits=ordered,
        sources={s: SplitSource(origins[s], len(rows), rows) for s, rows in ordered.items()},
        description=plan.description,
        notes=(*notes, *leaks),
        columns=_as_read(plan, targets) if plan.own else None,
        leaks=leaks,
        scale=ScoreScale.of(ordered["train"]["label"][:], plan.name) if scored else None,
        file_notes=file_notes,
    )


def _as_read(plan: _Plan, targets: Targets | None) -> Columns:
    """The columns in use with how labels were read in them."""
    separator = targets.separator if isinstance(targets, MultiLabelSet) else None
    return replace(plan.columns, separator=separator, ids_count=bool(plan.label_names))


def load_inputs(
    path: str | Path, spec: DataSpec, kind: Kind, trained: Columns | None = None
) -> tuple[Dataset, tuple[str, ...]]:
    """The rows of a file to be predicted: ``text`` and ``text_pair``, ``prompt`` or ``messages``, no labels.

    Also what was found about the file, in words.

    Args:
        path: of the file.
        spec: of the training data.
        kind: of the task.
        trained: the columns of the training data, where they are known; the file must have the same ones.

    Raises:
        DataError: as :func:`load`.
    """
    table = open_files(path)
    if trained is not None:
        columns = columns_as_trained(table, trained)
    else:
        text, prompt = spec.text_columns, spec.prompt_column
        columns = find_columns(table, text, prompt_column=prompt, kind=kind, with_target=False)
        check_pair(table.name, columns, spec)
    rows = read_rows(table, columns, Reading(roles=spec.roles, with_answer=False, by_recipe=False))
    unread = []
    if trained is not None and kind == "causal_lm":  # a prompt may have parts that training did not have
        learned = {column.lower() for column in (trained.target, trained.group, *trained.flags) if column}
        unread = _unused([table], columns, {column for column in table.columns if column.lower() in learned})
    return rows.to_dataset(None), (*table.notes, *rows.notes, *unread)


def check_pair(name: str, columns: Columns, spec: DataSpec) -> None:
    """Raises DataError where a file has other numbers of texts than the task with a name that a run was trained on."""
    if spec.task is None or looks_like_file(spec.task) or is_hub_name(spec.task) or columns.kind not in TEXT_KINDS:
        return
    expected = get_task(spec.task).text_columns
    if len(columns.text) != len(expected):
        raise DataError(
            f"{name} has the texts {', '.join(columns.text)}, and {spec.task} reads {', '.join(expected)}",
            "Name the columns so.",
        )


def _unused(tables: Iterable[Table], columns: Columns, known: Set[str] = frozenset()) -> list[str]:
    """Columns of own data that are not read, beside those that are known; those of options belong to a completion."""
    used = columns.used | known | ({"options", "answer", "label"} if columns.kind == "causal_lm" else set())
    names = dict.fromkeys(name for table in tables for name in table.columns if name not in used)
    shown = named(list(names)[:20]) + (", ..." if len(names) > 20 else "")
    return [f"columns that are not used: {shown}"] if names else []


def _leaks(data: Mapping[str, Dataset]) -> tuple[str, ...]:
    """What of the other splits stands in the training rows too."""
    found = []
    for split in SPLITS[1:]:
        if "train" in data and split in data and (count := shared_inputs(data["train"], data[split])):
            found.append(
                f"{split}: {count:,} of {len(data[split]):,} rows have the texts or prompt of a training row "
                "(data.group_column keeps such rows together)"
            )
    return tuple(found)


def _wanted(split: str, splits: Sequence[str] | None) -> bool:
    return splits is None or split in splits


def _plan(spec: DataSpec, splits: Sequence[str] | None, trained: Columns | None) -> _Plan:
    if spec.task is not None and not looks_like_file(spec.task) and not is_hub_name(spec.task):
        return _task_plan(get_task(spec.task), spec, splits)
    if spec.task is None or looks_like_file(spec.task):
        train = spec.task or spec.train_file
        given = train or spec.validation_file or spec.test_file or ""
        name = Path(given if isinstance(given, str) else given[0]).name
        tables = file_tables(train, spec.validation_file, spec.test_file)
        description = "own files"
    else:
        name, tables, description = spec.task, hub_tables(spec.task), "a data set on the hub"
    has_validation = "validation" in tables
    if not tables:
        raise ConfigError("no data is given", "Set data.task or data.train_file.")
    first = next(iter(tables.values()))
    columns = columns_as_trained(first, trained, with_target=True) if trained else _own_columns(first, spec)
    names = tuple(spec.label_names) or first.class_names.get(columns.target or "", ())
    if splits is not None:
        # Without names, and for a validation split that is not there, the training rows are needed as well.
        known = names and (columns.kind == "classification" or spec.label_separator)
        helpers = () if known and "validation" in tables else ("train",)
        tables = {split: table for split, table in tables.items() if split in (*splits, *helpers)}
    return _Plan(name, tables, columns, names, description, has_validation, own=True)


def _own_columns(table: Table, spec: DataSpec) -> Columns:
    """Those of own data, named by the recipe or recognised."""
    columns = find_columns(
        table,
        spec.text_columns,
        spec.label_column,
        spec.prompt_column,
        spec.completion_column,
        spec.kind,
        messages_column=spec.messages_column,
        label_columns=spec.label_columns,
    )
    if spec.group_column is not None and spec.group_column not in table.columns:
        raise DataError(
            f"{table.name} has no column {spec.group_column!r}; it has {listed(table)}",
            "Set data.group_column to one of them.",
        )
    return replace(columns, group=spec.group_column, separator=spec.label_separator)


def _task_plan(task: Task, spec: DataSpec, splits: Sequence[str] | None) -> _Plan:
    folder = spec.local_folder
    available = local_splits(task.name, folder) or task.splits
    wanted = list(available if splits is None else splits)
    if "validation" in wanted and "validation" not in available:
        wanted = [split for split in wanted if split != "validation"]
        wanted += [] if "train" in wanted else ["train"]
    if task.kind == "multi_label" and not spec.label_separator and "train" in available and "train" not in wanted:
        wanted.append("train")  # which says how labels are parted in a text
    for split in wanted:
        if split not in {*task.splits, *available}:
            raise DataError(f"{task.name} has no {split} split; it has {', '.join(available)}", task.remedy)
    if spec.subset is not None and spec.subset not in task.subsets:
        known = f"it has {', '.join(task.subsets)}" if task.subsets else "it has none"
        raise ConfigError(f"data.subset is {spec.subset}, and {task.name} has no such subset: {known}", "Leave it out.")
    if spec.kind not in (None, task.kind):
        raise ConfigError(f"data.kind is {spec.kind}, and {task.name} is a task of {task.kind}", "Leave it out.")
    subset = {"train": f"train_{spec.subset}"} if spec.subset is not None else {}
    tables = {split: task.loader(subset.get(split, split), folder) for split in wanted}
    if task.kind == "causal_lm":
        columns = Columns("causal_lm", ("prompt",), "completion")
    else:
        texts = ("text", "text_pair")[: len(task.text_columns)]
        columns = Columns(task.kind, texts, "label", separator=spec.label_separator)
    return _Plan(task.name, tables, columns, task.label_names or (), task.description, "validation" in available)


def _hidden(checked: Mapping[str, CheckedRows]) -> set[str]:
    """Splits whose labels are all -1, the hub's mark for labels that are not public."""
    return {
        split for split, rows in checked.items() if split != "train" and distinct(rows.label_keys) in ({"-1"}, {-1.0})
    }
