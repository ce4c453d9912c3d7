"""Texts with a score each: the head predicts the mean and the variance of a normal distribution of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from monteclora.data.kinds import Kind
from monteclora.data.truncation import Truncated
from monteclora.errors import DataError
from monteclora.metrics.registry import Scoring, measure
from monteclora.metrics.regression import INTERVAL, gaussian_nll_per_example
from monteclora.prediction.classes import predict_outputs
from monteclora.prediction.forward import FloatArray
from monteclora.prediction.sampler import Sampler
from monteclora.prediction.scores import OUTPUTS, ScorePredictions, mean_and_variance
from monteclora.tasks.base import Predicted, Predictor, Scored, TextKind, encoded_texts, texts_of, uncertainties
from monteclora.tasks.measures import Measures, ScoreMeasures
from monteclora.tasks.weights import ClassWeights

if TYPE_CHECKING:
    from datasets import Dataset

    from monteclora.tasks.loading import TaskData

__all__ = ["Regression"]


class Regression(TextKind):
    """See :class:`~monteclora.tasks.base.TaskKind`.

    Scores are learned standardised by the mean and standard deviation of the training rows, and predicted in their own
    unit.
    """

    name: Kind = "regression"
    can_be_calibrated = False

    def measures(self, data: TaskData, weights: ClassWeights | None = None) -> Measures:
        """The Gaussian negative log-likelihood, and the metrics of scores."""
        if data.scale is None:
            raise DataError(f"{data.name} has no training rows to take the scale of the scores from", "Give some.")
        return ScoreMeasures(data.scale)

    def outputs(self, label_names: Sequence[str] | None) -> tuple[str, ...] | None:
        """Mean and variance."""
        return OUTPUTS

    def to_learn(self, rows: Dataset, data: TaskData) -> Dataset:
        """Standardised."""
        return rows if data.scale is None else data.scale.standardised(rows)

    def shown(self, label: Any, data: TaskData) -> str | None:
        """The score in its own unit."""
        return f"{label if data.scale is None else label * data.scale.spread + data.scale.centre:.6g}"

    def accepts(self, label_names: Any) -> bool:
        """None."""
        return not label_names

    def scorings(self, rows: Dataset) -> tuple[Scoring, ...]:
        """Of scores."""
        return ("scores",)

    def score(self, predictor: Predictor, rows: Dataset) -> Scored:
        """Predicted distributions against scores."""
        found, cut = _predicted(predictor, rows, predictor.samplers)
        scores = np.asarray(rows["label"][:], dtype=np.float64)
        known = [ScorePredictions(each.means, each.variances, scores) for each in found]
        metrics = [measure("scores", each.mean, each.total, scores) for each in known]
        nll = gaussian_nll_per_example(known[-1].mean, known[-1].total, scores)
        return Scored(
            point=metrics[0],
            posterior=metrics[1] if len(metrics) > 1 else None,
            predictions=known[-1],
            at_mean=known[0],
            table=pa.table({**texts_of(rows), "label": scores, "nll": nll, **_columns(known[-1])}),
            notes=cut.notes,
        )

    def predict(self, predictor: Predictor, rows: Dataset, max_new_tokens: int) -> Predicted:
        """The mean of each score, its standard deviation, and the ends of its 90 % interval."""
        (found,), cut = _predicted(predictor, rows, predictor.samplers[-1:])
        return Predicted({**{name: rows[name][:] for name in rows.column_names}, **_columns(found)}, cut)


def _predicted(
    predictor: Predictor, rows: Dataset, samplers: tuple[Sampler, ...]
) -> tuple[list[ScorePredictions], Truncated]:
    """Scores of rows of texts under each sampler, in their unit; also what was truncated."""
    assert predictor.scale is not None
    centre, spread = predictor.scale.centre, predictor.scale.spread
    inputs, cut = encoded_texts(rows, predictor)

    def normal(outputs: Tensor) -> Tensor:
        return torch.stack(mean_and_variance(outputs), -1)

    def predict(sampler: Sampler) -> FloatArray:
        return predict_outputs(predictor.model, inputs, of=normal, sampler=sampler, **predictor.arguments())

    with predictor.precision():
        found = [predictor.once(sampler, predict) for sampler in samplers]
    return [ScorePredictions(each[..., 0] * spread + centre, each[..., 1] * spread**2) for each in found], cut


def _columns(found: ScorePredictions) -> dict[str, Any]:
    low, high = found.interval(INTERVAL)
    return {"prediction": found.mean, "std": np.sqrt(found.total), "low": low, "high": high, **uncertainties(found)}
