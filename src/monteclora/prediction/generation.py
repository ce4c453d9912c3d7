"""Prompts as a causal LM saw them in training, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from monteclora.data.encoding import Encoder
from monteclora.data.truncation import Truncated, Truncation
from monteclora.errors import ConfigError
from monteclora.prediction.predictive import evaluating
from monteclora.prediction.sampler import Batched, Sampler
from monteclora.prediction.tokens import one_by_one

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Decoding", "Drawn", "complete", "complete_by_draws", "complete_tokens", "encode_prompts", "token_texts"]


def encode_prompts(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_new_tokens: int,
    truncation: Truncation = "prompt_start",
) -> tuple[list[dict[str, list[int]]], Truncated]:
    """The tokens up to where the answer begins, exactly as training had them; also what was cut.

    Args:
        rows: with ``prompt``; or ``messages``, whose last answer, if they end with one, is what is asked for.
        tokenizer: of the model.
        max_length: most tokens of a prompt.
        max_new_tokens: how many tokens must fit after them.
        truncation: ``prompt_end`` cuts the end of longer prompts, any other their start.

    Raises:
        ConfigError: prompt and answer together are longer than the model reads.
    """
    limit = tokenizer.model_max_length
    if max_length + max_new_tokens > limit:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens}, and after a prompt of data.max_length {max_length} tokens the model "
            f"has room for {max(limit - max_length, 0)}",
            "Ask for fewer.",
        )
    encoder = Encoder(tokenizer)
    found = [encoder.prompt(row, max_length, truncation) for row in rows]
    prompts = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids, _ in found]
    cut = sum(is_cut for _, is_cut in found)
    return prompts, Truncated(cut, len(rows), "prompts", max_length)


@dataclass(frozen=True)
class Decoding:
    """How an answer is written.

    Args:
        max_new_tokens: most tokens of an answer.
        temperature: of the next-token distribution; 0 takes the most probable token.
        top_p: only the most probable tokens whose probabilities add up to this are drawn from.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1", "Allow more.")
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}, expected 0 or more", "Use 0 for no sampling.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}, expected above 0 and at most 1", "Use 1 for all tokens.")


def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[dict[str, list[int]]],
    decoding: Decoding,
    seeds: Sequence[int] = (),
) -> list[str]:
    """The texts of :func:`complete_tokens`, without special tokens."""
    found = complete_tokens(model, tokenizer, prompts, decoding, seeds)
    answers: list[str] = tokenizer.batch_decode(found, skip_special_tokens=True)
    return answers


def complete_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[dict[str, list[int]]],
    decoding: Decoding,
    seeds: Sequence[int] = (),
) -> list[list[int]]:
    """The answers to a batch of prompts in tokens, with the one that ends each; keys and values are cached.

    Args:
        model: with a language-modelling head.
        tokenizer: the model's.
        prompts: encoded, as :func:`encode_prompts` gives them.
        decoding: how.
        seeds: of each prompt's random numbers, where the temperature is above 0. An answer depends on its own seed,
            neither on the other prompts nor on the global generators.
    """
    batch = tokenizer.pad(list(prompts), padding_side="left", return_tensors="pt")
    inputs = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
    ends = _end_tokens(model, tokenizer)
    with evaluating(model), torch.no_grad():
        tokens = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=decoding.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=_processors(decoding, seeds),
        )
    return [_until(row, ends) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Up to the first that is an end; what follows it is padding."""
    length = next((number for number, token in enumerate(tokens, start=1) if token in ends), len(tokens))
    return tokens[:length]


def complete_by_draws(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[dict[str, list[int]]],
    decoding: Decoding,
    sampler: Sampler,
    count: int,
) -> list[list[str]]:
    """The answers of ``count`` draws to each of a batch of prompts, draw by draw, each by the most probable tokens.

    Draws that can share forward passes write their answers as one batch.
    """

    def run(together: bool) -> list[list[str]]:
        if together:
            assert isinstance(sampler, Batched)
            with sampler.draws(model, 0, count):
                texts = complete(model, tokenizer, [*prompts] * count, decoding)
            return [texts[row :: len(prompts)] for row in range(len(prompts))]
        by_draw = []
        for number in range(count):
            with sampler.draw(model, number):
                by_draw.append(complete(model, tokenizer, prompts, decoding))
        return [list(texts) for texts in zip(*by_draw, strict=True)]

    return one_by_one(sampler, run)


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text; joined, they are the whole, special tokens with it.

    A character of several tokens stands with the last of them.
    """
    found, shown = [], ""
    for length in range(1, len(tokens) + 1):
        text = tokenizer.decode(list(tokens[:length]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = text if length == len(tokens) or not text.endswith("\N{REPLACEMENT CHARACTER}") else shown
        found.append(whole[len(shown) :])
        shown = whole
    return found


def _processors(decoding: Decoding, seeds: Sequence[int]) -> Any:
    import transformers

    if not decoding.temperature:
        return transformers.LogitsProcessorList()
    found = [transformers.TemperatureLogitsWarper(decoding.temperature)]
    if decoding.top_p < 1:
        found.append(transformers.TopPLogitsWarper(decoding.top_p))
    return transformers.LogitsProcessorList([*found, Drawn(seeds)])


class Drawn:
    """Makes the most probable token one that is drawn: the maximum of log-probabilities with Gumbel noise.

    Each row has a generator of its own, so that what is drawn for it does not depend on the batch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores, shape (B, V), with noise."""
        exponential = torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self._generators]
        )
        noise = -exponential.clamp_min(torch.finfo(exponential.dtype).tiny).log()
        return scores.float() + noise.to(scores.device)


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What training put at the end of an answer, and what the pretrained model knows as an end."""
    known = model.generation_config.eos_token_id
    listed = known if isinstance(known, list) else [known]
    return sorted({token for token in (*listed, tokenizer.eos_token_id) if token is not None})
