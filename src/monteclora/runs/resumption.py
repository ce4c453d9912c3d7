"""Going on with a run: with the same recipe and data, or with others that are accepted on purpose and written down."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from monteclora.errors import CheckpointError
from monteclora.runs.data_facts import data_facts
from monteclora.runs.determining import changed_values
from monteclora.runs.environment import changes
from monteclora.runs.manifest import Checkpoint
from monteclora.runs.recipe import Recipe
from monteclora.runs.run_folder import RunFolder
from monteclora.runs.start import check_unchanged

__all__ = ["accepted_sha256", "check_changes", "overrides_of", "resumed"]

# what takes effect from the step it is changed at; all else is in the weights, their shapes or the noise already
_ADJUSTABLE = ("data.", "training.", "method.kl_weight", "method.coop_weight", "method.lora_dropout")
_FIXED = ("training.mode",)

logger = logging.getLogger(__name__)


def check_changes(run: RunFolder, changed: list[str], override: bool) -> None:
    """Whether an unfinished run may resume although its recipe changed.

    Args:
        run: it.
        changed: dotted keys.
        override: whether changes are accepted.

    Raises:
        CheckpointError: it may not; the message names the keys.
    """
    begun = f"{run.path} was started with another recipe: {', '.join(changed)} changed"
    fixed = [key for key in changed if key in _FIXED or not key.startswith(_ADJUSTABLE)]
    if run.finished is not None or (override and fixed):
        why = ", and is finished" if run.finished is not None else f"; {', '.join(fixed)} cannot change on the way"
        raise CheckpointError(begun + why, "Choose another name or output.")
    if not override:
        hint = "Choose another name or output, or remove the folder."
        if not fixed:
            hint += " To resume with the changes and have them recorded, give --override."
        raise CheckpointError(begun, hint)


def resumed(
    run: RunFolder, recipe: Recipe, facts: Mapping[str, Any], checkpoint: Checkpoint, *, override: bool = False
) -> dict[str, Any]:
    """The content of ``environment.json`` of a resumed run: as it was started, and what is not as it was.

    Args:
        run: it.
        recipe: it resumes with.
        facts: its environment as of now.
        checkpoint: it resumes from.
        override: whether other data are accepted.

    Raises:
        CheckpointError: the data are others than when the run began, and that was not accepted, or their labels are;
            or what they were is not to be read.
    """
    before = run.environment
    check_unchanged(before, facts, run.path)
    data = _changed_data(run, facts["data"], override)
    changed = changes(before, facts)
    if changed:
        logger.warning("resuming in another environment, the result may differ: %s", ", ".join(changed))
    entry: dict[str, Any] = {"step": checkpoint.total_step, "changes": changed}
    values = _changed_recipe(run, recipe, before, checkpoint)
    if data or values:
        entry["override"] = {"recipe_sha256": checkpoint.recipe_sha256, "recipe": values, "data": data}
        before |= {key: facts[key] for key in ("recipe_sha256", "seeds", "data")}
    # earlier versions did not write down all of it; paths that are found from here lead from here
    missing = {key: facts[key] for key in ("started_in", "recipe_sha256") if key not in before}
    return {**before, **missing, "resumed": [*before.get("resumed", []), entry]}


def _changed_data(run: RunFolder, now: Mapping[str, Any], override: bool) -> list[str]:
    before = data_facts(run)
    changed = [
        f"the {split} rows of {source['origin']}"
        for split, source in now["splits"].items()
        if before.sha256.get(split) != source["sha256"]
    ]
    if changed and not override:
        raise CheckpointError(
            f"{changed[0]} changed since {run.path} was started",
            "Restore them, choose another name or output, or give --override to resume with these.",
        )
    if (before.kind, before.label_names or ()) != (now["kind"], tuple(now["label_names"] or ())):
        raise CheckpointError(f"{now['name']} has other labels than {run.path} was started with", "Restore the data.")
    return changed


def _changed_recipe(
    run: RunFolder, recipe: Recipe, environment: Mapping[str, Any], checkpoint: Checkpoint
) -> dict[str, list[Any]]:
    """What the checkpoint was trained with and what the run resumes with, by dotted key.

    A checkpoint may be older than the latest override, so that the changes since then add up.
    """
    accepted = _accepted(environment)
    since = [n for n, entry in enumerate(accepted) if entry["recipe_sha256"] == checkpoint.recipe_sha256]
    history = [entry["recipe"] for entry in accepted[since[0] :]] if since else []
    latest = {key: list(values) for key, values in changed_values(run.recipe, recipe).items()}
    found: dict[str, list[Any]] = {}
    for changed in (*history, latest):
        for key, (old, new) in changed.items():
            found[key] = [found.get(key, [old])[0], new]
    return {key: values for key, values in found.items() if values[0] != values[1]}


def _accepted(environment: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [entry["override"] for entry in environment.get("resumed", []) if "override" in entry]


def accepted_sha256(environment: Mapping[str, Any]) -> list[str]:
    """Checksums of the recipes that the run was trained with before changes that were accepted."""
    return [entry["recipe_sha256"] for entry in _accepted(environment)]


def overrides_of(environment: Mapping[str, Any]) -> list[str]:
    """What was changed on the way, one sentence per change; for the reader of the run's numbers.

    Args:
        environment: the content of ``environment.json``.
    """
    notes = []
    for entry in environment.get("resumed", []):
        if "override" in entry:
            recipe = [f"{key} {old} -> {new}" for key, (old, new) in entry["override"]["recipe"].items()]
            data = [f"other {rows.removeprefix('the ')}" for rows in entry["override"]["data"]]
            notes.append(f"went on from step {entry['step']} with {', '.join([*recipe, *data])}")
    return notes
