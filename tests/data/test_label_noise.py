from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from monteclora.data.label_noise import with_label_noise
from monteclora.errors import ConfigError, DataError
from monteclora.tasks import DataSpec, load


def rows(count: int = 300) -> Dataset:
    return Dataset.from_dict({"text": [f"text {i}" for i in range(count)], "label": [i % 3 for i in range(count)]})


def noisy(found: Dataset) -> dict[str, int]:
    return {row["text"]: row["label"] for row in found}


def test_so_many_labels_are_wrong_and_their_order_does_not_matter() -> None:
    before = noisy(rows())
    found, count = with_label_noise(rows(), 0.2, 0, 3)
    wrong = {text for text, label in noisy(found).items() if label != before[text]}
    assert count == len(wrong) == 60
    assert set(noisy(found).values()) == {0, 1, 2}
    assert noisy(with_label_noise(rows().shuffle(1), 0.2, 0, 3)[0]) == noisy(found)
    assert noisy(with_label_noise(rows(), 0.2, 1, 3)[0]) != noisy(found)
    more = noisy(with_label_noise(rows(), 0.4, 0, 3)[0])
    assert all(more[text] == noisy(found)[text] for text in wrong)


def test_wrong_labels_are_drawn_evenly_from_the_others() -> None:
    found, _ = with_label_noise(rows(3000), 1.0, 0, 3)
    shifts = [(row["label"] - int(row["text"].split()[1])) % 3 for row in found]
    assert set(shifts) == {1, 2}
    assert shifts.count(1) == pytest.approx(1500, abs=4 * 27.4)  # four standard deviations


def test_a_wrong_answer_is_another_option() -> None:
    row = {"prompt": "p", "completion": "the answer is b.", "options": ["a", "b", "c"], "answer": "b"}
    (found,) = with_label_noise(Dataset.from_list([row]), 1.0, 0, None)[0]
    assert found["answer"] in ("a", "c")
    assert found["completion"] == f"the answer is {found['answer']}."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "B is right", "options": ["a", "b"]}, "does not contain it"),
        ({"completion": "it is b", "options": ["b", "b"]}, "there is no other option"),
    ],
)
def test_an_answer_that_cannot_be_replaced_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"row 0 cannot have a wrong answer in place of 'b': .*{message}"):
        with_label_noise(Dataset.from_list([{"prompt": "p", "answer": "b", **row}]), 1.0, 0, None)


def test_texts_without_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match="neither labels nor answer options"):
        with_label_noise(Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}), 0.2, 0, None)


def test_only_training_rows_of_a_task_are_changed_and_it_is_said() -> None:
    clean, found = (load(DataSpec(task="helpdesk", label_noise=noise, train_fraction=0.5)) for noise in (0.0, 0.2))
    assert clean.sources["train"].sha256 != found.sources["train"].sha256
    for split in ("validation", "test"):
        assert clean.sources[split].sha256 == found.sources[split].sha256
    count = round(0.2 * found.sources["train"].rows)
    assert f"train: {count} of {found.sources['train'].rows} rows have a wrong label (seed 0)" in found.notes
    assert not any("wrong label" in note for note in clean.notes)
