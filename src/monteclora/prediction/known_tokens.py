"""The tokens of training rows, and which of them follow each other: what a new row has of neither is new.

Random keystrokes fall into pieces that ordinary text has too, but not in that order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monteclora.prediction.forward import FloatArray

__all__ = ["MOST_PAIRS", "KnownTokens"]

MOST_PAIRS = 500_000
"""That are kept, 4 MB; of more the most frequent ones."""
_ROWS_AT_ONCE = 10_000
_Ids = NDArray[np.int64]


@dataclass(frozen=True)
class KnownTokens:
    """What rows have.

    Attributes:
        tokens: int64 (V,), the ids of all their tokens, sorted.
        pairs: int64 (M,), of all neighbours, or the most frequent ones, ``first * 2**32 + second``, sorted. None where
            an earlier version kept none.
    """

    tokens: _Ids
    pairs: _Ids | None

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> KnownTokens:
        """Of rows of token ids, in bounded memory: pairs that are rare so far may be dropped and counted anew."""
        tokens, pairs, counts = (np.empty(0, dtype=np.int64) for _ in range(3))
        for some in _chunks(rows):
            ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in some])
            tokens = np.union1d(tokens, ids)
            found = _pairs(some)[0]
            every = np.concatenate([pairs, found])
            pairs, of_each = np.unique(every, return_inverse=True)
            weights = np.concatenate([counts, np.ones(len(found), dtype=np.int64)])
            counts = np.bincount(of_each, weights, len(pairs)).astype(np.int64)
            if len(pairs) > MOST_PAIRS:
                kept = np.sort(np.argsort(-counts, kind="stable")[:MOST_PAIRS])
                pairs, counts = pairs[kept], counts[kept]
        return cls(tokens, pairs)

    def new_tokens(self, rows: Sequence[Sequence[int]]) -> FloatArray:
        """The share of each row's tokens that are not known, float64 (B,)."""
        lengths = np.array([len(row) for row in rows])
        return _share_new(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]), lengths, self.tokens)

    def new_pairs(self, rows: Sequence[Sequence[int]]) -> FloatArray:
        """The share of each row's neighbours that are not known, float64 (B,); 0 of a row of one token."""
        assert self.pairs is not None
        return _share_new(*_pairs(rows), self.pairs)


def _chunks(rows: Iterable[Sequence[int]]) -> Iterable[list[Sequence[int]]]:
    some: list[Sequence[int]] = []
    for row in rows:
        some.append(row)
        if len(some) == _ROWS_AT_ONCE:
            yield some
            some = []
    if some:
        yield some


def _pairs(rows: Sequence[Sequence[int]]) -> tuple[_Ids, _Ids]:
    """All neighbours, row after row, and how many there are in each."""
    arrays = [np.asarray(row, dtype=np.int64) for row in rows]
    return (
        np.concatenate([(ids[:-1] << 32) + ids[1:] for ids in arrays]),
        np.array([max(len(ids) - 1, 0) for ids in arrays]),
    )


def _share_new(values: _Ids, lengths: _Ids, known: _Ids) -> FloatArray:
    counts = np.bincount(np.repeat(np.arange(len(lengths)), lengths), ~np.isin(values, known), len(lengths))
    found: FloatArray = counts / np.maximum(lengths, 1)
    return found
