"""The order of the training rows in which batches hold rows of about the same length."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["length_grouped"]

_POOL = 50


def length_grouped(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """Shuffle rows so that those of one optimiser step are about equally long, and little padding is computed.

    Rows are shuffled, pools of 50 batches sorted by length and cut into batches, and the batches shuffled, the one with
    the longest row first: what does not fit into memory fails at once.

    Args:
        lengths: tokens of each row.
        batch_size: rows of an optimiser step.
        seed: of the shuffling.
        epoch: every epoch has an order of its own.
    """
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    whole = len(order) - len(order) % batch_size
    batches = []
    for start in range(0, whole, _POOL * batch_size):
        pool = sorted(order[start : min(start + _POOL * batch_size, whole)], key=lengths.__getitem__)
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    longest = max(shuffled, key=lambda batch: max(map(lengths.__getitem__, batch)), default=None)
    shuffled.sort(key=lambda batch: batch is not longest)
    return [row for batch in shuffled for row in batch] + order[whole:]
