"""The last hidden states of a model while it answers, and two views of a row that they give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from monteclora.errors import ConfigError
from monteclora.prediction.forward import base_of, text_mask

__all__ = ["Watched", "mean_of_tokens", "views", "watching"]


@dataclass
class Watched:
    """What the latest forward pass of a model under :func:`watching` left behind.

    Attributes:
        arguments: what the model's inputs need besides, for its hidden states to be seen.
        kept: these states, until :meth:`states` is asked for them.
    """

    arguments: dict[str, Any]
    kept: list[Tensor] = field(default_factory=list)

    def states(self, length: int) -> Tensor:
        """The last hidden states of the latest pass, (B, T, D), without virtual tokens before the row's T."""
        return self.kept.pop()[:, -length:]


@contextmanager
def watching(model: nn.Module) -> Iterator[Watched]:
    """Keep the last hidden states of each forward pass in the block, at no further cost.

    Of a model of transformers they are what its part below the head gives; another one is asked for all its hidden
    states. Of an ensemble they are the first member's.

    Raises:
        ConfigError: in the block, a model gives no hidden states.
    """
    base = base_of(model)
    body = getattr(base, "base_model", base)
    # transformers' own heads read what is below them; how others come by their states is not known
    below = isinstance(body, nn.Module) and body is not base and type(base).__module__.startswith("transformers.")
    watched = Watched({} if below else {"output_hidden_states": True})

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        watched.kept[:] = [_last(output, below, type(base).__name__)]

    handle = (body if below else base).register_forward_hook(keep)
    try:
        yield watched
    finally:
        handle.remove()


def _last(output: Any, below: bool, name: str) -> Tensor:
    if below:
        states = getattr(output, "last_hidden_state", output[0])
    else:
        states = (getattr(output, "hidden_states", None) or (None,))[-1]
    if not isinstance(states, Tensor) or states.dim() != 3:
        raise ConfigError(f"{name} gives no hidden states, which novelty is measured on", "Leave novelty out.")
    return states


def views(model: nn.Module, states: Tensor, batch: dict[str, Any]) -> Tensor:
    """Two views of each row, float64 (B, 2 D), each scaled to length 1, of its hidden states (B, T, D).

    They are the mean over the row's tokens, and the state of its first token, or of its last one where the model reads
    from left to right.
    """
    mask = _mask(model, states, batch).bool()
    places = torch.arange(states.shape[1], device=states.device)
    if _reads_both_ways(model):
        read = torch.where(mask, places, states.shape[1]).amin(1)
    else:
        read = torch.where(mask, places, -1).amax(1)
    token = states[torch.arange(len(states), device=states.device), read].double()
    return torch.cat(
        [nn.functional.normalize(part, dim=1) for part in (mean_of_tokens(model, states, batch), token)], 1
    )


def mean_of_tokens(model: nn.Module, states: Tensor, batch: dict[str, Any]) -> Tensor:
    """The mean of hidden states (B, T, D) over the tokens of each row, float64 (B, D)."""
    mask = _mask(model, states, batch).unsqueeze(-1).double()
    return (states.double() * mask).sum(1) / mask.sum(1)


def _mask(model: nn.Module, states: Tensor, batch: dict[str, Any]) -> Tensor:
    """Which states are of tokens, (B, T): an encoder-decoder's, which shifts its input by a place, as its input's."""
    mask = text_mask(base_of(model), batch)
    return (batch["attention_mask"] if mask is None else mask).to(states.device)


def _reads_both_ways(model: nn.Module) -> bool:
    """Whether the first token's state depends on those after it: the model is an encoder, or no text model we know."""
    import transformers

    config = getattr(base_of(model), "config", None)
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return encoder or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
