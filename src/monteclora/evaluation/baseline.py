"""What the pretrained model is worth without fine-tuning: logistic regression on its features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from monteclora.data.encoding import encode
from monteclora.evaluation.own_rows import FIT_SPLIT, own_rows
from monteclora.metrics.registry import measure
from monteclora.prediction.novelty import pretrained_features
from monteclora.runs.loading import LoadedRun

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["MOST_ROWS", "frozen_baseline"]

MOST_ROWS = 3000
"""Training rows up to which the baseline costs seconds, and fine-tuning may not pay."""

_STRENGTHS = np.geomspace(1.0, 1000.0, 4)  # inverse regularisation, chosen by cross-validation on the training rows
_FOLDS = 3


def frozen_baseline(loaded: LoadedRun) -> Mapping[str, float] | None:
    """Validation metrics of a logistic regression on features of the model without its adapter.

    The features are means over a row's tokens of the last hidden states, scaled to unit length; the regularisation is
    chosen by cross-validated likelihood on the training rows alone.

    Args:
        loaded: a classifier's run.

    Returns:
        Metrics by name, or None where there are no validation rows, too many training rows (:data:`MOST_ROWS`), or a
        class has fewer training rows than cross-validation needs.

    Raises:
        DataError: the run's rows are gone or changed.
    """
    from sklearn.linear_model import LogisticRegressionCV

    data = own_rows(loaded, "train", FIT_SPLIT)
    if "train" not in data.splits or FIT_SPLIT not in data.splits or len(data.splits["train"]) > MOST_ROWS:
        return None
    train, validation = data.split("train"), data.split(FIT_SPLIT)
    labels, truth = np.array(train["label"]), np.array(validation["label"])
    counts = np.bincount(labels, minlength=len(loaded.label_names or ()))
    if counts.min() < _FOLDS:
        return None
    features = [_features(loaded, rows) for rows in (train, validation)]
    known, new = (found / np.linalg.norm(found, axis=1, keepdims=True) for found in features)
    model = LogisticRegressionCV(
        Cs=_STRENGTHS, cv=_FOLDS, scoring="neg_log_loss", max_iter=1000, l1_ratios=(0.0,), use_legacy_attributes=False
    )
    return measure("classes", model.fit(known, labels).predict_proba(new), truth)


def _features(loaded: LoadedRun, rows: Dataset) -> NDArray[np.float64]:
    """Of B rows, float64 (B, D)."""
    encoded = encode(rows, loaded.kind, loaded.tokenizer, loaded.recipe.data.max_length).dataset.to_list()
    with loaded.precision():
        return pretrained_features(loaded.model, encoded, loaded.collate, loaded.recipe.training.eval_batch_size)
