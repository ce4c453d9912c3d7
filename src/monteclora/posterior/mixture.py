"""The collapsed mixture: one draw instead of N (docs/method.md section 2).

Given ``Sigma = L L^T`` and ``pi``, the weighted sum of N independent Gaussian columns is one Gaussian column, so

    ``A = mu + eps ||pi||_2 L Xi``,    ``Xi`` standard normal of the shape of ``A``.

Exactly in distribution, at a cost that does not depend on N.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from monteclora.posterior import wishart
from monteclora.posterior.settings import Covariance

__all__ = ["kl_divergence_terms", "log_determinant_constants"]


def log_determinant_constants(nu: float, rank: int, *, covariance: Covariance, normalised: bool) -> list[float]:
    """``E[log|Sigma|] - 2 sum(rho)`` spread over the r rows: r Python floats (docs/method.md section 3)."""
    shift = math.log(nu) if normalised else 0.0
    return [value - shift for value in wishart.bartlett_log_diagonal_mean(nu, rank, covariance)]


def kl_divergence_terms(rho: Tensor, row_squared_norm: Tensor, row_log_determinant: Tensor, num: int) -> Tensor:
    """The summands of ``KL_z = N/2 (tr Sigma - log|Sigma| - r)``, one for each row (docs/method.md section 4).

    Args:
        rho: log standard deviations, shape (..., r).
        row_squared_norm: shape (..., r): ``c/nu ||T_i||^2`` of the draw, or its expectation ``c``.
        row_log_determinant: shape (..., r): ``log(c/nu T_ii^2)`` of the draw, or its expectation.
        num: N, the number of mixture components.

    Returns:
        Shape (..., r), nats, never negative: ``row_squared_norm`` is at least ``exp(row_log_determinant)``.
    """
    # as x - 1 - log x of x = Sigma_ii, by expm1 of log x: near the prior the difference is far below float32's rounding
    # of its terms. What is left is the distance of log|Sigma| from its bound, Hadamard's or Jensen's
    log_squared_norm = row_squared_norm.log()
    log_variance = 2.0 * rho + log_squared_norm
    variance_part = (torch.expm1(log_variance) - log_variance).clamp_min(0.0)
    return num / 2.0 * (variance_part + (log_squared_norm - row_log_determinant).clamp_min(0.0))
