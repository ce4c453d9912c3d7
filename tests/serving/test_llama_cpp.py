"""A real llama.cpp computes with our GGUF files what we compute."""

from __future__ import annotations

import json
import urllib.request

import pytest
import torch

from tests.serving.conftest import DRAWS, PROMPTS, Adapted

pytestmark = pytest.mark.serving
TOP = 200


def next_token(adapted: Adapted, address: str, prompt: str, adapter: int | None) -> dict[int, float]:
    """llama.cpp's log-probabilities of the likeliest next tokens."""
    body = {
        "prompt": adapted.tokenizer(prompt)["input_ids"],
        "n_predict": 1,
        "n_probs": TOP,
        "temperature": 0,
        "cache_prompt": False,  # it would take keys and values that another adapter made for the same prompt
        "lora": [{"id": i, "scale": float(i == adapter)} for i in range(DRAWS + 1)],
    }
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        found = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
    return {each["id"]: each["logprob"] for each in found}


def test_log_probabilities_agree(adapted: Adapted, llama_cpp_address: str) -> None:
    differences, moved = [], []
    for adapter, draw in enumerate((None, *range(DRAWS))):
        of_adapter = []
        for prompt in PROMPTS:
            found = next_token(adapted, llama_cpp_address, prompt, adapter)
            expected = adapted.log_probs(prompt, draw)
            ids = torch.tensor(list(found))
            of_adapter.append((torch.tensor(list(found.values())) - expected[ids]).abs().mean())
            if adapter:
                moved.append((expected - adapted.log_probs(prompt, None))[ids].abs().mean())
        differences.append(torch.stack(of_adapter).mean().item())
    print(f"mean differences from llama.cpp: {differences}; of draws from the mean: {torch.stack(moved).mean():.3f}")
    assert max(differences) < 0.005
    assert torch.stack(moved).mean() > 0.02, "the draws must differ by more than the tolerance"
