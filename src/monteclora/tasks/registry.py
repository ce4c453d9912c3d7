"""The benchmark tasks by name. A new task is a file in this folder and its name in ``_FAMILIES``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from monteclora.config import nearest
from monteclora.data.files import Table
from monteclora.data.kinds import Kind
from monteclora.errors import ConfigError
from monteclora.tasks.generation import Generation

__all__ = ["Task", "get_task", "is_task", "list_tasks", "register"]

_FAMILIES = ("glue", "superglue", "multiple_choice", "commonsense", "gsm8k", "code", "helpdesk")
_TASKS: dict[str, Task] = {}


@dataclass(frozen=True)
class Task:
    """A data set with a name.

    Args:
        name: as recipes write it.
        kind: what is learned, as ``data.kind`` has it.
        text_columns: the one or two columns of the source that the model reads.
        label_names: the name of each label id; None for ``causal_lm`` and ``regression``.
        splits: the splits that come with labels, out of ``train``, ``validation``, ``test``.
        description: one line for ``monteclora list tasks``.
        loader: from split and data folder (or None) to a table with the columns ``text``, perhaps
            ``text_pair``, and ``label``, or ``prompt``, ``completion``, ``options`` and ``answer``.
        subsets: smaller training splits by name (``data.subset``); the loader is asked for ``train_<name>``.
        generation: how answers that a model writes are judged; None where nothing is written.
        remedy: what to do about a split that the data set does not have.
    """

    name: str
    kind: Kind
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    splits: tuple[str, ...]
    description: str
    loader: Callable[[str, Path | None], Table]
    subsets: tuple[str, ...] = ()
    generation: Generation | None = None
    remedy: str = "Choose one of its splits, or give files of your own."


def register(task: Task) -> Task:
    """Add a task. Raises ConfigError when its name is taken."""
    if task.name in _TASKS:
        raise ConfigError(f"the task {task.name} is registered already", "Choose another name.")
    _TASKS[task.name] = task
    return task


def list_tasks() -> tuple[Task, ...]:
    """Every task in alphabetical order."""
    for family in _FAMILIES:
        importlib.import_module(f"monteclora.tasks.{family}")
    return tuple(_TASKS[name] for name in sorted(_TASKS))


def is_task(name: str) -> bool:
    """Whether there is a task of that name."""
    return any(task.name == name for task in list_tasks())


def get_task(name: str) -> Task:
    """The task of that name. Raises ConfigError that names the nearest one."""
    tasks = {task.name: task for task in list_tasks()}
    if name not in tasks:
        near = nearest(name, tasks)
        hint = f"Did you mean {near}? " if near else ""
        raise ConfigError(f"there is no task {name!r}", f"{hint}See `monteclora list tasks`.")
    return tasks[name]
