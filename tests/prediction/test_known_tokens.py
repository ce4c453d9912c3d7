"""Known tokens and pairs against sets, and the most frequent of too many."""

import itertools

import numpy as np
import pytest

from monteclora.prediction import known_tokens
from monteclora.prediction.known_tokens import KnownTokens


def rows_at_random(count, seed):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 12, generator.integers(1, 9)).tolist() for _ in range(count)]


def share(values, known):
    return np.mean([value not in known for value in values]) if values else 0.0


@pytest.mark.parametrize("at_once", [10_000, 3])
def test_shares_are_those_of_sets(at_once, monkeypatch):
    monkeypatch.setattr(known_tokens, "_ROWS_AT_ONCE", at_once)
    training, rows = rows_at_random(10, 0), [*rows_at_random(40, 1), [3], [2**31 - 1, 2**31 - 1]]
    found = KnownTokens.of(iter(training))
    tokens = {token for row in training for token in row}
    pairs = {pair for row in training for pair in itertools.pairwise(row)}
    assert found.tokens.tolist() == sorted(tokens)
    np.testing.assert_allclose(found.new_tokens(rows), [share(row, tokens) for row in rows])
    expected = [share(list(itertools.pairwise(row)), pairs) for row in rows]
    np.testing.assert_allclose(found.new_pairs(rows), expected)
    assert 0.1 < np.mean(expected) < 0.9


@pytest.mark.parametrize("at_once", [10_000, 2])
def test_of_too_many_pairs_the_most_frequent_are_kept(at_once, monkeypatch):
    monkeypatch.setattr(known_tokens, "_ROWS_AT_ONCE", at_once)
    monkeypatch.setattr(known_tokens, "MOST_PAIRS", 2)
    found = KnownTokens.of([[1, 2], [5, 6], [5, 6], [1, 2], [3, 4], [9, 9]])
    np.testing.assert_array_equal(found.new_pairs([[1, 2], [5, 6], [3, 4], [9, 9], [1, 2, 3]]), [0, 0, 1, 1, 0.5])
    assert found.tokens.tolist() == [1, 2, 3, 4, 5, 6, 9]
