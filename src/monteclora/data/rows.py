"""The rows of a table, checked one by one, as columns of a ``datasets.Dataset``.

Texts: ``text``, perhaps ``text_pair``, ``label`` (an id, a score, or 0 or 1 for each label). Causal LM: ``prompt`` and
``completion``, with ``options`` and ``answer`` where the task has them; ``completion`` alone of a corpus; or
``messages``, with ``extra`` where conversations have more than text (see :mod:`monteclora.data.conversations`).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from monteclora.config import brief
from monteclora.data.coded import Coded
from monteclora.data.columnar import checked_columns
from monteclora.data.columns import Columns, listed
from monteclora.data.conversations import Conversation, read_conversation, with_prompt
from monteclora.data.files import Table
from monteclora.data.kinds import TEXT_KINDS
from monteclora.data.labels import Targets, label_key
from monteclora.data.multi_labels import read_flags, read_labels
from monteclora.data.scores import read_score
from monteclora.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

__all__ = ["CheckedRows", "Reading", "read_rows"]

_OPTIONAL = frozenset(("extra",))  # columns of some rows only
_PREFERENCE = (False, "false", "False", "FALSE")
_MOST_ROWS, _MOST_CHARACTERS = 10_000, 2**24  # held as Python objects before they become an Arrow table


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
        on_bad_row: what a row that cannot be read does: ``stop`` everything, or be ``skip``ped.
        roles: names of roles in conversations, by which of ours they are.
        learned_turns: of conversations: ``all`` turns of the assistant, or the ``last``.
        with_answer: whether conversations must end with an answer; those that do not are left out.
        by_recipe: whether a recipe says so, in which another ``on_bad_row`` could be written.
    """

    on_bad_row: Literal["stop", "skip"] = "stop"
    roles: Mapping[str, str] = field(default_factory=dict)
    learned_turns: Literal["all", "last"] = "all"
    with_answer: bool = True
    by_recipe: bool = True


@dataclass(frozen=True)
class CheckedRows:
    """Checked columns of a table, their row numbers, and what is to be learned of texts as it is in the file.

    Where all rows of the table are there, their numbers are looked up when they are needed (None).
    ``label_keys`` has of each row what :func:`label_key`, :func:`read_score` or :func:`read_labels` made of it.
    ``groups`` has what is in the group column of each row, where there is one; ``notes`` says what was left out.
    """

    table: Table
    chunks: list[pa.Table]
    numbers: array[int] | None
    label_keys: Sequence[Any]
    groups: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def to_dataset(self, targets: Targets | None) -> Dataset:
        """The rows as a dataset; with ``targets``, a column ``label``. DataError for a label outside the set."""
        import datasets
        import pyarrow as pa
        from datasets.table import InMemoryTable

        data = pa.concat_tables(self.chunks, promote_options="default")
        if targets is not None and self.label_keys:
            data = data.append_column("label", self._values(targets))
        # a fingerprint that is given is not computed, from a pickled copy of all rows
        return datasets.Dataset(InMemoryTable(data), fingerprint=uuid4().hex)

    def _values(self, targets: Targets) -> Any:
        """What is learned of each row. Raises DataError for a label outside the set."""
        import pyarrow as pa

        keys = self.label_keys
        if isinstance(keys, Coded):
            try:
                once = [targets.value_of(key, "") for key in keys.values]
                return pa.array(once, targets.type).take(pa.array(keys.codes))
            except DataError:
                pass  # with its place, below
        numbers = (number for number, _ in self.table.each()) if self.numbers is None else iter(self.numbers)
        values = [targets.value_of(key, self.table.place(n)) for key, n in zip(keys, numbers, strict=True)]
        return pa.array(values, targets.type)


def read_rows(table: Table, columns: Columns, reading: Reading | None = None) -> CheckedRows:
    """Read the columns in use.

    Args:
        table: the data.
        columns: those in use.
        reading: how.

    Raises:
        DataError: a column is missing, no row is left, or rows are to be read that have an empty text or label, one of
            the wrong type, or a malformed conversation; the message names the file and the line of the first, and how
            many there are.
    """
    absent = [name for name in columns.required if name not in table.columns]
    if absent:
        raise DataError(
            f"{table.name} has no column {absent[0]!r}; it has {listed(table)}",
            "Give every file of a task the same columns.",
        )
    names = [name for name in table.columns if name in columns.used]
    whole = None if table.columnar is None else table.columnar(names)
    found = (
        None
        if whole is None
        else checked_columns(whole, columns, partial(_read_target, columns=columns), table.columns)
    )
    if found is not None:
        data, keys, groups = found
        return CheckedRows(table, [data], None, keys, groups)
    del whole
    reader = _Reader(table, columns, reading or Reading())
    for number, attempt in table.each():
        reader.add(number, attempt)
    return reader.finish()


class _Reader:
    """Rows as they are read, and what is wrong with the others."""

    def __init__(self, table: Table, columns: Columns, reading: Reading) -> None:
        self._table, self._columns, self._reading = table, columns, reading
        self._keys: dict[Any, Any] = {}  # one object for all rows of a label
        self._label_keys: list[Any] = []
        self._groups: list[str] = []
        self._numbers = array("q")
        self._chunks = _Chunks()
        self._bad = _Listed()
        self._first: DataError | None = None
        self._unanswered = _Listed()
        self._ignored: set[str] = set()

    def add(self, number: int, attempt: dict[str, Any] | DataError) -> None:
        """Read a row, or note what is wrong with it."""
        try:
            if isinstance(attempt, DataError):
                raise attempt
            self._read(number, attempt)
        except DataError as error:
            self._first = self._first or error
            self._bad.add(number)

    def _read(self, number: int, row: dict[str, Any]) -> None:
        columns, place = self._columns, self._table.place(number)
        if columns.kind in TEXT_KINDS:
            found: dict[str, Any] | None = _text_row(row, columns, place)
            key = _target(row, columns, place) if columns.target or columns.flags else None
        else:
            found, key = self._causal_row(row, place), None
        group = str(row.get(columns.group)) if columns.group else None
        if found is None:
            self._unanswered.add(number)
            return
        self._chunks.add(found, place)
        self._numbers.append(number)
        if key is not None:
            self._label_keys.append(key if isinstance(key, float) else self._keys.setdefault(key, key))
        if group is not None:
            self._groups.append(self._keys.setdefault(group, group))

    def _causal_row(self, row: dict[str, Any], place: str) -> dict[str, Any] | None:
        columns = self._columns
        first = row.get(columns.text[0]) if columns.text else None
        target = row.get(columns.target) if columns.target else None
        around = columns.system or columns.history or columns.tools
        messages = isinstance(first, list) or isinstance(target, list)
        if not columns.text or not (columns.conversation or around or messages):
            return _completion_row(row, columns, place)
        tools = row.get(columns.tools) if columns.tools else None
        conversation = Conversation(place, self._reading.roles, tools)
        if columns.conversation:
            read_conversation(first, conversation)
        else:
            if not isinstance(first, list):
                first = _prompt(row, columns, place)
            if columns.target and not isinstance(target, list):
                target = _text(row, columns.target, place)
            system, history = (row.get(name) if name else None for name in (columns.system, columns.history))
            with_prompt(conversation, first, target, system, history)
        self._ignored |= conversation.ignored
        return conversation.finish(self._reading.learned_turns == "last", self._reading.with_answer)

    def finish(self) -> CheckedRows:
        """All rows. Raises DataError where some are wrong, and that is to stop, or none is left."""
        table, read = self._table, len(self._numbers) + self._bad.count + self._unanswered.count
        notes = []
        if self._first is not None:
            many = f"{self._bad.count:,} of {read:,} rows are wrong: {table.listed(self._bad.numbers, self._bad.count)}"
            if self._reading.on_bad_row == "stop" or not self._numbers:
                message = self._first.message + (f" ({many})" if self._bad.count > 1 else "")
                skip = " data.on_bad_row skip leaves such rows out." if self._reading.by_recipe else ""
                raise DataError(message, f"{self._first.hint}{skip}")
            notes.append(f"{table.name}: {many}, and are left out. The first: {self._first.message}")
        if self._unanswered.count:
            listed = table.listed(self._unanswered.numbers, self._unanswered.count)
            where = f"{self._unanswered.count:,} of {read:,} rows ({listed})"
            if not self._numbers:
                raise DataError(
                    f"{table.place(self._unanswered.first)}: the last message is not the assistant's, nor is it in any "
                    "other row",
                    "Give conversations that end with an answer.",
                )
            notes.append(f"{table.name}: {where} do not end with an answer of the assistant, and are left out")
        if self._ignored:
            notes.append(f"{table.name}: keys of messages that are not used: {', '.join(sorted(self._ignored))}")
        return CheckedRows(table, self._chunks.finish(), self._numbers, self._label_keys, self._groups, tuple(notes))


class _Listed:
    """Counts rows, and keeps the numbers of the first ten."""

    def __init__(self) -> None:
        self.count = 0
        self.numbers: list[int] = []

    def add(self, number: int) -> None:
        """Count a row."""
        self.count += 1
        if len(self.numbers) < 10:
            self.numbers.append(number)

    @property
    def first(self) -> int:
        """The number of the first row."""
        return self.numbers[0]


class _Chunks:
    """Collects rows as Arrow tables, which hold text in a fraction of what Python's objects take."""

    def __init__(self) -> None:
        self._done: list[pa.Table] = []
        self._rows: list[dict[str, Any]] = []
        self._characters = 0
        self._names: tuple[str, ...] | None = None
        self._more: set[str] = set()

    def add(self, row: dict[str, Any], place: str) -> None:
        """Add a row. Raises DataError when it has other columns than the first."""
        names = tuple(name for name in row if name not in _OPTIONAL)
        if self._names is None:
            self._names = names
        if names != self._names:
            odd = ", ".join(sorted(set(names) ^ set(self._names)))
            raise DataError(
                f"{place} and the rows before it do not both have {odd}", "Give it to all rows, or to none."
            )
        self._rows.append(row)
        self._more.update(name for name in row if name in _OPTIONAL)
        self._characters += sum(len(value) for value in row.values())
        if len(self._rows) >= _MOST_ROWS or self._characters >= _MOST_CHARACTERS:
            self._flush()

    def finish(self) -> list[pa.Table]:
        """The tables, all of one schema."""
        if self._rows or not self._done:
            self._flush()
        return self._done

    def _flush(self) -> None:
        import pyarrow as pa

        message = pa.struct([("role", pa.string()), ("content", pa.string())])
        types = {"messages": pa.list_(message), "options": pa.list_(pa.string())}
        schema = pa.schema(
            [(name, types.get(name, pa.string())) for name in (*(self._names or ()), *sorted(self._more))]
        )
        self._done.append(pa.Table.from_pylist(self._rows, schema))
        self._rows, self._characters = [], 0


def _text_row(row: dict[str, Any], columns: Columns, place: str) -> dict[str, Any]:
    names = ("text", "text_pair")
    return {ours: _text(row, name, place) for ours, name in zip(names, columns.text, strict=False)}


def _completion_row(row: dict[str, Any], columns: Columns, place: str) -> dict[str, Any]:
    result: dict[str, Any] = {"prompt": _prompt(row, columns, place)} if columns.text else {}
    if columns.target:
        label = row.get("label")
        if columns.text and isinstance(label, bool | str) and label in _PREFERENCE:
            raise DataError(
                f"{place} has the label {brief(label)}: completions that are marked as bad would be learned as good",
                "Keep the rows whose label is true; preferences are not supported.",
            )
        result["completion"] = _text(row, columns.target, place)
        if columns.text and isinstance(row.get("options"), list):
            result |= _options(row, result["completion"], place)
    return result


def _prompt(row: dict[str, Any], columns: Columns, place: str) -> str:
    first, *more = columns.text
    return "\n\n".join([_text(row, first, place), *(_text(row, name, place) for name in more if row.get(name))])


def _options(row: dict[str, Any], completion: str, place: str) -> dict[str, Any]:
    options, answer = row["options"], row.get("answer")
    if len(options) < 2 or not all(isinstance(option, str) and option for option in options):
        raise DataError(f"{place}: options is not a list of two texts or more", "Write the words to choose from.")
    if twice := sorted({option for option in options if options.count(option) > 1}):
        raise DataError(
            f"{place}: the option {brief(twice[0])} stands in the row twice, and nothing tells the two apart",
            "Write each option once.",
        )
    if not isinstance(answer, str) or answer not in options or answer not in completion:
        raise DataError(
            f"{place}: the answer {brief(answer)} is not one of the options, or not in the completion",
            "Write the right option into both.",
        )
    return {"options": options, "answer": answer}


def _text(row: dict[str, Any], name: str, place: str) -> str:
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{place} has no text in the column {name!r}", "Fill it in or remove the row.")
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text in the column {name!r}, found {brief(value)}", "Write it as text.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: the column {name!r} holds half a character (a lone surrogate)", "Correct the text."
        ) from None
    return value


def _target(row: dict[str, Any], columns: Columns, place: str) -> Any:
    try:
        return _read_target(row, columns)
    except ValueError as error:
        what = {"regression": "score", "multi_label": "labels"}.get(columns.kind, "label")
        raise DataError(f"{place} {error}", f"Correct the {what} or remove the row.") from None


def _read_target(row: dict[str, Any], columns: Columns) -> Any:
    """What a row has to learn. Raises ValueError where that is wrong."""
    value = row.get(columns.target or "")
    if columns.kind == "regression":
        return read_score(value)
    if columns.kind == "multi_label":
        return read_flags(row, columns.flags) if columns.flags else read_labels(value)
    return label_key(value)
