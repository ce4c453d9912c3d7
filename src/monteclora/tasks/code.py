"""Programs: Magicoder-OSS-Instruct (Wei et al. 2023) to learn from, HumanEval (Chen et al. 2021) to be tested on.

Judging an answer to HumanEval runs what the model wrote, in a sandbox (:mod:`monteclora.system.sandbox`), and only
where that is allowed.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from monteclora.data.files import Table
from monteclora.data.sources import HubData, convert, open_split
from monteclora.system.sandbox import Limits, run_check
from monteclora.tasks.generation import Generation, Problem, Verdict
from monteclora.tasks.registry import Task, register

__all__ = ["HUMANEVAL_PROMPT", "extract_program"]

HUMANEVAL_PROMPT = (
    "Complete this Python function. Write the whole function in one block of code.\n\n```python\n{code}\n```"
)

# a block in any language, with the first word after its opening: one that is not recognised would have its closing
# taken for an opening
_BLOCK = re.compile(r"```[^\S\n]*([^\s`]*)[^`\n]*\n(.*?)(?:(?:\n|(?<=\n))[^\S\n]*```|\Z)", re.DOTALL)
_PYTHON = re.compile(r"(python|py)?[\d.]*", re.IGNORECASE)
# where a completion of the bare prompt ends: at the next thing that is not part of the function
_AFTER = re.compile(r"\n(?=\S)(?![)\]}#@])(?!def |import |from )")


def extract_program(prompt: str, answer: str, entry_point: str) -> str:
    """The program in an answer.

    Args:
        prompt: the beginning of the function: imports, signature and docstring.
        answer: a block of code (the first that defines the function, else the first in Python or in no language that is
            named, else the first), or the function's continuation.
        entry_point: the function's name.

    Returns:
        A program that defines the function if the answer does.
    """
    found = [(language, textwrap.dedent(block)) for language, block in _BLOCK.findall(answer)]
    blocks = [block for _, block in sorted(found, key=lambda each: _PYTHON.fullmatch(each[0]) is None)]
    defines = re.compile(rf"^(async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    code = next((block for block in blocks if defines.search(block)), blocks[0] if blocks else answer)
    if defines.search(code):
        # helpers and imports of the prompt come first: answers take them for granted
        start = defines.search(prompt)
        return (prompt[: start.start()] if start else "") + "\n" + code
    return f"{prompt.rstrip()}\n{_continuation(code)}\n"


def _continuation(code: str) -> str:
    """The lines of an answer that continue the function, indented."""
    code = code.strip("\n").rstrip()
    first, _, rest = code.partition("\n")
    if first.startswith((" ", "\t")):
        return _AFTER.split(code, maxsplit=1)[0]
    later = [line for line in rest.split("\n") if line.strip()]
    if first.endswith(":") or any(not line.startswith((" ", "\t")) for line in later):
        return textwrap.indent(code, "    ")
    return f"    {code}"  # the first line alone lost its indentation


def judge(problem: Problem, answer: str, limits: Limits | None = None) -> Verdict:
    """Run the tests on the program in an answer."""
    facts = problem.facts
    program = extract_program(facts["prompt"], answer, facts["entry_point"])
    trusted = facts["prompt"] + problem.reference
    outcome = run_check(program, trusted, facts["test"], facts["entry_point"], limits or Limits())
    late = (outcome.reason,) if outcome.timed_out else ()
    return Verdict({"passed": outcome.passed}, program, outcome.reason, (*outcome.missing, *late))


def _humaneval_row(row: dict[str, Any]) -> dict[str, Any]:
    answer = f"```python\n{row['prompt']}{row['canonical_solution']}```"
    return {"prompt": HUMANEVAL_PROMPT.format(code=row["prompt"].rstrip()), "completion": answer}


def _open_humaneval(split: str, folder: Path | None) -> Table:
    return open_split("humaneval", split, folder, HubData("openai/openai_humaneval"))


def _load_humaneval(split: str, folder: Path | None) -> Table:
    return convert(_open_humaneval(split, folder), ("prompt", "completion"), _humaneval_row)


def _problems(split: str, folder: Path | None) -> list[Problem]:
    names = ("prompt", "test", "entry_point", "canonical_solution", "task_id")
    table = convert(_open_humaneval(split, folder), names, lambda row: {name: row[name] for name in names})
    return [
        Problem(_humaneval_row(row)["prompt"], row["canonical_solution"], {name: row[name] for name in names})
        for _, row in table.rows()
    ]


def _load_magicoder(split: str, folder: Path | None) -> Table:
    table = open_split("magicoder_oss_instruct", split, folder, HubData("ise-uiuc/Magicoder-OSS-Instruct-75K"))
    return convert(
        table, ("prompt", "completion"), lambda row: {"prompt": row["problem"], "completion": row["solution"]}
    )


register(
    Task(
        name="humaneval",
        kind="causal_lm",
        text_columns=("prompt", "canonical_solution"),
        label_names=None,
        splits=("test",),
        description="164 Python functions to write; pass@k of generated programs, with --allow-code-execution",
        loader=_load_humaneval,
        generation=Generation(
            problems=_problems,
            judge=judge,
            criteria={"passed": "passed"},
            max_new_tokens=384,
            runs_code=True,
        ),
        remedy="Train on magicoder_oss_instruct, and test with `monteclora generate RUN --task humaneval`.",
    )
)
register(
    Task(
        name="magicoder_oss_instruct",
        kind="causal_lm",
        text_columns=("problem", "solution"),
        label_names=None,
        splits=("train",),
        description="programming problems with solutions, made from open-source code; humaneval tests what was learned",
        loader=_load_magicoder,
        remedy="Its rows are for training; `monteclora generate RUN --task humaneval` tests what was learned.",
    )
)
