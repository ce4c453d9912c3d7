from __future__ import annotations

import random
from collections import Counter

import datasets
import pytest

from monteclora.data.splitting import carve_validation, content_sha256, subset
from monteclora.errors import DataError


def rows(n=200, seed=None):
    data = [{"text": f"text {i}", "label": i % 4 // 3} for i in range(n)]
    if seed is not None:
        random.Random(seed).shuffle(data)
    return datasets.Dataset.from_list(data)


def test_every_label_gives_its_share_and_no_row_is_lost():
    train, validation = carve_validation(rows(), 0.1, 0, "x")
    assert Counter(validation["label"]) == {0: 15, 1: 5}
    assert sorted([*train["text"], *validation["text"]]) == sorted(rows()["text"])


def test_the_choice_depends_on_content_and_seed_only():
    _, first = carve_validation(rows(), 0.1, 0, "x")
    _, reordered = carve_validation(rows(seed=1), 0.1, 0, "x")
    _, other_seed = carve_validation(rows(), 0.1, 1, "x")
    assert set(first["text"]) == set(reordered["text"]) != set(other_seed["text"])


def test_equal_rows_stay_on_one_side_and_no_label_leaves_training():
    doubled = datasets.concatenate_datasets([rows(40), rows(40), rows(40)])
    train, validation = carve_validation(doubled, 0.3, 0, "x")
    assert not set(train["text"]) & set(validation["text"])
    tiny = datasets.Dataset.from_list([{"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": "c", "label": 1}])
    train, validation = carve_validation(tiny, 0.9, 0, "x")
    assert set(train["label"]) == {0, 1}


def test_too_few_rows_are_refused():
    with pytest.raises(DataError, match=r"f\.csv has 4 rows, too few"):
        carve_validation(rows(4), 0.1, 0, "f.csv")


def test_subsets_are_nested_and_keep_the_order():
    small, large = subset(rows(), 20, 0)["text"], subset(rows(), 50, 0)["text"]
    assert len(small) == 20
    assert set(small) < set(large)
    assert list(large) == [text for text in rows()["text"] if text in set(large)]
    assert set(subset(rows(), 20, 1)["text"]) != set(small)
    assert len(subset(rows(), None, 0)) == len(subset(rows(), 999, 0)) == 200


def test_the_checksum_tells_content_and_order():
    assert content_sha256(rows()) == content_sha256(rows())
    assert content_sha256(rows()) != content_sha256(rows(seed=1))
    assert content_sha256(rows()) != content_sha256(rows(199))
