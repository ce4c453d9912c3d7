"""The Laplace approximation of a run: fitted to its training rows when it is first asked for, and stored with it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch

from monteclora.data.encoding import encode
from monteclora.errors import ConfigError
from monteclora.evaluation.own_rows import FIT_SPLIT, halves, own_rows
from monteclora.methods import get_method
from monteclora.prediction.laplace import LAPLACE, LAPLACE_FILE, LaplacePosterior, attach
from monteclora.prediction.laplace_fit import check_installed, fit_laplace
from monteclora.prediction.laplace_marginals import logit_moments
from monteclora.runs.calibration import weights_sha256
from monteclora.runs.loading import LoadedRun
from monteclora.runs.run_folder import RunFolder
from monteclora.system.progress import progress_bar
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks.kinds import KINDS

__all__ = ["laplace_of", "prepare_sampler"]

_GAIN = 1e-4  # nats by which the NLL has to be lower for a larger precision
_ROWS = 64  # whose distributions are in memory at once: of many classes and precisions they are large
_DECADES = 8  # that it is at most above the one of the largest marginal likelihood


def prepare_sampler(
    loaded: LoadedRun, name: str | None, num_samples: int | None, *, progress: bool = False
) -> tuple[str, ...]:
    """Fit what the sampler of that name draws from, where it needs that, and attach it to the run's model.

    Args:
        loaded: the run.
        name: of the sampler; None for the run's own, which needs nothing.
        num_samples: draws; see :meth:`LoadedRun.sampler`.
        progress: whether to draw a progress bar on standard error.

    Returns:
        Notes on the fit, in words.

    Raises:
        CheckpointError: what was stored is damaged, or cannot be stored.
        ConfigError: there is no such sampler, or the run cannot be given it.
        DataError: the run's training rows are gone or changed.
    """
    if not loaded.sampler_kind(name, num_samples).needs_fit:
        return ()
    found = laplace_of(loaded, progress=progress)
    attach(loaded.model, found)
    chosen = f"the smallest NLL of {found.chosen_on:,} validation rows" if found.chosen_on else "marginal likelihood"
    return (
        f"Laplace approximation ({found.structure}, prior precision {found.prior_precision:.3g} by {chosen}) "
        f"fitted to {found.rows:,} training rows in {found.seconds:.1f} s",
    )


def laplace_of(loaded: LoadedRun, *, progress: bool = False) -> LaplacePosterior:
    """The run's approximation from its folder, where it was fitted at the weights that the run has now, else a new one.

    Raises as :func:`prepare_sampler`.
    """
    _check(loaded)
    path = loaded.folder / LAPLACE_FILE
    weights = weights_sha256(RunFolder(loaded.folder).adapter)
    if path.exists() and (stored := LaplacePosterior.load(path)) is not None and stored.weights == weights:
        return stored
    check_installed()  # before rows are read
    rows = own_rows(loaded.folder, loaded.recipe.data, "train").split("train")
    encoded: Sequence[dict[str, Any]] = encode(
        rows, loaded.kind, loaded.tokenizer, loaded.recipe.data.max_length
    ).dataset.to_list()
    title = f"{loaded.recipe.name}: Laplace approximation"
    with quiet_libraries(), loaded.precision(), progress_bar(title, len(encoded), progress) as advance:
        found = fit_laplace(
            loaded.model,
            loaded.trained,
            encoded,
            loaded.collate,
            classes=len(loaded.label_names or ()),
            batch_size=loaded.recipe.training.eval_batch_size,
            progress=advance,
        )
    found = dataclasses.replace(_by_validation(loaded, found), weights=weights)
    found.save(path)
    return found


def _by_validation(loaded: LoadedRun, fitted: LaplacePosterior) -> LaplacePosterior:
    """With the prior precision that predicts best, on the half of the validation rows that also fits posterior scales.

    From the precision of the largest marginal likelihood upwards, in steps of the square root of ten, it is the first
    whose NLL is the least or hardly above it. With fewer than four validation rows the marginal likelihood's stays.
    """
    data = own_rows(loaded.folder, loaded.recipe.data, FIT_SPLIT)
    rows = data.splits.get(FIT_SPLIT)
    if rows is None or len(rows) < 4:
        return fitted
    started = time.perf_counter()
    fit, _ = halves(rows, data.name)
    encoded: list[dict[str, Any]] = encode(
        fit, loaded.kind, loaded.tokenizer, loaded.recipe.data.max_length
    ).dataset.to_list()
    precisions = [fitted.prior_precision * 10 ** (step / 2) for step in range(2 * _DECADES + 1)]
    parts = []
    with quiet_libraries(), loaded.precision():
        for first in range(0, len(encoded), _ROWS):
            some = encoded[first : first + _ROWS]
            moments = logit_moments(loaded.model, fitted, some, loaded.collate, precisions)
            parts.append(moments.nll(torch.tensor([row["labels"] for row in some])))
    nlls = torch.cat(parts, 1).mean(1).tolist()
    chosen = next(precision for precision, nll in zip(precisions, nlls, strict=True) if nll <= min(nlls) + _GAIN)
    seconds = fitted.seconds + time.perf_counter() - started
    return dataclasses.replace(fitted, prior_precision=chosen, chosen_on=len(fit), seconds=seconds)


def _check(loaded: LoadedRun) -> None:
    """Raises ConfigError for a run that cannot be given a Laplace approximation."""
    recipe = loaded.recipe
    if loaded.members or loaded.is_base or loaded.unfinished:
        what = "an ensemble" if loaded.members else "an unfinished run" if loaded.unfinished else "the pretrained model"
        raise ConfigError(f"the sampler {LAPLACE} was asked of {what}", "Ask it of a single finished run.")
    if not KINDS[loaded.kind].has_classes:
        raise ConfigError(
            f"the sampler {LAPLACE} is for classifiers, and {loaded.folder} is a run of {loaded.kind}, whose "
            "curvature it does not have",
            "Choose another sampler.",
        )
    if not get_method(recipe.method.name).takes_laplace:
        raise ConfigError(
            f"the sampler {LAPLACE} is for adapters that are a point estimate, and {loaded.folder} was trained with "
            f"the method {recipe.method.name}",
            "Choose another sampler, or train with the method lora.",
        )
    if recipe.model.quantization != "none":
        raise ConfigError(
            f"the sampler {LAPLACE} needs derivatives that quantised layers do not have", "Choose another sampler."
        )
