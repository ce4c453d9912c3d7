"""ivon's optimiser with what a run asks of one. Importing this file needs ivon-opt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ivon
import torch

from monteclora.system.randomness import preserved_generators

__all__ = ["IvonOptimizer"]


class IvonOptimizer(ivon.IVON):
    """Draws its noise from a generator of its own, and has all of its state in its state dict.

    Args:
        groups: of parameters, where they are trained: the state stays there.
        seed: of the noise.
        **options: of ``ivon.IVON``.
    """

    def __init__(self, groups: list[dict[str, Any]], seed: int, **options: Any) -> None:
        self._seed = seed
        super().__init__(groups, **options)

    @contextmanager
    def at_a_draw(self) -> Iterator[None]:
        """The same draw on every process, in every way to divide the batch, and after every resumption.

        Whatever ends the block, the weights are at their mean again. One without a gradient has one of zero.
        """
        self._forget()  # of a step that fp16 skipped
        weights = [p for group in self.param_groups for p in group["params"]]
        means = [p.data for p in weights]
        drawn = self.sampled_params(train=True)
        with preserved_generators():
            torch.manual_seed((self._seed * 1_000_003 + self.current_step) % 2**63)
            drawn.__enter__()
        try:
            yield
        except BaseException:
            for p, mean in zip(weights, means, strict=True):
                p.data = mean
            raise
        for p in weights:  # those that no batch reached, whose gradient ivon asks for
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        drawn.__exit__(None, None, None)

    def _forget(self) -> None:
        """Forget the gradients at draws, as a step does; tests/methods/test_ivon.py compares."""
        self.state.update(count=0, avg_grad=None, avg_nxg=None, avg_gsq=None)

    def step(self, closure: Any = None) -> Any:
        """Skip a step whose gradients were removed."""
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            self._forget()
            return None
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Momentum and curvature are in ivon's groups, and the number of steps nowhere: here all are state."""
        groups, state, first = [], {}, 0
        for number, group in enumerate(self.param_groups):
            count = len(group["params"])
            kept = {name: value for name, value in group.items() if name not in ("params", "momentum", "hess")}
            groups.append({**kept, "params": list(range(first, first + count))})
            state[number] = {
                "momentum": group["momentum"],
                "hess": group["hess"],
                "step": torch.tensor(self.current_step),
            }
            first += count
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave, in place."""
        for number, group in enumerate(self.param_groups):
            saved = state_dict["state"][number]
            for name in ("momentum", "hess"):
                group[name].copy_(saved[name])
            self.current_step = int(saved["step"])
