"""What every key of a recipe is: the one description behind the docs page, ``recipes keys`` and the JSON schema.

All of it comes from the schema: types and defaults from its fields, descriptions from its docstrings, and ranges
from its own checks, which are asked about numbers on both sides of each usual bound.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

from docstring_parser import DocstringStyle, parse

from monteclora.config import default_of
from monteclora.methods import list_methods
from monteclora.runs.recipe import Recipe

__all__ = ["Key", "default_text", "json_schema", "markdown", "recipe_keys", "type_text"]

_METHOD = "method"
_REQUIRED = dataclasses.MISSING
# what each bound is called, with a number that it refuses and one that it takes
_LOWER: tuple[tuple[str, float, float], ...] = (
    ("at least 0", -1, 0),
    ("above 0", 0, 1e-9),
    ("at least 1", 0, 1),
    ("at least 2", 1, 2),
)
_UPPER: tuple[tuple[str, float, float], ...] = (("below 1", 1, 0.5), ("at most 1", 1.5, 1))


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Attributes:
        name: dotted.
        type: its annotation.
        default: its default; ``dataclasses.MISSING`` where a recipe must give it.
        range: of numbers, in words; empty where every number is taken.
        description: in a sentence or two.
        methods: those that have it; empty for a key of every recipe.
    """

    name: str
    type: Any
    default: Any
    range: str
    description: str
    methods: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        """Whether a recipe must give it."""
        return self.default is _REQUIRED


def recipe_keys() -> tuple[Key, ...]:
    """Every key, those outside sections first; those of methods once for the methods that share them."""
    found = sorted(_keys_of(Recipe, ""), key=lambda key: "." in key.name)
    shared: dict[tuple[str, str], Key] = {}
    for method in list_methods():
        for key in _keys_of(method.options, f"{_METHOD}."):
            if key.name == "method.name":
                continue
            same = (key.name, repr((key.type, key.default, key.description)))
            before = shared.get(same, key)
            shared[same] = dataclasses.replace(before, methods=(*before.methods, method.name))
    names = Literal[tuple(method.name for method in list_methods())]  # type: ignore[valid-type]
    choice = Key("method.name", names, _REQUIRED, "", "how it is trained (``monteclora list methods``).")
    ordered = sorted(shared.values(), key=lambda key: -len(key.methods))
    place = next((n for n, key in enumerate(found) if key.name.startswith("training.")), len(found))
    return (*found[:place], choice, *ordered, *found[place:])


def _keys_of(schema: Any, prefix: str) -> Iterator[Key]:
    hints = typing.get_type_hints(schema)
    descriptions = _descriptions(schema)
    for field in dataclasses.fields(schema):
        name, expected = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(expected):
            if name != _METHOD:
                yield from _keys_of(expected, f"{name}.")
            continue
        # the default of a recipe's name is the file's name, which is known when one is read
        default = None if name == "name" else default_of(field)
        yield Key(name, expected, default, _range(schema, field.name, expected), descriptions.get(field.name, ""))


def _descriptions(schema: Any) -> dict[str, str]:
    """What docstrings say of the fields, those of base classes included."""
    found: dict[str, str] = {}
    for base in (*reversed(schema.__mro__), *getattr(schema, "described_by", ())):
        if dataclasses.is_dataclass(base) and base.__doc__:
            for parameter in parse(inspect.cleandoc(base.__doc__), style=DocstringStyle.GOOGLE).params:
                for name in parameter.arg_name.split(", "):
                    found[name] = " ".join((parameter.description or "").split())
    return found


def _range(schema: Any, name: str, expected: Any) -> str:
    """The bounds of a number, found by asking the schema's own check."""
    numbers = [kind for kind in _members(expected) if kind in (int, float)]
    if not numbers:
        return ""
    kind = float if float in numbers else int

    def holds(refused: float, taken: float) -> bool:
        representable = kind is float or (refused % 1 == 0 and taken % 1 == 0)
        return representable and _refused(schema, {name: kind(refused)}) and not _refused(schema, {name: kind(taken)})

    bounds = (next((text for text, *ends in side if holds(*ends)), "") for side in (_LOWER, _UPPER))
    return " and ".join(text for text in bounds if text)


def _refused(schema: Any, values: Mapping[str, Any]) -> bool:
    """Whether the schema has a problem with any of these fields."""
    return any(place in values for place, _ in getattr(_bare(schema, values), "problems", list)())


def _bare(schema: Any, values: Mapping[str, Any]) -> Any:
    """An instance with these values, and something of the right type where there is no default."""
    hints = typing.get_type_hints(schema)
    needed = {
        field.name: _bare(hints[field.name], {}) if dataclasses.is_dataclass(hints[field.name]) else "lora"
        for field in dataclasses.fields(schema)
        if field.default is _REQUIRED and field.default_factory is _REQUIRED
    }
    return schema(**{**needed, **values})


def _members(expected: Any) -> tuple[Any, ...]:
    """The types of a union, without integers where every number is taken."""
    if typing.get_origin(expected) in (Union, types.UnionType):
        members = typing.get_args(expected)
        return tuple(member for member in members if member is not int or float not in members)
    return (expected,)


def type_text(key: Key) -> str:
    """The type and range of a key, in words."""
    return _type_name(key.type) + (f", {key.range}" if key.range else "")


def default_text(key: Key) -> str:
    """The default as a recipe would write it."""
    if key.required:
        return "required"
    return key.default if isinstance(key.default, str) else json.dumps(key.default)


def _type_name(expected: Any) -> str:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(member) for member in sorted(_members(expected), key=lambda m: m is type(None)))
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"mapping to {_type_name(arguments[1])}"
    names = {type(None): "null", bool: "true or false", int: "integer", float: "number", str: "text", Any: "anything"}
    return names[expected]


def markdown(keys: Sequence[Key]) -> str:
    """The docs page: a table for each section."""
    lines = [
        "# Every key of a recipe",
        "",
        "`monteclora recipes keys` lists them too. `monteclora recipes schema` prints a JSON schema, with which an",
        "editor completes and checks recipes:",
        "",
        "```yaml",
        "# yaml-language-server: $schema=recipe.schema.json",
        "```",
        "",
        "Every key can be given on the command line too, as in `--training.learning_rate 3e-4`.",
    ]
    section = None
    for key in keys:
        own = key.name.rpartition(".")[0] or "top level"
        if own != section:
            section = own
            lines += ["", f"## {own}", "", "| key | type | default | |", "|---|---|---|---|"]
        lines.append(f"| {' | '.join(_cells(key))} |")
    return "\n".join(lines) + "\n"


def _cells(key: Key) -> list[str]:
    of = f"Of {', '.join(key.methods)}. " if key.methods else ""
    default = default_text(key) if key.required else f"`{default_text(key)}`"
    description = key.description[:1].upper() + key.description[1:]
    cells = [f"`{key.name}`", type_text(key), default, of + description]
    return [cell.replace("|", "\\|").replace("``", "`") for cell in cells]


def json_schema(keys: Sequence[Key]) -> dict[str, Any]:
    """A JSON schema (draft 2020-12) of recipes.

    It refuses unknown keys and wrong types. A key that only some methods have is taken with every method: which it is,
    is checked when the recipe is read.
    """
    root = _section()
    for key in keys:
        *path, name = key.name.split(".")
        section = root
        for part in path:
            section = section["properties"].setdefault(part, _section())
        known = section["properties"].get(name)
        own = _json_type(key.type)
        if not key.required:
            own["default"] = key.default
        own["description"] = _cells(key)[-1].replace("\\|", "|").replace("`", "")
        section["properties"][name] = own if known is None else {"anyOf": [*known.get("anyOf", [known]), own]}
        if key.required:
            section.setdefault("required", []).append(name)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "monteclora recipe", **root}


def _section() -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": {}}


def _json_type(expected: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (Union, types.UnionType):
        members = [_json_type(member) for member in _members(expected)]
        return {"anyOf": members} if members[1:] else members[0]
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": _json_type(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _json_type(arguments[1])}
    names = {type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string"}
    return {} if expected is Any else {"type": names[expected]}
