"""What answers to a task's questions are worth: verdicts, scores, and the table of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from monteclora.evaluation.answers import Slot
from monteclora.metrics.intervals import bootstrap_interval
from monteclora.metrics.pass_at_k import pass_at_k
from monteclora.system.atomic import replacing
from monteclora.system.devices import usable_cores
from monteclora.system.progress import progress_bar
from monteclora.tasks.generation import Generation, Problem, Verdict

__all__ = ["Score", "counted_notes", "judge", "scores", "write_verdicts"]

_KS = (1, 10, 100)
_MOST_JUDGES = 8  # at once


@dataclass(frozen=True)
class Score:
    """The mean over problems, and its 95 % bootstrap interval over them (None for a single problem)."""

    mean: float
    low: float | None = None
    high: float | None = None


def judge(
    task: str,
    generation: Generation,
    problems: Sequence[Problem],
    texts: Mapping[Slot, str],
    slots: Sequence[Slot],
    progress: bool,
) -> dict[Slot, Verdict]:
    """The verdicts on the answers of ``slots``, several at a time.

    Args:
        task: the name shown beside the progress bar.
        generation: judges an answer to a problem.
        problems: the questions.
        texts: the answers.
        slots: those to judge.
        progress: whether to draw a progress bar on standard error.
    """
    with (
        progress_bar(f"{task}: judged", len(slots), progress) as advance,
        # judging may take two processes and has a limit of wall-clock time
        ThreadPoolExecutor(min(usable_cores(), _MOST_JUDGES)) as pool,
    ):

        def verdict(slot: Slot) -> Verdict:
            found = generation.judge(problems[slot[0]], texts[slot])
            advance(1)
            return found

        return dict(zip(slots, pool.map(verdict, slots), strict=True))


def counted_notes(verdicts: Mapping[Slot, Verdict]) -> list[str]:
    """The notes of verdicts, each with the number of answers that it applies to."""
    counts = Counter(note for verdict in verdicts.values() for note in verdict.notes)
    return [f"{count} of {len(verdicts)} answers: {note}" for note, count in counts.items()]


def scores(problems: int, verdicts: Mapping[Slot, Verdict]) -> dict[str, Score]:
    """The share of right answers by each criterion; by pass@k where there is one criterion.

    Args:
        problems: how many questions.
        verdicts: at least one for each question, as many for every one.
    """
    first = next(iter(verdicts.values()))
    found: dict[str, Score] = {}
    for name in first.correct:
        right: list[list[bool]] = [[] for _ in range(problems)]
        for slot, verdict in verdicts.items():
            right[slot[0]].append(verdict.correct[name])
        if len(first.correct) > 1:
            found[name] = _score([float(np.mean(each)) for each in right])
            continue
        for k in (k for k in _KS if k <= len(right[0])):
            found[f"pass@{k}"] = _score([pass_at_k(len(each), sum(each), k) for each in right])
    return found


def _score(values: list[float]) -> Score:
    if len(values) < 2:
        return Score(values[0])
    interval = bootstrap_interval(values, seed=0)
    return Score(interval.mean, interval.low, interval.high)


def write_verdicts(
    path: Path, problems: Sequence[Problem], texts: Mapping[Slot, str], verdicts: Mapping[Slot, Verdict]
) -> None:
    """Write a Parquet file with a row for each answer: question, answer, reference and verdict."""
    rows = [
        {
            **dict(zip(("problem", "draw", "answer"), slot, strict=True)),
            "prompt": problems[slot[0]].prompt,
            "text": texts[slot],
            "extracted": verdict.extracted,
            "reason": verdict.reason,
            "reference": problems[slot[0]].reference,
            **verdict.correct,
        }
        for slot, verdict in verdicts.items()
    ]
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
