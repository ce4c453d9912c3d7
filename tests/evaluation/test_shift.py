import dataclasses
import json
import shutil

import numpy as np
import pytest

import monteclora
from monteclora import evaluate
from monteclora.errors import ConfigError, DataError
from monteclora.metrics.ood import auroc, fpr95
from monteclora.tasks import load as load_task
from tests.finished_runs import write_rows
from tests.training.conftest import WORDS

STRANGE = [{"text": " ".join(WORDS[i::11])} for i in range(9)]


@pytest.fixture
def copied(trained, tmp_path):
    """Makes a copy of a run that may be changed, as it was when training ended."""
    later = shutil.ignore_patterns("novelty.safetensors", "abstention.json")
    return lambda name: shutil.copytree(trained[name], tmp_path / name, ignore=later)


@pytest.fixture
def outside(tmp_path):
    return write_rows(tmp_path / "strange.jsonl", STRANGE)


def by_hand(run, texts):
    """Each score of each text, one text at a time, by its definition."""
    model = monteclora.load(run)
    found = model.predict(texts)
    logits = [
        model.run.model(**model.run.tokenizer(t, truncation=True, max_length=16, return_tensors="pt")) for t in texts
    ]
    logits = np.stack([each.logits[0].detach().double().numpy() for each in logits])
    return {
        "max_probability": -np.array(found.confidence),
        "entropy": np.array(found.total),
        "mutual_information": np.array(found.epistemic),
        "energy": -np.log(np.exp(logits).sum(1)),
        "max_logit": -logits.max(1),
        "novelty": np.array(found.novelty),
    }


def test_scores_tell_outside_rows_as_they_do_by_hand(copied, outside):
    run = copied("texts")
    result = evaluate(run, ood=outside, progress=False)
    assert (result.shift.ood["rows"], result.shift.ood["file"], result.notes) == (9, str(outside), ())
    inside = load_task(monteclora.load(run).run.recipe.data, None).split("test")["text"][:]
    low, high = by_hand(run, inside), by_hand(run, [row["text"] for row in STRANGE])
    assert list(result.shift.ood["scores"]) == list(low)
    for name, found in result.shift.ood["scores"].items():
        # rounding may exchange two of the 15 x 9 pairs at most
        assert found["auroc"] == pytest.approx(auroc(low[name], high[name]), abs=2 / 135), name
        assert found["fpr95"] == pytest.approx(fpr95(low[name], high[name]), abs=1 / 9 + 1e-9), name
    stored = json.loads((run / "evaluation.json").read_text())["splits"]["test"]["adapter"]
    assert stored["ood"] == dict(result.shift.ood)


def test_what_was_taken_for_granted_of_the_outside_file_is_noted(copied, tmp_path):
    file = tmp_path / "strange.csv"
    file.write_bytes("text\ncafé w1\nw2 w3\n".encode("cp1252"))
    result = evaluate(copied("texts"), ood=file, progress=False)
    assert [note.partition(" is ")[0] for note in result.notes] == [f"{file}: the encoding"]


def test_the_split_against_itself_is_chance(copied, tmp_path):
    run = copied("texts")
    rows = load_task(monteclora.load(run).run.recipe.data, None).split("test")["text"][:]
    result = evaluate(run, ood=write_rows(tmp_path / "same.jsonl", [{"text": t} for t in rows]), progress=False)
    for name, found in result.shift.ood["scores"].items():
        assert found["auroc"] == pytest.approx(0.5, abs=0.01), name


def test_answers_are_ranked_by_confidence(copied):
    run = copied("texts")
    result = evaluate(run, progress=False)
    found = result.scored.predictions
    order = np.argsort(-found.probs.max(1))
    right = (found.probs.argmax(1) == found.labels)[order]
    risks = 1 - np.cumsum(right) / np.arange(1, 16)
    best = 1 - np.cumsum(np.sort(right)[::-1]) / np.arange(1, 16)
    expected = {"aurc": risks.mean(), "aurc_excess": (risks - best).mean(), "accuracy_at_0.8": right[:12].mean()}
    assert result.shift.selective == pytest.approx(expected)
    stored = json.loads((run / "evaluation.json").read_text())["splits"]["test"]["adapter"]
    assert stored["selective"] == result.shift.selective
    assert "ood" not in stored


def test_without_draws_there_is_no_mutual_information(copied, outside):
    result = evaluate(copied("lora"), ood=outside, progress=False)
    assert set(result.shift.ood["scores"]) == {"max_probability", "entropy", "energy", "max_logit", "novelty"}


def test_where_the_rows_of_the_run_are_gone_novelty_is_left_out(copied, outside, monkeypatch):
    def gone(*_):
        raise DataError("there is no file texts-train.jsonl", "Check the path.")

    monkeypatch.setattr("monteclora.evaluation.own_rows.load", gone)
    result = evaluate(copied("texts"), ood=outside, progress=False)
    assert "novelty" not in result.shift.ood["scores"]
    assert result.notes == ("novelty is left out: there is no file texts-train.jsonl. Check the path.",)


def test_novelty_of_rows_that_it_is_made_of_is_left_out_or_noted(copied, outside):
    run = copied("texts")
    on_train = evaluate(run, "train", ood=outside, progress=False)
    assert "novelty" not in on_train.shift.ood["scores"]
    assert "novelty is left out: it is the distance to the train rows, which are evaluated here" in on_train.notes
    on_validation = evaluate(run, "validation", ood=outside, progress=False)
    assert "novelty" in on_validation.shift.ood["scores"]
    assert any(note.startswith("novelty was fitted to these rows") for note in on_validation.notes)
    assert not any("novelty" in note for note in evaluate(run, ood=outside, progress=False).notes)


def test_an_unfinished_run_stores_no_reference(copied, outside, monkeypatch):
    from monteclora.evaluation.run import evaluate_loaded
    from monteclora.runs.loading import load_run

    run = copied("texts")
    loaded = dataclasses.replace(load_run(run), unfinished="stopped at step 3")
    result = evaluate_loaded(loaded, ood=outside, progress=False)
    assert "novelty" not in result.shift.ood["scores"]
    assert not (run / "novelty.safetensors").exists()


def test_what_cannot_be_measured_is_refused_before_anything_is_predicted(trained, outside, monkeypatch):
    monkeypatch.setattr("monteclora.evaluation.run.fitted_calibrators", lambda *_: pytest.fail("it went on"))
    with pytest.raises(ConfigError, match="is a run of causal_lm, and ood is for classifiers"):
        evaluate(trained["pairs"], ood=outside, progress=False)
    with pytest.raises(DataError, match="there is no file"):
        evaluate(trained["texts"], ood=outside.with_name("missing.jsonl"), progress=False)


def test_a_language_model_has_neither(copied):
    facts = evaluate(copied("questions"), progress=False).facts()
    assert not {"selective", "ood"} & set(facts)
