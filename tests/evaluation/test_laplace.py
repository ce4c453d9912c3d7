import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from monteclora import evaluate
from monteclora.data.encoding import encode
from monteclora.errors import CheckpointError, ConfigError, DataError
from monteclora.evaluation.laplace import laplace_of
from monteclora.evaluation.own_rows import halves, own_rows
from monteclora.evaluation.prediction import predict_file
from monteclora.prediction.laplace import LAPLACE_FILE, attach
from monteclora.prediction.laplace_marginals import logit_moments
from monteclora.runs.loading import load_run
from monteclora.tasks.classification import classify
from monteclora.training.run import train
from tests.finished_runs import tiny_recipe


def quietly(run, **kwargs):
    return evaluate(run, sampler="laplace", num_samples=kwargs.pop("num_samples", 6), progress=False, **kwargs)


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained["lora"], tmp_path / "lora")


@pytest.fixture
def fitted(run):
    pytest.importorskip("laplace")
    laplace_of(load_run(run))
    return run


def test_an_evaluation_fits_stores_and_says_so(run):
    pytest.importorskip("laplace")
    result = quietly(run)
    assert result.sampler == "laplace"
    assert result.variant == "adapter+laplace"
    assert 0.0 < result.scored.predictions.epistemic.max() < np.log(3)
    assert result.posterior["nll"] != pytest.approx(result.point["nll"], abs=1e-6)
    (note,) = [note for note in result.notes if note.startswith("Laplace")]
    assert note.startswith("Laplace approximation (kron, prior precision ")
    assert "fitted to 33 training rows" in note  # 36 without those for validation
    facts = json.loads((run / "evaluation.json").read_text())["splits"]["test"]["adapter+laplace"]
    assert facts["cost"]["laplace"]["forward_passes"] == 2  # fifteen rows in batches of eight, whatever the draws
    with safe_open(run / LAPLACE_FILE, framework="pt") as file:
        assert json.loads(file.metadata()["structure"]) == "kron"


def test_validation_rows_choose_the_prior_precision(assets, tmp_path):
    pytest.importorskip("laplace")
    recipe = tiny_recipe(assets, tmp_path / "run", method="lora")
    recipe["data"]["validation_fraction"] = 0.5
    recipe["training"] |= {"max_steps": 60, "learning_rate": 0.03, "best_metric": None}
    run = train(recipe, progress=False).folder
    loaded = load_run(run)
    chosen = laplace_of(loaded)
    rows = own_rows(run, loaded.recipe.data, "validation").split("validation")
    fit, _ = halves(rows, "texts")
    assert chosen.chosen_on == len(fit)

    def nll(factor):
        attach(loaded.model, dataclasses.replace(chosen, prior_precision=chosen.prior_precision * factor))
        many = loaded.sampler("laplace", 200)  # near the expectation, which is what chooses
        (found,), _ = classify(loaded.predictor(many), fit, (many,))
        labels = np.array(fit["label"])
        return -np.log(found.probs[np.arange(len(labels)), labels]).mean()

    encoded = encode(fit, loaded.kind, loaded.tokenizer, loaded.recipe.data.max_length).dataset.to_list()
    near = [chosen.prior_precision * factor for factor in (10**-0.5, 1.0, 10**0.5)]
    moments = logit_moments(loaded.model, chosen, encoded, loaded.collate, near)
    lower, best, higher = moments.nll(torch.tensor([row["labels"] for row in encoded])).mean(1).tolist()
    assert best <= min(lower, higher) + 1e-4
    assert nll(1) == pytest.approx(best, abs=1e-2)  # of draws of the weights
    assert nll(1) < nll(1e-4) - 1e-2
    (note,) = [note for note in quietly(run).notes if note.startswith("Laplace")]
    assert f"by the smallest NLL of {len(fit)} validation rows" in note


def test_a_file_that_validation_rows_did_not_choose_is_fitted_again(fitted):
    path = fitted / LAPLACE_FILE
    with safe_open(path, framework="pt") as file:
        parts, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    del about["chosen_on"]
    save_file(parts, path, {**about, "format": "1"})
    laplace_of(load_run(fitted))
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "2"


def test_the_same_again_is_neither_fitted_nor_other(fitted, monkeypatch):
    before = (fitted / LAPLACE_FILE).read_bytes()
    first = quietly(fitted)
    monkeypatch.setitem(sys.modules, "laplace", None)  # what is fitted is read without laplace-torch
    again = quietly(fitted)
    np.testing.assert_array_equal(again.scored.predictions.log_probs, first.scored.predictions.log_probs)
    assert (fitted / LAPLACE_FILE).read_bytes() == before


def test_other_weights_are_fitted_anew(fitted, assets):
    old = laplace_of(load_run(fitted))
    recipe = tiny_recipe(assets, fitted.parent / "other", method="lora")
    recipe["training"]["max_steps"] = 4
    other = train(recipe, progress=False).folder
    shutil.rmtree(fitted / "adapter")
    shutil.copytree(other / "adapter", fitted / "adapter")
    assert laplace_of(load_run(fitted)).weights != old.weights


def test_a_file_is_predicted_and_calibrated(fitted, assets, tmp_path):
    found = predict_file(
        fitted, assets / "texts-test.jsonl", tmp_path / "out.parquet", sampler="laplace", num_samples=3, progress=False
    )
    assert (found.sampler, found.num_samples) == ("laplace", 3)
    assert any(note.startswith("Laplace approximation") for note in found.notes)
    calibrated = quietly(fitted, calibrator="temperature")
    assert calibrated.variant == "adapter+laplace+temperature"


@pytest.mark.parametrize("method", ["dora", "adalora", "ia3", "prompt_tuning", "loraplus"])
def test_other_adapters_are_fitted_too(method, assets, tmp_path):
    pytest.importorskip("laplace")
    recipe = tiny_recipe(assets, tmp_path / method, method=method)
    if method in ("adalora", "ia3", "prompt_tuning"):
        del recipe["method"]["r"]
    result = quietly(train(recipe, progress=False))
    assert result.scored.predictions.epistemic.max() > 0
    note = next(note for note in result.notes if note.startswith("Laplace"))
    assert ("(kron," if method == "loraplus" else "(diag,") in note


def test_what_cannot_be_given_one_is_refused_by_name(trained, run, monkeypatch):
    with pytest.raises(ConfigError, match=r"laplace is for classifiers, and .*questions is a run of causal_lm"):
        quietly(trained["questions"])
    with pytest.raises(ConfigError, match="trained with the method monteclora"):
        quietly(trained["texts"])
    with pytest.raises(ConfigError, match="num_samples is 0, and the sampler laplace draws"):
        quietly(run, num_samples=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'laplace-torch, which is not installed.*"monteclora\[laplace\]"'):
        quietly(run)
    assert not (run / LAPLACE_FILE).exists()


def test_rows_that_changed_and_damage_are_told(fitted, assets, tmp_path):
    path = fitted / LAPLACE_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"laplace.safetensors cannot be read"):
        quietly(fitted)
    path.unlink()
    rows = assets / "texts-train.jsonl"
    changed = tmp_path / "texts-train.jsonl"
    changed.write_text(rows.read_text().replace("apple", "berry", 1))
    recipe = fitted / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(rows), str(changed)))
    with pytest.raises(DataError, match=r"the train rows of .* changed since"):
        quietly(fitted)
