"""What a run tells while it trains: lines in ``metrics.jsonl``, and the progress bar."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from monteclora.runs.metrics_log import MetricsLog

__all__ = ["LogEverything", "ShowProgress"]

_TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
_SECONDS_BETWEEN_LINES = 10.0


class _TokenRate:
    """Tokens per second of training since the last time it was asked."""

    def start(self, state: TrainerState) -> None:
        self._then, self._before = time.perf_counter(), int(state.num_input_tokens_seen)

    def leave_out(self, seconds: float) -> None:
        """These were not spent on training."""
        self._then += seconds

    def __call__(self, state: TrainerState) -> float:
        then, before = self._then, self._before
        self.start(state)
        return (self._before - before) / max(self._then - then, 1e-9)


class LogEverything(TrainerCallback):
    """Writes what the Trainer logs as events, steps counted over all phases; logs the last step in any case.

    Args:
        log: where to.
        phase: name of the phase.
        first_step: steps of the phases before.
    """

    def __init__(self, log: MetricsLog, phase: str, first_step: int) -> None:
        self.metrics_log = log
        self.phase = phase
        self.first_step = first_step
        self._rate = _TokenRate()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of tokens per second."""
        self._rate.start(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the last step logged, wherever the interval ends."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a line."""
        if not state.is_world_process_zero or not logs:
            return
        where = {"phase": self.phase, "step": self.first_step + state.global_step, "epoch": state.epoch}
        if "loss" in logs:
            names = ("loss", "objective", "kl", "pi_squared_norm", "learning_rate", "grad_norm")
            values = {name: logs[name] for name in names if name in logs}
            rate = round(self._rate(state), 1)
            speed = {"tokens": int(state.num_input_tokens_seen), "tokens_per_second": rate}
            self.metrics_log.append({"event": "train", **where, **values, **speed})
        elif any(name.startswith("eval_") for name in logs):
            values = {
                name.removeprefix("eval_"): value
                for name, value in logs.items()
                if name.startswith("eval_") and name not in _TIMES
            }
            seconds = {"seconds": logs["eval_runtime"]}
            self._rate.leave_out(logs["eval_runtime"])
            self.metrics_log.append({"event": "eval", **where, **values, **seconds})


class ShowProgress(TrainerCallback):
    """A bar with loss, KL and ||pi||^2 on a terminal, lines from time to time anywhere else; on standard error.

    Args:
        phase: what the bar is called.
        console: where to.
    """

    def __init__(self, phase: str, console: Console) -> None:
        self.phase = phase
        self.console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line = time.monotonic()
        self._rate = _TokenRate()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar where training starts."""
        self._rate.start(state)
        if not state.is_world_process_zero:
            return
        if not self.console.is_terminal:
            if state.global_step:
                self.console.print(f"{self.phase}: resuming at step {state.global_step} of {state.max_steps}")
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
        self._task = self._bar.add_task(self.phase, total=state.max_steps, completed=state.global_step, numbers="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move on."""
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the numbers."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            numbers = f"{_training_numbers(logs)}  {self._rate(state):,.0f} tokens/s"
            if self._bar:
                self._bar.update(self._task, numbers=numbers)
            elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES or state.global_step >= state.max_steps:
                self._line(state, numbers)
        elif any(name.startswith("eval_") for name in logs):
            self._rate.leave_out(logs["eval_runtime"])
            self._line(state, f"validation {_validation_numbers(logs)}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _line(self, state: TrainerState, text: str) -> None:
        where = f"step {state.global_step}/{state.max_steps}"
        self.console.print(f"{self.phase}: {where}  {text}", soft_wrap=True, highlight=False)
        self._last_line = time.monotonic()


def _training_numbers(logs: dict[str, float]) -> str:
    parts = [f"loss {logs['loss']:.3f}"]
    if "kl" in logs:
        parts += [f"KL {logs['kl']:.2f}", f"||pi||² {logs['pi_squared_norm']:.3f}"]
    return "  ".join(parts)


def _validation_numbers(logs: dict[str, float]) -> str:
    names = [name for name in logs if name.startswith("eval_") and name not in _TIMES]
    return "  ".join(f"{name.removeprefix('eval_')} {logs[name]:.3f}" for name in names)
