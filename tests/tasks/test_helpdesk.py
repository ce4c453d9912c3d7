from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import combinations

import pytest

from monteclora.tasks import DataSpec, load
from monteclora.tasks.helpdesk import LABELS, ambiguous, out_of_scope


@pytest.fixture(scope="module")
def data():
    return load(DataSpec(task="helpdesk"))


@pytest.fixture(scope="module")
def messages(data):
    labelled = [text for rows in data.splits.values() for text in rows["text"]]
    return [*labelled, *out_of_scope(), *(message.text for message in ambiguous())]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower().replace("'", ""))


def trigrams(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + 3]) for i in range(len(found) - 2)}


def test_twelve_intents_with_their_counts(data):
    assert data.label_names == LABELS
    assert len(LABELS) == 12
    counts = {split: Counter(rows["label"]) for split, rows in data.splits.items()}
    assert set(counts["validation"].values()) == {15}
    assert set(counts["test"].values()) == {25}
    assert len(counts["train"]) == 12
    assert min(counts["train"].values()) >= 60


def test_messages_outside_and_between_the_intents():
    assert len(out_of_scope()) >= 150
    assert len(ambiguous()) >= 80
    for message in ambiguous():
        assert set(message.labels) <= set(LABELS), message.text
        assert message.labels[0] != message.labels[1], message.text


def test_no_two_messages_share_more_than_half_of_their_trigrams(messages):
    grams = [trigrams(text) for text in messages]
    holders = defaultdict(list)
    for number, found in enumerate(grams):
        for gram in found:
            holders[gram].append(number)
    shared = Counter(pair for numbers in holders.values() for pair in combinations(numbers, 2))
    alike = [
        (messages[first], messages[second])
        for (first, second), count in shared.items()
        if count > min(len(grams[first]), len(grams[second])) / 2
    ]
    assert alike == []


def test_no_message_occurs_twice(messages):
    assert len({" ".join(words(text)) for text in messages}) == len(messages)


def test_messages_are_plain_text(messages):
    for text in messages:
        assert text == " ".join(text.split()), text
        assert text.isprintable(), text
        assert not re.search(r"\\[nrtux\"]|&\w+;|https?://|\S+@\S+\.\w+|\d{7,}", text), text
        letters = {character for character in text if ord(character) > 127}
        assert all(character.isalpha() for character in letters), text


def test_messages_vary_in_length(messages):
    lengths = sorted(len(words(text)) for text in messages)
    assert lengths[len(lengths) // 6] <= 6
    assert lengths[-len(lengths) // 8] >= 30
