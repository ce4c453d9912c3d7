"""Validation while a run trains: at the mean, and without a trace in the generators."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn

from monteclora.system.randomness import preserved_generators
from monteclora.tasks.measures import Measures

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Interrupted", "Validation"]


_MOST_NUMBERS = 2**22  # kept on the device: 16 MB


class Interrupted(Exception):  # noqa: N818 - not an error: a request to stop came in
    """Validation was cut short; it is made up for when the run resumes."""


@dataclass(frozen=True)
class Validation:
    """The validation split of a run.

    Attributes:
        dataset: encoded rows.
        collate: pads a list of rows to a batch.
        columns: of the rows that the model takes.
        measures: of the task.
        batch_size: rows of a forward pass.
        process, processes: this process's number and how many there are; each evaluates its share of the batches.
    """

    dataset: Dataset
    collate: Callable[[list[dict[str, Any]]], Any]
    columns: list[str]
    measures: Measures
    batch_size: int
    process: int
    processes: int

    @property
    def _passes(self) -> int:
        """Forward passes over all processes, the same number on each."""
        return math.ceil(len(self.dataset) / self.batch_size / self.processes) * self.processes

    def __call__(
        self, model: nn.Module, device: torch.device, precision: AbstractContextManager[Any], stop: Callable[[], bool]
    ) -> dict[str, float]:
        """The metrics of ``model``, by name; arguments and errors as of :meth:`predictions`."""
        return self.measures.compute(*self.predictions(model, device, precision, stop))

    def predictions(
        self, model: nn.Module, device: torch.device, precision: AbstractContextManager[Any], stop: Callable[[], bool]
    ) -> tuple[NDArray[np.float64], NDArray[Any] | None]:
        """What the measures keep of all rows, float64 (N, K), and their labels; None for those of tokens.

        Args:
            model: left in evaluation mode.
            device: where its inputs go.
            precision: the autocast context of forward passes.
            stop: asked between batches whether to give up.

        Raises:
            Interrupted: ``stop`` said so. With several processes it is not asked: they would stop at different batches.
        """
        rows = self.dataset.select_columns(self.columns)
        starts = range(0, len(rows), self.batch_size)
        # sharded models compute together: a process without a batch of its own repeats the first one
        rounds = [starts[i] if i < len(starts) else None for i in range(self.process, self._passes, self.processes)]
        kept, labels = _Kept(), []
        model.eval()
        with preserved_generators(), torch.no_grad():
            for own in rounds:
                if self.processes == 1 and stop():
                    raise Interrupted
                start = own or 0
                batch = self.collate([rows[i] for i in range(start, min(start + self.batch_size, len(rows)))])
                inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
                with precision:
                    logits = model(**inputs).logits
                reduced = self.measures.reduce(logits.float(), batch["labels"].to(device))
                if own is not None:
                    kept.add(reduced)
                    labels.append((start, batch["labels"].numpy()))
            found = list(zip(labels, kept.finish(), strict=True))
            if self.processes > 1:
                found = gather_object(found)
        found.sort(key=lambda part: part[0][0])
        tokens = self.measures.scoring == "tokens"  # their batches are of different lengths
        whole = None if tokens else np.concatenate([labels for (_, labels), _ in found])
        return np.concatenate([kept for _, kept in found]), whole


class _Kept:
    """What is kept of batches, on the device until there is much of it: nothing waits for a copy of each."""

    def __init__(self) -> None:
        self._waiting: list[Tensor] = []
        self._numbers = 0
        self._done: list[NDArray[np.float64]] = []

    def add(self, kept: Tensor) -> None:
        """Add a batch's, (B, K)."""
        self._waiting.append(kept)
        self._numbers += kept.numel()
        if self._numbers >= _MOST_NUMBERS:
            self._transfer()

    def finish(self) -> list[NDArray[np.float64]]:
        """Each batch's, float64, (B, K)."""
        self._transfer()
        return self._done

    def _transfer(self) -> None:
        if self._waiting:
            sizes = [len(each) for each in self._waiting]
            whole = torch.cat(self._waiting).cpu().double()
            self._done += [part.numpy() for part in whole.split(sizes)]
        self._waiting, self._numbers = [], 0
