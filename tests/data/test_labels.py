from __future__ import annotations

import pytest

from monteclora.data.labels import LabelSet, label_key
from monteclora.errors import DataError


@pytest.mark.parametrize(
    ("value", "key"), [(" refund ", "refund"), (3, "3"), (-1, "-1"), (2.0, "2"), (True, "true"), ("07", "07")]
)
def test_a_label_becomes_text(value, key):
    assert label_key(value) == key


@pytest.mark.parametrize("value", [None, "", "  ", 0.5, float("nan"), ["a"], {"a": 1}])
def test_what_is_no_label(value):
    with pytest.raises(ValueError, match="label"):
        label_key(value)


def test_integers_keep_their_meaning():
    zero_based = LabelSet.from_labels(["10", "2", "0", "1", "2"])
    assert zero_based.names == ("0", "1", "2", "10")
    signed = LabelSet.from_labels(["1", "-1"])
    assert (signed.id_of("-1", ""), signed.id_of("1", "")) == (0, 1)
    with pytest.raises(DataError):
        signed.id_of("0", "")


def test_names_are_sorted_and_numbers_are_not_ids():
    labels = LabelSet.from_labels(["b", "a"])
    assert labels.names == ("a", "b")
    with pytest.raises(DataError, match=r"f\.csv, line 3: the label '0' is not among the 2 labels a, b"):
        labels.id_of("0", "f.csv, line 3")


def test_with_explicit_names_a_label_is_a_name_or_an_id():
    labels = LabelSet(["no", "yes"])
    assert [labels.id_of(key, "") for key in ("no", "yes", "0", "1")] == [0, 1, 0, 1]
    for key in ("2", "-1", "maybe"):
        with pytest.raises(DataError, match="not among"):
            labels.id_of(key, "")
    assert LabelSet(["1", "0"]).id_of("1", "") == 0, "a name comes before an id"
