"""What a user fixes about a posterior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from monteclora.posterior import dirichlet, wishart

Estimator = Literal["expected", "sampled"]

__all__ = ["Estimator", "PosteriorSettings"]


@dataclass(frozen=True)
class PosteriorSettings:
    """What is fixed about a posterior, apart from each layer's shape and scale.

    Attributes:
        num_components: N, the number of mixture components.
        covariance: ``diagonal`` or ``full`` Sigma.
        dirichlet: ``exact`` or ``laplace`` law of pi.
        normalised: whether ``E[Sigma] = V`` whatever the rank.
        estimator: of KL_z and ||pi||^2 in the regulariser, ``expected`` or ``sampled``.
        per_example: flipout signs for every example instead of one draw shared by the batch.
        alpha_prior: the prior's concentration; eta starts at its logarithm.
        degrees_of_freedom: nu, at least every layer's rank; None is the rank of each layer.
        kl_weight: weight of the KL terms in the loss.
        coop_weight: weight of the cooperative loss.
    """

    num_components: int = 4
    covariance: wishart.Covariance = "diagonal"
    dirichlet: dirichlet.Approximation = "exact"
    normalised: bool = True
    estimator: Estimator = "expected"
    per_example: bool = False
    alpha_prior: float = 1.0
    degrees_of_freedom: float | None = None
    kl_weight: float = 1e-5
    coop_weight: float = 1.0
