"""Laplace approximations of the trained weights: Gaussian draws around them, predicted with by the linearised model.

Daxberger et al. 2021 (arXiv 2106.14806); for LoRA Yang et al. 2024 (arXiv 2308.13111). With the trained weights w* and
the posterior N(w*, P^-1), P = GGN + prior precision, draw s is a function of the weights linearised at w*:

    logits_s(x) = f(x; w*) + J(x) (w_s - w*),   w_s ~ N(w*, P^-1)

which is the predictive that belongs to the generalised Gauss-Newton matrix (Immer et al. 2021, arXiv 2008.08216); the
network's own predictions at w_s are known to underfit. J takes a forward pass and one backward pass for each class,
whatever the number of draws: :mod:`monteclora.prediction.laplace_jacobians`. How P is found is in
:mod:`monteclora.prediction.laplace_fit`; nothing here needs laplace-torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from monteclora.adapters.rows import batch_tensor
from monteclora.errors import CheckpointError, ConfigError
from monteclora.prediction.fitted_file import fitted_file
from monteclora.prediction.laplace_jacobians import moved_logits
from monteclora.system.atomic import write_file

__all__ = ["LAPLACE", "LAPLACE_FILE", "Laplace", "LaplacePosterior", "Structure", "attach"]

LAPLACE = "laplace"
LAPLACE_FILE = "laplace.safetensors"
Structure = Literal["kron", "diag"]
_FORMAT = 2  # 1 had no validation rows choose the prior precision
_KEPT_NUMBERS = 50_000_000  # of draws in memory, 200 MB


@dataclass(frozen=True)
class LaplacePosterior:
    """The precision P of the trained weights, and draws from N(0, P^-1).

    Attributes:
        structure: of the Gauss-Newton matrix: ``kron``, one Kronecker product for each weight, or ``diag``.
        shapes: of the trained parameters, by name, in their order.
        parts: of the matrix, float32, by name. ``diag``: its diagonal, in the parameter's shape. ``kron``: the
            eigenvectors (out, out), (in, in) and eigenvalues (out,), (in,) of a weight's two factors, and (out, out)
            and (out,) of a bias, as ``NAME/vectors.0``, ``NAME/values.0``, and ``.1`` likewise.
        prior_precision: of every weight.
        rows: that the matrix is a sum over.
        seconds: the fit took.
        weights: checksum of the weights that it was fitted at.
        chosen_on: how many validation rows chose the prior precision by their NLL; 0 where it has the largest marginal
            likelihood.
    """

    structure: Structure
    shapes: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, Tensor]
    prior_precision: float
    rows: int
    seconds: float = 0.0
    weights: str = ""
    chosen_on: int = 0
    _draws: dict[tuple[int, int], dict[str, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def scaled(self, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A linear map M with M M^T = P^-1: from standard normal noise to deviations from the trained weights.

        Args:
            noise: by name, in the parameters' shapes.
        """
        return {name: self._scaled(name, values) for name, values in noise.items()}

    def _scaled(self, name: str, noise: Tensor) -> Tensor:
        found = noise / (self.eigenvalues(name) + self.prior_precision).sqrt()
        return self._turned(name, found, back=True)

    def eigenvalues(self, name: str) -> Tensor:
        """Of a parameter's block of the Gauss-Newton matrix, float32, in the parameter's shape."""
        if self.structure == "diag":
            return self.parts[name]
        values = [self.parts[f"{name}/values.{place}"] for place in range(len(self.shapes[name]))]
        return values[0] if len(values) == 1 else torch.outer(*values)

    def along_eigenvectors(self, name: str, jacobian: Tensor) -> Tensor:
        """A Jacobian in a parameter, (..., *shape), along the eigenvectors of its block, in the same shape."""
        return self._turned(name, jacobian, back=False)

    def _turned(self, name: str, values: Tensor, *, back: bool) -> Tensor:
        """Into the eigenvectors of a parameter's block, or back out of them."""
        if self.structure == "diag":
            return values
        first, *second = (self.parts[f"{name}/vectors.{place}"] for place in range(len(self.shapes[name])))
        if not second:
            return values @ (first.T if back else first)
        return first @ values @ second[0].T if back else first.T @ values @ second[0]

    def deviation(self, seed: int, number: int) -> Mapping[str, Tensor]:
        """Draw ``number`` of the stream ``seed``: w_s - w* by name, float32, on the CPU; the same on every device."""
        key = (seed, number)
        found = self._draws.get(key)  # once: another thread may clear them
        if found is None:
            digest = hashlib.blake2b(f"{LAPLACE},{seed},{number}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            found = self.scaled({n: torch.randn(shape, generator=generator) for n, shape in self.shapes.items()})
            if (len(self._draws) + 1) * sum(part.numel() for part in found.values()) > _KEPT_NUMBERS:
                self._draws.clear()
            self._draws[key] = found
        return found

    def facts(self) -> dict[str, Any]:
        """What is reported of the fit, for JSON."""
        return {
            "structure": self.structure,
            "prior_precision": self.prior_precision,
            "rows": self.rows,
            "chosen_on": self.chosen_on,
            "seconds": round(self.seconds, 3),
        }

    def save(self, path: Path) -> None:
        """Write it, whole or not at all; raises CheckpointError where the disk refuses."""
        about = {
            "format": str(_FORMAT),
            **{name: json.dumps(value) for name, value in self.facts().items()},
            "shapes": json.dumps(self.shapes),
            "weights_sha256": self.weights,
        }
        write_file(path, save({name: part.contiguous() for name, part in self.parts.items()}, metadata=about))

    @classmethod
    def load(cls, path: Path) -> LaplacePosterior | None:
        """Read what :meth:`save` wrote; None where an earlier version wrote it, which chose the precision otherwise.

        Raises:
            CheckpointError: the file is missing, damaged or of a later format.
        """
        with fitted_file(path, "pt", _FORMAT, "Remove it; it is fitted again when needed.") as (about, parts):
            if int(about["format"]) < _FORMAT:
                return None
            names = ("structure", "prior_precision", "rows", "chosen_on", "seconds")
            facts = {name: json.loads(about[name]) for name in names}
            shapes = {name: tuple(map(int, shape)) for name, shape in json.loads(about["shapes"]).items()}
            found = cls(shapes=shapes, parts=parts, weights=about["weights_sha256"], **facts)
            found.check()
        return found

    def check(self) -> None:
        """Raises ValueError where parts are missing, have other shapes than the weights, or make no precision."""
        expected: dict[str, tuple[int, ...]] = {}
        for name, shape in self.shapes.items():
            if self.structure == "diag":
                expected[name] = shape
                continue
            for place, size in enumerate(shape):
                expected |= {f"{name}/vectors.{place}": (size, size), f"{name}/values.{place}": (size,)}
        found = {name: tuple(part.shape) for name, part in self.parts.items()}
        if self.structure not in ("kron", "diag") or found != expected:
            raise ValueError("its tensors are not those of its weights")
        if not all(part.isfinite().all() for part in self.parts.values()):
            raise ValueError("it holds numbers that are not finite")
        if not 0.0 < self.prior_precision < float("inf"):
            raise ValueError(f"its prior precision is {self.prior_precision}")
        if any((part < 0).any() for name, part in self.parts.items() if "/vectors." not in name):
            raise ValueError("its precision is negative")


_Deviations = Sequence[Mapping[str, Tensor]]
_current: ContextVar[tuple[nn.Module, _Deviations] | None] = ContextVar("deviations", default=None)
# a pass under a draw has other tensors in the place of the weights: no other pass may see them
_passes = threading.RLock()


def attach(model: nn.Module, posterior: LaplacePosterior) -> None:
    """Let a model predict under draws of :class:`Laplace`; outside of them it is what it was.

    From then on its passes wait for each other: threads that predict with it do so one after the other. Parts of the
    model that are called by themselves are not held back, and do not know of draws.

    Args:
        model: a classifier, on any device.
        posterior: of its weights.

    Raises:
        CheckpointError: the posterior is of other weights.
        ConfigError: something has given the model a forward of its own, which draws would be lost in.
    """
    own = getattr(model.__dict__.get("forward"), "__func__", None)
    attached = getattr(own, "__wrapped__", None) is type(model).forward
    if "forward" in model.__dict__ and own is not type(model).forward and not attached:
        raise ConfigError(
            f"the sampler {LAPLACE} cannot draw in this {type(model).__name__}: its forward was replaced, "
            "as accelerate does to move parts of a model between devices",
            "Load the model whole, on one device, or use another sampler.",
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if any(shapes.get(name) != shape for name, shape in posterior.shapes.items()):
        raise CheckpointError("the Laplace approximation is of other weights than the model's", "Fit it again.")
    model.laplace_posterior = posterior  # type: ignore[assignment]
    if attached:
        return

    # of the instance and not a hook: under a draw the plain pass is not needed. A bound method follows a copied model.
    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _passes:
            drawn = _current.get()
            if drawn is None or drawn[0] is not self:
                return type(self).forward(self, *args, **kwargs)
            return _linearised(self, drawn[1], args, kwargs)

    model.forward = types.MethodType(forward, model)


class _Plain(nn.Module):
    """A model without what :func:`attach` put on it, and without its hooks, which this pass has met already."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = model.training
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.model).forward(self.model, *args, **kwargs)


def _linearised(
    model: nn.Module, deviations: _Deviations, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> SequenceClassifierOutput:
    """f + J dw of rows that are given as often as there are deviations, (S B, C)."""
    parameters = dict(model.named_parameters())
    leaves = {name: parameters[name].detach().requires_grad_() for name in deviations[0]}
    batch = batch_tensor(args, kwargs)
    assert batch is not None
    given = batch.shape[0]
    plain = _Plain(model)

    def logits_of(rows: slice) -> Tensor:
        def part(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == given else value

        named = {f"model.{name}": leaf for name, leaf in leaves.items()}
        some = {name: part(value) for name, value in kwargs.items()}
        found: Tensor = torch.func.functional_call(plain, named, tuple(map(part, args)), some).logits
        return found

    found = moved_logits(model, leaves, logits_of, deviations, given // len(deviations))
    return SequenceClassifierOutput(logits=found.flatten(0, 1))


@dataclass(frozen=True)
class Laplace:
    """S draws from a Laplace approximation; see :class:`monteclora.prediction.sampler.Sampler`.

    Attributes:
        num_samples: S.
        seed: the stream of draws.
    """

    num_samples: int
    seed: int = 0
    name: str = LAPLACE

    def check(self, model: nn.Module) -> None:
        """Raises ConfigError for a model to which no approximation was attached."""
        if not isinstance(getattr(model, "laplace_posterior", None), LaplacePosterior):
            raise ConfigError(
                f"the sampler {LAPLACE} needs an approximation that is fitted after training, and the model has none",
                f"Use `monteclora evaluate RUN --sampler {LAPLACE}`, which fits it.",
            )

    @property
    def shares_passes(self) -> bool:
        """All draws take the passes of one."""
        return True

    @property
    def keeps_shared(self) -> bool:
        """Draws of several passes share nothing."""
        return False

    def keeping(self, model: nn.Module) -> AbstractContextManager[None]:
        """Nothing to keep."""
        return nullcontext()

    @contextmanager
    def draws(self, model: nn.Module, first: int, count: int) -> Iterator[None]:
        """Forward passes in the block are given their rows ``count`` times over, and give the copies' logits under the
        draws ``first``, ``first + 1``, ..., and no other output.

        Raises:
            ConfigError: no approximation was attached to the model.
        """
        self.check(model)
        posterior: Any = model.laplace_posterior
        found = [posterior.deviation(self.seed, number) for number in range(first, first + count)]
        token = _current.set((model, found))
        try:
            yield
        finally:
            _current.reset(token)

    def draw(self, model: nn.Module, number: int) -> AbstractContextManager[None]:
        """Forward passes in the block give the logits of draw ``number``; see :meth:`draws`."""
        return self.draws(model, number, 1)
