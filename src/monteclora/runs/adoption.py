"""LoRA adapters that were trained without posterior or elsewhere: what is known of them, and a posterior for them.

An adapter folder of peft, with what :func:`adopt` writes beside the adapter, is a run folder: it is evaluated, predicts
and is exported as any other.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monteclora.adapters.active import active_posteriors
from monteclora.adapters.checks import check_adapter
from monteclora.adapters.grafting import Graft, Rows, graft
from monteclora.adapters.storage import CONFIG_FILE, GRAFTED
from monteclora.data.models import resolve_model
from monteclora.data.parts import resolved
from monteclora.errors import ConfigError
from monteclora.methods.adapters import AdapterMethod
from monteclora.methods.lora import LoRAOptions
from monteclora.methods.registry import get_method
from monteclora.runs.environment import describe_environment
from monteclora.runs.foreign_adapter import check_task, lora_options
from monteclora.runs.loading import LoadedRun
from monteclora.runs.prepare import base_model
from monteclora.runs.recipe import ModelSpec, Recipe
from monteclora.runs.run_folder import RunFolder
from monteclora.system.devices import training_device
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks import DataSpec, load

if TYPE_CHECKING:
    from monteclora.tasks import TaskData

__all__ = ["Adopted", "adopt", "disown", "is_plain_adapter", "rows_of", "with_posterior"]


@dataclass(frozen=True)
class Adopted:
    """What is known about an adapter.

    Attributes:
        run: its folder.
        notes: what was taken for granted, in words.
    """

    run: RunFolder
    notes: tuple[str, ...]


def is_plain_adapter(folder: str | Path) -> bool:
    """Whether a folder is an adapter, rather than a run that has one."""
    return RunFolder(Path(folder)).is_adapter


def adopt(folder: str | Path, base: str | None, data: DataSpec) -> Adopted:
    """Describe an adapter from elsewhere as a run: ``recipe.yaml`` and ``environment.json`` in its folder.

    Args:
        folder: as peft, unsloth or axolotl write it.
        base: the model it was trained on; by default the one that its configuration names.
        data: rows with labels or completions, as ``validation_file``; of a classifier also ``label_names``, in the
            order of training. Without these the order is that of names in the file.

    Raises:
        CheckpointError: a file of the adapter is missing or damaged.
        ConfigError: no base model is named, there is none of that name, or an option is none that a recipe can have.
        DataError: the file is wrong, or its rows are of another kind than the adapter.
        UnsafeCodeError: the weights are a pickle.
    """
    run, notes = RunFolder(Path(folder)), []
    check_adapter(run.path)
    config = json.loads((run.path / CONFIG_FILE).read_text(encoding="utf-8"))
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"{run.path / CONFIG_FILE} names no base model", "Give it with --base.")
    if base is None:
        notes.append(f"the base model is {name}, as {CONFIG_FILE} says")
    resolve_model(name)
    found, spec = _described(data)
    if not data.label_names and found.label_names:
        listed = ", ".join(found.label_names)
        notes.append(f"the labels are taken in the order {listed}: name them if the adapter was trained with another")
    check_task(run.path, config, found.kind, f"the rows of {data.validation_file}")
    options = LoRAOptions(**lora_options(run.path, config))
    title = run.path.resolve().name
    recipe = Recipe(name=title, model=ModelSpec(name), data=spec, method=options, output=str(run.path.resolve()))
    facts = {**describe_environment(recipe, found, training_device()), "adopted": True}
    run.write_environment(facts)
    run.write_recipe(recipe)
    return Adopted(run, tuple(notes))


def _described(data: DataSpec) -> tuple[TaskData, DataSpec]:
    """The rows, and how to find them again with the labels in the same order."""
    spec = data
    if data.validation_file is not None:
        spec = dataclasses.replace(data, validation_file=resolved(data.validation_file))
        if not data.label_names:  # the names are those of training rows, of which there are none
            as_training = dataclasses.replace(spec, train_file=spec.validation_file, validation_file=None)
            names = load(dataclasses.replace(as_training, validation_fraction=0.0)).label_names
            spec = dataclasses.replace(spec, label_names=list(names or ()))
    return load(spec), spec


def disown(folder: Path) -> None:
    """Remove what :func:`adopt` wrote."""
    run = RunFolder(folder)
    if run.recipe_file.is_file() and run.environment.get("adopted"):
        run.recipe_file.unlink()
        (folder / "environment.json").unlink()


def with_posterior(loaded: LoadedRun, rows: Rows | None) -> tuple[LoadedRun, Graft | None]:
    """A run whose predictions can be drawn, with the posterior that it was given for that and nobody saved yet.

    Args:
        loaded: a run; one that has a posterior stays as it is.
        rows: of a new posterior, see :func:`monteclora.adapters.grafting.graft`; by default ``equal``.

    Raises:
        ConfigError: the method has no posterior and no LoRA adapter that could get one; or ``rows`` are asked of a run
            that has a posterior with other ones.
    """
    if loaded.has_posterior:
        _check_rows(loaded, rows)
        return loaded, None
    method: Any = get_method(loaded.recipe.method.name)
    if not isinstance(method, AdapterMethod) or method.peft_type != AdapterMethod.peft_type:
        raise ConfigError(
            f"the method {method.name} of {loaded.folder} has no posterior to scale, and no LoRA adapter to put one on",
            "Evaluate it with --calibrator temperature.",
        )
    with quiet_libraries():
        plain = base_model(loaded.recipe, loaded.kind, loaded.label_names, loaded.tokenizer)
        made = graft(plain, RunFolder(loaded.folder).adapter, rows or "equal", loaded.recipe.seed)
    if loaded.recipe.model.quantization == "none":
        made.model.to(training_device())
    made.model.requires_grad_(False).eval()
    return dataclasses.replace(loaded, model=made.model), made


def rows_of(loaded: LoadedRun) -> Rows | None:
    """How the rows of a posterior are scaled that a plain LoRA was given; None for one that was trained."""
    found: Rows | None = (active_posteriors(loaded.model)[0].calibration or {}).get(GRAFTED)
    return found


def _check_rows(loaded: LoadedRun, rows: Rows | None) -> None:
    found = rows_of(loaded)
    if rows not in (None, found):
        what = "that was trained" if found is None else f"with {found} rows"
        hint = "Leave rows out." if found is None else "Take that away first: monteclora calibrate RUN --undo."
        raise ConfigError(f"rows are {rows}, and {loaded.folder} has a posterior {what}", hint)
