"""One run: a recipe in, a run folder with a trained adapter out."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from monteclora.errors import CheckpointError
from monteclora.training.environment import PeakMemory, changes, describe_environment, training_device
from monteclora.training.folders import discard_remains, new_folder
from monteclora.training.manifest import Checkpoint, newest_complete
from monteclora.training.phases import phases_of, train_phase
from monteclora.training.prepare import PreparedData, prepare_data, prepare_model
from monteclora.training.quiet import quiet_libraries
from monteclora.training.recipe import Recipe, load_recipe, recipe_sha256
from monteclora.training.run_folder import RunFolder

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["RunResult", "train"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: where it is.
        recipe: what it trained.
        steps: optimiser steps of all phases.
        kept_step: the step whose weights it ended with.
        metrics: validation metrics of that step, by name; empty without validation rows.
        seconds: of training.
        peak_memory_bytes: of the GPU where there is one, else of the process.
        tokens: seen in training, without padding.
        trained_parameters: how many numbers were trained.
    """

    folder: Path
    recipe: Recipe
    steps: int
    kept_step: int
    metrics: Mapping[str, float]
    seconds: float
    peak_memory_bytes: int
    tokens: int
    trained_parameters: int

    @property
    def adapter(self) -> Path:
        """The trained adapter, as ``save_pretrained`` writes it."""
        return RunFolder(self.folder).adapter


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Iterable[tuple[str, str]] = (),
    *,
    progress: bool = True,
) -> RunResult:
    """Train what a recipe says, in the run folder it names.

    The same call again: a finished run gives its result without training, an unfinished one goes on from its newest
    complete checkpoint and ends as if it had never stopped. SIGINT and SIGTERM save a checkpoint first.

    Args:
        recipe: the path of a YAML file, the name of a bundled recipe, a mapping, or a recipe.
        overrides: pairs of dotted key and YAML text, as in ``("training.learning_rate", "1e-4")``.
        progress: whether to tell on standard error what happens.

    Raises:
        ConfigError: the recipe is wrong, or asks for what this machine cannot do.
        DataError: the data are wrong.
        CheckpointError: the folder holds a run of another recipe or data, is in use, or cannot be written.
        DivergenceError: the loss or a gradient is not finite; the last checkpoint is finite.
        TrainingInterrupted: a KeyboardInterrupt, after saving.
    """
    recipe = load_recipe(recipe, overrides)
    run = RunFolder(recipe.folder)
    console = Console(stderr=True, quiet=not progress or not _is_main())
    with ExitStack() as stack:
        if _is_main():
            stack.enter_context(run.locked())
            run.claim(recipe)
        finished = run.finished
        if finished is None:
            stack.enter_context(quiet_libraries())
            finished = _train(recipe, run, console)
        else:
            console.print(f"{run.path} is finished: nothing to train", highlight=False)
    return _result(recipe, run, finished)


def _train(recipe: Recipe, run: RunFolder, console: Console) -> dict[str, Any]:
    """Train an unfinished run to its end; gives the last line of its metrics."""
    data = prepare_data(recipe)
    for note in data.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    model = prepare_model(recipe, data)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    checkpoint = _newest_checkpoint(run, recipe)
    memory = PeakMemory(training_device())
    if _is_main():
        discard_remains(run.path)
        discard_remains(run.checkpoints)
        _note_environment(run, describe_environment(recipe, data.task, memory.device), checkpoint)
        run.metrics.rewind(0 if checkpoint is None else checkpoint.total_step)
    done = _train_phases(recipe, run, data, model, checkpoint, console)
    facts = {
        "event": "finished",
        "phase": done[-1]["phase"],
        "step": done[-1]["step"],
        "kept_step": done[-1]["kept_step"],
        "metrics": _validation_metrics(run, {phase["kept_step"] for phase in done}),
        "seconds": sum(phase["seconds"] for phase in done),
        "tokens": sum(phase["tokens"] for phase in done),
        "peak_memory_bytes": memory.bytes,
        "trained_parameters": parameters,
    }
    if _is_main():
        with new_folder(run.adapter) as stage:
            model.save_pretrained(str(stage), save_embedding_layers=False)
        run.metrics.append(facts)
    return facts


def _train_phases(
    recipe: Recipe,
    run: RunFolder,
    data: PreparedData,
    model: PeftModel,
    checkpoint: Checkpoint | None,
    console: Console,
) -> list[dict[str, Any]]:
    """Train the phases that are left; gives a line of metrics for every phase of the run."""
    done = [event for event in run.metrics.read() if event["event"] == "phase"]
    for phase in phases_of(recipe, len(data.train))[len(done) :]:
        outcome = train_phase(
            recipe,
            phase,
            run,
            data,
            model,
            first_step=done[-1]["step"] if done else 0,
            resume=checkpoint if checkpoint is not None and checkpoint.phase == phase.name else None,
            console=console,
        )
        done.append({"event": "phase", "phase": phase.name, **dataclasses.asdict(outcome)})
        if _is_main():
            run.metrics.append(done[-1])
    return done


def _newest_checkpoint(run: RunFolder, recipe: Recipe) -> Checkpoint | None:
    found = newest_complete(run.checkpoints)
    if found is not None and found.recipe_sha256 != recipe_sha256(recipe):
        raise CheckpointError(f"{found.path} was written for another recipe", f"Remove {run.checkpoints}.")
    return found


def _note_environment(run: RunFolder, facts: dict[str, Any], checkpoint: Checkpoint | None) -> None:
    """Write down what is trained on; on resuming check that the data are the same, and tell what else is not.

    Raises:
        CheckpointError: the data are others than when the run began.
    """
    if checkpoint is None:
        run.write_environment(facts)
        return
    before = run.environment
    for split, source in facts["data"]["splits"].items():
        if before["data"]["splits"].get(split, {}).get("sha256") != source["sha256"]:
            raise CheckpointError(
                f"the {split} rows of {source['origin']} changed since {run.path} was begun",
                "Restore them, or choose another name or output.",
            )
    changed = changes(before, facts)
    if changed:
        logger.warning("resuming in another environment, the result may differ: %s", ", ".join(changed))
    resumed = [*before.get("resumed", []), {"step": checkpoint.total_step, "changes": changed}]
    run.write_environment({**before, "resumed": resumed})


def _validation_metrics(run: RunFolder, kept_steps: set[int]) -> dict[str, float]:
    """The metrics of the last validated step whose weights a phase ended with."""
    about = ("event", "phase", "step", "epoch", "seconds")
    found = [event for event in run.metrics.read() if event["event"] == "eval" and event["step"] in kept_steps]
    return {key: value for key, value in found[-1].items() if key not in about} if found else {}


def _result(recipe: Recipe, run: RunFolder, finished: Mapping[str, Any]) -> RunResult:
    same = ("kept_step", "metrics", "seconds", "peak_memory_bytes", "tokens", "trained_parameters")
    return RunResult(run.path, recipe, finished["step"], **{name: finished[name] for name in same})


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
