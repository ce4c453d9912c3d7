"""Steps whose loss or gradient is not finite: what is told of them, and whether the run stops or passes them over."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from monteclora.errors import DivergenceError
from monteclora.runs.prepare import PreparedData
from monteclora.runs.run_folder import RunFolder
from monteclora.system.atomic import write_file

__all__ = ["NonFiniteSteps", "Part"]

Part = Literal["loss", "regulariser", "gradient"]

_SHOWN = 8  # rows in a line for people
_EXCERPT = 200  # characters of a row in the file

logger = logging.getLogger(__name__)


@dataclass
class NonFiniteSteps:
    """What happens at a step that is not finite, and how many there were.

    Attributes:
        run: the run.
        data: what it trains on.
        phase: name of the phase.
        first_step: steps of the phases before.
        most_in_a_row: so many steps one after the other are skipped, the next one stops the run; 0 stops at once.
        skipped: steps of this phase that were skipped.
        in_a_row: those of them since the last finite step.
    """

    run: RunFolder
    data: PreparedData
    phase: str
    first_step: int
    most_in_a_row: int
    skipped: int = 0
    in_a_row: int = 0

    def finite(self) -> None:
        """A step was as it should be."""
        self.in_a_row = 0

    def met(self, step: int, part: Part, indices: Sequence[int], *, writes: bool) -> None:
        """A step was not finite: count it as skipped, and put that into the metrics; or stop.

        Args:
            step: of this phase, from 1.
            part: the first of the three that is not finite, in the order in which they are computed.
            indices: of the encoded training rows in the batch, or in those batches of the step that were not finite.
            writes: whether this process is the one that writes.

        Raises:
            DivergenceError: the run stops; the rows are in ``diverged.json``.
        """
        encoded = self.data.encoded["train"]
        rows = [encoded.row_of(index) for index in indices]
        facts = {"phase": self.phase, "step": self.first_step + step, "part": part}
        if self.in_a_row < self.most_in_a_row:
            self.skipped += 1
            self.in_a_row += 1
            if writes:
                self.run.metrics.append({"event": "skipped", **facts, "rows": rows})
                logger.warning("the %s is not finite at step %d: skipped", part, facts["step"])
            return
        if writes:
            texts = [self._text(encoded.dataset[index]) for index in indices]
            source = self.data.task.sources["train"]
            document = {
                **facts,
                "data": {"split": "train", "origin": source.origin, "sha256": source.sha256},
                "rows": [{"row": row, "text": text} for row, text in zip(rows, texts, strict=True)],
            }
            text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            write_file(self.run.divergence_file, text.encode())
        after = f" after {self.in_a_row} skipped steps" if self.in_a_row else ""
        raise DivergenceError(
            f"the {part} is not finite at step {facts['step']}{after}; in the batch: training rows {_listed(rows)} "
            f"({self.run.divergence_file})",
            "Look at these rows, lower training.learning_rate, set training.max_grad_norm, or have such steps skipped "
            "(training.non_finite: skip); the last checkpoint is finite.",
        )

    def _text(self, row: dict[str, Any]) -> str:
        text = str(self.data.tokenizer.decode(row["input_ids"]))
        return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."


def _listed(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:_SHOWN]))
    return shown if len(rows) <= _SHOWN else f"{shown} and {len(rows) - _SHOWN} more"
