"""Which tokens of a row that is too long are kept.

The answer may take half of the row whatever the prompt, and all that the prompt leaves; the prompt likewise. So a long
document gives way to the answer to it, and a long answer loses its end, never the question before it. The chat
template's own tokens and the system prompt stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["Kept", "Tokens", "Truncated", "Truncation", "prompt_excess", "truncate"]

Truncation = Literal["prompt_start", "prompt_end", "completion", "drop"]


@dataclass(frozen=True)
class Truncated:
    """How many texts were cut.

    Attributes:
        count: of them.
        of: so many.
        what: these are, in the plural.
        max_length: most tokens of one.
    """

    count: int
    of: int
    what: str
    max_length: int

    def __str__(self) -> str:
        return f"{self.count} of {self.of} {self.what} were truncated to {self.max_length} tokens"

    @property
    def notes(self) -> tuple[str, ...]:
        """That in words, for people; nothing where none was cut."""
        return (str(self),) if self.count else ()

    def __add__(self, other: Truncated) -> Truncated:
        """Of both, which were cut to the same length."""
        return replace(self, count=self.count + other.count, of=self.of + other.of)


@dataclass(frozen=True)
class Tokens:
    """A row in tokens, up to the last one that is learned.

    Attributes:
        ids: token ids.
        learned: whether each is learned.
        start: where the text of the prompt may be cut from: after the beginning-of-sequence token, the system prompt
            and the head of the template.
        end: where that text ends; after it are the tokens that ask for the last answer.
        answer: where the last learned turn begins.
    """

    ids: list[int]
    learned: list[bool]
    start: int
    end: int
    answer: int

    def without(self, first: int, count: int) -> Tokens:
        """The row without ``count`` tokens of the prompt's text from the number ``first`` on."""
        last = first + count
        return Tokens(
            ids=self.ids[:first] + self.ids[last:],
            learned=self.learned[:first] + self.learned[last:],
            start=self.start,
            end=self.end - count,
            answer=self.answer - count,
        )


@dataclass(frozen=True)
class Kept:
    """What is left of a row, and whether its prompt lost some of its text; no token where the row is left out."""

    ids: list[int]
    learned: list[bool]
    prompt_cut: bool = False


def truncate(row: Tokens, max_length: int, how: Truncation = "prompt_start") -> Kept:
    """At most ``max_length`` tokens of a row.

    Args:
        row: in tokens.
        max_length: most tokens.
        how: ``prompt_start`` cuts the prompt's text from its start, ``prompt_end`` from its end, ``completion`` only
            the end of the last answer; ``drop`` leaves out every row that is too long.

    Returns:
        the tokens; none where nothing of the prompt's text, or nothing of the answer, would be left.
    """
    excess = len(row.ids) - max_length
    if excess <= 0:
        return Kept(row.ids, row.learned)
    answer = len(row.ids) - row.answer
    cut = 0 if how in ("completion", "drop") else prompt_excess(row, max_length)
    if how == "drop" or answer - (excess - cut) < min(answer, 1):  # neither part has so much to give
        return Kept([], [])
    left = row.without(row.start if how == "prompt_start" else row.end - cut, cut)
    return Kept(left.ids[:max_length], left.learned[:max_length], cut > 0)


def prompt_excess(row: Tokens, max_length: int) -> int:
    """How many tokens the prompt's text has to lose; one token of it stays."""
    excess, text, answer = len(row.ids) - max_length, row.end - row.start, len(row.ids) - row.answer
    room = max(max_length - answer, max_length // 2) - (row.answer - text)
    return max(min(text - max(room, 1), excess), 0)
