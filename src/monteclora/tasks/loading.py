"""The one way to data: a :class:`DataSpec` from the recipe in, a :class:`TaskData` out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from monteclora.config import brief
from monteclora.data.columns import Columns, find_columns, input_columns, listed
from monteclora.data.conversations import ROLES
from monteclora.data.files import Table, open_table
from monteclora.data.kinds import Kind
from monteclora.data.label_noise import with_label_noise
from monteclora.data.labels import LabelSet, describe_labels, refuse_scores
from monteclora.data.rows import CheckedRows, Reading, read_rows
from monteclora.data.sources import SPLITS, local_splits
from monteclora.data.splitting import carve_validation, content_sha256, shared_inputs, subset
from monteclora.data.truncation import Truncation
from monteclora.errors import ConfigError, DataError
from monteclora.tasks.local import file_tables, hub_tables, is_hub_name, looks_like_file
from monteclora.tasks.registry import Task, get_task

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["DataSpec", "SplitSource", "TaskData", "load", "load_inputs"]


@dataclass(frozen=True)
class DataSpec:
    """The ``data`` section of a recipe.

    Args:
        task: the name of a task (``monteclora list tasks``), the path of a data file, or a data set on the
            hub as ``owner/name`` or ``owner/name:config``.
        subset: a smaller training split of a task that has them, such as ``xs`` of winogrande.
        folder: where task files are, ``<folder>/<task>/<split>.jsonl.gz``; by default ``MONTECLORA_DATA``.
        train_file, validation_file, test_file: own files in place of a task.
        text_columns, label_column: for classification; recognised by their names when left out.
        prompt_column, completion_column: for causal language modelling; likewise. A completion column without a
            prompt column is a corpus, of which every token is learned.
        messages_column: of conversations; likewise.
        roles: names of roles in conversations, by which of ``system``, ``user``, ``assistant``, ``tool`` they are.
        learned_turns: of a conversation: ``all`` turns of the assistant, or the ``last``.
        group_column: rows with the same value in it are never parted by the validation split.
        on_bad_row: what a row that cannot be read does: ``stop``, or be left out and counted (``skip``).
        label_names: the labels in the order of their ids; by default those that occur in the training data.
        max_length: most tokens of a row.
        truncation: what a prompt with its completion loses where it is longer: the prompt's text its start
            (``prompt_start``) or its end (``prompt_end``), and the completion its end where it alone takes more than
            half; only the completion's end (``completion``); or the row is left out (``drop``).
        chat_template: in place of the model's: the path of a Jinja file, or ``chatml``.
        train_rows, validation_rows: use only that many rows.
        train_fraction: use only this share of the training rows that remain after validation rows are set aside.
        label_noise: give this share of the training rows a wrong label or answer, drawn uniformly from the others.
        validation_fraction: the share of the training rows of each label set aside where there is no
            validation split; 0 for none.
        seed: chooses all these rows, and the wrong labels.
    """

    task: str | None = None
    subset: str | None = None
    folder: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    text_columns: list[str] = field(default_factory=list)
    label_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    roles: dict[str, str] = field(default_factory=dict)
    learned_turns: Literal["all", "last"] = "all"
    group_column: str | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"
    label_names: list[str] = field(default_factory=list)
    max_length: int = 128
    truncation: Truncation = "prompt_start"
    chat_template: str | None = None
    train_rows: int | None = None
    validation_rows: int | None = None
    train_fraction: float | None = None
    label_noise: float = 0.0
    validation_fraction: float = 0.1
    seed: int = 0

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values: pairs of field and message, see :mod:`monteclora.config`."""
        found = []
        files = (self.train_file, self.validation_file, self.test_file)
        if self.task is None and not any(files):
            found.append(("task", "is missing: name a task, a file or a data set on the hub"))
        if self.subset is not None and (self.task is None or looks_like_file(self.task) or is_hub_name(self.task)):
            found.append(("subset", "is for tasks with a name (monteclora list tasks)"))
        if self.task is not None and self.train_file is not None:
            found.append(("train_file", "and task are both given: keep one"))
        if len(self.text_columns) > 2:
            found.append(("text_columns", "must name one or two columns"))
        if self.label_column and (self.prompt_column or self.completion_column or self.messages_column):
            found.append(("label_column", "is for classification, prompt, completion and messages columns are not"))
        if self.messages_column and (self.prompt_column or self.completion_column):
            found.append(("messages_column", "and prompt_column or completion_column are given: keep one"))
        if wrong := sorted(set(self.roles.values()) - set(ROLES)):
            found.append(("roles", f"maps to {', '.join(wrong)}, expected one of {', '.join(ROLES)}"))
        if len(self.label_names) == 1 or len(set(self.label_names)) < len(self.label_names):
            found.append(("label_names", "must be two or more different names"))
        if self.max_length < 2:
            found.append(("max_length", "must be at least 2"))
        for name in ("train_rows", "validation_rows"):
            if (rows := getattr(self, name)) is not None and rows < 1:
                found.append((name, "must be at least 1"))
        if self.train_fraction is not None and not 0 < self.train_fraction <= 1:
            found.append(("train_fraction", "must be above 0 and at most 1"))
        if self.train_fraction is not None and self.train_rows is not None:
            found.append(("train_fraction", "and train_rows are both given: keep one"))
        if not 0 <= self.label_noise <= 1:
            found.append(("label_noise", "must be between 0 and 1"))
        if not 0 <= self.validation_fraction < 1:
            found.append(("validation_fraction", "must be at least 0 and below 1"))
        return found


@dataclass(frozen=True)
class SplitSource:
    """Where the rows of a split came from (path or hub name), their number, the sha256 of their content."""

    origin: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class TaskData:
    """Loaded data.

    ``splits`` holds datasets with the columns that :mod:`monteclora.data.rows` describes; ``notes`` says in
    words what was set aside or left out, ``leaks`` what of other splits stands in the training rows. ``columns`` are
    those of own data, which rows to be predicted must have too; None for a task with a name.
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


def load(spec: DataSpec, splits: Sequence[str] | None = None) -> TaskData:
    """Load the data of a recipe.

    Args:
        spec: what to load.
        splits: the splits that are needed; by default all there are.

    Raises:
        ConfigError: there is no such task.
        DataError: files, columns, rows or labels are wrong or missing.
        UnsafeCodeError: the data set is a program.
    """
    plan = _plan(spec, splits)
    reading = Reading(spec.on_bad_row, spec.roles, spec.learned_turns)
    checked = {split: read_rows(table, plan.columns, reading) for split, table in plan.tables.items()}
    notes = [note for table in plan.tables.values() for note in table.notes]
    notes += [note for rows in checked.values() for note in rows.notes]
    notes += _unused(plan)
    hidden = _hidden(checked)
    notes += [f"{split}: left out, its labels are hidden" for split in hidden]
    checked = {split: rows for split, rows in checked.items() if split not in hidden}
    labels = _label_set(plan, checked)
    data = {split: rows.to_dataset(labels) for split, rows in checked.items()}
    origins = {split: rows.table.name for split, rows in checked.items()}
    _check_classes(data, labels, plan.name)
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
        data["train"], changed = with_label_noise(
            data["train"], spec.label_noise, spec.seed, len(labels.names) if labels else None
        )
        notes.append(f"train: {changed} of {len(data['train'])} rows have a wrong label (seed {spec.seed})")
    ordered = {split: data[split] for split in SPLITS if split in data and _wanted(split, splits)}
    if labels is not None:
        notes += describe_labels(labels.names, {split: rows["label"][:] for split, rows in ordered.items()})
    return TaskData(
        name=plan.name,
        kind=plan.columns.kind,
        label_names=labels.names if labels else None,
        splits=ordered,
        sources={s: SplitSource(origins[s], len(rows), content_sha256(rows)) for s, rows in ordered.items()},
        description=plan.description,
        notes=(*notes, *leaks),
        columns=plan.columns if plan.own else None,
        leaks=leaks,
    )


def load_inputs(path: str | Path, spec: DataSpec, kind: Kind, trained: Columns | None = None) -> Dataset:
    """The rows of a file to be predicted: ``text`` and ``text_pair``, ``prompt`` or ``messages``, no labels.

    Args:
        path: of the file.
        spec: of the training data.
        kind: of the task.
        trained: the columns of the training data, where they are known; the file must have the same ones.

    Raises:
        DataError: as :func:`load`.
    """
    table = open_table(path)
    if trained is not None:
        columns = input_columns(table, trained)
    else:
        text, prompt = spec.text_columns, spec.prompt_column
        columns = find_columns(table, text, prompt_column=prompt, kind=kind, with_target=False)
        _check_pair(table, columns, spec)
    return read_rows(table, columns, Reading(roles=spec.roles, with_answer=False)).to_dataset(None)


def _check_pair(table: Table, columns: Columns, spec: DataSpec) -> None:
    """A task with a name reads one text or two."""
    if spec.task is None or looks_like_file(spec.task) or is_hub_name(spec.task) or columns.kind != "classification":
        return
    expected = get_task(spec.task).text_columns
    if len(columns.text) != len(expected):
        raise DataError(
            f"{table.name} has the texts {', '.join(columns.text)}, and {spec.task} reads {', '.join(expected)}",
            "Name the columns so.",
        )


def _unused(plan: _Plan) -> list[str]:
    """Columns of own data that are not read; those of options belong to a completion."""
    if not plan.own:
        return []
    used = plan.columns.used | ({"options", "answer", "label"} if plan.columns.kind == "causal_lm" else set())
    names = dict.fromkeys(name for table in plan.tables.values() for name in table.columns if name not in used)
    shown = ", ".join(brief(name, quotes=False) for name in list(names)[:20]) + (", ..." if len(names) > 20 else "")
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


def _plan(spec: DataSpec, splits: Sequence[str] | None) -> _Plan:
    if spec.task is not None and not looks_like_file(spec.task) and not is_hub_name(spec.task):
        return _task_plan(get_task(spec.task), spec, splits)
    if spec.task is None or looks_like_file(spec.task):
        train = spec.task or spec.train_file
        name = Path(train or spec.validation_file or spec.test_file or "").name
        tables = file_tables(train, spec.validation_file, spec.test_file)
        description = "own files"
    else:
        name, tables, description = spec.task, hub_tables(spec.task), "a data set on the hub"
    has_validation = "validation" in tables
    if not tables:
        raise ConfigError("no data is given", "Set data.task or data.train_file.")
    first = next(iter(tables.values()))
    columns = find_columns(
        first,
        spec.text_columns,
        spec.label_column,
        spec.prompt_column,
        spec.completion_column,
        messages_column=spec.messages_column,
    )
    if spec.group_column is not None and spec.group_column not in first.columns:
        raise DataError(
            f"{first.name} has no column {spec.group_column!r}; it has {listed(first)}",
            "Set data.group_column to one of them.",
        )
    columns = replace(columns, group=spec.group_column)
    names = tuple(spec.label_names) or first.class_names.get(columns.target or "", ())
    if splits is not None:
        # Without names, and for a validation split that is not there, the training rows are needed as well.
        helpers = () if names and "validation" in tables else ("train",)
        tables = {split: table for split, table in tables.items() if split in (*splits, *helpers)}
    return _Plan(name, tables, columns, names, description, has_validation, own=True)


def _task_plan(task: Task, spec: DataSpec, splits: Sequence[str] | None) -> _Plan:
    folder = Path(spec.folder) if spec.folder else None
    available = local_splits(task.name, folder) or task.splits
    wanted = list(available if splits is None else splits)
    if "validation" in wanted and "validation" not in available:
        wanted = [split for split in wanted if split != "validation"]
        wanted += [] if "train" in wanted else ["train"]
    for split in wanted:
        if split not in {*task.splits, *available}:
            raise DataError(f"{task.name} has no {split} split; it has {', '.join(available)}", task.remedy)
    if spec.subset is not None and spec.subset not in task.subsets:
        known = f"it has {', '.join(task.subsets)}" if task.subsets else "it has none"
        raise ConfigError(f"data.subset is {spec.subset}, and {task.name} has no such subset: {known}", "Leave it out.")
    subset = {"train": f"train_{spec.subset}"} if spec.subset is not None else {}
    tables = {split: task.loader(subset.get(split, split), folder) for split in wanted}
    if task.kind == "causal_lm":
        columns = Columns("causal_lm", ("prompt",), "completion")
    else:
        texts = ("text", "text_pair")[: len(task.text_columns)]
        columns = Columns("classification", texts, "label")
    return _Plan(task.name, tables, columns, task.label_names or (), task.description, "validation" in available)


def _hidden(checked: Mapping[str, CheckedRows]) -> set[str]:
    """Splits whose labels are all -1, the hub's mark for labels that are not public."""
    return {split for split, rows in checked.items() if split != "train" and set(rows.label_keys) == {"-1"}}


def _label_set(plan: _Plan, checked: Mapping[str, CheckedRows]) -> LabelSet | None:
    if plan.columns.kind != "classification":
        return None
    if plan.label_names:
        return LabelSet(plan.label_names)
    if "train" not in checked:
        raise DataError(f"{plan.name} has no training rows to take the label names from", "Set data.label_names.")
    refuse_scores(checked["train"].label_keys, plan.name)
    return LabelSet.from_labels(checked["train"].label_keys)


def _check_classes(data: Mapping[str, Dataset], labels: LabelSet | None, name: str) -> None:
    if labels is not None and "train" in data:
        present = set(data["train"].unique("label"))
        if len(present) < 2:
            only = ", ".join(labels.names[i] for i in present)
            raise DataError(f"all training rows of {name} have the label {only}", "Give rows of two labels or more.")
