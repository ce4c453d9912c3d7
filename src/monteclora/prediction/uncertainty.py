"""What S draws agree on and what they do not, in nats (Depeweg et al. 2018).

With probabilities p_s and their mean p, total uncertainty is the entropy H[p]. Its aleatoric part, mean_s H[p_s], is
what the data leave open under every draw. Its epistemic part is the rest: the mutual information between label and
weights, zero where all draws agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["aleatoric", "epistemic", "total"]


def total(probs: Tensor) -> Tensor:
    """H[mean_s p_s], shape (B,), float64, nats, of ``probs``, shape (S, B, C)."""
    return _entropy(probs.double().mean(0))


def aleatoric(probs: Tensor) -> Tensor:
    """mean_s H[p_s], shape (B,), float64, nats, of ``probs``, shape (S, B, C)."""
    return _entropy(probs.double()).mean(0)


def epistemic(probs: Tensor) -> Tensor:
    """H[mean_s p_s] - mean_s H[p_s], shape (B,), float64, nats, never negative, of ``probs``, shape (S, B, C)."""
    probs = probs.double()
    mean = probs.mean(0, keepdim=True)
    # as a mean of divergences from the mean: each is non-negative, and equal draws give an exact zero
    divergence = torch.special.xlogy(probs, probs) - torch.special.xlogy(probs, mean)
    same = (probs == probs[:1]).all(0)
    information: Tensor = divergence.mean(0).masked_fill(same, 0.0).sum(-1)
    return information.clamp_min(0.0)


def _entropy(probs: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(probs, probs).sum(-1)
    return entropy
