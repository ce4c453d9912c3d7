"""Nothing reads or writes pickle, and nothing runs code that it was not asked to run."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import safetensors
import torch
import yaml

from monteclora.cli import main
from monteclora.data.models import load_model, load_tokenizer, resolve_model
from monteclora.errors import UnsafeCodeError
from tests.old_files import FIXTURES, run_assets, run_recipe

PICKLED = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # torch.save writes a zip of pickles


@pytest.fixture
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("pickle was used")

    class Refusing:
        def __init__(self, *_: Any, **__: Any) -> None:
            refuse()

    for name in ("load", "loads", "dump"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(pickle, "Unpickler", Refusing)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)


def read(path: Path) -> None:
    """Read a file as what its name says it is; a file of another kind fails the test."""
    content = path.read_bytes()
    assert not content.startswith(PICKLED), path
    match path.suffix:
        case ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                file.keys()
        case ".json":
            json.loads(content)
        case ".jsonl":
            [json.loads(line) for line in content.splitlines()]
        case ".yaml":
            yaml.safe_load(content)
        case ".parquet":
            pq.read_table(io.BytesIO(content))
        case ".md" | ".html":
            content.decode()
        case _:
            assert path.name == ".lock", path
            assert content == b""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with run_assets(tmp_path):
        yield tmp_path


def test_a_run_from_its_beginning_to_its_export_uses_no_pickle(folder: Path, no_pickle: None) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(run_recipe()))
    Path("new.csv").write_text("text\nw1 w2\nw40\n")
    shutil.copytree(FIXTURES / "2026-11" / "run-unfinished", "run")
    (folder / "run/expected.json").unlink()
    assert main(["train", "recipe.yaml"]) == 0  # resumes
    assert main(["train", "recipe.yaml", "--output", "other", "--training.max_steps", "2"]) == 0
    assert main(["evaluate", "run", "--split", "validation"]) == 0
    assert main(["predict", "run", "new.csv"]) == 0
    for kind in ("samples", "merged"):
        assert main(["export", "run", "--format", kind]) == 0
    files = [path for name in ("run", "other") for path in Path(name).rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in [*files, Path("new-predictions.parquet")]:
        read(path)


def test_code_that_comes_with_a_model_runs_only_when_asked_for_by_name(folder: Path) -> None:
    """It is not enough that the model asks for it."""
    code = "from pathlib import Path\nPath('ran').touch()\nraise SystemExit\n"
    for name in ("configuration", "modeling", "tokenization"):
        Path("model", f"{name}_own.py").write_text(code)
    config = json.loads(Path("model/config.json").read_text())
    classes = {"AutoConfig": "configuration_own.C", "AutoModelForSequenceClassification": "modeling_own.M"}
    Path("model/config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
    settings = json.loads(Path("model/tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}}
    Path("model/tokenizer_config.json").write_text(json.dumps({**settings, **own}))
    with pytest.raises(UnsafeCodeError, match=r"set model\.trust_remote_code to true"):
        load_model(resolve_model("./model"), "classification", 2)
    with pytest.raises(UnsafeCodeError, match=r"set model\.trust_remote_code to true"):
        load_tokenizer(resolve_model("./model"))
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "..", ".", ""])
def test_a_recipe_cannot_name_its_run_out_of_the_folder_of_runs(
    folder: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump({**run_recipe(), "name": name, "output": None}))
    before = sorted(folder.parent.rglob("*"))
    assert main(["train", "recipe.yaml"]) == 2
    assert "expected a plain file name" in capfd.readouterr().err
    assert sorted(folder.parent.rglob("*")) == before


def test_an_export_stays_in_the_folder_it_is_given(folder: Path) -> None:
    shutil.copytree(FIXTURES / "2026-11" / "run-finished", "run")
    assert main(["export", "run", "--format", "samples", "--num-samples", "2", "--out", "out"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["sample-0", "sample-1"]
