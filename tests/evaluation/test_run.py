import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import monteclora
from monteclora import evaluate
from monteclora.data.encoding import Encoder
from monteclora.errors import CheckpointError, ConfigError, DataError
from monteclora.metrics.calibration import (
    classwise_calibration_error,
    equal_mass_calibration_error,
    smooth_calibration_error,
)
from monteclora.metrics.registry import measure
from monteclora.runs.loading import load_run
from monteclora.training.run import train
from tests.finished_runs import LABELS, tiny_recipe, write_rows

CLASSIFICATION = {"accuracy", "f1", "mcc", "nll", "brier", "ece"}
UNCERTAINTIES = ["total", "aleatoric", "epistemic"]


def quietly(run, *args, **kwargs):
    return evaluate(run, *args, progress=False, **kwargs)


@pytest.fixture
def copied(trained, tmp_path):
    """Makes a copy of a run that may be changed."""
    return lambda name: shutil.copytree(trained[name], tmp_path / name)


# classification


def test_classification_is_measured_at_the_mean_and_under_draws(copied):
    result = quietly(copied("texts"), seed=3)
    assert (result.split, result.source.rows, result.num_samples, result.model) == ("test", 15, 3, "adapter")
    assert set(result.point) == set(result.posterior) == CLASSIFICATION
    found, labels = result.scored.predictions, result.scored.predictions.labels
    assert result.point == pytest.approx(measure("classes", result.scored.at_mean.probs, labels))
    assert result.posterior == pytest.approx(measure("classes", found.probs, labels))
    assert result.posterior["nll"] != result.point["nll"]


def test_predictions_are_those_of_the_trained_model(assets, trained, copied):
    """The mean of the run folder through peft alone gives the same probabilities."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    result = quietly(copied("texts"), num_samples=0)
    model = AutoModelForSequenceClassification.from_pretrained(assets / "bert", num_labels=3)
    model = PeftModel.from_pretrained(model, trained["texts"] / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(assets / "bert")
    for i, row in enumerate(result.rows):
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], truncation=True, max_length=16, return_tensors="pt")).logits
        np.testing.assert_allclose(result.scored.at_mean.probs[i], logits.softmax(-1)[0].numpy(), atol=1e-5)


def test_predictions_parquet_holds_every_row(copied):
    result = quietly(copied("texts"))
    table = pq.read_table(result.folder / "predictions.parquet")
    first = ["split", "model", "index", "text", "label", "prediction", "confidence", "probabilities"]
    assert table.column_names == [*first, *UNCERTAINTIES]
    rows = table.to_pylist()
    assert [row["index"] for row in rows] == list(range(15))
    for row, source in zip(rows, result.rows, strict=True):
        assert row["text"] == source["text"]
        assert row["label"] == LABELS[source["label"]]
        probabilities = row["probabilities"]
        assert list(probabilities) == list(LABELS)
        assert sum(probabilities.values()) == pytest.approx(1)
        assert row["prediction"] == max(probabilities, key=probabilities.get)
        assert row["confidence"] == probabilities[row["prediction"]]
        assert row["total"] == pytest.approx(row["aleatoric"] + row["epistemic"], abs=1e-9)


def test_evaluation_json_keeps_every_split_and_the_latest_of_each(copied):
    run = copied("texts")
    quietly(run, "validation")
    quietly(run, "test", num_samples=2)
    last = quietly(run, "test", num_samples=0)
    document = json.loads((run / "evaluation.json").read_text())
    assert set(document["splits"]) == {"validation", "test"}
    assert document["method"] == "monteclora"
    facts = document["splits"]["test"]["adapter"]
    assert facts == json.loads(json.dumps(last.facts()))
    assert facts["posterior"] is None
    assert facts["versions"]["monteclora"] == monteclora.__version__
    counts = {
        split: pq.read_table(run / "predictions.parquet")["split"].to_pylist().count(split)
        for split in ("validation", "test")
    }
    assert counts == {"validation": document["splits"]["validation"]["adapter"]["rows"], "test": 15}


def test_the_same_seed_gives_the_same_draws_whatever_the_batches(copied):
    run = copied("texts")
    one, other = quietly(run, seed=1, batch_size=4), quietly(run, seed=1, batch_size=15)
    np.testing.assert_allclose(one.scored.predictions.probs, other.scored.predictions.probs, atol=1e-6)
    third = quietly(run, seed=2)
    assert not np.allclose(one.scored.predictions.probs, third.scored.predictions.probs, atol=1e-6)


def test_lora_has_no_posterior_to_sample(copied):
    run = copied("lora")
    result = quietly(run)
    assert result.posterior is None
    assert not result.scored.predictions.epistemic.any()
    with pytest.raises(ConfigError, match="num_samples is 4, and the method lora has no posterior"):
        quietly(run, num_samples=4)


def test_a_limit_takes_the_same_rows_every_time(copied):
    run = copied("texts")
    some, same = quietly(run, rows=6), quietly(run, rows=6, seed=9)
    assert some.rows["text"] == same.rows["text"]
    assert some.source.rows == 6
    assert some.source.sha256 == same.source.sha256 != quietly(run).source.sha256
    with pytest.raises(ConfigError, match="rows is 0"):
        quietly(run, rows=0)


# causal LM


def test_options_are_ranked_by_their_likelihood(copied):
    run = copied("questions")
    result = quietly(run)
    assert set(result.point) == {"accuracy", "nll", "brier", "ece"}
    assert result.posterior is not None
    loaded = load_run(run)
    for index, row in enumerate(result.rows):
        completions = [f"w80 w81 {option}" for option in row["options"]]
        scores = []
        for completion in completions:
            ids = Encoder(loaded.tokenizer).options(row["prompt"], [completion], 48)[0][0]["input_ids"]
            with torch.no_grad():
                log_probs = loaded.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            # from the first word of the option to the end token, which is left out
            start = len(ids) - 1 - len(completion.split()) + 2
            scores.append(sum(log_probs[i - 1, ids[i]].item() for i in range(start, len(ids) - 1)))
        expected = np.exp(scores) / np.exp(scores).sum()
        if len(loaded.tokenizer(row["prompt"])["input_ids"]) < 10:  # a longer prompt is cut
            np.testing.assert_allclose(result.scored.at_mean.probs[index, : len(scores)], expected, atol=1e-5)


def test_a_prompt_that_is_too_long_is_cut_alike_for_all_its_options(copied):
    result = quietly(copied("questions"), num_samples=0)
    assert any("were truncated to 16 tokens" in note for note in result.notes)
    table = pq.read_table(result.folder / "predictions.parquet").to_pylist()
    for row in table:
        assert len(row["probabilities"]) == len(row["options"])
        assert sum(row["probabilities"]) == pytest.approx(1)
        # were the prompts cut differently, all of them would be scored, and one option would have it all
        assert max(row["probabilities"]) < 0.999


def test_completions_are_measured_by_the_token(copied):
    result = quietly(copied("pairs"))
    assert set(result.point) == set(result.posterior) == {"nll", "perplexity", "token_accuracy"}
    assert result.point["perplexity"] == pytest.approx(np.exp(result.point["nll"]))
    rows = pq.read_table(result.folder / "predictions.parquet").to_pylist()
    assert sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows) == pytest.approx(
        result.posterior["nll"]
    )
    # the words of the completion and the end token
    assert [row["tokens"] for row in rows] == [len(row["completion"].split()) + 1 for row in rows]


def test_the_base_model_is_the_before_of_the_comparison(copied):
    run = copied("questions")
    before, after = quietly(run, base=True), quietly(run)
    assert before.model == "base"
    assert before.num_samples == 0
    assert before.point["nll"] > after.point["nll"]
    document = json.loads((run / "evaluation.json").read_text())
    assert set(document["splits"]["test"]) == {"adapter", "base"}
    models = pq.read_table(run / "predictions.parquet")["model"].to_pylist()
    assert (models.count("base"), models.count("adapter")) == (15, 15)


def test_a_classifier_has_no_base_to_compare_with(trained):
    with pytest.raises(ConfigError, match="has no head for its labels"):
        quietly(trained["texts"], base=True)


# what can be wrong


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no recipe.yaml: it is not a run"):
        quietly(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        quietly(tmp_path / "missing")


def test_a_file_is_measured_with_the_labels_of_the_run(copied, tmp_path):
    run = copied("texts")
    own = quietly(run)
    rows = [json.loads(line) for line in Path(own.source.origin).read_text().splitlines()]
    same = write_rows(tmp_path / "new.jsonl", rows)
    assert quietly(run, task=str(same)).posterior == own.posterior
    assert "new.jsonl:test" in json.loads((run / "evaluation.json").read_text())["splits"]
    one_class = write_rows(tmp_path / "one.jsonl", [row for row in rows if row["label"] == "cherry"])
    assert quietly(run, task=str(one_class)).source.rows == 5  # the label keeps its place among the run's
    wrong = write_rows(tmp_path / "wrong.jsonl", [{**rows[0], "label": "plum"}])
    with pytest.raises(DataError, match="plum"):
        quietly(run, task=str(wrong))
    with pytest.raises(ConfigError, match="is one file of rows"):
        quietly(run, "train", task=str(same))


def test_a_split_that_is_not_there(trained):
    with pytest.raises(DataError, match="has no dev split"):
        quietly(trained["texts"], "dev")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "posterior.safetensors", "adapter_config.json"])
def test_a_missing_file_of_the_adapter_is_named(copied, name):
    run = copied("texts")
    (run / "adapter" / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        quietly(run)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "posterior.safetensors"])
def test_a_cut_file_of_the_adapter_is_refused(copied, name):
    run = copied("texts")
    content = (run / "adapter" / name).read_bytes()
    (run / "adapter" / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=name):
        quietly(run)


def test_an_adapter_of_another_rank_or_other_layers_is_refused(copied, assets, tmp_path):
    other = tiny_recipe(assets, tmp_path / "other")
    other["method"] |= {"r": 2}
    train(other, progress=False)
    run = copied("texts")
    shutil.rmtree(run / "adapter")
    shutil.copytree(tmp_path / "other" / "adapter", run / "adapter")
    with pytest.raises(CheckpointError, match=r"does not fit|cannot be loaded into"):
        quietly(run)


def test_weights_that_peft_would_pass_over_are_refused(copied):
    from safetensors.torch import load_file, save_file

    run = copied("texts")
    path = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, path)
    with pytest.raises(CheckpointError, match="1 weights are on one side only"):
        quietly(run)


def test_an_unfinished_run_is_refused_unless_it_is_allowed_and_then_says_so(copied):
    run = copied("texts")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(line for line in lines if '"finished"' not in line) + "\n")
    with pytest.raises(CheckpointError, match="is not finished"):
        quietly(run)
    result = quietly(run, allow_unfinished=True)
    assert result.unfinished == "stopped at step 6"
    assert result.facts()["unfinished"] == "stopped at step 6"
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        quietly(run, allow_unfinished=True)


def test_data_that_changed_since_training_are_told(assets, tmp_path):
    recipe = tiny_recipe(assets, tmp_path / "run")
    rows = [json.loads(line) for line in (assets / "texts-test.jsonl").read_text().splitlines()]
    recipe["data"]["validation_file"] = str(write_rows(tmp_path / "validation.jsonl", rows))
    train(recipe, progress=False)
    assert quietly(tmp_path / "run", "validation").notes == ()
    write_rows(tmp_path / "validation.jsonl", rows[1:])
    (note,) = quietly(tmp_path / "run", "validation").notes
    assert "changed since the run was trained" in note


def test_results_are_whole_or_absent(copied, monkeypatch):
    run = copied("texts")
    quietly(run)
    before = (run / "predictions.parquet").read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*predictions\.parquet: No space left"):
        quietly(run, num_samples=0)
    assert (run / "predictions.parquet").read_bytes() == before
    assert not list(run.glob(".predictions*"))


def test_another_task_is_scored_under_its_name(copied, tmp_path, monkeypatch):
    """Its own prompts and options; plain and per byte, since the options are texts."""
    from tests.tasks.rows import PIQA, write_split

    rows = [{**PIQA, "goal": f"w{i}", "sol1": "w5 w6 w7", "sol2": f"w8 w{i + 9}", "label": i % 2} for i in range(5)]
    write_split(tmp_path, "piqa", "validation", rows)
    monkeypatch.setenv("MONTECLORA_DATA", str(tmp_path))
    run = copied("questions")
    result = quietly(run, task="piqa")
    assert result.split == "piqa:validation"
    assert result.source.rows == 5
    assert {"accuracy", "accuracy_per_byte", "nll", "brier", "ece"} == set(result.point) == set(result.posterior)
    assert "piqa:validation" in json.loads((run / "evaluation.json").read_text())["splits"]
    assert "accuracy_per_byte" not in quietly(run).point  # words for options have no length that means anything
    with pytest.raises(ConfigError, match="mrpc is a task of classification, and the run is one of causal_lm"):
        quietly(run, task="mrpc")


def test_notes_on_another_task_are_about_its_rows_and_not_the_runs(copied, assets, tmp_path, monkeypatch):
    from tests.tasks.rows import PIQA, write_split

    rows = [{**PIQA, "goal": f"w{i % 4}", "sol1": "w5", "sol2": f"w{i + 9}", "label": i % 2} for i in range(20)]
    write_split(tmp_path, "piqa", "train", rows)
    monkeypatch.setenv("MONTECLORA_DATA", str(tmp_path))
    result = quietly(copied("questions"), task="piqa", calibrator="temperature")
    assert result.split == "piqa:validation"
    (leak,) = (note for note in result.notes if "rows have the texts or prompt of a training row" in note)
    assert leak.startswith("piqa:validation: ")
    assert not any("changed since" in note or "fitted to these rows" in note for note in result.notes)

    recipe = tiny_recipe(assets, tmp_path / "own", "questions")
    recipe["data"] = {"task": "piqa", "max_length": 16}
    result = quietly(train(recipe, progress=False).folder, task="piqa", calibrator="temperature")
    assert result.split == "piqa:validation"
    assert any("the calibrator temperature was fitted to these rows" in note for note in result.notes)


def test_evaluations_say_how_well_probabilities_are_calibrated(copied):
    """By more measures than the ECE: of the evaluated predictions, of classes and of options."""
    result = quietly(copied("texts"))
    found, metrics = result.scored.predictions, result.calibration
    assert metrics == result.facts()["calibration"]
    assert metrics["equal_mass"] == equal_mass_calibration_error(found.probs, found.labels)
    assert metrics["smooth"] == smooth_calibration_error(found.probs, found.labels)
    assert metrics["classwise"] == classwise_calibration_error(found.probs, found.labels)
    parts = [metrics[f"brier_{name}"] for name in ("reliability", "resolution", "uncertainty")]
    assert parts[0] - parts[1] + parts[2] == pytest.approx(result.posterior["brier"])
    assert set(quietly(copied("questions")).calibration) == {"equal_mass", "smooth"}  # options are no classes
    assert "calibration" not in quietly(copied("pairs")).facts()
