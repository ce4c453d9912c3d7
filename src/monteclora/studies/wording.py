"""Keys and conditions of a study in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["condition_in_words", "key_in_words", "values_in_words"]


def key_in_words(key: str) -> str:
    """``data.label_noise`` as label noise."""
    return key.rpartition(".")[2].replace("_", " ")


def values_in_words(values: Mapping[str, Any]) -> str:
    """Values with their keys, as in "label noise 0.2, train rows 100"; empty where there are none."""
    return ", ".join(f"{key_in_words(key)} {value}" for key, value in values.items())


def condition_in_words(condition: Mapping[str, Any]) -> str:
    """A condition by its values; the one of a study without conditions is "all"."""
    return values_in_words(condition) or "all"
