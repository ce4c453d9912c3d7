"""The members of an ensemble (recipe field ``ensemble``), trained one after the other in folders of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import PartialState

from monteclora.runs.begin import Run
from monteclora.runs.determining import recipe_sha256
from monteclora.runs.recipe import Recipe, is_run_name
from monteclora.runs.recipe_paths import started_in
from monteclora.runs.result import RunResult
from monteclora.runs.run_folder import RunFolder
from monteclora.system.devices import is_main_process
from monteclora.training.agreement import by_main_process

__all__ = ["member_recipes", "train_members"]

_ADDED = ("seconds", "tokens", "skipped_steps", "trained_parameters", "range_test_steps", "back_offs")


def member_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipe of each member: of an ordinary run, which differs from the ensemble's in seed, name and folder."""
    run = RunFolder(recipe.folder)
    return [
        dataclasses.replace(
            recipe, name=_name(recipe.name, seed), seed=seed, ensemble=1, output=str(run.member(seed).path)
        )
        for seed in range(recipe.seed, recipe.seed + recipe.ensemble)
    ]


def _name(name: str, seed: int) -> str:
    """A member's, which is a name of a recipe too."""
    long = f"{name}-seed-{seed}"
    return long if is_run_name(long) else f"seed-{seed}"


def train_members(run: Run, train: Callable[[Recipe], RunResult]) -> dict[str, Any]:
    """Train those that are not finished; gives the last line of the ensemble's metrics.

    Args:
        run: of the ensemble.
        train: trains a member, or resumes it where it stopped.
    """
    folder, recipe = run.folder, run.recipe
    members = member_recipes(recipe)
    if is_main_process():
        if not folder.begun or folder.started_in is None:
            folder.write_environment({"started_in": started_in(folder.path)})
        if not folder.begun:
            folder.metrics.append({"event": "members", "step": 0, "seeds": [member.seed for member in members]})
        folder.record_recipe(recipe)  # a change that was accepted: the members write down how
    results = [train(member) for member in members]
    by_main_process(lambda: _conclude(folder, recipe, results))
    PartialState().wait_for_everyone()
    return folder.metrics.read()[-1]


def _conclude(folder: RunFolder, recipe: Recipe, results: Sequence[RunResult]) -> None:
    # data and versions are the members' own, and the same for all
    facts = RunFolder(results[0].folder).environment
    folder.write_environment({**facts, "started_in": folder.started_in, "recipe_sha256": recipe_sha256(recipe)})
    folder.metrics.append(_conclusion(results))


def _conclusion(results: Sequence[RunResult]) -> dict[str, Any]:
    """What :class:`~monteclora.runs.result.RunResult` says of an ensemble."""
    steps, rates = sum(result.steps for result in results), {result.learning_rate for result in results}
    names = [name for name in results[0].metrics if all(name in result.metrics for result in results)]
    return {
        "event": "finished",
        "step": steps,
        "kept_step": steps,
        "metrics": {name: sum(result.metrics[name] for result in results) / len(results) for name in names},
        **{name: sum(getattr(result, name) for result in results) for name in _ADDED},
        "learning_rate": rates.pop() if len(rates) == 1 else None,
        "peak_memory_bytes": max(result.peak_memory_bytes for result in results),
    }
