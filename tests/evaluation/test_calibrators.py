import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from monteclora import evaluate
from monteclora.errors import CheckpointError, ConfigError, DataError
from monteclora.evaluation.prediction import predict_file
from monteclora.prediction.temperature import Temperature
from monteclora.training.run import train
from tests.finished_runs import tiny_recipe, write_rows


def quietly(run, *args, **kwargs):
    return evaluate(run, *args, progress=False, **kwargs)


@pytest.fixture
def copied(trained, tmp_path):
    return lambda name: shutil.copytree(trained[name], tmp_path / name)


def test_the_temperature_is_the_one_of_the_validation_rows(copied):
    run = copied("texts")
    plain, validation = quietly(run), quietly(run, "validation")
    result = quietly(run, calibrator="temperature")
    for before, after, fit_to in (
        (plain.scored.predictions, result.scored.predictions, validation.scored.predictions),
        (plain.scored.at_mean, result.scored.at_mean, validation.scored.at_mean),
    ):
        expected = Temperature.fit(fit_to).apply(before)
        np.testing.assert_allclose(after.probs, expected.probs, atol=1e-6)
    assert any("temperature" in note and "validation rows" in note for note in result.notes)
    assert (result.calibrator, result.variant) == ("temperature", "adapter+temperature")


def test_what_was_fitted_is_stored_and_found_again(copied, monkeypatch):
    run = copied("texts")
    first = quietly(run, calibrator="temperature")
    stored = json.loads((run / "calibration.json").read_text())["calibrators"]
    assert set(stored) == {"temperature/mean", "temperature/posterior/3 draws/seed 0"}
    assert all(fit["split"] == "validation" and fit["rows"] > 0 for fit in stored.values())
    monkeypatch.setattr(Temperature, "fit", lambda *_: pytest.fail("fitted again"))
    again = quietly(run, calibrator="temperature")
    np.testing.assert_array_equal(first.scored.predictions.probs, again.scored.predictions.probs)


def test_another_adapter_is_calibrated_anew(copied, trained):
    run = copied("texts")
    quietly(run, calibrator="temperature")
    before = json.loads((run / "calibration.json").read_text())["calibrators"]["temperature/mean"]
    (run / "adapter" / "another.safetensors").write_bytes(b"")
    quietly(run, calibrator="temperature")
    after = json.loads((run / "calibration.json").read_text())["calibrators"]["temperature/mean"]
    assert before["weights_sha256"] != after["weights_sha256"]


def test_evaluating_on_the_rows_of_the_fit_says_so(copied):
    result = quietly(copied("texts"), "validation", calibrator="temperature")
    assert any("was fitted to these rows" in note for note in result.notes)


def test_options_are_calibrated(copied):
    run = copied("questions")
    plain, result = quietly(run), quietly(run, calibrator="temperature")
    assert result.point["accuracy"] == plain.point["accuracy"]
    assert result.point["nll"] != plain.point["nll"]


def test_completions_have_nothing_to_calibrate(copied):
    with pytest.raises(ConfigError, match="needs probabilities of classes, options or labels"):
        quietly(copied("pairs"), calibrator="temperature")


def test_a_run_without_validation_rows_is_refused(assets, tmp_path):
    recipe = tiny_recipe(assets, tmp_path / "run")
    recipe["data"]["validation_fraction"] = 0.0
    train(recipe, progress=False)
    with pytest.raises(DataError, match="has no validation rows to fit the calibrator temperature to"):
        quietly(tmp_path / "run", calibrator="temperature")


def test_a_damaged_file_is_refused(copied):
    run = copied("texts")
    (run / "calibration.json").write_text('{"format": 1, "calibrators": 3}')
    with pytest.raises(CheckpointError, match=r"calibration\.json is damaged"):
        quietly(run, calibrator="temperature")


def test_new_rows_are_predicted_as_the_evaluation_predicts(copied, tmp_path):
    run = copied("texts")
    expected = quietly(run, calibrator="temperature")
    file = write_rows(tmp_path / "new.jsonl", [{"text": row["text"]} for row in expected.rows])
    found = predict_file(run, file, tmp_path / "out.parquet", calibrator="temperature", progress=False)
    assert (found.sampler, found.calibrator) == ("posterior", "temperature")
    confidence = pq.read_table(found.path)["confidence"].to_numpy()
    np.testing.assert_allclose(confidence, expected.scored.predictions.probs.max(1), atol=1e-6)


def test_evaluations_with_other_samplers_stand_beside_each_other(assets, tmp_path):
    recipe = tiny_recipe(assets, tmp_path / "run", method="lora")
    recipe["method"]["lora_dropout"] = 0.3
    train(recipe, progress=False)
    quietly(tmp_path / "run")
    result = quietly(tmp_path / "run", sampler="mc_dropout", num_samples=4)
    assert result.scored.predictions.epistemic.min() > 0
    document = json.loads((tmp_path / "run" / "evaluation.json").read_text())["splits"]["test"]
    assert set(document) == {"adapter", "adapter+mc_dropout"}
    facts = document["adapter+mc_dropout"]
    assert (facts["sampler"], facts["calibrator"], facts["num_samples"]) == ("mc_dropout", "none", 4)
    assert facts["cost"]["mc_dropout"]["forward_passes"] == 4 * facts["cost"]["mean"]["forward_passes"] == 8
    models = pq.read_table(tmp_path / "run" / "predictions.parquet")["model"].to_pylist()
    assert models.count("adapter") == models.count("adapter+mc_dropout") == 15


def test_what_a_sampler_cannot_draw_is_refused_by_name(copied):
    run = copied("lora")
    with pytest.raises(ConfigError, match="method lora has no posterior for the sampler posterior"):
        quietly(run, sampler="posterior")
    with pytest.raises(ConfigError, match="sampler mean draws nothing"):
        quietly(run, sampler="mean", num_samples=3)
    with pytest.raises(ConfigError, match="num_samples is 0, and the sampler mc_dropout draws"):
        quietly(run, sampler="mc_dropout", num_samples=0)
