"""Which columns of a table the model reads: named by the recipe, else recognised by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from monteclora.config import brief, nearest
from monteclora.data.files import Table
from monteclora.data.kinds import TEXT_KINDS, Kind
from monteclora.errors import DataError

__all__ = ["Columns", "columns_as_trained", "find_columns", "listed", "named"]

_TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "passage"),
    ("text", "text_pair"),
)
_TEXTS = ("text", "sentence", "message")
_LABELS: Mapping[Kind, tuple[str, ...]] = {
    "classification": ("label", "intent", "class", "category", "target"),
    "regression": ("score", "label", "rating", "target", "value", "similarity"),
    "multi_label": ("labels", "label", "tags", "categories", "intents"),
}
_MESSAGES = ("messages", "conversations", "conversation")
_COMPLETIONS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
)
_INPUTS = ("input", "context")


@dataclass(frozen=True)
class Columns:
    """The columns in use, in the order the model reads them.

    ``text`` holds one or two names for texts; for ``causal_lm`` those of the prompt (``instruction``
    and perhaps ``input``, none for a corpus), or of messages alone where it is a ``conversation``. ``target`` is the
    label, score or completion column; None where the messages hold the completion, where labels have a column of 0 and
    1 each (``flags``), or where rows to be predicted have none.
    ``system``, ``history`` and ``tools`` go with a prompt or a conversation, where there are such columns; rows of one
    ``group`` are never parted.

    How labels were read goes with them, for other files of the same task: ``separator`` parts several labels in one
    text ("" where each text is one label, None where that is not known), and ``ids_count`` says whether a label may be
    an id in place of a name.
    """

    kind: Kind
    text: tuple[str, ...]
    target: str | None
    conversation: bool = False
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    group: str | None = None
    flags: tuple[str, ...] = ()
    separator: str | None = None
    ids_count: bool = True

    @property
    def required(self) -> tuple[str, ...]:
        """Those that every file must have; a prompt's second column may be missing."""
        text = self.text if self.kind in TEXT_KINDS else self.text[:1]
        return tuple(name for name in (*text, self.target, *self.flags) if name is not None)

    @property
    def used(self) -> frozenset[str]:
        """Those that are read."""
        names = (*self.text, self.target, self.system, self.history, self.tools, self.group, *self.flags)
        return frozenset(name for name in names if name is not None)


def find_columns(
    table: Table,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    kind: Kind | None = None,
    with_target: bool = True,
    messages_column: str | None = None,
    label_columns: Sequence[str] = (),
) -> Columns:
    """The columns that a task uses.

    Args:
        table: the data.
        text_columns, label_column, prompt_column, completion_column, messages_column: names from the recipe; what is
            left out is recognised, whatever its capitals. A completion column without a prompt column is a corpus, and
            so is a column of texts alone.
        kind: the kind of task, where it is known already.
        with_target: False for rows to be predicted, which need no label or completion.
        label_columns: of 0 and 1, one for each label, in place of a label column.

    Raises:
        DataError: a named column is missing, or none is recognised; the message lists the columns.
    """
    for option, name in (
        *(("text_columns", column) for column in text_columns),
        *(("label_columns", column) for column in label_columns),
        ("label_column", label_column),
        ("prompt_column", prompt_column),
        ("completion_column", completion_column),
        ("messages_column", messages_column),
    ):
        if name is not None and name not in table.columns:
            raise _missing(table, option, name)
    if messages_column:
        return _conversation(table, messages_column)
    if kind != "causal_lm" and not prompt_column and not completion_column:
        text = tuple(text_columns) or _first_group(table, (*_TEXT_PAIRS, *((name,) for name in _TEXTS)))
        wanted: Kind = kind or ("multi_label" if label_columns else "classification")
        label = label_column or (None if label_columns else _first(table, _LABELS[wanted]))
        if text and (label or label_columns or not with_target):
            flags = tuple(label_columns) if with_target else ()
            return Columns(wanted, text, label if with_target else None, flags=flags)
        if kind or text_columns or label_column or label_columns:
            raise _unrecognised(table, "label_column" if text else "text_columns")
    return _completion_columns(table, prompt_column, completion_column, with_target, kind)


def columns_as_trained(table: Table, trained: Columns, with_target: bool = False) -> Columns:
    """The columns of other rows for what was trained on ``trained``: the same ones, whatever their capitals.

    Args:
        table: the rows.
        trained: the columns of the training data.
        with_target: False for rows to be predicted, which need no label or completion.

    Raises:
        DataError: one is missing, or the training data have no prompts, after which alone rows can be predicted.
    """
    if not (trained.text or with_target):
        raise DataError("the run was trained on texts without prompts", "Rows can be predicted after prompts only.")
    wanted = trained if with_target else replace(trained, target=None, flags=())
    # columns of flags are the names of the labels, and keep their capitals
    found = {
        name: name if name in table.columns or name in trained.flags else _first(table, (name.lower(),))
        for name in wanted.used
    }
    for name in wanted.required:
        if found[name] not in table.columns:
            raise DataError(
                f"{table.name} has no column {name!r}, which the run was trained on; it has {listed(table)}",
                "Name the columns as in the training data.",
            )
    text = tuple(found[name] or name for name in trained.text)
    return replace(
        wanted,
        text=tuple(name for name in text if name in table.columns),
        target=found.get(wanted.target or ""),
        group=None,
        system=found.get(trained.system or ""),
        history=found.get(trained.history or ""),
        tools=found.get(trained.tools or ""),
    )


def _conversation(table: Table, column: str) -> Columns:
    return Columns("causal_lm", (column,), None, conversation=True, tools=_first(table, ("tools",)))


def _completion_columns(
    table: Table, prompt: str | None, completion: str | None, with_target: bool, kind: Kind | None
) -> Columns:
    messages = _first(table, _MESSAGES)
    if messages and not prompt and not completion:
        return _conversation(table, messages)
    for prompt_name, completion_name in _COMPLETIONS:
        found_prompt = prompt or _first(table, (prompt_name,))
        found_completion = completion or _first(table, (completion_name,))
        if found_prompt and (found_completion or not with_target):
            extra = _first(table, _INPUTS) if found_prompt.lower() == "instruction" else None
            return Columns(
                "causal_lm",
                (found_prompt, extra) if extra else (found_prompt,),
                found_completion if with_target else None,
                system=_first(table, ("system",)),
                history=_first(table, ("history",)),
                tools=_first(table, ("tools",)),
            )
    if completion and not prompt:
        return Columns("causal_lm", (), completion)
    corpus = None if prompt or _first(table, _LABELS["classification"]) else _first(table, ("text",))
    if corpus and with_target and (kind == "causal_lm" or len(table.columns) == 1):
        return Columns("causal_lm", (), corpus)  # texts and nothing else
    if _first(table, ("chosen",)) and _first(table, ("rejected",)):
        raise DataError(
            f"{table.name} holds preferences (chosen and rejected), which are not supported",
            "Set data.prompt_column, and data.completion_column to the chosen answers.",
        )
    if prompt:
        raise _unrecognised(table, "completion_column")
    pairs = "text_columns and data.label_column, or data.prompt_column and data.completion_column"
    raise _unrecognised(table, pairs)


def _first(table: Table, names: Sequence[str]) -> str | None:
    by_lower = {column.lower(): column for column in reversed(table.columns)}
    return next((by_lower[name] for name in names if name in by_lower), None)


def _first_group(table: Table, groups: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    for group in groups:
        found = tuple(filter(None, (_first(table, (name,)) for name in group)))
        if len(found) == len(group):
            return found
    return ()


def _missing(table: Table, option: str, name: str) -> DataError:
    near = nearest(name, table.columns)
    hint = f"Set data.{option} to {near}?" if near else f"Set data.{option} to one of them."
    return DataError(f"{table.name} has no column {name!r}; it has {listed(table)}", hint)


def _unrecognised(table: Table, options: str) -> DataError:
    return DataError(
        f"cannot tell which columns of {table.name} to use; it has {listed(table)}", f"Set data.{options}."
    )


def listed(table: Table, most: int = 50) -> str:
    """The names of a table's columns for a message, the first ``most`` of them."""
    shown = named(table.columns[:most])
    more = len(table.columns) - most
    return f"{shown} and {more:,} more" if more > 0 else shown


def named(columns: Sequence[str]) -> str:
    """Names of columns for a message."""
    return ", ".join(brief(column, quotes=False) or "a column without a name" for column in columns)
