"""Several files as one table: lists, patterns, folders of parts; and corpora of plain text."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monteclora.data.parts import open_files
from monteclora.errors import ConfigError, DataError
from monteclora.runs.recipe import load_recipe
from monteclora.tasks import DataSpec, load, load_inputs

PARTS = ("text,label\none,a\ntwo,b\n", "text,label\nthree,a\n")
ROWS = [{"text": text, "label": label} for text, label in (("one", "a"), ("two", "b"), ("three", "a"))]
LINES = (
    '{"text": "one", "label": "a"}\n{"label": "b", "text": "two"}\n',
    '{"text": "three", "label": "a", "id": 1}\n',
)


@pytest.fixture
def spark(tmp_path: Path) -> Path:
    """What Spark leaves behind: parts, a mark of success and checksums."""
    folder = tmp_path / "out.csv"
    folder.mkdir()
    for number, content in enumerate(PARTS):
        (folder / f"part-0000{number}-6e1f-c000.csv").write_text(content)
        (folder / f".part-0000{number}-6e1f-c000.csv.crc").write_bytes(b"crc")
    (folder / "_SUCCESS").touch()
    return folder


def test_parts_are_one_table_in_the_order_of_their_names(spark: Path) -> None:
    first, second = sorted(spark.glob("part*"))
    for files in (spark, f"{spark}/part-*.csv", [str(first), str(second)], [str(first), f"{spark}/*.csv"]):
        table = open_files(files)
        assert [row for _, row in table.rows()] == ROWS
        assert table.columns == ("text", "label")
        places = [table.place(number).rpartition("/")[2] for number, _ in table.rows()]
        assert places == [f"{first.name}, line 2", f"{first.name}, line 3", f"{second.name}, line 2"]
        assert "2 files" in table.notes[0]
    (number, row) = next(iter(open_files([str(second), str(first)]).rows()))
    assert (number, row) == (2, ROWS[2]), "a list keeps its order"


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "mixed"])
def test_parts_of_every_kind(tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS[:2]), tmp_path / "part-0.parquet")
        pq.write_table(pa.Table.from_pylist(ROWS[2:]), tmp_path / "part-1.parquet")
    else:
        for number, text in enumerate(LINES):
            zipped = kind == "jsonl.gz" or (kind == "mixed" and number)
            name = f"part-{number}.jsonl{'.gz' if zipped else ''}"
            (tmp_path / name).write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    data = load(DataSpec(train_file=str(tmp_path), validation_fraction=0.0))
    assert data.split("train").to_dict() == {"text": ["one", "two", "three"], "label": [0, 1, 0]}


def test_parts_are_read_at_once_where_each_of_them_can_be(tmp_path: Path) -> None:
    for number, content in enumerate(LINES):
        (tmp_path / f"part-{number}.jsonl").write_text(content)
    table = open_files(tmp_path)
    assert table.columnar is not None
    found = table.columnar(["text", "label"])
    assert found is not None
    assert found.to_pylist() == [{name: row[name] for name in ("text", "label")} for _, row in table.rows()]
    assert table.columnar(["text", "id"]) is None, "the first part has no such column"


def test_wrong_rows_are_named_by_their_file(spark: Path) -> None:
    with (spark / "part-00002.csv").open("w") as file:
        file.write("text,label\n,a\nfour,\n")
    message = r"part-00002\.csv, line 2 has no text.*\(2 of 5 rows .* rows part-00002\.csv:2, part-0"
    with pytest.raises(DataError, match=message):
        load(DataSpec(train_file=str(spark)))
    found = load(DataSpec(train_file=str(spark), on_bad_row="skip", validation_fraction=0.0))
    assert len(found.split("train")) == 3
    assert "part-00002.csv:2, part-00002.csv:3, and are left out" in " ".join(found.notes)


REFUSED: dict[str, tuple[dict[str, str], Any, str]] = {
    "no match": ({}, "*.csv", r"no file matches .*\*\.csv"),
    "an empty folder": ({"_SUCCESS": ""}, "", "a folder without data files"),
    "an unfinished folder": ({"part-0.csv": PARTS[0], "_temporary": ""}, "", "it is still being written"),
    "another file": ({"part-0.csv": PARTS[0], "readme.md": "x"}, "", r"holds readme\.md, which is not a data file"),
    "other headers": (
        {"a.csv": PARTS[0], "b.csv": "text,class\nx,y\n"},
        "*.csv",
        r"b\.csv and .*a\.csv do not both have the column .class.",
    ),
    "an empty part": ({"a.csv": PARTS[0], "b.csv": ""}, "*.csv", r"b\.csv is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    files, pattern, message = REFUSED[case]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        open_files(f"{tmp_path}/{pattern}" if pattern else tmp_path)


def test_recipes_take_lists_and_patterns(spark: Path) -> None:
    def data(**section: Any) -> DataSpec:
        return load_recipe({"name": "x", "model": {"name": "m"}, "data": section, "method": {"name": "lora"}}).data

    files = sorted(map(str, spark.glob("part*")))
    assert data(train_file=files).train_file == files
    assert len(load(data(task=f"{spark}/*.csv", validation_fraction=0)).split("train")) == 3
    with pytest.raises(ConfigError, match="train_file is an empty list"):
        data(train_file=[])


def test_rows_of_parts_are_predicted(spark: Path) -> None:
    spec = DataSpec(train_file=str(spark))
    columns = load(DataSpec(train_file=str(spark), validation_fraction=0.0)).columns
    rows, _ = load_inputs(str(spark), spec, "classification", columns)
    assert rows["text"][:] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("x.txt", "First line.\n\n  Second line.\n", {}),
        ("x.txt.gz", "First line.\r\n\r\n  Second line.", {}),
        ("x.jsonl", '{"text": "First line."}\n{"text": "  Second line."}\n', {}),
        ("x.jsonl", '{"text": "First line.", "url": "u"}\n{"text": "  Second line."}\n', {"kind": "causal_lm"}),
    ],
)
def test_texts_alone_are_a_corpus(tmp_path: Path, name: str, content: str, options: dict[str, Any]) -> None:
    raw = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    data = load(DataSpec(train_file=str(tmp_path / name), validation_fraction=0.0, **options))
    assert data.kind == "causal_lm"
    assert data.split("train").to_dict() == {"completion": ["First line.", "  Second line."]}


def test_texts_with_other_columns_are_no_corpus_unless_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a", "lable": "b"}\n')
    with pytest.raises(DataError, match="cannot tell which columns"):
        load(DataSpec(train_file=str(tmp_path / "x.jsonl")))
