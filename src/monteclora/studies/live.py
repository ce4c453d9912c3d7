"""How far a study is, on standard error: a table where somebody watches, else a line for each trial."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live as Display
from rich.table import Table

from monteclora.metrics.registry import METRICS
from monteclora.studies.folder import Outcome, StudyFolder
from monteclora.studies.plan import Plan
from monteclora.studies.summary import primary_metric

__all__ = ["Live"]


class Live:
    """Shows a study while it runs.

    Args:
        folder, plan: of the study.
        workers: that share what is left, for the estimate of the end.
        show: whether to show anything.
        console: for people.
    """

    def __init__(
        self, folder: StudyFolder, plan: Plan, workers: int, *, show: bool = True, console: Console | None = None
    ) -> None:
        self._folder, self._plan, self._workers = folder, plan, workers
        self._console = console or Console(stderr=True, quiet=not show)
        self._outcomes = folder.outcomes(plan.trials)
        self._before, self._started = len(self._outcomes), time.monotonic()
        watched = show and self._console.is_terminal
        self._display = Display(console=self._console, auto_refresh=False, transient=True) if watched else None

    def __enter__(self) -> Self:
        """Say what is to be done."""
        for note in self._plan.notes:
            self._console.print(f"note: {note}", highlight=False, soft_wrap=True)
        total, done = len(self._plan.trials), len(self._outcomes)
        self._console.print(f"{self._folder.path}: {total} trials, {done} done", highlight=False, soft_wrap=True)
        if self._display is not None:
            self._display.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Leave the terminal as it was."""
        if self._display is not None:
            self._display.stop()

    def tick(self) -> int:
        """Look at the folder, and show what is new; gives how many trials are done."""
        for trial in self._plan.trials:
            if trial.id not in self._outcomes and (outcome := self._folder.outcome(trial.id)) is not None:
                self._outcomes[trial.id] = outcome
                place = f"[{len(self._outcomes)}/{len(self._plan.trials)}]"
                text = f"{place} {trial.label}: {self._told(outcome)}"
                self._console.print(text, highlight=False, soft_wrap=True, markup=False)
        if self._display is not None:
            self._display.update(self._table(), refresh=True)
        return len(self._outcomes)

    def _told(self, outcome: Outcome) -> str:
        if outcome.status != "finished":
            return f"{outcome.status}: {outcome.reason}"
        name = primary_metric(self._plan, self._outcomes).name
        if name not in outcome.metrics:  # of a study of tasks that have no metric in common
            name = next(iter(outcome.metrics))
        return f"{METRICS[name].label} {outcome.metrics[name]:.4f} ({outcome.seconds:.1f} s)"

    def _table(self) -> Table:
        left = [trial for trial in self._plan.trials if trial.id not in self._outcomes]
        runs = {trial.run: trial for trial in reversed(left)}
        running = [trial for run, trial in reversed(runs.items()) if self._folder.claims.running(run)]
        by_status = dict.fromkeys(("finished", "diverged", "failed"), 0)
        for outcome in self._outcomes.values():
            by_status[outcome.status] += 1
        table = Table.grid(padding=(0, 2))
        table.add_row("done", f"{len(self._outcomes)} of {len(self._plan.trials)}")
        table.add_row("running", "; ".join(trial.label for trial in running[: self._workers]) or "none")
        table.add_row("diverged, failed", f"{by_status['diverged']}, {by_status['failed']}")
        table.add_row("best", self._best())
        new = len(self._outcomes) - self._before
        rest = (time.monotonic() - self._started) / new * len(left) if new else None
        table.add_row("estimated end", "unknown yet" if rest is None else f"in {rest / 60:.0f} min")
        return table

    def _best(self) -> str:
        metric = primary_metric(self._plan, self._outcomes)
        measured = {identity for identity, outcome in self._outcomes.items() if metric.name in outcome.metrics}
        finished = [trial for trial in self._plan.trials if trial.id in measured]
        if not finished:
            return "none yet"
        sign = 1 if metric.greater_is_better else -1
        best = max(finished, key=lambda trial: sign * self._outcomes[trial.id].metrics[metric.name])
        return f"{best.label}: {metric.label} {self._outcomes[best.id].metrics[metric.name]:.4f}"
