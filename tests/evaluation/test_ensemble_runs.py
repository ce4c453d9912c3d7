"""Runs whose recipe says ``ensemble``: trained as several runs, used as one."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

import monteclora
from monteclora import evaluate
from monteclora.cli import main
from monteclora.errors import CheckpointError, ConfigError
from monteclora.evaluation.calibrate import calibrate
from monteclora.evaluation.prediction import predict_file
from monteclora.reports.run_report import write_run_report
from monteclora.runs.determining import recipe_sha256
from monteclora.runs.loading import load_run
from monteclora.runs.recipe import load_recipe
from monteclora.studies.study import study
from monteclora.training.run import train
from tests.finished_runs import tiny_recipe
from tests.training.conftest import StopAfter, adapter_content, train_until


def recipe_of(assets, folder, **changes):
    return {**tiny_recipe(assets, folder, method="lora"), "ensemble": 2, "seed": 3, **changes}


@pytest.fixture(scope="module")
def made(assets, tmp_path_factory):
    """An ensemble of two, stopped in its second member and trained on."""
    folder = tmp_path_factory.mktemp("ensemble") / "run"
    recipe = recipe_of(assets, folder)
    recipe["training"] |= {"save_every": 1}
    with pytest.MonkeyPatch.context() as patch:
        train_until(patch, StopAfter(9), recipe)  # six steps each
    assert len(list((folder / "members").iterdir())) == 2
    with pytest.raises(CheckpointError, match=r"the ensemble .* is not finished"):
        evaluate(folder, progress=False)
    result = train(recipe, progress=False)
    assert train(recipe, progress=False) == result  # finished: nothing to train
    return result


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made.folder, tmp_path / "run")


@pytest.fixture(scope="module")
def alone(assets, tmp_path_factory):
    """The run of the second seed by itself."""
    recipe = recipe_of(assets, tmp_path_factory.mktemp("alone") / "four", seed=4, ensemble=1)
    return train(recipe, progress=False)


def test_a_member_is_the_run_of_its_seed_to_the_bit(made, alone):
    assert [path.name for path in made.members] == ["seed-3", "seed-4"]
    assert adapter_content(made.members[1]) == adapter_content(alone.folder)
    assert adapter_content(made.members[0]) != adapter_content(alone.folder)
    assert (made.steps, made.trained_parameters) == (2 * alone.steps, 2 * alone.trained_parameters)
    first = load_run(made.members[0])
    expected = [evaluate(run, "validation", progress=False).point["nll"] for run in made.members]
    assert made.metrics["nll"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert first.recipe.seed == 3


def test_the_run_predicts_as_its_members_together(run, alone):
    probs = [evaluate(folder, progress=False).scored.at_mean.probs for folder in sorted((run / "members").iterdir())]
    result = evaluate(run, progress=False)
    assert (result.sampler, result.num_samples, result.variant) == ("ensemble", 2, "adapter")
    np.testing.assert_allclose(result.scored.predictions.probs, np.mean(probs, 0), atol=1e-9)
    facts = json.loads((run / "evaluation.json").read_text())
    assert facts["recipe_sha256"] == recipe_sha256(load_recipe(run / "recipe.yaml"))
    assert len(facts["splits"]["test"]["adapter"]["members"]) == 2
    three = evaluate([run, alone.folder], sampler="ensemble", progress=False)
    assert three.num_samples == 3
    np.testing.assert_array_equal(
        evaluate(run, sampler="ensemble", progress=False).scored.predictions.log_probs,
        result.scored.predictions.log_probs,
    )


def test_texts_files_pages_and_calibrators_take_it(run, assets, tmp_path):
    answers = monteclora.load(run).predict(["w1 w2 w3", "w40 w41"])
    assert max(answers.epistemic) > 0
    found = predict_file(run, assets / "texts-test.jsonl", tmp_path / "out.parquet", progress=False)
    assert (found.sampler, found.num_samples) == ("ensemble", 2)
    calibrated = evaluate(run, calibrator="temperature", progress=False)
    assert calibrated.variant == "adapter+temperature"
    assert "means over 2 runs" in write_run_report(run, progress=False).read_text()


def test_several_runs_predict_a_file_together(run, alone, assets, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    members = [str(path) for path in sorted((run / "members").iterdir())]
    file = str(assets / "texts-test.jsonl")
    assert main(["predict", *members, file, "--sampler", "ensemble", "--out", "two.parquet"]) == 0
    assert "2 ensemble draws each" in capsys.readouterr().out
    assert main(["predict", str(run), file, "--out", "run.parquet"]) == 0
    columns = [pq.read_table(name)["confidence"].to_pylist() for name in ("two.parquet", "run.parquet")]
    assert columns[0] == pytest.approx(columns[1], abs=1e-9)
    capsys.readouterr()
    assert main(["predict", *members, file]) == 2
    assert "2 runs were given with no sampler. Add --sampler ensemble" in capsys.readouterr().err
    assert main(["predict", *members, "--text", "w1"]) == 2


def test_thresholds_belong_to_the_members_that_they_were_chosen_for(run, alone, assets, tmp_path):
    """Stored with the first run, whose own predictions have another one."""
    first, second = sorted((run / "members").iterdir())
    file, out = assets / "texts-test.jsonl", tmp_path / "out.parquet"

    def stored(*runs, **kwargs):
        predict_file(list(runs), file, out, progress=False, **kwargs)
        return json.loads((first / "abstention.json").read_text())["weights_sha256"]

    own = stored(first)
    both = stored(first, second, sampler="ensemble")
    assert own != both != stored(first, second, alone.folder, sampler="ensemble")
    assert own == stored(first)


def test_what_takes_a_single_run_says_so(run, capsys):
    with pytest.raises(ConfigError, match=r"is an ensemble of 2 runs, and calibration takes one.*seed-3"):
        calibrate(run, progress=False)
    with pytest.raises(ConfigError, match="the sampler mc_dropout is for one"):
        evaluate(run, sampler="mc_dropout", progress=False)
    assert main(["export", str(run), "--format", "merged"]) == 2
    assert "export takes one" in capsys.readouterr().err


def test_recipes_say_what_is_wrong(assets, tmp_path):
    with pytest.raises(ConfigError, match="ensemble is 0, expected at least 1"):
        load_recipe(recipe_of(assets, tmp_path / "a", ensemble=0))
    with pytest.raises(ConfigError, match="with those of the members"):
        load_recipe(recipe_of(assets, tmp_path / "a", seed=2**32 - 1))
    short = recipe_of(assets, tmp_path / "a", training={"max_steps": 1})
    train(short, progress=False)
    with pytest.raises(CheckpointError, match="started with another recipe: ensemble changed"):
        train({**short, "ensemble": 3}, progress=False)


def test_a_field_at_its_default_leaves_the_checksum_of_older_recipes(assets, tmp_path):
    recipe = recipe_of(assets, tmp_path / "a", ensemble=1)
    without = {key: value for key, value in recipe.items() if key != "ensemble"}
    assert recipe_sha256(load_recipe(recipe)) == recipe_sha256(load_recipe(without))
    assert recipe_sha256(load_recipe(recipe)) != recipe_sha256(load_recipe({**recipe, "ensemble": 2}))


def test_an_arm_of_a_study_can_be_an_ensemble(assets, tmp_path):
    base = tiny_recipe(assets, tmp_path / "base", method="lora")
    del base["output"], base["name"]
    base["training"]["max_steps"] = 2
    arms = {"one": {"set": {"method.name": "lora"}}, "two": {"set": {"method.name": "lora", "ensemble": 2}}}
    found = study(
        {"name": "s", "base": base, "arms": arms, "grid": {"seed": [0]}, "output": str(tmp_path / "s")}, progress=False
    )
    one, two = sorted((found.outcomes[trial.id] for trial in found.plan.trials), key=lambda o: o.trained_parameters)
    assert two.status == one.status == "finished"
    assert two.trained_parameters == 2 * one.trained_parameters
    assert two.metrics["nll"] != one.metrics["nll"]
    assert two.point["nll"] == pytest.approx(one.point["nll"], abs=1e-6)  # the first member has the seed of the study
    assert not list((found.folder / "trials").rglob("checkpoints"))
