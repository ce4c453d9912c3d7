"""A recipe for somebody's own file: what was found in it, and settings that learn from so many rows."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from monteclora.data.columns import find_columns
from monteclora.data.encoding import encode
from monteclora.data.guessing import guess_columns
from monteclora.data.kinds import Kind
from monteclora.data.models import STARTERS, load_tokenizer, resolve_model
from monteclora.data.parts import open_files
from monteclora.errors import ConfigError, DataError
from monteclora.methods import get_method
from monteclora.runs.recipe import load_recipe
from monteclora.tasks import DataSpec, TaskData, load
from monteclora.tasks.local import looks_like_file

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["NewRecipe", "new_recipe"]

_STARTER = {"classification": "minilm", "causal_lm": "smollm2"}
_BY_HAND: Mapping[Kind, str] = {"regression": "scores", "multi_label": "several labels of a row"}
_OTHERWISE = "for scores or several labels of a row, write a recipe by hand, with data.kind (monteclora recipes keys)"
_LENGTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
_MEASURED_ROWS = 1000  # whose lengths choose data.max_length
_COVERED = 0.98  # of the rows are not truncated
_EPOCHS = (3, 30)
_FEW_VALIDATION, _MORE_VALIDATION = 60, 0.2  # below so many rows, this share is set aside instead


@dataclass(frozen=True)
class _Settings:
    """What a kind of model learns well with: starting points, of which the learning rate matters most."""

    learning_rate: float
    batch_size: int
    modules_to_save: tuple[str, ...] = ()
    why: str = ""


# minilm's pooler was never trained as a classifier's, and has to be learned whole; batches of 8 rows did better than of
# 16 in as many steps (docs/robustness.md)
_SETTINGS = {
    "minilm": _Settings(0.0015, 8, ("pooler",), "MiniLM's pooler is untrained: it is learned whole"),
    "smollm2": _Settings(0.001, 8),
    "classification": _Settings(0.0005, 16),
    "causal_lm": _Settings(0.0002, 8),
}


@dataclass(frozen=True)
class _Schedule:
    """For how long, and by what the weights are chosen.

    Attributes:
        steps: of the optimiser, within the bounds of the epochs.
        evaluations: at least; with three, on 3,000 rows, the weights that are kept are already overfitted.
        patience: of early stopping, in evaluations.
        chosen_by: lines of the ``training`` section.
    """

    steps: int
    evaluations: int
    patience: int
    chosen_by: tuple[str, ...]


# a classifier gets better long after its NLL has turned, for it is too sure of itself by then (docs/judging.md)
_SCHEDULES = {
    "classification": _Schedule(
        640,
        24,
        8,
        (
            "  best_metric: tempered_nll  # keep the weights that are best once their confidence is put right",
            "  temperature: true  # and put it right",
        ),
    ),
    "causal_lm": _Schedule(
        320, 12, 5, ("  best_metric: nll  # keep the weights of the evaluation with the best validation likelihood",)
    ),
}


@dataclass(frozen=True)
class NewRecipe:
    """A recipe as text.

    Attributes:
        text: YAML with comments.
        notes: what was found in the file.
    """

    text: str
    notes: tuple[str, ...]


def new_recipe(
    file: str | Path,
    *,
    text: Sequence[str] = (),
    label: str | None = None,
    model: str | None = None,
    method: str = "monteclora",
    folder: str | Path = ".",
) -> NewRecipe:
    """A recipe that trains on a file: its columns, labels and lengths are looked at, and nothing is trained.

    Args:
        file: anything that ``data.task`` takes as a path, of several files a pattern.
        text, label: columns of texts to be classified and of their labels. Without them they are recognised by their
            names, and where these say nothing, by what the columns hold, which a note says.
        model: by default the starter model for what the file holds.
        method: by name.
        folder: that the recipe will be in; the file's path leads from there.

    Raises:
        DataError: the file, its columns, rows or labels are wrong.
        ConfigError: there is no such folder, model or method, or the rows have scores or several labels each.
    """
    file, folder = os.path.expanduser(str(file)), Path(folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}", "Make it, or give another one for the recipe.")
    columns, guess = _named_columns(file, text, label)
    spec = DataSpec(task=file, **columns)
    data = _loaded(spec)
    if data.kind in _BY_HAND:
        raise ConfigError(f"{file} holds {_BY_HAND[data.kind]}, for which no recipe is made", _sentence(_OTHERWISE))
    if looks_like_file(file) and len(data.splits.get("validation", ())) < _FEW_VALIDATION:  # it was set aside
        spec = dataclasses.replace(spec, validation_fraction=_MORE_VALIDATION)
        data = load(spec)
    rows = data.split("train")
    if model is None:
        model = _STARTER[data.kind]
    length = _length(rows, data, model)
    settings = _SETTINGS[model] if model in STARTERS else _SETTINGS[data.kind]
    schedule = _SCHEDULES[data.kind]
    epochs = min(max(math.ceil(schedule.steps * settings.batch_size / len(rows)), _EPOCHS[0]), _EPOCHS[1])
    written = dataclasses.replace(spec, task=_from(folder, file))
    content = _text(written, data, model, method, length, epochs, settings, schedule)
    load_recipe({"name": "new", **yaml.safe_load(content)})  # a wrong method or name is told before anything is written
    return NewRecipe(content, (*guess, *data.notes, *data.leaks))


def _from(folder: Path, file: str) -> str:
    """The path of a file as it leads from a folder; an absolute one, and what is no file, as it is."""
    if os.path.isabs(file) or not looks_like_file(file) or os.path.samefile(folder, "."):
        return file
    return os.path.relpath(file, folder)


def _named_columns(file: str, text: Sequence[str], label: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The columns to name in the recipe, and what was guessed."""
    if not looks_like_file(file):
        return {}, ()
    table = open_files(file)
    try:
        find_columns(table, text, label)
    except DataError as error:
        guess = guess_columns(table)
        if guess is None or text or label:  # there is no recipe yet whose keys could be set
            hint = f"Name the columns of texts and labels with --text and --label; {_OTHERWISE}."
            raise DataError(error.message, hint) from None
        found = {"text_columns": [guess.text], "label_column": guess.label}
        return found, (f"guessed from what they hold: {guess.text} is the text, {guess.label} the label",)
    given = {"text_columns": list(text), "label_column": label}
    return {key: value for key, value in given.items() if value}, ()


def _loaded(spec: DataSpec) -> TaskData:
    """The rows; where only ``data.kind`` would mend what is wrong with them, the hint is to write a recipe by hand."""
    try:
        return load(spec)
    except DataError as error:
        if "data.kind" not in str(error):
            raise
        raise DataError(error.message, f"Name another column with --label; {_OTHERWISE}.") from None


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _length(rows: Dataset, data: TaskData, model: str) -> int:
    """The shortest usual length that holds most rows whole, and that the model reads."""
    tokenizer = load_tokenizer(resolve_model(model), trust_remote_code=False)
    most = min(tokenizer.model_max_length, _LENGTHS[-1])
    encoded = encode(rows.select(range(min(len(rows), _MEASURED_ROWS))), data.kind, tokenizer, most).dataset
    wanted = np.quantile([len(ids) for ids in encoded["input_ids"]], _COVERED)
    return min(next((length for length in _LENGTHS if length >= wanted), most), most)


def _text(
    spec: DataSpec,
    data: TaskData,
    model: str,
    method: str,
    length: int,
    epochs: int,
    settings: _Settings,
    schedule: _Schedule,
) -> str:
    larger = spec.validation_fraction == _MORE_VALIDATION
    steps = math.ceil(epochs * len(data.split("train")) / settings.batch_size)
    about = ", ".join(f"{len(rows):,} {split}" for split, rows in data.splits.items())
    lines = [
        f"# {Path(str(spec.task)).name}: {data.kind.replace('_', ' ')}, {about} rows",
        "# Made by `monteclora new`, to be changed.",
        "# Every key: `monteclora recipes keys`. A dry run with rows, memory and time: `monteclora check`.",
        "",
        "model:",
        f"  name: {_yaml(model)}",
        "data:",
        f"  task: {_yaml(spec.task)}",
        *_columns(data),
        *([f"  validation_fraction: {spec.validation_fraction}  # few rows: more to judge by"] if larger else []),
        f"  max_length: {length}  # tokens; {_COVERED:.0%} of the rows are not longer",
        *_method(method, data.kind, settings),
        "training:",
        *_rate(method, data.kind, settings),
        f"  batch_size: {settings.batch_size}",
        f"  epochs: {epochs}  # about {steps} steps",
        "  group_by_length: true",
    ]
    if "validation" in data.splits:
        lines += schedule.chosen_by
        if epochs < schedule.evaluations:
            every = math.ceil(steps / schedule.evaluations)
            lines.append(f"  eval_every: {every}  # steps; the best are often within an epoch")
        often = "" if epochs < schedule.evaluations else ", of which each epoch has one"
        lines.append(f"  early_stopping_patience: {schedule.patience}  # evaluations{often}")
    if data.kind == "classification" and get_method(method).has_posterior:
        # as good as draws in all blocks, and texts out of scope stand out more (docs/calibration.md)
        lines += ["evaluation:", "  layers: 1  # draws in the last block alone, which costs a fraction"]
    return "\n".join(lines) + "\n"


def _method(name: str, kind: Kind, settings: _Settings) -> list[str]:
    """The section of a method, with what it has of LoRA's options."""
    lines = ["method:", f"  name: {_yaml(name)}"]
    if kind == "classification" and _like_lora(name):
        # queries and values alone, peft's choice for encoders, are clearly worse (docs/robustness.md)
        lines.append("  target_modules: all-linear  # every linear layer but the head")
    if settings.modules_to_save and "modules_to_save" in _options(name):
        lines.append(f"  modules_to_save: [{', '.join(settings.modules_to_save)}]  # {settings.why}")
    return lines


def _options(method: str) -> set[str]:
    return {field.name for field in dataclasses.fields(get_method(method).options)}


def _like_lora(method: str) -> bool:
    return "lora_alpha" in _options(method)


def _rate(method: str, kind: Kind, settings: _Settings) -> list[str]:
    """A fixed one is LoRA's. A range test did better for classifiers (docs/robustness.md), and finds any method's."""
    if kind != "classification" and _like_lora(method):
        return [f"  learning_rate: {settings.learning_rate}"]
    start = f"; else {settings.learning_rate} is a start" if _like_lora(method) else ""
    return [
        f"  learning_rate: auto  # found by a range test of some 50 steps{start}",
        "  back_off: 2  # times, where the rate turns out to be too high",
    ]


def _columns(data: TaskData) -> list[str]:
    """The columns and labels that were found, written out so that they can be corrected."""
    columns = data.columns
    if columns is None:
        return []
    found: dict[str, Any] = {}
    if data.kind == "classification":
        found = {"text_columns": list(columns.text), "label_column": columns.target}
    elif columns.conversation and len(columns.text) == 1:
        found = {"messages_column": columns.text[0]}
    elif not columns.conversation and len(columns.text) <= 1:
        found = {"prompt_column": columns.text[0] if columns.text else None, "completion_column": columns.target}
    lines = [f"  {key}: {_yaml(value)}" for key, value in found.items() if value]
    if not lines:
        lines = [f"  # columns: {', '.join((*columns.text, *([columns.target] if columns.target else [])))}"]
    if data.label_names:
        lines.append(f"  # labels: {', '.join(data.label_names[:20])}{', ...' if len(data.label_names) > 20 else ''}")
    return lines


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()
