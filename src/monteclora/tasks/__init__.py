"""What a model learns: tasks by name, own files and data sets on the hub, one file a family."""

from monteclora.tasks.loading import SplitSource, TaskData, load, load_inputs
from monteclora.tasks.registry import Task, get_task, is_task, list_tasks, register
from monteclora.tasks.spec import DataSpec

__all__ = [
    "DataSpec",
    "SplitSource",
    "Task",
    "TaskData",
    "get_task",
    "is_task",
    "list_tasks",
    "load",
    "load_inputs",
    "register",
]
