"""One run: a recipe in, a run folder with a trained adapter out."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from rich.console import Console

from monteclora.methods import get_method
from monteclora.runs.begin import Run, begin
from monteclora.runs.environment import describe_environment
from monteclora.runs.manifest import Checkpoint, checkpoint_folder
from monteclora.runs.prepare import PreparedData, prepare_data, prepare_model
from monteclora.runs.recipe import Recipe, load_recipe
from monteclora.runs.result import RunResult
from monteclora.runs.resumption import overrides_of
from monteclora.runs.run_folder import RunFolder
from monteclora.runs.start import check_start, start_facts, with_start
from monteclora.system.atomic import new_folder
from monteclora.system.devices import PeakMemory, is_main_process, training_device
from monteclora.system.quiet import quiet_libraries
from monteclora.system.randomness import preserved_generators
from monteclora.tasks import load
from monteclora.training import sharding
from monteclora.training.agreement import by_main_process
from monteclora.training.back_off import Return
from monteclora.training.ensemble import train_members
from monteclora.training.phases import train_phase
from monteclora.training.plans import Phase, phases_of, plan_of
from monteclora.training.range_test import range_test, recorded
from monteclora.training.tempering import Tempered, head_of, temper

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["train"]

_SUMMED = ("seconds", "tokens", "skipped_steps", "back_offs")  # over the phases of a run


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Iterable[tuple[str, str]] = (),
    *,
    override: bool = False,
    progress: bool = True,
) -> RunResult:
    """Train what a recipe says, in the run folder it names.

    The same call again: a finished run gives its result without training, an unfinished one resumes from its newest
    complete checkpoint and ends as if it had never stopped. SIGINT and SIGTERM save a checkpoint first. A recipe with
    ``ensemble`` above 1 trains its members in ``members/`` of the folder, each to the bit as a run of that seed alone.

    Args:
        recipe: the path of a YAML file, the name of a bundled recipe, a mapping, or a recipe.
        overrides: pairs of dotted key and YAML text, as in ``("training.learning_rate", "1e-4")``.
        override: resume an unfinished run although its recipe (``data``, ``training`` and the weights of the
            regulariser) or its data changed; ``environment.json`` then says from which step, and how.
        progress: whether to tell on standard error what happens.

    Raises:
        ConfigError: the recipe is wrong, or asks for what this machine cannot do.
        DataError: the data are wrong.
        CheckpointError: the folder holds a run of another recipe or data, is in use, or cannot be written.
        DivergenceError: the loss or a gradient is not finite; the last checkpoint is finite.
        TrainingInterrupted: a KeyboardInterrupt, after saving.
    """
    recipe = with_start(load_recipe(recipe, overrides))
    sharding.check_launch(recipe.model.quantization, recipe.training.precision)
    console = Console(stderr=True, quiet=not progress or not is_main_process())
    with begin(recipe, override=override) as run:
        finished = run.finished
        if finished is None and recipe.ensemble > 1:
            finished = train_members(run, lambda member: train(member, override=override, progress=progress))
        elif finished is None:
            with preserved_generators(), quiet_libraries():
                finished = _train(run, console)
        else:
            with quiet_libraries():
                run.check_data(load(recipe.data, ("train", "validation")).sources)
            console.print(f"{run.folder.path} is finished: nothing to train", highlight=False)
    return _result(run, finished)


def _train(run: Run, console: Console) -> dict[str, Any]:
    """Train an unfinished run to its end; gives the last line of its metrics."""
    recipe, folder = run.recipe, run.folder
    data = prepare_data(recipe)
    for note in (*data.notes, *check_start(recipe, data.task.kind, data.task.label_names)):
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    fresh = _FreshModel(partial(prepare_model, recipe, data.task.kind, data.task.label_names, data.tokenizer))
    parameters = fresh.model.named_parameters()
    trained = {name: parameter.numel() for name, parameter in parameters if parameter.requires_grad}
    head = head_of(fresh.model, trained, len(data.task.label_names or ())) if recipe.training.temperature else None
    checkpoint = run.checkpoint()
    memory = PeakMemory(training_device())
    if is_main_process():
        _note(run, data, checkpoint, memory.device, console)
    rate = _known_rate(recipe, folder)
    if rate is None:
        rate = _found_rate(recipe, folder, data, fresh.model, console)
        fresh.renew()
    phases = phases_of(recipe, len(data.train), rate)
    _train_phases(recipe, phases, folder, data, fresh, frozenset(trained), checkpoint, console)
    model = fresh.model
    tempered = None if head is None else _tempered(model, head, recipe, data, console)
    with sharding.gathered(model, trained):
        by_main_process(lambda: _save_adapter(folder, recipe, model))
    if recipe.training.post_hoc.adapter is not None:
        # its weights are saved with the posterior, and were not trained
        trained = {name: trained[name] for name, each in model.named_parameters() if each.requires_grad}
    count = sum(trained.values())
    by_main_process(lambda: folder.metrics.append(_conclusion(folder, rate, count, memory, tempered)))
    PartialState().wait_for_everyone()
    return folder.metrics.read()[-1]


def _tempered(model: nn.Module, head: str, recipe: Recipe, data: PreparedData, console: Console) -> Tempered | None:
    found, rows = temper(model, head, recipe.training, data), len(data.validation or ())
    if found is None:
        note = f"training.temperature is left out: the logits do not follow {head}"
    else:
        note = f"the head is divided by {found.temperature:.3g}, the temperature that suits {rows} validation rows best"
    console.print(f"note: {note}", highlight=False, soft_wrap=True)
    return found


def _save_adapter(folder: RunFolder, recipe: Recipe, model: nn.Module) -> None:
    with new_folder(folder.adapter) as stage:
        get_method(recipe.method.name).save(model, stage)


def _note(run: Run, data: PreparedData, checkpoint: Checkpoint | None, device: torch.device, console: Console) -> None:
    """Write down what is trained on, and leave of the metrics what the checkpoint has seen."""
    run.folder.divergence_file.unlink(missing_ok=True)
    facts = describe_environment(run.recipe, data.task, device)
    run.note({**facts, **({"start": start} if (start := start_facts(run.recipe)) else {})}, checkpoint)
    for note in overrides_of(run.folder.environment):
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    run.folder.metrics.rewind(0 if checkpoint is None else checkpoint.total_step)


def _known_rate(recipe: Recipe, run: RunFolder) -> float | None:
    """The peak learning rate, the recipe's or the one that the run has found; None where it is still to be found.

    A run that resumes goes by what its log says. All processes read it: nothing is added before all have taken part in
    the test.
    """
    given = recipe.training.learning_rate
    return recorded(run) if given == "auto" else given


def _found_rate(recipe: Recipe, run: RunFolder, data: PreparedData, model: nn.Module, console: Console) -> float:
    """The peak learning rate by a range test, whose line is in the metrics afterwards; ``model`` is used up."""
    found = range_test(recipe, run, data, model, console)
    event = found.event(phases_of(recipe, len(data.train), found.learning_rate)[0].name)
    by_main_process(lambda: run.metrics.append(event))
    console.print(
        f"note: learning rate {found.learning_rate:g}, found by a range test of {found.steps} steps", highlight=False
    )
    return found.learning_rate


def _train_phases(
    recipe: Recipe,
    phases: list[Phase],
    run: RunFolder,
    data: PreparedData,
    fresh: _FreshModel,
    trained: frozenset[str],
    checkpoint: Checkpoint | None,
    console: Console,
) -> None:
    """Train the phases that are left, with a line of metrics for each; the model ends with the weights to keep."""
    first_step = 0
    if checkpoint is not None:
        phases = list(dropwhile(lambda phase: phase.name != checkpoint.phase, phases))
        first_step = checkpoint.first_step
    for phase in phases:
        resume: Checkpoint | Return | None = checkpoint
        if checkpoint is not None and checkpoint.phase != phase.name:
            resume = None
        attempt = partial(
            train_phase, recipe, phase, run, data, first_step=first_step, trained=trained, console=console
        )
        while isinstance(outcome := attempt(fresh.model, resume=resume), Return):
            fresh.renew()
            resume = outcome
        first_step = outcome.step
        if outcome.kept_step != outcome.step:
            method = get_method(recipe.method.name)
            if sharding.is_sharded(fresh.model):  # its parameters take no whole ones any more
                fresh.renew()
                method.begin_phase(fresh.model, plan_of(recipe, phase, len(data.train)))
            method.load(fresh.model, checkpoint_folder(run.checkpoints, outcome.kept_step))
        event = {"event": "phase", "phase": phase.name, **dataclasses.asdict(outcome)}
        by_main_process(partial(run.metrics.append, event))


class _FreshModel:
    """The model that is trained; the old one is gone before a new one is made.

    Args:
        prepare: makes it, as a run begins with it.
    """

    def __init__(self, prepare: Callable[[], nn.Module]) -> None:
        self._prepare = prepare
        self.model = prepare()

    def renew(self) -> None:
        """Throw it away, and make it anew."""
        del self.model
        gc.collect()  # modules and hooks refer to each other: counting references frees none of them
        self.model = self._prepare()


def _conclusion(
    run: RunFolder, rate: float, trained_parameters: int, memory: PeakMemory, tempered: Tempered | None
) -> dict[str, Any]:
    """The last line of the metrics; its costs count those of a range test."""
    events = run.metrics.read()
    tests = [event for event in events if event["event"] == "range_test"]
    phases = [event for event in events if event["event"] == "phase"]
    kept_steps = {phase["kept_step"] for phase in phases}
    # of the last validated step whose weights a phase ended with
    validated = [event for event in events if event["event"] == "eval" and event["step"] in kept_steps]
    about = ("event", "phase", "step", "epoch", "seconds")
    metrics = {name: value for name, value in (validated or [{}])[-1].items() if name not in about}
    return {
        "event": "finished",
        **{name: phases[-1][name] for name in ("phase", "step", "kept_step")},
        "metrics": metrics if tempered is None else tempered.metrics,
        **({} if tempered is None else {"temperature": tempered.temperature}),
        "learning_rate": rate / 2 ** phases[0].get("back_offs", 0),
        "range_test_steps": sum(test["test_steps"] for test in tests),
        **{name: sum(e.get(name, 0) for e in (*tests, *phases)) for name in _SUMMED},
        "peak_memory_bytes": memory.bytes,
        "trained_parameters": trained_parameters,
    }


def _result(run: Run, finished: Mapping[str, Any]) -> RunResult:
    same = ("kept_step", "metrics", "seconds", "peak_memory_bytes", "tokens", "trained_parameters")
    values = {name: finished[name] for name in same}
    since = {
        name: finished[name]
        for name in ("skipped_steps", "learning_rate", "range_test_steps", "back_offs", "temperature")
        if name in finished
    }
    members = tuple(member.path for member in run.folder.members)
    return RunResult(run.folder.path, run.recipe, finished["step"], **values, **since, members=members)
