"""How well a classifier ranks its own answers, and tells rows of another kind from those of a split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    from monteclora.prediction.novelty import Novelty, Seen
    from monteclora.runs.loading import LoadedRun
    from monteclora.tasks.base import Predictor, Scored

__all__ = ["COVERAGE", "SCORES", "Outside", "Shift", "outside_rows"]

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
class Outside:
    """Rows that are to be distinguished from those of a split.

    Attributes:
        file: where they come from, as it was given.
        rows: its texts.
        notes: what was left out or taken for granted when it was read, in words.
    """

    file: str
    rows: Dataset
    notes: tuple[str, ...]


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
    def ranked(cls, loaded: LoadedRun, scored: Scored) -> Shift:
        """How well the run ranks its answers, of a split's predictions; nothing where rows have no class each."""
        found = scored.predictions
        if not KINDS[loaded.kind].has_classes or not isinstance(found, Predictions):
            return cls()
        curve = risk_coverage(found.probs.max(1), found.probs.argmax(1) == found.labels)
        return cls(
            {
                "aurc": curve.aurc,
                "aurc_excess": curve.excess,
                f"accuracy_at_{COVERAGE}": curve.accuracy_at(COVERAGE),
            }
        )

    @classmethod
    def of(
        cls,
        loaded: LoadedRun,
        predictor: Predictor,
        scored: Scored,
        inside: Dataset,
        split: str | None,
        outside: Outside,
    ) -> Shift:
        """How well the run ranks its answers, and tells outside rows.

        Probability, entropy and mutual information are those of the evaluated predictions, under draws where there are
        any; energy, logit and novelty are taken at the mean.

        Args:
            loaded: the run.
            predictor: as it predicted the split.
            scored: the split's predictions.
            inside: the split's rows.
            split: of the run's own data that these are; None for rows of another task.
            outside: what is to be distinguished from them; see :func:`outside_rows`.
        """
        ranked, found = cls.ranked(loaded, scored), scored.predictions
        assert isinstance(found, Predictions)  # outside rows are of classifiers
        (other,), cut = classify(predictor, outside.rows, predictor.samplers[-1:])
        novelty, left_out = _novelty(loaded, split, predictor.batch_size)
        name = Path(outside.file).name
        notes = (*outside.notes, *(f"{name}: {note}" for note in cut.notes), *left_out)
        seen = [see(loaded, rows, predictor.batch_size, novelty) for rows in (inside, outside.rows)]
        low, high = _scores(found, seen[0], novelty), _scores(other, seen[1], novelty)
        scores = {name: {"auroc": auroc(low[name], high[name]), "fpr95": fpr95(low[name], high[name])} for name in low}
        return replace(ranked, ood={"file": outside.file, "rows": len(outside.rows), "scores": scores}, notes=notes)

    def facts(self) -> dict[str, Any]:
        """For JSON: ``selective`` and ``ood``, where there are any."""
        parts = {"selective": self.selective, "ood": self.ood}
        return {name: dict(part) for name, part in parts.items() if part is not None}


def outside_rows(loaded: LoadedRun, file: str | Path | None) -> Outside | None:
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
    rows, notes = load_inputs(file, loaded.recipe.data, loaded.kind, loaded.columns)
    return Outside(str(file), rows, tuple(notes))


def _novelty(loaded: LoadedRun, split: str | None, batch_size: int) -> tuple[Novelty | None, tuple[str, ...]]:
    """What measures novelty, where it may, and in words what must be known of it."""
    if split == "train":
        return None, ("novelty is left out: it is the distance to the train rows, which are evaluated here",)
    if loaded.unfinished:  # what is stored for an unfinished run would be taken for the finished one's
        return None, ("novelty is left out: the run is unfinished. Let it finish.",)
    try:
        found = novelty_of(loaded, batch_size=batch_size)
    except DataError as error:
        return None, (f"novelty is left out: {error}",)
    fitted = ("novelty was fitted to these rows: its numbers are better than on new ones",)
    return found, fitted if split == FIT_SPLIT else ()


def _scores(found: Predictions, seen: Seen, novelty: Novelty | None) -> dict[str, FloatArray]:
    """Scores of rows by name, float64 (B,), larger for rows less like the training rows."""
    scores = {"max_probability": -found.probs.max(1), "entropy": found.total}
    if found.num_samples > 1:
        scores["mutual_information"] = found.epistemic
    scores |= {"energy": seen.energy, "max_logit": -seen.max_logit}
    return scores if novelty is None else {**scores, "novelty": novelty.of(seen)}
