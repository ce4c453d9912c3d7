from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from monteclora.posterior import noise
from monteclora.posterior.noise import Kind

CPU = torch.device("cpu")


def words(
    seed: int = 0, rank: int = 0, draw: int = 0, kind: Kind = Kind.NORMAL, *, posterior_sample: bool = False
) -> Tensor:
    generator = noise.generator(seed, rank, draw, kind, CPU, posterior_sample=posterior_sample)
    return torch.randn(1000, generator=generator)


def cpu_seed(seed: int, rank: int, draw: int, kind: Kind, *, posterior_sample: bool = False) -> int:
    """What torch's CPU generator is seeded with: the lower 32 bits."""
    generator = noise.generator(seed, rank, draw, kind, CPU, posterior_sample=posterior_sample)
    return generator.initial_seed() & 0xFFFFFFFF


def test_torchs_cpu_generator_takes_the_lower_32_bits_only():
    """The fact that the module is built around; should it change, so may the module."""
    low, high = torch.Generator().manual_seed(7), torch.Generator().manual_seed((5 << 32) + 7)
    assert torch.equal(torch.randn(8, generator=low), torch.randn(8, generator=high))


def test_the_mixing_function_is_a_bijection():
    """Each of its steps is inverted: an odd multiplier has an inverse, a shifted xor undoes itself."""

    def unshift(value: int, bits: int) -> int:
        result = value
        for _ in range(32 // bits):
            result = value ^ result >> bits
        return result

    def inverse(value: int) -> int:
        value = unshift(value, 16)
        value = value * pow(0xC2B2AE35, -1, 2**32) & 0xFFFFFFFF
        value = unshift(value, 13)
        value = value * pow(0x85EBCA6B, -1, 2**32) & 0xFFFFFFFF
        return unshift(value, 16)

    cases = np.random.default_rng(0).integers(0, 2**32, 10_000).tolist()
    for value in [0, 1, 2**31, 2**32 - 1, *cases]:
        mixed = noise._mix(value)
        assert 0 <= mixed < 2**32
        assert inverse(mixed) == value


@pytest.mark.parametrize(("seed", "start"), [(0, 0), (1, 0), (12345, 2**29 - 50_000)])
def test_no_two_of_100000_draws_share_a_cpu_seed(seed, start):
    seeds = {cpu_seed(seed, 0, draw, Kind.NORMAL) for draw in range(start, start + 100_000)}
    assert len(seeds) == 100_000


@pytest.mark.parametrize("seed", range(20))
def test_kinds_and_uses_of_a_stream_never_share_a_cpu_seed(seed):
    count = 1000
    parts = itertools.product(range(count), Kind, (False, True))
    seeds = {cpu_seed(seed, seed % 3, draw, kind, posterior_sample=use) for draw, kind, use in parts}
    assert len(seeds) == count * len(Kind) * 2


def test_every_kind_has_its_place_in_the_counter():
    """Two bits are reserved for the kind and one for the use."""
    assert sorted(Kind) == [0, 1, 2, 3]


@pytest.mark.parametrize("use", [False, True])
@pytest.mark.parametrize("kind", Kind)
def test_a_generator_is_a_function_of_its_arguments(kind, use):
    expected = [words(3, 1, draw, kind, posterior_sample=use) for draw in range(5)]
    torch.manual_seed(99)
    torch.randn(7)
    for draw in (4, 0, 2, 2, 1, 3):
        assert torch.equal(words(3, 1, draw, kind, posterior_sample=use), expected[draw])


def test_different_arguments_give_uncorrelated_numbers():
    streams = [
        words(seed, rank, draw, kind, posterior_sample=use)
        for seed in (0, 1, -1, 2**40)
        for rank in (0, 1, 7)
        for draw in (0, 1, 2, 1000)
        for kind in Kind
        for use in (False, True)
    ]
    # of 384 streams no two are correlated by more than 5.5 standard errors, which chance does once in 300 such tests
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlation.abs().max() < 5.5 / 1000**0.5


def test_neighbouring_draws_look_independent_number_by_number():
    first = torch.stack([words(draw=draw)[:4] for draw in range(4000)])
    correlation = torch.corrcoef(torch.cat([first[:-1], first[1:]], dim=1).T) - torch.eye(8)
    assert correlation.abs().max() < 5.0 / 4000**0.5


@pytest.mark.parametrize("seed", [-(2**70), -1, 2**63, 2**64 - 1, 2**100])
def test_any_whole_number_is_a_seed(seed):
    assert not torch.equal(words(seed), words(seed + 1))


def test_the_global_generators_are_neither_read_nor_changed():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    before = words(5)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    assert torch.equal(words(5), before)


def test_the_stream_is_the_one_of_earlier_versions():
    """A resumed run draws on where an earlier version of the package stopped."""
    assert cpu_seed(0, 0, 0, Kind.NORMAL) == 2472267022
    assert cpu_seed(7, 2, 31, Kind.SIGN, posterior_sample=True) == 3693325814
