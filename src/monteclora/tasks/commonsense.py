"""Commonsense questions in instruction form, as Hu et al. 2023 (LLM-Adapters) put them.

Each row asks the model to write "the correct answer is X", X being one of the words that the instruction
offers. A data folder holds the instructions themselves or the original questions, out of which they are made with the
same templates, as they are from the hub. The ``test`` split is the official test split of ARC and OpenBookQA and the
official validation split of BoolQ, WinoGrande, PIQA and Social IQa, whose test labels are hidden.

``commonsense_15k`` and ``commonsense_170k`` are the published mixtures that models are trained on: the files as they
were published, a JSON array with ``instruction``, ``input``, ``output`` and ``answer``.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from monteclora.config import brief
from monteclora.data.files import Row, Table, open_table
from monteclora.data.labels import label_key
from monteclora.data.sources import DATA_FOLDER_VARIABLE, HubData, convert, local_splits, open_split
from monteclora.errors import DataError, NotAtHandError
from monteclora.tasks.multiple_choice import CHOICES, WINOGRANDE_SIZES, open_questions
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


# a label of BoolQ, as the task boolq takes it or as JSON has it, to the answer word
_BOOLEANS = {"0": "false", "1": "true", "no": "false", "yes": "true", "false": "false", "true": "true"}

# The published templates: the original row to instruction and answer word


def _numbered(word: str, texts: list[str], separator: str = " ") -> str:
    return separator.join(f"{word.capitalize()}{i}: {text}" for i, text in enumerate(texts, start=1))


def _format(word: str, count: int) -> str:
    return "Answer format: " + "/".join(f"{word}{i}" for i in range(1, count + 1))


def _boolq(row: dict[str, Any]) -> tuple[str, str]:
    question = f"Please answer the following question with true or false, question: {row['question']}?"
    key = label_key(row["label"])
    if key not in _BOOLEANS:
        raise ValueError(f"the label is {brief(key)}, expected one of {', '.join(_BOOLEANS)}")
    return f"{question}\n\nAnswer format: true/false", _BOOLEANS[key]


def _arc(row: dict[str, Any]) -> tuple[str, str]:
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    question = f"Please choose the correct answer to the question: {row['question']}"
    instruction = f"{question}\n\n{_numbered('answer', texts)}\n\n{_format('answer', len(texts))}"
    return instruction, f"answer{labels.index(row['answerKey']) + 1}"


def _openbookqa(row: dict[str, Any]) -> tuple[str, str]:
    return _arc({**row, "question": row["question_stem"]})


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
    """The template of an instruction task, and which task's questions go into it.

    Attributes:
        template: an original row to instruction and answer word.
        description: one line.
        source: the task with the original questions.
        test: the split of it that is the test split here.
        subsets: of the training split.
    """

    template: Callable[[dict[str, Any]], tuple[str, str]]
    description: str
    source: str
    test: str = "validation"
    subsets: tuple[str, ...] = ()

    def instruction_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """An original question as a row of the instruction task."""
        instruction, answer = self.template(row)
        output = f"the correct answer is {answer}"
        return _standard_row({"instruction": instruction, "output": output, "answer": answer})

    def open(self, split: str, folder: Path | None) -> Table:
        """The original questions of a split."""
        theirs = self.test if split == "test" else split
        if self.source in CHOICES:
            return open_questions(self.source, theirs, folder)
        return open_split(self.source, theirs, folder, HubData("aps/super_glue", self.source))


QUESTIONS = {
    "boolq_instruct": Questions(_boolq, "yes/no questions, no passage", "boolq"),
    "arc_easy_instruct": Questions(_arc, "school science questions, easy", "arc_easy", "test"),
    "arc_challenge_instruct": Questions(_arc, "school science questions, hard", "arc_challenge", "test"),
    "openbookqa_instruct": Questions(
        _openbookqa, "elementary science that takes a fact and some reasoning", "openbookqa", "test"
    ),
    "winogrande_instruct": Questions(
        _winogrande,
        "which of two names fills the blank (data.subset: xs, s, m, l, xl)",
        "winogrande",
        subsets=WINOGRANDE_SIZES,
    ),
    "piqa_instruct": Questions(_piqa, "everyday physics, two solutions", "piqa"),
    "social_i_qa_instruct": Questions(_social_i_qa, "social situations, three answers", "social_i_qa"),
}


def _load(name: str, split: str, folder: Path | None) -> Table:
    if split in local_splits(name, folder):
        return convert(open_split(name, split, folder), _COLUMNS, _standard_row)
    questions = QUESTIONS[name]
    return convert(questions.open(split, folder), _COLUMNS, questions.instruction_row)


def _load_mixture(split: str, folder: Path | None) -> Table:
    if split in local_splits("commonsense_instruct", folder):
        return convert(open_split("commonsense_instruct", split, folder), _COLUMNS, _standard_row)

    def rows() -> Iterator[Row]:
        mixed = [row for name in _MIXTURE for _, row in _load(name, split, folder).rows()]
        random.Random(0).shuffle(mixed)
        return enumerate(mixed, start=1)

    return Table("the mixture of " + ", ".join(_MIXTURE), _COLUMNS, rows, unit="row")


def _load_published(name: str, split: str, folder: Path | None) -> Table:
    """The train split as published, ``<name>.json`` in the data folder or the task's own; else the usual place."""
    root = folder or os.environ.get(DATA_FOLDER_VARIABLE)
    for place in (Path(root), Path(root) / name) if root and split == "train" else ():
        if (path := place / f"{name}.json").is_file():
            return convert(open_table(path), _COLUMNS, _standard_row)
    if split not in local_splits(name, folder):
        raise NotAtHandError(
            f"{name} is not available, and it is not on the hub",
            f"Put {name}.json of AGI-Edgerunners/LLM-Adapters (ft-training_set) into a folder, and set data.folder "
            f"or {DATA_FOLDER_VARIABLE} to it.",
        )
    return convert(open_split(name, split, folder), _COLUMNS, _standard_row)


def _register(
    name: str, splits: tuple[str, ...], description: str, loader: Callable[..., Table], subsets: tuple[str, ...] = ()
) -> None:
    columns = ("instruction", "output")
    remedy = "Train on its train split, and evaluate on the tasks by name (`monteclora evaluate RUN --task NAME`)."
    task = Task(name, "causal_lm", columns, None, splits, description, loader, subsets, remedy=remedy)
    register(task)


for _name, _questions in QUESTIONS.items():
    _about = f"instructions: {_questions.description}"
    _register(_name, ("train", "test"), _about, partial(_load, _name), _questions.subsets)
_register("commonsense_instruct", ("train",), "instructions: BoolQ, ARC and WinoGrande mixed", _load_mixture)
for _name, _rows in (("commonsense_15k", "about 15,000"), ("commonsense_170k", "170,420")):
    _about = f"instructions: the published mixture of eight commonsense tasks, {_rows} rows"
    _register(_name, ("train",), _about, partial(_load_published, _name))
