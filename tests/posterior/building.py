"""Posteriors of known laws, and what is compared of their draws with those of the reference."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monteclora.posterior import AdapterPosterior, Draw, LayerShape, PosteriorSettings
from tests import reference
from tests.posterior.checks import COUNT
from tests.reference import Law

__all__ = [
    "LAWS",
    "posterior_of",
    "random_posterior",
    "raw_normals",
    "reference_statistics",
    "row_scales",
    "set_law",
    "stacked_noise",
    "statistics",
]

# both covariances, both laws of the weights, normalised (nu = r) and published (here with more degrees of freedom)
LAWS = [
    Law(full=full, laplace=laplace, normalised=normalised, dof=dof)
    for full, laplace, (normalised, dof) in itertools.product((False, True), (False, True), ((True, 3), (False, 6)))
]


def statistics(a: np.ndarray) -> dict[str, np.ndarray]:
    """Of draws (count, r, n): single entries, and how those of a row, of a column and all of them hang together."""
    last = a.shape[1] - 1
    return {
        "A_11": a[:, 0, 0],
        "|A_r1|": np.abs(a[:, last, 0]),
        "A_11 A_r1": a[:, 0, 0] * a[:, last, 0],
        "|A_11 A_12|": np.abs(a[:, 0, 0] * a[:, 0, 1]),
        "||A||": np.linalg.norm(a, axis=(1, 2)),
    }


@functools.cache
def reference_statistics(law: Law) -> dict[str, np.ndarray]:
    """Those of the N-draw sampler, each sorted."""
    draws = reference.draws(law, COUNT, np.random.default_rng(0))
    return {name: np.sort(values) for name, values in statistics(draws).items()}


def posterior_of(laws: Sequence[Law], *, seed: int = 0, **settings: Any) -> AdapterPosterior:
    """One layer for each law; the laws agree in N and in everything that is a setting."""
    first = laws[0]
    posterior = AdapterPosterior(
        [LayerShape(f"layer{i}", len(law.rho), law.columns) for i, law in enumerate(laws)],
        [law.scale for law in laws],
        PosteriorSettings(
            num_components=len(first.alpha),
            covariance="full" if first.full else "diagonal",
            dirichlet="laplace" if first.laplace else "exact",
            normalised=first.normalised,
            # None is each layer's rank
            degrees_of_freedom=None if all(law.dof == len(law.rho) for law in laws) else float(first.dof),
            **settings,
        ),
        seed=seed,
    )
    set_law(posterior, laws)
    return posterior


@torch.no_grad()
def set_law(posterior: AdapterPosterior, laws: Sequence[Law]) -> None:
    """Give the parameters the values of the laws."""
    posterior.rho.copy_(torch.tensor([value for law in laws for value in law.rho]))
    posterior.eta.copy_(torch.tensor([law.alpha for law in laws]).log())


def random_posterior(
    seed: int = 0, *, shapes: Sequence[tuple[int, int]] = ((2, 5), (3, 4), (1, 7)), **settings: Any
) -> AdapterPosterior:
    """A few layers of different ranks and widths, away from the prior."""
    layers = [LayerShape(f"layer{i}", rank, columns) for i, (rank, columns) in enumerate(shapes)]
    scale = [0.1 * (i + 1) for i in range(len(layers))]
    posterior = AdapterPosterior(layers, scale, PosteriorSettings(**settings), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        posterior.rho.normal_(generator=generator).mul_(0.5)
        posterior.eta.normal_(generator=generator)
    return posterior


def stacked_noise(draw: Draw, every: slice = slice(None)) -> np.ndarray:
    """``A - mu`` of the chosen layers, of one shape, as draws of one law: shape (layers [* S], r, n)."""
    return torch.stack([part.matrix.detach() for part in draw.layers[every]]).double().flatten(0, -3).numpy()


def raw_normals(posterior: AdapterPosterior, generator: torch.Generator) -> Tensor:
    """The standard normal numbers of a draw, flat."""
    return posterior.rho.detach().new_empty(posterior._layout.cells).normal_(generator=generator)


def row_scales(posterior: AdapterPosterior, draw: Draw) -> list[Tensor]:
    """What the rows of every layer's noise were multiplied by: shape (r, 1) or (S, r, 1)."""
    return list(draw.row_scale.unsqueeze(-1).split([layer.rank for layer in posterior.layers], -2))
