"""``--key value`` and ``--key=value`` for the keys of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

from monteclora.errors import ConfigError

__all__ = ["RECIPE_USAGE", "Overrides", "parse_overrides"]

RECIPE_USAGE = "RECIPE [--KEY VALUE ...] [--json]"
Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]


def parse_overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of dotted key and YAML text.

    Raises:
        ConfigError: a word that is no key, or a key without a value.
    """
    found = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"unexpected argument '{word}'", "Change values of the recipe with --key value.")
        key, equals, value = word[2:].partition("=")
        if not equals:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"--{key} has no value", f"Write --{key} VALUE, or --{key}= for an empty one.")
            value = following
        found.append((key, value))
    return found
