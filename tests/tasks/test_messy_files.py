"""Files that people have, from tries as a new user: each is what it should be, or one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monteclora.config import parse_yaml
from monteclora.data.guessing import guess_columns
from monteclora.data.parts import open_files
from monteclora.errors import ConfigError, DataError
from monteclora.runs.new_recipe import new_recipe
from monteclora.tasks import DataSpec, load

ROWS = [("one", "a"), ("two", "b"), ("three", "a")]
CSV = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)
SETS = [["x", "y"], [], ["z"]]
MULTI = {"kind": "multi_label"}


def lines(rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def labelled(labels: Any) -> bytes:
    return (
        b"text\tlabels\n"
        + "".join(f"{text}\t{label}\n" for (text, _), label in zip(ROWS, labels, strict=True)).encode()
    )


GOOD: dict[str, tuple[str, bytes, dict[str, Any], list[Any]]] = {
    "a quoted line break, both line ends, a mark": (
        "x.csv",
        b"\xef\xbb\xbf" + b'text,label\r\n"one\r\n""two""",a\r\nthree,b\r\n',
        {},
        [{"text": 'one\r\n"two"', "label": 0}, {"text": "three", "label": 1}],
    ),
    "compressed UTF-16": ("x.csv.gz", gzip.compress(CSV.encode("utf-16")), {}, [0, 1, 0]),
    "an index of pandas": ("x.csv", CSV.replace("text", ",text").replace("\n", "\n0,", 3).encode(), {}, [0, 1, 0]),
    "labels of 0.0 and 1.0": ("x.csv", b"text,label\none,0.0\ntwo,1.0\nthree,0\n", {}, [0, 1, 0]),
    "numbers and texts": ("x.jsonl", lines([{"text": "a", "label": each} for each in (1, "1", "two")]), {}, [0, 0, 1]),
    "emoji and Arabic": (
        "x.csv",
        "text,label\n\u0645\u0631\u062d\u0628\u0627 \U0001f600,\u0646\ntwo,b\n".encode(),
        {},
        [1, 0],
    ),
    "a list as JSON writes it": ("x.csv", labelled(map(json.dumps, SETS)), MULTI, [[1, 1, 0], [0, 0, 0], [0, 0, 1]]),
    "a list as Python writes it": ("x.csv", labelled(map(str, SETS)), MULTI, [[1, 1, 0], [0, 0, 0], [0, 0, 1]]),
    "what Python takes for no list": ("x.csv", labelled(["x", "[{[]: 1}]", "x"]), MULTI, [[0, 1], [1, 0], [0, 1]]),
    "one row of messages": (
        "x.json",
        lines([{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}]),
        {},
        [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
    ),
    "rows with a column named from": (
        "x.json",
        json.dumps({"data": [{"from": "me", "text": text, "label": label} for text, label in ROWS]}).encode(),
        {},
        [0, 1, 0],
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_read(tmp_path: Path, case: str) -> None:
    name, content, options, expected = GOOD[case]
    (tmp_path / name).write_bytes(content)
    rows = load(DataSpec(task=str(tmp_path / name), validation_fraction=0, **options)).split("train")
    assert (rows.to_list() if isinstance(expected[0], dict) else rows["label"][:]) == expected


REFUSED: dict[str, tuple[str, bytes, dict[str, Any], str]] = {
    "a list as Python writes it": (
        "x.csv",
        labelled(map(str, SETS)),
        {"label_column": "labels"},
        "need data.kind multi_label",
    ),
    "a list as JSON writes it": (
        "x.csv",
        labelled(map(json.dumps, SETS)),
        {"label_column": "labels"},
        "line 2 has the labels",
    ),
    "a list as numpy writes it": ("x.csv", labelled(["['x' 'y']", "[]", "['z']"]), MULTI, "not separated by commas"),
    "a vector as numpy writes it": (
        "x.csv",
        labelled(["[0. 1.]", "[1. 1.]", "[0. 0.]"]),
        MULTI,
        "not separated by commas",
    ),
    "a vector": (
        "x.jsonl",
        lines({"text": "a", "labels": [n, 1.0, 0]} for n in (0, 1)),
        MULTI,
        "a 0 or 1 for each label",
    ),
    "a vector as text": ("x.csv", labelled(["[0, 1, 0]", "[1, 0, 0]", "[1, 1, 0]"]), MULTI, "a 0 or 1 for each label"),
    "a list that is nested too deeply": (
        "x.jsonl",
        lines({"text": "a", "labels": "[" * n + "]" * n} for n in (2, 900)),
        MULTI,
        "line 1 has the label",
    ),
    "columns of JSON": (
        "x.json",
        json.dumps({"text": ["a", "b"], "label": ["x", "y"]}).encode(),
        {},
        "holds columns, or rows",
    ),
    "rows by a key": (
        "x.json",
        json.dumps({"0": {"text": "a"}, "1": {"text": "b"}}, indent=1).encode(),
        {},
        "or rows by a key",
    ),
    "a record as a label": (
        "x.jsonl",
        lines([{"text": "a", "label": {"name": "b"}}]),
        {},
        "line 1 has the label {'name': 'b'}",
    ),
    "a comma after a row": ("x.jsonl", lines([{"text": "a", "label": "b"}])[:-1] + b",\n", {}, "line 1 is not JSON"),
    "a missing score-like label": ("x.csv", b"text,label\none,0.0\ntwo,\n", {}, "line 3 has no label"),
    "nameless columns": ("x.csv", b",x\n0,one\n1,two\n", {}, "it has a column without a name, x"),
    "UTF-16 without a mark": ("x.csv", CSV.encode("utf-16-le"), {}, "Save it as UTF-8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    name, content, options, part = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(DataSpec(task=str(tmp_path / name), validation_fraction=0, **options))
    assert part in str(caught.value)
    assert name in str(caught.value)


def test_types_of_parquet_and_columns_that_are_not_used(tmp_path: Path) -> None:
    texts, labels = zip(*ROWS, strict=True)
    columns = {
        "text": pa.array(texts, pa.large_string()).dictionary_encode(),
        "label": pa.array(labels).dictionary_encode(),
        "when": pa.array([0, 1, 2], pa.timestamp("ns")),
        "": pa.array([0, 1, 2], pa.decimal128(10, 2)),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    data = load(DataSpec(task=str(tmp_path / "x.parquet"), validation_fraction=0))
    assert data.split("train").to_dict() == {"text": list(texts), "label": [0, 1, 0]}
    assert "columns that are not used: when, a column without a name" in data.notes


def test_a_row_is_not_taken_for_the_header(tmp_path: Path) -> None:
    rows = "".join(f"some longer text of row {i},{'ab'[i % 2]}\n" for i in range(20))
    (tmp_path / "x.csv").write_text(rows)
    with pytest.raises(DataError, match=r"x\.csv has no header, it seems: its first line names a column 'a'"):
        new_recipe(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text(f"words,team\n{rows}")
    guess = guess_columns(open_files(tmp_path / "x.csv"))
    assert guess is not None
    assert (guess.text, guess.label) == ("words", "team")


def test_paths_of_windows_in_double_quotes() -> None:
    with pytest.raises(ConfigError, match="Write each backslash twice in double quotes"):
        parse_yaml('task: "C:\\Users\\rows.csv"')
    task = parse_yaml('task: "C:\\new\\table.csv"').root.value["task"].value
    with pytest.raises(DataError, match="Write each backslash of the path twice in double quotes"):
        open_files(task)
