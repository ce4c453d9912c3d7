"""The formulas of docs/method.md sections 2 and 3, one by one and differentiable, from the package's raw draws.

The package itself never forms ``L``, ``pi`` or ``A - mu`` of one layer: it fills a flat buffer with the noise of all
layers. What it fills it with is tested against these, and these against the slow reference in tests/reference.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from monteclora.posterior import dirichlet, wishart
from monteclora.posterior.settings import Covariance

__all__ = ["WishartMoments", "draw", "variance", "weights", "wishart_factor", "wishart_moments"]


class WishartMoments(NamedTuple):
    """``E[tr Sigma]`` and ``E[log|Sigma|]``, both of shape (...)."""

    trace: Tensor
    log_determinant: Tensor


def weights(eta: Tensor, raw: dirichlet.Raw) -> Tensor:
    """``pi``, shape (..., N)."""
    return dirichlet.log_weights(eta, raw).exp()


def wishart_factor(rho: Tensor, raw: Tensor, nu: float | Tensor, *, normalised: bool = True) -> Tensor:
    """The diagonal of ``L``, shape (..., r), from chi-square draws; ``L``, (..., r, r), from Bartlett factors."""
    root_c = torch.as_tensor(nu, dtype=rho.dtype, device=rho.device).rsqrt() if normalised else rho.new_ones(())
    std = rho.exp() * root_c
    return std.unsqueeze(-1) * raw if raw.dim() > rho.dim() else std * raw.sqrt()


def wishart_moments(
    rho: Tensor, nu: float, *, covariance: Covariance = "diagonal", normalised: bool = True
) -> WishartMoments:
    """``E[tr Sigma] = c tr V`` and ``E[log|Sigma|]``, of rho, shape (..., r)."""
    rank = rho.shape[-1]
    log_diagonal = sum(wishart.bartlett_log_diagonal_mean(nu, rank, covariance))
    c = 1.0 if normalised else nu
    return WishartMoments(
        trace=c * (2.0 * rho).exp().sum(-1),
        log_determinant=2.0 * rho.sum(-1) + log_diagonal - (rank * math.log(nu) if normalised else 0.0),
    )


def draw(mu: Tensor, scale: float | Tensor, pi: Tensor, factor: Tensor, xi: Tensor) -> Tensor:
    """``A = mu + eps ||pi|| L Xi``, shape (r, n), of weights (N,), L (r, r) or its diagonal (r,), Xi (r, n)."""
    noise = factor.unsqueeze(-1) * xi if factor.dim() == 1 else factor @ xi
    norm: Tensor = torch.linalg.vector_norm(pi)
    return mu + scale * norm * noise


def variance(rho: Tensor, eta: Tensor, scale: float | Tensor, nu: float, *, normalised: bool = True) -> Tensor:
    """``Var(A_ij) = eps^2 E||pi||^2 c exp(2 rho_i)``, shape (..., r), one for all columns."""
    c = 1.0 if normalised else nu
    squared_norm = dirichlet.mean_squared_norm(eta)
    return scale**2 * squared_norm.unsqueeze(-1) * c * (2.0 * rho).exp()
