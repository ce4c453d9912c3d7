"""Nodes to an instance of a dataclass schema, strictly, and back to YAML."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

import yaml

from monteclora.config.document import Document, Dumper, Node, brief, from_python, nearest, override
from monteclora.errors import ConfigError

__all__ = ["build", "default_of", "dump"]

Schema = TypeVar("Schema")

_MOST_TOLD = 50  # problems of one document
_LARGEST_INTEGER = 10**300  # as in YAML: no longer than float() takes
_LARGEST_FLOAT = sys.float_info.max
_HALF = re.compile("[\ud800-\udfff]")  # of a character: no UTF-8 file holds it


def build(
    schema: type[Schema],
    document: Document | Mapping[str, Any],
    overrides: Iterable[tuple[str, str]] = (),
) -> Schema:
    """Turn a document into an instance of ``schema``.

    Args:
        schema: a dataclass type, see :mod:`monteclora.config`.
        document: from :func:`load_yaml` or :func:`parse_yaml`, or a plain mapping.
        overrides: pairs of dotted key and YAML text, as in ``("training.learning_rate", "1e-4")``; dashes in
            keys count as underscores, and the last one of a key wins.

    Raises:
        ConfigError: with every problem of the document, the overrides and the ``problems`` hooks.
    """
    if not isinstance(document, Document):
        document = Document(from_python(document, "recipe"), "recipe")
    problems = list(document.problems)
    root = document.root
    for key, text in overrides:
        root = override(root, key.replace("-", "_").split("."), text, problems)
    result = _Builder(problems, tuple(_paths(schema))).mapping_to(schema, root, "")
    if problems:
        where = "Correct this entry" if len(problems) == 1 else f"Correct these {len(problems)} entries"
        more = [f"and {len(problems) - _MOST_TOLD} more"] if len(problems) > _MOST_TOLD else []
        raise ConfigError("; ".join(problems[:_MOST_TOLD] + more), f"{where} and run again.")
    return typing.cast(Schema, result)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a schema's field; ``dataclasses.MISSING`` where there is none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def dump(instance: Any) -> str:
    """Write a schema instance as YAML that :func:`build` reads back to an equal instance."""
    return yaml.dump(_to_python(instance), Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def _to_python(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _to_python(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {key: _to_python(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_python(item) for item in value]
    return value


class _Builder:
    """Converts nodes to the annotated types, appending every problem to one list."""

    def __init__(self, problems: list[str], known_paths: tuple[str, ...]) -> None:
        self.problems = problems
        self.known_paths = known_paths

    def mapping_to(self, schema: type, node: Node, path: str) -> Any:
        """An instance of the dataclass ``schema``, or None when a problem was found."""
        entries = {} if node.value is None else node.value  # a section whose every line is a comment
        if not isinstance(entries, dict):
            return self.refuse(node, path, "a mapping")
        found_before = len(self.problems)
        hints = typing.get_type_hints(schema)
        fields = {field.name: field for field in dataclasses.fields(schema) if field.init}
        values: dict[str, Any] = {}
        for name, child in entries.items():
            if name in fields:
                values[name] = self.to(hints[name], child, _join(path, name))
            else:
                self.problems.append(self.unknown(name, child, path, tuple(fields)))
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in entries:
                self.problems.append(f"{node.where}: {_join(path, name)} is missing")
        if len(self.problems) > found_before:
            return None
        instance = schema(**values)
        for name, message in getattr(instance, "problems", list)():
            self.problems.append(f"{_find(node, name).where}: {_join(path, name)} {message}")
        return instance

    def to(self, expected: Any, node: Node, path: str) -> Any:
        """``node`` as a value of the annotation ``expected``; a problem is recorded and None returned."""
        origin, arguments = typing.get_origin(expected), typing.get_args(expected)
        if origin in (Union, types.UnionType):
            return self.to_union(arguments, node, path)
        if dataclasses.is_dataclass(expected) and isinstance(expected, type):
            return self.mapping_to(expected, node, path)
        if origin in (list, tuple) and isinstance(node.value, list):
            items = (self.to(arguments[0], child, f"{path}[{i}]") for i, child in enumerate(node.value))
            return origin(items)
        if origin is dict and isinstance(node.value, dict):
            return {
                self.text(key, node, path): self.to(arguments[1], v, _join(path, key)) for key, v in node.value.items()
            }
        if origin is Literal and any(node.value == a and type(node.value) is type(a) for a in arguments):
            return node.value
        if origin is Literal and node.raw in arguments:
            return node.raw
        if expected is Any:
            return _plain(node)
        if expected is int and type(node.value) is int and abs(node.value) <= _LARGEST_INTEGER:
            return node.value
        if expected is float and type(node.value) in (int, float) and abs(node.value) <= _LARGEST_FLOAT:
            return float(node.value)
        if expected in (bool, type(None)) and type(node.value) is expected:
            return node.value
        text = node.value if type(node.value) is str else node.raw
        if expected is str and text is not None:
            return self.text(text, node, path)
        return self.refuse(node, path, _name_of(expected))

    def text(self, value: str, node: Node, path: str) -> str:
        """``value``; a problem is recorded when no file could hold it."""
        if _HALF.search(value):
            self.refuse(Node(value, node.where), path, "text without halves of characters")
        return value

    def to_union(self, members: tuple[Any, ...], node: Node, path: str) -> Any:
        # The narrowest first: null before a section, an int in `float | int`, command-line text at the end.
        order = (type(None), None, bool, int, float, str)
        for member in sorted(members, key=lambda m: order.index(m) if m in order else 1):
            attempt = _Builder([], self.known_paths)
            value = attempt.to(member, node, path)
            if not attempt.problems:
                return value
            if isinstance(node.value, dict | list) and _holds(member, node.value):
                self.problems.extend(attempt.problems)
                return None
        return self.refuse(node, path, " or ".join(_name_of(member) for member in members))

    def refuse(self, node: Node, path: str, expected: str) -> None:
        at = f"{path}: " if path else ""
        self.problems.append(f"{node.where}: {at}expected {expected}, found {node.describe()}")

    def unknown(self, name: str, node: Node, path: str, level: tuple[str, ...]) -> str:
        """The message for an unknown key: the nearest name of its own level, else of the whole schema."""
        shown = brief(_join(path, name), quotes=False)
        if len(self.problems) >= _MOST_TOLD:  # nobody reads it
            return f"{node.where}: unknown key {shown}"
        near = nearest(name, level)
        target = _join(path, near) if near else None
        if target is None:
            leaves: dict[str, str] = {}
            for known in self.known_paths:
                leaves.setdefault(known.rpartition(".")[2], known)
            leaf = nearest(name, leaves)
            target = leaves[leaf] if leaf else nearest(_join(path, name), self.known_paths)
        remedy = f"did you mean {target}?" if target else f"expected one of {', '.join(level)}"
        return f"{node.where}: unknown key {shown}, {remedy}"


def _paths(schema: Any, prefix: str = "") -> Iterator[str]:
    """The dotted path of every field of a schema and of the dataclasses inside it."""
    if dataclasses.is_dataclass(schema) and isinstance(schema, type):
        hints = typing.get_type_hints(schema)
        for field in dataclasses.fields(schema):
            yield _join(prefix, field.name)
            for inner in (hints[field.name], *typing.get_args(hints[field.name])):
                yield from _paths(inner, _join(prefix, field.name))


def _find(node: Node, path: str) -> Node:
    """The node at the dotted ``path``, or the innermost section on the way to it."""
    for name in path.split("."):
        if not isinstance(node.value, dict) or name not in node.value:
            break
        node = node.value[name]
    return node


def _holds(expected: Any, value: dict[str, Node] | list[Node]) -> bool:
    """Whether ``expected`` is a type for mappings where ``value`` is one, or for lists likewise."""
    origin = typing.get_origin(expected) or expected
    if isinstance(value, list):
        return origin in (list, tuple)
    return origin is dict or dataclasses.is_dataclass(origin)


def _plain(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(child) for child in node.value]
    return node.value


def _name_of(expected: Any) -> str:
    names = {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(argument) for argument in arguments)
    if origin in (list, tuple):
        return "a list"
    return "null" if expected is type(None) else names.get(expected, "a mapping")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
