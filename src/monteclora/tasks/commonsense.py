"""Commonsense questions in instruction form, as Hu et al. 2023 (LLM-Adapters) put them.

Each row asks the model to write "the correct answer is X", X being one of the words that the instruction
offers. A data folder holds the instructions themselves; from the hub they are made out of the original
questions with the same templates. The ``test`` split is the official test split of ARC and the official
validation split of BoolQ, WinoGrande, PIQA and Social IQa, whose test labels are hidden.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from monteclora.data.files import Row, Table
from monteclora.data.sources import HubData, convert, local_splits, open_split
from monteclora.errors import DataError
from monteclora.tasks.registry import Task, register

__all__ = ["QUESTIONS", "Questions", "option_completions", "options_of"]

_COLUMNS = ("prompt", "completion", "options", "answer")
_ANSWER_FORMAT = re.compile(r"Answer format:\s*([^\s/]+(?:/[^\s/]+)+)\s*$")
_MIXTURE = ("boolq_instruct", "arc_easy_instruct", "arc_challenge_instruct", "winogrande_instruct")


def options_of(prompt: str) -> tuple[str, ...]:
    """The answer words that an instruction offers: ``... Answer format: true/false`` gives true and false.

    Empty when the prompt does not end in an answer format.
    """
    match = _ANSWER_FORMAT.search(prompt)
    return tuple(match.group(1).split("/")) if match else ()


def option_completions(completion: str, answer: str, options: tuple[str, ...] | list[str]) -> list[str]:
    """The completion of a row once for each option: its answer word replaced by that option.

    Raises:
        DataError: the answer word is not in the completion.
    """
    before, found, after = completion.rpartition(answer)
    if not found:
        raise DataError(f"the completion {completion!r} does not contain its answer {answer!r}")
    return [f"{before}{option}{after}" for option in options]


def _standard_row(row: dict[str, Any]) -> dict[str, Any]:
    prompt = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    options = options_of(prompt)
    if row["answer"] not in options:
        raise ValueError(f"the answer {row['answer']!r} is not among the options {'/'.join(options)}")
    return {"prompt": prompt, "completion": row["output"], "options": list(options), "answer": row["answer"]}


# The published templates: the original row to instruction and answer word


def _numbered(word: str, texts: list[str], separator: str = " ") -> str:
    return separator.join(f"{word.capitalize()}{i}: {text}" for i, text in enumerate(texts, start=1))


def _format(word: str, count: int) -> str:
    return "Answer format: " + "/".join(f"{word}{i}" for i in range(1, count + 1))


def _boolq(row: dict[str, Any]) -> tuple[str, str]:
    question = f"Please answer the following question with true or false, question: {row['question']}?"
    return f"{question}\n\nAnswer format: true/false", "true" if row["label"] else "false"


def _arc(row: dict[str, Any]) -> tuple[str, str]:
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    question = f"Please choose the correct answer to the question: {row['question']}"
    instruction = f"{question}\n\n{_numbered('answer', texts)}\n\n{_format('answer', len(texts))}"
    return instruction, f"answer{labels.index(row['answerKey']) + 1}"


def _winogrande(row: dict[str, Any]) -> tuple[str, str]:
    task = "Please choose the correct answer to fill in the blank to complete the given sentence"
    options = _numbered("option", [row["option1"], row["option2"]])
    return f"{task}: {row['sentence']}\n\n{options} {_format('option', 2)}", f"option{row['answer']}"


def _piqa(row: dict[str, Any]) -> tuple[str, str]:
    question = f"Please choose the correct solution to the question: {row['goal']}"
    solutions = _numbered("solution", [row["sol1"], row["sol2"]], separator="\n\n")
    return f"{question}\n\n{solutions}\n\n{_format('solution', 2)}", f"solution{row['label'] + 1}"


def _social_i_qa(row: dict[str, Any]) -> tuple[str, str]:
    question = f"Please choose the correct answer to the question: {row['context']} {row['question']}"
    answers = _numbered("answer", [row["answerA"], row["answerB"], row["answerC"]])
    return f"{question}\n\n{answers}\n\n{_format('answer', 3)}", f"answer{row['label']}"


@dataclass(frozen=True)
class Questions:
    """Where the original questions of an instruction task are, and their template."""

    hub: HubData
    template: Callable[[dict[str, Any]], tuple[str, str]]
    description: str

    def instruction_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """An original question as a row of the instruction task."""
        instruction, answer = self.template(row)
        output = f"the correct answer is {answer}"
        return _standard_row({"instruction": instruction, "output": output, "answer": answer})


_VALIDATION_IS_TEST = {"test": "validation"}
QUESTIONS = {
    "boolq_instruct": Questions(
        HubData("aps/super_glue", "boolq", _VALIDATION_IS_TEST), _boolq, "yes/no questions, no passage"
    ),
    "arc_easy_instruct": Questions(HubData("allenai/ai2_arc", "ARC-Easy"), _arc, "school science questions, easy"),
    "arc_challenge_instruct": Questions(
        HubData("allenai/ai2_arc", "ARC-Challenge"), _arc, "school science questions, hard"
    ),
    "winogrande_instruct": Questions(
        HubData("allenai/winogrande", "winogrande_l", _VALIDATION_IS_TEST),
        _winogrande,
        "which of two names fills the blank (train: size L)",
    ),
    "piqa_instruct": Questions(
        HubData("baber/piqa", None, _VALIDATION_IS_TEST), _piqa, "everyday physics, two solutions"
    ),
    "social_i_qa_instruct": Questions(
        HubData("lighteval/siqa", None, _VALIDATION_IS_TEST), _social_i_qa, "social situations, three answers"
    ),
}


def _load(name: str, split: str, folder: Path | None) -> Table:
    if split in local_splits(name, folder):
        return convert(open_split(name, split, folder), _COLUMNS, _standard_row)
    questions = QUESTIONS[name]
    return convert(open_split(name, split, folder, questions.hub), _COLUMNS, questions.instruction_row)


def _load_mixture(split: str, folder: Path | None) -> Table:
    if split in local_splits("commonsense_instruct", folder):
        return _load("commonsense_instruct", split, folder)

    def rows() -> Iterator[Row]:
        mixed = [row for name in _MIXTURE for _, row in _load(name, split, folder).rows()]
        random.Random(0).shuffle(mixed)
        return enumerate(mixed, start=1)

    return Table("the mixture of " + ", ".join(_MIXTURE), _COLUMNS, rows, unit="row")


def _register(name: str, splits: tuple[str, ...], description: str, loader: Callable[..., Table]) -> None:
    register(Task(name, "causal_lm", ("instruction", "output"), None, splits, description, loader))


for _name, _questions in QUESTIONS.items():
    _register(_name, ("train", "test"), f"instructions: {_questions.description}", partial(_load, _name))
_register("commonsense_instruct", ("train",), "instructions: BoolQ, ARC and WinoGrande mixed", _load_mixture)
