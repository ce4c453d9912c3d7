"""Whatever a data file holds, its rows are loaded or one line says which file and line is wrong, and what to do."""

from __future__ import annotations

import gzip
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monteclora.errors import DataError
from monteclora.tasks import DataSpec, load

Make = Callable[[Path], Path]
ROWS = [{"text": f"message {i}", "label": "ab"[i % 2]} for i in range(4)]
CSV = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def file(name: str, content: str | bytes) -> Make:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def parquet(columns: Any, cut: int | None = None, spoil: bool = False) -> Make:
    def make(folder: Path) -> Path:
        path = folder / "x.parquet"
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, compression="none")
        content = path.read_bytes()
        if spoil:
            content = content.replace(b"message 1", b"message \xff")
        path.write_bytes(content[:cut])
        return path

    return make


def folder(path: Path) -> Path:
    (path / "x.csv").mkdir()
    return path / "x.csv"


def pipe(path: Path) -> Path:
    os.mkfifo(path / "x.jsonl")
    return path / "x.jsonl"


def loop(path: Path) -> Path:
    (path / "x.csv").symlink_to(path / "y.csv")
    (path / "y.csv").symlink_to(path / "x.csv")
    return path / "x.csv"


def dangling(path: Path) -> Path:
    (path / "x.csv").symlink_to(path / "nowhere.csv")
    return path / "x.csv"


def link(path: Path) -> Path:
    (path / "x.csv").symlink_to(file("real.csv", CSV)(path))
    return path / "x.csv"


def wide(columns: int) -> str:
    names = [f"c{i}" for i in range(columns)]
    return "\n".join([",".join(names), *(",".join(["x"] * columns) for _ in range(3))]) + "\n"


def jsonl(*rows: Any) -> str:
    return JSONL + "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


LONG = "x" * 10_000_000
TABLE = {"text": [row["text"] for row in ROWS], "label": [row["label"] for row in ROWS]}

LOADED: dict[str, tuple[Make, int]] = {
    "byte-order mark, csv": (file("x.csv", b"\xef\xbb\xbf" + CSV.encode()), 4),
    "byte-order mark, jsonl": (file("x.jsonl", b"\xef\xbb\xbf" + JSONL.encode()), 4),
    "mixed line ends": (file("x.csv", CSV.replace("\n", "\r\n", 3)), 4),
    "no line end at the end": (file("x.csv", CSV.rstrip()), 4),
    "blank lines": (file("x.jsonl", "\n\n" + JSONL.replace("\n", "\n  \n")), 4),
    "a cell of 10 MB, csv": (file("x.csv", f"{CSV}{LONG},a\n"), 5),
    "a cell of 10 MB, jsonl": (file("x.jsonl", jsonl({"text": LONG, "label": "a"})), 5),
    "a cell of 10 MB, parquet": (parquet({"text": [LONG, "b"], "label": ["a", "b"]}), 2),
    "numbers in quotes are text": (file("x.csv", 'text,label\n"12","1"\n"13","2"\n'), 2),
    "whole numbers as floats": (parquet({"text": ["a", "b"], "label": [1.0, 2.0]}), 2),
    "booleans": (file("x.jsonl", '{"text": "a", "label": true}\n{"text": "b", "label": false}\n'), 2),
    "commas, quotes and line ends in cells": (file("x.csv", CSV + '"a ""b"",\n\nc",a\n'), 5),
    "unicode of all planes": (file("x.csv", CSV + "\u202e\U0001f600\u0301 \uffff,b\n"), 5),
    "more keys in later rows": (file("x.jsonl", jsonl({"text": "t", "label": "a", "x": [[[{}]]], "y": None})), 5),
    "a column of anything nested": (parquet({**TABLE, "x": [[{"a": [1]}]] * 4}), 4),
    "a column of nothing": (parquet({**TABLE, "x": pa.nulls(4)}), 4),
    "a capital ending": (file("x.CSV", CSV), 4),
    "a link to a file": (link, 4),
    "gzip of several members": (file("x.jsonl.gz", gzip.compress(JSONL.encode()) * 2), 8),
    "an options column that is no list": (
        file("x.jsonl", '{"prompt": "p", "completion": "c", "options": "x"}\n{"prompt": "p", "completion": "c"}\n'),
        2,
    ),
}

REFUSED: dict[str, tuple[Make, str]] = {
    "NUL, csv": (file("x.csv", CSV + "a\0,b\n"), "x.csv, line 6 holds a NUL byte"),
    "NUL, jsonl": (file("x.jsonl", JSONL + "\0\0\0"), "x.jsonl, line 5 holds a NUL byte"),
    "old Mac line ends, csv": (file("x.csv", CSV.replace("\n", "\r")), "a carriage return alone does not end one"),
    "old Mac line ends, jsonl": (file("x.jsonl", JSONL.replace("\n", "\r")), "x.jsonl, line 1 is not JSON: Extra data"),
    "duplicated columns, csv": (file("x.csv", "text,text,label\na,b,c\n"), "the column 'text' more than once"),
    "duplicated columns, parquet": (
        parquet(pa.table([["a"], ["b"], ["c"]], names=["text", "label", "label"])),
        "the column 'label' more than once",
    ),
    "duplicated keys": (
        file("x.jsonl", jsonl('{"text": 1, "text": 2}\n')),
        "line 5 is not JSON: the key 'text' is given",
    ),
    "ragged rows": (file("x.csv", CSV + "a\n"), "x.csv, line 6 has 1 fields where the header has 2"),
    "UTF-16 without a mark": (file("x.csv", CSV.encode("utf-16-le")), "x.csv, line 1 holds a NUL byte"),
    "truncated parquet": (parquet(TABLE, cut=-40), "x.parquet is not a whole Parquet file"),
    "a beginning of parquet": (parquet(TABLE, cut=50), "x.parquet is not a whole Parquet file"),
    "parquet with broken text": (parquet(TABLE, spoil=True), "x.parquet, after row 0: a value cannot be read"),
    "parquet by name": (file("x.parquet", CSV), "x.parquet is not a whole Parquet file"),
    "parquet without rows": (parquet({"text": [], "label": []}), "x.parquet has no rows"),
    "empty": (file("x.csv", ""), "x.csv is empty"),
    "empty, gzip": (file("x.jsonl.gz", gzip.compress(b"")), "x.jsonl.gz is empty"),
    "nothing but blanks": (file("x.csv", "\n \n"), "x.csv has a header and no rows"),
    "a header only": (file("x.csv", "text,label\n"), "x.csv has a header and no rows"),
    "a label with control characters": (
        file("x.jsonl", jsonl({"text": "t", "label": "a\x1b[2J"})),
        r"x.jsonl, line 5 has the label 'a\x1b[2J', which holds a control character",
    ),
    "a label with a line end": (file("x.csv", CSV + 't,"a\nb"\n'), "x.csv, line 6 has the label"),
    "a label of a thousand digits": (
        file("x.jsonl", jsonl('{"text": "t", "label": 1' + "0" * 999 + "}\n")),
        "line 5 has",
    ),
    "a label that is not a number": (
        file("x.jsonl", jsonl('{"text": "t", "label": NaN}\n')),
        "line 5 has no label (nan)",
    ),
    "a label that is a list": (
        file("x.jsonl", jsonl({"text": "t", "label": ["a"] * 9999})),
        "line 5 has the labels ['a'",
    ),
    "scores as labels": (
        file("x.csv", "text,label\na,2.5\nb,4\n"),
        "x.csv look like scores (2 different numbers, as 2.5)",
    ),
    "N/A as a label": (file("x.csv", CSV + "t,N/A\n"), "x.csv, line 6 has no label (N/A)"),
    "no label": (file("x.jsonl", jsonl({"text": "t", "label": None})), "x.jsonl, line 5 has no label"),
    "no text": (file("x.csv", CSV + "  ,a\n"), "x.csv, line 6 has no text in the column 'text'"),
    "numbers as text": (
        file("x.jsonl", jsonl({"text": 5, "label": "a"})),
        "line 5: expected text in the column 'text'",
    ),
    "a document as text": (file("x.jsonl", jsonl({"text": {"a": "b" * 9999}, "label": "a"})), "line 5: expected text"),
    "half a character": (
        file("x.jsonl", jsonl('{"text": "\\ud800", "label": "a"}\n')),
        "line 5: the column 'text' holds half",
    ),
    "one label only": (file("x.csv", "text,label\na,b\nc,b\n"), "have the label b"),
    "deeply nested JSON": (file("x.jsonl", jsonl('{"text": ' + "[" * 100_000 + "\n")), "x.jsonl, line 5 is not JSON"),
    "a number of too many digits": (file("x.jsonl", jsonl('{"text": ' + "9" * 5000 + "}\n")), "line 5 is not JSON"),
    "JSON arrays": (file("x.jsonl", jsonl([1, 2])), "x.jsonl, line 5 is not a JSON object"),
    "a JSON document of many lines": (file("x.jsonl", json.dumps(ROWS, indent=1)), "x.jsonl, line 1 is not JSON"),
    "half a line of JSON": (file("x.jsonl", JSONL[:-10]), "x.jsonl, line 4 is not JSON"),
    "a folder": (folder, "x.csv is a folder without data files"),
    "a pipe": (pipe, "x.jsonl is not an ordinary file"),
    "a device": (lambda _: Path("/dev/zero"), "/dev/zero is not an ordinary file"),
    "links in a circle": (loop, "cannot read "),
    "a link to nothing": (dangling, "there is no file "),
    "a name of 300 characters": (lambda path: path / ("x" * 300 + ".csv"), "cannot read "),
    "a name with a NUL": (lambda path: path / "a\0.csv", "cannot read "),
    "a quote that is never closed": (
        file("x.csv", CSV + '"open,a\nb,c\n'),
        "the row that starts in line 6: unexpected end",
    ),
    "a quote in the middle": (file("x.csv", CSV + '"a" b,c\n'), "the row that starts in line 6"),
    "a cell of 20 MB": (file("x.csv", f"{CSV}{LONG}{LONG},a\n"), "the row that starts in line 6: field larger than"),
    "10,000 columns": (file("x.csv", wide(10_000)), "and 9,950 more. Set data.text_columns"),
    "10,000 columns of one name": (file("x.csv", ",".join(["a"] * 10_000) + "\n"), "the column 'a' more than once"),
    "gzip that is truncated": (file("x.jsonl.gz", gzip.compress(JSONL.encode())[:-9]), "x.jsonl.gz is a damaged gzip"),
    "gzip that is not": (file("x.jsonl.gz", JSONL), "x.jsonl.gz is a damaged gzip file: Not a gzipped file"),
    "gzip with a wrong checksum": (
        file("x.jsonl.gz", gzip.compress(JSONL.encode())[:-8] + b"\0" * 8),
        "x.jsonl.gz is a damaged gzip file: CRC check failed",
    ),
    "a gzip bomb": (
        file("x.jsonl.gz", gzip.compress(b" " * 2**28, 1)),
        "x.jsonl.gz, line 1 has more than 67,108,864 bytes",
    ),
    "options in some rows": (
        file(
            "x.jsonl",
            '{"prompt": "p", "completion": "is a", "options": ["a", "b"], "answer": "a"}\n'
            '{"prompt": "p", "completion": "c"}\n',
        ),
        "x.jsonl, line 2 and the rows before it do not both have answer, options",
    ),
    "options of other types": (
        file("x.jsonl", '{"prompt": "p", "completion": "c", "options": [1, {}], "answer": 1}\n'),
        "x.jsonl, line 1: options is not a list of two texts or more",
    ),
    "an answer that is no option": (
        file("x.jsonl", '{"prompt": "p", "completion": "c", "options": ["a", "b"], "answer": ["c"]}\n'),
        "x.jsonl, line 1: the answer ['c'] is not one of the options",
    ),
    "an option that stands in a row twice": (
        file("x.jsonl", '{"prompt": "p", "completion": "a", "options": ["a", "b", "a"], "answer": "a"}\n'),
        "x.jsonl, line 1: the option 'a' stands in the row twice",
    ),
    "an input that is no text": (
        file("x.jsonl", '{"instruction": "p", "input": ["x"], "output": "c"}\n'),
        "x.jsonl, line 1: expected text in the column 'input', found ['x']",
    ),
}


def spec(path: Path) -> DataSpec:
    return DataSpec(train_file=str(path), validation_fraction=0.0)


def test_there_are_forty_of_them() -> None:
    assert len(LOADED) + len(REFUSED) >= 40


@pytest.mark.parametrize("case", LOADED)
def test_odd_files_are_loaded(tmp_path: Path, case: str) -> None:
    make, rows = LOADED[case]
    assert len(load(spec(make(tmp_path))).split("train")) == rows


@pytest.mark.parametrize("case", REFUSED)
def test_broken_files_are_told_in_one_line(tmp_path: Path, case: str) -> None:
    make, part = REFUSED[case]
    with pytest.raises(DataError) as caught:
        load(spec(make(tmp_path)))
    text = str(caught.value)
    assert part in text
    assert text.splitlines() == [text]
    assert caught.value.hint
    assert len(text) < 1500


def test_a_label_that_never_occurs_in_training_is_told(tmp_path: Path) -> None:
    train, other = file("train.csv", CSV)(tmp_path), file("dev.csv", CSV + "t,c\n")(tmp_path)
    with pytest.raises(DataError, match=r"dev\.csv, line 6: the label 'c' is not among the 2 labels a, b"):
        load(DataSpec(train_file=str(train), validation_file=str(other)))


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except OSError:  # a namespace without other users
        pytest.skip("root may read everything")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("closed", ["file", "folder"])
def test_what_may_not_be_read_is_told(closed: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = file("x.csv", CSV)(folder)
        folder.chmod(0o755)
        (path if closed == "file" else folder).chmod(0)
        with as_nobody(), pytest.raises(DataError, match=r"cannot read .*x\.csv: Permission denied"):
            load(spec(path))
        folder.chmod(0o755)


def test_a_path_is_never_taken_for_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's library would read a folder of that name, whatever is in it."""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="owner/name is a folder here"):
        load(DataSpec(task="owner/name"))
    for task in ("../name", "owner/..", "./x"):
        with pytest.raises(ValueError, match="there is no task"):
            load(DataSpec(task=task))
