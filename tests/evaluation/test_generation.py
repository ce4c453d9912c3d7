import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import monteclora
from monteclora.adapters.active import posterior_sampling
from monteclora.adapters.rescaling import rescale_posterior
from monteclora.errors import CheckpointError, ConfigError, UnsafeCodeError
from monteclora.evaluation import generation as module
from monteclora.evaluation import judging
from monteclora.evaluation.generation import generate
from monteclora.metrics.ood import auroc
from monteclora.metrics.pass_at_k import pass_at_k
from monteclora.prediction.generation import Decoding, Drawn, complete
from monteclora.runs.loading import load_run
from monteclora.tasks import get_task
from monteclora.tasks.generation import Verdict
from tests.tasks.rows import GSM8K, HUMANEVAL, write_split


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of a language model's run, and a data folder with six questions and two functions."""
    folder = tmp_path / "data"
    rows = [{**GSM8K, "question": f"w{i} w{i + 1} ?"} for i in range(6)]
    write_split(folder, "gsm8k", "test", rows)
    write_split(folder, "humaneval", "test", [HUMANEVAL, {**HUMANEVAL, "task_id": "Made/1"}])
    monkeypatch.setenv("MONTECLORA_DATA", str(folder))
    return shutil.copytree(trained["pairs"], tmp_path / "pairs")


def quietly(run, task="gsm8k", **options):
    return generate(run, task, **{"max_new_tokens": 5, "progress": False, **options})


def texts(result):
    return [row["text"] for row in pq.read_table(result.answers).to_pylist()]


def test_answers_are_those_of_the_model_one_by_one(run):
    result = quietly(run, batch_size=4)
    loaded = load_run(run)
    for row in pq.read_table(result.answers).to_pylist():
        ids = loaded.tokenizer(row["prompt"] + "\n", add_special_tokens=False)["input_ids"][-(64 - 5) :]
        with torch.no_grad():
            for _ in range(5):  # greedy, without a cache
                ids.append(int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == loaded.tokenizer.eos_token_id:
                    break
        words = loaded.tokenizer.decode(ids, skip_special_tokens=True)
        assert words.endswith(row["text"])
    assert (result.problems, result.num_samples, result.samples) == (6, 0, 1)
    assert set(result.scores) == {"strict", "flexible"}


def test_wrong_answers_are_told_by_scores_of_their_tokens(run, monkeypatch):
    """As by the scores of the same texts given to predict; every other answer is made right, the last is empty."""
    recipe = run / "recipe.yaml"  # predict cuts texts to the length of training rows, generate to what the model reads
    recipe.write_text(recipe.read_text().replace("max_length: 16", "max_length: 64"))
    right = [True, False, True, False, True, False]
    written = {f"w{i} w{i + 1} ?": f"w{7 * i} w3 w{5 * i + 2}" if i < 5 else "" for i in range(6)}
    firsts = {load_run(run).tokenizer(prompt)["input_ids"][0]: text for prompt, text in written.items()}
    monkeypatch.setattr(module, "complete", lambda _m, _t, rows, *_: [firsts[row["input_ids"][0]] for row in rows])
    verdicts = {(i, 0, 0): Verdict({"strict": is_right, "flexible": True}, "") for i, is_right in enumerate(right)}
    monkeypatch.setattr(module, "judge", lambda *_: verdicts)
    result = quietly(run, error_detection=True)
    assert set(result.error_detection) == {"strict"}  # all are right by the other criterion
    assert "1 of 6 answers are empty and have no scores" in result.notes
    answered, right = pq.read_table(result.answers).to_pylist()[:5], right[:5]
    given = monteclora.load(run).predict(
        [row["prompt"] for row in answered], completions=[row["text"] for row in answered], num_samples=3
    )
    for name, found in result.error_detection["strict"].items():
        sign = -1 if name == "mean_log_probability" else 1
        values = sign * np.array([sequence[name] for sequence in given.sequence])
        assert found == pytest.approx(auroc(values[np.array(right)], values[~np.array(right)]), abs=1e-9), name
    assert len(result.error_detection["strict"]) == 7
    stored = json.loads((run / "generation.json").read_text())["results"][-1]
    assert stored["error_detection"] == result.error_detection


def test_several_runs_read_the_answers_of_the_first(run, monkeypatch):
    other = shutil.copytree(run, run.parent / "other")
    model = load_run(other).model
    for name, parameter in model.named_parameters():
        parameter.data *= 3.0 if "lora_B" in name else 1.0
    model.save_pretrained(other / "adapter")
    for folder in (run, other):
        recipe = folder / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("max_length: 16", "max_length: 64"))
    right = [True, False, True, False, True, False]
    verdicts = {(i, 0, 0): Verdict({"strict": is_right}, "") for i, is_right in enumerate(right)}
    monkeypatch.setattr(module, "judge", lambda *_: verdicts)
    result = quietly(run, error_detection=True, readers=[other])
    rows = [row for row in pq.read_table(result.answers).to_pylist() if row["text"]]
    right = np.array([right[row["problem"]] for row in rows])
    prompts, written = [row["prompt"] for row in rows], [row["text"] for row in rows]
    one, two = (
        monteclora.load(folder).predict(prompts, completions=written, num_samples=0).tokens for folder in (run, other)
    )
    mean = [
        np.mean([np.logaddexp(x["log_probability"], y["log_probability"]) for x, y in zip(a, b, strict=True)])
        for a, b in zip(one, two, strict=True)
    ]
    told = auroc(-np.array(mean)[right], -np.array(mean)[~right])
    found = result.error_detection["strict"]
    assert found["mean_log_probability"] == pytest.approx(told, abs=1e-9)
    assert "mean_epistemic" in found
    assert result.facts()["readers"] == [str(other)]
    for options in ({}, {"error_detection": True, "base": True}):
        with pytest.raises(ConfigError, match="several runs were given with"):
            quietly(run, readers=[other], **options)


def test_what_was_judged_is_kept_before_the_answers_are_read_again(run, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "errors_told", stopped)
    with pytest.raises(KeyboardInterrupt):
        quietly(run, error_detection=True)
    (kept,) = json.loads((run / "generation.json").read_text())["results"]
    assert kept["scores"]
    assert kept.get("error_detection") is None


def test_it_goes_on_where_it_stopped(run, monkeypatch):
    expected = texts(quietly(run, batch_size=2, temperature=1.0, samples=2))
    shutil.rmtree(run / "answers")
    written = []

    def two_batches(*arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments)
        return complete(*arguments)

    monkeypatch.setattr(module, "complete", two_batches)
    with pytest.raises(KeyboardInterrupt):
        quietly(run, batch_size=2, temperature=1.0, samples=2)
    (file,) = (run / "answers").glob("*.jsonl")
    assert len(file.read_text().splitlines()) == 1 + 4
    with file.open("a") as stream:
        stream.write('{"problem": 5, "dr')  # killed while it wrote
    count = []
    monkeypatch.setattr(
        module, "complete", lambda *arguments: (count.append(len(arguments[2])), complete(*arguments))[1]
    )
    assert texts(quietly(run, batch_size=3, temperature=1.0, samples=2)) == expected
    assert sum(count) == 12 - 4
    count.clear()
    assert texts(quietly(run, batch_size=3, temperature=1.0, samples=2)) == expected
    assert not count


def test_other_settings_are_other_answers(run):
    one = quietly(run)
    other = quietly(run, temperature=2.0, seed=1)
    assert one.answers != other.answers
    assert texts(one) != texts(other)
    assert texts(quietly(run, temperature=2.0, seed=2)) != texts(other)
    document = json.loads((run / "generation.json").read_text())
    assert len(document["results"]) == 3
    assert len(json.loads((run / "generation.json").read_text())["results"]) == 3
    assert texts(quietly(run)) == texts(one)
    assert len(json.loads((run / "generation.json").read_text())["results"]) == 3


def test_answers_of_other_weights_are_not_taken_for_those_of_these(run):
    """A posterior that is rescaled, as calibrate does, has the same recipe and answers otherwise."""
    before = quietly(run, num_samples=2)
    rescale_posterior(run / "adapter", 50.0, {})
    after = quietly(run, num_samples=2)
    assert after.answers != before.answers
    assert texts(after) != texts(before)
    base = quietly(run, base=True)
    rescale_posterior(run / "adapter", 1.0, {})
    assert quietly(run, base=True).answers == base.answers


def test_every_draw_answers_under_its_own_weights(run):
    result = quietly(run, num_samples=3, seed=4)
    rows = pq.read_table(result.answers).to_pylist()
    assert [row["draw"] for row in rows] == [0, 1, 2] * 6
    loaded = load_run(run)
    for row in rows[:6]:
        ids = loaded.tokenizer(row["prompt"] + "\n", add_special_tokens=False)["input_ids"][-(64 - 5) :]
        prompt = [{"input_ids": ids, "attention_mask": [1] * len(ids)}]
        with posterior_sampling(loaded.model, 4, first=row["draw"], resample=False):
            assert complete(loaded.model, loaded.tokenizer, prompt, Decoding(5)) == [row["text"]]


def test_global_generators_are_left_alone(run):
    before = torch.get_rng_state()
    quietly(run, temperature=1.0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_limit_takes_the_same_questions_every_time(run):
    some, same = (pq.read_table(quietly(run, rows=3, seed=s).answers)["prompt"].to_pylist() for s in (0, 9))
    assert some == same
    assert len(some) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")
def test_programs_are_run_only_where_that_is_allowed(run, monkeypatch):
    called = []
    monkeypatch.setattr(module, "complete", lambda *_: called.append(1))
    with pytest.raises(UnsafeCodeError, match="--allow-code-execution"):
        quietly(run, "humaneval")
    assert not called
    answers = iter(["    return math.pi * r * r\n", "no idea", "    return 3.14159265359 * r ** 2\n", "    return 0\n"])
    monkeypatch.setattr(module, "complete", lambda *arguments: [next(answers) for _ in arguments[2]])
    result = quietly(run, "humaneval", allow_code_execution=True, temperature=1.0, samples=2, batch_size=1)
    assert result.scores["pass@1"].mean == 0.5
    assert [row["passed"] for row in pq.read_table(result.answers).to_pylist()] == [True, True, False, False]


def test_notes_say_how_answers_were_judged_and_no_more_are_judged_at_once_than_there_is_time_for(run, monkeypatch):
    answers = iter(["late", "late", "right", "wrong"])
    pools = []

    def judged(problem, answer):
        return Verdict(
            {"passed": answer == "right"}, answer, notes=("no Landlock", *["no verdict"] * (answer == "late"))
        )

    def pool(workers):
        pools.append(workers)
        return ThreadPoolExecutor(workers)

    task = get_task("humaneval")
    monkeypatch.setattr(module, "complete", lambda *arguments: [next(answers) for _ in arguments[2]])
    monkeypatch.setattr(judging, "usable_cores", lambda: 64)
    monkeypatch.setattr(judging, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(
        module, "get_task", lambda name: replace(task, generation=replace(task.generation, judge=judged))
    )
    result = quietly(run, "humaneval", allow_code_execution=True, temperature=1.0, samples=2)
    assert result.notes[-2:] == ("4 of 4 answers: no Landlock", "2 of 4 answers: no verdict")
    assert pools == [8]


def test_what_does_not_fit_is_refused(run, trained):
    for options, message in (
        ({"samples": 2}, "at temperature 0"),
        ({"rows": 0}, "rows is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"max_new_tokens": 64}, "the model reads 48 tokens"),
        ({"task": "mrpc"}, "answers to mrpc are not generated"),
        ({"task": None}, "own files"),
    ):
        with pytest.raises(ConfigError, match=message):
            quietly(run, **options)
    with pytest.raises(ConfigError, match="trained a classifier"):
        quietly(trained["texts"])


def test_a_damaged_file_of_answers_is_named(run):
    file = quietly(run).answers.with_suffix(".jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], "{}", *lines[2:]]) + "\n")
    with pytest.raises(CheckpointError, match=r"line 2 is damaged"):
        quietly(run)


# drawing, and estimating from what is drawn


def test_drawing_follows_the_distribution():
    """Of 4,000 draws over five tokens, each count within four standard errors of its expectation."""
    scores = torch.tensor([[1.0, 0.0, -1.0, 2.0, -float("inf")]])
    found = Drawn(range(4000))(None, scores.repeat(4000, 1)).argmax(-1)
    counts, p = torch.bincount(found, minlength=5), scores.softmax(-1)[0]
    assert counts[4] == 0
    assert ((counts - 4000 * p).abs() <= 4 * (4000 * p * (1 - p)).sqrt()).all()


def test_what_is_drawn_for_a_row_does_not_depend_on_the_batch():
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = Drawn([7, 8, 9])(None, scores)
    alone = Drawn([8])(None, scores[1:2])
    assert torch.equal(together[1:2], alone)


def test_pass_at_k_is_the_mean_over_subsets():
    from itertools import combinations

    for n in (1, 4, 6):
        for c in range(n + 1):
            for k in range(1, n + 1):
                chosen = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))
