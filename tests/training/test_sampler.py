import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monteclora.training.sampler import length_grouped


def batches(order: list[int], batch_size: int) -> list[list[int]]:
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_every_row_once_whatever_the_sizes(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    seen = length_grouped(lengths, batch_size, seed, epoch)
    assert sorted(seen) == list(range(len(lengths)))
    whole = len(lengths) - len(lengths) % batch_size
    if whole:  # among the rows of whole batches
        assert max(lengths[i] for i in seen[:batch_size]) == max(lengths[i] for i in seen[:whole])


@pytest.fixture
def uneven() -> list[int]:
    return [(i * 7919) % 97 + 1 for i in range(1003)]


def test_little_padding_and_batches_in_no_order_of_length(uneven: list[int]) -> None:
    grouped = batches(length_grouped(uneven, 16, 0, 0), 16)
    shuffled = batches(length_grouped([1] * len(uneven), 16, 0, 0), 16)  # equal lengths keep the shuffled order
    padded, plain = (
        sum(len(batch) * max(uneven[i] for i in batch) for batch in found) for found in (grouped, shuffled)
    )
    assert padded < 1.1 * sum(uneven)
    assert plain > 1.7 * sum(uneven)
    longest = [max(uneven[i] for i in batch) for batch in grouped[1:-1]]
    rising = sum(a < b for a, b in itertools.pairwise(longest)) / len(longest)
    assert 0.3 < rising < 0.7


def test_the_order_depends_on_seed_and_epoch_alone(uneven: list[int]) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return length_grouped(uneven, 16, seed, epoch)

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    assert set(order(0, 0)[:16]) != set(order(0, 1)[:16])
