"""The counter-based noise stream: (seed, process, draw) names a generator, a layer is a fixed place in what it draws.

There is no state to advance but the counter of draws, so a draw can be made again at any time, on its own: a resumed
run is the uninterrupted run, and nothing outside (dropout, data order, initial weights) shares these numbers
(docs/method.md section 7).
"""

from __future__ import annotations

import hashlib
from enum import IntEnum

import torch

__all__ = ["Kind", "generator"]

_MASK = 0xFFFFFFFF


class Kind(IntEnum):
    """What is drawn. Each kind has a generator of its own: a rejection sampler of one never shifts another."""

    NORMAL = 0
    WISHART = 1
    DIRICHLET = 2
    SIGN = 3


def _key(*parts: int) -> tuple[int, int]:
    """Two 32-bit words from integers of any size."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8, person=b"monteclora").digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _mix(value: int) -> int:
    """A bijection of the 32-bit integers (the finaliser of MurmurHash3)."""
    value ^= value >> 16
    value = value * 0x85EBCA6B & _MASK
    value ^= value >> 13
    value = value * 0xC2B2AE35 & _MASK
    return value ^ value >> 16


def generator(
    seed: int, process: int, draw: int, kind: Kind, device: torch.device, *, posterior_sample: bool = False
) -> torch.Generator:
    """The generator of one draw.

    Args:
        seed: the stream.
        process: the number of the training process; every one draws its own noise.
        draw: counts the training forwards, from 0. Within 2**29 draws no two generators of one (seed, process) share a
            seed, whatever their kinds and uses.
        kind: what is drawn.
        device: where.
        posterior_sample: True for the streams of prediction, which never meet those of training.

    Returns:
        A fresh ``torch.Generator``; the global generators are neither read nor changed.
    """
    low, high = _key(seed, process)
    # torch's CPU generator takes the lower 32 bits only: a bijection of all that tells the generators of a stream apart
    # keeps them apart there, where a hash would repeat one within some ten thousand steps
    counter = draw << 3 | kind << 1 | posterior_sample
    word = high << 32 | _mix((counter ^ low) & _MASK)
    result = torch.Generator(device=device)
    result.manual_seed(word)
    return result
