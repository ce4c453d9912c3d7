"""Texts as people send them in a hurry: what a model is calibrated on, and what it then meets, are not the same.

Each corruption has three strengths. What becomes of a text depends on the text, the corruption and the seed alone; a
stronger one changes whatever a weaker one does, and more.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING
from uuid import uuid4

from monteclora.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["CORRUPTIONS", "STRENGTHS", "corrupt", "corrupted_rows"]

STRENGTHS = (1, 2, 3)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _typos(text: str, share: float, generator: random.Random) -> str:
    """A share of the letters is doubled, left out, exchanged with the next one or replaced."""
    found: list[str] = []
    letters = list(text)
    for place, letter in enumerate(letters):
        chosen, kind, other = generator.random() < share, generator.randrange(4), generator.choice(_LETTERS)
        if not (letter.isalpha() and chosen):
            found.append(letter)
        elif kind == 0:
            found += [letter, letter]
        elif kind == 1:
            continue
        elif kind == 2 and place + 1 < len(letters):
            found.append(letters[place + 1])
            letters[place + 1] = letter
        else:
            found.append(other)
    return "".join(found) if "".join(found).strip() else text


def _dropped(text: str, share: float, generator: random.Random) -> str:
    """A share of the words is left out; one stays."""
    words = text.split()
    ranks = [generator.random() for _ in words]
    kept = [word for word, rank in zip(words, ranks, strict=True) if rank >= share]
    return " ".join(kept or [words[ranks.index(max(ranks))]])


def _cut(text: str, share: float, generator: random.Random) -> str:
    """The last share of the words is missing; one stays."""
    words = text.split()
    return " ".join(words[: max(1, round(len(words) * (1 - share)))])


def _upper(text: str, share: float, generator: random.Random) -> str:
    """A share of the words is in capitals."""
    return " ".join(word.upper() if generator.random() < share else word for word in text.split())


CORRUPTIONS: Mapping[str, tuple[Callable[[str, float, random.Random], str], tuple[float, float, float]]] = {
    "typos": (_typos, (0.03, 0.08, 0.2)),
    "words_dropped": (_dropped, (0.1, 0.25, 0.5)),
    "cut": (_cut, (0.25, 0.5, 0.75)),
    "upper_case": (_upper, (0.34, 0.67, 1.0)),
}
"""By name: the function, and the share of letters or words that it changes at each strength."""


def corrupt(text: str, name: str, strength: int, seed: int = 0) -> str:
    """A corrupted text; one without a word stays as it is.

    Args:
        text: any.
        name: of the corruption.
        strength: 1 to 3.
        seed: of what is chosen.

    Raises:
        ConfigError: there is no such corruption or strength.
    """
    if name not in CORRUPTIONS:
        raise ConfigError(f"there is no corruption {name!r}", f"Choose one of {', '.join(CORRUPTIONS)}.")
    if strength not in STRENGTHS:
        raise ConfigError(f"strength is {strength!r}, expected 1, 2 or 3", "Choose one.")
    if not text.split():
        return text
    change, shares = CORRUPTIONS[name]
    digest = hashlib.blake2b(f"{seed},{name},{text}".encode(), digest_size=8).digest()
    return change(text, shares[strength - 1], random.Random(int.from_bytes(digest, "little")))


def corrupted_rows(rows: Dataset, name: str, strength: int, seed: int = 0) -> Dataset:
    """The same rows with other texts; see :func:`corrupt`."""
    columns = [column for column in ("text", "text_pair") if column in rows.column_names]
    return rows.map(
        lambda row: {column: corrupt(row[column], name, strength, seed) for column in columns},
        load_from_cache_file=False,
        keep_in_memory=True,
        new_fingerprint=uuid4().hex,  # one that is given is not computed, and nothing is kept by it
    )
