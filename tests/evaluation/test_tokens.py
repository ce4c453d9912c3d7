"""Token by token through a run: what is written, how it hangs together, what is refused."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

import monteclora
from monteclora.errors import ConfigError
from monteclora.evaluation.prediction import predict_file
from monteclora.prediction.agreement import agreement
from monteclora.prediction.ensemble import Ensemble, Members
from monteclora.prediction.generation import Decoding, complete, complete_by_draws
from monteclora.runs.loading import load_run
from monteclora.tasks.kinds import KINDS
from tests.finished_runs import write_rows

PROMPTS = ["w1 w2 w3", "w40 w4", "w5"]


@pytest.fixture(scope="module")
def model(trained):
    return monteclora.load(trained["questions"])


def test_tokens_are_those_of_the_completion_and_add_up(model):
    found = model.predict(PROMPTS, num_samples=3, seed=4, max_new_tokens=6, answers=2)
    for i in range(len(PROMPTS)):
        tokens, sequence = found.tokens[i], found.sequence[i]
        ids = [token["id"] for token in tokens]
        assert model.run.tokenizer.decode(ids, skip_special_tokens=True) == found.labels[i]
        assert "".join(token["text"] for token in tokens) == model.run.tokenizer.decode(ids)
        assert 1 <= len(tokens) <= 6
        for token in tokens:
            assert token["total"] == pytest.approx(token["aleatoric"] + token["epistemic"], abs=1e-6)
            assert token["epistemic"] >= 0
        # the first token's are those that a prediction always had
        assert tokens[0]["total"] == pytest.approx(found.total[i], abs=1e-5)
        assert tokens[0]["epistemic"] == pytest.approx(found.epistemic[i], abs=1e-5)
        assert sequence["log_probability"] == pytest.approx(sum(token["log_probability"] for token in tokens))
        assert sequence["max_epistemic"] == max(token["epistemic"] for token in tokens)
        assert len(found.answers[i]) == 2
        best = agreement(found.answers[i])
        assert (found.answer[i], found.agreement[i]) == (best.answer, best.share)
    assert max(token["epistemic"] for tokens in found.tokens for token in tokens) > 0
    assert found.to_arrow().to_pydict() == found.to_dict()
    assert found.labels == model.predict(PROMPTS, num_samples=0, max_new_tokens=6).labels  # at the mean


def test_each_answer_is_what_its_draw_writes_alone(model):
    found = model.predict(PROMPTS, num_samples=3, seed=4, max_new_tokens=5, answers=3).answers
    run = model.run
    sampler = run.sampler(num_samples=3, seed=4)
    for text, answers in zip(PROMPTS, found, strict=True):
        ids, _ = monteclora.data.encoding.Encoder(run.tokenizer).prompt({"prompt": text}, 16)
        prompt = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        for number, answer in enumerate(answers):
            with sampler.draw(run.model, number):
                assert complete(run.model, run.tokenizer, [prompt], Decoding(5)) == [answer]


def test_members_of_an_ensemble_write_their_own_answers(model, trained):
    other, run = load_run(trained["questions"]).model, model.run
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    prompts = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in ([5, 6, 7], [20, 9])]
    members = Members([run.model, other])
    found = complete_by_draws(members, run.tokenizer, prompts, Decoding(5), Ensemble(2), 2)
    expected = [complete(each, run.tokenizer, prompts, Decoding(5)) for each in members.members]
    assert found == [list(texts) for texts in zip(*expected, strict=True)]
    assert complete(members, run.tokenizer, prompts, Decoding(5)) == expected[0]  # the first stands for all


def test_a_given_completion_is_read_as_training_has_it(model):
    found = model.predict(PROMPTS, completions=["w80 w81 w70", "w80", "w72 w73"], seed=1)
    assert found.labels == ["w80 w81 w70", "w80", "w72 w73"]
    row = {"prompt": PROMPTS[0], "completion": "w80 w81 w70"}
    whole = monteclora.data.encoding.Encoder(model.run.tokenizer).row(row, 16)
    learned = [token for token, is_learned in zip(whole.ids, whole.learned, strict=True) if is_learned]
    assert [token["id"] for token in found.tokens[0]] == learned
    with torch.no_grad():
        logits = model.run.model(input_ids=torch.tensor([whole.ids])).logits[0].log_softmax(-1)
    start = whole.learned.index(True)
    expected = [logits[i - 1, whole.ids[i]].item() for i in range(start, len(whole.ids))]
    at_mean = model.predict(PROMPTS[:1], completions=["w80 w81 w70"], num_samples=0).tokens[0]
    np.testing.assert_allclose([token["log_probability"] for token in at_mean], expected, atol=1e-5)
    assert [token["epistemic"] for token in at_mean] == [0.0] * len(expected)


def test_a_file_of_them(trained, model, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": text} for text in PROMPTS])
    options = {"num_samples": 3, "seed": 4, "max_new_tokens": 6, "progress": False}
    lines = predict_file(trained["questions"], file, tmp_path / "a.jsonl", tokens=True, answers=2, **options).path
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    table = predict_file(trained["questions"], file, tmp_path / "b.parquet", tokens=True, **options).path
    expected = model.predict(PROMPTS, num_samples=3, seed=4, max_new_tokens=6, answers=2)
    for row, other, tokens in zip(rows, pq.read_table(table).to_pylist(), expected.tokens, strict=True):
        assert [token["text"] for token in row["tokens"]] == [token["text"] for token in tokens]
        np.testing.assert_allclose([t["total"] for t in row["tokens"]], [t["total"] for t in tokens], atol=1e-6)
        assert other["sequence"] == pytest.approx(row["sequence"])
        assert "answers" not in other
    assert [row["answers"] for row in rows] == expected.answers
    plain = predict_file(trained["questions"], file, tmp_path / "c.jsonl", **options).path
    assert not {"tokens", "sequence", "answers"} & set(json.loads(plain.read_text().splitlines()[0]))


@pytest.mark.parametrize("num_samples", [0, 3])
def test_the_first_token_tells_what_the_prompt_alone_tells(model, num_samples):
    rows = Dataset.from_dict({"prompt": ["w1 w2 w3", "w40 w4"]})
    predictor = model.run.predictor(model.run.sampler(num_samples=num_samples, seed=4))
    read = []  # rows of forward passes over prompts; those of one token go on from the cache

    def note(embedding, inputs):
        read.append(len(inputs[0]) * (inputs[0].shape[1] > 1))

    hook = model.run.model.get_input_embeddings().register_forward_pre_hook(note)
    try:
        alone = KINDS["causal_lm"].predict(predictor, rows, 1).columns
        count = sum(read)
        whole = KINDS["causal_lm"].predict_tokens(predictor, rows, 1).columns
    finally:
        hook.remove()
    assert count == 2 * (1 + max(num_samples, 1)), "once to write and once under each draw"
    assert sum(read) == 2 * count, "for tokens as well"
    assert whole["next_token"] == alone["next_token"]
    for name in ("confidence", "total", "aleatoric", "epistemic"):
        np.testing.assert_allclose(whole[name], alone[name], atol=1e-6)


def test_what_is_refused(trained, model, tmp_path):
    with pytest.raises(ConfigError, match="answers is 4, and 3 draws are there"):
        model.predict(PROMPTS, num_samples=3, answers=4)
    with pytest.raises(ConfigError, match="answers is 1, and 0 draws"):
        model.predict(PROMPTS, num_samples=0, answers=1)
    with pytest.raises(ConfigError, match="a list of 3 texts"):
        model.predict(PROMPTS, completions=["w1"])
    (tokens,) = model.predict(PROMPTS[:1], completions=[""]).tokens
    assert [token["text"] for token in tokens] == ["[END]"], "of no answer at all, its end is read"
    classifier = monteclora.load(trained["texts"])
    with pytest.raises(ConfigError, match="answers are of language models"):
        classifier.predict(["w1"], answers=2)
    file = write_rows(tmp_path / "in.jsonl", [{"text": "w1"}])
    with pytest.raises(ConfigError, match="tokens are of language models"):
        predict_file(trained["texts"], file, tmp_path / "out.jsonl", tokens=True, progress=False)
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": "w1"}])
    with pytest.raises(ConfigError, match="answers is 9, and 3 draws"):
        predict_file(load_run(trained["questions"]).folder, file, tmp_path / "out.jsonl", answers=9, progress=False)
    assert not (tmp_path / "out.jsonl").exists()
