"""Batches of rows of like length, and the forward passes over them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn

from monteclora.prediction.ensemble import Members

__all__ = ["Collate", "FloatArray", "base_of", "batches", "logits_at", "to_device"]

FloatArray = NDArray[np.float64]
Collate = Callable[[list[dict[str, Any]]], Any]
"""Pads a list of encoded rows to a batch."""


def batches(rows: Sequence[dict[str, Any]], size: int) -> Iterator[list[int]]:
    """Indices in batches of rows of like length, longest first: little padding, and memory runs out early or never."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    for first in range(0, len(order), size):
        yield order[first : first + size]


def base_of(model: nn.Module) -> nn.Module:
    """The model inside peft's wrapper, which may be inside others (compiled, averaged, distributed).

    Of an ensemble it is the first member's, which stands for all: they have one architecture.
    """
    found = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if found is not None:
        return cast(nn.Module, found.get_base_model())
    return model.members[0] if isinstance(model, Members) else model


def to_device(batch: Any, model: nn.Module) -> dict[str, Any]:
    """The tensors of a batch, where the model is."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}


def logits_at(model: nn.Module, inputs: dict[str, Any], columns: Tensor) -> Tensor:
    """Logits at some columns of a padded batch, (B, len(columns), V); a large head runs on those alone if it can."""
    parameters = inspect.signature(base_of(model).forward).parameters
    mask = inputs["attention_mask"]
    if "position_ids" in parameters and not mask[:, 0].all():
        # absolute positions must not count padding on the left
        inputs = {**inputs, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    if "logits_to_keep" in parameters:
        found: Tensor = model(**inputs, logits_to_keep=columns).logits
        return found
    every: Tensor = model(**inputs).logits
    return every[:, columns]
