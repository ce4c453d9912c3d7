import numpy as np
import pytest
import torch

from monteclora.adapters.active import posterior_sampling
from monteclora.adapters.sampler import Posterior
from monteclora.errors import DataError
from monteclora.prediction import options as module
from monteclora.prediction.options import OptionRow, score_options
from tests.models import END, gpt2, llama, wrapped

ENDS = frozenset({END})
CLOSE = {"atol": 1e-10, "rtol": 0}


def exact(build):
    """In float64, where a shared prompt and a loop over the options differ by rounding alone."""
    return wrapped(build).double()


def log_likelihood(model, prompt, option):
    """log p(option | prompt): the option alone with its prompt, without a cache, in evaluation mode."""
    model.eval()
    ids = [*prompt, *option]
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))


def rows_like_questions(count, seed=0):
    """Prompts of 2 to 12 tokens with 2 to 4 options of 1 to 6, some of which begin alike, all with an end."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        shared = generator.integers(2, 96, size=generator.integers(0, 3)).tolist()
        firsts = generator.permutation(np.arange(2, 96))[: generator.integers(2, 5)].tolist()
        rests = [generator.integers(2, 96, size=generator.integers(0, 4)).tolist() for _ in firsts]
        options = [[*shared, first, *rest, END] for first, rest in zip(firsts, rests, strict=True)]
        rows.append(OptionRow(generator.integers(2, 96, size=generator.integers(2, 13)).tolist(), options))
    return rows


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_equals_a_loop_over_the_options(build, batch_size):
    model, rows = exact(build), rows_like_questions(12)
    found = score_options(model, rows, ends=ENDS, batch_size=batch_size).log_likelihoods
    assert found.shape == (1, 12, max(len(row.options) for row in rows))
    for row, scores in zip(rows, found[0], strict=True):
        expected = [log_likelihood(model, row.prompt, option[:-1]) for option in row.options]
        np.testing.assert_allclose(scores[: len(expected)], expected, **CLOSE)
        assert (scores[len(expected) :] == -np.inf).all()


def test_equals_the_loop_under_every_draw():
    model, rows = exact(llama), rows_like_questions(5)
    found = score_options(model, rows, ends=ENDS, sampler=Posterior(3, seed=5), batch_size=8).log_likelihoods
    for number in range(3):
        with posterior_sampling(model, 5, first=number, resample=False):
            for row, scores in zip(rows, found[number], strict=True):
                expected = [log_likelihood(model, row.prompt, option[:-1]) for option in row.options]
                np.testing.assert_allclose(scores[: len(expected)], expected, **CLOSE)
    assert np.abs(found[0, :, 0] - found[1, :, 0]).max() > 1e-3


def test_the_prompt_is_read_once_for_all_options(monkeypatch):
    model = wrapped(llama)
    row = OptionRow([5, 6, 7, 8, 9], [[20, 21, 22, END], [20, 23, 24, END], [20, 25, 26, END]])
    read = []
    forward = module.step
    monkeypatch.setattr(
        module, "step", lambda m, ids, *a, **k: (read.append(tuple(ids.shape)), forward(m, ids, *a, **k))[1]
    )
    score_options(model, [row], ends=ENDS)
    assert read == [(1, 6), (3, 1)]  # the prompt with the token that all options begin with, then one token of each
    read.clear()
    score_options(model, [OptionRow([5, 6, 7], [[20, END], [21, END]])], ends=ENDS)
    assert read == [(1, 3)]  # options of one token need no pass of their own


def test_a_model_without_a_cache_reads_each_option_whole(monkeypatch):
    model, rows = exact(llama), rows_like_questions(6)
    expected = score_options(model, rows, ends=ENDS).log_likelihoods
    monkeypatch.setattr(module, "cache_name", lambda _: None)
    monkeypatch.setattr("monteclora.prediction.cached.cache_name", lambda _: None)
    np.testing.assert_allclose(score_options(model, rows, ends=ENDS).log_likelihoods, expected, **CLOSE)


def test_words_that_options_end_with_count():
    """The same words are more or less likely after one option than after another."""
    model, prompt = exact(llama), [5, 6, 7]
    found = score_options(model, [OptionRow(prompt, [[20, 30, 31, END], [21, 30, 31, END]])], ends=ENDS)
    expected = [log_likelihood(model, prompt, [first, 30, 31]) for first in (20, 21)]
    np.testing.assert_allclose(found.log_likelihoods[0, 0], expected, **CLOSE)


def test_an_option_that_begins_another_is_told_apart_by_its_end():
    """Without the end token the shorter one could never be the less likely one."""
    model, prompt, options = exact(llama), [5, 6, 7], [[20, 21, END], [20, 21, 22, END]]
    found = score_options(model, [OptionRow(prompt, options)], ends=ENDS)
    scores = [log_likelihood(model, prompt, option) for option in options]
    np.testing.assert_allclose(found.log_likelihoods[0, 0], scores, **CLOSE)


def test_probabilities_are_normalised_over_the_options_plain_or_by_length():
    model, rows = wrapped(llama), rows_like_questions(4)
    found = score_options(model, rows, ends=ENDS, sampler=Posterior(2))
    lengths = [[3 + k for k, _ in enumerate(row.options)] for row in rows]
    for predictions, divide in ((found.predictions(), False), (found.predictions(lengths), True)):
        np.testing.assert_allclose(predictions.probs.sum(-1), 1)
        for i, row in enumerate(rows):
            scores = found.log_likelihoods[:, i, : len(row.options)] / (np.array(lengths[i]) if divide else 1)
            expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            np.testing.assert_allclose(predictions.probs[i, : len(row.options)], expected.mean(0), atol=1e-12)
            assert not predictions.probs[i, len(row.options) :].any()


def test_options_that_cannot_be_told_apart_are_refused():
    rows = [OptionRow([5], [[2], [3]]), OptionRow([5], [[2, 3], [4], [2, 3]])]
    with pytest.raises(DataError, match="two options of row 1 have the same tokens"):
        score_options(wrapped(llama), rows)
