from __future__ import annotations

import pytest

from monteclora.data.columns import Columns, columns_as_trained, find_columns
from monteclora.data.files import Table
from monteclora.errors import DataError


def table(*columns):
    return Table("a.csv", columns, lambda: iter(()))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("id", "text", "label"), Columns("classification", ("text",), "label")),
        (("Message", "Intent"), Columns("classification", ("Message",), "Intent")),
        (("idx", "sentence1", "sentence2", "label"), Columns("classification", ("sentence1", "sentence2"), "label")),
        (("premise", "hypothesis", "class"), Columns("classification", ("premise", "hypothesis"), "class")),
        (("question", "passage", "target"), Columns("classification", ("question", "passage"), "target")),
        (("prompt", "completion"), Columns("causal_lm", ("prompt",), "completion")),
        (("instruction", "output"), Columns("causal_lm", ("instruction",), "output")),
        (("instruction", "input", "output"), Columns("causal_lm", ("instruction", "input"), "output")),
        (("messages", "id"), Columns("causal_lm", ("messages",), None, conversation=True)),
        (("Messages", "tools"), Columns("causal_lm", ("Messages",), None, conversation=True, tools="tools")),
        (("conversations",), Columns("causal_lm", ("conversations",), None, conversation=True)),
        (
            ("instruction", "input", "output", "system", "history"),
            Columns("causal_lm", ("instruction", "input"), "output", system="system", history="history"),
        ),
        (("instruction", "context", "response"), Columns("causal_lm", ("instruction", "context"), "response")),
        (("question", "answer"), Columns("causal_lm", ("question",), "answer")),
    ],
)
def test_usual_names_are_recognised(names, expected):
    assert find_columns(table(*names)) == expected


def test_named_columns_go_before_recognised_ones():
    both = table("text", "label", "body", "kind", "prompt", "completion")
    assert find_columns(both, ["body"], "kind") == Columns("classification", ("body",), "kind")
    assert find_columns(both, ["body"]) == Columns("classification", ("body",), "label")
    assert find_columns(both, prompt_column="body") == Columns("causal_lm", ("body",), "completion")
    assert find_columns(both, kind="causal_lm") == Columns("causal_lm", ("prompt",), "completion")


def test_rows_to_be_predicted_need_no_target():
    assert find_columns(table("text"), with_target=False) == Columns("classification", ("text",), None)
    assert find_columns(table("prompt"), kind="causal_lm", with_target=False).text == ("prompt",)


@pytest.mark.parametrize(
    ("names", "options", "part"),
    [
        (("texts", "y"), {}, "it has texts, y. Set data.text_columns and data.label_column"),
        (("text", "y"), {"text_columns": ["text"]}, "Set data.label_column"),
        (("body", "label"), {"label_column": "label"}, "Set data.text_columns"),
        (("text", "label"), {"label_column": "lable"}, "no column 'lable'; it has text, label. Set data.label_column"),
        (("a", "b"), {"prompt_column": "a"}, "Set data.completion_column"),
        (("text", "label"), {"kind": "causal_lm"}, "data.prompt_column"),
    ],
)
def test_a_missing_column_names_those_there_are_and_the_option(names, options, part):
    with pytest.raises(DataError) as caught:
        find_columns(table(*names), **options)
    assert part in str(caught.value)


PAIRS = Columns("classification", ("sentence1", "sentence2"), "label")
ALPACA = Columns("causal_lm", ("instruction", "input"), "output", system="system")


@pytest.mark.parametrize(
    ("trained", "names", "expected"),
    [
        (PAIRS, ("Sentence1", "sentence2", "x"), Columns("classification", ("Sentence1", "sentence2"), None)),
        (ALPACA, ("instruction", "output"), Columns("causal_lm", ("instruction",), None)),
        (
            ALPACA,
            ("system", "input", "instruction"),
            Columns("causal_lm", ("instruction", "input"), None, system="system"),
        ),
    ],
)
def test_rows_to_be_predicted_have_the_columns_of_the_training_data(trained, names, expected):
    assert columns_as_trained(table(*names), trained) == expected


@pytest.mark.parametrize(
    ("trained", "names", "part"),
    [
        (PAIRS, ("text",), "no column 'sentence1', which the run was trained on; it has text"),
        (PAIRS, ("sentence1", "text"), "no column 'sentence2'"),
        (Columns("classification", ("text",), "label"), ("sentence1", "sentence2"), "no column 'text'"),
        (ALPACA, ("prompt",), "no column 'instruction'"),
        (Columns("causal_lm", (), "text"), ("text",), "trained on texts without prompts"),
    ],
)
def test_rows_without_the_columns_of_the_training_data_are_refused(trained, names, part):
    with pytest.raises(DataError, match=part):
        columns_as_trained(table(*names), trained)
