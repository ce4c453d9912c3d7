"""A study on disk: ``study.yaml``, ``results/ID.json`` a trial, ``trials/ID/`` and ``claims/ID.json`` a run.

A run has the id of its trial, unless it is evaluated in several ways; see :attr:`monteclora.studies.plan.Trial.run`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from monteclora.config import dump
from monteclora.errors import CheckpointError
from monteclora.runs.recipe import recipe_content
from monteclora.studies.claims import Claims
from monteclora.studies.plan import Trial
from monteclora.studies.recipe import StudyRecipe, load_study
from monteclora.system.atomic import write_file

__all__ = ["Outcome", "StudyFolder"]

Status = Literal["finished", "diverged", "failed"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a trial; one file, written once.

    Attributes:
        trial: its id.
        status: ``diverged`` is a result, ``failed`` is the lack of one.
        reason: of divergence or failure.
        metrics: by name, of the evaluated split, under draws where there were any; empty unless finished.
        point: likewise, at the mean.
        validation: metrics of the weights that training kept.
        no_skill: metrics of predicting the class frequencies whatever the row.
        rows: how many were evaluated.
        seconds: of training.
        tokens, peak_memory_bytes, trained_parameters: of training.
        seconds_per_row: of the evaluation's draws; where there are none, of the mean with tokenising and metrics.
        notes: what was done differently from the recipe.
    """

    trial: str
    status: Status
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    point: Mapping[str, float] = field(default_factory=dict)
    validation: Mapping[str, float] = field(default_factory=dict)
    no_skill: Mapping[str, float] = field(default_factory=dict)
    rows: int = 0
    seconds: float = 0.0
    tokens: int = 0
    peak_memory_bytes: int = 0
    trained_parameters: int = 0
    notes: Sequence[str] = ()
    seconds_per_row: float = 0.0


@dataclass(frozen=True)
class StudyFolder:
    """The files of a study.

    Args:
        path: its folder.
    """

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The study recipe."""
        return self.path / "study.yaml"

    @property
    def recipe(self) -> StudyRecipe:
        """The study recipe, for this folder. Raises CheckpointError where there is none."""
        if not self.recipe_file.is_file():
            raise CheckpointError(f"{self.path} is no study: it has no study.yaml", "Give a study folder.")
        return load_study(self.recipe_file, str(self.path))

    def write_recipe(self, study: StudyRecipe) -> None:
        """Put down what is studied, with the content of the base recipe: its file may change, or be elsewhere.

        So may the files of known outcomes, which are in the folder by then.
        """
        base = study.base if isinstance(study.base, dict) else recipe_content(study.base)
        write_file(self.recipe_file, dump(replace(study, base=base, known=[])).encode())

    @cached_property
    def claims(self) -> Claims:
        """Who works on what."""
        return Claims(self.path / "claims")

    def outcome_file(self, trial: str) -> Path:
        """Of a trial, by its id."""
        return self.path / "results" / f"{trial}.json"

    def outcome(self, trial: str) -> Outcome | None:
        """The outcome of a trial; None where it is not done.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.outcome_file(trial)
        try:
            return Outcome(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__})", "Remove it: the trial is run again."
            ) from None

    def outcomes(self, trials: Sequence[Trial]) -> dict[str, Outcome]:
        """Of all trials that are done, by id."""
        found = {trial.id: self.outcome(trial.id) for trial in trials}
        return {identity: outcome for identity, outcome in found.items() if outcome is not None}

    def outcome_versions(self) -> frozenset[tuple[str, int]]:
        """File name and time of every outcome: another set when one was written or removed. Reads none of them."""
        files = (self.path / "results").glob("*.json")
        return frozenset((file.name, file.stat().st_mtime_ns) for file in files)

    def adopt(self, trial: Trial, outcome: Outcome) -> bool:
        """Record the outcome that a trial had elsewhere, unless it has one here or is in progress; whether it was."""
        with self.claims.idle(trial.run) as idle:
            adopted = idle and not self.outcome_file(outcome.trial).is_file()
            if adopted:
                self.write_outcome(outcome)
        return adopted

    def retry_failed(self, trials: Sequence[Trial]) -> None:
        """Have failed trials tried again, as if they never had been."""
        failed: dict[str, list[Path]] = {}
        for trial in trials:
            outcome = self.outcome(trial.id)
            if outcome is not None and outcome.status == "failed":
                failed.setdefault(trial.run, []).append(self.outcome_file(trial.id))
        for run, results in failed.items():
            self.claims.forget(run, results)

    def write_outcome(self, outcome: Outcome) -> None:
        """Record the outcome of a trial."""
        text = json.dumps(asdict(outcome), indent=1, ensure_ascii=False) + "\n"
        write_file(self.outcome_file(outcome.trial), text.encode())
