import dataclasses
import itertools
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.numpy import save as save_arrays
from safetensors.torch import load_file, save_file

import monteclora
from monteclora.adapters.rescaling import rescale_posterior
from monteclora.data.columns import Columns
from monteclora.data.splitting import carve_validation
from monteclora.errors import CheckpointError, ConfigError, DataError
from monteclora.evaluation import own_rows, reference
from monteclora.evaluation.calibrate import calibrate
from monteclora.evaluation.prediction import predict_file
from monteclora.evaluation.reference import abstention_of, novelty_of, see
from monteclora.evaluation.run import evaluate
from monteclora.metrics.ood import neighbour_distance
from monteclora.metrics.selective import abstention_threshold
from monteclora.prediction.novelty import Novelty
from monteclora.prediction.whitening import Whitening
from monteclora.runs.loading import load_run
from monteclora.tasks import load as load_task
from monteclora.training.run import train
from tests.finished_runs import LABELS, questions, texts, tiny_recipe, write_rows

TEXTS = [row["text"] for row in texts(7, seed=4)]


@pytest.fixture
def run(trained, tmp_path):
    later = shutil.ignore_patterns("novelty.safetensors", "abstention.json")
    return shutil.copytree(trained["texts"], tmp_path / "run", ignore=later)


def test_answers_are_those_of_predict_file(run, tmp_path):
    found = monteclora.load(run).predict(TEXTS, seed=3)
    file = write_rows(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    path = predict_file(run, file, tmp_path / "out.jsonl", seed=3, progress=False).path
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert found.labels == [row["prediction"] for row in rows]
    for name in ("confidence", "total", "aleatoric", "epistemic"):
        np.testing.assert_allclose(getattr(found, name), [row[name] for row in rows], atol=1e-6)
    assert len(found.novelty) == len(found.abstain) == 7
    assert found.to_arrow().to_pydict() == found.to_dict()


def test_novelty_can_be_left_out_of_a_file(run, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    rows = {}
    for novelty in (True, False):
        path = predict_file(run, file, tmp_path / "out.jsonl", num_samples=0, novelty=novelty, progress=False).path
        rows[novelty] = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[False] == [{name: value for name, value in row.items() if name != "novelty"} for row in rows[True]]
    assert "abstain" in rows[False][0]


def test_novelty_is_its_definition(run):
    model = monteclora.load(run).run
    data = load_task(model.recipe.data, None)
    training, held_out, new = (see(model, data.split(name)) for name in ("train", "validation", "test"))
    found = novelty_of(model)

    rows = see(model, data.split("train")).tokens
    known = {token for row in rows for token in row}
    pairs = {pair for row in rows for pair in itertools.pairwise(row)}

    def parts(seen):
        kept = training.features.astype(np.float16)
        whiten = Whitening.of(kept)
        distance = neighbour_distance(whiten(seen.features), whiten(kept), k=3)
        new_tokens = [np.mean([token not in known for token in row]) for row in seen.tokens]
        new_pairs = [np.mean([pair not in pairs for pair in itertools.pairwise(row)]) for row in seen.tokens]
        return distance, seen.energy, np.array(new_tokens), np.array(new_pairs)

    shares, least_spreads = (2, 1, 2, 0.5), (0, 0, 0.02, 0.02)
    expected = [
        sum(
            share * (of_new - of_held.mean()) / max(of_held.std(), least)
            for share, least, of_new, of_held in zip(shares, least_spreads, parts(x), parts(held_out), strict=True)
        )
        for x in (new, held_out)
    ]
    np.testing.assert_allclose(found.of(new), expected[0] - np.quantile(expected[1], 0.95, method="inverted_cdf"))
    assert np.mean(found.of(held_out) > 1e-9) <= 0.05


def test_what_was_stored_is_used_and_damage_is_named(run, monkeypatch):
    first = monteclora.load(run).predict(TEXTS)
    monkeypatch.setattr("monteclora.evaluation.own_rows.load", lambda *_: pytest.fail("the rows were read again"))
    assert monteclora.load(run).predict(TEXTS) == first
    assert np.isfinite(Novelty.load(run / "novelty.safetensors").limit)
    stored = json.loads((run / "abstention.json").read_text())
    for change, message in (
        (lambda document: document.pop("threshold"), r"abstention\.json is damaged"),
        (lambda document: document.update(format=1000), r"abstention\.json has format 1000"),
    ):
        document = dict(stored)
        change(document)
        (run / "abstention.json").write_text(json.dumps(document))
        with pytest.raises(CheckpointError, match=message):
            monteclora.load(run).predict(TEXTS)
    (run / "novelty.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"novelty\.safetensors cannot be read"):
        monteclora.load(run).predict(TEXTS)


def test_rows_are_read_and_weights_hashed_at_the_first_call_alone(run, monkeypatch):
    count = {"load": 0, "weights_sha256": 0}

    def counted(name, function):
        def call(*arguments, **options):
            count[name] += 1
            return function(*arguments, **options)

        return call

    for module, name in ((own_rows, "load"), (reference, "weights_sha256")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    model = monteclora.load(run)
    first = model.predict(TEXTS)
    assert count["load"] == 1
    before = dict(count)
    assert model.predict(TEXTS) == first
    assert count == before
    assert model.predict(TEXTS, seed=1).confidence != first.confidence  # other draws are judged by their own threshold
    assert count["weights_sha256"] > before["weights_sha256"]


def test_novelty_of_other_weights_is_measured_anew(trained, tmp_path):
    run = shutil.copytree(trained["lora"], tmp_path / "lora")
    first = novelty_of(load_run(run))
    path = run / "adapter" / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: 1.5 * tensor for name, tensor in load_file(path).items()}, path, metadata)
    again = novelty_of(load_run(run))
    assert again.weights != first.weights
    assert again.centre[1] != pytest.approx(first.centre[1])  # the mean energy
    assert not np.array_equal(again.features, first.features)
    np.testing.assert_array_equal(again.known.tokens, first.known.tokens)
    np.testing.assert_array_equal(again.known.pairs, first.known.pairs)


def test_novelty_outlives_a_new_scale_of_the_posterior(run):
    """It is measured at the mean."""
    novelty_of(load_run(run))
    before = (run / "novelty.safetensors").read_bytes()
    rescale_posterior(run / "adapter", 2.0, {})
    novelty_of(load_run(run))
    assert (run / "novelty.safetensors").read_bytes() == before


def test_rows_that_changed_are_not_taken_for_the_runs(assets, tmp_path):
    """Neither for novelty and abstention, which are left out with a note, nor to fit a calibrator or a scale to."""
    recipe = tiny_recipe(assets, tmp_path / "run")
    recipe["data"]["validation_file"] = str(write_rows(tmp_path / "validation.jsonl", texts(12, seed=6)))
    run = train(recipe, progress=False).folder
    write_rows(tmp_path / "validation.jsonl", texts(12, seed=7))
    found = monteclora.load(run).predict(TEXTS)
    changed = r"the validation rows of \S*validation.jsonl changed since"
    assert found.novelty is None
    assert re.search(changed, found.notes[0])
    with pytest.raises(DataError, match=changed):
        evaluate(run, calibrator="temperature", progress=False)
    with pytest.raises(DataError, match=changed):
        calibrate(run, progress=False)


@pytest.mark.parametrize("draws", [None, 0])
def test_after_calibrate_draws_are_judged_by_the_half_that_did_not_choose_the_scale(assets, tmp_path, draws):
    recipe = tiny_recipe(assets, tmp_path / "run")
    recipe["data"]["validation_file"] = str(write_rows(tmp_path / "validation.jsonl", texts(20, seed=6)))
    recipe["training"] |= {"best_metric": "nll", "max_steps": 25}
    run = train(recipe, progress=False).folder
    loaded = load_run(run)
    assert abstention_of(loaded, loaded.sampler(num_samples=draws), 0, 0.9, 0.5).examples == 20
    result = calibrate(run, progress=False)
    loaded = load_run(run)
    found = abstention_of(loaded, loaded.sampler(num_samples=draws), 0, 0.9, 0.5)
    assert found.examples == (20 if draws == 0 else result.rows[1] < 20 and result.rows[1])
    how = json.loads((run / "abstention.json").read_text())["rows"]
    assert how.startswith("validation" if draws == 0 else "the half of the validation rows that did not choose")
    if draws is None:
        validation = evaluate(run, "validation", progress=False)
        _, held_out = carve_validation(validation.rows, 0.5, 0, "rows")
        place = {text: i for i, text in enumerate(validation.rows["text"])}
        chosen = [place[text] for text in held_out["text"]]
        probs, labels = validation.scored.predictions.probs[chosen], validation.scored.predictions.labels[chosen]
        expected = abstention_threshold(probs.max(1), probs.argmax(1) == labels, 0.9, 0.5)
        assert (found.threshold, found.errors) == (pytest.approx(expected.threshold), expected.errors)
    notes = monteclora.load(run).predict(TEXTS, num_samples=draws).notes
    assert any("chose the training step (best nll)" in note for note in notes)


def test_why_nothing_is_answered_is_said(assets, tmp_path):
    recipe = tiny_recipe(assets, tmp_path / "run")
    wrong = [{**row, "label": LABELS[(LABELS.index(row["label"]) + 1) % 3]} for row in texts(50, seed=6)]
    recipe["data"]["validation_file"] = str(write_rows(tmp_path / "validation.jsonl", wrong))
    recipe["training"]["max_steps"] = 25
    run = train(recipe, progress=False).folder
    found = monteclora.load(run, risk=0.1, level=0.9).predict(TEXTS)
    assert all(found.abstain)
    assert found.notes == (
        "every answer is abstained from: the answers to 50 validation rows are wrong too often to promise at most "
        "10 % wrong answers with a probability of 90 %",
    )
    (note,) = monteclora.load(run, risk=0.01).predict(TEXTS).notes
    assert "50 validation rows cannot promise at most 1 % wrong answers" in note
    assert "it takes 459" in note  # 0.99^459 is below 0.01, 0.99^458 above
    assert monteclora.load(run, risk=0.99, level=0.1).predict(TEXTS).notes == ()


def test_a_promise_that_cannot_be_given_is_refused(trained):
    with pytest.raises(ConfigError, match=r"risk is 1\.5; expected a value between 0 and 1"):
        monteclora.load(trained["texts"], risk=1.5)
    with pytest.raises(ConfigError, match=r"risk is 0\.2, and .* is a run of causal_lm"):
        monteclora.load(trained["pairs"], risk=0.2)


def test_without_the_rows_of_the_run_texts_are_answered_and_a_note_says_what_is_left_out(run, monkeypatch):
    def gone(*_):
        raise DataError("there is no file texts-train.jsonl", "Check the path.")

    monkeypatch.setattr("monteclora.evaluation.own_rows.load", gone)
    found = monteclora.load(run).predict(TEXTS)
    assert (found.novelty, found.abstain, len(found.labels)) == (None, None, 7)
    assert found.notes == ("novelty and abstain are left out: there is no file texts-train.jsonl. Check the path.",)
    assert "notes" not in found.to_dict()


def test_the_threshold_is_chosen_on_validation_rows(run):
    loaded = monteclora.load(run).run
    predictions = evaluate(run, "validation", progress=False).scored.predictions
    right = predictions.probs.argmax(1) == predictions.labels
    sampler = loaded.sampler(seed=0)
    for risk, level in ((0.1, 0.9), (0.9, 0.5)):
        expected = abstention_threshold(predictions.probs.max(1), right, risk, level)
        found = abstention_of(loaded, sampler, 0, risk, level)
        assert (found.threshold, found.answered) == (pytest.approx(expected.threshold), expected.answered)
        assert str(abstention_of(loaded, sampler, 0, risk, level)) == str(found)  # as it was stored


def test_a_threshold_chosen_for_other_weights_is_chosen_anew(run):
    loaded = monteclora.load(run).run
    abstention_of(loaded, None, 0, 0.9, 0.5)
    before = json.loads((run / "abstention.json").read_text())
    (run / "abstention.json").write_text(json.dumps({**before, "weights_sha256": "of others", "threshold": 2.0}))
    abstention_of(loaded, None, 0, 0.9, 0.5)
    assert json.loads((run / "abstention.json").read_text()) == before


def test_a_language_model_answers_prompts(trained):
    found = monteclora.load(trained["pairs"]).predict([row["prompt"] for row in questions(3, seed=3)], max_new_tokens=4)
    assert len(found.labels) == 3
    assert "novelty" not in found.to_dict()
    np.testing.assert_allclose(found.total, np.add(found.aleatoric, found.epistemic), atol=1e-9)


@pytest.mark.parametrize(
    "wrong",
    [
        *("a text", b"a text", None, 3, {"a text": 1}, {"a text"}, [], [""], [3], [None], [()]),
        *(np.array("a text"), pd.DataFrame({"text": ["a text"]})),
    ],
)
def test_what_is_no_list_of_texts_is_refused(trained, wrong):
    with pytest.raises(ConfigError, match="takes a list of one text or more"):
        monteclora.load(trained["texts"]).predict(wrong)


@pytest.mark.parametrize("stored", [1, 2])
def test_what_an_earlier_version_stored_keeps_its_score(run, tmp_path, stored):
    """Nearest rows of the pretrained model, uncentred: one by the first view, or three by both, which count twice."""
    model = monteclora.load(run).run
    data = load_task(model.recipe.data, None)
    texts = data.split("test")
    made = novelty_of(model)
    earlier = Novelty(made.features, made.centre[:2], made.spread[:2], 0.5)  # compares by the pretrained features
    training, new = (see(model, rows, novelty=earlier) for rows in (data.split("train"), texts))
    width = made.features.shape[1] // (2 if stored == 1 else 1)
    tensors = {
        "features": training.pretrained[:, :width].astype(np.float16),
        "centre": made.centre[:2],
        "spread": made.spread[:2],
        "limit": np.array([0.5]),
        **({} if stored == 1 else {"how": np.array([3.0, 2.0])}),
    }
    metadata = {"format": str(stored), "weights_sha256": made.weights}
    (run / "novelty.safetensors").write_bytes(save_arrays(tensors, metadata=metadata))
    k, share = (1, 1) if stored == 1 else (3, 2)
    distance = neighbour_distance(new.pretrained[:, :width], tensors["features"], k)
    parts = [(x - made.centre[i]) / made.spread[i] for i, x in enumerate((distance, new.energy))]
    expected = share * parts[0] + parts[1] - 0.5
    assert novelty_of(monteclora.load(run).run).needs_pretrained
    found = monteclora.load(run).predict(texts["text"][:], num_samples=0)
    np.testing.assert_allclose(found.novelty, expected, atol=1e-5)
    file = write_rows(tmp_path / "in.jsonl", [{"text": text} for text in texts["text"][:]])
    path = predict_file(run, file, tmp_path / "out.jsonl", num_samples=0, progress=False).path
    np.testing.assert_allclose([json.loads(x)["novelty"] for x in path.read_text().splitlines()], expected, atol=1e-5)
    ood = evaluate(run, ood=file, progress=False).shift.ood["scores"]
    assert ood["novelty"]["auroc"] == pytest.approx(0.5)  # the same rows on either side


def test_novelty_does_not_depend_on_how_the_answers_were_made(run):
    """It is the mean's, whether the answer's own passes showed it or passes more."""
    model = monteclora.load(run)
    np.testing.assert_allclose(
        model.predict(TEXTS, num_samples=0).novelty, model.predict(TEXTS, num_samples=2).novelty, atol=1e-5
    )


@pytest.mark.parametrize("how", ["its data", "a task with a name"])
def test_single_texts_are_refused_by_a_run_of_pairs(trained, how):
    model = monteclora.load(trained["texts"])
    pairs = Columns("classification", ("sentence1", "sentence2"), "label")
    data = dataclasses.replace(model.run.recipe.data, task="mrpc", train_file=None, test_file=None)
    loaded = {
        "its data": dataclasses.replace(model.run, columns=pairs),
        "a task with a name": dataclasses.replace(
            model.run, columns=None, recipe=dataclasses.replace(model.run.recipe, data=data)
        ),
    }[how]
    model = dataclasses.replace(model, run=loaded)
    for wrong in (["w1"], [("w1", "w2"), "w3"], [("w1", "w2", "w3")]):
        with pytest.raises(ConfigError, match=r"reads (pairs of texts \(sentence1, sentence2\)|single texts, or two)"):
            model.predict(wrong)


def test_pairs_are_answered_as_predict_file_does(assets, tmp_path):
    rows = [
        {"a": row["text"], "b": other["text"], "label": row["label"]}
        for row, other in zip(texts(24, 0), texts(24, 5), strict=True)
    ]
    recipe = tiny_recipe(assets, tmp_path / "run")
    train_file = write_rows(tmp_path / "pairs.jsonl", rows)
    recipe["data"] = {"train_file": str(train_file), "text_columns": ["b", "a"], "max_length": 32}
    recipe["training"]["max_steps"] = 2
    train(recipe, progress=False)
    model = monteclora.load(tmp_path / "run")
    found = model.predict([(row["b"], row["a"]) for row in rows[:5]], seed=1)
    file = write_rows(tmp_path / "in.jsonl", rows[:5])
    path = predict_file(tmp_path / "run", file, tmp_path / "out.jsonl", seed=1, progress=False).path
    written = [json.loads(line) for line in path.read_text().splitlines()]
    np.testing.assert_allclose(found.confidence, [row["confidence"] for row in written], atol=1e-6)
    again = model.predict(([row["b"], row["a"]] for row in rows[:5]), seed=1)  # lists, and no sequence
    assert again == found
    assert again.texts == [(row["b"], row["a"]) for row in rows[:5]]
    swapped = model.predict([(row["a"], row["b"]) for row in rows[:5]], seed=1)
    assert not np.allclose(found.confidence, swapped.confidence, atol=1e-6)
    assert len(found.novelty) == 5
    with pytest.raises(ConfigError, match=r"pairs of texts \(b, a\)"):
        model.predict(["w1"])


def test_a_pair_is_refused_by_a_run_of_single_texts_and_by_a_language_model(trained):
    with pytest.raises(ConfigError, match=r"reads single texts \(text\)"):
        monteclora.load(trained["texts"]).predict([("w1", "w2")])
    with pytest.raises(ConfigError, match="a pair of texts was given"):
        monteclora.load(trained["pairs"]).predict([("w1", "w2")])
