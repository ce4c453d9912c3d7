import numpy as np
import pytest
import torch

from monteclora.adapters.active import posterior_sampling
from monteclora.adapters.sampler import Posterior
from monteclora.errors import DataError
from monteclora.prediction.options import predict_options
from tests.models import gpt2, llama, wrapped
from tests.prediction.rows import SIDES, padding


def log_likelihood(model, ids, start, end=None):
    """Sum of log p(ids[i] | ids[:i]) for i in start .. end - 1, one row alone, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(start, end or len(ids)))


def options_for(prompt, endings):
    return [{"input_ids": [*prompt, *ending]} for ending in endings]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_options_of_one_token_are_next_token_probabilities(build, side):
    model = wrapped(build)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    rows = [options_for(prompt, [[20, 21, 1], [20, 22, 1], [20, 23, 1]]) for prompt in prompts]
    found = predict_options(model, rows, padding(side), batch_size=4)
    for prompt, probs in zip(prompts, found.probs, strict=True):
        scores = [log_likelihood(model, [*prompt, 20, last], len(prompt) + 1) for last in (21, 22, 23)]
        np.testing.assert_allclose(probs, np.exp(scores) / np.exp(scores).sum(), atol=1e-6)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_options_of_several_tokens_add_up_from_where_they_part_to_the_shared_end(build, side):
    model = wrapped(build)
    prompt, endings = [5, 6, 7], [[20, 21, 22, 1], [20, 23, 24, 25, 1]]
    rows = [options_for(prompt, endings), options_for([9, 9, 9, 9, 9], [[30, 1], [31, 1], [32, 1]])]
    found = predict_options(model, rows, padding(side), batch_size=1)
    scores = [log_likelihood(model, [*prompt, *ending], 4, len(prompt) + len(ending) - 1) for ending in endings]
    np.testing.assert_allclose(found.probs[0, :2], np.exp(scores) / np.exp(scores).sum(), atol=1e-6)
    assert found.probs[0, 2] == 0.0
    assert found.total[0] <= np.log(2)


def test_an_option_that_begins_another_is_told_apart_by_its_end():
    """Without the end token the shorter one would have nothing to be scored by, and win always."""
    model, prompt, endings = wrapped(llama), [5, 6, 7], [[20, 21, 1], [20, 21, 22, 1]]
    found = predict_options(model, [options_for(prompt, endings)], padding())
    scores = [log_likelihood(model, [*prompt, *ending], 5) for ending in endings]
    np.testing.assert_allclose(found.probs[0], np.exp(scores) / np.exp(scores).sum(), atol=1e-6)


def test_options_under_draws_average_the_probabilities_of_each_draw():
    model, prompt, endings = wrapped(llama), [5, 6, 7], [[20, 21, 1], [23, 1], [24, 25, 1]]
    found = predict_options(model, [options_for(prompt, endings)], padding(), sampler=Posterior(3, seed=5))
    draws = []
    for number in range(3):
        with posterior_sampling(model, 5, first=number, resample=False):
            ends = [len(prompt) + len(ending) - 1 for ending in endings]
            scores = [log_likelihood(model, [*prompt, *e], 3, end) for e, end in zip(endings, ends, strict=True)]
        draws.append(np.exp(scores) / np.exp(scores).sum())
    np.testing.assert_allclose(found.probs[0], np.mean(draws, 0), atol=1e-6)
    assert found.epistemic[0] > 0


def test_options_that_cannot_be_told_apart_are_refused():
    rows = [options_for([5], [[2], [3]]), options_for([5], [[2, 3], [4], [2, 3]])]
    with pytest.raises(DataError, match="two options of row 1 have the same tokens"):
        predict_options(wrapped(llama), rows, padding())
