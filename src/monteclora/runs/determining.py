"""What of a recipe determines the result, as a checksum and key by key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from monteclora.config import default_of
from monteclora.runs.recipe import AFFECTS_RESULT, Recipe
from monteclora.runs.recipe_paths import absolute

__all__ = ["all_values", "changed_values", "differences", "recipe_sha256", "settings"]


def recipe_sha256(recipe: Recipe) -> str:
    """The checksum of what determines the result: two recipes that share it train the same adapter.

    Fields at their defaults are left out, so that a field added later, whose default is what was done before, does not
    make another recipe of an old one. The method's name never is: it is each method's own default.
    """
    changed = _changed(_resolved(recipe))
    changed["method"] = {**changed.get("method", {}), "name": recipe.method.name}
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()


def settings(recipe: Recipe) -> dict[str, Any]:
    """The values of the dotted keys that determine the result and are not at their defaults."""
    return dict(_flat(_changed(recipe)))


def all_values(recipe: Recipe) -> dict[str, Any]:
    """The values of all dotted keys that determine the result, defaults included."""
    return dict(_flat(_determining(_resolved(recipe))))


def differences(first: Recipe, second: Recipe) -> list[str]:
    """The dotted keys, of those that determine the result, in which two recipes differ; paths by where they lead."""
    return list(changed_values(first, second))


def changed_values(first: Recipe, second: Recipe) -> dict[str, tuple[Any, Any]]:
    """Both values of the keys that :func:`differences` gives; None for a key that only the other's method has."""
    one, other = (all_values(absolute(recipe)) for recipe in (first, second))
    missing = object()
    keys = sorted(key for key in {*one, *other} if one.get(key, missing) != other.get(key, missing))
    return {key: (one.get(key), other.get(key)) for key in keys}


def _resolved(recipe: Recipe) -> Recipe:
    """With the values of options that are left to another one: those determine the result, however they are written."""
    return dataclasses.replace(recipe, method=recipe.method.resolved())


def _determining(instance: Any) -> Any:
    if not dataclasses.is_dataclass(instance):
        return instance
    kept = (f for f in dataclasses.fields(instance) if f.metadata.get(AFFECTS_RESULT, True))
    return {f.name: _determining(getattr(instance, f.name)) for f in kept}


def _changed(section: Any) -> dict[str, Any]:
    """What :func:`_determining` gives, without the fields at their defaults and sections without any other."""
    changed = {}
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            value = _changed(value)
        if f.metadata.get(AFFECTS_RESULT, True) and value not in ({}, default_of(f)):
            changed[f.name] = value
    return changed


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
