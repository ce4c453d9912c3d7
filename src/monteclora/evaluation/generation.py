"""Prompts as a causal LM saw them in training, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from monteclora.data.encoding import IGNORED, encode
from monteclora.errors import ConfigError
from monteclora.evaluation.loading import LoadedRun
from monteclora.evaluation.predictive import evaluating

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["complete", "encode_prompts"]


def encode_prompts(
    loaded: LoadedRun, rows: Dataset, max_new_tokens: int
) -> tuple[list[dict[str, list[int]]], tuple[str, ...]]:
    """The tokens up to where the answer begins, exactly as training had them; also what was cut, in words.

    Args:
        loaded: a causal LM.
        rows: with ``prompt``; or ``messages``, whose last answer is what is asked for.
        max_new_tokens: how many tokens must find room behind them.

    Raises:
        ConfigError: prompt and answer together are longer than the model reads.
    """
    longest, limit = loaded.recipe.data.max_length, loaded.tokenizer.model_max_length
    if longest + max_new_tokens > limit:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens}, and behind a prompt of data.max_length {longest} tokens the model "
            f"has room for {max(limit - longest, 0)}",
            "Ask for fewer.",
        )
    encoded = encode(rows.map(_without_answer), loaded.kind, loaded.tokenizer, longest)
    prompts = []
    for row in encoded.dataset:
        end = len(row["labels"])
        while row["labels"][end - 1] != IGNORED:  # the end of the empty answer
            end -= 1
        prompts.append({"input_ids": row["input_ids"][:end], "attention_mask": [1] * end})
    cut = encoded.shortened
    return prompts, (f"{cut} of {len(rows)} prompts were shortened to {longest} tokens",) if cut else ()


def _without_answer(row: dict[str, Any]) -> dict[str, Any]:
    if "messages" in row:
        *before, last = row["messages"]
        return {"messages": [*before, {**last, "content": ""}]}
    return {"completion": ""}


def complete(loaded: LoadedRun, prompts: Sequence[dict[str, list[int]]], max_new_tokens: int) -> list[str]:
    """The most likely answers, token by token, at the posterior's mean; special tokens are left out of the text."""
    tokenizer, model = loaded.tokenizer, loaded.model
    batch = tokenizer.pad(list(prompts), padding_side="left", return_tensors="pt")
    inputs = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
    with evaluating(model), torch.no_grad():
        tokens = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=_end_tokens(loaded),
            pad_token_id=tokenizer.pad_token_id,
        )
    answers: list[str] = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def _end_tokens(loaded: LoadedRun) -> list[int]:
    """What training put at the end of an answer, and what the pretrained model knows as an end."""
    known = loaded.model.generation_config.eos_token_id
    listed = known if isinstance(known, list) else [known]
    return sorted({token for token in (*listed, loaded.tokenizer.eos_token_id) if token is not None})
