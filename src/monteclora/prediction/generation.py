"""Prompts as a causal LM saw them in training, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from monteclora.data.encoding import encode_prompt
from monteclora.data.truncation import Truncation
from monteclora.errors import ConfigError
from monteclora.prediction.predictive import evaluating

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["complete", "encode_prompts"]


def encode_prompts(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_new_tokens: int,
    truncation: Truncation = "prompt_start",
) -> tuple[list[dict[str, list[int]]], tuple[str, ...]]:
    """The tokens up to where the answer begins, exactly as training had them; also what was cut, in words.

    Args:
        rows: with ``prompt``; or ``messages``, whose last answer, if they end with one, is what is asked for.
        tokenizer: of the model.
        max_length: most tokens of a prompt.
        max_new_tokens: how many tokens must find room behind them.
        truncation: ``prompt_end`` cuts the end of longer prompts, any other their start.

    Raises:
        ConfigError: prompt and answer together are longer than the model reads.
    """
    limit = tokenizer.model_max_length
    if max_length + max_new_tokens > limit:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens}, and behind a prompt of data.max_length {max_length} tokens the model "
            f"has room for {max(limit - max_length, 0)}",
            "Ask for fewer.",
        )
    found = [encode_prompt(row, tokenizer, max_length, truncation) for row in rows]
    prompts = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids, _ in found]
    cut = sum(is_cut for _, is_cut in found)
    return prompts, (f"{cut} of {len(rows)} prompts were truncated to {max_length} tokens",) if cut else ()


def complete(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[dict[str, list[int]]], max_new_tokens: int
) -> list[str]:
    """The greedy answers at the adapter's mean; special tokens are left out of the text.

    Args:
        model: with a language-modelling head.
        tokenizer: the model's.
        prompts: encoded, as :func:`encode_prompts` gives them.
        max_new_tokens: most tokens of an answer.
    """
    batch = tokenizer.pad(list(prompts), padding_side="left", return_tensors="pt")
    inputs = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
    with evaluating(model), torch.no_grad():
        tokens = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=_end_tokens(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
    answers: list[str] = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What training put at the end of an answer, and what the pretrained model knows as an end."""
    known = model.generation_config.eos_token_id
    listed = known if isinstance(known, list) else [known]
    return sorted({token for token in (*listed, tokenizer.eos_token_id) if token is not None})
