"""The pretrained model kept in memory between runs that start from the same one."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from monteclora.system.randomness import generator_states, restore_generators

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["kept_base_model", "kept_or_loaded"]

_SHARE = 8  # of the memory that is free, a model that is kept takes at most one part in this many


@dataclass
class _Slot:
    """One model as it was loaded, which nothing else ever touches, and the generators after loading."""

    key: Hashable = None
    model: PreTrainedModel | None = None
    generators: dict[str, Any] | None = None


_slot: ContextVar[_Slot | None] = ContextVar("kept_base_model", default=None)


@contextmanager
def kept_base_model() -> Iterator[None]:
    """Inside the block the last model loaded stays in memory, and a run that needs the same one gets a copy of it.

    A copy is as good as a model that was loaded: weights, buffers and a head drawn from the same seed are equal, and so
    are the global generators afterwards.
    """
    token = _slot.set(_Slot())
    try:
        yield
    finally:
        _slot.reset(token)


def kept_or_loaded(key: Hashable, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model of one's own: a copy of the one that is kept where that has the same key, else a loaded one.

    Args:
        key: of all that the model depends on, the seed of its head included.
        load: loads it; draws from generators that it seeds itself.
    """
    slot = _slot.get()
    if slot is None:
        return load()
    if slot.model is None or slot.generators is None or slot.key != key:
        slot.model, slot.generators = None, None  # before there are two
        model = load()
        if not _is_small(model):
            return model
        slot.key, slot.model, slot.generators = key, model, generator_states()
    restore_generators(slot.generators)
    return copy.deepcopy(slot.model)


def _is_small(model: PreTrainedModel) -> bool:
    """Whether a second copy is little of what memory is free."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return False
    tensors = [*model.parameters(), *model.buffers()]
    return _SHARE * sum(tensor.numel() * tensor.element_size() for tensor in tensors) < free
