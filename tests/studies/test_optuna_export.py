from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from monteclora.errors import ConfigError
from monteclora.studies.folder import Outcome
from monteclora.studies.optuna_export import check_storage, export_to_optuna
from monteclora.studies.plan import Plan, Trial
from monteclora.studies.study import study

optuna = pytest.importorskip("optuna")


def made(name: str = "safe") -> tuple[Plan, dict[str, Outcome]]:
    cells: list[tuple[str, float, Any, Outcome]] = [
        ("lora", 1e-3, "all-linear", Outcome("a", "finished", metrics={"accuracy": 0.9, "nll": 0.3}, seconds=60.0)),
        ("lora", 1e-2, ["query"], Outcome("b", "diverged", "not finite")),
        ("full", 1e-3, "all-linear", Outcome("c", "failed", "OSError")),
        ("full", 1e-2, "all-linear", Outcome("d", "finished", metrics={"accuracy": 0.95, "nll": float("nan")})),
    ]
    trials = []
    for arm, rate, targets, outcome in cells:
        settings = {"training.learning_rate": rate, "method.target_modules": targets}
        settings |= {"method.r": 4 * (1 + len(trials))} if arm == "lora" else {}
        trials.append(Trial(outcome.trial, arm, {"data.label_noise": None}, settings, 1, cast(Any, None)))
    study = SimpleNamespace(metric=None, name=name, folder=Path("studies/safe"))
    return Plan(cast(Any, study), tuple(trials)), {cell[3].trial: cell[3] for cell in cells}


def test_cells_are_trials_with_their_values(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    plan, outcomes = made()
    check_storage(storage, "safe")
    assert export_to_optuna(storage, plan, outcomes) == 4
    found = optuna.load_study(study_name="safe", storage=storage)
    assert found.direction.name == "MAXIMIZE"
    assert [trial.state.name for trial in found.trials] == ["COMPLETE", "PRUNED", "FAIL", "COMPLETE"]
    assert found.best_trial.user_attrs["trial"] == "d"
    first = found.trials[0]
    assert first.params == {
        "arm": "lora", "data.label_noise": None, "training.learning_rate": 1e-3,
        "method.target_modules": "all-linear", "method.r": 4, "seed": 1,
    }  # fmt: skip
    assert first.distributions["training.learning_rate"].log
    assert not first.distributions["method.r"].log
    assert first.duration.total_seconds() == pytest.approx(60)
    assert (first.value, first.user_attrs["nll"]) == (0.9, 0.3)
    assert found.trials[1].params["method.target_modules"] == '["query"]'
    assert found.trials[1].user_attrs["reason"] == "not finite"
    assert "method.r" not in found.trials[2].params


def test_a_second_export_takes_the_place_of_the_first(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    plan, outcomes = made()
    other = optuna.create_study(study_name="another", storage=storage)
    export_to_optuna(storage, plan, {"a": outcomes["a"]})
    export_to_optuna(storage, plan, outcomes)  # with values that no trial had before
    assert len(optuna.load_study(study_name="safe", storage=storage).trials) == 4
    assert sorted(optuna.get_all_study_names(storage)) == ["another", "safe"]
    assert other.trials == []


def test_what_is_not_ours_or_out_of_reach_is_told_and_left(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    optuna.create_study(study_name="safe", storage=storage)
    plan, outcomes = made()
    for call in (lambda: check_storage(storage, "safe"), lambda: export_to_optuna(storage, plan, outcomes)):
        with pytest.raises(ConfigError, match="has a study safe that was not exported from here"):
            call()
    assert optuna.load_study(study_name="safe", storage=storage).trials == []
    for wrong in (f"sqlite:///{tmp_path}/no/such/folder.db", "no url", "oracle9://x"):
        with pytest.raises(ConfigError, match="cannot use") as caught:
            check_storage(wrong, "safe")
        assert "\n" not in str(caught.value)


def test_a_study_is_exported_at_its_end_and_a_wrong_storage_refused_at_its_start(
    make_study: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    recipe = make_study(grid={"method.name": ["lora"], "seed": [0]})
    with pytest.raises(ConfigError, match="cannot use"):
        study(recipe, workers=0, optuna=f"sqlite:///{tmp_path}/no/such/folder.db", progress=False)
    assert not Path(recipe["output"]).exists()
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    (outcome,) = study(recipe, workers=0, optuna=storage, progress=False).outcomes.values()
    (trial,) = optuna.load_study(study_name="study", storage=storage).trials
    assert (trial.user_attrs["trial"], trial.value) == (outcome.trial, outcome.metrics["accuracy"])
