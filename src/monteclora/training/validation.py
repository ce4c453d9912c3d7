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
from torch import nn

from monteclora.system.randomness import preserved_generators
from monteclora.tasks.measures import Measures

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Interrupted", "Validation"]


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
        """The metrics of ``model``, by name.

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
        found: list[tuple[int, Any, Any]] = []
        model.eval()
        with preserved_generators(), torch.no_grad():
            for own in rounds:
                if self.processes == 1 and stop():
                    raise Interrupted
                start = own or 0
                batch = self.collate([rows[i] for i in range(start, min(start + self.batch_size, len(rows)))])
                labels = batch["labels"].to(device)
                inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
                with precision:
                    logits = model(**inputs).logits
                kept = self.measures.reduce(logits.float(), labels)
                if own is not None:
                    found.append((start, kept.double().cpu().numpy(), labels.cpu().numpy()))
            if self.processes > 1:
                found = gather_object(found)
        found.sort(key=lambda part: part[0])
        tokens = self.measures.scoring == "tokens"  # their batches are of different lengths
        labels = None if tokens else np.concatenate([labels for _, _, labels in found])
        return self.measures.compute(np.concatenate([kept for _, kept, _ in found]), labels)
