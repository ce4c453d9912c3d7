"""The ``data`` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Literal

from monteclora.data.conversations import ROLES
from monteclora.data.kinds import TEXT_KINDS, Kind
from monteclora.data.truncation import Truncation
from monteclora.tasks.local import is_hub_name, looks_like_file

__all__ = ["DataSpec"]


@dataclass(frozen=True)
class DataSpec:
    """The ``data`` section of a recipe.

    Args:
        task: the name of a task (``monteclora list tasks``), the path of a data file, or a data set on the
            hub as ``owner/name`` or ``owner/name:config``.
        subset: a smaller training split of a task that has them, such as ``xs`` of winogrande.
        kind: of own data: ``classification``, ``causal_lm``, ``regression`` or ``multi_label``; by default the first or
            the second, as the columns are.
        folder: where task files are, ``<folder>/<task>/<split>.jsonl.gz``; by default ``MONTECLORA_DATA``.
        train_file, validation_file, test_file: own files in place of a task: one, several, a pattern such as
            ``data/part-*.csv``, or a folder of parts.
        text_columns, label_column: of texts with a label, a score or several labels; recognised by their names when
            left out.
        label_columns: of 0 and 1, one for each of several labels, in place of a label column.
        label_separator: between several labels in one text; by default ``|``, ``;`` or ``,``, whichever occurs.
        prompt_column, completion_column: for causal language modelling; likewise. A completion column without a
            prompt column is a corpus, of which every token is learned.
        messages_column: of conversations; likewise.
        roles: names of roles in conversations, by which of ``system``, ``user``, ``assistant``, ``tool`` they are.
        learned_turns: of a conversation: ``all`` turns of the assistant, or the ``last``.
        group_column: rows with the same value in it are never parted by the validation split.
        on_bad_row: what a row that cannot be read does: ``stop``, or be left out and counted (``skip``).
        label_names: the labels in the order of their ids; by default those that occur in the training data.
        class_weights: how much the rows of a label count in training: a number for each label, 1 for those left out, or
            ``balanced`` for the inverse of its frequency. They are relative: the mean weight of the rows is 1.
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
    kind: Kind | None = None
    folder: str | None = None
    train_file: str | list[str] | None = None
    validation_file: str | list[str] | None = None
    test_file: str | list[str] | None = None
    text_columns: list[str] = field(default_factory=list)
    label_column: str | None = None
    label_columns: list[str] = field(default_factory=list)
    label_separator: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    roles: dict[str, str] = field(default_factory=dict)
    learned_turns: Literal["all", "last"] = "all"
    group_column: str | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"
    label_names: list[str] = field(default_factory=list)
    class_weights: Literal["balanced"] | dict[str, float] | None = None
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
        found += self._kind_problems()
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
        for name in ("train_file", "validation_file", "test_file"):
            if getattr(self, name) == []:
                found.append((name, "is an empty list: name a file, or leave it out"))
        return found

    def _kind_problems(self) -> list[tuple[str, str]]:
        """Fields of one kind of task with those of another."""
        found = []
        written = [name for name in ("prompt_column", "completion_column", "messages_column") if getattr(self, name)]
        labelled = [
            name for name in ("label_column", "label_columns", "label_names", "class_weights") if getattr(self, name)
        ]
        if written and self.label_column:
            found.append(("label_column", "is for texts with labels, prompt, completion and messages columns are not"))
        if self.kind in TEXT_KINDS and written:
            found.append((written[0], f"is for prompts with completions, and kind is {self.kind}"))
        if self.kind == "causal_lm" and labelled:
            found.append((labelled[0], "is for texts with labels, and kind is causal_lm"))
        if self.kind == "regression":
            names = ("label_columns", "label_names", "class_weights", "label_noise")
            found += [(name, "is for labels, and kind is regression") for name in names if getattr(self, name)]
        if self.label_columns and self.label_column:
            found.append(("label_columns", "and label_column are both given: keep one"))
        if self.label_columns and self.label_names and self.label_names != self.label_columns:
            found.append(("label_names", "differ from label_columns, which are the names of the labels"))
        if self.label_columns and self.label_separator:
            found.append(("label_separator", "and label_columns are both given: keep one"))
        for name in ("label_columns", "label_separator"):
            if getattr(self, name) and (self.kind or "multi_label") != "multi_label":
                found.append((name, f"is for several labels of a row, and kind is {self.kind}"))
        if self.label_separator is not None and (not self.label_separator or self.kind is None):
            found.append(("label_separator", "must be some text, with kind multi_label"))
        if len(self.label_columns) == 1 or len(set(self.label_columns)) < len(self.label_columns):
            found.append(("label_columns", "must name two or more different columns"))
        if isinstance(self.class_weights, dict) and not all(0 < weight < inf for weight in self.class_weights.values()):
            found.append(("class_weights", "must be finite numbers above 0"))
        return found

    @property
    def local_folder(self) -> Path | None:
        """``folder`` as a path."""
        return Path(self.folder) if self.folder else None
