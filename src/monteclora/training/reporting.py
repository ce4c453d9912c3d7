"""What a run tells while it trains: lines in ``metrics.jsonl``, trackers, and a progress bar or lines on a console."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from monteclora.runs.metrics_log import MetricsLog
from monteclora.training.agreement import by_main_process
from monteclora.training.state import TrainingState

__all__ = ["Reporting"]

_SECONDS_BETWEEN_LINES = 10.0


class Reporting:
    """Tells of one phase; only the main process does.

    Args:
        log: the metrics file.
        accelerator: whose trackers log the same.
        console: for people: a bar on a terminal, lines from time to time anywhere else.
        phase: name of the phase, for the metrics.
        title: name of the phase, for people.
        first_step: steps of the phases before; the metrics count over all phases.
        steps: of the phase.
    """

    def __init__(
        self,
        log: MetricsLog,
        accelerator: Accelerator,
        console: Console,
        *,
        phase: str,
        title: str,
        first_step: int,
        steps: int,
    ) -> None:
        self.metrics_log = log
        self.accelerator = accelerator
        self.console = console
        self.phase = phase
        self.title = title
        self.first_step = first_step
        self.steps = steps
        self.quiet = not accelerator.is_main_process
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line = time.monotonic()
        self._then = time.perf_counter()
        self._tokens_then = 0

    def start(self, state: TrainingState) -> None:
        """Training starts, or resumes."""
        self._then, self._tokens_then = time.perf_counter(), state.tokens
        if self.quiet:
            return
        if not self.console.is_terminal:
            if state.step:
                self.console.print(f"{self.title}: resuming at step {state.step} of {self.steps}")
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            transient=False,
        )
        self._bar.start()
        self._task = self._bar.add_task(self.title, total=self.steps, completed=state.step, numbers="")

    def step(self, state: TrainingState) -> None:
        """A step was taken."""
        if self._bar:
            self._bar.update(self._task, completed=state.step)

    def train(self, state: TrainingState, epoch: float, values: Mapping[str, float]) -> None:
        """Log means over the steps since the last log."""
        seconds = max(time.perf_counter() - self._then, 1e-9)
        rate = (state.tokens - self._tokens_then) / seconds
        self._then, self._tokens_then = time.perf_counter(), state.tokens
        speed = {"tokens": state.tokens, "tokens_per_second": round(rate, 1)}
        self._log("train", state.step, epoch, {**values, **speed})
        if self.quiet:
            return
        numbers = f"{_training_numbers(values)}  {rate:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, numbers=numbers)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES or state.step >= self.steps:
            self._line(state.step, numbers)

    def evaluation(self, state: TrainingState, epoch: float, metrics: Mapping[str, float], seconds: float) -> None:
        """Log the validation metrics of this step; the time they took is no training time."""
        self._then += seconds
        self._log("eval", state.step, epoch, {**metrics, "seconds": round(seconds, 4)})
        if not self.quiet:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            self._line(state.step, f"validation {shown}")

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _log(self, event: str, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        # all processes come here: that the disk is full ends each of them
        by_main_process(lambda: self._write(event, self.first_step + step, epoch, values))

    def _write(self, event: str, total: int, epoch: float, values: Mapping[str, Any]) -> None:
        self.metrics_log.append({"event": event, "phase": self.phase, "step": total, "epoch": epoch, **values})
        if self.accelerator.trackers:
            self.accelerator.log({f"{event}/{name}": value for name, value in values.items()}, step=total)

    def _line(self, step: int, text: str) -> None:
        self.console.print(f"{self.title}: step {step}/{self.steps}  {text}", soft_wrap=True, highlight=False)
        self._last_line = time.monotonic()


def _training_numbers(values: Mapping[str, float]) -> str:
    parts = [f"loss {values['loss']:.3f}"]
    if "kl" in values:
        parts += [f"KL {values['kl']:.2f}", f"||pi||² {values['pi_squared_norm']:.3f}"]
    return "  ".join(parts)
