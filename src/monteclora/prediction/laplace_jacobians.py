"""A classifier as a linear function of its weights: the logits of rows, and their Jacobians in the weights.

With these, every draw of the weights costs a product, however many draws there are. Where all weights belong to
linear layers, a forward pass of many rows and a backward pass for each class give the Jacobian of each row: of a
layer's weight, the products of what came in and the gradients of what came out (Goodfellow 2015, arXiv 1510.01799).
Otherwise rows go through the model one at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["LogitsOf", "jacobians", "moved_logits"]

LogitsOf = Callable[[slice], Tensor]
"""Logits of some rows, (B, C), from a pass with gradients."""

_MOST_NUMBERS = 25_000_000  # of Jacobians in memory at once, 100 MB
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of the size of a sum of gradients; of half precision
_HALF_PRECISION = 5e-2


def jacobians(
    model: nn.Module, weights: Mapping[str, Tensor], logits_of: LogitsOf, rows: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Logits, (B, C), and their Jacobians in each weight, (B, C, *shape), of a few rows after another.

    Both are float32 and without a gradient.

    Args:
        model: that ``logits_of`` runs; no other thread does in the meantime.
        weights: leaves with a gradient that it runs with, by the names of its parameters.
        logits_of: logits of some of the rows.
        rows: how many there are.
    """
    layers = _linear_layers(model, weights)
    count = sum(weight.numel() for weight in weights.values())
    first, size = 0, 1  # how many classes there are is seen of the first row
    while first < rows:
        some = slice(first, min(first + size, rows))
        found = None if layers is None else _of_many(layers, weights, logits_of, some)
        if found is None:
            layers = None
            found = _one_by_one(weights, logits_of, some)
        yield found
        first, size = some.stop, max(1, _MOST_NUMBERS // (count * found[0].shape[1]))


def moved_logits(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    logits_of: LogitsOf,
    deviations: Sequence[Mapping[str, Tensor]],
    rows: int,
) -> Tensor:
    """f + J (w - w*) of every row for every w, float32, (S, B, C).

    Args:
        model, logits_of, rows: see :func:`jacobians`.
        weights: w*, around which f is linearised: leaves with a gradient that ``logits_of`` runs with.
        deviations: w - w* of each w, by name; their dtype and device may be others than the weights'.
    """
    moves = [
        {name: each[name].flatten().to(weight.device, torch.float32) for name, weight in weights.items()}
        for each in deviations
    ]
    found = []
    with torch.enable_grad(), _uncached_casts():
        for logits, by_name in jacobians(model, weights, logits_of, rows):
            flat = {name: each.flatten(2) for name, each in by_name.items()}
            # draw by draw: to the last bit, one is the same however many there are
            drawn = [sum((flat[name] @ part for name, part in move.items()), logits) for move in moves]
            found.append(torch.stack(drawn))
    return torch.cat(found, 1)


class _Call(NamedTuple):
    """What came into a layer and out of it, (B, ..., n) and (B, ..., m)."""

    layer: nn.Module
    given: Tensor
    output: Tensor


def _linear_layers(model: nn.Module, names: Mapping[str, Tensor]) -> dict[nn.Module, dict[str, str]] | None:
    """The layers with these parameters, and the names of theirs; None where one is no linear layer's."""
    found: dict[nn.Module, dict[str, str]] = {}
    for name in names:
        of_layer, _, own = name.rpartition(".")
        layer = model.get_submodule(of_layer)
        if not isinstance(layer, nn.Linear):
            return None
        found.setdefault(layer, {})[own] = name
    return found


@contextmanager
def _watched(layers: Mapping[nn.Module, object]) -> Iterator[list[_Call]]:
    """The calls of these layers in the block, by this thread."""
    calls: list[_Call] = []
    thread = threading.get_ident()

    def record(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if threading.get_ident() == thread and output.requires_grad:  # else it is a constant, such as DoRA's norm
            calls.append(_Call(layer, args[0].detach(), output))

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _of_many(
    layers: Mapping[nn.Module, Mapping[str, str]], weights: Mapping[str, Tensor], logits_of: LogitsOf, some: slice
) -> tuple[Tensor, dict[str, Tensor]] | None:
    """Logits and Jacobians of rows from passes that they share; None where the layers' calls do not explain them."""
    with _watched(layers) as calls:
        logits = logits_of(some)
    rows, classes = logits.shape
    if any(call.given.shape[0] != rows or call.output.shape[0] != rows for call in calls):
        return None
    found = {name: weight.new_zeros(rows, classes, *weight.shape).float() for name, weight in weights.items()}
    agreements = []  # looked at once: a device need not wait for each
    for number in range(classes):
        wanted = [*(call.output for call in calls), *weights.values()]
        last = number == classes - 1
        grads = torch.autograd.grad(logits[:, number].sum(), wanted, retain_graph=not last, allow_unused=True)
        for call, grad in zip(calls, grads, strict=False):
            if grad is None:
                continue
            out = grad.reshape(rows, -1, grad.shape[-1]).float()
            for own, name in layers[call.layer].items():
                if own == "bias":
                    found[name][:, number] += out.sum(1)
                else:
                    found[name][:, number] += out.mT @ call.given.reshape(rows, -1, call.given.shape[-1]).float()
        for (name, weight), total in zip(weights.items(), grads[len(calls) :], strict=True):
            agreed = _agree(total, found[name][:, number], weight, [call.output for call in calls])
            agreements.append(agreed.to(logits.device))
    return (logits.detach().float(), found) if bool(torch.stack(agreements).all()) else None


def _agree(total: Tensor | None, found: Tensor, weight: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Whether the gradients of rows, (B, *shape), add up to their sum's gradient, but for rounding of a row's size.

    A layer's weight may be used outside of it. A single row, the first, shows that whatever others cancel.
    """
    expected = torch.zeros_like(weight) if total is None else total
    dtypes = {weight.dtype, *(output.dtype for output in outputs)}
    tolerance = max(_TOLERANCE.get(dtype, _HALF_PRECISION) for dtype in dtypes)
    size = found.flatten(1).norm(dim=1).sum()
    return (expected.float() - found.sum(0)).norm() <= tolerance * size + 1e-12


def _one_by_one(weights: Mapping[str, Tensor], logits_of: LogitsOf, some: slice) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and Jacobians of rows, each from passes of its own."""
    logits, found = [], []
    for row in range(some.start, some.stop):
        (of_row,) = logits_of(slice(row, row + 1))
        logits.append(of_row.detach().float())
        grads = [torch.autograd.grad(o, list(weights.values()), retain_graph=True, allow_unused=True) for o in of_row]
        found.append(
            [
                torch.stack([torch.zeros_like(weight) if grad is None else grad for grad in of_weight]).float()
                for weight, of_weight in zip(weights.values(), zip(*grads, strict=True), strict=True)
            ]
        )
    by_weight = zip(weights, zip(*found, strict=True), strict=True)
    return torch.stack(logits), {name: torch.stack(of_rows) for name, of_rows in by_weight}


@contextmanager
def _uncached_casts() -> Iterator[None]:
    """Autocast keeps no casts of weights: it would hold on to those of every call until its own block ends."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
