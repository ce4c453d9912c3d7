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
from monteclora.config import brief
from monteclora.data.kinds import Kind
from monteclora.errors import CheckpointError, ConfigError
from monteclora.methods.lora import LoRAFields
from monteclora.runs.recipe import Recipe
from monteclora.tasks.kinds import KINDS

__all__ = ["check_start", "check_unchanged", "start_facts", "with_start"]

_HERE = "training.post_hoc.adapter"
_HEADS = frozenset(("classifier", "score"))  # peft adds both to what a classifier's adapter saves, whatever its head is


def with_start(recipe: Recipe) -> Recipe:
    """The recipe with the options of the adapter that it starts from; one that starts from none as it is.

    Raises:
        CheckpointError: a file of the adapter is missing or damaged, or it has a posterior already.
        ConfigError: an option of the recipe is another one than the adapter's.
        UnsafeCodeError: its weights are a pickle.
    """
    if recipe.training.post_hoc.adapter is None:
        return recipe
    folder, written = _read(recipe)
    options: Any = recipe.method
    found = {}
    for field in dataclasses.fields(LoRAFields):
        if field.name == "name":
            continue
        given, own = getattr(options, field.name), _as_option(field, written.get(field.name))
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if given not in (default, own):
            raise ConfigError(
                f"method.{field.name} is {brief(given)}, and the adapter {folder} of {_HERE} has {brief(own)}",
                "Leave it out: the adapter's own counts.",
            )
        found[field.name] = own
    return dataclasses.replace(recipe, method=dataclasses.replace(options, **found))


def check_start(recipe: Recipe, kind: Kind, label_names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Check that the adapter is one for this kind of task; gives what is taken for granted, in words.

    Raises:
        ConfigError: it is for another kind.
    """
    if recipe.training.post_hoc.adapter is None:
        return ()
    folder, written = _read(recipe)
    expected, found = KINDS[kind].peft_task, written.get("task_type")
    if found not in (None, expected):
        raise ConfigError(
            f"the rows are for {expected}, and the adapter {folder} of {_HERE} is one for {found}",
            "Give rows of the adapter's task.",
        )
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


def _as_option(field: dataclasses.Field[Any], value: Any) -> Any:
    """What ``adapter_config.json`` says, as the recipe's field has it."""
    if value is None:
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        return None if field.name == "target_modules" else default
    if field.name == "lora_alpha":
        return max(int(value), 1)
    if field.name == "modules_to_save":
        return sorted({*value} - _HEADS)
    if isinstance(value, list):
        return sorted(map(str, value))
    return [value] if field.name == "exclude_modules" else value
