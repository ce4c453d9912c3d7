"""Steps whose loss or gradient is not finite: what is reported of them, and whether the run stops or skips them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from accelerate.utils import gather_object

from monteclora.errors import DivergenceError
from monteclora.runs.prepare import PreparedData
from monteclora.runs.run_folder import RunFolder
from monteclora.system.atomic import write_file
from monteclora.system.devices import process_count
from monteclora.training.agreement import by_main_process
from monteclora.training.state import TrainingState

__all__ = ["NonFiniteSteps", "Part"]

Part = Literal["loss", "regulariser", "gradient"]

_SHOWN = 8  # rows in a line for people
_EXCERPT = 200  # characters of a row in the file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NonFiniteSteps:
    """What happens at a step that is not finite.

    Attributes:
        run: the run.
        data: what it trains on.
        phase: name of the phase.
        first_step: steps of the phases before.
        most_in_a_row: at most this many consecutive steps are skipped, the next one stops the run; 0 stops at once.
    """

    run: RunFolder
    data: PreparedData
    phase: str
    first_step: int
    most_in_a_row: int

    def met(self, state: TrainingState, part: Part, indices: Sequence[int]) -> None:
        """The step after ``state`` was not finite: count it as skipped, and put that into the metrics; or stop.

        Args:
            state: where the phase stands; its counts of skipped steps are raised.
            part: the first of the three that is not finite, in the order in which they are computed.
            indices: of this process's encoded training rows in the step, or in those of its batches that were not
                finite. All processes must call this.

        Raises:
            DivergenceError: the run stops; the rows are in ``diverged.json``.
        """
        encoded = self.data.encoded["train"]
        indices = gather_object(list(indices)) if process_count() > 1 else indices
        rows = [encoded.row_of(index) for index in indices]
        facts = {"phase": self.phase, "step": self.first_step + state.step + 1, "part": part}
        if state.skipped_in_a_row < self.most_in_a_row:
            state.skipped += 1
            state.skipped_in_a_row += 1
            by_main_process(lambda: self._skipped({**facts, "rows": rows}))
            return
        by_main_process(lambda: self._write(facts, indices, rows))
        after = f" after {state.skipped_in_a_row} skipped steps" if state.skipped_in_a_row else ""
        raise DivergenceError(
            f"the {part} is not finite at step {facts['step']}{after}; in the batch: training rows {_listed(rows)} "
            f"({self.run.divergence_file})",
            "Look at these rows, lower training.learning_rate, set training.max_grad_norm, or have such steps skipped "
            "(training.non_finite: skip); the last checkpoint is finite.",
        )

    def _skipped(self, facts: dict[str, Any]) -> None:
        self.run.metrics.append({"event": "skipped", **facts})
        logger.warning("the %s is not finite at step %d: skipped", facts["part"], facts["step"])

    def _write(self, facts: dict[str, Any], indices: Sequence[int], rows: Sequence[int]) -> None:
        dataset = self.data.encoded["train"].dataset
        texts = [self._text(dataset[index]) for index in indices]
        source = self.data.task.sources["train"]
        document = {
            **facts,
            "data": {"split": "train", "origin": source.origin, "sha256": source.sha256},
            "rows": [{"row": row, "text": text} for row, text in zip(rows, texts, strict=True)],
        }
        write_file(self.run.divergence_file, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())

    def _text(self, row: dict[str, Any]) -> str:
        text = str(self.data.tokenizer.decode(row["input_ids"]))
        return text if len(text) <= _EXCERPT else text[:_EXCERPT] + "..."


def _listed(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:_SHOWN]))
    return shown if len(rows) <= _SHOWN else f"{shown} and {len(rows) - _SHOWN} more"
