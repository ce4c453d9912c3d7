"""Predictive distributions: sample the posterior, split what is uncertain.

Under S draws with probabilities p_s, mean p: total uncertainty is the entropy H[p], the aleatoric part mean_s H[p_s]
is what the data leave open under every draw, and the epistemic part is their difference, the mutual information
between label and weights (Depeweg et al. 2018), zero when all draws agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from monteclora.adapters.model import active_posteriors, posterior_sampling
from monteclora.errors import ConfigError

__all__ = ["PredictiveDistribution", "class_logits", "evaluating", "predict"]

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class PredictiveDistribution:
    """Predictions for a batch of B inputs over C classes (labels, or the vocabulary).

    Attributes:
        probs: shape (S, B, C), float32, one distribution a posterior draw.
    """

    probs: Tensor

    @property
    def mean(self) -> Tensor:
        """The predictive distribution, shape (B, C)."""
        return self.probs.double().mean(0).float()

    @property
    def total(self) -> Tensor:
        """H[mean_s p_s], shape (B,), float64, nats."""
        return _entropy(self.probs.double().mean(0))

    @property
    def aleatoric(self) -> Tensor:
        """mean_s H[p_s], shape (B,), float64, nats."""
        entropies: Tensor = _entropy(self.probs.double())
        return entropies.mean(0)

    @property
    def epistemic(self) -> Tensor:
        """H[mean_s p_s] - mean_s H[p_s], shape (B,), float64, nats, never negative."""
        probs = self.probs.double()
        mean = probs.mean(0, keepdim=True)
        # as a mean of divergences from the mean: each is non-negative, and equal draws give an exact zero
        divergence = torch.special.xlogy(probs, probs) - torch.special.xlogy(probs, mean)
        same = (probs == probs[:1]).all(0)
        information: Tensor = divergence.mean(0).masked_fill(same, 0.0).sum(-1)
        return information.clamp_min(0.0)


def _entropy(probs: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(probs, probs).sum(-1)
    return entropy


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the block; every module's mode is restored after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def class_logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Logits of the labels, or of the next token after each row's last one, shape (B, C), float32.

    Args:
        model: with a classification or a language-modelling head.
        inputs: what the model takes; rows may be padded on either side if ``attention_mask`` is among them.
    """
    inputs = dict(inputs)
    parameters = inspect.signature(_base(model).forward).parameters
    mask = inputs.get("attention_mask")
    generative = "logits_to_keep" in parameters or _base(model).__class__.__name__.endswith("LMHeadModel")
    if generative and mask is not None and mask.dim() == 2 and "position_ids" in parameters:
        # absolute positions must not count padding on the left
        inputs.setdefault("position_ids", (mask.cumsum(-1) - 1).clamp_min(0))
    logits: Tensor = model(**inputs).logits
    if logits.dim() == 3:
        length = logits.shape[1]
        if mask is None:
            last = torch.full((logits.shape[0],), length - 1, device=logits.device)
        else:
            last = (mask.long() * torch.arange(length, device=mask.device)).argmax(-1).to(logits.device)
        logits = logits[torch.arange(logits.shape[0], device=logits.device), last]
    return logits.float()


def _base(model: nn.Module) -> nn.Module:
    found = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast(nn.Module, found)


def predict(model: nn.Module, batch: Mapping[str, Any], num_samples: int = 16, seed: int = 0) -> PredictiveDistribution:
    """Sample the posterior predictive distribution of labels or next tokens.

    Draw s is the same for every input and every call with this seed: the result for an input depends neither on what
    else is in the batch nor on the global generators, and neither is changed.

    Args:
        model: a model with a MonteCLoRA adapter; its mode (training or not) is as before afterwards.
        batch: what the model takes (``input_ids``, ``attention_mask``, ...), each value of shape (B, ...); labels are
            ignored.
        num_samples: S.
        seed: the stream of draws.

    Returns:
        Probabilities of shape (S, B, C), and their split into aleatoric and epistemic uncertainty.

    Raises:
        ConfigError: the model has no MonteCLoRA adapter, or ``num_samples`` is below 1.
    """
    if num_samples < 1:
        raise ConfigError(f"num_samples is {num_samples}, expected at least 1")
    device = active_posteriors(model)[0].rho.device
    inputs = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
        if key not in ("labels", "label")
    }
    rows = max(value.shape[0] for value in inputs.values() if isinstance(value, Tensor))
    together = max(1, _ROWS_AT_ONCE // rows)
    chunks = []
    with evaluating(model):
        for first in range(0, num_samples, together):
            count = min(together, num_samples - first)
            repeated = {
                key: value.repeat(count, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) else value
                for key, value in inputs.items()
            }
            with posterior_sampling(model, seed, num_samples=count, first=first):
                logits = class_logits(model, repeated)
            chunks.append(logits.softmax(-1).view(count, rows, -1))
    return PredictiveDistribution(torch.cat(chunks))
