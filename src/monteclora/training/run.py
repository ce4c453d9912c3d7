"""One run: a recipe in, a run folder with a trained adapter out."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
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
    _train_phases(recipe, run, data, model, checkpoint, console)
    if _is_main():
        with new_folder(run.adapter) as stage:
            model.save_pretrained(str(stage), save_embedding_layers=False)
        run.metrics.append(_conclusion(run, parameters, memory))
    PartialState().wait_for_everyone()
    return run.metrics.read()[-1]


def _train_phases(
    recipe: Recipe,
    run: RunFolder,
    data: PreparedData,
    model: PeftModel,
    checkpoint: Checkpoint | None,
    console: Console,
) -> None:
    """Train the phases that are left, and write a line of metrics for each."""
    phases = phases_of(recipe, len(data.train))
    first_step = 0
    if checkpoint is not None:
        phases = list(dropwhile(lambda phase: phase.name != checkpoint.phase, phases))
        first_step = checkpoint.first_step
    for phase in phases:
        resume = checkpoint if checkpoint is not None and checkpoint.phase == phase.name else None
        outcome = train_phase(recipe, phase, run, data, model, first_step=first_step, resume=resume, console=console)
        first_step = outcome.step
        if _is_main():
            run.metrics.append({"event": "phase", "phase": phase.name, **dataclasses.asdict(outcome)})


def _conclusion(run: RunFolder, trained_parameters: int, memory: PeakMemory) -> dict[str, Any]:
    """The last line of the metrics."""
    events = run.metrics.read()
    phases = [event for event in events if event["event"] == "phase"]
    kept_steps = {phase["kept_step"] for phase in phases}
    # of the last validated step whose weights a phase ended with
    validated = [event for event in events if event["event"] == "eval" and event["step"] in kept_steps]
    about = ("event", "phase", "step", "epoch", "seconds")
    metrics = {name: value for name, value in (validated or [{}])[-1].items() if name not in about}
    return {
        "event": "finished",
        **{name: phases[-1][name] for name in ("phase", "step", "kept_step")},
        "metrics": metrics,
        **{name: sum(phase[name] for phase in phases) for name in ("seconds", "tokens")},
        "peak_memory_bytes": memory.bytes,
        "trained_parameters": trained_parameters,
    }


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


def _result(recipe: Recipe, run: RunFolder, finished: Mapping[str, Any]) -> RunResult:
    same = ("kept_step", "metrics", "seconds", "peak_memory_bytes", "tokens", "trained_parameters")
    return RunResult(run.path, recipe, finished["step"], **{name: finished[name] for name in same})


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
