from __future__ import annotations

import gzip
import json

import datasets
import pytest

from monteclora.data.sources import HubData, hub_splits, local_splits, open_split
from monteclora.errors import DataError, UnsafeCodeError
from monteclora.tasks import DataSpec, get_task, load


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MONTECLORA_DATA", str(tmp_path))
    return tmp_path


def put(folder, task, split, rows):
    path = folder / task / f"{split}.jsonl.gz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def pair(i, label):
    return {"sentence1": f"one {i}", "sentence2": f"two {i}", "label": label, "idx": i}


def hub_with(monkeypatch, answer):
    calls = []

    def load_dataset(name, config=None, split=None):
        calls.append((name, config, split))
        if isinstance(answer, Exception):
            raise answer
        return answer if split is None else answer[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_folder_given_goes_before_the_environment(folder, tmp_path_factory):
    put(folder, "mrpc", "train", [pair(0, 0), pair(1, 1)])
    other = tmp_path_factory.mktemp("other")
    put(other, "mrpc", "validation", [pair(0, 0)])
    assert local_splits("mrpc", None) == ("train",)
    assert local_splits("mrpc", other) == ("validation",)


def test_mrpc_from_a_folder(folder):
    put(folder, "mrpc", "train", [pair(0, 0), pair(1, 1)])
    put(folder, "mrpc", "validation", [pair(2, 1)])
    data = load(DataSpec(task="mrpc"))
    assert (data.kind, data.label_names) == ("classification", ("not_equivalent", "equivalent"))
    assert data.split("train").to_list() == [
        {"text": "one 0", "text_pair": "two 0", "label": 0},
        {"text": "one 1", "text_pair": "two 1", "label": 1},
    ]
    assert data.sources["validation"].origin.endswith("mrpc/validation.jsonl.gz")
    with pytest.raises(DataError, match="no test split; it has train, validation"):
        data.split("test")


def test_wic_marks_its_word_and_boolq_reads_the_question_first(folder):
    row = {"word": "board", "sentence1": "Room and board .", "sentence2": "He nailed boards .", "label": 0}
    put(folder, "wic", "train", [row, {**row, "label": 1}])
    put(folder, "boolq", "validation", [{"question": "is it", "passage": "It is.", "label": 1, "idx": 0}])
    wic = next(get_task("wic").loader("train", None).rows())[1]
    assert wic == {"text": "board: Room and board .", "text_pair": "He nailed boards .", "label": 0}
    boolq = next(get_task("boolq").loader("validation", None).rows())[1]
    assert (boolq["text"], boolq["text_pair"], boolq["label"]) == ("is it", "It is.", 1)


def test_a_label_out_of_range_and_the_file_of_another_task(folder):
    put(folder, "mrpc", "train", [pair(0, 0), pair(1, 2)])
    with pytest.raises(DataError, match=r"train\.jsonl\.gz, line 2: the label '2' is not among"):
        load(DataSpec(task="mrpc"))
    put(folder, "cola", "train", [{"text": "a", "label": 0}])
    with pytest.raises(DataError, match="line 1 has no column 'sentence'"):
        load(DataSpec(task="cola"))


def test_the_hub_is_asked_when_the_folder_has_nothing(folder, monkeypatch):
    split = datasets.Dataset.from_list([pair(0, 0), pair(1, 1)])
    calls = hub_with(monkeypatch, {"train": split, "validation": split, "test": split})
    data = load(DataSpec(task="mrpc"))
    assert calls == [("nyu-mll/glue", "mrpc", s) for s in ("train", "validation", "test")]
    assert data.sources["train"].origin == "nyu-mll/glue:mrpc (train)"


def test_neither_place_names_both_remedies(folder, monkeypatch):
    hub_with(monkeypatch, ConnectionError("Couldn't reach it"))
    with pytest.raises(DataError) as caught:
        load(DataSpec(task="rte"))
    assert "Set MONTECLORA_DATA to a folder with rte/train.jsonl.gz" in str(caught.value)
    assert "or run where the hub is reachable" in str(caught.value)


def test_a_data_set_that_is_a_program_is_refused(monkeypatch):
    hub_with(monkeypatch, RuntimeError("Dataset scripts are no longer supported, but found x.py"))
    with pytest.raises(UnsafeCodeError, match="is a program"):
        hub_splits("owner/name", None)


def test_a_split_under_another_name_on_the_hub(folder, monkeypatch):
    split = datasets.Dataset.from_list([pair(0, 0)])
    calls = hub_with(monkeypatch, {"validation": split})
    open_split("x", "test", None, HubData("owner/x", None, {"test": "validation"}))
    assert calls == [("owner/x", None, "validation")]


def test_a_hub_data_set_by_name(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    good = datasets.Dataset.from_dict({"text": ["a", "b"] * 20, "label": [0, 1] * 20}, features=features)
    hidden = datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
    hub_with(monkeypatch, {"train": good, "dev": good, "test": hidden})
    data = load(DataSpec(task="owner/reviews:small"))
    assert data.label_names == ("neg", "pos")
    assert list(data.splits) == ["train", "validation"]
    assert data.notes[0] == "test: left out, its labels are hidden"
    hub_with(monkeypatch, {"corpus": good})
    with pytest.raises(DataError, match="has the splits corpus and none of"):
        load(DataSpec(task="owner/reviews"))
