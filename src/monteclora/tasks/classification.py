"""Texts with a label each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from monteclora.data.encoding import encode
from monteclora.data.kinds import Kind
from monteclora.metrics.registry import Scoring
from monteclora.prediction.classes import predict_classes
from monteclora.prediction.predictions import Predictions
from monteclora.prediction.sampler import Sampler
from monteclora.tasks.base import Predicted, Predictor, Scored, scored, truncated, uncertainties
from monteclora.tasks.measures import ClassMeasures, Measures

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Classification"]


class Classification:
    """See :class:`~monteclora.tasks.base.TaskKind`."""

    name: Kind = "classification"
    auto_class = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"
    has_pretrained_head = False
    predicts_tokens = False
    rows_at_once = 1024

    def measures(self) -> Measures:
        """The metrics of classes."""
        return ClassMeasures()

    def accepts(self, label_names: Any) -> bool:
        """Two different names or more."""
        return len(set(label_names)) == len(label_names) >= 2 and all(isinstance(name, str) for name in label_names)

    def scorings(self, rows: Dataset) -> tuple[Scoring, ...]:
        """Of classes."""
        return ("classes",)

    def score(self, predictor: Predictor, rows: Dataset) -> Scored:
        """Class probabilities against labels."""
        found, notes = classify(predictor, rows, predictor.samplers)
        labels, names = np.asarray(rows["label"][:]), predictor.label_names
        columns = {
            **{name: rows[name][:] for name in ("text", "text_pair") if name in rows.column_names},
            "label": [names[i] for i in labels],
            **_chosen(predictor, found[-1]),
        }
        return scored(predictor, "classes", found, labels, columns, notes)

    def predict(self, predictor: Predictor, rows: Dataset, max_new_tokens: int) -> Predicted:
        """The most probable label of each text, with the probability of every label."""
        (found,), notes = classify(predictor, rows, predictor.samplers[-1:])
        columns = {
            **{name: rows[name][:] for name in rows.column_names},
            **_chosen(predictor, found),
            **uncertainties(found),
        }
        return Predicted(columns, notes)


def classify(
    predictor: Predictor, rows: Dataset, samplers: tuple[Sampler, ...]
) -> tuple[list[Predictions], tuple[str, ...]]:
    """The classes of rows of texts under each sampler; also what was truncated, in words."""
    encoded = encode(rows, "classification", predictor.tokenizer, predictor.max_length)
    inputs = encoded.dataset.to_list()

    def predict(sampler: Sampler) -> Predictions:
        return predict_classes(predictor.model, inputs, sampler=sampler, **predictor.arguments())

    with predictor.precision():
        found = [predictor.calibrated(predictor.once(sampler, predict), sampler) for sampler in samplers]
    return found, truncated(encoded.shortened, len(rows), predictor.max_length)


def _chosen(predictor: Predictor, found: Predictions) -> dict[str, Any]:
    names = list(predictor.label_names)
    return {
        "prediction": [names[i] for i in found.probs.argmax(1)],
        "confidence": found.probs.max(1),
        "probabilities": pa.StructArray.from_arrays(list(map(pa.array, found.probs.T)), names=names),
    }
