"""The KL terms and the cooperative loss of all layers (docs/method.md section 4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from monteclora.posterior import mixture, wishart

__all__ = ["Regulariser", "row_divergences"]


class Regulariser(NamedTuple):
    """The parts of the regulariser (docs/method.md section 4), scalars averaged over layers, and their weights."""

    kl_pi: Tensor
    kl_sigma: Tensor
    kl_z: Tensor
    coop: Tensor
    kl_weight: float
    coop_weight: float

    def detach(self) -> Regulariser:
        """The same numbers without gradient."""
        parts = (self.kl_pi.detach(), self.kl_sigma.detach(), self.kl_z.detach(), self.coop.detach())
        return Regulariser(*parts, self.kl_weight, self.coop_weight)

    @property
    def kl(self) -> Tensor:
        """KL_pi + KL_Sigma + KL_z, in nats."""
        return self.kl_pi + self.kl_sigma + self.kl_z

    @property
    def loss(self) -> Tensor:
        """What is added to the task's loss, once for each optimiser step."""
        return self.kl_weight * self.kl + self.coop_weight * self.coop


class _RowDivergences(torch.autograd.Function):
    """:func:`row_divergences` with its gradient in closed form: two operations instead of the graph of twenty."""

    @staticmethod
    def forward(
        ctx: Any, rho: Tensor, nu: Tensor, row_squared_norm: Tensor, row_log_determinant: Tensor, num: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rho, nu, row_squared_norm)
        ctx.num = num
        kl_z = mixture.kl_divergence_terms(rho, row_squared_norm, row_log_determinant, num)
        return wishart.kl_divergence(rho, nu), kl_z.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sigma: Tensor, grad_z: Tensor) -> tuple[Tensor, None, None, None, None]:
        rho, nu, row_squared_norm = ctx.saved_tensors
        # docs/method.md section 4: d/d rho_i of nu/2 (exp(2 rho_i) - 2 rho_i) is nu (exp(2 rho_i) - 1), that of
        # N/2 (q_i exp(2 rho_i) - 2 rho_i) is N (q_i exp(2 rho_i) - 1) with q_i the squared norm; all of shape (R,)
        sigma = grad_sigma * nu * torch.expm1(2.0 * rho)
        return sigma + grad_z * ctx.num * torch.expm1(2.0 * rho + row_squared_norm.log()), None, None, None, None


def row_divergences(
    rho: Tensor, nu: Tensor, row_squared_norm: Tensor, row_log_determinant: Tensor, num: int
) -> tuple[Tensor, Tensor]:
    """``KL_Sigma`` and ``KL_z`` summed over all rows, differentiable once, in ``rho`` only.

    Args:
        rho: log standard deviations of the rows of all layers, shape (R,).
        nu: degrees of freedom, shape (R,).
        row_squared_norm: shape (R,), see :func:`mixture.kl_divergence_terms`.
        row_log_determinant: shape (R,), likewise.
        num: N, the number of mixture components.

    Returns:
        Two scalars, nats, never negative (docs/method.md section 4).
    """
    divergences: tuple[Tensor, Tensor] = _RowDivergences.apply(rho, nu, row_squared_norm, row_log_determinant, num)
    return divergences
