"""An adapter that a run starts from: ``training.post_hoc.adapter``, whose posterior alone is trained.

The folder is one of peft's, whatever tool wrote it. Its own configuration says what its layers are; the recipe that is
written down says the same, so that no option in it is one that had no effect.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monteclora.adapters.checks import check_adapter
from monteclora.adapters.storage import CONFIG_FILE, POSTERIOR_FILE, WEIGHTS_FILE
from monteclora.config import brief, default_of
from monteclora.data.kinds import Kind
from monteclora.errors import CheckpointError, ConfigError
from monteclora.runs.foreign_adapter import check_task, lora_options
from monteclora.runs.recipe import Recipe

__all__ = ["check_start", "check_unchanged", "start_facts", "with_start"]

_HERE = "training.post_hoc.adapter"


def with_start(recipe: Recipe) -> Recipe:
    """The recipe with the options of the adapter that it starts from; one that starts from none as it is.

    Raises:
        CheckpointError: a file of the adapter is missing or damaged, or it has a posterior already.
        ConfigError: an option of the recipe is another one than the adapter's, or one of the adapter's is none that a
            recipe can have.
        UnsafeCodeError: its weights are a pickle.
    """
    if recipe.training.post_hoc.adapter is None:
        return recipe
    folder, written = _read(recipe)
    options: Any = recipe.method
    found = lora_options(folder, written)
    defaults = {field.name: default_of(field) for field in dataclasses.fields(options)}
    for name, own in found.items():
        given = getattr(options, name)
        if given not in (defaults[name], own):
            raise ConfigError(
                f"method.{name} is {brief(given)}, and the adapter {folder} of {_HERE} has {brief(own)}",
                "Leave it out: the adapter's own counts.",
            )
    return dataclasses.replace(recipe, method=dataclasses.replace(options, **found))


def check_start(recipe: Recipe, kind: Kind, label_names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Check that the adapter is one for this kind of task; gives what is taken for granted, in words.

    Raises:
        DataError: it is for another kind.
    """
    if recipe.training.post_hoc.adapter is None:
        return ()
    folder, written = _read(recipe)
    check_task(folder, written, kind)
    notes = [f"rho and eta alone are trained: the mean stays that of {folder}"]
    if label_names and not recipe.data.label_names and recipe.data.task is None:
        listed = ", ".join(label_names)
        notes.append(f"the labels are taken in the order {listed}: set data.label_names if the adapter has another")
    base = written.get("base_model_name_or_path")
    if base and Path(base).name != Path(recipe.model.name).name:
        notes.append(f"the adapter says that it was trained on {base}; it is put on {recipe.model.name}")
    return tuple(notes)


def start_facts(recipe: Recipe) -> dict[str, str] | None:
    """For ``environment.json``: the adapter's folder and the checksum of its weights; None where there is none."""
    if recipe.training.post_hoc.adapter is None:
        return None
    folder = Path(recipe.training.post_hoc.adapter)
    with (folder / WEIGHTS_FILE).open("rb") as file:
        return {"adapter": str(folder), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any], run: Path) -> None:
    """Raises CheckpointError where the adapter is another one than when the run began, by these environments."""
    first, second = (facts.get("start") or {} for facts in (before, now))
    if first.get("sha256") != second.get("sha256"):
        folder = second.get("adapter", first.get("adapter"))
        raise CheckpointError(
            f"the adapter {folder} of {_HERE} changed since {run} was started",
            "Restore it, or choose another name or output.",
        )


def _read(recipe: Recipe) -> tuple[Path, dict[str, Any]]:
    """The folder and its configuration."""
    folder = Path(str(recipe.training.post_hoc.adapter))
    if not folder.is_dir():
        raise ConfigError(f"{_HERE} is {folder}, and there is no such folder", "Give the folder of a LoRA adapter.")
    check_adapter(folder)
    if (folder / POSTERIOR_FILE).is_file():
        raise ConfigError(
            f"the adapter {folder} of {_HERE} has a posterior already ({POSTERIOR_FILE})",
            "Give a plain LoRA; `monteclora calibrate --undo` takes away one that calibrate gave.",
        )
    written: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return folder, written
