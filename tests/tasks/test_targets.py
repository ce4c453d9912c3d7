"""Scores, several labels and weights: what files may hold of them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monteclora.data.files import Table, open_table
from monteclora.errors import ConfigError, DataError
from monteclora.runs.recipe import load_recipe
from monteclora.tasks import DataSpec, Task, load, registry
from monteclora.tasks.weights import class_weights, label_weights

ROWS = ({"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []}, {"text": "c", "labels": ["z"]})
RECIPE = {"name": "x", "model": {"name": "m"}, "data": {"task": "x.csv"}, "method": {"name": "lora"}}
FLAGS = [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
WRITTEN_FLAGS = (
    {"text": "a", "labels": [1, 1.0, 0]},
    {"text": "b", "labels": "[0, 0, 0]"},
    {"text": "c", "labels": "[0,0,1]"},
)
MULTI_LABEL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a list": ("x.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS), {}),
    "bars": ("x.csv", "text,labels\na,x|y\nb,\nc,z\n", {}),
    "commas": ("x.csv", 'text,tags\na,"y, x"\nb,\nc,z\n', {}),
    "a separator of its own": ("x.csv", "text,labels\na,x/y\nb,\nc,z\n", {"label_separator": "/"}),
    "a 0 or 1 for each": (
        "x.jsonl",
        "".join(json.dumps(row) + "\n" for row in WRITTEN_FLAGS),
        {"label_names": ["x", "y", "z"]},
    ),
    "columns of 0 and 1": (
        "x.csv",
        "text,x,y,z\na,1,true,0\nb,0,0.0,False\nc,0,0,1.0\n",
        {"label_columns": ["x", "y", "z"], "kind": None},
    ),
}


def loaded(folder: Path, name: str, content: str, **options: Any) -> Any:
    (folder / name).write_text(content, encoding="utf-8")
    return load(DataSpec(train_file=str(folder / name), validation_fraction=0.0, **options))


@pytest.mark.parametrize("case", MULTI_LABEL)
def test_several_labels_of_a_row(tmp_path: Path, case: str) -> None:
    name, content, options = MULTI_LABEL[case]
    data = loaded(tmp_path, name, content, **{"kind": "multi_label", **options})
    assert (data.kind, data.label_names) == ("multi_label", ("x", "y", "z"))
    assert data.split("train").to_dict() == {"text": ["a", "b", "c"], "label": FLAGS}
    notes = " ".join(data.notes)
    assert "train: 3 labels: x 1, y 1, z 1" in notes
    assert "train: 1 rows without a label" in notes
    assert ("labels are separated by" in notes) == (case in ("bars", "commas"))


def test_scores_have_a_scale_and_are_told(tmp_path: Path) -> None:
    data = loaded(tmp_path, "x.csv", "text,rating\na,1\nb,2.5\nc,4e0\n", kind="regression")
    assert (data.kind, data.label_names) == ("regression", None)
    assert data.split("train")["label"][:] == [1.0, 2.5, 4.0]
    assert (data.scale.centre, data.scale.spread) == pytest.approx((2.5, np.std([1.0, 2.5, 4.0])))
    assert data.scale.standardised(data.split("train"))["label"][:] == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5])
    assert "scores from 1 to 4, mean 2.5, standard deviation 1.225, 3 different ones" in data.notes[0]


def test_the_kind_of_prompts_can_be_said_too(tmp_path: Path) -> None:
    content = '{"text": "a", "label": "b", "prompt": "p", "completion": "c"}\n'
    assert loaded(tmp_path, "x.jsonl", content, kind="causal_lm").kind == "causal_lm"


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no score": ("text,score\na,1\nb,\n", {"kind": "regression"}, "x.csv, line 3 has no score"),
    "a score that is a word": ("text,score\na,1\nb,good\n", {"kind": "regression"}, "line 3 has the score 'good'"),
    "a decimal comma": ("text;score\na;1,5\nb;2,5\n", {"kind": "regression"}, "'1,5', expected a decimal point"),
    "nan": ("text,score\na,1\nb,nan\n", {"kind": "regression"}, r"line 3 has no score \(nan\)"),
    "an infinite score": ("text,score\na,1\nb,-inf\n", {"kind": "regression"}, "line 3 has the score -inf"),
    "one score": ("text,score\na,1\nb,1\n", {"kind": "regression"}, "all training rows of x.csv have the score 1"),
    "no label at all": ("text,labels\na,\nb,\n", {"kind": "multi_label"}, "no training row of x.csv has a label"),
    "a missing label": ("text,labels\na,x\nb,n/a\n", {"kind": "multi_label"}, r"line 3 has no label \(n/a\)"),
    "a 0 or 1 for each of fewer labels": (
        'text,labels\na,"[0, 1, 0, 0]"\nb,"[0, 1, 0]"\n',
        {"kind": "multi_label", "label_names": ["x", "y", "z"]},
        r"line 2 has the labels \[0, 1, 0, 0\], a 0 or 1 for each label: expected names",
    ),
    "numbers of two labels, or a 0 or 1 for each": (
        'text,labels\na,"[0, 1]"\nb,"[1, 1]"\n',
        {"kind": "multi_label", "label_names": ["x", "y"]},
        r"line 3 has the labels \[1, 1\].*three or more",
    ),
    "a missing label among others": ("text,labels\na,x|n/a\nb,x\n", {"kind": "multi_label"}, "line 2 has no label"),
    "another label": (
        "text,labels\na,x|y\nb,w\n",
        {"kind": "multi_label", "label_names": ["x", "y"]},
        "line 3: the label 'w' is not among the 2 labels",
    ),
    "a flag of 2": ("text,x,y\na,1,0\nb,2,0\n", {"label_columns": ["x", "y"]}, "line 3 has '2' in the column 'x'"),
    "a column that is not there": ("text,x\na,1\n", {"label_columns": ["x", "y"]}, "has no column 'y'"),
    "wrong labels of scores": (
        "text,labels\na,x\nb,y\n",
        {"kind": "multi_label", "label_noise": 0.5},
        "neither labels nor answer options",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    content, options, message = REFUSED[case]
    with pytest.raises((DataError, ConfigError), match=message):
        loaded(tmp_path, "x.csv", content, **options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "regression", "label_names": ["a", "b"]}, "data.label_names is for labels, and kind is regression"),
        ({"kind": "regression", "class_weights": "balanced"}, "data.class_weights is for labels"),
        ({"kind": "causal_lm", "class_weights": "balanced"}, "data.class_weights is for texts with labels"),
        ({"kind": "regression", "prompt_column": "p"}, "data.prompt_column is for prompts with completions"),
        ({"kind": "classification", "label_columns": ["a", "b"]}, "data.label_columns is for several labels"),
        ({"label_separator": "|"}, "data.label_separator must be some text, with kind multi_label"),
        ({"label_columns": ["a"]}, "must name two or more different columns"),
        ({"label_columns": ["a", "b"], "label_names": ["c", "d"]}, "data.label_names differ from label_columns"),
        (
            {"label_columns": ["a", "b"], "kind": "multi_label", "label_separator": "|"},
            "label_separator and label_columns",
        ),
        ({"class_weights": {"a": float("inf")}}, "data.class_weights.a: expected a finite number, found inf"),
        ({"class_weights": {"a": 0}}, "data.class_weights must be finite numbers above 0"),
        ({"class_weights": "even"}, "class_weights: expected"),
    ],
)
def test_fields_that_do_not_go_together_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(
            {"name": "x", "model": {"name": "m"}, "data": {"task": "x.csv", **data}, "method": {"name": "lora"}}
        )


def test_a_metric_without_a_direction_chooses_no_step() -> None:
    with pytest.raises(ConfigError, match="best_metric is coverage_90, of which neither"):
        load_recipe({**RECIPE, "training": {"best_metric": "coverage_90"}})


def test_a_named_task_is_of_its_own_kind() -> None:
    with pytest.raises(ConfigError, match=r"data\.kind is regression, and helpdesk is a task of classification"):
        load(DataSpec(task="helpdesk", kind="regression"))


def test_weights_of_a_task_without_labels_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"prompt": "1 + 1", "completion": "2"}\n' * 4)
    with pytest.raises(ConfigError, match=r"data\.class_weights is given, and the rows have no labels"):
        load(DataSpec(train_file=str(file), class_weights="balanced"))


def test_labels_are_divided_as_the_training_rows_say_whatever_else_is_loaded(tmp_path: Path) -> None:
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("text,label\n" + "one,x;y\ntwo,z\nthree,x\n" * 4)
    test.write_text("text,label\nfour,x;y\nfive,z\n")
    spec = DataSpec(train_file=str(train), test_file=str(test), kind="multi_label", validation_fraction=0)
    alone = load(spec, ["train"]).label_names
    assert alone == load(spec, ["train", "test"]).label_names == ("x", "y", "z")
    test.write_text("text,label\nfour,x|y\n")  # of another kind than the training rows: refused by its own row
    with pytest.raises(DataError, match=r"test\.csv, line 2: the label 'x\|y' is not among"):
        load(spec, ["train", "test"])


def test_labels_of_a_task_with_a_name_are_divided_as_the_recipe_or_its_training_rows_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {"train": ["x", "y"], "test": ["x|y"]}

    def rows(split: str, folder: Path | None) -> Table:
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels[split]))
        return open_table(path)

    task = Task("tags", "multi_label", ("text",), ("x", "y"), ("train", "test"), "", rows)
    monkeypatch.setitem(registry._TASKS, "tags", task)
    spec = DataSpec(task="tags", kind="multi_label", validation_fraction=0)
    with pytest.raises(DataError, match=r"the label 'x\|y' is not among"):  # in training each text is one label
        load(spec, ["test"])
    labels["test"] = ["x/y"]
    data = load(replace(spec, label_separator="/"), ["test"])
    assert data.split("test")["label"][:] == [[1, 1]]
    labels["train"], labels["test"] = ["x", "x|y"], ["y", "x|y"]
    data = load(spec, ["test"])
    assert data.split("test")["label"][:] == [[0, 1], [1, 1]]
    assert list(data.splits) == ["test"]


def test_equal_scores_have_no_scale(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text("text,score\n" + "words,0.7\n" * 7)  # whose deviation is rounded to 1e-16
    with pytest.raises(DataError, match=r"have the score 0\.7"):
        load(DataSpec(train_file=str(file), kind="regression", label_column="score", validation_fraction=0))


def test_balanced_weights_are_the_inverse_of_frequency_and_have_a_mean_of_one() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [2])
    found = np.array(class_weights("balanced", ("a", "b", "c", "d"), labels))
    assert found[:3] * [6, 3, 1] == pytest.approx(np.full(3, 10 / 3))
    assert found[labels].mean() == pytest.approx(1.0)
    given = np.array(class_weights({"b": 4.0}, ("a", "b", "c"), labels))
    assert given / given[0] == pytest.approx([1.0, 4.0, 1.0])
    assert given[labels].mean() == pytest.approx(1.0)


def test_weights_of_labels_are_those_of_two_classes_each() -> None:
    labels = np.array([[1, 0], [0, 0], [0, 0], [0, 1]])
    assert np.array(label_weights("balanced", ("a", "b"), labels)) == pytest.approx(np.array([[2 / 3, 2]] * 2))
    low, high = label_weights({"b": 3.0}, ("a", "b"), labels)[1]
    assert (high / low, (3 * low + high) / 4) == pytest.approx((3.0, 1.0))


def test_a_weight_of_no_label_is_named() -> None:
    for function, labels in ((class_weights, [0, 1]), (label_weights, [[0, 1], [1, 0]])):
        with pytest.raises(ConfigError, match=r"data\.class_weights has 'spma', which is no label\. Did you mean spam"):
            function({"spma": 2.0}, ("ham", "spam"), labels)
