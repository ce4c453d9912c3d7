"""``training.temperature``: how confident a classifier is, fitted to the validation rows and kept in its head.

Temperature scaling (Guo et al. 2017, arXiv 1706.04599, section 4.2) divides the logits by T. Here the head is divided,
weights and bias, so that whatever loads the adapter has the same probabilities, and draws of its posterior too.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from monteclora.errors import ConfigError
from monteclora.metrics.calibration import fitted_temperature
from monteclora.runs.prepare import PreparedData
from monteclora.runs.recipe import TrainingSpec
from monteclora.training.assembly import precision_of, validation_of
from monteclora.training.sharding import reshard

__all__ = ["Tempered", "head_of", "temper"]

_LOW_RANK = ("lora_A", "lora_B")  # as wide as the head where the rank is the number of classes
_TOLERANCE = 0.05  # of the largest logit: what bf16 makes of it


@dataclass(frozen=True)
class Tempered:
    """A classifier's validation after its head was divided.

    Attributes:
        temperature: T; above 1 it was too confident.
        metrics: of the validation rows, by name.
    """

    temperature: float
    metrics: dict[str, float]


def head_of(model: nn.Module, trained: Collection[str], classes: int) -> str:
    """The name of the linear layer that gives a classifier's logits: the last one that is trained and as wide.

    Args:
        model: as it begins to train.
        trained: names of the parameters that the run trains.
        classes: how many there are.

    Raises:
        ConfigError: there is none.
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and f"{name}.weight" in trained
        and module.out_features == classes
        and not any(part in name.split(".") for part in _LOW_RANK)
    ]
    if not found:
        raise ConfigError(
            f"training.temperature is true, and no linear layer that is trained gives the {classes} logits",
            "Set it to false, and evaluate and predict with --calibrator temperature.",
        )
    return found[-1]


def temper(model: nn.Module, head: str, spec: TrainingSpec, data: PreparedData) -> Tempered | None:
    """Divide the head by the temperature that suits the validation rows best; the same on every process.

    None where the logits do not follow, as those of a head whose linear layer is not the last thing in it: the model is
    left as it was.

    Args:
        model: a classifier with the weights to keep.
        head: see :func:`head_of`.
        spec, data: that it was trained by.
    """
    validation = validation_of(spec, data, model)
    assert validation is not None  # the recipe's check
    device = next(model.parameters()).device
    precision = precision_of(spec.precision, device)
    logits, labels = validation.predictions(model, device, precision(), lambda: False)
    assert labels is not None
    temperature = fitted_temperature(logits, labels)
    reshard(model)  # what a forward pass has gathered of a sharded model is a copy
    parts = list(model.get_submodule(head).parameters())
    before = [part.detach().clone() for part in parts]
    with torch.no_grad():
        for part in parts:
            part.div_(temperature)
    after, _ = validation.predictions(model, device, precision(), lambda: False)
    if not np.allclose(after * temperature, logits, rtol=0.0, atol=_TOLERANCE * float(np.abs(logits).max())):
        reshard(model)
        with torch.no_grad():
            for part, value in zip(parts, before, strict=True):
                part.copy_(value)
        return None
    return Tempered(temperature, data.measures.compute(after, labels))
