from __future__ import annotations

import gzip
import json

import datasets
import pytest

from monteclora.errors import DataError
from monteclora.tasks import DataSpec, get_task, load
from monteclora.tasks.commonsense import QUESTIONS, option_completions, options_of
from tests.tasks.rows import write_split

ARC = {
    "question": "Which one?",
    "choices": {"text": ["dry", "wet", "hot"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
ARC_PROMPT = (
    "Please choose the correct answer to the question: Which one?\n\n"
    "Answer1: dry Answer2: wet Answer3: hot\n\nAnswer format: answer1/answer2/answer3"
)
WINOGRANDE_PROMPT = (
    "Please choose the correct answer to fill in the blank to complete the given sentence: A met B so _ left.\n\n"
    "Option1: A Option2: B Answer format: option1/option2"
)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (ARC_PROMPT, ("answer1", "answer2", "answer3")),
        (WINOGRANDE_PROMPT, ("option1", "option2")),
        ("Is it?\n\nAnswer format: true/false", ("true", "false")),
        ("Which?\n\nAnswer format: solution1/solution2 ", ("solution1", "solution2")),
        ("Answer format: true/false is what I want.", ()),
        ("No options here", ()),
    ],
)
def test_the_options_are_read_from_the_instruction(prompt, options):
    assert options_of(prompt) == options


def test_each_option_gives_its_completion():
    texts = option_completions("the correct answer is answer1", "answer1", ("answer1", "answer2"))
    assert texts == ["the correct answer is answer1", "the correct answer is answer2"]
    assert option_completions("true is true", "true", ["false"]) == ["true is false"]
    with pytest.raises(DataError, match="does not contain"):
        option_completions("yes", "true", ["true"])


@pytest.mark.parametrize(
    ("task", "row", "prompt", "answer"),
    [
        ("arc_easy_instruct", ARC, ARC_PROMPT, "answer2"),
        (
            "winogrande_instruct",
            {"sentence": "A met B so _ left.", "option1": "A", "option2": "B", "answer": "2"},
            WINOGRANDE_PROMPT,
            "option2",
        ),
        (
            "openbookqa_instruct",
            {"question_stem": "Which one?", "choices": ARC["choices"], "answerKey": "2"},
            ARC_PROMPT,
            "answer2",
        ),
        (
            "boolq_instruct",
            {"question": "is ice cold", "passage": "Ice.", "label": 1},
            "Please answer the following question with true or false, question: is ice cold?\n\n"
            "Answer format: true/false",
            "true",
        ),
        (
            "piqa_instruct",
            {"goal": "Open it", "sol1": "Push.", "sol2": "Pull.", "label": 0},
            "Please choose the correct solution to the question: Open it\n\nSolution1: Push.\n\nSolution2: Pull.\n\n"
            "Answer format: solution1/solution2",
            "solution1",
        ),
        (
            "social_i_qa_instruct",
            {"context": "A fell.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"},
            "Please choose the correct answer to the question: A fell. Why?\n\nAnswer1: x Answer2: y Answer3: z\n\n"
            "Answer format: answer1/answer2/answer3",
            "answer3",
        ),
    ],
)
def test_the_published_templates(task, row, prompt, answer):
    made = QUESTIONS[task].instruction_row(row)
    assert made["prompt"] == prompt
    assert (made["completion"], made["answer"]) == (f"the correct answer is {answer}", answer)
    assert answer in made["options"]


@pytest.mark.parametrize(
    ("label", "answer"),
    [(1, "true"), (0, "false"), (True, "true"), (False, "false"), ("yes", "true"), ("no", "false"), ("0", "false")],
)
def test_labels_of_boolq_are_read_as_the_task_boolq_reads_them(label, answer):
    row = {"question": "is ice cold", "passage": "Ice.", "label": label}
    assert QUESTIONS["boolq_instruct"].instruction_row(row)["answer"] == answer


@pytest.mark.parametrize("label", [-1, 2, "maybe", "-1", 0.5, None, ""])
def test_a_label_that_boolq_does_not_have_is_no_answer(tmp_path, label):
    rows = [{"question": "is ice cold", "passage": "Ice.", "label": each} for each in (1, label)]
    write_split(tmp_path, "boolq", "train", rows)
    with pytest.raises(DataError, match=r"train\.jsonl\.gz, line 2: "):
        load(DataSpec(task="boolq_instruct", folder=str(tmp_path)), splits=["train"])


def test_from_the_hub_the_questions_become_instructions(monkeypatch, tmp_path):
    monkeypatch.setenv("MONTECLORA_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([ARC] * 3))
    data = load(DataSpec(task="arc_challenge_instruct"), splits=["test"])
    assert data.split("test")[0] == {
        "prompt": ARC_PROMPT,
        "completion": "the correct answer is answer2",
        "options": ["answer1", "answer2", "answer3"],
        "answer": "answer2",
    }


def test_the_mixture_is_its_parts_in_a_fixed_order(monkeypatch, tmp_path):
    for name in ("boolq", "arc_easy", "arc_challenge", "winogrande"):
        (tmp_path / f"{name}_instruct").mkdir()
        rows = (
            {
                "instruction": f"{name} {i}\n\nAnswer format: true/false",
                "input": "",
                "output": "the correct answer is true",
                "answer": "true",
            }
            for i in range(5)
        )
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}_instruct" / "train.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    spec = DataSpec(task="commonsense_instruct", folder=str(tmp_path), validation_fraction=0.0)
    first, second = load(spec).split("train"), load(spec).split("train")
    assert len(first) == 20
    assert first.to_list() == second.to_list()
    assert [row["prompt"].split()[0] for row in first][:5] != ["boolq"] * 5


@pytest.mark.parametrize("place", ["commonsense_15k.json", "commonsense_15k/commonsense_15k.json"])
def test_the_published_file_is_read_as_it_is(monkeypatch, tmp_path, place):
    row = {"input": "", "output": "the correct answer is ending2", "answer": "ending2"}
    row["instruction"] = "Please choose.\n\nEnding1: a Ending2: b\n\nAnswer format: ending1/ending2"
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(json.dumps([row] * 4))
    monkeypatch.setenv("MONTECLORA_DATA", str(tmp_path))
    data = load(DataSpec(task="commonsense_15k", validation_fraction=0))
    assert len(data.split("train")) == 4
    assert data.split("train")[0]["options"] == ["ending1", "ending2"]
    task = get_task("commonsense_15k")
    with pytest.raises(DataError, match="commonsense_15k is not available"):
        task.loader("validation", None)  # the file is that of the train split
    with pytest.raises(DataError, match=r"commonsense_170k is not available.*Put commonsense_170k\.json"):
        load(DataSpec(task="commonsense_170k"))


def test_a_folder_with_the_original_questions_is_enough(tmp_path):
    """Instructions are made out of them, as out of those on the hub."""
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "test.jsonl.gz").write_bytes(gzip.compress(json.dumps(ARC).encode()))
    assert (
        load(DataSpec(task="arc_easy_instruct", folder=str(tmp_path)), ["test"]).split("test")[0]["prompt"]
        == ARC_PROMPT
    )


@pytest.mark.parametrize("wrong", [{"answer": "maybe"}, {"instruction": None}])
def test_a_broken_row_is_named(tmp_path, wrong):
    (tmp_path / "boolq_instruct").mkdir()
    good = {"instruction": "Is it?\n\nAnswer format: true/false", "input": "", "output": "true", "answer": "true"}
    text = json.dumps(good) + "\n" + json.dumps(good | wrong) + "\n"
    (tmp_path / "boolq_instruct" / "test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(DataError, match=r"test\.jsonl\.gz, line 2: "):
        load(DataSpec(task="boolq_instruct", folder=str(tmp_path)), splits=["test"])
