from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from monteclora.config import build, load_yaml, parse_yaml
from monteclora.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: [x\n", "r.yaml, line 2"),
        ("name: &a x\nextra: *a\n", "r.yaml, line 1: anchors and aliases are not allowed"),
        ("- name\n", "holds a list where a mapping is expected"),
        ("just words\n", "holds the text 'just words'"),
        ("a: 1\n---\na: 2\n", "line 2"),
        ("name: \x07\n", "special characters"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_broken_yaml_is_refused_with_its_place(text, part):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "r.yaml")
    assert part in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "starter.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match=r"Did you mean .*starter\.yaml"):
        load_yaml(tmp_path / "startr.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 9"):
        load_yaml(tmp_path / "latin.yaml")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfname: x\n")
    assert load_yaml(tmp_path / "bom.yaml").root.value["name"].value == "x"


def test_what_is_no_recipe_is_told_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml is not an ordinary file"):
        load_yaml(tmp_path / "pipe.yaml")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match=r"large\.yaml has 1,099,511,627,776 bytes, a recipe at most 1,048,576"):
        load_yaml(tmp_path / "large.yaml")
    for name in ("a\0b.yaml", "x" * 300 + ".yaml", "\ud800.yaml"):
        with pytest.raises(ConfigError, match="cannot read"):
            load_yaml(tmp_path / name)


def test_a_file_of_nothing_but_mistakes_is_told_in_a_line_that_can_be_read(tmp_path):
    @dataclass(frozen=True)
    class Schema:
        name: str = ""

    text = "".join(f"k{i}: 1\n" for i in range(3000))
    with pytest.raises(ConfigError, match=r"; and 2950 more\. Correct these 3000 entries") as caught:
        build(Schema, parse_yaml(text, "r.yaml"))
    assert len(str(caught.value)) < 5000
