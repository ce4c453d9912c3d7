import datasets
import pytest

from monteclora.errors import ConfigError, DataError
from monteclora.tasks import DataSpec, load
from monteclora.tasks.multiple_choice import CHOICES
from tests.tasks.rows import ARC, OPENBOOKQA, PIQA, SIQA, WINOGRANDE, write_split


@pytest.mark.parametrize(
    ("task", "row", "prompt", "options", "answer"),
    [
        ("piqa", PIQA, "Question: Open a door\nAnswer:", ["Push the wall.", "Turn the handle."], "Turn the handle."),
        ("social_i_qa", SIQA, "Question: Ann fell. Why?\nAnswer:", ["ice", "sun"], "ice"),
        (
            "winogrande",
            WINOGRANDE,
            "Complete the sentence: The cup missed the box because",
            ["cup was small.", "box was small."],
            "box was small.",
        ),
        ("arc_easy", ARC, "Question: Which one is wet?\nAnswer:", ["sand", "rain", "fire"], "rain"),
        ("openbookqa", OPENBOOKQA, "Ice melts when it is", ["cold", "warm"], "warm"),
    ],
)
def test_a_row_of_the_hub_becomes_a_question_with_options(monkeypatch, tmp_path, task, row, prompt, options, answer):
    monkeypatch.setenv("MONTECLORA_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([row] * 3))
    data = load(DataSpec(task=task), splits=["validation"])
    assert data.split("validation")[0] == {
        "prompt": prompt, "completion": answer, "options": options, "answer": answer
    }  # fmt: skip


def test_labels_and_sentences_that_do_not_fit_are_refused():
    for task, row in (
        ("piqa", PIQA | {"label": -1}),
        ("social_i_qa", SIQA | {"label": "4"}),
        ("winogrande", WINOGRANDE | {"sentence": "no blank"}),
        ("arc_easy", ARC | {"answerKey": "D"}),
    ):
        with pytest.raises(ValueError):
            CHOICES[task].row(row)


def test_a_subset_is_a_smaller_training_split(monkeypatch, tmp_path):
    write_split(tmp_path, "winogrande", "train", [WINOGRANDE] * 9)
    write_split(tmp_path, "winogrande", "train_xs", [WINOGRANDE] * 4)
    write_split(tmp_path, "winogrande", "validation", [WINOGRANDE] * 2)
    for task in ("winogrande", "winogrande_instruct"):
        for subset, rows in ((None, 9), ("xs", 4)):
            spec = DataSpec(task=task, folder=str(tmp_path), subset=subset, validation_fraction=0)
            assert len(load(spec, splits=["train"]).split("train")) == rows
    asked = []

    def hub(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([WINOGRANDE] * 5)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    load(DataSpec(task="winogrande", folder=str(tmp_path), subset="s", validation_fraction=0), splits=["train"])
    assert asked == [("allenai/winogrande", "winogrande_s", "train")]


def test_a_subset_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="subset is tiny, and winogrande has no such subset: it has xs, s, m, l, xl"):
        load(DataSpec(task="winogrande", folder=str(tmp_path), subset="tiny"))
    with pytest.raises(ConfigError, match="arc_easy has no such subset: it has none"):
        load(DataSpec(task="arc_easy", folder=str(tmp_path), subset="s"))
    assert DataSpec(task="rows.csv", subset="s").problems()[0][0] == "subset"


@pytest.mark.parametrize(
    ("task", "split", "remedy"), [("humaneval", "train", "Train on magicoder"), ("gsm8k", "train", None)]
)
def test_a_task_says_which_splits_it_has(tmp_path, task, split, remedy):
    write_split(tmp_path, task, "test", [{"question": "?", "answer": "#### 1", "prompt": "p"}])
    if remedy is None:
        with pytest.raises(DataError, match=rf"the {split} split of {task} is not available"):
            load(DataSpec(task=task, folder=str(tmp_path)), splits=[split])
        return
    with pytest.raises(DataError, match=rf"{task} has no {split} split; it has test. {remedy}"):
        load(DataSpec(task=task, folder=str(tmp_path)), splits=[split])
