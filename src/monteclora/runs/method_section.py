"""The ``method`` section of a recipe before its fields are known: which method it is for, and how to read it as that.

A method's fields can have had other names in earlier versions.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping

from monteclora.config import Document, Node
from monteclora.errors import ConfigError
from monteclora.methods import get_method

__all__ = ["method_name", "with_current_names"]

logger = logging.getLogger(__name__)

_DEFAULT = "monteclora"
_SECTION = "method"

Overrides = list[tuple[str, str]]


def method_name(document: Document, overrides: Overrides) -> str:
    """The method that a recipe is for, which decides the section's fields.

    Raises:
        ConfigError: there is no such method.
    """
    named = [text.strip() for key, text in overrides if _plain(key) == f"{_SECTION}.name"]
    return named[-1] if named else _written_name(document)


def _written_name(document: Document) -> str:
    """The name in the document's own section."""
    name = _entries(document).get("name")
    if name is None or name.value is None:
        return _DEFAULT
    if not isinstance(name.value, str):
        raise ConfigError(f"{name.where}: there is no method like {name.describe()}", "See `monteclora list methods`.")
    try:
        return get_method(name.value).name
    except ConfigError as error:
        raise ConfigError(f"{name.where}: {error.message}", error.hint) from None


def with_current_names(
    document: Document, overrides: Iterable[tuple[str, str]], renamed: Mapping[str, str]
) -> tuple[Document, Overrides]:
    """The document and the overrides with the present names of the method's fields; each old name is logged.

    Args:
        document: a recipe.
        overrides: pairs of dotted key and YAML text.
        renamed: old name to present name.

    Raises:
        ConfigError: a field is given under both names.
    """
    current = {f"{_SECTION}.{old}": f"{_SECTION}.{new}" for old, new in renamed.items()}
    changed = [(current.get(_plain(key), key), text) for key, text in overrides]
    keys = {_plain(key) for key, _ in overrides}
    for old in keys & {*current}:
        if current[old] in keys:
            raise _given_twice(f"--{old}", old, current[old])
        logger.warning("--%s is read as --%s, its present name", old, current[old])
    entries = dict(_entries(document))
    for old, new in renamed.items():
        if old not in entries:
            continue
        node = entries.pop(old)
        if new in entries:
            raise _given_twice(node.where, f"{_SECTION}.{old}", f"{_SECTION}.{new}")
        logger.warning("%s: method.%s is read as method.%s, its present name", node.where, old, new)
        entries[new] = node
    return _with_entries(document, entries), changed


def _given_twice(where: str, old: str, new: str) -> ConfigError:
    return ConfigError(f"{where}: {old} and {new} are two names of one option, and both are given", f"Keep {new}.")


def _plain(key: str) -> str:
    return key.replace("-", "_")


def _entries(document: Document) -> dict[str, Node]:
    """The section's entries; none where it is missing or is no mapping, which reading it reports."""
    section = document.root.value.get(_SECTION)
    return section.value if section is not None and isinstance(section.value, dict) else {}


def _with_entries(document: Document, entries: dict[str, Node]) -> Document:
    if entries == _entries(document):
        return document
    section = document.root.value[_SECTION]
    root = Node({**document.root.value, _SECTION: Node(entries, section.where)}, document.root.where)
    return dataclasses.replace(document, root=root)
