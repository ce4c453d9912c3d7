"""A real llama.cpp computes with our GGUF files what we compute."""

from __future__ import annotations

import json
import urllib.request

import numpy as np
import pytest
import torch

from monteclora.adapters.sampler import Posterior
from monteclora.prediction.options import OptionRow, score_options
from monteclora.prediction.tokens import score_tokens
from monteclora.serving import Client
from tests.serving.conftest import DRAWS, PROMPTS, SEED, Served

pytestmark = pytest.mark.serving
TOP = 200


def next_token(served: Served, prompt: str, adapter: int | None) -> dict[int, float]:
    """llama.cpp's log-probabilities of the likeliest next tokens."""
    body = {
        "prompt": served.tokenizer(prompt)["input_ids"],
        "n_predict": 1,
        "n_probs": TOP,
        "temperature": 0,
        "cache_prompt": False,  # it would take keys and values that another adapter made for the same prompt
        "lora": [{"id": i, "scale": float(i == adapter)} for i in range(DRAWS + 1)],
    }
    request = urllib.request.Request(
        f"{served.address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        found = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
    return {each["id"]: each["logprob"] for each in found}


def test_log_probabilities_agree(served: Served) -> None:
    differences, moved = [], []
    for adapter, draw in enumerate((None, *range(DRAWS))):
        of_adapter = []
        for prompt in PROMPTS:
            found = next_token(served, prompt, adapter)
            expected = served.log_probs(prompt, draw)
            ids = torch.tensor(list(found))
            of_adapter.append((torch.tensor(list(found.values())) - expected[ids]).abs().mean())
            if adapter:
                moved.append((expected - served.log_probs(prompt, None))[ids].abs().mean())
        differences.append(torch.stack(of_adapter).mean().item())
    print(f"mean differences from llama.cpp: {differences}; of draws from the mean: {torch.stack(moved).mean():.3f}")
    assert max(differences) < 0.005
    assert torch.stack(moved).mean() > 0.02, "the draws must differ by more than the tolerance"


def test_the_clients_numbers_are_ours(served: Served) -> None:
    """Along completions and over options, with as many tokens named as the vocabulary has, and with twenty."""
    sampler, tokenizer = Posterior(DRAWS, SEED), served.tokenizer
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:4]]
    texts = [tokenizer(" a thing of great beauty.")["input_ids"]] * 4
    ours = score_tokens(served.model, prompts, texts, sampler=sampler)
    rows = [
        OptionRow(prompt, [tokenizer(" good")["input_ids"], tokenizer(" bad luck")["input_ids"]]) for prompt in prompts
    ]
    options = score_options(served.model, rows, sampler=sampler).predictions()
    vocabulary = served.model.get_base_model().config.vocab_size
    worst: dict[str, float] = {}
    with Client(served.address, top=vocabulary, timeout=600) as client, Client(served.address, timeout=600) as short:
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
    assert worst["draw_log_probs"] < 0.05
    assert worst["epistemic"] < 1e-4  # of up to 0.0013
    assert worst["total"] < 0.02
    assert worst["options epistemic"] < 1e-5
