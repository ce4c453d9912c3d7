import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from monteclora import evaluate, export_samples
from monteclora.adapters.rescaling import posterior_scale, rescale_posterior
from monteclora.data.splitting import carve_validation
from monteclora.errors import ConfigError, DataError
from monteclora.evaluation.calibrate import calibrate, undo_calibration
from monteclora.metrics.registry import measure
from monteclora.prediction.predictions import Predictions
from monteclora.prediction.temperature import Temperature
from monteclora.runs.loading import load_run
from monteclora.training.run import train
from tests.finished_runs import LABELS, texts, tiny_recipe, write_rows


def quietly(run, **kwargs):
    return evaluate(run, progress=False, **kwargs)


@pytest.fixture(scope="module")
def noisy(assets, tmp_path_factory):
    """A run with visible noise and 40 validation rows, some with a wrong label."""
    folder = tmp_path_factory.mktemp("noisy")
    rows = texts(40, seed=5)
    for row in rows[::4]:
        row["label"] = LABELS[(LABELS.index(row["label"]) + 1) % 3]
    recipe = tiny_recipe(assets, folder / "run")
    recipe["data"]["validation_file"] = str(write_rows(folder / "validation.jsonl", rows))
    recipe["method"]["sample_scale"] = "relative:1.0"
    recipe["training"] |= {"max_steps": 25, "learning_rate": 5e-2}
    train(recipe, progress=False)
    return folder / "run"


@pytest.fixture
def run(noisy, tmp_path):
    return shutil.copytree(noisy, tmp_path / "run")


def test_the_scale_is_the_best_of_its_curve_and_is_in_force_afterwards(run):
    result = calibrate(run, progress=False)
    nlls = {scale: metrics["nll"] for scale, metrics in result.curve.items()}
    assert result.factor == min(nlls, key=nlls.get)
    assert list(nlls) == sorted(nlls)
    assert len(nlls) == 15
    assert result.rows[0] + result.rows[1] == 40
    assert posterior_scale(run / "adapter")["factor"] == result.factor
    stored = json.loads((run / "calibration.json").read_text())["posterior_scale"]
    assert [point["scale"] for point in stored["curve"]] == list(nlls)
    assert stored["report"]["calibrated"] == pytest.approx(result.report["calibrated"])


def test_scale_zero_is_the_mean_and_one_is_as_trained(run):
    before = quietly(run)
    for factor, expected in ((0.0, before.scored.at_mean), (1.0, before.scored.predictions)):
        rescale_posterior(run / "adapter", factor, {})
        found = quietly(run).scored.predictions
        np.testing.assert_allclose(found.probs, expected.probs, atol=1e-6)
    result = calibrate(run, progress=False)
    assert result.curve[0.0] == pytest.approx(calibrate(run, progress=False).curve[0.0], abs=1e-6)


def test_the_curve_does_not_depend_on_the_scale_in_force(run):
    first = calibrate(run, progress=False)
    rescale_posterior(run / "adapter", 0.0, {})
    again = calibrate(run, progress=False)
    assert again.factor == first.factor
    for scale, metrics in first.curve.items():
        assert again.curve[scale] == pytest.approx(metrics, abs=1e-6)


def test_undo_puts_back_the_very_file(run):
    path = run / "adapter" / "posterior.safetensors"
    before = path.read_bytes()
    assert not undo_calibration(run)
    calibrate(run, progress=False)
    calibrate(run, progress=False)
    assert path.read_bytes() != before
    assert undo_calibration(run)
    assert path.read_bytes() == before
    assert "posterior_scale" not in json.loads((run / "calibration.json").read_text())


def test_exported_draws_and_saved_adapters_have_the_scale(run, tmp_path):
    plain = load_run(run)
    export_samples(plain.model, tmp_path / "plain", 1)
    rescale_posterior(run / "adapter", 5.0, {"criterion": "by hand"})
    scaled = load_run(run)
    export_samples(scaled.model, tmp_path / "scaled", 1)
    mean = load_file(run / "adapter" / "adapter_model.safetensors")
    one, other = (load_file(tmp_path / n / "sample-0" / "adapter_model.safetensors") for n in ("plain", "scaled"))
    for name in mean:
        torch.testing.assert_close(other[name] - mean[name], 5.0 * (one[name] - mean[name]), atol=1e-5, rtol=1e-4)
    scaled.model.save_pretrained(tmp_path / "saved")
    assert posterior_scale(tmp_path / "saved") == posterior_scale(run / "adapter")


def test_with_a_tolerance_the_largest_scale_that_keeps_to_it(run):
    result = calibrate(run, tolerance=0.1, progress=False)
    accuracy = {scale: metrics["accuracy"] for scale, metrics in result.curve.items()}
    within = [scale for scale in accuracy if accuracy[scale] >= accuracy[0.0] - 0.1 - 1e-12]
    assert result.factor in within
    assert all(scale in within for scale in accuracy if scale <= result.factor)
    above = [scale for scale in accuracy if scale > result.factor]
    assert not above or min(above) not in within
    assert calibrate(run, tolerance=0.99, progress=False).factor == 64.0


def test_a_temperature_is_fitted_anew_at_the_new_scale(run):
    before = quietly(run, calibrator="temperature").notes
    rescale_posterior(run / "adapter", 8.0, {})
    assert quietly(run, calibrator="temperature").notes != before


def test_what_cannot_be_calibrated_is_refused(trained, assets, tmp_path):
    full = tiny_recipe(assets, tmp_path / "full")
    train({**full, "method": {"name": "full"}}, progress=False)
    with pytest.raises(ConfigError, match=r"method full of .* has no posterior to scale, and no LoRA adapter"):
        calibrate(tmp_path / "full", progress=False)
    with pytest.raises(ConfigError, match=r"rows are isotropic, and .* has a posterior that was trained"):
        calibrate(trained["texts"], rows="isotropic", progress=False)
    with pytest.raises(ConfigError, match=r"base is given, and .* is a run with its own"):
        calibrate(trained["texts"], base="minilm", progress=False)
    with pytest.raises(ConfigError, match="tolerance is 2"):
        calibrate(trained["texts"], tolerance=2.0, progress=False)
    with pytest.raises(ConfigError, match="num_samples is 0"):
        calibrate(trained["texts"], num_samples=0, progress=False)
    with pytest.raises(ConfigError, match="scale is -1"):
        rescale_posterior(trained["texts"] / "adapter", -1.0, {})
    recipe = tiny_recipe(assets, tmp_path / "run")
    recipe["data"]["validation_fraction"] = 0.0
    train(recipe, progress=False)
    with pytest.raises(DataError, match="0 validation rows, too few"):
        calibrate(tmp_path / "run", progress=False)


def test_scale_then_temperature_in_one_go(run, monkeypatch):
    result = calibrate(run, temperature=True, seed=2, progress=False)
    plain = calibrate(run, seed=2, progress=False)  # the same scale, and so the same weights
    assert plain.factor == result.factor
    assert plain.temperature is None
    assert plain.report == {name: plain.report[name] for name in ("mean", "trained", "calibrated")}

    # by hand, from the predictions of the validation rows at the chosen scale
    validation = quietly(run, split="validation", seed=2)
    fit, held_out = carve_validation(validation.rows, 0.5, 0, "rows")
    place = {text: i for i, text in enumerate(validation.rows["text"])}
    at_scale = validation.scored.predictions

    def of(rows):
        chosen = [place[text] for text in rows["text"]]
        return Predictions(at_scale.log_probs[:, chosen], at_scale.labels[chosen])

    expected = Temperature.fit(of(fit))
    assert result.temperature == pytest.approx(expected.temperature, rel=1e-3)
    corrected = expected.apply(of(held_out))
    found = measure("classes", corrected.probs, corrected.labels)
    assert result.report["calibrated + temperature"] == pytest.approx(found, abs=1e-4)

    monkeypatch.setattr(Temperature, "fit", lambda *_: pytest.fail("fitted again"))
    used = quietly(run, calibrator="temperature", seed=2)
    assert any(f"temperature {result.temperature:.3f}, fitted to {len(fit)} validation" in note for note in used.notes)


def test_no_scale_is_predicted_twice_and_the_mean_needs_no_draws(run, monkeypatch):
    """Forward passes: of the mean once a half, of draws at every scale but 0; the temperature needs no more."""
    loaded, passes = load_run(run), []
    loaded.model.register_forward_pre_hook(lambda *_: passes.append(len(_[1])))
    monkeypatch.setattr("monteclora.evaluation.calibrate.load_run", lambda *_: loaded)
    result = calibrate(run, temperature=True, num_samples=3, batch_size=64, progress=False)  # a pass is a half
    scales = set(result.curve)
    reported = {0.0, 1.0, result.factor}
    measured = [*scales, *reported, result.factor]  # the last with the temperature
    assert len(passes) == 2 + sum(0 if scale == 0.0 else 3 for scale in measured)


def test_a_temperature_of_completions_is_refused_before_anything_is_measured(trained, tmp_path):
    pairs = shutil.copytree(trained["pairs"], tmp_path / "pairs")
    before = (pairs / "adapter" / "posterior.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="a temperature needs probabilities of classes, options or labels"):
        calibrate(pairs, temperature=True, progress=False)
    assert (pairs / "adapter" / "posterior.safetensors").read_bytes() == before
    assert not (pairs / "calibration.json").exists()


@pytest.mark.parametrize("rows", ["equal", "isotropic"])
def test_a_plain_lora_run_gets_a_posterior_that_evaluation_uses_until_undone(assets, tmp_path, rows):
    recipe = tiny_recipe(assets, tmp_path / "run", method="lora")
    recipe["data"]["validation_fraction"] = 0.4
    recipe["training"] |= {"max_steps": 25, "learning_rate": 5e-2}
    run = train(recipe, progress=False).folder
    files = {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    plain = quietly(run)
    assert plain.posterior is None
    result = calibrate(run, rows=rows, tolerance=0.99, progress=False)  # the largest scale
    assert (result.grafted, list(result.report), result.factor) == (rows, ["mean", "calibrated"], 64.0)
    found = quietly(run)
    assert (found.sampler, found.num_samples) == ("posterior", 3)
    np.testing.assert_allclose(found.scored.at_mean.probs, plain.scored.at_mean.probs, atol=1e-5)
    assert np.median(found.scored.predictions.epistemic) > 1e-6
    assert calibrate(run, tolerance=0.99, progress=False).grafted == rows
    other = {"equal": "isotropic", "isotropic": "equal"}[rows]
    with pytest.raises(ConfigError, match=f"rows are {other}, and .* has a posterior with {rows} rows"):
        calibrate(run, rows=other, progress=False)
    assert undo_calibration(run)
    assert not undo_calibration(run)
    assert {path.name: path.read_bytes() for path in (run / "adapter").iterdir()} == files
    assert quietly(run).posterior is None


def test_a_scale_is_fitted_for_the_blocks_that_are_drawn_and_used_with_them(run):
    result = calibrate(run, layers=1, num_samples=3, temperature=True, progress=False)
    assert result.layers == posterior_scale(run / "adapter")["layers"] == 1
    found = quietly(run, split="validation", num_samples=3)
    assert (found.layers, found.facts()["layers"]) == (1, 1)
    held_out = carve_validation(found.rows, 0.5, 0, "rows")[1]["text"]
    place = [found.rows["text"].index(text) for text in held_out]
    by_hand = measure("classes", found.scored.predictions.probs[place], found.scored.predictions.labels[place])
    assert result.report["calibrated"] == pytest.approx(by_hand, abs=1e-5)
    whole = quietly(run, split="validation", num_samples=3, layers=2)  # of the model's two blocks
    assert not np.allclose(whole.scored.predictions.probs, found.scored.predictions.probs, atol=1e-4)
    assert len(json.loads((run / "calibration.json").read_text())["calibrators"]) == 2
    assert quietly(run, layers=2, num_samples=3, calibrator="temperature").calibrator == "temperature"
    assert len(json.loads((run / "calibration.json").read_text())["calibrators"]) == 3
    with pytest.raises(ConfigError, match="layers is 3, and the model has 2 adapted blocks"):
        quietly(run, layers=3)
    with pytest.raises(ConfigError, match="layers is 1, and the sampler mean draws none"):
        quietly(run, layers=1, sampler="mean")


def test_the_card_has_the_numbers_of_the_held_out_half_and_keeps_what_people_wrote(run, tmp_path):
    adapter, readme = run / "adapter", run / "adapter" / "README.md"
    assert not readme.exists()
    result = calibrate(run, temperature=True, progress=False)
    text = readme.read_text()
    assert "library_name: peft" in text
    assert f"| calibrated | {result.report['calibrated']['accuracy']:.4f} |" in text
    assert "| calibrated + temperature |" in text
    load_run(run).model.save_pretrained(tmp_path / "saved")
    saved = (tmp_path / "saved" / "README.md").read_text()
    assert f"| calibrated | {result.report['calibrated']['accuracy']:.4f} |" in saved
    assert undo_calibration(run)
    assert not readme.exists()
    readme.write_text("# Mine\n")
    for _ in range(2):
        calibrate(run, progress=False)
    assert readme.read_text().startswith("# Mine\n")
    assert readme.read_text().count("## Calibration") == 1
    assert undo_calibration(run)
    assert readme.read_text() == "# Mine\n"
    assert adapter.is_dir()
