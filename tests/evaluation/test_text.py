import dataclasses
import json
import shutil

import numpy as np
import pytest

import monteclora
from monteclora.data.columns import Columns
from monteclora.errors import CheckpointError, ConfigError, DataError
from monteclora.evaluation.prediction import predict_file
from monteclora.evaluation.reference import abstention_of, novelty_of, see
from monteclora.evaluation.run import evaluate
from monteclora.metrics.ood import nearest_distance
from monteclora.metrics.selective import abstention_threshold
from monteclora.prediction.novelty import Novelty
from monteclora.tasks import load as load_task
from tests.finished_runs import questions, texts, write_rows

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


def test_novelty_is_its_definition(run):
    model = monteclora.load(run).run
    data = load_task(model.recipe.data, None)
    training, held_out, new = (see(model, data.split(name)) for name in ("train", "validation", "test"))
    found = novelty_of(model)

    def parts(seen):
        return nearest_distance(seen.features, training.features.astype(np.float16), k=1), seen.energy

    expected = [
        sum(
            (of_new - of_held.mean()) / of_held.std() for of_new, of_held in zip(parts(x), parts(held_out), strict=True)
        )
        for x in (new, held_out)
    ]
    np.testing.assert_allclose(found.of(new), expected[0] - np.quantile(expected[1], 0.95, method="inverted_cdf"))
    assert np.mean(found.of(held_out) > 1e-9) <= 0.05


def test_what_was_stored_is_used_and_damage_is_named(run, monkeypatch):
    model = monteclora.load(run)
    first = model.predict(TEXTS)
    monkeypatch.setattr("monteclora.evaluation.reference.load", lambda *_: pytest.fail("the rows were read again"))
    assert model.predict(TEXTS) == first
    assert np.isfinite(Novelty.load(run / "novelty.safetensors").limit)
    stored = json.loads((run / "abstention.json").read_text())
    del stored["threshold"]
    (run / "abstention.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"abstention\.json is damaged"):
        model.predict(TEXTS)
    (run / "novelty.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"novelty\.safetensors cannot be read"):
        model.predict(TEXTS)


def test_without_the_rows_of_the_run_texts_are_answered_and_a_note_says_what_is_left_out(run, monkeypatch):
    def gone(*_):
        raise DataError("there is no file texts-train.jsonl", "Check the path.")

    monkeypatch.setattr("monteclora.evaluation.reference.load", gone)
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


@pytest.mark.parametrize("wrong", ["a text", [], [""], [3]])
def test_what_is_no_list_of_texts_is_refused(trained, wrong):
    with pytest.raises(ConfigError, match="takes a list of one text or more"):
        monteclora.load(trained["texts"]).predict(wrong)


def test_features_are_the_pretrained_models_and_energies_the_tuned_ones(run):
    loaded = monteclora.load(run).run
    rows = load_task(loaded.recipe.data, None).split("test")
    seen, batch = see(loaded, rows), loaded.tokenizer(rows["text"][:1], return_tensors="pt")
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    logits = loaded.model(**batch).logits
    assert seen.energy[0] == pytest.approx(-float(logits.logsumexp(-1)), abs=1e-5)
    with loaded.model.disable_adapter():
        states = loaded.model(**batch, output_hidden_states=True).hidden_states[-1]
    np.testing.assert_allclose(seen.features[0], states[0].mean(0).numpy(), atol=1e-5)


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
    with pytest.raises(ConfigError, match=r"reads pairs of texts \(sentence1, sentence2\)"):
        dataclasses.replace(model, run=loaded).predict(["w1"])
