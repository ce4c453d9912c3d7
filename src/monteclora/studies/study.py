"""A study from its recipe to its result."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from monteclora.errors import ConfigError
from monteclora.studies.centring import Centred, centre
from monteclora.studies.execution import tidy
from monteclora.studies.folder import Outcome, StudyFolder
from monteclora.studies.known import read_known, take_known
from monteclora.studies.live import Live
from monteclora.studies.optuna_export import check_storage, export_to_optuna
from monteclora.studies.plan import Plan, make_plan
from monteclora.studies.processes import default_workers, run_workers
from monteclora.studies.ray_cluster import run_on_ray
from monteclora.studies.recipe import StudyRecipe, load_study
from monteclora.studies.summary import Summary, summarise
from monteclora.studies.tables import write_tables
from monteclora.studies.worker import work

__all__ = ["StudyResult", "read_study", "study"]


@dataclass(frozen=True)
class StudyResult:
    """A study as far as it is.

    Attributes:
        folder: where it is.
        plan: its trials.
        outcomes: of those that are done, by id.
        summaries: of each arm under each condition; empty while nothing is done.
    """

    folder: Path
    plan: Plan = field(repr=False)
    outcomes: Mapping[str, Outcome] = field(repr=False)
    summaries: tuple[Summary, ...]

    def __repr__(self) -> str:
        return f"StudyResult({self.folder}, {len(self.outcomes)} of {len(self.plan.trials)} trials done)"

    @cached_property
    def centred(self) -> Centred:
        """Which trials are near to each arm's best learning rate, or value of another setting."""
        return centre(self.plan, self.outcomes)

    @cached_property
    def centred_summaries(self) -> tuple[Summary, ...]:
        """Of these trials, as ``summaries``."""
        return summarise(self.centred.plan, self.outcomes, self.plan)

    @property
    def left(self) -> int:
        """Trials without an outcome."""
        return len(self.plan.trials) - len(self.outcomes)


def study(
    recipe: str | Path | Mapping[str, Any] | StudyRecipe,
    *,
    output: str | None = None,
    workers: int | None = None,
    workers_per_device: int = 1,
    ray: str | None = None,
    optuna: str | None = None,
    known: Sequence[str | Path] = (),
    progress: bool = True,
) -> StudyResult:
    """Run every trial of a study that is not done yet, and summarise them.

    The same call again runs what is left: finished trials never, interrupted ones from their checkpoint, failed ones
    with all their retries. Several calls, on several machines that share the folder, divide the trials among them.

    Args:
        recipe: the path of a YAML file, a bundled study's name, a mapping, or a study recipe.
        output: a study folder in place of the recipe's.
        workers: processes on this machine, of which no more are started than there are runs left; by default one for
            each core or GPU; 0 runs the trials in this process.
        workers_per_device: processes that share a GPU.
        ray: the address of a Ray cluster whose nodes run the workers, or ``local``; ``workers`` counts them all.
        optuna: the URL of an Optuna storage, as in ``sqlite:///study.db``, to which the trials are written at the end.
        known: files ``results.parquet`` of earlier studies beside the recipe's ``known``; outcomes of the same trials
            are taken from them.
        progress: whether to tell on standard error what happens.

    Raises:
        ConfigError: the recipe is wrong, or workers cannot start.
        DataError: the data are wrong.
        CheckpointError: a file of known outcomes is missing or damaged, or one of the study folder is.
        KeyboardInterrupt: asked for; everything is saved and the same call continues.
    """
    if ray is not None and workers == 0:
        raise ConfigError("workers is 0, and a cluster runs workers", "Leave it out, or give how many.")
    plan = make_plan(load_study(recipe, output))
    if optuna is not None:
        check_storage(optuna, plan.study.name)
    found = read_known([*plan.study.known, *known])
    folder = StudyFolder(plan.study.folder)
    folder.write_recipe(plan.study)
    plan = replace(plan, notes=(*plan.notes, *take_known(folder, plan, found)))
    folder.retry_failed(plan.trials)
    hours = plan.study.max_hours
    deadline = None if hours is None else time.time() + 3600 * hours
    count = default_workers(workers_per_device) if workers is None else workers
    left = sum(any(not folder.outcome_file(trial.id).is_file() for trial in trials) for trials in plan.runs)
    with Live(folder, plan, max(count, 1), show=progress) as live:
        if left and count == 0:
            work(folder, plan, deadline)
        elif left and ray is not None:
            run_on_ray(folder, ray, workers, left, workers_per_device, deadline, live.tick)
        elif left:
            run_workers(folder, min(count, left), workers_per_device, deadline, live.tick)
        live.tick()
    for trials in plan.runs:  # a worker that was killed after writing its result left what is not kept
        tidy(folder, plan.study, trials)
    result = _result(folder, plan)
    if optuna is not None:
        export_to_optuna(optuna, plan, result.outcomes)
    return result


def read_study(folder: str | Path) -> StudyResult:
    """A study as far as it is, without running anything. Raises CheckpointError where there is none."""
    found = StudyFolder(Path(folder))
    return _result(found, make_plan(found.recipe))


def _result(folder: StudyFolder, plan: Plan) -> StudyResult:
    outcomes = folder.outcomes(plan.trials)
    result = StudyResult(folder.path, plan, outcomes, summarise(plan, outcomes))
    if outcomes:
        write_tables(folder.path, plan, outcomes, result.summaries, result.centred)
    return result
