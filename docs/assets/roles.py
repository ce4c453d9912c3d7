"""Cross references of docstrings, as Sphinx writes them, as code on the pages of the reference."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`([^`]+)`")


def _code(match: re.Match[str]) -> str:
    name = match[1]
    return f"`{name.rpartition('.')[2]}`" if name.startswith("~") else f"`{name}`"


class Roles(griffe.Extension):
    """Rewrites the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_code, obj.docstring.value)
