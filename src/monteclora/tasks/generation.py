"""Answers that a model writes: the questions of a task, and how an answer is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Generation", "Problem", "Verdict"]


@dataclass(frozen=True)
class Problem:
    """One question.

    Attributes:
        prompt: what the model is asked, without the chat template.
        reference: the right answer, for people.
        facts: what judging an answer needs.
    """

    prompt: str
    reference: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What an answer is worth.

    Attributes:
        correct: whether it is right, by criterion.
        extracted: what was taken for the answer.
        reason: why it is wrong, where there is more to say.
        notes: what a reader of the scores must know of how it was judged, in words that are the same for many answers.
    """

    correct: Mapping[str, bool]
    extracted: str
    reason: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """How a task's answers are asked for and judged.

    Attributes:
        problems: from split and data folder (or None) to the questions of a split.
        judge: from a question and what the model wrote to a verdict; runs in several threads.
        criteria: the names of the verdict's entries, with labels for tables.
        max_new_tokens: enough for an answer.
        runs_code: whether judging runs what the model wrote.
    """

    problems: Callable[[str, Path | None], list[Problem]]
    judge: Callable[[Problem, str], Verdict]
    criteria: Mapping[str, str]
    max_new_tokens: int
    runs_code: bool = False
