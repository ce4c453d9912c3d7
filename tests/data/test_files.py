from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monteclora.data.files import open_table
from monteclora.data.text import encoding_of
from monteclora.errors import DataError

ROWS = [{"text": 'a "quoted", text', "label": "x"}, {"text": "zwei\nZeilen ü", "label": "y"}]


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path):
    with pytest.raises(DataError) as caught:
        list(open_table(path).rows())
    assert str(path.name) in caught.value.message
    assert caught.value.hint
    return str(caught.value)


CSV = 'text,label\n"a ""quoted"", text",x\n"zwei\nZeilen ü",y\n'
TSV = 'text\tlabel\n"a ""quoted"", text"\tx\n"zwei\nZeilen ü"\ty\n'
JSONL = "\n".join(json.dumps(row) for row in ROWS) + "\n"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
@pytest.mark.parametrize(("name", "content"), [("a.csv", CSV), ("a.tsv", TSV), ("a.jsonl", JSONL)])
def test_text_formats_hold_the_same_rows(tmp_path, mark, name, content):
    table = open_table(written(tmp_path, name, mark + content.encode()))
    assert table.columns == ("text", "label")
    assert [row for _, row in table.rows()] == ROWS
    assert table.place(2).endswith(f"{name}, line 2")


def test_gzip_and_parquet_hold_the_same_rows(tmp_path):
    zipped = written(tmp_path, "a.jsonl.gz", gzip.compress(JSONL.encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in (zipped, tmp_path / "a.parquet"):
        assert [row for _, row in open_table(path).rows()] == ROWS
    assert open_table(tmp_path / "a.parquet").place(1).endswith("row 1")


def test_row_numbers_are_the_lines_a_person_sees(tmp_path):
    csv = open_table(written(tmp_path, "a.csv", 'text,label\n"one\ntwo",x\n\nthree,y\n'))
    assert [number for number, _ in csv.rows()] == [2, 5]
    jsonl = open_table(written(tmp_path, "a.jsonl", '\n{"a": 1}\n\n{"a": 2}\n'))
    assert [number for number, _ in jsonl.rows()] == [2, 4]


def test_windows_line_ends_and_a_missing_last_one(tmp_path):
    table = open_table(written(tmp_path, "a.csv", "text,label\r\na,x\r\nb,y"))
    assert [row["label"] for _, row in table.rows()] == ["x", "y"]


def test_a_field_longer_than_the_csv_modules_limit(tmp_path):
    table = open_table(written(tmp_path, "a.csv", f"text,label\n{'a' * 200_000},x\n"))
    assert len(next(table.rows())[1]["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "\n\n", "is empty"),
        ("a.jsonl", "\n", "is empty"),
        ("a.csv", "text,label\n", "has a header and no rows"),
        ("a.csv", "text,label\na,x\nb\n", "line 3 has 1 fields where the header has 2"),
        ("a.csv", "text,label\na,b,c\n", "line 2 has 3 fields where the header has 2"),
        ("a.csv", 'text,label\na,x\n"b,y\nc,z\n', "the row that starts in line 3: unexpected end of data"),
        ("a.csv", "text,text\na,b\n", "has the column 'text' more than once"),
        ("a.csv", "text,,\na,b,c\n", "line 2 has 3 fields where the header has 1"),
        ("a.csv", b"text,label\na,x\nb\0,y\n", "line 3 holds a NUL byte"),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', "line 2: byte 19 is not UTF-8"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 is not a JSON object"),
        ("a.jsonl", '{"a": 1, "a": 2}\n', "line 1 is not JSON: the key 'a' is given twice"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl.gz", "no gzip", "damaged gzip"),
        ("a.jsonl.gz", gzip.compress(JSONL.encode() * 1000)[:-20], "damaged gzip"),
        ("a.parquet", "no parquet", "is not a whole Parquet file"),
        ("a.json", "{}", "holds no list of rows"),
        ("a.md", "{}", "cannot tell the format"),
    ],
)
def test_a_defect_is_named_with_its_place(tmp_path, name, content, part):
    assert part in refusal(written(tmp_path, name, content))


def test_damaged_parquet_files(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS * 1000), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is not a whole Parquet file" in refusal(path)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "has no rows" in refusal(path)


def test_a_missing_file_names_the_nearest_one(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,b\n")
    assert "Did you mean" in refusal(tmp_path / "trian.csv")
    assert "there is no file" in refusal(tmp_path / "nowhere" / "x.csv")


def test_half_a_character_at_the_end_of_a_piece_is_not_utf8(tmp_path):
    start, piece = b"refund," + b"x" * (2**20 - 6), b"y" * 2**20  # 2 bytes are looked at first, then pieces of 2**20
    rows = {"cp1252": start + b"\xc3" + piece + b"\xa9", "utf-8": start + b"\xc3\xa9" + piece}
    for encoding, content in rows.items():
        path = tmp_path / f"{encoding}.csv"
        path.write_bytes(content)
        assert encoding_of(path, guess=True) == encoding
