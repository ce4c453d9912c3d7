"""Multiple choice in the schema of the hub's data sets: the right option is learned, and all are scored.

``prompt`` is the question, ``options`` are the texts to choose from and ``completion`` is the right one. Evaluation
compares the options' likelihoods, plain (``accuracy``) and per byte (``accuracy_per_byte``). Of options that stand in a
question twice (five questions of Social IQa's validation split) one is kept: nothing could tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from monteclora.data.files import Table
from monteclora.data.sources import HubData, convert, open_split
from monteclora.tasks.registry import Task, register

__all__ = ["CHOICES", "WINOGRANDE_SIZES", "Choice", "open_questions"]

_COLUMNS = ("prompt", "completion", "options", "answer")
WINOGRANDE_SIZES = ("xs", "s", "m", "l", "xl")

# Prompts: from a row of the hub to the question, the options, and the number of the right one


def _piqa(row: dict[str, Any]) -> tuple[str, list[str], int]:
    return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"])


def _social_i_qa(row: dict[str, Any]) -> tuple[str, list[str], int]:
    options = [row["answerA"], row["answerB"], row["answerC"]]
    return f"Question: {row['context']} {row['question']}\nAnswer:", options, int(row["label"]) - 1


def _winogrande(row: dict[str, Any]) -> tuple[str, list[str], int]:
    before, blank, after = row["sentence"].partition("_")
    if not blank:
        raise ValueError("the sentence has no blank (_)")
    options = [f"{row[name]}{after}" for name in ("option1", "option2")]
    return f"Complete the sentence: {before.strip()}".strip(), options, int(row["answer"]) - 1


def _arc(row: dict[str, Any]) -> tuple[str, list[str], int]:
    return f"Question: {row['question']}\nAnswer:", *_lettered(row)


def _openbookqa(row: dict[str, Any]) -> tuple[str, list[str], int]:
    return row["question_stem"], *_lettered(row)


def _lettered(row: dict[str, Any]) -> tuple[list[str], int]:
    choices = row["choices"]
    return choices["text"], choices["label"].index(row["answerKey"].strip())


@dataclass(frozen=True)
class Choice:
    """A task.

    Attributes:
        hub: where the questions are.
        question: a row of it to question, options and the number of the right one.
        splits: with labels that are public.
        description: one line.
        subsets: configurations on the hub with fewer training rows, by name.
    """

    hub: HubData
    question: Callable[[dict[str, Any]], tuple[str, list[str], int]]
    splits: tuple[str, ...]
    description: str
    subsets: dict[str, str] = field(default_factory=dict)

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the hub as prompt, completion, options and answer."""
        prompt, options, right = self.question(row)
        if not 0 <= right < len(options):
            raise ValueError(f"the label names option {right + 1} of {len(options)}")
        texts = [option.strip() for option in options]
        answer = texts[right]
        return {"prompt": prompt, "completion": answer, "options": list(dict.fromkeys(texts)), "answer": answer}


_ALL = ("train", "validation", "test")
CHOICES = {
    "piqa": Choice(HubData("baber/piqa"), _piqa, _ALL[:2], "everyday physics: which of two solutions works?"),
    "social_i_qa": Choice(
        HubData("lighteval/siqa"), _social_i_qa, _ALL[:2], "social situations: which of three answers fits?"
    ),
    "winogrande": Choice(
        HubData("allenai/winogrande", "winogrande_xl"),
        _winogrande,
        _ALL[:2],
        "which of two names fills the blank? (data.subset: xs, s, m, l, xl)",
        {size: f"winogrande_{size}" for size in WINOGRANDE_SIZES},
    ),
    "arc_easy": Choice(HubData("allenai/ai2_arc", "ARC-Easy"), _arc, _ALL, "school science questions, easy"),
    "arc_challenge": Choice(HubData("allenai/ai2_arc", "ARC-Challenge"), _arc, _ALL, "school science questions, hard"),
    "openbookqa": Choice(
        HubData("allenai/openbookqa", "main"),
        _openbookqa,
        _ALL,
        "elementary science that takes a fact and some reasoning",
    ),
}


def open_questions(name: str, split: str, folder: Path | None) -> Table:
    """The rows of a split as the hub has them; ``train_<subset>`` for a smaller training split."""
    choice = CHOICES[name]
    subset = choice.subsets.get(split.removeprefix("train_")) if split.startswith("train_") else None
    hub = HubData(choice.hub.name, subset, {split: "train"}) if subset else choice.hub
    return open_split(name, split, folder, hub)


def _load(name: str, split: str, folder: Path | None) -> Table:
    return convert(open_questions(name, split, folder), _COLUMNS, CHOICES[name].row)


for _name, _choice in CHOICES.items():
    register(
        Task(
            name=_name,
            kind="causal_lm",
            text_columns=("prompt", "completion"),
            label_names=None,
            splits=_choice.splits,
            description=f"multiple choice: {_choice.description}",
            loader=partial(_load, _name),
            subsets=tuple(_choice.subsets),
        )
    )
