"""How unlike its training rows a row is, from what the forward pass that answers it shows.

The parts are the distance to the nearest training rows in the last hidden states of the tuned model, the energy of its
logits, and the shares of the row's tokens, and of neighbours among them, that no training row has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.numpy import save
from torch import Tensor, nn

from monteclora.errors import DataError
from monteclora.metrics.ood import neighbour_distance
from monteclora.prediction.classes import collect
from monteclora.prediction.fitted_file import fitted_file
from monteclora.prediction.forward import Collate, FloatArray, base_of, batches, placed, to_device
from monteclora.prediction.known_tokens import KnownTokens
from monteclora.prediction.predictions import Predictions
from monteclora.prediction.predictive import class_logits, evaluating
from monteclora.prediction.sampler import MEAN
from monteclora.prediction.states import mean_of_tokens, views, watching
from monteclora.prediction.whitening import Whitening
from monteclora.system.atomic import write_file
from monteclora.system.progress import Progress

__all__ = [
    "MOST_BYTES",
    "NOVELTY_FILE",
    "Novelty",
    "Seen",
    "look_at",
    "most_rows",
    "predict_and_look",
    "pretrained_features",
    "with_pretrained",
]

NOVELTY_FILE = "novelty.safetensors"
MOST_BYTES = 4_000_000
"""Of reference features: callers subsample the training rows to :func:`most_rows` of this size."""
_FORMAT = 4
_NEIGHBOURS = 3
_SHARES = (2.0, 1.0, 2.0, 0.5)  # see docs/abstaining.md for what was measured
_LEAST_SPREAD = (1e-12, 1e-12, 0.02, 0.02)  # where every held-out token is known, one new of fifty is no sensation
_QUANTILE = 0.95


@dataclass(frozen=True)
class Seen:
    """What forward passes of a model at its mean show of B rows.

    Attributes:
        features: float32 (B, 2 D), of the last hidden states, D numbers each: the mean over a row's tokens, and the
            first token, of a model that reads from left to right the last one; each scaled to length 1.
        energy: float64 (B,), minus the log-sum-exp of the logits (Liu et al., NeurIPS 2020).
        max_logit: float64 (B,), the largest logit (Hendrycks et al., ICML 2022).
        tokens: the ids of each row's tokens.
        pretrained: float64 (B, 2 D), the features of the model without its adapter, which files of earlier versions
            need; None where they were not asked for. A model that was trained whole has its own there.
    """

    features: NDArray[np.float32]
    energy: FloatArray
    max_logit: FloatArray
    tokens: Sequence[Sequence[int]]
    pretrained: FloatArray | None = None


def predict_and_look(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Collate,
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> tuple[Predictions, Seen]:
    """Class probabilities of encoded rows at the mean, and what the same forward passes show besides.

    Args:
        model: a classifier of transformers, whole or with an adapter.
        rows, collate, batch_size, progress: see :func:`monteclora.prediction.classes.predict_classes`.

    Raises:
        ConfigError: the model gives no hidden states.
        DataError: there is no row.
    """
    inputs, features = _unlabelled(rows), list[tuple[list[int], FloatArray]]()

    def score(indices: list[int]) -> Tensor:
        batch = _batch(model, inputs, indices, collate)
        logits = class_logits(model, {**batch, **watched.arguments}).double()
        states = watched.states(batch["input_ids"].shape[1])
        features.append((indices, views(model, states, batch).float().cpu().numpy()))
        return torch.cat([logits.log_softmax(-1), logits.logsumexp(-1, True), logits.amax(-1, True)], -1)

    with watching(model) as watched:
        found = collect(model, inputs, score, MEAN, batch_size=batch_size, progress=progress)
    tokens = [row["input_ids"] for row in inputs]
    seen = Seen(_in_order(features), -found[0, :, -2], found[0, :, -1].copy(), tokens)
    return Predictions(np.ascontiguousarray(found[:, :, :-2])), seen


def look_at(model: nn.Module, rows: Sequence[dict[str, Any]], collate: Collate, batch_size: int = 64) -> Seen:
    """As :func:`predict_and_look`, without the probabilities."""
    return predict_and_look(model, rows, collate, batch_size=batch_size)[1]


def with_pretrained(
    model: nn.Module, seen: Seen, rows: Sequence[dict[str, Any]], collate: Collate, batch_size: int = 64
) -> Seen:
    """What was seen of rows, with the features of the pretrained model, in a forward pass more of each.

    The adapter is switched off for the call: no other thread may use the model.
    """
    return replace(seen, pretrained=_without(model, rows, collate, batch_size, views))


def pretrained_features(
    model: nn.Module, rows: Sequence[dict[str, Any]], collate: Collate, batch_size: int = 64
) -> FloatArray:
    """The mean over the tokens of each row without the adapter, float64 (B, D); see :func:`with_pretrained`."""
    return _without(model, rows, collate, batch_size, mean_of_tokens)


def _without(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Collate,
    batch_size: int,
    view: Callable[[nn.Module, Tensor, dict[str, Any]], Tensor],
) -> FloatArray:
    """What ``view`` makes of the last hidden states (B, T, D) without the adapter, in the order of the rows."""
    inputs, parts = _unlabelled(rows), []
    with evaluating(model), _without_adapter(model) as pretrained, watching(pretrained) as watched:
        for indices in batches(inputs, batch_size):
            batch = _batch(model, inputs, indices, collate)
            pretrained(**batch, **watched.arguments)
            states = watched.states(batch["input_ids"].shape[1])
            parts.append((indices, view(model, states, batch).cpu().numpy()))
    return _in_order(parts)


def _unlabelled(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    if not rows:
        raise DataError("there are no rows to look at", "Give at least one.")
    return [{key: value for key, value in row.items() if key != "labels"} for row in rows]


def _batch(model: nn.Module, rows: Sequence[dict[str, Any]], indices: list[int], collate: Collate) -> dict[str, Any]:
    """Some rows as the model takes them, on its device."""
    return placed(base_of(model), to_device(collate([rows[i] for i in indices]), model))


def _in_order(parts: Sequence[tuple[list[int], NDArray[Any]]]) -> NDArray[Any]:
    order = np.concatenate([indices for indices, _ in parts])
    return np.concatenate([found for _, found in parts])[np.argsort(order)]


@contextmanager
def _without_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """The model whose hidden states are the pretrained one's, in the block; one without an adapter as it is."""
    if not isinstance(model, PeftModel):
        yield model
        return
    if model.active_peft_config.is_prompt_learning:
        # virtual tokens are put before what the base model reads, and peft leaves that model as it is
        yield model.get_base_model()
        return
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield model.get_base_model()
    finally:
        for parameter, required in trainable:  # peft makes the adapter trainable when it switches it on again
            parameter.requires_grad_(required)


@dataclass(frozen=True)
class Novelty:
    """Scores rows against training rows; see :meth:`fit`.

    Attributes:
        features: of training rows, float16 (N, 2 D); in files of format 1 (N, D), of the first view alone.
        centre, spread: float64 (K,), mean and standard deviation over held-out rows of the K parts: distance, energy,
            new tokens and new pairs.
        limit: 0.95 quantile of the held-out rows' scores.
        weights: the checksum of the model's weights that these were measured with; empty where it is not known.
        known: the tokens of training rows. An earlier version kept no pairs, and there is no such part; one before it
            kept nothing (None): its features are those of the pretrained model, not whitened.
        neighbours: training rows whose mean distance counts.
        shares: float64 (K,), how much each part counts.
    """

    features: NDArray[np.float16]
    centre: FloatArray
    spread: FloatArray
    limit: float
    weights: str = ""
    known: KnownTokens | None = None
    neighbours: int = _NEIGHBOURS
    shares: FloatArray = field(default_factory=lambda: np.array(_SHARES))

    @classmethod
    def fit(cls, training: Seen, held_out: Seen, weights: str = "", known: KnownTokens | None = None) -> Novelty:
        """Keep the training rows, and learn from rows held out of training how far apart ordinary rows are.

        Args:
            training: rows, all or some, whose features are kept.
            held_out: rows that were not learned.
            weights: the checksum of the model's.
            known: the tokens of all training rows; by default those of ``training``.
        """
        kept, parts = training.features.astype(np.float16), len(_SHARES)
        tokens = KnownTokens.of(training.tokens) if known is None else known
        without = cls(kept, np.zeros(parts), np.ones(parts), 0.0, weights, tokens)
        found = without.parts_of(held_out)
        unlimited = replace(without, centre=found.mean(1), spread=np.maximum(found.std(1), _LEAST_SPREAD))
        return replace(unlimited, limit=float(np.quantile(unlimited.of(held_out), _QUANTILE, method="inverted_cdf")))

    def of(self, seen: Seen) -> FloatArray:
        """The novelty of rows, float64 (B,): above 0 where a row is more novel than 95 % of the held-out rows.

        The sum of the standardised parts, each times its share, minus the limit.
        """
        found: FloatArray = self.shares @ ((self.parts_of(seen) - self.centre[:, None]) / self.spread[:, None])
        return found - self.limit

    def parts_of(self, seen: Seen) -> FloatArray:
        """Distance, energy, shares of new tokens and of new pairs, float64 (4, B); of earlier scores the first ones.

        The distance is the mean of those to the nearest training rows, after all features are whitened by these, and
        scaled to length 1: training pulls states towards few directions, which tell only labels apart.
        """
        if self.known is None:
            assert seen.pretrained is not None  # callers look at needs_pretrained
            own = seen.pretrained[:, : self.features.shape[1]]
            return np.stack([neighbour_distance(own, self.features, self.neighbours), seen.energy])
        whiten, reference = self._whitened
        distance = neighbour_distance(whiten(seen.features), reference, self.neighbours)
        parts = [distance, seen.energy, self.known.new_tokens(seen.tokens)]
        return np.stack(parts if self.known.pairs is None else [*parts, self.known.new_pairs(seen.tokens)])

    @cached_property
    def _whitened(self) -> tuple[Whitening, FloatArray]:
        """What whitens features, and the training rows' own, float64 (N, 2 D)."""
        found = Whitening.of(self.features)
        return found, found(self.features)

    @property
    def needs_pretrained(self) -> bool:
        """Whether :attr:`Seen.pretrained` is what rows are compared by."""
        return self.known is None

    def save(self, path: Path) -> None:
        """Write the reference; raises CheckpointError where the disk refuses."""
        assert self.known is not None
        assert self.known.pairs is not None
        tensors: dict[str, NDArray[Any]] = {
            "features": self.features,
            "centre": self.centre,
            "spread": self.spread,
            "limit": np.array([self.limit]),
            "how": np.array([self.neighbours, *self.shares]),
            "known": self.known.tokens.astype(np.int32),
            "pairs": self.known.pairs,
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
            version = int(about.get("format", "1"))
            known = None
            if version > 2:
                pairs = found["pairs"].astype(np.int64) if version > 3 else None
                known = KnownTokens(found["known"].astype(np.int64), pairs)
            how = found.get("how", np.array([1.0, 1.0]))  # format 1: the nearest row, by the first view
            # the first formats have the distance's share alone
            shares = np.array([how[1], 1.0]) if known is None else how[1:]
            parts = (2 if known is None else 3 if known.pairs is None else 4,)
            wrong = any(each.shape != parts for each in (centre, spread, shares))
            flat = known is None or (known.tokens.ndim == 1 and (known.pairs is None or known.pairs.ndim == 1))
            if features.ndim != 2 or limit.shape != (1,) or wrong or not flat:
                raise ValueError("its tensors have other shapes")
            if not all(np.isfinite(values).all() for values in found.values()):
                raise ValueError("it holds numbers that are not finite")
            weights = about.get("weights_sha256", "")
            return cls(features, centre, spread, float(limit[0]), weights, known, int(how[0]), shares)


def most_rows(width: int) -> int:
    """How many training rows are kept for features of this width."""
    return max(1, MOST_BYTES // (2 * width))
