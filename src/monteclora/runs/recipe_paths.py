"""Where the relative paths of a recipe lead: beside its file first, then from the working directory.

A path is written down as it leads from the working directory; where both folders are the same, or nothing is beside the
file, it stays as it is written. A run also records where it was started (:func:`started_in`), and finds its data from
any directory, and after a move with them. What it writes down later leads from there too (:func:`kept_words`).
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monteclora.config import Node
from monteclora.data.chat import CHATML
from monteclora.data.models import STARTERS
from monteclora.tasks import list_tasks

if TYPE_CHECKING:
    from monteclora.runs.recipe import Recipe

__all__ = ["PATH_KEYS", "absolute", "beside", "kept_words", "places_of", "started_in", "with_places"]

PATH_KEYS = (
    "model.name",
    "data.task",
    "data.folder",
    "data.train_file",
    "data.validation_file",
    "data.test_file",
    "data.chat_template",
    "training.post_hoc.adapter",
)
"""Keys of a recipe whose values can be paths of what it reads; where runs are written is up to the command."""


def beside(key: str, value: Any, places: Sequence[Path]) -> Any:
    """The value of a key, with relative paths as they lead from the first of these folders in which they exist.

    Args:
        key: dotted; values of keys that hold no path stay as they are.
        value: a path, a list of them, or a name of something else, which stays as it is.
        places: folders; one that is the working directory leaves a path as it is.
    """
    if key not in PATH_KEYS:
        return value
    if isinstance(value, list):
        return [beside(key, each, places) for each in value]
    if not isinstance(value, str) or not value or value in _names(key):
        return value
    if value.startswith("~"):
        return os.path.expanduser(value)
    if os.path.isabs(value):
        return value
    for place in places:
        if _exists(found := os.path.normpath(os.path.join(place, value))):
            return value if place.resolve() == Path.cwd() else found
    return value


def with_places(root: Node, places: Sequence[Path], prefix: str = "") -> Node:
    """A recipe's document with its paths as :func:`beside` has them."""
    entries = {}
    for key, node in root.value.items():
        name = f"{prefix}{key}"
        if isinstance(node.value, dict):
            entries[key] = with_places(node, places, f"{name}.")
        elif isinstance(node.value, list):
            entries[key] = dataclasses.replace(node, value=[_node(name, each, places) for each in node.value])
        else:
            entries[key] = _node(name, node, places)
    return dataclasses.replace(root, value=entries)


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, in which two that name the same files in different words are equal."""
    found = recipe
    for key in PATH_KEYS:
        path = key.split(".")
        found = _replaced(found, path, _absolute(key, _value(found, path)))
    return found


def started_in(folder: Path) -> dict[str, str]:
    """The working directory, for the environment of a run: as it is, and as it leads from the run's folder."""
    here = Path.cwd()
    try:
        relative = os.path.relpath(here, folder.resolve())
    except ValueError:  # another drive
        relative = "."
    return {"absolute": str(here), "from_run": relative}


def places_of(folder: Path, recorded: Mapping[str, Any] | None) -> list[Path]:
    """Where the paths of a run's recipe lead from: here, where it was started as seen from the run, where that was.

    Args:
        folder: of the run.
        recorded: what :func:`started_in` gave when it was started; None where that was not written down.
    """
    if recorded is None:
        return [Path()]
    from_run, where = str(recorded.get("from_run", ".")), str(recorded.get("absolute", "."))
    return [Path(), folder / from_run, Path(where)]


def kept_words(recipe: Recipe, found: Recipe, written: Recipe, places: Sequence[Path]) -> Recipe:
    """A recipe as the file of a run has it: with paths that lead from where the run was started, not from here.

    Args:
        recipe: whose paths lead from the working directory.
        found: the run's own until now, whose paths lead from there too: those that still lead to the same files are
            written as they were.
        written: the same as it is written; by earlier versions as its paths led from where the run was last gone on
            with, which is mended.
        places: as :func:`places_of` gives them.
    """
    here = Path.cwd()
    from_here = len(places) == 1 or any(place.resolve() == here for place in places[1:])
    for key in PATH_KEYS:
        path = key.split(".")
        new, old, words = (_value(each, path) for each in (recipe, found, written))
        lost = not from_here and _leads_from_here_alone(key, words, places[1:])
        if _absolute(key, new) == _absolute(key, old) and not lost:
            recipe = _replaced(recipe, path, words)
        elif not from_here:
            recipe = _replaced(recipe, path, _absolute(key, new))
    return recipe


def _leads_from_here_alone(key: str, value: Any, places: Sequence[Path]) -> bool:
    """Whether a path leads to a file from the working directory, and from none of these folders."""
    if isinstance(value, list):
        return any(_leads_from_here_alone(key, each, places) for each in value)
    return bool(beside(key, value, places) == value != _absolute(key, value))


def _node(key: str, node: Node, places: Sequence[Path]) -> Node:
    return dataclasses.replace(node, value=beside(key, node.value, places))


def _names(key: str) -> frozenset[str]:
    """What a value means that is no path, whatever files there are."""
    known = {"model.name": STARTERS, "data.chat_template": (CHATML,), "data.task": [task.name for task in list_tasks()]}
    return frozenset(known.get(key, ()))


def _replaced(section: Any, path: Sequence[str], value: Any) -> Any:
    """The section with another value at a path."""
    name, *rest = path
    return dataclasses.replace(section, **{name: _replaced(getattr(section, name), rest, value) if rest else value})


def _value(section: Any, path: Sequence[str]) -> Any:
    return reduce(getattr, path, section)


def _absolute(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(key, each) for each in value]
    return os.path.abspath(value) if _leads_somewhere(key, value) else value


def _leads_somewhere(key: str, value: Any) -> bool:
    return isinstance(value, str) and bool(value) and value not in _names(key) and _exists(value)


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path) or (
            glob.has_magic(path) and next(glob.iglob(path, recursive=True), None) is not None
        )
    except (OSError, ValueError):  # no name of a file at all
        return False
