"""What a model learns: tasks by name, own files and data sets on the hub, one file a family."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from monteclora.tasks.registry import Task, get_task, is_task, list_tasks, register
from monteclora.tasks.spec import DataSpec

if TYPE_CHECKING:
    from monteclora.tasks.loading import SplitSource, TaskData, check_pair, load, load_inputs

__all__ = [
    "DataSpec",
    "SplitSource",
    "Task",
    "TaskData",
    "check_pair",
    "get_task",
    "is_task",
    "list_tasks",
    "load",
    "load_inputs",
    "register",
]


def __getattr__(name: str) -> Any:
    """What reads data takes numpy along, for which a list of names need not wait."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module("monteclora.tasks.loading"), name)
