"""The order of the training rows in which batches hold rows of about the same length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

__all__ = ["LengthGroupedSampler"]

_POOL = 50


class LengthGroupedSampler(Sampler[int]):
    """Shuffles rows so that those of one optimiser step are about equally long, and little padding is computed.

    Rows are shuffled, pools of 50 batches sorted by length and cut into batches, and the batches shuffled, the one with
    the longest row first: what does not fit into memory fails at once. The order is a function of seed and epoch, so a
    resumed run goes on in it.

    Args:
        lengths: tokens of each row.
        batch_size: rows of an optimiser step.
        seed: of the shuffling.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; the Trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        whole = len(order) - len(order) % self.batch_size
        batches = []
        for start in range(0, whole, _POOL * self.batch_size):
            pool = sorted(order[start : min(start + _POOL * self.batch_size, whole)], key=self.lengths.__getitem__)
            batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        longest = max(shuffled, key=lambda batch: max(map(self.lengths.__getitem__, batch)), default=None)
        shuffled.sort(key=lambda batch: batch is not longest)
        for batch in shuffled:
            yield from batch
        yield from order[whole:]
