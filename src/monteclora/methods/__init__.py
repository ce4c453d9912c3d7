"""The fine-tuning methods that can be compared, one file each."""

from monteclora.methods.base import Method, MethodOptions, TaskKind
from monteclora.methods.registry import get_method, list_methods, register

__all__ = ["Method", "MethodOptions", "TaskKind", "get_method", "list_methods", "register"]
