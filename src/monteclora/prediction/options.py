"""Answer options by their likelihood; the options of a row share the forward pass over their prompt."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor, nn

from monteclora.errors import DataError
from monteclora.prediction.cached import cache_name, padded, step
from monteclora.prediction.classes import collect
from monteclora.prediction.forward import FloatArray
from monteclora.prediction.predictions import Predictions
from monteclora.prediction.sampler import MEAN, Sampler
from monteclora.system.progress import Progress

__all__ = ["OptionRow", "OptionScores", "score_options"]


@dataclass(frozen=True)
class OptionRow:
    """A question in tokens.

    Attributes:
        prompt: token ids, at least one.
        options: the token ids of each option, which follow the prompt.
    """

    prompt: list[int]
    options: list[list[int]]


@dataclass(frozen=True)
class OptionScores:
    """The likelihood of B rows' options, at most C each, under S draws.

    Attributes:
        log_likelihoods: log p(option | prompt) in nats, float64, shape (S, B, C); minus infinity after the options of
            a row that has fewer than C.
    """

    log_likelihoods: FloatArray

    def predictions(self, lengths: Sequence[Sequence[int]] | None = None) -> Predictions:
        """Probabilities of the options, draw by draw: their likelihoods normalised over each row's options.

        Args:
            lengths: of each row's options; each log-likelihood is divided by its option's. A long option is otherwise
                less likely than a short one because of its length alone.
        """
        scores = self.log_likelihoods
        if lengths is not None:
            divisors = np.ones(scores.shape[1:])
            for row, values in enumerate(lengths):
                divisors[row, : len(values)] = values
            scores = scores / divisors
        return Predictions(log_softmax(scores, axis=-1))


def score_options(
    model: nn.Module,
    rows: Sequence[OptionRow],
    *,
    ends: AbstractSet[int] = frozenset(),
    sampler: Sampler = MEAN,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> OptionScores:
    """The log-likelihood of each option after its prompt.

    The prompt, with the tokens that all options begin with, goes through the model once per row; its keys and values
    are then shared by the row's options. A model without such a cache reads each option with its prompt.

    Args:
        model: with a language-modelling head.
        rows: the questions.
        ends: tokens that end a turn. They are not scored at the end of an option, as in likelihood benchmarks, unless
            an option of the row would then be the beginning of another.
        sampler: what is drawn.
        batch_size: sequences per forward pass; a row's options always share one.
        progress: called with the number of rows done, batch by batch.

    Raises:
        DataError: two options of a row have the same tokens.
    """
    shares = cache_name(model) is not None
    plans = [_plan(number, row, ends, shares) for number, row in enumerate(rows)]
    width = max(len(row.options) for row in rows)

    def score(indices: list[int]) -> Tensor:
        found = torch.full((len(indices), width), -torch.inf, dtype=torch.float64)
        for row, values in enumerate(_log_likelihoods(model, [plans[i] for i in indices])):
            found[row, : len(values)] = values
        return found

    shown = [{"input_ids": plan.prefix} for plan in plans]
    rows_at_once = max(1, batch_size // width)
    return OptionScores(collect(model, shown, score, sampler, batch_size=rows_at_once, progress=progress))


@dataclass(frozen=True)
class _Plan:
    """How to score a row: ``prefix`` is read once, ``rests`` after it; tokens of the prefix count from ``start`` on."""

    prefix: list[int]
    start: int
    rests: list[list[int]]


def _plan(number: int, row: OptionRow, ends: AbstractSet[int], shares: bool) -> _Plan:
    options = row.options
    if len(set(map(tuple, options))) < len(options):
        raise DataError(
            f"two options of row {number} have the same tokens, they cannot be distinguished",
            "Make the options differ, or set a larger data.max_length.",
        )
    kept = [_without_end(option, ends) for option in options]
    if any(i != j and b[: len(a)] == a for i, a in enumerate(kept) for j, b in enumerate(kept)):
        kept = options  # where one option continues after the end of another, the end distinguishes them
    shared = _shared_start(kept) if shares else 0
    return _Plan(row.prompt + kept[0][:shared], len(row.prompt), [option[shared:] for option in kept])


def _without_end(option: list[int], ends: AbstractSet[int]) -> list[int]:
    length = len(option)
    while length and option[length - 1] in ends:
        length -= 1
    return option[:length]


def _shared_start(sequences: list[list[int]]) -> int:
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False)))


def _log_likelihoods(model: nn.Module, plans: list[_Plan]) -> list[Tensor]:
    """The log-likelihood of each plan's options, float64."""
    if cache_name(model) is None:
        return _read_apart(model, plans)
    ids, mask = padded([plan.prefix for plan in plans], left=True)
    long = [(i, k) for i, plan in enumerate(plans) for k, rest in enumerate(plan.rests) if len(rest) > 1]
    kept = max(len(plan.prefix) - plan.start for plan in plans) + 1
    logits, cache = step(model, ids, mask, kept, use_cache=bool(long))
    found = []
    for i, plan in enumerate(plans):
        tokens = plan.prefix[plan.start :]
        log_probs = _log_probs(logits[i, kept - len(tokens) - 1 :])  # the last row is of what comes next
        shared = log_probs[range(len(tokens)), tokens].double().sum()
        firsts = [
            log_probs[-1, rest[0]].double() if rest else log_probs.new_zeros((), dtype=torch.double)
            for rest in plan.rests
        ]
        found.append((shared + torch.stack(firsts)).cpu())
    if long:
        # each option after the keys and values of its prompt
        cache.batch_select_indices(torch.tensor([i for i, _ in long], device=logits.device))
        rests = [plans[i].rests[k] for i, k in long]
        more, behind = padded([rest[:-1] for rest in rests], left=False)
        whole = torch.cat([mask[[i for i, _ in long]], behind], 1)
        logits, _ = step(model, more, whole, more.shape[1], cache=cache)
        for row, ((i, k), rest) in enumerate(zip(long, rests, strict=True)):
            found[i][k] += _sum(logits[row, : len(rest) - 1], rest[1:])
    return found


def _read_apart(model: nn.Module, plans: list[_Plan]) -> list[Tensor]:
    """Likewise, each option in a pass of its own together with its prompt."""
    found = []
    for plan in plans:
        ids, mask = padded([plan.prefix + rest[:-1] for rest in plan.rests], left=True)
        kept = max(map(len, plan.rests))
        logits, _ = step(model, ids, mask, kept)
        sums = [_sum(logits[k, kept - len(rest) :], rest) for k, rest in enumerate(plan.rests)]
        found.append(torch.stack(sums))
    return found


def _sum(logits: Tensor, tokens: list[int]) -> Tensor:
    """Summed log-probability of ``tokens`` under as many rows of logits, float64, on the CPU."""
    return _log_probs(logits)[range(len(tokens)), tokens].double().sum().cpu()


def _log_probs(logits: Tensor) -> Tensor:
    """In float32, or in float64 where the logits are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
