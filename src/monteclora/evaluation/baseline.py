"""What the pretrained model is worth without fine-tuning: logistic regression on its features."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from monteclora.evaluation.own_rows import FIT_SPLIT, own_rows
from monteclora.evaluation.reference import see
from monteclora.metrics.registry import measure
from monteclora.runs.loading import LoadedRun

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
    features = [see(loaded, rows).features for rows in (train, validation)]
    known, new = (found / np.linalg.norm(found, axis=1, keepdims=True) for found in features)
    model = LogisticRegressionCV(
        Cs=_STRENGTHS, cv=_FOLDS, scoring="neg_log_loss", max_iter=1000, l1_ratios=(0.0,), use_legacy_attributes=False
    )
    return measure("classes", model.fit(known, labels).predict_proba(new), truth)
