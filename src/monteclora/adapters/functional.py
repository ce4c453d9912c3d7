"""LoRA with a drawn A as one differentiable operation.

Computed from the pieces of a draw, so that neither the drawn ``A`` nor a second copy of the input is kept for the
backward pass: ``A = mu + row_scale xi`` is formed where it is used. The row scales get their gradient from what the
backward pass computes for ``A`` anyway, ``dL/drow_scale_i = sum_j (dL/dA)_ij xi_ij`` (METHOD.md sections 2 and 5).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monteclora.errors import ConfigError
from monteclora.posterior import LayerDraw

__all__ = ["drawn_lora", "grouped_lora"]


def _drawn(mu: Tensor, xi: Tensor, row_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``A`` in the dtype of the matmuls; the noise is added before rounding to it."""
    return torch.addcmul(mu.to(xi.dtype), xi, row_scale).to(dtype)


def _add_product(result: Tensor, hidden: Tensor, weight_b: Tensor, scaling: float) -> Tensor:
    """``result + scaling * hidden B^T`` for matrices; in one kernel where the dtypes agree."""
    if result.dtype == hidden.dtype:
        return torch.addmm(result, hidden, weight_b.t(), alpha=scaling)
    return result + (hidden @ weight_b.t()) * scaling


class _Repeatable(torch.autograd.Function):
    """Checks that a recomputed layer saw the draw of its forward pass."""

    @staticmethod
    def remember(ctx: Any, token: Tensor) -> None:
        """In forward: keep the draw's number apart from the saved tensors, which a recomputation replaces."""
        if not torch.compiler.is_compiling():
            ctx.index = int(token)

    @staticmethod
    def verify(ctx: Any, token: Tensor) -> None:
        """In backward: the saved number must be the forward pass's.

        Raises:
            RuntimeError: it is not.
        """
        if not torch.compiler.is_compiling() and int(token) != ctx.index:
            raise RuntimeError(
                f"activation checkpointing recomputed a layer under noise draw {int(token)}, and its forward pass used "
                f"draw {ctx.index}: run the backward pass before the next training forward, or checkpoint through the "
                "model's gradient_checkpointing_enable()"
            )


class _SharedLoRA(_Repeatable):
    """``result + scaling * B (A x)``: x (T, n), result (T, m), mu and xi (r, n), weight_b (m, r), row_scale (r, 1)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor,
        mu: Tensor,
        weight_b: Tensor,
        row_scale: Tensor,
        xi: Tensor,
        token: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        x, b = x.to(dtype), weight_b.to(dtype)
        hidden = x @ _drawn(mu, xi, row_scale, dtype).t()
        ctx.save_for_backward(x, hidden, mu, weight_b, row_scale, xi, token)
        ctx.scaling, ctx.result_dtype = scaling, result.dtype
        _Repeatable.remember(ctx, token)
        return _add_product(result, hidden, b, scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, mu, weight_b, row_scale, xi, token = ctx.saved_tensors
        _Repeatable.verify(ctx, token)
        needs_x, needs_result, needs_mu, needs_b, needs_scale = ctx.needs_input_grad[:5]
        grad_x = grad_a = grad_b = grad_scale = None
        low = grad.to(x.dtype)
        if needs_b:
            grad_b = (low.t() @ hidden).mul_(ctx.scaling).to(weight_b.dtype)
        grad_hidden = (low @ weight_b.to(x.dtype)).mul_(ctx.scaling)
        if needs_x:
            grad_x = grad_hidden @ _drawn(mu, xi, row_scale, x.dtype)
        if needs_mu or needs_scale:
            grad_a = grad_hidden.t() @ x
            if needs_scale:
                grad_scale = (grad_a * xi).sum(-1, keepdim=True)
            grad_a = grad_a.to(mu.dtype) if needs_mu else None
        grad_result = grad.to(ctx.result_dtype) if needs_result else None
        return grad_x, grad_result, grad_a, grad_b, grad_scale, None, None, None, None


class _PerExampleLoRA(_Repeatable):
    """Flipout: ``h_b = x_b mu^T + (((x_b o u_b) Delta^T) o s_b)`` (METHOD.md section 5).

    x (B, T, n), result (B, T, m), sign_in (B, n), sign_out (B, r), the rest as in :class:`_SharedLoRA`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor,
        mu: Tensor,
        weight_b: Tensor,
        row_scale: Tensor,
        xi: Tensor,
        sign_in: Tensor,
        sign_out: Tensor,
        token: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        x, b = x.to(dtype), weight_b.to(dtype)
        delta = (xi * row_scale).to(dtype)
        hidden = x @ mu.to(dtype).t()
        hidden += ((x * sign_in.to(dtype).unsqueeze(1)) @ delta.t()) * sign_out.to(dtype).unsqueeze(1)
        ctx.save_for_backward(x, hidden, mu, weight_b, row_scale, xi, sign_in, sign_out, token)
        ctx.scaling, ctx.result_dtype = scaling, result.dtype
        _Repeatable.remember(ctx, token)
        return _add_product(result.flatten(0, 1), hidden.flatten(0, 1), b, scaling).view(result.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, mu, weight_b, row_scale, xi, sign_in, sign_out, token = ctx.saved_tensors
        _Repeatable.verify(ctx, token)
        needs_x, needs_result, needs_mu, needs_b, needs_scale = ctx.needs_input_grad[:5]
        grad_x = grad_mu = grad_b = grad_scale = None
        low = grad.to(x.dtype)
        into = sign_in.to(x.dtype).unsqueeze(1)
        if needs_b:
            grad_b = (low.flatten(0, 1).t() @ hidden.flatten(0, 1)).mul_(ctx.scaling).to(weight_b.dtype)
        grad_hidden = (low @ weight_b.to(x.dtype)).mul_(ctx.scaling)
        signed = grad_hidden * sign_out.to(x.dtype).unsqueeze(1)
        if needs_x:
            delta = (xi * row_scale).to(x.dtype)
            grad_x = (signed @ delta).mul_(into).add_(grad_hidden @ mu.to(x.dtype))
        if needs_mu:
            grad_mu = (grad_hidden.flatten(0, 1).t() @ x.flatten(0, 1)).to(mu.dtype)
        if needs_scale:
            grad_delta = signed.flatten(0, 1).t() @ (x * into).flatten(0, 1)
            grad_scale = (grad_delta * xi).sum(-1, keepdim=True)
        grad_result = grad.to(ctx.result_dtype) if needs_result else None
        return grad_x, grad_result, grad_mu, grad_b, grad_scale, *[None] * 6


def drawn_lora(
    x: Tensor,
    result: Tensor,
    mu: Tensor,
    weight_b: Tensor,
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
        draw: the layer's noise.
        token: the draw's number, a scalar integer tensor.
        scaling: s.
        dtype: of the matmuls; None is that of ``mu``.

    Returns:
        Shape (..., m), the dtype of ``result`` or, where the matmuls run in a wider one, of both promoted.

    Raises:
        ConfigError: noise is per example and the examples cannot be told apart in ``x``.
    """
    dtype = dtype or mu.dtype
    if draw.sign_in is None or draw.sign_out is None:
        flat_x, flat_result = x.reshape(-1, x.shape[-1]), result.reshape(-1, result.shape[-1])
        shared: Tensor = _SharedLoRA.apply(
            flat_x, flat_result, mu, weight_b, draw.row_scale, draw.xi, token, scaling, dtype
        )
        return shared.view(result.shape)
    batch = draw.sign_in.shape[0]
    if x.dim() == 1 or x.shape[0] % batch:
        raise ConfigError(
            f"noise='per_example' met a layer input of shape {tuple(x.shape)} in a batch of {batch} examples",
            "Use noise='shared' for models that regroup their inputs.",
        )
    flat_x, flat_result = x.reshape(batch, -1, x.shape[-1]), result.reshape(batch, -1, result.shape[-1])
    signs = draw.sign_in, draw.sign_out
    each: Tensor = _PerExampleLoRA.apply(
        flat_x, flat_result, mu, weight_b, draw.row_scale, draw.xi, *signs, token, scaling, dtype
    )
    return each.view(result.shape)


def grouped_lora(x: Tensor, result: Tensor, mu: Tensor, weight_b: Tensor, draw: LayerDraw, scaling: float) -> Tensor:
    """LoRA under S posterior draws at once, for prediction.

    Args:
        x: shape (S * B, ..., n), the batch repeated S times.
        result: shape (S * B, ..., m).
        mu: shape (r, n).
        weight_b: shape (m, r).
        draw: the layer's noise, with ``xi`` of shape (S, r, n).
        scaling: s.

    Returns:
        Shape (S * B, ..., m).
    """
    a = torch.addcmul(mu.to(draw.xi.dtype), draw.xi, draw.row_scale).to(mu.dtype)
    hidden = x.reshape(draw.xi.shape[0], -1, x.shape[-1]) @ a.transpose(-1, -2)
    return result + (hidden @ weight_b.t()).view(result.shape) * scaling
