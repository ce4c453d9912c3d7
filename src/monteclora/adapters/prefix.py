"""Noise in the last blocks alone, and one pass through the blocks below for all draws.

Where the first blocks of a model are not drawn, S draws of a batch agree up to the block where noise begins. The model
is then called with the batch repeated S times, as for draws of all blocks, and everything outside the blocks sees that
batch. But the blocks below the noise are given its first rows alone, and what comes out of them is repeated in front of
the first block that is drawn. Several calls over the same rows may keep it (:meth:`SharedPrefix.keeping`): from the
second on, the blocks below are given a single row, and what comes out of them is not used. Embeddings in front of the
blocks are given those rows too, and what comes out of them is repeated at once. That this changes nothing is found out
for each kind of call: the model is run both ways.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from monteclora.adapters.last_blocks import LastBlocks
from monteclora.adapters.nested import Place, leaves, mapped
from monteclora.adapters.row_checks import call_kind, probe
from monteclora.adapters.rows import CACHES, batch_tensors, copied
from monteclora.posterior import AdapterPosterior, Draw, in_force
from monteclora.posterior.torch_private import original
from monteclora.system.modes import evaluating
from monteclora.system.randomness import preserved_generators

__all__ = ["SharedPrefix"]

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # of the size of outputs; of half precision
_HALF_PRECISION = 5e-2


@dataclass(frozen=True)
class _Plan:
    """What is known of a kind of call.

    Attributes:
        problem: why the blocks below the noise run for every draw; None where they need not.
        hidden: where the first drawn block is given the hidden states.
        rows: for each block below, where it is given tensors with the batch along their first dimension, and
        others: where it is given other tensors.
        embeddings: which of the modules around the blocks make states of the batch's ids, row by row.
    """

    problem: str | None = None
    hidden: Place = ()
    rows: tuple[frozenset[Place], ...] = ()
    others: tuple[frozenset[Place], ...] = ()
    embeddings: frozenset[int] = frozenset()


@dataclass
class _Kept:
    """What came out of the blocks below the noise, (B, ...), for calls over the same rows; None before the first."""

    hidden: Tensor | None = None


@dataclass(frozen=True)
class _Active:
    """A call that goes on: the batch, of ``total`` rows, is the examples ``count`` times over."""

    plan: _Plan
    count: int
    total: int
    kept: _Kept

    @property
    def rows_below(self) -> int:
        """How many rows the blocks below are given."""
        return self.total // self.count if self.kept.hidden is None else 1


_active: ContextVar[Mapping[SharedPrefix, _Active]] = ContextVar("active", default=MappingProxyType({}))
_keeping: ContextVar[Mapping[SharedPrefix, _Kept]] = ContextVar("keeping", default=MappingProxyType({}))
_recording: ContextVar[Mapping[SharedPrefix, _Record]] = ContextVar("recording", default=MappingProxyType({}))


@dataclass
class _Record:
    """What a call gave to the blocks, in order, and how many rows modules in front of them made of ids."""

    blocks: list[tuple[int, dict[Place, tuple[int, ...]]]] = field(default_factory=list)
    embeddings: dict[int, list[int]] = field(default_factory=dict)


@dataclass(eq=False)
class SharedPrefix:
    """Runs the blocks below the noise once, where that is known to change nothing."""

    hooked: list[nn.Module] = field(default_factory=list)
    around: list[nn.Module] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)
    plans: dict[Any, _Plan] = field(default_factory=dict)

    def remove(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.forget()
        self.hooked.clear()
        self.around.clear()
        self.handles.clear()

    def forget(self) -> None:
        """The layers have changed: nothing is known any more."""
        self.plans.clear()

    def begin(
        self,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        last: LastBlocks,
        count: int,
        posteriors: Sequence[AdapterPosterior],
        draw: Callable[[AdapterPosterior, int], Draw],
    ) -> None:
        """Let the call that goes on in this context share its pass through the blocks below the noise till :meth:`end`.

        Where it cannot, that is said the first time.

        Args:
            module: about to be called; the first time it is called up to five times, in evaluation mode, on copies of
                its arguments.
            args, kwargs: of the call, with the batch ``count`` times over.
            last: the blocks.
            count: of draws.
            posteriors: that are drawn.
            draw: a number of draws of a posterior.
        """
        if kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in CACHES):
            return  # keys and values that are kept have a row for each draw in every block
        total = batch_tensors(args, kwargs)[0].shape[0]
        # of a single row it could not be seen whether rows are kept apart
        kind = (call_kind(module, args, kwargs, posteriors), last.first, total == count, _keeps_by_default(module))
        if kind not in self.plans:

            def drawing(number: int) -> None:
                for posterior in posteriors:
                    in_force.put(posterior, draw(posterior, number) if number else None)

            with probe(), in_force.restored(), preserved_generators(), evaluating(module), torch.no_grad():
                try:
                    self.plans[kind] = self._find(last, module, args, kwargs, count, drawing)
                except (RuntimeError, IndexError, ValueError, TypeError) as error:
                    reason = str(error).partition("\n")[0]
                    problem = f"with fewer rows than the batch they raise {type(error).__name__}: {reason}"
                    self.plans[kind] = _Plan(problem)
            if self.plans[kind].problem is not None:
                text = f"the blocks below the last that are drawn run for every draw: {self.plans[kind].problem}"
                warnings.warn(text, UserWarning, stacklevel=2)
        if self.plans[kind].problem is None:
            kept = _keeping.get().get(self) or _Kept()
            _active.set({**_active.get(), self: _Active(self.plans[kind], count, total, kept)})

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Calls of this context inside the block are over the same rows, however often: the blocks below run once."""
        token = _keeping.set({**_keeping.get(), self: _Kept()})
        try:
            yield
        finally:
            _keeping.reset(token)

    def _find(
        self,
        last: LastBlocks,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        count: int,
        drawing: Callable[[int], None],
    ) -> _Plan:
        if any(original(part) is not part for part in module.modules()):
            return _Plan("the model is compiled")
        if not last.alone:
            return _Plan("the adapted blocks are in several lists")
        self._hook(last.blocks, _around(module, last.blocks))
        drawing(0)
        seen = []
        for draws in (1, 2):
            with self._recorded() as record:
                batch, named = _parts(args, kwargs, count, draws)
                module.forward(*batch, **named)
            seen.append(record)
        planned = _compared(seen[0], seen[1], len(last.blocks), last.first)
        if planned.problem is not None:
            return planned
        drawing(2)
        batch, named = _parts(args, kwargs, count, 2)
        expected = module.forward(*copied(batch), **copied(named))  # a copy: a call may change a cache
        if isinstance(expected, Mapping) and any(expected.get(name) is not None for name in CACHES):
            return _Plan(
                "keys and values are kept, though not asked for (pass use_cache=False where they are not needed)"
            )
        total = next(iter(batch_tensors(batch, named))).shape[0]
        token = _active.set({**_active.get(), self: _Active(planned, 2, total, _Kept())})
        try:
            # the second time with what the first one kept
            found = [module.forward(*copied(batch), **copied(named)) for _ in range(2)]
        finally:
            _active.reset(token)
        agreed = all(_agree(expected, each) for each in found)
        return planned if agreed else _Plan("its outputs would be others")

    @contextmanager
    def _recorded(self) -> Iterator[_Record]:
        record = _Record()
        token = _recording.set({**_recording.get(), self: record})
        try:
            yield record
        finally:
            _recording.reset(token)

    def end(self) -> None:
        """The call is over."""
        if self in _active.get():
            _active.set({prefix: active for prefix, active in _active.get().items() if prefix is not self})

    def _hook(self, blocks: Sequence[nn.Module], around: Sequence[nn.Module]) -> None:
        """For good: hooks that came and went would be seen by other threads."""
        for place, block in enumerate(blocks):
            if all(block is not known for known in self.hooked):  # by identity, which a copied list keeps
                self.hooked.append(block)
                self.handles.append(block.register_forward_pre_hook(partial(self._before, place), with_kwargs=True))
        for module in around:
            if all(module is not known for known in self.around):
                before = partial(self._before_embedding, len(self.around))
                after = partial(self._after_embedding, len(self.around))
                self.around.append(module)
                self.handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self.handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _before(self, place: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a block is given instead; None for what it is given anyhow."""
        if torch.compiler.is_compiling():
            return None
        record = _recording.get().get(self)
        if record is not None:
            record.blocks.append((place, {at: tuple(tensor.shape) for at, tensor in leaves((args, kwargs))}))
        active = _active.get().get(self)
        if active is None or place > len(active.plan.rows):
            return None
        plan = active.plan
        if place == len(plan.rows):
            return mapped((args, kwargs), partial(_all_rows, active))
        rows, others, given = plan.rows[place], plan.others[place], active.rows_below

        def first_rows(at: Place, x: Tensor) -> Tensor:
            # a mask that no earlier call had tells by its shape alone
            belongs = at in rows or (at not in others and x.dim() > 1)
            return x[:given] if belongs and x.dim() and x.shape[0] == active.total else x

        return mapped((args, kwargs), first_rows)

    def _before_embedding(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The rows that the blocks below are given; None for what the module is given anyhow."""
        active = None if torch.compiler.is_compiling() else _active.get().get(self)
        if active is None or number not in active.plan.embeddings:
            return None
        total, given = active.total, active.rows_below
        return mapped((args, kwargs), lambda _, x: x[:given] if x.dim() and x.shape[0] == total else x)

    def _after_embedding(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """What is made of those rows, for every row of the batch; None for what came out."""
        if torch.compiler.is_compiling():
            return None
        record = _recording.get().get(self)
        if record is not None and not record.blocks:
            given = [tensor for _, tensor in leaves((args, kwargs))]
            made = given and isinstance(output, Tensor) and not any(tensor.is_floating_point() for tensor in given)
            record.embeddings.setdefault(number, []).append(output.shape[0] if made and output.dim() else 0)
        active = _active.get().get(self)
        if active is None or number not in active.plan.embeddings:
            return None
        rest = output.shape[1:]
        if output.shape[0] == 1:
            return output.expand(active.total, *rest)
        return output.repeat(active.total // output.shape[0], *[1] * len(rest))


def _around(module: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules beside those that contain the list of blocks: among them a model's embeddings."""
    path = next((name for name, part in module.named_modules() if part is blocks[0]), "").split(".")
    found = []
    for depth in range(len(path) - 1):
        outer = module.get_submodule(".".join(path[:depth]))
        found += [
            part
            for name, part in outer.named_children()
            if name != path[depth] and not isinstance(part, (nn.ModuleList, nn.ModuleDict))
        ]
    return found


def _all_rows(active: _Active, at: Place, x: Tensor) -> Tensor:
    """The hidden states of every row, from those of the examples, which are kept; another tensor as it is."""
    if at != active.plan.hidden:
        return x
    if active.kept.hidden is None:
        active.kept.hidden = x
    hidden = active.kept.hidden
    return hidden.repeat(active.count, *[1] * (hidden.dim() - 1))


def _keeps_by_default(module: nn.Module) -> bool:
    """Whether a call that does not say may return keys and values."""
    return bool(getattr(getattr(module, "config", None), "use_cache", False))


def _parts(
    args: Sequence[Any], kwargs: Mapping[str, Any], count: int, draws: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A copy of a call with a batch ``count`` times over, with the batch ``draws`` times over."""
    batch = {id(tensor) for tensor in batch_tensors(args, kwargs)}

    def part(_: Place, x: Tensor) -> Tensor:
        return x.detach()[: draws * (x.shape[0] // count)].clone() if id(x) in batch else x.detach().clone()

    found: tuple[tuple[Any, ...], dict[str, Any]] = mapped((tuple(args), dict(kwargs)), part)
    return found


def _compared(once: _Record, twice: _Record, blocks: int, first: int) -> _Plan:
    """A plan, from what the blocks were given with the batch once and twice."""
    one, two = once.blocks, twice.blocks
    if any([place for place, _ in record] != list(range(blocks)) for record in (one, two)):
        return _Plan("they do not run one after the other")
    rows: list[frozenset[Place]] = []
    others: list[frozenset[Place]] = []
    for (place, before), (_, after) in zip(one[: first + 1], two[: first + 1], strict=True):
        if before.keys() != after.keys():
            return _Plan(f"what block {place} is given depends on the number of rows")
        doubled = {at for at, shape in before.items() if shape and after[at] == (2 * shape[0], *shape[1:])}
        if any(after[at] != shape for at, shape in before.items() if at not in doubled):
            return _Plan(f"the input of block {place} is not ordered by rows of the batch")
        rows.append(frozenset(doubled))
        others.append(frozenset(before.keys() - doubled))
    hidden = next((at for at in one[first][1] if at in rows[first]), None)
    if hidden is None:
        return _Plan(f"block {first} is given nothing of the batch")
    embeddings = {
        number
        for number, made in once.embeddings.items()
        if len(made) == 1 and made[0] and twice.embeddings.get(number) == [2 * made[0]]
    }
    return _Plan(None, hidden, tuple(rows[:first]), tuple(others[:first]), frozenset(embeddings))


def _agree(expected: Any, found: Any) -> bool:
    """Whether two outputs are the same but for rounding."""
    pairs = [(dict(leaves(output))) for output in (expected, found)]
    if not pairs[0] or pairs[0].keys() != pairs[1].keys():
        return False
    for at, one in pairs[0].items():
        other = pairs[1][at]
        if one.shape != other.shape:
            return False
        if one.is_floating_point():
            size = one.double().abs().amax() if one.numel() else 0.0
            tolerance = _TOLERANCE.get(one.dtype, _HALF_PRECISION)
            if not bool(((one.double() - other.double()).abs() <= tolerance * size + 1e-30).all()):
                return False
    return True
