"""Forward passes that continue from the keys and values of earlier ones."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from monteclora.adapters.rows import CACHES
from monteclora.prediction.forward import base_of, with_positions

__all__ = ["cache_name", "padded", "step"]


def cache_name(model: nn.Module) -> str | None:
    """What the model's forward calls the keys and values of earlier tokens; None where it takes none."""
    parameters = inspect.signature(base_of(model).forward).parameters
    return next((name for name in CACHES if name in parameters), None)


def padded(sequences: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and mask, shape (B, T); padding is masked, so that any token serves."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences):
        place = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    return ids, mask


def step(
    model: nn.Module, ids: Tensor, mask: Tensor, kept: int, *, cache: Any = None, use_cache: bool = False
) -> tuple[Tensor, Any]:
    """Logits of the last ``kept`` columns, (B, kept, V), and the keys and values where they are asked for.

    Args:
        model: with a language-modelling head.
        ids: new tokens, shape (B, T).
        mask: of the cached tokens and the new ones, shape (B, T' + T).
        kept: columns.
        cache: keys and values of the T' tokens before them.
        use_cache: whether to return those of all tokens.
    """
    parameters = inspect.signature(base_of(model).forward).parameters
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    inputs = with_positions(base_of(model), inputs, past=mask.shape[1] - ids.shape[1])
    name = cache_name(model)
    if name is not None:
        inputs |= {name: cache, "use_cache": use_cache or cache is not None}
    if "logits_to_keep" in parameters:  # a large head runs on those columns alone
        inputs["logits_to_keep"] = kept
    found = model(**inputs)
    return found.logits[:, -kept:], found.get(name) if name else None
