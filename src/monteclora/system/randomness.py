"""The global random generators: saved, restored, and left as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch

__all__ = ["generator_states", "preserved_generators", "restore_generators"]


def generator_states() -> dict[str, Any]:
    """The states of the generators of Python, numpy, torch and every CUDA device, of plain types and tensors."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Put every generator into the state that :func:`generator_states` took down."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Whatever the block draws, the generators are afterwards as they were before."""
    states = generator_states()
    try:
        yield
    finally:
        restore_generators(states)
