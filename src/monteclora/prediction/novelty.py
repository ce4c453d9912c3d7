"""How unlike its training rows a row is: the energy of its logits and the distance to the nearest training rows.

The energy is that of the tuned model at its mean. Features are two views of the last hidden states of the model without
its adapter, which training has not pulled towards the training rows' labels: their mean over the tokens of a row, and
that of the token in which a head would read the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.numpy import save
from torch import nn

from monteclora.errors import DataError
from monteclora.metrics.ood import neighbour_distance
from monteclora.prediction.fitted_file import fitted_file
from monteclora.prediction.forward import Collate, FloatArray, base_of, batches, placed, to_device
from monteclora.prediction.predictive import evaluating
from monteclora.system.atomic import write_file

__all__ = ["MOST_BYTES", "NOVELTY_FILE", "Novelty", "Seen", "look_at", "most_rows", "pretrained_features"]

NOVELTY_FILE = "novelty.safetensors"
MOST_BYTES = 4_000_000
"""Of reference features: callers subsample the training rows to :func:`most_rows` of this size."""
_FORMAT = 2
_NEIGHBOURS, _SHARE = 3, 2.0  # see docs/abstaining.md for what was measured
_QUANTILE = 0.95


@dataclass(frozen=True)
class Seen:
    """What forward passes show of B rows.

    Attributes:
        features: float64 (B, 2 D), of the last hidden states without the adapter, D numbers each: the mean over a row's
            tokens, and the first token, of a model that reads from left to right the last one; each scaled to length 1.
            A model that was trained whole has no states without an adapter, and its own are taken.
        energy: float64 (B,), minus the log-sum-exp of the logits (Liu et al., NeurIPS 2020).
        max_logit: float64 (B,), the largest logit (Hendrycks et al., ICML 2022).
    """

    features: FloatArray
    energy: FloatArray
    max_logit: FloatArray


def look_at(model: nn.Module, rows: Sequence[dict[str, Any]], collate: Collate, batch_size: int = 64) -> Seen:
    """The features and energies of encoded rows.

    The adapter is switched off for part of the call: no other thread may use the model.

    Args:
        model: a classifier that returns ``hidden_states``, as every model of transformers does.
        rows: with ``input_ids`` and ``attention_mask``; ``labels`` are ignored.
        collate: pads a list of rows to a batch.
        batch_size: rows per forward pass.

    Raises:
        DataError: there is no row.
    """
    features: list[tuple[list[int], FloatArray]] = []
    energy, max_logit = np.empty(len(rows)), np.empty(len(rows))
    with evaluating(model):
        for indices, batch in _placed_batches(model, rows, collate, batch_size):
            found = model(**batch, output_hidden_states=not isinstance(model, PeftModel))
            states = _pretrained_states(model, batch) if isinstance(model, PeftModel) else found.hidden_states[-1]
            features.append((indices, _views(model, states, batch)))
            logits = found.logits.double()
            energy[indices] = -torch.logsumexp(logits, -1).cpu().numpy()
            max_logit[indices] = logits.amax(-1).cpu().numpy()
    return Seen(_in_order(features), energy, max_logit)


def pretrained_features(
    model: PeftModel, rows: Sequence[dict[str, Any]], collate: Collate, batch_size: int = 64
) -> FloatArray:
    """The mean over the tokens of each row, float64 (B, D), in one forward pass a batch; see :func:`look_at`."""
    features = []
    with evaluating(model):
        for indices, batch in _placed_batches(model, rows, collate, batch_size):
            features.append((indices, _pooled(_pretrained_states(model, batch), batch)))
    return _in_order(features)


def _placed_batches(
    model: nn.Module, rows: Sequence[dict[str, Any]], collate: Collate, batch_size: int
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Batches of rows of about the same length, on the model's device, with the rows' numbers."""
    if not rows:
        raise DataError("there are no rows to look at", "Give at least one.")
    inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
    for indices in batches(inputs, batch_size):
        yield indices, placed(base_of(model), to_device(collate([inputs[i] for i in indices]), model))


def _pooled(states: torch.Tensor, batch: dict[str, Any]) -> FloatArray:
    """The mean of hidden states (B, T, D) over the tokens of each row, float64 (B, D)."""
    mask = batch["attention_mask"].unsqueeze(-1).double()
    pooled: FloatArray = ((states.double() * mask).sum(1) / mask.sum(1)).cpu().numpy()
    return pooled


def _views(model: nn.Module, states: torch.Tensor, batch: dict[str, Any]) -> FloatArray:
    """The features of :class:`Seen`, float64 (B, 2 D), of hidden states (B, T, D)."""
    places = torch.arange(states.shape[1], device=states.device)
    mask = batch["attention_mask"].bool()
    if _reads_both_ways(model):
        read = torch.where(mask, places, states.shape[1]).amin(1)
    else:
        read = torch.where(mask, places, -1).amax(1)
    token = states[torch.arange(len(states), device=states.device), read].double().cpu().numpy()
    parts = (_pooled(states, batch), token)
    return np.concatenate([part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for part in parts], 1)


def _reads_both_ways(model: nn.Module) -> bool:
    """Whether the first token's state depends on those after it: the model is an encoder, or no text model we know."""
    import transformers

    config = getattr(base_of(model), "config", None)
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return encoder or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING


def _in_order(parts: Sequence[tuple[list[int], FloatArray]]) -> FloatArray:
    order = np.concatenate([indices for indices, _ in parts])
    return np.concatenate([found for _, found in parts])[np.argsort(order)]


def _pretrained_states(model: PeftModel, batch: dict[str, Any]) -> torch.Tensor:
    if model.active_peft_config.is_prompt_learning:
        # virtual tokens are put before what the base model reads, and peft leaves that model as it is
        found: torch.Tensor = model.get_base_model()(**batch, output_hidden_states=True).hidden_states[-1]
        return found
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            states: torch.Tensor = model(**batch, output_hidden_states=True).hidden_states[-1]
    finally:
        for parameter, required in trainable:  # peft makes the adapter trainable when it switches it on again
            parameter.requires_grad_(required)
    return states


@dataclass(frozen=True)
class Novelty:
    """Scores rows against training rows; see :meth:`fit`.

    Attributes:
        features: of training rows, float16 (N, 2 D), or (N, D) of the first view alone.
        centre, spread: float64 (2,), mean and standard deviation of distance and energy over held-out rows.
        limit: 0.95 quantile of the held-out rows' scores.
        weights: the checksum of the model's weights that these were measured with; empty where it is not known.
        neighbours: training rows whose mean distance counts.
        share: how often the distance counts as much as the energy.
    """

    features: NDArray[np.float16]
    centre: FloatArray
    spread: FloatArray
    limit: float
    weights: str = ""
    neighbours: int = _NEIGHBOURS
    share: float = _SHARE

    @classmethod
    def fit(cls, training: Seen, held_out: Seen, weights: str = "") -> Novelty:
        """Keep the training rows, and learn from rows held out of training how far apart ordinary rows are."""
        kept = training.features.astype(np.float16)
        without = cls(kept, np.zeros(2), np.ones(2), 0.0, weights)
        parts = without.parts_of(held_out)
        centre, spread = parts.mean(1), np.maximum(parts.std(1), 1e-12)
        unlimited = replace(without, centre=centre, spread=spread)
        return replace(unlimited, limit=float(np.quantile(unlimited.of(held_out), _QUANTILE, method="inverted_cdf")))

    def of(self, seen: Seen) -> FloatArray:
        """The novelty of rows, float64 (B,): above 0 where a row is more novel than 95 % of the held-out rows.

        The standardised mean distance to the nearest training rows, times its share, and the standardised energy, minus
        the limit.
        """
        distance, energy = (self.parts_of(seen) - self.centre[:, None]) / self.spread[:, None]
        found: FloatArray = self.share * distance + energy - self.limit
        return found

    def parts_of(self, seen: Seen) -> FloatArray:
        """Distance and energy, float64 (2, B)."""
        views = seen.features[:, : self.features.shape[1]]
        return np.stack([neighbour_distance(views, self.features, self.neighbours), seen.energy])

    def save(self, path: Path) -> None:
        """Write the reference; raises CheckpointError where the disk refuses."""
        tensors: dict[str, NDArray[Any]] = {
            "features": self.features,
            "centre": self.centre,
            "spread": self.spread,
            "limit": np.array([self.limit]),
            "how": np.array([self.neighbours, self.share]),
        }
        write_file(path, save(tensors, metadata={"format": str(_FORMAT), "weights_sha256": self.weights}))

    @classmethod
    def load(cls, path: Path) -> Novelty:
        """Read what :meth:`save` wrote, or an earlier version did: its score stays what it was.

        Raises:
            CheckpointError: the file is missing, damaged or of a later format.
        """
        with fitted_file(path, "np", _FORMAT, "Remove it; it is made again when needed.") as (about, found):
            features, centre, spread, limit = (found[name] for name in ("features", "centre", "spread", "limit"))
            how = found.get("how", np.array([1.0, 1.0]))  # format 1: the nearest row, by the first view
            pairs = (centre, spread, how)
            if features.ndim != 2 or limit.shape != (1,) or any(each.shape != (2,) for each in pairs):
                raise ValueError("its tensors have other shapes")
            if not all(np.isfinite(values).all() for values in found.values()):
                raise ValueError("it holds numbers that are not finite")
        known = about.get("weights_sha256", "")
        return cls(features, centre, spread, float(limit[0]), known, int(how[0]), float(how[1]))


def most_rows(width: int) -> int:
    """How many training rows are kept for features of this width."""
    return max(1, MOST_BYTES // (2 * width))
