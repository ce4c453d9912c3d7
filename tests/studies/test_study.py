from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from monteclora.errors import ConfigError, DivergenceError
from monteclora.evaluation.run import evaluate
from monteclora.reports.study_report import write_study_report
from monteclora.studies import execution
from monteclora.studies.folder import StudyFolder
from monteclora.studies.plan import make_plan
from monteclora.studies.recipe import load_study
from monteclora.studies.study import StudyResult, study
from monteclora.training import range_test
from tests.training.conftest import adapter_content

DRIVER = (
    "import json, sys; from monteclora import study; study(json.load(open(sys.argv[1])), workers=2, progress=False)"
)


def results(found: StudyResult) -> dict[str, Any]:
    """Everything of the outcomes that does not depend on time or place, and the adapters bitwise."""
    times = ("seconds", "seconds_per_row", "peak_memory_bytes")
    return {
        trial.id: (
            {key: value for key, value in vars(found.outcomes[trial.id]).items() if key not in times},
            adapter_content(found.folder / "trials" / trial.id),
        )
        for trial in found.plan.trials
    }


def drive(recipe: dict[str, Any], folder: Path) -> subprocess.Popen[bytes]:
    file = folder / "study.json"
    file.write_text(json.dumps(recipe))
    paths = os.pathsep.join(sys.path)
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(file)], env={**os.environ, "PYTHONPATH": paths})


def holders(folder: StudyFolder) -> list[int]:
    states = [json.loads(path.read_text()) for path in folder.path.glob("claims/*.json")]
    return [state["holder"]["pid"] for state in states if state["holder"] is not None]


def test_killed_workers_and_drivers_leave_one_result_a_cell_equal_to_the_serial_study(
    make_study: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    serial = study(make_study("serial"), workers=0, progress=False)
    recipe = make_study("killed")
    folder = StudyFolder(Path(recipe["output"]))
    trials = make_plan(load_study(recipe)).trials
    generator = random.Random(0)
    kills = 0
    driver = drive(recipe, tmp_path)
    end = time.monotonic() + 300  # not an expectation: a study that never ends is to fail
    try:
        while driver.poll() is None or driver.returncode != 0:
            if driver.poll() is not None:
                driver = drive(recipe, tmp_path)
            assert time.monotonic() < end
            time.sleep(generator.uniform(0.2, 0.6))
            working = holders(folder)
            if kills < 6 and working:
                victim = driver.pid if kills == 3 else generator.choice(working)
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                kills += 1
    finally:
        driver.kill()
    assert kills == 6
    assert sorted(path.stem for path in (folder.path / "results").glob("*.json")) == sorted(t.id for t in trials)
    assert results(study(recipe, workers=0, progress=False)) == results(serial)


def test_finished_trials_are_not_run_again_and_a_wider_grid_runs_what_is_new(
    make_study: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_study()
    trained: list[str] = []
    original = execution.train
    monkeypatch.setattr(execution, "train", lambda r, **options: trained.append(r.name) or original(r, **options))
    first = study(recipe, workers=0, progress=False)
    assert sorted(trained) == sorted(trial.id for trial in first.plan.trials)
    again = study(recipe, workers=0, progress=False)
    assert len(trained) == 8
    assert results(again) == results(first)
    wider = make_study(grid={**recipe["grid"], "seed": [0, 1, 2]})
    found = study(wider, workers=0, progress=False)
    assert len(trained) == 12
    check_tables(found)


def test_two_drivers_on_one_folder_do_no_cell_twice(make_study: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    recipe = make_study()
    drivers = [drive(recipe, tmp_path) for _ in range(2)]
    assert [driver.wait(200) for driver in drivers] == [0, 0]
    found = study(recipe, workers=0, progress=False)
    assert len(found.outcomes) == 8
    for trial in found.plan.trials:  # a run that was begun twice would have noted that it was resumed
        environment = json.loads((found.folder / "trials" / trial.id / "environment.json").read_text())
        assert "resumed" not in environment


def test_out_of_memory_is_retried_with_smaller_passes_and_the_same_result(
    make_study: Callable[..., dict[str, Any]], assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the masks of dropout are drawn for each pass, so that other passes have other masks
    model = shutil.copytree(assets / "bert", tmp_path / "without-dropout")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.0}))
    options = {"set": {"method.lora_dropout": 0.0, "model.name": str(model)}}
    grid = {"method.name": ["lora"], "seed": [0]}
    right = study(make_study("right", grid, **options), workers=0, progress=False)
    original = execution.train

    def full(recipe: Any, **arguments: Any) -> Any:
        if (recipe.training.micro_batch_size or recipe.training.batch_size) > 4:
            raise torch.OutOfMemoryError("planted")
        return original(recipe, **arguments)

    monkeypatch.setattr(execution, "train", full)
    found = study(make_study("planted", grid, **options), workers=0, progress=False)
    (outcome,), (expected,) = found.outcomes.values(), right.outcomes.values()
    assert "passes of 4 rows" in outcome.notes[0]
    assert outcome.metrics["nll"] == pytest.approx(expected.metrics["nll"], abs=1e-5)
    table = (found.folder / "summary.md").read_text()
    assert "- lora (all), 1 of 1 trials: out of memory: passes of 4 rows, gradients accumulated\n" in table


def test_failed_trials_are_retried_and_diverged_ones_are_results(
    make_study: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def fail(recipe: Any, **arguments: Any) -> Any:
        tries.append(recipe.seed)
        raise DivergenceError("the loss is not finite at step 3") if recipe.seed else OSError("no such disk")

    monkeypatch.setattr(execution, "train", fail)
    found = study(make_study(grid={"method.name": ["lora"], "seed": [0, 1]}, retries=1), workers=0, progress=False)
    by_seed = {trial.seed: found.outcomes[trial.id] for trial in found.plan.trials}
    assert (by_seed[0].status, by_seed[0].reason) == ("failed", "OSError: no such disk")
    assert (by_seed[1].status, by_seed[1].reason) == ("diverged", "the loss is not finite at step 3")
    assert sorted(tries) == [0, 0, 1]


def check_tables(found: StudyResult) -> None:
    """They have every trial and every statistic."""
    table = pq.read_table(found.folder / "results.parquet").to_pylist()
    assert {row["trial"]: row["nll"] for row in table} == {
        identity: outcome.metrics["nll"] for identity, outcome in found.outcomes.items()
    }
    assert all(row["tokens"] > 0 and row["validation_nll"] > 0 for row in table)
    assert (found.folder / "summary.md").read_text().count("\n| ") == 1 + len(found.summaries)
    assert (found.folder / "summary.tex").read_text().count(r"\\") == 1 + len(found.summaries)
    page = write_study_report(found.folder).read_text()
    assert all(identity in page for identity in found.outcomes)
    assert page.count("curve-") >= len(found.outcomes)


def test_wrong_keys_of_a_grid_are_refused_before_anything_is_written(
    make_study: Callable[..., dict[str, Any]],
) -> None:
    recipe = make_study(grid={"training.lerning_rate": [1e-3]})
    with pytest.raises(ConfigError, match=r"training\.learning_rate"):
        study(recipe, workers=0, progress=False)
    assert not Path(recipe["output"]).exists()


def test_an_option_that_a_method_lacks_makes_no_trials_of_its_own(make_study: Callable[..., dict[str, Any]]) -> None:
    grid = {"method.name": ["lora", "monteclora"], "method.num_components": [2, 4], "seed": [0]}
    trials = make_plan(load_study(make_study(grid=grid))).trials
    assert sorted(trial.arm for trial in trials) == ["lora", "monteclora", "monteclora"]


def test_a_study_that_is_cut_short_compares_all_arms(make_study: Callable[..., dict[str, Any]]) -> None:
    plan = make_plan(load_study(make_study(max_trials=5)))
    assert len(plan.trials) == 4
    cells = {arm: {(t.seed, str(t.settings)) for t in plan.trials if t.arm == arm} for arm in ("lora", "monteclora")}
    assert cells["lora"] == cells["monteclora"]
    assert any("left out" in note for note in plan.notes)


@pytest.mark.parametrize(("name", "count"), [("study-helpdesk", 288), ("study-helpdesk-starter", 12)])
def test_bundled_studies_have_the_trials_that_their_grid_says(name: str, count: int) -> None:
    trials = make_plan(load_study(name)).trials
    assert len(trials) == len({trial.id for trial in trials}) == count


def test_trials_are_evaluated_as_the_study_says(make_study: Callable[..., dict[str, Any]]) -> None:
    grid = {"method.name": ["monteclora"], "seed": [0]}
    found = study(make_study(grid=grid, split="validation", sampler="mean", calibrator="temperature"), workers=0)
    (outcome,) = found.outcomes.values()
    result = evaluate(
        found.folder / "trials" / outcome.trial, "validation", sampler="mean", calibrator="temperature", progress=False
    )
    assert dict(outcome.metrics) == dict(result.point)
    wrong = make_study(grid=grid, sampler="posterio")
    with pytest.raises(ConfigError, match="sampler is 'ensemble', expected one of mean, posterior, mc_dropout"):
        study(make_study(grid=grid, sampler="ensemble"), workers=0)  # a trial is one run
    with pytest.raises(ConfigError, match="sampler is 'posterio', expected one of mean, posterior"):
        study(wrong, workers=0)


def test_a_rate_that_is_found_and_going_back_are_settings_like_others(
    make_study: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_test, "STEPS_PER_DECADE", 2)
    monkeypatch.setattr(range_test, "MOST_STEPS", 15)
    grid = {"method.name": ["lora"], "training.learning_rate": ["auto", 1e-2], "training.back_off": [0, 1], "seed": [0]}
    result = study(make_study(grid=grid), workers=0)
    notes = {
        (trial.settings["training.learning_rate"], trial.settings["training.back_off"]): result.outcomes[trial.id].notes
        for trial in result.plan.trials
    }
    assert len(notes) == 4
    assert all(outcome.status == "finished" for outcome in result.outcomes.values())
    for (rate, _), found in notes.items():
        assert any("found by a range test of 1" in note for note in found) is (rate == "auto")
    page = write_study_report(result.folder).read_text()
    assert "auto" in page
