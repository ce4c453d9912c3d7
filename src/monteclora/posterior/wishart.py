"""The Wishart factor: ``Sigma = L L^T`` with ``L = diag(exp(rho)) T`` (docs/method.md sections 1 to 4).

``Sigma ~ Wishart_r(c V / nu, nu)`` with ``V = diag(exp(2 rho))``; ``c = 1`` is the normalised law, for which
``E[Sigma] = V``, and ``c = nu`` is the published one. No covariance matrix is ever formed and no Cholesky
factorisation is ever taken: a draw *is* its factor ``T``, and ``T`` does not depend on any parameter.

All functions are written for one or many layers at once: the last axis is the rank axis, any axes before it are
batch axes, and where a sum over that axis is left to the caller the name ends in ``_terms``.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from monteclora.posterior.settings import Covariance
from monteclora.posterior.torch_private import standard_gamma

__all__ = [
    "bartlett_log_diagonal_mean",
    "kl_divergence",
    "kl_divergence_terms",
    "raw_bartlett",
    "raw_chi_square",
]


def raw_chi_square(nu: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw independent chi-square variables.

    Args:
        nu: degrees of freedom, shape (...), float32 or float64, positive.
        generator: the source of randomness, on the device of ``nu``.

    Returns:
        Shape (...), the dtype of ``nu``, strictly positive. The diagonal of Wishart(I, nu) has this law
        (docs/method.md section 2).
    """
    draw = 2.0 * standard_gamma(nu / 2.0, generator)
    return draw.clamp_min(torch.finfo(nu.dtype).tiny)


def raw_bartlett(nu: float, rank: int, count: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw Bartlett factors of Wishart(I, nu): lower triangular ``T`` with ``T T^T ~ Wishart_r(I, nu)``.

    ``T_ii = sqrt(chi2_{nu - i + 1})`` with i from 1 and standard normals below the diagonal (docs/method.md section 2).

    Args:
        nu: degrees of freedom, at least ``rank``.
        rank: r.
        count: how many independent factors.
        like: gives dtype (float32 or float64) and device.
        generator: the source of randomness, on that device.

    Returns:
        Shape (count, r, r).
    """
    dof = nu - torch.arange(rank, dtype=like.dtype, device=like.device)
    diagonal = raw_chi_square(dof.expand(count, rank).contiguous(), generator).sqrt()
    factor = torch.randn(count, rank, rank, dtype=like.dtype, device=like.device, generator=generator)
    return factor.tril(-1) + torch.diag_embed(diagonal)


def kl_divergence_terms(rho: Tensor, nu: float | Tensor) -> Tensor:
    """The summands of :func:`kl_divergence`, shape (..., r); each is non-negative."""
    # expm1 keeps the difference exact where V is close to the prior, and the clamp takes away the last rounding
    return nu / 2.0 * (torch.expm1(2.0 * rho) - 2.0 * rho).clamp_min(0.0)


def kl_divergence(rho: Tensor, nu: float | Tensor) -> Tensor:
    """``KL(Wishart(V, nu) || Wishart(I, nu)) = nu/2 (tr V - log|V| - r)``, docs/method.md section 4.

    The same formula holds when both are normalised.

    Args:
        rho: log standard deviations, shape (..., r).
        nu: degrees of freedom, a number or broadcastable to ``rho``.

    Returns:
        Shape (...), nats, never negative.
    """
    return kl_divergence_terms(rho, nu).sum(-1)


@functools.cache
def bartlett_log_diagonal_mean(nu: float, rank: int, covariance: Covariance) -> tuple[float, ...]:
    """``E[log T_ii^2]`` for i = 1..r: ``log 2 + digamma((nu - i + 1)/2)``, or ``log 2 + digamma(nu/2)`` if diagonal.

    docs/method.md section 3. Returns r Python floats (computed in float64).
    """
    # on the CPU by name: the default device is "meta" while a model without weights is being built
    steps = torch.arange(rank, dtype=torch.float64, device="cpu") * (covariance == "full")
    return tuple((math.log(2.0) + torch.digamma((nu - steps) / 2.0)).tolist())
