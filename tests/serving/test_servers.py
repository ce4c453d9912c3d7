"""What the client makes of real servers' answers is what the model at hand says."""

from __future__ import annotations

import numpy as np
import pytest

from monteclora.adapters.sampler import Posterior
from monteclora.prediction.options import OptionRow, score_options
from monteclora.prediction.tokens import score_tokens
from monteclora.serving import Client
from tests.serving.conftest import DRAWS, PROMPTS, SEED, Adapted

pytestmark = pytest.mark.serving
# of log-probabilities and of total uncertainty: llama.cpp rounds keys, values and activations, vLLM computes in float32
TOLERANCES = {"llama_cpp": (0.05, 0.02), "vllm": (1e-3, 1e-3)}


@pytest.mark.parametrize("server", TOLERANCES)
def test_the_clients_numbers_are_ours(adapted: Adapted, server: str, request: pytest.FixtureRequest) -> None:
    """Along completions and over options, with as many tokens named as the vocabulary has, and with twenty."""
    address = request.getfixturevalue(f"{server}_address")
    sampler, tokenizer = Posterior(DRAWS, SEED), adapted.tokenizer
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:4]]
    texts = [tokenizer(" a thing of great beauty.")["input_ids"]] * 4
    ours = score_tokens(adapted.model, prompts, texts, sampler=sampler)
    rows = [
        OptionRow(prompt, [tokenizer(" good")["input_ids"], tokenizer(" bad luck")["input_ids"]]) for prompt in prompts
    ]
    options = score_options(adapted.model, rows, sampler=sampler).predictions()
    vocabulary = adapted.model.get_base_model().config.vocab_size
    worst: dict[str, float] = {}
    with Client(address, top=vocabulary, timeout=600) as client, Client(address, timeout=600) as short:
        assert client.adapters == tuple(f"sample-{i}" for i in range(DRAWS))
        for number, (prompt, text, expected) in enumerate(zip(prompts[:2], texts, ours, strict=False)):
            found = client.score(prompt, text)
            for name in ("draw_log_probs", "total", "aleatoric", "epistemic"):
                difference = np.abs(getattr(found.scores, name) - getattr(expected, name))
                worst[name] = max(worst.get(name, 0.0), float(difference.max()))
            part = short.score(prompt, text)
            assert (part.scores.epistemic <= found.scores.epistemic + 1e-6).all()
            assert (part.covered < 1).all()
            chosen = client.options(prompt, rows[number].options)
            for name in ("total", "epistemic"):
                difference = abs(getattr(chosen, name)[0] - getattr(options, name)[number])
                worst[f"options {name}"] = max(worst.get(f"options {name}", 0.0), float(difference))
    print(
        f"largest differences from ours: {worst}; our epistemic: {[scores.epistemic.round(4) for scores in ours[:2]]}"
    )
    log_probs, total = TOLERANCES[server]
    assert worst["draw_log_probs"] < log_probs
    assert worst["total"] < total
    assert worst["epistemic"] < 1e-4  # of up to 0.0013
    assert worst["options epistemic"] < 1e-5
