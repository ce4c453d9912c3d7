"""What the pretrained model is worth without fine-tuning: logistic regression on its features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel

from monteclora.data.encoding import encode
from monteclora.evaluation.own_rows import FIT_SPLIT
from monteclora.metrics.registry import measure
from monteclora.prediction.novelty import pretrained_features
from monteclora.runs.loading import LoadedRun
from monteclora.tasks import TaskData

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["MOST_ROWS", "allow_baseline", "frozen_baseline"]

MOST_ROWS = 3000
"""Rows of a split up to which the baseline costs seconds, and fine-tuning may not pay."""

_STRENGTHS = np.geomspace(1.0, 1000.0, 4)  # inverse regularisation, chosen by cross-validation on the training rows
_FOLDS = 3


def allow_baseline(data: TaskData) -> bool:
    """Whether a classifier's rows allow a baseline, told without its model.

    There are validation rows, neither split has more than :data:`MOST_ROWS`, and each class has as many training rows
    as cross-validation needs.
    """
    splits = [data.splits.get(split) for split in ("train", FIT_SPLIT)]
    if any(rows is None or len(rows) > MOST_ROWS for rows in splits):
        return False
    counts = np.bincount(data.split("train")["label"], minlength=len(data.label_names or ()))
    return int(counts.min()) >= _FOLDS


def frozen_baseline(loaded: LoadedRun, data: TaskData) -> Mapping[str, float] | None:
    """Validation metrics of a logistic regression on features of the model without its adapter.

    The features are means over a row's tokens of the last hidden states, scaled to unit length; the regularisation is
    chosen by cross-validated likelihood on the training rows alone.

    Args:
        loaded: a classifier's run.
        data: its training and validation rows, which :func:`allow_baseline` has found to be right for it.

    Returns:
        Metrics by name, or None for a run without an adapter (``method: full``): its model is the fine-tuned one, and
        the pretrained one's features cannot be had from it.
    """
    from sklearn.linear_model import LogisticRegressionCV

    if not isinstance(loaded.model, PeftModel):
        return None
    train, validation = data.split("train"), data.split(FIT_SPLIT)
    labels, truth = np.array(train["label"]), np.array(validation["label"])
    features = [_features(loaded, loaded.model, rows) for rows in (train, validation)]
    known, new = (found / np.linalg.norm(found, axis=1, keepdims=True) for found in features)
    model = LogisticRegressionCV(
        Cs=_STRENGTHS, cv=_FOLDS, scoring="neg_log_loss", max_iter=1000, l1_ratios=(0.0,), use_legacy_attributes=False
    )
    return measure("classes", model.fit(known, labels).predict_proba(new), truth)


def _features(loaded: LoadedRun, model: PeftModel, rows: Dataset) -> NDArray[np.float64]:
    """Of B rows, float64 (B, D)."""
    encoded = encode(rows, loaded.kind, loaded.tokenizer, loaded.recipe.data.max_length).dataset.to_list()
    with loaded.precision():
        return pretrained_features(model, encoded, loaded.collate, loaded.recipe.training.eval_batch_size)
