"""Token by token: against one forward pass without a cache for each draw, and as identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monteclora.adapters.active import posterior_sampling
from monteclora.adapters.sampler import Posterior
from monteclora.prediction import tokens as module
from monteclora.prediction.ensemble import Ensemble, Members
from monteclora.prediction.mc_dropout import MCDropout
from monteclora.prediction.sampler import MEAN
from monteclora.prediction.tokens import score_tokens
from tests.models import gpt2, llama, wrapped

CLOSE = {"atol": 1e-10, "rtol": 0}
NAMES = ("draw_log_probs", "total", "aleatoric", "epistemic")


def drawn(lengths, seed):
    generator = np.random.default_rng(seed)
    return [generator.integers(2, 96, size=n).tolist() for n in lengths]


PROMPTS, TEXTS = drawn((3, 7, 1, 5), 0), drawn((6, 1, 4, 9), 1)


@torch.no_grad()
def distributions(model, prompt, text):
    """p(. | what is before) of each token of a text, (T, V): one pass over the whole, nothing cached or padded."""
    ids = torch.tensor([[*prompt, *text]])
    return model.eval()(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].softmax(-1)


def assert_same(found, expected, **close):
    for one, other in zip(found, expected, strict=True):
        for name in NAMES:
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), **(close or CLOSE), err_msg=name)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_equals_a_pass_for_each_draw_and_text(build, batch_size, monkeypatch):
    model = wrapped(build).double()
    monkeypatch.setattr(module, "_NUMBERS", 4 * 3 * 96 * 4)  # parts of a few tokens
    found = score_tokens(model, PROMPTS, TEXTS, sampler=Posterior(3, seed=5), batch_size=batch_size)
    for prompt, text, scores in zip(PROMPTS, TEXTS, found, strict=True):
        probs = []
        for number in range(3):
            with posterior_sampling(model, 5, first=number, resample=False):
                probs.append(distributions(model, prompt, text).numpy())
        probs = np.stack(probs)
        mean = probs.mean(0)
        np.testing.assert_array_equal(scores.tokens, text)
        at = np.arange(len(text)), text
        np.testing.assert_allclose(np.exp(scores.draw_log_probs), probs[:, *at], **CLOSE)
        np.testing.assert_allclose(np.exp(scores.log_probs), mean[at], **CLOSE)
        total, aleatoric = -(mean * np.log(mean)).sum(-1), -(probs * np.log(probs)).sum(-1).mean(0)
        np.testing.assert_allclose(scores.total, total, **CLOSE)
        np.testing.assert_allclose(scores.aleatoric, aleatoric, **CLOSE)
        np.testing.assert_allclose(scores.epistemic, total - aleatoric, **CLOSE)
        np.testing.assert_allclose(scores.total, scores.aleatoric + scores.epistemic, **CLOSE)
        assert scores.epistemic.min() >= 0
        assert scores.epistemic.max() > 1e-5
        sequence = scores.sequence()
        assert sequence.log_probability == pytest.approx(np.log(mean[at]).sum())
        assert sequence.mean_log_probability == pytest.approx(np.log(mean[at]).mean())
        assert (sequence.max_total, sequence.sum_epistemic) == (scores.total.max(), scores.epistemic.sum())
        assert sequence.mean_total == pytest.approx(scores.total.mean())


def test_in_float32_the_identities_hold_to_1e_6():
    model, sampler = wrapped(llama), Posterior(4, seed=1)
    cached = score_tokens(model, PROMPTS, TEXTS, sampler=sampler)
    assert_same(score_tokens(model, PROMPTS, TEXTS, sampler=sampler, cached=False), cached, atol=1e-6, rtol=1e-6)
    for scores in cached:
        np.testing.assert_allclose(scores.total, scores.aleatoric + scores.epistemic, atol=1e-6, rtol=0)
        assert scores.epistemic.min() >= 0
    still = wrapped(llama, sample_scale=1e-30)
    for scores in score_tokens(still, PROMPTS, TEXTS, sampler=sampler):
        np.testing.assert_allclose(scores.epistemic, 0.0, atol=1e-6)


def test_draws_that_cannot_share_a_pass_are_made_one_at_a_time(monkeypatch):
    model, sampler = wrapped(llama).double(), Posterior(3, seed=2)
    expected = score_tokens(model, PROMPTS, TEXTS, sampler=sampler)
    monkeypatch.setattr("monteclora.adapters.row_checks.RowChecks._disorder", lambda *_: "'q_proj' (for the test)")
    with pytest.warns(UserWarning, match="q_proj.* one at a time"):
        found = score_tokens(model, PROMPTS, TEXTS, sampler=sampler)
    assert_same(found, expected)


def test_draws_of_the_last_blocks_alone():
    model = wrapped(llama).double()
    found = score_tokens(model, PROMPTS, TEXTS, sampler=Posterior(3, seed=5, layers=1))
    for prompt, text, scores in zip(PROMPTS, TEXTS, found, strict=True):
        for number in range(3):
            with posterior_sampling(model, 5, first=number, resample=False, layers=1):
                probs = distributions(model, prompt, text).numpy()
            expected = np.log(probs[np.arange(len(text)), text])
            np.testing.assert_allclose(scores.draw_log_probs[number], expected, **CLOSE)


def test_other_samplers_and_models_without_a_cache(monkeypatch):
    dropout = wrapped(llama, lora_dropout=0.4).double()
    members = Members([wrapped(llama, seed=i).double() for i in range(2)])
    cases = ((dropout, MCDropout(3, seed=1)), (members, Ensemble(2)), (dropout, MEAN))
    before = [score_tokens(model, PROMPTS, TEXTS, sampler=sampler) for model, sampler in cases]
    assert max(scores.epistemic.max() for scores in before[0]) > 1e-4
    assert all((scores.epistemic == 0).all() for scores in before[2])
    for (model, sampler), found in zip(cases[:2], before, strict=False):
        for number in range(sampler.num_samples):
            with sampler.draw(model, number):
                probs = distributions(model, PROMPTS[0], TEXTS[0]).numpy()
            expected = np.log(probs[np.arange(len(TEXTS[0])), TEXTS[0]])
            np.testing.assert_allclose(found[0].draw_log_probs[number], expected, **CLOSE)
    monkeypatch.setattr(module, "cache_name", lambda _: None)
    monkeypatch.setattr("monteclora.prediction.cached.cache_name", lambda _: None)
    for (model, sampler), expected in zip(cases, before, strict=True):
        assert_same(score_tokens(model, PROMPTS, TEXTS, sampler=sampler), expected)
