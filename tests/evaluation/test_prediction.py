import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import monteclora
from monteclora.errors import CheckpointError, ConfigError, DataError
from monteclora.evaluation.prediction import OUTPUT_COLUMNS, predict_file
from monteclora.evaluation.run import evaluate
from monteclora.prediction.generation import Decoding, complete, encode_prompts
from monteclora.runs.loading import load_run
from monteclora.tasks import load_inputs
from monteclora.tasks.classification import Classification
from monteclora.tasks.kinds import KINDS
from tests.finished_runs import LABELS, questions, texts, write_rows


def quietly(*args, **kwargs):
    return predict_file(*args, progress=False, **kwargs)


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def copied(trained, tmp_path):
    """Makes a copy of a run that may be changed, as it was when training ended."""
    later = shutil.ignore_patterns("novelty.safetensors", "abstention.json")

    def copy(name):
        return shutil.copytree(trained[name], Path(tempfile.mkdtemp(dir=tmp_path)) / "run", ignore=later)

    return copy


@pytest.fixture
def unlabelled(tmp_path):
    """The texts of the test split, without their labels, in a csv file."""
    path = tmp_path / "messages.csv"
    path.write_text("id,text\n" + "".join(f"{i},{row['text']}\n" for i, row in enumerate(texts(15, seed=1))))
    return path


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_predictions_are_those_of_the_evaluation(copied, unlabelled, tmp_path, ending):
    found = quietly(copied("texts"), unlabelled, tmp_path / f"out{ending}", seed=5)
    assert (found.rows, found.num_samples) == (15, 3)
    (note,) = found.notes
    assert note.startswith("every answer is abstained from: 3 validation rows cannot promise at most 10 % wrong")
    expected = evaluate(copied("texts"), seed=5, progress=False).scored.predictions
    rows = read(found.path)
    names = ["index", "text", "prediction", "confidence", "probabilities", "total", "aleatoric", "epistemic"]
    names += ["novelty", "abstain"]
    for i, row in enumerate(rows):
        assert list(row) == names
        assert row["index"] == i
        np.testing.assert_allclose(list(row["probabilities"].values()), expected.probs[i], atol=1e-6)
        assert row["prediction"] == LABELS[expected.probs[i].argmax()]
        assert row["epistemic"] == pytest.approx(expected.epistemic[i], abs=1e-6)


def test_rows_come_in_the_order_of_the_file_however_they_are_cut_up(copied, tmp_path, monkeypatch):
    rows = [{"text": row["text"]} for row in texts(23, seed=2)]
    file = write_rows(tmp_path / "in.jsonl", rows)
    whole = read(quietly(copied("texts"), file, tmp_path / "whole.jsonl").path)
    monkeypatch.setattr(Classification, "rows_at_once", 5)
    parts = read(quietly(copied("texts"), file, tmp_path / "parts.parquet", batch_size=2).path)
    assert [row["text"] for row in whole] == [row["text"] for row in parts] == [row["text"] for row in rows]
    assert [row["index"] for row in parts] == list(range(23))
    np.testing.assert_allclose([row["total"] for row in whole], [row["total"] for row in parts], atol=1e-6)


def test_lora_predicts_without_epistemic_uncertainty(copied, unlabelled, tmp_path):
    rows = read(quietly(copied("lora"), unlabelled, tmp_path / "out.jsonl").path)
    assert {row["epistemic"] for row in rows} == {0.0}
    assert all(row["total"] == row["aleatoric"] > 0 for row in rows)
    with pytest.raises(ConfigError, match="the method lora has no posterior"):
        quietly(copied("lora"), unlabelled, tmp_path / "out.jsonl", num_samples=2)


def test_novelty_and_abstain_are_those_of_the_model_that_answers_texts(copied, unlabelled, tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "rows_at_once", 4)
    rows = read(quietly(copied("texts"), unlabelled, tmp_path / "out.parquet", seed=2).path)
    expected = monteclora.load(copied("texts")).predict([row["text"] for row in rows], seed=2)
    np.testing.assert_allclose([row["novelty"] for row in rows], expected.novelty, rtol=1e-4)
    assert [row["abstain"] for row in rows] == expected.abstain


def test_where_the_rows_of_the_run_are_gone_a_note_says_what_is_left_out(copied, unlabelled, tmp_path, monkeypatch):
    def gone(*_):
        raise DataError("there is no file texts-train.jsonl", "Check the path.")

    run = copied("texts")
    monkeypatch.setattr("monteclora.evaluation.own_rows.load", gone)
    found = quietly(run, unlabelled, tmp_path / "out.jsonl")
    assert found.notes == ("novelty and abstain are left out: there is no file texts-train.jsonl. Check the path.",)
    assert not {"novelty", "abstain"} & set(read(found.path)[0])


def test_calibrated_predictions_have_no_threshold(copied, unlabelled, tmp_path):
    found = quietly(copied("texts"), unlabelled, tmp_path / "out.jsonl", calibrator="temperature")
    assert any(note.startswith("abstain is left out: a calibrator") for note in found.notes)
    assert {"novelty", "abstain"} & set(read(found.path)[0]) == {"novelty"}


def test_a_run_folder_that_cannot_be_written_to_predicts(copied, unlabelled, tmp_path, monkeypatch, caplog):
    def refuse(path, content):
        raise CheckpointError(f"cannot write {path}", "Free some space.")

    run = copied("texts")
    monkeypatch.setattr("monteclora.runs.documents.write_file", refuse)
    monkeypatch.setattr("monteclora.prediction.novelty.write_file", refuse)
    assert "novelty" in read(quietly(run, unlabelled, tmp_path / "out.jsonl").path)[0]
    assert "novelty.safetensors is not kept" in caplog.text


def test_columns_of_the_file_are_kept(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "rows_at_once", 2)
    rows = [{"text": f"w{i}", "id": i, "tags": ["a"] * i} for i in range(5)]
    file = write_rows(tmp_path / "in.jsonl", rows)
    run = copied("texts")
    for out in ("out.parquet", "out.jsonl"):
        found = read(quietly(run, file, tmp_path / out, keep=["id", "tags"]).path)
        assert list(found[0])[:4] == ["index", "id", "tags", "text"]
        assert [{name: row[name] for name in ("text", "id", "tags")} for row in found] == rows


def test_columns_that_cannot_be_kept_are_refused(trained, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", [{"text": "w1", "id": 1, "mixed": 1}, {"text": "w1", "mixed": "a"}])
    for keep, problem in (
        (["id", "confidence"], "have a column 'confidence' of their own"),
        (["ids"], r"in\.jsonl has no column 'ids'"),
        (["mixed"], "mixed types"),
        ("id", "expected a list of columns"),
    ):
        with pytest.raises((ConfigError, DataError), match=problem):
            quietly(trained["texts"], file, tmp_path / "out.jsonl", keep=keep)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", ["texts", "pairs"])
def test_no_column_has_a_name_that_could_be_kept(copied, tmp_path, name):
    rows = [{"text": "w1"}] if name == "texts" else [{"prompt": "w1"}]
    file = write_rows(tmp_path / "in.jsonl", rows)
    assert set(read(quietly(copied(name), file, tmp_path / "out.jsonl", max_new_tokens=4).path)[0]) <= OUTPUT_COLUMNS


# causal LM


def test_completions_are_the_most_likely_tokens_one_by_one(trained, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": row["prompt"]} for row in questions(7, seed=3)])
    rows = read(quietly(trained["pairs"], file, tmp_path / "out.parquet", max_new_tokens=4, num_samples=2).path)
    loaded = load_run(trained["pairs"])
    end = loaded.tokenizer.eos_token_id
    for row in rows:
        ids = loaded.tokenizer(row["prompt"] + "\n")["input_ids"][-16:]  # max_length
        answer = []
        while len(answer) < 4 and (not answer or answer[-1] != end):
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([[*ids, *answer]])).logits[0, -1]
            answer.append(int(logits.argmax()))
        assert row["completion"] == loaded.tokenizer.decode(answer, skip_special_tokens=True)
        assert 0 < row["confidence"] <= 1
        assert row["total"] == pytest.approx(row["aleatoric"] + row["epistemic"], abs=1e-9)
        assert row["epistemic"] > 0


def test_a_file_needs_the_columns_that_the_run_was_trained_on(trained, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"sentence1": "w1", "sentence2": "w2"}])
    with pytest.raises(DataError, match=r"pairs\.jsonl has no column 'text', which the run was trained on"):
        quietly(trained["texts"], pairs, tmp_path / "out.jsonl")
    other = write_rows(tmp_path / "other.jsonl", [{"instruction": "w1"}])
    with pytest.raises(DataError, match=r"other\.jsonl has no column 'prompt', which the run was trained on"):
        quietly(trained["pairs"], other, tmp_path / "out.jsonl")


def test_prompts_of_any_length_share_a_batch(trained, tmp_path):
    loaded = load_run(trained["pairs"])
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": "w1"}, {"prompt": "w1 w2 w3 w4 w5 w6 w7"}])
    rows, _ = load_inputs(file, loaded.recipe.data, loaded.kind)
    prompts, _ = encode_prompts(rows, loaded.tokenizer, loaded.recipe.data.max_length, 4)
    together = complete(loaded.model, loaded.tokenizer, prompts, Decoding(4))
    assert together == [
        answer for prompt in prompts for answer in complete(loaded.model, loaded.tokenizer, [prompt], Decoding(4))
    ]


def test_a_prompt_is_the_tokens_of_training(trained, tmp_path):
    from monteclora.data.encoding import Encoder

    loaded = load_run(trained["pairs"])
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": "w1 w2"}])
    (prompt,), cut = encode_prompts(
        load_inputs(file, loaded.recipe.data, loaded.kind)[0], loaded.tokenizer, loaded.recipe.data.max_length, 4
    )
    whole = Encoder(loaded.tokenizer).options("w1 w2", ["w9"], 16)[0][0]
    learned = next(i for i, label in enumerate(whole["labels"]) if label != -100)
    assert prompt["input_ids"] == whole["input_ids"][:learned]
    assert cut.notes == ()


def test_one_note_says_how_many_rows_of_a_file_were_cut(trained, tmp_path, monkeypatch):
    """Whatever the number of parts that it is predicted in."""
    monkeypatch.setattr(KINDS["classification"], "rows_at_once", 2)
    long = " ".join(f"w{i}" for i in range(30))
    file = write_rows(tmp_path / "in.jsonl", [{"text": text} for text in (long, "w1", "w2", long, long)])
    found = quietly(trained["texts"], file, tmp_path / "out.jsonl", num_samples=0, novelty=False)
    assert [note for note in found.notes if "truncated" in note] == ["3 of 5 rows were truncated to 16 tokens"]


def test_a_completion_that_has_no_room_is_refused(trained, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": "w1"}])
    with pytest.raises(ConfigError, match=r"max_new_tokens is 64.*has room for 32"):
        quietly(trained["pairs"], file, tmp_path / "out.jsonl")


# what can be wrong


@pytest.mark.parametrize(
    ("out", "problem"),
    [("out.csv", "cannot tell the format"), (".", "cannot tell the format"), ("in.jsonl", "is the file to predict")],
)
def test_a_bad_output_is_refused_before_anything_is_loaded(tmp_path, out, problem):
    file = write_rows(tmp_path / "in.jsonl", [{"text": "w1"}])
    with pytest.raises(ConfigError, match=problem):
        quietly(tmp_path / "no-run", file, tmp_path / out)


def test_bad_input_leaves_nothing_behind(trained, tmp_path):
    out = tmp_path / "out.parquet"
    out.write_text("before")
    cases = {"columns": [{"body": "w1"}], "no text": [{"text": "w1"}, {"text": " "}]}
    for rows in cases.values():
        with pytest.raises(DataError):
            quietly(trained["texts"], write_rows(tmp_path / "in.jsonl", rows), out)
    with pytest.raises(DataError, match="there is no file"):
        quietly(trained["texts"], tmp_path / "missing.jsonl", out)
    with pytest.raises(CheckpointError, match="not a run"):
        quietly(tmp_path, tmp_path / "in.jsonl", out)
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.parquet"]


def test_an_interruption_leaves_nothing_behind(trained, unlabelled, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Classification, "predict", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quietly(trained["texts"], unlabelled, tmp_path / "out.parquet")
    assert os.listdir(tmp_path) == ["messages.csv"]
