"""How one phase of a run is trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from accelerate import Accelerator
from rich.console import Console
from torch import nn
from transformers import set_seed

from monteclora.errors import DivergenceError
from monteclora.methods import get_method
from monteclora.runs.manifest import Checkpoint
from monteclora.runs.prepare import PreparedData
from monteclora.runs.recipe import Recipe
from monteclora.runs.run_folder import RunFolder
from monteclora.system.devices import is_main_process
from monteclora.training.assembly import accelerator_of, assemble, named_memory
from monteclora.training.back_off import Return, begin_again, returning, times_back, watch_of
from monteclora.training.checkpoint import Checkpoints, restore
from monteclora.training.class_prior import prior_of
from monteclora.training.divergence import NonFiniteSteps
from monteclora.training.interruption import TrainingInterrupted, stop_on_signals
from monteclora.training.loop import Loop
from monteclora.training.plans import Phase, plan_of
from monteclora.training.reporting import Reporting
from monteclora.training.watch import WentWrong

__all__ = ["Outcome", "train_phase"]

_STOPPING = "\nstopping: this step is finished and saved first; asked again, it stops at once\n"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a phase; steps are counted over all phases.

    Attributes:
        step: the last one.
        kept_step: the one whose weights are to be kept.
        tokens: it saw, without padding.
        seconds: it took.
        skipped_steps: how many were not finite, and changed nothing.
        back_offs: how often it went back, and on at half the learning rate.
    """

    step: int
    kept_step: int
    tokens: int
    seconds: float
    skipped_steps: int
    back_offs: int


def train_phase(
    recipe: Recipe,
    phase: Phase,
    run: RunFolder,
    data: PreparedData,
    model: nn.Module,
    *,
    first_step: int,
    trained: frozenset[str],
    resume: Checkpoint | Return | None,
    console: Console,
) -> Outcome | Return:
    """Train one phase, from its start or from one of its checkpoints; ``model`` ends with the weights of the last step.

    Args:
        recipe, phase, run, data, model: what is trained, on what, and where it is kept.
        first_step: steps of the phases before.
        trained: names of the parameters that any phase of the run trains.
        resume: a checkpoint of this phase; None to start it; or what the phase gave when it went wrong, to go back.
        console: for people.

    Raises:
        TrainingInterrupted: after saving, when that was asked for.
        DivergenceError: the loss or a gradient is not finite.
        CheckpointError: the checkpoint does not fit, or the disk is full.
        ConfigError: the recipe asks for something this machine or version cannot do.
    """
    method, back = get_method(recipe.method.name), None
    if isinstance(resume, Return):
        back, resume = resume, resume.checkpoint
    times = times_back(resume, back)
    phase = dataclasses.replace(phase, learning_rate=phase.learning_rate / 2**times)
    plan = plan_of(recipe, phase, len(data.train))
    method.begin_phase(model, plan)
    if resume is not None:
        method.load(model, resume.path)
    set_seed(recipe.seed)
    accelerator = accelerator_of(recipe, run)
    saver = _saver(recipe, phase, run, first_step, trained, resume)
    reporting = _reporting(recipe, phase, run, accelerator, console, first_step)
    most_skipped = recipe.training.max_skipped if recipe.training.non_finite == "skip" else 0
    non_finite = NonFiniteSteps(run, data, phase.name, first_step, most_skipped)
    loop = assemble(recipe, phase, plan, data, model, method, accelerator, saver, non_finite, reporting)
    if resume is not None:
        restore(loop, resume.path)
    prior = prior_of(data) if recipe.training.back_off else None  # it reads the labels of all rows
    loop.watch = watch_of(recipe, phase, prior, times)
    loop.prior = None if loop.watch is None else prior
    if back is not None:
        begin_again(loop, run, saver, back, phase.learning_rate)
    try:
        _run(loop, console)
    except (WentWrong, DivergenceError) as error:
        if (found := returning(loop, saver, error)) is None:
            raise
        accelerator.free_memory()
        return found
    return _outcome(loop, run, first_step, times)


def _saver(
    recipe: Recipe,
    phase: Phase,
    run: RunFolder,
    first_step: int,
    trained: frozenset[str],
    resume: Checkpoint | None,
) -> Checkpoints:
    return Checkpoints(
        folder=run.checkpoints,
        keep=recipe.training.keep_checkpoints,
        # one for all of the run, whatever words the paths have now; for the main process, which writes both
        recipe_sha256=run.environment["recipe_sha256"] if is_main_process() else "",
        phase=phase.name,
        first_step=first_step,
        trained=trained,
        resumed_from=None if resume is None else resume.path,
    )


def _reporting(
    recipe: Recipe, phase: Phase, run: RunFolder, accelerator: Accelerator, console: Console, first_step: int
) -> Reporting:
    title = recipe.name if phase.name == "cooperative" else f"{recipe.name} ({phase.name})"
    return Reporting(
        run.metrics, accelerator, console, phase=phase.name, title=title, first_step=first_step, steps=phase.steps
    )


def _outcome(loop: Loop, run: RunFolder, first_step: int, times: int) -> Outcome:
    """What a phase came to that went back so many times. Raises TrainingInterrupted where it was stopped."""
    state = loop.state
    if loop.interrupted:
        raise TrainingInterrupted(f"{run.path} is saved at step {first_step + state.step}: the same command resumes it")
    kept = state.step if state.best_step is None else state.best_step
    return Outcome(first_step + state.step, first_step + kept, state.tokens, state.seconds, state.skipped, times)


def _run(loop: Loop, console: Console) -> None:
    """Train to the end, to a signal or to an error, and close what tells of it."""
    try:
        with stop_on_signals("" if console.quiet else _STOPPING) as loop.interruption, named_memory(loop.batches):
            loop.run()
    finally:
        loop.reporting.close()
        for tracker in loop.accelerator.trackers:  # end_training() would also part the processes, whose run goes on
            tracker.finish()
