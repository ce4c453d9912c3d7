"""A dry run: what a recipe would train, on what, and what it would cost, before anything is trained or written."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from monteclora.data.encoding import RowView, describe_rows
from monteclora.data.kinds import Kind
from monteclora.data.models import ModelSource, empty_model, refuse_encoder, resolve_model
from monteclora.methods import get_method
from monteclora.runs.begin import describe_folder
from monteclora.runs.prepare import PreparedData, prepare_model, tokenizer_of
from monteclora.runs.recipe import Recipe, load_recipe
from monteclora.runs.start import with_start
from monteclora.system.devices import PeakMemory, training_device
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks.kinds import KINDS
from monteclora.training.at_hand import AtHand, config_of, look
from monteclora.training.estimate import Memory, Sizes, operations, required_memory
from monteclora.training.plans import Phase, batches, phases_of, plan_of
from monteclora.training.range_test import MOST_PROBED_ROWS, MOST_STEPS, NOMINAL

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CheckReport", "MeasuredStep", "check"]

_ROWS_SHOWN = 5
_LARGEST_TO_LOAD = 4 * 2**30  # bytes; loading more for a dry run takes longer than it tells
_EVALUATION_SHARE = 0.35  # of a training pass's time: no backward pass


@dataclass(frozen=True)
class MeasuredStep:
    """One forward and backward pass on this machine: rows, seconds, and peak memory in bytes."""

    rows: int
    seconds: float
    memory: int


@dataclass(frozen=True)
class CheckReport:
    """What a recipe amounts to.

    Attributes:
        recipe: with every default written out.
        kind: of its task.
        rows: of each split; empty where they are not on this machine.
        tokens: mean and longest row of the training split; None likewise.
        tokens_estimated: whether they were counted without the model's tokenizer.
        notes: what was set aside, truncated or left out.
        views: the first training rows as the model sees them.
        sizes: counts of the model.
        trained: names of what is trained, layer numbers replaced by ``*``, with how many numbers.
        phases: of the run; empty where the number of rows is not known.
        memory: estimated; of rows as long as the recipe allows where their lengths are not known.
        operations: floating-point operations of the whole run, estimated; None where the rows are not known.
        matmul_speed: what this machine does of them in a second at its best, in large matrix products.
        measured: a step on this machine; None where the weights are not available or too large to load for this.
        folder: whether the run's folder is there, and whose it is, in words.
    """

    recipe: Recipe
    kind: Kind
    rows: Mapping[str, int]
    tokens: tuple[float, int] | None
    tokens_estimated: bool
    notes: tuple[str, ...]
    views: tuple[RowView, ...]
    sizes: Sizes
    trained: Mapping[str, int]
    phases: tuple[Phase, ...]
    memory: Memory
    operations: float | None
    matmul_speed: float
    measured: MeasuredStep | None
    folder: str = ""

    @property
    def predicts_tokens(self) -> bool:
        """Whether some tokens of a row are learned and others are not."""
        return KINDS[self.kind].predicts_tokens

    @property
    def steps(self) -> int:
        """Optimiser steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def range_test_steps(self) -> int:
        """At most, before the first step; 0 where the recipe gives a learning rate."""
        return MOST_STEPS if self.recipe.training.learning_rate == "auto" else 0

    @property
    def seconds(self) -> float | None:
        """Estimated time of the run on this machine, validation and all members of an ensemble included.

        None where no step was measured.
        """
        if self.measured is None:
            return None
        row = self.measured.seconds / self.measured.rows
        spec = self.recipe.training
        trained_rows = (self.steps + self.range_test_steps) * spec.batch_size
        validated = [phase for phase in self.phases if phase.validates]
        per_epoch = max(self.rows["train"] // spec.batch_size, 1)
        evaluations = sum(-(-phase.steps // (spec.eval_every or per_epoch)) for phase in validated)
        probed_rows = MOST_PROBED_ROWS if self.range_test_steps else 0
        evaluated_rows = evaluations * self.rows.get("validation", 0) + probed_rows
        return self.recipe.ensemble * row * (trained_rows + _EVALUATION_SHARE * evaluated_rows)

    @property
    def least_seconds(self) -> float | None:
        """The run at the speed of large matrix products, which nothing exceeds; None where its size is not known."""
        return None if self.operations is None else self.recipe.ensemble * self.operations / self.matmul_speed

    def facts(self) -> dict[str, Any]:
        """Everything, for JSON."""
        facts = asdict(self)
        del facts["views"]
        return {
            **facts,
            "shown_rows": [str(view) for view in self.views],
            "steps": self.steps,
            "range_test_steps": self.range_test_steps,
            "seconds": self.seconds,
            "least_seconds": self.least_seconds,
        }


def check(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Iterable[tuple[str, str]] = ()) -> CheckReport:
    """Go through everything that training does before its first step, and measure or estimate one.

    Large models, and those whose weights are not on this machine, are built without weights from their configuration.
    No network is needed for the models of :mod:`monteclora.data.published`: trained parameters are exact, and the notes
    say what could not be read or was estimated.

    Args:
        recipe: as for :func:`monteclora.train`.
        overrides: likewise.

    Raises:
        ConfigError: the recipe is wrong.
        DataError: the data are.
    """
    recipe = with_start(load_recipe(recipe, overrides))
    with quiet_libraries():
        found = look(recipe)
        process = _process_memory()
        model = _empty_model(recipe, found)
        sizes, trained, lengths = Sizes.of(model), _trained_names(model), found.lengths
        method = get_method(recipe.method.name)
        phases = _phases(recipe, found)
        for phase in phases:  # what training would refuse at its start
            method.begin_phase(model, plan_of(recipe, phase, len(lengths)))
        virtual = method.virtual_tokens(recipe.method)
        micro = batches(recipe.training)[0]
        micro = min(micro, len(lengths)) if lengths else micro
        memory = required_memory(
            recipe,
            sizes,
            micro,
            max(lengths, default=recipe.data.max_length) + virtual,
            predicts_tokens=KINDS[found.kind].predicts_tokens,
            extra=method.extra_memory(model, recipe.method),
        )
        memory = replace(memory, process=process)
        measured = None
        if _can_be_measured(recipe, found, memory):
            del model
            measured = _measure(recipe, cast(PreparedData, found.data), micro)
        mean = sum(lengths) / len(lengths) if lengths else None
        return CheckReport(
            recipe=recipe,
            kind=found.kind,
            rows={split: len(encoded.dataset) for split, encoded in found.encoded.items()},
            tokens=None if mean is None else (mean, max(lengths)),
            tokens_estimated=found.estimated,
            notes=found.notes,
            views=() if found.data is None else _views(found.data),
            sizes=sizes,
            trained=trained,
            phases=phases,
            memory=memory,
            folder=describe_folder(recipe),
            operations=None if mean is None else _operations(recipe, sizes, phases, mean + virtual),
            matmul_speed=_matmul_speed(recipe),
            measured=measured,
        )


def _process_memory() -> int:
    """Bytes that this process has in use, before there is a model; 0 where training is on a device with its own."""
    device = training_device()
    return PeakMemory(device).bytes if device.type == "cpu" else 0


def _phases(recipe: Recipe, found: AtHand) -> tuple[Phase, ...]:
    rate = recipe.training.learning_rate
    return tuple(phases_of(recipe, len(found.lengths), NOMINAL if rate == "auto" else rate)) if found.lengths else ()


def _operations(recipe: Recipe, sizes: Sizes, phases: Sequence[Phase], tokens: float) -> float:
    """Of the run, for rows of so many tokens on average."""
    steps = sum(phase.steps for phase in phases) + (MOST_STEPS if recipe.training.learning_rate == "auto" else 0)
    return operations(recipe, sizes, steps * recipe.training.batch_size * tokens)


def _views(data: PreparedData) -> tuple[RowView, ...]:
    shown = partial(KINDS[data.task.kind].shown, data=data.task)
    return tuple(describe_rows(data.encoded["train"], data.tokenizer, _ROWS_SHOWN, shown))


def _empty_model(recipe: Recipe, found: AtHand) -> nn.Module:
    """The model with its adapter, without weights."""
    source = resolve_model(recipe.model.name)
    if source.gguf_file is not None:
        return prepare_model(recipe, found.kind, found.label_names, tokenizer_of(recipe))
    config = config_of(recipe)
    if found.kind == "causal_lm":
        refuse_encoder(source, config)
    if outputs := KINDS[found.kind].outputs(found.label_names):
        config.num_labels = len(outputs)
    model = empty_model(source, config, KINDS[found.kind].auto_class, recipe.model.trust_remote_code)
    return get_method(recipe.method.name).wrap(model, recipe.method, found.kind, recipe.seed)


def _trained_names(model: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = ["*" if part.isdigit() else part for part in name.split(".")]
            short = ".".join(part for part in parts if part not in ("base_model", "model", "default"))
            found[short] = found.get(short, 0) + parameter.numel()
    return found


def _weights_at_hand(source: ModelSource) -> bool:
    """Whether the weights are on this machine."""
    if source.where != "hub":
        return any(path.suffix in (".safetensors", ".bin", ".gguf") for path in Path(source.path).iterdir())
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(source.path, name), str) for name in files)


def _can_be_measured(recipe: Recipe, found: AtHand, memory: Memory) -> bool:
    """Whether rows and weights are there, and not too large to load for this."""
    ready = found.data is not None and not found.estimated and memory.weights <= _LARGEST_TO_LOAD
    return ready and _weights_at_hand(resolve_model(recipe.model.name))


def _matmul_speed(recipe: Recipe) -> float:
    """Operations a second of this machine in a large matrix product, in the precision of the recipe."""
    device, size = training_device(), 1024
    half = recipe.training.precision != "fp32"
    factor = torch.ones(size, size, device=device, dtype=torch.bfloat16 if half else torch.float32)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        (factor @ factor)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return 2.0 * size**3 / min(seconds)


def _measure(recipe: Recipe, data: PreparedData, rows: int) -> MeasuredStep:
    """The faster of two passes over the first rows, after one that warms up."""
    model = prepare_model(recipe, data.task.kind, data.task.label_names, data.tokenizer)
    device = training_device()
    if recipe.model.quantization == "none":
        model.to(device)
    if recipe.training.gradient_checkpointing:
        cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.training.precision)
    batch = data.collate([dict(row) for row in data.train.select(range(rows))]).to(device)
    memory = PeakMemory(device)
    model.train()
    seconds = []
    for _ in range(3):
        model.zero_grad()
        begin = time.perf_counter()
        with torch.autocast(device.type, precision) if precision else nullcontext():
            loss = data.measures.loss(model, batch, data.measures.count(batch["labels"]))
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return MeasuredStep(rows, min(seconds[1:]), memory.bytes)
