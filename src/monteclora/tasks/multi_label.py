"""Texts with any number of labels each: the head has an output for every label, which a row has or has not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from monteclora.data.kinds import Kind
from monteclora.data.truncation import Truncated
from monteclora.metrics.registry import Scoring, measure
from monteclora.prediction.classes import predict_outputs
from monteclora.prediction.labels import LabelPredictions, decision_log_probs
from monteclora.prediction.sampler import Sampler
from monteclora.tasks.base import Predicted, Predictor, Scored, TextKind, encoded_texts, texts_of, uncertainties
from monteclora.tasks.measures import LabelMeasures, Measures
from monteclora.tasks.weights import ClassWeights, label_weights

if TYPE_CHECKING:
    from datasets import Dataset

    from monteclora.tasks.loading import TaskData

__all__ = ["MultiLabel"]


class MultiLabel(TextKind):
    """See :class:`~monteclora.tasks.base.TaskKind`."""

    name: Kind = "multi_label"

    def measures(self, data: TaskData, weights: ClassWeights | None = None) -> Measures:
        """Binary cross-entropy, and the metrics of several labels."""
        if weights is None or "train" not in data.splits:
            return LabelMeasures()
        return LabelMeasures(label_weights(weights, data.label_names or (), data.split("train")["label"][:]))

    def shown(self, label: Any, data: TaskData) -> str | None:
        """The names of the labels."""
        return ", ".join(_named(label, data.label_names or ())) or "no label"

    def scorings(self, rows: Dataset) -> tuple[Scoring, ...]:
        """Of several labels."""
        return ("labels",)

    def score(self, predictor: Predictor, rows: Dataset) -> Scored:
        """Probabilities of labels against those that rows have."""
        found, cut = _predicted(predictor, rows, predictor.samplers)
        labels = np.asarray(rows["label"][:], dtype=np.int64)
        known = [each.labelled(labels) for each in found]
        metrics = [measure("labels", each.probs, labels, bins=predictor.bins) for each in known]
        names = [_named(row, predictor.label_names) for row in labels]
        return Scored(
            point=metrics[0],
            posterior=metrics[1] if len(metrics) > 1 else None,
            predictions=known[-1],
            at_mean=known[0],
            table=pa.table({**texts_of(rows), "label": names, **_columns(predictor, known[-1])}),
            notes=cut.notes,
        )

    def predict(self, predictor: Predictor, rows: Dataset, max_new_tokens: int) -> Predicted:
        """The labels of each text that are more probable than not, and the probability of each label."""
        (found,), cut = _predicted(predictor, rows, predictor.samplers[-1:])
        return Predicted({**{name: rows[name][:] for name in rows.column_names}, **_columns(predictor, found)}, cut)


def _predicted(
    predictor: Predictor, rows: Dataset, samplers: tuple[Sampler, ...]
) -> tuple[list[LabelPredictions], Truncated]:
    """Labels of rows of texts under each sampler; also what was truncated."""
    inputs, cut = encoded_texts(rows, predictor)
    count = len(predictor.label_names)

    def predict(sampler: Sampler) -> LabelPredictions:
        arguments = {"sampler": sampler, **predictor.arguments()}
        return LabelPredictions.of(predict_outputs(predictor.model, inputs, of=decision_log_probs, **arguments), count)

    with predictor.precision():
        found = [(sampler, predictor.once(sampler, predict).decisions) for sampler in samplers]
    return [LabelPredictions(predictor.calibrated(each, sampler), count) for sampler, each in found], cut


def _named(flags: Any, names: Any) -> list[str]:
    return [name for name, flag in zip(names, flags, strict=True) if flag]


def _columns(predictor: Predictor, found: LabelPredictions) -> dict[str, Any]:
    names = list(predictor.label_names)

    def by_label(values: NDArray[np.float64]) -> pa.StructArray:
        return pa.StructArray.from_arrays([pa.array(column) for column in values.T], names=names)

    return {
        "prediction": pa.array([_named(row, names) for row in found.probs > 0.5], pa.list_(pa.string())),
        "probabilities": by_label(found.probs),
        **uncertainties(found),
        "label_total": by_label(found.of_labels("total")),
        "label_epistemic": by_label(found.of_labels("epistemic")),
    }
