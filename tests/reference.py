"""The sampler as the paper writes it: Sigma as a dense matrix, N draws z_k, and their sum weighted by pi_k.

Slow, in numpy and float64, and built from nothing that the package uses: a Wishart matrix is a sum of outer products of
Gaussian vectors, Gaussian columns come from its Cholesky factor. Only tests import it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

__all__ = ["Law", "covariances", "draws", "name_of", "weights"]


@dataclass(frozen=True)
class Law:
    """The law of A - mu in one layer (docs/method.md section 1).

    Attributes:
        rho: log standard deviations, r numbers.
        alpha: concentrations, N numbers.
        scale: eps.
        dof: nu, a whole number of at least r.
        columns: n.
        full: whether Sigma is the whole Wishart matrix, or only its diagonal.
        laplace: whether pi has the Laplace approximation's law.
        normalised: whether E[Sigma] = diag(exp(2 rho)).
    """

    rho: tuple[float, ...] = (0.3, -0.5, 0.1)
    alpha: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    scale: float = 0.7
    dof: int = 3
    columns: int = 2
    full: bool = False
    laplace: bool = False
    normalised: bool = True


def name_of(law: Law) -> str:
    """What distinguishes a law's settings, for the names of tests."""
    parts = ("full" if law.full else "diagonal", "laplace" if law.laplace else "exact")
    return "-".join((*parts, "normalised" if law.normalised else "published", str(law.dof)))


def weights(law: Law, count: int, rng: np.random.Generator) -> Array:
    """``pi``, shape (count, N)."""
    alpha = np.array(law.alpha)
    if not law.laplace:
        return rng.dirichlet(alpha, size=count)
    n = len(alpha)
    mean = np.log(alpha) - np.log(alpha).mean()
    variance = (1.0 / alpha) * (1.0 - 2.0 / n) + (1.0 / alpha).sum() / n**2
    logits = mean + np.sqrt(variance) * rng.standard_normal((count, n))
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


def covariances(law: Law, count: int, rng: np.random.Generator) -> Array:
    """``Sigma``, shape (count, r, r): ``sum_d g_d g_d^T`` over nu vectors ``g_d ~ Normal(0, V)``, or V / nu."""
    std = np.exp(np.array(law.rho))
    if law.normalised:
        std = std / np.sqrt(law.dof)
    sigma = np.zeros((count, len(std), len(std)))
    for _ in range(law.dof):
        vector = std * rng.standard_normal((count, len(std)))
        sigma += vector[:, :, None] * vector[:, None, :]
    return sigma if law.full else sigma * np.eye(len(std))


def draws(law: Law, count: int, rng: np.random.Generator) -> Array:
    """``A - mu = eps sum_k pi_k z_k``, shape (count, r, n)."""
    pi = weights(law, count, rng)
    root = np.linalg.cholesky(covariances(law, count, rng))
    total = np.zeros((count, len(law.rho), law.columns))
    for k in range(len(law.alpha)):
        z = root @ rng.standard_normal((count, len(law.rho), law.columns))
        total += pi[:, k, None, None] * z
    return law.scale * total
