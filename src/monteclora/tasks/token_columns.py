"""What predictions of a language model say of each token of a text, as columns of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from monteclora.data.encoding import Encoder
from monteclora.data.truncation import Truncated, truncate
from monteclora.errors import ConfigError, DataError
from monteclora.prediction.agreement import agreement
from monteclora.prediction.classes import predict_classes
from monteclora.prediction.forward import batches
from monteclora.prediction.generation import Decoding, complete_by_draws, complete_tokens, token_texts
from monteclora.prediction.sampler import MEAN, Sampler
from monteclora.prediction.tokens import TokenScores, score_tokens
from monteclora.tasks.base import Predictor, uncertainties

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "Read",
    "answer_columns",
    "check_answers",
    "generated_texts",
    "given_texts",
    "next_token_columns",
    "token_columns",
    "token_scores",
]

_FIRST = ("likeliest", "confidence", "total", "aleatoric", "epistemic")


@dataclass(frozen=True)
class Read:
    """A text in tokens: what was asked, and what was answered or is given as the answer, at least one token each."""

    prompt: list[int]
    completion: list[int]


def generated_texts(predictor: Predictor, prompts: Sequence[list[int]], max_new_tokens: int) -> list[Read]:
    """Prompts with what the model answers at its mean by the most probable tokens, the token that ends it included."""
    rows = [{"input_ids": prompt, "attention_mask": [1] * len(prompt)} for prompt in prompts]
    found: dict[int, Read] = {}
    for indices in batches(rows, predictor.batch_size):
        batch = [rows[i] for i in indices]
        texts = complete_tokens(predictor.model, predictor.tokenizer, batch, Decoding(max_new_tokens))
        found |= {i: Read(prompts[i], text) for i, text in zip(indices, texts, strict=True)}
        if predictor.progress is not None:
            predictor.progress(len(indices))
    return [found[i] for i in range(len(rows))]


def given_texts(predictor: Predictor, rows: Dataset) -> tuple[list[Read], Truncated]:
    """Rows with ``prompt`` and ``completion`` in tokens, as training has them; also what was truncated.

    Raises:
        DataError: a completion has no token, or none within ``max_length``.
    """
    encoder, found, cut = Encoder(predictor.tokenizer), [], 0
    for number, row in enumerate(rows):
        whole = encoder.row(row, predictor.max_length)
        kept = truncate(whole, predictor.max_length, "prompt_start")
        if True not in kept.learned[1:]:
            raise DataError(
                f"text {number} has no token to score within {predictor.max_length}", "Give a text that is not empty."
            )
        start = max(kept.learned.index(True), 1)  # the first token has no predecessor that could predict it
        found.append(Read(kept.ids[:start], kept.ids[start:]))
        cut += len(kept.ids) < len(whole.ids)
    return found, Truncated(cut, len(rows), "rows", predictor.max_length)


def token_scores(predictor: Predictor, texts: Sequence[Read]) -> list[TokenScores]:
    """How probable and how uncertain each token of the completions is, under the predictor's last sampler."""
    return score_tokens(
        predictor.model,
        [text.prompt for text in texts],
        [text.completion for text in texts],
        sampler=predictor.samplers[-1],
        batch_size=predictor.batch_size,
        progress=predictor.progress,
    )


def token_columns(predictor: Predictor, texts: Sequence[Read]) -> dict[str, Any]:
    """``tokens``, a list of records a text, and ``sequence``, a record of the text's scores.

    Also what :func:`next_token_columns` gives, of which the first tokens tell: prompts are read once.
    """
    scores = token_scores(predictor, texts)
    first = {name: np.array([getattr(each, name)[0] for each in scores]) for name in _FIRST}
    return {
        "next_token": [predictor.tokenizer.decode([int(each)]) for each in first.pop("likeliest")],
        **first,
        "tokens": [_records(predictor, each) for each in scores],
        "sequence": [each.sequence().facts() for each in scores],
    }


def next_token_columns(predictor: Predictor, prompts: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """``next_token``, the most probable one after each prompt, its probability, and how uncertain it is."""
    arguments = {**predictor.arguments(), "progress": None}
    found = predict_classes(predictor.model, list(prompts), sampler=predictor.samplers[-1], **arguments)
    return {
        "next_token": [predictor.tokenizer.decode([int(token)]) for token in found.probs.argmax(1)],
        "confidence": found.probs.max(1),
        **uncertainties(found),
    }


def _records(predictor: Predictor, scores: TokenScores) -> list[dict[str, Any]]:
    columns = {
        "text": token_texts(predictor.tokenizer, scores.tokens.tolist()),
        "id": scores.tokens.tolist(),
        "log_probability": scores.log_probs.tolist(),
        "total": scores.total.tolist(),
        "aleatoric": scores.aleatoric.tolist(),
        "epistemic": scores.epistemic.tolist(),
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def answer_columns(
    predictor: Predictor, prompts: Sequence[dict[str, list[int]]], max_new_tokens: int, count: int
) -> dict[str, list[Any]]:
    """``answers`` of the first ``count`` draws, ``answer``, on which most agree, and ``agreement``, their share."""
    sampler, found = predictor.samplers[-1], dict[int, list[str]]()
    for indices in batches(prompts, max(1, predictor.batch_size // count)):
        batch = [prompts[i] for i in indices]
        texts = complete_by_draws(predictor.model, predictor.tokenizer, batch, Decoding(max_new_tokens), sampler, count)
        found |= dict(zip(indices, texts, strict=True))
    answers = [found[i] for i in range(len(prompts))]
    agreed = [agreement(texts) for texts in answers]
    return {
        "answers": answers,
        "answer": [each.answer for each in agreed],
        "agreement": [each.share for each in agreed],
    }


def check_answers(sampler: Sampler, answers: int) -> None:
    """Raises ConfigError where ``answers`` is negative, or there are fewer draws to write them."""
    if answers < 0:
        raise ConfigError(f"answers is {answers}, expected 0 or more", "Leave it out for none.")
    draws = 0 if sampler.name == MEAN.name else sampler.num_samples
    if answers > draws:
        raise ConfigError(
            f"answers is {answers}, and {draws} draws are there to write one each", "Ask for more draws (num_samples)."
        )
