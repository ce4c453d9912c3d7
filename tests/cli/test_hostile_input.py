"""What a user gives on the command line and cannot be used ends with status 2 and one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from monteclora.cli import main
from tests.data.test_hostile_files import REFUSED
from tests.old_files import run_assets, run_recipe

SAMPLE = (
    "NUL, csv",
    "ragged rows",
    "NUL, csv",
    "truncated parquet",
    "a header only",
    "a label with control characters",
    "JSON arrays",
    "a folder",
    "a pipe",
    "a name of 300 characters",
    "a gzip bomb",
    "10,000 columns",
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with run_assets(tmp_path):
        yield tmp_path


@pytest.mark.parametrize("case", SAMPLE)
def test_a_broken_data_file_ends_with_2(folder: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, part = REFUSED[case]
    recipe = run_recipe()
    recipe["data"]["train_file"] = str(make(folder))
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "recipe.yaml"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert part in line


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('name: "\\U00110000"\n', "recipe.yaml, line 1: chr() arg not in range"),
        ("a: &x [1]\nb: *x\n", "recipe.yaml, line 1: anchors and aliases are not allowed"),
        ("seed: " + "[" * 5000, "recipe.yaml, line 1: nested too deeply"),
        ("seed: 1\nseed: 2\n", "recipe.yaml, line 2: the key seed is given twice"),
    ],
)
def test_a_broken_recipe_ends_with_2(folder: Path, capfd: pytest.CaptureFixture[str], content: str, part: str) -> None:
    Path("recipe.yaml").write_text(content)
    assert main(["check", "recipe.yaml"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert part in line
