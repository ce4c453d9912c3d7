"""How well a run predicts a split of its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from monteclora.config.checks import check_at_least_one
from monteclora.errors import ConfigError
from monteclora.evaluation.asked_rows import AskedRows, asked_rows
from monteclora.evaluation.calibration_errors import calibration_errors
from monteclora.evaluation.calibrators import fitted_calibrators
from monteclora.evaluation.corrupted import check_corruptible, corrupted_count, under_corruption
from monteclora.evaluation.error_detection import error_detection
from monteclora.evaluation.laplace import prepare_sampler
from monteclora.evaluation.own_rows import FIT_SPLIT
from monteclora.evaluation.result import EvaluationResult
from monteclora.evaluation.shift import Outside, Shift, outside_rows
from monteclora.prediction.calibrator import Calibrator
from monteclora.prediction.cost import Meter, Metered, metered
from monteclora.prediction.ensemble import ENSEMBLE
from monteclora.prediction.registry import NO_CALIBRATOR, check_calibrator
from monteclora.prediction.sampler import MEAN, Sampler
from monteclora.runs.determining import recipe_sha256
from monteclora.runs.ensemble import Runs, load_runs
from monteclora.runs.loading import LoadedRun
from monteclora.runs.records import add_evaluation, add_predictions
from monteclora.system.progress import progress_bar
from monteclora.system.quiet import quiet_libraries
from monteclora.tasks.base import Predictor, Scored
from monteclora.tasks.kinds import KINDS

if TYPE_CHECKING:
    pass

__all__ = ["evaluate", "evaluate_loaded", "keep_facts"]


def evaluate(
    run: Runs,
    split: str | None = None,
    *,
    task: str | None = None,
    sampler: str | None = None,
    calibrator: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    layers: int | None = None,
    base: bool = False,
    rows: int | None = None,
    batch_size: int | None = None,
    allow_unfinished: bool = False,
    ood: str | Path | None = None,
    shift: bool = False,
    progress: bool = True,
) -> EvaluationResult:
    """Predict a split of a run's data, measure the predictions, and keep both in the run folder.

    Classification is measured by accuracy, F1, MCC, NLL, Brier score and ECE. Of a causal LM whose rows have answer
    options, each option's likelihood is normalised over the options and measured by accuracy, NLL, Brier score and
    ECE; without options, completions are measured by NLL per token, perplexity and token accuracy. Scores are measured
    by RMSE, MAE, R², Spearman's correlation, Gaussian NLL and the coverage of the 90 % interval; several labels of a
    row by subset accuracy, micro and macro F1, and NLL, Brier score and ECE of their decisions. All are taken at the
    posterior's mean and, with draws, of the mean over draws, whichever sampler makes them.

    Args:
        run: a run folder, or what ``train`` gave; several for the sampler ``ensemble``, which writes to the first. One
            that is an ensemble (recipe field ``ensemble``) predicts as one by default.
        split: ``train``, ``validation`` or ``test``; by default test where it has labels, else validation.
        task: other rows than the run's: a data file with its columns and labels, or another task with a name, of the
            same kind; records then have it before the split, as in ``new.csv:test`` and ``piqa:validation``.
        sampler: of the draws, by name (:mod:`monteclora.prediction.registry`); by default ``posterior`` for a method
            that has one, else ``mean``.
        calibrator: ``temperature`` or ``none``, the default; fitted to the validation rows and stored with the run.
        num_samples: draws; by default the recipe's number, 0 for the mean alone.
        seed: the stream of draws.
        layers: of the posterior's draws: the last adapted blocks that have noise; by default those that its scale was
            calibrated with, else the recipe's number, else all.
        base: evaluate the pretrained model without the adapter (causal LM only).
        rows: at most this many rows, chosen by their content: the same ones for every run.
        batch_size: sequences per forward pass; by default the recipe's ``training.eval_batch_size``.
        allow_unfinished: take the last checkpoint of a run that did not finish, and say so in the result.
        ood: a file of rows unlike the training data, for a classifier: how well scores distinguish them from the
            split's rows.
        shift: also measure the same rows corrupted (typos, words dropped, texts cut, upper case, three strengths each),
            of a run whose rows are texts with labels or scores.
        progress: whether to draw a progress bar on standard error.

    Raises:
        CheckpointError: not a run, an unfinished one, or its adapter is damaged.
        ConfigError: an argument does not fit the run.
        DataError: the split is missing or wrong.
    """
    if ood is not None and sampler == ENSEMBLE:
        raise ConfigError(f"ood does not go with the sampler {ENSEMBLE}", "Leave it out.")
    loaded = load_runs(run, sampler, num_samples, base=base, allow_unfinished=allow_unfinished)
    return evaluate_loaded(
        loaded,
        split,
        task=task,
        sampler=sampler,
        calibrator=calibrator,
        num_samples=num_samples,
        seed=seed,
        layers=layers,
        rows=rows,
        batch_size=batch_size,
        ood=ood,
        shift=shift,
        progress=progress,
    )


def evaluate_loaded(
    loaded: LoadedRun,
    split: str | None = None,
    *,
    task: str | None = None,
    sampler: str | None = None,
    calibrator: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    layers: int | None = None,
    rows: int | None = None,
    batch_size: int | None = None,
    ood: str | Path | None = None,
    shift: bool = False,
    keep: bool = True,
    progress: bool = True,
) -> EvaluationResult:
    """As :func:`evaluate`, with a run that is loaded already; without ``keep`` its folder stays as it is."""
    check_at_least_one(rows=rows)
    prepared = prepare_sampler(loaded, sampler, num_samples, progress=progress)
    drawn = loaded.sampler(sampler, num_samples, seed, layers)
    check_calibrator(calibrator or NO_CALIBRATOR)
    outside = outside_rows(loaded, ood)
    if shift:
        check_corruptible(loaded)
    asked = asked_rows(loaded, split, task, rows)
    calibrators, fitted = _correctors(loaded, calibrator, drawn, seed, batch_size, asked.own)
    scored, meter = _scored(loaded, asked, drawn, calibrators, batch_size, progress=progress)
    found = _result(loaded, asked, drawn, scored, meter, (*prepared, *fitted), calibrator, seed)
    if keep:
        _keep(loaded, found)
    if outside is None and not shift:
        return found
    # what follows takes long, and what was measured is on disk by now
    found = _further(loaded, found, asked.own, loaded.predictor(drawn, batch_size, None, calibrators), outside)
    if shift:
        found = _corrupted(loaded, found, loaded.predictor(drawn, batch_size, None, calibrators), progress=progress)
    if keep:
        keep_facts(loaded, found)
    return found


def _result(
    loaded: LoadedRun,
    asked: AskedRows,
    drawn: Sampler | None,
    scored: Scored,
    meter: Meter,
    notes: tuple[str, ...],
    calibrator: str | None,
    seed: int,
) -> EvaluationResult:
    """What the predictions of the split tell."""
    kind = KINDS[loaded.kind]
    return EvaluationResult(
        folder=loaded.folder,
        kind=loaded.kind,
        split=asked.name,
        source=asked.source,
        model="base" if loaded.is_base else "adapter",
        sampler=drawn.name if drawn else MEAN.name,
        calibrator=calibrator or NO_CALIBRATOR,
        num_samples=drawn.num_samples if drawn else 0,
        seed=seed,
        cost=meter.costs(drawn.name if drawn else None),
        scored=scored,
        rows=asked.rows,
        seconds=meter.seconds,
        unfinished=loaded.unfinished,
        notes=(*asked.notes, *notes, *scored.notes),
        shift=Shift.ranked(loaded, scored),
        calibration=calibration_errors(scored, classes=kind.has_classes, bins=loaded.recipe.evaluation.bins),
        members=loaded.members,
        layers=getattr(drawn, "layers", None),
        error_detection=error_detection(scored),
        weights_sha256=None if loaded.is_base else loaded.weights_sha256(),
        split_rows=asked.split_rows,
    )


def _further(
    loaded: LoadedRun, found: EvaluationResult, own: str | None, predictor: Predictor, outside: Outside | None
) -> EvaluationResult:
    """The same with how outside rows are told from those of the split, where there are any."""
    if outside is None:
        return found
    with quiet_libraries():
        shift = Shift.of(loaded, predictor, found.scored, found.rows, own, outside)
    return dataclasses.replace(found, shift=shift, notes=(*found.notes, *shift.notes))


def _corrupted(loaded: LoadedRun, found: EvaluationResult, predictor: Predictor, *, progress: bool) -> EvaluationResult:
    """The same with metrics of its rows under corruption."""
    total = corrupted_count(len(found.rows), len(predictor.samplers))
    with quiet_libraries(), progress_bar(f"{loaded.recipe.name}: corrupted {found.split}", total, progress) as advance:
        told = dataclasses.replace(predictor, progress=advance)
        return dataclasses.replace(found, corrupted=under_corruption(loaded, told, found.rows))


def _correctors(
    loaded: LoadedRun, name: str | None, drawn: Sampler | None, seed: int, batch_size: int | None, own: str | None
) -> tuple[Mapping[str, Calibrator], tuple[str, ...]]:
    """What corrects the probabilities, and what must be known of it; ``own`` is the evaluated split."""
    with quiet_libraries():
        calibrators, fitted = fitted_calibrators(loaded, name, drawn, seed, batch_size)
    if calibrators and own == FIT_SPLIT:
        caution = f"the calibrator {name} was fitted to these rows: its numbers are better than on new ones"
        fitted = (*fitted, caution)
    return calibrators, fitted


def _scored(
    loaded: LoadedRun,
    asked: AskedRows,
    drawn: Sampler | None,
    calibrators: Mapping[str, Calibrator],
    batch_size: int | None,
    *,
    progress: bool,
) -> tuple[Scored, Meter]:
    """The rows predicted and measured, and what that cost."""
    with (
        quiet_libraries(),
        metered(loaded.model) as meter,
        progress_bar(f"{loaded.recipe.name}: {asked.name}", len(asked.rows), progress) as advance,
    ):
        predictor = loaded.predictor(drawn and Metered.of(drawn, meter), batch_size, advance, calibrators)
        scored = KINDS[loaded.kind].score(predictor, asked.rows)
    return scored, meter


def _keep(loaded: LoadedRun, result: EvaluationResult) -> None:
    place = {"split": result.split, "model": result.variant}
    count = result.scored.table.num_rows
    columns = {**{name: pa.array([value] * count) for name, value in place.items()}, "index": pa.array(range(count))}
    table = pa.table({**columns, **{name: result.scored.table[name] for name in result.scored.table.column_names}})
    add_predictions(loaded.folder, table)
    keep_facts(loaded, result)


def keep_facts(loaded: LoadedRun, result: EvaluationResult) -> None:
    """Put all but the rows' predictions into the run folder, in the place of the last evaluation of the same kind."""
    about = {
        "run": loaded.recipe.name,
        "recipe_sha256": recipe_sha256(loaded.recipe),
        "task": loaded.recipe.data.task,
        "base_model": loaded.recipe.model.name,
        "method": loaded.recipe.method.name,
    }
    add_evaluation(loaded.folder, about, split=result.split, model=result.variant, facts=result.facts())
