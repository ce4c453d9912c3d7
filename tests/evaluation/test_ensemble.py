import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from monteclora import evaluate
from monteclora.cli import main
from monteclora.errors import CheckpointError, ConfigError
from monteclora.evaluation.prediction import predict_file
from monteclora.metrics.registry import measure
from monteclora.prediction.temperature import Temperature
from monteclora.runs import ensemble
from monteclora.training.run import train
from tests.finished_runs import tiny_recipe


def quietly(run, *args, **kwargs):
    return evaluate(run, *args, progress=False, **kwargs)


def together(*runs, **kwargs):
    return quietly(runs, sampler="ensemble", **kwargs)


@pytest.fixture
def copied(trained, tmp_path):
    def copy(name, to=None):
        return shutil.copytree(trained[name], tmp_path / (to or name))

    return copy


@pytest.fixture(scope="module")
def longer(assets, tmp_path_factory):
    """A LoRA run on texts that came further, so that its probabilities are others."""
    recipe = tiny_recipe(assets, tmp_path_factory.mktemp("longer") / "longer", method="lora")
    recipe["seed"] = 1
    recipe["training"] |= {"max_steps": 20, "learning_rate": 0.2}
    return train(recipe, progress=False).folder


@pytest.fixture
def never_loaded(monkeypatch):
    """Refusals must come before the weights of any member are read."""
    monkeypatch.setattr(ensemble, "load_run", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("name", ["texts", "questions", "pairs"])
def test_an_ensemble_of_copies_of_a_run_is_that_run(copied, name):
    """Of classes, options and completions alike."""
    one, other = copied(name), copied(name, "copy")
    alone, both = quietly(one, num_samples=0), together(one, other)
    assert both.posterior == pytest.approx(alone.point, abs=1e-12)
    assert both.point == alone.point
    assert np.abs(both.scored.predictions.epistemic).max() < 1e-12
    if name == "texts":
        np.testing.assert_allclose(both.scored.predictions.probs, alone.scored.predictions.probs, rtol=0, atol=1e-12)


def test_the_probabilities_are_the_mean_over_runs_in_whichever_order(copied, longer, tmp_path):
    """Members may be of different methods and seeds."""
    runs = [copied("texts"), shutil.copytree(longer, tmp_path / "longer")]
    alone = [quietly(run, num_samples=0).scored.predictions.probs for run in runs]
    result, turned = together(*runs), together(*reversed(runs))
    probs = result.scored.predictions.probs
    np.testing.assert_allclose(probs, (alone[0] + alone[1]) / 2, rtol=0, atol=1e-12)
    np.testing.assert_allclose(turned.scored.predictions.probs, probs, rtol=0, atol=1e-12)
    assert np.abs(alone[0] - alone[1]).max() > 0.05
    assert result.scored.predictions.epistemic.max() > 0
    labels = result.scored.predictions.labels
    assert result.posterior == pytest.approx(measure("classes", probs, labels))


def test_the_record_names_the_members_and_what_they_cost(copied):
    runs = [copied("texts"), copied("lora")]
    result = together(*runs)
    facts = json.loads((runs[0] / "evaluation.json").read_text())["splits"]["test"]["adapter+ensemble"]
    assert facts["members"] == [str(run) for run in runs]
    assert (facts["sampler"], facts["num_samples"]) == ("ensemble", 2)
    assert facts["cost"]["mean"]["forward_passes"] == 2  # fifteen rows in batches of eight
    assert facts["cost"]["ensemble"]["forward_passes"] == 4
    assert facts["cost"]["ensemble"]["seconds"] > 0
    models = pq.read_table(runs[0] / "predictions.parquet")["model"].to_pylist()
    assert models.count("adapter+ensemble") == 15
    assert not (runs[1] / "evaluation.json").exists()
    assert result.members == tuple(runs)


def test_a_temperature_is_fitted_to_the_ensemble_and_to_no_other_one(copied):
    one, two, three = copied("texts"), copied("lora"), copied("texts", "third")
    validation = together(one, two, split="validation")
    expected = Temperature.fit(validation.scored.predictions).apply(together(one, two).scored.predictions)
    calibrated = together(one, two, calibrator="temperature")
    np.testing.assert_allclose(calibrated.scored.predictions.probs, expected.probs, atol=1e-6)
    assert calibrated.variant == "adapter+ensemble+temperature"

    def fits():
        return set(json.loads((one / "calibration.json").read_text())["calibrators"])

    before = fits()
    together(one, two, calibrator="temperature")
    assert fits() == before
    together(one, three, calibrator="temperature")
    assert len(fits() - before) == 1


def test_the_command_line_takes_several_runs(copied, capsys):
    runs = [str(copied("texts")), str(copied("lora"))]
    assert main(["evaluate", *runs, "--sampler", "ensemble"]) == 0
    shown = capsys.readouterr().out
    assert "first run alone" in shown
    assert "ensemble, 2 runs" in shown
    assert main(["evaluate", *runs]) == 2
    said = capsys.readouterr().err
    assert "2 runs were given with no sampler" in said
    assert "Add --sampler ensemble" in said


# refusals


@pytest.mark.usefixtures("never_loaded")
def test_arguments_that_do_not_fit_an_ensemble_are_refused(trained):
    one, two = trained["texts"], trained["lora"]
    with pytest.raises(ConfigError, match="needs two runs or more, and 1 was given"):
        quietly(one, sampler="ensemble")
    with pytest.raises(ConfigError, match="2 runs were given with the sampler mc_dropout"):
        quietly([one, two], sampler="mc_dropout")
    with pytest.raises(ConfigError, match="num_samples is 3, and an ensemble of 2 draws each run once"):
        together(one, two, num_samples=3)
    with pytest.raises(ConfigError, match="base does not go with the sampler ensemble"):
        together(one, two, base=True)
    with pytest.raises(ConfigError, match="allow_unfinished does not go with"):
        together(one, two, allow_unfinished=True)
    with pytest.raises(ConfigError, match="ood does not go with"):
        together(one, two, ood="rows.csv")
    with pytest.raises(ConfigError, match="is given twice"):
        together(one, two, one.parent / "." / one.name)


@pytest.mark.usefixtures("never_loaded")
def test_an_unfinished_member_is_refused(copied):
    one, two = copied("texts"), copied("lora")
    lines = (two / "metrics.jsonl").read_text().splitlines()
    (two / "metrics.jsonl").write_text("\n".join(line for line in lines if '"finished"' not in line) + "\n")
    with pytest.raises(CheckpointError, match=r"lora is not finished"):
        together(one, two)


@pytest.mark.usefixtures("never_loaded")
def test_runs_of_different_tasks_are_refused(trained):
    with pytest.raises(ConfigError, match=r"questions and .*texts differ in the task"):
        together(trained["texts"], trained["questions"])


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda data: data.update(label_names=["berry", "apple", "cherry"]), "the labels"),
        (lambda data: data["splits"]["train"].update(sha256="0" * 64), "the rows of train"),
        (lambda data: data["splits"].pop("validation"), "the splits"),
    ],
    ids=["labels", "rows", "splits"],
)
def test_members_that_saw_other_labels_or_rows_are_refused(copied, change, what):
    one, two = copied("texts"), copied("lora")
    environment = json.loads((two / "environment.json").read_text())
    change(environment["data"])
    (two / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(ConfigError, match=f"differ in {what}"):
        together(one, two)


def test_members_of_another_base_model_or_length_are_refused(copied, assets, tmp_path, request):
    other = tiny_recipe(assets, tmp_path / "shorter")
    other["data"]["max_length"] = 12
    train(other, progress=False)
    shutil.copytree(assets / "bert", tmp_path / "bert")
    another = tiny_recipe(assets, tmp_path / "another")
    another["model"]["name"] = str(tmp_path / "bert")
    train(another, progress=False)
    request.getfixturevalue("never_loaded")
    with pytest.raises(ConfigError, match=r"differ in data.max_length \(12, not 16\)"):
        together(copied("texts"), tmp_path / "shorter")
    with pytest.raises(ConfigError, match="differ in the base model"):
        together(tmp_path / "texts", tmp_path / "another")


def test_a_file_is_not_predicted_by_an_ensemble_of_one(trained, assets, tmp_path):
    with pytest.raises(ConfigError, match="an ensemble needs two runs or more"):
        predict_file(trained["texts"], assets / "texts-test.jsonl", tmp_path / "out.jsonl", sampler="ensemble")


def test_the_sampler_of_several_runs_says_what_is_wrong(trained):
    loaded = ensemble.load_ensemble([trained["texts"], trained["lora"]])
    with pytest.raises(ConfigError, match="2 runs predict together, and no sampler was named") as caught:
        loaded.sampler()
    assert "ensemble" in caught.value.hint
    with pytest.raises(ConfigError, match="2 runs predict together, and the sampler posterior is for one"):
        loaded.sampler("posterior", 4)
    with pytest.raises(ConfigError, match="num_samples is 3, and an ensemble of 2 draws each run once"):
        loaded.sampler("ensemble", 3)
    assert loaded.sampler("ensemble").num_samples == 2
