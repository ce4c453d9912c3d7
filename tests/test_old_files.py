"""Adapters and runs that earlier versions wrote load, and give the numbers they gave then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
from safetensors.torch import save

import monteclora
from monteclora import train
from monteclora.errors import CheckpointError
from tests.old_files import BASES, FIXTURES, STEPS, base_model, metrics_of, numbers_of, run_assets, run_recipe

VERSIONS = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
CLOSE = {"rel": 1e-4, "abs": 1e-5}


def expected(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "expected.json").read_text())
    return found


def test_there_are_old_files() -> None:
    assert "2026-11" in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", BASES)
def test_an_old_adapter_gives_its_old_numbers(version: str, name: str) -> None:
    folder = FIXTURES / version / f"adapter-{name}"
    found = numbers_of(monteclora.from_pretrained(base_model(name), str(folder)), name)
    wanted = expected(folder)
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert found[key] == pytest.approx(values, **CLOSE), key


@pytest.fixture
def old_run(tmp_path: Path) -> Iterator[Any]:
    """Copies an old run beside the model and the data that it names."""
    with run_assets(tmp_path):

        def copy(version: str, name: str) -> dict[str, Any]:
            shutil.copytree(FIXTURES / version / name, "run")
            return expected(Path("run"))

        yield copy


def check_metrics(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, metrics in wanted.items():
        assert found[key] == pytest.approx(metrics, **CLOSE), key


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_run_gives_its_old_numbers(old_run: Any, version: str) -> None:
    wanted = old_run(version, "run-finished")
    check_metrics(metrics_of("run"), wanted)
    assert train(run_recipe(), progress=False).steps == STEPS  # finished: nothing is trained


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_run_that_was_stopped_goes_on_to_where_it_would_have_come(old_run: Any, version: str) -> None:
    wanted = old_run(version, "run-unfinished")
    check_metrics(metrics_of("run", allow_unfinished=True), wanted)
    assert train(run_recipe(), progress=False).steps == STEPS
    check_metrics(metrics_of("run"), expected(FIXTURES / version / "run-finished"))


def test_a_posterior_of_a_later_format_says_to_update(tmp_path: Path) -> None:
    import hashlib

    shutil.copytree(FIXTURES / "2026-11" / "adapter-llama", tmp_path / "adapter")
    path = tmp_path / "adapter" / "posterior.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        document = json.dumps({**json.loads(file.metadata()["monteclora"]), "format": 1000})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    content = b"".join(tensors[name].numpy().tobytes() for name in ("rho", "eta", "scale"))
    digest = hashlib.sha256(document.encode() + content).hexdigest()
    path.write_bytes(save(tensors, {"monteclora": document, "sha256": digest}))
    with pytest.raises(CheckpointError, match=r"has format 1000.* Upgrade monteclora"):
        monteclora.from_pretrained(base_model("llama"), str(tmp_path / "adapter"))


def test_a_run_of_a_later_format_says_to_update(old_run: Any) -> None:
    old_run("2026-11", "run-finished")
    path = Path("run/environment.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1000}))
    with pytest.raises(CheckpointError, match=r"has format 1000.* Upgrade monteclora"):
        metrics_of("run")


def test_an_evaluation_of_a_later_format_is_left_as_it_is(old_run: Any) -> None:
    old_run("2026-11", "run-finished")
    path = Path("run/evaluation.json")
    path.write_text('{"format": 1000, "splits": {}}')
    with pytest.raises(CheckpointError, match=r"has format 1000.* Upgrade monteclora"):
        metrics_of("run")
    assert json.loads(path.read_text())["format"] == 1000
