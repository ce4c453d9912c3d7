"""Data: tasks by name, own files, data sets on the hub; their encoding; the starter models."""

from monteclora.data.loading import DataSpec, SplitSource, TaskData, load, load_inputs
from monteclora.data.registry import Task, get_task, list_tasks, register

__all__ = [
    "DataSpec",
    "SplitSource",
    "Task",
    "TaskData",
    "get_task",
    "list_tasks",
    "load",
    "load_inputs",
    "register",
]
