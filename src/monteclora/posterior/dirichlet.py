"""The mixture weights ``pi ~ Dirichlet(exp(eta))`` (docs/method.md sections 1 to 4).

Two laws are offered. ``exact`` is the Dirichlet, by normalised Gamma draws with their implicit derivative. ``laplace``
is its Laplace approximation in softmax space (Srivastava & Sutton 2017), which the published code uses.

Differs from ``torch.distributions.Dirichlet.rsample``: the draw is made in log space from ``Gamma(alpha + 1)`` and an
exponential variable, ``log Gamma(alpha) = log Gamma(alpha + 1) - E / alpha`` in law. A concentration of 1e-3 then
neither underflows nor loses its gradient; both factors carry their exact pathwise derivative.

The last axis is the component axis of length N; any axes before it are batch axes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from monteclora.posterior.settings import Approximation
from monteclora.posterior.torch_private import standard_gamma, standard_gamma_derivative

__all__ = [
    "Raw",
    "kl_divergence",
    "log_norm",
    "log_norm_with_gradient",
    "log_weights",
    "mean_squared_norm",
    "raw",
]


class Raw(NamedTuple):
    """Raw draws, all of shape (..., N) and without gradient.

    ``exact``: ``gamma ~ Gamma(alpha + 1)``, its implicit derivative with respect to ``alpha``, and a standard
    exponential. ``laplace``: standard normals in ``gamma``, the others are None.
    """

    gamma: Tensor
    gamma_grad: Tensor | None
    exponential: Tensor | None


@torch.no_grad()
def raw(eta: Tensor, approximation: Approximation = "exact", generator: torch.Generator | None = None) -> Raw:
    """Draw what :func:`log_weights` needs, at the current ``eta``.

    Args:
        eta: log concentrations, shape (..., N), float32 or float64.
        approximation: which law.
        generator: the source of randomness, on the device of ``eta``.
    """
    if approximation == "laplace":
        normal = torch.randn(eta.shape, dtype=eta.dtype, device=eta.device, generator=generator)
        return Raw(normal, None, None)
    shape = eta.exp() + 1.0
    gamma = standard_gamma(shape, generator)
    exponential = torch.empty_like(shape).exponential_(generator=generator)
    return Raw(gamma, standard_gamma_derivative(shape, gamma), exponential)


def _laplace_variance(inverse: Tensor) -> Tensor:
    """Variance of the Laplace approximation's logits from ``1 / alpha``, shape (..., N) (docs/method.md section 2)."""
    count = inverse.shape[-1]
    return inverse * (1.0 - 2.0 / count) + inverse.sum(-1, keepdim=True) / count**2


def _logits(eta: Tensor, draw: Raw) -> Tensor:
    """Unnormalised log weights, shape (..., N), differentiable in ``eta``."""
    if eta.shape[-1] == 1:
        # one component has weight 1 whatever its logit; Laplace's variance is 0 there, where its root has no derivative
        return eta
    alpha = eta.exp()
    if draw.gamma_grad is None or draw.exponential is None:
        return eta - eta.mean(-1, keepdim=True) + _laplace_variance(1.0 / alpha).sqrt() * draw.gamma
    # pathwise: the value is the draw's, the gradient its implicit derivative (docs/method.md section 7)
    gamma = draw.gamma + draw.gamma_grad * (alpha - alpha.detach())
    return gamma.log() - draw.exponential / alpha


def log_weights(eta: Tensor, draw: Raw) -> Tensor:
    """``log pi``, shape (..., N), differentiable in ``eta``; the weights sum to 1, and N = 1 gives 0.

    Args:
        eta: log concentrations, shape (..., N), with the values they had when ``draw`` was made.
        draw: from :func:`raw`.
    """
    return _logits(eta, draw).log_softmax(-1)


def log_norm(eta: Tensor, draw: Raw) -> Tensor:
    """``log ||pi||_2``, shape (...), differentiable in ``eta``: between ``-log(N)/2`` and 0."""
    return 0.5 * (2.0 * log_weights(eta, draw)).logsumexp(-1)


@torch.no_grad()
def log_norm_with_gradient(eta: Tensor, draw: Raw) -> tuple[Tensor, Tensor]:
    """:func:`log_norm` and its derivative in ``eta``, without a graph (docs/method.md sections 2 and 7).

    In a logit ``l_k`` the derivative is ``pi_k^2 / ||pi||^2 - pi_k``. Exact: ``l_k = log g_k - E_k / alpha_k``, so that
    ``d l_k / d eta_k = alpha_k g'_k / g_k + E_k / alpha_k``. Laplace: ``l_k = eta_k - avg(eta) + z_k sqrt(var_k)``.

    Args:
        eta: log concentrations, shape (..., N), with the values they had when ``draw`` was made.
        draw: from :func:`raw`.

    Returns:
        ``log ||pi||_2``, shape (...), and the derivative, shape (..., N), zero for N = 1.
    """
    log_pi = log_weights(eta, draw)
    log_squares = 2.0 * log_pi
    value, count = 0.5 * log_squares.logsumexp(-1), eta.shape[-1]
    if count == 1:
        return value, torch.zeros_like(eta)
    # in the logits, of which a common shift changes nothing: these sum to zero
    gradient = log_squares.softmax(-1) - log_pi.exp()
    if draw.gamma_grad is not None and draw.exponential is not None:
        alpha = eta.exp()
        return value, gradient * (alpha * draw.gamma_grad / draw.gamma + draw.exponential / alpha)
    inverse = (-eta).exp()
    half = 0.5 * gradient * draw.gamma * _laplace_variance(inverse).rsqrt()
    return value, gradient - inverse * (half * (1.0 - 2.0 / count) + half.sum(-1, keepdim=True) / count**2)


def _alpha(eta: Tensor) -> Tensor:
    """Concentrations in the precision of the special functions: float64 where the device has it."""
    return (eta if eta.device.type == "mps" else eta.double()).exp()


class _Divergence(torch.autograd.Function):
    """:func:`kl_divergence` with its gradient in closed form (docs/method.md section 4), of eta, shape (..., N).

    With ``e_k = alpha_k - prior`` it is ``alpha_k (e_k trigamma(alpha_k) - sum_j e_j trigamma(alpha_0))`` in ``eta_k``.
    Most of its time goes into special functions, of which autograd would take two more for each component.
    """

    @staticmethod
    def forward(ctx: Any, eta: Tensor, prior: float) -> Tensor:
        ctx.save_for_backward(eta)
        ctx.prior = prior
        alpha = _alpha(eta)
        total = alpha.sum(-1)
        normaliser = total.lgamma() - alpha.lgamma().sum(-1)
        priors = alpha.new_full((alpha.shape[-1],), prior)
        # the very operations of the line above, so that the divergence of the prior from itself is zero
        constant = priors.sum(-1).lgamma() - priors.lgamma().sum(-1)
        log_mean = alpha.digamma() - total.digamma().unsqueeze(-1)
        divergence = normaliser - constant + ((alpha - prior) * log_mean).sum(-1)
        # the clamp takes away rounding at alpha = prior, where the divergence and its gradient are zero
        return divergence.clamp_min_(0.0).to(eta.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (eta,) = ctx.saved_tensors
        alpha, trigamma = _alpha(eta), torch.special.polygamma
        excess, total = alpha - ctx.prior, alpha.sum(-1)
        gradient = excess * trigamma(1, alpha) - (excess.sum(-1) * trigamma(1, total)).unsqueeze(-1)
        return grad.unsqueeze(-1) * (gradient * alpha).to(eta.dtype), None


def kl_divergence(eta: Tensor, prior: float = 1.0) -> Tensor:
    """``KL(Dirichlet(exp(eta)) || Dirichlet(prior, ..., prior))``, docs/method.md section 4.

    Args:
        eta: log concentrations, shape (..., N).
        prior: the prior's concentration, the same for every component.

    Returns:
        Shape (...), nats, never negative, in the dtype of ``eta`` (computed in float64 where the device has it);
        differentiable once.
    """
    divergence: Tensor = _Divergence.apply(eta, prior)
    return divergence


class _SquaredNorm(torch.autograd.Function):
    """``S = E||pi||^2``, shape (...), of eta, shape (..., N) (docs/method.md section 3); gradient in closed form.

    ``d S / d eta_k = E[pi_k] (2 alpha_k + 1 - S (2 alpha_0 + 1)) / (alpha_0 + 1)``: on so few numbers autograd's graph
    of a dozen operations takes longer.
    """

    @staticmethod
    def forward(ctx: Any, eta: Tensor) -> Tensor:
        total, weights = eta.logsumexp(-1).exp(), eta.softmax(-1)
        alpha = eta.exp()
        squared_norm = (weights * (alpha + 1.0)).sum(-1) / (total + 1.0)
        ctx.save_for_backward(alpha, weights, total, squared_norm)
        return squared_norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        alpha, weights, total, squared_norm = ctx.saved_tensors
        excess = 2.0 * alpha + 1.0 - (squared_norm * (2.0 * total + 1.0)).unsqueeze(-1)
        gradient: Tensor = (grad / (total + 1.0)).unsqueeze(-1) * weights * excess
        return gradient


def mean_squared_norm(eta: Tensor) -> Tensor:
    """``E||pi||^2 = sum alpha_k (alpha_k + 1) / (alpha_0 (alpha_0 + 1))`` of the exact Dirichlet.

    docs/method.md section 3.

    Args:
        eta: log concentrations, shape (..., N).

    Returns:
        Shape (...), differentiable once.
    """
    value: Tensor = _SquaredNorm.apply(eta)
    return value
