"""How uncertain a language model is at each token of a text, under S draws that each read the whole of it.

At every position the draws' next-token distributions p_s have a mean p. Total uncertainty H[p], its aleatoric part
mean_s H[p_s] and the epistemic rest are those of :mod:`monteclora.prediction.uncertainty`, over the vocabulary. Means,
maxima and sums of them over a text are the scores of Malinin & Gales (2021), "Uncertainty estimation in autoregressive
structured prediction", and Fomicheva et al. (2020).

A draw stays the same for the whole text: its keys and values are those of one model. S draws of B texts are one batch
of S * B rows, draw by draw.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import Context, copy_context
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor, nn

from monteclora.adapters.row_checks import RowOrderError
from monteclora.prediction import uncertainty
from monteclora.prediction.cached import cache_name, padded, step
from monteclora.prediction.forward import FloatArray, batches
from monteclora.prediction.predictive import evaluating
from monteclora.prediction.sampler import MEAN, Batched, Sampler, sharing
from monteclora.system.progress import Progress

__all__ = ["SequenceScores", "TokenScores", "one_by_one", "score_tokens"]

_NUMBERS = 2**24  # log-probabilities in memory at once
_T = TypeVar("_T")


@dataclass(frozen=True)
class SequenceScores:
    """One number for a whole text of T tokens, nats.

    Attributes:
        log_probability: of the text: the sum over tokens of ``log mean_s p_s``.
        mean_log_probability: that by token, comparable between texts of different lengths.
        mean_total, max_total, sum_total: entropy of the tokens' predictive distributions.
        mean_epistemic, max_epistemic, sum_epistemic: mutual information of token and draw.
    """

    log_probability: float
    mean_log_probability: float
    mean_total: float
    max_total: float
    sum_total: float
    mean_epistemic: float
    max_epistemic: float
    sum_epistemic: float

    def facts(self) -> dict[str, float]:
        """All of them by name."""
        return asdict(self)


@dataclass(frozen=True)
class TokenScores:
    """What S draws say along a text of T tokens, at least one.

    Attributes:
        tokens: ids, shape (T,).
        draw_log_probs: log p_s(token | what is before it), float64, shape (S, T), nats.
        total, aleatoric, epistemic: of each token's distribution over the vocabulary, float64, shape (T,), nats; the
            first is the sum of the others.
        likeliest: ids of the tokens that mean_s p_s makes most probable in its places, int64, shape (T,), and
        confidence: their probabilities, float64, shape (T,); both None where only parts of the distributions are known.
    """

    tokens: NDArray[np.int64]
    draw_log_probs: FloatArray
    total: FloatArray
    aleatoric: FloatArray
    epistemic: FloatArray
    likeliest: NDArray[np.int64] | None = None
    confidence: FloatArray | None = None

    @property
    def log_probs(self) -> FloatArray:
        """log mean_s p_s(token | what is before it), shape (T,), nats."""
        found: FloatArray = logsumexp(self.draw_log_probs, axis=0) - np.log(len(self.draw_log_probs))
        return found

    def sequence(self) -> SequenceScores:
        """What they say of the text as a whole."""
        log_probs = self.log_probs
        by_name = {"total": self.total, "epistemic": self.epistemic}
        scores = {
            f"{what}_{name}": float(reduce(values))
            for name, values in by_name.items()
            for what, reduce in (("mean", np.mean), ("max", np.max), ("sum", np.sum))
        }
        return SequenceScores(float(log_probs.sum()), float(log_probs.mean()), **scores)


def score_tokens(
    model: nn.Module,
    prompts: Sequence[list[int]],
    texts: Sequence[list[int]],
    *,
    sampler: Sampler = MEAN,
    batch_size: int = 16,
    cached: bool = True,
    progress: Progress | None = None,
) -> list[TokenScores]:
    """Read texts after their prompts under every draw.

    Args:
        model: with a language-modelling head.
        prompts: token ids, at least one each.
        texts: token ids, at least one each: what was generated, or is given.
        sampler: what is drawn. Draws share a forward pass where the sampler and the model can; else each draw makes its
            own, and a warning says so.
        batch_size: rows per forward pass; all draws of a text are in one.
        cached: whether keys and values are kept, where the model can. Without, every part of a text is read from its
            beginning: the same numbers, slowly.
        progress: called with the number of texts done, batch by batch.
    """
    found: dict[int, TokenScores] = {}
    rows = [{"input_ids": [*prompt, *text]} for prompt, text in zip(prompts, texts, strict=True)]
    with evaluating(model):
        for indices in batches(rows, max(1, batch_size // sampler.num_samples)):
            chosen = [prompts[i] for i in indices], [texts[i] for i in indices]

            def read(together: bool, chosen: tuple[list[list[int]], list[list[int]]] = chosen) -> list[TokenScores]:
                with _Reader.of(model, sampler, together=together, cached=cached) as reader:
                    return _score(reader, *chosen)

            found |= zip(indices, one_by_one(sampler, read), strict=True)
            if progress is not None:
                progress(len(indices))
    return [found[i] for i in range(len(texts))]


def one_by_one(sampler: Sampler, run: Callable[[bool], _T]) -> _T:
    """What ``run(True)`` gives, with draws that share forward passes, or else ``run(False)``, without."""
    # where draws share the blocks below theirs, these keep the keys and values of one copy of the rows, not of each
    if sampler.num_samples == 1 or not isinstance(sampler, Batched) or sharing(sampler):
        return run(False)
    try:
        return run(True)
    except RowOrderError as error:
        warnings.warn(f"{error.message}: they are made one at a time", UserWarning, stacklevel=3)
        return run(False)


@dataclass
class _Lane:
    """Draws that share forward passes: how many, the context they are in force in, and their keys and values."""

    draws: int
    context: Context
    cache: Any = None


@dataclass
class _Reader:
    """Reads B texts part by part under S draws.

    Draws that cannot share a pass are each in force in a context of their own, so that none is made twice.
    """

    model: nn.Module
    lanes: list[_Lane]
    cached: bool
    mask: Tensor | None = None  # of everything read so far, (B, T)
    ids: list[Tensor] = field(default_factory=list)

    @classmethod
    @contextmanager
    def of(cls, model: nn.Module, sampler: Sampler, *, together: bool, cached: bool) -> Iterator[_Reader]:
        """With the draws in force until the block ends."""
        count = sampler.num_samples
        with ExitStack() as stack:
            lanes = []
            for number in range(1 if together else count):
                context = copy_context()
                force: AbstractContextManager[None]
                if together and isinstance(sampler, Batched):
                    force = sampler.draws(model, 0, count)
                else:
                    force = sampler.draw(model, number)
                context.run(force.__enter__)
                stack.callback(context.run, force.__exit__, None, None, None)
                lanes.append(_Lane(count if together else 1, context))
            yield cls(model, lanes, cached and cache_name(model) is not None)

    def read(self, ids: Tensor, mask: Tensor, kept: int) -> Tensor:
        """The next tokens; log-probabilities of what comes after the last ``kept`` of them, (S, B, kept, V).

        Args:
            ids: shape (B, T).
            mask: of them, shape (B, T).
            kept: at most T.
        """
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], 1)
        if not self.cached:
            self.ids.append(ids)
            ids = torch.cat(self.ids, 1)
        return torch.cat([lane.context.run(self._read, lane, ids, self.mask, kept) for lane in self.lanes])

    def _read(self, lane: _Lane, ids: Tensor, mask: Tensor, kept: int) -> Tensor:
        repeated = ids.repeat(lane.draws, 1), mask.repeat(lane.draws, 1)
        logits, lane.cache = step(self.model, *repeated, kept, cache=lane.cache, use_cache=self.cached)
        if not self.cached:
            lane.cache = None
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.log_softmax(-1).view(lane.draws, len(ids), kept, -1)


def _score(reader: _Reader, prompts: list[list[int]], texts: list[list[int]]) -> list[TokenScores]:
    """Of a batch of texts, all draws at once."""
    targets, mask = padded(texts, left=False)
    log_probs = reader.read(*padded(prompts, left=True), 1)
    parts = [_measured(log_probs, targets[:, :1])]
    width = max(1, _NUMBERS // (log_probs.numel() or 1))
    for first in range(0, targets.shape[1] - 1, width):
        last = min(first + width, targets.shape[1] - 1)
        log_probs = reader.read(targets[:, first:last], mask[:, first:last], last - first)
        parts.append(_measured(log_probs, targets[:, first + 1 : last + 1]))
    whole = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}
    return [
        TokenScores(np.asarray(text), **{name: values[..., row, : len(text)] for name, values in whole.items()})
        for row, text in enumerate(texts)
    ]


def _measured(log_probs: Tensor, targets: Tensor) -> dict[str, FloatArray]:
    """Of k tokens, (S, B, k) or (B, k) each, by the names in :class:`TokenScores`.

    Args:
        log_probs: shape (S, B, k, V).
        targets: the tokens, shape (B, k).
    """
    draws, rows, width, vocabulary = log_probs.shape
    index = targets.to(log_probs.device).expand(draws, rows, width)[..., None]
    probs = log_probs.double().exp().view(draws, rows * width, vocabulary)
    found = {name: getattr(uncertainty, name)(probs).view(rows, width) for name in ("total", "aleatoric", "epistemic")}
    confidence, likeliest = probs.mean(0).max(-1)
    found |= {"confidence": confidence.view(rows, width), "likeliest": likeliest.view(rows, width)}
    found["draw_log_probs"] = log_probs.gather(-1, index).squeeze(-1).double()
    return {name: values.cpu().numpy() for name, values in found.items()}
