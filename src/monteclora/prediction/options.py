"""Answer options by their likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn

from monteclora.errors import DataError
from monteclora.prediction.classes import collect
from monteclora.prediction.forward import Collate, logits_at, to_device
from monteclora.prediction.predictions import Predictions
from monteclora.prediction.sampler import MEAN, Sampler
from monteclora.system.progress import Progress

__all__ = ["predict_options"]


def predict_options(
    model: nn.Module,
    rows: Sequence[Sequence[dict[str, list[int]]]],
    collate: Collate,
    *,
    sampler: Sampler = MEAN,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Predictions:
    """Probabilities of answer options: each completion's likelihood, normalised over a row's options.

    Tokens that all options of a row share before they part add the same to each and need not be scored; tokens that
    they share at the end (the end of the turn) are left out, as likelihood benchmarks do, unless an option would then
    be the beginning of another.

    Args:
        model: with a language-modelling head.
        rows: for each row, its options as encoded completions (``input_ids``) of the same prompt.
        collate: pads a list of encoded completions to a batch.
        sampler: what is drawn.
        batch_size: sequences per forward pass; a row's options always share one.
        progress: told how many rows are done, batch by batch.

    Raises:
        DataError: two options of a row have the same tokens.
    """
    plans = [_option_plan(number, [option["input_ids"] for option in options]) for number, options in enumerate(rows)]
    width = max(len(options) for options in rows)
    rows_at_once = max(1, batch_size // max(len(plan.sequences) for plan in plans))

    def score(indices: list[int]) -> Tensor:
        log_probs = _option_log_probs(model, collate, [plans[i] for i in indices])
        result = torch.full((len(indices), width), -torch.inf, dtype=torch.float64)
        for row, values in enumerate(log_probs):
            result[row, : len(values)] = torch.tensor(values, dtype=torch.float64)
        return result.log_softmax(-1)

    shown = [{"input_ids": plan.sequences[0]} for plan in plans]
    return collect(model, shown, score, sampler, batch_size=rows_at_once, progress=progress)


@dataclass(frozen=True)
class _OptionPlan:
    """How to score a row's options: which sequences to run, and in which the (position, token) pairs to add up.

    Where the options part in a single token one sequence serves them all: ``targets`` then has a list of one pair for
    each option, all in sequence 0.
    """

    sequences: list[list[int]]
    targets: list[tuple[int, list[tuple[int, int]]]]


def _option_plan(number: int, options: list[list[int]]) -> _OptionPlan:
    if len(set(map(tuple, options))) < len(options):
        raise DataError(
            f"two options of row {number} have the same tokens, they cannot be told apart",
            "Make the options differ, or set a larger data.max_length.",
        )
    start = _shared_start(options)
    tail = min(_shared_start([option[::-1] for option in options]), min(map(len, options)) - start)
    kept = [option[: len(option) - tail] for option in options]
    if any(a != b and b[: len(a)] == a for a in kept for b in kept):
        kept = options  # where one option goes on after the end of another, the end tells them apart
    if all(len(option) == start + 1 for option in kept):
        return _OptionPlan([kept[0][:start]], [(0, [(start - 1, option[start])]) for option in kept])
    targets = [(k, [(i - 1, ids[i]) for i in range(start, len(ids))]) for k, ids in enumerate(kept)]
    return _OptionPlan(kept, targets)


def _shared_start(sequences: list[list[int]]) -> int:
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False)))


def _option_log_probs(model: nn.Module, collate: Collate, plans: list[_OptionPlan]) -> list[list[float]]:
    """For each plan, the log-likelihood of each option."""
    sequences = [ids for plan in plans for ids in plan.sequences]
    batch = to_device(collate([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences]), model)
    first = batch["attention_mask"].long().argmax(-1).tolist()
    # (sequence in the batch, column, token) of everything that is added up, option by option
    wanted: list[list[tuple[int, int, int]]] = []
    offset = 0
    for plan in plans:
        for sequence, pairs in plan.targets:
            row = offset + sequence
            wanted.append([(row, first[row] + position, token) for position, token in pairs])
        offset += len(plan.sequences)
    columns = sorted({column for option in wanted for _, column, _ in option})
    place = {column: index for index, column in enumerate(columns)}
    logits = logits_at(model, batch, torch.tensor(columns, device=batch["input_ids"].device))
    values = []
    for option in wanted:
        rows, places, tokens = zip(*((row, place[column], token) for row, column, token in option), strict=True)
        scores = logits[list(rows), list(places)].double().log_softmax(-1)
        values.append(float(scores[range(len(tokens)), list(tokens)].sum()))
    taken = iter(values)
    return [[next(taken) for _ in plan.targets] for plan in plans]
