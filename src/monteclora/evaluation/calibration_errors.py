"""How well the probabilities of an evaluation are calibrated, by measures that see what the ECE does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from monteclora.metrics.calibration import (
    brier_decomposition,
    classwise_calibration_error,
    equal_mass_calibration_error,
    smooth_calibration_error,
)
from monteclora.prediction.predictions import Predictions
from monteclora.tasks.base import Scored

__all__ = ["calibration_errors"]


def calibration_errors(scored: Scored, *, classes: bool, bins: int) -> Mapping[str, float] | None:
    """Measures by name, of the evaluated predictions: under draws where there are any.

    ``equal_mass`` and ``smooth`` are of the predicted class or option. Of classes there are ``classwise`` too, and the
    Brier score's ``reliability``, ``resolution`` and ``uncertainty``; options have no classes, their order carries no
    meaning. All are functions of :mod:`monteclora.metrics.calibration`.

    Args:
        scored: labelled predictions.
        classes: whether they are of classes.
        bins: of the binned measures.

    Returns:
        None for predictions that are not of classes or options.
    """
    found = scored.predictions
    if not isinstance(found, Predictions) or found.labels is None:
        return None
    errors = {
        "equal_mass": equal_mass_calibration_error(found.probs, found.labels, bins),
        "smooth": smooth_calibration_error(found.probs, found.labels),
    }
    if not classes:
        return errors
    parts = asdict(brier_decomposition(found.probs, found.labels, bins))
    return {
        **errors,
        "classwise": classwise_calibration_error(found.probs, found.labels, bins),
        **{f"brier_{name}": value for name, value in parts.items()},
    }
