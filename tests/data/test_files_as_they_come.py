"""Files of the shapes that people have, each with the rows that must come out of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monteclora.data.files import open_table
from monteclora.errors import ConfigError, DataError

ROWS: list[dict[str, Any]] = [{"text": "caf\u00e9, one", "label": "a"}, {"text": "two", "label": "b"}]
CSV = 'text,label\n"caf\u00e9, one",a\ntwo,b\n'
SEMICOLONS = "text;label\ncaf\u00e9, one;a\ntwo;b\n"
TABS = "text\tlabel\ncaf\u00e9, one\ta\ntwo\tb\n"
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)

SAME_ROWS: dict[str, tuple[str, bytes, str]] = {
    "commas": ("x.csv", CSV.encode(), ""),
    "semicolons": ("x.csv", SEMICOLONS.encode(), "separated by semicolons"),
    "tabs in a csv": ("x.csv", TABS.encode(), "separated by tabs"),
    "bars": ("x.csv", SEMICOLONS.replace(";", "|").encode(), "separated by vertical bars"),
    "sep= in the first line": ("x.csv", b"sep=;\r\n" + SEMICOLONS.encode(), "separated by semicolons"),
    "tsv": ("x.tsv", TABS.encode(), ""),
    "cp1252": ("x.csv", SEMICOLONS.encode("cp1252"), "the encoding is cp1252"),
    "UTF-16 with tabs": ("x.csv", TABS.encode("utf-16"), "separated by tabs, the encoding is utf-16"),
    "UTF-16, jsonl": ("x.jsonl", JSONL.encode("utf-16"), "the encoding is utf-16"),
    "trailing empty columns": ("x.csv", CSV.replace("\n", ",,\n").encode(), ""),
    "csv.gz": ("x.csv.gz", gzip.compress(CSV.encode()), ""),
    "csv.zst": ("x.csv.zst", bytes(pa.compress(CSV.encode(), "zstd", asbytes=True)), ""),
    "ndjson": ("x.ndjson", JSONL.encode(), ""),
    "a JSON list": ("x.json", json.dumps(ROWS, indent=1).encode(), ""),
    "a JSON object with a list": ("x.json", json.dumps({"data": ROWS}).encode(), ""),
    "JSON lines named .json": ("x.json", JSONL.encode(), ""),
}


@pytest.mark.parametrize("case", SAME_ROWS)
def test_the_same_rows_come_out_of_every_container(tmp_path: Path, case: str) -> None:
    name, content, note = SAME_ROWS[case]
    (tmp_path / name).write_bytes(content)
    table = open_table(tmp_path / name)
    assert table.columns == ("text", "label")
    assert [row for _, row in table.rows()] == ROWS
    assert note in " ".join(table.notes)
    assert bool(note) == bool(table.notes)


def test_binary_text_in_parquet_is_text(tmp_path: Path) -> None:
    columns = {"text": [row["text"].encode() for row in ROWS], "label": ["a", "b"]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert [row for _, row in open_table(tmp_path / "x.parquet").rows()] == ROWS


def test_stray_quotes_of_a_raw_tsv_merge_no_lines(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text('text\tlabel\n"open\ta\nb\tclosed"\n')
    table = open_table(tmp_path / "x.tsv")
    assert [row for _, row in table.rows()] == [{"text": '"open', "label": "a"}, {"text": "b", "label": 'closed"'}]
    assert "quotes are part of the text" in table.notes[0]


def test_columns_of_jsonl_are_those_of_all_rows(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"instruction": "i", "output": "o"}\n{"instruction": "i", "input": "n"}\n')
    assert open_table(tmp_path / "x.jsonl").columns == ("instruction", "output", "input")


def test_the_first_sheet_of_a_workbook(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    for row in ([None, None], ["text", "label", None], [ROWS[0]["text"], ROWS[0]["label"]], [], list(ROWS[1].values())):
        sheet.append(row)
    book.create_sheet("notes").append(["not read"])
    book.save(tmp_path / "x.xlsx")
    table = open_table(tmp_path / "x.xlsx")
    assert table.columns == ("text", "label")
    assert list(table.rows()) == [(3, ROWS[0]), (5, ROWS[1])]
    sheet.append(["t", "l", "beyond"])
    book.save(tmp_path / "x.xlsx")
    with pytest.raises(DataError, match="row 6 has a value beyond the header"):
        list(open_table(tmp_path / "x.xlsx").rows())
    (tmp_path / "x.xlsx").write_bytes(b"PK no workbook")
    with pytest.raises(DataError, match="is not a whole workbook"):
        open_table(tmp_path / "x.xlsx")


def test_a_damaged_zst_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv.zst").write_bytes(b"no frame at all")
    with pytest.raises(DataError, match="damaged"):
        open_table(tmp_path / "x.csv.zst")


def test_a_workbook_without_its_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"monteclora\[excel\]"):
        open_table(tmp_path / "x.xlsx")
