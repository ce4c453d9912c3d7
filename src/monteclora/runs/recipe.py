"""The recipe: everything that makes a run, in one YAML file."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from monteclora.config import Document, Node, brief, build, load_yaml, nearest
from monteclora.config.document import from_python, override, to_python
from monteclora.errors import ConfigError
from monteclora.methods import MethodOptions, get_method
from monteclora.runs.bundled import bundled_recipes, former_names
from monteclora.runs.method_section import method_name, with_current_names, without_foreign_fields
from monteclora.runs.recipe_paths import PATH_KEYS, with_places
from monteclora.tasks import DataSpec

__all__ = [
    "AFFECTS_RESULT",
    "EvaluationSpec",
    "ModelSpec",
    "PostHocSpec",
    "Recipe",
    "TrainingSpec",
    "is_run_name",
    "load_recipe",
    "recipe_content",
]

logger = logging.getLogger(__name__)

AFFECTS_RESULT = "affects_result"  # in the metadata of a field


def _free(default: Any) -> Any:
    """A field that may change between the start of a run and its resumption: the result does not depend on it."""
    return field(default=default, metadata={AFFECTS_RESULT: False})


@dataclass(frozen=True)
class ModelSpec:
    """The ``model`` section.

    Args:
        name: a starter model (``monteclora list models``), a folder, or a model on the hub.
        dtype: of the frozen weights; what is trained is kept in float32 wherever the model allows it.
        quantization: store the frozen weights in 4 or 8 bits (bitsandbytes).
        trust_remote_code: run the program that comes with the model, if it needs one.
    """

    name: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["none", "4bit", "8bit"] = "none"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class PostHocSpec:
    """The second phase of ``mode: post_hoc``, in which the posterior alone is trained (docs/method.md section 6).

    Args:
        epochs: passes over the training rows.
        max_steps: at most this many optimiser steps, whatever ``epochs`` says.
        learning_rate_factor: this phase's peak learning rate, as a multiple of ``training.learning_rate``.
        adapter: the folder of a plain LoRA adapter, of peft, unsloth, axolotl or a run, that takes the place of the
            first phase: its weights stay as they are. LoRA's options are then the adapter's own.
    """

    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate_factor: float = 5.0
    adapter: str | None = None

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, see :mod:`monteclora.config`."""
        found = _at_least(self, {"max_steps": 1})
        return found + _above_zero(self, "epochs", "learning_rate_factor")


@dataclass(frozen=True)
class TrainingSpec:
    """The ``training`` section. Steps are optimiser steps throughout.

    Args:
        mode: ``cooperative`` trains adapter and posterior together; ``post_hoc`` trains a plain LoRA first, then the
            posterior alone.
        epochs: passes over the training rows.
        max_steps: at most this many steps, whatever ``epochs`` says; the schedule then ends there.
        batch_size: rows per step, over all processes.
        group_by_length: batch rows of about the same length, so that less padding is computed.
        micro_batch_size: rows per forward pass; the gradients of ``batch_size / micro_batch_size`` passes are added up.
            null takes all rows of a step at once.
        eval_batch_size: rows per forward pass of evaluation.
        learning_rate: the peak learning rate; ``auto`` finds it by a learning-rate range test before the first step.
        schedule: of the learning rate after warm-up: ``linear`` or ``cosine`` decay to zero, or ``constant``.
        warmup_ratio: the fraction of the steps over which the learning rate rises linearly from zero.
        weight_decay: AdamW's; never applied to biases, norms and the posterior.
        max_grad_norm: gradients are scaled down to this norm; null leaves them as they are.
        back_off: how often, at most, a run that goes wrong goes back to its last good checkpoint, or its start, and on
            at half the learning rate: its loss is not finite, rises well above where it was, or stays that of always
            predicting the frequencies of the classes.
        non_finite: what to do when the loss or gradient of a step is not finite: ``stop`` the run, or ``skip`` the
            step, which leaves weights and optimiser as they are, and count it.
        max_skipped: at most this many consecutive steps are skipped; one more stops the run.
        gradient_checkpointing: keep fewer activations, and recompute them in the backward pass.
        precision: of the matmuls (autocast); float32 weights stay what they are.
        eval_every: steps between evaluations; null evaluates after each epoch. The last step is always evaluated.
        save_every: steps between checkpoints; null saves after each epoch. The last step is always saved.
        logging_every: steps between lines of training metrics.
        keep_checkpoints: how many of the latest checkpoints stay on disk, beside the best one.
        best_metric: end with the checkpoint that is best in this validation metric; null ends with the last one.
        early_stopping_patience: stop after this many consecutive evaluations without a better ``best_metric``.
        temperature: of a classifier: divide its head, when it is trained, by the temperature that suits the validation
            rows best; with ``best_metric: tempered_nll`` weights are chosen that are best so.
        num_workers: processes that collate batches beside the training process.
        post_hoc: the second phase of ``mode: post_hoc``.
    """

    mode: Literal["cooperative", "post_hoc"] = "cooperative"
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 32
    group_by_length: bool = False
    micro_batch_size: int | None = None
    eval_batch_size: int = 64
    learning_rate: float | Literal["auto"] = 5e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.06
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    back_off: int = 0
    # free: where ``stop`` has a result, ``skip`` has the same one
    non_finite: Literal["stop", "skip"] = _free("stop")
    max_skipped: int = _free(5)
    gradient_checkpointing: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    eval_every: int | None = None
    save_every: int | None = _free(None)
    logging_every: int = _free(10)
    keep_checkpoints: int = _free(1)
    best_metric: str | None = None
    early_stopping_patience: int | None = None
    temperature: bool = False
    num_workers: int = _free(0)
    post_hoc: PostHocSpec = field(default_factory=PostHocSpec)

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, see :mod:`monteclora.config`."""
        names = ("max_steps", "batch_size", "micro_batch_size", "eval_batch_size", "eval_every", "save_every")
        ones = (*names, "logging_every", "keep_checkpoints", "early_stopping_patience", "max_skipped")
        found = _at_least(self, {**dict.fromkeys(ones, 1), "num_workers": 0, "weight_decay": 0, "back_off": 0})
        found += _above_zero(self, "epochs", "learning_rate", "max_grad_norm")
        if not 0 <= self.warmup_ratio < 1:
            found.append(("warmup_ratio", f"is {self.warmup_ratio}, expected at least 0 and below 1"))
        micro = self.micro_batch_size
        if micro is not None and micro >= 1 and self.batch_size % micro:
            found.append(("micro_batch_size", f"is {micro}, expected a divisor of batch_size {self.batch_size}"))
        if self.best_metric is not None:
            found += [("best_metric", wrong) for wrong in _wrong_metric(self.best_metric)]
        if self.early_stopping_patience is not None and self.best_metric is None:
            found.append(("early_stopping_patience", "needs training.best_metric to say what must get better"))
        if self.temperature and self.post_hoc.adapter is not None:
            found.append(("temperature", "is true, and training.post_hoc.adapter stays as it is, its head too"))
        return found


def _wrong_metric(name: str) -> Iterator[str]:
    """What is wrong with a metric that is to choose the best checkpoint."""
    from monteclora.metrics.registry import METRICS  # loads numpy, for which a list of keys need not wait

    if name not in METRICS:
        near = nearest(name, METRICS)
        yield f"is {brief(name)}, " + (f"did you mean {near}?" if near else f"expected one of {', '.join(METRICS)}")
    elif METRICS[name].greater_is_better is None:
        yield f"is {name}, of which neither more nor less is better"


@dataclass(frozen=True)
class EvaluationSpec:
    """The ``evaluation`` section: how a trained adapter is tested.

    Args:
        num_samples: posterior draws per prediction.
        bins: of the calibration error and the reliability diagram.
        layers: draw from the posterior in so many of the last adapted blocks alone, which costs less; null draws in
            all. A scale that was calibrated with some number is used with that number.
    """

    num_samples: int = _free(16)
    bins: int = _free(15)
    layers: int | None = _free(None)

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the values, see :mod:`monteclora.config`."""
        return _at_least(self, {"num_samples": 1, "bins": 1, "layers": 1})


@dataclass(frozen=True)
class Recipe:
    """One run.

    Args:
        name: of the run; by default the recipe file's name.
        model: the pretrained model.
        data: what it learns.
        method: how; each method has its own fields (``monteclora list methods``).
        training: for how long and how fast.
        evaluation: how it is tested.
        seed: of the head, the adapter, dropout, data order and the posterior's noise. Runs that differ in ``method``
            alone share all of them but the last.
        ensemble: how many runs, with the seeds ``seed``, ``seed + 1`` and so on, are trained as the members of one.
        output: the run folder; null is ``runs/<name>``.
        report_to: also log to these trackers, by the names that transformers has for them.
    """

    name: str = field(metadata={AFFECTS_RESULT: False})
    model: ModelSpec
    data: DataSpec
    method: MethodOptions
    training: TrainingSpec = field(default_factory=TrainingSpec)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    seed: int = 0
    ensemble: int = 1
    output: str | None = _free(None)
    report_to: list[str] = field(default_factory=list, metadata={AFFECTS_RESULT: False})

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output or f"runs/{self.name}").expanduser()

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong across sections, see :mod:`monteclora.config`."""
        found = []
        if not is_run_name(self.name):
            found.append(("name", f"is {brief(self.name)}, expected a plain file name"))
        if "\0" in (self.output or ""):
            found.append(("output", "holds a NUL, expected a path"))
        if self.ensemble < 1:
            found.append(("ensemble", f"is {self.ensemble}, expected at least 1"))
        if not 0 <= self.seed <= 2**32 - max(self.ensemble, 1):
            last = " with those of the members" if self.ensemble > 1 else ""
            found.append(("seed", f"is {self.seed}, expected at least 0 and below 2**32{last}"))
        if self.training.mode == "post_hoc" and not get_method(self.method.name).has_posterior:
            found.append(("training.mode", f"is post_hoc, and the method {self.method.name} has no posterior"))
        if self.training.post_hoc.adapter is not None:
            if self.training.mode != "post_hoc":
                found.append(("training.post_hoc.adapter", f"is given, and training.mode is {self.training.mode}"))
            if self.training.learning_rate == "auto":
                found.append(("training.learning_rate", "is auto, which is for the adapter that is there already"))
        return found


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe,
    overrides: Iterable[tuple[str, str]] = (),
    *,
    places: Sequence[Path] | None = None,
) -> Recipe:
    """Read a recipe and check it.

    Relative paths in a file lead from its folder, or else from the working directory; those of overrides and mappings
    from the working directory alone.

    Args:
        source: the path of a YAML file, the name of a bundled recipe, a mapping with the same content, or a recipe.
        overrides: pairs of dotted key and YAML text, as in ``("training.learning_rate", "1e-4")``.
        places: of a file: where its relative paths lead from, in place of its folder and the working directory; none to
            leave them as they are written.

    Raises:
        ConfigError: no such file or name, or with every problem of the recipe at once.
    """
    overrides = [(key, _expanded(key, text)) for key, text in overrides]
    if isinstance(source, Recipe):
        if not overrides:
            return source
        source = dataclasses.asdict(source)
    if isinstance(source, Mapping):
        document = _with_places(Document(from_python(source, "recipe"), "recipe"), [Path()])
    else:
        path, implied = _find(source)
        document = _with_places(
            _named(load_yaml(path), Path(source).stem), _places_of(path) if places is None else places
        )
        overrides = [*implied, *overrides]
    name = method_name(document, overrides)
    options = get_method(name).options
    document = without_foreign_fields(document, name)
    document, overrides = with_current_names(document, overrides, options.renamed)
    found = build(_schema_for(options), document, overrides)
    values = {f.name: getattr(found, f.name) for f in dataclasses.fields(Recipe)}
    return Recipe(**values)


def recipe_content(source: str | Path) -> dict[str, Any]:
    """What the file of a recipe, or a bundled one, says: a mapping that :func:`load_recipe` takes in its place.

    Raises:
        ConfigError: no such file or name, or it is not YAML.
    """
    path, implied = _find(source)
    root = _with_places(_named(load_yaml(path), Path(source).stem), _places_of(path)).root
    for key, text in implied:
        root = override(root, key.split("."), text, [])
    content: dict[str, Any] = to_python(root)
    return content


def is_run_name(name: str) -> bool:
    """Whether a run can have this name: it is a plain file name."""
    plain = Path(name).name == name and name not in ("", "..") and "\\" not in name
    return plain and bool(name.strip()) and not re.search("[\x00-\x1f\x7f]", name) and len(name.encode()) <= 200


def _find(source: str | Path) -> tuple[Path, list[tuple[str, str]]]:
    """The file of a recipe, and what an earlier name of a bundled one says beside it."""
    source = os.path.expanduser(source)
    bundled, name = bundled_recipes(), str(source)
    if os.path.isfile(source):  # Path.is_file raises for names that are too long
        return Path(source), []
    if name in bundled:
        return bundled[name], []
    if name in (former := former_names()):
        current, method = former[name]
        logger.warning("%s is read as %s --method.name %s, its present name", name, current, method)
        return bundled[current], [("method.name", method)]
    if not Path(source).suffix and Path(source).name == name:
        near = nearest(name, bundled)
        hint = f"Did you mean {near}?" if near else "Give a YAML file, or see `monteclora recipes`."
        raise ConfigError(f"there is no bundled recipe {name!r}", hint)
    return Path(source), []


def _places_of(file: Path) -> list[Path]:
    return [file.parent, Path()]


def _with_places(document: Document, places: Sequence[Path]) -> Document:
    return dataclasses.replace(document, root=with_places(document.root, places))


def _expanded(key: str, text: str) -> str:
    """The value of an override; of a path in the user's home the whole path."""
    return os.path.expanduser(text) if key in PATH_KEYS and text.startswith("~/") else text


def _named(document: Document, name: str) -> Document:
    if "name" in document.root.value:
        return document
    root = Node({"name": Node(name, document.source), **document.root.value}, document.root.where)
    return dataclasses.replace(document, root=root)


def _schema_for(options: type[MethodOptions]) -> type[Recipe]:
    return dataclasses.make_dataclass("Recipe", [("method", options)], bases=(Recipe,), frozen=True)


def _at_least(section: Any, bounds: Mapping[str, float]) -> list[tuple[str, str]]:
    values = {name: getattr(section, name) for name in bounds}
    return [
        (name, f"is {value}, expected at least {bounds[name]}")
        for name, value in values.items()
        if value is not None and value < bounds[name]
    ]


def _above_zero(section: Any, *names: str) -> list[tuple[str, str]]:
    values = {name: getattr(section, name) for name in names}
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    return [(name, f"is {value}, expected above 0") for name, value in numbers.items() if value <= 0]
