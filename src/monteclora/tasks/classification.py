"""Texts with a label each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from monteclora.data.kinds import Kind
from monteclora.data.truncation import Truncated
from monteclora.metrics.registry import Scoring
from monteclora.prediction.classes import predict_classes
from monteclora.prediction.novelty import predict_and_look
from monteclora.prediction.predictions import Predictions
from monteclora.prediction.sampler import MEAN, Sampler
from monteclora.tasks.base import Predicted, Predictor, Scored, TextKind, encoded_texts, scored, texts_of, uncertainties
from monteclora.tasks.measures import ClassMeasures, Measures
from monteclora.tasks.weights import ClassWeights, class_weights

if TYPE_CHECKING:
    from datasets import Dataset

    from monteclora.tasks.loading import TaskData

__all__ = ["Classification"]


class Classification(TextKind):
    """See :class:`~monteclora.tasks.base.TaskKind`."""

    name: Kind = "classification"
    has_classes = True

    def measures(self, data: TaskData, weights: ClassWeights | None = None) -> Measures:
        """Cross-entropy, and the metrics of classes."""
        if weights is None or "train" not in data.splits:
            return ClassMeasures()
        return ClassMeasures(class_weights(weights, data.label_names or (), data.split("train")["label"][:]))

    def shown(self, label: Any, data: TaskData) -> str | None:
        """The label's name."""
        return str((data.label_names or ())[label])

    def scorings(self, rows: Dataset) -> tuple[Scoring, ...]:
        """Of classes."""
        return ("classes",)

    def score(self, predictor: Predictor, rows: Dataset) -> Scored:
        """Class probabilities against labels."""
        found, cut = classify(predictor, rows, predictor.samplers)
        labels, names = np.asarray(rows["label"][:]), predictor.label_names
        columns = {
            **texts_of(rows),
            "label": [names[i] for i in labels],
            **_chosen(predictor, found[-1]),
        }
        return scored(predictor, "classes", found, labels, columns, cut)

    def predict(self, predictor: Predictor, rows: Dataset, max_new_tokens: int) -> Predicted:
        """The most probable label of each text, with the probability of every label."""
        inputs, cut = encoded_texts(rows, predictor)
        sampler, seen = predictor.samplers[-1], None
        if sampler is MEAN and predictor.looks:
            with predictor.precision():
                found, seen = predict_and_look(predictor.model, inputs, **predictor.arguments())
            found = predictor.calibrated(found, sampler)
        else:
            (found,) = _under(predictor, inputs, (sampler,))
        columns = {
            **{name: rows[name][:] for name in rows.column_names},
            **_chosen(predictor, found),
            **uncertainties(found),
        }
        return Predicted(columns, cut, inputs, seen)


def classify(predictor: Predictor, rows: Dataset, samplers: tuple[Sampler, ...]) -> tuple[list[Predictions], Truncated]:
    """The classes of rows of texts under each sampler; also what was truncated."""
    inputs, cut = encoded_texts(rows, predictor)
    return _under(predictor, inputs, samplers), cut


def _under(predictor: Predictor, inputs: Sequence[dict[str, Any]], samplers: tuple[Sampler, ...]) -> list[Predictions]:
    """The classes of rows in tokens under each sampler."""

    def predict(sampler: Sampler) -> Predictions:
        return predict_classes(predictor.model, inputs, sampler=sampler, **predictor.arguments())

    with predictor.precision():
        return [predictor.calibrated(predictor.once(sampler, predict), sampler) for sampler in samplers]


def _chosen(predictor: Predictor, found: Predictions) -> dict[str, Any]:
    names = list(predictor.label_names)
    return {
        "prediction": [names[i] for i in found.probs.argmax(1)],
        "confidence": found.probs.max(1),
        "probabilities": pa.StructArray.from_arrays(list(map(pa.array, found.probs.T)), names=names),
    }
