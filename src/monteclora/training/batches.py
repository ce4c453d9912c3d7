"""Which rows each forward pass of an optimiser step sees, in every epoch and on every process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from monteclora.data.encoding import IGNORED
from monteclora.training.sampler import length_grouped

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Batch", "Batches"]


@dataclass(frozen=True)
class Batch:
    """The rows of one forward pass.

    Attributes:
        rows: numbers of the rows in the training split; empty where the step has fewer batches than processes.
        inputs: padded tensors. A process without rows runs one row, none of whose labels counts.
    """

    rows: Sequence[int]
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Batches:
    """The batches of a training split.

    The order of an epoch is a function of seed and epoch. A step takes the next ``micro * accumulated * processes``
    rows; the last step of an epoch takes what is left.

    Attributes:
        dataset: encoded rows.
        collate: pads a list of rows to a batch.
        columns: of the rows that the model takes.
        micro: rows of a forward pass of one process.
        accumulated: forward passes of a process per step.
        process, processes: this process's number and how many there are.
        seed: of the order.
        lengths: of the rows, in tokens, where batches are to hold rows of about the same length; else None.
        workers: processes that collate beside this one.
    """

    dataset: Dataset
    collate: Callable[[list[dict[str, Any]]], Any]
    columns: Sequence[str]
    micro: int
    accumulated: int
    process: int
    processes: int
    seed: int
    lengths: Sequence[int] | None = None
    workers: int = 0

    @property
    def rows_per_step(self) -> int:
        """Over all processes."""
        return self.micro * self.accumulated * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may have fewer rows."""
        return math.ceil(len(self.dataset) / self.rows_per_step)

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch, from 0, in the order in which they are seen."""
        if self.lengths is not None:
            return length_grouped(self.lengths, self.rows_per_step, self.seed, epoch)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order: list[int] = torch.randperm(len(self.dataset), generator=generator).tolist()
        return order

    def plan(self, epoch: int, first_step: int = 0) -> list[list[list[int]]]:
        """For each step of an epoch from ``first_step``, the rows of each of this process's forward passes."""
        order = self.order(epoch)
        steps = []
        for start in range(first_step * self.rows_per_step, len(order), self.rows_per_step):
            rows = order[start : start + self.rows_per_step]
            passes = [rows[i : i + self.micro] for i in range(0, len(rows), self.micro)]
            passes += [[]] * (-len(passes) % self.processes)
            steps.append(passes[self.process :: self.processes])
        return steps

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """The batches of each step of an epoch; making the iterator takes one number from the global generator."""
        plan = self.plan(epoch, first_step)
        loader: DataLoader[Any] = DataLoader(
            self.dataset.select_columns(list(self.columns)),
            batch_sampler=[rows or [0] for step in plan for rows in step],
            collate_fn=self.collate,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
        )
        batches = iter(loader)

        def grouped() -> Iterator[list[Batch]]:
            for step in plan:
                yield [_batch(rows, next(batches)) for rows in step]

        return grouped()


def _batch(rows: Sequence[int], collated: Any) -> Batch:
    inputs = dict(collated)
    if not rows:
        labels = inputs["labels"]
        inputs["labels"] = torch.full_like(labels, math.nan if labels.is_floating_point() else IGNORED)
    return Batch(rows, inputs)
