"""From a recipe to what training needs: data as token ids, and the model with its adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from monteclora.adapters.quantised import keep_differentiable
from monteclora.data.chat import use_template
from monteclora.data.encoding import Encoded, collator, encode
from monteclora.data.kinds import Kind
from monteclora.data.models import load_model, load_tokenizer, resolve_model
from monteclora.data.token_cache import encode_once
from monteclora.errors import ConfigError
from monteclora.methods import get_method
from monteclora.methods.lora import seed_everything
from monteclora.runs.kept_model import kept_or_loaded
from monteclora.runs.recipe import Recipe
from monteclora.tasks import TaskData, load
from monteclora.tasks.kinds import KINDS
from monteclora.tasks.measures import ClassMeasures, Measures, check_metric

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PreparedData", "base_model", "prepare_data", "prepare_model", "tokenizer_of"]


@dataclass(frozen=True)
class PreparedData:
    """The data of a run.

    Attributes:
        task: as loaded.
        tokenizer: of the model.
        encoded: token ids of the train split and, where there is one, of the validation split.
        collate: makes a batch of rows.
        measures: what validation measures.
        notes: what was set aside, truncated or left out, in words.
    """

    task: TaskData
    tokenizer: PreTrainedTokenizerBase
    encoded: dict[str, Encoded]
    collate: Callable[[list[dict[str, Any]]], Any]
    measures: Measures
    notes: tuple[str, ...]

    @property
    def train(self) -> Dataset:
        """Rows to train on."""
        return self.encoded["train"].dataset

    @property
    def validation(self) -> Dataset | None:
        """Rows to validate on; None where there are none."""
        return self.encoded["validation"].dataset if "validation" in self.encoded else None


def _check_choice(recipe: Recipe, task: TaskData) -> None:
    """Raise ConfigError where what is chosen or fitted by validation rows does not go with the rows."""
    spec = recipe.training
    if spec.temperature and task.kind != "classification":
        raise ConfigError(
            f"training.temperature is true, and {task.name} is of the kind {task.kind}: it is for a classifier's head",
            "Leave it out.",
        )
    asked = {"best_metric": spec.best_metric, "temperature": "true" if spec.temperature else None}
    for name, value in asked.items():
        if value is not None and "validation" not in task.splits:
            raise ConfigError(
                f"training.{name} is {value}, and there are no validation rows",
                "Give data.validation_file or a data.validation_fraction above 0.",
            )


def prepare_data(recipe: Recipe, stand_in: Callable[[TaskData], PreTrainedTokenizerBase] | None = None) -> PreparedData:
    """Load and tokenise the rows of a recipe.

    Args:
        recipe: names model and data.
        stand_in: makes a tokenizer for these rows, to be taken in place of the model's.

    Raises:
        NotAtHandError: rows or tokenizer are on the hub, which cannot be reached.
        DataError: files, columns, rows or labels are wrong.
        ConfigError: the model or task is unknown, or an option does not fit the task.
    """
    task = load(recipe.data, splits=("train", "validation"))
    resolve_model(recipe.model.name)  # a wrong name is reported before rows are tokenised
    kind = KINDS[task.kind]
    task.split("train")
    measures = kind.measures(task, recipe.data.class_weights)
    check_metric(measures, recipe.training.best_metric)
    if isinstance(measures, ClassMeasures):
        measures = replace(measures, chosen_by=recipe.training.best_metric)
    _check_choice(recipe, task)
    tokenizer = tokenizer_of(recipe, None if stand_in is None else stand_in(task))
    length, truncation = recipe.data.max_length, recipe.data.truncation
    encoding = encode_once if stand_in is None else encode  # what a stand-in makes is not worth keeping
    encoded = {
        split: encoding(kind.to_learn(rows, task), task.kind, tokenizer, length, truncation)
        for split, rows in task.splits.items()
    }
    return PreparedData(
        task=task,
        tokenizer=tokenizer,
        encoded=encoded,
        collate=collator(task.kind, tokenizer),
        measures=measures,
        notes=(*task.notes, *_cuts(encoded, recipe.data.max_length)),
    )


def tokenizer_of(recipe: Recipe, stand_in: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or one in its place, with the recipe's chat template where it names one.

    Raises:
        ConfigError: it cannot be loaded, or there is no such template.
    """
    tokenizer = stand_in or load_tokenizer(resolve_model(recipe.model.name), recipe.model.trust_remote_code)
    if recipe.data.chat_template is not None:
        use_template(tokenizer, recipe.data.chat_template)
    _leave_room(recipe, tokenizer)
    return tokenizer


def _leave_room(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Take the positions that the method uses from those of the model. Raises ConfigError where none are left."""
    taken, most = get_method(recipe.method.name).virtual_tokens(recipe.method), tokenizer.model_max_length
    if taken and recipe.data.max_length + taken > most:
        raise ConfigError(
            f"data.max_length is {recipe.data.max_length}, and the method {recipe.method.name} takes {taken} of the "
            f"{most} positions that {recipe.model.name} has",
            f"Set data.max_length to {most - taken} or less." if taken < most else "Set fewer virtual tokens.",
        )
    tokenizer.model_max_length = most - taken


def _cuts(encoded: dict[str, Encoded], max_length: int) -> list[str]:
    notes = []
    for split, found in encoded.items():
        rows = len(found.dataset) + found.dropped
        if found.shortened:
            notes.append(f"{split}: {found.shortened} of {rows} rows were truncated to {max_length} tokens")
        if found.prompts_cut:
            notes.append(f"{split}: {found.prompts_cut} of these lost part of the prompt")
        if found.completions_cut:
            notes.append(f"{split}: {found.completions_cut} of these lost part of what is to be learned")
        if found.dropped:
            notes.append(f"{split}: {found.dropped} of {rows} rows were left out, nothing of them is left to learn")
    return notes


def base_model(
    recipe: Recipe, kind: Kind, label_names: Sequence[str] | None, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The pretrained model, with the head that the task needs, drawn from the recipe's seed.

    Args:
        recipe: names the model.
        kind: of the task.
        label_names: in the order of the classes; None where there are none.
        tokenizer: the model's.
    """
    source = resolve_model(recipe.model.name)
    outputs = KINDS[kind].outputs(label_names)

    def loaded() -> PreTrainedModel:
        seed_everything(recipe.seed)
        return load_model(
            source,
            kind,
            dtype=recipe.model.dtype,
            id2label=dict(enumerate(outputs)) if outputs else None,
            trust_remote_code=recipe.model.trust_remote_code,
            quantization=None if recipe.model.quantization == "none" else recipe.model.quantization,
            pad_token_id=tokenizer.pad_token_id,
        )

    if recipe.model.quantization != "none":
        return loaded()  # it cannot be copied
    return kept_or_loaded((source, recipe.model, kind, outputs, tokenizer.pad_token_id, recipe.seed), loaded)


def prepare_model(
    recipe: Recipe, kind: Kind, label_names: Sequence[str] | None, tokenizer: PreTrainedTokenizerBase
) -> nn.Module:
    """The pretrained model with the method's adapter, what is trained in float32. Arguments as :func:`base_model`.

    Raises:
        ConfigError: the model cannot be loaded or adapted, or would be trained in half precision.
    """
    method = get_method(recipe.method.name)
    base, start = base_model(recipe, kind, label_names, tokenizer), recipe.training.post_hoc.adapter
    if start is None:
        model = method.wrap(base, recipe.method, kind, recipe.seed)
    else:
        model = method.start_from(base, Path(start), recipe.method, recipe.seed)
    keep_differentiable(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            if recipe.training.precision == "fp32":
                # without autocast a float32 head cannot take the activations of a half-precision model
                raise ConfigError(
                    f"model.dtype {recipe.model.dtype} would have {name} trained in half precision",
                    "Set training.precision to bf16, or model.dtype to float32.",
                )
            parameter.data = parameter.data.float()
    return model
