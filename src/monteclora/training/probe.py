"""The loss of the same rows again and again: it changes with the weights alone, and not with what a batch holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from monteclora.training.loop import Loop

__all__ = ["Probe"]


class Probe:
    """Measures a loop's model on fixed training rows, at its mean, without dropout.

    Every process measures all of the rows: they are few, and sharded models compute together.

    Args:
        loop: whose model it is, at the precision that it trains at.
        rows: numbers of training rows.
        batch_size: rows of a forward pass.
    """

    def __init__(self, loop: Loop, rows: Sequence[int], batch_size: int) -> None:
        self._loop = loop
        batches = loop.batches
        table = batches.dataset.select_columns(list(batches.columns))
        parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        self._batches = [dict(batches.collate([table[row] for row in part])) for part in parts]
        self._items = sum(int(loop.measures.count(batch["labels"])) for batch in self._batches)

    def __call__(self) -> float:
        """The task's loss over the rows, in nats, the same on every process. The model is left in evaluation mode."""
        loop, device = self._loop, self._loop.accelerator.device
        loop.model.eval()
        items = torch.tensor(self._items, device=device)
        losses = []
        with torch.no_grad():
            for batch in self._batches:
                inputs = {name: value.to(device) for name, value in batch.items()}
                with loop.precision():
                    losses.append(loop.measures.loss(loop.model, inputs, items).float().to(device))
        total = torch.stack(losses).sum()
        if loop.accelerator.num_processes > 1:
            total = loop.accelerator.reduce(total, reduction="mean")
        return float(total)
