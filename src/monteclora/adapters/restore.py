"""Put a saved adapter back into a model that has one of the same kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["load_adapter"]


def load_adapter(model: Any, folder: Path) -> None:
    """Put a saved adapter (and posterior) into a model that has one of the same kind.

    Args:
        model: a ``peft.PeftModel``; what is trainable in it stays so.
        folder: written by ``save_pretrained``.
    """
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
