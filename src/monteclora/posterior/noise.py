"""The counter-based noise stream: (seed, rank, draw) names a generator, a layer is a fixed place in what it draws.

There is no state to advance but the counter of draws, so a draw can be made again at any time, on its own: a resumed
run is the uninterrupted run, and nothing outside (dropout, data order, initial weights) shares these numbers
(METHOD.md section 7).
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum

import torch
from torch import Tensor

__all__ = ["Kind", "generator", "normal"]

_MASK = 0xFFFFFFFF
# parts of a large draw of normals that are drawn side by side, and the fewest numbers worth it
PARTS, WORTHWHILE = 8, 1 << 18


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
    seed: int, rank: int, draw: int, kind: Kind, device: torch.device, *, posterior_sample: bool = False, part: int = 0
) -> torch.Generator:
    """The generator of one draw.

    Args:
        seed: the stream.
        rank: the process; every one draws its own noise.
        draw: counts the training forwards, from 0. Within 2**26 draws no two generators of one (seed, rank) share a
            seed, whatever their kinds, uses and parts.
        kind: what is drawn.
        device: where.
        posterior_sample: True for the streams of prediction, which never meet those of training.
        part: which of up to 8 parts of what is drawn.

    Returns:
        A fresh ``torch.Generator``; the global generators are neither read nor changed.
    """
    low, high = _key(seed, rank)
    # torch's CPU generator takes the lower 32 bits only: a bijection of all that tells the generators of a stream apart
    # keeps them apart there, where a hash would repeat one within some ten thousand steps
    counter = draw << 6 | part << 3 | kind << 1 | posterior_sample
    word = high << 32 | _mix((counter ^ low) & _MASK)
    result = torch.Generator(device=device)
    result.manual_seed(word)
    return result


def normal(count: int, like: Tensor, seed: int, rank: int, draw: int, *, posterior_sample: bool = False) -> Tensor:
    """Standard normal numbers of the stream.

    The CPU's generator is serial. There, a large draw is made of parts with generators of their own, by as many threads
    as torch may use; which numbers are drawn does not depend on how many those are.

    Args:
        count: how many.
        like: gives dtype and device.
        seed: the stream; this and the others as for :func:`generator`.
        rank: the process.
        draw: the draw's number.
        posterior_sample: True for the streams of prediction.

    Returns:
        Shape (count,).
    """
    result = torch.empty(count, dtype=like.dtype, device=like.device)
    parts = PARTS if like.device.type == "cpu" and count >= WORTHWHILE else 1
    inference = torch.is_inference_mode_enabled()

    def fill(part: int, cells: Tensor) -> None:
        stream = generator(seed, rank, draw, Kind.NORMAL, like.device, posterior_sample=posterior_sample, part=part)
        # modes belong to a thread
        with torch.inference_mode(inference), torch.no_grad():
            cells.normal_(generator=stream)

    pieces = result.tensor_split(parts)
    workers = min(parts, torch.get_num_threads())
    if workers == 1:
        for part, cells in enumerate(pieces):
            fill(part, cells)
    else:
        # threads of this draw alone: a pool that lasts would not survive a fork
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, range(parts), pieces))
    return result
