"""Batches of rows of like length, and the forward passes over them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn

from monteclora.prediction.ensemble import Members

__all__ = [
    "Collate",
    "FloatArray",
    "base_of",
    "batches",
    "logits_at",
    "placed",
    "text_mask",
    "to_device",
    "with_positions",
]

FloatArray = NDArray[np.float64]
Collate = Callable[[list[dict[str, Any]]], Any]
"""Pads a list of encoded rows to a batch."""


def batches(rows: Sequence[dict[str, Any]], size: int) -> Iterator[list[int]]:
    """Indices in batches of rows of like length, longest first: little padding, and memory runs out early or never."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    for first in range(0, len(order), size):
        yield order[first : first + size]


def to_device(batch: Any, model: nn.Module) -> dict[str, Any]:
    """The tensors of a batch, where the model is."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}


def base_of(model: nn.Module) -> nn.Module:
    """The model inside peft's wrapper, which may be inside others (compiled, averaged, distributed).

    Of an ensemble it is the first member's, which stands for all: they have one architecture.
    """
    found = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if found is not None:
        return cast(nn.Module, found.get_base_model())
    return model.members[0] if isinstance(model, Members) else model


def text_mask(base: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """The mask of the tokens whose logits a model returns: of an encoder-decoder, its decoder's."""
    name = "decoder_attention_mask" if _two_stacks(base) else "attention_mask"
    mask: Tensor | None = inputs.get(name)
    return mask


def with_positions(base: nn.Module, inputs: Mapping[str, Any], past: int = 0) -> dict[str, Any]:
    """The same inputs, with positions that do not count padding on the left.

    Args:
        base: the model.
        inputs: what it takes; a mask of shape (B, past + T) says what is padding. Positions that are given are kept.
        past: how many tokens before the T of the inputs are in a cache of keys and values.
    """
    mask = text_mask(base, inputs)
    counts = not _two_stacks(base) and "position_ids" in inspect.signature(base.forward).parameters
    if not counts or inputs.get("position_ids") is not None or mask is None or mask.dim() != 2 or mask[:, 0].all():
        return dict(inputs)
    return {**inputs, "position_ids": (mask.long().cumsum(-1) - 1).clamp_min(0)[:, past:]}


def placed(base: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same rows where they give what each gives alone, whichever side their padding, of shape (B, T), is on.

    A language model is given positions that do not count padding. A classifier looks for the last token by its padding
    and counts positions from the first column: the padding is moved after the rows.
    """
    found, mask = with_positions(base, inputs), text_mask(base, inputs)
    if _is_language_model(base):
        return found
    if mask is None or inputs.get("input_ids") is None or "position_ids" not in found.keys() - inputs.keys():
        return dict(inputs)
    return _padded_on_the_right(dict(inputs), mask)


def _padded_on_the_right(inputs: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    first = mask.long().argmax(-1)
    if not first.any():
        return inputs
    length = mask.shape[1]
    columns = (torch.arange(length, device=mask.device) + first[:, None]) % length
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    return {
        name: value[rows.to(value.device), columns.to(value.device)]
        if isinstance(value, Tensor) and value.shape[:2] == mask.shape
        else value
        for name, value in inputs.items()
    }


def _is_language_model(base: nn.Module) -> bool:
    """Whether the logits of some tokens alone can be asked for: over a vocabulary they are many."""
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def _two_stacks(base: nn.Module) -> bool:
    return bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))


def logits_at(model: nn.Module, inputs: dict[str, Any], columns: Tensor) -> Tensor:
    """Logits at some columns of a padded batch, (B, len(columns), V); a large head runs on those alone if it can."""
    base = base_of(model)
    inputs = with_positions(base, inputs)
    if _is_language_model(base):
        found: Tensor = model(**inputs, logits_to_keep=columns).logits
        return found
    every: Tensor = model(**inputs).logits
    return every[:, columns]
