"""One draw of a posterior: what its layers are given, and how its gradient reaches rho and eta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from monteclora.posterior import dirichlet
from monteclora.posterior.layout import Layout
from monteclora.posterior.reminder import Reminder
from monteclora.posterior.torch_private import versions

__all__ = ["DifferentiableDraw", "Differentiation", "Draw", "LayerDraw", "LayerSlot", "RawDraw", "Repetitions"]


class LayerDraw(NamedTuple):
    """One layer's part of a draw.

    Attributes:
        transposed: ``A^T``, shape (n, r), a view of memory in the order of ``A``: what a layer multiplies its input
            with. Where the layer is to add its mean, the noise ``A - mu = eps ||pi|| L Xi`` likewise, that in the shape
            (S, n, r) for S draws at once. In training it carries the gradient of rho, eta and the mean in it.
        has_mean: whether the mean is in it.
        sign_in: ``u``, shape (B, n), or None where noise is shared by the batch.
        sign_out: ``s``, shape (B, r), or None.
    """

    transposed: Tensor
    has_mean: bool = False
    sign_in: Tensor | None = None
    sign_out: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """``A``, or the noise, of shape (r, n) or (S, r, n)."""
        return self.transposed.transpose(-1, -2)

    def to(self, device: torch.device) -> LayerDraw:
        """The same on another device."""
        signs = (None if sign is None else sign.to(device) for sign in (self.sign_in, self.sign_out))
        return LayerDraw(self.transposed.to(device), self.has_mean, *signs)


@dataclass(frozen=True, eq=False)
class Draw:
    """Everything random about one forward pass.

    Attributes:
        index: the draw's number in its stream.
        layers: each layer's part, as views of flat buffers; None for one that is not drawn.
        groups: 0 for training, else S, the number of draws made at once.
        row_scale: what each row of the noise was multiplied by, shape (R,) or (S, R), without gradient:
            ``eps ||pi|| exp(rho) sqrt(c/nu)``, with a diagonal covariance times ``sqrt(chi2)`` of the row.
        squared_norm: ``||pi||^2`` of each layer, shape (L,).
        row_squared_norm: ``c/nu ||T_i||^2``, shape (R,).
        row_log_determinant: ``log(c/nu T_ii^2)``, shape (R,).
        weights: raw draws of the mixture weights.
    """

    index: int
    layers: tuple[LayerDraw | None, ...]
    groups: int
    row_scale: Tensor
    squared_norm: Tensor
    row_squared_norm: Tensor
    row_log_determinant: Tensor
    weights: dirichlet.Raw


class LayerSlot:
    """Where one layer finds its part of the posterior's draws.

    A layer that looked it up by its number would be recompiled for every number.

    Attributes:
        index: the layer's number.
        current: its part of the training draw.
        predictive: of the latest prediction draw, for compiled code, which reads no context: compiled models predict
            in one thread at a time.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.current: LayerDraw | None = None
        self.predictive: LayerDraw | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "current": None, "predictive": None}


class RawDraw(NamedTuple):
    """One draw without gradient: A or noise of all layers, flat (C,) and by layer, transposed (n, r), d log||pi||/d eta
    (L, N) and what :class:`Draw` has."""

    cells: Tensor
    blocks: list[Tensor]
    log_norm_grad: Tensor | None
    row_scale: Tensor
    squared_norm: Tensor
    row_squared_norm: Tensor
    row_log_determinant: Tensor
    weights: dirichlet.Raw


class Repetitions:
    """The draws under which layers ran inside a backward pass through a checkpoint that knows nothing of draws.

    Such a checkpoint repeats a layer under the current draw, which need not be that of the forward pass it repeats.
    """

    def __init__(self) -> None:
        self.indices: set[int] = set()

    def note(self, index: int) -> None:
        """A layer was repeated under draw ``index``."""
        self.indices.add(index)

    def check(self, index: int) -> None:
        """Layers that ran under draw ``index`` have their gradients: were they repeated under the same?

        Raises:
            RuntimeError: all that were repeated were so under other draws.
        """
        if self.indices and index not in self.indices:
            raise RuntimeError(
                f"activation checkpointing recomputed a layer under noise draw {max(self.indices)}, and its forward "
                f"pass used draw {index}: run the backward pass before the next training forward, or checkpoint "
                "through the model's gradient_checkpointing_enable()"
            )


@dataclass(frozen=True, eq=False)
class Differentiation:
    """What the backward pass of a draw needs.

    Attributes:
        layout: of ``cells``.
        ranks: of the layers, shape (L,).
        cells: what the layers were given, shape (C,).
        log_norm_grad: d log||pi|| / d eta, shape (L, N); None where neither rho nor eta has a gradient.
        means: in ``cells``; None where layers add their own.
        versions: of the means.
        index: the draw's number.
        repetitions: of layers in the backward pass.
        reminder: notified when rho and eta get their gradient.
    """

    layout: Layout
    ranks: Tensor
    cells: Tensor
    log_norm_grad: Tensor | None
    means: Sequence[Tensor] | None
    versions: list[int]
    index: int
    repetitions: Repetitions
    reminder: Reminder

    def gradients(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        """Those of rho (R,) and eta (L, N) from those of the layers' parts.

        Raises:
            RuntimeError: layers were repeated under other draws, or means changed since the draw was made.
        """
        self.repetitions.check(self.index)
        if self.means is not None and self.versions != versions(self.means):
            raise RuntimeError(
                "lora_A was modified in place between the draw of its noise and the backward pass: run the backward "
                "pass before the optimiser's step, and layers within a forward pass of the whole model"
            )
        if self.log_norm_grad is None:
            return None, None
        self.reminder.gradient()
        of_rows = self.layout.row_products(grads, self.cells, self.means)
        of_layers = torch.segment_reduce(of_rows, "sum", lengths=self.ranks)
        return of_rows, self.log_norm_grad * of_layers.unsqueeze(-1)


class DifferentiableDraw(torch.autograd.Function):
    """Cut a draw into layers and give it its gradient: noise is proportional to ``exp(rho)`` and ``||pi||(eta)``.

    The scalar product of a row's noise with its gradient is therefore the gradient of rho, for all layers at once. What
    the backward pass needs is kept outside autograd's saved tensors: the node may be passed through as often as
    reentrant activation checkpointing does.
    """

    @staticmethod
    def forward(
        ctx: Any, known: Differentiation, blocks: Sequence[Tensor], rho: Tensor, eta: Tensor, *means: Tensor
    ) -> tuple[Tensor, ...]:
        """``blocks``, the layers' parts of the cells, transposed: each of shape (n, r)."""
        ctx.set_materialize_grads(False)
        ctx.known, ctx.has_means = known, bool(means)
        return tuple(blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of rho, eta and the means from those of the parts, None for layers without one."""
        of_matrices = [None if grad is None else grad.t() for grad in grads]
        return None, None, *ctx.known.gradients(of_matrices), *(of_matrices if ctx.has_means else ())
