"""What the evaluation of a run found."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from monteclora.data.kinds import Kind
from monteclora.evaluation.shift import Shift
from monteclora.prediction.ensemble import ENSEMBLE
from monteclora.prediction.registry import NO_CALIBRATOR
from monteclora.prediction.sampler import MEAN
from monteclora.system.version import VERSION
from monteclora.tasks import SplitSource
from monteclora.tasks.base import Scored

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["EvaluationResult"]

_PACKAGES = ("torch", "transformers", "peft", "tokenizers")
_UNCERTAINTIES = ("total", "aleatoric", "epistemic")


@dataclass(frozen=True)
class EvaluationResult:
    """How well a run predicts a split.

    Attributes:
        folder: of the run.
        split: what was predicted.
        source: where its rows came from, how many, and their checksum.
        model: the ``adapter``, or the ``base`` model without it.
        sampler: how it was predicted, by name.
        calibrator: what corrected the probabilities, by name; ``none`` where nothing did.
        num_samples: draws, 0 for none.
        seed: their stream.
        layers: the last adapted blocks that were drawn; None for all.
        cost: forward passes (calls of the model) and seconds of each sampler, by its name.
        scored: predictions, labels, and the metrics of both.
        rows: what was predicted.
        seconds: it took.
        unfinished: how far the run came if it did not finish.
        notes: what a reader of the numbers must know, in words.
        shift: how well a classifier ranks its answers, and tells outside rows.
        members: the folders of the runs of an ensemble, whose first one ``point`` is of; empty for a single run.
        calibration: more measures of calibration than the metrics have, by name; see
            :func:`monteclora.evaluation.calibration_errors.calibration_errors`. None for completions.
        error_detection: the AUROC of wrong against right answers by score; see
            :func:`monteclora.evaluation.error_detection.error_detection`.
        corrupted: metrics of the same rows corrupted; see :func:`monteclora.evaluation.corrupted.under_corruption`.
            Empty where they were not asked for.
        weights_sha256: the checksum of the weights, the posterior's scale among them; None of the base model.
        split_rows: how many rows the split has, of which ``source`` says how many were predicted.
    """

    folder: Path
    kind: Kind
    split: str
    source: SplitSource
    model: Literal["adapter", "base"]
    sampler: str
    calibrator: str
    num_samples: int
    seed: int
    cost: Mapping[str, Mapping[str, float]]
    scored: Scored
    rows: Dataset
    seconds: float
    unfinished: str | None
    notes: tuple[str, ...]
    shift: Shift
    members: tuple[Path, ...] = ()
    layers: int | None = None
    calibration: Mapping[str, float] | None = None
    error_detection: Mapping[str, float] | None = None
    corrupted: Sequence[Mapping[str, Any]] = ()
    weights_sha256: str | None = None
    split_rows: int | None = None

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value:.4g}" for name, value in (self.posterior or self.point).items())
        draws = f"{self.num_samples} draws" if self.num_samples else "the mean"
        return f"EvaluationResult({self.folder}, {self.split}, {self.source.rows} rows, {draws}: {shown})"

    @property
    def variant(self) -> str:
        """The model, and how it predicts where that is not its method's own way: ``adapter+mc_dropout+temperature``.

        An evaluation in the run folder is replaced by the next one of the same split and variant.
        """
        own = self.sampler in (MEAN.name, "posterior") or (self.sampler == ENSEMBLE and self.folder not in self.members)
        sampler = () if own else (self.sampler,)
        calibrator = () if self.calibrator == NO_CALIBRATOR else (self.calibrator,)
        return "+".join((self.model, *sampler, *calibrator))

    @property
    def point(self) -> Mapping[str, float]:
        """Metrics by name under the posterior's mean, a plain LoRA; of an ensemble, its first member's."""
        return self.scored.point

    @property
    def posterior(self) -> Mapping[str, float] | None:
        """Metrics by name of the posterior predictive distribution; None without draws."""
        return self.scored.posterior

    def facts(self) -> dict[str, Any]:
        """Everything but the rows and their predictions, for JSON."""
        found = self.scored.predictions
        return {
            "rows": self.source.rows,
            "origin": self.source.origin,
            "sha256": self.source.sha256,
            "split_rows": self.split_rows,
            "weights_sha256": self.weights_sha256,
            "sampler": self.sampler,
            "members": [str(folder) for folder in self.members],
            "calibrator": self.calibrator,
            "num_samples": self.num_samples,
            **({} if self.layers is None else {"layers": self.layers}),
            "seed": self.seed,
            "cost": {name: dict(cost) for name, cost in self.cost.items()},
            "point": dict(self.point),
            "posterior": None if self.posterior is None else dict(self.posterior),
            "mean_uncertainty": {name: float(getattr(found, name).mean()) for name in _UNCERTAINTIES},
            **({} if self.calibration is None else {"calibration": dict(self.calibration)}),
            **({} if self.error_detection is None else {"error_detection": dict(self.error_detection)}),
            **self.shift.facts(),
            **({"corrupted": [dict(each) for each in self.corrupted]} if self.corrupted else {}),
            "unfinished": self.unfinished,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
            "versions": {
                "monteclora": VERSION,
                "python": platform.python_version(),
                **{package: version(package) for package in _PACKAGES},
            },
        }
