import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from monteclora.system.sandbox import Limits
from monteclora.tasks import get_task
from monteclora.tasks.code import extract_program, judge
from tests.tasks.rows import HUMANEVAL, write_split

PROMPT, NAME = HUMANEVAL["prompt"], HUMANEVAL["entry_point"]
BODY = HUMANEVAL["canonical_solution"]
WHOLE = "def area(r):\n    return 3.14159265359 * r ** 2"

linux = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")


@pytest.fixture
def problem(tmp_path):
    write_split(tmp_path, "humaneval", "test", [HUMANEVAL])
    (found,) = get_task("humaneval").generation.problems("test", tmp_path)
    return found


@pytest.mark.parametrize(
    "answer",
    [
        BODY,
        BODY.strip(),
        "square = r * r\n    return math.pi * square",
        "if r < 0:\n    return 0\nreturn math.pi * r * r",
        f"{BODY}\n\nprint(area(1))\n# and so on\nassert False",
        f"```python\n{WHOLE}\n```",
        f"Here it is:\n\n```python\n{WHOLE}\n```\nIt uses ```math```.",
        f"```\n{WHOLE}",  # cut off by the limit of tokens
        f"First:\n```python\nprint('hello')\n```\nthen:\n```python\n{WHOLE}\n```",
        f"```python\n{PROMPT}{BODY}```",
        f"  ```py\n{BODY}  ```",
        f"```python3\n{WHOLE}\n```",
        f'```Python title="area.py"\n{WHOLE}\n```',
        f"```bash\npip install numpy\n```\nthen:\n```python\n{WHOLE}\n```",
        f"```bash\npip install numpy\n```\nand in the function:\n```python\n{BODY}\n```",
        f"```\n```\n```python\n{WHOLE}\n```\nwhich prints\n```text\n3.14\n```",
        f"```python\n{WHOLE.replace('3.14159265359', 'math.pi')}\n```",  # takes the prompt's import for granted
    ],
)
@linux
def test_the_program_of_an_answer_is_found(problem, answer):
    verdict = judge(problem, answer, Limits(60))
    assert verdict.correct == {"passed": True}, (verdict.reason, verdict.extracted)


@linux
@pytest.mark.parametrize(
    "answer", ["", "I cannot.", "```python\npass\n```", "    return 0\n", "```python\ndef other(): pass\n```"]
)
def test_a_wrong_answer_does_not_pass(problem, answer):
    verdict = judge(problem, answer, Limits(60))
    assert verdict.correct == {"passed": False}
    assert verdict.reason


@linux
def test_programs_that_take_too_long_are_told_from_wrong_ones(problem):
    late = judge(problem, "while True: pass", Limits(1))
    assert late.notes == ("no verdict within 1 seconds",)
    assert judge(problem, "return 0", Limits(60)).notes == judge(problem, BODY, Limits(60)).notes  # the machine's


def test_a_program_keeps_the_imports_of_the_prompt():
    assert extract_program(PROMPT, f"```python\n{WHOLE}\n```", NAME).startswith("import math\n")
    assert extract_program(PROMPT, BODY, NAME) == PROMPT.rstrip() + "\n" + BODY


def test_the_prompt_shows_the_function(problem):
    assert PROMPT.rstrip() in problem.prompt
    assert problem.prompt.startswith("Complete this Python function.")


@linux
@pytest.mark.skipif("MONTECLORA_DATA" not in os.environ, reason="needs the data set")
def test_every_canonical_solution_passes():
    problems = get_task("humaneval").generation.problems("test", Path(os.environ["MONTECLORA_DATA"]))
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda problem: judge(problem, problem.reference, Limits(60)), problems))
    failed = {p.facts["task_id"]: v.reason for p, v in zip(problems, verdicts, strict=True) if not v.correct["passed"]}
    assert len(problems) == 164
    assert failed == {}
