"""What is read column by column is what is read row by row: rows, labels, errors and checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from monteclora.data import json_files
from monteclora.data.columns import Columns
from monteclora.data.files import open_table
from monteclora.data.labels import LabelSet
from monteclora.data.rows import Reading, read_rows
from monteclora.data.splitting import content_ranks, content_sha256
from monteclora.errors import DataError
from monteclora.tasks import DataSpec, load
from tests.data.test_files_as_they_come import SAME_ROWS
from tests.data.test_hostile_files import REFUSED

KINDS = (
    Columns("classification", ("text",), "label"),
    Columns("classification", ("text", "pair"), "label", group="group"),
    Columns("regression", ("text",), "label"),
    Columns("multi_label", ("text",), "label"),
    Columns("multi_label", ("text",), None, flags=("label", "group")),
    Columns("causal_lm", ("text",), "pair"),
    Columns("causal_lm", (), "text"),
)
PIECES = [
    "",
    " ",
    "\u00a0",
    "\u3000x",
    "a",
    "two words",
    'a "quote"',
    "a,b",
    "a\nb",
    "a\r\nb",
    "\ufeff",
    "caf\u00e9",
    "\\",
]
NUMBERS = ["0", "1", "1.0", "2.5", "true", "False", "nan", "N/A", "null", "2020-01-01", "-0", "1e5"]
CELLS = [*PIECES, *NUMBERS, "x|y", "caf\u00e9", "#", "\U0001f600"]
VALUES = [*CELLS, 0, 1, 1.0, 2.5, True, None, 2**53 + 1, -(2**60), 1e300, ["x"], [], {"a": 1}, "\x00", "\x1f"]


def outcome(path: Path, columns: Columns, *, slow: bool) -> tuple[Any, bool]:
    """What comes of reading a file, and whether it was read column by column."""
    try:
        table = open_table(path)
        if slow:
            table = dataclasses.replace(table, columnar=None)
        found = read_rows(table, columns, Reading())
        keys = list(found.label_keys)
        rows = found.to_dataset(None).to_dict()
        labels = LabelSet(("a", "b", "0", "1"))
        try:
            ids = found.to_dataset(labels).to_dict() if columns.kind == "classification" else None
        except DataError as error:
            ids = str(error)
        return (table.columns, rows, keys, [type(key) for key in keys], found.groups, found.notes, ids), (
            found.numbers is None
        )
    except DataError as error:
        return str(error), False


def same(monkeypatch: pytest.MonkeyPatch, path: Path, columns: Columns) -> bool:
    """Whether the file was read column by column; either way it must be as if it had not been."""
    found, at_once = outcome(path, columns, slow=False)
    with monkeypatch.context() as patch:
        patch.setattr(json_files, "_at_once", lambda path: None)
        expected, _ = outcome(path, columns, slow=True)
    assert found == expected, path.read_bytes()
    return at_once


def csv_text(generator: random.Random) -> bytes:
    """A table of cells, quoted as they must be, or not."""
    delimiter, end = generator.choice([",", ",", ";", "\t"]), generator.choice(["\n", "\n", "\r\n"])
    cells = CELLS if generator.random() < 0.3 else ["a", "b c", "0", "1", "2", "x,y", "caf\u00e9"]
    clean = generator.random() < 0.8

    def cell(text: str) -> str:
        special = any(each in text for each in f'{delimiter}"\n\r')
        if (special and (clean or generator.random() < 0.8)) or generator.random() < 0.1:
            return '"' + text.replace('"', '""') + '"'
        return text

    lines = [*[""] * generator.choice([0, 0, 0, 2]), "text,pair,label,group".replace(",", delimiter)]
    for _ in range(generator.randint(1, 6)):
        count = 4 if clean or generator.random() < 0.9 else generator.randint(1, 6)
        lines.append(delimiter.join(cell(generator.choice(cells)) for _ in range(count)))
        if generator.random() < 0.05:
            lines.append("")
    text = end.join(lines) + generator.choice([end, ""])
    return generator.choice([b"", b"", b"\xef\xbb\xbf"]) + text.encode()


def jsonl_text(generator: random.Random) -> bytes:
    """Objects, or almost."""
    values = VALUES if generator.random() < 0.3 else ["a", "b c", "0", "1", 'say "no"']
    lines = []
    for _ in range(generator.randint(1, 6)):
        names = [name for name in ("text", "pair", "label", "group") if generator.random() < 0.97]
        row = {name: generator.choice(values) for name in names}
        lines.append(json.dumps(row, ensure_ascii=generator.random() < 0.5))
        if generator.random() < 0.04:
            lines[-1] = generator.choice(
                [lines[-1][:-1], lines[-1] + "{}", "[1]", "", " ", lines[-1] + " ", '{"text": "a", "text": "b"}']
            )
        if generator.random() < 0.02:
            lines[-1] = '{"text": "a", "label": NaN}'
    return generator.choice([b"", b"", b"\xef\xbb\xbf"]) + generator.choice(["\n", "\r\n"]).join(lines).encode()


@pytest.mark.parametrize(("ending", "make"), [("csv", csv_text), ("tsv", csv_text), ("jsonl", jsonl_text)])
def test_generated_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, make: Callable[[random.Random], bytes]
) -> None:
    generator = random.Random(ending)
    at_once = 0
    for _ in range(150):
        path = tmp_path / f"x.{ending}"
        path.write_bytes(make(generator))
        at_once += sum(same(monkeypatch, path, columns) for columns in generator.sample(KINDS, 3))
    assert at_once > 50, "most files are left to the slow reader: the comparison says little"


@pytest.mark.parametrize("case", SAME_ROWS)
def test_files_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name, content, _ = SAME_ROWS[case]
    (tmp_path / name).write_bytes(content)
    at_once = same(monkeypatch, tmp_path / name, KINDS[0])
    assert at_once or case not in ("commas", "semicolons", "bars", "sep= in the first line", "ndjson", "tabs in a csv")


@pytest.mark.parametrize("case", REFUSED)
def test_broken_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    make, _ = REFUSED[case]
    path = make(tmp_path)
    if os.path.isfile(path):
        same(monkeypatch, path, KINDS[0])


def test_a_label_outside_the_set_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('text,label\n"a\nb",yes\nc,no\nd,maybe\n')
    with pytest.raises(DataError, match=r"x\.csv, line 5: the label 'maybe' is not among"):
        load(DataSpec(train_file=str(tmp_path / "x.csv"), label_names=["yes", "no"]))


def test_a_quote_that_spans_pieces_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monteclora.data.scan._CHUNK", 16)
    for long in ("a\n" * 20, 'b""\n' * 9, "c" * 15 + "\n"):
        (tmp_path / "x.csv").write_text(f'text,label\none,a\n"{long}",b\nthree,a\n')
        same(monkeypatch, tmp_path / "x.csv", KINDS[0])
        (tmp_path / "y.csv").write_text(f'text,label\none,a\n"{long}"x,b\nthree,a\n')
        assert not same(monkeypatch, tmp_path / "y.csv", KINDS[0])


def test_checksums_and_ranks_are_those_of_the_rows_as_json() -> None:
    texts = ["plain", 'a "b"', "tab\t", "back\\slash", "caf\u00e9", "\x7f", "\u2028", "", "new\nline"] * 3
    columns = {
        "text": texts,
        "label": list(range(27)),
        "score": [0.1, 1.0, 1e300] * 9,
        "labels": [[0, 1], [], [1]] * 9,
        "maybe": [None, "x", 'y"'] * 9,
    }
    for names in (["text", "label"], ["text"], ["label"], list(columns)):
        rows = Dataset.from_dict({name: columns[name] for name in names})
        lines = [json.dumps(dict(sorted(row.items())), ensure_ascii=False).encode() for row in rows]
        for data, expected in ((rows, lines), (rows.select([5, 2, 20]), [lines[i] for i in (5, 2, 20)])):
            assert content_sha256(data) == hashlib.sha256(b"".join(each + b"\n" for each in expected)).hexdigest()
            assert content_ranks(data, 3, "x") == [hashlib.sha256(b"3 x " + each).digest() for each in expected]


def test_parquet_is_read_by_rows_where_its_types_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "label": pa.array([1, 0], pa.int8())}), tmp_path / "x.parquet")
    same(monkeypatch, tmp_path / "x.parquet", KINDS[0])
