"""How far answers to one question agree: the sampling-based uncertainty of whole texts."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Agreement", "agreement", "normalised"]


@dataclass(frozen=True)
class Agreement:
    """The answer that most of several agree on.

    Attributes:
        answer: the first one of those that are equal once normalised; the first of all where there is a tie.
        share: of the answers that equal it, above 0 and at most 1.
    """

    answer: str
    share: float


def normalised(text: str) -> str:
    """Text without what makes no other answer: case, compatibility forms, spaces, punctuation around words.

    Signs inside a word stay: 3.5 is not 35.
    """
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(filter(None, map(_bare, words)))


def agreement(answers: Sequence[str]) -> Agreement:
    """Which answer most of ``answers``, at least one, agree on, by exact match of what :func:`normalised` gives."""
    forms = [normalised(answer) for answer in answers]
    form, count = Counter(forms).most_common(1)[0]  # of equal counts the one met first
    return Agreement(answers[forms.index(form)], count / len(answers))


def _bare(word: str) -> str:
    first, last = 0, len(word)
    while first < last and unicodedata.category(word[first]).startswith("P") and word[first] != "-":
        first += 1
    while last > first and unicodedata.category(word[last - 1]).startswith("P"):
        last -= 1
    return word[first:last]
