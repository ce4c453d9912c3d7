"""Where a batch's rows lie in the input of each adapted layer, determined by marking some of them.

Several draws in one forward pass, and noise of each example's own, need a layer to know which part of its input belongs
to which draw or example. Most layers have the batch along their first dimension. Others do not: sequence-first models,
layers fed by relative positions or learned queries, experts that are sent tokens one by one. Their shapes may look the
same, so shapes are not asked.

Instead the forward pass that is about to run is run beforehand, without adapters and gradients, once as it is and then
with some rows replaced by noise. The input of a layer is in order if it changes where those rows should be, and
nowhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from monteclora.adapters.eager import uncompiled
from monteclora.system.modes import evaluating
from monteclora.system.randomness import preserved_generators

__all__ = ["CACHES", "RowOrder", "batch_tensor", "batch_tensors", "copied", "row_order"]

CACHES = ("cache", "past_key_values")
"""What a model's forward calls the keys and values of earlier tokens: from transformers 5.24 on, and before."""

# one number for each token, of which there may be as many as rows
_POSITIONS = ("cache_position",)
_MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "attention_mask")
# a marked input changes by about its own size, rounding by a hundredth of that at most
_CHANGED = 0.02
# in one random direction, one marked row of a hundred changes by less than that
_DIRECTIONS = 8


def batch_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor whose first dimension is the batch of a call, or None."""
    named = [kwargs.get(name) for name in _MAIN_INPUTS]
    for value in [*named, *args, *kwargs.values()]:
        if isinstance(value, Tensor) and value.dim() > 0:
            return value
    return None


def batch_tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a call that have its batch along their first dimension, :func:`batch_tensor` among them.

    A vector of positions is none, however long.
    """
    batch = batch_tensor(args, kwargs)
    if batch is None:
        return []
    values = [*args, *(value for name, value in kwargs.items() if name not in _POSITIONS)]
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim() > 0]
    return [tensor for tensor in tensors if tensor.shape[0] == batch.shape[0]]


class RowOrder(NamedTuple):
    """What is known of the order of rows in the inputs of layers.

    Attributes:
        disorder: the first layer whose input is not the groups of the batch one after the other, with the reason;
            None where the layers that ran are in order.
        ran: names of the layers that ran.
        settled: whether that is final: a layer is not in order, or each one ran.
    """

    disorder: str | None = None
    ran: frozenset[str] = frozenset()
    settled: bool = False


_UNKNOWN = RowOrder()


def row_order(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    layers: Mapping[str, nn.Module],
    groups: int,
    known: RowOrder = _UNKNOWN,
) -> RowOrder:
    """Find out whether the input of each layer is the groups of the batch one after the other.

    Args:
        module: about to be called; it is called up to three times, in evaluation mode, on copies of its arguments.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        layers: adapted layers by name.
        groups: equal parts of the batch along its first dimension: draws, or examples. At least 2.
        known: from earlier calls; where this one runs no other layers, ``module`` is called once.
    """
    with preserved_generators():
        plain = _inputs(module, args, kwargs, layers, groups, None)
        if isinstance(plain, str):
            return RowOrder(plain, known.ran, settled=True)
        ran = known.ran | plain.keys()
        disorder = None
        if ran != known.ran:
            disorder = _first_disorder(module, args, kwargs, layers, groups, plain)
    inside = {id(part) for part in module.modules()}
    missing = any(id(layer) in inside for name, layer in layers.items() if name not in ran)
    return RowOrder(disorder, ran, settled=disorder is not None or not missing)


def _first_disorder(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    layers: Mapping[str, nn.Module],
    groups: int,
    plain: Mapping[str, list[Tensor]],
) -> str | None:
    """The first layer that is not in order, with the reason, from its inputs and those when rows are marked."""
    for group in (0, groups - 1):
        marked = _inputs(module, args, kwargs, layers, groups, group)
        if isinstance(marked, str):
            return marked
        for name in plain.keys() | marked.keys():
            before, after = plain.get(name, []), marked.get(name, [])
            if [call.shape for call in before] != [call.shape for call in after]:
                return f"'{name}' (which rows it is given depends on their content)"
            for one, other in zip(before, after, strict=True):
                reason = _disorder(one, other, group)
                if reason:
                    return f"'{name}' ({reason})"
    return None


def _disorder(before: Tensor, after: Tensor, group: int) -> str | None:
    """What is wrong with an input, shape (groups, numbers), of which ``group`` alone should have changed."""
    size = before.square().mean().sqrt()
    changed = ((after - before).abs().amax(-1) > _CHANGED * size).tolist()
    if not changed[group] and not any(changed):
        return "its input does not depend on the batch"
    expected = [number == group for number in range(len(changed))]
    return None if changed == expected else "its input is not ordered by rows of the batch"


def _inputs(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    layers: Mapping[str, nn.Module],
    groups: int,
    marked: int | None,
) -> dict[str, list[Tensor]] | str:
    """Every call's input of each layer, as random projections, (groups, numbers); or what is wrong with one."""
    found: dict[str, list[Tensor]] = {}
    wrong: list[str] = []
    thread = get_ident()
    copied_args, copied_kwargs = copied(args), copied(dict(kwargs))

    def record(name: str, x: Tensor) -> None:
        if get_ident() != thread:
            return  # another thread predicts with the same model
        if x.dim() < 2 or x.shape[0] % groups:
            wrong.append(f"'{name}' (its input has the shape {tuple(x.shape)})")
            return
        directions = torch.randn(x.shape[-1], _DIRECTIONS, generator=torch.Generator().manual_seed(0)).to(x.device)
        found.setdefault(name, []).append((x.detach().float() @ directions).reshape(groups, -1))

    with ExitStack() as stack:
        stack.enter_context(evaluating(module))
        stack.enter_context(uncompiled())  # hooks of a moment are not worth a graph
        if marked is not None:
            mark = _Mark(marked, groups, _row_counts(copied_args, copied_kwargs, groups))
            mark.inputs(copied_args, copied_kwargs)
            stack.enter_context(mark.embeddings(module))
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda _, given, name=name: record(name, given[0]))
            stack.callback(handle.remove)
        module.forward(*copied_args, **copied_kwargs)
    return wrong[0] if wrong else found


class _Mark:
    """Replaces one of several equal parts of everything that belongs to the batch by noise."""

    def __init__(self, group: int, groups: int, counts: set[int]) -> None:
        self.group, self.groups, self.counts = group, groups, counts
        self.generator = torch.Generator().manual_seed(1)
        self.thread = get_ident()

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Mark the floating-point inputs, in place; masks are none."""
        for value in [*args, *(value for name, value in kwargs.items() if "mask" not in name)]:
            if isinstance(value, Tensor):
                self.put_into(value)
            elif isinstance(value, (list, tuple)):
                self.inputs(value, {})
            elif isinstance(value, Mapping):
                self.inputs((), value)

    def put_into(self, value: Tensor) -> None:
        """Mark a tensor in place if it is of floating point and its first dimension is a batch."""
        if value.is_floating_point() and value.dim() > 1 and value.shape[0] in self.counts:
            rows = value.shape[0] // self.groups
            part = value[self.group * rows : (self.group + 1) * rows]
            noise = torch.randn(part.shape, generator=self.generator).to(part)
            part.copy_(noise * (value.float().std() + 1e-6).to(part))

    @contextmanager
    def embeddings(self, module: nn.Module) -> Iterator[None]:
        """Mark what the embeddings of tokens return: token numbers themselves can't be replaced by noise."""

        def after(embedding: nn.Module, given: Any, output: Tensor) -> Tensor:
            if get_ident() != self.thread:
                return output
            output = output.clone()
            self.put_into(output)
            return output

        handles = [embedding.register_forward_hook(after) for embedding in _token_embeddings(module)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _token_embeddings(module: nn.Module) -> list[nn.Module]:
    """The embeddings that models say their inputs go into; where none says so, all that there are."""
    found: dict[int, nn.Module] = {}
    for part in module.modules():
        get = getattr(part, "get_input_embeddings", None)
        if get is None:
            continue
        try:
            embedding = get()
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(embedding, nn.Module):
            found[id(embedding)] = embedding
    if found:
        return [e for e in found.values() if isinstance(e, nn.Embedding) or hasattr(e, "base_layer")]
    return [part for part in module.modules() if isinstance(part, nn.Embedding)]


def _row_counts(args: Sequence[Any], kwargs: Mapping[str, Any], groups: int) -> set[int]:
    """The first dimensions of a call's tensors that are made up of the groups."""
    tensors = [value for value in [*args, *kwargs.values()] if isinstance(value, Tensor) and value.dim() > 1]
    nested = [v for value in [*args, *kwargs.values()] if isinstance(value, Mapping) for v in value.values()]
    tensors += [value for value in nested if isinstance(value, Tensor) and value.dim() > 1]
    return {tensor.shape[0] for tensor in tensors if tensor.shape[0] % groups == 0}


def copied(value: Any) -> Any:
    """Arguments that a call may change, caches among them, without their graph."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(copied(part) for part in value)
    if isinstance(value, list):
        return [copied(part) for part in value]
    if isinstance(value, MutableMapping):
        result = copy.copy(value)
        for key, part in value.items():
            result[key] = copied(part)
        return result
    return copy.deepcopy(value)
