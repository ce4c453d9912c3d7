"""How well a classifier ranks its own answers, and tells rows of another kind from those of a split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monteclora.errors import ConfigError, DataError
from monteclora.evaluation.own_rows import FIT_SPLIT
from monteclora.evaluation.reference import novelty_of, see
from monteclora.metrics.ood import auroc, fpr95
from monteclora.metrics.selective import risk_coverage
from monteclora.prediction.predictions import Predictions
from monteclora.tasks import load_inputs
from monteclora.tasks.classification import classify
from monteclora.tasks.kinds import KINDS

if TYPE_CHECKING:
    from datasets import Dataset

    from monteclora.metrics.checks import FloatArray
    from monteclora.prediction.novelty import Seen
    from monteclora.runs.loading import LoadedRun
    from monteclora.tasks.base import Predictor, Scored

__all__ = ["COVERAGE", "SCORES", "Shift", "outside_rows"]

COVERAGE = 0.8
SCORES: Mapping[str, str] = {
    "max_probability": "maximum probability",
    "entropy": "entropy",
    "mutual_information": "mutual information",
    "energy": "energy",
    "max_logit": "maximum logit",
    "novelty": "novelty",
}
"""What tells outside rows, by name, with what people call it."""


@dataclass(frozen=True)
class Shift:
    """What an evaluation of a classifier says beside its metrics.

    Attributes:
        selective: ``aurc``, ``aurc_excess`` and ``accuracy_at_0.8`` of the split; None where rows have no class each.
        ood: ``file``, ``rows``, and in ``scores`` the ``auroc`` and ``fpr95`` of each score by name; None without a
            file.
        notes: what was left out or shortened, in words.
    """

    selective: Mapping[str, float] | None = None
    ood: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of(
        cls,
        loaded: LoadedRun,
        predictor: Predictor,
        scored: Scored,
        inside: Dataset,
        split: str | None,
        file: str | Path | None,
        outside: Dataset | None,
    ) -> Shift:
        """Measure.

        Probability, entropy and mutual information are those of the evaluated predictions, under draws where there are
        any; energy, logit and novelty are taken at the mean.

        Args:
            loaded: the run.
            predictor: as it predicted the split.
            scored: the split's predictions.
            inside: the split's rows.
            split: of the run's own data that these are; None for rows of another task.
            file: where the outside rows come from.
            outside: rows to be distinguished from the split's; see :func:`outside_rows`.
        """
        found = scored.predictions
        if not KINDS[loaded.kind].has_classes or not isinstance(found, Predictions):
            return cls()
        curve = risk_coverage(found.probs.max(1), found.probs.argmax(1) == found.labels)
        selective = {
            "aurc": curve.aurc,
            "aurc_excess": curve.excess,
            f"accuracy_at_{COVERAGE}": curve.accuracy_at(COVERAGE),
        }
        if outside is None:
            return cls(selective)
        (other,), shortened = classify(predictor, outside, predictor.samplers[-1:])
        seen, seen_outside = see(loaded, inside), see(loaded, outside)
        low, high = _scores(found, seen), _scores(other, seen_outside)
        notes = [f"{Path(str(file)).name}: {note}" for note in shortened]
        if split == "train":
            notes.append("novelty is left out: it is the distance to the train rows, which are evaluated here")
        else:
            try:
                if loaded.unfinished:  # what is stored for an unfinished run would be taken for the finished one's
                    raise DataError("the run is unfinished", "Let it finish.")
                novelty = novelty_of(loaded)
                low["novelty"], high["novelty"] = novelty.of(seen), novelty.of(seen_outside)
                if split == FIT_SPLIT:
                    notes.append("novelty was fitted to these rows: its numbers are better than on new ones")
            except DataError as error:
                notes.append(f"novelty is left out: {error}")
        scores = {name: {"auroc": auroc(low[name], high[name]), "fpr95": fpr95(low[name], high[name])} for name in low}
        return cls(selective, {"file": str(file), "rows": len(outside), "scores": scores}, tuple(notes))

    def facts(self) -> dict[str, Any]:
        """For JSON: ``selective`` and ``ood``, where there are any."""
        parts = {"selective": self.selective, "ood": self.ood}
        return {name: dict(part) for name, part in parts.items() if part is not None}


def outside_rows(loaded: LoadedRun, file: str | Path | None) -> Dataset | None:
    """The rows of a file that are to be distinguished from those of a split; labels are not read.

    Raises:
        ConfigError: the run is no classifier, or an ensemble.
        DataError: the file is missing or wrong.
    """
    if file is None:
        return None
    loaded.check_single("ood")
    if not KINDS[loaded.kind].has_classes:
        raise ConfigError(f"{loaded.folder} is a run of {loaded.kind}, and ood is for classifiers", "Leave --ood out.")
    rows, _ = load_inputs(file, loaded.recipe.data, loaded.kind, loaded.columns)
    return rows


def _scores(found: Predictions, seen: Seen) -> dict[str, FloatArray]:
    """Scores of rows by name, float64 (B,), larger for rows less like the training rows."""
    scores = {"max_probability": -found.probs.max(1), "entropy": found.total}
    if found.num_samples > 1:
        scores["mutual_information"] = found.epistemic
    return {**scores, "energy": seen.energy, "max_logit": -seen.max_logit}
