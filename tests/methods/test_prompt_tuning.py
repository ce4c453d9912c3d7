"""Virtual tokens are not seen from outside: a row's logits are its own, whatever stands beside it in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from monteclora.errors import ConfigError
from monteclora.methods import get_method
from tests.methods.common import wrap
from tests.models import PAD, bert, gpt2, llama, llama_classifier, t5, tokens

VIRTUAL = 5


def prompted(build: Any, kind: str) -> Any:
    return wrap(get_method("prompt_tuning"), build(), kind, num_virtual_tokens=VIRTUAL).eval()


def padded(ids: Tensor, before: int, behind: int) -> dict[str, Tensor]:
    rows = len(ids)
    left, right = (torch.full((rows, count), PAD) for count in (before, behind))
    mask = torch.cat([torch.zeros_like(left), torch.ones_like(ids), torch.zeros_like(right)], 1)
    return {"input_ids": torch.cat([left, ids, right], 1), "attention_mask": mask}


def by_hand(model: Any, ids: Tensor) -> Tensor:
    """The base model on the embeddings of prompt and tokens, without padding."""
    embedded = model.get_base_model().get_input_embeddings()(ids)
    prompt = model.prompt_encoder["default"].embedding.weight.expand(len(ids), -1, -1)
    return model.get_base_model()(inputs_embeds=torch.cat([prompt, embedded], 1)).logits


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize(("before", "behind"), [(0, 0), (0, 3), (3, 0), (2, 2)])
@torch.no_grad()
def test_logits_of_a_language_model_are_those_of_its_own_tokens(build: Any, before: int, behind: int) -> None:
    model, ids = prompted(build, "causal_lm"), tokens(3, 6)
    expected = by_hand(model, ids)[:, VIRTUAL:]
    given = padded(ids, before, behind)
    found = model(**given).logits
    assert found.shape[1] == 6 + before + behind
    torch.testing.assert_close(found[:, before : before + 6], expected, rtol=1e-4, atol=1e-5)
    columns = torch.tensor([before + 1, before + 4])
    torch.testing.assert_close(model(**given, logits_to_keep=columns).logits, expected[:, [1, 4]], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_loss_is_that_of_its_own_tokens() -> None:
    model, ids = prompted(llama, "causal_lm"), tokens(3, 6)
    labels = ids.clone()
    labels[:, :2] = -100
    logits = by_hand(model, ids)[:, VIRTUAL:-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(model(**padded(ids, 0, 0), labels=labels).loss, expected)


@pytest.mark.parametrize("build", [llama, gpt2])
@torch.no_grad()
def test_completions_do_not_depend_on_padding(build: Any) -> None:
    model, ids = prompted(build, "causal_lm"), tokens(2, 5)
    written = ids
    for _ in range(4):
        written = torch.cat([written, by_hand(model, written)[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    for before in (0, 3):
        found = model.generate(**padded(ids, before, 0), **options)
        assert torch.equal(found[:, before:], written)


@pytest.mark.parametrize("build", [llama, gpt2])
@torch.no_grad()
def test_keys_and_values_that_are_kept_hold_the_prompt(build: Any) -> None:
    """As options are scored: the prompts of rows in one pass, padded on the left, what follows in another."""
    model, ids = prompted(build, "causal_lm"), tokens(2, 7)
    given = padded(ids, 3, 0)
    first = model(input_ids=given["input_ids"][:, :8], attention_mask=given["attention_mask"][:, :8], use_cache=True)
    name = "past_key_values" if "past_key_values" in first else "cache"
    found = model(
        input_ids=given["input_ids"][:, 8:],
        attention_mask=given["attention_mask"],
        use_cache=True,
        **{name: first[name]},
    )
    torch.testing.assert_close(found.logits, by_hand(model, ids)[:, VIRTUAL + 5 :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [bert, llama_classifier])
@pytest.mark.parametrize("behind", [0, 3])
@torch.no_grad()
def test_classes_do_not_depend_on_padding(build: Any, behind: int) -> None:
    model, ids = prompted(build, "classification"), tokens(3, 6)
    found = model(**padded(ids, 0, behind)).logits
    torch.testing.assert_close(found, by_hand(model, ids), rtol=1e-4, atol=1e-5)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be merged"):
        get_method("prompt_tuning").merge(prompted(llama, "causal_lm"))
    with pytest.raises(ConfigError, match="in one stack"):
        prompted(t5, "causal_lm")
