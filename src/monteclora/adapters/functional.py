"""LoRA with a drawn A, in as few differentiable operations as it takes.

A handful of torch's own operations rather than one written in Python: on small batches a layer costs what its calls
cost, and an ``autograd.Function`` costs more of them than it saves. Adding the low-rank product to the frozen layer's
output and scaling it are folded into one matmul; plain LoRA makes three passes over that output.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from monteclora.errors import ConfigError
from monteclora.posterior import LayerDraw

__all__ = ["drawn_lora", "grouped_lora"]


def _add_product(result: Tensor, hidden: Tensor, weight_b: Tensor, scaling: float) -> Tensor:
    """``result + scaling * hidden B^T`` for matrices; in one kernel where the dtypes agree."""
    if result.dtype == hidden.dtype:
        return torch.addmm(result, hidden, weight_b.t(), alpha=scaling)
    return result + F.linear(hidden, weight_b) * scaling


def drawn_lora(
    x: Tensor, result: Tensor, mu: Tensor | None, weight_b: Tensor, draw: LayerDraw, scaling: float
) -> Tensor:
    """``result + scaling * B (A x)`` for an input of any rank, with ``A = mu + noise`` (docs/method.md section 2).

    With per-example noise, example b has ``A_b = mu + noise o (s_b u_b^T)`` (section 5). Its A is formed
    rather than its input's signs changed: that would keep a copy of the input for the backward pass.

    Args:
        x: shape (..., n); with per-example noise (B, ..., n), or (B * T, n) example by example.
        result: the frozen layer's output, shape (..., m).
        mu: mean of A, shape (r, n); None where the draw has it.
        weight_b: B, shape (m, r), in the dtype of mu.
        draw: the layer's A, or its noise.
        scaling: s.

    Returns:
        Shape (..., m), the dtype of ``result`` or, where the matmuls run in a wider one, of both promoted.

    Raises:
        ConfigError: noise is per example and the examples cannot be distinguished in ``x``.
    """
    dtype = weight_b.dtype
    if x.dtype != dtype:
        x = x.to(dtype)
    # the noise is added before rounding to the dtype of the matmuls
    if mu is None or draw.sign_in is None or draw.sign_out is None:
        a = draw.transposed if mu is None else mu.t() + draw.transposed
        if a.dtype != dtype:
            a = a.to(dtype)
        # as matrices throughout: what a layer costs on small batches is the number of its operations
        hidden = torch.mm(x.reshape(-1, x.shape[-1]), a)
    else:
        batch = draw.sign_in.shape[0]
        if x.dim() == 1 or x.shape[0] % batch:
            raise ConfigError(
                f"noise='per_example' met a layer input of shape {tuple(x.shape)} in a batch of {batch} examples",
                "Use noise='shared' for models that regroup their inputs.",
            )
        rows = draw.matrix * draw.sign_out.unsqueeze(-1)
        a = torch.addcmul(mu.to(rows.dtype), rows, draw.sign_in.unsqueeze(1)).to(mu.dtype)
        hidden = torch.bmm(x.reshape(batch, -1, x.shape[-1]), a.transpose(1, 2)).flatten(0, 1)
    flat = result.reshape(-1, result.shape[-1])
    return _add_product(flat, hidden, weight_b, scaling).view(result.shape)


def grouped_lora(x: Tensor, result: Tensor, mu: Tensor, weight_b: Tensor, draw: LayerDraw, scaling: float) -> Tensor:
    """LoRA under S posterior draws at once, for prediction.

    Args:
        x: shape (S * B, ..., n), the batch repeated S times.
        result: shape (S * B, ..., m).
        mu: shape (r, n).
        weight_b: shape (m, r).
        draw: the layer's noise, with ``transposed`` of shape (S, n, r).
        scaling: s.

    Returns:
        Shape (S * B, ..., m).

    Raises:
        ConfigError: S does not divide the first dimension of ``x``.
    """
    count = draw.transposed.shape[0]
    if count > 1 and (x.dim() == 1 or x.shape[0] % count):
        raise ConfigError(
            f"{count} draws at once met a layer input of shape {tuple(x.shape)}, whose rows are not the batch {count} "
            "times over",
            "Repeat the batch along its first dimension, or draw one at a time with num_samples=1.",
        )
    a = (mu.t() + draw.transposed).to(mu.dtype)
    hidden = (x.reshape(a.shape[0], -1, x.shape[-1]) @ a).flatten(0, 1)
    return _add_product(result.reshape(-1, result.shape[-1]), hidden, weight_b, scaling).view(result.shape)
