"""Beginning a run: whose folder it is, decided before anything is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from monteclora.config import dump
from monteclora.errors import CheckpointError
from monteclora.runs.begin import begin
from monteclora.runs.data_facts import data_facts
from monteclora.runs.manifest import Checkpoint
from monteclora.runs.recipe import Recipe, load_recipe
from monteclora.runs.resumption import resumed
from monteclora.runs.run_folder import RunFolder
from monteclora.tasks import SplitSource
from monteclora.training.run import train


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(
        {
            "name": "run",
            "output": str(tmp_path / "run"),
            "model": {"name": "tiny"},
            "data": {"task": str(tmp_path / "rows.csv")},
            "method": {"name": "lora"},
        }
    )


def test_a_new_folder_holds_the_recipe_and_is_kept_for_one_process(recipe: Recipe, tmp_path: Path) -> None:
    with begin(recipe) as run:
        assert run.folder.path == tmp_path / "run"
        assert run.finished is None
        assert run.checkpoint() is None
        assert load_recipe(run.folder.recipe_file) == recipe
        with pytest.raises(CheckpointError, match="another process is training"), begin(recipe):
            pass
    with begin(recipe):  # released
        pass


def test_a_recipe_is_corrected_until_something_was_measured(recipe: Recipe) -> None:
    other = dataclasses.replace(recipe, seed=recipe.seed + 1)
    with begin(recipe):
        pass
    with begin(other) as run:
        assert load_recipe(run.folder.recipe_file) == other
        run.folder.metrics.append({"event": "log", "step": 1})
    with pytest.raises(CheckpointError, match="seed changed"), begin(recipe):
        pass
    assert load_recipe(RunFolder(run.folder.path).recipe_file) == other


def test_another_process_of_the_run_waits_for_no_lock(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with begin(recipe):
        monkeypatch.setattr("monteclora.runs.begin.is_main_process", lambda: False)
        with begin(recipe) as run:
            assert run.recipe == recipe


FACTS = {
    "data": {
        "name": "rows",
        "kind": "classification",
        "label_names": ["a", "b"],
        "splits": {"train": {"origin": "rows.csv", "rows": 4, "sha256": "0"}},
    }
}


def damaged(part: str) -> dict[str, Any]:
    data = {**FACTS["data"]}
    if part == "data":
        return {}
    if part == "splits":
        del data["splits"]
    elif part == "sha256":
        data["splits"] = {"train": {"origin": "rows.csv"}}
    elif part == "kind":
        data["kind"] = "novels"
    else:
        data["columns"] = 3
    return {"data": data}


@pytest.mark.parametrize("part", ["data", "splits", "sha256", "kind", "columns"])
def test_a_damaged_environment_is_told_of_by_whoever_reads_it(recipe: Recipe, part: str) -> None:
    checkpoint = Checkpoint(Path("step-1"), "0", "cooperative", 0, 1, False, {}, None)
    with begin(recipe) as run:
        run.folder.write_environment(damaged(part))
        for use in (
            lambda: run.check_data({"train": SplitSource("rows.csv", 4, "0")}),
            lambda: resumed(run.folder, recipe, FACTS, checkpoint),
            lambda: data_facts(run.folder),
        ):
            with pytest.raises(CheckpointError, match=r"environment\.json is damaged") as caught:
                use()
            assert caught.value.hint


def test_rows_that_changed_since_the_run_was_finished_are_refused(recipe: Recipe) -> None:
    with begin(recipe) as run:
        run.folder.write_environment(FACTS)
        run.check_data({"train": SplitSource("rows.csv", 4, "0"), "test": SplitSource("other.csv", 1, "1")})
        with pytest.raises(CheckpointError, match=r"the train rows of rows\.csv changed"):
            run.check_data({"train": SplitSource("rows.csv", 4, "1")})


def test_a_later_format_asks_for_an_upgrade(recipe: Recipe) -> None:
    with begin(recipe) as run:
        run.folder.write_environment({"format": 2})
        with pytest.raises(CheckpointError, match="has format 2") as caught:
            data_facts(run.folder)
        assert "Upgrade" in caught.value.hint


def test_an_adapter_from_elsewhere_is_not_trained(recipe: Recipe) -> None:
    folder = Path(recipe.folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "recipe.yaml").write_text(dump(recipe))
    (folder / "environment.json").write_text("{}")  # as `monteclora calibrate --base` has left it
    with pytest.raises(CheckpointError, match=r"is an adapter that was trained elsewhere\. Choose another output"):
        train(recipe, progress=False)
    assert not (folder / ".lock").exists()
