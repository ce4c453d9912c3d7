from __future__ import annotations

import pytest

from monteclora.data.labels import LabelSet, describe_labels, label_key, refuse_scores
from monteclora.errors import DataError


@pytest.mark.parametrize(
    ("value", "key"), [(" refund ", "refund"), (3, "3"), (-1, "-1"), (2.0, "2"), (True, "true"), ("07", "07")]
)
def test_a_label_becomes_text(value, key):
    assert label_key(value) == key


@pytest.mark.parametrize(
    "spellings",
    [
        (1, 1.0, "1", "1.0", " 1.00 "),
        (True, "true", "True", "TRUE"),
        ("caf\u00e9", "cafe\u0301"),
    ],
    ids=["numbers", "booleans", "accents"],
)
def test_one_label_in_the_spellings_of_several_kinds_of_file_is_one(spellings):
    assert len({label_key(value) for value in spellings}) == 1


@pytest.mark.parametrize("value", ["nan", "NaN", "N/A", "null", "#N/A", "<NA>", float("nan")])
def test_marks_of_a_missing_label_are_no_class(value):
    with pytest.raises(ValueError, match="has no label"):
        label_key(value)


@pytest.mark.parametrize("value", ["none", "NA", "No", "1.5.2", "-"])
def test_names_that_only_look_like_marks_are_classes(value):
    assert label_key(value) == value


@pytest.mark.parametrize("keys", [["0", "2.5", "3.75"], [str(i) for i in range(500)], ["1e-3", "2"]])
def test_scores_are_refused_by_name(keys):
    with pytest.raises(DataError, match=r"the labels of a\.csv look like scores .* Set data\.kind to regression"):
        refuse_scores(keys, "a.csv")


@pytest.mark.parametrize("keys", [["1", "2", "5"] * 9, [str(i) for i in range(1000)] * 4, ["2.5", "good"], []])
def test_numbers_that_are_classes_are_not(keys):
    refuse_scores(keys, "a.csv")


def test_the_label_table_tells_what_looks_like_a_mistake():
    names = ("GOOD", "Good", "bad", "rare")
    assert describe_labels(names, {"train": [0, 1, 2, 2, 2, 1, 0, 3], "validation": [2, 0, 1]}) == [
        "train: 4 labels: bad 3, GOOD 2, Good 2, rare 1",
        "validation: 3 labels: bad 1, GOOD 1, Good 1",
        "labels that differ in capitals or punctuation alone: GOOD, Good",
        "train: labels with a single row (1): rare",
        "validation: labels without a row (1): rare",
    ]


@pytest.mark.parametrize("value", [None, "", "  ", 0.5, float("nan"), ["a"], {"a": 1}])
def test_what_is_no_label(value):
    with pytest.raises(ValueError, match="label"):
        label_key(value)


def test_integers_keep_their_meaning():
    zero_based = LabelSet.from_labels(["10", "2", "0", "1", "2"])
    assert zero_based.names == ("0", "1", "2", "10")
    signed = LabelSet.from_labels(["1", "-1"])
    assert (signed.value_of("-1", ""), signed.value_of("1", "")) == (0, 1)
    with pytest.raises(DataError):
        signed.value_of("0", "")


def test_names_are_sorted_and_numbers_are_not_ids():
    labels = LabelSet.from_labels(["b", "a"])
    assert labels.names == ("a", "b")
    with pytest.raises(DataError, match=r"f\.csv, line 3: the label '0' is not among the 2 labels a, b"):
        labels.value_of("0", "f.csv, line 3")


def test_with_explicit_names_a_label_is_a_name_or_an_id():
    labels = LabelSet(["no", "yes"])
    assert [labels.value_of(key, "") for key in ("no", "yes", "0", "1")] == [0, 1, 0, 1]
    for key in ("2", "-1", "maybe"):
        with pytest.raises(DataError, match="not among"):
            labels.value_of(key, "")
    assert LabelSet(["1", "0"]).value_of("1", "") == 0, "a name comes before an id"
