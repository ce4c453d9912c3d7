"""Several runs of one task to a model that predicts as their ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monteclora.errors import ConfigError
from monteclora.prediction.ensemble import ENSEMBLE
from monteclora.runs.data_facts import data_facts
from monteclora.runs.loading import LoadedRun, check_finished, combined, load_run
from monteclora.runs.result import RunResult
from monteclora.runs.run_folder import RunFolder

__all__ = ["Runs", "folders_of", "load_ensemble", "load_runs"]

Runs = str | Path | RunResult | Sequence[str | Path | RunResult]
"""A run, or several that predict together: their folders, or what ``train`` gave."""


def folders_of(runs: Runs) -> list[Path]:
    """The folder of each run."""
    given = [runs] if isinstance(runs, str | Path | RunResult) else runs
    return [each.folder if isinstance(each, RunResult) else Path(each) for each in given]


def load_runs(
    runs: Runs,
    sampler: str | None,
    num_samples: int | None = None,
    *,
    base: bool = False,
    allow_unfinished: bool = False,
) -> LoadedRun:
    """One run, or several as an ensemble.

    Args:
        runs: which.
        sampler: of the predictions, by name; several runs need ``ensemble``.
        num_samples: its draws.
        base: of one run, see :func:`~monteclora.runs.loading.load_run`.
        allow_unfinished: likewise.

    Raises:
        CheckpointError: a folder is no run, an unfinished one, or its adapter is missing or damaged.
        ConfigError: the runs do not predict the same thing, or an argument does not fit an ensemble, which is reported
            before any model is loaded; and as :func:`~monteclora.runs.loading.load_run`.
    """
    folders = folders_of(runs)
    several = len(folders) != 1
    if not several and (sampler != ENSEMBLE or RunFolder.existing(folders[0]).recipe.ensemble > 1):
        return load_run(folders[0], base=base, allow_unfinished=allow_unfinished)
    if sampler != ENSEMBLE:
        asked = "no sampler" if sampler is None else f"the sampler {sampler}"
        raise ConfigError(
            f"{len(folders)} runs were given with {asked}", f"Add --sampler {ENSEMBLE}, or take one run at a time."
        )
    for name, value in {"base": base, "allow_unfinished": allow_unfinished}.items():
        if value:
            raise ConfigError(f"{name} does not go with the sampler {ENSEMBLE}", "Leave it out.")
    members = _members(folders)
    if num_samples not in (None, len(members)):
        raise ConfigError(
            f"num_samples is {num_samples}, and an {ENSEMBLE} of {len(members)} draws each run once", "Leave it out."
        )
    return load_ensemble(folders)


def load_ensemble(folders: Sequence[str | Path]) -> LoadedRun:
    """Load runs as the members of one ensemble; all of them are in memory at once.

    Args:
        folders: of two finished runs or more, trained on the same rows of the same task from the same base model.
            Methods, learning rates and seeds may differ. A run that is an ensemble itself stands for its members.

    Returns:
        The first run, with a model that holds all of them and the folders as its ``members``.

    Raises:
        CheckpointError: not a run, an unfinished one, or its adapter is missing or damaged.
        ConfigError: a single run, one that is given twice, or two that do not predict the same thing.
    """
    runs = _members(folders)
    if len(runs) < 2:
        raise ConfigError(f"an ensemble needs two runs or more, and {len(runs)} was given", "Name the other runs.")
    resolved = [run.path.resolve() for run in runs]
    for place, (run, path) in enumerate(zip(runs, resolved, strict=True)):
        if path in resolved[:place]:
            raise ConfigError(f"the run {run.path} is given twice", "Name each member of an ensemble once.")
    for run in runs:
        check_finished(run)
    _check_alike(runs)
    return combined([load_run(run.path) for run in runs])


def _members(folders: Sequence[str | Path]) -> list[RunFolder]:
    """The runs in these folders, and in the place of an ensemble its members."""
    found: list[RunFolder] = []
    for run in map(RunFolder.existing, folders):
        if run.recipe.ensemble > 1:
            check_finished(run)
        found += run.members if run.recipe.ensemble > 1 else (run,)
    return found


def _check_alike(runs: Sequence[RunFolder]) -> None:
    """Raises ConfigError that names the first thing in which a run differs from the first one."""
    first, *others = runs
    expected = _shared(first)
    for run in others:
        for what, value in _shared(run).items():
            if value != expected[what]:
                shown = "" if what.startswith("the rows") else f" ({_short(value)}, not {_short(expected[what])})"
                raise ConfigError(
                    f"{run.path} and {first.path} differ in {what}{shown}, and cannot be one {ENSEMBLE}",
                    "Train the members with recipes that differ in the seed or the method only.",
                )


def _shared(run: RunFolder) -> Mapping[str, Any]:
    """What the members of an ensemble must have in common, in words."""
    recipe, data = run.recipe, data_facts(run)
    return {
        "the task": data.name,
        "the kind of task": data.kind,
        "the labels": data.label_names,
        "the splits": sorted(data.sha256),
        **{f"the rows of {split}": checksum for split, checksum in data.sha256.items()},
        "the base model": recipe.model.name,
        "data.max_length": recipe.data.max_length,
        "data.truncation": recipe.data.truncation,
        "training.precision": recipe.training.precision,
    }


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
