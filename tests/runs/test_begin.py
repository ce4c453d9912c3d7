"""Beginning a run: whose folder it is, decided before anything is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from monteclora.errors import CheckpointError
from monteclora.runs.begin import begin
from monteclora.runs.recipe import Recipe, load_recipe
from monteclora.runs.run_folder import RunFolder


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
