"""One reader for every document beside a run: calibration, evaluations, generated answers, thresholds."""

import json

import pytest

from monteclora.errors import CheckpointError
from monteclora.runs.calibration import read_calibration, write_calibration
from monteclora.runs.documents import read_document, write_document
from monteclora.runs.records import add_evaluation


def test_what_is_written_is_read(tmp_path):
    assert read_document(tmp_path / "a.json", 3, dict) is None
    write_document(tmp_path / "a.json", 2, {"one": [1, "ä"]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"format": 2, "one": [1, "ä"]}
    assert read_document(tmp_path / "a.json", 3, dict) == {"one": [1, "ä"]}


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"3", b"{}", b'{"format": "x"}', b'{"format": 1}', b"[" * 100_000], ids=repr
)
def test_damage_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.json is damaged") as caught:
        read_document(tmp_path / "a.json", 1, lambda document: document["one"], "Do this.")
    assert caught.value.hint == "Do this."


def test_a_folder_in_its_place_is_damage(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(CheckpointError, match=r"a\.json is damaged"):
        read_document(tmp_path / "a.json", 1, dict)


def test_a_later_format_is_refused_before_it_is_looked_at(tmp_path):
    write_document(tmp_path / "a.json", 2, {})
    with pytest.raises(CheckpointError, match=r"has format 2, this version reads format 1"):
        read_document(tmp_path / "a.json", 1, lambda document: pytest.fail("it was read"))


def test_every_document_is_read_so(tmp_path):
    write_calibration(tmp_path, {"one": {"two": 3}})
    assert read_calibration(tmp_path) == {"one": {"two": 3}}
    add_evaluation(tmp_path, {"run": "a"}, "test", "adapter", {"x": 1})
    path = add_evaluation(tmp_path, {"run": "a"}, "test", "base", {"x": 2})
    document = json.loads(path.read_text())
    assert document == {"format": 1, "run": "a", "splits": {"test": {"adapter": {"x": 1}, "base": {"x": 2}}}}
    path.write_text(json.dumps({**document, "format": 7}))
    with pytest.raises(CheckpointError, match=r"evaluation\.json has format 7"):
        add_evaluation(tmp_path, {}, "test", "base", {})
