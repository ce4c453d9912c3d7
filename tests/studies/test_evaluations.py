"""Runs that are evaluated in several ways: trained once, with an outcome for each way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from monteclora.errors import ConfigError
from monteclora.studies import execution
from monteclora.studies.execution import attempt
from monteclora.studies.folder import Outcome, StudyFolder
from monteclora.studies.plan import make_plan
from monteclora.studies.recipe import load_study
from monteclora.studies.results import read_results
from monteclora.studies.study import study

Make = Callable[..., dict[str, Any]]
WAYS = {"sampler": [None, "mean", "posterior"], "calibrator": ["none", "temperature"], "evaluation.num_samples": [2, 3]}
ONE = {"method.name": ["monteclora"], "seed": [0]}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    trained: list[str] = []
    original = execution.train
    monkeypatch.setattr(execution, "train", lambda r, **options: trained.append(r.name) or original(r, **options))
    return trained


def timeless(outcome: Outcome) -> Outcome:
    return replace(outcome, seconds=0.0, seconds_per_row=0.0, peak_memory_bytes=0)


def test_a_run_is_trained_once_for_all_its_evaluations_which_are_those_of_runs_of_their_own(
    make_study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = counted(monkeypatch)
    found = study(make_study("all", {**ONE, **WAYS}), workers=0, progress=False)
    assert len(found.outcomes) == 12
    assert len(trained) == 1
    assert {o.status for o in found.outcomes.values()} == {"finished"}
    assert all(o.seconds_per_row > 0 for o in found.outcomes.values())
    assert not list((found.folder / "trials" / trained[0] / "checkpoints").glob("*"))
    assert {tuple(trial.settings) for trial in found.plan.trials} == {()}
    assert len({summary.condition["sampler"] for summary in found.summaries}) == 3
    # the same trials, each as the only one of its run, have the same identities and results
    alone = {"sampler": "posterior", "calibrator": "temperature", "set": {"evaluation.num_samples": 3}}
    for name, options in (("alone", alone), ("mean", {"sampler": "mean"}), ("default", {})):
        (other,) = study(make_study(name, ONE, **options), workers=0, progress=False).outcomes.values()
        assert timeless(found.outcomes[other.trial]) == timeless(other)
    nll = [outcome.metrics["nll"] for outcome in found.outcomes.values()]
    assert len(set(nll)) == 6  # mean | 2 or 3 draws, by name or by default, each with and without temperature


def test_more_evaluations_of_a_study_need_no_training(make_study: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = counted(monkeypatch)
    first = study(make_study(grid=ONE), workers=0, progress=False)
    wider = study(make_study(grid={**ONE, "evaluation.num_samples": [2, 5]}), workers=0, progress=False)
    assert len(wider.outcomes) == 2
    (outcome,) = first.outcomes.values()
    assert wider.outcomes[outcome.trial] == outcome
    run = first.folder / "trials" / outcome.trial
    assert trained == [run.name] * 2  # asked for again, and found finished
    assert (run / "metrics.jsonl").read_text().count('"finished"') == 1


def test_an_evaluation_that_fails_leaves_the_others_and_the_run(
    make_study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = execution.evaluate_loaded

    def broken(*arguments: Any, sampler: str | None, **options: Any) -> Any:
        if sampler == "mean":
            raise OSError("no such disk")
        return original(*arguments, sampler=sampler, **options)

    grid = {**ONE, "sampler": ["mean", "posterior"]}
    with monkeypatch.context() as patch:
        patch.setattr(execution, "evaluate_loaded", broken)
        found = study(make_study(grid=grid, retries=1), workers=0, progress=False)
    status = {trial.sampler: found.outcomes[trial.id] for trial in found.plan.trials}
    assert (status["posterior"].status, status["mean"].status) == ("finished", "failed")
    assert status["mean"].reason == "OSError: no such disk"
    assert list((found.plan.trials[0].recipe.folder / "checkpoints").iterdir())
    trained = counted(monkeypatch)
    again = study(make_study(grid=grid), workers=0, progress=False)
    assert len(trained) == 1
    assert {o.status for o in again.outcomes.values()} == {"finished"}
    assert again.outcomes[status["posterior"].trial] == status["posterior"]
    assert not list((found.plan.trials[0].recipe.folder / "checkpoints").glob("*"))


def test_two_processes_do_not_work_on_one_run(make_study: Make) -> None:
    recipe = load_study(make_study(grid={**ONE, **WAYS}))
    (trials,) = make_plan(recipe).runs
    folder = StudyFolder(recipe.folder)
    taken = folder.claims.take(trials[0].run, lambda: False, lambda: 0)
    assert taken is not None
    assert not any(attempt(folder, recipe, [trial]) for trial in trials)
    folder.claims.release(trials[0].run, *taken)
    assert attempt(folder, recipe, trials[:1])


def test_a_sampler_that_a_method_lacks_makes_no_trials_of_it(make_study: Make) -> None:
    grid = {"method.name": ["lora", "monteclora"], "seed": [0], "sampler": [None, "posterior"]}
    plan = make_plan(load_study(make_study(grid=grid)))
    assert sorted((t.arm, t.sampler) for t in plan.trials if t.arm == "lora") == [("lora", None)]
    assert len(plan.trials) == 3
    assert "the arm lora has no posterior, and so no trials with the sampler posterior" in plan.notes
    with pytest.raises(ConfigError, match="the arm lora has no trial"):
        make_plan(load_study(make_study(grid={**grid, "sampler": ["posterior"]})))
    del grid["sampler"]
    with pytest.raises(ConfigError, match="the method lora has no posterior for the sampler posterior"):
        make_plan(load_study(make_study(grid=grid, sampler="posterior")))


def test_arms_may_differ_in_their_evaluation_alone(make_study: Make) -> None:
    arms = {
        "draws": {"set": {"method.name": "monteclora"}},
        "mean": {"set": {"method.name": "monteclora", "sampler": "mean"}},
    }
    plan = make_plan(load_study(make_study(grid={"training.learning_rate": [1e-3, 1e-2], "seed": [0]}, arms=arms)))
    assert [len(trials) for trials in plan.runs] == [2, 2]
    assert {trial.arm for trials in plan.runs for trial in trials} == {"draws", "mean"}


@pytest.mark.parametrize("place", ["grid", "set", "arms.a.set", "arms.a.grid"])
def test_a_wrong_name_is_refused_wherever_it_stands(make_study: Make, place: str) -> None:
    wrong: dict[str, Any] = {"grid": {**ONE, "sampler": ["posterio"]}} if place == "grid" else {"grid": {"seed": [0]}}
    if place == "set":
        wrong["set"] = {"sampler": "posterio"}
    elif place != "grid":
        section = place.rpartition(".")[2]
        wrong["arms"] = {"a": {section: {"sampler": ["posterio"] if section == "grid" else "posterio"}}}
    with pytest.raises(ConfigError, match=rf"{place}\.sampler is 'posterio', expected one of mean, posterior"):
        load_study(make_study(**wrong))


@pytest.mark.parametrize(
    ("name", "identity"), [("study-helpdesk", "37f0d74c0b484ac0"), ("study-helpdesk-starter", "f16aed8d43051a0c")]
)
def test_the_identity_of_a_trial_does_not_change(name: str, identity: str) -> None:
    """What was run stays run: a change of this number trains every trial of every study again."""
    assert identity in {trial.id for trial in make_plan(load_study(name)).trials}


def test_the_blocks_that_are_drawn_in_are_part_of_an_identity(make_study: Make) -> None:
    plan = make_plan(load_study(make_study(grid={**ONE, "evaluation.layers": [None, 1]})))
    everywhere, last = plan.trials
    assert everywhere.id != last.id
    assert len(plan.runs) == 1
    assert sorted(trial.conditions["evaluation.layers"] or 0 for trial in plan.trials) == [0, 1]
    (alone,) = make_plan(load_study(make_study(grid=ONE))).trials
    assert alone.id in {everywhere.id, last.id}  # the default is what a study has that does not name it


def test_the_published_outcomes_are_of_trials_of_their_study(tmp_path: Path) -> None:
    """Whatever is added to a recipe: its default does not make other trials of those that were run."""
    published = Path(__file__).parents[2] / "docs" / "results" / "helpdesk"
    known = read_results(published / "results.parquet")
    plan = make_plan(load_study(published / "study.yaml", str(tmp_path)))
    assert len(known) == 72
    assert known.keys() <= {trial.id for trial in plan.trials}
