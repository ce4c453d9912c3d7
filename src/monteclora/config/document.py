"""YAML text to nodes that know their line.

Scalars follow YAML 1.2 (``1e-4`` is a number, ``no`` is a word). Tags, anchors and aliases are refused, so a
file can neither name Python objects nor grow while it is read; so are pipes, devices and files of megabytes, so
reading one ends.
"""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from monteclora.errors import ConfigError

__all__ = [
    "Document",
    "Dumper",
    "Node",
    "brief",
    "from_python",
    "load_yaml",
    "nearest",
    "override",
    "parse_yaml",
    "to_python",
]

_LARGEST_FILE = 2**20  # bytes
_DEEPEST = 100  # levels of brackets or indentation
_TAG = "tag:yaml.org,2002:"
_CORE_SCALARS = (  # YAML 1.2, section 10.3.2; integers no longer than float() takes
    ("null", r"null|Null|NULL|~|", "nN~"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]{1,300}|0o[0-7]{1,300}|0x[0-9a-fA-F]{1,240}", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)


class _Loader(yaml.SafeLoader):
    """Composes nodes with the scalars of YAML 1.2, without anchors, and no deeper than anyone can read."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the base class declares it so
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if self.depth > _DEEPEST:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", event.start_mark)
        if getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases are not allowed: write the value out", event.start_mark
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


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
                return f"the text {brief(self.value)}"
            case None | bool():
                return {None: "null", True: "true", False: "false"}[self.value]
        return brief(self.value)


@dataclass(frozen=True)
class Document:
    """A parsed file: its root node (a mapping), its name for messages, and the problems met so far."""

    root: Node
    source: str
    problems: tuple[str, ...] = ()


def load_yaml(path: str | Path) -> Document:
    """Read a YAML file (UTF-8, with or without a byte-order mark).

    Raises:
        ConfigError: no such file, not an ordinary one, too large, not UTF-8, not YAML, or the top level is not a
            mapping.
    """
    path = Path(path)
    try:
        text = _content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}", "Save the file as UTF-8.") from None
    except (OSError, ValueError) as error:  # a name with a NUL or half a character is a ValueError
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read {path}: {reason}", _hint_for(path)) from None
    return parse_yaml(text, str(path))


def _content(path: Path) -> bytes:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not path.is_dir():  # opening a pipe would wait for its other end
        raise ConfigError(f"{path} is not an ordinary file", "Give the path of a YAML file.")
    if found.st_size > _LARGEST_FILE:
        raise ConfigError(
            f"{path} has {found.st_size:,} bytes, a recipe at most {_LARGEST_FILE:,}", "Is it another file?"
        )
    return path.read_bytes()


def _hint_for(path: Path) -> str:
    try:
        near = nearest(path.name, (file.name for file in path.parent.glob("*.y*ml") if file.name != path.name))
    except (OSError, ValueError):
        near = None
    return f"Did you mean {path.parent / near}?" if near else "Give the path of a YAML file."


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
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node: yaml.Node | None = loader.get_single_node()
        return None if node is None else _from_yaml(node, source, problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        message = f"{source}{line}: {error.problem or error.context}"
        hint = "Correct the YAML: indentation, quotes, brackets."
        if "escape" in message:
            hint = "Write each backslash twice in double quotes, as in a path of Windows, or use single quotes."
        raise ConfigError(message, hint) from None
    except yaml.YAMLError as error:
        message = f"{source}: {' '.join(str(error).split())}"
        raise ConfigError(message, "Remove the special characters.") from None
    except (ValueError, OverflowError) as error:  # PyYAML lets escapes and version numbers out of range through
        line = f", line {loader.line + 1}" if loader else ""
        raise ConfigError(f"{source}{line}: {error}", "Correct the escapes in double quotes.") from None


def _from_yaml(node: yaml.Node, source: str, problems: list[str]) -> Node:
    where = f"{source}, line {node.start_mark.line + 1}"
    tag = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode) and tag == "map":
        entries: dict[str, Node] = {}
        for key, value in node.value:
            key_where = f"{source}, line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode) or key.tag != _TAG + "str":
                text = getattr(key, "value", "")
                problems.append(f"{key_where}: the key {brief(text if isinstance(text, str) else '')} is not text")
            elif key.value in entries:
                problems.append(f"{key_where}: the key {brief(key.value, quotes=False)} is given twice")
            else:
                child = _from_yaml(value, source, problems)
                entries[key.value] = Node(child.value, key_where)
        return Node(entries, where)
    if isinstance(node, yaml.SequenceNode) and tag == "seq":
        return Node([_from_yaml(item, source, problems) for item in node.value], where)
    if isinstance(node, yaml.ScalarNode) and tag in ("null", "bool", "int", "float", "str"):
        try:
            return Node(_scalar(tag, node.value), where)
        except ValueError:  # a tag that is written out, as in !!int x
            problems.append(f"{where}: {brief(node.value)} is no {tag}")
            return Node(None, where)
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
    """Plain mappings, lists and scalars as nodes that all stand at ``where``.

    Raises:
        ConfigError: the value is nested too deeply, or holds itself.
    """

    def convert(inner: Any) -> Node:
        if isinstance(inner, Mapping):
            return Node({str(key): convert(item) for key, item in inner.items()}, where)
        if isinstance(inner, list | tuple):
            return Node([convert(item) for item in inner], where)
        return Node(inner, where)

    try:
        return convert(value)
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply", "Give a flatter mapping.") from None


def to_python(node: Node) -> Any:
    """Plain mappings, lists and scalars: what :func:`from_python` makes such a node of."""
    if isinstance(node.value, dict):
        return {key: to_python(item) for key, item in node.value.items()}
    if isinstance(node.value, list):
        return [to_python(item) for item in node.value]
    return node.value


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


def brief(value: Any, most: int = 60, *, quotes: bool = True) -> str:
    """How a message shows a value that may be of any size: its ``repr`` (or text), cut to ``most`` characters."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to print much longer ones
        return f"a number of {value.bit_length():,} bits"
    text = value if isinstance(value, str) else repr(value)
    shown = repr(text[:most]) if isinstance(value, str) and quotes else text[:most]
    return shown if len(text) <= most else f"{shown}... ({len(text):,} characters)"


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like ``name``, or None when none is alike."""
    return next(iter(difflib.get_close_matches(name, list(candidates), n=1)), None)
