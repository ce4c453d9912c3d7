"""Prompts with completions, some with answer options to choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from monteclora.data.encoding import IGNORED, Encoder, encode
from monteclora.data.kinds import Kind
from monteclora.data.truncation import Truncated, Truncation
from monteclora.errors import DataError
from monteclora.metrics.registry import Scoring, measure
from monteclora.prediction.completions import CompletionScores, score_completions
from monteclora.prediction.generation import encode_prompts
from monteclora.prediction.options import OptionRow, OptionScores, score_options
from monteclora.prediction.sampler import Sampler
from monteclora.tasks.base import Predicted, Predictor, Scored, scored, uncertainties
from monteclora.tasks.commonsense import option_completions
from monteclora.tasks.measures import Measures, TokenMeasures
from monteclora.tasks.token_columns import (
    answer_columns,
    check_answers,
    generated_texts,
    given_texts,
    next_token_columns,
    token_columns,
)
from monteclora.tasks.weights import ClassWeights

if TYPE_CHECKING:
    from datasets import Dataset

    from monteclora.tasks.loading import TaskData

__all__ = ["CausalLM"]


class CausalLM:
    """See :class:`~monteclora.tasks.base.TaskKind`."""

    name: Kind = "causal_lm"
    auto_class = "AutoModelForCausalLM"
    peft_task = "CAUSAL_LM"
    has_pretrained_head = True
    predicts_tokens = True
    has_classes = False
    can_be_calibrated = True  # where rows have options
    rows_at_once = 64  # each has a probability for every token of the vocabulary

    def measures(self, data: TaskData, weights: ClassWeights | None = None) -> Measures:
        """The metrics of the tokens to be learned."""
        return TokenMeasures()

    def outputs(self, label_names: Sequence[str] | None) -> tuple[str, ...] | None:
        """The model's own, over its vocabulary."""
        return None

    def to_learn(self, rows: Dataset, data: TaskData) -> Dataset:
        """As they are."""
        return rows

    def shown(self, label: Any, data: TaskData) -> str | None:
        """Some of the tokens."""
        return None

    def accepts(self, label_names: Any) -> bool:
        """None."""
        return not label_names

    def scorings(self, rows: Dataset) -> tuple[Scoring, ...]:
        """Of answer options where rows have them, also per byte where they are texts; else of tokens."""
        if not {"options", "answer"} <= set(rows.column_names):
            return ("tokens",)
        # options that are not the whole completion are words for them, such as answer1, whose lengths say nothing
        texts = rows["completion"][:] == rows["answer"][:]
        return ("options", "options_per_byte") if texts else ("options",)

    def score(self, predictor: Predictor, rows: Dataset) -> Scored:
        """Answer options against the answer where rows have them, else the tokens of completions."""
        found = self.scorings(rows)
        if found == ("tokens",):
            return _score_completions(predictor, rows)
        return _score_options(predictor, rows, per_byte="options_per_byte" in found)

    def predict(self, predictor: Predictor, rows: Dataset, max_new_tokens: int) -> Predicted:
        """The greedy completion at the mean; the most probable next token with its probability and uncertainty."""
        return self.predict_tokens(predictor, rows, max_new_tokens, tokens=False)

    def predict_tokens(
        self,
        predictor: Predictor,
        rows: Dataset,
        max_new_tokens: int,
        *,
        tokens: bool = True,
        answers: int = 0,
        given: bool = False,
    ) -> Predicted:
        """See :class:`~monteclora.tasks.base.TokenKind`."""
        tokenizer, sampler = predictor.tokenizer, predictor.samplers[-1]
        check_answers(sampler, answers)
        if given:
            texts, cut = given_texts(predictor, rows)
        else:
            prompts, cut = encode_prompts(rows, tokenizer, predictor.max_length, max_new_tokens, predictor.truncation)
            writer = replace(predictor, progress=None) if tokens else predictor  # reading S times takes longer
            with predictor.precision():
                texts = generated_texts(writer, [each["input_ids"] for each in prompts], max_new_tokens)
        inputs = [{"input_ids": text.prompt, "attention_mask": [1] * len(text.prompt)} for text in texts]
        with predictor.precision():
            more = token_columns(predictor, texts) if tokens else next_token_columns(predictor, inputs)
            more |= answer_columns(predictor, inputs, max_new_tokens, answers) if answers else {}
        columns = {
            **{name: rows[name][:] for name in rows.column_names},
            "completion": tokenizer.batch_decode([text.completion for text in texts], skip_special_tokens=True),
            **more,
        }
        return Predicted(columns, cut)


def _score_options(predictor: Predictor, rows: Dataset, *, per_byte: bool) -> Scored:
    encoder = Encoder(predictor.tokenizer)
    encoded, labels, lengths, cut = [], [], [], 0
    for number, row in enumerate(rows):
        options = _options(number, row)
        completions = option_completions(row["completion"], row["answer"], options)
        sequences, excess = encoder.options(row["prompt"], completions, predictor.max_length)
        encoded.append(_option_row(sequences))
        labels.append(options.index(row["answer"]))
        lengths.append([len(option.encode()) for option in options])
        cut += excess > 0

    def likelihoods(sampler: Sampler) -> OptionScores:
        return score_options(
            predictor.model,
            encoded,
            ends=frozenset(predictor.tokenizer.all_special_ids),
            sampler=sampler,
            batch_size=predictor.batch_size,
            progress=predictor.progress,
        )

    with predictor.precision():
        scores = [predictor.once(sampler, likelihoods) for sampler in predictor.samplers]
    found = [
        predictor.calibrated(each.predictions(), sampler)
        for each, sampler in zip(scores, predictor.samplers, strict=True)
    ]
    probs, choices = found[-1].probs, rows["options"][:]
    columns = {
        "prompt": rows["prompt"][:],
        "options": choices,
        "label": rows["answer"][:],
        "prediction": [row[i] for row, i in zip(choices, probs.argmax(1), strict=True)],
        "confidence": probs.max(1),
        "probabilities": [p[: len(row)].tolist() for p, row in zip(probs, choices, strict=True)],
    }
    shortened = Truncated(cut, len(rows), "rows", predictor.max_length)
    result = scored(predictor, "options", found, np.asarray(labels), columns, shortened)
    if not per_byte:
        return result
    weighed = [measure("options_per_byte", each.predictions(lengths).probs, np.asarray(labels)) for each in scores]
    posterior = None if result.posterior is None else {**result.posterior, **weighed[-1]}
    return replace(result, point={**result.point, **weighed[0]}, posterior=posterior)


def _option_row(sequences: list[dict[str, list[int]]]) -> OptionRow:
    """Encoded completions of one prompt."""
    start = next(i for i, label in enumerate(sequences[0]["labels"]) if label != IGNORED)
    return OptionRow(sequences[0]["input_ids"][:start], [row["input_ids"][start:] for row in sequences])


def _options(number: int, row: Mapping[str, Any]) -> list[str]:
    options = row["options"]
    if not isinstance(options, list) or len(options) < 2 or row["answer"] not in options:
        raise DataError(
            f"row {number}: expected two options or more with the answer {row['answer']!r} among them, found {options}",
            "Correct the columns options and answer.",
        )
    return options


def _score_completions(predictor: Predictor, rows: Dataset) -> Scored:
    truncation: Truncation = "prompt_start" if predictor.truncation == "drop" else predictor.truncation
    encoded = encode(rows, "causal_lm", predictor.tokenizer, predictor.max_length, truncation)
    if encoded.dropped:
        raise DataError(
            f"{encoded.dropped} of {len(rows)} rows have no token to score within {predictor.max_length}",
            "Remove rows without an answer.",
        )
    inputs = encoded.dataset.to_list()

    def completions(sampler: Sampler) -> CompletionScores:
        return score_completions(predictor.model, inputs, sampler=sampler, **predictor.arguments())

    with predictor.precision():
        found = [predictor.once(sampler, completions) for sampler in predictor.samplers]
    columns = {
        **{name: rows[name] for name in ("prompt", "completion", "messages") if name in rows.column_names},
        "nll": found[-1].nll,
        "tokens": found[-1].tokens,
        "correct_tokens": found[-1].correct,
    }
    metrics = [measure("tokens", each.sums) for each in found]
    return Scored(
        point=metrics[0],
        posterior=metrics[1] if len(metrics) > 1 else None,
        predictions=found[-1],
        at_mean=found[0],
        table=pa.table({**columns, **uncertainties(found[-1])}),
        notes=Truncated(encoded.shortened, len(rows), "rows", predictor.max_length).notes,
    )
