"""YAML text to nodes that know their line.

Scalars follow YAML 1.2 (``1e-4`` is a number, ``no`` is a word). Tags, anchors and aliases are refused, so a
file can neither name Python objects nor grow while it is read.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from monteclora.errors import ConfigError

__all__ = ["Document", "Dumper", "Node", "from_python", "load_yaml", "nearest", "override", "parse_yaml"]

_TAG = "tag:yaml.org,2002:"
_CORE_SCALARS = (  # YAML 1.2, section 10.3.2
    ("null", r"null|Null|NULL|~|", "nN~"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]{1,4000}|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),  # int() reads at most 4300 digits
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)


class _Loader(yaml.SafeLoader):
    """Composes nodes with the scalars of YAML 1.2 and without anchors."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the base class declares it so

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases are not allowed: write the value out", event.start_mark
            )
        return super().compose_node(parent, index)


class Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or YAML 1.2 would read as something else."""

    def _represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML folds these three line breaks into a space unless they are escaped.
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar(_TAG + "str", data, style=style)


Dumper.add_representer(str, Dumper._represent_str)

for _name, _pattern, _first in _CORE_SCALARS:
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(
            _TAG + _name, re.compile(f"^(?:{_pattern})$"), [*_first, *([""] if _name == "null" else [])]
        )


@dataclass(frozen=True)
class Node:
    """A value and where it stands.

    ``value`` is a scalar, a list of nodes or a dict from key to node; ``where`` reads like
    ``recipe.yaml, line 3`` or ``--training.seed``. ``raw`` is the text of a command-line value, which a
    string field takes as it is.
    """

    value: Any
    where: str
    raw: str | None = None

    def describe(self) -> str:
        """What stands there, for the end of "expected ..., found ..."."""
        match self.value:
            case dict():
                return "a mapping"
            case list():
                return "a list"
            case str():
                return f"the text {self.value!r}"
            case None | bool():
                return {None: "null", True: "true", False: "false"}[self.value]
        return repr(self.value)


@dataclass(frozen=True)
class Document:
    """A parsed file: its root node (a mapping), its name for messages, and the problems met so far."""

    root: Node
    source: str
    problems: tuple[str, ...] = ()


def load_yaml(path: str | Path) -> Document:
    """Read a YAML file (UTF-8, with or without a byte-order mark).

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, or the top level is not a mapping.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}", "Save the file as UTF-8.") from None
    except OSError as error:
        near = nearest(path.name, (file.name for file in path.parent.glob("*.y*ml")))
        hint = f"Did you mean {path.parent / near}?" if near else "Give the path of a YAML file."
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str = "recipe") -> Document:
    """Parse YAML text; ``source`` is the name that messages use. Raises ConfigError as :func:`load_yaml`."""
    problems: list[str] = []
    root = _parse(text, source, problems)
    if root is None or root.value is None:
        root = Node({}, source)
    if not isinstance(root.value, dict):
        raise ConfigError(f"{source} holds {root.describe()} where a mapping is expected", "Write `key: value` lines.")
    return Document(root, source, tuple(problems))


def _parse(text: str, source: str, problems: list[str]) -> Node | None:
    """Compose ``text``; duplicate keys and tags go to ``problems``, broken YAML raises."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _from_yaml(node, source, problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        message = f"{source}{line}: {error.problem or error.context}"
        raise ConfigError(message, "Correct the YAML: indentation, quotes, brackets.") from None
    except yaml.YAMLError as error:
        message = f"{source}: {' '.join(str(error).split())}"
        raise ConfigError(message, "Remove the special characters.") from None
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply", "Write a flatter file.") from None


def _from_yaml(node: yaml.Node, source: str, problems: list[str]) -> Node:
    where = f"{source}, line {node.start_mark.line + 1}"
    tag = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode) and tag == "map":
        entries: dict[str, Node] = {}
        for key, value in node.value:
            key_where = f"{source}, line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode) or key.tag != _TAG + "str":
                text = getattr(key, "value", "")
                problems.append(f"{key_where}: the key {text if isinstance(text, str) else ''!r} is not text")
            elif key.value in entries:
                problems.append(f"{key_where}: the key {key.value} is given twice")
            else:
                child = _from_yaml(value, source, problems)
                entries[key.value] = Node(child.value, key_where)
        return Node(entries, where)
    if isinstance(node, yaml.SequenceNode) and tag == "seq":
        return Node([_from_yaml(item, source, problems) for item in node.value], where)
    if isinstance(node, yaml.ScalarNode) and tag in ("null", "bool", "int", "float", "str"):
        return Node(_scalar(tag, node.value), where)
    problems.append(f"{where}: the YAML tag {node.tag.replace(_TAG, '!!')} is not allowed")
    return Node(None, where)


def _scalar(tag: str, text: str) -> Any:
    match tag:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        case "float":
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    return text


def from_python(value: Any, where: str) -> Node:
    """Plain mappings, lists and scalars as nodes that all stand at ``where``."""
    if isinstance(value, Mapping):
        return Node({str(key): from_python(item, where) for key, item in value.items()}, where)
    if isinstance(value, list | tuple):
        return Node([from_python(item, where) for item in value], where)
    return Node(value, where)


def override(root: Node, path: list[str], text: str, problems: list[str]) -> Node:
    """A copy of ``root`` with the value at ``path`` replaced by YAML ``text``; missing sections are made."""
    where = f"--{'.'.join(path)}"

    def put(node: Node, rest: list[str]) -> Node:
        entries = dict(node.value) if isinstance(node.value, dict) else {}
        if rest[1:]:
            entries[rest[0]] = put(entries.get(rest[0], Node({}, where)), rest[1:])
        else:
            entries[rest[0]] = Node(value, where, raw=text)
        return Node(entries, node.where)

    try:
        parsed = _parse(text, where, problems)
        value = None if parsed is None else parsed.value
    except ConfigError:
        value = text  # a string such as `a: b: c`; any other field then says what it expects
    return put(root, path)


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like ``name``, or None when none is alike."""
    return next(iter(difflib.get_close_matches(name, list(candidates), n=1)), None)
