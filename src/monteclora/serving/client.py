"""Uncertainty from a server: its adapters are draws of a posterior, and are asked one by one.

What is combined is what :mod:`monteclora.prediction` combines, by the same functions: with all of the vocabulary's
log-probabilities the numbers are those of the model at hand. Servers return the likeliest tokens alone. The rest is one
outcome more then, "another token": a coarser variable, whose entropies and mutual information are at most those of
the token (data-processing inequality). How much of the probability had names is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from monteclora.errors import ConfigError, ServerError
from monteclora.prediction import uncertainty
from monteclora.prediction.agreement import Agreement, agreement
from monteclora.prediction.options import OptionScores
from monteclora.prediction.predictions import Predictions
from monteclora.prediction.tokens import TokenScores
from monteclora.serving.http import Connection
from monteclora.serving.servers import Position, connected, understood

__all__ = ["Client", "Served"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Served:
    """What K adapters say along a text of T tokens.

    Attributes:
        texts: of the tokens, as the server writes them.
        scores: log-probabilities of the tokens under each adapter and under their mean, exactly; total, aleatoric and
            epistemic uncertainty, which are lower bounds where ``covered`` is below 1. ``scores.sequence()`` is of the
            whole text.
        covered: the share of each distribution that fell to tokens every adapter named, shape (T,), the least of
            any adapter.
    """

    texts: list[str]
    scores: TokenScores
    covered: FloatArray


class Client:
    """Asks a server's adapters.

    Args:
        url: of the server, as ``http://localhost:8000``.
        adapters: the draws, by name; by default all whose names begin with ``sample-``.
        kind: ``vllm`` or ``llamacpp``; by default what the server says it is.
        top: how many of the likeliest tokens are asked for; vLLM allows 20 unless started with ``--max-logprobs``.
        timeout: seconds without an answer before a request has failed.
        retries: how often a request is repeated that met no server, or one that is busy.
        api_key: sent as a bearer token.
        parallel: adapters asked at once.

    Raises:
        ConfigError: an argument is out of range, or the server does not have the adapters.
        ServerError: it cannot be asked.
    """

    def __init__(
        self,
        url: str,
        adapters: Sequence[str] | None = None,
        *,
        kind: str | None = None,
        top: int = 20,
        timeout: float = 60.0,
        retries: int = 3,
        api_key: str | None = None,
        parallel: int = 8,
    ) -> None:
        if top < 1 or parallel < 1:
            raise ConfigError(f"top is {top} and parallel is {parallel}, expected at least 1", "Use 20 and 8.")
        self._connection = Connection(url, timeout, retries, api_key)
        self._server = connected(self._connection, kind)
        with understood(self._connection):
            there = self._server.adapters()
        chosen = [name for name in there if name.startswith("sample-")] if adapters is None else list(adapters)
        missing = [name for name in chosen if name not in there]
        if missing or not chosen:
            what = f"no adapter {missing[0]!r}" if missing else "no adapter whose name begins with sample-"
            raise ConfigError(f"{url} has {what}; it has {', '.join(there) or 'none'}", "Serve it, or name others.")
        self.adapters = tuple(chosen)
        self.top = top
        self._pool = ThreadPoolExecutor(min(parallel, len(chosen)))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown()

    def score(self, prompt: str | Sequence[int], text: str | Sequence[int]) -> Served:
        """Every token of a text behind a prompt.

        Args:
            prompt: token ids, or a text that the server makes tokens of; a chat template is not applied.
            text: token ids, or a text, at least one token; it is made tokens of by itself, as in training.
        """
        asked, answered = self._tokens(prompt, special=True), self._tokens(text, special=False)
        if not asked or not answered:
            raise ConfigError("the prompt or the text has no token", "Give one of each at least.")
        return _combined(answered, self._positions(asked, answered))

    def complete(self, prompt: str | Sequence[int], max_tokens: int = 64, *, adapter: str | None = None) -> Served:
        """What an adapter writes, scored by all.

        Args:
            prompt: as in :meth:`score`.
            max_tokens: at most.
            adapter: which writes, as ``mean``; by default the first draw.
        """
        asked = self._tokens(prompt, special=True)
        with understood(self._connection):
            written, _ = self._server.complete(adapter or self.adapters[0], asked, max_tokens)
        if not written:
            raise ServerError("the server wrote no token", "Correct the prompt.")
        return _combined(written, self._positions(asked, written))

    def options(self, prompt: str | Sequence[int], options: Sequence[str | Sequence[int]]) -> Predictions:
        """Which of several answers is likely: probabilities and uncertainties over them, as of one row (B = 1).

        An option's probability under an adapter is its likelihood behind the prompt, divided by the sum over options.
        All of an option's tokens count, its end as well if it is among them. Exact, whatever ``top`` is.
        """
        asked = self._tokens(prompt, special=True)
        answers = [self._tokens(option, special=False) for option in options]
        if len(answers) < 2 or not all(answers) or not asked:
            raise ConfigError("expected a prompt and two options or more, none of them empty", "Give two texts.")
        sums = [
            [sum(position.log_prob for position in positions) for positions in self._positions(asked, answer)]
            for answer in answers
        ]
        return OptionScores(np.array(sums).T[:, None, :]).predictions()

    def answers(self, prompt: str | Sequence[int], max_tokens: int = 64) -> tuple[list[str], Agreement]:
        """What each draw writes by itself, and how far they agree."""
        asked = self._tokens(prompt, special=True)
        with understood(self._connection):
            texts = list(self._pool.map(lambda name: self._server.complete(name, asked, max_tokens)[1], self.adapters))
        return texts, agreement(texts)

    def _tokens(self, text: str | Sequence[int], *, special: bool) -> list[int]:
        if not isinstance(text, str):
            return list(text)
        with understood(self._connection):
            return self._server.tokens(text, special=special)

    def _positions(self, prompt: list[int], text: list[int]) -> list[list[Position]]:
        """Of each adapter, of each token."""
        with understood(self._connection):
            return list(self._pool.map(lambda name: self._server.score(name, prompt, text, self.top), self.adapters))


def _combined(tokens: list[int], by_adapter: list[list[Position]]) -> Served:
    by_token = list(zip(*by_adapter, strict=True))
    measured = [_measured([position.top for position in positions]) for positions in by_token]
    columns = {name: np.array([each[name] for each in measured]) for name in measured[0]}
    covered = columns.pop("covered")
    log_probs = np.array([[position.log_prob for position in positions] for positions in by_adapter])
    texts = [positions[0].text for positions in by_token]
    return Served(texts, TokenScores(np.array(tokens), log_probs, **columns), covered)


def _measured(tops: Sequence[Mapping[int, float]]) -> dict[str, float]:
    """Uncertainties over the tokens that every adapter named and "another token"."""
    shared = sorted(set.intersection(*(set(top) for top in tops)))
    named = np.exp(np.array([[top[token] for token in shared] for top in tops], dtype=float).reshape(len(tops), -1))
    rest = np.clip(1.0 - named.sum(1, keepdims=True), 0.0, 1.0)
    probs = torch.from_numpy(np.concatenate([named, rest], axis=1)[:, None, :])
    found = {name: float(getattr(uncertainty, name)(probs)) for name in ("total", "aleatoric", "epistemic")}
    return {**found, "covered": float(1.0 - rest.max())}
