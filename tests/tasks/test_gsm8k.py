import gzip
import json
import os
from pathlib import Path

import pytest

from monteclora.tasks import get_task
from monteclora.tasks.generation import Problem
from monteclora.tasks.gsm8k import flexible_answer, gold_answer, judge, normalised, strict_answer
from tests.tasks.rows import GSM8K, write_split

OUTPUTS = Path(__file__).parents[1] / "fixtures" / "gsm8k-outputs.jsonl.gz"


def verdict(answer, gold="1,234"):
    return judge(Problem("?", f"So much.\n#### {gold}"), answer).correct


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("#### 1234", True, True),
        ("#### 1,234.", True, True),
        ("It is $1,234.", False, True),
        ("#### $1234", False, True),  # strict wants the number itself behind the marks
        ("#### 1234 or #### 99", True, False),
        ("1234 of 2000", False, False),
        ("-1234", False, False),
        ("nothing", False, False),
    ],
)
def test_answers_are_matched_strictly_and_flexibly(answer, strict, flexible):
    assert verdict(answer) == {"strict": strict, "flexible": flexible}


def test_the_gold_answer_is_behind_the_last_marks():
    assert gold_answer("a #### 3\n#### -1,000.5") == "-1,000.5"
    for text in ("no marks", "#### many", "#### "):
        with pytest.raises(ValueError):
            gold_answer(text)


def test_problems_are_the_rows_in_their_order(tmp_path):
    rows = [{**GSM8K, "question": f"Question {i}?"} for i in range(5)]
    write_split(tmp_path, "gsm8k", "test", rows)
    found = get_task("gsm8k").generation.problems("test", tmp_path)
    assert [problem.prompt.partition("?")[0] for problem in found] == [f"Question {i}" for i in range(5)]
    assert "Solve the problem step by step" in found[0].prompt
    assert found[0].reference == GSM8K["answer"]


@pytest.mark.skipif("MONTECLORA_DATA" not in os.environ, reason="needs the data set")
def test_every_reference_solution_has_its_gold_answer():
    folder = Path(os.environ["MONTECLORA_DATA"])
    with gzip.open(folder / "gsm8k" / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    problems = get_task("gsm8k").generation.problems("test", folder)
    assert len(problems) == len(rows) == 1319
    for problem, row in zip(problems, rows, strict=True):
        assert gold_answer(row["answer"]) == row["answer"].split("#### ")[1].strip()
        assert judge(problem, row["answer"]).correct == {"strict": True, "flexible": True}


def outputs():
    """200 answers of SmolLM2-135M-Instruct to questions of the test split, 160 tokens each at most.

    With what lm-evaluation-harness 0.4.13 takes for each answer, and whether it counts it as right.
    """
    with gzip.open(OUTPUTS, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_agrees_with_the_harness_on_outputs_of_a_model():
    rows = outputs()
    assert len(rows) == 200
    for row in rows:
        ours = judge(Problem("?", f"#### {row['gold']}"), row["text"]).correct
        for name, extract in (("strict", strict_answer), ("flexible", flexible_answer)):
            assert extract(row["text"]) == row["harness"][name]["found"]
            assert ours[name] == row["harness"][name]["right"]
    # both ways of matching had something to find, and answers of both kinds
    assert sum(row["harness"]["strict"]["found"] != "[invalid]" for row in rows) > 20
    assert 0 < sum(row["harness"]["flexible"]["right"] for row in rows) < 200
    assert normalised("#### 5") == "5"


def test_the_harness_still_says_what_is_kept_of_it():
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    metrics = pytest.importorskip("lm_eval.api.metrics")
    filters = {
        "strict": extraction.RegexFilter(r"#### (\-?[0-9\.\,]+)"),
        "flexible": extraction.RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
    }
    ignored = {"ignore_case": True, "regexes_to_ignore": [",", r"\$", r"(?s).*#### ", r"\.$"]}
    for row in outputs():
        for name, each in filters.items():
            ((found,),) = each.apply([[row["text"]]], [{}])
            right = metrics.exact_match_hf_evaluate(predictions=[found], references=[f"#### {row['gold']}"], **ignored)
            assert row["harness"][name] == {"found": found, "right": bool(right["exact_match"])}
