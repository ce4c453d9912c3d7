"""Whether a model knows when it is wrong: how well scores of its answers tell wrong ones from right ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from monteclora.metrics.ood import auroc
from monteclora.prediction.predictions import Predictions
from monteclora.tasks.base import Scored

__all__ = ["ERROR_SCORES", "detected", "error_detection"]

ERROR_SCORES: Mapping[str, str] = {
    "max_probability": "maximum probability",
    "entropy": "entropy",
    "mutual_information": "mutual information",
}
"""What may tell wrong answers, by name, with what people call it."""


def error_detection(scored: Scored) -> Mapping[str, float] | None:
    """The AUROC of wrong against right answers by each score of the evaluated predictions.

    Args:
        scored: labelled predictions of classes or answer options, under draws where there are any.

    Returns:
        By name, the scores of :data:`ERROR_SCORES`; without draws there is no mutual information. None for predictions
        that are not of classes or options, and where all answers are right or all wrong.
    """
    found = scored.predictions
    if not isinstance(found, Predictions) or found.labels is None:
        return None
    scores: dict[str, ArrayLike] = {"max_probability": -found.probs.max(1), "entropy": found.total}
    if found.num_samples > 1:
        scores["mutual_information"] = found.epistemic
    return detected(found.probs.argmax(1) == found.labels, scores)


def detected(right: NDArray[np.bool_], scores: Mapping[str, ArrayLike]) -> Mapping[str, float] | None:
    """The AUROC of wrong against right answers by each of several scores.

    Args:
        right: bool (B,).
        scores: by name, float (B,) each, larger where an answer is more likely wrong.

    Returns:
        By name; None where all answers are right or all wrong.
    """
    if right.all() or not right.any():
        return None
    return {name: auroc(np.asarray(values)[right], np.asarray(values)[~right]) for name, values in scores.items()}
