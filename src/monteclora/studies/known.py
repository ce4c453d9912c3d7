"""Outcomes of earlier studies, taken from their ``results.parquet`` in place of running the trials again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from monteclora.studies.folder import Outcome, StudyFolder
from monteclora.studies.plan import Plan
from monteclora.studies.results import read_results

__all__ = ["read_known", "take_known"]


def read_known(files: Sequence[str | Path]) -> dict[Path, dict[str, Outcome]]:
    """The outcomes in each file, by trial; failed trials are left out, which are to be tried again.

    Raises:
        CheckpointError: a file is not there, damaged, or no study's results.
    """
    found = {Path(file): read_results(Path(file)) for file in files}
    return {path: {t: o for t, o in of_file.items() if o.status != "failed"} for path, of_file in found.items()}


def take_known(folder: StudyFolder, plan: Plan, known: Mapping[Path, Mapping[str, Outcome]]) -> list[str]:
    """Put known outcomes of the plan's trials into a study's folder; says of each file how many were taken.

    A trial is the same where its identity is: the same recipe, data, model and evaluation. What the folder has already,
    or what is being worked on, stays; of several files that know a trial, the first one counts.
    """
    notes = []
    for path, outcomes in known.items():
        taken = 0
        for trial in plan.trials:
            outcome = outcomes.get(trial.id)
            if outcome is not None:
                taken += folder.adopt(trial, outcome)
        notes.append(f"{taken} of the {len(outcomes)} outcomes in {path} taken")
    return notes
