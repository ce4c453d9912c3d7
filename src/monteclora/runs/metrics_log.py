"""``metrics.jsonl``: a line for everything a run measures, in the order it happens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from monteclora.errors import CheckpointError
from monteclora.system.atomic import write_file

__all__ = ["MetricsLog"]


class MetricsLog:
    """Events: mappings with ``event``, ``phase`` and ``step``.

    The events are ``range_test``, ``back_off``, ``train``, ``skipped``, ``eval``, ``phase`` and ``finished``.

    Steps are counted over all phases. A ``train`` line holds means since the line before: ``loss``, the task's
    negative log-likelihood in nats, and with a posterior ``objective`` (loss and regulariser), ``kl`` (nats) and
    ``pi_squared_norm``; besides ``learning_rate``, ``grad_norm``, ``tokens`` seen so far and ``tokens_per_second``. A
    ``skipped`` line names the ``part`` of a step that was not finite and its training ``rows``; no mean counts it. An
    ``eval`` line holds validation metrics. A ``phase`` line closes a phase, the ``finished`` line the run. A
    ``range_test`` line, before the first step, has the ``learning_rate`` that was found, the ``rates`` and ``losses``
    that it was found by, and the test's ``test_steps``, ``tokens`` and ``seconds``. A ``back_off`` line says that the
    run went back to its step, the ``number``-th time in the phase, from ``left_step``, for what ``reason``, and with
    what peak ``learning_rate`` it went on; what was measured in between is forgotten.
    An ensemble's file begins with a ``members`` line, which names their ``seeds``.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: dict[str, Any]) -> None:
        """Write a line; it is on disk when this returns, and readable whatever happens next.

        Raises:
            CheckpointError: the disk refuses it, for instance because it is full.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path}: {error.strerror}", "Make room; the same command resumes the run."
            ) from error

    def read(self) -> list[dict[str, Any]]:
        """Every event; a last line that a killed process left unfinished is skipped.

        Raises:
            CheckpointError: another line is damaged.
        """
        if not self.path.is_file():
            return []
        # a byte that is no UTF-8 makes its line no JSON
        lines = self.path.read_bytes().decode("utf-8", errors="replace").splitlines(keepends=True)
        events = []
        for number, line in enumerate(lines, start=1):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                if line is lines[-1] and not line.endswith("\n"):
                    break
                raise self._damaged(number, "not JSON") from None
            if not isinstance(event, dict) or not {"event", "step"} <= event.keys():
                raise self._damaged(number, "not an event")
            events.append(event)
        return events

    def _damaged(self, line: int, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}, line {line} is {why}", "Remove the line, or take the file from a backup.")

    def rewind(self, step: int, back_off: dict[str, Any] | None = None) -> None:
        """Forget what was measured after ``step``, and what ended there: the run resumes from it.

        Args:
            step: counted over all phases.
            back_off: the line that says why, where the run goes back; in the place of an earlier one of its number,
                which was written and came to nothing.
        """

        def is_past(event: dict[str, Any]) -> bool:
            ends = event["event"] in ("phase", "finished")
            same = ("event", "phase", "step", "number")
            again = back_off is not None and all(event.get(name) == back_off[name] for name in same)
            return bool(event["step"] < step or (event["step"] == step and not ends)) and not again

        kept = [event for event in self.read() if is_past(event)] + ([] if back_off is None else [back_off])
        write_file(self.path, "".join(json.dumps(event) + "\n" for event in kept).encode())
