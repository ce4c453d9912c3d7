"""Which heads of transformers ignore the number of items in the step: known by their class, verified by a probe.

Such a head takes the mean of its batch, and the Trainer, which has handed it the number of items in all the accumulated
batches, does not divide by the number of batches either: the gradient is multiplied by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from monteclora.system.modes import evaluating
from monteclora.system.randomness import preserved_generators

__all__ = ["ignores_count", "is_library_head"]

_CLASSIFIERS = {
    *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
    *MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(),
}


def is_library_head(model: Any) -> bool:
    """Whether ``model`` is a sequence or token classifier of transformers, with transformers' loss."""
    kind = type(model)
    modules = (kind.__module__, model.loss_function.__module__) if kind.__name__ in _CLASSIFIERS else ("",)
    return all(module.startswith("transformers.") for module in modules)


def ignores_count(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the model's loss is the same for one item in the step and for two: one that is divided by them halves."""
    # labels that all count: a batch may have none that does
    probe = {**inputs, "labels": torch.zeros_like(inputs["labels"])}
    losses: list[Tensor] = []
    with preserved_generators(), evaluating(model):
        for count in (1, 2):
            outputs = model(**probe, num_items_in_batch=torch.tensor(count, device=probe["labels"].device))
            losses.append(outputs["loss"] if isinstance(outputs, dict) else outputs[0])
    return bool(torch.isclose(losses[0], losses[1], rtol=1e-2).all())
