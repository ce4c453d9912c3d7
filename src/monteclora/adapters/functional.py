"""LoRA with a drawn A as one differentiable operation.

Computed from the pieces of a draw, so that neither the drawn ``A`` nor a second copy of the input is kept for the
backward pass, and ``rho`` and ``eta`` get their gradient from what the backward pass computes for ``A`` anyway:
with ``A = mu + row_scale xi`` and ``v_i = sum_j (dL/dA)_ij xi_ij``, row_scale is proportional to ``exp(rho_i)`` and to
``||pi||``, hence ``dL/drho_i = row_scale_i v_i`` and ``dL/deta = (d log||pi|| / d eta) sum_i row_scale_i v_i``
(METHOD.md sections 2 and 7).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monteclora.errors import ConfigError
from monteclora.posterior import LayerDraw

__all__ = ["DrawnLoRA", "drawn_lora", "grouped_lora"]


def _drawn(mu: Tensor, xi: Tensor, row_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``A`` in the dtype of the matmuls; the noise is added before rounding to it."""
    return torch.addcmul(mu.to(xi.dtype), xi, row_scale.unsqueeze(-1)).to(dtype)


class DrawnLoRA(torch.autograd.Function):
    """``result + scaling * B (A x)`` with ``A = mu + row_scale xi``, shared or per example (flipout).

    Shapes: x (T, n) or, per example, (B, T, n); result (..., m) likewise; mu (r, n); weight_b (m, r); rho (r,); eta
    (N,); xi (r, n); row_scale (r,); log_norm_grad (N,); sign_in (B, n) and sign_out (B, r) or None; token a scalar.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        result: Tensor,
        mu: Tensor,
        weight_b: Tensor,
        rho: Tensor,
        eta: Tensor,
        xi: Tensor,
        row_scale: Tensor,
        log_norm_grad: Tensor,
        sign_in: Tensor | None,
        sign_out: Tensor | None,
        token: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """See the class."""
        x, b = x.to(dtype), weight_b.to(dtype)
        if sign_in is None or sign_out is None:
            hidden = x @ _drawn(mu, xi, row_scale, dtype).t()
        else:
            delta = (xi * row_scale.unsqueeze(-1)).to(dtype)
            signed = (x * sign_in.to(dtype).unsqueeze(1)) @ delta.t()
            hidden = x @ mu.to(dtype).t() + signed * sign_out.to(dtype).unsqueeze(1)
        ctx.save_for_backward(
            x, hidden, mu, weight_b, rho, eta, xi, row_scale, log_norm_grad, sign_in, sign_out, token
        )
        ctx.scaling, ctx.result_dtype = scaling, result.dtype
        if not torch.compiler.is_compiling():
            ctx.index = int(token)
        if result.dtype == dtype:
            flat = torch.addmm(result.flatten(0, -2), hidden.flatten(0, -2), b.t(), alpha=scaling)
            return flat.view(result.shape)
        return result + (hidden @ b.t()) * scaling

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """See the module's head note for the gradients of rho and eta."""
        x, hidden, mu, weight_b, rho, eta, xi, row_scale, log_norm_grad, sign_in, sign_out, token = ctx.saved_tensors
        if not torch.compiler.is_compiling() and int(token) != ctx.index:
            raise RuntimeError(
                f"activation checkpointing recomputed a layer under noise draw {int(token)} while its forward pass used "
                f"draw {ctx.index}: run the backward pass before the next training forward, or checkpoint through the "
                "model's gradient_checkpointing_enable()"
            )
        needs = ctx.needs_input_grad
        low = grad.to(x.dtype)
        grad_b = grad_mu = grad_rho = grad_eta = grad_x = None
        if needs[3]:
            grad_b = (low.flatten(0, -2).t() @ hidden.flatten(0, -2) * ctx.scaling).to(weight_b.dtype)
        grad_hidden = (low @ weight_b.to(x.dtype)) * ctx.scaling
        flat_x, flat_hidden = x.flatten(0, -2), grad_hidden.flatten(0, -2)
        if sign_in is None:
            grad_a = flat_hidden.t() @ flat_x if needs[2] or needs[4] or needs[5] else None
            grad_delta = grad_a
            if needs[0]:
                grad_x = grad_hidden @ _drawn(mu, xi, row_scale, x.dtype)
        else:
            signed_hidden = grad_hidden * sign_out.to(x.dtype).unsqueeze(1)
            into = sign_in.to(x.dtype).unsqueeze(1)
            grad_a = flat_hidden.t() @ flat_x if needs[2] else None
            grad_delta = (
                signed_hidden.flatten(0, -2).t() @ (x * into).flatten(0, -2) if needs[4] or needs[5] else None
            )
            if needs[0]:
                delta = (xi * row_scale.unsqueeze(-1)).to(x.dtype)
                grad_x = grad_hidden @ mu.to(x.dtype) + (signed_hidden @ delta) * into
        if grad_a is not None and needs[2]:
            grad_mu = grad_a.to(mu.dtype)
        if grad_delta is not None and (needs[4] or needs[5]):
            scaled = row_scale * (grad_delta.to(xi.dtype) * xi).sum(-1)
            grad_rho = scaled.to(rho.dtype) if needs[4] else None
            grad_eta = (log_norm_grad * scaled.sum()).to(eta.dtype) if needs[5] else None
        grad_result = grad.to(ctx.result_dtype) if needs[1] else None
        return grad_x, grad_result, grad_mu, grad_b, grad_rho, grad_eta, *([None] * 8)


def drawn_lora(
    x: Tensor,
    result: Tensor,
    mu: Tensor,
    weight_b: Tensor,
    rho: Tensor,
    eta: Tensor,
    draw: LayerDraw,
    token: Tensor,
    scaling: float,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``result + scaling * B (A x)`` for an input of any rank.

    Args:
        x: shape (..., n); with per-example noise (B, ..., n), or (B * T, n) example by example.
        result: the frozen layer's output, shape (..., m).
        mu: mean of A, shape (r, n).
        weight_b: B, shape (m, r).
        rho: shape (r,), only for its gradient.
        eta: shape (N,), only for its gradient.
        draw: the layer's noise.
        token: the draw's number, a scalar integer tensor.
        scaling: s.
        dtype: of the matmuls; None is that of ``mu``.

    Returns:
        Shape (..., m), the dtype of ``result`` or, where the matmuls run in a wider one, of both promoted.

    Raises:
        ConfigError: noise is per example and the examples cannot be told apart in ``x``.
    """
    lead = (-1,)
    if draw.sign_in is not None:
        batch = draw.sign_in.shape[0]
        if x.dim() == 1 or x.shape[0] % batch:
            raise ConfigError(
                f"noise='per_example' met a layer input of shape {tuple(x.shape)} in a batch of {batch} examples",
                "Use noise='shared' for models that regroup their inputs.",
            )
        lead = (batch, -1)
    flat_x, flat_result = x.reshape(*lead, x.shape[-1]), result.reshape(*lead, result.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = DrawnLoRA.apply(
            flat_x, flat_result, mu, weight_b, rho, eta, *draw, token, scaling, dtype or mu.dtype
        )
    return out.view(result.shape)


def grouped_lora(
    x: Tensor, result: Tensor, mu: Tensor, weight_b: Tensor, xi: Tensor, row_scale: Tensor, scaling: float
) -> Tensor:
    """LoRA under S posterior draws at once, for prediction.

    Args:
        x: shape (S * B, ..., n), the batch repeated S times.
        result: shape (S * B, ..., m).
        mu: shape (r, n).
        weight_b: shape (m, r).
        xi: shape (S, r, n).
        row_scale: shape (S, r).
        scaling: s.

    Returns:
        Shape (S * B, ..., m).
    """
    groups = xi.shape[0]
    a = torch.addcmul(mu.to(xi.dtype), xi, row_scale.unsqueeze(-1)).to(mu.dtype)
    hidden = x.reshape(groups, -1, x.shape[-1]) @ a.transpose(-1, -2)
    return result + (hidden @ weight_b.t()).view(result.shape) * scaling
