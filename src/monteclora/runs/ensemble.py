"""Several runs of one task to a model that predicts as their ensemble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from monteclora.errors import ConfigError
from monteclora.prediction.ensemble import ENSEMBLE, Members
from monteclora.runs.data_facts import data_facts
from monteclora.runs.loading import LoadedRun, check_finished, load_run
from monteclora.runs.run_folder import RunFolder

__all__ = ["load_ensemble"]


def load_ensemble(folders: Sequence[str | Path]) -> LoadedRun:
    """Load runs as the members of one ensemble; all of them are in memory at once.

    Args:
        folders: of two finished runs or more, trained on the same rows of the same task from the same base model.
            Methods, learning rates and seeds may differ.

    Returns:
        The first run, with a model that holds all of them and the folders as its ``members``.

    Raises:
        CheckpointError: not a run, an unfinished one, or its adapter is missing or damaged.
        ConfigError: a single run, one that is given twice, or two that do not predict the same thing.
    """
    runs = [RunFolder.existing(folder) for folder in folders]
    if len(runs) < 2:
        raise ConfigError(f"an ensemble needs two runs or more, and {len(runs)} was given", "Name the other runs.")
    resolved = [run.path.resolve() for run in runs]
    for place, (run, path) in enumerate(zip(runs, resolved, strict=True)):
        if path in resolved[:place]:
            raise ConfigError(f"the run {run.path} is given twice", "Name each member of an ensemble once.")
    for run in runs:
        check_finished(run)
    _check_alike(runs)
    loaded = [load_run(run.path) for run in runs]
    model = Members([each.model for each in loaded]).eval()
    return replace(loaded[0], model=model, members=tuple(each.folder for each in loaded))


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
