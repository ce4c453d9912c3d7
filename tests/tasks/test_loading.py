from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from monteclora.config import build
from monteclora.data.columns import Columns
from monteclora.errors import ConfigError, DataError
from monteclora.tasks import DataSpec, load, load_inputs

WORDS = ["refund", "login", "export"]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def messages(n=60):
    return [{"text": f"message number {i}", "label": WORDS[i % 3]} for i in range(n)]


def test_a_bare_path_is_enough(tmp_path):
    data = load(DataSpec(task=jsonl(tmp_path / "mail.jsonl", messages())))
    assert data.label_names == ("export", "login", "refund")
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 54, "validation": 6}
    assert data.notes[0].startswith("validation: 6 rows (10%, seed 0) set aside from")
    assert data.name == "mail.jsonl"
    assert len(data.sources["train"].sha256) == 64


def test_files_of_every_split_and_named_columns(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.csv").write_text("Body,Kind,extra\nhello,1,x\nbye,0,y\n")
    spec = DataSpec(
        train_file=str(tmp_path / "a.csv"),
        validation_file=str(tmp_path / "b.csv"),
        test_file=str(tmp_path / "c.csv"),
        text_columns=["Body"],
        label_column="Kind",
        label_names=["bad", "good"],
    )
    data = load(spec)
    assert list(data.splits) == ["train", "validation", "test"]
    assert data.split("test").to_list() == [{"text": "hello", "label": 1}, {"text": "bye", "label": 0}]
    assert data.label_names == ("bad", "good")
    assert list(load(spec, splits=["test"]).splits) == ["test"]


def test_row_limits_are_seeded_and_leave_validation_alone(tmp_path):
    path = jsonl(tmp_path / "mail.jsonl", messages(300))
    whole = load(DataSpec(task=path))
    small = load(DataSpec(task=path, train_rows=40, validation_rows=10))
    other = load(DataSpec(task=path, train_rows=40, seed=1))
    assert (len(small.split("train")), len(small.split("validation"))) == (40, 10)
    assert set(small.split("validation")["text"]) <= set(whole.split("validation")["text"])
    assert set(small.split("train")["text"]) != set(other.split("train")["text"])
    assert "validation" not in load(DataSpec(task=path, validation_fraction=0.0)).splits


def test_a_test_file_alone_needs_label_names(tmp_path):
    path = jsonl(tmp_path / "test.jsonl", messages(6))
    with pytest.raises(DataError, match=r"Set data\.label_names"):
        load(DataSpec(test_file=path))
    assert len(load(DataSpec(test_file=path, label_names=WORDS)).split("test")) == 6


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([{"text": "a", "label": "x"}, {"text": " ", "label": "y"}], "line 2 has no text in the column 'text'"),
        ([{"text": "a", "label": "x"}, {"text": None, "label": "y"}], "line 2 has no text in the column 'text'"),
        ([{"text": "a", "label": "x"}, {"label": "y"}], "line 2 has no text in the column 'text'"),
        ([{"text": "a", "label": "x"}, {"text": 5, "label": "y"}], "line 2: expected text"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], "line 2 has no label"),
        ([{"text": "a", "label": "x"}, {"text": "b"}], "line 2 has no label"),
        ([{"text": "a", "label": 0.5}], "line 1 has the label 0.5: labels are names or whole numbers"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], "have the label x"),
        ([{"prompt": "a", "completion": ""}], "line 1 has no text in the column 'completion'"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "line 1: the last message is not the assistant's"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "line 1: the first message is the assistant's"),
        ([{"messages": [{"role": "bot", "content": "a"}]}], "line 1: the role 'bot'"),
        ([{"messages": "hello"}], "line 1: messages is not a list"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, rows, part):
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load(DataSpec(task=path))
    assert part in str(caught.value)


def test_half_a_character_is_refused_before_a_tokenizer_meets_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800", "label": "x"}\n')
    with pytest.raises(DataError, match="half a character"):
        load(DataSpec(task=str(tmp_path / "a.jsonl")))


def test_a_label_that_training_never_shows_is_refused(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", messages())
    other = jsonl(tmp_path / "dev.jsonl", [{"text": "a", "label": "login"}, {"text": "b", "label": "Refund"}])
    with pytest.raises(DataError, match=r"dev\.jsonl, line 2: the label 'Refund' is not among the 3 labels"):
        load(DataSpec(train_file=train, validation_file=other))


@pytest.mark.parametrize("label", [-1, 2])
def test_an_integer_outside_an_explicit_list_is_refused(tmp_path, label):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": label}])
    with pytest.raises(DataError, match=f"line 2: the label '{label}' is not among"):
        load(DataSpec(task=path, label_names=["no", "yes"]))


def test_files_of_different_shape_are_refused(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", messages())
    other = jsonl(tmp_path / "dev.jsonl", [{"body": "a", "label": "login"}])
    with pytest.raises(DataError, match=r"dev\.jsonl has no column 'text'; it has body, label"):
        load(DataSpec(train_file=train, validation_file=other))


def test_instructions_and_conversations(tmp_path):
    rows = [{"instruction": f"Say {i}", "input": "" if i % 2 else "loud", "output": str(i)} for i in range(20)]
    data = load(DataSpec(task=jsonl(tmp_path / "a.jsonl", rows)))
    assert (data.kind, data.label_names) == ("causal_lm", None)
    assert {"prompt": "Say 2\n\nloud", "completion": "2"} in data.split("train").to_list()
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    chat = load(DataSpec(task=jsonl(tmp_path / "b.jsonl", [{"messages": turns}] * 3), validation_fraction=0.0))
    assert chat.split("train")[0]["messages"] == turns


def test_rows_to_be_predicted_have_no_label(tmp_path):
    path = jsonl(tmp_path / "new.jsonl", messages(3))
    assert load_inputs(path, DataSpec(task="helpdesk"), "classification")[0].column_names == ["text"]
    with pytest.raises(DataError, match=r"Set data\.text_columns"):
        load_inputs(jsonl(tmp_path / "x.jsonl", [{"body": "a"}]), DataSpec(task="helpdesk"), "classification")


def test_chats_to_be_answered_may_end_with_the_user(tmp_path):
    trained = Columns("causal_lm", ("messages",), None, conversation=True)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = jsonl(tmp_path / "new.jsonl", [{"messages": turns}, {"messages": turns[:1]}])
    rows, _ = load_inputs(path, DataSpec(task="a.jsonl"), "causal_lm", trained)
    assert rows["messages"][:] == [turns, turns[:1]]


def test_single_texts_are_no_pairs_of_a_task(tmp_path):
    path = jsonl(tmp_path / "new.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="has the texts text, and mrpc reads sentence1, sentence2"):
        load_inputs(path, DataSpec(task="mrpc"), "classification")


@pytest.mark.parametrize("task", ["nowhere.csv", "data/nowhere.json", "mprc"])
def test_a_task_that_is_nothing(task):
    with pytest.raises((ConfigError, DataError)) as caught:
        load(DataSpec(task=task))
    assert caught.value.hint


def test_a_wrong_section_is_told_field_by_field():
    wrong = {
        "max_length": 1,
        "train_rows": 0,
        "validation_fraction": 1.0,
        "label_names": ["a"],
        "text_columns": ["a"] * 3,
    }
    with pytest.raises(ConfigError) as caught:
        build(DataSpec, wrong)
    for name in ("task", *wrong):
        assert f"recipe: {name} " in caught.value.message


def test_the_train_split_alone_is_what_training_had(tmp_path):
    spec = DataSpec(task=jsonl(tmp_path / "mail.jsonl", messages()))
    whole, alone = load(spec), load(spec, splits=["train"])
    assert list(alone.splits) == ["train"]
    assert alone.sources["train"].sha256 == whole.sources["train"].sha256
    assert alone.sources["train"].rows == 54


def test_what_was_found_out_about_a_file_is_told(tmp_path):
    (tmp_path / "a.csv").write_text("text;label\none;a\ntwo;b\n")
    notes = load(DataSpec(task=str(tmp_path / "a.csv"), validation_fraction=0.0)).notes
    assert notes[0] == f"{tmp_path / 'a.csv'}: fields are separated by semicolons"
    assert notes[1:] == ("train: 2 labels: a 1, b 1", "train: labels with a single row (2): a, b")


def test_a_validation_file_of_hidden_labels_leaves_validation_to_be_carved(tmp_path):
    hidden = jsonl(tmp_path / "dev.jsonl", [{"text": "a", "label": -1}, {"text": "b", "label": -1}])
    data = load(DataSpec(train_file=jsonl(tmp_path / "mail.jsonl", messages()), validation_file=hidden))
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 54, "validation": 6}


ONE = {"text": "one", "label": "good"}
TAGS = {"text": "one", "tags": "a;b"}
ASKED = {"instruction": "q", "output": "a"}


@pytest.mark.parametrize(
    ("kind", "trained", "other", "part"),
    [
        # a label that was no id in training is none in another file
        (None, [ONE, {**ONE, "label": "bad"}], [{**ONE, "label": "1"}], "the label '1' is not among"),
        (None, [{**ONE, "label": 3}, {**ONE, "label": 5}], [{**ONE, "label": 0}], "the label '0' is not among"),
        # what parted labels in training parts them in another file, and nothing else does
        ("multi_label", [TAGS, TAGS], [{**TAGS, "tags": "a|b"}], "the label 'a|b' is not among"),
        ("multi_label", [{**TAGS, "tags": t} for t in "ab"], [{**TAGS, "tags": "a,b"}], "the label 'a,b' is not among"),
        (None, [ASKED], [{"prompt": "q", "completion": "a"}], "no column 'instruction', which the run was trained on"),
        (None, [ASKED], [{"instruction": "q", "response": "a"}], "no column 'output', which the run was trained on"),
        (None, [{"text": "Once."}], [{"body": "Once."}], "no column 'text', which the run was trained on"),
    ],
)
def test_another_file_is_not_read_by_another_guess(tmp_path, kind, trained, other, part):
    data = load(DataSpec(task=jsonl(tmp_path / "a.jsonl", trained), kind=kind, validation_fraction=0))
    spec = DataSpec(test_file=jsonl(tmp_path / "b.jsonl", other), label_names=list(data.label_names or ()))
    with pytest.raises(DataError, match=re.escape(part)):
        load(spec, ["test"], data.columns)
    own = replace(spec, test_file=jsonl(tmp_path / "c.jsonl", trained))
    same = load(own, ["test"], data.columns)
    assert same.split("test").to_list() == data.split("train").to_list()


def test_another_file_has_its_own_form_which_is_said(tmp_path):
    rows = jsonl(tmp_path / "a.jsonl", [TAGS, {**TAGS, "tags": ""}])
    data = load(DataSpec(task=rows, kind="multi_label", validation_fraction=0))
    (tmp_path / "b.csv").write_bytes("Tags\tText\na ; b\t\u00e9t\u00e9\n\tnone\n".encode("cp1252"))
    spec = DataSpec(test_file=str(tmp_path / "b.csv"), label_names=["a", "b"])
    test = load(spec, ["test"], data.columns)
    assert test.split("test").to_list() == [
        {"text": "\u00e9t\u00e9", "label": [1, 1]},
        {"text": "none", "label": [0, 0]},
    ]
    note = f"{tmp_path / 'b.csv'}: fields are separated by tabs, the encoding is cp1252"
    assert test.file_notes == {"test": (note,)}
    assert load_inputs(tmp_path / "b.csv", spec, "multi_label", data.columns)[1] == (note,)


def test_runs_that_did_not_write_down_how_labels_are_parted(tmp_path):
    columns = replace(Columns("multi_label", ("text",), "tags"), separator=None)
    spec = DataSpec(test_file=jsonl(tmp_path / "a.jsonl", [TAGS]), label_names=["a", "b"])
    assert load(spec, ["test"], columns).split("test")["label"][:] == [[1, 1]]


@pytest.mark.parametrize("written", ["a|b, c", "b, c;a"])
def test_lists_do_not_say_how_other_files_part_labels_in_a_text(tmp_path, written):
    """Nor does a comma divide where it is part of a label."""
    rows = [{**TAGS, "tags": ["a", "b, c"]}, {**TAGS, "tags": []}, {**TAGS, "tags": ["d"]}]
    train = jsonl(tmp_path / "a.jsonl", rows)
    other = jsonl(tmp_path / "b.jsonl", [{**TAGS, "tags": written}, {**TAGS, "tags": "b, c"}])
    data = load(DataSpec(task=train, kind="multi_label", validation_fraction=0))
    assert data.columns.separator is None
    spec = DataSpec(test_file=other, label_names=["a", "b, c", "d"])
    assert load(spec, ["test"], data.columns).split("test")["label"][:] == [[1, 1, 0], [0, 1, 0]]
    both = DataSpec(train_file=train, validation_file=other, kind="multi_label")
    assert load(both).split("validation")["label"][:] == [[1, 1, 0], [0, 1, 0]]


def test_what_is_not_read_of_another_file_is_said_and_no_recipe_is_mentioned(tmp_path):
    data = load(DataSpec(task=jsonl(tmp_path / "a.jsonl", [ASKED]), validation_fraction=0))
    path = jsonl(tmp_path / "b.jsonl", [{**ASKED, "input": "i", "id": 1}])
    note = "columns that are not used: input, id"
    assert load(DataSpec(test_file=path), ["test"], data.columns).file_notes == {"test": (note,)}
    assert load_inputs(path, DataSpec(task=path), "causal_lm", data.columns)[1] == (note,)
    bad = jsonl(tmp_path / "c.jsonl", [{"instruction": "", "output": "a"}])
    for attempt in (
        lambda: load(DataSpec(test_file=bad), ["test"], data.columns),
        lambda: load_inputs(bad, DataSpec(task=bad), "causal_lm", data.columns),
    ):
        with pytest.raises(DataError, match="line 1 has no text in the column 'instruction'") as caught:
            attempt()
        assert "on_bad_row" not in str(caught.value)


def test_a_file_of_hidden_labels_has_nothing_to_measure(tmp_path):
    data = load(DataSpec(task=jsonl(tmp_path / "a.jsonl", messages(12)), validation_fraction=0))
    spec = DataSpec(test_file=jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": -1}]), label_names=WORDS)
    with pytest.raises(DataError, match=r"all labels of b\.jsonl are -1, the mark of hidden labels"):
        load(spec, ["test"], data.columns)
