"""GSM8K (Cobbe et al. 2021): grade-school word problems with worked solutions that end in ``#### <number>``.

The solution is learned as it is, with its calculator annotations (``<<16-3-4=9>>``). Answers are matched as
lm-evaluation-harness does: ``strict`` takes the first number after ``####``, ``flexible`` the last number of the text;
both are compared with the reference after dropping commas, dollar signs and a final full stop.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from monteclora.data.files import Table
from monteclora.data.sources import HubData, convert, open_split
from monteclora.tasks.generation import Generation, Problem, Verdict
from monteclora.tasks.registry import Task, register

__all__ = ["PROMPT", "flexible_answer", "gold_answer", "strict_answer"]

PROMPT = (
    "{question}\n\nSolve the problem step by step. End with the answer as a number on a line of its own: #### <number>"
)
NO_ANSWER = "[invalid]"

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))


def strict_answer(text: str) -> str:
    """The first number after ``####``; ``[invalid]`` where none does."""
    found = _STRICT.search(text)
    return found.group(1) if found else NO_ANSWER


def flexible_answer(text: str) -> str:
    """The last thing that looks like a number; ``[invalid]`` where nothing does."""
    found = _NUMBER.findall(text)
    return found[-1].strip() if found else NO_ANSWER


def normalised(answer: str) -> str:
    """A number without commas, dollar signs, what precedes ``####``, and a final full stop; in lower case."""
    for pattern in _IGNORED:
        answer = pattern.sub("", answer)
    return answer.lower()


def gold_answer(solution: str) -> str:
    """The number that a reference solution ends in.

    Raises:
        ValueError: there is none.
    """
    _, found, number = solution.rpartition("#### ")
    if not found or not re.fullmatch(r"-?[0-9][0-9.,]*", number.strip()):
        raise ValueError("the solution does not end in #### and a number")
    return number.strip()


def judge(problem: Problem, answer: str) -> Verdict:
    """Compare the numbers in an answer with the reference."""
    gold = normalised(problem.reference)
    strict, flexible = strict_answer(answer), flexible_answer(answer)
    correct = {"strict": normalised(strict) == gold, "flexible": normalised(flexible) == gold}
    return Verdict(correct, flexible if strict == NO_ANSWER else strict)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    gold_answer(row["answer"])
    return {"prompt": PROMPT.format(question=row["question"]), "completion": row["answer"]}


def _load(split: str, folder: Path | None) -> Table:
    return convert(open_split("gsm8k", split, folder, HubData("openai/gsm8k", "main")), ("prompt", "completion"), _row)


def _problems(split: str, folder: Path | None) -> list[Problem]:
    rows = (row for _, row in _load(split, folder).rows())
    return [Problem(row["prompt"], row["completion"]) for row in rows]


register(
    Task(
        name="gsm8k",
        kind="causal_lm",
        text_columns=("question", "answer"),
        label_names=None,
        splits=("train", "test"),
        description="grade-school word problems, worked step by step; answers are generated and matched",
        loader=_load,
        generation=Generation(
            problems=_problems,
            judge=judge,
            criteria={"strict": "exact match, strict", "flexible": "exact match, flexible"},
            max_new_tokens=320,
        ),
    )
)
