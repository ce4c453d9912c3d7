"""A real vLLM computes with our adapters what we compute."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import monteclora
from monteclora.serving import Client
from tests.serving.conftest import DRAWS, PROMPTS, SEED, Adapted

pytestmark = pytest.mark.serving


@torch.no_grad()
def log_probs(adapted: Adapted, prompt: list[int], text: list[int], draw: int | None) -> Tensor:
    """Of a text's tokens behind a prompt, under a draw, or the mean."""
    drawing = (
        monteclora.posterior_sampling(adapted.model, SEED, first=draw, resample=False) if draw is not None else None
    )
    with drawing or nullcontext():
        logits = adapted.model(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(text)), text]


def test_log_probabilities_agree(adapted: Adapted, vllm_address: str) -> None:
    """Along a text behind twenty prompts, under the mean and under each draw."""
    draws = {"mean": None, **{f"sample-{draw}": draw for draw in range(DRAWS)}}
    text = adapted.tokenizer(" a thing of great beauty.")["input_ids"]
    differences, moved = [], []
    with Client(vllm_address, list(draws), timeout=600) as client:
        for each in PROMPTS:
            prompt = adapted.tokenizer(each)["input_ids"]
            ours = torch.stack([log_probs(adapted, prompt, text, draw) for draw in draws.values()])
            differences.append((torch.from_numpy(client.score(prompt, text).scores.draw_log_probs) - ours).abs())
            moved.append((ours[1:] - ours[0]).abs().mean())
    worst = torch.stack(differences).amax((0, 2)).tolist()
    print(f"largest differences from vLLM: {dict(zip(draws, worst, strict=True))}")
    assert max(worst) < 1e-3
    assert torch.stack(moved).mean() > 0.02, "the draws must differ by more than the tolerance"
