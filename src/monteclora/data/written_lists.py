"""Lists that are written as text, as tables of lists become csv."""

from __future__ import annotations

import ast
import json
import re
from contextlib import suppress
from typing import Any, cast

from monteclora.config import brief

__all__ = ["written_list"]

# numpy writes no commas; of texts that stand side by side Python makes one
_BESIDE = re.compile(r"""['"]\s+['"]|\[\s*-?[\d.]+(\s+-?[\d.]+)+\s*\]""")


def written_list(text: str) -> list[Any] | None:
    """The list that a text is, as json, pandas and Python write one; None where it is none.

    Raises:
        ValueError: it is one without commas, as numpy writes it.
    """
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    with suppress(ValueError, RecursionError):
        return cast(list[Any], json.loads(text))
    if _BESIDE.search(text):
        raise ValueError(f"has the list {brief(text)}, whose parts are not separated by commas")
    with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return cast(list[Any], ast.literal_eval(text))
    return None
