"""A run folder back to a model that predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, cast

import torch

from monteclora.adapters.active import active_posteriors
from monteclora.adapters.checks import adapter_errors, check_adapter, check_head
from monteclora.adapters.model import MonteCLoRAModel
from monteclora.adapters.storage import POSTERIOR_FILE, WEIGHTS_FILE
from monteclora.adapters.wrapping import from_pretrained
from monteclora.config.checks import check_at_least_one
from monteclora.data.columns import Columns
from monteclora.data.encoding import collator
from monteclora.data.kinds import Kind
from monteclora.data.scores import ScoreScale
from monteclora.errors import CheckpointError, ConfigError
from monteclora.methods import get_method
from monteclora.prediction.calibrator import Calibrator
from monteclora.prediction.ensemble import ENSEMBLE, Members
from monteclora.prediction.forward import Collate
from monteclora.prediction.registry import SamplerKind, get_sampler
from monteclora.prediction.sampler import MEAN, Checked, Sampler
from monteclora.runs.calibration import joint_sha256
from monteclora.runs.data_facts import data_facts
from monteclora.runs.manifest import newest_complete
from monteclora.runs.prepare import base_model, prepare_model, tokenizer_of
from monteclora.runs.recipe import Recipe
from monteclora.runs.run_folder import RunFolder
from monteclora.system.devices import training_device
from monteclora.system.progress import Progress
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks.base import Predictor
from monteclora.tasks.kinds import KINDS

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LoadedRun", "check_finished", "combined", "load_run", "with_adapter"]

_RESTORE = "Take the folder from a backup, or remove it and run `monteclora train` again."


@dataclass(frozen=True)
class LoadedRun:
    """A trained run, ready to predict.

    Attributes:
        folder: of the run.
        recipe: as it was trained.
        kind: of its task.
        label_names: in the order of the classes; None for a causal LM.
        columns: of the training data, where it was no task with a name; earlier versions did not write them down.
        model: with the adapter at its posterior's mean (or without, for the base model), in evaluation mode.
        tokenizer: the model's.
        unfinished: how far an unfinished run came; None for a finished one.
        is_base: whether this is the pretrained model alone.
        trained: names of the model's parameters that training changed; empty for the base model.
        scale: on which scores were learned; None for other kinds.
        members: the folders of the runs that an ensemble combines, of which ``folder`` is the first, or whose
            ``ensemble`` they are; see :mod:`monteclora.runs.ensemble`. Empty for a single run.
    """

    folder: Path
    recipe: Recipe
    kind: Kind
    label_names: tuple[str, ...] | None
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    unfinished: str | None = None
    is_base: bool = False
    columns: Columns | None = None
    members: tuple[Path, ...] = ()
    trained: tuple[str, ...] = ()
    scale: ScoreScale | None = None

    def __repr__(self) -> str:
        return f"LoadedRun({self.folder}, {type(self.model).__name__})"

    @property
    def has_posterior(self) -> bool:
        """Whether predictions can be drawn."""
        if self.is_base:
            return False
        return get_method(self.recipe.method.name).has_posterior or isinstance(self.model, MonteCLoRAModel)

    @property
    def first(self) -> Path:
        """The folder of the run, of an ensemble the first member's."""
        return self.members[0] if self.members else self.folder

    def weights_sha256(self, *, posterior: bool = True) -> str:
        """The checksum of the weights, see :func:`monteclora.runs.calibration.weights_sha256`; of all members.

        Whichever of them comes first.
        """
        parts = self.members or (self.folder,)
        return joint_sha256((RunFolder(part).adapter for part in parts), posterior=posterior)

    def check_single(self, what: str) -> None:
        """Raises ConfigError for an ensemble; ``what`` cannot be done with one, in words."""
        if self.members:
            raise ConfigError(
                f"{self.folder} is an ensemble of {len(self.members)} runs, and {what} takes one",
                f"Give one of its members, such as {self.first}.",
            )

    @property
    def collate(self) -> Collate:
        """Makes a batch of encoded rows."""
        return collator(self.kind, self.tokenizer)

    def sampler(
        self, name: str | None = None, num_samples: int | None = None, seed: int = 0, layers: int | None = None
    ) -> Sampler | None:
        """How predictions are drawn; None for the mean alone.

        Args:
            name: of the sampler, see :mod:`monteclora.prediction.registry`; None is ``ensemble`` for a run that is
                one, ``posterior`` for a method that has one, else ``mean``.
            num_samples: draws; by default the recipe's number. 0 asks for the mean alone.
            seed: the stream of draws.
            layers: the last adapted blocks that are drawn; by default those that the posterior's scale was calibrated
                with, else the recipe's number.

        Raises:
            ConfigError: there is no such sampler, or the model has nothing that it draws; a negative number; draws of
                the mean; ``layers`` of a sampler that has none, or more than there are.
        """
        chosen = self.sampler_kind(name, num_samples)
        if chosen.name == MEAN.name or num_samples == 0 or not chosen.takes_layers:
            self._check_no_layers(layers, "mean" if num_samples == 0 else chosen.name)
        if chosen.name == MEAN.name or num_samples == 0:
            return None
        count = num_samples or len(self.members) or self.recipe.evaluation.num_samples
        sampler: Any = chosen.build(count, seed)
        if chosen.takes_layers:
            sampler = replace(sampler, layers=self.drawn_layers if layers is None else layers)
        if isinstance(sampler, Checked):
            sampler.check(self.model)
        return cast(Sampler, sampler)

    @property
    def drawn_layers(self) -> int | None:
        """The last adapted blocks that a posterior is drawn in: as its scale was calibrated, else the recipe's number;
        None is all."""
        calibration = active_posteriors(self.model)[0].calibration or {}
        found: int | None = calibration.get("layers", self.recipe.evaluation.layers)
        return found

    @staticmethod
    def _check_no_layers(layers: int | None, sampler: str) -> None:
        if layers is not None:
            raise ConfigError(f"layers is {layers}, and the sampler {sampler} draws none of them", "Leave it out.")

    def sampler_kind(self, name: str | None, num_samples: int | None) -> SamplerKind:
        """Which sampler :meth:`sampler` makes of these arguments. Raises ConfigError where they do not fit the run."""
        if num_samples is not None and num_samples < 0:
            raise ConfigError(f"num_samples is {num_samples}, expected 0 or more", "Use 0 for the mean alone.")
        if name is None and self.members and self.recipe.ensemble > 1:
            name = ENSEMBLE
        what = "the pretrained model" if self.is_base else f"the method {self.recipe.method.name}"
        if self.members and (name, num_samples) not in ((ENSEMBLE, None), (ENSEMBLE, len(self.members))):
            count = len(self.members)
            if name == ENSEMBLE:
                wrong = f"num_samples is {num_samples}, and an ensemble of {count} draws each run once"
                raise ConfigError(wrong, "Leave it out.")
            given = "no sampler was named" if name is None else f"the sampler {name} is for one"
            raise ConfigError(f"{count} runs predict together, and {given}", f"Ask for the sampler {ENSEMBLE}.")
        chosen = get_sampler(name or ("posterior" if self.has_posterior else MEAN.name))
        if num_samples and chosen.name == MEAN.name:
            if name is None:
                raise ConfigError(f"num_samples is {num_samples}, and {what} has no posterior", "Leave it out.")
            raise ConfigError(f"num_samples is {num_samples}, and the sampler mean draws nothing", "Leave it out.")
        if num_samples == 0 and name not in (None, MEAN.name):
            raise ConfigError(f"num_samples is 0, and the sampler {name} draws", "Ask for one draw or more.")
        if chosen.needs_posterior and not self.has_posterior and num_samples != 0:
            raise ConfigError(f"{what} has no posterior for the sampler {chosen.name}", "Choose another sampler.")
        return chosen

    def predictor(
        self,
        sampler: Sampler | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
        calibrators: Mapping[str, Calibrator] | None = None,
        looks: bool = False,
    ) -> Predictor:
        """What a task needs to predict with this run.

        Args:
            sampler: of draws, None for the mean alone; see :meth:`sampler`.
            batch_size: sequences per forward pass; by default the recipe's ``training.eval_batch_size``.
            progress: called with the number of rows done, by each sampler.
            calibrators: by the name of the sampler whose predictions they correct.
            looks: see :class:`~monteclora.tasks.base.Predictor`.

        Raises:
            ConfigError: ``batch_size`` is below 1.
        """
        check_at_least_one(batch_size=batch_size)
        return Predictor(
            model=self.model,
            tokenizer=self.tokenizer,
            collate=self.collate,
            max_length=self.recipe.data.max_length,
            truncation=self.recipe.data.truncation,
            label_names=self.label_names or (),
            precision=self.precision,
            batch_size=self.recipe.training.eval_batch_size if batch_size is None else batch_size,
            bins=self.recipe.evaluation.bins,
            posterior=sampler,
            progress=progress,
            calibrators=calibrators or {},
            scale=self.scale,
            looks=looks,
        )

    def precision(self) -> AbstractContextManager[Any]:
        """Matmuls in the precision the run was trained with."""
        name = self.recipe.training.precision
        if name == "fp32":
            return nullcontext()
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16 if name == "bf16" else torch.float16)


def load_run(folder: str | Path, *, base: bool = False, allow_unfinished: bool = False) -> LoadedRun:
    """Load a run's model with its adapter and posterior.

    Args:
        folder: made by ``monteclora train``.
        base: load the pretrained model without the adapter, a causal LM's "before".
        allow_unfinished: take the newest complete checkpoint of a run that did not finish, and is no ensemble.

    Raises:
        CheckpointError: not a run, an unfinished one, or its adapter or posterior is missing, damaged or does not fit.
        ConfigError: the model is missing, or ``base`` is asked of a classifier, whose head only training makes.
        UnsafeCodeError: the adapter is a pickle, or the model needs code that comes with it.
    """
    with quiet_libraries():
        return _load(RunFolder.existing(folder), base, allow_unfinished)


def combined(loaded: Sequence[LoadedRun]) -> LoadedRun:
    """Runs that predict the same thing as one model that holds all of them; otherwise it is the first of them."""
    model = Members([each.model for each in loaded]).eval()
    return replace(loaded[0], model=model, members=tuple(each.folder for each in loaded))


def _load(run: RunFolder, base: bool, allow_unfinished: bool) -> LoadedRun:
    recipe = run.recipe
    if recipe.ensemble > 1:
        check_finished(run)
        members = run.members[:1] if base else run.members
        loaded = [_load(member, base, False) for member in members]
        return replace(loaded[0] if base else combined(loaded), folder=run.path, recipe=recipe)
    adapter, unfinished = _adapter_of(run, allow_unfinished)
    data = data_facts(run)
    kind, labels = data.kind, data.label_names
    if base and not KINDS[kind].has_pretrained_head:
        raise ConfigError(
            f"{run.path} trained a head of {kind}, and the pretrained model has no head for its labels",
            "Ask for the base model of a causal LM run only.",
        )
    tokenizer = tokenizer_of(recipe)
    model: nn.Module
    if base:
        model = base_model(recipe, kind, labels, tokenizer)
    elif run.is_adapter or _was_given_a_posterior(recipe, adapter):
        model = with_adapter(base_model(recipe, kind, labels, tokenizer), adapter)
    else:  # as training had it, which draws again what neither the model's files nor the saved ones hold
        model = prepare_model(recipe, kind, labels, tokenizer)
        get_method(recipe.method.name).load(model, adapter)
    if recipe.model.quantization == "none":
        model.to(training_device())
    trained = () if base else tuple(name for name, each in model.named_parameters() if each.requires_grad)
    model.requires_grad_(False).eval()
    return LoadedRun(
        run.path,
        recipe,
        kind,
        labels,
        model,
        tokenizer,
        unfinished,
        base,
        data.columns,
        scale=data.scale,
        trained=trained,
    )


def _was_given_a_posterior(recipe: Recipe, adapter: Path) -> bool:
    """Whether an adapter has a posterior that its method did not make, or that was trained on one from elsewhere."""
    started = recipe.training.post_hoc.adapter is not None
    return (started or not get_method(recipe.method.name).has_posterior) and (adapter / POSTERIOR_FILE).is_file()


def with_adapter(model: PreTrainedModel, adapter: Path) -> nn.Module:
    """The base model with what the files of a LoRA adapter say, whatever made them; with its posterior if it has one.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the model.
        UnsafeCodeError: the weights are a pickle.
    """
    if (adapter / POSTERIOR_FILE).is_file():
        return from_pretrained(model, adapter)
    from peft import PeftModel

    check_adapter(adapter)
    check_head(adapter / WEIGHTS_FILE, model)
    with adapter_errors(adapter):
        loaded: nn.Module = PeftModel.from_pretrained(model, str(adapter))
    return loaded


def check_finished(run: RunFolder) -> None:
    """Raises CheckpointError for a run that did not finish."""
    _adapter_of(run, allow_unfinished=False)


def _adapter_of(run: RunFolder, allow_unfinished: bool) -> tuple[Path, str | None]:
    """The folder of the adapter to load, and how far the run came if it is not finished."""
    if _is_finished(run):
        return run.adapter, None
    again = f"Run `monteclora train {quote(str(run.recipe_file))}` to finish it"
    if run.recipe.ensemble > 1:
        raise CheckpointError(f"the ensemble {run.path} is not finished", f"{again}.")
    if not allow_unfinished:
        raise CheckpointError(f"the run {run.path} is not finished", f"{again}, or allow unfinished runs.")
    checkpoint = newest_complete(run.checkpoints)
    if checkpoint is None:
        raise CheckpointError(f"the unfinished run {run.path} has no checkpoint yet", f"{again}.")
    return checkpoint.path, f"stopped at step {checkpoint.total_step}"


def _is_finished(run: RunFolder) -> bool:
    try:
        return run.finished is not None
    except (UnicodeDecodeError, LookupError, TypeError) as error:
        raise CheckpointError(f"{run.metrics.path} is damaged ({type(error).__name__})", _RESTORE) from None
