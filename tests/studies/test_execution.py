from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from monteclora.studies import execution
from monteclora.studies.execution import attempt
from monteclora.studies.folder import StudyFolder
from monteclora.studies.plan import Trial, make_plan
from monteclora.studies.recipe import StudyRecipe, load_study
from monteclora.studies.study import study

ONE = {"method.name": ["lora"], "seed": [0]}


@pytest.fixture
def one(make_study: Callable[..., dict[str, Any]]) -> tuple[StudyFolder, StudyRecipe, Trial]:
    """A study of one trial."""
    recipe = load_study(make_study(grid=ONE))
    (trial,) = make_plan(recipe).trials
    return StudyFolder(recipe.folder), recipe, trial


def test_a_run_that_another_process_trains_is_not_taken_and_has_not_failed(
    one: tuple[StudyFolder, StudyRecipe, Trial],
) -> None:
    """Of a holder that was suspended until its claim was lost, and goes on."""
    folder, recipe, trial = one
    with execution.RunFolder(trial.recipe.folder).locked():
        for _ in range(5):
            assert not attempt(folder, recipe, [trial])
    state = folder.claims.state(trial.id)
    assert (state.failures, state.holder) == ([], None)
    assert folder.outcome(trial.id) is None
    assert attempt(folder, recipe, [trial])
    outcome = folder.outcome(trial.id)
    assert outcome is not None
    assert outcome.status == "finished"


def test_who_lost_a_claim_writes_and_removes_nothing(
    one: tuple[StudyFolder, StudyRecipe, Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe, trial = one
    original = execution.evaluate_loaded

    def lost(*arguments: Any, **options: Any) -> Any:
        state = folder.claims.state(trial.id)
        assert state.holder is not None
        state.holder["token"] = "another's"
        folder.claims._write(trial.id, state)
        return original(*arguments, **options)

    monkeypatch.setattr(execution, "evaluate_loaded", lost)
    attempt(folder, recipe, [trial])
    assert folder.outcome(trial.id) is None
    assert list(execution.RunFolder(trial.recipe.folder).checkpoints.iterdir())
    holder = folder.claims.state(trial.id).holder
    assert holder is not None
    assert holder["token"] == "another's"


def test_out_of_memory_in_evaluation_makes_its_passes_smaller_and_leaves_the_run(
    make_study: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = study(make_study("right", ONE), workers=0, progress=False)
    original, sizes = execution.evaluate_loaded, []

    def full(run: Any, *arguments: Any, batch_size: int | None = None, **options: Any) -> Any:
        sizes.append(batch_size)
        if batch_size is None or batch_size > 16:
            raise torch.OutOfMemoryError("planted")
        return original(run, *arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(execution, "evaluate_loaded", full)
    found = study(make_study("planted", ONE), workers=0, progress=False)
    (outcome,), (expected,) = found.outcomes.values(), right.outcomes.values()
    assert sizes == [None, 32, 16]
    assert outcome.status == "finished", outcome.reason
    assert outcome.metrics["nll"] == pytest.approx(expected.metrics["nll"], abs=1e-6)
    assert not any("out of memory" in note for note in outcome.notes)


@pytest.mark.parametrize("keep", ["adapter", "numbers", "everything"])
def test_what_is_not_kept_goes_also_where_a_worker_was_killed_behind_its_result(
    make_study: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    recipe = make_study(grid=ONE, keep=keep)
    with monkeypatch.context() as patch:
        patch.setattr(execution, "tidy", lambda *_: None)
        patch.setattr("monteclora.studies.study.tidy", lambda *_: None)
        found = study(recipe, workers=0, progress=False)
    run = found.folder / "trials" / found.plan.trials[0].id
    assert list((run / "checkpoints").iterdir())
    study(recipe, workers=0, progress=False)
    assert (run / "checkpoints").exists() == (keep == "everything")
    assert (run / "adapter").exists() == (keep != "numbers")


def test_failed_trials_are_tried_anew_by_the_next_command(
    make_study: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_study(grid=ONE, retries=1)
    tries: list[int] = []

    def fail(recipe: Any, **arguments: Any) -> Any:
        tries.append(recipe.seed)
        raise OSError("no such disk")

    with monkeypatch.context() as patch:
        patch.setattr(execution, "train", fail)
        for count in (2, 4):
            found = study(recipe, workers=0, progress=False)
            assert [outcome.status for outcome in found.outcomes.values()] == ["failed"]
            assert len(tries) == count
    found = study(recipe, workers=0, progress=False)
    assert [outcome.status for outcome in found.outcomes.values()] == ["finished"]
