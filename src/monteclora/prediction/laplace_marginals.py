"""What each row's logits are distributed as under a Laplace approximation, for many prior precisions at once.

Under the linearised model (Immer et al. 2021, arXiv 2008.08216) the logits of a row are Gaussian:

    f(x; w) ~ N(f(x; w*), J(x) P^-1 J(x)^T)

J is found once, in the eigenvectors of the Gauss-Newton matrix, where P is diagonal for every prior precision, however
many precisions are compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monteclora.prediction.forward import Collate, to_device
from monteclora.prediction.laplace import LaplacePosterior
from monteclora.prediction.laplace_jacobians import jacobians
from monteclora.prediction.predictive import class_logits, evaluating
from monteclora.system.progress import Progress

__all__ = ["LogitMoments", "logit_moments"]

_DRAWS = 256  # of each row's logits: the error of a mean probability is below 0.03


@dataclass(frozen=True)
class LogitMoments:
    """The Gaussian of each row's logits at each prior precision.

    Attributes:
        mean: logits at the trained weights, (N, C), float64.
        covariance: (P, N, C, C), float64.
    """

    mean: Tensor
    covariance: Tensor

    def nll(self, labels: Tensor) -> Tensor:
        """Negative log-likelihood of each row's label, (N,), under each precision, in nats, (P, N): of mean
        probabilities over the same standard normal draws for every row and precision."""
        classes = self.mean.shape[1]
        half = torch.randn(_DRAWS // 2, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        noise = torch.cat([half, -half])
        found = []
        for covariance in self.covariance:
            values, vectors = torch.linalg.eigh(covariance)  # no Cholesky: it may be singular
            root = vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)
            log_probs = (self.mean + torch.einsum("nck,sk->snc", root, noise)).log_softmax(-1)
            chosen = log_probs[:, torch.arange(len(labels)), labels]
            found.append(math.log(_DRAWS) - chosen.logsumexp(0))
        return torch.stack(found)


def logit_moments(
    model: nn.Module,
    posterior: LaplacePosterior,
    rows: Sequence[dict[str, Any]],
    collate: Collate,
    precisions: Sequence[float],
    *,
    progress: Progress | None = None,
) -> LogitMoments:
    """The moments of rows' logits; the posterior's own prior precision is not used.

    Args:
        model: a classifier at the weights of the posterior; requires_grad and modes are as before afterwards.
        posterior: of its weights.
        rows: encoded, with ``input_ids``.
        collate: makes a batch of rows.
        precisions: prior precisions, above 0.
        progress: called with the number of rows done.
    """
    parameters = dict(model.named_parameters())
    weights = {name: parameters[name] for name in posterior.shapes}
    unlabelled = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    means: list[Tensor] = []
    covariances = []

    def logits_of(some: slice) -> Tensor:
        return class_logits(model, to_device(collate(unlabelled[some]), model))

    with evaluating(model), torch.enable_grad():
        before = [weight.requires_grad for weight in weights.values()]
        for weight in weights.values():
            weight.requires_grad_(True)
        try:
            for logits, found in jacobians(model, weights, logits_of, len(rows)):
                means.append(logits.double().cpu())
                jacobian = {name: each.cpu() for name, each in found.items()}
                covariances.append(_covariance(posterior, jacobian, precisions))
                if progress is not None:
                    progress(len(logits))
        finally:
            for weight, required in zip(weights.values(), before, strict=True):
                weight.requires_grad_(required)
    return LogitMoments(torch.cat(means), torch.cat(covariances, 1))


def _covariance(posterior: LaplacePosterior, jacobian: Mapping[str, Tensor], precisions: Sequence[float]) -> Tensor:
    """J P^-1 J^T of each row, (P, N, C, C), float64, from J by name, (N, C, *shape)."""
    total = torch.zeros((), dtype=torch.float64)
    for name, each in jacobian.items():
        along = posterior.along_eigenvectors(name, each).flatten(2)
        eigenvalues = posterior.eigenvalues(name).flatten()
        parts = [(along / (eigenvalues + precision)) @ along.mT for precision in precisions]
        total = total + torch.stack(parts).double()
    return total
