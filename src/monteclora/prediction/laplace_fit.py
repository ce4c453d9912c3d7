"""Fitting a Laplace approximation with laplace-torch.

The Gauss-Newton matrix of the training rows' log-likelihood, Kronecker-factored (Martens & Grosse 2015; as
Laplace-LoRA, arXiv 2308.13111) where every trained weight is a linear layer's and the factors are of a size to keep,
else its diagonal; and one prior precision for all weights: the one that maximises the Laplace marginal likelihood
(MacKay 1992; Immer et al. 2021, arXiv 2104.04975), or a larger one that predicts held-out rows better.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from monteclora.errors import ConfigError, DataError
from monteclora.prediction.forward import Collate, to_device
from monteclora.prediction.laplace import LAPLACE, LaplacePosterior, Structure
from monteclora.prediction.predictive import class_logits, evaluating
from monteclora.system.progress import Progress
from monteclora.system.randomness import preserved_generators

__all__ = ["check_installed", "fit_laplace", "structure_of"]

_MOST_FACTOR_NUMBERS = 250_000_000  # 1 GB in float32
_MOST_JACOBIAN_NUMBERS = 50_000_000  # 200 MB
_STEPS = 300  # of Adam on the logarithm of the prior precision, 0.1 each at most
_OTHER = "Use another sampler."


def check_installed() -> None:
    """Raises ConfigError that names the extra where laplace-torch is missing."""
    if importlib.util.find_spec("laplace") is None:
        raise ConfigError(
            f"the sampler {LAPLACE} is fitted with laplace-torch, which is not installed",
            'Install it with pip install "monteclora[laplace]".',
        )


def structure_of(model: nn.Module, names: Sequence[str]) -> Structure:
    """``kron`` where it can be had of the trained weights and its factors are not too large, else ``diag``."""
    parameters = dict(model.named_parameters())
    shapes = [parameters[name].shape for name in names]
    linear = all(isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) for name in names)
    numbers = sum(size * size for shape in shapes for size in shape)
    return "kron" if linear and numbers <= _MOST_FACTOR_NUMBERS else "diag"


def fit_laplace(
    model: nn.Module,
    names: Sequence[str],
    rows: Sequence[dict[str, Any]],
    collate: Collate,
    *,
    classes: int,
    structure: Structure | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> LaplacePosterior:
    """Fit an approximation at the model's weights.

    Rows of one length make a batch: no padding is among the activations that the factors average.

    Args:
        model: a classifier with its trained weights; requires_grad and modes are as before afterwards.
        names: of the trained parameters.
        rows: of the training split, with ``input_ids`` and, in ``labels``, the number of the class.
        collate: makes a batch of rows.
        classes: how many.
        structure: of the Gauss-Newton matrix; None for :func:`structure_of`.
        batch_size: most rows per pass.
        progress: called with the number of rows done.

    Raises:
        ConfigError: laplace-torch is not installed.
        DataError: there are no rows, or the curvature is not finite.
    """
    check_installed()
    from laplace import Laplace

    if not rows:
        raise DataError("there are no training rows to fit a Laplace approximation to", "Give at least one.")
    chosen = structure or structure_of(model, names)
    started = time.perf_counter()
    if chosen == "diag":  # laplace-torch holds the Jacobian of a batch, (B, C, weights)
        count = sum(parameter.numel() for name, parameter in model.named_parameters() if name in set(names))
        batch_size = max(1, min(batch_size, _MOST_JACOBIAN_NUMBERS // (classes * count)))
    logits = _Logits(model)
    with (
        preserved_generators(),
        warnings.catch_warnings(),
        evaluating(model),
        torch.enable_grad(),
        _trained(model, names),
    ):
        warnings.simplefilter("ignore")  # what it says of choices that are made here
        found = Laplace(logits, "classification", subset_of_weights="all", hessian_structure=chosen)
        try:
            found.fit(_Batches(model, rows, collate, batch_size, progress))
        except SystemExit:  # so laplace-torch ends where a factor has no eigenvalues
            raise DataError("no Laplace approximation can be fitted: its curvature is not finite", _OTHER) from None
        found.optimize_prior_precision(pred_type="glm", method="marglik", n_steps=_STEPS, prior_structure="scalar")
        shapes = {
            name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad
        }
    posterior = LaplacePosterior(
        structure=chosen,
        shapes=shapes,
        parts=_diagonal(found.H, shapes) if chosen == "diag" else _factors(found.H, shapes),
        prior_precision=float(found.prior_precision),
        rows=len(rows),
        seconds=time.perf_counter() - started,
    )
    try:
        posterior.check()
    except ValueError as error:
        raise DataError(f"no Laplace approximation can be fitted: {error}", _OTHER) from None
    return posterior


class _Logits(nn.Module):
    """A classifier as laplace-torch calls it: a batch with its labels to logits, (B, C)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MutableMapping[str, Any]) -> Tensor:
        return class_logits(self.model, {name: value for name, value in batch.items() if name != "labels"})


class _Batches:
    """What laplace-torch takes for a loader: batches of rows of one length, and how many rows there are in all."""

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[dict[str, Any]],
        collate: Collate,
        batch_size: int,
        progress: Progress | None,
    ) -> None:
        self.model, self.dataset, self.collate = model, rows, collate
        self.batch_size, self.progress = batch_size, progress

    def __len__(self) -> int:
        return sum(1 for _ in self._groups())

    def _groups(self) -> Iterator[list[dict[str, Any]]]:
        ordered = sorted(self.dataset, key=lambda row: -len(row["input_ids"]))
        for _, group in groupby(ordered, key=lambda row: len(row["input_ids"])):
            rows = list(group)
            for first in range(0, len(rows), self.batch_size):
                yield rows[first : first + self.batch_size]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for rows in self._groups():
            yield to_device(self.collate(rows), self.model)
            if self.progress is not None:
                self.progress(len(rows))


@contextmanager
def _trained(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """These parameters, and no others, have a gradient: laplace-torch takes those for the weights."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in set(names))
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None


def _diagonal(diagonal: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    parts = diagonal.detach().float().cpu().split(sizes)
    return {name: part.reshape(shape).clone() for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _factors(decomposed: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    parts = {}
    for name, vectors, values in zip(shapes, decomposed.eigenvectors, decomposed.eigenvalues, strict=True):
        for place, (basis, spectrum) in enumerate(zip(vectors, values, strict=True)):
            parts[f"{name}/vectors.{place}"] = basis.detach().float().cpu()
            parts[f"{name}/values.{place}"] = spectrum.detach().float().cpu()
    return parts
