"""Private names of transformers, each with what it stands in for; a test fails when one changes.

The tests are in tests/adapters/test_private_names.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["checkpoint_function", "earlier_names", "set_checkpoint_function"]


def checkpoint_function(block: nn.Module) -> Callable[..., Any] | None:
    """The function through which a block of layers is checkpointed, None while checkpointing is off.

    ``gradient_checkpointing_enable`` sets it. What it takes (``context_fn``) reaches non-reentrant checkpointing only,
    and not models whose checkpointing was enabled before they were wrapped, so there is no public way.
    """
    return getattr(block, "_gradient_checkpointing_func", None)


def set_checkpoint_function(block: nn.Module, function: Callable[..., Any]) -> None:
    """Replace :func:`checkpoint_function`; past ``nn.Module.__setattr__``, which would register what is a module."""
    block.__dict__["_gradient_checkpointing_func"] = function


def earlier_names(model: nn.Module) -> dict[str, str] | None:
    """Patterns of the names that a model's weights had in earlier versions of transformers, with the names of today.

    peft reads the same attribute in ``PeftModel.from_pretrained``; there is no public name for it.
    """
    return getattr(model, "_checkpoint_conversion_mapping", None) or None
